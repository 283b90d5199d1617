"""Running shell text in a target: the one place that chooses session, spawn or terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from io import TextIOBase
from itertools import chain
from typing import Any

from gevent.lock import RLock
from pyinfra import logger
from pyinfra.connectors.util import CommandOutput, OutputLine

from pyinfra_orbstack import interrupts, localfile, process, transfer
from pyinfra_orbstack.process import CHUNK, STDERR, STDOUT
from pyinfra_orbstack.session import (
    LARGEST_FRAME_STDIN,
    Control,
    NotStarted,
    Sink,
    check_text,
)
from pyinfra_orbstack.targets import Target

#: How commands run: one open shell, or a shell for each command.
TRANSPORTS = ("session", "spawn")


class CommandTimeout(TimeoutError):
    """A command took longer than its ``_timeout``; what it had printed is in `output`."""

    def __init__(self, message: str, output: CommandOutput) -> None:
        super().__init__(message)
        self.output = output


class Runner:
    """Runs shell text in a target.

    Args:
        target: Where.
        user: As whom; None for the target's default user.
        workdir: Where commands start; None for that user's home.
        transport: One of `TRANSPORTS`.
        on_restart: Called when a new connection shows that the target was restarted.
        prefix: What stands before each line that is logged.
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
        self._control: Control | None = None
        self._init = ""

    # Connections

    def open(self) -> Control:
        """Return the open session; open one where there is none.

        Raises:
            NotStarted: The target does not answer.
        """
        if self._control is None or not self._control.alive:
            self.close()
            control = self._new_control()
            control.open()
            self._control = control
        return self._control

    def close(self) -> None:
        """Close the session."""
        control, self._control = self._control, None
        if control is not None:
            control.close()

    def _new_control(self) -> Control:
        return Control(self.target, user=self._user, workdir=self._workdir, verify=self._verify)

    def _verify(self, init: str) -> None:
        """See that what is behind a new connection is what we connected to."""
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
        """Run shell text, hand on what it prints and return its exit status."""
        pieces = iter(stdin)
        with interrupts.interruptible():
            if pty:
                return self._run_on_terminal(text, sink, pieces, timeout)
            first = _take(pieces, LARGEST_FRAME_STDIN)
            small = sum(map(len, first)) <= LARGEST_FRAME_STDIN
            if small and self._transport == "session":
                with self._lock:
                    return self._run_in_session(text, sink, b"".join(first), timeout)
            return self._run_spawned(text, sink, chain(first, pieces), timeout)

    def run_lines(
        self, text: str, print_line: Callable[[OutputLine], None] | None = None, **options: Any
    ) -> tuple[int, CommandOutput]:
        """Run shell text and return its exit status and its output in lines.

        Raises:
            CommandTimeout: It did not end in time.
        """
        lines = _Lines(print_line)
        try:
            status = self.run(text, lines.feed, **options)
        except TimeoutError:
            raise CommandTimeout(
                f"the command did not end within {options['timeout']:g} s and was ended, "
                "with everything it had started",
                lines.finish(),
            ) from None
        return status, lines.finish()

    def run_if_idle(self, text: str, timeout: float) -> bool:
        """Run shell text in the open session; False where none is open or it is busy.

        Nothing is opened for it, which would start a stopped machine.
        """
        if self._control is None or not self._control.idle:
            return False
        self._control.run(text, _ignore, deadline=time.monotonic() + timeout)
        return True

    def run_apart(
        self, text: str, timeout: float, stdin: Iterable[bytes] = ()
    ) -> tuple[int, CommandOutput]:
        """Run shell text that is to clean up, beside whatever the session is doing."""
        lines = _Lines()
        deadline = time.monotonic() + timeout
        status = self._new_control().spawn(text, lines.feed, stdin=stdin, deadline=deadline)
        return status, lines.finish()

    def as_root(self, *words: str) -> None:
        """Run a command line as root, without any connection.

        Raises:
            OSError: It failed.
        """
        argv = self.target.argv(*words, user="root")
        done = process.run(argv, timeout=30, env=self.target.environment())
        if done.returncode != 0:
            raise OSError(done.stderr.decode("utf-8", "replace").strip())

    def _run_in_session(self, text: str, sink: Sink, stdin: bytes, timeout: float | None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            return self.open().run(text, sink, stdin=stdin, deadline=deadline)
        except NotStarted as broken:
            logger.debug(f"{self._prefix}opening the session again: {broken}")
            return self.open().run(text, sink, stdin=stdin, deadline=deadline)

    def _run_spawned(
        self, text: str, sink: Sink, stdin: Iterable[bytes], timeout: float | None
    ) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        # Until START is sent no byte of stdin is read, so a second try has all of it.
        try:
            return self._new_control().spawn(text, sink, stdin=stdin, deadline=deadline)
        except NotStarted as broken:
            logger.debug(f"{self._prefix}trying again: {broken}")
            return self._new_control().spawn(text, sink, stdin=stdin, deadline=deadline)

    def _run_on_terminal(
        self, text: str, sink: Sink, stdin: Iterable[bytes], timeout: float | None
    ) -> int:
        with transfer.staged(self, check_text(text)) as path:
            deadline = None if timeout is None else time.monotonic() + timeout
            return self._new_control().terminal(path, sink, stdin=stdin, deadline=deadline)


def _ignore(stream: int, data: bytes) -> None:
    pass


class _Lines:
    """Collects output in lines, split at newlines alone, in the order in which they ended."""

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


def stdin_pieces(stdin: Any) -> Iterator[bytes]:
    """What pyinfra's `_stdin` holds, as bytes.

    Text is pyinfra's: every element and every line ends in a newline. Bytes are passed as they are.
    """
    if stdin is None:
        return
    if hasattr(stdin, "read"):
        if localfile.seekable(stdin):
            stdin.seek(0)
        if isinstance(stdin, TextIOBase):
            stdin = iter(stdin)
        else:
            yield from iter(lambda: stdin.read(CHUNK), b"")
            return
    elif isinstance(stdin, (str, bytes)):
        stdin = [stdin]
    elif hasattr(stdin, "readlines"):
        stdin = stdin.readlines()
    for element in stdin:
        if isinstance(element, bytes):
            yield element
        else:
            yield (element if element.endswith("\n") else f"{element}\n").encode()
