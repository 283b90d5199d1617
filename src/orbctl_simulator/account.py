"""Users according to a machine's own files, and how such files are read.

The machine's root controls these paths. So nothing here blocks (on a pipe, for example), follows a
link, or reads more than such a file can reasonably contain. All of it runs inside the machine's own
root.
"""

from __future__ import annotations

import os
import stat
from errno import ELOOP

from .linux import become
from .state import Failure, rpc, why

_MOST = 4 << 20
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC
_PATHS = {True: "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
_PATHS[False] = "/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games"


def read_plain(path: str) -> bytes:
    """The content of a regular file."""
    try:
        fd = os.open(path, _FLAGS)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise rpc(f"{path}: not a regular file")
            data = b""
            while len(data) <= _MOST:
                more = os.read(fd, 1 << 16)
                if not more:
                    return data
                data += more
            raise rpc(f"{path}: larger than {_MOST >> 20} MiB")
        finally:
            os.close(fd)
    except FileNotFoundError:
        raise
    except OSError as error:
        reason = "a symbolic link" if error.errno == ELOOP else why(error).lower()
        raise rpc(f"{path}: {reason}") from None


def read_lines(path: str) -> list[str]:
    """The lines of a file; none if it does not exist."""
    try:
        lines = read_plain(path).decode(errors="surrogateescape").split("\n")
    except FileNotFoundError:
        return []
    return lines if lines[-1] else lines[:-1]


def _lines_if_plain(path: str) -> list[str]:
    try:
        return read_lines(path)
    except Failure:
        return []


class Account:
    """A user of a machine, according to the machine's files."""

    def __init__(self, name: str) -> None:
        for line in read_lines("/etc/passwd"):
            fields = line.split(":")
            if len(fields) > 6 and name in (fields[0], fields[2]):
                break
        else:
            raise rpc(f"user not found: '{name}'")
        self.name, self.home, self.shell = fields[0], fields[5] or "/", fields[6] or "/bin/sh"
        self.uid, self.gid = int(fields[2]), int(fields[3])
        self.groups = [self.gid]
        for line in read_lines("/etc/group"):
            fields = line.split(":")
            if len(fields) > 3 and self.name in fields[3].split(","):
                self.groups.append(int(fields[2]))

    def become(self) -> None:
        become(self.uid, self.gid, self.groups)

    def environment(self) -> dict[str, str]:
        """The environment of a login; it contains nothing of the caller's."""
        env = {
            "HOME": self.home,
            "LOGNAME": self.name,
            "PATH": _PATHS[self.uid == 0],
            "SHELL": self.shell,
            "USER": self.name,
        }
        for path in ("/etc/default/locale", "/etc/locale.conf", "/etc/environment"):
            for line in _lines_if_plain(path):
                key, equals, value = line.strip().partition("=")
                key = key[7:].lstrip() if key.startswith("export ") else key
                if equals and not key.startswith("#"):
                    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
                    env[key] = value[1:-1] if quoted else value
        return env
