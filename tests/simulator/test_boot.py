"""Machines that boot their image's init, and features that require an init."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
import tty
import unicodedata
from pathlib import Path

import pytest

from orbctl_simulator import userns
from orbctl_simulator.console import Console, create
from tests.simulator.conftest import (
    IMAGE,
    WITH_CHILD,
    Booted,
    control_groups,
    have_init,
    is_alive,
    wait_for,
)

pytestmark = pytest.mark.boot


def is_running(booted: Booted, name: str) -> bool:
    return booted.state(name) == "running"


def inits_start(booted: Booted, name: str) -> str:
    """The start time of process 1, which differs between boots."""
    return booted.root_in(name, "cut -d' ' -f22 /proc/1/stat").text


def test_a_machine_is_running_when_create_returns(booted: Booted) -> None:
    """The init has finished booting, and no unit has failed."""
    name = booted.create()
    assert booted.root_in(name, "systemctl is-system-running").out == b"running\n"
    assert booted.root_in(name, "systemctl --failed --no-legend").text == ""
    assert booted.state(name) == "running"
    assert booted.root_in(name, "readlink /proc/1/exe").text.strip().endswith("/systemd")


def test_generators_run_as_on_a_server(booted: Booted, own_box: str) -> None:
    """Those that have nothing to do are only left out while a machine boots."""
    look = "ls -A /run/systemd/system-generators /run/systemd/generator/multi-user.target.wants"
    wanted = "printf '#!/bin/sh\\n' >/etc/rc.local; chmod +x /etc/rc.local"
    shown = booted.root_in(own_box, f"{wanted}; systemctl daemon-reload; {look}")
    assert "rc-local.service" in shown.lines
    assert "systemd-run-generator" not in shown.text
    assert booted("restart", own_box).code == 0
    assert "rc-local.service" in booted.root_in(own_box, look).lines


def test_processes_on_the_host(booted: Booted, own_box: str) -> None:
    """A machine has its supervisor, with its init as the only child."""
    init, supervisor = booted.pids(own_box)
    children = Path(f"/proc/{supervisor}/task/{supervisor}/children")
    wait_for(lambda: children.read_text().split() == [str(init)])


@pytest.mark.parametrize(
    ("command", "shows"),
    [
        ("hostnamectl status", "Static hostname: first"),
        ("timedatectl status", "Time zone: .*UTC"),
        ("loginctl list-users --no-legend && echo ok", "ok"),
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


def test_no_container_markers(booted: Booted, box: str) -> None:
    for path in ("/.dockerenv", "/run/.containerenv", "/usr/sbin/policy-rc.d"):
        assert booted.root_in(box, f"test -e {path}").code == 1
    assert booted.root_in(box, "systemd-detect-virt").text == "lxc\n"
    assert booted.root_in(box, "findmnt -n -o PROPAGATION /").text == "shared\n"


def test_container_markers_in_an_image(booted: Booted, small_root: Path) -> None:
    """They are removed from an image that was built for containers."""
    have_init(small_root, f"{WITH_CHILD} while :; do read line </command; done")
    os.mkfifo(small_root / "command")
    (small_root / "usr/sbin").mkdir()
    for path in (".dockerenv", "usr/sbin/policy-rc.d"):
        (small_root / path).write_text("")
    name = booted.create(root=small_root)
    assert booted.root_in(name, "ls -a / /usr/sbin").text.count("docker") == 0
    assert booted.root_in(name, "ls /usr/sbin").text == ""
    assert booted("delete", name).code == 0


def test_machine_id_of_a_clone_whose_first_start_fails(booted: Booted) -> None:
    """It still gets its own, at the first start that sets up its files."""
    name, look = booted.create("--isolated"), "cat /etc/machine-id"
    assert booted("clone", name, "copy").code == 0
    key = "machine.copy.mounts"
    assert booted("config", "set", key, "/etc/hostname:/etc/passwd/x").code == 0
    assert b"mount /etc/hostname on /etc/passwd/x" in booted("start", "copy").err
    assert booted("config", "set", key, "").code == 0
    assert booted("start", "copy").code == 0
    ident = booted.root_in("copy", look).text
    assert ident != booted.root_in(name, look).text
    assert booted("restart", "copy").code == 0
    assert booted.root_in("copy", look).text == ident
    assert booted("delete", name, "copy").code == 0


@pytest.mark.skipif(
    not os.path.exists("/lib/systemd/systemd"), reason="this host has no systemd to boot"
)
def test_host_root_as_base(booted: Booted) -> None:
    """It boots without the host's services, mounts and state directory."""
    name = booted.create(image="host")
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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["host"], "no cloud-init in this host's own root: name an image instead"),
        (["--variant", "default", "debian"], "no image with cloud-init: debian:"),
        (["alpine"], "no image with cloud-init: alpine:"),
    ],
)
def test_user_data_without_an_image(
    booted: Booted, tmp_path: Path, words: list[str], said: str
) -> None:
    """The host's root has no cloud-init that would read it, so nothing is created."""
    (tmp_path / "data").write_text("#cloud-config\n")
    env = {
        "ORBCTL_SIMULATOR_HOME": str(tmp_path / "state"),
        "ORBCTL_SIMULATOR_IMAGES": "host",
        "ORBCTL_SIMULATOR_STRICT_IMAGES": "0",
    }
    answer = booted("create", *words, "void", "--user-data", str(tmp_path / "data"), env=env)
    if answer.code == 0:
        booted("delete", "void", env=env)
    assert (answer.code, answer.out) == (1, b"")
    assert answer.err.decode().startswith(f"[-32098] create 'void': {said}")
    assert answer.err.count(b"\n") == 1
    assert booted("list", "-q", env=env).out == b""


def test_root_has_these_rights_in_a_machine(booted: Booted, box: str) -> None:
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
    """Files are kept; nothing else of the previous boot is."""
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
    assert booted.state(own_box) == "stopped"
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


def test_stop_shuts_down_cleanly(booted: Booted, own_box: str) -> None:
    """Services run their own stop commands."""
    have_unit(booted, own_box, "100ms")
    pids = booted.pids(own_box)
    assert booted("stop", own_box).code == 0
    assert not any(map(is_alive, pids))
    assert booted("start", own_box).code == 0
    assert booted.root_in(own_box, "cat /root/order").text == "stopped\n"


def test_stop_has_a_deadline(booted: Booted, own_box: str) -> None:
    """A service that does not stop is killed with the machine."""
    have_unit(booted, own_box, "infinity")
    pids = booted.pids(own_box)
    assert booted("stop", own_box, env={"ORBCTL_SIMULATOR_STOP_TIMEOUT": "4"}).code == 0
    assert not any(map(is_alive, pids))
    assert booted("start", own_box).code == 0
    assert booted.root_in(own_box, "cat /root/order").text == "stopped\n"


def test_the_deadline_is_that_of_stop(booted: Booted, own_box: str) -> None:
    """Not of the call that started the machine, nor the default."""
    assert booted("stop", "-f", own_box).code == 0
    assert booted("start", own_box, env={"ORBCTL_SIMULATOR_STOP_TIMEOUT": "60"}).code == 0
    have_unit(booted, own_box, "infinity")
    supervisor = booted.pids(own_box)[1]
    wrong = booted("stop", own_box, env={"ORBCTL_SIMULATOR_STOP_TIMEOUT": "soon"})
    assert wrong.err == b"ORBCTL_SIMULATOR_STOP_TIMEOUT: not a number of seconds: 'soon'\n"
    assert booted.state(own_box) == "running"
    begun = time.monotonic()
    assert booted("stop", own_box, env={"ORBCTL_SIMULATOR_STOP_TIMEOUT": "1.5"}).code == 0
    assert 1.5 <= time.monotonic() - begun < 9
    assert not is_alive(supervisor)
    have_unit(booted, own_box, "13s")  # longer than the default
    begun = time.monotonic()
    assert booted("stop", own_box, env={"ORBCTL_SIMULATOR_STOP_TIMEOUT": "60"}).code == 0
    assert 12 <= time.monotonic() - begun < 40


def test_the_deadline_is_that_of_the_last_stop(booted: Booted, own_box: str) -> None:
    """Not of one that was interrupted."""
    have_unit(booted, own_box, "infinity")
    supervisor = booted.pids(own_box)[1]
    limit = {"ORBCTL_SIMULATOR_STOP_TIMEOUT": "60"}
    first = booted.program.started("stop", own_box, env=limit)
    wait_for(lambda: booted.state(own_box) == "stopping")
    first.kill()
    first.communicate(timeout=10)
    begun = time.monotonic()
    assert booted("stop", own_box, env={"ORBCTL_SIMULATOR_STOP_TIMEOUT": "1.5"}).code == 0
    assert time.monotonic() - begun < 9
    assert not is_alive(supervisor)


def test_stop_at_once(booted: Booted, own_box: str) -> None:
    have_unit(booted, own_box, "infinity")
    pids = booted.pids(own_box)
    assert booted("stop", "-f", own_box).code == 0
    assert not any(map(is_alive, pids))
    assert booted("start", own_box).code == 0
    assert booted.root_in(own_box, "test -e /root/order").code == 1


def test_console_is_kept(booted: Booted, own_box: str) -> None:
    """The log contains the init's messages, no control sequences, and is limited in size."""
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


def test_console_without_control_sequences(tmp_path: Path) -> None:
    """Also if one comes in parts, or is what is left without other control characters."""
    terminal, other = os.openpty()
    tty.setraw(other)
    log = tmp_path / "log"
    create(str(log))
    console = Console(str(log), terminal, other)
    for part in (
        "\x9b2J\u00e9\u0085\n".encode(),
        b"a\xc2",
        b"\x9bb",
        b"\xc2\0\x9b\xc2\xc2\x9b\x9b",
    ):
        os.write(other, part)
        console.read()
    os.write(other, b"\xc2\0")
    console.read()
    os.write(other, b"\x1b\x9bend\xc3\xa9\n")
    console.close()
    shown = log.read_text(errors="replace")
    assert not [letter for letter in shown if unicodedata.category(letter) == "Cc"][2:]
    assert shown.startswith("?2J\u00e9?\na?b?")
    assert shown.endswith("?end\u00e9\n")


def test_ids_on_the_disk(booted: Booted, box: str) -> None:
    """No user of the host owns a machine's files, so set-uid files have no effect there."""
    script = "cp /bin/true /root/suid && chmod 4755 /root/suid && cp /bin/true /home/user/plain"
    assert booted.root_in(box, f"{script} && chown user /home/user/plain").code == 0
    upper = booted.directory(box) / ".files/upper"
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
    """They are kept when the machine gets different ids at its next boot."""
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
    other = booted.create()  # takes its former ids
    assert booted("start", own_box).code == 0
    assert "CapEff:\t0000000000002000" in booted(*look).text
    assert booted("delete", other).code == 0


def test_shared_directory(booted: Booted, tmp_path: Path) -> None:
    """The machine's user acts as the caller in it; other users do not."""
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "theirs").write_text("from the host")
    for path in (shared, shared / "theirs"):
        os.chown(path, 12345, 12345)
    name = booted.create("--isolated", "--mount", f"{shared}:/mnt/work")
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


def test_links_in_a_share_do_not_move_another(booted: Booted, tmp_path: Path) -> None:
    """Neither when the machine reboots by itself nor when it is started."""
    (tmp_path / "outer/inner").mkdir(parents=True)
    (tmp_path / "aside").mkdir()
    mounts = ("--mount", f"{tmp_path}/outer:/outer", "--mount", f"{tmp_path}/outer/inner:/data")
    name = booted.create("--isolated", *mounts)
    booted.root_in(name, f"rm -r /outer/inner; ln -s {tmp_path}/aside /outer/inner; reboot")
    wait_for(lambda: booted.state(name) == "stopped")
    refused = booted("start", name)
    assert "outer/inner: a part of this path is a symbolic link" in refused.err.decode(), refused
    (tmp_path / "outer/inner").unlink()
    (tmp_path / "outer/inner").mkdir()
    assert booted("start", name).code == 0
    pid = booted.pids(name)[0]
    booted.root_in(name, "rm -r /outer/inner; mkdir /outer/inner; reboot")  # a plain directory
    wait_for(lambda: booted.state(name) == "running" and booted.pids(name)[0] != pid)
    assert booted.root_in(name, "touch /data/new").code == 0
    assert (tmp_path / "outer/inner/new").exists()
    assert [*(tmp_path / "aside").iterdir()] == []
    assert booted("delete", name).code == 0


def test_links_where_temporary_files_and_engines_are(booted: Booted, small_root: Path) -> None:
    """A machine boots although their targets are only mounted later."""
    have_init(small_root, f"{WITH_CHILD} while :; do read line </command; done")
    os.mkfifo(small_root / "command")
    (small_root / "var/lib").mkdir(parents=True)
    places = ("tmp", "var/lib/docker", "var/lib/containers")
    for place in places:
        (small_root / place).symlink_to("/mnt/later")
    (small_root / "var/lib/containerd").write_text("no directory")
    name = booted.create(root=small_root)
    for place in places:
        assert "-> /mnt/later" in booted.root_in(name, f"ls -ld /{place}").text
    assert booted.root_in(name, "cat /var/lib/containerd").text == "no directory"
    assert booted("delete", name).code == 0


def test_shared_below_a_temporary_directory(booted: Booted, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    name = booted.create(
        "--isolated", "--mount", f"{tmp_path}:/tmp/one", "--mount", f"{tmp_path}/file:/run/two"
    )
    assert booted.root_in(name, "cat /tmp/one/file /run/two").text == "herehere"
    assert booted.root_in(name, "systemctl is-system-running").text == "running\n"
    assert booted("stop", name).code == 0
    assert booted("delete", name).code == 0


def test_shared_where_a_boot_mounts_or_deletes(booted: Booted, tmp_path: Path) -> None:
    """A share that the machine would hide, or empty, is refused."""
    (tmp_path / "file").write_text("here")
    for target in ("/tmp", "/run", "/var/run", "/dev/shm", "/sys", "/proc/x"):
        words = ("create", "--isolated", "--mount", f"{tmp_path}:{target}", IMAGE, "refused")
        refused = booted(*words)
        assert b"the machine mounts or empties this directory" in refused.err, (target, refused)
        assert refused.err.count(b"\n") == refused.code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_shared_below_links_to_temporary_files(booted: Booted, tmp_path: Path) -> None:
    """The machine sees it, and building the machine writes nothing into it."""
    (tmp_path / "file").write_text("here")
    targets = ("/var/run/NetworkManager", "/run/systemd/system-generators")
    mounts = [word for target in targets for word in ("--mount", f"{tmp_path}:{target}")]
    name = booted.create("--isolated", *mounts)
    for target in targets:
        assert booted.root_in(name, f"cat {target}/file").text == "here"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert booted("delete", name).code == 0


def test_setup_does_not_write_to_shares(booted: Booted, small_root: Path, tmp_path: Path) -> None:
    """Users, names and the like are written to the machine's own files only."""
    have_init(small_root, f"{WITH_CHILD} while :; do read line </command; done")
    os.mkfifo(small_root / "command")
    shared = tmp_path / "shared"
    for name in ("etc", "home", "opt", "usr"):
        (shared / name).mkdir(parents=True)
    (shared / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nuser:x:501:501::/:/bin/sh\n")
    (shared / "usr/local").mkdir()
    names = ("etc", "home", "opt", "usr/local")
    mounts = [word for name in names for word in ("--mount", f"{shared}/{name}:/{name}")]
    before = {path: path.stat().st_mtime_ns for path in shared.rglob("*")}
    name = booted.create("--isolated", *mounts, root=small_root)
    assert {path: path.stat().st_mtime_ns for path in shared.rglob("*")} == before
    assert booted("delete", name).code == 0
    assert {path: path.stat().st_mtime_ns for path in shared.rglob("*")} == before


def test_password(booted: Booted, tmp_path: Path) -> None:
    """The machine's own password files are used, whatever is mounted over them."""
    for name in ("passwd", "shadow", "group"):
        (tmp_path / name).write_text("root:*:0:0::/root:/bin/sh\nme:*:501:501::/:/bin/sh\n")
    files = [*tmp_path.iterdir()]
    before = [(path.read_text(), path.stat().st_mtime_ns) for path in files]
    flags = ("--isolated", "-u", "me", "--set-password", IMAGE)
    assert booted("create", *flags, "plain", stdin=b"secret\n").code == 0
    words = ("create", "--mount", f"{tmp_path}:/etc", *flags, "shared")
    env = {"ORBCTL_SIMULATOR_BOOT_TIMEOUT": "8"}  # without units in /etc it is never up
    assert booted(*words, stdin=b"secret\n", env=env).code == 0
    assert [(path.read_text(), path.stat().st_mtime_ns) for path in files] == before
    script = "grep -c '^me:.y.' /etc/shadow; grep -c '^root:.y.' /etc/shadow"
    assert booted.root_in("plain", script).text == "1\n1\n"
    for pid in booted.pids("plain"):
        for file in ("cmdline", "environ"):
            assert b"secret" not in Path(f"/proc/{pid}/{file}").read_bytes()
    assert booted("delete", "shared", "plain").code == 0


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
    assert (booted.directory(name) / ".files/upper/ended").read_text() == "ended\n"
    assert booted("restart", name).code == 0
    assert booted("delete", name).code == 0


def _add_busybox(root: Path, tmp_path: Path) -> None:
    fetch = ["apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", "busybox-static"]
    fetched = subprocess.run(fetch, cwd=tmp_path, capture_output=True, text=True, check=False)
    packages = list(tmp_path.glob("busybox-static_*.deb"))
    if not packages:
        reason = f"busybox could not be downloaded: {fetched.stderr.strip()}"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    subprocess.run(["dpkg", "-x", str(packages[0]), str(tmp_path / "deb")], check=True)
    (program,) = (tmp_path / "deb").glob("**/bin/busybox")
    for name in ("sbin/init", "sbin/poweroff", "sbin/reboot"):
        shutil.copy2(program, root / name)
