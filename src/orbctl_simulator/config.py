"""Settings: the default machine, whether OrbStack runs, and `config`."""

from __future__ import annotations

import os
import sys

from .shares import resolve
from .state import (
    Failure,
    Machine,
    everything,
    find,
    home,
    machines,
    profile,
    read_fields,
    rpc,
    write_fields,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .cli import Options

_DEFAULTS = {
    "app.start_at_login": "false",
    "cpu": str(os.cpu_count() or 1),
    "data_allow_backup": "false",
    "docker.expose_ports_to_lan": "true",
    "docker.node_name": "orbstack",
    "docker.set_context": "true",
    "k8s.enable": "false",
    "k8s.expose_services": "false",
    "machines.expose_ports_to_lan": "true",
    "machines.forward_ports": "true",
    "memory_mib": "8192",
    "mount_hide_shared": "false",
    "network.subnet4": "198.19.248.0/23",
    "network_bridge": "true",
    "network_proxy": "auto",
    "power.pause_in_sleep": "true",
    "rosetta": "true",
    "setup.use_admin": "true",
    "ssh.expose_port": "false",
}

# A machine's own keys: the field that stores each, its kind, and the version that added it.
_OF_MACHINES = {
    "cpu": ("cpu", "number", "2.2"),
    "disk_bytes": ("disk_bytes", "integer", "2.2"),
    "forward_ssh_agent": ("forward_ssh_agent", "switch", "2.1"),
    "isolate_network": ("isolate_network", "switch", "2.1"),
    "isolated": ("isolated", "switch", "2.1"),
    "memory_mib": ("memory_mib", "integer", "2.2"),
    "mounts": ("mounts", "list", "2.1"),
    "username": ("user", "text", "2.0"),
}

_HELP = """\
Change OrbStack settings.

Usage:
  {0} config [command]

Available Commands:
  docker      Edit Docker engine configuration
  get         Get a config value
  reset       Reset config to defaults
  set         Set a config option
  show        Show current configuration

Flags:
  -h, --help   help for config

Use "{0} config [command] --help" for more information about a command.
"""
_ARGUMENTS = {"docker": 0, "get": 1, "reset": 0, "set": 2, "show": 0}


def _load(name: str) -> dict[str, str]:
    try:
        return read_fields(os.path.join(home(), name))
    except FileNotFoundError:
        return {}


def _store(name: str, fields: dict[str, str]) -> None:
    os.makedirs(home(), mode=0o700, exist_ok=True)
    write_fields(os.path.join(home(), name), fields)


def default_machine() -> Machine | None:
    """The one that was set, otherwise the oldest one."""
    chosen = _load("default").get("id")
    known = list(machines())
    return next((m for m in known if m.id == chosen), known[0] if known else None)


def default(options: Options, words: list[str]) -> int:
    if not words:
        machine = default_machine()
        if machine is not None and _load("default").get("id") != "":
            print(machine.name)
        return 0
    _store("default", {"id": "" if words[0] == "none" else find(words[0]).id})
    return 0


def is_stopped() -> bool:
    return _load("power").get("state") == "stopped"


def wake() -> None:
    """Any command that needs OrbStack starts it; only `start` also starts its machines again."""
    if is_stopped():
        _store("power", {**_load("power"), "state": "running"})


def power_off(ended: list[Machine]) -> None:
    resume = "\t".join(machine.id for machine in ended)
    _store("power", {"state": "stopped", "resume": resume})


def take_resumed() -> list[Machine]:
    """The machines that ran when OrbStack was stopped; they are started again once."""
    resume = _load("power").get("resume", "").split("\t")
    _store("power", {"state": "running"})
    return [machine for machine in machines() if machine.id in resume]


def config(options: Options, words: list[str]) -> int:
    if not words or words[0] in ("help", "-h", "--help") or words[1:2] in (["-h"], ["--help"]):
        sys.stdout.write(_HELP.format(options.program))
        return 0
    verb, *rest = words
    if verb not in _ARGUMENTS:
        raise Failure(
            f'Error: unknown command "{verb}" for "{options.program} config"\n'
            f"Run '{options.program} config --help' for usage."
        )
    if len(rest) != _ARGUMENTS[verb]:
        raise Failure(f"Error: accepts {_ARGUMENTS[verb]} arg(s), received {len(rest)}")
    if verb == "docker":
        raise Failure("the simulator has no Docker engine")
    if verb == "reset":
        _store("settings", {})
    elif verb == "show":
        for key, value in sorted(_everything().items()):
            print(f"{key}: {value}")
    elif verb == "get":
        values = _everything()
        if rest[0] not in values:
            raise rpc(f"unknown config key: '{rest[0]}'")
        print(values[rest[0]])
    else:
        _set(*rest)
    return 0


def _everything() -> dict[str, str]:
    values = {**_DEFAULTS, **_load("settings")}
    for machine in machines():
        for key, (field, _, since) in _OF_MACHINES.items():
            if since <= profile():
                value = machine.fields.get(field, "")
                values[f"machine.{machine.name}.{key}"] = value.replace("\t", ",")
    return values


def _set(key: str, value: str) -> None:
    if key in _DEFAULTS:
        if _DEFAULTS[key] in ("true", "false"):
            value = _checked(key, value, "switch")
        with everything():
            _store("settings", {**_load("settings"), key: value})
        return
    name, _, last = key[len("machine.") :].rpartition(".")
    if not key.startswith("machine.") or last not in _OF_MACHINES or not name:
        raise rpc(f"unknown config key: '{key}'")
    field, kind, since = _OF_MACHINES[last]
    if since > profile():
        raise rpc(f"unknown config key: '{key}'")
    machine = find(name)
    value = _checked(key, value, kind)
    with machine.lock():
        machine.reload().fields[field] = value
        if field == "mounts":
            try:
                machine.fields["sources"] = resolve(machine.many("mounts"))
            except Failure as failure:
                raise rpc(f"config set '{key}': {failure}") from None
        machine.save()


def _checked(key: str, value: str, kind: str) -> str:
    from .values import check_user, cpus, is_count

    if kind == "switch" and value not in ("true", "false"):
        raise rpc(f"config set '{key}': not true or false: '{value}'")
    if kind == "integer" and not is_count(value):
        raise rpc(f"config set '{key}': not a number: '{value}'")
    try:
        if kind == "number":
            return cpus(value)
        if kind == "text":
            check_user(value)
    except Failure as failure:
        raise rpc(f"config set '{key}': {failure}") from None
    return value.replace(",", "\t") if kind == "list" else value
