"""Commands, byte-exact, through a shell that runs in a target.

A *control shell* (`sh`: dash, bash or busybox) in the target runs them. `protocol` is what it and
the client say to each other; here bytes are moved, time is kept, and what must not go on is ended.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Protocol

import gevent

from pyinfra_orbstack import interrupts, shell
from pyinfra_orbstack.keyboard import Keyboard
from pyinfra_orbstack.process import Child, Detached, TooManyFiles, feed
from pyinfra_orbstack.protocol import (
    PIPES,
    TERMINAL,
    Began,
    Event,
    Exchange,
    Hello,
    Output,
    Process,
    Stray,
    call,
    check_text,
    encoded,
    octal,
    typed,
)
from pyinfra_orbstack.protocol import (
    NotStarted as NotStarted,
)
from pyinfra_orbstack.protocol import (
    OutcomeUnknown as OutcomeUnknown,
)

#: Stdin up to this size travels in the frame of a session; more goes through a spawn.
LARGEST_FRAME_STDIN = 64 * 1024
#: So much may be printed before a command begins; more is no profile and no banner.
MOST_STRAY = 64 * 1024
#: Seconds for a control shell to answer, and for the call that ends a command.
ANSWER_TIMEOUT = 30.0
END_TIMEOUT = 15.0

# Read now: later there may be too many open files.
_FUNCTIONS = shell.text("session").encode()
_END = shell.text("processes") + shell.text("end") + 'orb_end "$@"'

#: Called with `STDOUT` or `STDERR` and a piece of what the command printed there.
Sink = Callable[[int, bytes], None]


class Target(Protocol):
    """Where commands run: a machine or a container."""

    def argv(self, *words: str, user: str | None = None, tty: bool = False) -> list[str]:
        """The local command line that runs ``words`` in the target."""

    def environment(self) -> dict[str, str]:
        """The environment of that command line."""


class ShellSession:
    """A control shell in a target and the exchanges with it.

    Args:
        target: Where it runs.
        user: As whom; None for the target's default user.
        workdir: Where commands start; None for that user's home.
        verify: Called with `Hello.init` before anything is run; what it raises ends the
            connection.
    """

    def __init__(
        self,
        target: Target,
        user: str | None = None,
        workdir: str | None = None,
        verify: Callable[[str], None] | None = None,
    ) -> None:
        self.target = target
        self._verify = verify
        self._user = user
        self._workdir = workdir
        self._child: Child | None = None
        self._closed_streams: set[int] = set()
        self._streams: Sequence[int] = PIPES
        # What came instead of a shell; None where it might be what was typed.
        self._transcript: bytearray | None = None
        self._busy = False
        # What an end of the running command is to find, and the call that finds it.
        self._shell: Process | None = None
        self._command: Process | None = None
        self._ending: Detached | None = None

    # The connection

    @property
    def alive(self) -> bool:
        """Whether the next command can be sent."""
        return self._child is not None and not self._closed_streams and not self._child.gone

    @property
    def idle(self) -> bool:
        """Whether it is alive and runs nothing."""
        return self.alive and not self._busy

    def open(self, deadline: float | None = None) -> None:
        """Start a session.

        Raises:
            NotStarted: The target does not answer; the text says what it printed instead.
            TimeoutError: The deadline came.
        """
        exchange = Exchange(hello=True)
        with self._closing_on_failure():
            self._start("sh")
            self._send(exchange, _script(b"orb_pipes", self._opening(exchange)), deadline)
            self._await(exchange, deadline, lambda: exchange.greeted)

    def _opening(self, exchange: Exchange) -> bytes:
        return call("orb_open", exchange.token, encoded("the directory", self._workdir or ""))

    def _start(self, *words: str, tty: bool = False) -> None:
        self.close()
        self._closed_streams.clear()
        self._streams = TERMINAL if tty else PIPES
        self._transcript = bytearray()
        self._shell = self._command = self._ending = None
        argv = self.target.argv(*words, user=self._user, tty=tty)
        try:
            self._child = Child(argv, env=self.target.environment(), tty=tty)
        except TooManyFiles:
            raise  # trying again does not help
        except OSError as broken:
            raise NotStarted(f"cannot run {argv[0]}: {broken.strerror}") from None

    def _send(self, exchange: Exchange, data: bytes, deadline: float | None) -> None:
        assert self._child is not None
        limit = _limit(deadline)
        try:
            with gevent.Timeout(max(0.0, limit - time.monotonic()), TimeoutError):
                self._child.write(data)
        except TimeoutError:
            if limit == deadline:
                raise
            raise self._no_shell(exchange) from None
        except OSError:
            raise self._no_shell(exchange) from None

    def _read(self, deadline: float | None) -> tuple[int, bytes]:
        assert self._child is not None
        stream, data = self._child.read(None if deadline is None else deadline - time.monotonic())
        if not data:
            self._closed_streams.add(stream)
        return stream, data

    def _await(
        self,
        exchange: Exchange,
        deadline: float | None,
        until: Callable[[], bool],
        most_stray: int = MOST_STRAY,
    ) -> None:
        """Read what the control shell must say before any command runs."""
        limit = _limit(deadline)
        while not until():
            try:
                data = self._hear(exchange, limit)
            except TimeoutError:
                if limit == deadline:
                    raise
                raise NotStarted(f"the target did not answer within {ANSWER_TIMEOUT:g} s") from None
            if not data:
                raise self._no_shell(exchange)
            if exchange.stray > most_stray:
                raise NotStarted(f"more than {most_stray} bytes came where an answer was expected")

    def _hear(self, exchange: Exchange, limit: float) -> bytes:
        stream, data = self._read(limit)
        for event in exchange.receive(stream, data):
            if isinstance(event, Hello):
                self._meet(event)
            elif isinstance(event, Stray) and self._transcript is not None:
                self._transcript += event.data
        return data

    def _meet(self, hello: Hello) -> None:
        self._shell = hello.shell
        if not hello.inside:
            # Trying again will not make it.
            raise OSError(f"there is no directory {self._workdir!r} in which to start")
        if self._verify is not None:
            self._verify(hello.init)

    def _no_shell(self, exchange: Exchange) -> NotStarted:
        """Why there is no control shell, in one line."""
        assert self._child is not None
        deadline = time.monotonic() + 1
        with contextlib.suppress(TimeoutError):
            while len(self._closed_streams) < len(self._streams):
                self._hear(exchange, deadline)
        said = " ".join((self._transcript or b"").decode("utf-8", "replace").split())
        how = "ended"
        with contextlib.suppress(OSError):
            status = self._child.wait(1)
            how = "still runs" if status is None else f"ended with exit code {status}"
        said = said[-300:] or "nothing"
        return NotStarted(f"the connection gave no shell: it {how} and said {said!r}")

    def close(self) -> None:
        """Close the connection; the control shell reads the end of its input and goes."""
        child, self._child = self._child, None
        if child is not None:
            child.close_stdin()
            with contextlib.suppress(OSError):
                child.wait(0 if self._closed_streams else 0.2)
            child.end()

    # Commands

    def run(
        self, text: str, sink: Sink, *, stdin: bytes = b"", deadline: float | None = None
    ) -> int:
        """Run a command in the open session.

        Args:
            text: Shell text, run by `sh -c`.
            sink: Takes what the command prints, piece by piece, as it comes.
            stdin: What it reads, at most `LARGEST_FRAME_STDIN` bytes.
            deadline: Point of `time.monotonic` at which the command is ended.

        Returns:
            Its exit status as a shell has it, 128+n for a signal.

        Raises:
            NotStarted: It did not run.
            OutcomeUnknown: It started, and nobody knows how it went.
            TimeoutError: The deadline came; the command and its descendants are gone.
        """
        exchange, source = Exchange(), octal(stdin) if stdin else "-none"
        frame = _lines(_framed(exchange, source, check_text(text)))
        self._command = self._ending = None
        self._transcript = bytearray()
        with self._occupied():
            with self._closing_on_failure():
                self._send(exchange, frame, deadline)
                self._await(exchange, deadline, lambda: exchange.ready)
            return self._complete(exchange, sink, deadline)

    def spawn(
        self,
        text: str,
        sink: Sink,
        *,
        stdin: Iterable[bytes] = (),
        deadline: float | None = None,
    ) -> int:
        """Run a command through a control shell of its own, with a stdin of any size.

        Arguments, result and errors are those of `run`; ``stdin`` comes in pieces.
        """
        exchange = Exchange(hello=True)
        frame = _framed(exchange, "-rest", check_text(text), b"orb_drain")
        with self._occupied():
            with self._closing_on_failure():
                self._start("sh")
                self._send(
                    exchange, _script(b"orb_pipes", self._opening(exchange), frame), deadline
                )
                self._await(exchange, deadline, lambda: exchange.ready and exchange.greeted)
            status = self._complete(exchange, sink, deadline, stdin=stdin)
        self.close()
        return status

    def terminal(
        self,
        text: str,
        sink: Sink,
        *,
        stdin: Iterable[bytes] = (),
        deadline: float | None = None,
    ) -> int:
        """Run a command on a pseudo terminal, where stdout and stderr are one.

        Arguments, result and errors are those of `spawn`, but ``stdin`` is typed, and followed by
        as many ends of file as the command reads.
        """
        prompt, exchange = Exchange(TERMINAL), Exchange(TERMINAL, hello=True)
        words = call("orb_terminal", exchange.token, exchange.start, check_text(text))
        keys = typed(_lines(self._opening(exchange), words))
        with self._occupied():
            with self._closing_on_failure():
                script = _script(b'orb_typed "$1"').decode()
                self._start("sh", "-c", script, "sh", prompt.token, tty=True)
                self._await(prompt, deadline, lambda: prompt.ready)
                self._transcript = None
                self._send(exchange, keys, deadline)
                # Without `stty` there, the terminal shows all that is typed.
                self._await(
                    exchange,
                    deadline,
                    lambda: exchange.ready and exchange.greeted,
                    most_stray=MOST_STRAY + 2 * len(keys),
                )
            status = self._complete(exchange, sink, deadline, keys=stdin)
        self.close()
        return status

    @contextlib.contextmanager
    def _occupied(self) -> Iterator[None]:
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    @contextlib.contextmanager
    def _closing_on_failure(self) -> Iterator[None]:
        """Nothing runs before START, so there is nothing but the connection to end."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    @contextlib.contextmanager
    def _ending_on_failure(self) -> Iterator[None]:
        """Leave no command behind when anything interrupts, be it Ctrl-C or gevent's own."""
        try:
            yield
        except TimeoutError:
            self.end_command()
            raise
        except BaseException:
            with contextlib.suppress(OSError):
                self.end_command()
            raise
        if self._ending is not None:
            # A signal came just now; the shell goes, too.
            with contextlib.suppress(OSError):
                self.end_command()

    def _complete(
        self,
        exchange: Exchange,
        sink: Sink,
        deadline: float | None,
        *,
        stdin: Iterable[bytes] | None = None,
        keys: Iterable[bytes] | None = None,
    ) -> int:
        """Say START, and see the command through."""
        child = self._child
        assert child is not None
        start = exchange.start.encode() + b"\n"
        helper: gevent.Greenlet | None = None
        with interrupts.at_interrupt(self._begin_ending), self._ending_on_failure():
            try:
                # From here on the outcome is unknown until it is known.
                if stdin is None:
                    child.try_write(start)
                else:
                    helper = gevent.spawn(feed, child, chain([start], stdin))
                while not exchange.finished:
                    for event in self._next_events(exchange, deadline):
                        if isinstance(event, Output):
                            sink(*event)
                        elif isinstance(event, Began):
                            self._command = event.process
                            if keys is not None:
                                keyboard = Keyboard(self.target, self._user, child, self._shell)
                                helper = gevent.spawn(keyboard.type, keys)
            except TimeoutError:
                for kept in exchange.release():
                    sink(*kept)
                raise
            finally:
                if helper is not None:
                    helper.kill()
            return exchange.outcome()

    def _next_events(self, exchange: Exchange, deadline: float | None) -> list[Event]:
        stream, data = self._read(deadline)
        if not data and not exchange.has_ended(stream):
            raise OutcomeUnknown(
                "the connection ended while the command ran: "
                "whether it ran to its end is unknown, so it is not repeated"
            )
        events = exchange.receive(stream, data)
        if exchange.stray > MOST_STRAY:
            raise OutcomeUnknown(f"more than {MOST_STRAY} bytes came before the command's output")
        return events

    # The end of a command

    def end_command(self) -> None:
        """End the running command and all its descendants, then close the connection.

        It takes a second call, as root: the login user cannot signal what sudo started.

        Raises:
            OSError: The target did not confirm it.
        """
        try:
            self._begin_ending_somehow()
            if self._ending is None:
                return
            done = self._ending.result(END_TIMEOUT)
            if done.returncode != 0:
                said = " ".join(done.stderr.decode("utf-8", "replace").split())
                raise OSError(said[-300:] or f"exit code {done.returncode}")
        except OSError as broken:
            reason = str(broken) or f"no answer in {END_TIMEOUT:g} s"
            raise OSError(
                f"the command may still run: the call that should end it failed ({reason})"
            ) from None
        finally:
            self.close()

    def _begin_ending_somehow(self) -> None:
        deadline = time.monotonic() + END_TIMEOUT
        while True:
            try:
                return self._begin_ending()
            except TooManyFiles:
                if time.monotonic() > deadline:
                    raise
                self.close()  # it has as many as it takes, unless others are quicker
                gevent.sleep(0.1)

    def _begin_ending(self) -> None:
        """Start that call, once; it goes on whatever happens to us."""
        words = []
        for process, kind in ((self._shell, "process"), (self._command, "group")):
            if process is not None:
                words += [str(process.pid), str(process.started), kind]
        if words and self._ending is None:
            argv = self.target.argv("sh", "-c", _END, "sh", *words, user="root")
            self._ending = Detached(argv, self.target.environment())


def _limit(deadline: float | None) -> float:
    answer = time.monotonic() + ANSWER_TIMEOUT
    return answer if deadline is None else min(answer, deadline)


def _lines(*lines: bytes) -> bytes:
    return b"".join(line + b"\n" for line in lines)


def _script(*calls: bytes) -> bytes:
    """The control shell's functions, and calls of them."""
    return _FUNCTIONS + _lines(*calls)


def _framed(exchange: Exchange, source: str, text: bytes, *more: bytes) -> bytes:
    """One command for a control shell: a compound that runs whole or not at all."""
    words = call("orb_exchange", exchange.token, exchange.start, source, text)
    return b"{ " + b"".join(one + b"; " for one in (words, *more)) + b"}"
