"""Commands that only show something: `list`, `info`, `status`, `version` and others."""

from __future__ import annotations

import json
import os
import sys

from .config import is_stopped, wake
from .state import Failure, Machine, find, home, machines, profile, say
from .sweeping import sweep
from .trees import disk_usage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .cli import Options

_VERSIONS = {
    "2.0": ("2.0.5", "2000500"),
    "2.1": ("2.1.1", "2010100"),
    "2.2": ("2.2.3", "2020300"),
}


def record(machine: Machine) -> dict[str, object]:
    config: dict[str, object] = {"isolated": machine.on("isolated")}
    if profile() >= "2.1":
        config["forward_ssh_agent"] = machine.on("forward_ssh_agent")
        config["isolate_network"] = machine.on("isolate_network")
    config["default_username"] = machine.user
    if profile() >= "2.1":
        config.update(http_port=0, https_port=0)
    image = {key: machine.fields[key] for key in ("distro", "version", "arch", "variant")}
    return {
        "id": machine.id,
        "name": machine.name,
        "image": image,
        "config": config,
        "builtin": False,
        "state": machine.state,
    }


def addresses(machine: Machine) -> tuple[str, str]:
    """A machine's addresses, which never change. Without init, nothing answers there."""
    if machine.boots:
        from .network import Network

        its = Network(home()).addresses(machine.id)
        return (its.ip4, its.ip6) if its else ("", "")
    from hashlib import sha256

    raw = sha256(machine.id.encode()).digest()
    ip4 = f"192.168.{138 + raw[0] % 2}.{2 + raw[1] % 250}"
    groups = ":".join(raw[i : i + 2].hex().lstrip("0") or "0" for i in (2, 4, 6, 8))
    return ip4, f"fd07:b51a:cc66:0:{groups}"


def disk_size(machine: Machine) -> int:
    """The size of the machine's changes, without the shared base."""
    return disk_usage(machine.upper)


def _wants_json(options: Options) -> bool:
    wanted = options.text("format") or "text"
    if wanted not in ("text", "json"):
        raise Failure(f"unknown format: {wanted}")
    return wanted == "json"


def list_(options: Options, _: list[str]) -> int:
    wake()
    sweep()
    as_json = _wants_json(options)
    shown = list(machines())
    if options.on("running"):
        shown = [machine for machine in shown if machine.state == "running"]
    if options.on("quiet"):
        sys.stdout.write("".join(machine.name + "\n" for machine in shown))
    elif as_json:
        sys.stdout.write(json.dumps([record(machine) for machine in shown], indent=2) + "\n")
    else:
        _print_table(shown)
    return 0


def _print_table(shown: list[Machine]) -> None:
    head = ("NAME", "STATE", "DISTRO", "VERSION", "ARCH", "SIZE", "IP")
    rows = [head, tuple("-" * len(title) for title in head)] if sys.stdout.isatty() else []
    for machine in shown:
        state = machine.state
        image = tuple(machine.fields[key] for key in ("distro", "version", "arch"))
        ip4 = addresses(machine)[0] if state == "running" else ""
        rows.append((machine.name, state, *image, _human(disk_size(machine)), ip4))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def _human(size: float) -> str:
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def info(options: Options, words: list[str]) -> int:
    wake()
    as_json = _wants_json(options)
    machine = find(words[0])
    if not machine.finished:
        sweep()  # the process that creates it may have died
        machine = find(words[0])
    told: dict[str, object] = {"record": record(machine), "disk_size": disk_size(machine)}
    ip4, ip6 = addresses(machine)
    if machine.state == "running":
        told.update(ip4=ip4, ip6=ip6)
    if as_json:
        sys.stdout.write(json.dumps(told, indent=2) + "\n")
        return 0
    fields = machine.fields
    print(f"ID: {machine.id}\nName: {machine.name}\nState: {machine.state}")
    print(f"Distro: {fields['distro']}\nVersion: {fields['version']}")
    print(f"Architecture: {fields['arch']}\nSize: {_human(disk_size(machine))}")
    if machine.state == "running":
        print(f"IPv4: {ip4}\nIPv6: {ip6}")
    return 0


def status(options: Options, _: list[str]) -> int:
    print("Stopped" if is_stopped() else "Running")
    return 1 if is_stopped() else 0


def version(options: Options, _: list[str]) -> int:
    number, build = _VERSIONS[profile()]
    print(f"Version: {number} ({build})\nCommit: {'0' * 40} (v{number})")
    return 0


def ssh(options: Options, _: list[str]) -> int:
    """Print OrbStack's details, for scripts that read the port. Nothing listens there."""
    print("Host: 127.0.0.1\nPort: 32222\nUser: default\nIdentityFile: ~/.orbstack/ssh/id_ed25519")
    say("the simulator has no SSH server: use `run`")
    return 0


def logs(options: Options, words: list[str]) -> int:
    path = find(words[0]).file("console")
    if os.path.exists(path):  # a clone that never ran has none
        with open(path, encoding="utf-8", errors="replace") as file:
            sys.stdout.write(file.read())
    return 0
