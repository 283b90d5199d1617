"""How processes enter a machine that boots its own init."""

from __future__ import annotations

import os

from .door import Door
from .entry import Entry
from .linux import NoArguments, import_nothing_more
from .runstate import RUNNING, RunState
from .state import Machine, rpc


class BootedDoor(Door):
    """Like the door of a machine without init, plus its user namespace and control groups.

    A process inside has the rights of the machine's root and no more, so none are dropped.
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
                raise ProcessLookupError  # what was opened may belong to another process
        except (OSError, ValueError, IndexError):
            raise rpc(f"machine not running: '{machine.name}'") from None

    def own(self, fd: int) -> None:
        os.fchown(fd, self._first, self._first)

    def enter(self, *kept: int, bare: bool = False, all_rights: bool = False) -> None:
        self._no_arguments = NoArguments()
        import_nothing_more()
        for fd in (0, 1, 2):
            # The machine can open it by its name in /proc only if the machine's root owns it.
            if os.readlink(f"/proc/self/fd/{fd}").startswith("pipe:"):
                self.own(fd)
        self._entry.enter(*kept, root=self._bare if bare else -1)
