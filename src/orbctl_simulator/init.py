"""A machine's first process: it builds the machine's world, then waits.

It is a separate program with an empty environment, so nothing of its creator's memory, pipes,
secrets or working directory remains in the machine. Until its creator reports that the machine is
recorded, its parent kills it when the creator dies. After that, `stop` or the host kills it, or it
exits when its files are deleted, because no command could stop it then.

The order of the steps separates the machine's files from the host's: the host's root is detached
before any of the machine's files is looked at. Those are set up before anything is mounted in them.
Shared directories are mounted last, and never written.
"""

from __future__ import annotations

# Python 3.9 imports it only when it writes files; by then its root is the machine's.
import encodings.ascii  # noqa: F401
import os
import stat
import sys
import time

from . import guest
from .linux import (
    CLONE_NEWIPC,
    CLONE_NEWNS,
    CLONE_NEWUTS,
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
    bind_read_only,
    close_all_but,
    copy_of_mount,
    detach,
    drop_capabilities,
    hide_from_others,
    import_nothing_more,
    leave_keys,
    let_kernel_reap,
    mount,
    pivot_root,
    put_mount,
    refuse_calls,
    sethostname,
    unshare,
)
from .shares import open_source
from .state import read_fields

_DEVICES = (("null", 3), ("zero", 5), ("full", 7), ("random", 8), ("urandom", 9))
_LINKS = (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2"))
# The machine uses the host's network.
_HOSTS = ("127.0.0.1\thost.orb.internal",)
_MASKED = ("kcore", "keys", "latency_stats", "timer_list", "sched_debug", "mtrr")


def main() -> None:
    status, secret = map(int, sys.argv[2:4])
    how, count, *paths = sys.argv[4:]
    lower, rest = paths[: int(count)], paths[int(count) :]
    hidden, shares = rest[:2], list(zip(rest[2::2], rest[3::2]))
    os.setsid()  # a signal from the machine to its session must not reach our parent
    close_all_but(status, secret)
    hide_from_others()
    leave_keys()
    import_nothing_more()
    # This file is never replaced, and no process in the machine can reach it.
    lock = os.open("../lock", os.O_RDONLY | os.O_CREAT, 0o600)
    try:
        _build(read_fields("../machine"), how == "create", lower, hidden, shares, secret)
    except Exception as error:
        # No traceback: the files that it would quote can no longer be read.
        os.write(status, f"error {error}\n".encode(errors="surrogateescape"))
        os._exit(1)
    os.write(status, b"ok\n")
    os.close(status)
    while os.fstat(lock).st_nlink:
        time.sleep(2)


def _build(
    fields: dict[str, str],
    fresh: bool,
    lower: list[str],
    hidden: list[str],
    shares: list[tuple[str, str]],
    secret: int,
) -> None:
    unshare(CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC)
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    resolver = _host_resolver()
    sources = [_open(source) for source, _ in shares]
    _mount_overlay(lower)
    os.chdir("root")
    pivot_root()
    # Before any path is resolved: from the machine's root, `..` would lead to the host's.
    detach(".")
    os.chdir("/")

    sethostname(fields["name"])
    if fresh:
        guest.prepare(fields["name"], fields["user"], resolver, _HOSTS)
    else:
        guest.refresh(fields["name"], resolver)
    os.umask(0)
    _mount_devices()
    _mount_temporary(hidden)
    _mount_sys(fields)
    os.umask(0o022)
    _make_places(shares, sources)
    _mount_proc()
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    refuse_calls()
    guest.set_password(fields["user"], secret, _limit)
    _share(shares, sources)
    let_kernel_reap()
    drop_capabilities()


def _open(source: str) -> tuple[int, bool]:
    """A share's mount, and whether it is a directory."""
    fd = open_source(source)
    try:
        return copy_of_mount(fd), stat.S_ISDIR(os.fstat(fd).st_mode)
    except OSError as error:
        raise OSError(f"mount {source}: {os.strerror(error.errno or 0)}") from None
    finally:
        os.close(fd)


def _limit() -> None:
    close_all_but()
    drop_capabilities()


def _host_resolver() -> str:
    try:
        with open("/etc/resolv.conf", encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _mount_overlay(lower: list[str]) -> None:
    """Mount it without the state directory's path, which options may be unable to contain.

    No layer may use an attribute to point elsewhere in its base, such as at private files.
    """
    files = [os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW) for path in lower]
    places = ":".join(f"/proc/self/fd/{fd}" for fd in files)
    options = f"lowerdir={places},upperdir=upper,workdir=work"
    safe = ",index=off,redirect_dir=nofollow,metacopy=off"
    try:
        mount("overlay", "root", "overlay", MS_NODEV, options + safe)
    except OSError as error:
        raise OSError(
            f"this host cannot mount an overlay in {os.getcwd()} ({error.strerror}): put"
            " ORBCTL_SIMULATOR_HOME on ext4, xfs, btrfs or a tmpfs, or see the `doctor` command"
        ) from None
    for fd in files:
        os.close(fd)


def _mount_devices() -> None:
    os.makedirs("/dev", mode=0o755, exist_ok=True)
    mount("tmpfs", "/dev", "tmpfs", MS_NOSUID | MS_NOEXEC, "mode=755,size=1m")
    for name, minor in _DEVICES:
        os.mknod(f"/dev/{name}", 0o20666, os.makedev(1, minor))
    os.mknod("/dev/tty", 0o20666, os.makedev(5, 0))
    for name, path in _LINKS:
        os.symlink(f"/proc/self/fd{path}", f"/dev/{name}")
    for name, kind, options in (
        ("pts", "devpts", "newinstance,ptmxmode=0666,mode=0620,gid=5"),
        ("shm", "tmpfs", "mode=1777"),
    ):
        os.mkdir(f"/dev/{name}", 0o755)
        mount(kind, f"/dev/{name}", kind, MS_NOSUID | MS_NOEXEC, options)
    os.symlink("pts/ptmx", "/dev/ptmx")


def _mount_temporary(hidden: list[str]) -> None:
    """Mount its own ``/tmp`` and ``/run``, and hide the simulator's own directories."""
    for path, mode in (("/tmp", "1777"), ("/run", "755")):
        os.makedirs(path, exist_ok=True)
        mount("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV, f"mode={mode}")
    os.mkdir("/run/lock", 0o1777)
    for path in hidden:
        if os.path.isdir(path):
            mount("tmpfs", path, "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV, "mode=000")


def _mount_sys(fields: dict[str, str]) -> None:
    """Show limits where a deploy looks for them, instead of the host's control groups."""
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
    os.makedirs("/sys", mode=0o755, exist_ok=True)
    mount("sysfs", "/sys", "sysfs", flags | MS_RDONLY)
    if not os.path.isdir("/sys/fs/cgroup"):
        return  # pragma: no cover: a kernel without control groups
    mount("tmpfs", "/sys/fs/cgroup", "tmpfs", flags, "mode=755")
    cpus, memory = float(fields.get("cpu") or 0), int(fields.get("memory_mib") or 0)
    for name, value in (
        ("cpu.max", f"{int(cpus * 100000)} 100000" if cpus else "max 100000"),
        ("memory.max", str(memory << 20) if memory else "max"),
    ):
        with open(f"/sys/fs/cgroup/{name}", "w") as file:
            file.write(value + "\n")
        os.chmod(f"/sys/fs/cgroup/{name}", 0o644)
    mount(None, "/sys/fs/cgroup", None, MS_REMOUNT | MS_RDONLY | flags)


def _mount_proc() -> None:
    os.makedirs("/proc", mode=0o755, exist_ok=True)
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    for name in os.listdir("/proc"):
        path = f"/proc/{name}"
        # Everything that is not about processes belongs to the host: settings, modes and owners.
        if name in _MASKED:
            bind_read_only("/dev/null", path, 0)
        elif not (name.isdigit() or os.path.islink(path)):
            bind_read_only(path, path)


def _make_places(shares: list[tuple[str, str]], sources: list[tuple[int, bool]]) -> None:
    """Create the mount points of shared directories, before any of these is mounted.

    Also before ``/proc`` is mounted, through which a link could lead into one that is open.
    """
    for (source, target), (_, is_folder) in zip(shares, sources):
        try:
            if is_folder:
                os.makedirs(target, exist_ok=True)
            else:
                os.makedirs(os.path.dirname(target), exist_ok=True)
                os.close(os.open(target, os.O_RDONLY | os.O_CREAT | os.O_NONBLOCK, 0o644))
        except OSError as error:
            raise OSError(f"mount {source} on {target}: {error.strerror}") from None


def _share(shares: list[tuple[str, str]], sources: list[tuple[int, bool]]) -> None:
    for (source, target), (fd, _) in zip(shares, sources):
        try:
            put_mount(fd, target)
            flags = os.fstatvfs(fd).f_flag & (MS_RDONLY | MS_NOSUID | MS_NOEXEC) | MS_NODEV
            mount(None, f"/proc/self/fd/{fd}", None, MS_BIND | MS_REMOUNT | flags)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise OSError(f"mount {source} on {target}: {reason}") from None
        os.close(fd)
