"""D23: many random faults; `make faults` runs more, and FAULT_SEED repeats a run."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import pytest

from pyinfra_orbstack import interrupts, session, shell
from pyinfra_orbstack.ending import Ending
from pyinfra_orbstack.interrupts import Interrupted

from .conftest import PLACES, Guest, Remote, in_container

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]

STEPS = int(os.environ.get("FAULT_STEPS", "400"))

# Kills one of the processes between a command and us: the control shell, or one of its children.
KILL = (
    shell.text("processes")
    + """
exec 2>/dev/null
orb_from "$1" "$2" process || exit 0
orb_pick=$3
orb_find
set -- $orb_live
[ $# -gt 0 ] || exit 0
shift $((orb_pick % $#))
kill -9 "$1" || :
"""
)


@pytest.fixture
def dice() -> random.Random:
    seed = int(os.environ.get("FAULT_SEED") or 0) or random.randrange(1, 10**6)
    print(f"FAULT_SEED={seed}")
    return random.Random(seed)


@pytest.fixture
def shells(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Finds the control shell that was opened last."""
    opened: list[Ending] = []

    class Noted(Ending):
        def __init__(self, target: Any) -> None:
            super().__init__(target)
            opened.append(self)

    monkeypatch.setattr(session, "Ending", Noted)
    return lambda: opened[-1].shell if opened else None


@pytest.fixture
def ways(machine: str, transport: str) -> Iterator[list[Callable[..., Any]]]:
    """The ways to run a command: in a session, in its own shell, on a terminal."""
    one, other = (Remote(machine, orbstack_transport=way) for way in ("session", "spawn"))
    for remote in (one, other):
        remote.connect()
    yield [one.run, other.run, lambda *words, **how: one.run(*words, _get_pty=True, **how)]
    for remote in (one, other):
        remote.close()


def steps_here(request: pytest.FixtureRequest) -> range:
    return range(STEPS // (100 if in_container(request) else 20))


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("transport", PLACES)
def test_D23_seeded_faults(
    machine: str,
    guest: Guest,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    transport: str,
    dice: random.Random,
) -> None:
    """Streams are cut and clients killed at random; every success is real, nothing runs twice."""
    steps, faults = STEPS, 0.1
    if in_container(request):
        # The same protocol behind a client that starts more slowly.
        steps, faults = max(100, steps // 20), 0.3
    plan: list[tuple[str, int]] = []

    class Faulty(session.Child):
        """A client that is killed, or whose stream is cut, after this many bytes."""

        def __init__(self, argv: Any, **options: Any) -> None:
            self.fault, self.left = plan.pop() if plan else ("", 0)
            super().__init__(argv, **options)

        def spoil(self, length: int) -> int:
            passed = min(length, self.left)
            self.left -= length
            if self.left < 0:
                os.killpg(self.pid, signal.SIGKILL)
            return passed

        def read(self, timeout: float | None = None) -> tuple[int, bytes]:
            stream, data = super().read(timeout)
            if (self.fault, stream) in (("stdout", 1), ("stderr", 2)) and self.left >= 0:
                data = data[: self.spoil(len(data))]
            elif self.left < 0:
                data = b""
            return stream, data

        def write(self, data: bytes) -> None:
            if self.fault == "stdin" and self.left >= 0:
                data = data[: self.spoil(len(data))]
            super().write(data)

    monkeypatch.setattr(session, "Child", Faulty)
    guest.sh("rm -f /tmp/steps; touch /tmp/steps; chmod 666 /tmp/steps")
    remotes = [Remote(machine, orbstack_transport=way) for way in ("session", "spawn")]
    for remote in remotes:
        remote.connect()
    succeeded: set[int] = set()
    unknown: set[int] = set()
    for step in range(steps):
        remote = remotes[dice.random() < 0.05]
        stdin = b"x" * dice.choice([0, 0, 10, 5000])
        if dice.random() < faults:
            if remote is remotes[0] and remote.host.connector.runner.session is not None:
                if dice.random() < 0.5:
                    remote.drop_session()
                else:
                    connection = remote.host.connector.runner.session.connection
                    if connection is not None:
                        child = connection.child
                        child.fault = dice.choice(["stdin", "stdout", "stderr"])
                        child.left = dice.randrange(600)
            plan[:] = [(dice.choice(["stdin", "stdout", "stderr"]), dice.randrange(3000))]
        try:
            ran = remote.run(f"echo {step} >>/tmp/steps; cat; echo {step}", _stdin=stdin)
        except OSError:
            unknown.add(step)
        else:
            assert ran.ok
            assert ran.out[-1].endswith(str(step))
            succeeded.add(step)
        plan.clear()
    for remote in remotes:
        remote.close()
    ran_steps = [int(line) for line in guest.sh("cat /tmp/steps").split()]
    assert len(ran_steps) == len(set(ran_steps)), "something ran twice"
    assert succeeded <= set(ran_steps), "a false success"
    assert unknown, "no fault was ever seen"
    assert len(succeeded) > steps / 2


@pytest.mark.parametrize("transport", PLACES)
def test_D23_helpers_that_are_killed(
    guest: Guest,
    ways: list[Callable[..., Any]],
    shells: Callable[[], Any],
    dice: random.Random,
    request: pytest.FixtureRequest,
    transport: str,
) -> None:
    """Whichever process is killed: a success means one run, with all its output."""
    guest.sh("rm -f /tmp/steps; touch /tmp/steps; chmod 666 /tmp/steps")
    succeeded: set[int] = set()
    for step in steps_here(request):

        def kill() -> None:
            if (found := shells()) is not None:
                words = (str(found.pid), str(found.started), str(dice.randrange(100)))
                guest.sh(KILL, *words)

        killer = gevent.spawn_later(dice.uniform(0, 0.3), kill)
        # The command's own children are killed, too, and then it fails.
        text = (
            f"set -e; echo {step} >>/tmp/steps; seq 5000; sleep 0.{dice.randrange(3)}; echo {step}"
        )
        with contextlib.suppress(OSError):
            ran = dice.choice(ways)(text)
            if ran.ok:
                succeeded.add(step)
                lines = [line.strip() for line in ran.out]
                assert lines == [*map(str, range(1, 5001)), str(step)]
        killer.join()
    ran_steps = [int(line) for line in guest.sh("cat /tmp/steps").split()]
    assert len(ran_steps) == len(set(ran_steps)), "something ran twice"
    assert succeeded <= set(ran_steps), "a false success"


@pytest.mark.parametrize("transport", PLACES)
def test_D23_second_interrupts(
    guest: Guest,
    ways: list[Callable[..., Any]],
    dice: random.Random,
    request: pytest.FixtureRequest,
    transport: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C, and again within 60 ms: no command keeps running."""
    # pytest's handler is next in the chain.
    monkeypatch.setattr(interrupts, "_previous", lambda number, frame: None)
    for step in steps_here(request):
        job = gevent.spawn(dice.choice(ways), f"sleep 98{step:04d}")
        gevent.sleep(dice.uniform(0, 0.3))
        for _ in range(dice.choice([2, 2, 3])):
            interrupts.handle(signal.SIGINT, None)
            gevent.sleep(dice.uniform(0, 0.06))
        with pytest.raises(Interrupted):
            job.get(timeout=60)
    guest.wait_for("sleep 98", there=False)
    assert [way("echo on").out[0].strip() for way in ways] == ["on"] * 3
