"""Every process between a command and us, killed and stopped: a success is complete."""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest

from pyinfra_orbstack.process import STDERR, STDOUT
from pyinfra_orbstack.protocol import OutcomeUnknown
from pyinfra_orbstack.session import ShellSession

from .test_session import LINUX, SHELLS, Here, running

pytestmark = [pytest.mark.long, LINUX]

WAYS = ("session", "session-stdin", "spawn", "terminal")


class Ran:
    """A running command, and its output so far."""

    def __init__(self, session: ShellSession, way: str, text: str, seconds: float = 30) -> None:
        self.session = session
        self.way = way
        self.out = {STDOUT: b"", STDERR: b""}
        how, options = {
            "session": (session.run, {}),
            "session-stdin": (session.run, {"stdin": b"x" * 30_000}),
            "spawn": (session.spawn, {"stdin": [b"x" * 30_000]}),
            "terminal": (session.terminal, {}),
        }[way]
        if way.startswith("session"):
            session.open()
        deadline = time.monotonic() + seconds
        self.job = gevent.spawn(how, text, self._take, deadline=deadline, **options)

    def _take(self, stream: int, data: bytes) -> None:
        self.out[stream] += data

    def wait_for(self, word: bytes) -> None:
        deadline = time.monotonic() + 20
        while word not in self.out[STDOUT]:
            assert time.monotonic() < deadline, self.out
            assert not self.job.ready(), self.job.get()
            gevent.sleep(0.01)

    def status(self) -> int | None:
        """The exit status; None if the outcome is unknown."""
        try:
            return int(self.job.get(timeout=30))
        except OutcomeUnknown:
            return None

    def chain(self) -> list[int]:
        """The control shell, the command, and the shell's other processes.

        The first two keep their places when the process that writes stdin has exited.
        """
        self.wait_for(b"begun")
        shell, command = self.session.ending.shell, self.session.ending.command
        assert shell is not None
        assert command is not None
        own = [command.pid, *descendants(command.pid)]
        return [shell.pid, command.pid, *(x for x in descendants(shell.pid) if x not in own)]


def descendants(pid: int) -> list[int]:
    """All processes below one, in a stable order."""
    found = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


@pytest.fixture(
    params=[
        f"{shell} {way}" for shell in SHELLS for way in WAYS if shell != "perl" or way[:2] == "se"
    ]
)
def start(request: pytest.FixtureRequest) -> Iterator[Callable[..., Ran]]:
    shell, _, way = request.param.partition(" ")
    sessions = []

    def run(text: str, environment: dict[str, str] | None = None, seconds: float = 30) -> Ran:
        target = Here(SHELLS[shell])
        if environment is not None:
            target.environment = lambda: {**os.environ, **environment}  # type: ignore[method-assign]
        sessions.append(ShellSession(target))
        return Ran(sessions[-1], way, text, seconds)

    yield run
    for session in sessions:
        session.close()


def hit(
    start: Callable[..., Ran], text: str, act: Callable[[int], object], **options: Any
) -> list[Ran]:
    """Run a command once for each process of its chain, and act on that process."""
    with until_released(text) as one:
        count = len(start(one).chain())
    assert count > 1
    runs = []
    for place in range(count):
        with until_released(text) as one:
            runs.append(start(one, **options))
            chain = runs[-1].chain()
            # The process that writes its stdin may have exited by now.
            act(chain[min(place, len(chain) - 1)])
    return runs


@contextlib.contextmanager
def until_released(text: str) -> Iterator[str]:
    """A command whose WAIT lasts until the end of the context, so that nothing exits before."""
    with tempfile.TemporaryDirectory() as folder:
        path = shlex.quote(f"{folder}/held")
        Path(folder, "held").touch()
        yield text.replace("WAIT", f"while [ -e {path} ]; do sleep 0.05; done")


TEXT = "echo begun; WAIT; echo late; echo late >&2; exit 3"


def test_any_process_in_the_chain_killed(start: Callable[..., Ran]) -> None:
    runs = hit(start, TEXT, lambda pid: os.kill(pid, signal.SIGKILL))
    statuses = [ran.status() for ran in runs]
    # The command's own process reports its signal; without the others, the outcome is unknown.
    assert set(statuses) <= {None, 3, 128 + signal.SIGKILL}
    assert 128 + signal.SIGKILL in statuses
    assert None in statuses
    for ran, status in zip(runs, statuses):
        if status == 3:
            assert b"".join(ran.out.values()).split() == [b"begun", b"late", b"late"]


def test_a_stopped_process_is_waited_for(start: Callable[..., Ran]) -> None:
    def pause(pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        gevent.spawn_later(1, os.kill, pid, signal.SIGCONT)

    for ran in hit(start, TEXT, pause):
        assert ran.status() == 3
        assert b"".join(ran.out.values()).split() == [b"begun", b"late", b"late"]


def test_a_process_that_stays_stopped_is_killed_by_the_timeout(start: Callable[..., Ran]) -> None:
    mark = f"66{os.getpid()}"
    text = f"echo begun; sleep {mark}"
    for ran in hit(start, text, lambda pid: os.kill(pid, signal.SIGSTOP), seconds=3):
        with pytest.raises(TimeoutError):
            ran.job.get(timeout=30)
    assert len(running(mark)) == 1  # only the run that counts the processes


def copiers(ran: Ran) -> list[int]:
    """Only the processes that copy the output of a command: two called cat."""
    found = []
    for pid in ran.chain():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if words[0].endswith(b"cat"):
                found.append(pid)
    return found


def test_copiers_killed_while_only_background_processes_print(
    start: Callable[..., Ran],
) -> None:
    with until_released("echo begun; WAIT") as text:
        if not copiers(start(text)):
            pytest.skip("a terminal is not copied")
    for place in (0, 1):
        with until_released("(WAIT; echo later; echo later >&2) & echo begun") as text:
            ran = start(text)
            ran.wait_for(b"begun")
            gevent.sleep(0.2)
            os.kill(copiers(ran)[place], signal.SIGKILL)
        assert ran.status() is None


CATS = {
    "missing": None,
    "that does nothing": "exit 0",
    "that copies a part": "exec head -c 9",
    "that copies a line": "IFS= read -r line; printf '%s\\n' \"$line\"",
    "that fails in the end": '"$REAL"; exit 1',
    "that is killed in the end": '"$REAL"; kill -9 $$',
}


@pytest.mark.parametrize("kind", CATS)
def test_a_cat(start: Callable[..., Ran], tmp_path: Path, kind: str) -> None:
    for name in ("sh", "setsid", "stty", "sleep", "head", "printf", "env"):
        found = shutil.which(name)
        assert found
        (tmp_path / name).symlink_to(found)
    if CATS[kind] is not None:
        (tmp_path / "cat").write_text(f"#!/bin/sh\n{CATS[kind]}\n")
        (tmp_path / "cat").chmod(0o755)
    ran = start(
        "env printf 'begun\\nand more\\n'; echo more >&2",
        {"PATH": str(tmp_path), "REAL": shutil.which("cat") or ""},
    )
    status = ran.status()
    # A terminal is not copied, and in some busyboxes cat is a builtin.
    assert status in (None, 0)
    if status == 0:
        assert b"".join(ran.out.values()).split() == [b"begun", b"and", b"more", b"more"]


SPY = """
for d in /proc/[0-9]*; do
tr '\\0' ' ' <$d/cmdline; tr '\\0' ' ' <$d/environ; echo 7; done 2>/dev/null
echo THE-END; exit 5
"""


def test_no_process_shows_a_token(
    start: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does any environment on this host."""
    tokens = []
    real = secrets.token_hex

    def remember(size: int) -> str:
        tokens.append(real(size))
        return tokens[-1]

    monkeypatch.setattr(secrets, "token_hex", remember)
    ran = start(SPY)
    assert ran.status() == 5
    seen = b"".join(ran.out.values())
    assert b"THE-END" in seen
    assert b"orb_exec" in seen or b"dash" in seen or b"sh" in seen
    exchange = [token for token in tokens if token.encode() in seen]
    # The token of a prompt does, but it is meaningless once the command runs.
    assert len(exchange) <= (1 if ran.way == "terminal" else 0)
