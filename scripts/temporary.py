"""Temporary files of a run: in a separate directory, removed when the run ends, however it ends.

RUNS contains a note for each directory, and the run and all its child processes hold a lock on it.
So the next run, and `make clean`, find what a killed one has left.
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

#: Removes the machines, containers and mounts in a directory; False if something remains.
End = Callable[[Path], bool]
#: Names of this process's own notes.
_own: set[str] = set()


@contextlib.contextmanager
def files(end: End) -> Iterator[None]:
    """Provide a directory for temporary files, since pytest, uv and others leave some behind."""
    folder = Path(tempfile.gettempdir(), f"orb-{secrets.token_hex(4)}")
    RUNS.mkdir(parents=True, exist_ok=True)
    note = RUNS / folder.name
    with note.open("w") as file:
        # Child processes keep the lock if only this process is killed.
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
    """Remove killed runs' leftovers; return notes of runs that continue, or left something."""
    return [note for note in RUNS.glob("*") if note.name not in _own and not _sweep(note, end)]


def _sweep(note: Path, end: End) -> bool:
    with contextlib.suppress(BlockingIOError, FileNotFoundError), note.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        folder = Path(file.read())
        # An incomplete note, of a run that was killed before it had created anything.
        if re.fullmatch(r"orb-\w+", folder.name) and folder.exists():
            print(f"removing what a killed run left in {folder}", flush=True)
            if not _discard(folder, end):
                return False
        note.unlink()
    return not note.exists()


def _discard(folder: Path, end: End) -> bool:
    used = folder.exists() and any(path.is_dir() for path in folder.iterdir())
    if used and not end(folder):
        print(f"{folder} could not be removed: run `make clean` again", file=sys.stderr)
        return False
    remove(folder)
    return not folder.exists()


def remove(path: Path) -> None:
    """Delete a file or directory; root owns files that the simulator made for an ordinary user."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    shutil.rmtree(path, ignore_errors=True)
    if path.exists():
        subprocess.run(["sudo", "-n", "rm", "-rf", "--", str(path)])
