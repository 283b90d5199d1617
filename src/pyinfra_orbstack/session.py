"""Commands, byte-exact, through a shell that runs in a target.

A *control shell* (`sh`: dash, bash or busybox) in the target runs them. `protocol` defines its
messages and the client's; this module moves bytes, enforces deadlines, and kills what must not
continue.
"""

from __future__ import annotations

import contextlib
import math
import select
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Protocol

import gevent

from pyinfra_orbstack import interrupts, protocol, shell
from pyinfra_orbstack.ending import Ending
from pyinfra_orbstack.keyboard import Keyboard
from pyinfra_orbstack.places import Place, PlaceError
from pyinfra_orbstack.process import STDERR, STDOUT, Child, TooManyFiles, feed, follow
from pyinfra_orbstack.protocol import (
    PIPES,
    TERMINAL,
    Began,
    Event,
    Exchange,
    Hello,
    NotStarted,
    OutcomeUnknown,
    Output,
    Stray,
    call,
)

__all__ = ["Client", "NotStarted", "OutcomeUnknown", "Reachable", "ShellSession", "Sink"]

#: Stdin up to this size travels in the frame of a session.
LARGEST_FRAME_STDIN = 64 * 1024
#: If the target is far away, a stdin up to this size follows START in the open session.
LARGEST_FAR_STDIN = 4 * 1024 * 1024
#: If the target is far away, seconds for which a session that has answered counts as alive: then
#: START is sent with the command, to save the wait for READY.
ALIVE_FOR = 10.0
#: Maximum bytes before a command begins; more is not a profile and not a banner.
MOST_STRAY = 64 * 1024
#: Seconds for a control shell to answer.
ANSWER_TIMEOUT = 30.0

# Read now: later there may be too many open files.
_FUNCTIONS = shell.text("session").encode()
_CONTROL = shell.text("control", "pl").encode()

#: Called with `STDOUT` or `STDERR` and a piece of the command's output there.
Sink = Callable[[int, bytes], None]
#: Makes the command line and the environment of a local executable that starts a command in the
#: target: called with the command line that does so, the line to send there first, and the
#: environment.
Client = Callable[[list[str], str, dict[str, str]], tuple[list[str], dict[str, str]]]


class Reachable(Protocol):
    """A place where commands run: a machine or a container."""

    @property
    def place(self) -> Place:
        """Where the client of the target runs."""

    def argv(self, *words: str, user: str | None = None, tty: bool = False) -> list[str]:
        """The local command line that runs ``words`` in the target."""

    def environment(self) -> dict[str, str]:
        """The environment of that command line."""


def largest_stdin(target: Reachable) -> int:
    """Maximum size of a stdin in an open session; a larger one goes through a spawn."""
    return LARGEST_FAR_STDIN if target.place.far else LARGEST_FRAME_STDIN


class Connection:
    """A client on this host and, behind it, a shell in the target.

    Args:
        target: Where the shell runs.
        words: Its command line.
        user: The user to run as.
        tty: Whether it has a terminal.
        meet: Called when the shell introduces itself.

    Raises:
        NotStarted: There is no client.
    """

    def __init__(
        self,
        target: Reachable,
        *words: str,
        user: str | None,
        tty: bool = False,
        meet: Callable[[Hello], None],
    ) -> None:
        self._place = target.place
        try:
            self._place.open()
        except PlaceError as broken:
            raise NotStarted(str(broken)) from None
        argv = target.argv(*words, user=user, tty=tty)
        try:
            self.child = Child(argv, env=target.environment(), tty=tty)
        except TooManyFiles:
            raise  # a retry does not help
        except OSError as broken:
            raise NotStarted(f"cannot run {argv[0]}: {broken.strerror}") from None
        self._meet = meet
        self._streams = TERMINAL if tty else PIPES
        self._ended: set[int] = set()
        #: The output received instead of a shell, to be shown; None if it may be typed input.
        self.transcript: bytearray | None = bytearray()

    @property
    def alive(self) -> bool:
        """Whether both sides still exist."""
        return not self._ended and not self.child.gone

    def read(self, deadline: float | None) -> tuple[int, bytes]:
        """Return the next piece of a stream; empty bytes mean that it has ended.

        Raises:
            TimeoutError: Nothing came before the deadline.
        """
        stream, data = self.child.read(None if deadline is None else deadline - time.monotonic())
        if not data:
            self._ended.add(stream)
        return stream, data

    def ask(
        self,
        exchange: Exchange,
        data: bytes,
        until: Callable[[], bool],
        deadline: float | None,
        most_stray: int = MOST_STRAY,
    ) -> None:
        """Send what a shell must read before any command runs, and read its answer.

        Raises:
            NotStarted: It does not answer.
            TimeoutError: The deadline passed.
        """
        answer = time.monotonic() + ANSWER_TIMEOUT
        limit = answer if deadline is None else min(answer, deadline)
        try:
            self._send(data, limit)
            while not until():
                if not self._listen(exchange, limit):
                    raise EOFError
                if exchange.stray > most_stray:
                    raise NotStarted(f"more than {most_stray} bytes arrived instead of an answer")
        except TimeoutError:
            if limit == deadline:
                raise
            raise NotStarted(f"the target did not answer within {ANSWER_TIMEOUT:g} s") from None
        except EOFError:
            raise self._no_shell(exchange) from None

    def hand_over(self, data: bytes, deadline: float | None) -> None:
        """Send a command that runs without waiting for START.

        Raises:
            NotStarted: It was not sent completely, and so cannot run.
            TimeoutError: The deadline passed.
        """
        answer = time.monotonic() + ANSWER_TIMEOUT
        limit = answer if deadline is None else min(answer, deadline)
        # The end is written as a whole or not at all.
        end = max(0, len(data) - select.PIPE_BUF)
        try:
            for piece in (data[:end], data[end:]):
                self._send(piece, limit)
        except (TimeoutError, EOFError):
            if limit == deadline and time.monotonic() >= limit:
                raise TimeoutError from None
            raise NotStarted(
                "the connection ended before the command was sent: try again"
            ) from None

    def _send(self, data: bytes, limit: float) -> None:
        try:
            with gevent.Timeout(max(0.0, limit - time.monotonic()), TimeoutError):
                self.child.write(data)
        except TimeoutError:
            raise
        except OSError:
            raise EOFError from None

    def _listen(self, exchange: Exchange, limit: float) -> bytes:
        stream, data = self.read(limit)
        for event in exchange.receive(stream, data):
            if isinstance(event, Hello):
                self._meet(event)
            elif isinstance(event, Stray) and self.transcript is not None:
                self.transcript += event.data
        return data

    def _no_shell(self, exchange: Exchange) -> NotStarted:
        """Why there is no shell, in one line."""
        deadline = time.monotonic() + 1
        with contextlib.suppress(TimeoutError):
            while len(self._ended) < len(self._streams):
                self._listen(exchange, deadline)
        transcript = (self.transcript or b"").decode("utf-8", "replace")
        said = " ".join(transcript.split())
        how, status = "the connection ended", None
        with contextlib.suppress(OSError):
            status = self.child.wait(1)
            how = "no answer" if status is None else f"exit code {status}"
        return NotStarted(
            self._place.problem(status, transcript)
            or f"could not start a shell: {how}: {said[-300:] or 'no output'!r}"
        )

    def close(self) -> None:
        """Close it; the shell reads the end of its input and exits."""
        self.child.close_stdin()
        with contextlib.suppress(OSError):
            self.child.wait(0 if self._ended else 0.2)
        self.child.end()


class ShellSession:
    """A control shell in a target and the exchanges with it.

    Args:
        target: Where it runs.
        user: The user to run as; None for the target's default user.
        workdir: The working directory of commands; None for that user's home.
        verify: Called with `Hello.init` before anything runs; an exception from it ends the
            connection.
    """

    def __init__(
        self,
        target: Reachable,
        user: str | None = None,
        workdir: str | None = None,
        verify: Callable[[str], None] | None = None,
    ) -> None:
        self.target = target
        self._user = user
        self._workdir = workdir
        self._verify = verify
        self.connection: Connection | None = None
        self.ending = Ending(target)
        self._busy = False
        # When the session last answered.
        self._answered = -math.inf

    @property
    def alive(self) -> bool:
        """Whether the next command can be sent."""
        return self.connection is not None and self.connection.alive

    @property
    def idle(self) -> bool:
        """Whether it is alive and runs nothing."""
        return self.alive and not self._busy

    def open(self, deadline: float | None = None) -> None:
        """Start a session.

        Raises:
            NotStarted: The target does not answer; the message contains what it printed instead.
            TimeoutError: The deadline passed.
        """
        exchange = Exchange(hello=True)
        with self._closing_on_failure():
            script = _script(b"orb_pipes", self._opening(exchange, _CONTROL))
            self._connect("sh").ask(exchange, script, lambda: exchange.greeted, deadline)
        self._answered = time.monotonic()

    def _connect(self, *words: str, tty: bool = False) -> Connection:
        self.close()
        self.ending = Ending(self.target)
        self.connection = Connection(self.target, *words, user=self._user, tty=tty, meet=self._meet)
        return self.connection

    def _opening(self, exchange: Exchange, *program: bytes) -> bytes:
        directory = protocol.encoded("the directory", self._workdir or "")
        return call("orb_control" if program else "orb_open", *program, exchange.token, directory)

    def _meet(self, hello: Hello) -> None:
        self.ending.shell = hello.shell
        if not hello.inside:
            # A retry will not create it.
            raise OSError(f"there is no directory {self._workdir!r}: correct orbstack_workdir")
        if self._verify is not None:
            self._verify(hello.init)

    def close(self) -> None:
        """Close the connection."""
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.close()

    # Commands

    def run(
        self, text: str, sink: Sink, *, stdin: bytes = b"", deadline: float | None = None
    ) -> int:
        """Run a command in the open session.

        Args:
            text: Shell text, run by `sh -c`.
            sink: Receives the command's output, piece by piece, as it arrives.
            stdin: The command's input, at most `largest_stdin` bytes.
            deadline: Point of `time.monotonic` at which the command is killed.

        Returns:
            Its exit status as a shell reports it, 128+n for a signal.

        Raises:
            NotStarted: It did not run.
            OutcomeUnknown: It started, and its outcome is unknown.
            TimeoutError: The deadline passed; the command and its descendants are gone.
        """
        exchange, source, behind = Exchange(), "-none", b""
        if len(stdin) > LARGEST_FRAME_STDIN:
            source, behind = f"-{len(stdin)}", stdin
        elif stdin:
            source = protocol.octal(stdin)
        recent = time.monotonic() - self._answered < ALIVE_FOR
        at_once = self.target.place.far and recent and not behind
        frame = _lines(_framed(exchange, source, text, at_once=at_once))
        connection = self.connection
        assert connection is not None
        connection.transcript = bytearray()
        self.ending.command = None
        with self._occupied():
            if at_once:
                status = self._complete(exchange, sink, deadline, frame=frame)
            else:
                with self._closing_on_failure():
                    connection.ask(exchange, frame, lambda: exchange.ready, deadline)
                status = self._complete(exchange, sink, deadline, behind=behind)
        self._answered = time.monotonic()
        return status

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
        frame = _framed(exchange, "-rest", text, b"orb_drain")
        script = _script(b"orb_pipes", self._opening(exchange), frame)
        with self._occupied():
            with self._closing_on_failure():
                self._connect("sh").ask(exchange, script, lambda: exchange.waits, deadline)
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
        words = protocol.command_words(text)
        line = call("orb_terminal", exchange.token, exchange.start, *words)
        keys = protocol.typed(_lines(self._opening(exchange), line))
        script = _script(b'orb_typed "$1"').decode()
        with self._occupied():
            with self._closing_on_failure():
                connection = self._connect("sh", "-c", script, "sh", prompt.token, tty=True)
                connection.ask(prompt, b"", lambda: prompt.ready, deadline)
                # If the target has no `stty`, the terminal echoes everything that is typed.
                connection.transcript = None
                most = MOST_STRAY + 2 * len(keys)
                connection.ask(exchange, keys, lambda: exchange.waits, deadline, most)
            status = self._complete(exchange, sink, deadline, keys=stdin)
        self.close()
        return status

    def relay(self, client: Client, text: str, sink: Sink, *, deadline: float | None = None) -> int:
        """Run a local executable that starts a command in the target by itself.

        The two talk to each other through stdin and stdout of the command. Its stderr is ours too,
        and both are passed on.

        Args:
            client: Makes the command line of the executable.
            text: The command, as for `run`.
            sink: Receives the output of the executable.
            deadline: Point of `time.monotonic` at which both are killed.

        Returns:
            The exit status of the executable.

        Raises:
            OSError: It cannot be started, its exit status is unknown, or after an error the target
                did not confirm that the command is gone.
            TimeoutError: The deadline passed; both are gone.
        """
        exchange = Exchange(TERMINAL, hello=True)
        command = call("orb_exec", exchange.token, *protocol.command_words(text))
        first = protocol.octal(_lines(self._opening(exchange), b"( " + command + b" )"))
        script = _script(b"orb_relayed").decode()
        reach = self.target.argv("sh", "-c", script, user=self._user)
        argv, env = client(reach, first, self.target.environment())
        self.ending = Ending(self.target)

        def receive(stream: int, data: bytes) -> None:
            if stream == STDOUT:
                sink(stream, data)
                return
            # The shell's messages are on stderr, between everything else.
            for event in exchange.receive(STDOUT, data):
                if isinstance(event, Hello):
                    self._meet(event)
                elif isinstance(event, Began):
                    self.ending.command = event.process
                else:
                    sink(STDERR, event.data)

        def stop() -> None:
            child.kill()
            self.ending.begin()

        child = Child(argv, env=env, report=True)
        with self._ending_on_failure(lambda: exchange.greeted):
            try:
                with interrupts.at_interrupt(stop):
                    child.close_stdin()
                    status = follow(child, receive, deadline)
            finally:
                for kept in exchange.release():
                    sink(STDERR, kept.data)
                child.end()
        if status and exchange.greeted and not self.ending.begun:
            # It may have left the command behind.
            self.end_command()
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
        """Nothing runs before START, so only the connection has to be closed."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    @contextlib.contextmanager
    def _ending_on_failure(self, started: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """Leave no command behind after any interruption, be it Ctrl-C or one from gevent."""
        try:
            yield
        except NotStarted:
            self.close()
            raise
        except TimeoutError:
            if started():
                self.end_command()
            raise
        except BaseException:
            if started():
                with contextlib.suppress(OSError):
                    self.end_command()
            raise
        if self.ending.begun:
            # A signal came just now; the shell must go, too.
            with contextlib.suppress(OSError):
                self.end_command()

    def end_command(self) -> None:
        """Kill the running command and all its descendants, then close the connection.

        Raises:
            OSError: The target did not confirm it.
        """
        try:
            self.ending.finish(make_room=self.close)
        finally:
            self.close()

    def _complete(
        self,
        exchange: Exchange,
        sink: Sink,
        deadline: float | None,
        *,
        stdin: Iterable[bytes] | None = None,
        keys: Iterable[bytes] | None = None,
        behind: bytes = b"",
        frame: bytes = b"",
    ) -> int:
        """Send START, and follow the command to its end.

        Args:
            exchange: The exchange.
            sink: Receives the output.
            deadline: Point of `time.monotonic` at which the command is killed.
            stdin: The command's input; its end is that of the shell's.
            keys: The command's input on a terminal.
            behind: The command's input in an open session.
            frame: The command, if it was not sent yet: it runs without START.
        """
        assert self.connection is not None
        child = self.connection.child
        start = exchange.start.encode() + b"\n"
        helper: gevent.Greenlet | None = None
        with interrupts.at_interrupt(self.ending.begin), self._ending_on_failure():
            try:
                # From here on the outcome is unknown until it is reported.
                exchange.stray = 0
                if frame:
                    self.connection.hand_over(frame, deadline)
                elif stdin is not None:
                    helper = gevent.spawn(feed, child, chain([start], stdin))
                elif behind:
                    helper = gevent.spawn(feed, child, [start, behind], close=False)
                else:
                    child.try_write(start)
                while not exchange.finished:
                    for event in self._next_events(exchange, deadline):
                        if isinstance(event, Output):
                            sink(*event)
                        elif isinstance(event, Began):
                            self.ending.command = event.process
                            if keys is not None:
                                shell = self.ending.shell
                                keyboard = Keyboard(self.target, self._user, child, shell)
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
        assert self.connection is not None
        stream, data = self.connection.read(deadline)
        if not data and not exchange.has_ended(stream):
            raise OutcomeUnknown(
                "the connection ended while the command ran: "
                "its outcome is unknown, so it is not repeated; check what it did"
            )
        events = exchange.receive(stream, data)
        if exchange.stray > MOST_STRAY:
            raise OutcomeUnknown(
                f"more than {MOST_STRAY} bytes arrived before the command's output"
            )
        return events


def _lines(*lines: bytes) -> bytes:
    return b"".join(line + b"\n" for line in lines)


def _script(*calls: bytes) -> bytes:
    """The control shell's functions, followed by calls."""
    return _FUNCTIONS + _lines(*calls)


def _framed(
    exchange: Exchange, source: str, text: str, *more: bytes, at_once: bool = False
) -> bytes:
    """One command for a control shell: a compound that runs completely or not at all."""
    start = "" if at_once else exchange.start
    words = protocol.command_words(text)
    line = call("orb_exchange", exchange.token, start, source, *words)
    return b"{ " + b"".join(one + b"; " for one in (line, *more)) + b"}"
