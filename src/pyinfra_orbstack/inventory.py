"""Names to hosts: which hosts `@orbstack/...` stands for, with groups and data."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from pyinfra.api.exceptions import InventoryError
from pyinfra.api.util import memoize

from pyinfra_orbstack import docker, orbctl
from pyinfra_orbstack.targets import CONTAINERS, MACHINES, HostName, parse

#: Seconds for which a listing is recent enough to connect, which pyinfra does right after it.
FRESH = 2.0

T = TypeVar("T")
Host = tuple[str, dict[str, Any], list[str]]


def hosts(name: str | None = None) -> Iterator[Host]:
    """The hosts for a name, a pattern or nothing after ``@orbstack/``.

    Raises:
        InventoryError: There are none, or they cannot be listed. A host given by name never fails
            here, only when it is connected to.
    """
    asked = parse(f"{MACHINES}{name or ''}")
    assert asked is not None
    try:
        yield from (_containers if asked.container else _machines)(asked)
    except InventoryError:
        # The pattern becomes a host that fails alone, when it is connected to: with `--limit` a run
        # may leave it out, and must not be bothered by it.
        if not asked.is_pattern:
            raise
        yield f"{MACHINES}{name}", {}, ["@orbstack"]


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


def _machines(asked: HostName) -> Iterator[Host]:
    name = asked.name
    try:
        machines = list_machines()[1]
    except orbctl.OrbctlError as broken:
        # A host given by name fails alone, when it is connected to.
        if not name or asked.is_pattern:
            raise InventoryError(f"cannot list OrbStack's machines: {broken}") from None
        machines = []
    if not name:
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
        yield machine_host(name, next((one for one in machines if one.name == name), None))
        return
    for machine in chosen:
        yield machine_host(machine.name, machine)


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


class MachineHostData(dict[str, Any]):
    """Data of a machine, with its addresses looked up on first use.

    `orbctl` reports the address of one machine at a time, and only of running ones: looking all up
    in advance would cost every run a call for each, and a machine that connecting creates or
    starts has none yet.
    """

    def __init__(self, name: str) -> None:
        super().__init__(orbstack_vm=True, vm_name=name)
        self._name = name

    def __missing__(self, key: str) -> Any:
        if key not in ("orbstack_ip4", "orbstack_domain"):
            raise KeyError(key)
        try:
            machine = orbctl.Orbctl().info(self._name)
        except (orbctl.MachineNotFound, orbctl.BadValue):
            raise KeyError(key) from None
        except orbctl.OrbctlError as broken:
            raise InventoryError(f"cannot read {key} of {MACHINES}{self._name}: {broken}") from None
        if not machine.running or not machine.ip4:
            raise KeyError(key)
        # The user's own values take precedence.
        self.setdefault("orbstack_ip4", machine.ip4)
        self.setdefault("orbstack_domain", machine.domain)
        return self[key]


def machine_host(name: str, machine: orbctl.Machine | None) -> Host:
    data = MachineHostData(name)
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
    return f"{MACHINES}{name}", data, groups


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


def container_host(name: str, container: docker.Container | None, *, named: bool) -> Host:
    # Listing running containers must not start one that has stopped since.
    data: dict[str, Any] = {"container_name": name} if named else {"orbstack_start": False}
    groups = ["@orbstack", "orbstack_containers"]
    if container is not None:
        name = container.name
        data.update(
            container_id=container.id,
            container_name=name,
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
    return f"{CONTAINERS}{name}", data, groups


def _containers(asked: HostName) -> Iterator[Host]:
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
        yield container_host(name, called[0] if len(called) == 1 else None, named=True)
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
        yield container_host(one.name, one, named=False)


def just_listed(name: str) -> orbctl.Machine | None:
    """The machine, if a listing less than `FRESH` seconds old shows that it runs."""
    for key, (when, machines) in list_machines.cache.items():
        if key != "failure" and time.monotonic() - when < FRESH:
            return next((one for one in machines if one.name == name and one.running), None)
    return None


def known(there: Iterable[orbctl.Machine | docker.Container]) -> str:
    names = sorted(one.name for one in there)
    return f" (existing: {', '.join(names)})" if names else " (none exists)"
