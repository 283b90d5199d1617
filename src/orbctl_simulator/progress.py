"""What a call is doing: a bar on a terminal, otherwise one line at its start."""

from __future__ import annotations

import os
import sys
import time

_BAR = 24
_PAUSE = 0.1


class Progress:
    """Shown until this context is left, which leaves a terminal as it was.

    Without a `detail`, prints only to a terminal.
    """

    def __init__(self, title: str, detail: str | None = None) -> None:
        self._title, self._begun, self._shown = title, time.monotonic(), 0.0
        self._step, self._done, self._total = "", 0, 0
        self._terminal = _is_terminal()
        if not self._terminal and detail is not None:
            _write(f"{title}{detail}\n")

    def __enter__(self) -> Progress:
        self._draw()
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal:
            _write("\r\x1b[K")

    def step(self, text: str, total: int = 0) -> None:
        """Begin the next step, whose size is `total`, if that is known."""
        self._step, self._done, self._total = text, 0, total
        self._draw()

    def reach(self, done: int) -> None:
        self._done = done
        if time.monotonic() - self._shown >= _PAUSE:
            self._draw()

    def tick(self) -> None:
        """Time has passed."""
        self.reach(self._done)

    def _draw(self) -> None:
        if not self._terminal:
            return
        self._shown = time.monotonic()
        if self._total:
            part = min(self._done / self._total, 1.0)
            full = int(_BAR * part)
            amount = f"[{'#' * full}{'.' * (_BAR - full)}] {part:4.0%} of {size(self._total)}"
        else:
            amount = f"{self._shown - self._begun:.0f} s"
        text = f"{self._title}: {self._step + ' ' if self._step else ''}{amount}"
        _write("\r" + _printable(text)[: _width() - 1] + "\x1b[K")


def size(count: int) -> str:
    """Bytes in readable form: ``92.1 MB``."""
    if count >= 1 << 30:
        return f"{count / (1 << 30):.1f} GB"
    return f"{count / (1 << 20):.1f} MB"


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _is_terminal() -> bool:
    return os.environ.get("TERM") != "dumb" and sys.stderr is not None and sys.stderr.isatty()


def _width() -> int:
    try:
        return os.get_terminal_size(2).columns or 80
    except OSError:
        return 80


def _write(text: str) -> None:
    """Ignore a caller that no longer reads, or a closed terminal: the work continues."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError):
        pass
