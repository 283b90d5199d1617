"""Machines that boot their image's init, and what only an init makes possible."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orbctl_simulator import cgroups, userns
from orbctl_simulator.runstate import RunState
from tests.simulator.conftest import (
    WITH_CHILD,
    Booted,
    control_groups,
    have_init,
    make_booted,
    mounts_of,
    supervisors_of,
)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


def wait_for(what: object, seconds: float = 30) -> None:
    """Wait until `what` is true; only a machine that hangs takes so long."""
    deadline = time.monotonic() + seconds
    assert callable(what)
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(booted: Booted, name: str) -> bool:
    return booted("state", name).text == "running\n"


def inits_start(booted: Booted, name: str) -> str:
    """The start time of process 1, which differs between boots."""
    return booted.root_in(name, "cut -d' ' -f22 /proc/1/stat").text


def test_is_up_when_create_returns(booted: Booted) -> None:
    """The init has finished booting, and no unit has failed."""
    name = booted.create()
    assert booted.root_in(name, "systemctl is-system-running").out == b"running\n"
    assert booted.root_in(name, "systemctl --failed --no-legend").text == ""
    assert booted("state", name).text == "running\n"
    assert booted.root_in(name, "readlink /proc/1/exe").text.strip().endswith("/systemd")


@pytest.mark.parametrize(
    ("command", "shows"),
    [
        ("hostnamectl status", r"Static hostname: boot-\d"),
        ("timedatectl status", "Time zone: .*UTC"),
        ("loginctl list-users --no-legend; echo ok", "ok"),
        ("logger -t test hello; journalctl --sync; journalctl -t test -o cat", "hello"),
        ("systemd-run --wait --pipe -q -p PrivateTmp=yes sh -c 'ls -A /tmp; echo ok'", "^ok$"),
        ("systemd-run --wait --pipe -q -p DynamicUser=yes id -u", r"^6\d{4}$"),
        (
            "systemd-run --wait --pipe -q -p PrivateDevices=yes sh -c 'echo x >/dev/null; echo ok'",
            "ok",
        ),
        ("systemd-run --wait --pipe -q -p PrivateNetwork=yes wc -l /proc/net/dev", "^3 "),
        ("systemd-run --wait --pipe -q -p RestrictAddressFamilies=AF_UNIX echo ok", "ok"),
    ],
)
def test_tools_of_systemd(booted: Booted, box: str, command: str, shows: str) -> None:
    assert re.search(shows, booted.root_in(box, command).text, re.MULTILINE)


def test_sandbox_of_a_unit(booted: Booted, box: str) -> None:
    """`ProtectSystem=strict` is enforced, not only accepted."""
    options = "-p ProtectSystem=strict -p ProtectHome=yes -p ProtectKernelTunables=yes"
    run = f"systemd-run --wait --pipe -q {options}"
    answer = booted.root_in(box, f"{run} touch /usr/new")
    assert answer.code != 0
    assert b"Read-only file system" in answer.err
    assert booted.root_in(box, f"{run} ls -A /home").text == ""


def test_timer(booted: Booted, box: str) -> None:
    script = "systemd-run -q --on-active=0.1 --timer-property=AccuracySec=10ms touch /tmp/timer"
    assert booted.root_in(box, script).code == 0
    wait_for(lambda: booted.root_in(box, "test -e /tmp/timer").code == 0)


def test_users_own_manager(booted: Booted, own_box: str) -> None:
    """`systemd --user` runs as after a login."""
    start = "systemd-run -q --uid=user -p Delegate=yes -E XDG_RUNTIME_DIR=/run/user/501"
    script = f"install -d -o user -m 700 /run/user/501; {start} /lib/systemd/systemd --user"
    assert booted.root_in(own_box, script).code == 0
    wait_for(lambda: booted.root_in(own_box, "test -S /run/user/501/systemd/private").code == 0)
    unit = "XDG_RUNTIME_DIR=/run/user/501 systemctl --user --wait is-system-running"
    assert booted("run", "-m", own_box, "sh", "-c", unit).out == b"running\n"


def test_no_marks_of_a_container(booted: Booted, box: str) -> None:
    for path in ("/.dockerenv", "/run/.containerenv", "/usr/sbin/policy-rc.d"):
        assert booted.root_in(box, f"test -e {path}").code == 1
    assert booted.root_in(box, "systemd-detect-virt").text == "lxc\n"
    assert booted.root_in(box, "findmnt -n -o PROPAGATION /").text == "shared\n"


def test_marks_of_a_container_in_an_image(booted: Booted, small_root: Path) -> None:
    """They are removed from an image that was made for containers."""
    have_init(small_root, f"{WITH_CHILD} while :; do read line </command; done")
    os.mkfifo(small_root / "command")
    (small_root / "usr/sbin").mkdir()
    for path in (".dockerenv", "usr/sbin/policy-rc.d"):
        (small_root / path).write_text("")
    name = booted.create(root=small_root)
    assert booted.root_in(name, "ls -a / /usr/sbin").text.count("docker") == 0
    assert booted.root_in(name, "ls /usr/sbin").text == ""
    assert booted("delete", name).code == 0


@pytest.mark.skipif(
    not os.path.exists("/lib/systemd/systemd"), reason="this host has no systemd to boot"
)
def test_hosts_own_root(booted: Booted) -> None:
    """It boots without the host's services, mounts and state directory."""
    name = booted.create(root=Path("/"))
    assert booted.root_in(name, "systemctl is-system-running").out == b"running\n"
    list_units = "systemctl list-units --type=service --state=running --plain --no-legend"
    shown = booted.root_in(name, f"{list_units} | cut -d' ' -f1").text.split()
    assert {unit for unit in shown if not unit.startswith("systemd-")} <= {
        *("console-getty.service", "dbus.service", "user@501.service"),
    }
    assert booted.root_in(name, f"ls '{booted.home}/machines'").code != 0
    assert booted.root_in(name, f"umount '{booted.home}'").code != 0
    assert booted.root_in(name, "cat /etc/fstab; ls -A /root /home/*").code == 0
    for path in ("/.dockerenv", "/usr/sbin/policy-rc.d"):
        assert booted.root_in(name, f"test -e {path}").code == 1
    assert booted("restart", name).code == 0
    assert booted.root_in(name, "systemctl is-system-running").out == b"running\n"
    assert booted("delete", name).code == 0


def test_what_a_deploy_may_do(booted: Booted, box: str) -> None:
    """Root has rights in its namespaces that it lacks in machines without init."""
    for script in (
        "mount -t tmpfs none /mnt && umount /mnt",
        "hostname other && hostname $(cat /etc/hostname)",
        "sysctl -q -w net.ipv4.ip_forward=1 2>/dev/null || echo 1 >/proc/sys/net/ipv4/ip_forward",
        "unshare --user --map-root-user --mount --pid --fork mount -t proc proc /proc",
        "mount --bind /etc /mnt && umount /mnt",
        "ls -l /proc/1/fd /proc/1/cwd >/dev/null",
        "chroot / true",
    ):
        assert booted.root_in(box, script).code == 0, script


def test_identity(booted: Booted) -> None:
    """Each machine has its own id, also a clone, and keeps it."""
    first, copy = booted.create(), "copy-of-first"
    look = "cat /etc/machine-id"
    ident = booted.root_in(first, look).text
    assert re.fullmatch(r"[0-9a-f]{32}\n", ident)
    assert booted.root_in(first, "echo kept >/root/kept; chown user /root/kept").code == 0
    assert booted("clone", first, copy).code == 0
    assert booted("restart", first).code == 0
    assert booted.root_in(first, look).text == ident
    assert booted("start", copy).code == 0
    assert booted.root_in(copy, look).text not in ("", ident)
    assert booted.root_in(copy, "cat /root/kept; stat -c %U /root/kept").text == "kept\nuser\n"
    assert booted.root_in(copy, "hostname; cat /etc/hostname").text == f"{copy}\n{copy}\n"
    assert booted("delete", copy).code == 0


@pytest.mark.parametrize("command", ["reboot", "systemctl reboot", "shutdown -r now"])
def test_reboot(booted: Booted, own_box: str, command: str) -> None:
    """The files stay; nothing else of the boot before does."""
    init, supervisor = booted.pids(own_box)
    ident = booted.root_in(own_box, "touch /tmp/x /run/x /root/kept; cat /etc/machine-id").text
    start = inits_start(booted, own_box)
    booted.root_in(own_box, command)
    wait_for(lambda: booted.pids(own_box)[0] != init and is_running(booted, own_box))
    assert booted.pids(own_box)[1] == supervisor
    assert booted.root_in(own_box, "ls /root/kept /tmp/x /run/x").out == b"/root/kept\n"
    assert booted.root_in(own_box, "cat /etc/machine-id").text == ident
    assert inits_start(booted, own_box) != start
    assert float(booted.root_in(own_box, "cut -d' ' -f1 /proc/uptime").text) < 60
    assert booted.root_in(own_box, "systemctl is-system-running").text == "running\n"


@pytest.mark.parametrize("command", ["poweroff", "halt", "shutdown -h now"])
def test_poweroff(booted: Booted, own_box: str, command: str) -> None:
    pids = booted.pids(own_box)
    booted.root_in(own_box, command)
    wait_for(lambda: not any(map(is_alive, pids)))
    assert booted("state", own_box).text == "stopped\n"
    assert not any(booted.directory(own_box).name in group for group in control_groups())
    assert booted("start", own_box).code == 0
    assert is_running(booted, own_box)


UNIT = """[Service]
ExecStart=/bin/sh -c 'trap "" TERM; while :; do sleep 100 & wait; done'
ExecStop=/bin/sh -c 'echo stopped >>/root/order'
TimeoutStopSec={}
"""


def have_unit(booted: Booted, name: str, patience: str) -> None:
    script = "cat >/etc/systemd/system/slow.service && systemctl start slow"
    words = ("run", "-m", name, "-u", "root", "sh", "-c", script)
    assert booted(*words, stdin=UNIT.format(patience).encode()).code == 0


def test_stop_is_in_order(booted: Booted, own_box: str) -> None:
    """Services run their own stop commands."""
    have_unit(booted, own_box, "100ms")
    pids = booted.pids(own_box)
    assert booted("stop", own_box).code == 0
    assert not any(map(is_alive, pids))
    assert booted("start", own_box).code == 0
    assert booted.root_in(own_box, "cat /root/order").text == "stopped\n"


def test_stop_has_a_deadline(booted: Booted, own_box: str) -> None:
    """A service that does not stop is killed with the machine."""
    assert booted("stop", "-f", own_box).code == 0
    assert booted("start", own_box, env={"ORBCTL_SIMULATOR_STOP_TIMEOUT": "1"}).code == 0
    have_unit(booted, own_box, "infinity")
    pids = booted.pids(own_box)
    assert booted("stop", own_box).code == 0
    assert not any(map(is_alive, pids))
    assert booted("start", own_box).code == 0
    assert booted.root_in(own_box, "cat /root/order").text == "stopped\n"


def test_stop_at_once(booted: Booted, own_box: str) -> None:
    have_unit(booted, own_box, "infinity")
    pids = booted.pids(own_box)
    assert booted("stop", "-f", own_box).code == 0
    assert not any(map(is_alive, pids))
    assert booted("start", own_box).code == 0
    assert booted.root_in(own_box, "test -e /root/order").code == 1


def test_commands_end_with_the_machine(booted: Booted, own_box: str) -> None:
    """`stop` returns when commands and the daemons they started are gone."""
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


def test_where_commands_run(booted: Booted, box: str) -> None:
    """Commands run in their own control group of the machine, in every hierarchy."""
    shown = booted("run", "-m", box, "cat", "/proc/self/cgroup").text.splitlines()
    assert f"0::/{cgroups.COMMANDS}" in shown
    assert {line.rpartition(":")[2] for line in shown} <= {"/", f"/{cgroups.COMMANDS}"}
    assert booted.root_in(box, "systemctl status --no-pager >/dev/null").code == 0


def test_control_group_of_commands_is_made_again(booted: Booted, own_box: str) -> None:
    script = f"systemd-run -q --on-active=0.1 rmdir /sys/fs/cgroup/{cgroups.COMMANDS}"
    assert booted.root_in(own_box, script).code == 0
    group = f"orb-{booted.directory(own_box).name}/{cgroups.COMMANDS}"
    wait_for(lambda: not any(Path("/sys/fs/cgroup").glob(f"**/{group}")))
    assert booted.root_in(own_box, "echo here").text == "here\n"


@pytest.fixture
def killed(booted: Booted, own_box: str) -> Iterator[tuple[str, int, int]]:
    """A machine whose supervisor is killed. After the test, it starts as usual."""
    init, supervisor = booted.pids(own_box)
    os.kill(supervisor, signal.SIGKILL)
    yield own_box, init, supervisor
    assert booted("state", own_box).text == "stopped\n"
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


def test_supervisor_that_root_of_the_machine_disowned(booted: Booted, own_box: str) -> None:
    """An init that does not end with its parent is killed by the next command."""
    # prctl(PR_SET_PDEATHSIG, 0), by an init of the machine's own: a shell that execs it again.
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
    assert booted("state", own_box).text == "stopped\n"
    assert booted("start", own_box).code == 0


def test_machine_ends_with_its_directory(debian_root: Path, tmp_path: Path) -> None:
    """No command could stop it any more."""
    booted = make_booted(tmp_path / "gone", debian_root)
    name = booted.create()
    pids, ident = booted.pids(name), booted.directory(name).name
    shutil.rmtree(tmp_path / "gone")
    wait_for(lambda: not any(map(is_alive, pids)))
    assert not any(ident in group for group in control_groups())


def test_killed_in_the_middle_of_create(debian_root: Path, tmp_path: Path) -> None:
    """Killing the command, the supervisor or the init at any time leaves nothing running."""
    booted = make_booted(tmp_path / "state", debian_root)
    begun = time.monotonic()
    name = booted.create()
    whole = time.monotonic() - begun
    assert booted("delete", name).code == 0
    before = control_groups()
    for number in range(12):
        words = ("create", str(debian_root), f"killed-{number}")
        process = booted.program.started(*words, start_new_session=True)
        time.sleep(whole * (0.1 + 0.08 * number))
        if number % 3 == 1:  # the machine's supervisor, in the middle of the boot
            for supervisor in supervisors_of(tmp_path / "state"):
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
    wait_for(lambda: supervisors_of(tmp_path / "state") == [])
    assert mounts_of(tmp_path / "state") == []
    for path in (tmp_path / "state" / "machines").iterdir():
        cgroups.remove(path.name)
    assert control_groups() == before


@pytest.mark.parametrize(
    ("init", "reason"),
    [
        ("exit 1", "setup: machine crashed on startup"),
        ("exit 0", "setup: machine crashed on startup"),
        ("kill -9 $$; cat /no", "setup: machine crashed on startup"),
        ("exec cat", "setup: machine didn't start in 2s (missing IP address)"),
        (None, "the image has no init"),
    ],
)
def test_machine_that_does_not_come_up(
    booted: Booted, small_root: Path, init: str | None, reason: str
) -> None:
    """`create` fails with OrbStack's message and leaves nothing behind."""
    if init:
        have_init(small_root, init)
    before = control_groups(), supervisors_of(booted.home), list(booted.home.glob("machines/*"))
    patience = {"ORBCTL_SIMULATOR_BOOT_TIMEOUT": "2"}
    answer = booted("create", str(small_root), "bad", env=patience)
    assert answer == (1, b"", f"[-32098] create 'bad': {reason}\n".encode())
    after = control_groups(), supervisors_of(booted.home), list(booted.home.glob("machines/*"))
    assert after == before


def test_service_that_hangs_at_boot(booted: Booted, own_box: str) -> None:
    """`start` does not fail because of it, as OrbStack only waits for an address."""
    unit = "[Service]\nType=oneshot\nExecStart=/bin/sleep 1000\nTimeoutStopSec=1\n"
    script = (
        "cat >/etc/systemd/system/slow.service; mkdir -p /etc/systemd/system/basic.target.wants"
    )
    script += "; ln -s ../slow.service /etc/systemd/system/basic.target.wants/"
    words = ("run", "-m", own_box, "-u", "root", "sh", "-c", script)
    assert booted(*words, stdin=unit.encode()).code == 0
    assert booted("stop", own_box).code == 0
    assert booted("start", own_box, env={"ORBCTL_SIMULATOR_BOOT_TIMEOUT": "3"}).code == 0
    assert booted.root_in(own_box, "systemctl is-system-running").out == b"starting\n"


def test_wrong_timeouts(booted: Booted, own_box: str) -> None:
    assert booted("stop", own_box).code == 0
    for name in ("ORBCTL_SIMULATOR_BOOT_TIMEOUT", "ORBCTL_SIMULATOR_STOP_TIMEOUT"):
        answer = booted("start", own_box, env={name: "soon"})
        assert answer.code == 1
        assert answer.err.decode() == (
            f"[-32098] start '{own_box}': {name}: not a number of seconds: 'soon'\n"
        )


def test_console_is_kept(booted: Booted, own_box: str) -> None:
    """The log has the init's messages, no control sequences, and a limited size."""
    path = booted.directory(own_box) / "console"
    assert "Reached target" in path.read_text()
    script = r"printf 'a\\033[2Jb\\r\\007c\\n' >/dev/console; yes | head -c 3000000 >/dev/console"
    assert booted.root_in(own_box, script).code == 0
    assert booted.root_in(own_box, "echo the end >/dev/console").code == 0
    wait_for(lambda: "the end" in path.read_text()[-100:])
    assert path.stat().st_size < 1 << 21
    assert set(path.read_bytes()) & set(range(32)) == {9, 10} & set(path.read_bytes())
    assert booted("stop", own_box).code == 0
    assert "Powering off" in path.read_text() or "Power-Off" in path.read_text()


def test_ids_on_the_disk(booted: Booted, box: str) -> None:
    """No user of the host owns a machine's files, so set-uid files have no effect there."""
    script = "cp /bin/true /root/suid && chmod 4755 /root/suid && cp /bin/true /home/user/plain"
    assert booted.root_in(box, f"{script} && chown user /home/user/plain").code == 0
    upper = booted.directory(box) / "upper"
    assert (upper / "root/suid").stat().st_uid == userns.STORED
    assert (upper / "home/user/plain").stat().st_uid == userns.STORED + 501
    owners = {path.lstat().st_uid for path in upper.rglob("*")}
    assert all(userns.STORED <= uid < userns.STORED + userns.SPAN for uid in owners)


def test_ids_while_it_runs(booted: Booted, box: str, own_box: str) -> None:
    """Machines have different ids, and none of a user of the host."""
    maps = [Path(f"/proc/{booted.pids(name)[0]}/uid_map").read_text() for name in (box, own_box)]
    assert maps[0] != maps[1]
    assert all(int(line.split()[1]) > userns.STORED for line in maps)
    assert all(int(line.split()[2]) > 67278 for line in maps)


def test_capabilities_of_files(booted: Booted, own_box: str) -> None:
    """They are kept when the machine gets other ids at its next boot."""
    # setxattr of security.capability: version 2, effective, cap_net_raw permitted
    perl = 'my ($f, $n, $v) = ("/root/cat", "security.capability");'
    perl += '$v = pack("V5", 0x02000001, 1 << 13, 0, 0, 0);'
    perl += "exit(syscall(188, $f, $n, $v, length $v, 0) != 0)"
    script = f"cp /bin/cat /root/cat && chmod 755 /root /root/cat && perl -e '{perl}'"
    assert booted.root_in(own_box, script).code == 0
    look = ("run", "-m", own_box, "/root/cat", "/proc/self/status")
    first = booted(*look).text
    assert "CapEff:\t0000000000002000" in first
    assert booted("stop", own_box).code == 0
    other = booted.create()  # takes the ids that it had
    assert booted("start", own_box).code == 0
    assert "CapEff:\t0000000000002000" in booted(*look).text
    assert booted("delete", other).code == 0


def test_shared_directory(booted: Booted, tmp_path: Path) -> None:
    """The machine's user acts as the caller in it; others do not."""
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "theirs").write_text("from the host")
    for path in (shared, shared / "theirs"):
        os.chown(path, 12345, 12345)
    name = booted.create("--mount", f"{shared}:/mnt/work")
    assert booted("run", "-m", name, "cat", "/mnt/work/theirs").text == "from the host"
    script = "echo from inside >/mnt/work/mine; stat -c %u:%g /mnt/work/theirs /mnt/work/mine"
    assert booted("run", "-m", name, "sh", "-c", script).text == "501:501\n" * 2
    assert (shared / "mine").stat().st_uid == (shared / "mine").stat().st_gid == 12345
    assert booted.root_in(name, "cp /bin/true /mnt/work/root; chmod 4755 /mnt/work/root").code == 0
    assert (shared / "root").stat().st_uid >= userns.STORED
    assert booted("restart", name).code == 0
    assert booted("run", "-m", name, "cat", "/mnt/work/mine").text == "from inside\n"
    assert booted("delete", name).code == 0
    assert (shared / "theirs").read_text() == "from the host"


def test_shared_below_a_temporary_directory(booted: Booted, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    name = booted.create("--mount", f"{tmp_path}:/tmp/one\t{tmp_path}/file:/run/two")
    assert booted.root_in(name, "cat /tmp/one/file /run/two").text == "herehere"
    assert booted.root_in(name, "systemctl is-system-running").text == "running\n"
    assert booted("stop", name).code == 0
    assert booted("delete", name).code == 0


def test_setting_up_writes_to_nothing_that_is_shared(
    booted: Booted, small_root: Path, tmp_path: Path
) -> None:
    """Users, names and the like are written to the machine's own files only."""
    have_init(small_root, f"{WITH_CHILD} while :; do read line </command; done")
    os.mkfifo(small_root / "command")
    shared = tmp_path / "shared"
    for name in ("etc", "home", "opt", "usr"):
        (shared / name).mkdir(parents=True)
    (shared / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nuser:x:501:501::/:/bin/sh\n")
    (shared / "usr/local").mkdir()
    mounts = "\t".join(f"{shared}/{name}:/{name}" for name in ("etc", "home", "opt", "usr/local"))
    before = {path: path.stat().st_mtime_ns for path in shared.rglob("*")}
    name = booted.create("--mount", mounts, root=small_root)
    assert {path: path.stat().st_mtime_ns for path in shared.rglob("*")} == before
    assert booted("delete", name).code == 0
    assert {path: path.stat().st_mtime_ns for path in shared.rglob("*")} == before


@pytest.mark.parametrize("kind", ["busybox", "script"])
def test_other_inits(booted: Booted, small_root: Path, tmp_path: Path, kind: str) -> None:
    """Inits that do not report when they are up, and need a command to shut down."""
    if kind == "busybox":
        _add_busybox(small_root, tmp_path)
        table = "::sysinit:/bin/sh -c 'echo booted >/booted'\n::respawn:/bin/cat /dev/console\n"
        table += "::shutdown:/bin/sh -c 'echo ended >/ended'\n"
        (small_root / "etc/inittab").write_text(table)
    else:
        loop = "echo booted >/booted; while :; do read line </command && break; done"
        have_init(small_root, f"{WITH_CHILD} {loop}; echo ended >/ended")
        (small_root / "sbin/poweroff").write_text("#!/bin/sh\necho now >/command\n")
        (small_root / "sbin/poweroff").chmod(0o755)
        os.mkfifo(small_root / "command")
    name = booted.create(root=small_root)
    assert booted.root_in(name, "cat /booted").text == "booted\n"
    assert booted.root_in(name, "id; hostname").text.split("\n")[1] == name
    assert booted("stop", name).code == 0
    assert (booted.directory(name) / "upper/ended").read_text() == "ended\n"
    assert booted("restart", name).code == 0
    assert booted("delete", name).code == 0


def _add_busybox(root: Path, tmp_path: Path) -> None:
    fetch = ["apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", "busybox-static"]
    fetched = subprocess.run(fetch, cwd=tmp_path, capture_output=True, text=True, check=False)
    packages = list(tmp_path.glob("busybox-static_*.deb"))
    if not packages:
        reason = f"busybox could not be fetched: {fetched.stderr.strip()}"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    subprocess.run(["dpkg", "-x", str(packages[0]), str(tmp_path / "deb")], check=True)
    program = next(path for path in (tmp_path / "deb").rglob("busybox") if path.is_file())
    for name in ("sbin/init", "sbin/poweroff", "sbin/reboot"):
        shutil.copy2(program, root / name)


def test_ten_at_once(booted: Booted) -> None:
    names = [f"ten-{number}" for number in range(10)]
    calls = [booted.program.started("create", str(booted.root), name) for name in names]
    answers = [call.communicate(timeout=200) for call in calls]
    assert [call.returncode for call in calls] == [0] * 10, answers
    for name in names:
        assert booted.root_in(name, "hostname").text == f"{name}\n"
        assert booted("delete", name).code == 0


def test_why_a_host_cannot(booted: Booted, tmp_path: Path) -> None:
    """The reason is found by trying, in one line, and nothing is left behind."""
    code = "import sys; from orbctl_simulator import trial; sys.stdout.write(trial.why_not())"
    look = [*booted.program.command[:1], "-c", code]
    before = control_groups()
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
    assert control_groups() == before
    assert list((tmp_path / "state").glob("trial*")) == []


def test_limits(booted: Booted) -> None:
    """They are enforced where the host's control groups allow it."""
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


def test_host_that_has_mounted_no_control_groups(booted: Booted) -> None:
    """Machines use control groups anyway, and leave none."""
    hide = "umount -l /sys/fs/cgroup; while umount -l /sys/fs/cgroup; do :; done 2>/dev/null"
    words = [*booted.program.command, "create", str(booted.root), "unmounted"]
    made = ["unshare", "-m", "sh", "-c", f'{hide}; "$@"', "sh", *words]
    before = control_groups()
    subprocess.run(made, env=booted.program.env, check=True)
    assert booted.root_in("unmounted", "systemctl is-system-running").text == "running\n"
    assert booted("delete", "unmounted").code == 0
    assert control_groups() == before
