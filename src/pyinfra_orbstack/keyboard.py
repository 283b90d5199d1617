"""Typed input for a command's terminal: its stdin, and ends of file when it waits for them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

import gevent

from pyinfra_orbstack import shell
from pyinfra_orbstack.process import STDOUT, Child, feed
from pyinfra_orbstack.protocol import Process

if TYPE_CHECKING:
    from pyinfra_orbstack.session import Reachable

_READING = shell.text("processes") + shell.text("reading") + 'orb_reading "$@"'

END_OF_FILE = b"\x04"
#: Seconds after which most commands have ended.
DELAY = 0.1
#: Seconds to wait for an end of file to be read before the next one; doubled up to the maximum.
PAUSE, LONGEST_PAUSE = 0.4, 2.0
#: The same, if the target cannot be asked.
BLIND_PAUSE = 1.0


class Keyboard:
    """Types on the terminal of a command.

    The terminal keeps an end of file until a process reads it. If the terminal's mode changes
    meanwhile, it turns into a NUL byte: `sudo` does that, and passes the byte on to a terminal of
    its own, where the command takes it for input. So an end of file is typed only when a process of
    the command waits for input. Separate calls observe that: one as root, and one as the command's
    user, since root may lack the right to look at others' processes.

    Args:
        target: Where the command runs.
        user: The user that it runs as.
        terminal: The client whose stdin is the terminal.
        control: The control shell of the command, if known.
    """

    def __init__(
        self, target: Reachable, user: str | None, terminal: Child, control: Process | None
    ) -> None:
        self._target = target
        self._users = {user, "root"}
        self._terminal = terminal
        self._control = control
        self._pause = PAUSE
        self._typed = 0.0

    def type(self, pieces: Iterable[bytes]) -> None:
        """Type all pieces, then ends of file, until this is killed."""
        feed(self._terminal, pieces, close=False)
        gevent.sleep(DELAY)
        watchers = [gevent.spawn(self._watch, user) for user in self._users if self._control]
        try:
            gevent.joinall(watchers)
        finally:
            gevent.killall(watchers)
        pause = BLIND_PAUSE
        while self._terminal.try_write(END_OF_FILE):
            gevent.sleep(pause)
            pause *= 2

    def _watch(self, user: str | None) -> None:
        assert self._control is not None
        words = (str(self._control.pid), str(self._control.started), "process")
        argv = self._target.argv("sh", "-c", _READING, "sh", *words, user=user)
        with contextlib.suppress(OSError):
            watcher = Child(self._target.place.idle(argv), env=self._target.environment())
            try:
                # Its stderr ends at once.
                while (piece := watcher.read()) != (STDOUT, b""):
                    if piece[0] == STDOUT:
                        self._end_of_file()
            finally:
                watcher.end()

    def _end_of_file(self) -> None:
        """Type an end of file, unless the last one may not have arrived yet."""
        if time.monotonic() - self._typed >= self._pause:
            self._pause = min(2 * self._pause, LONGEST_PAUSE) if self._typed else self._pause
            self._typed = time.monotonic()
            self._terminal.write(END_OF_FILE)
