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
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import gevent
from gevent.monkey import get_original
from gevent.os import nb_read, nb_write
from gevent.queue import Empty, Queue

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
    "run",
]

_poll, _sleep = get_original("select", "poll"), get_original("time", "sleep")

CHUNK = 65536
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
        # Bounded: a process that prints faster than it is read waits, and memory stays flat.
        self._chunks: Queue[tuple[int, bytes]] = Queue(maxsize=16)
        self._failure: Exception | None = None
        self._writer: Any = None
        self.readers = {
            stream: gevent.spawn(self._read_all, stream) for stream in self._fds if stream
        }
        self._open = set(self.readers)

    def _read_all(self, stream: int) -> None:
        data = b"-"
        while data:
            try:
                data = nb_read(self._fds[stream], CHUNK)
            except OSError:
                # A pseudo terminal answers EIO when its other end is closed.
                data = b""
            self._chunks.put((stream, data))

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
            if self._chunks.empty() and (lost := self._lost()):
                stream, data = lost, b""
                break
            left = GRACE if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                stream, data = self._chunks.get(timeout=min(GRACE, left))
                break
            except Empty:
                if deadline is not None and left < GRACE:
                    raise TimeoutError from None
            # On a busy host, silence may only mean that the readers had no turn.
            if gone and not self._readable():
                gevent.killall(list(self.readers.values()))
            gone = self.gone
        if self._failure is not None:
            raise OSError(f"cannot read the input: {self._failure}") from self._failure
        if not data:
            self._open.discard(stream)
        return stream, data

    def _readable(self) -> bool:
        poll = _poll()
        for stream in self._open:
            poll.register(self._fds[stream], select.POLLIN)
        return bool(poll.poll(0))

    def _lost(self) -> int:
        """A stream whose reader ended without reporting it, or 0."""
        return next((one for one in self._open if self.readers[one].ready()), 0)

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
        self._chunks.put((0, b""))

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

    def end(self) -> None:
        """Kill the process and its group, and close everything that belongs to it."""
        self.close_stdin()
        self._process.kill()
        gevent.killall(list(self.readers.values()))
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
    collected = {stream: bytearray() for stream in (STDOUT, STDERR, STATUS)}
    feeder = gevent.spawn(feed, child, [stdin] if isinstance(stdin, bytes) else stdin)
    try:
        open_streams = set(collected)
        while open_streams:
            stream, data = child.read(None if deadline is None else deadline - time.monotonic())
            collected[stream] += data
            if not data:
                open_streams.discard(stream)
        # The intermediate shell is about to end, and processes that it leaves are not ours to kill.
        child.settle()
        return _completed(*(bytes(collected[one]) for one in (STATUS, STDOUT, STDERR)))
    finally:
        feeder.kill()
        child.end()


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
        return _completed(status, b"", text)


def wait_for_detached(seconds: float) -> None:
    """Block, for a process that is about to die, until all `Detached` have ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not all(one._process.poll() for one in list(_detached)):
        _sleep(0.01)


_detached: set[Detached] = set()


def _completed(reported: bytes, stdout: bytes, stderr: bytes) -> Completed:
    """The result of a command, as the intermediate shell reported it."""
    reported = reported.strip()
    if not reported.isdigit():
        raise OSError(errno.ECHILD, "it was killed, and its exit status is unknown")
    status = int(reported)
    if status in (126, 127) and stderr.startswith(f"{NAME}: ".encode()):
        missing = status == 127 or b"No such file" in stderr
        code = errno.ENOENT if missing else errno.EACCES
        raise OSError(code, os.strerror(code))
    return Completed(status, stdout, stderr)
