"""Standing between the caller's streams and the machine's, where they cannot be handed over.

A command in a machine normally gets the caller's own pipes. A terminal is never handed over (the
machine gets one of its own, or a pipe), and a call log or a fault has to see what passes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import struct
import termios
import time
import tty

from .boot import halt
from .enter import exit_code
from .linux import set_controlling_terminal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .calls import Call
    from .enter import Door
    from .state import Machine

_TIOCGPTN, _TIOCSPTLCK = 0x80045430, 0x40045431
_CHUNK = 4096  # what a pipe that select calls writable is sure to take


class _Stream:
    """One direction: bytes read from `source`, not yet written to `target`."""

    def __init__(self, source: int, target: int, limit: int | None = None) -> None:
        self.source, self.target, self.limit = source, target, limit
        self.waiting = b""
        self.seen: Callable[[bytes], None] | None = None
        self.ended = self.is_input = self.closes = False

    def read(self) -> None:
        try:
            data = os.read(self.source, 65536)
        except OSError:
            data = b""  # EIO: a terminal whose other side has gone
        if self.seen and data:
            self.seen(data)
        self.waiting += data
        self.ended = not data

    def write(self) -> bool:
        """Pass some of it on; False when the limit is reached."""
        data = self.waiting[:_CHUNK]
        if self.limit is not None:
            data = data[: self.limit]
        try:
            done = os.write(self.target, data) if data else 0
        except OSError:
            self.ended, self.waiting = True, b""
            if self.closes:
                os.close(self.source)  # the command is to see that nobody reads any more
            return True
        self.waiting = self.waiting[done:]
        if self.limit is not None:
            self.limit -= done
            return self.limit > 0
        return True


def relay(
    door: Door,
    machine: Machine,
    work: Callable[[], None],
    call: Call | None,
    terminals: list[bool],
) -> int:
    limits = call.limits if call else {}
    if terminals[0] and terminals[1]:
        return _with_pty(door, machine, work, call)
    streams, ends = [], {}
    for fd in (0, 1, 2):
        logged = fd == 0 and call is not None and call.logs
        if not (terminals[fd] or logged or fd in limits):
            continue
        reader, writer = os.pipe()
        if fd == 0:
            stream, ends[fd] = _Stream(0, writer, limits.get(0)), reader
            stream.is_input = True
            if call:
                stream.seen = call.stdin_seen
        else:
            stream, ends[fd] = _Stream(reader, fd, limits.get(fd)), writer
            stream.closes = True
        streams.append(stream)

    def wired() -> None:
        os.setsid()
        for fd, end in ends.items():
            os.dup2(end, fd)
        work()

    pid = door.fork(wired)
    for end in ends.values():
        os.close(end)
    return _pump(streams, pid, machine, call)


def _with_pty(door: Door, machine: Machine, work: Callable[[], None], call: Call | None) -> int:
    master = door.open_pty()
    fcntl.ioctl(master, _TIOCSPTLCK, struct.pack("i", 0))
    number = struct.unpack("I", fcntl.ioctl(master, _TIOCGPTN, b"\0" * 4))[0]
    _copy_size(master)

    def wired() -> None:
        os.setsid()
        slave = os.open(f"/dev/pts/{number}", os.O_RDWR | os.O_NOCTTY)
        set_controlling_terminal(slave)
        for fd in (0, 1, 2):
            os.dup2(slave, fd)
        work()

    signal.signal(signal.SIGWINCH, lambda *_: _copy_size(master))
    pid = door.fork(wired)
    limits = call.limits if call else {}
    keys, screen = _Stream(0, master, limits.get(0)), _Stream(master, 1, limits.get(1))
    keys.is_input = True
    before = termios.tcgetattr(0)
    tty.setraw(0, termios.TCSANOW)
    try:
        return _pump([keys, screen], pid, machine, call)
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def _copy_size(master: int) -> None:
    size = fcntl.ioctl(0, termios.TIOCGWINSZ, b"\0" * 8)
    fcntl.ioctl(master, termios.TIOCSWINSZ, size)


def _pump(streams: list[_Stream], pid: int, machine: Machine, call: Call | None) -> int:
    """Pass bytes until the command has ended and all that it had written is through."""
    ended = os.pidfd_open(pid)
    stop_at = time.monotonic() + call.stop_after if call and call.stop_after is not None else None
    over = False
    while True:
        readers = [s.source for s in streams if not (s.ended or s.waiting or (over and s.is_input))]
        writers = [s.target for s in streams if s.waiting and not (over and s.is_input)]
        if over and not readers and not writers:
            break
        pause = None if stop_at is None else max(0.0, stop_at - time.monotonic())
        watched = readers if over else [*readers, ended]
        ready, free, _ = select.select(watched, writers, [], 0 if over and not writers else pause)
        if stop_at is not None and time.monotonic() >= stop_at:
            stop_at = None
            if os.fork() == 0:  # the end of a machine waits for us to reap what we started in it
                with contextlib.suppress(Exception):
                    halt(machine)
                os._exit(0)
        if over and not ready and not free:
            break
        over = over or ended in ready
        for stream in streams:
            if stream.source in ready and stream.source in readers:
                stream.read()
            if stream.waiting and stream.target in free and not stream.write():
                return call.cut_exit if call else 1
            if stream.is_input and stream.ended and not stream.waiting and stream.target >= 0:
                _close_input(stream, streams)
    return exit_code(os.waitpid(pid, 0)[1])


def _close_input(stream: _Stream, streams: list[_Stream]) -> None:
    """End of file goes on, both ways; a terminal's other direction needs its descriptor still."""
    if all(stream.target != other.source for other in streams):
        os.close(stream.target)
        stream.target = -1
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.close(null)
