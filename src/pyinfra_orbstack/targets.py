"""Targets: a host's name says machine or container; a target knows how to reach it."""

from __future__ import annotations

import abc
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from typing_extensions import override

from pyinfra_orbstack import docker, orbctl
from pyinfra_orbstack.places import Place

if TYPE_CHECKING:
    from pyinfra.api.host import Host

#: Prefixes of machines, and of containers, in host names.
MACHINES = "@orbstack/"
CONTAINERS = "@orbstack/docker/"
#: Prefix of hosts that pyinfra calls by the name of the machine or container alone.
PLAIN = "@orbstack/plain/"


class HostName(NamedTuple):
    """What a host is, as its name in the inventory says; its data only decides on which Mac."""

    container: bool
    name: str
    plain: bool = False

    @property
    def is_pattern(self) -> bool:
        """Whether it stands for any number of machines or containers."""
        return any(sign in self.name for sign in "*?[")

    @property
    def written(self) -> str:
        """The name in an inventory."""
        kind = CONTAINERS if self.container else MACHINES
        return f"{PLAIN if self.plain else MACHINES}{kind[len(MACHINES) :]}{self.name}"

    @property
    def called(self) -> str:
        """The name by which pyinfra calls the host."""
        several = not self.name or self.is_pattern
        return PlainName(self) if self.plain and not several else self.written

    def __str__(self) -> str:
        return f"{'container' if self.container else 'machine'} {self.name!r}"


class PlainName(str):
    """A host's name without a prefix, which `parse` understands as long as it is this object."""

    meaning: HostName

    def __new__(cls, meaning: HostName) -> PlainName:
        self = super().__new__(cls, meaning.name)
        self.meaning = meaning
        return self


class HostData(dict[str, Any]):
    """Data of a host; what the host is, is an attribute, which no key can override.

    Args:
        meaning: What the host is, as far as is known.
        place: Where it was listed, and where it is unless its own data says otherwise.
        named: Whether it was given by name. Otherwise it exists in that place only.
        data: Its data.
    """

    def __init__(self, meaning: HostName, place: Place, named: bool, **data: Any) -> None:
        super().__init__(data)
        self.meaning = self.asked = meaning
        self.listed: dict[str, Any] = {}
        self.place = place
        self.named = named


def meaning(host: Host) -> HostName | None:
    """What a host of an inventory is; None if it belongs to another connector."""
    data = getattr(host, "host_data", None)
    return data.meaning if isinstance(data, HostData) else None


def parse(host: str) -> HostName | None:
    """What a host name means to this connector; None if it belongs to another connector.

    >>> parse("@orbstack/web"), parse("@orbstack/docker/web"), parse("web")
    (HostName(container=False, name='web', plain=False), \
HostName(container=True, name='web', plain=False), None)
    >>> parse("@orbstack/plain/web").called
    'web'
    """
    if isinstance(host, PlainName):
        return host.meaning
    if not f"{host}/".startswith(MACHINES):
        return None
    plain = f"{host}/".startswith(PLAIN)
    words = host[len(PLAIN if plain else MACHINES) :].split("/", 1)
    if words[0] == "docker":
        return HostName(True, words[1] if len(words) > 1 else "", plain)
    return HostName(False, "/".join(words), plain)


class Target(abc.ABC):
    """A place where commands run; its users need not know whether it is machine or container."""

    #: Whether it needs time to answer after a start.
    boots: bool

    @property
    @abc.abstractmethod
    def place(self) -> Place:
        """Where its client runs; `Place.open` it before calling `argv`."""

    @abc.abstractmethod
    def argv(self, *words: str, user: str | None = None, tty: bool = False) -> list[str]:
        """The local command line that runs ``words`` in the target."""

    @abc.abstractmethod
    def environment(self) -> dict[str, str]:
        """The environment of that command line."""

    @property
    @abc.abstractmethod
    def state(self) -> str:
        """Its state at the last check; ``running`` if commands can run."""

    @abc.abstractmethod
    def refresh(self) -> None:
        """Check again, and make sure that it is still the target that we connected to.

        Raises:
            OSError: It is gone, or was replaced by another one.
        """

    @abc.abstractmethod
    def start(self) -> None:
        """Start the target."""

    @abc.abstractmethod
    def start_line(self) -> str:
        """The command that starts it, as shown to the user."""

    @abc.abstractmethod
    def explain(self, silence: str) -> str:
        """Why it provides no shell, and what to do."""


class MachineTarget(Target):
    """A machine."""

    boots = True

    def __init__(self, client: orbctl.Orbctl, machine: orbctl.Machine) -> None:
        self.client = client
        self.machine = machine

    def __str__(self) -> str:
        return f"machine {self.machine.name!r}"

    @property
    @override
    def place(self) -> Place:
        """Where its client runs."""
        return self.client.place

    @override
    def argv(self, *words: str, user: str | None = None, tty: bool = False) -> list[str]:
        """The local command line that runs ``words`` in the machine."""
        # `orbctl` itself detects whether there is a terminal.
        args = orbctl.run_args(self.machine.name, words, user=user)
        return self.client.argv(args, tty=tty)

    @override
    def environment(self) -> dict[str, str]:
        """The environment of that command line."""
        return self.client.environment()

    @property
    @override
    def state(self) -> str:
        """Its state at the last check."""
        return self.machine.state

    @override
    def refresh(self) -> None:
        """Check again, and make sure that it is still the machine that we connected to."""
        try:
            now = self.client.info(self.machine.name)
        except orbctl.OrbctlError as broken:
            raise OSError(str(broken)) from None
        if now.id != self.machine.id:
            raise OSError(
                f"machine {now.name!r} was replaced by another one of the same name since "
                "pyinfra connected to it: run pyinfra again"
            )
        self.machine = now

    @override
    def start(self) -> None:
        """Start the machine."""
        self.client.start(self.machine.name)

    @override
    def start_line(self) -> str:
        """The command that starts it, as shown to the user."""
        return self.client.line(["start", self.machine.name])

    @override
    def explain(self, silence: str) -> str:
        """Why it provides no shell."""
        return silence


class ContainerTarget(Target):
    """A container.

    It is reached by its id, so that another container of the same name is never mistaken for it.
    """

    boots = False

    def __init__(self, client: docker.Docker, container: docker.Container) -> None:
        self.client = client
        self.container = container

    def __str__(self) -> str:
        return f"container {self.container.name!r}"

    @property
    @override
    def place(self) -> Place:
        """Where its client runs."""
        return self.client.place

    @override
    def argv(self, *words: str, user: str | None = None, tty: bool = False) -> list[str]:
        """The local command line that runs ``words`` in the container."""
        args = docker.exec_args(self.container.id, words, user=user, tty=tty)
        return self.client.argv(args, tty=tty)

    @override
    def environment(self) -> dict[str, str]:
        """The environment of that command line."""
        return self.client.environment()

    @property
    @override
    def state(self) -> str:
        """Its state at the last check."""
        return self.container.state

    @override
    def refresh(self) -> None:
        """Check again."""
        self.container = self.client.inspect(self.container.id)

    @override
    def start(self) -> None:
        """Start the container."""
        if self.state == "paused":
            raise docker.DockerError(
                f"{self} is paused; to resume it, run: {self._line('unpause')}"
            )
        self.client.start(self.container.id)

    @override
    def start_line(self) -> str:
        """The command that starts it, as shown to the user."""
        return self._line("start")

    def _line(self, verb: str) -> str:
        return self.client.line([verb, self.container.name])

    @override
    def explain(self, silence: str) -> str:
        """Why it provides no shell, and what to do."""
        if re.search(r"executable file .*not found", silence):
            return "its image has no shell (sh), which pyinfra requires"
        if re.search(r"not running|running containers", silence):
            return "it has ended: use a command that keeps running"
        return silence
