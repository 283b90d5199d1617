"""Machines for every suite: OrbStack if it is installed, otherwise the simulator."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from pyinfra_orbstack import orbctl, programs
from pyinfra_orbstack.orbctl import Orbctl, OrbctlError
from pyinfra_orbstack.testing import Engine, MachineFactory, unavailable

from . import sharing
from .containers import Containers, Unavailable, engine

if TYPE_CHECKING:
    from .sshd import Sshd

ROOT = Path(__file__).parent.parent
# These tests do not depend on the image: the host's root is available at once, without init.
os.environ.setdefault("ORBCTL_SIMULATOR_IMAGES", "host")
os.environ.setdefault("ORBCTL_SIMULATOR_INIT", "none")
# Some examples start processes, which take as long as they take.
settings.register_profile("any host", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any host")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--conformance-report", type=Path, help="write what the conformance suite found"
    )
    parser.addoption(
        "--over-ssh",
        action="store_true",
        help="run the conformance suite as if this host were a Mac that ssh reaches",
    )


def pytest_configure(config: pytest.Config) -> None:
    # A run behind `nohup` or `&` ignores these signals, and so would all processes that it starts.
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    for number, handler in handlers.items():
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)
    path = config.getoption("--conformance-report")
    # A worker sees only a part of the results.
    if path is not None and not hasattr(config, "workerinput"):
        from .conformance.report import Report

        config.pluginmanager.register(Report(path, config.getoption("--orbstack")))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """By file, because the tests of a file share machines. Those of the conformance suite share
    some that are slow to create: `make test` runs its few on one worker, other targets by function.
    """
    from xdist.scheduler import LoadFileScheduling

    few = "not thorough" in config.getoption("markexpr")

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            if nodeid.startswith("tests/conformance/"):
                return "tests/conformance" if few else nodeid.partition("[")[0]
            return nodeid.partition("::")[0]

    return Scheduling(config, log) if config.getoption("dist") == "loadfile" else None


class Machines:
    """The plugin's machines by name, for tests that call `orbctl` themselves."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.client = engine.client
        self.record = engine.record
        self.prefix = f"pyinfra-test-{secrets.token_hex(3)}"
        self.made = 0

    def new_name(self) -> str:
        """A name that no other machine has."""
        self.made += 1
        return f"{self.prefix}-{self.made}"

    def number(self, name: str) -> int:
        """The number of one of our names, counted from 1; 0 for any other name."""
        prefix, _, number = name.rpartition("-")
        return int(number) if prefix == self.prefix and number.isdigit() else 0

    def own(self, name: str) -> orbctl.Machine:
        """Record a machine that a test has created, to be deleted at the end."""
        machine = self.client.info(name)
        self.record.add(machine, self.client)
        return machine

    def create(self, image: str = "ubuntu", **options: object) -> str:
        """Create a machine and return its name."""
        name = self.new_name()
        args = orbctl.create_args(name, image, **options)  # type: ignore[arg-type]
        return self.engine.create(name, args).name

    def load(self, archive: Path) -> str:
        """Import a machine and return its name."""
        name = self.new_name()
        self.engine.create(name, ["import", "--name", name, str(archive)])
        return name

    def clone(self, source: str) -> str:
        """Clone a machine, start the clone and return its name."""
        name = self.new_name()
        self.engine.create(name, orbctl.machine_args("clone", source, name))
        self.client.start(name)
        return name


@pytest.fixture
def root_only() -> None:
    """For tests that read the simulator's state directory, or need root on the host."""
    if os.geteuid():
        pytest.skip("needs root")


@pytest.fixture(scope="session")
def shared_directory(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Path:
    """For `sharing.prepared`."""
    if named := os.environ.get(sharing.VARIABLE):
        return Path(named)
    own = tmp_path_factory.getbasetemp()
    return own.parent if sharing.is_shared(request.config) else own


@pytest.fixture(scope="session")
def simulated() -> bool:
    """Whether `orbctl` is the simulator."""
    try:
        return programs.is_simulator(orbctl.find())
    except OrbctlError:
        return True


@pytest.fixture(scope="session")
def client(simulated: bool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orbctl]:
    """`orbctl`; processes that tests start use the same one."""
    patch = pytest.MonkeyPatch()
    if simulated:
        patch.setenv(orbctl.COMMAND_VARIABLE, programs.choose_orbctl("simulator"))
        patch.setenv("ORBCTL_SIMULATOR_HOME", str(tmp_path_factory.mktemp("simulator")))
        if "ORBCTL_SIMULATOR_CACHE" not in os.environ:
            patch.setenv("ORBCTL_SIMULATOR_CACHE", str(ROOT / ".cache" / "simulator-layers"))
    try:
        found = Orbctl()
        found.machines()
    except OrbctlError as reason:
        patch.undo()
        unavailable(str(reason))
    yield found
    patch.undo()


@pytest.fixture(scope="session")
def machines(client: Orbctl, orbstack_machines: MachineFactory) -> Machines:
    """A factory of machines, all deleted at the end of the run."""
    return Machines(orbstack_machines.engine)


@pytest.fixture(scope="session")
def containers() -> Iterator[Containers]:
    """A factory of containers, all removed at the end."""
    with contextlib.ExitStack() as stack:
        try:
            made = Containers(stack.enter_context(engine()))
        except Unavailable as reason:
            pytest.skip(str(reason))
        stack.callback(made.remove_all)
        yield made


@pytest.fixture(scope="session")
def small_image(containers: Containers, machines: Machines, client: Orbctl) -> str:
    """A small Debian."""
    return containers.pack("small", client, machines.create())


@pytest.fixture(scope="session")
def sshd(machines: Machines, client: Orbctl, simulated: bool) -> Iterator[Sshd]:
    """A machine that runs SSH servers on loopback ports of this host."""
    from .conformance.conftest import Guest
    from .sshd import Sshd

    if not simulated:
        pytest.skip("needs a machine that shares this host's network")
    name = machines.create()
    yield Sshd(Guest(client, name))
    client.stop(name)
