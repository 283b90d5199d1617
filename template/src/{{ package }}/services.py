"""Debian and Ubuntu packages, and their services."""

from __future__ import annotations

from pyinfra import host
from pyinfra.api.operation import OperationMeta
from pyinfra.facts.deb import DebPackages
from pyinfra.facts.files import Directory
from pyinfra.operations import apt, systemd
from pyinfra.operations.util import any_changed


def install(*packages: str) -> None:
    """Install packages. If all are installed, apt's lists are not updated, however old they are."""
    missing = set(packages) - set(host.get_fact(DebPackages))
    apt.packages(
        name=f"Install {', '.join(packages)}",
        packages=list(packages),
        no_recommends=True,
        update=bool(missing),
        cache_time=3600,
    )


def can_run() -> bool:
    """Whether services can run here. Containers and machines without init have no systemd."""
    return bool(host.get_fact(Directory, path="/run/systemd/system"))


def run(service: str, *changes: OperationMeta) -> None:
    """Start and enable a service, and reload it if one of these operations changed something."""
    if not can_run():
        return
    systemd.service(name=f"Run {service}", service=service, running=True, enabled=True)
    if changes:
        systemd.service(
            name=f"Reload {service}", service=service, reloaded=True, _if=any_changed(*changes)
        )
