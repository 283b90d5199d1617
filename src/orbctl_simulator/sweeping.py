"""Removing what a killed simulator left half created, half removed or half built."""

from __future__ import annotations

import os
import time

from .state import Lock, Machine, cache, everything, home, machines, read_fields

# Names of unfinished things end with one of these; the name of their lock adds another.
NEW, LOCK = ".new", ".lock"
#: How the name of a trial's directory begins, before its id, and the name of the lock in it.
TRIAL, TRIAL_LOCK = "trial-", "lock"


def discard(machine: Machine) -> None:
    """Hide it in one step, then remove it."""
    from .trees import remove

    if machine.boots:
        from .network import Network

        Network(home()).forget(machine.id)
    trash = os.path.join(home(), "trash")
    while os.path.exists(machine.path):
        os.makedirs(trash, mode=0o700, exist_ok=True)
        try:
            os.rename(machine.path, os.path.join(trash, machine.id))
        except FileNotFoundError:
            continue  # another process sweeps
    remove(os.path.join(trash, machine.id))
    try:  # noqa: SIM105 contextlib is slow to load
        os.rmdir(trash)
    except OSError:
        pass


def sweep() -> None:
    """Remove what killed calls left. Loads slow modules only if there is something to remove."""
    for machine in machines():
        if not machine.finished:
            _sweep_unfinished(machine)
    folder = os.path.join(home(), "machines")
    for name in _names_in(folder):
        if not os.path.exists(os.path.join(folder, name, "machine")):
            with everything():  # a machine gets its directory and its record under this lock
                if not os.path.exists(os.path.join(folder, name, "machine")):
                    discard(Machine(os.path.join(folder, name), {}))
    for place in (os.path.join(home(), "images"), cache(), os.path.join(cache(), "images")):
        for name in _names_in(place):
            if name.endswith(NEW):
                _sweep_new(os.path.join(place, name))
    gone = {*_names_in(os.path.join(home(), "network", "machines"))} - {*_names_in(folder)}
    if gone:
        from .network import Network

        Network(home()).sweep({*_names_in(folder)})
    for name in _names_in(home()):
        if name.startswith(TRIAL):
            _sweep_trial(name)
    trash = os.path.join(home(), "trash")
    if os.path.exists(trash):
        from .trees import remove

        remove(trash)


def _names_in(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _sweep_unfinished(machine: Machine) -> None:
    """Remove it unless it is being created. Its watcher may still be killing it for a moment."""
    died = os.path.exists(machine.file("doing")) and not machine.shown_transition()
    deadline = time.monotonic() + (5 if died else 0)
    try:
        while not _removed(machine) and time.monotonic() < deadline:
            time.sleep(0.01)
    except FileNotFoundError:
        pass


def _removed(machine: Machine) -> bool:
    with machine.lock(wait=False) as lock:
        if lock.held and "made" not in read_fields(machine.file("machine")):
            from .boot import halt

            halt(machine)
            discard(machine)
        return lock.held


def _sweep_new(path: str) -> None:
    with Lock(path + LOCK, wait=False) as lock:
        if lock.held:
            from .trees import remove

            remove(path)


def _sweep_trial(name: str) -> None:
    """Remove what is left of a trial of this host, unless it is still going on."""
    place = os.path.join(home(), name)
    try:
        # A trial gets its directory and its lock under the lock on everything.
        with everything(), Lock(os.path.join(place, TRIAL_LOCK), wait=False) as lock:
            if not lock.held:
                return
            from . import cgroups
            from .trees import remove

            try:  # noqa: SIM105 contextlib is slow to load
                cgroups.remove(name[len(TRIAL) :])
            except OSError:
                pass  # a host without control groups has none of this trial either
            remove(place)
    except (FileNotFoundError, NotADirectoryError):
        pass  # it has just ended
