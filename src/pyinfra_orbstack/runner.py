"""Running shell text in a target: the one place that chooses session, spawn or terminal."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import gevent
from gevent.lock import RLock
from pyinfra import logger
from pyinfra.connectors.util import CommandOutput, OutputLine

from pyinfra_orbstack import interrupts, localfile, process
from pyinfra_orbstack.answers import BadValue
from pyinfra_orbstack.process import CHUNK, STDERR, STDOUT
from pyinfra_orbstack.protocol import NotStarted
from pyinfra_orbstack.session import Client, ShellSession, Sink, largest_stdin
from pyinfra_orbstack.targets import Target

#: How commands run: one open shell, or a shell for each command.
TRANSPORTS = ("session", "spawn")
#: Names the transport for hosts whose data names none.
TRANSPORT_VARIABLE = "PYINFRA_ORBSTACK_TRANSPORT"


class CommandTimeout(TimeoutError):
    """A command exceeded its ``_timeout``; `output` contains its output until then."""

    def __init__(self, message: str, output: CommandOutput) -> None:
        super().__init__(message)
        self.output = output


def choose_transport(named: str | None) -> str:
    """The transport that a host's data names, or else the environment.

    Raises:
        BadValue: There is no transport of that name.
    """
    transport = named or os.environ.get(TRANSPORT_VARIABLE) or TRANSPORTS[0]
    if transport not in TRANSPORTS:
        raise BadValue(
            f"unknown transport {transport!r}: set orbstack_transport or "
            f"{TRANSPORT_VARIABLE} to {' or '.join(TRANSPORTS)}"
        )
    return transport


class Runner:
    """Runs shell text in a target.

    Args:
        target: The target.
        user: The user to run as; None for the target's default user.
        workdir: The working directory of commands; None for that user's home.
        transport: One of `TRANSPORTS`.
        on_restart: Called when a new connection shows that the target was restarted.
        prefix: Prefix of each log line.
    """

    def __init__(
        self,
        target: Target,
        *,
        user: str | None = None,
        workdir: str | None = None,
        transport: str = TRANSPORTS[0],
        on_restart: Callable[[], object] = lambda: None,
        prefix: str = "",
    ) -> None:
        self.target = target
        self._user = user
        self._workdir = workdir
        self._transport = transport
        self._on_restart = on_restart
        self._prefix = prefix
        self._lock = RLock()
        self.session: ShellSession | None = None
        # The hub of the thread that created it: no other thread can wait for the session.
        self._hub = gevent.get_hub()
        self._init = ""

    # Connections

    def open(self, deadline: float | None = None) -> ShellSession:
        """Return the open session; open one if there is none.

        Raises:
            NotStarted: The target does not answer.
            TimeoutError: The deadline, a point of `time.monotonic`, passed.
        """
        if self.session is None or not self.session.alive:
            self.close()
            session = self._new_session()
            session.open(deadline)
            self.session = session
        return self.session

    def close(self) -> None:
        """Close the session."""
        session, self.session = self.session, None
        if session is not None:
            session.close()

    def _new_session(self) -> ShellSession:
        return ShellSession(self.target, self._user, self._workdir, self._verify)

    def _verify(self, init: str) -> None:
        """Check that a new connection leads to the target that we connected to."""
        if init == self._init:
            return
        if self._init:
            self.target.refresh()
            logger.info(f"{self._prefix}{self.target} was restarted")
            self._on_restart()
        self._init = init

    # Commands

    def run(
        self,
        text: str,
        sink: Sink,
        *,
        stdin: Iterable[bytes] = (),
        timeout: float | None = None,
        pty: bool = False,
    ) -> int:
        """Run shell text, pass on its output and return its exit status."""
        pieces = iter(stdin)
        with interrupts.interruptible():
            if pty:
                return self._run_alone(ShellSession.terminal, text, sink, pieces, timeout)
            in_session = self._transport == "session" and self._hub is gevent.get_hub()
            most = largest_stdin(self.target) if in_session else 0
            first = _take(pieces, most)
            if in_session and sum(map(len, first)) <= most:
                with self._lock:
                    return self._run_in_session(text, sink, b"".join(first), timeout)
            return self._run_alone(ShellSession.spawn, text, sink, chain(first, pieces), timeout)

    def run_lines(
        self, text: str, print_line: Callable[[OutputLine], None] | None = None, **options: Any
    ) -> tuple[int, CommandOutput]:
        """Run shell text and return its exit status and its output in lines.

        Raises:
            CommandTimeout: It did not end in time.
        """
        return self._in_lines(self.run, text, print_line, **options)

    def relay_lines(
        self,
        client: Client,
        text: str,
        print_line: Callable[[OutputLine], None] | None = None,
        timeout: float | None = None,
    ) -> tuple[int, CommandOutput]:
        """Run a local executable that starts shell text by itself; see `ShellSession.relay`.

        Raises:
            CommandTimeout: It did not end in time.
        """
        return self._in_lines(partial(self._relay, client), text, print_line, timeout=timeout)

    def _relay(self, client: Client, text: str, sink: Sink, timeout: float | None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        with interrupts.interruptible():
            return self._new_session().relay(client, text, sink, deadline=deadline)

    def _in_lines(
        self,
        run: Callable[..., int],
        text: str,
        print_line: Callable[[OutputLine], None] | None,
        **options: Any,
    ) -> tuple[int, CommandOutput]:
        lines = _Lines(print_line)
        try:
            status = run(text, lines.feed, **options)
        except TimeoutError:
            raise CommandTimeout(
                f"the command did not finish within {options['timeout']:g} s and was killed, "
                "with everything it had started",
                lines.finish(),
            ) from None
        return status, lines.finish()

    def run_if_idle(self, text: str, timeout: float) -> bool:
        """Run shell text in the open session; False if none is open or it is busy.

        It never opens a session, which would start a stopped machine.
        """
        if self.session is None or not self.session.idle:
            return False
        self.session.run(text, _ignore, deadline=time.monotonic() + timeout)
        return True

    def run_apart(
        self, text: str, timeout: float, stdin: Iterable[bytes] = ()
    ) -> tuple[int, CommandOutput]:
        """Run shell text for clean-up, independently of the session's current work."""
        lines = _Lines()
        deadline = time.monotonic() + timeout
        status = self._new_session().spawn(text, lines.feed, stdin=stdin, deadline=deadline)
        return status, lines.finish()

    def as_root(self, *words: str) -> None:
        """Run a command line as root, outside any connection.

        Raises:
            OSError: It failed.
        """
        self.target.place.open()
        argv = self.target.place.idle(self.target.argv(*words, user="root"))
        done = process.run(argv, timeout=30, env=self.target.environment())
        if done.returncode != 0:
            raise OSError(done.stderr.decode("utf-8", "replace").strip())

    def _run_in_session(self, text: str, sink: Sink, stdin: bytes, timeout: float | None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        return self._twice(
            lambda: self.open(deadline).run(text, sink, stdin=stdin, deadline=deadline)
        )

    def _run_alone(
        self,
        how: Callable[..., int],
        text: str,
        sink: Sink,
        stdin: Iterable[bytes],
        timeout: float | None,
    ) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        # No byte of stdin is read before START is sent, so a second attempt has all of it.
        return self._twice(
            lambda: how(self._new_session(), text, sink, stdin=stdin, deadline=deadline)
        )

    def _twice(self, attempt: Callable[[], int]) -> int:
        """Retry once if nothing can have run."""
        try:
            return attempt()
        except NotStarted as broken:
            logger.debug(f"{self._prefix}trying again: {broken}")
            return attempt()


def _ignore(stream: int, data: bytes) -> None:
    pass


class _Lines:
    """Collects output in lines, split only at newlines, in the order in which they ended."""

    def __init__(self, on_line: Callable[[OutputLine], None] | None = None) -> None:
        self._on_line = on_line
        self._open = {STDOUT: bytearray(), STDERR: bytearray()}
        self._lines: list[OutputLine] = []

    def feed(self, stream: int, data: bytes) -> None:
        head, newline, tail = data.rpartition(b"\n")
        if newline:
            buffer = self._open[stream]
            for line in bytes(buffer + head).split(b"\n"):
                self._add(stream, line)
            buffer.clear()
        self._open[stream] += tail

    def _add(self, stream: int, data: bytes) -> None:
        name = "stdout" if stream == STDOUT else "stderr"
        line = OutputLine(name, data.decode("utf-8", "replace"))
        self._lines.append(line)
        if self._on_line is not None:
            self._on_line(line)

    def finish(self) -> CommandOutput:
        for stream, rest in self._open.items():
            if rest:
                self._add(stream, bytes(rest))
                rest.clear()
        return CommandOutput(self._lines)


def _take(pieces: Iterator[bytes], most: int) -> list[bytes]:
    """Take pieces until there are more than ``most`` bytes, or no more pieces."""
    taken, size = [], 0
    while size <= most:
        piece = next(pieces, None)
        if piece is None:
            break
        taken.append(piece)
        size += len(piece)
    return taken


def can_be_read_again(stdin: Any) -> bool:
    """Whether `stdin_pieces` yields the same a second time."""
    again = isinstance(stdin, (str, bytes, list, tuple)) or localfile.seekable(stdin)
    return stdin is None or again


def stdin_pieces(stdin: Any) -> Iterator[bytes]:
    """The content of pyinfra's `_stdin`, as bytes.

    Text follows pyinfra's rules: every element and every line ends in a newline. Bytes are passed
    on unchanged.

    Raises:
        OSError: It cannot be read, or is neither text nor bytes.
    """
    try:
        for element in _elements(stdin):
            if isinstance(element, str):
                line = element if element.endswith("\n") else f"{element}\n"
                yield line.encode("utf-8", "surrogateescape")
            else:
                yield bytes(memoryview(element))
    except OSError:
        raise
    except Exception as bad:  # from whatever code produces them
        raise OSError(f"cannot send _stdin: {bad}") from None


def _elements(stdin: Any) -> Iterator[Any]:
    if stdin is None:
        return
    if isinstance(stdin, (str, bytes, bytearray)):
        yield stdin
    elif hasattr(stdin, "read"):
        if localfile.seekable(stdin):
            stdin.seek(0)
        read = stdin.readline if isinstance(stdin.read(0), str) else partial(stdin.read, CHUNK)
        if _may_block(stdin):
            read = partial(gevent.get_hub().threadpool.apply, read)
        while element := read():
            yield element
    else:
        yield from stdin.readlines() if hasattr(stdin, "readlines") else stdin


def _may_block(file: Any) -> bool:
    """Whether reading a file may block: a pipe, a terminal, a socket."""
    try:
        return not stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    except (AttributeError, OSError, ValueError):
        return False
