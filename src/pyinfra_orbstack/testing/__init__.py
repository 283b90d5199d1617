"""A pytest plugin: machines and containers as fixtures, with deploys applied to them and checked.

pytest loads it wherever the package is installed, so it imports heavy modules on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Hooks and fixtures: pytest finds them in the module that the entry point names.
from pyinfra_orbstack.testing.plugin import (
    orbstack_containers,
    orbstack_machine,
    orbstack_machines,
    pytest_addoption,
    pytest_configure,
    pytest_configure_node,
    pytest_ignore_collect,
    pytest_terminal_summary,
    pytest_unconfigure,
)

if TYPE_CHECKING:
    from pyinfra_orbstack.testing.containers import Container, ContainerFactory
    from pyinfra_orbstack.testing.engine import Engine, sweep, unavailable
    from pyinfra_orbstack.testing.machines import Inventory, Machine, MachineFactory
    from pyinfra_orbstack.testing.network import Response
    from pyinfra_orbstack.testing.results import Result, Step
    from pyinfra_orbstack.testing.runs import Groups
    from pyinfra_orbstack.testing.targets import Deploy, Ran, Target

__all__ = [
    "Container",
    "ContainerFactory",
    "Deploy",
    "Engine",
    "Groups",
    "Inventory",
    "Machine",
    "MachineFactory",
    "Ran",
    "Response",
    "Result",
    "Step",
    "Target",
    "orbstack_containers",
    "orbstack_machine",
    "orbstack_machines",
    "pytest_addoption",
    "pytest_configure",
    "pytest_configure_node",
    "pytest_ignore_collect",
    "pytest_terminal_summary",
    "pytest_unconfigure",
    "sweep",
    "unavailable",
]

_MODULES = {
    "containers": ("Container", "ContainerFactory"),
    "engine": ("Engine", "sweep", "unavailable"),
    "machines": ("Inventory", "Machine", "MachineFactory"),
    "network": ("Response",),
    "results": ("Result", "Step"),
    "runs": ("Groups",),
    "targets": ("Deploy", "Ran", "Target"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
