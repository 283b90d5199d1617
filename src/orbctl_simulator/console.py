"""What a booted machine writes to its console, kept for `logs`.

Whoever has root in the machine decides what that is. So no more of it is kept than is worth
reading, and of its control characters only line breaks and tabs: somebody's terminal will show it.
"""

from __future__ import annotations

import os

_MOST = 1 << 20
_UNSEEN = bytes(code for code in range(32) if code not in b"\n\t") + b"\x7f"


class Console:
    """The machine's console: our end of its terminal, and the file that keeps what comes out."""

    def __init__(self, path: str, terminal: int, other_end: int) -> None:
        # Without anybody at its other end a terminal hangs up.
        self.terminal, self._other_end = terminal, other_end
        self._path = path

    def read(self) -> None:
        keep(self._path, os.read(self.terminal, 1 << 16))

    def close(self) -> None:
        """After reading what is left in it: the last words are often those that matter."""
        os.close(self._other_end)
        try:
            while True:
                self.read()
        except OSError:
            os.close(self.terminal)


def keep(path: str, data: bytes) -> None:
    """Append to the log, of which the newer half stays when it has grown too long."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        log = os.open(path, flags, 0o600)
    except OSError:
        return  # the state directory has gone, or its disk is full: no reason to end the machine
    try:
        length = os.lseek(log, 0, os.SEEK_END)
        if length > _MOST:
            kept = os.pread(log, _MOST // 2, length - _MOST // 2)
            os.ftruncate(log, 0)
            os.write(log, kept)
        os.write(log, data.translate(None, _UNSEEN))
    except OSError:
        pass
    finally:
        os.close(log)
