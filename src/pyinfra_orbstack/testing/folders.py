"""A directory for each run: its machines, and how to reach the `orbctl` that manages them.

The processes of a run hold a shared lock on its directory, so a directory that can be locked
belongs to a crashed run.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


def root() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state, "pyinfra-orbstack", "tests")


@contextlib.contextmanager
def locked(path: Path, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, how)
        yield
    finally:
        os.close(fd)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def of_run(run: str = "*") -> list[Path]:
    return [path for path in root().glob(f"{run}-*") if path.is_dir()]
