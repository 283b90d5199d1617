"""A Mac on loopback whose machines are this host itself, to test the connection to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyinfra_orbstack import inventory
from pyinfra_orbstack.places import SSH_VARIABLE
from pyinfra_orbstack.testing import unavailable

from ..conformance.conftest import Remote
from ..loopback import MAC, Loopback, Unavailable, disconnect, loopback

HERE = Path(__file__).parent


class Mac:
    """The Mac, and the machines that its `orbctl` knows."""

    def __init__(self, folder: Path, server: Loopback) -> None:
        self.home = folder
        self.server = server
        self.machines = folder / "machines"

    def reset(self) -> None:
        """Restore one machine, and connect to the server directly."""
        disconnect()
        files = [self.home / "calls", self.home / "slow", self.server.bin / "docker"]
        for path in (*self.machines.iterdir(), *files):
            path.unlink(missing_ok=True)
        (self.machines / "web").write_text("01KHVDCW7HTAGRPMB823KADP9B\n")
        self.server.greet("")
        self.server.reach(self.server.port)
        self.server.provide("orbctl", str(HERE / "orbctl.sh"))

    def calls(self) -> list[str]:
        return (self.home / "calls").read_text().splitlines()


@pytest.fixture(scope="session")
def _mac(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mac]:
    home = tmp_path_factory.mktemp("remote")
    (home / "machines").mkdir()
    environment = {"ORBCTL_TEST_HOME": str(home), "XDG_STATE_HOME": str(home / "state")}
    try:
        with loopback(home / "server", environment) as server:
            yield Mac(home, server)
    except Unavailable as reason:
        unavailable(str(reason), "sshd")


@pytest.fixture
def mac(_mac: Mac, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mac]:
    """A Mac with the machine `web`."""
    monkeypatch.delenv(SSH_VARIABLE, raising=False)
    inventory.list_machines.cache.clear()
    inventory.list_containers.cache.clear()
    _mac.reset()
    yield _mac
    disconnect()


@pytest.fixture
def connect(mac: Mac) -> Iterator[Callable[..., Remote]]:
    """Connects to machines of the Mac, and disconnects at the end."""
    opened: list[Remote] = []

    def open_one(name: str = "web", **data: object) -> Remote:
        opened.append(Remote(name, **{"orbstack_ssh": MAC, **data}))
        return opened[-1].connect()

    yield open_one
    for remote in opened:
        remote.close()
