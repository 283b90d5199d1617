"""The console of a booted machine, logged for `logs`.

The machine's root controls what is written there, and a terminal will show it: the log is limited
in size, and contains no control characters except line breaks and tabs. Those of two bytes in
UTF-8, such as U+009B, which begins a control sequence, become question marks.
"""

from __future__ import annotations

import os

_MOST = 1 << 20
_UNPRINTED = bytes(code for code in range(32) if code not in b"\n\t") + b"\x7f"
_LEAD = b"\xc2"
_LONG = [_LEAD + bytes([code]) for code in range(0x80, 0xA0)]


class Console:
    """Our end of the console's terminal, and its log."""

    def __init__(self, path: str, terminal: int, other_end: int) -> None:
        # Kept open: a terminal that no process has open hangs up.
        self.terminal, self._other_end = terminal, other_end
        self._path, self._begun = path, b""

    def read(self) -> None:
        data = self._begun + os.read(self.terminal, 1 << 16).translate(None, _UNPRINTED)
        self._begun = _LEAD if data.endswith(_LEAD) else b""  # the character may be incomplete
        data = data[: len(data) - len(self._begun)]
        for control in _LONG if _LEAD in data else ():
            data = data.replace(control, b"?")
        log(self._path, data)

    def close(self) -> None:
        """Log what is left to read, then close it."""
        os.close(self._other_end)
        try:
            while True:
                self.read()
        except OSError:
            os.close(self.terminal)


def create(path: str) -> None:
    """Create a log. `log` does not, so that nothing disturbs the deletion of its directory."""
    try:  # noqa: SIM105 contextlib is slow to import
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
    except OSError:
        pass  # the machine starts even if the disk is full


def log(path: str, data: bytes) -> None:
    """Append to a log. If it is too long, only its newer half is kept."""
    try:
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return  # deleted, or a full disk: no reason to stop the machine
    try:
        length = os.lseek(file, 0, os.SEEK_END)
        if length > _MOST:
            kept = os.pread(file, _MOST // 2, length - _MOST // 2)
            os.ftruncate(file, 0)
            os.write(file, kept)
        os.write(file, data)
    except OSError:
        pass
    finally:
        os.close(file)
