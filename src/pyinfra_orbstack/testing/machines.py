"""Machines for tests, and their factory."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Union

from pyinfra_orbstack import orbctl
from pyinfra_orbstack.targets import HostName
from pyinfra_orbstack.testing import network, runs
from pyinfra_orbstack.testing.engine import Engine
from pyinfra_orbstack.testing.targets import Deployable, Target

#: A host in the form of an inventory file: a name, or a name with data.
Host = Union[str, "tuple[str, Mapping[str, Any]]"]


class Machine(Target):
    """A disposable machine, which a test may change in any way; its name is also its hostname.

    **Example:**

    .. code:: python

        def test_site(orbstack_machine):
            orbstack_machine.apply("deploy.py")
            assert orbstack_machine.http("/").status == 200
    """

    kind = "machine"

    def __init__(
        self,
        engine: Engine,
        machine: orbctl.Machine,
        groups: runs.Groups,
        data: Mapping[str, Any],
        *,
        plain: bool = False,
    ) -> None:
        named = HostName(False, machine.name, plain)
        super().__init__(named, machine.id, engine.root, groups, data)
        self.engine = engine
        self._machine = machine

    def argv(self, *words: str, user: str | None = None, tty: bool = False) -> list[str]:
        """Return the local command line that runs a command in the machine.

        + words: the command and its arguments
        + user: who runs it; the machine's default user by default
        + tty: has no effect: ``orbctl`` decides by itself

        **Returns:** the words of the command line, for ``subprocess``

        **Example:**

        .. code:: python

            subprocess.run(machine.argv("journalctl", "--no-pager"), check=True)
        """
        return self.engine.client.argv(orbctl.run_args(self.name, words, user=user))

    def environment(self) -> dict[str, str]:
        return {**super().environment(), orbctl.RECORD_VARIABLE: str(self.engine.record.path)}

    @property
    def ip4(self) -> str:
        """Its address in OrbStack's network, which this host can reach."""
        address = self.engine.client.info(self.name).ip4
        assert address, f"{self.name} has no address: it does not run"
        return address

    @property
    def domain(self) -> str:
        """Its domain name in OrbStack's network, which other machines and a Mac can resolve."""
        return self._machine.domain

    def http(
        self,
        path: str = "/",
        port: int = 80,
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float = 30,
    ) -> network.Response:
        """GET a path from this host, as soon as something answers at the port.

        + path: path to request
        + port: port to connect to
        + headers: headers of the request; ``Host`` is the machine's domain by default
        + timeout: seconds to wait for an answer

        **Returns:** the server's response, whatever its status; a redirect is not followed

        **Raises:**

        + AssertionError: no server answered in time

        **Example:**

        .. code:: python

            assert "Welcome" in machine.http("/", port=8080).text
        """
        host = self.domain if port == 80 else f"{self.domain}:{port}"
        return network.get(self.ip4, port, path, {"Host": host, **(headers or {})}, timeout)

    def restart(self) -> None:
        """Restart the machine and wait until it answers.

        **Example:**

        .. code:: python

            machine.restart()
            assert machine.http("/").status == 200  # the service is enabled
        """
        self._disconnect()
        self.engine.client.restart(self.name)
        self.engine.wait(self.name)

    def delete(self) -> None:
        """Delete it, unless machines are kept; the end of the run retries a failed deletion.

        **Example:**

        .. code:: python

            machine.delete()  # earlier than at the end of the run
        """
        self._disconnect()
        if self.engine.keep:
            return
        try:
            self.engine.client.remove(self._machine)
            self.engine.record.forget(self.id)
        except orbctl.OrbctlError as problem:
            warnings.warn(f"{self.name} was not deleted: {problem}", stacklevel=2)


class Inventory(Deployable):
    """Machines of a test as the hosts of one inventory; a deploy is applied to all of them.

    ``inventory["web-1"]`` is one of them, by the name that the test gave it.

    **Example:**

    .. code:: python

        def test_shop(orbstack_machines):
            with orbstack_machines.inventory({"web": ["web-1", "web-2"], "db": ["db"]}) as shop:
                shop.assert_idempotent("deploy.py")
                assert shop["web-1"].http("/").status == 200
    """

    def __init__(self, machines: Mapping[str, Machine]) -> None:
        self._machines = dict(machines)
        self.name = ", ".join(machine.name for machine in self)
        first = next(iter(self))
        self._root = first.engine.root
        self._environment = first.environment
        self._run = runs.Run(self._root, [machine.member for machine in self])

    def __getitem__(self, name: str) -> Machine:
        return self._machines[name]

    def __iter__(self) -> Iterator[Machine]:
        return iter(self._machines.values())

    def __len__(self) -> int:
        return len(self._machines)

    def group(self, name: str) -> list[Machine]:
        """Return the machines of a group.

        + name: name of the group

        **Returns:** its machines, in the order of the inventory; none if there is no such group

        **Example:**

        .. code:: python

            for machine in shop.group("web"):
                assert machine.http("/").status == 200
        """
        return [machine for machine in self if name in machine.member.groups]

    def environment(self) -> dict[str, str]:
        return self._environment()

    def delete(self) -> None:
        """Delete the machines.

        **Example:**

        .. code:: python

            shop.delete()  # earlier than at the end of the run
        """
        for machine in self:
            machine.delete()


class MachineFactory:
    """Creates machines; the fixture ``orbstack_machines`` is one.

    **Example:**

    .. code:: python

        with orbstack_machines("web", groups=["web"]) as machine:
            machine.apply("deploy.py")
    """

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
        plain: bool = False,
    ) -> Machine:
        """Create a machine: a clone of one that the run creates once for each image and user.

        + name: prefix of its name; a random suffix makes the name unique
        + image: image; by default the value of ``--orbstack-image`` or ``orbstack_image``
        + user: its default user; by default the one that ``orbctl create`` chooses
        + groups: groups of the host, by name or with their data
        + data: data of the host, which takes precedence over that of groups
        + plain: whether pyinfra calls the host by the machine's name alone

        **Returns:** the machine, which runs

        **Example:**

        .. code:: python

            machine = orbstack_machines("web", image="debian:bookworm", data={"port": 8080})
        """
        groups = runs.check_groups(groups)
        made = self.engine.make(name, image, user)
        return Machine(self.engine, made, groups, data or {}, plain=plain)

    def inventory(
        self,
        groups: Mapping[str, Sequence[Host]],
        *,
        every: runs.Groups = (),
        image: str | None = None,
        user: str | None = None,
        plain: bool = False,
    ) -> Inventory:
        """Create machines as the hosts of one inventory.

        + groups: hosts by group, in the form of an inventory file: names, or names with data. A
          name that is in several groups is one machine.
        + every: groups that contain all of them, by name or with their data
        + image: image, as for one machine
        + user: default user, as for one machine
        + plain: whether pyinfra calls the hosts by the machines' names alone

        **Returns:** the machines, which run

        **Raises:**

        + TypeError: the hosts of a group are a single text instead of a list
        + ValueError: there is no host

        **Example:**

        .. code:: python

            shop = orbstack_machines.inventory({"web": ["web"], "db": [("db", {"port": 5432})]})
        """
        runs.check_groups(list(groups))
        every = runs.check_groups(every)
        members: dict[str, set[str]] = {}
        data: dict[str, dict[str, Any]] = {}
        for group, hosts in groups.items():
            if isinstance(hosts, (str, bytes)):
                raise TypeError(f"hosts of {group} must be a list of names, not {hosts!r}")
            for host in hosts:
                name, own = (host, {}) if isinstance(host, str) else host
                members.setdefault(name, set()).add(group)
                data.setdefault(name, {}).update(own)
        if not members:
            raise ValueError("an inventory must have at least one host")
        with contextlib.ExitStack() as undo:
            made = {}
            for name, own_groups in members.items():
                in_groups = {**every, **{group: {} for group in groups if group in own_groups}}
                options: dict[str, Any] = {"image": image, "user": user, "plain": plain}
                machine = self(name, groups=in_groups, data=data[name], **options)
                made[name] = undo.enter_context(machine)
            undo.pop_all()
        return Inventory(made)
