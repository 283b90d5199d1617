"""A machine's root attacks what enters the machine: the processes, streams and keys of a call."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contract.conftest import Made
from tests.contract.program import Answer, Program
from tests.simulator import attackers
from tests.simulator.conftest import processes_of
from tests.simulator.test_safety import as_root, pid_of

SECRET = "CANARY-of-the-caller"


@contextlib.contextmanager
def watched(orb: Program, machine: str) -> Iterator[list[str]]:
    """The machine's root inspects every process that appears; at the end, what it saw."""
    if not os.path.exists("/usr/bin/python3"):
        pytest.skip("needs a Python in the base")
    words = ("run", "-m", machine, "-u", "root", "-w", "/", "/usr/bin/python3", "-c")
    watcher = orb.started(*words, attackers.WATCH)
    seen: list[str] = []
    try:
        assert watcher.stdout
        assert watcher.stdout.readline() == b"watching\n"
        yield seen
    finally:
        as_root(orb, machine, "touch /tmp/enough")
        seen.append(watcher.communicate(timeout=30)[0].decode())


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[int]:
    """A file of the host that callers have open."""
    (tmp_path / "canary").write_text("original")
    (tmp_path / "canary").chmod(0o600)
    fd = os.open(tmp_path / "canary", os.O_RDWR)
    yield fd
    os.close(fd)
    assert stat.S_IMODE((tmp_path / "canary").stat().st_mode) == 0o600
    assert (tmp_path / "canary").read_text() == "original"


@pytest.mark.long
def test_a_machine_sees_nothing_of_a_call(
    orb: Program, victim: str, canary: int, tmp_path: Path, home: Path
) -> None:
    """Its environment, files and memory are never visible, at any moment.

    Covers every kind of `run`, `push`, `pull`, `rename`, `clone` and a call that fails.
    """
    (tmp_path / "file").write_text("x")
    words = ("run", "-m", victim, "-u", "root")
    log = {"ORBCTL_SIMULATOR_LOG": str(tmp_path / "log")}
    how: dict[str, Any] = {"env": {"TOKEN": SECRET}, "pass_fds": (canary,)}
    with watched(orb, victim) as seen:
        for _ in range(25):
            assert orb(*words, "true", **how).code == 0
            assert orb(*words, "no-such-command", **how).code == 127
        for _ in range(5):
            assert orb(*words, "true", env={"TOKEN": SECRET, **log}, pass_fds=(canary,)).code == 0
            assert orb.on_terminal(*words, "true", env={"TOKEN": SECRET}).code == 0
            assert orb("push", "-m", victim, str(tmp_path / "file"), **how).code == 0
            assert orb("pull", "-m", victim, "file", str(tmp_path / "back"), **how).code == 0
        assert orb("rename", victim, f"{victim}-2", **how).code == 0
        assert orb("rename", f"{victim}-2", victim, **how).code == 0
        made = Made(orb)
        copy = made.name()
        assert orb("clone", victim, copy, **how).code == 0
        assert orb("delete", "-f", copy).code == 0
    assert seen == ["[]\n"]


def spoil(orb: Program, machine: str, home: Path, script: str) -> None:
    """Do it as the machine's root, also if the files that `run` needs no longer exist."""
    pid = str(pid_of(orb, machine, home))
    subprocess.run(["nsenter", "-t", pid, "-m", "-p", "-r", "sh", "-c", script], check=True)


TRAPS = {
    "mkfifo {}": "not a regular file",
    "ln -s /dev/zero {}": "a symbolic link",
    "ln -s {}.old {}": "a symbolic link",
    "ln -s /proc/self/environ {}": "a symbolic link",
    "mkdir {}": "not a regular file",
    "truncate -s 1T {}": "larger than 4 MiB",
}


@pytest.mark.usefixtures("root_only")
@pytest.mark.parametrize("path", ["/etc/passwd", "/etc/group"])
def test_user_files_that_are_traps(orb: Program, victim: str, home: Path, path: str) -> None:
    """A call that reads them fails at once, in one line, and never fills the memory."""
    spoil(orb, victim, home, f"mv {path} {path}.old")
    for trap, said in TRAPS.items():
        spoil(orb, victim, home, f"rm -rf {path}; {trap.format(path, path)}")
        answer = orb("run", "-m", victim, "id", timeout=20, preexec_fn=_little_memory)
        assert answer == Answer(1, b"", f"[-32098] {path}: {said}\n".encode()), trap


def _little_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (512 << 20, 512 << 20))


@pytest.mark.usefixtures("root_only")
def test_environment_files_that_are_traps(orb: Program, victim: str, home: Path) -> None:
    """They are ignored; in particular, they cannot be the caller's own environment."""
    spoil(orb, victim, home, "mkdir -p /etc/default")
    for trap in TRAPS:
        for path in ("/etc/environment", "/etc/default/locale", "/etc/locale.conf"):
            spoil(orb, victim, home, f"rm -rf {path}; {trap.format(path, path)}")
        env = {"TOKEN": f"x\nLEAKED={SECRET}\n"}
        answer = orb("run", "-m", victim, "env", env=env, timeout=20, preexec_fn=_little_memory)
        assert "LEAKED" not in answer.text
        assert "HOME=" in answer.text


@pytest.mark.usefixtures("root_only")
def test_traps_for_a_start(own: Program, tmp_path: Path) -> None:
    """The files that a start reads never block it, whatever they are."""
    assert own("create", "debian", "m").code == 0
    paths = ("/etc/hosts", "/etc/hostname", "/opt/orbstack-guest/etc/resolv.conf")
    for trap in ("mkfifo {}", "ln -s /dev/zero {}", "mkdir {}", "truncate -s 1T {}"):
        script = "; ".join(f"rm -rf {path}; {trap.format(path)}" for path in paths)
        assert own("run", "-m", "m", "-u", "root", "sh", "-c", script).code == 0
        assert own("restart", "m", timeout=20).code == 0
        for names in (("m", "n"), ("n", "m")):
            assert own("rename", *names, timeout=20).code == 0
    assert own("run", "-m", "m", "true").code == 0


# Streams ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fd", [0, 1, 2])
def test_files_of_the_caller_as_streams(orb: Program, victim: str, tmp_path: Path, fd: int) -> None:
    """They are read and written, but cannot be reopened, truncated or given other rights."""
    file = tmp_path / "stream"
    file.write_text("original")
    file.chmod(0o640)
    before = file.stat()
    script = attackers.STREAMS + "\nprint(open(0).read())\nos.write(2, b'said')\n"
    words = ("run", "-m", victim, "-u", "root", "/usr/bin/python3", "-c", script)
    with open(file, "rb" if fd == 0 else "ab") as stream:
        # Never the host's own /dev/null, which would be damaged if this test failed.
        streams: dict[str, Any] = {"stdin": subprocess.PIPE}
        streams[("stdin", "stdout", "stderr")[fd]] = stream
        process = _started(orb, words, streams)
        out, _ = process.communicate(timeout=30)
    after = file.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (
        before.st_mode,
        before.st_uid,
        before.st_gid,
    )
    assert os.listxattr(file) == []
    if fd == 0:
        assert file.read_text() == "original"
        assert b"original" in out
    else:
        assert file.read_text().startswith("original")


def _started(orb: Program, words: tuple[str, ...], streams: dict[str, Any]) -> Any:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*orb.command, *words], env=orb.env, **{"stdout": pipe, "stderr": pipe, **streams}
    )


def test_other_things_as_streams(orb: Program, victim: str, tmp_path: Path) -> None:
    """A named pipe, a socket and a device are not passed on, just like a file."""
    words = ("run", "-m", victim, "-u", "root", "readlink")
    numbers = ("/proc/self/fd/0", "/proc/self/fd/1", "/proc/self/fd/2")
    named = tmp_path / "pipe"
    os.mkfifo(named, 0o600)
    ours, theirs = socket.socketpair()
    with contextlib.ExitStack() as stack:
        stack.callback(ours.close)
        stack.callback(theirs.close)
        fifo = os.open(named, os.O_RDWR)
        stack.callback(os.close, fifo)
        zero = os.open("/dev/zero", os.O_RDONLY)
        stack.callback(os.close, zero)
        for stdin, stderr in ((fifo, theirs), (theirs, fifo), (zero, theirs)):
            streams = {"stdin": stdin, "stderr": stderr}
            out, _ = _started(orb, (*words, *numbers), streams).communicate(timeout=30)
            assert all(line.startswith(b"pipe:") for line in out.splitlines()), out
            assert len(out.splitlines()) == 3


@pytest.mark.usefixtures("root_only")
def test_the_callers_dev_null(orb: Program, victim: str, tmp_path: Path) -> None:
    """The machine's own is used instead, because the mode belongs to the host's."""
    null = tmp_path / "null"
    os.mknod(null, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    script = "chmod 777 /dev/stdin; chown 42 /dev/stdin; stat -Lc %t,%T /dev/stdin"
    with open(null, "rb") as stream:
        words = ("run", "-m", victim, "-u", "root", "sh", "-c", script)
        out, _ = _started(orb, words, {"stdin": stream}).communicate(timeout=30)
    assert out == b"1,3\n"
    assert (stat.S_IMODE(null.stat().st_mode), null.stat().st_uid) == (0o600, 0)


def test_machine_that_broke_its_devices(orb: Program, victim: str) -> None:
    """Its own ``null`` is then not used, and nothing is opened instead."""
    script = "rm /dev/null; mkfifo /dev/null; rm /dev/ptmx"
    assert as_root(orb, victim, script).code == 0
    words = ("run", "-m", victim, "sh", "-c", "cat; echo out")
    process = _started(orb, words, {"stdin": subprocess.DEVNULL})
    assert process.communicate(timeout=20) == (b"out\n", b"")


def test_order_of_two_streams_in_one_file(orb: Program, machine: str, tmp_path: Path) -> None:
    """Also through pipes, lines arrive in the order in which they were written."""
    script = "for i in 1 2 3 4 5 6 7 8 9; do echo $i; echo $i >&2; done"
    with open(tmp_path / "both", "wb") as file:
        streams = {"stdout": file, "stderr": subprocess.STDOUT}
        _started(orb, ("run", "-m", machine, "sh", "-c", script), streams).communicate(timeout=30)
    assert (tmp_path / "both").read_text().split() == [n for n in "123456789" for _ in (1, 2)]


@pytest.mark.usefixtures("root_only")
def test_signals_do_not_reach_the_caller(own: Program, rootfs: Path, tmp_path: Path) -> None:
    """Neither can its terminal be reached, also by an image's program that `create` runs."""
    bare = tmp_path / "bare"
    subprocess.run(["cp", "-a", rootfs, bare], check=True)
    (bare / "usr/bin/chpasswd").write_text("#!/bin/sh\nkill -9 0\n")
    (bare / "usr/bin/chpasswd").chmod(0o755)
    assert own("image", "add", "void", str(bare)).code == 0
    script = '"$@"; echo alive; exit 0'
    shell = Program(["sh", "-c", script, "sh", *own.command], own.env)
    made = shell("create", "-p", "void", "x", stdin=b"secret\n", start_new_session=True)
    assert made.out == b"alive\n"
    assert b"cannot set the password" in made.err
    assert own("list", "-q").text == ""
    assert processes_of(tmp_path / "state") == []
    assert own("create", "void", "x").code == 0
    killer = shell("run", "-m", "x", "-u", "root", "sh", "-c", "kill -9 0", start_new_session=True)
    assert killer.out == b"alive\n"


# Keys, modules ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("root_only")
def test_keys_of_the_host(orb: Program, victim: str, tmp_path: Path) -> None:
    """Keyrings belong to users, so a machine's root would have those of the host's root."""
    libc = ctypes.CDLL(None, use_errno=True)
    add_key, _, keyctl = {"x86_64": (248, 249, 250)}.get(os.uname().machine, (217, 218, 219))

    def with_a_key() -> None:
        libc.syscall(keyctl, 1, None)  # a new session, so that this test leaves nothing
        if libc.syscall(add_key, b"user", b"canary", b"secret", 6, -3) == -1:
            os._exit(77)

    words = ("run", "-m", victim, "-u", "root", "/usr/bin/python3", "-c", attackers.KEYS)
    answer = orb(*words, preexec_fn=with_a_key)
    if answer.code == 77:
        pytest.skip("this kernel has no keys")
    assert answer.text == "[]\n"
    status = as_root(orb, victim, "grep ^Seccomp: /proc/self/status /proc/1/status").text
    assert status.split() == [
        "/proc/self/status:Seccomp:",
        "2",
        "/proc/1/status:Seccomp:",
        "2",
    ]


def test_no_module_is_imported_inside() -> None:
    """Inside, the paths of the host's Python contain the machine's files."""
    script = (
        "from orbctl_simulator import linux\n"
        "linux.import_nothing_more()\n"
        "import sys, time\n"
        "try:\n import colorsys\nexcept ImportError: print('refused')"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert shown.stdout == "refused\n"


# Killed, hung ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("root_only")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_start_that_hangs(own: Program, rootfs: Path, tmp_path: Path, number: int) -> None:
    """If it is killed before the machine is up, the machine is killed, too."""
    bare = tmp_path / "bare"
    subprocess.run(["cp", "-a", rootfs, bare], check=True)
    hang = "#!/bin/sh\nwhile :; do read x <&2; done\n"
    (bare / "usr/bin/chpasswd").write_text(hang)
    (bare / "usr/bin/chpasswd").chmod(0o755)
    assert own("image", "add", "void", str(bare)).code == 0
    call = own.started("create", "-p", "void", "x", stdin=subprocess.PIPE)
    assert call.stdin
    call.stdin.write(b"secret\n")
    call.stdin.flush()
    _soon(lambda: bool(processes_of(tmp_path / "state")))
    assert own("info", "x", "-f", "json").json["record"]["state"] == "creating"
    refused = own("delete", "-f", "x")
    assert refused.code == 1
    said = "[-32098] delete 'x': invalid transition from creating to deleting\n"
    assert refused.err.decode() == said
    call.send_signal(number)
    call.communicate(timeout=20)
    assert own("list", "-q").text == ""
    assert processes_of(tmp_path / "state") == []
    assert not list((tmp_path / "state" / "machines").iterdir())


@pytest.mark.usefixtures("root_only")
def test_delete_after_a_start_that_was_killed(own: Program, tmp_path: Path) -> None:
    """When `delete` returns, nothing of the machine is left, even if it ended late."""
    for number in range(8):
        assert own("create", "debian", "m").code == 0
        assert own("stop", "m").code == 0
        call = own.started("start", "m")
        time.sleep(0.03 * number)
        call.kill()
        call.communicate()
        assert own("delete", "-f", "m").code == 0
        assert processes_of(tmp_path / "state") == []


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_machine_that_cannot_be_paused(orb: Program, made: Made, victim: str, number: int) -> None:
    """Its root kills or stops the process that pauses it for a copy: nothing hangs."""
    script = attackers.STRIKE.replace("NUMBER", str(int(number)))
    words = ("run", "-m", victim, "-u", "root", "/usr/bin/python3", "-c", script)
    striker = orb.started(*words)
    assert striker.stdout
    assert striker.stdout.readline() == b"ready\n"
    name = made.name()
    answer = orb("clone", victim, name, timeout=60)
    if answer.code == 0:
        made.own(name)
    else:
        assert answer.err.endswith(b"its processes could not be paused\n")
    assert orb("stop", victim, timeout=60).code == 0
    striker.communicate(timeout=30)
    assert orb("run", "-m", victim, "echo", "goes on").text == "goes on\n"


def _soon(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)
