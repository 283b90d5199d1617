"""The kernel's protection of directories that everyone may write to, such as /tmp."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

SYSCTLS = Path("/proc/sys/fs")


@contextlib.contextmanager
def protection(**values: int) -> Iterator[None]:
    """Set these sysctls of `fs` for the whole host, in one process of a run at a time."""
    files = {SYSCTLS / name: value for name, value in values.items()}
    if not all(os.access(file, os.W_OK) for file in files):
        pytest.skip("the kernel's protection of directories cannot be set here")
    with Path(tempfile.gettempdir(), "protection.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = {file: file.read_text() for file in files}
        try:
            for file, value in files.items():
                file.write_text(str(value))
            yield
        finally:
            for file, text in before.items():
                file.write_text(text)
