"""User namespaces, and mounts that show a file system under other ids.

Three kinds of ids stand for one user of a machine:

- inside, 0 is root and 501 the default user, as everywhere;
- while the machine runs, its processes have the ids of a range of the host's that no other running
  machine has: two machines can neither see each other's keys nor use up each other's quotas;
- on the disk all machines' files have the ids from `STORED` on, so a copy of a machine needs no
  change of owners. Nobody on the host has one of these ids, and a set-uid file that a machine's
  root wrote gives its caller nothing.

Mounts that map ids translate between the last two. Ids above 0x70000000 are used by nobody: the
ranges of users, of ``/etc/subuid`` and of systemd's containers end below.
"""

from __future__ import annotations

import ctypes
import os
from fcntl import LOCK_EX, LOCK_NB, flock

from .linux import setns, unshare

SPAN = 1 << 20
STORED = 0x70000000
_RANGES = 256  # the first one is that of the stored files
_LOCKS = "/run/orbctl-simulator"

CLONE_NEWUSER = 0x10000000
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
_AT_FDCWD, _AT_EMPTY_PATH, _OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH = -100, 0x1000, 1, 4
NO_SUID, NO_DEVICES, _MOUNT_ATTR_IDMAP = 2, 4, 0x00100000
_PR_SET_SECUREBITS, _NO_SETUID_FIXUP = 28, 1 << 2

_libc = ctypes.CDLL(None, use_errno=True)


class _MountAttributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]


def system_call(number: int, what: str, *arguments: object) -> int:
    words = (ctypes.c_long(word) if isinstance(word, int) else word for word in arguments)
    result: int = _libc.syscall(ctypes.c_long(number), *words)
    if result == -1:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result


def take_range() -> tuple[int, int]:
    """The first id of a range that is ours while the second, a file, stays open.

    Not the first one that is free: what is left of an ended machine might still have its ids.
    """
    os.makedirs(_LOCKS, mode=0o700, exist_ok=True)
    begin = os.urandom(1)[0]
    for number in (1 + (begin + step) % (_RANGES - 1) for step in range(_RANGES - 1)):
        lock = os.open(f"{_LOCKS}/ids-{number}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            flock(lock, LOCK_EX | LOCK_NB)
            return STORED + number * SPAN, lock
        except BlockingIOError:
            os.close(lock)
    raise OSError(f"{_RANGES - 1} machines run already, and there are ids for no more")


def keep_capabilities() -> None:
    """Let a change of ids leave this process its capabilities."""
    if _libc.prctl(_PR_SET_SECUREBITS, ctypes.c_ulong(_NO_SETUID_FIXUP), 0, 0, 0) == -1:
        error = ctypes.get_errno()
        raise OSError(error, f"securebits: {os.strerror(error)}")


def make(uids: str, gids: str, owner: int = 0) -> int:
    """A user namespace with these maps (``inside outside count`` lines), as a file.

    The kernel counts what a namespace uses (inotify instances, for one) for its owner, too.
    """
    ready, made = os.pipe()
    over, alive = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(alive)
            if owner:
                keep_capabilities()
                os.setresgid(owner, owner, owner)
                os.setresuid(owner, owner, owner)
            unshare(CLONE_NEWUSER)
            os.write(made, b"!")
            os.read(over, 1)
        finally:
            os._exit(0)
    os.close(made)
    os.close(over)
    try:
        if os.read(ready, 1) != b"!":
            raise OSError("this host, or the container it is, allows no user namespaces")
        for name, lines in (("uid_map", uids), ("gid_map", gids)):
            with open(f"/proc/{pid}/{name}", "w") as file:
                file.write(lines)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(alive)
        os.close(ready)
        os.waitpid(pid, 0)


def of_machine(first: int) -> int:
    """The one that a machine lives in; as a mount's it shows a plain root file system."""
    line = f"0 {first} {SPAN}\n"
    return make(line, line, owner=first)


def of_store(first: int) -> int:
    """For the mount by which a machine sees its own stored files."""
    line = f"{STORED} {first} {SPAN}\n"
    return make(line, line)


def of_share(first: int, uid: int, gid: int, user: int) -> int:
    """For the mount of a directory that host and machine share.

    Files of `uid` and `gid`, who shares it, belong to the machine's `user` and the other way round
    (for root: to its root). What others in the machine write belongs to nobody on the host; the
    files of others on the host belong to nobody in the machine.
    """
    meant = user if uid else 0
    return make(_swap(first, uid, meant), _swap(first, gid, meant))


def _swap(first: int, own: int, user: int) -> str:
    lines = f"{own} {first + user} 1\n"
    if user:
        lines += f"{STORED} {first} {user}\n"
    return lines + f"{STORED + user + 1} {first + user + 1} {SPAN - user - 1}\n"


def become_root_in(userns: int) -> None:
    setns(userns)
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def copy_of_mount(path: str | int, userns: int | None = None, flags: int = 0) -> int:
    """The mount that `path` is in, from there on and without what is mounted below it, as a file.

    It shows the ids that `userns` maps those of its files to, with `flags` set.
    """
    here, name = (path, b"") if isinstance(path, int) else (_AT_FDCWD, os.fsencode(path))
    how = _OPEN_TREE_CLONE | os.O_CLOEXEC | (_AT_EMPTY_PATH if isinstance(path, int) else 0)
    tree = system_call(_OPEN_TREE, f"mount {path}", here, name, how)
    mapped = 0 if userns is None else _MOUNT_ATTR_IDMAP
    attributes = _MountAttributes(mapped | flags, 0, 0, userns or 0)
    try:
        pointer, size = ctypes.byref(attributes), ctypes.sizeof(attributes)
        if mapped | flags:
            system_call(_MOUNT_SETATTR, "map owners", tree, b"", _AT_EMPTY_PATH, pointer, size)
    except OSError:
        os.close(tree)
        raise
    return tree


def put_mount(tree: int, target: str) -> None:
    place = os.fsencode(target)
    system_call(
        _MOVE_MOUNT, f"mount {target}", tree, b"", _AT_FDCWD, place, _MOVE_MOUNT_F_EMPTY_PATH
    )


class FileOwner:
    """What this process makes in the meantime belongs to that id; its rights stay."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __enter__(self) -> None:
        keep_capabilities()
        self._become(self._number)

    def __exit__(self, *_: object) -> None:
        self._become(0)

    @staticmethod
    def _become(number: int) -> None:
        _libc.setfsgid(ctypes.c_uint(number))
        _libc.setfsuid(ctypes.c_uint(number))
