"""Signals that end pyinfra: commands in machines are killed first.

On Ctrl-C pyinfra does not wait for its hosts, a second Ctrl-C interrupts any clean-up, and SIGTERM
or SIGHUP end the process at once. So the signal handler itself starts whatever must happen, as a
process that does not depend on this one: `at_interrupt` with `process.Detached`.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import gevent

from pyinfra_orbstack.process import wait_for_detached

#: Seconds that a terminated process waits for the clean-up that it started.
LAST_WAIT = 10.0
#: Seconds after which gevent looks for signals at the latest. Without a timer it overlooks one that
#: arrives in the microseconds before it waits, until it wakes for something else.
LOOK_AGAIN = 0.5


class Interrupted(OSError):
    """Ctrl-C came during work in a machine."""


_busy: dict[gevent.Greenlet, gevent.hub.Hub] = {}
_leaving: set[gevent.Greenlet] = set()
_callbacks: dict[object, Callable[[], object]] = {}
_shields: set[object] = set()
_postponed: set[int] = set()
_previous: Callable[[int, FrameType | None], object] | None = None
_timer: Any = None


def watch() -> None:
    """Handle Ctrl-C, and SIGTERM and SIGHUP if they still have their default handlers.

    pyinfra disconnects in the pool that runs the commands, so it would wait for all of them.
    """
    global _previous, _timer
    current = signal.getsignal(signal.SIGINT)
    if _previous is not None or not callable(current):
        return
    # Python accepts handlers only in the main thread, and under gevent only it knows which that is.
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, handle)
        _previous = current
        _timer = gevent.get_hub().loop.timer(LOOK_AGAIN, LOOK_AGAIN, ref=False)
        _timer.start(lambda: None)
        atexit.register(_at_exit)
        os.register_at_fork(after_in_child=_forget)
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, handle)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C raise `Interrupted` in this greenlet, once: its clean-up is not interrupted.

    The main greenlet gets `KeyboardInterrupt` from Python itself.
    """
    current = gevent.getcurrent()
    if current in _busy or current in _leaving or not isinstance(current, gevent.Greenlet):
        yield
        return
    _busy[current] = gevent.get_hub()
    try:
        yield
    finally:
        _busy.pop(current, None)
        _leaving.discard(current)


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Defer every signal until the body ends; for short work that must not be interrupted."""
    key = object()
    _shields.add(key)
    try:
        yield
    finally:
        _shields.discard(key)
        while _postponed and not _shields:
            signal.raise_signal(_postponed.pop())


@contextlib.contextmanager
def at_interrupt(callback: Callable[[], object]) -> Iterator[None]:
    """While the body runs, a signal calls ``callback`` before anything else happens.

    It runs in the signal handler of the main thread, at every signal, and when the interpreter
    exits in the middle of the body. It must not wait; of the processes that it starts, only a
    `process.Detached` is certain to complete.
    """
    key = object()
    _callbacks[key] = callback
    try:
        yield
    finally:
        _callbacks.pop(key, None)


def _call_back() -> None:
    for callback in list(_callbacks.values()):
        # Each concerns another host.
        with contextlib.suppress(Exception):
            callback()


def _interrupt_greenlets() -> None:
    for greenlet, hub in list(_busy.items()):
        del _busy[greenlet]
        _leaving.add(greenlet)
        # It may belong to another thread, or to one that is gone.
        with contextlib.suppress(Exception):
            hub.loop.run_callback_threadsafe(greenlet.kill, Interrupted("interrupted"), False)


def handle(number: int, frame: FrameType | None) -> None:
    if number != signal.SIGINT:
        # The process exits by this signal, whatever comes meanwhile.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    _call_back()
    if _shields:
        _postponed.add(number)
    elif number == signal.SIGINT:
        _interrupt_greenlets()
        if _previous is not None:
            _previous(number, frame)
    else:
        signal.signal(number, signal.SIG_DFL)
        wait_for_detached(LAST_WAIT)
        os.kill(os.getpid(), number)


def _forget() -> None:
    """A fork of this process must not kill the original's commands, however it ends."""
    for collection in (_busy, _leaving, _callbacks, _shields, _postponed):
        collection.clear()


def _at_exit() -> None:
    """Let hosts clean up that pyinfra does not wait for, such as those still connecting."""
    _call_back()
    _interrupt_greenlets()
    hub = gevent.get_hub()
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        gevent.joinall([one for one in _leaving if one.parent is hub], timeout=30)
