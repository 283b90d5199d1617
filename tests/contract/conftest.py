"""One `orbctl` for the whole suite: the one in the variable ORBCTL, otherwise the simulator.

``ORBCTL=orbctl`` runs the same tests against OrbStack on a Mac. Every machine gets a random prefix
and is recorded with its id when it is created; nothing else is ever deleted.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.contract.program import Program

ROOT = Path(__file__).resolve().parents[2]
IMAGE = "debian"
#: How sure each fact is, as its test's marker `fact` says. The suite was not run on a Mac yet.
SOURCES = {
    "recorded": "it was seen in real output of OrbStack",
    "documented": "OrbStack's documentation or a maintainer says so",
    "inferred": "it is a deduction, so OrbStack may behave differently",
    "conflict": "sources disagree, and the connector has to work either way",
}


def source_of(item: pytest.Item) -> str:
    marker = item.get_closest_marker("fact")
    if marker is None or marker.args not in [(word,) for word in SOURCES]:
        words = ", ".join(SOURCES)
        raise pytest.UsageError(f"{item.nodeid}: mark it with pytest.mark.fact, one of: {words}")
    return f"{marker.args[0]}: {SOURCES[marker.args[0]]}"


def pytest_itemcollected(item: pytest.Item) -> None:
    source_of(item)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        report.sections.append(("How sure this fact is", source_of(item)))
    return report


class Made:
    """The machines that these tests have created."""

    def __init__(self, orb: Program) -> None:
        self.orb = orb
        self.prefix = f"contract-{secrets.token_hex(3)}"
        self._ids: list[str] = []

    def name(self) -> str:
        return f"{self.prefix}-{secrets.token_hex(2)}"

    def own(self, name: str) -> str:
        """Record a machine as ours."""
        self._ids.append(self.orb("info", name, "-f", "json").json["record"]["id"])
        return name

    def create(self, *flags: str, image: str = IMAGE) -> str:
        name = self.name()
        answer = self.orb("create", *flags, image, name)
        assert answer.code == 0, answer
        return self.own(name)

    def clone(self, source: str) -> str:
        """A stopped clone: the fastest way to get a new machine."""
        name = self.name()
        answer = self.orb("clone", source, name)
        assert answer.code == 0, answer
        return self.own(name)

    def delete_all(self) -> None:
        for record in self.orb("list", "-f", "json").json:
            if record["id"] in self._ids:
                self.orb("delete", "-f", record["name"])


@pytest.fixture(scope="session")
def simulated() -> bool:
    """Whether the simulator is being tested."""
    return not (os.environ.get("ORBCTL") or shutil.which("orbctl"))


@pytest.fixture(scope="session")
def orb(simulated: bool, tmp_path_factory: pytest.TempPathFactory) -> Program:
    env = {key: value for key, value in os.environ.items() if not key.startswith("ORBCTL_")}
    if not simulated:
        return Program([os.environ.get("ORBCTL") or "orbctl"], env)
    # Characters that people use in names of directories, and that mount options cannot contain.
    env["ORBCTL_SIMULATOR_HOME"] = str(tmp_path_factory.mktemp("state folder, no: 1") / "é")
    env["ORBCTL_SIMULATOR_CACHE"] = os.environ.get(
        "ORBCTL_SIMULATOR_CACHE", str(ROOT / ".cache" / "simulator-layers")
    )
    # The tests are about orbctl's answers, not about images.
    for name, value in (("IMAGES", "host"), ("INIT", "none")):
        variable = f"ORBCTL_SIMULATOR_{name}"
        env[variable] = os.environ.get(variable, value)
    program = Program([sys.executable, "-m", "orbctl_simulator"], env)
    trial = program("doctor")
    if trial.code != 0:
        reason = f"no machines on this host: {trial.out.decode()}{trial.err.decode()}"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    return program


@pytest.fixture(scope="session")
def made(orb: Program) -> Iterator[Made]:
    made = Made(orb)
    yield made
    made.delete_all()


@pytest.fixture(scope="session")
def machine(made: Made) -> str:
    """A running machine for tests that do not change it."""
    return made.create()


@pytest.fixture
def stopped(made: Made, machine: str) -> str:
    """A stopped machine for one test, a clone of the shared one."""
    return made.clone(machine)


@pytest.fixture(scope="session")
def isolated(orb: Program, made: Made) -> str:
    """A running machine without file sharing."""
    if not orb("version").text.startswith(("Version: 2.1", "Version: 2.2")):
        pytest.skip("isolated machines came with OrbStack 2.1")
    return made.create("--isolated")
