"""Ctrl-C: what runs in machines ends before pyinfra goes on."""

from __future__ import annotations

import atexit
import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

import gevent

_busy: set[gevent.Greenlet] = set()
_watching = False


class Interrupted(OSError):
    """Ctrl-C came while a machine was at work."""


def watch() -> None:
    """Make Ctrl-C end what is running in machines before pyinfra goes on to disconnect.

    pyinfra disconnects in the pool in which the commands run, so it would wait for all of them.
    """
    global _watching
    if _watching:
        return
    previous = signal.getsignal(signal.SIGINT)
    if not callable(previous):
        return

    def handle(number: int, frame: FrameType | None) -> None:
        for greenlet in list(_busy):
            greenlet.kill(Interrupted("interrupted"), block=False)
        # pyinfra does not wait for hosts that are still connecting, and they clean up now.
        atexit.register(gevent.joinall, list(_busy), timeout=30)
        previous(number, frame)

    # Python takes handlers in the main thread alone, and under gevent only it knows which that is.
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, handle)
        _watching = True


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C reach this greenlet; the main one gets it from Python itself."""
    current = gevent.getcurrent()
    if current in _busy or not isinstance(current, gevent.Greenlet):
        yield
        return
    _busy.add(current)
    try:
        yield
    finally:
        _busy.discard(current)
