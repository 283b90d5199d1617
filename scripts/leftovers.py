"""Removes what a killed run left in its directory: machines, containers and mounts.

`noxfile.py` starts this as a module, with the Python of `.venv`, and removes the directory if it
succeeds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from pyinfra_orbstack import programs, testing
from pyinfra_orbstack.orbctl import Orbctl, OrbctlError, OrbctlMissing, Record
from tests import containers

#: Seconds that a command of the killed run may still need for a machine that it changes.
BUSY = 60
#: Prefix for commands that may need more rights: root owns even an ordinary user's simulator files.
RIGHTS = [] if os.geteuid() == 0 or sys.platform == "darwin" else ["sudo", "-n"]


def find(folder: Path, *words: str) -> list[Path]:
    """The results of `find` in a directory."""
    argv = [*RIGHTS, "find", str(folder), *words]
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return [Path(os.fsdecode(name)) for name in done.stdout.split(b"\0") if name]


def simulators(folder: Path) -> list[Path]:
    """State directories of simulators."""
    told = ("-exec", "test", "-e", "{}/../lock", ";")
    found = find(folder, "-type", "d", "-name", "machines", *told, "-prune", "-print0")
    return [path.parent for path in found]


def delete_machines(folder: Path) -> Iterator[str]:
    """Delete the machines of every simulator, and OrbStack machines that tests have recorded.

    Yields:
        Error messages.
    """
    for home in simulators(folder):
        simulator = programs.choose_orbctl("simulator")
        env = {**os.environ, "ORBCTL_SIMULATOR_HOME": str(home)}
        env.pop("ORBCTL_SIMULATOR_FAULTS", None)
        deadline = time.monotonic() + BUSY
        while True:
            done = subprocess.run(
                [simulator, "delete", "--all", "--force"], env=env, capture_output=True, text=True
            )
            if "invalid transition" not in done.stderr or time.monotonic() > deadline:
                break
            time.sleep(0.5)
        if done.returncode:
            yield f"machines of {home}: {done.stderr.strip()}"
    try:
        client = Orbctl(programs.choose_orbctl("real"))
    except OrbctlMissing:
        return
    for path in find(folder, "-type", "f", "-path", "*/record*/machines", "-print0"):
        try:
            Record(path).delete_all(client)
        except OrbctlError as problem:
            yield f"machines of {path}: {problem}"


def mounts(folder: Path) -> list[str]:
    """Mounts in a directory, the innermost first."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:  # a Mac
        return []
    points = (line.split()[4].encode().decode("unicode_escape") for line in lines)
    return sorted((one for one in points if folder in Path(one).parents), key=len, reverse=True)


def unmount(folder: Path) -> Iterator[str]:
    """Unmount file systems in a directory, whose content would be deleted with it."""
    for point in mounts(folder):
        subprocess.run([*RIGHTS, "umount", point], capture_output=True)
    for point in mounts(folder):
        yield f"still mounted: {point}"


def main() -> int:
    """Clear the directories given as arguments; print what remains."""
    status = 0
    for name in sys.argv[1:]:
        folder = Path(name).resolve()
        for end in (delete_machines, containers.sweep, unmount):
            for problem in end(folder):
                print(problem, file=sys.stderr)
                status = 1
    # Machines that the plugin has recorded, wherever its records are.
    testing.sweep()
    return status


if __name__ == "__main__":
    sys.exit(main())
