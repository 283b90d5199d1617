"""One network for tests that do not change it, and a separate one for each of the others."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.simulator.network.virtual import (
    ROOT,
    Machine,
    Net,
    environment,
    is_online,
    other_host,
    stop,
)


@pytest.fixture(scope="session", autouse=True)
def _possible(tmp_path_factory: pytest.TempPathFactory) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to create namespaces")
    reason = Net(tmp_path_factory.mktemp("trial"))("available")
    if reason:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no network: {reason}")
    # Hosts that tests create cannot download the tools.
    code = "from orbctl_simulator import tools; tools.ensure()"
    subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT, check=True)


@pytest.fixture(scope="session")
def online() -> None:
    if not is_online():
        (pytest.fail if os.environ.get("CI") else pytest.skip)("deb.debian.org is not reachable")


@pytest.fixture(scope="session")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Net]:
    with Net(tmp_path_factory.mktemp("network") / "state, of: all") as made:
        yield made


@pytest.fixture(scope="session")
def web(net: Net) -> Machine:
    return net.join("web")


@pytest.fixture(scope="session")
def db(net: Net) -> Machine:
    return net.join("db")


@pytest.fixture(scope="session")
def alone(net: Net) -> Machine:
    return net.join("alone", isolated=True)


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Net]:
    with Net(tmp_path / "state") as made:
        yield made


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Hosts, and networks on them, that end with the test."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def apart(tmp_path: Path, stack: ExitStack) -> Net:
    """The network of a host of its own, where no other network takes the same addresses."""
    return stack.enter_context(Net(tmp_path / "state", stack.enter_context(other_host())))


@pytest.fixture
def servers() -> Iterator[list[subprocess.Popen[str]]]:
    """Servers on the host."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for server in started:
        stop(server)
