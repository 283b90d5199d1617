"""Copying between the caller's streams and the machine's, if these cannot be passed directly.

A command in a machine normally gets the caller's own pipes. A terminal is never passed on (the
machine gets its own, or a pipe), and neither is a file, a socket or a device of the host. A call
log or a fault also has to see the data.
"""

from __future__ import annotations

import os
import select
import time

from .door import exit_code
from .state import Failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .cli import Call
    from .door import Door
    from .state import Machine

_CHUNK = 4096  # a pipe that select reports as writable accepts this much


class Stream:
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
            data = b""  # EIO: a terminal whose other side is closed
        if self.seen and data:
            self.seen(data)
        self.waiting += data
        self.ended = not data

    def write(self) -> bool:
        """Write some of it; False when the limit is reached."""
        data = self.waiting[:_CHUNK]
        if self.limit is not None:
            data = data[: self.limit]
        try:
            done = os.write(self.target, data) if data else 0
        except OSError:
            self.ended, self.waiting = True, b""
            if self.closes:
                os.close(self.source)  # the command must see that the reader has gone
            return True
        self.waiting = self.waiting[done:]
        if self.limit is not None:
            self.limit -= done
            return self.limit > 0
        return True


def relay(
    door: Door, machine: Machine, command: Callable[[str], int], call: Call, kinds: list[str]
) -> int:
    """Run a command with its own pipes where it cannot get the caller's streams."""
    limits = call.limits
    streams: list[Stream] = []
    ends: dict[int, int] = {}
    between = [fd for fd in (0, 1, 2) if kinds[fd] in ("terminal", "file") or fd in limits]
    if 0 not in between and call.logs:
        between.insert(0, 0)
    # If two streams are the same file, the order of the output must be kept.
    one = {1, 2} <= {*between} and not {1, 2} & {*limits} and os.path.sameopenfile(1, 2)
    for fd in between:
        if fd == 2 and one:
            ends[2] = ends[1]
            continue
        reader, writer = os.pipe()
        if fd == 0:
            stream, ends[fd] = Stream(0, writer, limits.get(0)), reader
            stream.is_input, stream.seen = True, call.stdin_seen
        else:
            stream, ends[fd] = Stream(reader, fd, limits.get(fd)), writer
            stream.closes = True
        streams.append(stream)
    pid = door.fork(lambda: command(""), streams=ends)
    for end in {*ends.values()}:
        os.close(end)
    return pump(streams, pid, machine, call)


def pump(streams: list[Stream], pid: int, machine: Machine, call: Call) -> int:
    """Copy bytes until the command has exited and all of its output is copied."""
    ended = os.pidfd_open(pid)
    stop_at = None if call.stop_after is None else time.monotonic() + call.stop_after
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
            _halt(machine)
        if over and not ready and not free:
            break
        over = over or ended in ready
        for stream in streams:
            if stream.source in ready and stream.source in readers:
                stream.read()
            if stream.waiting and stream.target in free and not stream.write():
                return call.cut_exit
            if stream.is_input and stream.ended and not stream.waiting and stream.target >= 0:
                _close_input(stream, streams)
    return exit_code(os.waitpid(pid, 0)[1])


def _halt(machine: Machine) -> None:
    from .boot import halt  # only tests need it here

    try:  # noqa: SIM105 contextlib is slow to load
        halt(machine)
    except Failure:
        pass


def _close_input(stream: Stream, streams: list[Stream]) -> None:
    """Pass on the end of a stream. The other direction of a terminal still needs its descriptor."""
    if all(stream.target != other.source for other in streams):
        os.close(stream.target)
        stream.target = -1
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.close(null)
