"""Settings: the default machine, whether OrbStack runs, and `config`."""

from __future__ import annotations

import os

from .state import Machine, home, machines, read_fields, write_fields

TYPE_CHECKING = False
if TYPE_CHECKING:
    pass


def _load(name: str) -> dict[str, str]:
    try:
        return read_fields(os.path.join(home(), name))
    except FileNotFoundError:
        return {}


def _store(name: str, fields: dict[str, str]) -> None:
    os.makedirs(home(), mode=0o700, exist_ok=True)
    write_fields(os.path.join(home(), name), fields)


def default_machine() -> Machine | None:
    """The one that was set, else the oldest one."""
    chosen = _load("settings").get("default")
    known = list(machines())
    return next((m for m in known if m.id == chosen), known[0] if known else None)


def is_stopped() -> bool:
    return _load("power").get("state") == "stopped"


def wake() -> None:
    """Any command that needs OrbStack starts it; only `start` brings its machines back."""
    if is_stopped():
        _store("power", {**_load("power"), "state": "running"})


def power_off(ended: list[Machine]) -> None:
    resume = "\t".join(machine.id for machine in ended)
    _store("power", {"state": "stopped", "resume": resume})


def take_resumed() -> list[Machine]:
    """The machines that ran when OrbStack was stopped; they are brought back once."""
    resume = _load("power").get("resume", "").split("\t")
    _store("power", {"state": "running"})
    return [machine for machine in machines() if machine.id in resume]
