"""Where commands run: what is a destination, what every login shell understands, what ssh says."""

from __future__ import annotations

import doctest
import errno
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import gevent
import pytest

from pyinfra_orbstack import launch, places, session, shelltext
from pyinfra_orbstack.answers import BadValue
from pyinfra_orbstack.places import HERE, Mac, Place, for_any_shell, place_of
from pyinfra_orbstack.protocol import NotStarted, OutcomeUnknown

from .test_session import SHELLS, Runner

#: Every byte that a command line can contain.
BYTES = "".join(map(chr, range(1, 128))) + "ü🦀'\"$HOME `id` !! %s \\n\\"
LOGIN_SHELLS = {
    name: found
    for name in ("sh", "dash", "bash", "ksh", "zsh", "fish", "csh", "tcsh")
    if (found := shutil.which(name))
}


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(places).failed == 0


# Destinations


@pytest.mark.parametrize(
    "value",
    ["mac", "me@mac.local", "ssh://me@mac:22", "me@192.0.2.1", "me@[::1]", "me@fe80::1%en0"],
)
def test_destinations(value: str) -> None:
    assert places.check_destination("key", value) == value


@pytest.mark.parametrize(
    "value",
    [
        *("", None, 7, ["mac"], "-oProxyCommand=id", "me@-oProxyCommand=id", "ssh://-oX", "a b"),
        *("a\tb", "a\nb", "a;id", "$(id)@mac", "`id`", "me@mac'", 'me@"mac', "me@mac\\", "a|b"),
    ],
)
def test_what_is_not_a_destination(value: object) -> None:
    with pytest.raises(BadValue, match="key "):
        places.check_destination("key", value)


def test_data_precedes_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(places.SSH_VARIABLE, raising=False)
    assert place_of() is HERE
    assert place_of("me@mac") is place_of("me@mac")
    monkeypatch.setenv(places.SSH_VARIABLE, "other")
    assert (place_of().name, place_of("me@mac").name) == ("other", "me@mac")
    monkeypatch.setenv(places.SSH_VARIABLE, "-oProxyCommand=id")
    with pytest.raises(BadValue, match=r"PYINFRA_ORBSTACK_SSH '-oProxyCommand=id' must"):
        place_of()


# Connections


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of an ssh for this process."""
    there = tmp_path / "bin"
    there.mkdir()
    monkeypatch.setenv("PATH", f"{there}:{os.environ['PATH']}")
    return there / "ssh"


def written(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_hosts_that_wait_for_an_attempt_share_its_failure(ssh: Path, tmp_path: Path) -> None:
    """A Mac that sleeps costs its hosts one wait, not one each."""
    log = tmp_path / "log"
    login = f"*ControlMaster=yes*) echo try >>'{log}'; sleep 0.5; echo 'No route to host' >&2"
    written(ssh, f"case $* in {login} ;; esac; exit 255")
    mac = Mac("mac")
    jobs = [gevent.spawn(mac.open) for _ in range(5)]
    gevent.joinall(jobs, timeout=30)
    assert {str(job.exception) for job in jobs} == {str(jobs[0].exception)}
    assert "cannot be reached" in str(jobs[0].exception)
    assert log.read_text() == "try\n"
    with pytest.raises(places.PlaceError):
        mac.open()
    assert log.read_text() == "try\ntry\n"


def test_no_executable_without_a_connection() -> None:
    with pytest.raises(places.PlaceError, match=r"ssh mac failed \(not connected\)"):
        Mac("mac").executable("orbctl")


@pytest.mark.parametrize("home", ["", "nowhere"])
def test_a_mac_without_a_home_directory(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mac, "_ask", lambda *_: home)
    with pytest.raises(places.PlaceError, match="mac has no home directory for ~: write"):
        Mac("mac").mac_path("~")


@pytest.fixture
def short_tmp(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory for temporary files whose path is short enough for a socket in it."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def test_nothing_is_left_of_a_connection_that_cannot_be_set_up(
    monkeypatch: pytest.MonkeyPatch, short_tmp: Path
) -> None:
    files = os.listdir("/dev/fd")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(launch, "Launched", full)
    with pytest.raises(launch.TooManyFiles, match="raise the limit"):
        places._Link(["ssh"], "mac")
    assert os.listdir(short_tmp) == []
    assert os.listdir("/dev/fd") == files


def test_nothing_is_left_of_a_connection_that_ends_at_once(short_tmp: Path) -> None:
    """However late the keeper begins."""
    links = []
    for _ in range(30):
        links.append(places._Link(["true"], "mac"))
        links[-1].let_go()
    deadline = time.monotonic() + 20
    left = [link for link in links if not link._keeper.wait(deadline - time.monotonic())]
    for link in left:
        link._keeper.kill()
    assert left == []
    assert os.listdir(short_tmp) == []


# Login shells


@pytest.mark.parametrize("shell", LOGIN_SHELLS)
def test_every_login_shell_runs_the_same(shell: str, tmp_path: Path) -> None:
    # Some shells write to the home directory.
    env = {**os.environ, "HOME": str(tmp_path)}
    line = for_any_shell(f"printf '%s|' {shlex.join([BYTES, 'end'])}; cat; exit 7")
    argv = [LOGIN_SHELLS[shell], "-c", line]
    done = subprocess.run(argv, input=b"\0in", env=env, capture_output=True)
    assert done.stdout == f"{BYTES}|end|".encode() + b"\0in"
    assert (done.returncode, done.stderr) == (7, b"")


def test_a_command_line_contains_nothing_that_a_shell_interprets() -> None:
    inner = for_any_shell(BYTES).removeprefix("exec sh -c '").removesuffix("'")
    assert not set(inner) & set("'!%\n`")
    assert inner.isascii()
    assert "\\\\" not in inner


@pytest.mark.parametrize("word", ["a", BYTES, "two\nlines\n", "\n", "", "-n", "'", "it's"])
def test_the_local_executable_passes_words_on(word: str, tmp_path: Path) -> None:
    """It is a shell script, since only shells call it."""
    ssh = tmp_path / "ssh"
    # The last word of its command line is for the login shell.
    ssh.write_text('#!/bin/sh\nwhile [ $# -gt 1 ]; do shift; done\nexec sh -c "$1"\n')
    ssh.chmod(0o755)
    link = object.__new__(places._Link)
    link._folder = str(tmp_path)
    (tmp_path / "users").touch()
    link.write_executable("printf '%s|'", [str(ssh), "--", "mac"])
    done = subprocess.run([tmp_path / "orbctl", "first", word, "last"], capture_output=True)
    assert done.stdout == f"first|{word}|last|".encode()
    assert done.stderr == b""


@pytest.mark.parametrize("shell", SHELLS)
def test_a_call_ends_when_its_input_does(shell: str, tmp_path: Path) -> None:
    """Its input is the connection: nothing may go on where nothing reaches it any more."""
    program = tmp_path / "orbctl"
    program.write_text('#!/bin/sh\necho "$$ $*"\nexec sleep 60\n')
    program.chmod(0o755)
    text = Mac._prefix("idle", "orbctl", "create", "a b")
    env = {**os.environ, "PYINFRA_ORBSTACK_ORBCTL": str(program)}
    with subprocess.Popen(
        [*SHELLS[shell], "-c", text], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as call:
        assert call.stdin is not None
        assert call.stdout is not None
        pid, words = call.stdout.readline().split(maxsplit=1)
        assert words == b"create a b\n"
        call.stdin.close()
        assert call.wait(10) == 128 + 15
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("status", [0, 3, 255])
def test_a_call_reports_its_status(shell: str, status: int, tmp_path: Path) -> None:
    program = tmp_path / "orbctl"
    program.write_text(f"#!/bin/sh\necho out\necho err >&2\nexit {status}\n")
    program.chmod(0o755)
    env = {**os.environ, "PYINFRA_ORBSTACK_ORBCTL": str(program)}
    text = Mac._prefix("idle", "orbctl", "list")
    with subprocess.Popen(
        [*SHELLS[shell], "-c", text],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as call:
        assert call.stdout is not None
        assert call.stderr is not None
        assert call.stdout.read() == b"out\n"
        assert call.stderr.read() == b"err\n"
        # Only ssh itself exits with 255.
        assert call.wait(10) == min(status, 254)


@pytest.mark.parametrize("how", ["idle", "piped"])
def test_no_orbctl(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelltext, "KNOWN_FOLDERS", ("~/bin",))
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    argv = ["sh", "-c", Mac._prefix(how, "orbctl", "list")]
    done = subprocess.run(argv, env=env, capture_output=True, text=True)
    assert done.returncode == 127
    said = Mac("me@mac").problem(127, done.stderr)
    assert said == "orbctl was not found on me@mac: install OrbStack there"
    said = Mac("me@mac").problem(127, done.stderr.replace("orbctl", "docker"))
    assert said == "docker was not found on me@mac: open OrbStack there once"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "orbctl").symlink_to(shutil.which("true") or "")
    assert subprocess.run(argv, env=env, stdin=subprocess.DEVNULL).returncode in (0, 143)


# What ssh says


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification", "changed"),
        ("No ED25519 host key is known for m.\nHost key verification failed.", "is unknown"),
        ("me@mac: Permission denied (publickey).", r"refused the login \(me@mac: Permission"),
        ("ssh: connect to host m port 22: Connection refused", "cannot be reached .*awake"),
        ("ssh: connect to host m port 22: No route to host", "cannot be reached"),
        ("Timeout, server mac not responding.", "cannot be reached"),
        ("ssh: Could not resolve hostname m: Name unknown", r"ssh mac failed \(ssh: Could not"),
        ("", r"ssh mac failed \(the connection ended\)"),
    ],
)
def test_one_line_that_says_what_to_do(said: str, wanted: str) -> None:
    found = Mac("mac").problem(255, said)
    assert "\n" not in found
    assert places.re.search(wanted, found), found


def test_failures_of_orbctl_are_its_own() -> None:
    assert Mac("mac").problem(1, "Permission denied") == ""
    assert Mac("mac").problem(None, "") == ""
    assert HERE.problem(255, "Permission denied") == ""


# Sessions in targets that are far away


class Far(Place):
    """This host, as if each answer took a while."""

    name = "far"


@pytest.fixture(params=SHELLS)
def far(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runner]:
    if not Path("/proc/self/stat").exists():
        pytest.skip("this host is the target, and has no /proc")
    runner = Runner(SHELLS[request.param], "session")
    monkeypatch.setattr(runner.target, "place", Far(), raising=False)
    yield runner
    runner.session.close()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What was sent before a wait for READY."""
    sent: list[bytes] = []
    real = session.Connection.ask

    def ask(self: session.Connection, exchange: object, data: bytes, *rest: object) -> None:
        sent.append(data)
        real(self, exchange, data, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(session.Connection, "ask", ask)
    return sent


def test_a_command_does_not_wait_for_its_start(far: Runner, waits: list[bytes]) -> None:
    for status in (0, 1, 255):
        assert far(f"echo out; echo err >&2; exit {status}") == (status, b"out\n", b"err\n")
    assert far("cat", b"x\0y") == (0, b"x\0y", b"")
    assert len(waits) == 1  # the hello


def test_a_session_that_was_idle_is_asked_first(
    far: Runner, waits: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "ALIVE_FOR", 0.0)
    assert far("echo out")[1] == b"out\n"
    assert len(waits) == 2
    assert far.session.connection is not None
    far.session.connection.child.end()
    with pytest.raises(NotStarted):
        far.session.run("true", lambda *_: None)


def test_a_connection_that_ends_after_the_command_was_sent(far: Runner) -> None:
    far("true")
    assert far.session.connection is not None
    with pytest.raises(OutcomeUnknown, match="its outcome is unknown"):
        far(f"kill -9 {far.session.connection.child.pid}; sleep 1")


def test_a_command_that_was_not_sent_completely_did_not_run(far: Runner, tmp_path: Path) -> None:
    far("true")
    assert far.session.connection is not None
    child = far.session.connection.child
    child.close_stdin()
    with pytest.raises(NotStarted, match="before the command was sent"):
        far.session.run(f"touch {tmp_path}/ran", lambda *_: None)
    time.sleep(0.2)
    assert not (tmp_path / "ran").exists()
    assert not far.session.alive


def test_large_input_goes_through_the_open_session(
    far: Runner, waits: list[bytes], tmp_path: Path
) -> None:
    data = bytes(range(256)) * 8192
    assert far("cat", data) == (0, data, b"")
    # Nothing of what a command leaves is a command.
    script = f"touch {tmp_path}/never\n".encode() * 30_000
    assert far("head -c 3; exit 4", script) == (4, b"tou", b"")
    assert far("exec <&-; sleep 0.1; echo on", script) == (0, b"on\n", b"")
    assert not (tmp_path / "never").exists()
    assert far("echo next") == (0, b"next\n", b"")
    assert len(waits) == 4  # the hello, and those with large input


def test_the_time_of_a_command_includes_its_input(far: Runner) -> None:
    with pytest.raises(TimeoutError):
        far("sleep 30", b"x" * 1_000_000, seconds=0.5)
    assert far("echo next") == (0, b"next\n", b"")
