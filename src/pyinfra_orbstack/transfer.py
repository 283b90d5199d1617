"""What moving a file takes: shell scripts for the target, checksums, and the local end.

The connector puts them together; nothing here runs anything.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator
from io import TextIOBase
from typing import IO, Any

from pyinfra.api.command import QuoteString, StringCommand
from pyinfra.progress import progress_spinner

from pyinfra_orbstack.process import CHUNK

#: Bytes from which on a transfer is shown.
SHOWN_FROM = 4 * 1024 * 1024

#: Exit code of a write that failed and could not be undone.
KEPT = 75

SUM = (
    "if command -v sha256sum >/dev/null 2>&1; then sha256sum; "
    "elif command -v cksum >/dev/null 2>&1; then cksum; else wc -c; fi"
)
# `set -C` refuses a file that is there already, link or not; names hold 128 random bits, so that is
# somebody else's trick.
UPLOAD = rf"""
d=${{1:-${{TMPDIR:-/tmp}}}}
[ -d "$d" ] && [ -w "$d" ] || d=$HOME
[ ! -e "$d/$2.new" ] || rm -f "$d/$2.new"
( umask 077; set -C; cat >"$d/$2.new" ) || {{ rm -f "$d/$2.new"; exit 1; }}
printf '%s\n%s\n' "$d" "$(pwd)"
{{ {SUM}; }} <"$d/$2.new"
"""

# Run by whomever sudo and the like name, with the new content on stdin or, if $3 is given, there.
WRITE = r"""
if [ -n "$3" ]; then exec <"$3" || exit 1; fi
old= made=
[ -e "$1" ] || made=1
: >>"$1" || exit 1
if [ -f "$1" ] && [ -s "$1" ] && [ -r "$1" ]; then
  old=$2
  ( umask 077; set -C; cat <"$1" >"$old" ) || {
    rm -f "$old"; echo "no room to keep the old content: nothing was changed" >&2; exit 1; }
fi
if cat >"$1"; then
  if [ -n "$old" ]; then rm -f "$old"; fi
  exit 0
fi
if [ -n "$made" ]; then rm -f "$1"; exit 1; fi
[ -n "$old" ] || exit 1
if cat <"$old" >"$1"; then rm -f "$old"; echo "its old content was put back" >&2; exit 1; fi
echo "its old content could not be put back and is kept in $old" >&2
exit 75
"""
_FED = """{{ {text}
}} <{new}; r=$?
if [ $r = 75 ]; then echo the new content is kept in {new} >&2; else rm -f {new}; fi
exit $r"""

READ = rf"""
s=$( {{ {SUM}; }} <"$1" ) || exit 1
printf '%s %s\n' "$2" "$s" >&2
exec cat <"$1"
"""

SWEEP_NEW = 'rm -f "${1:-${TMPDIR:-/tmp}}/$2.new" "$HOME/$2.new"'
SWEEP_OLD = 'if [ -f "$2" ]; then cat <"$2" >"$1" && rm -f "$2"; fi'


def script(text: str, *words: str) -> StringCommand:
    """A POSIX shell script with arguments, whatever shell the user chose for commands."""
    return StringCommand("sh", "-c", QuoteString(text), "sh", *map(QuoteString, words))


def fed(text: str, new: str) -> str:
    """Shell text that has the new content as its stdin, and removes it afterwards."""
    return _FED.format(text=text, new=StringCommand(QuoteString(new)).get_raw_value())


class Temporary:
    """The temporary files of one upload: new content and, while it is written, the old one."""

    def __init__(self, folder: str) -> None:
        self.folder = folder if not folder or folder.startswith("/") else f"./{folder}"
        self.name = f"pyinfra-orbstack-{secrets.token_hex(16)}"
        self.cwd = ""
        self.target = ""
        self.begun = False
        self.clean = False

    def path(self, kind: str) -> str:
        return f"{self.folder}/{self.name}.{kind}"


class Digest:
    """Checks what was sent or received against `sha256sum`, else `cksum`, else `wc -c`."""

    _REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))

    def __init__(self) -> None:
        self._sha = hashlib.sha256()
        self._crc = 0xFFFFFFFF
        self._length = 0

    def update(self, data: bytes) -> bytes:
        self._sha.update(data)
        # POSIX's CRC is zlib's with each byte's bits reversed.
        self._crc = zlib.crc32(data.translate(self._REVERSED), self._crc)
        self._length += len(data)
        return data

    def matches(self, words: list[str]) -> bool:
        """Whether the words that one of the three printed fit."""
        length = str(self._length)
        return (
            words[:1] == [self._sha.hexdigest()]
            or words[:2] == [str(self._cksum()), length]
            or words == [length]
        )

    def _cksum(self) -> int:
        length = self._length
        tail = length.to_bytes((length.bit_length() + 7) // 8, "little")
        crc = zlib.crc32(tail.translate(self._REVERSED), self._crc) ^ 0xFFFFFFFF
        return int(f"{crc:032b}"[::-1], 2) ^ 0xFFFFFFFF


# The local end ---------------------------------------------------------------------------------


class ChecksumMismatch(OSError):
    """What arrived is not what was sent."""


@contextlib.contextmanager
def reading(filename_or_io: Any, *, again: bool = False) -> Iterator[Iterator[bytes]]:
    """The content of a local file or an IO object, in pieces."""
    with contextlib.ExitStack() as stack:
        if hasattr(filename_or_io, "read"):
            file = filename_or_io
            if seekable(file):
                file.seek(0)
            elif again:
                raise ChecksumMismatch("the file arrived with another checksum")
        else:
            file = stack.enter_context(open(filename_or_io, "rb"))
        yield pieces(file)


@contextlib.contextmanager
def shown(title: str) -> Iterator[Callable[[bytes], bytes]]:
    """Show pyinfra's spinner for what moves more than `SHOWN_FROM` bytes."""
    moved = 0
    with contextlib.ExitStack() as stack:

        def count(data: bytes) -> bytes:
            nonlocal moved
            before, moved = moved, moved + len(data)
            if before < SHOWN_FROM <= moved:
                stack.enter_context(progress_spinner({title}))
            return data

        yield count


def seekable(file: Any) -> bool:
    return hasattr(file, "seek") and bool(getattr(file, "seekable", lambda: True)())


def pieces(file: IO[Any]) -> Iterator[bytes]:
    while data := file.read(CHUNK):
        yield data.encode() if isinstance(data, str) else data


def deliver(arrived: IO[bytes], filename_or_io: Any) -> None:
    """Copy a complete file to where the user wants it."""
    if not hasattr(filename_or_io, "write"):
        with open(filename_or_io, "wb") as file:
            shutil.copyfileobj(arrived, file)
        return
    if seekable(filename_or_io):
        filename_or_io.seek(0)
    if isinstance(filename_or_io, TextIOBase):
        filename_or_io.write(arrived.read().decode())
    else:
        shutil.copyfileobj(arrived, filename_or_io)
