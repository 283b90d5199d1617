"""Names to hosts: what `@orbstack/...` means, with groups and data."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

from pyinfra.api.exceptions import InventoryError
from pyinfra.api.util import memoize

from pyinfra_orbstack import docker, orbctl

#: Seconds for which a listing tells enough to connect, which pyinfra does right after it.
FRESH = 2.0

Host = tuple[str, dict[str, Any], list[str]]


def hosts(name: str | None = None) -> Iterator[Host]:
    """The hosts that a name, a pattern or nothing after ``@orbstack/`` means.

    Raises:
        InventoryError: There are none, or they cannot be listed. A host that was named never fails
            here, but when it is connected to.
    """
    if name and name.split("/")[0] == "docker":
        yield from container_hosts(name.partition("/")[2])
        return
    try:
        machines = list_machines()[1]
    except orbctl.OrbctlError as broken:
        # A host that was named fails when it is connected to, and alone.
        if not name or is_pattern(name):
            raise InventoryError(f"cannot list OrbStack's machines: {broken}") from None
        machines = []
    if not name:
        chosen = [machine for machine in machines if machine.running]
        if not chosen:
            raise InventoryError("no OrbStack machine is running (@orbstack/* is every one)")
    elif is_pattern(name):
        chosen = [machine for machine in machines if fnmatchcase(machine.name, name)]
        if not chosen:
            raise InventoryError(f"no OrbStack machine matches {name!r}{known(machines)}")
    else:
        yield _host(name, next((one for one in machines if one.name == name), None))
        return
    for machine in chosen:
        yield _host(machine.name, machine)


@memoize
def list_machines() -> tuple[float, list[orbctl.Machine]]:
    """When all machines were asked for, and which there were.

    They are read once, because pyinfra expands each name of an inventory twice.
    ``list_machines.cache.clear()`` forgets them.
    """
    return time.monotonic(), orbctl.Orbctl().machines()


def _host(name: str, machine: orbctl.Machine | None) -> Host:
    data: dict[str, Any] = {"orbstack_vm": True, "vm_name": name}
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
        groups += [
            f"orbstack_{word}"
            for word in ("running" if machine.running else "stopped", machine.arch, machine.distro)
            if word
        ]
    return f"@orbstack/{name}", data, groups


@memoize
def list_containers() -> list[docker.Container]:
    """All containers; memoised like `list_machines`."""
    return docker.Docker().containers()


def _container_host(name: str, container: docker.Container | None, *, named: bool) -> Host:
    # Whoever asks for all that run does not want one to be started that has ended since.
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
        if container.image_name:
            groups.append(f"orbstack_image_{container.image_name}")
        if container.project:
            groups.append(f"orbstack_project_{container.project}")
    return f"@orbstack/docker/{name}", data, groups


def container_hosts(name: str) -> Iterator[Host]:
    try:
        containers = list_containers()
    except docker.DockerError as broken:
        # As with machines: one that was named fails when it is connected to.
        if not name or is_pattern(name):
            raise InventoryError(f"cannot list containers: {broken}") from None
        containers = []
    if name and not is_pattern(name):
        called = [one for one in containers if one.name == name]
        called = called or [one for one in containers if one.id.startswith(name)]
        yield _container_host(name, called[0] if len(called) == 1 else None, named=True)
        return
    running = [one for one in containers if one.running]
    chosen = [one for one in running if fnmatchcase(one.name, name or "*")]
    if not chosen:
        if name:
            raise InventoryError(f"no running container matches {name!r}{known(running)}")
        raise InventoryError(
            "no container is running; "
            "one that is stopped is started when it is named: @orbstack/docker/NAME"
        )
    for one in chosen:
        yield _container_host(one.name, one, named=False)


def just_listed(name: str) -> orbctl.Machine | None:
    """The machine, if a listing that is not `FRESH` seconds old has shown that it runs."""
    for when, machines in list_machines.cache.values():
        if time.monotonic() - when < FRESH:
            return next((one for one in machines if one.name == name and one.running), None)
    return None


def is_pattern(name: str) -> bool:
    return any(sign in name for sign in "*?[")


def known(there: Iterable[orbctl.Machine | docker.Container]) -> str:
    names = sorted(one.name for one in there)
    return f" (there are: {', '.join(names)})" if names else " (there is none)"
