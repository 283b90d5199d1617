"""Attacks by a booted machine's root on the host.

The root file systems of the tests have no Python and no compiler, but perl for system calls.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import secrets
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from orbctl_simulator import userns
from tests.contract.program import Answer
from tests.simulator.conftest import WITH_CHILD, Booted, have_init

pytestmark = pytest.mark.boot

EPERM, ENOENT, EACCES, EINVAL, ENOSYS, ESTALE, EOPNOTSUPP = 1, 2, 13, 22, 38, 116, 95
ARM = platform.machine() == "aarch64"
# Numbers of system calls on x86-64 and arm64.
NUMBERS = {
    "acct": (163, 89),
    "add_key": (248, 217),
    "adjtimex": (159, 171),
    "bpf": (321, 280),
    "clock_settime": (227, 112),
    "delete_module": (176, 106),
    "init_module": (175, 105),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "perf_event_open": (298, 241),
    "reboot": (169, 142),
    "settimeofday": (164, 170),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "syslog": (103, 116),
}


def number(name: str) -> int:
    return NUMBERS[name][ARM]


def call(booted: Booted, box: str, name: str, *arguments: str) -> tuple[int, int]:
    """Result and error number of a system call by root; arguments are perl expressions."""
    names = [f"$a{position}" for position in range(len(arguments))]
    sets = "".join(f"my {name} = {text};" for name, text in zip(names, arguments))
    words = ", ".join([str(number(name)), *names])
    script = f'{sets} my $r = syscall({words}); print $r, " ", $! + 0;'
    words = ("run", "-m", box, "-u", "root", "perl", "-e", script)
    result, error = booted(*words).text.split()
    return int(result), int(error)


def refused(answer: Answer) -> bool:
    return answer.code != 0


def test_devices(booted: Booted, box: str) -> None:
    """Only devices that every program needs or that are meant for unprivileged users exist."""
    shown = booted.root_in(box, "cd /dev; find . -type c -o -type b | sort").text.split()
    needed = {"full", "null", "pts/0", "pts/ptmx", "random", "tty", "urandom", "zero"}
    found = {entry[2:] for entry in shown if not re.match(r"./pts/[1-9]", entry)}
    assert needed <= found <= needed | {"fuse", "net/tun"}


@pytest.mark.parametrize(
    "place", ["/root", "/tmp", "/run", "/dev", "/dev/shm", "/var/lib/docker", "/var/lib/containers"]
)
def test_no_new_devices(booted: Booted, box: str, place: str) -> None:
    for kind in ("b 254 0", "c 1 1", "c 10 237"):
        assert refused(booted.root_in(box, f"mknod {place}/node {kind}")), kind
    assert refused(booted.root_in(box, f"test -e {place}/node"))


def test_devices_of_an_image_do_not_open(booted: Booted, small_root: Path) -> None:
    have_init(small_root, f"{WITH_CHILD} while :; do read line </command; done")
    os.mkfifo(small_root / "command")
    image = booted.image(small_root)
    (files,) = (booted.home / "images").glob(f"{image.replace(':', '_')}_*/.files")
    os.mknod(files / "null", 0o20666, os.makedev(1, 3))  # adding an image skips devices
    (files / "null").chmod(0o666)
    name = booted.create(image=image)
    assert refused(booted.root_in(name, "echo x >/null"))
    assert booted.root_in(name, "ls -l /null").text.startswith("crw")
    assert booted("delete", name).code == 0


@pytest.mark.parametrize("point", ["/", "/var/lib/docker", "/mnt/shared"])
def test_nodev_cannot_be_removed(booted: Booted, sharing: str, point: str) -> None:
    """Neither by root nor in namespaces that it creates."""
    for how in ("remount,dev", "remount,bind,dev", "remount,bind,rw,suid,dev"):
        for prefix in ("", "unshare -m ", "unshare -Urm "):
            assert refused(booted.root_in(sharing, f"{prefix}mount -o {how} {point}"))
    shown = booted.root_in(sharing, f"findmnt -n -o OPTIONS {point}").text
    assert "nodev" in shown.split(",")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shared with a machine") / "shared"
    path.mkdir()
    (path / "file").write_text("shared")
    (path.parent / "canary").write_text("not shared")
    return path


@pytest.fixture(scope="session")
def sharing(booted: Booted, shared: Path) -> str:
    """A machine with a directory of the host."""
    return booted.create("--isolated", "--mount", f"{shared}:/mnt/shared")


@pytest.mark.parametrize("point", ["/", "/dev", "/mnt/shared", "/var/lib/docker"])
def test_mounts_of_the_host_stay(booted: Booted, sharing: str, point: str) -> None:
    """Unmounting reveals nothing of the host."""
    for how in ("umount", "umount -l"):
        for prefix in ("", "unshare -m ", "unshare -Urm "):
            assert refused(booted.root_in(sharing, f"{prefix}{how} {point}"))


def test_shared_directory_has_no_way_out(booted: Booted, sharing: str, shared: Path) -> None:
    script = "cd /mnt/shared && cat file && ls ../canary canary /mnt/shared/../canary"
    assert booted.root_in(sharing, script).out == b"shared"
    assert (shared.parent / "canary").read_text() == "not shared"


@pytest.mark.parametrize("point", ["/", "/mnt/shared", "/var/lib/docker", "/dev"])
def test_no_file_by_its_handle(booted: Booted, sharing: str, shared: Path, point: str) -> None:
    """File handles do not lead to other directories of a visible file system."""
    inodes = [2, shared.parent.stat().st_ino, (shared.parent / "canary").stat().st_ino]
    for inode in inodes:
        for generation in (0, 1):
            script = (
                f'opendir(my $d, "{point}"); my $fd = fileno($d);'
                f' my $h = pack("IiII", 8, 1, {inode}, {generation});'
                f" my $r = syscall({number('open_by_handle_at')}, $fd, $h, 0);"
                ' print $r, " ", $! + 0;'
            )
            words = ("run", "-m", sharing, "-u", "root", "perl", "-e", script)
            result, error = map(int, booted(*words).text.split())
            assert result == -1
            assert error in (EPERM, ESTALE, EOPNOTSUPP)


OPENED = "perl -ne 'use Fcntl; chomp; print \"$_\\n\" if sysopen(F, $_, O_WRONLY)'"


def test_settings_of_the_kernel(booted: Booted, box: str) -> None:
    """Of all files below /proc/sys, only namespaced settings can be opened for writing."""
    opened = booted.root_in(box, f"find /proc/sys -type f | {OPENED}").text.split()
    own = r"(net|user|fs/mqueue)/|kernel/(hostname|domainname|sem|msg|shm|auto_msg|pid_max|ns_last)"
    assert [path for path in opened if not re.match(f"/proc/sys/({own})", path)] == []
    assert "/proc/sys/net/ipv4/ip_forward" in opened


#: Asks the kernel's audit system for its state, over netlink.
AUDIT = """
socket(my $s, 16, 3, 9) or print("none"), exit;
send($s, pack("LSSLL", 16, 1000, 5, 1, 0), 0, pack("SSLL", 16, 0, 0, 0)) or print("refused"), exit;
recv($s, my $answer, 4096, 0);
my (undef, $type, undef, undef, undef, $error) = unpack("LSSLLl", $answer);
print $type == 2 && $error < 0 ? "refused" : "answered";
"""


def hosts_network() -> tuple[list[str], list[str]]:
    """The host's interfaces and routes, except those of simulators, which may change meanwhile."""
    interfaces = [name for name in os.listdir("/sys/class/net") if not name.startswith("orb-")]
    routes = Path("/proc/net/route").read_text().splitlines()
    return sorted(interfaces), [line for line in routes if not line.startswith("orb-")]


def test_netlink(booted: Booted, own_box: str) -> None:
    """It changes the machine's own network, and reaches no other part of the kernel."""
    before = hosts_network()
    changes = (
        "link add stray type bridge",
        "addr add 198.51.100.1/24 dev stray",
        "link set stray up",
        "route add 203.0.113.0/24 dev stray",
        "rule add from 203.0.113.1 table 7",
        "link set eth0 down",
    )
    for change in changes:
        assert booted.root_in(own_box, f"ip {change}").code == 0, change
    assert hosts_network() == before
    assert booted.root_in(own_box, "ip link set eth0 netns 1; ip -o link show eth0").code == 0
    told = booted("run", "-m", own_box, "-u", "root", "perl", "-e", AUDIT).text
    assert told in ("refused", "none")


def test_a_machine_has_its_own_network_settings(booted: Booted, box: str) -> None:
    path = Path("/proc/sys/net/ipv4/ip_default_ttl")
    before = path.read_text()
    assert booted.root_in(box, f"echo 77 >{path} && cat {path}").text == "77\n"
    assert path.read_text() == before


@pytest.mark.parametrize(
    "path", ["/proc/sysrq-trigger", "/proc/kcore", "/proc/kmsg", "/proc/mtrr", "/proc/timer_list"]
)
def test_windows_into_the_kernel(booted: Booted, box: str, path: str) -> None:
    if not os.path.exists(path):
        pytest.skip(f"this kernel has no {path}")
    opens = "exit(!(sysopen(F, $ARGV[0], 0) && sysread(F, $x, 1)) && !sysopen(F, $ARGV[0], 1))"
    words = ("run", "-m", box, "-u", "root", "perl", "-e", opens, path)
    assert booted(*words).code == 1


def test_sys_cannot_be_written(booted: Booted, own_box: str) -> None:
    """Also not after mounting it as writable or a second time."""
    script = """
        mount -o remount,rw /sys; mkdir -p /mnt/sys; mount -t sysfs none /mnt/sys
        find /sys /mnt/sys -path '*/fs/cgroup' -prune -o -type f -perm /222 -print
    """
    opened = booted.root_in(own_box, f"({script}) | {OPENED}").text.split()
    assert [path for path in opened if "/net/" not in path] == []


def test_system_calls_that_reach_the_host(booted: Booted, box: str) -> None:
    """Modules, clocks, swap, kexec, accounting, the kernel log and probes are rejected."""
    nothing, empty = '"/nothing"', '""'
    now = 'pack("qq", time, 0)'
    attempts = {
        "init_module": ['"x" x 64', "64", empty],
        "delete_module": [nothing, "0"],
        "settimeofday": [now, "0"],
        "clock_settime": ["0", now],
        "adjtimex": ['pack("Ix204", 0x10)'],
        "swapon": [nothing, "0"],
        "swapoff": [nothing],
        "kexec_load": ["0", "0", "0", "0"],
        "acct": [nothing],
        "syslog": ["8", "0", "100"],
        "bpf": ["5", 'pack("II", 2, 2) . "\\0" x 120', "128"],
    }
    for name, arguments in attempts.items():
        result, error = call(booted, box, name, *arguments)
        assert (result, error in (EPERM, ENOSYS)) == (-1, True), (name, error)
    event = 'pack("IIQ", 1, 128, 0) . "\\0" x 112'
    result, error = call(booted, box, "perf_event_open", event, "-1", "0", "-1", "0")
    assert result == -1
    assert error in (EPERM, EACCES, ENOENT, ENOSYS)


def test_reboot_affects_only_the_machine(booted: Booted, own_box: str) -> None:
    """No argument of the system call reaches the host, which would have ended this test."""
    for command in ("0x89ABCDEF", "0x00000000", "0x45584543", "0xD000FCE2"):
        result, error = call(booted, own_box, "reboot", "0xfee1dead", "672274793", command)
        assert (result, error) == (-1, EINVAL)


@pytest.fixture
def canary() -> Iterator[subprocess.Popen[bytes]]:
    """A process of the host."""
    process = subprocess.Popen(["sleep", "600"])
    yield process
    assert process.poll() is None
    process.kill()
    process.wait()


def test_processes_of_the_host(
    booted: Booted, own_box: str, canary: subprocess.Popen[bytes]
) -> None:
    """They can neither be seen nor signaled."""
    assert refused(booted.root_in(own_box, f"kill -0 {canary.pid}"))
    names = booted.root_in(own_box, "cat /proc/[0-9]*/comm").text.split()
    assert not {"pytest", "python", "python3"} & {*names}
    init = booted.pids(own_box)[0]
    booted.root_in(own_box, "kill -9 -1")
    assert Path(f"/proc/{init}").exists()


def test_sockets_of_the_host(booted: Booted, box: str, tmp_path: Path) -> None:
    """Neither its loopback nor its Unix sockets can be reached."""
    abstract = f"canary-{secrets.token_hex(4)}"
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as unix,
        socket.socket(socket.AF_UNIX) as path,
    ):
        unix.bind(f"\0{abstract}")
        path.bind(str(tmp_path / "socket"))
        for listener in (unix, path):
            listener.listen()
        script = f"""
            use Socket;
            socket(S, AF_INET, SOCK_STREAM, 0);
            print "tcp " if connect(S, sockaddr_in({tcp.getsockname()[1]}, inet_aton("127.0.0.1")));
            for my $name ("\\0{abstract}", "{tmp_path}/socket") {{
                socket(U, AF_UNIX, SOCK_STREAM, 0);
                print "unix " if connect(U, sockaddr_un($name));
            }}
        """
        words = ("run", "-m", box, "-u", "root", "perl", "-e", script)
        assert booted(*words).text == ""
    assert abstract not in booted.root_in(box, "cat /proc/net/unix").text


def test_files_of_the_host(booted: Booted, box: str) -> None:
    """No process of the machine has a root, directory or open file of the host."""
    machines = str(booted.home / "machines")
    script = """
        for my $p (glob "/proc/[0-9]*") {
            for my $l ("$p/root", "$p/cwd", glob "$p/fd/*") { print "$l\\n" if -e $l . $ARGV[0]; }
        }
    """
    words = ("run", "-m", box, "-u", "root", "perl", "-e", script)
    assert booted(*words, machines).text == ""
    assert "/proc/1/root" in booted(*words, "/etc/hostname").text
    assert booted.root_in(box, f"cd /; cd ..; test -d './{machines}'").code == 1


def test_control_groups(booted: Booted, own_box: str) -> None:
    """In every hierarchy, only the machine's part is visible, and its limits are read-only."""
    mark = f"canary-{secrets.token_hex(4)}"
    made = []
    lines = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    for point in (fields[1] for fields in lines if fields[2] in ("cgroup", "cgroup2")):
        made.append(Path(point, mark))
        made[-1].mkdir()
    kinds = [line.split(":")[1] for line in Path("/proc/self/cgroup").read_text().splitlines()]
    options = [kind if "=" not in kind else f"none,{kind}" for kind in kinds if kind]
    mounts = [f"mount -t cgroup -o {option} none /mnt/{n}" for n, option in enumerate(options)]
    folders = " ".join(f"/mnt/{n}" for n in range(len(mounts) + 1))
    script = f"""
        mkdir -p {folders}; mount -t cgroup2 none /mnt/{len(mounts)}
        {"; ".join(mounts) or ":"}
        find /mnt /sys/fs/cgroup -name '{mark}' -o -name release_agent -o -name 'orb-*'
        echo files:
        find {folders} /sys/fs/cgroup -maxdepth 1 -type f | {OPENED}
        rmdir /mnt/0/new 2>/dev/null; mkdir /mnt/0/new && echo made
    """
    try:
        found, _, opened = booted.root_in(own_box, script).out.decode().partition("files:\n")
    finally:
        for path in made:
            path.rmdir()
    assert found == ""
    assert {path.rpartition("/")[2] for path in opened.split() if path != "made"} <= {
        *("cgroup.procs", "cgroup.subtree_control", "cgroup.threads"),
    }


def test_limits_cannot_be_lifted(booted: Booted) -> None:
    name = booted.create("--memory", "150")
    script = """
        mkdir -p /mnt/m; mount -t cgroup -o memory none /mnt/m
        for f in /mnt/m/memory.limit_in_bytes /sys/fs/cgroup/memory.max; do echo -1 >$f; done
        for d in /mnt/m /sys/fs/cgroup; do echo $$ >$d/../cgroup.procs; done
        exec perl -e '$x = "x" x (300 << 20); print "lifted"'
    """
    assert booted.root_in(name, script).out == b""
    assert booted("delete", name).code == 0


_libc = ctypes.CDLL(None, use_errno=True)


def test_keys_of_the_caller(booted: Booted, box: str) -> None:
    """Keys of the session that enters the machine cannot be found or read in it."""
    mark = f"canary-{secrets.token_hex(4)}"
    code = (
        "import ctypes, os, sys; c = ctypes.CDLL(None);"
        f"c.syscall({number('keyctl')}, 1, None);"  # a new session, also for what it starts
        f"key = c.syscall({number('add_key')}, b'user', b'{mark}', b'secret', 6, -3);"
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:], str(key)])"
    )
    search = (
        f"my ($t, $d) = ('user', '{mark}'); my $b = 'x' x 64; my $n = $ARGV[0] + 0;"
        f"my $s = syscall({number('keyctl')}, 10, -3, $t, $d, 0);"
        f"my $r = syscall({number('keyctl')}, 11, $n, $b, 64);"
        f"my $l = syscall({number('keyctl')}, 8, $n, -5);"
        'print "$s $r $l ", ($n > 0)'
    )
    started = ["-m", "orbctl_simulator", "run", "-m", box, "-u", "root"]
    words = [booted.program.command[0], "-c", code, *started, "perl", "-e", search]
    answer = subprocess.run(words, env=booted.program.env, capture_output=True, text=True)
    assert answer.stdout == "-1 -1 -1 1", answer
    assert mark not in booted.root_in(box, "cat /proc/keys").text


def test_keys_of_another_machine(booted: Booted, box: str, own_box: str) -> None:
    """Keys are addressed by numbers of the whole kernel; only owners' ids protect them."""
    add = (
        "my ($t, $d, $p) = ('user', 'canary', 'secret');"
        f"my $k = syscall({number('add_key')}, $t, $d, $p, 6, -3);"
        f"syscall({number('keyctl')}, 5, $k, 0x3f3f3f00);"  # all rights for its owner and group
        f"syscall({number('keyctl')}, 8, $k, -4); print $k"  # and it stays, in the owner's ring
    )
    key = booted("run", "-m", own_box, "-u", "root", "perl", "-e", add).text
    read = (
        f"my $b = 'x' x 64; my $k = {key} + 0;"
        f"my $r = syscall({number('keyctl')}, 11, $k, $b, 64); print $r"
    )
    assert int(key) > 0
    assert booted("run", "-m", own_box, "-u", "root", "perl", "-e", read).text == "6"
    assert booted("run", "-m", box, "-u", "root", "perl", "-e", read).text == "-1"
    assert "canary" in booted.root_in(own_box, "cat /proc/keys").text
    assert "canary" not in booted.root_in(box, "cat /proc/keys").text


ATTACKER = r"""
    use Fcntl; $| = 1;
    my ($mark, $found, $seen) = ($ARGV[0], 0, 0);
    print "ready\n";
    my %done;
    until (-e "/run/enough") {
        opendir(my $d, "/proc") or die;
        for my $p (grep { /^\d+$/ && $_ > 1 && $_ != $$ } readdir $d) {
            next if ($done{$p} // 0) > 200;
            $done{$p}++;
            for my $l ("exe", "cwd", "root") {
                my $t = readlink "/proc/$p/$l" // next;
                $seen++;
                print "$l leads to $t\n" if $t =~ /python|$mark/;
            }
            for my $name ("environ", "maps", "mountinfo", "auxv") {
                sysopen(my $f, "/proc/$p/$name", O_RDONLY) or next;
                sysread($f, my $text, 1 << 20);
                print "$name of $p\n" if $text =~ /python|$mark/;
            }
            for my $l (glob "/proc/$p/fd/*") {
                my $t = readlink $l // next;
                print "$l leads to $t\n" if $t =~ m{python|$mark|/orbctl|/machines/};
            }
        }
    }
    print "seen\n" if $seen;
"""


def test_entering_process_cannot_be_inspected(booted: Booted, own_box: str) -> None:
    """A process that enters the machine exposes nothing before it becomes the command.

    An attacker in the machine inspects all processes meanwhile; it does see the commands.
    """
    mark = f"canary-{secrets.token_hex(4)}"
    words = ("run", "-m", own_box, "-u", "root", "perl", "-e", ATTACKER, mark)
    attacker = booted.program.started(*words)
    assert attacker.stdout
    attacker.stdout.readline()
    env = {"SECRET": mark}
    for user in ("root", "user") * 20:
        answer = booted("run", "-m", own_box, "-u", user, "true", env=env)
        assert answer.code == 0
    booted.root_in(own_box, "sleep 0.3; touch /run/enough")
    told = attacker.communicate(timeout=60)[0].decode()
    assert told == "seen\n"
    assert attacker.returncode == 0


def test_supervisor_is_closed(booted: Booted, box: str) -> None:
    """It keeps nothing of its creator, and other users cannot inspect it."""
    _, supervisor = booted.pids(box)
    proc = Path(f"/proc/{supervisor}")
    assert (proc / "environ").read_bytes() in (b"", b"\0")
    held = {os.readlink(path) for path in (proc / "fd").iterdir()}
    files = {path for path in held if path.startswith("/") and not path.startswith("/dev/")}
    lock = str(booted.directory(box) / "lock")
    assert lock in files
    # The last is `make coverage`'s.
    known = r"/run/orbctl-simulator/ids-\d+|.*/\.cache/coverage/lines"
    assert all(re.fullmatch(known, path) for path in files - {lock, "/"})
    # The root is the machine's own. Both ends of the console's terminal have the names that they
    # have in the machine.
    assert held - files >= {"/dev/null", "/dev/pts/ptmx", "/dev/console"}
    assert proc.stat().st_uid == 0
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    for name in ("fd", "environ", "exe"):
        look = ["ls", "-l", str(proc / name)] if name != "environ" else ["cat", str(proc / name)]
        assert subprocess.run([*nobody, *look], capture_output=True).returncode != 0


def test_a_machine_has_its_own_ids_and_namespaces(booted: Booted, own_box: str) -> None:
    """A machine's processes have their own ids and namespaces on the host."""
    init = booted.pids(own_box)[0]
    status = Path(f"/proc/{init}/status").read_text()
    uids = re.findall(r"^[UG]id:\s+(\d+)", status, re.MULTILINE)
    assert all(int(uid) > userns.STORED for uid in uids)
    namespaces = {"cgroup", "ipc", "mnt", "net", "pid", "user", "uts"}
    for name in namespaces:
        assert os.readlink(f"/proc/{init}/ns/{name}") != os.readlink(f"/proc/self/ns/{name}")
