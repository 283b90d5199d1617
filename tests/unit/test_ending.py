"""The shell code that kills a command: whom it finds, whatever processes are named."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import pyinfra_orbstack.shell
from pyinfra_orbstack import ending

from .test_session import LINUX

pytestmark = LINUX

SHELLS = [["dash"], ["bash"], ["busybox", "sh"]]
#: Names itself as its first argument, and waits.
NAMED = 'printf %s "$1" >/proc/$$/comm; echo; read -r _ <&3'

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture(params=SHELLS, ids=lambda words: words[0])
def shell(request: pytest.FixtureRequest) -> list[str]:
    if not shutil.which(request.param[0]):
        pytest.skip(f"{request.param[0]} is not installed")
    return list(request.param)


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a process in a session of its own; wait until it prints a line."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*words: str, **options: object) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            **options,  # type: ignore[call-overload]
        )
        started.append(child)
        assert child.stdout
        child.stdout.readline()
        return child

    yield start
    for child in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        for pipe in (child.stdin, child.stdout):
            assert pipe
            pipe.close()


def end(
    shell: list[str], root: subprocess.Popen[bytes], before: str = "", **options: object
) -> int:
    """Kill a process and its descendants, after a shell text; return the exit code."""
    began = stat(root.pid)[19]
    words = [*shell, "-c", before + ending._END, "sh", str(root.pid), began, "process"]
    return subprocess.run(words, timeout=60, **options).returncode  # type: ignore[call-overload]


def stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat that follow the name."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()


def test_the_command_is_stopped_before_its_children_are_searched(
    shell: list[str], start: Start, tmp_path: Path
) -> None:
    """The search takes long on a busy host, where the command would start more of them."""
    root = start("sh", "-c", "sleep 1000 & echo; sleep 1000; :")
    log = tmp_path / "log"
    told = f'kill() {{ echo "$*" >>{log}; command kill "$@"; }}\n'
    assert end(shell, root, told) == 0
    assert log.read_text().splitlines()[0] == f"-STOP {root.pid}"


def test_a_name_with_newlines_names_no_other_process(shell: list[str], start: Start) -> None:
    """Its second line looks as if it began the record of another process."""
    victim = start("sh", "-c", "echo; exec sleep 1000")
    name = f"\n{victim.pid} (x"
    root = start("sh", "-c", 'setsid sh -c "$1" sh "$2" 3<&0; :', "sh", NAMED, name)
    (forger,) = Path(f"/proc/{root.pid}/task/{root.pid}/children").read_text().split()
    assert name in Path(f"/proc/{forger}/stat").read_text()
    assert end(shell, root) == 0
    assert victim.poll() is None
    assert root.wait(10) == -signal.SIGKILL
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        assert stat(int(forger))[0] in "ZX"


def test_a_command_whose_own_name_has_newlines(shell: list[str], start: Start) -> None:
    root = start("sh", "-c", f"exec 3<&0; {NAMED}", "sh", "a\nb) c")
    assert end(shell, root) == 0
    assert root.wait(10) == -signal.SIGKILL


def test_a_group_whose_leader_has_ended(shell: list[str], start: Start, tmp_path: Path) -> None:
    """Nothing else leads to its members, as the leader was their parent."""
    code = """
import subprocess, sys, time
leader = subprocess.Popen(["sh", "-c", "sleep 1000 & echo $! >" + sys.argv[1]],
    start_new_session=True)
while open(f"/proc/{leader.pid}/stat").read().rpartition(") ")[2][0] != "Z":
    time.sleep(0.05)
print(flush=True)
time.sleep(1000)
"""
    root = start(sys.executable, "-c", code, str(tmp_path / "pid"))
    member = int((tmp_path / "pid").read_text())
    try:
        assert end(shell, root) == 0
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            assert stat(member)[0] in "ZX"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)


def test_a_process_that_cannot_be_stopped(shell: list[str], start: Start, tmp_path: Path) -> None:
    """It waits in the kernel until its child executes a program: it is killed soon all the same."""
    code = "import ctypes, time; print(flush=True); ctypes.CDLL(None).vfork(); time.sleep(1000)"
    root = start(sys.executable, "-c", code)
    deadline = time.monotonic() + 30
    while stat(root.pid)[0] != "D":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    log = tmp_path / "log"
    told = f'kill() {{ echo "$1" >>{log}; command kill "$@"; }}\n'
    assert end(shell, root, told) == 0
    assert root.wait(10) == -signal.SIGKILL
    assert log.read_text().split().count("-STOP") < 15


@pytest.mark.parametrize("live", ["", "99999999"])
def test_an_incomplete_search_is_no_success(shell: list[str], live: str) -> None:
    """If new processes appear in each search, some may be missing when the others are killed."""
    fake = f"""
orb_from() {{ orb_roots=''; }}
orb_search() {{
count=$((count + 1)); orb_live={live} orb_moving=0 orb_new=$((count < 60))
[ $orb_new = 1 ] || orb_live=
}}
"""
    words = [*shell, "-c", ending._END.replace('orb_end "$', f'{fake}orb_end "$')]
    assert subprocess.run(words).returncode == 1


def test_a_number_that_is_used_again(shell: list[str]) -> None:
    """Neither that process nor its children are part of the command."""
    call = """
sift() { orb_sift "$1" S "$2" "$2" "$2" 0 0 0 0 0 0 0 0 0 0 0 0 0 1 0 "$3"; }
orb_live='' orb_me='' orb_new=0
orb_add 100 7; orb_add 200 ''
sift 100 1 7; sift 101 100 8
sift 100 1 9; sift 102 100 9
sift 201 200 9; sift 200 1 9; sift 202 200 9
echo $orb_live $orb_new
"""
    words = [*shell, "-c", pyinfra_orbstack.shell.text("processes") + call]
    assert subprocess.check_output(words).split() == [b"100", b"101", b"201", b"1"]


def test_threads_that_outlive_the_first_one(shell: list[str], start: Start) -> None:
    code = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(1000,)).start()
print(flush=True)
ctypes.CDLL(None).pthread_exit(None)
"""
    root = start(sys.executable, "-c", code)
    deadline = time.monotonic() + 30
    while stat(root.pid)[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert end(shell, root) == 0
    assert root.wait(10) == -signal.SIGKILL


@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("prlimit"),
    reason="needs root, to become a user without processes, and prlimit",
)
def test_no_more_processes_can_be_started(shell: list[str], start: Start) -> None:
    def become() -> None:
        os.setgroups([])
        os.setgid(54321)
        os.setuid(54321)

    limited = ["prlimit", "--nproc=1:1"]
    root = start("sh", "-c", "echo; sleep 1000; :", preexec_fn=become)
    fork = [*limited, "sh", "-c", "(true); :"]
    assert subprocess.run(fork, preexec_fn=become, capture_output=True).returncode != 0
    assert end([*limited, *shell], root, preexec_fn=become) == 0
    assert root.wait(10) == -signal.SIGKILL
