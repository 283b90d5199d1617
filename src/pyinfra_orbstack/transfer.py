"""Transferring files: uploads and downloads over a `Runner`, with checksums at both ends.

The target runs functions of `shell/*.sh`. Their text and all words go over stdin and never through
a wrapper such as `sudo -i`, which interprets `$` and newlines a second time.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
import shlex
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

import gevent
from pyinfra.api.command import QuoteString, StringCommand
from pyinfra.connectors.util import CommandOutput, OutputLine
from pyinfra.progress import progress_spinner

from pyinfra_orbstack import localfile, protocol, shell
from pyinfra_orbstack.interrupts import Interrupted
from pyinfra_orbstack.localfile import printable, worded
from pyinfra_orbstack.process import STDERR
from pyinfra_orbstack.protocol import Line, MarkedStream, NotStarted

if TYPE_CHECKING:
    from pyinfra_orbstack.runner import Runner

#: Transfers of at least this many bytes show a spinner.
SHOWN_FROM = 4 * 1024 * 1024
#: Content up to this size is a word of the call; larger content follows on stdin, with a trailer.
SMALL = 8 * 1024
#: The length of the trailer, which upload.sh also uses.
TRAILER = 160
#: Seconds to restore what a killed upload left.
RECOVERY_TIMEOUT = 15.0
#: Seconds before that, in which a machine that is stopping reports it.
SETTLING = 0.5
#: How much of a wrapper's messages is kept to explain a failure, and how much of that is shown.
MOST_SAID = 64 * 1024
MOST_TOLD = 500

#: Adds the effect of pyinfra's global arguments to a command: sudo, su, a shell, a directory.
Wrap = Callable[[StringCommand], StringCommand]

# The text for a wrapper, if it is not `sh` alone. It contains nothing that a shell interprets
# differently in an extra pass. If content follows the functions, `dd` takes not a byte of that.
_BEFORE_CONTENT = (
    'eval "`if dd iflag=fullblock count=0 </dev/null; then dd iflag=fullblock bs={0} count=1; '
    'else dd bs=1 count={0}; fi 2>/dev/null`"'
)


class ChecksumMismatch(OSError):
    """The received content differs from the sent content."""


def shell_call(libraries: Iterable[str], *words: str, content: bool = False) -> bytes:
    """Shell text that defines the functions of some files and calls one of them.

    It runs completely or does nothing: a truncated call is a syntax error. With ``content`` the
    call reads the text that follows it; otherwise that is left to the shell.

    Raises:
        UnicodeEncodeError: A word has no encoding in a file system.
    """
    line = " ".join(map(shlex.quote, words))
    stdin = "" if content else " </dev/null"
    text = f"{''.join(map(shell.text, libraries))}{{ {line}; }}{stdin}\n"
    return text.encode("utf-8", "surrogateescape")


class Deadline:
    """The time by which all steps of a transfer must be done."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._end = None if seconds is None else time.monotonic() + seconds

    def __str__(self) -> str:
        return f"it did not finish within {self._seconds:g} s"

    def left(self) -> float | None:
        """The remaining seconds, or None if there is no limit.

        Raises:
            TimeoutError: The deadline has passed.
        """
        if self._end is None:
            return None
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    @contextlib.contextmanager
    def covering(self) -> Iterator[None]:
        """Raise `TimeoutError` in code that waits for longer."""
        timeout = gevent.Timeout(self.left())
        try:
            with timeout:
                yield
        except gevent.Timeout as fired:
            if fired is not timeout:
                raise
            raise TimeoutError from None


class _Transfer:
    """What uploads and downloads share.

    Args:
        runner: Runs commands in the target.
        path: The path in the target, resolved there by the command that uses it.
        wrap: Makes a command run as a user who may write or read there.
        stdin_taken: Whether the wrapper reads something else from stdin, as `su` does with its
            password. Our input is then on descriptor 3.
        timeout: Seconds for all steps together.
    """

    verb: str
    libraries: tuple[str, ...]

    def __init__(
        self,
        runner: Runner,
        path: str,
        wrap: Wrap,
        *,
        stdin_taken: bool = False,
        timeout: float | None = None,
    ) -> None:
        self._runner = runner
        self._path = path
        self._wrap = wrap
        self._stdin_taken = stdin_taken
        self._deadline = Deadline(timeout)

    def _error(self, why: str, kind: type[OSError] = OSError) -> OSError:
        return kind(f"cannot {self.verb} {printable(self._path)}: {why}")

    def _call(self, *words: str, content: bool = False) -> tuple[str, bytes]:
        """A command that calls one of our shell functions, and the start of its input."""
        if any("\0" in word for word in words):
            raise self._error("a path must not contain a NUL byte")
        try:
            head = shell_call(self.libraries, *words, content=content)
        except UnicodeEncodeError:
            raise self._error("the path cannot be encoded") from None
        boot = ["-c", QuoteString(_BEFORE_CONTENT.format(len(head)))] if content else []
        stdin = ["<&3"] if self._stdin_taken else []
        try:
            command = self._wrap(StringCommand("sh", *boot, *stdin))
        except OSError as broken:
            raise self._error(str(broken)) from None
        text = str(command.get_raw_value())
        return (f"{{ {text}\n}} 3<&0" if self._stdin_taken else text), head

    def _twice(self, attempt: Callable[[], None], may_repeat: bool = True) -> None:
        """Retry once if the received content differs from the sent content."""
        try:
            try:
                attempt()
            except ChecksumMismatch:
                if not may_repeat:
                    raise
                attempt()
        except TimeoutError as late:
            # An error with a text reports what was found once the time was over.
            raise self._error(str(late) or str(self._deadline), TimeoutError) from None


class _Said:
    """The messages of one of our calls on stderr, and those of its wrapper."""

    # Prompts, and sudo's messages other than the reason.
    _NOISE = re.compile(
        r"^(\[sudo[^]]*\] |doas \([^)]*\) )?[Pp]ass(word|wort|phrase)[^:]*: *"
        r"|^sudo: unable to resolve.*"
    )

    def __init__(self, token: str, status: int, text: str) -> None:
        self._status = status
        told, self._noise = [], []
        for line in text.split("\n"):
            if line.startswith(f"{token} "):
                told.append(line[len(token) + 1 :])
            else:
                self._noise.append(self._NOISE.sub("", line).strip())
        #: Whether it ran at all.
        self.begun = "begun" in told
        #: Where old content is kept, if it is.
        self.kept = next((line[5:] for line in told if line.startswith("kept ")), "")
        #: `ok`, `failed REASON`, or something else if it was killed.
        self.verdict = told[-1] if told else ""

    @property
    def killed(self) -> bool:
        """Whether it was killed before it could report the outcome."""
        return self.verdict != "ok" and not self.verdict.startswith("failed ")

    def reason(self) -> str:
        """Why it failed, in one line."""
        if self.verdict.startswith("failed "):
            return " ".join(self.verdict[len("failed ") :].split())
        if self.begun:
            return f"its command was killed (exit code {self._status})"
        lines = list(dict.fromkeys(filter(None, self._noise)))
        # "sudo: ..." is more informative than the lines that some shells print around it.
        named = [line for line in lines if re.match(r"\S+: \S", line)]
        unsaid = f"its command exited with status {self._status} and printed no reason"
        return "; ".join(named or lines)[:MOST_TOLD] or unsaid


class Upload(_Transfer):
    """One upload: written beside its target, checked there, and renamed to it.

    `shell/upload.sh` describes what happens if the target cannot be replaced. After any
    interruption the target has either its old or its complete new content.

    Args:
        place: A directory in the target for temporary files, if the file's own cannot take them.
        arguments: Those of every transfer.
        options: Those of every transfer.
    """

    verb = "write"
    libraries = ("transfer", "upload")

    def __init__(self, *arguments: Any, place: str = "", **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._place = place

    def put(self, source: Any) -> None:
        """Write a local file, or the content of an IO object.

        Raises:
            OSError: It could not be written; the message describes the state of the target.
        """
        again = not hasattr(source, "read") or localfile.seekable(source)
        self._twice(lambda: self._attempt(source), again)

    def _attempt(self, source: Any) -> None:
        token = secrets.token_hex(16)
        with shown(f"uploading {self._path}") as count, _Content(source, count) as content:
            with self._deadline.covering():
                first, whole = content.take(SMALL)
            self._check(content)
            digest = Digest()
            digest.update(first)
            words = ("put", token, self._path, self._place)
            if whole:
                text, head = self._call(*words, *digest.words(), protocol.octal(first))
                stdin: Iterable[bytes] = [head]
            else:
                text, head = self._call(*words, content=True)
                stdin = chain((head, first), self._with_trailer(content, digest, token))

            def watch(line: OutputLine) -> None:
                content.wanted = content.wanted and not line.line.startswith(f"{token} failed")

            said = self._run(token, text, stdin, watch)
        # If killed, it could not clean up; if it never began, there is nothing to clean.
        left = self.recover() if said.begun and said.killed else ""
        self._check(content, left)
        if said.verdict == "failed mismatch":
            raise ChecksumMismatch(str(self._error("its checksum changed during the transfer")))
        if said.verdict != "ok":
            raise self._error(said.reason() + left)

    def _check(self, content: _Content, left: str = "") -> None:
        broken = content.failure
        if broken is not None:
            raise worded(broken, str(self._error(f"{broken}{left}"))) from None

    def _with_trailer(self, content: _Content, digest: Digest, token: str) -> Iterator[bytes]:
        """The rest of the content, followed by the checksums of all of it."""
        yield from map(digest.update, content)
        state = "whole" if content.failure is None else "broken"
        yield " ".join((token, state, *digest.words())).ljust(TRAILER - 1).encode() + b"\n"

    def _run(
        self,
        token: str,
        text: str,
        stdin: Iterable[bytes],
        watch: Callable[[OutputLine], None],
    ) -> _Said:
        try:
            status, output = self._runner.run_lines(
                text, watch, stdin=stdin, timeout=self._deadline.left()
            )
        except NotStarted as broken:
            raise self._error(str(broken), NotStarted) from None
        except BaseException as broken:
            left = self.recover()
            if isinstance(broken, TimeoutError):
                raise TimeoutError(f"{self._deadline}{left}") from None
            if isinstance(broken, OSError) and not isinstance(broken, Interrupted):
                raise worded(broken, str(self._error(f"{broken}{left}"))) from None
            raise
        return _Said(token, status, _lines(output))

    def recover(self) -> str:
        """Undo what a killed upload left, and return a message about it."""
        # A target that is stopping takes a moment to report it.
        with contextlib.suppress(Interrupted, KeyboardInterrupt):
            gevent.sleep(SETTLING)
        for _ in range(3):
            try:
                return self._try_to_recover()
            except (Interrupted, KeyboardInterrupt):
                continue
            except OSError:
                break
        return "; the next upload to it removes what this one left"

    def _try_to_recover(self) -> str:
        self._runner.target.refresh()
        if self._runner.target.state != "running":
            raise OSError("the target does not run")
        token = secrets.token_hex(16)
        text, head = self._call("recover", token, self._path, self._place)
        status, output = self._runner.run_apart(text, RECOVERY_TIMEOUT, stdin=[head])
        said = _Said(token, status, _lines(output))
        if said.kept:
            return f"; its old content is kept in {said.kept}"
        if said.verdict != "ok":
            raise OSError(said.reason())
        return ""


def _lines(output: CommandOutput) -> str:
    return "\n".join(line.line for line in output.combined_lines)


class _Content:
    """The pieces of a source; a source that fails halfway must not look complete."""

    def __init__(self, source: Any, count: Callable[[bytes], bytes]) -> None:
        self._pieces = localfile.pieces(source)
        self._count = count
        self.failure: OSError | None = None
        #: Whether anything still takes more.
        self.wanted = True

    def __enter__(self) -> _Content:
        return self

    def __exit__(self, *_: object) -> None:
        # If another greenlet still waits in it, that one closes it.
        with contextlib.suppress(ValueError):
            self._pieces.close()

    def __iter__(self) -> Iterator[bytes]:
        try:
            for piece in self._pieces:
                if not self.wanted:
                    return
                yield self._count(piece)
        except OSError as broken:
            self.failure = broken

    def take(self, most: int) -> tuple[bytes, bool]:
        """Read until there are more than ``most`` bytes; or all, and report that it is all."""
        taken = bytearray()
        for piece in self:
            taken += piece
            if len(taken) > most:
                return bytes(taken), False
        return bytes(taken), True


class Download(_Transfer):
    """One download: it is checked before anything local changes."""

    verb = "read"
    libraries = ("transfer", "download")

    def get(self, destination: Any) -> None:
        """Read a file of the target into a local file or an IO object.

        Raises:
            OSError: It could not be read or not be written; nothing local has changed.
        """
        with localfile.writing(destination) as arrival:
            ways = iter(("quickly", "carefully"))
            self._twice(lambda: self._attempt(arrival, next(ways)))
            arrival.commit()

    def _attempt(self, arrival: localfile.Arrival, how: str) -> None:
        arrival.restart()
        token = secrets.token_hex(16)
        stream, digest, noise = MarkedStream(token.encode()), Digest(), bytearray()
        told: list[Line] = []
        with shown(f"downloading {self._path}") as count:

            def sink(number: int, data: bytes) -> None:
                if number == STDERR:
                    noise.extend(data[: MOST_SAID - len(noise)])
                    return
                for piece in stream.feed(data):
                    if isinstance(piece, Line):
                        told.append(piece)
                    elif not told:
                        noise.extend(piece[: MOST_SAID - len(noise)])
                    elif len(told) == 1:
                        arrival.write(count(digest.update(piece)))

            text, head = self._call("get", how, token, self._path)
            try:
                status = self._runner.run(text, sink, stdin=[head], timeout=self._deadline.left())
            except OSError as broken:
                if broken is arrival.failure or isinstance(broken, (TimeoutError, Interrupted)):
                    raise
                raise worded(broken, str(self._error(str(broken)))) from None
        if [line.word for line in told] != [b"begin", b"end"]:
            raise self._error(_Said(token, status, noise.decode("utf-8", "replace")).reason())
        if not digest.matches(told[1].rest.decode("ascii", "replace").split()):
            raise ChecksumMismatch(str(self._error("its checksum changed during the transfer")))


class Digest:
    """Computes the checksums of `sha256sum`, `cksum` and `wc -c` over transferred data."""

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

    def words(self) -> tuple[str, str, str]:
        """SHA-256, CRC and length."""
        return self._sha.hexdigest(), str(self._cksum()), str(self._length)

    def matches(self, words: list[str]) -> bool:
        """Whether the output words of one of the three commands match."""
        sha, crc, length = self.words()
        return words[:1] == [sha] or words[:2] == [crc, length] or words == [length]

    def _cksum(self) -> int:
        length = self._length
        tail = length.to_bytes((length.bit_length() + 7) // 8, "little")
        crc = zlib.crc32(tail.translate(self._REVERSED), self._crc) ^ 0xFFFFFFFF
        return int(f"{crc:032b}"[::-1], 2) ^ 0xFFFFFFFF


@contextlib.contextmanager
def shown(title: str) -> Iterator[Callable[[bytes], bytes]]:
    """Show pyinfra's spinner for transfers of at least `SHOWN_FROM` bytes."""
    moved = 0
    with contextlib.ExitStack() as stack:

        def count(data: bytes) -> bytes:
            nonlocal moved
            before, moved = moved, moved + len(data)
            if before < SHOWN_FROM <= moved:
                stack.enter_context(progress_spinner({title}))
            return data

        yield count
