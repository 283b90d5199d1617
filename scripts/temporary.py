"""Temporary files of a run: in a folder of its own, which goes when the run ends, however it does.

A note of each folder lies in RUNS, and the run and all that it starts hold a lock on it. So the
next run, and `make clean`, find what a killed one has left.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import ending

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / ".cache" / "runs"

#: Puts an end to the machines, containers and mounts in a folder; False if something stays.
End = Callable[[Path], bool]
#: Names of the notes that are this process's.
_own: set[str] = set()


@contextlib.contextmanager
def files(end: End) -> Iterator[None]:
    """Have a folder for those of all programs, since pytest, uv and others leave some behind."""
    folder = Path(tempfile.gettempdir(), f"orb-{secrets.token_hex(4)}")
    RUNS.mkdir(parents=True, exist_ok=True)
    note = RUNS / folder.name
    with note.open("w") as file:
        # Whatever this process starts goes on with the lock, if this process alone is killed.
        fcntl.flock(file, fcntl.LOCK_EX)
        _own.add(note.name)
        ending.INHERITED.append(file.fileno())
        file.write(str(folder))
        file.flush()
        folder.mkdir(mode=0o700)
        before = os.environ.get("TMPDIR")
        os.environ["TMPDIR"] = str(folder)
        try:
            yield
        finally:
            os.environ.update({"TMPDIR": before} if before else {})
            if _discard(folder, end):
                note.unlink(missing_ok=True)
            _own.discard(note.name)
            ending.INHERITED.remove(file.fileno())


def sweep(end: End) -> list[Path]:
    """Remove what killed runs have left; return the notes of runs that go on, or left something."""
    return [note for note in RUNS.glob("*") if note.name not in _own and not _sweep(note, end)]


def _sweep(note: Path, end: End) -> bool:
    with contextlib.suppress(BlockingIOError, FileNotFoundError), note.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        folder = Path(file.read())
        # Half a note of a run that was killed before it had made anything.
        if re.fullmatch(r"orb-\w+", folder.name) and folder.exists():
            print(f"removing what a killed run left in {folder}", flush=True)
            if not _discard(folder, end):
                return False
        note.unlink()
    return not note.exists()


def _discard(folder: Path, end: End) -> bool:
    used = folder.exists() and any(path.is_dir() for path in folder.iterdir())
    if used and not end(folder):
        print(f"{folder} stays; `make clean` tries again", file=sys.stderr)
        return False
    remove(folder)
    return not folder.exists()


def remove(path: Path) -> None:
    """Delete a file or folder; what the simulator made for an ordinary user belongs to root."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    shutil.rmtree(path, ignore_errors=True)
    if path.exists():
        subprocess.run(["sudo", "-n", "rm", "-rf", "--", str(path)])
