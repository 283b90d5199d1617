"""A run of `make` leaves nothing behind; a later run finds what a killed one left."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .checkout import Checkout, child_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what is left is seen in /proc")

INT, TERM, HUP, KILL = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Checkout]:
    made = Checkout(tmp_path)
    yield made
    made.end()


def send(number: int, whom: str, make: int) -> None:
    if whom == "group":
        os.killpg(make, number)
    else:
        os.kill(make if whom == "make" else child_of(make), number)


@pytest.mark.parametrize(
    ("number", "whom", "env"),
    [
        (TERM, "make", {"PYTEST_XDIST_AUTO_NUM_WORKERS": "2"}),
        (INT, "make", {}),
        (HUP, "make", {}),
        (KILL, "make", {}),
        (TERM, "nox", {}),
        (TERM, "group", {"PYTEST_XDIST_AUTO_NUM_WORKERS": "2", "WITH_CONTAINER": "1"}),
        (INT, "group", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "name", ""),
)
def test_a_terminated_run_leaves_nothing(
    checkout: Checkout, number: int, whom: str, env: dict[str, str]
) -> None:
    make = checkout.test(**env)
    send(number, whom, make.pid)
    assert make.wait(600) != 0
    # A killed make does not wait.
    checkout.wait_for(lambda: not list(checkout.processes()))
    assert checkout.left() == []


def test_sigterm_to_ci_reaches_its_target(checkout: Checkout) -> None:
    running = checkout.ci()
    running.terminate()
    assert running.wait(600) == 130
    assert "KeyboardInterrupt" in checkout.log.read_text()
    assert checkout.left() == []


@pytest.mark.parametrize("seconds", [0.5, 2])
def test_a_run_terminated_at_its_start_leaves_nothing(checkout: Checkout, seconds: float) -> None:
    """While `make` starts, pytest collects tests, or a machine is created."""
    make = checkout.start("test")
    time.sleep(seconds)
    os.killpg(make.pid, TERM)
    assert make.wait(600) != 0
    assert checkout.left() == []


@pytest.mark.parametrize(
    ("whom", "target"), [("nox", "clean"), ("group", "clean"), ("group", "contract")]
)
def test_leftovers_of_a_killed_run_are_removed_later(
    checkout: Checkout, whom: str, target: str
) -> None:
    """By `make clean`, and by the next run of any target, here without tests."""
    make = checkout.test(WITH_CONTAINER="1")
    send(KILL, whom, make.pid)
    make.wait(600)
    if whom == "nox":
        # The tests get the signal, and exit.
        checkout.wait_for(lambda: not list(checkout.processes()))
    assert checkout.left() != []
    checkout.make(target)
    assert "removing what a killed run left in" in checkout.log.read_text()
    assert checkout.left() == []
    assert (checkout.path / ".cache").exists() == (target != "clean")


def test_machines_of_others_are_not_removed(checkout: Checkout, tmp_path: Path) -> None:
    """A note is a file with text, which names temporary files or nothing."""
    runs = checkout.path / ".cache" / "runs"
    runs.mkdir()
    mine = tmp_path / "mine"
    mine.mkdir()
    for number, text in enumerate(["", "/", str(mine), "orb-", f"{mine}/../mine", "/no/orb-x"]):
        (runs / str(number)).write_text(text)
    checkout.make("contract")
    assert mine.exists()
    assert checkout.left() == []


def test_a_running_run_is_left_alone(checkout: Checkout) -> None:
    make = checkout.test()
    before = sorted(checkout.left())
    assert checkout.make("clean") != 0
    assert "a run goes on" in checkout.log.read_text()
    checkout.make("contract")
    assert sorted(checkout.left()) == before
    send(TERM, "make", make.pid)
    make.wait(600)
    assert checkout.left() == []


@pytest.mark.skipif(not importlib.util.find_spec("coverage"), reason="needs coverage.py")
@pytest.mark.parametrize(("number", "target"), [(TERM, ""), (KILL, "contract")])
def test_an_interrupted_measurement_removes_its_hook(
    checkout: Checkout, number: int, target: str
) -> None:
    make = checkout.test("coverage")
    hook = Path((checkout.path / ".cache" / "coverage" / "hook").read_text())
    assert hook.exists()
    try:
        send(number, "group", make.pid)
        make.wait(600)
        if target:
            assert hook.exists()
            checkout.make(target)
        assert not hook.exists()
        assert checkout.left() == []
    finally:
        hook.unlink(missing_ok=True)
