"""Booted machines that fail, hang, or lose a process, and many at once."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, NoReturn, cast

import pytest

from orbctl_simulator import boots, cgroups, userns
from orbctl_simulator.booted import Pause, Start
from orbctl_simulator.runstate import RUNNING, RunState
from orbctl_simulator.state import Failure, find
from tests.contract.program import Program
from tests.simulator.conftest import (
    IMAGE,
    Booted,
    control_groups,
    have_init,
    is_alive,
    make_booted,
    mounts_of,
    orphaned_groups,
    supervisors_of,
    wait_for,
)

if TYPE_CHECKING:
    from orbctl_simulator.bootplan import Plan

pytestmark = pytest.mark.boot


def test_commands_end_with_the_machine(booted: Booted, own_box: str) -> None:
    """`stop` returns when commands and the daemons that they started have ended."""
    marks = [f"60.{time.time_ns()}", f"61.{time.time_ns()}"]
    call = booted.program.started("run", "-m", own_box, "sh", "-c", f"echo up; sleep {marks[0]}")
    assert call.stdout
    call.stdout.readline()
    booted(
        "run", "-m", own_box, "sh", "-c", f"setsid sleep {marks[1]} </dev/null >/dev/null 2>&1 &"
    )
    wait_for(lambda: all(map(is_running_somewhere, marks)))
    assert booted("stop", own_box).code == 0
    assert not any(map(is_running_somewhere, marks))
    call.communicate(timeout=10)
    assert call.returncode in (137, 143)


def is_running_somewhere(mark: str) -> bool:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes() == f"sleep\0{mark}\0".encode():
                return is_alive(int(folder.name))
        except OSError:
            continue
    return False


def test_commands_have_their_own_control_group(booted: Booted, box: str) -> None:
    """Commands run in their own control group of the machine, in every hierarchy."""
    shown = booted("run", "-m", box, "cat", "/proc/self/cgroup").text.splitlines()
    assert f"0::/{cgroups.COMMANDS}" in shown
    assert {line.rpartition(":")[2] for line in shown} <= {"/", f"/{cgroups.COMMANDS}"}
    assert booted.root_in(box, "systemctl status --no-pager >/dev/null").code == 0


def test_control_group_of_commands_is_made_again(booted: Booted, own_box: str) -> None:
    script = (
        "systemd-run -q --on-active=0.1 --timer-property=AccuracySec=10ms "
        f"rmdir /sys/fs/cgroup/{cgroups.COMMANDS}"
    )
    assert booted.root_in(own_box, script).code == 0
    name = f"orb-{booted.directory(own_box).name}"
    groups = [Path(path) for path in control_groups() if Path(path).name == name]
    assert any((group / cgroups.COMMANDS).exists() for group in groups)
    wait_for(lambda: not any((group / cgroups.COMMANDS).exists() for group in groups))
    assert booted.root_in(own_box, "echo here").text == "here\n"


@pytest.fixture
def killed(booted: Booted, own_box: str) -> Iterator[tuple[str, int, int]]:
    """A machine whose supervisor is killed. After the test, it starts as usual."""
    init, supervisor = booted.pids(own_box)
    os.kill(supervisor, signal.SIGKILL)
    yield own_box, init, supervisor
    assert booted.state(own_box) == "stopped"
    assert booted("start", own_box).code == 0
    assert booted.root_in(own_box, "systemctl is-system-running").text == "running\n"


def test_machine_ends_with_its_supervisor(booted: Booted, killed: tuple[str, int, int]) -> None:
    _, init, _ = killed
    wait_for(lambda: not is_alive(init))


def test_stop_cleans_up_behind_a_killed_supervisor(
    booted: Booted, killed: tuple[str, int, int]
) -> None:
    name, init, _ = killed
    assert booted("stop", name).code == 0
    assert not is_alive(init)
    assert not any(booted.directory(name).name in group for group in control_groups())


def test_delete_of_a_machine_whose_supervisor_is_stopped(booted: Booted) -> None:
    """A supervisor that hangs does not keep its machine alive."""
    name = booted.create()
    init, supervisor = booted.pids(name)
    ident = booted.directory(name).name
    os.kill(supervisor, signal.SIGSTOP)
    assert booted("delete", name).code == 0
    assert not is_alive(init)
    assert not is_alive(supervisor)
    assert not any(ident in group for group in control_groups())


def test_init_that_outlives_its_supervisor(booted: Booted, own_box: str) -> None:
    """An init that does not end with its parent is killed by the next command."""
    # prctl(PR_SET_PDEATHSIG, 0), by the machine's own init: a shell that executes the real one.
    script = "exec perl -e 'syscall(157, 1, 0); exec @ARGV' /lib/systemd/systemd"
    wrapped = (
        f"rm /sbin/init; printf '#!/bin/sh\n%s\n' \"{script}\" >/sbin/init; chmod +x /sbin/init"
    )
    assert booted.root_in(own_box, wrapped).code == 0
    assert booted("restart", own_box).code == 0
    init, supervisor = booted.pids(own_box)
    os.kill(supervisor, signal.SIGKILL)
    time.sleep(0.2)
    assert is_alive(init)
    assert booted("stop", own_box).code == 0
    assert not is_alive(init)


def test_init_that_is_killed(booted: Booted, own_box: str) -> None:
    init, supervisor = booted.pids(own_box)
    os.kill(init, signal.SIGKILL)
    wait_for(lambda: not is_alive(supervisor))
    assert booted.state(own_box) == "stopped"
    assert booted("start", own_box).code == 0


def test_machine_ends_with_its_directory(booted: Booted, tmp_path: Path) -> None:
    """No command could stop it anymore."""
    home = tmp_path / "gone"
    booted = make_booted(home)
    name = booted.create()
    pids, ident = booted.pids(name), booted.directory(name).name
    # The router may write to it meanwhile.
    wait_for(lambda: shutil.rmtree(home, ignore_errors=True) or not home.exists())
    wait_for(lambda: not any(map(is_alive, pids)))
    assert not any(ident in group for group in control_groups())


def test_ranges_of_killed_supervisors_are_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(userns, "_LOCKS", str(tmp_path))
    (first, lock), (other, still) = userns.take_range(), userns.take_range()
    assert first != other
    held = {path.name for path in tmp_path.iterdir()}
    assert len(held) == 2
    (tmp_path / "ids-300").touch()
    userns.release_range(first, lock)
    (left,) = tmp_path.iterdir()
    assert left.name in held
    userns.release_range(other, still)
    assert [*tmp_path.iterdir()] == []


def test_deletion_of_a_directory_is_not_disturbed(booted: Booted) -> None:
    """Otherwise the directory would not be empty when it is removed, after its files."""
    name = booted.create()
    place, pids = booted.directory(name), booted.pids(name)
    for file in ("pid", "console", "lock"):
        (place / file).unlink()
    wait_for(lambda: not any(map(is_alive, pids)))
    assert not (place / "pid").exists()
    assert not (place / "console").exists()
    shutil.rmtree(place)


def test_address_is_free_when_its_machine_is_gone(booted: Booted, box: str) -> None:
    name = booted.create()
    place, pids = booted.directory(name), booted.pids(name)
    address = booted.home / "network/machines" / place.name
    assert address.exists()
    shutil.rmtree(place)
    wait_for(lambda: not any(map(is_alive, pids)))
    assert booted("start", box).code == 0
    assert not address.exists()
    assert booted("info", box, "-f", "json").json["ip4"] in booted("list").text


def test_killed_in_the_middle_of_create(booted: Booted, tmp_path: Path) -> None:
    """Killing the command, the supervisor or the init at any time leaves nothing running."""
    booted = make_booted(tmp_path / "state")
    begun = time.monotonic()
    name = booted.create()
    whole = time.monotonic() - begun
    assert booted("delete", name).code == 0
    before = orphaned_groups()
    for number in range(12):
        words = ("create", IMAGE, f"killed-{number}")
        process = booted.program.started(*words, start_new_session=True)
        time.sleep(whole * (0.1 + 0.08 * number))
        if number % 3 == 1:  # the machine's supervisor, in the middle of the boot
            for supervisor in supervisors_of(tmp_path / "state"):
                with contextlib.suppress(ProcessLookupError):  # a short-lived helper
                    os.kill(supervisor, signal.SIGKILL)
        elif number % 3 == 2:
            for path in (tmp_path / "state" / "machines").glob("*/pid"):
                life = RunState.read(str(path))
                if life and life.has_init:
                    os.kill(life.init, signal.SIGKILL)
        else:
            process.kill()
        process.communicate()
        if process.returncode == 0:
            assert booted("delete", f"killed-{number}").code == 0

    def incomplete() -> set[int]:
        lives = [RunState.read(str(path)) for path in tmp_path.glob("state/machines/*/pid")]
        complete = {life.supervisor for life in lives if life and life.state == RUNNING}
        return {*supervisors_of(tmp_path / "state")} - complete

    # A command that is killed at its last moment leaves a whole machine. Anything else ends by
    # itself, before another command could remove it.
    wait_for(lambda: not incomplete())
    for number in range(12):
        if booted("info", f"killed-{number}").code == 0:
            assert booted("delete", f"killed-{number}").code == 0
    wait_for(lambda: supervisors_of(tmp_path / "state") == [])
    assert mounts_of(tmp_path / "state") == []
    for path in (tmp_path / "state" / "machines").iterdir():
        cgroups.remove(path.name)
    wait_for(lambda: orphaned_groups() <= before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_export(booted: Booted, own_box: str, tmp_path: Path, number: int) -> None:
    """The machine runs on, and its lock is free, although the export would take much longer."""
    fill = "head -c 3000000 /dev/urandom >/root/large"
    assert booted.root_in(own_box, fill).code == 0
    target = tmp_path / "slow"
    os.mkfifo(target)
    process = booted.program.started("export", own_box, str(target))
    with open(target, "rb") as reader:
        reader.read(1)  # it writes more than a pipe takes, so it waits
        process.send_signal(number)
        process.communicate(timeout=60)
        with open(booted.directory(own_box) / "lock") as lock:
            wait_for(lambda: _can_lock(lock.fileno()))
    name = booted.directory(own_box).name
    (events,) = (
        path
        for path in map(Path, control_groups())
        if path.name == f"orb-{name}" and (path / "cgroup.events").exists()
    )
    wait_for(lambda: "frozen 0" in (events / "cgroup.events").read_text())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_killed_trial(booted: Booted, tmp_path: Path, number: int) -> None:
    """Neither the trial nor the next command leaves anything of it, and a live trial stays."""
    code = (
        "import time\nfrom orbctl_simulator import cgroups, trial\n"
        "def run(builder):\n"
        "    cgroups.enter(builder._plan.id, 0, 0, 0)\n"
        "    print('entered', flush=True)\n    time.sleep(60)\n"
        "trial.Builder.run = run\ntrial.why_not()\n"
    )
    before, state = orphaned_groups(), tmp_path / "state"
    booted = make_booted(state)
    look = Program([booted.program.command[0], "-c", code], booted.program.env)
    process = look.started()
    assert process.stdout
    assert process.stdout.readline() == b"entered\n"
    assert booted("list").code == 0
    assert len(list(state.glob("trial*"))) == 1
    process.send_signal(number)
    process.wait(20)
    if number != signal.SIGINT:
        assert booted("list").code == 0
    assert list(state.glob("trial*")) == []
    wait_for(lambda: orphaned_groups() <= before)
    process.communicate()


def _can_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@pytest.mark.parametrize(
    ("init", "reason"),
    [
        ("exit 1", "setup: machine crashed on startup"),
        ("exit 0", "setup: machine crashed on startup"),
        ("kill -9 $$; cat /no", "setup: machine crashed on startup"),
        ("exec cat", "setup: machine didn't start in 2s (missing IP address)"),
        (
            None,
            "debian:test (amd64) has no init and dbus, and no supported package manager",
        ),
    ],
)
def test_machine_that_does_not_boot(
    booted: Booted, small_root: Path, init: str | None, reason: str
) -> None:
    """`create` fails with OrbStack's message and leaves nothing behind."""
    if init:
        have_init(small_root, init)
    before = orphaned_groups()
    others = supervisors_of(booted.home), list(booted.home.glob("machines/*"))
    patience = {"ORBCTL_SIMULATOR_BOOT_TIMEOUT": "2" if "in 2s" in reason else "30"}
    answer = booted("create", booted.image(small_root), "bad", env=patience)
    told = re.sub(r"debian:test\d+", "debian:test", answer.err.decode())
    assert (answer.code, answer.out, told) == (1, b"", f"[-32098] create 'bad': {reason}\n")
    assert (supervisors_of(booted.home), list(booted.home.glob("machines/*"))) == others
    wait_for(lambda: orphaned_groups() <= before)


def wait_to_be_killed(*_: object) -> NoReturn:
    time.sleep(60)
    os._exit(0)


class SlowBuilder:
    """Has made a first process, and is killed before it has reported it."""

    def __init__(self, plan: None, report: int, orders: int, spaces: object, secret: int) -> None:
        self._report, self._orders = report, orders

    def run(self) -> NoReturn:
        first = os.fork()
        if first == 0:
            os.write(self._report, b"built 999 999 999 999 other\n")
            os._exit(len(os.read(self._orders, 1)))
        wait_to_be_killed()


def boot_by(builder: type[SlowBuilder], monkeypatch: pytest.MonkeyPatch) -> boots.Boot:
    """A boot without a machine, whose network is never connected."""
    fds = os.open("/", os.O_PATH), os.open("/", os.O_PATH)
    monkeypatch.setattr(boots.userns, "of_machine", lambda first: fds)
    monkeypatch.setattr(boots, "Builder", builder)
    monkeypatch.setattr(boots, "connect", wait_to_be_killed)
    return boots.Boot(cast("Plan", SimpleNamespace(first_id=0)), -1)


def test_killed_before_its_process_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends, and so does the boot: both once waited for ever."""
    boot = boot_by(SlowBuilder, monkeypatch)
    assert select.select(boot.files(), [], [], 30)[0]
    boot.kill()
    deadline = time.monotonic() + 30
    while not boot.read({*select.select(boot.files(), [], [], 1)[0]}):
        assert time.monotonic() < deadline
    boot.finish()
    assert boot.console is None


class HastyChild(SlowBuilder):
    """A builder whose first process is ready before the builder has reported it."""

    def run(self) -> NoReturn:
        ready, told = os.pipe()
        first = os.fork()
        if first == 0:
            fds = (*os.openpty(), *(os.open("/", os.O_PATH) for _ in range(3)))
            os.write(self._report, f"built {' '.join(map(str, fds))} other\n".encode())
            os.write(told, b"!")
            os._exit(len(os.read(self._orders, 1)))
        os.read(ready, 1)
        os.write(self._report, f"init {first}\n".encode())
        wait_to_be_killed()


def test_ready_before_it_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the first process opened is taken as soon as its id is known."""
    monkeypatch.chdir(tmp_path)
    boot = boot_by(HastyChild, monkeypatch)
    deadline = time.monotonic() + 30
    while boot.console is None:
        assert not boot.read({*select.select(boot.files(), [], [], 1)[0]})
        assert time.monotonic() < deadline
    boot.kill()
    assert select.select([boot.pidfd], [], [], 30)[0]


#: An init that reboots at once, by the number of the system call reboot.
REBOOTING = f"""#!/usr/bin/perl
syscall({169 if os.uname().machine == "x86_64" else 142}, 0xfee1dead, 672274793, 0x1234567, 0);
"""


def test_reboots_before_it_is_up(booted: Booted, own_box: str) -> None:
    """They share one time limit, however short each boot is."""
    words = ("sh", "-c", "rm /sbin/init; cat >/sbin/init; chmod 755 /sbin/init")
    answer = booted("run", "-m", own_box, "-u", "root", *words, stdin=REBOOTING.encode())
    assert answer.code == 0, answer
    assert booted("stop", own_box).code == 0
    limit = {"ORBCTL_SIMULATOR_BOOT_TIMEOUT": "2"}
    answer = booted("start", own_box, env=limit, timeout=30)
    reason = "setup: machine didn't start in 2s (missing IP address)"
    assert answer.err.decode() == f"[-32098] start '{own_box}': {reason}\n"
    assert booted.state(own_box) == "stopped"


def test_reboots_after_it_was_up(booted: Booted, own_box: str) -> None:
    """Then nothing waits, but `start` must not wait for ever, nor any command be refused."""
    assert booted("stop", own_box).code == 0
    limit = {"ORBCTL_SIMULATOR_BOOT_TIMEOUT": "10"}
    assert booted("start", own_box, env=limit).code == 0
    words = ("sh", "-c", "rm /sbin/init; cat >/sbin/init; chmod 755 /sbin/init; sync; kill -INT 1")
    booted("run", "-m", own_box, "-u", "root", *words, stdin=REBOOTING.encode())
    wait_for(lambda: booted.state(own_box) == "stopped")


def test_start_after_the_machine_ended_by_itself(booted: Booted, own_box: str) -> None:
    """Its supervisor still removes what it left, but it no longer counts as running."""
    for _ in range(5):
        init = booted.pids(own_box)[0]
        booted.root_in(own_box, "poweroff -f")
        while is_alive(init):
            time.sleep(0.001)
        assert booted("start", own_box).code == 0
        assert is_alive(booted.pids(own_box)[0])


def test_start_after_a_killed_start(booted: Booted, own_box: str) -> None:
    """However early it was killed, the second one boots the machine alone."""
    assert booted("stop", own_box).code == 0
    begun = time.monotonic()
    assert booted("start", own_box).code == 0
    whole = time.monotonic() - begun
    folder = booted.directory(own_box)
    for number in range(10):
        assert booted("stop", "-f", own_box).code == 0
        assert supervisors_of(booted.home, folder.name) == []
        call = booted.program.started("start", own_box)
        time.sleep(whole * 0.06 * number)
        call.kill()
        call.communicate()
        answer = booted("start", own_box)
        assert answer.code == 0, (number, answer)
        assert is_alive(booted.pids(own_box)[0])
        assert len(supervisors_of(booted.home, folder.name)) == 1


def test_start_beside_a_start_that_is_killed_once_the_machine_is_up(
    booted: Booted, own_box: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine ends with the first one, so the second one waits, and boots it again."""
    monkeypatch.setenv("ORBCTL_SIMULATOR_HOME", str(booted.home))
    assert booted("stop", own_box).code == 0
    with Start(find(own_box)) as start:
        first = booted.pids(own_box)[0]
        assert is_alive(first)
        assert booted.state(own_box) == "starting"
        second = booted.program.started("start", own_box)
        wait_for(lambda: (booted.directory(own_box) / "doing").exists())
        start._supervisor.close()  # as the kernel does when the process is killed
        start._supervisor.wait(60)
        start._is_committed = True  # nothing is left to do
    assert second.wait(60) == 0
    assert not is_alive(first)
    assert is_alive(booted.pids(own_box)[0])
    assert booted.state(own_box) == "running"


def test_supervisor_waits_for_another_one_of_its_machine(
    booted: Booted, own_box: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command may have been killed before its supervisor recorded itself."""
    assert booted("stop", own_box).code == 0
    monkeypatch.setenv("ORBCTL_SIMULATOR_HOME", str(booted.home))
    monkeypatch.setattr("orbctl_simulator.booted._timeouts", lambda: ("1", "1"))
    monkeypatch.setattr("orbctl_simulator.booted._PATIENCE", 1.0)
    folder = booted.directory(own_box)
    record = (folder / "pid").read_text()
    with (folder / "lock").open("r+") as other:
        fcntl.lockf(other, fcntl.LOCK_EX)
        with pytest.raises(Failure, match="supervisor does not answer"):
            Start(find(own_box))
        assert supervisors_of(booted.home, folder.name) == []
        call = booted.program.started("start", own_box)
        wait_for(lambda: supervisors_of(booted.home, folder.name))
        with pytest.raises(subprocess.TimeoutExpired):
            call.wait(1)
        assert (folder / "pid").read_text() == record
    assert call.wait(60) == 0
    assert is_alive(booted.pids(own_box)[0])
    assert len(supervisors_of(booted.home, folder.name)) == 1


def test_supervisor_that_is_stopped_when_its_machine_is_up(
    booted: Booted, own_box: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert booted("stop", own_box).code == 0
    monkeypatch.setenv("ORBCTL_SIMULATOR_HOME", str(booted.home))
    monkeypatch.setattr("orbctl_simulator.booted._PATIENCE", 1.0)
    with Start(find(own_box)) as start:
        os.kill(booted.pids(own_box)[1], signal.SIGSTOP)
        start._supervisor._deadline = time.monotonic() + 2
        with pytest.raises(Failure, match="supervisor does not answer"):
            start.commit()
    assert supervisors_of(booted.home, booted.directory(own_box).name) == []
    assert booted("start", own_box).code == 0


def test_start_of_a_machine_whose_supervisor_is_stopped(booted: Booted, own_box: str) -> None:
    """It hangs, so its machine neither ends nor boots again: a new one takes its place."""
    init, supervisor = booted.pids(own_box)
    os.kill(supervisor, signal.SIGSTOP)
    os.kill(init, signal.SIGKILL)
    wait_for(lambda: not is_alive(init))
    limit = {"ORBCTL_SIMULATOR_BOOT_TIMEOUT": "5"}
    assert booted("start", own_box, env=limit).code == 0
    assert is_alive(booted.pids(own_box)[0])
    assert not is_alive(supervisor)


def test_watcher_of_a_pause_is_killed(
    booted: Booted, own_box: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine goes on."""
    monkeypatch.setenv("ORBCTL_SIMULATOR_HOME", str(booted.home))
    pause = Pause(find(own_box))
    with pause:
        os.kill(pause._watcher, signal.SIGKILL)
    assert booted("run", "-m", own_box, "true", timeout=20).code == 0


def test_service_that_hangs_at_boot(booted: Booted, own_box: str) -> None:
    """`start` does not fail because of it: OrbStack only waits for an address."""
    unit = "[Service]\nType=oneshot\nExecStart=/bin/sleep 1000\nTimeoutStopSec=1\n"
    script = (
        "cat >/etc/systemd/system/slow.service; mkdir -p /etc/systemd/system/basic.target.wants"
    )
    script += "; ln -s ../slow.service /etc/systemd/system/basic.target.wants/"
    words = ("run", "-m", own_box, "-u", "root", "sh", "-c", script)
    assert booted(*words, stdin=unit.encode()).code == 0
    assert booted("stop", own_box).code == 0
    assert booted("start", own_box, env={"ORBCTL_SIMULATOR_BOOT_TIMEOUT": "8"}).code == 0
    assert booted.root_in(own_box, "systemctl is-system-running").out == b"starting\n"


def test_wrong_timeouts(booted: Booted, own_box: str) -> None:
    assert booted("stop", own_box).code == 0
    for name in ("ORBCTL_SIMULATOR_BOOT_TIMEOUT", "ORBCTL_SIMULATOR_STOP_TIMEOUT"):
        for words in (["start", own_box], ["create", IMAGE, "wrong"]):
            answer = booted(*words, env={name: "soon"})
            assert answer.code == 1
            assert answer.err.decode() == (
                f"[-32098] {words[0]} '{words[-1]}': {name}: not a number of seconds: 'soon'\n"
            )


def test_ten_at_once(booted: Booted) -> None:
    names = [f"ten-{number}" for number in range(10)]
    calls = [booted.program.started("create", IMAGE, name) for name in names]
    answers = [call.communicate(timeout=200) for call in calls]
    assert [call.returncode for call in calls] == [0] * 10, answers
    for name in names:
        assert booted.root_in(name, "hostname").text == f"{name}\n"
        assert booted("delete", name).code == 0


def test_reasons_why_a_host_cannot_boot_machines(booted: Booted, tmp_path: Path) -> None:
    """The reason, in one line, is found by trying, and nothing is left behind."""
    code = "import sys; from orbctl_simulator import trial; sys.stdout.write(trial.why_not())"
    look = [*booted.program.command[:1], "-c", code]
    before = orphaned_groups()
    home = f"ORBCTL_SIMULATOR_HOME={tmp_path}/state"
    scripts = {
        "": "",
        "mount -t tmpfs none /proc/sys;": "nothing is mounted over",
        "mount -t tmpfs none /sys/kernel;": "nothing is mounted over",
        f"cd {tmp_path}; mkdir l u w state; mount -t overlay -o lowerdir=l,upperdir=u,workdir=w"
        " overlay state;": "Linux 5.19 or later",
    }
    for script, reason in scripts.items():
        words = ["unshare", "-m", "sh", "-c", f'{script} exec env {home} "$@"', "sh", *look]
        told = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        assert reason in told
        assert bool(told) == bool(reason)
        assert "\n" not in told
    wait_for(lambda: orphaned_groups() <= before)
    assert list((tmp_path / "state").glob("trial*")) == []


def test_limits(booted: Booted) -> None:
    """They are enforced if the host's control groups allow it."""
    how = cgroups.limits()
    name = booted.create("--cpus", "0.5", "--memory", "200")
    group = f"orb-{booted.directory(name).name}"
    fill = "perl -e '$x = \"x\" x (400 << 20); print 1'"
    answer = booted.root_in(name, fill)
    assert (answer.code == 137) == ("memory" in how), answer
    if how.get("memory") == "version 2":
        assert booted.root_in(name, "cat /sys/fs/cgroup/memory.max").text == f"{200 << 20}\n"
    if how.get("cpu") == "version 2":
        assert booted.root_in(name, "cat /sys/fs/cgroup/cpu.max").text == "50000 100000\n"
    elif "cpu" in how:
        quota = next(Path("/sys/fs/cgroup").glob(f"cpu*/{group}/cpu.cfs_quota_us"))
        assert quota.read_text() == "50000\n"
    assert booted.root_in(name, "nproc").text == f"{os.cpu_count()}\n"
    total = booted.root_in(name, "grep MemTotal /proc/meminfo").text
    assert total in Path("/proc/meminfo").read_text()
    assert booted("delete", name).code == 0


def test_host_without_mounted_control_groups(booted: Booted) -> None:
    """Machines use control groups anyway, and leave none behind."""
    hide = "umount -l /sys/fs/cgroup; while umount -l /sys/fs/cgroup; do :; done 2>/dev/null"
    words = [*booted.program.command, "create", IMAGE, "unmounted"]
    made = ["unshare", "-m", "sh", "-c", f'{hide}; "$@"', "sh", *words]
    before = orphaned_groups()
    subprocess.run(made, env=booted.program.env, check=True)
    assert booted.root_in("unmounted", "systemctl is-system-running").text == "running\n"
    assert booted("delete", "unmounted").code == 0
    wait_for(lambda: orphaned_groups() <= before)


@pytest.mark.parametrize(
    ("installer", "reason"),
    [
        ("", "has no init and dbus, and no supported package manager"),
        ("exit 0", "has no init"),
        ("echo no network; exit 1", "could not be installed in .*: no network .*"),
    ],
)
def test_image_that_has_no_init(
    booted: Booted, rootfs: Path, tmp_path: Path, installer: str, reason: str
) -> None:
    """Its machines have no init, and one line says so; if an init is required, it fails."""
    root = tmp_path / "root"
    shutil.copytree(rootfs, root)
    if installer:
        (root / "usr/bin/apt-get").write_text(f"#!/bin/sh\n{installer}\n")
        (root / "usr/bin/apt-get").chmod(0o755)
        # Workers share the cache: a layer for another image of this name must not be taken for it.
        (root / "var/lib/dpkg").mkdir(parents=True)
        (root / "var/lib/dpkg/status").touch()
    image = booted.image(root)
    refused = booted("create", image, "plain")
    assert (refused.code, refused.out) == (1, b"")
    assert re.search(f" create 'plain': .*{reason}\n$", refused.err.decode())
    env = {"ORBCTL_SIMULATOR_INIT": ""}
    made = booted("create", image, "plain", env=env)
    assert (made.code, made.out) == (0, b"")
    last = made.err.decode().splitlines()[-1]
    assert re.fullmatch(f"the machine has no init, as with .*=none: .*{reason}", last)
    assert booted("run", "-m", "plain", "hostname").text == "plain\n"
    assert booted("delete", "plain").code == 0


def test_host_that_cannot_boot_machines(booted: Booted, tmp_path: Path) -> None:
    """Machines have no init, and one line says so; if an init is required, it fails."""
    env = {"ORBCTL_SIMULATOR_HOME": str(tmp_path / "state"), "ORBCTL_SIMULATOR_IMAGES": "host"}

    def create(init: str) -> subprocess.CompletedProcess[str]:
        hide = 'mount -t tmpfs none /sys/kernel; exec "$@"'
        words = [*booted.program.command, "create", "host", "plain"]
        own = {**booted.program.env, **env, "ORBCTL_SIMULATOR_INIT": init}
        command = ["unshare", "-m", "sh", "-c", hide, "sh", *words]
        return subprocess.run(command, env=own, capture_output=True, text=True)

    refused = create("image")
    assert refused.returncode == 1
    assert refused.stderr.startswith("[-32098] create 'plain': this host cannot boot machines: ")
    made = create("")
    assert made.returncode == 0, made
    # Before it, another line may say what is installed once.
    last = made.stderr.splitlines()[-1]
    assert re.fullmatch("the machine has no init, .*nothing is mounted over.*", last)
    other = {**booted.program.env, **env}
    for words in (["run", "-m", "plain", "true"], ["delete", "-f", "plain"]):
        subprocess.run([*booted.program.command, *words], env=other, check=True)
