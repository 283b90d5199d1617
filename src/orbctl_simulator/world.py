"""Building the world of a booted machine: its namespaces, its mounts, and its first process.

`_outside` runs with the host's rights, before the machine has any process: it joins the control
groups, stacks the root file system in a private mount namespace, adds devices and shares, and
enters the machine's user namespace. The kernel locks these mounts: the machine's root can neither
unmount them nor change their ``nodev``.

`_inside` runs as the machine's root: it mounts what the kernel allows there, detaches the host's
root, sets up files, and executes the image's init.
"""

from __future__ import annotations

import _socket
import ctypes
import os
import select

from . import cgroups, generators, guest, guestfiles, userns
from .linux import (
    CLONE_NEWIPC,
    CLONE_NEWNS,
    CLONE_NEWPID,
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
    setns,
    unshare,
)
from .parts import INITS
from .rights import (
    drop_capabilities,
    hide_from_others,
    leave_keys,
    raise_limits,
    start_clock,
    use_default_scheduling,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from .bootplan import Plan

MS_SHARED = 1 << 20
CLONE_NEWCGROUP = 0x02000000
_SPACES = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWCGROUP
_SAFE = MS_NOSUID | MS_NODEV | MS_NOEXEC

_DEVICES = (
    *(("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9)),
    ("tty", 5, 0),
)
# Devices for unprivileged users. Opening one whose driver is not loaded would load it on the host.
_MISC_DEVICES = (("fuse", "fuse"), ("net/tun", "tun"))
_LINKS = (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2"))
# /tmp is a tmpfs in every image, so files pushed there are lost, as reported of OrbStack.
_TEMPORARY = {"/run": "mode=755,size=20%,nr_inodes=800k", "/tmp": "mode=1777"}
# Storage of container engines, which cannot stack their overlays on ours.
_ENGINES = (("containerd", 0o711), ("containers", 0o755), ("docker", 0o710))

ENVIRONMENT = {
    # LXC's name: its images check for it, and OrbStack's machines are based on them.
    "container": "lxc",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "TERM": "dumb",
}
_TIOCSPTLCK = 0x40045431

_libc = ctypes.CDLL(None, use_errno=True)


class _Needs:
    """Turns an error into what the host would need."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: object, __: object) -> None:
        if isinstance(error, OSError):
            raise OSError(f"needs {self._what} ({error.strerror or error})") from None


class Builder:
    """Builds the world in a child of the supervisor.

    It reports lines: ``init PID``, then ``built`` with the numbers of descriptors that the
    supervisor takes from that process (both ends of the console, a socket, the files without what
    is mounted in them, and what `generators.mask` returns) and the kind of init, or ``error TEXT``.
    The first process waits for `orders`: paths and contents of files, then ``!``, each terminated
    by a NUL.

    `spaces` are the machine's user namespace and network namespace.
    """

    def __init__(
        self, plan: Plan, report: int, orders: int, spaces: tuple[int, int], secret: int = -1
    ) -> None:
        self._plan, self._report, self._orders = plan, report, orders
        self._own, self._network = spaces
        self._secret = secret
        self._first = plan.first_id

    def run(self) -> NoReturn:
        """Leaves the machine's first process to the supervisor, as its child."""
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
        plan = self._plan
        cpus = float(plan.fields.get("cpu") or 0)
        memory = int(plan.fields.get("memory_mib") or 0) << 20
        use_default_scheduling()
        with _Needs("control groups of version 2, Linux 5.14 or later"):
            cgroups.enter(plan.id, self._first, cpus, memory)
        raise_limits()
        unshare(CLONE_NEWNS)
        mount(None, "/", None, MS_REC | MS_PRIVATE)
        host = os.open("/", os.O_PATH | os.O_DIRECTORY)
        for share in plan.shares:
            share.open(self._first)
        os.umask(0)
        self._stack()
        place = os.open(".", os.O_PATH | os.O_DIRECTORY)
        # A copy without later mounts: setting up files never writes to what the host shares.
        self._bare = userns.copy_of_mount("system")
        devices = _misc_devices()
        _change_root(os.open("system", os.O_PATH | os.O_DIRECTORY))
        with userns.FileOwner(self._first):
            for share in plan.shares:
                share.find_target()
            self._mount_outer(devices)
            for share in plan.shares:
                share.make_target()
            for share in plan.shares:
                share.attach()
        _change_root(host)
        os.fchdir(place)
        if plan.clock is not None:
            start_clock(plan.clock)
        userns.become_root_in(self._own)
        hide_from_others()
        with _Needs("namespaces within user namespaces"):
            unshare(_SPACES)
            setns(self._network)
        end_with_parent()

    def _stack(self) -> None:
        """Mount the overlay by relative paths: mount options cannot quote every path."""
        files = os.path.realpath(self._plan.files)
        store = userns.of_store(self._first)
        trees = []
        for path, space in [(lower, self._own) for lower in self._plan.lowers] + [(files, store)]:
            with _Needs(f"Linux 5.19 or later, and {path} on ext4, xfs, btrfs or tmpfs"):
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
        options += ",index=off,redirect_dir=nofollow,metacopy=off"
        needs = _Needs(f"overlays in {files}, so ext4, xfs, btrfs or tmpfs")
        with needs, userns.FileOwner(self._first):
            mount("overlay", "system", "overlay", MS_NODEV, options)

    def _mount_outer(self, misc: list[tuple[str, int, int]]) -> None:
        """Mount what only the host may: device nodes work on no other file system."""
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
        for path in self._plan.hidden:
            if os.path.isdir(path):
                mount("tmpfs", path, "tmpfs", _SAFE | MS_RDONLY, "mode=000")
        for path, options in _TEMPORARY.items():
            if self._is_shared_below(path):
                _mount_temporary(path, f"{options},{owner}")
        for name, mode in _ENGINES:
            self._put_on_disk(f"var/lib/{name}", mode)

    def _is_shared_below(self, path: str) -> bool:
        """Whether a share would be hidden if `path` were mounted after it."""
        return any(share.target.startswith(f"{path}/") for share in self._plan.shares)

    def _put_on_disk(self, path: str, mode: int) -> None:
        """Mount a directory's stored files over it, without the overlay.

        A directory with files from the image stays as it is: only its changes are stored.
        """
        try:
            os.makedirs(f"/{path}", mode, exist_ok=True)
        except OSError:
            return  # a file, or a link whose target is mounted later
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
            sethostname(self._plan.name)
            self._mount_inner()
            os.umask(0o022)
            init = _find_init()
            is_systemd = os.path.realpath(init).endswith("/systemd")
            socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM)
            socket.bind(b"\0orb")
            ends = _make_console()
            leave_keys()
            drop_capabilities()
            masks = []
            if is_systemd and not self._is_shared_below("/run"):
                masks.append(generators.mask())
            fds = " ".join(map(str, (*ends, socket.fileno(), self._bare, *masks)))
            self._tell(f"built {fds} {'systemd' if is_systemd else 'other'}")
            self._set_up_files()
            files = self._await_orders()
            end_with_parent()
            if select.select([self._orders], [], [], 0)[0]:
                os._exit(1)  # the supervisor exited too early for this process to end with it
            self._finish_files(files)
            for fd in (0, 1, 2):
                os.dup2(ends[1], fd)
            default_signals()
            notify = {"NOTIFY_SOCKET": "@orb"} if is_systemd else {}
            os.execve(init, [init], {**ENVIRONMENT, **notify})
        except BaseException as error:
            self._tell(f"error {error}")
        os._exit(1)

    def _mount_inner(self) -> None:
        """Mount while the host's /proc and /sys are visible, as the kernel requires."""
        # Descriptors opened before refer to the old namespace; the current directory followed.
        host = os.open("/", os.O_PATH | os.O_DIRECTORY)
        # A mount that came from the host cannot become the root here, a copy of it can.
        mount("system", "system", None, MS_BIND | MS_REC)
        root = os.open("system", os.O_PATH | os.O_DIRECTORY)
        _change_root(root)
        for path in ("/proc", "/sys"):
            os.makedirs(path, mode=0o755, exist_ok=True)
        with _Needs("/proc and /sys that nothing is mounted over, unlike in most containers"):
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
        mount(None, "/", None, MS_REC | MS_SHARED)  # as systemd does outside of containers

    def _await_orders(self) -> dict[str, str]:
        """Wait until the supervisor lets the machine boot; returns the files to write."""
        data, names = b"", [""]
        while "!" not in names:
            more = os.read(self._orders, 1 << 16)
            if not more:
                os._exit(1)
            data += more
            words = data.decode(errors="surrogateescape").split("\0")[:-1]
            names = words[::2]
        return dict(zip(names[: names.index("!")], words[1::2]))

    def _set_up_files(self) -> None:
        """Set up what does not depend on the network, while that is connected."""
        root = os.open("/", os.O_PATH | os.O_DIRECTORY)
        _change_root(self._bare)
        guestfiles.set_up(self._plan)
        _change_root(root)

    def _finish_files(self, files: dict[str, str]) -> None:
        root = os.open("/", os.O_PATH | os.O_DIRECTORY)
        _change_root(self._bare)
        guest.refresh(self._plan.name, files.pop("/etc/resolv.conf", ""))
        if self._secret >= 0:
            guest.set_password(self._plan.fields["user"], self._secret)
        _change_root(root)
        guestfiles.replace({path: text for path, text in files.items() if not self._shares(path)})

    def _shares(self, path: str) -> bool:
        """Whether a file would be one of the host's."""
        folder, name = os.path.split(path)
        real = f"{os.path.realpath(folder)}/{name}/"
        return any(real.startswith(f"{share.target}/") for share in self._plan.shares)


def _change_root(directory: int) -> None:
    """Resolve paths below a directory, so that no link in it leads elsewhere."""
    os.fchdir(directory)
    os.chroot(".")


def _mount_temporary(path: str, options: str) -> None:
    try:
        os.makedirs(path, mode=0o755, exist_ok=True)
    except FileExistsError:
        return  # a link whose target is mounted later
    mount("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV, options)


def _misc_devices() -> list[tuple[str, int, int]]:
    with open("/proc/misc") as file:
        loaded = {name: int(number) for number, name in (line.split() for line in file)}
    return [(path, 10, loaded[name]) for path, name in _MISC_DEVICES if name in loaded]


def _make_console() -> tuple[int, int]:
    """Make the machine's first terminal its console; returns both ends."""
    ours = os.open("/dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY)
    _libc.ioctl(ours, ctypes.c_ulong(_TIOCSPTLCK), ctypes.byref(ctypes.c_int(0)))
    mount("/dev/pts/0", "/dev/console", None, MS_BIND)
    return ours, os.open("/dev/console", os.O_RDWR | os.O_NOCTTY)


def _find_init() -> str:
    for path in INITS:
        if os.access(path, os.X_OK):
            return path
    raise OSError("the image has no init")
