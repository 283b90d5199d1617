"""What ends a process as Ctrl-C does: a CI at its limit, a terminal that is closed."""

from __future__ import annotations

import contextlib
import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class EndSignals:
    """Makes these signals count as Ctrl-C, for as long as nothing else handles them.

    Attributes:
        over: Whether the end has begun; what is put in order then is not to be disturbed.
    """

    def __init__(self) -> None:
        self.over = False
        self._taken: list[int] = []

    def begin(self) -> None:
        """Take those whose default handler stands; Python allows it in the main thread alone."""
        for number in SIGNALS:
            with contextlib.suppress(ValueError):
                if signal.getsignal(number) is signal.SIG_DFL:
                    signal.signal(number, self._handle)
                    self._taken.append(number)

    def end(self) -> None:
        """Give them back."""
        for number in self._taken:
            signal.signal(number, signal.SIG_DFL)
        self._taken.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.over:
            return
        self.over = True
        interrupt = signal.getsignal(signal.SIGINT)
        if callable(interrupt):  # the connector's own, maybe
            interrupt(signal.SIGINT, frame)
        raise KeyboardInterrupt
