"""Machines of tests, and what makes them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from pyinfra_orbstack import orbctl
from pyinfra_orbstack.targets import MACHINES
from pyinfra_orbstack.testing import runs
from pyinfra_orbstack.testing.engine import Engine
from pyinfra_orbstack.testing.targets import Target


class Machine(Target):
    """A machine that a test may do anything to; its name is also its hostname."""

    kind = "machine"

    def __init__(
        self, engine: Engine, machine: orbctl.Machine, groups: runs.Groups, data: Mapping[str, Any]
    ) -> None:
        super().__init__(MACHINES, machine.name, machine.id, engine.root, groups, data)
        self.engine = engine
        self._machine = machine

    def argv(self, *words: str, user: str | None = None, tty: bool = False) -> list[str]:
        """The command line on this computer that runs a command there."""
        return self.engine.client.argv(orbctl.run_args(self.name, words, user=user))

    def environment(self) -> dict[str, str]:
        return {**super().environment(), orbctl.RECORD_VARIABLE: str(self.engine.record.path)}

    def restart(self) -> None:
        """Restart it and wait until it answers."""
        self._disconnect()
        self.engine.client.restart(self.name)
        self.engine.wait(self.name)

    def delete(self) -> None:
        """Delete it, unless machines are kept; the end of the run tries again if that fails."""
        self._disconnect()
        if self.engine.keep:
            return
        try:
            self.engine.client.remove(self._machine)
            self.engine.record.forget(self.id)
        except orbctl.OrbctlError as problem:
            warnings.warn(f"{self.name} was not deleted: {problem}", stacklevel=2)


class MachineFactory:
    """Makes machines; see `orbstack_machines`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __call__(
        self,
        name: str = "test",
        *,
        image: str | None = None,
        user: str | None = None,
        groups: runs.Groups = (),
        data: Mapping[str, Any] | None = None,
    ) -> Machine:
        """Make a machine: a clone of one that the run makes once for each image and user.

        Args:
            name: What its name begins with; a random end keeps it apart from all others.
            image: Image, by default what `--orbstack-image` or ``orbstack_image`` say.
            user: Its default user, by default as `orbctl create` has it.
            groups: runs.Groups of the host, or their data by name.
            data: Data of the host, which come before that of groups.
        """
        groups = runs.check_groups(groups)
        return Machine(self.engine, self.engine.make(name, image, user), groups, data or {})
