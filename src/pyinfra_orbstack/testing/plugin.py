"""The module that pytest loads: options, hooks and fixtures.

pytest loads it wherever the package is installed, so the first fixture that needs a heavy module
imports it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pyinfra_orbstack.testing import folders
from pyinfra_orbstack.testing.signals import EndSignals

if TYPE_CHECKING:
    from pyinfra_orbstack.testing.containers import ContainerFactory
    from pyinfra_orbstack.testing.engine import Engine
    from pyinfra_orbstack.testing.machines import Machine, MachineFactory

RUN_KEY = pytest.StashKey[str]()
ENGINE_KEY: pytest.StashKey[Engine] = pytest.StashKey()
SIGNALS_KEY = pytest.StashKey[EndSignals]()


# Options and hooks -----------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that select machines."""
    group = parser.getgroup("orbstack", "machines of OrbStack")
    group.addoption(
        "--orbstack",
        choices=("auto", "real", "simulator"),
        default="auto",
        help="source of the machines: OrbStack if available, else its simulator (auto)",
    )
    group.addoption(
        "--orbstack-init",
        choices=("image", "none"),
        help="whether the simulator's machines boot the init of their image; by default they do"
        " if the host supports it; none is faster",
    )
    group.addoption("--orbstack-image", metavar="IMAGE", help="image of the machines")
    group.addoption(
        "--orbstack-keep", action="store_true", help="keep the machines until the next run"
    )
    parser.addini("orbstack_image", "image of the machines", default="ubuntu:noble")


def pytest_configure(config: pytest.Config) -> None:
    """Name the run for all pytest-xdist workers, and make sure that it can end cleanly."""
    signals = config.stash[SIGNALS_KEY] = EndSignals()
    signals.begin()
    config.pluginmanager.register(_CtrlC(signals))
    init = config.getoption("orbstack_init")
    if init:
        patch = pytest.MonkeyPatch()  # of the environment, which child processes inherit
        patch.setenv("ORBCTL_SIMULATOR_INIT", init)
        config.add_cleanup(patch.undo)
    worker = getattr(config, "workerinput", {})
    config.stash[RUN_KEY] = worker.get("orbstack_run") or secrets.token_hex(4)


class _CtrlC:
    """Keeps clean-up undisturbed after Ctrl-C."""

    def __init__(self, signals: EndSignals) -> None:
        self._signals = signals

    @pytest.hookimpl(tryfirst=True)
    def pytest_keyboard_interrupt(self) -> None:
        self._signals.over = True


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Do not collect tests from a simulator's machines, which contain whole systems."""
    # One named on the command line is not ignored itself, but its contents can be.
    return True if any(map(_has_machines, (collection_path, collection_path.parent))) else None


def _has_machines(folder: Path) -> bool:
    named = os.environ.get("ORBCTL_SIMULATOR_HOME")
    if named and os.path.realpath(named) == os.path.realpath(folder):
        return True
    try:
        machines = os.listdir(folder / "machines")
    except PermissionError:
        return True
    except OSError:
        return False
    # Each is named after its id.
    return bool(machines) and all(len(name) == 26 and name.isupper() for name in machines)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Pass the name of the run to a pytest-xdist worker."""
    node.workerinput["orbstack_run"] = node.config.stash[RUN_KEY]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """List the machines that were kept."""
    if config.getoption("orbstack_keep"):
        for folder in folders.of_run(config.stash[RUN_KEY]):
            for line in folders.lines(folder / "machines"):
                terminalreporter.write_line(f"kept until the next run: {line.split()[0]}")


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Delete everything that the run created and did not delete, once all workers have ended."""
    signals = config.stash[SIGNALS_KEY]
    signals.over = True
    engine = config.stash.get(ENGINE_KEY, None)
    if engine is not None:
        engine.close()
    kept = config.getoption("orbstack_keep", default=False)
    if not kept and not hasattr(config, "workerinput"):
        for folder in folders.of_run(config.stash[RUN_KEY]):
            from pyinfra_orbstack.testing.engine import delete_all

            delete_all(folder)
    signals.end()


# Fixtures --------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def orbstack_machines(request: pytest.FixtureRequest) -> MachineFactory:
    """Create machines. Without ``with`` a machine lives until the run ends.

    **Returns:** what creates machines

    **Example:**

    .. code:: python

        def test_site(orbstack_machines):
            with orbstack_machines(groups=["web"]) as machine:
                machine.assert_idempotent("deploy.py")
    """
    from pyinfra_orbstack.testing.engine import Engine
    from pyinfra_orbstack.testing.machines import MachineFactory

    stash = request.config.stash
    if ENGINE_KEY not in stash:
        stash[ENGINE_KEY] = Engine(request.config, stash[RUN_KEY])
    return MachineFactory(stash[ENGINE_KEY])


@pytest.fixture
def orbstack_machine(orbstack_machines: MachineFactory) -> Iterator[Machine]:
    """A fresh machine for one test.

    **Returns:** the machine, which runs

    **Example:**

    .. code:: python

        def test_deploy(orbstack_machine):
            orbstack_machine.assert_idempotent("deploy.py")
    """
    with orbstack_machines() as machine:
        yield machine


@pytest.fixture(scope="session")
def orbstack_containers(request: pytest.FixtureRequest) -> Iterator[ContainerFactory]:
    """Create containers. Without ``with`` a container lives until the run ends.

    **Returns:** what creates containers

    **Example:**

    .. code:: python

        def test_tools(orbstack_containers):
            with orbstack_containers("debian:13") as container:
                container.assert_idempotent("deploy.py")
    """
    from pyinfra_orbstack.testing.containers import ContainerFactory

    factory = ContainerFactory(request.config.rootpath)
    yield factory
    factory.delete_all()
