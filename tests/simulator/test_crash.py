"""Killed simulators, many at once, unusual conditions: nothing incomplete, nothing left behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.contract.conftest import Made
from tests.contract.program import Program
from tests.simulator.conftest import make_program, processes_of, wait_for


@pytest.mark.usefixtures("root_only")
def test_killed_in_the_middle_of_create(own: Program, tmp_path: Path) -> None:
    """Whenever it is killed, the machine is then complete, or there is no trace of it."""
    begun = time.monotonic()
    assert own("create", "debian", "whole").code == 0
    whole = time.monotonic() - begun
    for number in range(12):
        process = own.started("create", "debian", f"killed-{number}")
        time.sleep(whole * (0.2 + 0.08 * number))
        process.kill()
        process.communicate()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        known = own("list", "-f", "json").json
        running = [entry for entry in known if entry["state"] == "running"]
        if len(processes_of(tmp_path / "state")) == len(running):
            break
        time.sleep(0.05)
    assert len(processes_of(tmp_path / "state")) == len(running)
    folders = list((tmp_path / "state" / "machines").iterdir())
    assert {folder.name for folder in folders} == {entry["id"] for entry in known}
    assert not (tmp_path / "state" / "trash").exists()
    for entry in known:
        assert entry["state"] in ("running", "stopped")
        assert own("run", "-m", entry["name"], "sudo", "id", "-u").text == "0\n"


@pytest.mark.usefixtures("root_only")
def test_a_partly_created_machine_is_removed_by_the_next_command(
    own: Program, tmp_path: Path
) -> None:
    """It is `creating` while its creator lives; once that has died, the next command removes it."""
    assert own("create", "debian", "whole").code == 0
    folder = tmp_path / "state" / "machines" / ("0" * 26)
    shutil.copytree(next(folder.parent.iterdir()), folder, symlinks=True, ignore=_not_the_record)
    record = (folder / "machine").read_text()
    (folder / "machine").write_text(record.replace("whole", "half").replace("made=yes\n", ""))
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        states = {entry["name"]: entry["state"] for entry in own("list", "-f", "json").json}
        assert states == {"whole": "running", "half": "creating"}
    assert own("list", "-q").lines == ["whole"]
    assert not folder.exists()


@pytest.mark.usefixtures("root_only")
@pytest.mark.parametrize("words", [["stop", "-a"], ["restart", "-a"], ["rename", "whole", "half"]])
def test_commands_ignore_what_a_killed_create_left(
    own: Program, tmp_path: Path, words: list[str]
) -> None:
    assert own("create", "debian", "whole").code == 0
    folder = tmp_path / "state" / "machines" / ("0" * 26)
    folder.mkdir()
    record = next(folder.parent.glob("*/machine")).read_text()
    (folder / "machine").write_text(record.replace("whole", "half").replace("made=yes\n", ""))
    assert own(*words) == (0, b"", b"")
    assert not folder.exists()


def _not_the_record(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name not in ("machine",)]


@pytest.mark.usefixtures("root_only")
def test_killed_delete(own: Program, tmp_path: Path) -> None:
    """A killed `delete` has deleted the machine or not; the next command removes the rest."""
    for number in range(4):
        begun = time.monotonic()
        assert own("create", "debian", "doomed").code == 0
        process = own.started("delete", "-f", "doomed")
        time.sleep((time.monotonic() - begun) * (0.3 + 0.15 * number))
        process.kill()
        process.communicate()
        running = own("list", "-q", "-r").lines
        assert len(running) == len(processes_of(tmp_path / "state"))
        assert set(own("list", "-q").lines) <= {"doomed"}
        assert not (tmp_path / "state" / "trash").exists()
        own("delete", "-f", "doomed")


def states(*command: str) -> set[str]:
    """The states of a command's processes; `T` is stopped."""
    line = "".join(f"{word}\0" for word in command).encode()
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "cmdline").read_bytes() == line:
                found.add((folder / "stat").read_text().rpartition(") ")[2][0])
    return found


def test_a_killed_clone_resumes_its_source(own: Program) -> None:
    """The source is paused while it is copied, but not forever."""
    assert own("create", "debian", "source").code == 0
    assert own("clone", "source", "quiet") == (0, b"", b"")
    assert own("run", "-m", "source", "sh", "-c", "head -c 500M /dev/zero >~/big").code == 0
    command = ("sleep", f"60.{time.time_ns()}")
    sleeping = own.started("run", "-m", "source", *command)
    while not states(*command):
        assert sleeping.poll() is None
    seen = False
    for number in range(10):  # a busy host may not show it to us in time
        process = own.started("clone", "source", f"copy{number}")
        while process.poll() is None and not seen:
            seen = "T" in states(*command)
        process.kill()
        process.communicate()
        if seen:
            break
    assert seen
    wait_for(lambda: "T" not in states(*command))
    assert own("stop", "source").code == 0
    sleeping.communicate(timeout=10)


def test_twenty_at_once(own: Program) -> None:
    """Twenty machines, created, used and deleted at the same time."""
    names = [f"many-{number}" for number in range(20)]
    for before, after in ((["create", "debian"], []), (["run", "-m"], ["hostname"])):
        calls = [own.started(*before, name, *after) for name in names]
        answers = [call.communicate(timeout=90) for call in calls]
        assert [call.returncode for call in calls] == [0] * 20, answers
    assert [out.decode().strip() for out, _ in answers] == names
    assert len({entry["id"] for entry in own("list", "-f", "json").json}) == 20
    calls = [own.started("delete", "-f", name) for name in names]
    assert [call.wait(60) for call in calls] == [0] * 20
    for call in calls:
        call.communicate()
    assert own("list", "-q").text == ""


def test_several_creators_of_one_name(own: Program) -> None:
    """If several calls create a machine of the same name at the same time, only one succeeds."""
    calls = [own.started("create", "debian", "same") for _ in range(4)]
    errors = [call.communicate(timeout=60)[1] for call in calls]
    assert sorted(call.returncode for call in calls) == [0, 1, 1, 1]
    assert sum(b"machine already exists: 'same'" in error for error in errors) == 3
    assert own("list", "-q").lines == ["same"]


@pytest.mark.usefixtures("root_only")
def test_names_are_given_under_a_lock(own: Program, tmp_path: Path) -> None:
    """While one process assigns a name, another one waits, and then continues."""
    own("list")
    (tmp_path / "state" / "machines").mkdir(parents=True)
    with open(tmp_path / "state" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        call = own.started("create", "debian", "waits")
        with pytest.raises(subprocess.TimeoutExpired):
            call.wait(0.6)
        assert own("list", "-q").text == ""
    call.communicate(timeout=30)
    assert call.returncode == 0


def test_start_by_many(own: Program, tmp_path: Path) -> None:
    """If many commands find a machine stopped, it is started once."""
    own("create", "debian", "shared")
    own("stop", "shared")
    calls = [own.started("run", "-m", "shared", "sh", "-c", "echo $$") for _ in range(6)]
    pids = {call.communicate(timeout=60)[0] for call in calls}
    assert len(pids) == 6
    assert len(processes_of(tmp_path / "state")) == 1


def test_stop_during_run(orb: Program, made: Made, machine: str) -> None:
    """A command in a machine that is stopped ends promptly, with the exit code of its signal."""
    name = made.clone(machine)
    call = orb.started("run", "-m", name, "sh", "-c", "trap '' TERM; echo up; sleep 60")
    assert call.stdout
    call.stdout.readline()
    started = time.monotonic()
    assert orb("stop", name).code == 0
    call.communicate(timeout=30)
    assert call.returncode == 137
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_killing_the_client_leaves_the_command_running(
    orb: Program, machine: str, number: int
) -> None:
    """The harsh reading: if a signal ends `orbctl run`, its command in the machine continues."""
    go_on, mark = f"/tmp/go-on-{int(number)}", f"/tmp/mark-{int(number)}"
    script = f"echo up; until test -e {go_on}; do sleep 0.1; done; touch {mark}"
    call = orb.started("run", "-m", machine, "sh", "-c", script, start_new_session=True)
    assert call.stdout
    call.stdout.readline()
    os.killpg(call.pid, number)  # as a terminal does for ^C
    call.wait(60)
    assert orb("run", "-m", machine, "test", "-e", mark).code == 1
    wait = f"touch {go_on}; until test -e {mark}; do sleep 0.1; done"
    assert orb("run", "-m", machine, "timeout", "30", "sh", "-c", wait).code == 0
    call.communicate()


@pytest.mark.usefixtures("root_only")
def test_a_reused_pid_is_not_a_machine(own: Program, tmp_path: Path) -> None:
    """A machine whose pid now belongs to another process, as after a reboot, is stopped."""
    own("create", "debian", "old")
    own("stop", "old")
    folder = next((tmp_path / "state" / "machines").iterdir())
    with subprocess.Popen(["sleep", "60"]) as other:
        started = Path(f"/proc/{other.pid}/stat").read_text().rpartition(") ")[2].split()[19]
        (folder / "pid").write_text(f"{other.pid} {started} shared\n")
        assert own("info", "old", "-f", "json").json["record"]["state"] == "stopped"
        assert own("stop", "old").code == 0
        assert b"machine not running" in own("pull", "-m", "old", "/etc/hostname", "/tmp").err
        assert other.poll() is None
        other.kill()
    assert own("run", "-m", "old", "echo", "up").text == "up\n"


@pytest.mark.usefixtures("root_only")
def test_host_is_never_entered(own: Program, tmp_path: Path) -> None:
    """A process with a machine's id, but with the host's files, is not entered."""
    assert own("create", "debian", "m").code == 0
    assert own("stop", "m").code == 0
    (folder,) = (tmp_path / "state" / "machines").iterdir()
    mark = tmp_path / "mark"
    with subprocess.Popen([sys.executable, "-c", "input()", folder.name], stdin=-1) as other:
        started = Path(f"/proc/{other.pid}/stat").read_text().rpartition(") ")[2].split()[19]
        (folder / "pid").write_text(f"{other.pid} {started} shared\n")
        for words in (
            ["run", "-m", "m", "-u", "root", "touch", str(mark)],
            ["pull", "-m", "m", "x"],
        ):
            answer = own(*words)
            assert answer.code == 1
            assert b"machine not running: 'm'" in answer.err
        other.kill()
    assert not mark.exists()


def test_umask_of_the_caller(own: Program) -> None:
    """It creates no machine whose files its users cannot read."""
    made = own("create", "debian", "masked", preexec_fn=_strict_umask)
    assert made.code == 0
    assert own("run", "-m", "masked", "sh", "-c", "umask && touch ~/x").text == "0022\n"


def _strict_umask() -> None:
    os.umask(0o777)


def test_orphans_are_reaped(orb: Program, machine: str) -> None:
    """Pid 1 reaps the processes that a command leaves behind."""
    script = (
        "(sleep 0.1 & sleep 0.1 & sleep 0.1 &); sleep 0.4; ps -e -o ppid=,stat= | grep -c '[1-9] Z'"
    )
    assert orb("run", "-m", machine, "sh", "-c", script).out == b"0\n"


@pytest.mark.usefixtures("root_only")
def test_state_directory_can_move(tmp_path: Path, orb: Program) -> None:
    """Nothing in it contains its own path."""
    program = make_program(tmp_path / "one")
    program("create", "debian", "mover")
    program("run", "-m", "mover", "sh", "-c", "echo here >~/file")
    program("stop", "mover")
    (tmp_path / "one").rename(tmp_path / "two")
    program = make_program(tmp_path / "two")
    assert program("run", "-m", "mover", "sh", "-c", "cat ~/file").text == "here\n"
    assert program("delete", "-f", "mover").code == 0


@pytest.mark.usefixtures("root_only")
def test_machine_ends_with_its_state_directory(tmp_path: Path, orb: Program) -> None:
    """No command could stop it: deleting the directory cleans up after a killed test run."""
    program = make_program(tmp_path / "gone")
    assert program("create", "debian", "orphan").code == 0
    process = program.started("run", "-m", "orphan", "sh", "-c", "echo up; sleep 60")
    assert process.stdout
    process.stdout.readline()
    assert len(processes_of(tmp_path / "gone")) == 1
    shutil.rmtree(tmp_path / "gone")
    assert process.wait(20) == 137
    process.communicate()
    assert processes_of(tmp_path / "gone") == []
