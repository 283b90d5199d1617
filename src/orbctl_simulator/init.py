"""A machine's first process: it makes the machine's world, then waits.

It is a program of its own, started with an empty environment, so that nothing of its creator's
memory, pipes, secrets or working directory lives on in the machine. Until its creator says
that all is written down, it dies with it; after that `stop` ends it, or the host, or it ends itself
when its files are gone: nobody could stop it any more.
"""

from __future__ import annotations

# Python 3.9 looks for it only when it writes files, and by then the machine's root is its own.
import encodings.ascii  # noqa: F401
import os
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
    detach,
    drop_capabilities,
    let_kernel_reap,
    mount,
    pivot_root,
    sethostname,
    unshare,
)
from .state import read_fields

_DEVICES = (("null", 3), ("zero", 5), ("full", 7), ("random", 8), ("urandom", 9))
_LINKS = (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2"))
_READ_ONLY = ("/proc/sys", "/proc/sysrq-trigger", "/proc/irq", "/proc/bus", "/proc/fs")
_MASKED = ("kcore", "keys", "latency_stats", "timer_list", "sched_debug", "mtrr")


def main() -> None:
    _, control, status, how, *paths = sys.argv[1:]
    close_all_but(int(control), int(status))
    # Of all its files this one is never replaced, and whoever opens it by /proc gains nothing.
    lock = os.open("lock", os.O_RDONLY | os.O_CREAT, 0o600)
    hidden, shares = paths[:2], list(zip(paths[2::2], paths[3::2]))
    try:
        _build(read_fields("machine"), how == "create", hidden, shares)
    except Exception as error:
        # Text only, and no traceback: the files it would quote are no longer in sight.
        os.write(int(status), f"error {error}\n".encode(errors="surrogateescape"))
        os._exit(1)
    os.write(int(status), b"ok\n")
    os.close(int(status))
    if os.read(int(control), 1) != b"!":
        os._exit(1)
    os.close(int(control))
    while os.fstat(lock).st_nlink:
        time.sleep(2)


def _build(
    fields: dict[str, str], fresh: bool, hidden: list[str], shares: list[tuple[str, str]]
) -> None:
    unshare(CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC)
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    resolver = _host_resolver()
    sources = [os.open(source, os.O_PATH) for source, _ in shares]
    old_root = os.open("/", os.O_RDONLY | os.O_DIRECTORY)

    _mount_overlay()
    os.chdir("root")
    pivot_root()
    os.chdir("/")

    os.umask(0)
    _mount_kernel_views()
    _mount_limits(fields)
    _make_devices()
    for path, mode in (("/tmp", "1777"), ("/run", "755")):
        os.makedirs(path, exist_ok=True)
        mount("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV, f"mode={mode}")
    os.mkdir("/run/lock", 0o1777)
    for path in hidden:
        if os.path.isdir(path):
            mount("tmpfs", path, "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV, "mode=000")
    os.umask(0o022)
    for (source, target), fd in zip(shares, sources):
        _share(fd, target, os.path.isdir(f"/proc/self/fd/{fd}"), source)
        os.close(fd)

    os.fchdir(old_root)
    os.close(old_root)
    detach(".")
    os.chdir("/")
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)

    sethostname(fields["name"])
    guest.set_resolver(resolver)
    if fresh:
        guest.prepare(fields["name"], fields["user"])
    guest.set_hostname(fields["name"])
    os.setsid()
    let_kernel_reap()
    drop_capabilities()


def _host_resolver() -> str:
    try:
        with open("/etc/resolv.conf", encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _mount_overlay() -> None:
    """Mount it by relative paths: the state folder's own may hold what options cannot."""
    options = "lowerdir=base,upperdir=upper,workdir=work"
    safe = ",index=off,redirect_dir=off,metacopy=off"
    try:
        mount("overlay", "root", "overlay", MS_NODEV, options + safe)
    except OSError:
        try:
            mount("overlay", "root", "overlay", MS_NODEV, options)
        except OSError as error:
            raise OSError(
                f"this host cannot make an overlay in {os.getcwd()} ({error.strerror}): put"
                " ORBCTL_SIMULATOR_HOME on ext4, xfs, btrfs or a tmpfs, or see the `doctor` command"
            ) from None


def _mount_kernel_views() -> None:
    safe = MS_NOSUID | MS_NODEV | MS_NOEXEC
    for path in ("/proc", "/sys", "/dev"):
        os.makedirs(path, mode=0o755, exist_ok=True)
    mount("proc", "/proc", "proc", safe)
    for path in _READ_ONLY:
        if os.path.exists(path):
            bind_read_only(path)
    mount("sysfs", "/sys", "sysfs", safe | MS_RDONLY)
    mount("tmpfs", "/dev", "tmpfs", MS_NOSUID | MS_NOEXEC, "mode=755,size=1m")
    for name, minor in _DEVICES:
        os.mknod(f"/dev/{name}", 0o20666, os.makedev(1, minor))
    for name in _MASKED:
        if os.path.exists(f"/proc/{name}"):
            mount("/dev/null", f"/proc/{name}", None, MS_BIND)


def _make_devices() -> None:
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


def _mount_limits(fields: dict[str, str]) -> None:
    """Show limits where a deploy would look for them, in place of the host's control groups."""
    if not os.path.isdir("/sys/fs/cgroup"):
        return  # pragma: no cover: a kernel without control groups
    mount("tmpfs", "/sys/fs/cgroup", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=755")
    cpus, memory = float(fields.get("cpu") or 0), int(fields.get("memory_mib") or 0)
    for name, value in (
        ("cpu.max", f"{int(cpus * 100000)} 100000" if cpus else "max 100000"),
        ("memory.max", str(memory << 20) if memory else "max"),
    ):
        with open(f"/sys/fs/cgroup/{name}", "w") as file:
            file.write(value + "\n")
    mount(None, "/sys/fs/cgroup", None, MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)


def _share(fd: int, target: str, folder: bool, source: str) -> None:
    try:
        if folder:
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            open(target, "a").close()
        mount(f"/proc/self/fd/{fd}", target, None, MS_BIND)
    except OSError as error:
        raise OSError(f"mount {source} on {target}: {error.strerror}") from None
