"""A deploy must not be able to harm the host: what a machine's root cannot do."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest

from orbctl_simulator import shares
from orbctl_simulator.linux import KEPT_CAPABILITIES
from orbctl_simulator.state import Machine
from tests.contract.conftest import Made
from tests.contract.program import Answer, Program
from tests.simulator import attackers
from tests.simulator.conftest import make_program, mounts_of


def as_root(orb: Program, machine: str, script: str) -> Answer:
    return orb("run", "-m", machine, "-u", "root", "sh", "-c", script)


def python_in(orb: Program, machine: str, script: str, **options: Any) -> str:
    """The output of a program that root runs with the machine's Python."""
    if not os.path.exists("/usr/bin/python3"):
        pytest.skip("needs a Python in the base")
    words = ("run", "-m", machine, "-u", "root", "-w", "/", "/usr/bin/python3", "-c", script)
    return orb(*words, **options).text


def pid_of(orb: Program, machine: str, home: Path) -> int:
    ident = orb("info", machine, "-f", "json").json["record"]["id"]
    return int((home / "machines" / ident / "pid").read_text().split()[0])


def test_devices(orb: Program, machine: str) -> None:
    """``/dev`` contains what programs need, and no disk, memory or kernel log."""
    shown = as_root(orb, machine, "cd /dev; find . ! -type l ! -name . | sort").text.split()
    needed = {"full", "null", "pts", "pts/ptmx", "random", "shm", "tty", "urandom", "zero"}
    assert {entry[2:] for entry in shown} == needed
    links = as_root(orb, machine, "cd /dev; find . -type l | sort").text.split()
    assert links == ["./fd", "./ptmx", "./stderr", "./stdin", "./stdout"]
    assert as_root(orb, machine, "findmnt -n -o FSTYPE /dev || grep ' /dev ' /proc/mounts").text


def test_no_new_devices(orb: Program, machine: str) -> None:
    """Root cannot create any."""
    answer = as_root(orb, machine, "mknod /root/disk b 254 0")
    assert answer.code != 0
    assert as_root(orb, machine, "test -e /root/disk").code != 0


def test_devices_of_the_base_do_not_open(orb: Program, machine: str) -> None:
    """A device node in the base's files does not work in a machine."""
    assert "nodev" in as_root(orb, machine, "grep ' / ' /proc/mounts").text


@pytest.mark.parametrize(
    "path",
    ["/sys/kernel/uevent_helper", "/sys/power/state", "/sys/module/overlay/parameters/xino"],
)
def test_sys_is_read_only(orb: Program, machine: str, path: str) -> None:
    assert as_root(orb, machine, f"echo x >{path}").code != 0
    assert as_root(orb, machine, "grep -E '^sysfs /sys sysfs ro,' /proc/mounts").code == 0
    assert as_root(orb, machine, "mkdir /sys/fs/cgroup/here").code != 0
    assert as_root(orb, machine, "ls /sys/fs/cgroup").text.split() == ["cpu.max", "memory.max"]


def test_sysctl(orb: Program, machine: str) -> None:
    """``/proc/sys`` is read-only: kernel settings are the host's."""
    path = Path("/proc/sys/vm/swappiness")
    before = path.read_text()
    assert as_root(orb, machine, f"echo {int(before) + 1} >{path}").code != 0
    assert as_root(orb, machine, f"sysctl -w vm.swappiness={int(before) + 1}").code != 0
    assert path.read_text() == before


@pytest.mark.parametrize("path", ["/proc/sysrq-trigger", "/proc/irq", "/proc/bus", "/proc/fs"])
def test_other_switches_are_read_only(orb: Program, machine: str, path: str) -> None:
    if not os.path.exists(path):
        pytest.skip(f"this kernel has no {path}")
    mounts = as_root(orb, machine, "cat /proc/mounts").text
    assert re.search(rf"^\S+ {path} \S+ ro,", mounts, re.MULTILINE)


def test_files_of_the_kernel(orb: Program, machine: str) -> None:
    """Their modes and owners belong to the host, which a careless `chmod -R` would change."""
    script = (
        "cd /proc; for f in [a-z]*; do test -L $f && continue; "
        "chmod 444 $f 2>/dev/null && echo $f; chown 0 $f 2>/dev/null && echo $f; done; "
        "for f in kcore keys; do test ! -e $f || cat $f || exit 1; done"
    )
    assert as_root(orb, machine, script).text == ""


def test_capabilities(orb: Program, machine: str) -> None:
    """Module, time, boot, raw I/O, mknod, net-admin and swap rights are not in the bounding set."""
    kept = sum(1 << number for number in KEPT_CAPABILITIES)
    gone = {"sys_module": 16, "sys_rawio": 17, "sys_admin": 21, "sys_boot": 22, "sys_time": 25}
    gone.update(net_admin=12, mknod=27, sys_ptrace=19, syslog=34, mac_admin=33, bpf=39)
    assert not any(kept >> number & 1 for number in gone.values())
    for path in ("/proc/self/status", "/proc/1/status"):
        shown = as_root(orb, machine, f"grep ^Cap {path}").text
        sets = dict(re.findall(r"^Cap(\w+):\s*(\w+)$", shown, re.MULTILINE))
        assert int(sets["Bnd"], 16) & ~kept == 0
        assert int(sets["Eff"], 16) & ~kept == 0
        assert int(sets["Inh"], 16) == 0


def test_sudo_grants_no_more_rights(orb: Program, machine: str) -> None:
    """A set-uid program cannot regain rights that are not in the bounding set."""
    shown = orb("run", "-m", machine, "sudo", "grep", "^CapEff", "/proc/self/status").text
    kept = sum(1 << number for number in KEPT_CAPABILITIES)
    assert int(shown.split()[1], 16) & ~kept == 0


@pytest.mark.parametrize(
    "script",
    [
        "mount -t tmpfs none /mnt",
        "mount -o remount,rw /proc/sys",
        "umount /proc/sys",
        "umount /dev",
        "date -s @0",
        "hostname other",
        "ip link set lo down",
        "swapoff -a -v && swapon /dev/null",
        "nsenter -t 1 -m true && unshare -m true",
        "dmesg --clear",
        "modprobe loop || insmod /nothing || false",
        "echo 1 >/proc/sys/kernel/sysrq",
        "echo b >/proc/sysrq-trigger",
    ],
)
def test_root_without_init_lacks_these_rights(orb: Program, machine: str, script: str) -> None:
    assert as_root(orb, machine, script).code != 0


def test_no_user_namespaces(orb: Program, machine: str) -> None:
    """In one, the machine's root would regain all rights, and could mount the control groups."""
    assert python_in(orb, machine, attackers.NAMESPACES) == "[]\n"
    script = "unshare -UrmC sh -c 'mount -t cgroup2 none /mnt'"
    for user in ("root", "nobody"):
        assert orb("run", "-m", machine, "-u", user, "sh", "-c", script).code != 0
    threads = "import threading; t = threading.Thread(target=print, args=('ran',)); t.start()"
    assert python_in(orb, machine, threads) == "ran\n"


def test_private_files_are_hidden(orb: Program, machine: str, home: Path) -> None:
    """The host's ``/root`` and ``/home``, and the state directory, cannot be seen."""
    user = orb("run", "-m", machine, "id", "-un").text.strip()
    assert as_root(orb, machine, "ls -A /home").text.split() == [user]
    assert as_root(orb, machine, "ls -A /root").text.split() == []
    assert as_root(orb, machine, f"ls '{home}/machines'").code != 0


@pytest.mark.usefixtures("root_only")
def test_state_directory_outside_private_places(own: Program, orb: Program) -> None:
    """The state directory and the layers are hidden wherever they are."""
    place = Path("/opt") / f"orbctl-simulator-test-{os.getpid()}"
    program = make_program(place / "state", ORBCTL_SIMULATOR_CACHE=str(place / "cache"))
    cache = place / "cache"
    try:
        cache.mkdir(parents=True)
        os.system(f"cp -a {own.env['ORBCTL_SIMULATOR_CACHE']}/. {cache} 2>/dev/null")  # noqa: S605
        assert program("create", "debian", "hidden").code == 0
        for path in (place / "state", cache, "/var/cache/orbctl-simulator"):
            shown = program("run", "-m", "hidden", "-u", "root", "ls", "-A", str(path))
            assert shown.out == b""
    finally:
        program("delete", "-f", "hidden")
        os.system(f"rm -rf {place}")  # noqa: S605


def test_writes_stay_in_the_machine(orb: Program, machine: str) -> None:
    """No change, also through links, reaches the host's files."""
    before = {path: Path(path).stat().st_mtime_ns for path in ("/etc/passwd", "/etc/hosts", "/usr")}
    script = "echo x >>/etc/passwd; echo x >>/etc/hosts; rm -rf /usr/share/doc; touch /usr/new"
    as_root(orb, machine, f"{script}; ln -sfn /etc /opt/link; touch /opt/link/new; rm -rf /var/log")
    assert not Path("/usr/new").exists()
    assert not Path("/etc/new").exists()
    assert Path("/var/log").exists()
    assert before == {path: Path(path).stat().st_mtime_ns for path in before}
    as_root(orb, machine, "sed -i /^x$/d /etc/passwd /etc/hosts; rm /opt/link /etc/new /usr/new")


@pytest.mark.usefixtures("root_only")
def test_simulator_in_a_chroot(own: Program, tmp_path: Path) -> None:
    """There, the namespace's root is the host's; commands still run in the machine's root."""
    inside, mark = tmp_path / "chroot", f"/opt/chroot-{os.getpid()}"
    inside.mkdir()
    steps = [
        'mount --rbind / "$0" && cd /',
        'chroot "$0" "$@" create debian caged',
        f'chroot "$0" "$@" run -m caged -u root sh -c "hostname; touch {mark}"',
        'chroot "$0" "$@" delete -f caged',
    ]
    shell = ["unshare", "-m", "--propagation", "private", "sh", "-c", " && ".join(steps)]
    answer = Program([*shell, str(inside), *own.command], own.env)()
    assert not Path(mark).exists()
    assert answer.text == "caged\n"


def test_a_machine_has_its_own_temporary_files(orb: Program, machine: str, tmp_path: Path) -> None:
    """``/tmp`` and ``/run`` are the machine's own empty file systems."""
    assert as_root(orb, machine, f"ls {tmp_path}").code != 0
    for path in ("/tmp", "/run", "/dev/shm"):
        assert as_root(orb, machine, f"touch {path}/safety-{os.getpid()}").code == 0
        assert not Path(path, f"safety-{os.getpid()}").exists()
    assert as_root(orb, machine, "stat -c %a /tmp").text == "1777\n"


def test_a_machine_sees_only_its_own_processes(orb: Program, machine: str) -> None:
    """It can neither see nor signal a process of the host."""
    names = as_root(orb, machine, "ls /proc | grep -c '^[0-9]*$'").text
    assert int(names) < 10
    assert as_root(orb, machine, f"kill -0 {os.getpid()}").code != 0
    assert as_root(orb, machine, "kill -9 1; sleep 0.1; echo alive").text == "alive\n"


def test_pid_1_holds_none_of_the_callers_files(orb: Program, made: Made, home: Path) -> None:
    """No pipe, working directory or variable of the process that created the machine.

    It has one file open, through which it sees whether its state directory exists.
    """
    name = made.create()
    assert python_in(orb, name, attackers.PID_1) == "[]\n"
    if os.geteuid() == 0:
        pid = pid_of(orb, name, home)
        held = {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()} - {"/dev/null"}
        assert [path.rpartition("/")[2] for path in held] == ["lock"]
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        assert Path(f"/proc/{pid}/environ").read_bytes() == b""


def test_create_does_not_hold_pipes(made: Made) -> None:
    """A caller that reads the output of `create` to the end does not wait for the machine."""
    name = made.name()
    process = made.orb.started("create", "debian", name)
    process.communicate(timeout=60)
    made.own(name)
    assert made.orb("info", name, "-f", "json").json["record"]["state"] == "running"


def test_no_mount_in_the_hosts_namespace(orb: Program, machine: str, home: Path) -> None:
    assert orb("run", "-m", machine, "grep", "-c", "upperdir=upper", "/proc/mounts").text == "1\n"
    assert mounts_of(home) == []


def test_state_directory_is_private(orb: Program, machine: str, home: Path) -> None:
    assert stat.S_IMODE((home / "machines").stat().st_mode) == 0o700
    assert {entry.name for entry in home.parent.iterdir()} == {home.name}


# What is mounted -------------------------------------------------------------------------------


def tree_of(folder: Path) -> list[tuple[str, int, int, int, int]]:
    """Every name below a directory, with the attributes that a write would change."""
    seen = []
    for path in [folder, *sorted(folder.rglob("*"))]:
        status = path.lstat()
        seen.append((str(path), status.st_mode, status.st_uid, status.st_size, status.st_mtime_ns))
    return seen


@pytest.mark.parametrize(
    "target", ["/etc", "/opt", "/home", "/usr/local/bin", "/root", "/etc/sudoers.d", "/"]
)
def test_setup_does_not_write_to_the_host(own: Program, tmp_path: Path, target: str) -> None:
    """Users, sudo, names, resolver, password and home are the machine's, whatever is shared."""
    shared = tmp_path / "shared"
    (shared / "passwd").parent.mkdir()
    for name in ("passwd", "shadow", "group", "hosts", "hostname", "resolv.conf"):
        (shared / name).write_text("root:x:0:0::/root:/bin/sh\n")
    before = tree_of(shared)
    flags = ("--isolated", "--mount", f"{shared}:{target}", "--set-password")
    made = own("create", *flags, "debian", "m", stdin=b"secret\n")
    if target == "/":
        assert made.code == 1
        assert own("list", "-q").text == ""
        return
    assert made.code == 0, made
    assert as_root(own, "m", f"cat {target}/passwd").text.startswith("root:")
    for words in (["restart", "m"], ["rename", "m", "n"], ["stop", "n"], ["start", "n"]):
        assert own(*words).code == 0
    assert tree_of(shared) == before
    assert own("config", "set", "machine.n.mounts", "").code == 0
    assert own("restart", "n").code == 0
    assert own("run", "-m", "n", "sudo", "hostname").text == "n\n"
    assert as_root(own, "n", "cut -d: -f2 /etc/shadow | grep -c ^[$]").text == "2\n"


def test_one_file_that_is_mounted(own: Program, tmp_path: Path) -> None:
    """It is not written either; a share inside another share works, or is rejected."""
    (tmp_path / "outer").mkdir()
    (tmp_path / "inner").mkdir()
    (tmp_path / "hosts").write_text("original")
    mounts = ("--mount", f"{tmp_path}/hosts:/etc/hosts")
    assert own("create", "--isolated", *mounts, "debian", "m").code == 0
    assert own("rename", "m", "n").code == 0
    assert (tmp_path / "hosts").read_text() == "original"
    mounts = ("--mount", f"{tmp_path}/outer:/x", "--mount", f"{tmp_path}/inner:/x/y")
    refused = own("create", "--isolated", *mounts, "debian", "o")
    assert refused.code == 1
    assert f"mount {tmp_path}/inner on /x/y: " in refused.err.decode()
    assert list((tmp_path / "outer").iterdir()) == []
    (tmp_path / "outer" / "y").mkdir()
    (tmp_path / "inner" / "file").write_text("x")
    assert own("create", "--isolated", *mounts, "debian", "o").code == 0
    assert as_root(own, "o", "cat /x/y/file").text == "x"


@pytest.mark.parametrize("link", ["..{}", "{}", "/proc/1/root{}"])
def test_links_where_something_is_mounted(own: Program, tmp_path: Path, link: str) -> None:
    """A start resolves them only in the machine; `..` must not lead from its root to the host's."""
    outside = tmp_path / "outside"
    for folder in ("shared", "outside"):
        (tmp_path / folder).mkdir()
    assert own("create", "--isolated", "debian", "m").code == 0
    script = f"ln -s {link.format(outside)} /there; rm -rf /opt; ln -s /there /opt"
    assert as_root(own, "m", script).code == 0
    assert own("config", "set", "machine.m.mounts", f"{tmp_path}/shared:/there/deep/er").code == 0
    own("restart", "m", timeout=20)
    assert list(outside.iterdir()) == []
    assert list((tmp_path / "shared").iterdir()) == []


def test_links_to_what_a_start_has_open(own: Program, tmp_path: Path) -> None:
    """They lead into no share: mount points are created before ``/proc`` is mounted."""
    (tmp_path / "shared").mkdir()
    assert own("create", "--isolated", "debian", "m").code == 0
    numbers = range(3, 13)
    links = "; ".join(f"ln -s /proc/self/fd/{number} /to{number}" for number in numbers)
    assert as_root(own, "m", links).code == 0
    for number in numbers:
        mounts = f"{tmp_path}/shared:/to{number}/place/deeper"
        assert own("config", "set", "machine.m.mounts", mounts).code == 0
        own("restart", "m", timeout=20)
        assert list((tmp_path / "shared").iterdir()) == []


def test_devices_of_what_is_mounted(own: Program, tmp_path: Path) -> None:
    """They do not open; read-only mounts of the host stay read-only."""
    (tmp_path / "shared").mkdir()
    flags = ("--isolated", "--mount", f"{tmp_path}/shared:/s", "--mount", "/proc/sys:/t")
    assert own("create", *flags, "debian", "m").code == 0
    shown = as_root(own, "m", "grep -E ' /(s|t) ' /proc/mounts").lines
    assert all("nodev" in line for line in shown)
    assert len(shown) == 2


def linked(own: Program, folder: Path, *flags: str) -> None:
    """Create a machine ``m`` with a share inside a share, and replace the inner one by a link."""
    (folder / "outer/inner").mkdir(parents=True)
    (folder / "aside").mkdir()
    (folder / "aside/file").write_text("original")
    mounts = ("--mount", f"{folder}/outer:/outer", "--mount", f"{folder}/outer/inner:/data")
    assert own("create", "--isolated", *mounts, *flags, "m").code == 0
    script = f"touch /data/here; rm -r /outer/inner; ln -s {folder}/aside /outer/inner"
    assert as_root(own, "m", script).code == 0


def test_links_in_a_share_do_not_move_another(own: Program, tmp_path: Path) -> None:
    """A source is resolved when it is given; later, a link on its path is an error."""
    linked(own, tmp_path, "debian")
    assert own("stop", "m").code == 0
    refused = own("start", "m")
    assert "outer/inner: a part of this path is a symbolic link" in refused.err.decode(), refused
    assert refused.err.count(b"\n") == refused.code == 1
    (tmp_path / "outer/inner").unlink()
    (tmp_path / "outer/inner").mkdir()
    assert own("start", "m").code == 0
    assert as_root(own, "m", "ls /data").text == ""
    (tmp_path / "link").symlink_to("aside")
    given = f"{tmp_path}/link:/data"
    assert own("config", "set", "machine.m.mounts", given).code == 0
    assert own("restart", "m").code == 0
    assert as_root(own, "m", "cat /data/file").text == "original"
    assert own("config", "get", "machine.m.mounts").text == f"{given}\n"
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to("outer")  # the source stays what it was
    assert own("restart", "m").code == 0
    assert as_root(own, "m", "cat /data/file").text == "original"


def test_shares_of_an_earlier_version(own: Program, tmp_path: Path) -> None:
    """Its records have no resolved sources."""
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/file").write_text("here")
    (tmp_path / "link").symlink_to("plain")
    for name in ("plain", "link"):
        mount = f"{tmp_path}/{name}:/x"
        assert own("create", "--isolated", "--mount", mount, "debian", name).code == 0
        assert own("stop", name).code == 0
    given = {"ORBCTL_SIMULATOR_SHARE": str(tmp_path / "plain")}
    assert own("create", "debian", "shares", env=given).code == 0
    assert own("stop", "shares").code == 0
    for record in (tmp_path / "state/machines").glob("*/machine"):
        lines = record.read_text().splitlines(keepends=True)
        text = "".join(line for line in lines if not line.startswith("sources="))
        record.write_text(re.sub("^shares=/.*", r"\g<0>/", text, flags=re.MULTILINE))
    assert own("run", "-m", "plain", "cat", "/x/file").text == "here"
    assert own("run", "-m", "shares", "cat", f"{tmp_path}/plain/file").text == "here"
    assert "is a symbolic link" in own("start", "link").err.decode()


@pytest.mark.parametrize("boots", [True, False])
def test_where_shares_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, boots: bool) -> None:
    """Also one with a colon, and one at a place that a boot mounts."""
    monkeypatch.setenv("ORBCTL_SIMULATOR_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("ORBCTL_SIMULATOR_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "a:b"
    folder.mkdir()
    fields = {"shares": f"{folder}\t/dev", "init": "image" if boots else ""}
    dev = [] if boots else ["/dev", "/dev"]
    expected = [str(folder), str(folder), str(folder), f"/mnt/mac{folder}", *dev]
    assert shares.of(Machine("m", fields)) == [*expected, "/dev", "/mnt/mac/dev"]


def test_copies_of_a_machine_without_its_private_directories(own: Program, tmp_path: Path) -> None:
    """The host's stay hidden, whether they were removed or replaced by links."""
    assert own("create", "debian", "m").code == 0
    script = "rm -rf /root /home /var/cache && ln -s srv /home && ln -s srv /var/cache"
    assert as_root(own, "m", script).code == 0
    assert own("clone", "m", "cloned").code == 0
    assert own("export", "m", f"{tmp_path}/m.tar.zst").code == 0
    assert own("import", "-n", "imported", f"{tmp_path}/m.tar.zst").code == 0
    for name in ("cloned", "imported"):
        script = "readlink /home /var/cache; test -e /root || echo none"
        words = ("run", "-m", name, "-u", "root", "-w", "/", "sh", "-c", script)
        assert own(*words).text == "srv\nsrv\nnone\n"


@pytest.mark.parametrize("place", ["", "state", "state/machines", "cache"])
def test_the_simulators_own_files_are_not_shared(own: Program, tmp_path: Path, place: str) -> None:
    (tmp_path / "cache").mkdir()
    env = {"ORBCTL_SIMULATOR_CACHE": f"{tmp_path}/cache"}
    source = tmp_path / place
    refused = own("create", "--isolated", "--mount", f"{source}:/x", "debian", "m", env=env)
    assert f"mount {source}:/x: would share {tmp_path}/" in refused.err.decode(), refused
    assert refused.err.count(b"\n") == refused.code == 1
    refused = own("create", "debian", "m", env={**env, "ORBCTL_SIMULATOR_SHARE": str(source)})
    assert f"mount {source}: would share " in refused.err.decode(), refused
    assert own("list", "-q").text == ""
