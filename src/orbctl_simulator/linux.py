"""The system calls that Python 3.9 does not provide.

Direct calls, instead of util-linux, keep `run` at a few milliseconds, and allow touching a
machine's files only from inside its own root.
"""

from __future__ import annotations

import _frozen_importlib as _imp
import ctypes
import os
import struct
import sys
from errno import ENOSYS, EPERM

_BUILT_IN = (_imp.BuiltinImporter, _imp.FrozenImporter)
_libc = ctypes.CDLL(None, use_errno=True)

CLONE_NEWTIME = 0x00000080
CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MNT_DETACH = 2

_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41}
_KEYCTL = {"x86_64": 250}  # the others share one number
_OPEN_TREE, _MOVE_MOUNT, _MOVE_MOUNT_F_EMPTY_PATH, _AT_FDCWD = 428, 429, 4, -100
_AT_EMPTY_PATH = 0x1000
_PR_SET_PDEATHSIG, _PR_GET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 2, 4
_PR_SET_SECCOMP, _PR_CAPBSET_DROP = 22, 24
_SIGCHLD, _SIG_DFL, _SIG_IGN = 17, ctypes.c_void_p(0), ctypes.c_void_p(1)

# Numbers of system calls in each architecture that a processor runs: three about keys; clone3;
# clone and unshare, whose first argument consists of flags.
_CALLS = {
    "x86_64": {
        0xC000003E: ((248, 249, 250), 435, (56, 272)),
        0x40000003: ((286, 287, 288), 435, (120, 310)),
    },
    "aarch64": {
        0xC00000B7: ((217, 218, 219), 435, (220, 97)),
        0x40000028: ((309, 310, 311), 435, (120, 337)),
    },
    "riscv64": {
        0xC00000F3: ((217, 218, 219), 435, (220, 97)),
        0x400000F3: ((217, 218, 219), 435, (220, 97)),
    },
}
# A filter's instructions: load a part of the call, compare, test a bit, answer.
_LOAD, _EQUAL, _SET, _AND, _ANSWER = 0x20, 0x15, 0x45, 0x54, 0x06
_NUMBER, _ARCH, _FLAGS = 0, 4, 16
_ALLOW, _REFUSE, _UNKNOWN = 0x7FFF0000, 0x00050000 | EPERM, 0x00050000 | ENOSYS

# Numbers of the capabilities that a deploy needs: chown, dac_override, fowner, fsetid,
# kill, setgid, setuid, setpcap, net_bind_service, net_raw, sys_chroot, audit_write, setfcap.
# The others affect more than the machine: mounts, modules, clocks, devices, the shared network.
KEPT_CAPABILITIES = (0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 29, 31)


def _check(result: int, what: str) -> None:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _path(value: str | None) -> bytes | None:
    return None if value is None else os.fsencode(value)


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def setns(fd: int) -> None:
    _check(_libc.setns(fd, 0), "setns")


def mount(
    source: str | None, target: str, kind: str | None, flags: int = 0, options: str = ""
) -> None:
    _check(
        _libc.mount(
            _path(source), _path(target), _path(kind), ctypes.c_ulong(flags), _path(options)
        ),
        f"mount {kind or source or ''} on {target}",
    )


def bind_read_only(source: str, path: str, devices: int = MS_NODEV) -> None:
    mount(source, path, None, MS_BIND)
    flags = MS_RDONLY | MS_NOSUID | MS_NOEXEC | devices
    mount(None, path, None, MS_BIND | MS_REMOUNT | flags)


def detach(path: str) -> None:
    _check(_libc.umount2(_path(path), MNT_DETACH), f"umount {path}")


def pivot_root() -> None:
    """Make the current directory the root; the old root is then mounted on top of it."""
    number = _PIVOT_ROOT.get(os.uname().machine)
    if number is None:  # pragma: no cover: another architecture
        raise OSError(f"pivot_root: not known for {os.uname().machine}")
    _check(_libc.syscall(ctypes.c_long(number), b".", b"."), "pivot_root")


def sethostname(name: str) -> None:
    raw = os.fsencode(name)
    _check(_libc.sethostname(raw, ctypes.c_size_t(len(raw))), "sethostname")


def drop_capabilities() -> None:
    """Drop capabilities that could harm the host, for this process and all that it starts.

    Without them in the bounding set, sudo's set-uid bit cannot restore them.
    """
    for number in range(64):
        if (
            number not in KEPT_CAPABILITIES
            and _libc.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(number), 0, 0, 0) == -1
        ):
            break  # beyond the last one that this kernel knows
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    _check(_libc.capget(header, sets), "capget")
    kept = sum(1 << number for number in KEPT_CAPABILITIES)
    for half in (0, 1):
        mine = sets[half * 3 + 1] & (kept >> (32 * half)) & 0xFFFFFFFF
        sets[half * 3] = sets[half * 3 + 1] = mine
        sets[half * 3 + 2] = 0
    _check(_libc.capset(header, sets), "capset")


def default_signals() -> None:
    """Reset signals: a new program must not inherit those that Python or `nohup` ignored."""
    _libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    for number in range(1, 65):
        _libc.signal(number, _SIG_DFL)
    _libc.sigprocmask(2, (ctypes.c_uint64 * 16)(), None)


def let_kernel_reap() -> None:
    """Ignore SIGCHLD: the kernel then leaves no zombies, so pid 1 has nothing to do."""
    default_signals()
    _libc.signal(_SIGCHLD, _SIG_IGN)


def end_with_parent() -> None:
    _check(_libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(9), 0, 0, 0), "prctl")


def copy_of_mount(path: str | int) -> int:
    """Copy the mount of `path`, from `path` down and without mounts below it; returns it as a file.

    It can be entered as a directory, or be mounted once its source can no longer be reached.
    """
    place, name = (path, "") if isinstance(path, int) else (_AT_FDCWD, path)
    how = 1 | os.O_CLOEXEC | _AT_EMPTY_PATH
    number, here, flags = map(ctypes.c_long, (_OPEN_TREE, place, how))
    fd: int = _libc.syscall(number, here, _path(name), flags)
    _check(fd, f"mount {path}")
    return fd


def put_mount(fd: int, target: str) -> None:
    number, here, flags = map(ctypes.c_long, (_MOVE_MOUNT, _AT_FDCWD, _MOVE_MOUNT_F_EMPTY_PATH))
    result = _libc.syscall(number, ctypes.c_long(fd), b"", here, _path(target), flags)
    _check(result, "mount")


def hide_from_others() -> None:
    """Keep processes without the host's own rights from inspecting this one (/proc, ptrace).

    They cannot read its memory, environment and files until it executes another program.
    """
    _check(_libc.prctl(_PR_SET_DUMPABLE, ctypes.c_ulong(0), 0, 0, 0), "prctl")


class NoArguments:
    """In this context, this process has no command line, which any process could read in /proc.

    A program that it starts shares its memory until it has been executed.
    """

    def __init__(self) -> None:
        with open("/proc/self/stat", "rb") as file:
            fields = file.read().rpartition(b") ")[2].split()
        start, end = int(fields[45]), int(fields[46])
        self._memory = (ctypes.c_char * (end - start)).from_address(start)
        self._words = self._memory.raw

    def __enter__(self) -> None:
        self._memory.raw = bytes(len(self._words))

    def __exit__(self, *_: object) -> None:
        self._memory.raw = self._words


def import_nothing_more() -> None:
    """Import no further modules: from now on, this process sees a machine's files."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if finder in _BUILT_IN]


def become(uid: int, gid: int, groups: list[int]) -> None:
    """Become another user. Stays hidden, and still ends with its parent if it did before."""
    signal = ctypes.c_int()
    _check(_libc.prctl(_PR_GET_PDEATHSIG, ctypes.byref(signal), 0, 0, 0), "prctl")
    os.setgroups(groups)
    os.setgid(gid)
    os.setuid(uid)
    hide_from_others()  # changing ids may have undone it
    _check(_libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.value), 0, 0, 0), "prctl")


def leave_keys() -> None:
    """Leave the caller's session keyring."""
    number = ctypes.c_long(_KEYCTL.get(os.uname().machine, 219))
    result = _libc.syscall(number, ctypes.c_long(1), None)
    if result == -1 and ctypes.get_errno() == ENOSYS:
        return  # pragma: no cover: a kernel without keys
    _check(result, "keyctl")


def refuse_calls() -> None:
    """Make some system calls fail, in this process and all that it starts.

    Those about keys, because keyrings belong to users, not machines: a machine's root would have
    those of the host's root. And those that create a user namespace, in which a machine's root
    would regain the rights that it must not have, and could mount the host's control groups.
    """
    steps = b"".join(_filter(arch, *calls) for arch, calls in _CALLS[os.uname().machine].items())
    steps += _step(_ANSWER, _ALLOW)
    program = ctypes.create_string_buffer(steps)
    told = struct.pack("@HP", len(steps) // 8, ctypes.addressof(program))
    _check(_libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(2), told, 0, 0), "seccomp")


def _filter(arch: int, keys: tuple[int, ...], clone3: int, flagged: tuple[int, ...]) -> bytes:
    """The filter for processes of one architecture; jumps count from the next instruction."""
    ends = {"flags": 0, "refuse": 3, "unknown": 4}  # after the first answer
    asked = [*((number, "refuse") for number in keys), (clone3, "unknown")]
    asked += [(number, "flags") for number in flagged]
    steps = _step(_LOAD, _NUMBER) + _step(_AND, 0xBFFFFFFF)  # x86-64 has two names for each
    for place, (number, end) in enumerate(asked):
        steps += _step(_EQUAL, number, yes=len(asked) - place + ends[end])
    steps += _step(_ANSWER, _ALLOW)
    steps += _step(_LOAD, _FLAGS) + _step(_SET, CLONE_NEWUSER, yes=1) + _step(_ANSWER, _ALLOW)
    steps += _step(_ANSWER, _REFUSE) + _step(_ANSWER, _UNKNOWN)
    return _step(_LOAD, _ARCH) + _step(_EQUAL, arch, no=len(steps) // 8) + steps


def _step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("=HBBI", code, yes, no, value)


def close_all_but(*kept: int) -> None:
    """Close what the caller left open: another process may wait for the end of such a pipe."""
    for entry in os.listdir("/proc/self/fd"):
        if int(entry) > 2 and int(entry) not in kept:
            try:  # noqa: SIM105 contextlib is slow to load
                os.close(int(entry))
            except OSError:
                pass  # the descriptor that listed the directory
