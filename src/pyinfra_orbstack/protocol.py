"""The exchange between the client and a control shell, as bytes, without any I/O.

1. The client sends a command: to a shell that reads from a pipe as one `{ ...; }` compound, so that
   truncated text is a syntax error and never runs; on a terminal with a byte count, as `typed`
   encodes it.
2. The shell answers READY and waits.
3. The client sends START, a word made for this command alone. Before it, nothing can have run and
   the command may be tried again; from its first byte on the outcome is unknown until reported.
   If the target is far away and has just answered, START is empty and the shell does not wait for
   it: then the last byte of the frame takes its place.
4. The command runs. Its output is enclosed by BEGIN and END, on each stream. It is over when its
   process has ended and both outputs are closed.

The shell's own messages begin with a token of 128 random bits, made for each exchange; it is in no
argument list and in no environment of the target, so a command cannot print it. Anything before a
BEGIN comes from a profile or from OrbStack's update banner and is dropped.

Each process between a command and us reports how it ended. Success requires the command's exit
status, the same on both streams, and complete copies of both outputs.
"""

from __future__ import annotations

import secrets
import shlex
import signal
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Union

from pyinfra_orbstack.process import STDERR, STDOUT

#: A longer command text cannot be one argument of `sh -c` (Linux, MAX_ARG_STRLEN).
LONGEST_TEXT = 128 * 1024 - 1
#: Streams of a control shell behind pipes, and of one on a terminal.
PIPES, TERMINAL = (STDOUT, STDERR), (STDOUT,)


class NotStarted(OSError):
    """The command did not start; it is safe to try it again."""


class OutcomeUnknown(OSError):
    """The command started, but its exit status or the completeness of its output is unknown."""


class Process(NamedTuple):
    """A process of the target, as described by a line of ``/proc/PID/stat``.

    >>> Process.parse(b"7 (a (b) c) S 1 7 7 0 -1 4 0 0 0 0 0 0 0 0 20 0 1 0 1234 9")
    Process(pid=7, parent=1, group=7, session=7, started=1234)
    """

    pid: int
    parent: int
    group: int
    session: int
    started: int

    @classmethod
    def parse(cls, line: bytes) -> Process | None:
        """Read such a line; None if it is not one."""
        head, _, tail = line.partition(b" ")
        fields = tail.rpartition(b") ")[2].split()
        try:
            return cls(int(head), *(int(fields[place]) for place in (1, 2, 3, 19)))
        except (ValueError, IndexError):
            return None


# Client to shell ------------------------------------------------------------------------------


def encoded(what: str, text: str) -> bytes:
    """Return text for a target as bytes.

    Raises:
        OSError: It contains a character that no command line can contain.
    """
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as bad:
        raise OSError(
            f"{what} must not contain {text[bad.start]!r}, which is not a character"
        ) from None
    if b"\0" in data:
        raise OSError(f"{what} must not contain a NUL byte")
    return data


def check_text(text: str) -> bytes:
    """Return a command text as bytes.

    Raises:
        OSError: It is too long for Linux, or contains a character that no command line can
            contain.
    """
    data = encoded("the command", text)
    if len(data) > LONGEST_TEXT:
        raise OSError(
            f"the command is {len(data)} bytes long, but Linux limits an argument to "
            f"{LONGEST_TEXT}: upload it as a file, and run the file"
        )
    return data


def command_words(text: str) -> tuple[bytes, ...]:
    """The command line that runs a command text.

    pyinfra's own commands are ``sh -c 'TEXT'`` already, and need no second shell around it. Neither
    does a shell that reads its input.

    >>> command_words("ls | wc -l"), command_words("sh -c 'ls | wc -l'"), command_words("sh -c sh")
    ((b'sh', b'-c', b'ls | wc -l'), (b'sh', b'-c', b'ls | wc -l'), (b'sh',))

    Raises:
        OSError: See `check_text`.
    """
    data = check_text(text)
    prefix, word = text[:6], text[6:]
    inner = word[1:-1].replace("'\"'\"'", "'") if word[:1] == "'" else word
    if prefix == "sh -c " and shlex.quote(inner) == word:
        data = encoded("the command", inner)
    return (b"sh",) if data == b"sh" else (b"sh", b"-c", data)


def call(function: str, *words: str | bytes) -> bytes:
    """A call of one of the functions in ``shell/session.sh``.

    >>> call("orb_open", "a b", b"c")
    b"orb_open 'a b' c"
    """
    return b" ".join([function.encode(), *map(_quoted, words)])


def _quoted(word: str | bytes) -> bytes:
    # Latin-1, to quote bytes as `shlex` does.
    text = word if isinstance(word, str) else word.decode("latin-1")
    return shlex.quote(text).encode("latin-1")


_PLAIN = (
    b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;/_+=@#()[]{}<>|&~^*?!$"
)
_OCTAL = [chr(byte) if byte in _PLAIN else f"\\{byte:03o}" for byte in range(256)]


def octal(data: bytes) -> str:
    """``data`` as a `printf` format, in pure ASCII.

    >>> octal(b"10%")
    '10\\\\045'
    """
    return "".join(map(_OCTAL.__getitem__, data))


def typed(script: bytes) -> bytes:
    """A script in the form to type on a terminal, for `orb_typed`."""
    digits = b"".join(b"\\%03o" % byte for byte in script)
    lines = [digits[start : start + 1000] for start in range(0, len(digits), 1000)]
    return b"".join(line + b"\n" for line in [*lines, b". %d" % len(digits)])


# Shell to client ------------------------------------------------------------------------------


class Line(NamedTuple):
    """The text after the token, on a line of the control shell."""

    word: bytes
    rest: bytes


class MarkedStream:
    """Separates the lines of the control shell from everything else on one stream.

    >>> stream = MarkedStream(b"TOKEN")
    >>> stream.feed(b"abcTOK"), stream.feed(b"EN end 0\\nrest")
    ([b'abc'], [Line(word=b'end', rest=b'0'), b'rest'])
    """

    def __init__(self, token: bytes) -> None:
        self._token = token
        self._held = b""

    def feed(self, data: bytes) -> list[bytes | Line]:
        """Take a piece, and return what is certain so far, in order: text and whole lines."""
        found: list[bytes | Line] = []
        data = self._held + data
        while (at := data.find(self._token)) >= 0:
            line, newline, rest = data[at + len(self._token) :].partition(b"\n")
            if not newline:
                break
            word, _, words = line.strip().partition(b" ")
            found += [data[:at], Line(word, words)]
            data = rest
        if at < 0:
            at = len(data) - _overlap(data, self._token)
        self._held = data[at:]
        found.append(data[:at])
        return [one for one in found if one]

    def release(self) -> bytes:
        """Return text held back as a possible control line, once none can follow."""
        held, self._held = self._held, b""
        return b"" if held.startswith(self._token) else held


def _overlap(data: bytes, token: bytes) -> int:
    """How many bytes at the end of ``data`` could be the beginning of ``token``."""
    for length in range(min(len(token) - 1, len(data)), 0, -1):
        if data.endswith(token[:length]):
            return length
    return 0


class Hello(NamedTuple):
    """The control shell is ready for commands.

    Attributes:
        inside: Whether it could enter the directory.
        shell: The control shell; None if the target hides its processes.
        init: When the target's first process started (field 22 of ``/proc/1/stat``: uptime and
            boot id belong to the kernel that all machines share).
    """

    inside: bool
    shell: Process | None
    init: str


class Began(NamedTuple):
    """The command runs as this process; None if the target hides its processes."""

    process: Process | None


class Output(NamedTuple):
    """The command printed something."""

    stream: int
    data: bytes


class Stray(NamedTuple):
    """Something else printed this, before the command began."""

    data: bytes


Event = Union[Hello, Began, Output, Stray]


class Exchange:
    """One exchange: bytes of the control shell go in, and events come out.

    Args:
        streams: `PIPES` or `TERMINAL`.
        hello: Whether the control shell introduces itself first.
    """

    def __init__(self, streams: Sequence[int] = PIPES, *, hello: bool = False) -> None:
        self.token = secrets.token_hex(16)
        self.start = secrets.token_hex(16)
        #: Whether the control shell waits for START.
        self.ready = False
        #: How many bytes were dropped before the command began.
        self.stray = 0
        self._streams = {stream: MarkedStream(self.token.encode()) for stream in streams}
        self._silent = set(streams) if hello else set()
        self._begun: set[int] = set()
        self._ended: set[int] = set()
        self._reports: dict[tuple[int, bytes], list[bytes]] = {}

    @property
    def greeted(self) -> bool:
        """Whether the control shell has introduced itself, on all streams."""
        return not self._silent

    @property
    def waits(self) -> bool:
        """Whether the shell has introduced itself and waits for START."""
        return self.greeted and self.ready

    @property
    def finished(self) -> bool:
        """Whether all streams have reached their END."""
        return len(self._ended) == len(self._streams)

    def has_ended(self, stream: int) -> bool:
        """Whether a stream has reached its END."""
        return stream in self._ended

    def receive(self, stream: int, data: bytes) -> list[Event]:
        """Take a piece of a stream, and return its events."""
        events: list[Event] = []
        for one in self._streams[stream].feed(data):
            if isinstance(one, Line):
                events += self._line(stream, *one)
            elif stream not in self._begun:
                self.stray += len(one)
                events.append(Stray(one))
            elif stream not in self._ended:
                events.append(Output(stream, one))
        return events

    def release(self) -> list[Output]:
        """Text held back as a possible END: if no END can follow, it is the command's output."""
        kept = {stream: marked.release() for stream, marked in self._streams.items()}
        running = self._begun - self._ended
        return [Output(stream, data) for stream, data in kept.items() if data and stream in running]

    def _line(self, stream: int, word: bytes, rest: bytes) -> Iterator[Hello | Began]:
        if word == b"hello" and stream in self._silent:
            self._silent.discard(stream)
            if stream == STDOUT:
                yield _parse_hello(rest)
        elif word == b"ready" and stream == STDOUT:
            self.ready = True
        elif word == b"begin" and stream not in self._begun:
            self._begun.add(stream)
            if stream == STDOUT:
                yield Began(Process.parse(rest))
        elif word == b"end":
            self._ended.add(stream)
        else:
            self._reports.setdefault((stream, word), []).append(rest)

    def outcome(self) -> int:
        """The command's exit status as a shell reports it: 128+n for a signal.

        Raises:
            OutcomeUnknown: Not every process between the command and us ended by itself.
        """
        statuses = {self._report(stream, b"status") for stream in self._streams}
        if len(statuses) > 1 or None in statuses:
            raise OutcomeUnknown(
                "the command's outcome is unknown: its exit status did not arrive; "
                "check what it did"
            )
        for stream, name in ((STDOUT, "stdout"), (STDERR, "stderr")):
            if STDERR in self._streams and self._report(stream, b"copied") != 0:
                raise OutcomeUnknown(
                    f"the command's outcome is unknown: copying its {name} failed "
                    "(check that `cat` works in the target)"
                )
        # A command need not read its stdin; the process that writes it then has a broken pipe.
        if (STDOUT, b"input") in self._reports:
            written = self._report(STDOUT, b"input")
            if written is None or (written > 128 and written != 128 + signal.SIGPIPE):
                raise OutcomeUnknown(
                    "the command's outcome is unknown: its stdin was not completely written; "
                    "check what it did"
                )
        return statuses.pop() or 0

    def _report(self, stream: int, word: bytes) -> int | None:
        """An exit status that was reported exactly once and is valid."""
        reported = self._reports.get((stream, word), [])
        if len(reported) != 1 or not reported[0].isdigit() or int(reported[0]) > 255:
            return None
        return int(reported[0])


def _parse_hello(words: bytes) -> Hello:
    where, _, stats = words.partition(b" ")
    shell, _, init = stats.partition(b" init ")
    fields = init.split()
    started = fields[19].decode("ascii", "replace") if len(fields) > 19 else ""
    return Hello(where == b"home", Process.parse(shell), started)
