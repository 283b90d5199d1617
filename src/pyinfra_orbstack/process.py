"""The one runner of local processes: bytes in, bytes out, no stream can block another.

pyinfra runs its hosts in gevent greenlets, with or without gevent's monkey patches, so every
wait here is gevent's own. It does not use pyinfra's runner, which decodes strictly, writes all of
stdin before it reads, and leaves the process running when a timeout fires.

It does not use gevent's own `Popen` either. Once gevent watches one process, it reaps every child
of this one, and the code that started the others never learns how they ended. This module waits
only for its own children. pyinfra's `@local` may still make gevent reap those, so an exit status
that matters comes through a pipe, from an intermediate shell, where no other code can take it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import gevent
from gevent.event import Event
from gevent.monkey import get_original
from gevent.os import nb_write

from pyinfra_orbstack import launch
from pyinfra_orbstack.launch import (
    NAME,
    STATUS,
    STDERR,
    STDIN,
    STDOUT,
    Launched,
    TooManyFiles,
    close,
)

__all__ = [
    "CHUNK",
    "STDERR",
    "STDOUT",
    "Child",
    "Completed",
    "Detached",
    "TooManyFiles",
    "feed",
    "follow",
    "run",
]

_poll, _sleep = get_original("select", "poll"), get_original("time", "sleep")

CHUNK = 65536
#: How many chunks are received before anything reads them.
MOST_CHUNKS = 16
#: The event of libev that a descriptor can be read.
READABLE = 1
#: Seconds of silence after which the streams of a process that is gone count as ended.
GRACE = 1.0


class Completed(NamedTuple):
    """The result of a process; the exit status is as a shell reports it, 128+n for a signal."""

    returncode: int
    stdout: bytes
    stderr: bytes


class Child:
    """A local process whose output arrives in chunks, in the order in which it was read.

    It runs in a session of its own, so that Ctrl-C in a terminal reaches it only through us.

    Args:
        argv: The command line; every word is passed on unchanged.
        env: The whole environment, or None for ours.
        tty: Give it a pseudo terminal instead of three pipes; all output is then `STDOUT`.
        report: Run it through a shell that writes its exit status to a stream `STATUS`.

    Raises:
        OSError: The command cannot be started.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        tty: bool = False,
        report: bool = False,
    ) -> None:
        with launch.explained(), ExitStack() as theirs, ExitStack() as ours:
            self._fds, files = (launch.terminal if tty else launch.pipes)(ours, theirs)
            if report:
                self._fds[STATUS], files[STATUS] = launch.pipe(ours, theirs)
            self._process = Launched(argv, env, files, report=report)
            ours.pop_all()
        for fd in self._fds.values():
            os.set_blocking(fd, False)
        self._chunks: deque[tuple[int, bytes]] = deque()
        self._arrived = Event()
        self._failure: Exception | None = None
        self._writer: Any = None
        # Watchers, since a greenlet for each stream would cost a switch for each chunk.
        loop = gevent.get_hub().loop
        self._watchers = {
            stream: loop.io(fd, READABLE) for stream, fd in self._fds.items() if stream
        }
        #: The streams that have not ended, as far as `read` has returned them.
        self.open = set(self._watchers)
        self._receiving = set(self._watchers)
        self._watch()

    def _watch(self) -> None:
        """Receive as long as there is room: memory stays flat if the process is fast."""
        room = len(self._chunks) < MOST_CHUNKS
        for stream, watcher in self._watchers.items():
            wanted = room and stream in self._receiving
            if wanted and not watcher.active:
                watcher.start(self._receive, stream)
            elif watcher.active and not wanted:
                watcher.stop()

    def _receive(self, stream: int) -> None:
        try:
            data = os.read(self._fds[stream], CHUNK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            # A pseudo terminal answers EIO when its other end is closed.
            data = b""
        self._add(stream, data)

    def _add(self, stream: int, data: bytes) -> None:
        self._chunks.append((stream, data))
        if not data:
            self._receiving.discard(stream)
        if not data or len(self._chunks) >= MOST_CHUNKS:
            self._watch()
        self._arrived.set()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def read(self, timeout: float | None = None) -> tuple[int, bytes]:
        """Return the next chunk as (stream, bytes); empty bytes mean that the stream has ended.

        The streams of a process that is gone end, even if another process keeps them open.

        Raises:
            TimeoutError: Nothing came within ``timeout`` seconds.
            OSError: The input for stdin cannot be read.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        gone = False
        while True:
            if self._chunks:
                stream, data = self._chunks.popleft()
                if len(self._chunks) == MOST_CHUNKS - 1:
                    self._watch()
                break
            left = GRACE if deadline is None else max(0.0, deadline - time.monotonic())
            self._arrived.clear()
            if self._arrived.wait(min(GRACE, left)):
                continue
            if deadline is not None and left < GRACE:
                raise TimeoutError
            # On a busy host, silence may only mean that the event loop had no turn.
            if gone and not self._readable():
                for one in list(self._receiving):
                    self._add(one, b"")
            gone = self.gone
        if self._failure is not None:
            raise OSError(f"cannot read the input: {self._failure}") from self._failure
        if not data:
            self.open.discard(stream)
        return stream, data

    def _readable(self) -> bool:
        poll = _poll()
        for stream in self.open:
            poll.register(self._fds[stream], select.POLLIN)
        # Some systems cannot poll pseudo terminals.
        return any(event & ~select.POLLNVAL for _, event in poll.poll(0))

    def write(self, data: bytes) -> None:
        """Write all of ``data`` to stdin.

        Raises:
            BrokenPipeError: The process reads no more.
        """
        view = memoryview(data)
        while view:
            fd = self._fds.get(STDIN)
            if fd is None:
                raise BrokenPipeError("stdin is closed")
            self._writer = gevent.getcurrent()
            try:
                view = view[nb_write(fd, view[:CHUNK]) :]
            finally:
                self._writer = None
                if STDIN not in self._fds:
                    close(fd)

    def try_write(self, data: bytes) -> bool:
        """Write, and return whether the process still reads."""
        try:
            self.write(data)
        except OSError:
            return False
        return True

    def fail(self, reason: Exception) -> None:
        """Make `read` raise, because the process's input is unavailable."""
        self._failure = reason
        self._add(STDIN, b"")

    def close_stdin(self) -> None:
        """Let the process read the end of its input."""
        fd, writer = self._fds.pop(STDIN, None), self._writer
        if fd is None:
            return
        if writer is None:
            close(fd)
            return

        def interrupt() -> None:
            if self._writer is writer:
                writer.throw(BrokenPipeError("stdin is closed"))

        # A descriptor must not be closed while gevent waits for it, so the writer closes it.
        gevent.get_hub().loop.run_callback(interrupt)

    @property
    def gone(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll()

    def wait(self, timeout: float) -> int | None:
        """Return the exit status, negative for a signal, or None if it still runs.

        Raises:
            OSError: It has ended, and other code in this process has taken its exit status.
        """
        if not self._process.wait(timeout):
            return None
        if self._process.status is None:
            raise OSError(errno.ECHILD, "its exit status is unknown")
        return self._process.status

    def settle(self) -> None:
        """Let a process that is about to end finish."""
        self._process.wait(GRACE)

    def kill(self) -> None:
        """Kill the process and its group; a signal handler may do so."""
        self._process.kill()

    def end(self) -> None:
        """Kill the process and its group, and close everything that belongs to it."""
        self.close_stdin()
        self.kill()
        while self._watchers:
            self._watchers.popitem()[1].close()
        # A waiting reader gets the end of each stream.
        for one in list(self._receiving):
            self._add(one, b"")
        while self._fds:
            close(self._fds.popitem()[1])
        self._process.wait(2)


def run(
    argv: Sequence[str],
    *,
    stdin: bytes | Iterable[bytes] = b"",
    timeout: float | None = None,
    env: Mapping[str, str] | None = None,
) -> Completed:
    """Run a command to its end and return its output.

    Args:
        argv: The command line.
        stdin: The command's input, whole or in pieces.
        timeout: Seconds after which the command is killed.
        env: The whole environment, or None for ours.

    Raises:
        OSError: The command cannot be started, or its exit status is unknown.
        TimeoutError: It did not end in time; it and its group are gone.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    child = Child(argv, env=env, report=True)
    collected = {stream: bytearray() for stream in (STDOUT, STDERR)}
    feeder = gevent.spawn(feed, child, [stdin] if isinstance(stdin, bytes) else stdin)
    try:
        status = follow(child, lambda stream, data: collected[stream].extend(data), deadline)
        # The intermediate shell is about to end, and processes that it leaves are not ours to kill.
        child.settle()
        return _completed(status, bytes(collected[STDOUT]), bytes(collected[STDERR]))
    finally:
        feeder.kill()
        child.end()


def follow(child: Child, sink: Callable[[int, bytes], object], deadline: float | None) -> int:
    """Pass on the output of a process with `report`, and return its exit status.

    Raises:
        OSError: Its exit status is unknown.
        TimeoutError: The deadline, a point of `time.monotonic`, passed.
    """
    reported = b""
    while child.open:
        stream, data = child.read(None if deadline is None else deadline - time.monotonic())
        if stream == STATUS:
            reported += data
        else:
            sink(stream, data)
    return _status(reported)


def feed(child: Child, pieces: Iterable[bytes], *, close: bool = True) -> None:
    """Write all pieces to a process and close its stdin; a process may stop reading early.

    An error in producing the pieces is raised to the reader of the process: partial input must
    not look complete.
    """
    try:
        for piece in pieces:
            if not child.try_write(piece):
                break
    except Exception as broken:
        child.fail(broken)
        return
    if close:
        child.close_stdin()


class Detached:
    """A command that runs to its own end, whatever happens to this process.

    It starts without the help of any greenlet, so a signal handler may start one.

    Args:
        argv: The command line.
        env: The whole environment, or None for ours.

    Raises:
        OSError: It cannot be started.
    """

    def __init__(self, argv: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        with launch.explained(), ExitStack() as theirs, ExitStack() as ours:
            self._transcript, said = launch.pipe(ours, theirs)
            # The intermediate shell gets our end too: that way no writer is killed by a broken pipe
            # when this process is gone.
            files = {STDOUT: said, STDERR: said, STATUS: said, 4: self._transcript}
            self._process = Launched(argv, env, files, report=True)
            ours.pop_all()
        os.set_blocking(self._transcript, False)
        _detached.add(self)

    def result(self, timeout: float) -> Completed:
        """Wait for the command to end, and return its result; call this only once.

        Everything that it printed is in `stderr`.

        Raises:
            OSError: Its exit status is unknown.
            TimeoutError: It did not end in time; it and its group are gone.
        """
        deadline, said, gone = time.monotonic() + timeout, b"", False
        try:
            while not gone:
                gone = self._process.wait(min(0.05, deadline - time.monotonic()))
                with contextlib.suppress(BlockingIOError):
                    while piece := os.read(self._transcript, CHUNK):
                        said += piece
                if not gone and time.monotonic() >= deadline:
                    self._process.kill()
                    raise TimeoutError
        finally:
            if self in _detached:
                _detached.discard(self)
                close(self._transcript)
                launch.unreaped.add(self._process)
        text, _, status = said.rpartition(b"\n")
        return _completed(_status(status), b"", text)


def wait_for_detached(seconds: float) -> None:
    """Block, for a process that is about to die, until all `Detached` have ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not all(one._process.poll() for one in list(_detached)):
        _sleep(0.01)


_detached: set[Detached] = set()


def _status(reported: bytes) -> int:
    """The exit status of a command, as the intermediate shell reported it."""
    reported = reported.strip()
    if not reported.isdigit():
        raise OSError(errno.ECHILD, "it was killed, and its exit status is unknown")
    return int(reported)


def _completed(status: int, stdout: bytes, stderr: bytes) -> Completed:
    """The result of a command that the intermediate shell was able to start."""
    if status in (126, 127) and stderr.startswith(f"{NAME}: ".encode()):
        missing = status == 127 or b"No such file" in stderr
        code = errno.ENOENT if missing else errno.EACCES
        raise OSError(code, os.strerror(code))
    return Completed(status, stdout, stderr)
