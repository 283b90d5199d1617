"""What the workers of a run prepare once for all of them."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

#: Names the directory that separate runs share; noxfile.py sets it, too, for `make compat`.
VARIABLE = "SHARED_DIRECTORY"


def is_shared(config: pytest.Config) -> bool:
    """Whether other processes need the same things as this one.

    xdist's own variable does not tell: runs that a test starts inherit it.
    """
    return hasattr(config, "workerinput") or VARIABLE in os.environ


def prepared(directory: Path, name: str, make: Callable[[Path], object]) -> Path:
    """A file in a shared directory, which the first process that needs it makes."""
    path = directory / name
    with (directory / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            part = directory / f"part.{name}"
            make(part)
            part.rename(path)
    return path
