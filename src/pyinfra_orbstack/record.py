"""The machines that somebody created, by name and id, so that only those are ever deleted."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyinfra_orbstack.orbctl import Machine, Orbctl

#: Names a file in which whoever creates machines writes down their names and ids.
RECORD_VARIABLE = "PYINFRA_ORBSTACK_RECORD"


class Record:
    """The machines that somebody created, so that only those are ever deleted.

    A text file with a name and an id on each line. Whoever creates a machine adds it at once;
    whoever deletes one looks for the id, as it may have been renamed, and compares it with what
    `orbctl info` says of its name.

    Args:
        path: The file; it need not exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @classmethod
    def from_environment(cls) -> Record | None:
        """The record that `PYINFRA_ORBSTACK_RECORD` names, if it names one."""
        path = os.environ.get(RECORD_VARIABLE)
        return cls(path) if path else None

    def _entries(self) -> list[tuple[str, str]]:
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        # A line that a crash cut short names no machine.
        return [(words[0], words[1]) for line in lines if len(words := line.split()) == 2]

    def machines(self) -> dict[str, str]:
        """Ids by the names that the machines were made with."""
        return dict(self._entries())

    def existing(self, orbctl: Orbctl) -> list[Machine]:
        """Those that are still there, whatever they are called now."""
        ids = {machine_id for _, machine_id in self._entries()}
        return [machine for machine in orbctl.machines() if machine.id in ids] if ids else []

    def add(self, machine: Machine) -> None:
        """Write a machine down."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(f"{machine.name} {machine.id}\n")

    def forget(self, machine_id: str) -> None:
        """Take a machine out."""
        if not self.path.exists():
            return
        with self.path.open("r+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            kept = [line for line in file if machine_id not in line.split()]
            file.seek(0)
            file.truncate()
            file.writelines(kept)

    def delete_all(self, orbctl: Orbctl) -> list[str]:
        """Delete every machine written down that is still the one that was created.

        Returns:
            The names of those that were deleted.
        """
        # Read first: what somebody adds meanwhile is not to be forgotten.
        entries, deleted = self._entries(), []
        for machine in self.existing(orbctl):
            if orbctl.delete(machine.name, machine.id):
                deleted.append(machine.name)
        for _, machine_id in entries:
            self.forget(machine_id)
        return deleted
