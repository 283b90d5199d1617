"""Control shells that do not answer as they should."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from pyinfra_orbstack import protocol, session
from pyinfra_orbstack.session import NotStarted, ShellSession

from .test_session import LINUX, Here, Runner, running

pytestmark = LINUX


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter timeouts for answers."""
    monkeypatch.setattr(session, "ANSWER_TIMEOUT", 1.5)


@pytest.mark.parametrize("way", ["session", "spawn"])
def test_client_is_missing(way: str) -> None:
    with pytest.raises(NotStarted, match="cannot run /no/such/client: No such file"):
        Runner(["/no/such/client"], way)("true")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("way", ["session", "spawn"])
def test_silent_shell(way: str) -> None:
    with pytest.raises(NotStarted, match="did not answer"):
        Runner(["sh", "-c", "exec sleep 60"], way)("true")


@pytest.mark.long
@pytest.mark.usefixtures("quick")
def test_shell_that_stops_answering() -> None:
    """Output on stderr is not an answer."""
    runner = Runner(["sh", "-c", '(sleep 1; echo late >&2) & exec sh "$@"', "sh"], "session")
    runner.session.open()
    assert runner.session.connection is not None
    os.kill(runner.session.connection.child.pid, signal.SIGSTOP)
    with pytest.raises(NotStarted, match="did not answer within"):
        runner("true")
    runner.session.open()
    assert runner.session.connection is not None
    os.kill(runner.session.connection.child.pid, signal.SIGSTOP)
    with pytest.raises(TimeoutError):
        runner("true", seconds=0.3)
    runner.session.close()


def test_shell_that_prints_too_much() -> None:
    flood = f"head -c {session.MOST_STRAY + 1} /dev/zero | tr '\\0' x; exec sh \"$@\""
    with pytest.raises(NotStarted, match="bytes arrived instead of an answer"):
        Runner(["sh", "-c", flood, "sh"], "session")("true")


def test_command_that_cannot_be_killed() -> None:
    """The call that should kill it is separate, and may fail."""

    class Locked(Here):
        def argv(self, *words: str, user: str | None = None, tty: bool = False) -> list[str]:
            return ["/no/such/client"] if user else super().argv(*words, tty=tty)

    runner = Runner(["sh"], "session")
    runner.session = ShellSession(Locked(["sh"]))
    runner.session.open()
    with pytest.raises(OSError, match=r"may still be running, .*No such file"):
        runner("sleep 8", seconds=2)


def test_terminal_that_ends_before_the_command() -> None:
    session = ShellSession(Here(["sh", "-c", "echo no terminal today", "sh"]))
    with pytest.raises(NotStarted, match=r"could not start a shell: .*no terminal today"):
        session.terminal("true", lambda *_: None)


def test_terminal_that_loses_what_is_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = protocol.typed
    monkeypatch.setattr(protocol, "typed", lambda script: real(script).replace(b"\\141", b"", 1))
    control = ShellSession(Here(["sh"]))
    with pytest.raises(NotStarted, match="could not start a shell"):
        control.terminal("echo a", lambda *_: None)


@pytest.mark.long
@pytest.mark.parametrize("way", ["session", "spawn", "terminal"])
@pytest.mark.parametrize("delay", ["sleep 4", "sleep 0.2; stty -echo; sleep 4"])
def test_timeout_before_the_command_begins(tmp_path: Path, way: str, delay: str) -> None:
    """It runs neither then nor later."""
    slow = ["sh", "-c", f'{delay} 2>/dev/null; exec sh "$@"', "sh"]
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        Runner(slow, way)(f"echo >{tmp_path / 'ran'}", seconds=0.4)
    assert time.monotonic() - began < 4
    time.sleep(4.5)
    assert not (tmp_path / "ran").exists()


@pytest.mark.long
@pytest.mark.parametrize("way", ["session", "spawn", "terminal"])
def test_timeout_at_every_moment(way: str) -> None:
    """Whenever it comes, a started command is killed, and another one does not start."""
    mark = f"55{os.getpid()}"
    for step in range(25):
        with pytest.raises(TimeoutError):
            Runner(["sh"], way)(f"exec sleep {mark}", seconds=step / 200)
    time.sleep(0.3)
    assert running(mark) == []


@pytest.mark.long
@pytest.mark.parametrize("way", ["session", "spawn", "terminal"])
def test_timeout_of_a_command_that_keeps_forking(way: str, tmp_path: Path) -> None:
    """It is stopped at once. Only its parent leads to a child, which has a session of its own."""
    mark, forks = f"20.{os.getpid()}", tmp_path / "forks"
    text = f"for i in $(seq 3000); do echo >>{forks}; setsid sleep {mark} & done; sleep {mark}"
    for seconds in (0.1, 0.4, 1.6, 6.4):
        with pytest.raises(TimeoutError):
            Runner(["sh"], way)(text, seconds=seconds)
        assert running(mark) == []
        if forks.exists():  # the command had begun
            break
    assert len(forks.read_text()) < 3000


@pytest.mark.parametrize("way", ["session", "spawn", "terminal"])
@pytest.mark.parametrize(
    ("text", "reason"), [("echo \ud800", "not a character"), ("echo \0", "NUL byte")]
)
def test_texts_that_cannot_be_sent(way: str, text: str, reason: str) -> None:
    with pytest.raises(OSError, match=reason):
        Runner(["sh"], way)(text)


@pytest.mark.long
def test_too_many_open_files() -> None:
    """One error, without a retry, which would not help. A running command is still killed."""
    code = """
        import resource
        from pyinfra_orbstack.session import NotStarted, ShellSession
        from tests.unit.test_session import Here, running

        session = ShellSession(Here(["sh"]))
        session.open()
        mark = f"54{os.getpid()}"
        job = gevent.spawn(session.run, f"sleep {mark}", print, deadline=time.monotonic() + 1)
        gevent.sleep(0.5)
        files = []
        try:
            while True:
                files.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            pass
        for how in ("open", "spawn", "terminal"):
            try:
                getattr(ShellSession(Here(["sh"])), how)(*["true", print][: 2 * (how != "open")])
            except NotStarted:
                print("not started")
            except OSError as error:
                print(error)
        job.join()
        print(type(job.exception).__name__)
        [os.close(file) for file in files]
        print(running(mark))
    """
    command = ["sh", "-c", 'ulimit -n 64; exec "$@"', "sh", sys.executable, "-c"]
    imports = "import os, time, gevent\n"
    done = subprocess.run(
        [*command, imports + textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    line = "too many open files: raise the limit (ulimit -n) or use fewer hosts\n"
    assert done.stdout == 3 * line + "TimeoutError\n[]\n", done.stderr
