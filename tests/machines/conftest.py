"""Operations applied to the simulator through pyinfra's API, with a log of `orbctl` calls."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gevent
import pytest
from pyinfra.api import Config, Inventory, State
from pyinfra.api.connect import connect_all, disconnect_all
from pyinfra.api.exceptions import PyinfraError
from pyinfra.api.operations import run_ops
from pyinfra.context import ctx_host, ctx_state

from pyinfra_orbstack import orbctl

from ..conftest import Machines

_READING = ("info", "list", "logs", "ssh", "status", "version")


def changes(words: Sequence[str]) -> bool:
    """Whether a call of `orbctl` changes anything. `run` does: it starts stopped machines."""
    if words[0] == "config":
        return words[1] == "set"
    return words[0] not in _READING and list(words) != ["default"]


@dataclass
class Applied:
    """The result of one operation."""

    will_change: bool = False
    changed: bool = False
    error: str = ""
    log: str = ""
    calls: list[list[str]] = field(default_factory=list)
    failed_hosts: set[str] = field(default_factory=set)

    @property
    def changing(self) -> list[list[str]]:
        """The calls of `orbctl` that change something."""
        return [words for words in self.calls if changes(words)]


def read_calls(path: Path) -> list[list[str]]:
    """The calls in the simulator's log."""
    if not path.exists():
        return []
    return [json.loads(line)["argv"][1:] for line in path.read_text().splitlines()]


def status(pid: int) -> dict[str, str]:
    """A process's state, according to the kernel."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def kill_at(at: str, log: Path) -> None:
    """Kill the shell that calls `orbctl`, and its children, as in a crash."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for line in log.read_text().splitlines() if log.exists() else ():
            call = json.loads(line)
            if at in " ".join(call["argv"]) and call["exit"] is None:
                pids = [call["pid"]]
                # For a non-root user, the simulator runs as root, behind sudo.
                while (parent := int(status(pids[-1])["PPid"])) != os.getpid():
                    pids.append(parent)
                sudo = ["sudo", "-n"] if os.geteuid() else []
                subprocess.run([*sudo, "kill", "-KILL", *map(str, reversed(pids))], check=True)
                return
        gevent.sleep(0.02)


class Applier:
    """Applies operations to ``@local``, like a deploy."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def __call__(
        self, operation: Callable[..., Any], *args: Any, dry: bool = False, **kwargs: Any
    ) -> Applied:
        return self.all(lambda: operation(*args, **kwargs), dry=dry)

    def all(
        self,
        deploy: Callable[[], Any],
        *,
        dry: bool = False,
        hosts: Sequence[Any] = ("@local",),
        config: Config | None = None,
    ) -> Applied:
        """Apply a function that calls operations; return the result of the last one."""
        done = Applied()
        self.log.unlink(missing_ok=True)
        lines = _Lines()
        logging.getLogger("pyinfra").addHandler(lines)
        # Only a dry run looks for changes, as with `pyinfra -y`.
        state = State(Inventory((list(hosts), {})), config or Config(), check_for_changes=dry)
        metas = []
        try:
            connect_all(state)
            with ctx_state.use(state):
                for host in list(state.inventory):
                    with ctx_host.use(host):
                        metas.append((host, deploy()))
            if dry:
                done.will_change = any(meta.will_change for _, meta in metas if meta)
            else:
                run_ops(state)
        except PyinfraError as error:
            done.error = str(error)
        finally:
            with ctx_state.use(state):
                disconnect_all(state)
            logging.getLogger("pyinfra").removeHandler(lines)
        for _, meta in metas:
            if meta and meta.is_complete():
                done.changed = done.changed or meta.did_change()
                if not meta.did_succeed():
                    done.error = meta.stderr or done.error or "failed"
        done.failed_hosts = {host.name for host in state.failed_hosts}
        done.log = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(lines.texts))
        done.calls = read_calls(self.log)
        return done


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@pytest.fixture(autouse=True, scope="session")
def recorded(
    machines: Machines, simulated: bool, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Machines that operations create are recorded, and deleted at the end."""
    if not simulated:
        pytest.skip("these tests read the simulator's log")
    patch = pytest.MonkeyPatch()
    patch.setenv(orbctl.RECORD_VARIABLE, str(machines.record.path))
    patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
    logging.getLogger("pyinfra").setLevel(logging.INFO)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def apply_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Applier]:
    log = tmp_path_factory.mktemp("calls") / "log"
    patch = pytest.MonkeyPatch()
    patch.setenv("ORBCTL_SIMULATOR_LOG", str(log))
    yield Applier(log)
    patch.undo()


@pytest.fixture
def apply(apply_session: Applier) -> Applier:
    """Applies an operation and returns the result."""
    return apply_session


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Injects faults into calls of the simulator."""

    def spoil(**rule: Any) -> None:
        monkeypatch.setenv("ORBCTL_SIMULATOR_FAULTS", json.dumps([rule]))

    return spoil


@pytest.fixture(scope="session")
def base(machines: Machines) -> str:
    """A running machine that no test changes."""
    return machines.create("ubuntu:noble")


@pytest.fixture
def clone(machines: Machines, base: str) -> Iterator[str]:
    """A running machine for one test."""
    name = machines.clone(base)
    yield name
    # Many operations query every machine.
    if any(machine.name == name for machine in machines.client.machines()):
        machines.client.call("delete", "--force", name)
