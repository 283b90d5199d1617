"""The way into a machine that its own init has booted."""

from __future__ import annotations

import os

from .door import Door
from .entry import Entry
from .linux import NoArguments, import_nothing_more
from .runstate import RUNNING, RunState
from .state import Machine, rpc


class BootedDoor(Door):
    """Like the way into a machine without init, by way of its user namespace and control groups.

    Whoever is inside has the rights of the machine's root and no more, so nothing is taken away.
    """

    def __init__(self, machine: Machine) -> None:
        found = RunState.read(machine.file("pid"))
        try:
            if found is None or found.state != RUNNING:
                raise ProcessLookupError
            self.proc = os.open(f"/proc/{found.init}", os.O_RDONLY | os.O_DIRECTORY)
            supervisor = os.open(f"/proc/{found.supervisor}", os.O_RDONLY | os.O_DIRECTORY)
            flags = os.O_PATH | os.O_DIRECTORY
            self._bare = os.open(f"fd/{found.bare}", flags, dir_fd=supervisor)
            os.close(supervisor)
            self._root = self._open("root", os.O_RDONLY | os.O_DIRECTORY)
            with open(self._open("uid_map")) as file:
                self._first = int(file.read().split()[1])
            self._entry = Entry(machine.id, self.proc)
            if not (found.is_supervised and found.has_init):
                raise ProcessLookupError  # what has been opened is not its own
        except (OSError, ValueError, IndexError):
            raise rpc(f"machine not running: '{machine.name}'") from None

    def own(self, fd: int) -> None:
        os.fchown(fd, self._first, self._first)

    def enter(self, *kept: int, bare: bool = False, all_rights: bool = False) -> None:
        self._no_arguments = NoArguments()
        import_nothing_more()
        for fd in (0, 1, 2):
            # What is not the machine's own cannot be opened in it by its name in /proc.
            if os.readlink(f"/proc/self/fd/{fd}").startswith("pipe:"):
                self.own(fd)
        self._entry.enter(*kept, root=self._bare if bare else -1)
