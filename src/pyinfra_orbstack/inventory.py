"""Names to hosts: which hosts `@orbstack/...` stands for, with groups and data."""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from pyinfra.api.exceptions import InventoryError
from pyinfra.api.util import memoize

from pyinfra_orbstack import docker, orbctl
from pyinfra_orbstack.places import HERE, SSH_KEY, SSH_VARIABLE, Place, place_of
from pyinfra_orbstack.targets import MACHINES, HostData, HostName, parse

#: Seconds for which a listing is recent enough to connect, which pyinfra does right after it.
FRESH = 2.0

T = TypeVar("T")
Host = tuple[str, dict[str, Any], list[str]]
#: The data of a host, and its groups.
Found = tuple[HostData, list[str]]


def hosts(name: str | None = None) -> Iterator[Host]:
    """The hosts for a name, a pattern or nothing after ``@orbstack/``.

    Raises:
        InventoryError: There are none, they cannot be listed, or two have the same plain name. A
            host given by name never fails otherwise, only when it is connected to.
    """
    asked = parse(f"{MACHINES}{name or ''}")
    assert asked is not None
    try:
        found = list((_containers if asked.container else _machines)(asked))
    except InventoryError:
        # The pattern becomes a host that fails alone, when it is connected to: with `--limit` a run
        # may leave it out, and must not be bothered by it.
        if not asked.is_pattern:
            raise
        found = [(HostData(asked, _usual(), False), ["@orbstack"])]
    building = _building()
    _check_one_mac(asked, building)
    for data, groups in found:
        host = data.meaning.called
        if host != data.meaning.written:
            _check_unique(host, data.meaning, building)
            # With this group, `--limit` also accepts the name as written in the inventory.
            groups.append(data.meaning.written)
        if asked.name and not asked.is_pattern:
            # The same for a container whose id is written there.
            names = (asked.written, asked.called)
            groups += [str(name) for name in dict.fromkeys(names) if name not in (host, *groups)]
        yield str(host), data, groups


def _building() -> dict[str, Any]:
    """What pyinfra knows of the inventory that it is building; it tells a connector nothing."""
    frame = inspect.currentframe()
    while frame and frame.f_code.co_name != "make_hosts_and_groups":
        frame = frame.f_back
    return dict(frame.f_locals) if frame else {}


def _check_one_mac(host: HostName, building: dict[str, Any]) -> None:
    """Reject a host that is listed with two Macs: pyinfra would forget one of them."""
    listed = [
        building.get("names", ()),
        *(names for names, _ in building.get("groups", {}).values()),
    ]
    entries = (one for names in listed for one in names if isinstance(one, tuple))
    given = (data.get(SSH_KEY) for name, data, *_ in entries if name == host.written)
    macs = {str(mac) for mac in given if mac}
    if len(macs) > 1:
        raise InventoryError(
            f"two hosts are called '{host.written}', on {' and '.join(sorted(macs))}: "
            "use an inventory for each Mac, or rename one of them"
        )


def _check_unique(host: str, meaning: HostName, building: dict[str, Any]) -> None:
    """Reject a plain name that is the name of another host as well.

    pyinfra would make one host of both, which is in the groups of both.
    """
    if not building:
        return
    earlier = building["self"].host_data
    named = (one[0] if isinstance(one, tuple) else one for one in building["names"])
    other: HostName | None = meaning
    if host in earlier:
        other = earlier[host].meaning if isinstance(earlier[host], HostData) else None
    elif host in named:
        other = None
    if other != meaning:
        raise InventoryError(
            f"two hosts are called {host!r}: {meaning} and "
            f"{other or 'a host of another connector'}: use "
            f"{meaning._replace(plain=False).written} instead of {meaning.written}"
        )


def no_match(asked: HostName) -> str:
    """Why a pattern has no hosts; called when the pattern is connected to."""
    name = asked.name
    try:
        if asked.container:
            running = [one for one in list_containers() if one.running]
            return f"no running container matches {name!r}{known(running)}"
        return f"no OrbStack machine matches {name!r}{known(list_machines()[1])}"
    except docker.DockerError as broken:
        return f"cannot list containers: {broken}"
    except orbctl.OrbctlError as broken:
        return f"cannot list OrbStack's machines: {broken}"


def _machines(asked: HostName) -> Iterator[Found]:
    name = asked.name
    try:
        machines = list_machines()[1]
    except orbctl.OrbctlError as broken:
        # A host given by name fails alone, when it is connected to.
        if not name or asked.is_pattern:
            raise InventoryError(f"cannot list OrbStack's machines: {broken}") from None
        machines = []
    if not name:
        if asked.plain and any(machine.name == "plain" for machine in machines):
            raise InventoryError(
                "@orbstack/plain means all running machines, but one is called 'plain': "
                "use @orbstack/plain/plain for that one, and @orbstack/plain/* for all"
            )
        chosen = [machine for machine in machines if machine.running]
        if not chosen:
            raise InventoryError(
                "no OrbStack machine is running; use @orbstack/* to include stopped machines"
            )
    elif asked.is_pattern:
        chosen = [machine for machine in machines if fnmatchcase(machine.name, name)]
        if not chosen:
            raise InventoryError(no_match(asked))
    else:
        found = next((one for one in machines if one.name == name), None)
        yield machine_host(asked, found, named=True)
        return
    for machine in chosen:
        yield machine_host(asked._replace(name=machine.name), machine, named=False)


@memoize
def list_machines() -> tuple[float, list[orbctl.Machine]]:
    """All machines, and when they were listed.

    They are read once, because pyinfra expands each name of an inventory twice.
    ``list_machines.cache.clear()`` forgets them.
    """
    machines = _unless_just_failed(list_machines.cache, lambda: orbctl.Orbctl().machines())
    return time.monotonic(), machines


def _unless_just_failed(cache: dict[Any, Any], listing: Callable[[], list[T]]) -> list[T]:
    """List the items; a failure applies to the inventory's next names too, without a retry."""
    if "failure" in cache and time.monotonic() - cache["failure"][0] < FRESH:
        raise cache["failure"][1]
    try:
        return listing()
    except (orbctl.OrbctlError, docker.DockerError) as broken:
        cache["failure"] = time.monotonic(), broken
        raise


def _usual() -> Place:
    try:
        return place_of()
    except orbctl.BadValue:
        return HERE  # listing fails, with the reason


class MachineHostData(HostData):
    """Data of a machine, with its addresses looked up on first use.

    `orbctl` reports the address of one machine at a time, and only of running ones: looking all up
    in advance would cost every run a call for each, and a machine that connecting creates or
    starts has none yet.
    """

    def __init__(self, meaning: HostName, named: bool) -> None:
        super().__init__(meaning, _usual(), named, orbstack_vm=True, vm_name=meaning.name)

    def __missing__(self, key: str) -> Any:
        if key not in ("orbstack_ip4", "orbstack_domain"):
            raise KeyError(key)
        try:
            machine = orbctl.Orbctl(place=self.place).info(self.meaning.name)
        except (orbctl.MachineNotFound, orbctl.BadValue):
            raise KeyError(key) from None
        except orbctl.OrbctlError as broken:
            raise InventoryError(f"cannot read {key} of {self.meaning.written}: {broken}") from None
        if not machine.running or not machine.ip4:
            raise KeyError(key)
        # The user's own values take precedence.
        self.setdefault("orbstack_ip4", machine.ip4)
        self.setdefault("orbstack_domain", machine.domain)
        return self[key]


def check_place(host: Any, destination: str | None) -> None:
    """Take note of the Mac that a host's data names.

    That is unknown while an inventory is read, so hosts are listed without it.

    Raises:
        BadValue: The host was listed elsewhere.
    """
    data = host.inventory.host_data.get(host.name)
    place = place_of(destination)
    if not isinstance(data, HostData) or data.place is place:
        return
    if not data.named:
        listed = f"on {data.place.name}" if data.place.far else "on this host"
        raise orbctl.BadValue(
            f"{host.name} was listed {listed}, but its orbstack_ssh is {place.name!r}: to list "
            f"that Mac's hosts, set {SSH_VARIABLE}"
        )
    data.place = place
    for key, value in data.listed.items():
        # Values that are not what was listed are the user's own.
        if key in data and data[key] == value and key not in _TRUE_ANYWHERE:
            del data[key]
    # What was asked for may be the beginning of the id of a container here.
    data.meaning = data.asked
    if data.asked.container:
        data.setdefault("container_name", data.asked.name)


#: What is true of a host wherever it is.
_TRUE_ANYWHERE = ("orbstack_vm", "vm_name")


def machine_host(asked: HostName, machine: orbctl.Machine | None, *, named: bool = True) -> Found:
    data = MachineHostData(asked, named)
    groups = ["@orbstack", "orbstack"]
    if machine is not None:
        data.update(
            vm_id=machine.id,
            vm_status=machine.state,
            vm_distro=machine.distro,
            vm_version=machine.version,
            vm_arch=machine.arch,
            vm_username=machine.username,
        )
        groups.append("orbstack_running" if machine.running else "orbstack_stopped")
        groups += _group("orbstack_", machine.arch) + _group("orbstack_", machine.distro)
    data.listed = dict(data)
    return data, groups


#: One-word groups with another meaning than a distro or an architecture.
_TAKEN = {"orbstack_running", "orbstack_stopped", "orbstack_containers", "orbstack_vm"}


def _group(prefix: str, word: str | None) -> list[str]:
    """A group with a name that others have chosen; none if that is more than a word."""
    group = f"{prefix}{word}"
    plain = word and re.fullmatch(r"[A-Za-z0-9][\w.-]*", word, re.ASCII)
    return [group] if plain and group not in _TAKEN else []


@memoize
def list_containers() -> list[docker.Container]:
    """All containers; cached like `list_machines`."""
    return _unless_just_failed(list_containers.cache, lambda: docker.Docker().containers())


def container_host(asked: HostName, container: docker.Container | None, *, named: bool) -> Found:
    data = HostData(asked, _usual(), named)
    # Listing running containers must not start one that has stopped since.
    data.update({"container_name": asked.name} if named else {"orbstack_start": False})
    groups = ["@orbstack", "orbstack_containers"]
    if container is not None:
        data.meaning = asked._replace(name=container.name)
        data.update(
            container_id=container.id,
            container_name=container.name,
            container_image=container.image,
            container_state=container.state,
            container_labels=dict(container.labels),
            container_project=container.project,
            container_service=container.service,
            container_domain=container.domain,
            container_ports=dict(container.ports),
        )
        groups += _group("orbstack_image_", container.image_name)
        groups += _group("orbstack_project_", container.project)
    data.listed = dict(data)
    return data, groups


def _containers(asked: HostName) -> Iterator[Found]:
    name = asked.name
    try:
        containers = list_containers()
    except docker.DockerError as broken:
        # As with machines: one given by name fails when it is connected to.
        if not name or asked.is_pattern:
            raise InventoryError(f"cannot list containers: {broken}") from None
        containers = []
    if name and not asked.is_pattern:
        called = [one for one in containers if one.name == name]
        called = called or [one for one in containers if one.id.startswith(name)]
        yield container_host(asked, called[0] if len(called) == 1 else None, named=True)
        return
    running = [one for one in containers if one.running]
    chosen = [one for one in running if fnmatchcase(one.name, name or "*")]
    if not chosen:
        if name:
            raise InventoryError(no_match(asked))
        raise InventoryError(
            "no container is running; "
            "to start a stopped container, target it by name: @orbstack/docker/NAME"
        )
    for one in chosen:
        yield container_host(asked, one, named=False)


def just_listed(name: str, place: Place) -> orbctl.Machine | None:
    """The machine, if a listing less than `FRESH` seconds old shows that it runs in that place."""
    if place is not _usual():
        return None
    for key, (when, machines) in list_machines.cache.items():
        if key != "failure" and time.monotonic() - when < FRESH:
            return next((one for one in machines if one.name == name and one.running), None)
    return None


def known(there: Iterable[orbctl.Machine | docker.Container]) -> str:
    names = sorted(one.name for one in there)
    return f" (existing: {', '.join(names)})" if names else " (none exists)"
