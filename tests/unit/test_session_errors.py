"""ShellSession shells that do not answer as they should."""

from __future__ import annotations

import os
import signal

import pytest

from pyinfra_orbstack import session
from pyinfra_orbstack.session import NotStarted, ShellSession

from .test_session import Here, Runner


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are waited for less long."""
    monkeypatch.setattr(session, "ANSWER_TIMEOUT", 1.5)


@pytest.mark.parametrize("way", ["session", "spawn"])
def test_client_that_is_not_there(way: str) -> None:
    with pytest.raises(NotStarted, match="cannot run /no/such/client: No such file"):
        Runner(["/no/such/client"], way)("true")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("way", ["session", "spawn"])
def test_shell_that_says_nothing(way: str) -> None:
    with pytest.raises(NotStarted, match="did not answer"):
        Runner(["sh", "-c", "exec sleep 60"], way)("true")


@pytest.mark.usefixtures("quick")
def test_shell_that_stops_answering() -> None:
    """What comes on stderr instead is no answer."""
    runner = Runner(["sh", "-c", '(sleep 1; echo late >&2) & exec sh "$@"', "sh"], "session")
    runner.session.open()
    assert runner.session._child is not None
    os.kill(runner.session._child.pid, signal.SIGSTOP)
    with pytest.raises(NotStarted, match="did not answer within"):
        runner("true")
    runner.session.open()
    assert runner.session._child is not None
    os.kill(runner.session._child.pid, signal.SIGSTOP)
    with pytest.raises(TimeoutError):
        runner("true", seconds=0.3)
    runner.session.close()


def test_shell_that_talks_too_much() -> None:
    flood = f"head -c {session.MOST_STRAY + 1} /dev/zero | tr '\\0' x; exec sh \"$@\""
    with pytest.raises(NotStarted, match="bytes came where an answer was expected"):
        Runner(["sh", "-c", flood, "sh"], "session")("true")


def test_command_that_cannot_be_ended() -> None:
    """The call that should end it is another one, and may fail."""

    class Locked(Here):
        def argv(self, *words: str, user: str | None = None, tty: bool = False) -> list[str]:
            return ["/no/such/client"] if user else super().argv(*words, tty=tty)

    runner = Runner(["sh"], "session")
    runner.session = ShellSession(Locked(["sh"]))
    with pytest.raises(OSError, match=r"may still run: .*No such file"):
        runner("sleep 3", seconds=0.5)


def test_terminal_that_ends_before_the_command() -> None:
    control = ShellSession(Here(["sh", "-c", "echo no terminal today", "sh"]))
    with pytest.raises(
        session.OutcomeUnknown, match=r"ended before the command: .*no terminal today"
    ):
        control.terminal("/tmp/none", lambda *_: None, stdin=[])
