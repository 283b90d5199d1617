"""The world of a booted machine: its namespaces, its mounts, and what its init starts with.

It is made in two halves. `_outside` has the host's rights, and no other process of the machine is
there yet: it enters the control groups, stacks the root file system in a mount namespace of its
own, puts the devices and what is shared into it, and goes into the machine's user namespace. What
it has mounted is locked there: root of the machine can neither unmount it nor take away its
`nodev`. `_inside` has no more rights than root of the machine: it mounts what a kernel has to offer
to such a root, leaves the host behind, sets up the files, and becomes the image's init.
"""

from __future__ import annotations

import _socket
import ctypes
import os
import resource
import select
import time

from . import cgroups, guest, userns
from .linux import (
    CLONE_NEWIPC,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWTIME,
    CLONE_NEWUTS,
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    default_signals,
    detach,
    end_with_parent,
    mount,
    pivot_root,
    sethostname,
    unshare,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

MS_SHARED = 1 << 20
CLONE_NEWCGROUP, CLONE_NEWNET = 0x02000000, 0x40000000
_SPACES = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWCGROUP

_DEVICES = (
    *(("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9)),
    ("tty", 5, 0),
)
# Made for users without rights; only where the host has them already: opening one loads a module.
_MISC_DEVICES = (("fuse", "fuse"), ("net/tun", "tun"))
_LINKS = (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2"))
_SAFE = MS_NOSUID | MS_NODEV | MS_NOEXEC
# Also /tmp, whatever the image makes of it: what is pushed to there must not pass by luck.
_TEMPORARY = {"/run": "mode=755,size=20%,nr_inodes=800k", "/tmp": "mode=1777"}
# Where engines of containers keep theirs: their overlays cannot lie on ours.
_ENGINES = (("containerd", 0o711), ("containers", 0o755), ("docker", 0o710))

# Limits that root of a machine could not raise: the kernel asks for the host's rights then.
_UNLIMITED = resource.RLIM_INFINITY
_LIMITS = (
    (resource.RLIMIT_NOFILE, 1024, 1 << 20),
    (resource.RLIMIT_MEMLOCK, 8 << 20, _UNLIMITED),
    (resource.RLIMIT_NPROC, _UNLIMITED, _UNLIMITED),
    (resource.RLIMIT_CORE, 0, _UNLIMITED),
    (13, 40, 40),  # RLIMIT_NICE
)

# Rights that have no effect in a user namespace, and whose holders believe that they have one:
# sys_module, sys_rawio, sys_pacct, sys_time, mac_override, mac_admin, syslog, wake_alarm,
# block_suspend, audit_read.
_DROPPED = (16, 17, 20, 25, 32, 33, 34, 35, 36, 37)
_PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _JOIN_SESSION_KEYRING, _TIOCSPTLCK = 4, 24, 1, 0x40045431
_KEYCTL = {"x86_64": 250}  # the others share one number

_INITS = ("/sbin/init", "/usr/sbin/init", "/lib/systemd/systemd", "/usr/lib/systemd/systemd")
ENVIRONMENT = {
    # OrbStack's machines are LXC's; its images look for this name, and systemd for any.
    "container": "lxc",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "TERM": "dumb",
}

_libc = ctypes.CDLL(None, use_errno=True)


class Plan:
    """What is to be booted."""

    def __init__(self, machine_id: str, fields: dict[str, str], lowers: list[str]) -> None:
        self.id, self.fields = machine_id, fields
        # Root file systems, the uppermost first, and the directory of what is written over them.
        self.lowers, self.files = lowers, "."
        self.shares: list[Share] = []
        # Whether it has never been set up, and never been booted as itself.
        self.is_new = self.is_first = False
        self.clock: float | None = None  # what it begins with, where it is not the host's
        self.first_id = 0


class Share:
    """A file or directory of the host's that the machine sees, too, and whose it is."""

    def __init__(self, source: str, target: str, uid: int, gid: int) -> None:
        self.source, self.target, self.uid, self.gid = source, target, uid, gid
        self._tree, self._is_directory = -1, True

    def open(self, first_id: int) -> None:
        space = userns.of_share(first_id, self.uid, self.gid, guest.USER_ID)
        try:
            flags = userns.NO_SUID | userns.NO_DEVICES
            self._tree = userns.copy_of_mount(self.source, space, flags)
            self._is_directory = os.path.isdir(self.source)
        except OSError as error:
            raise OSError(f"mount {self.source}: {error.strerror}") from None
        finally:
            os.close(space)

    def attach(self) -> None:
        """Put it in its place, which is made in the machine's own files if need be."""
        try:
            if self._is_directory:
                os.makedirs(self.target, mode=0o755, exist_ok=True)
            else:
                os.makedirs(os.path.dirname(self.target), mode=0o755, exist_ok=True)
                os.close(os.open(self.target, os.O_CREAT | os.O_RDONLY | os.O_NONBLOCK, 0o644))
            userns.put_mount(self._tree, self.target)
        except OSError as error:
            raise OSError(f"mount {self.source} on {self.target}: {error.strerror}") from None
        finally:
            os.close(self._tree)


def drop_rights() -> None:
    for number in _DROPPED:
        _libc.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(number), 0, 0, 0)


def hide_from_others() -> None:
    """Nobody without the host's own rights may look into this process, by /proc or by ptrace."""
    _libc.prctl(_PR_SET_DUMPABLE, ctypes.c_ulong(0), 0, 0, 0)


def leave_keys() -> None:
    """Have no key of the caller's session any more."""
    number = _KEYCTL.get(os.uname().machine, 219)
    userns.system_call(number, "session keyring", _JOIN_SESSION_KEYRING, None)


class _Needs:
    """Says what a host must have for a step that it refused."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: object, __: object) -> None:
        if isinstance(error, OSError):
            raise OSError(f"needs {self._what} ({error.strerror or error})") from None


class Builder:
    """Makes the world in a child of the supervisor.

    It writes lines to `report`: ``init PID``, then ``built`` with what the supervisor takes from
    that process (its terminal's two ends, its socket) and the kind of its init, or ``error TEXT``.
    From `orders` it reads words that end with a NUL: paths and contents of files, then ``!``.
    """

    def __init__(self, plan: Plan, report: int, orders: int) -> None:
        self._plan, self._report, self._orders = plan, report, orders
        self._first = plan.first_id

    def run(self) -> NoReturn:
        """Never returns; the init that it leaves behind is its parent's to wait for."""
        try:
            end_with_parent()
            self._outside()
            pid = os.fork()
            if pid == 0:
                self._inside()
            self._tell(f"init {pid}")
        except BaseException as error:
            self._tell(f"error {error}")
        os._exit(0)

    def _tell(self, what: str) -> None:
        line = what.replace("\n", " ")
        os.write(self._report, f"{line}\n".encode(errors="surrogateescape"))

    def _outside(self) -> None:
        fields = self._plan.fields
        cpus, memory = float(fields.get("cpu") or 0), int(fields.get("memory_mib") or 0) << 20
        with _Needs("control groups of version 2, Linux 5.14 or later"):
            cgroups.enter(self._plan.id, self._first, cpus, memory)
        for kind, soft, hard in _LIMITS:
            _raise_limit(kind, soft, hard)
        with _Needs("user namespaces, which this host, or the container it is, does not allow"):
            self._own = userns.of_machine(self._first)
        unshare(CLONE_NEWNS)
        mount(None, "/", None, MS_REC | MS_PRIVATE)
        host = os.open("/", os.O_PATH | os.O_DIRECTORY)
        for share in self._plan.shares:
            share.open(self._first)
        os.umask(0)
        self._stack()
        place = os.open(".", os.O_PATH | os.O_DIRECTORY)
        # Without what is mounted in it, ever: nothing of the host's is written when files are.
        self._bare = userns.copy_of_mount("system")
        devices = _misc_devices()
        _change_root(os.open("system", os.O_PATH | os.O_DIRECTORY))
        with userns.FileOwner(self._first):
            self._mount_outer(devices)
            for share in self._plan.shares:
                share.attach()
        _change_root(host)
        os.fchdir(place)
        if self._plan.clock is not None:
            _start_clock(self._plan.clock)
        userns.become_root_in(self._own)
        hide_from_others()
        with _Needs("namespaces within user namespaces"):
            unshare(_SPACES)
        end_with_parent()

    def _stack(self) -> None:
        """The overlay, by relative paths: the state folder's own may hold what options cannot."""
        files = os.path.realpath(self._plan.files)
        store = userns.of_store(self._first)
        trees = []
        for path, space in [(lower, self._own) for lower in self._plan.lowers] + [(files, store)]:
            with _Needs(f"Linux 5.19 or later, and {path} on ext4, xfs, btrfs or a tmpfs"):
                trees.append(userns.copy_of_mount(path, space, userns.NO_DEVICES))
        mount("tmpfs", f"{files}/root", "tmpfs", MS_NODEV | MS_NOSUID, "size=1m")
        os.chdir(f"{files}/root")
        lowers = [str(number) for number in range(len(self._plan.lowers))]
        for name, tree in zip([*lowers, "stored"], trees):
            os.mkdir(name, 0o755)
            userns.put_mount(tree, name)
        os.mkdir("system", 0o755)
        self._upper = os.open("stored/upper", os.O_PATH | os.O_DIRECTORY)
        options = f"lowerdir={':'.join(lowers)},upperdir=stored/upper,workdir=stored/work"
        with userns.FileOwner(self._first):
            options += ",index=off,redirect_dir=nofollow,metacopy=off"
            with _Needs(f"overlays in {files}, so ext4, xfs, btrfs or a tmpfs"):
                mount("overlay", "system", "overlay", MS_NODEV, options)

    def _mount_outer(self, misc: list[tuple[str, int, int]]) -> None:
        """What only the host can mount: devices work on no other's file system."""
        owner = f"uid={self._first},gid={self._first}"
        os.makedirs("/dev", mode=0o755, exist_ok=True)
        mount("tmpfs", "/dev", "tmpfs", MS_NOSUID | MS_NOEXEC, f"mode=755,size=1m,{owner}")
        for name, major, minor in (*_DEVICES, *misc):
            os.makedirs(os.path.dirname(f"/dev/{name}"), mode=0o755, exist_ok=True)
            os.mknod(f"/dev/{name}", 0o20666, os.makedev(major, minor))
        for name, path in _LINKS:
            os.symlink(f"/proc/self/fd{path}", f"/dev/{name}")
        os.symlink("pts/ptmx", "/dev/ptmx")
        for name in ("pts", "shm", "mqueue"):
            os.mkdir(f"/dev/{name}", 0o755)
        os.close(os.open("/dev/console", os.O_CREAT | os.O_WRONLY, 0o600))
        for path, options in _TEMPORARY.items():
            if self._is_shared_below(path):
                _mount_temporary(path, f"{options},{owner}")
        for name, mode in _ENGINES:
            self._put_on_disk(f"var/lib/{name}", mode)

    def _is_shared_below(self, path: str) -> bool:
        """Then it must be there before what is shared, or that would be hidden."""
        return any(share.target.startswith(f"{path}/") for share in self._plan.shares)

    def _put_on_disk(self, path: str, mode: int) -> None:
        """Have a directory on the host's file system itself, where it is stored anyway.

        One that the image fills is left alone: what is stored is only what was changed in it.
        """
        os.makedirs(f"/{path}", mode, exist_ok=True)
        stored = os.open(".", os.O_PATH | os.O_DIRECTORY, dir_fd=self._upper)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
        try:
            for name in path.split("/"):
                inner = os.open(name, flags, dir_fd=stored)
                os.close(stored)
                stored = inner
            if {*os.listdir(f"/{path}")} == {*os.listdir(stored)}:
                tree = userns.copy_of_mount(stored)
                userns.put_mount(tree, f"/{path}")
                os.close(tree)
        except OSError:
            return
        finally:
            os.close(stored)

    def _inside(self) -> NoReturn:
        try:
            os.setsid()
            os.umask(0)
            sethostname(self._plan.fields["name"])
            self._mount_inner()
            os.umask(0o022)
            init = _find_init()
            systemd = os.path.realpath(init).endswith("/systemd")
            socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM)
            socket.bind(b"\0orb")
            ends = _make_console()
            leave_keys()
            drop_rights()
            fds = " ".join(map(str, (*ends, socket.fileno())))
            self._tell(f"built {fds} {'systemd' if systemd else 'other'}")
            files = self._await_orders()
            end_with_parent()
            if select.select([self._orders], [], [], 0)[0]:
                os._exit(1)  # too late: it has just ended
            self._set_up_files(files)
            for fd in (0, 1, 2):
                os.dup2(ends[1], fd)
            default_signals()
            notify = {"NOTIFY_SOCKET": "@orb"} if systemd else {}
            os.execve(init, [init], {**ENVIRONMENT, **notify})
        except BaseException as error:
            self._tell(f"error {error}")
        os._exit(1)

    def _mount_inner(self) -> None:
        """While the host's own ones are in sight: the kernel gives no other root a fuller view.

        The root is bound to itself, since what the host has mounted cannot become a root here.
        """
        # What was open is in the namespace that was left; the current directory came along.
        host = os.open("/", os.O_PATH | os.O_DIRECTORY)
        mount("system", "system", None, MS_BIND | MS_REC)
        root = os.open("system", os.O_PATH | os.O_DIRECTORY)
        _change_root(root)
        for path in ("/proc", "/sys"):
            os.makedirs(path, mode=0o755, exist_ok=True)
        with _Needs("/proc and /sys whole, not covered in part as in a container"):
            mount("proc", "/proc", "proc", _SAFE)
            mount("sysfs", "/sys", "sysfs", _SAFE | MS_RDONLY)
        if os.path.isdir("/sys/fs/cgroup"):
            mount("cgroup2", "/sys/fs/cgroup", "cgroup2", _SAFE)
        options = "newinstance,ptmxmode=0666,mode=0620,gid=5"
        mount("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, options)
        mount("mqueue", "/dev/mqueue", "mqueue", _SAFE)
        for path, options in {**_TEMPORARY, "/dev/shm": "mode=1777"}.items():
            if not self._is_shared_below(path):
                _mount_temporary(path, options)
        _change_root(host)
        os.fchdir(root)
        pivot_root()
        detach(".")
        os.chdir("/")
        mount(None, "/", None, MS_REC | MS_SHARED)  # as systemd leaves it where no container is

    def _await_orders(self) -> dict[str, str]:
        """The supervisor's word that all is written down, and files that its machine needs."""
        data = b""
        while not data.endswith(b"!\0"):
            more = os.read(self._orders, 1 << 16)
            if not more:
                os._exit(1)
            data += more
        words = data.decode(errors="surrogateescape").split("\0")[:-2]
        return dict(zip(words[::2], words[1::2]))

    def _set_up_files(self, files: dict[str, str]) -> None:
        fields = self._plan.fields
        root = os.open("/", os.O_PATH | os.O_DIRECTORY)
        _change_root(self._bare)
        if self._plan.is_new:
            guest.prepare(fields["name"], fields["user"])
            _say_up_to_date()
        if self._plan.is_first:
            _renew_identity()
        guest.set_hostname(fields["name"])
        _write({path: text for path, text in files.items() if not path.startswith("/run/")})
        _change_root(root)
        _write({path: text for path, text in files.items() if path.startswith("/run/")})


def _change_root(directory: int) -> None:
    """To and fro: links in the machine's files lead nowhere else meanwhile."""
    os.fchdir(directory)
    os.chroot(".")


def _mount_temporary(path: str, options: str) -> None:
    os.makedirs(path, mode=0o755, exist_ok=True)
    mount("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV, options)


def _misc_devices() -> list[tuple[str, int, int]]:
    with open("/proc/misc") as file:
        there = {name: int(number) for number, name in (line.split() for line in file)}
    return [(path, 10, there[name]) for path, name in _MISC_DEVICES if name in there]


def _make_console() -> tuple[int, int]:
    """A terminal of the machine's own, the first one, as its console; both its ends."""
    ours = os.open("/dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY)
    _libc.ioctl(ours, ctypes.c_ulong(_TIOCSPTLCK), ctypes.byref(ctypes.c_int(0)))
    mount("/dev/pts/0", "/dev/console", None, MS_BIND)
    return ours, os.open("/dev/console", os.O_RDWR | os.O_NOCTTY)


def _find_init() -> str:
    for path in _INITS:
        if os.access(path, os.X_OK):
            return path
    raise OSError("its image has no init")


def _renew_identity() -> None:
    """A machine that is new, or a copy, has an id of its own."""
    if os.path.lexists("/etc/machine-id"):
        ident = bytearray(os.urandom(16))
        ident[6], ident[8] = ident[6] & 0x0F | 0x40, ident[8] & 0x3F | 0x80  # as systemd makes it
        _write({"/etc/machine-id": f"{ident.hex()}\n"})
    if os.path.isfile("/var/lib/dbus/machine-id") and not os.path.islink(
        "/var/lib/dbus/machine-id"
    ):
        os.unlink("/var/lib/dbus/machine-id")


def _say_up_to_date() -> None:
    """Spare systemd what the image's package manager has done when it made it.

    The users, the linker's cache and the like that ``ConditionNeedsUpdate=`` is about: they would
    be made once more at the first boot of each new machine.
    """
    for place in ("/etc", "/var"):
        if os.path.isdir("/usr/lib/systemd") and not os.path.lexists(f"{place}/.updated"):
            newest = os.stat("/usr").st_mtime_ns
            os.close(os.open(f"{place}/.updated", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            os.utime(f"{place}/.updated", ns=(newest, newest))


def _write(files: dict[str, str]) -> None:
    """In place of whatever is there."""
    for path, text in files.items():
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        if os.path.lexists(path):
            os.unlink(path)
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        with open(fd, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)


def _raise_limit(kind: int, soft: int, hard: int) -> None:
    try:
        resource.setrlimit(kind, (soft, hard))
    except (OSError, ValueError):  # this root has no sys_resource, as in a container
        most = resource.getrlimit(kind)[1]
        if most != _UNLIMITED:
            soft = most if soft == _UNLIMITED else min(soft, most)
        resource.setrlimit(kind, (soft, most))


def _start_clock(begins: float) -> None:
    """The time since the boot begins with this one, for this process's children."""
    unshare(CLONE_NEWTIME)
    with open("/proc/self/timens_offsets", "w") as file:
        for name, clock in (("monotonic", time.CLOCK_MONOTONIC), ("boottime", time.CLOCK_BOOTTIME)):
            seconds, nanoseconds = divmod(int(begins * 10**9) - time.clock_gettime_ns(clock), 10**9)
            file.write(f"{name} {seconds} {nanoseconds}\n")
