"""Machines for the connector's own tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pyinfra_orbstack import inventory
from pyinfra_orbstack.orbctl import Orbctl

PYINFRA = os.path.join(os.path.dirname(sys.executable), "pyinfra")
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(autouse=True)
def _fresh_listing() -> None:
    inventory.list_machines.cache.clear()


@pytest.fixture(scope="session")
def pair(machines, client: Orbctl) -> tuple[str, str]:  # type: ignore[no-untyped-def]
    """Two machines: the first runs, the second is stopped."""
    running, stopped = machines.create(), machines.create()
    client.stop(stopped)
    return running, stopped


@pytest.fixture
def pyinfra(tmp_path: Path, client: Orbctl) -> Run:
    """Run the pyinfra command in a temporary directory."""

    def run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [PYINFRA, "-y", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
            env={**os.environ, **env},
        )

    return run
