"""Signals that end a process like Ctrl-C: a CI time limit, a closed terminal."""

from __future__ import annotations

import contextlib
import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class EndSignals:
    """Makes these signals act as Ctrl-C, as long as nothing else handles them.

    Attributes:
        over: Whether the end has begun; clean-up must not be disturbed from then on.
    """

    def __init__(self) -> None:
        self.over = False
        self._taken: list[int] = []

    def begin(self) -> None:
        """Take over signals with the default handler; Python allows it only in the main thread."""
        for number in SIGNALS:
            with contextlib.suppress(ValueError):
                if signal.getsignal(number) is signal.SIG_DFL:
                    signal.signal(number, self._handle)
                    self._taken.append(number)

    def end(self) -> None:
        """Restore the default handlers."""
        for number in self._taken:
            signal.signal(number, signal.SIG_DFL)
        self._taken.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.over:
            return
        self.over = True
        interrupt = signal.getsignal(signal.SIGINT)
        if callable(interrupt):  # possibly the connector's own
            interrupt(signal.SIGINT, frame)
        raise KeyboardInterrupt
