"""User namespaces, and mounts that map the owners of files.

A user of a machine has three ids:

- inside the machine: 0 for root, 501 for the default user;
- on the host, while the machine runs: an id from a range that no other running machine uses. Keys,
  inotify instances and other per-user quotas are counted by these ids, so machines cannot read or
  exhaust each other's;
- on disk: `STORED` plus the id inside. All machines share this range, so copying a machine changes
  no owner. No user of the host has such an id, so a set-uid file written by a machine's root grants
  nothing on the host.

Idmapped mounts translate between the last two. Ids from 0x70000000 to 0x7fffffff are unassigned:
the ranges of users, of ``/etc/subuid`` and of systemd's containers end below.
"""

from __future__ import annotations

import ctypes
import os
from fcntl import LOCK_EX, LOCK_NB, flock

from .linux import CLONE_NEWUSER, setns, unshare

SPAN = 1 << 20
STORED = 0x70000000
_RANGES = 256  # the first one is that of the stored files
_LOCKS = "/run/orbctl-simulator"

CLONE_NEWNET = 0x40000000
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
    """Reserve a range of ids. Returns its first id and a lock file that reserves it while open.

    The search starts at random, so a range is rarely reused while the kernel still tears down the
    machine that had it.
    """
    begin = os.urandom(1)[0]
    for number in (1 + (begin + step) % (_RANGES - 1) for step in range(_RANGES - 1)):
        lock = _try_lock(number)
        if lock >= 0:
            return STORED + number * SPAN, lock
    raise OSError(f"{_RANGES - 1} machines are running, which is the limit")


def _try_lock(number: int) -> int:
    os.makedirs(_LOCKS, mode=0o700, exist_ok=True)
    lock = os.open(_lock_of(number), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        flock(lock, LOCK_EX | LOCK_NB)
        if os.fstat(lock).st_nlink:  # otherwise it was released, and another process has a new one
            return lock
    except BlockingIOError:
        pass
    os.close(lock)
    return -1


def _lock_of(number: int) -> str:
    return f"{_LOCKS}/ids-{number}"


def release_range(first: int, lock: int) -> None:
    """Release it, and the ranges of supervisors that were killed."""
    os.unlink(_lock_of((first - STORED) // SPAN))
    os.close(lock)
    for name in os.listdir(_LOCKS):
        lock = _try_lock(int(name.rpartition("-")[2]))
        if lock >= 0:
            os.unlink(f"{_LOCKS}/{name}")
            os.close(lock)


def keep_capabilities() -> None:
    """Keep this process's capabilities when its ids change."""
    if _libc.prctl(_PR_SET_SECUREBITS, ctypes.c_ulong(_NO_SETUID_FIXUP), 0, 0, 0) == -1:
        error = ctypes.get_errno()
        raise OSError(error, f"securebits: {os.strerror(error)}")


def make(uids: str, gids: str) -> int:
    """Create a user namespace with these maps (lines of ``inside outside count``) and open it."""
    return _make(uids, gids, 0, with_network=False)[0]


def make_with_network(uids: str, gids: str, owner: int = 0) -> tuple[int, int]:
    """Create and open one, and a network namespace that belongs to it.

    The kernel also charges what they use, such as inotify instances, to their `owner`.
    """
    user, network = _make(uids, gids, owner, with_network=True)
    return user, network


def _make(uids: str, gids: str, owner: int, with_network: bool) -> list[int]:
    answers, report = os.pipe()
    waits, go_on = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(answers)
            os.close(go_on)
            _unshare_in_steps(owner, with_network, report, waits)
        except OSError as error:
            os.write(report, f"{error}\n".encode())
        finally:
            os._exit(0)
    os.close(report)
    os.close(waits)
    try:
        with open(answers) as file:
            pid = file.readline().strip()
            if not pid.isdigit():
                raise OSError(f"needs user namespaces, which are not allowed here ({pid})")
            for name, lines in (("uid_map", uids), ("gid_map", gids)):
                with open(f"/proc/{pid}/{name}", "w") as map_file:
                    map_file.write(lines)
            os.write(go_on, b"!")
            answer = file.readline().strip()
            if answer != "ok":
                raise OSError(f"needs network namespaces, which are not allowed here ({answer})")
            kinds = ("user", "net") if with_network else ("user",)
            return [os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC) for kind in kinds]
    finally:
        os.close(go_on)
        os.waitpid(child, 0)


def _unshare_in_steps(owner: int, with_network: bool, report: int, waits: int) -> None:
    if owner:
        keep_capabilities()
        os.setresgid(owner, owner, owner)
        os.setresuid(owner, owner, owner)
    unshare(CLONE_NEWUSER)
    # Its pid as the process that writes the maps sees it, which may differ from its own view.
    os.write(report, os.readlink("/proc/self").encode() + b"\n")
    os.read(waits, 1)
    if with_network:
        unshare(CLONE_NEWNET)  # only now, so that its contents belong to the root of the maps
    os.write(report, b"ok\n")
    os.read(waits, 1)


def of_machine(first: int) -> tuple[int, int]:
    """The namespace a machine runs in, and its network's.

    As a mount's map, the first one shows a plain root file system.
    """
    line = f"0 {first} {SPAN}\n"
    return make_with_network(line, line, owner=first)


def of_store(first: int) -> int:
    """The map of the mount that shows a machine its stored files."""
    line = f"{STORED} {first} {SPAN}\n"
    return make(line, line)


def of_share(first: int, uid: int, gid: int, user: int) -> int:
    """The map of the mount of a directory that the host shares with a machine.

    Files of the caller (`uid`, `gid`) are owned by `user` in the machine, and files that `user`
    creates are owned by the caller on the host. If root shares, its files are owned by the
    machine's root. What other users of the machine create gets an id from the stored range on the
    host; files of the host's other users are owned by nobody in the machine.
    """
    inside = user if uid else 0
    return make(_share_map(first, uid, inside), _share_map(first, gid, inside))


def _share_map(first: int, own: int, user: int) -> str:
    if STORED <= own < STORED + SPAN:  # a machine has created it
        return f"{STORED} {first} {SPAN}\n"
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
    """Copy the mount of `path`, from `path` down and without mounts below it; returns it as a file.

    `userns` maps the owners of its files; `flags` are added.
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
    """In this context, files that this process creates are owned by `number`."""

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
