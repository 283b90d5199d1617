"""Which executables to run: an `orbctl`, real or simulated, and the `pyinfra` of this Python."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from pyinfra_orbstack import orbctl

SIMULATOR = "orbctl-simulator"


def is_simulator(command: str) -> bool:
    """Whether this `orbctl` is the simulator."""
    return Path(command).name == SIMULATOR


def choose_orbctl(which: str = "auto") -> str:
    """Return the `orbctl` to use: real OrbStack if available, else the simulator.

    Args:
        which: ``real``, ``simulator``, or ``auto``, which honours `PYINFRA_ORBSTACK_ORBCTL`.

    Raises:
        OrbctlMissing: There is none of that kind.
    """
    if which == "simulator":
        beside = Path(sys.executable).with_name(SIMULATOR)
        found = str(beside) if beside.exists() else shutil.which(SIMULATOR)
        if not found:
            raise orbctl.OrbctlMissing(
                f"{SIMULATOR} not found beside {sys.executable}: reinstall it"
            )
        return found
    if which == "real":
        found = orbctl.find()
        if is_simulator(found):
            raise orbctl.OrbctlMissing(
                f"orbctl is the simulator: install OrbStack, or unset {orbctl.COMMAND_VARIABLE}"
            )
        return found
    if os.environ.get(orbctl.COMMAND_VARIABLE):
        return orbctl.find()
    try:
        return orbctl.find()
    except orbctl.OrbctlMissing:
        if sys.platform == "darwin":
            raise
        return choose_orbctl("simulator")


def settings(command: str) -> dict[str, str]:
    """The environment that another process needs to reach the same machines."""
    if not is_simulator(command):
        return {}
    names = ("ORBCTL_SIMULATOR_HOME", "ORBCTL_SIMULATOR_CACHE")
    kept = {name: os.environ[name] for name in names if os.environ.get(name)}
    return {orbctl.COMMAND_VARIABLE: command, **kept}


def pyinfra_argv(*words: str) -> list[str]:
    """The command line of the `pyinfra` that is installed beside this interpreter.

    It uses the script, not ``-m pyinfra``: before 3.10 that loads gevent first and patches it
    afterwards.
    """
    beside = Path(sys.executable).with_name("pyinfra")
    return [str(beside) if beside.exists() else "pyinfra", *words]
