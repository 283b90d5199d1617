"""Waiting while this host's package manager changes the files below machines.

If a machine's base is the host's own root, its files would change under it, and the behavior of an
overlay is then undefined. Locks are only checked, never taken.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time

from .state import Failure, say

_SECONDS = 60
# Locked by fcntl: dpkg and apt, and rpm with the tools built on it.
_RECORDS = (
    *("/var/lib/dpkg/lock-frontend", "/var/lib/dpkg/lock"),
    *("/var/lib/rpm/.rpm.lock", "/usr/lib/sysimage/rpm/.rpm.lock"),
)
# Locked by flock: apk. Exists while it works: pacman.
_FLOCKS = ("/lib/apk/db/lock", "/usr/lib/apk/db/lock")
_FILES = ("/var/lib/pacman/db.lck",)


def wait_for_packages(base: str) -> None:
    """If the host's own root is the base, wait for its package manager, up to a limit."""
    if base != "/":
        return
    begun, lock = time.monotonic(), _held()
    if lock:
        say(f"waiting for this host's package manager, which has locked {lock}")
    while lock:
        if time.monotonic() - begun > _SECONDS:
            raise Failure(
                f"this host's package manager still locks {lock}, and machines would see its files"
                " change: try again when it has finished"
            )
        time.sleep(0.1)
        lock = _held()


def _held() -> str:
    """The lock of a package manager that is running, or nothing."""
    for path in _RECORDS:
        if _is_record_locked(path):
            return path
    for path in _FLOCKS:
        if os.path.exists(path) and _is_flocked(path):
            return path
    return next(filter(os.path.exists, _FILES), "")


def _is_record_locked(path: str) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        wanted = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
        answer = fcntl.fcntl(fd, fcntl.F_GETLK, wanted)
    finally:
        os.close(fd)
    kind: int = struct.unpack_from("h", answer)[0]
    return kind != fcntl.F_UNLCK


def _is_flocked(path: str) -> bool:
    inode = f":{os.stat(path).st_ino} "
    with open("/proc/locks") as file:
        return any(" FLOCK " in line and inode in line for line in file)
