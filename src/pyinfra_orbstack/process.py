"""The one runner of local processes: bytes in, bytes out, no stream can block another.

pyinfra runs its hosts in gevent greenlets, with or without gevent's monkey patches, so every
wait here is gevent's own. pyinfra's runner is not used: it decodes strictly, writes all of stdin
before it reads, and leaves the process running when a timeout fires.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import gevent
from gevent.monkey import get_original
from gevent.os import nb_read, nb_write
from gevent.queue import Empty, Queue
from gevent.subprocess import PIPE, Popen, TimeoutExpired

#: Since 25.8.1 gevent's own close waits for the loop's next event, and the end of an input with it.
_close_now = get_original("os", "close")

CHUNK = 65536
STDOUT, STDERR = 1, 2


class Completed(NamedTuple):
    """What a process left behind."""

    returncode: int
    stdout: bytes
    stderr: bytes


class Child:
    """A local process whose output arrives in chunks, in the order in which it was read.

    It runs in a session of its own, so that Ctrl-C in a terminal reaches it only through us.

    Args:
        argv: The command line; every word is passed on as it is.
        env: The whole environment, or None for ours.
        tty: Give it a pseudo terminal instead of three pipes; all output is then `STDOUT`.

    Raises:
        OSError: The command cannot be started.
    """

    def __init__(
        self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, tty: bool = False
    ) -> None:
        # Bounded: a process that prints faster than it is read waits, and memory stays flat.
        self._chunks: Queue[tuple[int, bytes]] = Queue(maxsize=16)
        self._fds: dict[int, int] = {}
        if tty:
            master, slave = os.openpty()
            try:
                self._popen = Popen(
                    argv, stdin=slave, stdout=slave, stderr=slave, env=env, start_new_session=True
                )
            except BaseException:
                os.close(master)
                raise
            finally:
                os.close(slave)
            os.set_blocking(master, False)
            self._fds = {0: master, STDOUT: os.dup(master)}
        else:
            self._popen = Popen(
                argv, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=env, start_new_session=True
            )
            for number, pipe in enumerate(
                (self._popen.stdin, self._popen.stdout, self._popen.stderr)
            ):
                # Ours alone from here: gevent's file objects would close it a second time.
                self._fds[number] = os.dup(pipe.fileno())
                pipe.close()
                os.set_blocking(self._fds[number], False)
        self._failure: Exception | None = None
        self._writing = False
        self._reading: dict[int, int] = {}
        self._readers = {
            stream: gevent.spawn(self._read_all, stream)
            for stream in (STDOUT, STDERR)
            if stream in self._fds
        }
        self._watcher = gevent.spawn(self._watch)

    def _read_all(self, stream: int) -> None:
        data, reads = b"-", 0
        while data:
            self._reading[stream] = reads = reads + 1
            try:
                data = nb_read(self._fds[stream], CHUNK)
            except OSError:
                # A pseudo terminal answers EIO when its other end is gone.
                data = b""
            self._reading[stream] = 0
            self._chunks.put((stream, data))

    def _watch(self) -> None:
        """End the streams of a process that is gone, though another one holds them open."""
        self._popen.wait()
        for stream, reader in self._readers.items():
            while not reader.ready():
                waiting = self._reading.get(stream, 0)
                reader.join(timeout=1)
                if not reader.ready() and waiting and self._reading[stream] == waiting:
                    reader.kill()
                    self._chunks.put((stream, b""))

    @property
    def pid(self) -> int:
        """The process id."""
        return int(self._popen.pid)

    def read(self, timeout: float | None = None) -> tuple[int, bytes]:
        """Return the next chunk as (stream, bytes); empty bytes mean that the stream has ended.

        Raises:
            TimeoutError: Nothing came within ``timeout`` seconds.
            OSError: What should be written to stdin cannot be read.
        """
        try:
            chunk: tuple[int, bytes] = self._chunks.get(
                timeout=None if timeout is None else max(timeout, 0)
            )
        except Empty:
            raise TimeoutError from None
        if self._failure is not None:
            raise OSError(f"reading the input failed: {self._failure}") from self._failure
        return chunk

    def write(self, data: bytes) -> None:
        """Write all of ``data`` to stdin.

        Raises:
            BrokenPipeError: The process reads no more.
        """
        view = memoryview(data)
        while view:
            if 0 not in self._fds:
                raise BrokenPipeError("stdin is closed")
            self._writing = True
            try:
                view = view[nb_write(self._fds[0], view[:CHUNK]) :]
            finally:
                self._writing = False

    def try_write(self, data: bytes) -> bool:
        """Write, and return whether the process still reads."""
        try:
            self.write(data)
        except OSError:
            return False
        return True

    def fail(self, reason: Exception) -> None:
        """Make `read` raise, because its process cannot be given its input."""
        self._failure = reason
        self._chunks.put((0, b""))

    def close_stdin(self) -> None:
        """Let the process read the end of its input."""
        fd = self._fds.pop(0, None)
        if fd is not None:
            # What gevent still waits for must not be closed behind its back.
            (os.close if self._writing else _close_now)(fd)

    def wait(self, timeout: float | None = None) -> int | None:
        """Return the exit status, negative for a signal, or None if it still runs."""
        if timeout == 0:
            # Asked before each command, and gevent's wait would set a timer each time.
            status = self._popen.poll()
            return None if status is None else int(status)
        try:
            return int(self._popen.wait(timeout=timeout))
        except TimeoutExpired:
            return None

    def end(self) -> None:
        """End the process and its group, and close everything that belongs to it."""
        self.close_stdin()
        if self._popen.poll() is None:
            # Not ours to signal when the client is sudo: closed streams end it then.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        gevent.killall([self._watcher, *self._readers.values()])
        for stream in (STDOUT, STDERR):
            fd = self._fds.pop(stream, None)
            if fd is not None:
                os.close(fd)
        self.wait(timeout=2)


def run(
    argv: Sequence[str],
    *,
    stdin: bytes | Iterable[bytes] = b"",
    timeout: float | None = None,
    env: Mapping[str, str] | None = None,
) -> Completed:
    """Run a command to its end and return what it printed.

    Args:
        argv: The command line.
        stdin: What the command reads, whole or in pieces.
        timeout: Seconds after which the command is ended.
        env: The whole environment, or None for ours.

    Raises:
        OSError: The command cannot be started.
        TimeoutError: It did not end in time; it and its group are gone.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    child = Child(argv, env=env)
    collected = {STDOUT: bytearray(), STDERR: bytearray()}
    feeder = gevent.spawn(feed, child, [stdin] if isinstance(stdin, bytes) else stdin)
    try:
        open_streams = set(collected)
        while open_streams:
            stream, data = child.read(None if deadline is None else deadline - time.monotonic())
            collected[stream] += data
            if not data:
                open_streams.discard(stream)
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        status = child.wait(left)
        if status is None:
            raise TimeoutError
        return Completed(status, bytes(collected[STDOUT]), bytes(collected[STDERR]))
    finally:
        feeder.kill()
        child.end()


def feed(child: Child, pieces: Iterable[bytes], *, close: bool = True) -> None:
    """Write all pieces to a process and close its stdin; a process may stop reading early.

    What goes wrong in making the pieces reaches whoever reads from the process: half an input
    must not look like a whole one.
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
