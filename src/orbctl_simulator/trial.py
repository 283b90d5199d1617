"""Finds out whether this host can boot machines, by building the world of an empty one."""

from __future__ import annotations

import os
import shutil

from . import cgroups, stored, userns
from .bootplan import Plan
from .light import suppress
from .state import Failure, Lock, everything, home, new_id
from .sweeping import TRIAL, TRIAL_LOCK
from .world import Builder

_DIRECTORIES = ("dev", "proc", "run", "sbin", "sys", "tmp")


def reason_of_host() -> str:
    """Why this host cannot boot machines, or nothing. Downloads missing tools if possible."""
    from . import tools
    from .network import available

    os.makedirs(home(), mode=0o700, exist_ok=True)
    reason = why_not() or available() or ""
    if not reason:
        try:
            tools.ensure()
        except Failure as failure:
            return str(failure)
    return reason


def why_not() -> str:
    """What prevents the boot of a machine, in one line, or an empty string."""
    if os.geteuid() != 0:
        return "needs root"
    ident = new_id()
    place = os.path.join(home(), f"{TRIAL}{ident}")
    lock = Lock(os.path.join(place, TRIAL_LOCK))  # while it is held, `sweep` leaves the place alone
    try:
        with everything():
            os.makedirs(place)
            lock.__enter__()
        for name in ("upper", "work", "root", *(f"lower/{name}" for name in _DIRECTORIES)):
            os.makedirs(os.path.join(place, name))
        os.close(os.open(os.path.join(place, "lower/sbin/init"), os.O_CREAT, 0o755))
        try:
            for path in (place, os.path.join(place, "upper"), os.path.join(place, "work")):
                stored.give_to_root(path)
        except OSError as error:
            return f"needs root with all ids of the host ({error.strerror})"
        reason = _reason(ident, place, lock.fd)
        return reason.replace(f"{place}/lower", home()).replace(place, home())
    except OSError as error:
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    finally:
        shutil.rmtree(place, ignore_errors=True)
        if lock.held:
            lock.__exit__()


def _reason(ident: str, place: str, lock: int) -> str:
    first, ids = userns.take_range()
    try:
        return _told(ident, place, lock, first)
    except OSError as error:
        return str(error)
    finally:  # also after Ctrl-C
        with suppress(OSError):  # a host without control groups
            cgroups.remove(ident)
        userns.release_range(first, ids)


def _told(ident: str, place: str, lock: int, first: int) -> str:
    spaces = userns.of_machine(first)
    answers, report = os.pipe()
    orders, control = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(control)
            os.close(lock)
            os.chdir(place)
            plan = Plan(ident, ["start", ".", place, place, "1", os.path.join(place, "lower")])
            plan.fields = {"name": "trial"}
            plan.first_id = first
            Builder(plan, report, orders, spaces).run()
        finally:
            os._exit(1)
    for fd in (report, orders, *spaces):
        os.close(fd)
    os.waitpid(pid, 0)
    os.close(control)  # the first process exits, because it has no supervisor
    with open(answers, errors="surrogateescape") as file:
        told = dict(line.rstrip("\n").partition(" ")[::2] for line in file)
    return "" if "built" in told else told.get("error", "the first process was killed")
