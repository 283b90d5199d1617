"""Killing a command and everything that it started, whatever happens to this process."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import gevent

from pyinfra_orbstack import shell
from pyinfra_orbstack.process import Detached, TooManyFiles
from pyinfra_orbstack.protocol import Process

if TYPE_CHECKING:
    from pyinfra_orbstack.session import Reachable

#: Seconds for the call that kills a command.
END_TIMEOUT = 15.0

# Read now: later there may be too many open files.
_END = shell.text("processes") + shell.text("end") + 'orb_end "$@"'


class Ending:
    """Kills what runs behind one control shell.

    This takes a separate call as root: the login user cannot signal processes that sudo started.

    Attributes:
        shell: The control shell, once known.
        command: The process of the command that runs there.
    """

    def __init__(self, target: Reachable) -> None:
        self._target = target
        self.shell: Process | None = None
        self.command: Process | None = None
        self._call: Detached | None = None

    @property
    def begun(self) -> bool:
        """Whether the call was started."""
        return self._call is not None

    def begin(self) -> None:
        """Start the call, once; a signal handler may do so, and nothing needs to wait for it.

        Raises:
            OSError: It cannot be started.
        """
        words = []
        for process, kind in ((self.shell, "process"), (self.command, "group")):
            if process is not None:
                words += [str(process.pid), str(process.started), kind]
        if not words:
            raise OSError("the target does not show its processes")
        if self._call is None:
            argv = self._target.argv("sh", "-c", _END, "sh", *words, user="root")
            self._call = Detached(self._target.place.idle(argv), self._target.environment())

    def finish(self, make_room: Callable[[], object]) -> None:
        """Start the call if it was not started, and wait for it to end.

        Args:
            make_room: Closes files that the call does not need.

        Raises:
            OSError: The target did not confirm that the command is gone.
        """
        try:
            self._begin_somehow(make_room)
            assert self._call is not None
            done = self._call.result(END_TIMEOUT)
            if done.returncode != 0:
                said = " ".join(done.stderr.decode("utf-8", "replace").split())
                raise OSError(said[-300:] or f"exit code {done.returncode}")
        except OSError as broken:
            reason = str(broken) or f"no answer in {END_TIMEOUT:g} s"
            raise OSError(
                f"the command may still be running, as killing it failed ({reason}): check for it"
            ) from None

    def _begin_somehow(self, make_room: Callable[[], object]) -> None:
        deadline = time.monotonic() + END_TIMEOUT
        while not self.begun:
            try:
                self.begin()
            except TooManyFiles:
                if time.monotonic() > deadline:
                    raise
                make_room()
                gevent.sleep(0.1)
