"""Packages of Debian and Ubuntu, and the services that come with them."""

from __future__ import annotations

from pyinfra import host
from pyinfra.api.operation import OperationMeta
from pyinfra.facts.deb import DebPackages
from pyinfra.facts.files import Directory
from pyinfra.operations import apt, systemd
from pyinfra.operations.util import any_changed


def install(*packages: str) -> None:
    """Install packages. A host that has them all has nothing to do, however old apt's lists are."""
    missing = set(packages) - set(host.get_fact(DebPackages))
    apt.packages(
        name=f"Install {', '.join(packages)}",
        packages=list(packages),
        no_recommends=True,
        update=bool(missing),
        cache_time=3600,
    )


def can_run() -> bool:
    """Whether services can run here: containers, and machines without init, have no systemd."""
    return bool(host.get_fact(Directory, path="/run/systemd/system"))


def run(service: str, *changes: OperationMeta) -> None:
    """Run a service, now and after each boot, and reload it if one of these changed something."""
    if not can_run():
        return
    systemd.service(name=f"Run {service}", service=service, running=True, enabled=True)
    if changes:
        systemd.service(
            name=f"Reload {service}", service=service, reloaded=True, _if=any_changed(*changes)
        )
