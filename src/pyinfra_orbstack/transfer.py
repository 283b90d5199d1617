"""Moving files: uploads and downloads over a `Runner`, with checksums at both ends."""

from __future__ import annotations

import contextlib
import hashlib
import posixpath
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator
from io import TextIOBase
from typing import IO, TYPE_CHECKING, Any

from pyinfra.api.command import QuoteString, StringCommand
from pyinfra.progress import progress_spinner

from pyinfra_orbstack.process import CHUNK, STDERR

if TYPE_CHECKING:
    from pyinfra_orbstack.runner import Runner

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


#: Adds to a command what pyinfra's global arguments ask for: sudo, su, a shell, a directory.
Wrap = Callable[[StringCommand], StringCommand]


class Upload:
    """One upload: a temporary file in the target, checked there, then written to its place.

    The old content is kept beside it while it is written. Whatever interrupts, leaving the context
    removes the temporary files and puts a half-written file back.

    Args:
        runner: Runs commands in the target.
        folder: Where temporary files go; "" for the target's own choice.
        timeout: Seconds for sending the content.
    """

    def __init__(self, runner: Runner, folder: str, timeout: float | None = None) -> None:
        self._runner = runner
        self._timeout = timeout
        self._folder = folder if not folder or folder.startswith("/") else f"./{folder}"
        self._name = f"pyinfra-orbstack-{secrets.token_hex(16)}"
        self._cwd = ""
        self._target = ""
        self._begun = False
        self._clean = False

    def __enter__(self) -> Upload:
        return self

    def __exit__(self, *_: object) -> None:
        if self._begun and not self._clean:
            with contextlib.suppress(OSError):
                self._sweep()

    def _path(self, kind: str) -> str:
        return f"{self._folder}/{self._name}.{kind}"

    def put(
        self,
        filename_or_io: Any,
        target: str,
        wrap: Wrap,
        *,
        by_user: str = "",
        show: Callable[[StringCommand], object] = lambda command: None,
    ) -> None:
        """Write a local file, or what an IO object holds, to ``target``.

        Args:
            filename_or_io: The source.
            target: The path in the target.
            wrap: Makes the writing command that of whoever may write there.
            by_user: Whom the temporary file is given to, where the command's stdin is taken.
            show: Called with the writing command before it runs.
        """
        try:
            new = self._send(filename_or_io, target)
        except ChecksumMismatch:
            new = self._send(filename_or_io, target, again=True)
        if by_user:
            # su reads its password from stdin, so the file is opened by its name instead.
            self._runner.as_root("chown", by_user, new)
        self._target = posixpath.join(self._cwd, target)
        command = wrap(script(WRITE, target, self._path("old"), new if by_user else ""))
        show(command)
        text = str(command.get_raw_value())
        status, output = self._runner.run_lines(text if by_user else fed(text, new))
        if by_user and status != KEPT:
            self._runner.as_root("rm", "-f", new)
        self._clean = True
        if status != 0:
            raise OSError(f"cannot write {target}: {output.stderr or output.output}")

    def _send(self, filename_or_io: Any, target: str, again: bool = False) -> str:
        title = f"uploading {target}"
        with reading(filename_or_io, again=again) as source, shown(title) as count:
            return self.stage(map(count, source))

    def stage(self, source: Iterator[bytes]) -> str:
        """Write a private temporary file in the target, check it, and return its path."""
        self._begun = True
        digest = Digest()
        status, output = self._runner.run_lines(
            script(UPLOAD, self._folder, self._name).get_raw_value(),
            stdin=map(digest.update, source),
            timeout=self._timeout,
        )
        if status != 0:
            raise OSError(f"cannot write a temporary file: {output.stderr or output.output}")
        self._folder, self._cwd, *sums = output.stdout_lines or ["", ""]
        if not digest.matches(" ".join(sums).split()):
            raise ChecksumMismatch("the file arrived with another checksum")
        return self._path("new")

    def _sweep(self) -> None:
        """Remove what an interrupted transfer left, and put a half-written file back."""
        words = script(SWEEP_NEW, self._folder, self._name).get_raw_value()
        self._runner.run_apart(words, timeout=15)
        if self._target:
            self._runner.as_root("sh", "-c", SWEEP_OLD, "sh", self._target, self._path("old"))


class Download:
    """One attempt to read a file of the target into a local temporary one.

    Args:
        source: The path in the target.
        wrap: Makes the reading command that of whoever may read there.
    """

    def __init__(self, source: str, wrap: Wrap) -> None:
        self._source = source
        self._mark = secrets.token_hex(8)
        self.command = wrap(script(READ, source, self._mark))
        self._digest = Digest()
        self._errors = bytearray()

    def fetch(self, runner: Runner, into: IO[bytes], timeout: float | None) -> bool:
        """Read it into a local file, and return whether all of it has arrived.

        Raises:
            OSError: It cannot be read.
        """
        with shown(f"downloading {self._source}") as count:

            def sink(stream: int, data: bytes) -> None:
                if stream == STDERR:
                    self._errors.extend(data)
                else:
                    self._digest.update(count(data))
                    into.write(data)

            status = runner.run(self.command.get_raw_value(), sink, timeout=timeout)
        said = self._errors.decode("utf-8", "replace").splitlines()
        if status != 0:
            reason = " ".join(line for line in said if self._mark not in line)
            raise OSError(f"cannot read {self._source}: {reason}")
        # su's prompt may stand before it, without a newline.
        mark = self._mark
        sent = next((line.partition(mark)[2].split() for line in said if mark in line), [])
        return self._digest.matches(sent)


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
