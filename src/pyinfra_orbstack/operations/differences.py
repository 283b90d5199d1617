"""How a machine differs from its specification, and which differences can be changed."""

from __future__ import annotations

from typing import Any

from pyinfra import host, logger

from pyinfra_orbstack import orbctl
from pyinfra_orbstack.facts.orbstack import (
    CloudInitDigest,
    MachineData,
    OrbStackConfigValue,
)
from pyinfra_orbstack.operations.common import ask, is_at_least, require
from pyinfra_orbstack.operations.steps import log_change
from pyinfra_orbstack.specification import MachineSpec, same_image, same_mounts


def supported_settings(spec: MachineSpec) -> dict[str, str]:
    """The settings to apply to an existing machine; refused where OrbStack lacks them."""
    require(
        "2.1",
        isolated=spec.isolated,
        isolate_network=spec.isolate_network,
        mounts=spec.mounts,
        forward_ssh_agent=spec.forward_ssh_agent is not None,
    )
    require("2.2", **spec.limited)
    settings = spec.settings
    if settings and not spec.limited and not is_at_least("2.2"):
        # This version has no limits, so there are none to lift.
        settings = {}
    if spec.forward_ssh_agent is not None:
        settings["forward_ssh_agent"] = setting_text(spec.forward_ssh_agent)
    return settings


def find_differences(found: MachineData, spec: MachineSpec, digest: str) -> list[str]:
    """Differences that require a new machine. Only values known on both sides are compared."""
    compared: list[tuple[str, Any, Any]] = [
        ("arch", spec.arch, found["arch"]),
        ("isolated", spec.isolated, found["isolated"]),
        ("isolate_network", spec.isolate_network, found["isolate_network"]),
    ]
    if digest:
        known = ask(CloudInitDigest, machine_id=found["id"])
        compared.append(("SHA-256 of cloud_init", digest[:12], known[:12]))
    rows = [
        (what, value, have, None if have in (None, "") else value == have)
        for what, value, have in compared
    ]
    if spec.image is not None:
        distro, version = found["distro"], found["version"]
        same = same_image(spec.image, distro, version)
        rows.append(("image", spec.image, f"{distro}:{version}", same))
    if spec.mounts is not None:
        told = ""
        if found["isolated"]:
            told = ask(OrbStackConfigValue, key=orbctl.machine_key(found["name"], "mounts"))
        rows.append(("mounts", spec.mounts, told, same_mounts(spec.mounts, told)))

    differences = []
    for what, value, have, same in rows:
        if same is False and value is not None:
            differences.append(f"{what} is {have}, not {value}")
        elif same is None and value:
            warn_unknown(found, what, value, have)
    return differences


def warn_unknown(found: MachineData, what: str, value: Any, have: Any) -> None:
    """Warn about a value that cannot be compared."""
    logger.warning(
        f"{host.print_prefix}machine {found['name']}: {what} should be {value}, but "
        f"cannot be compared with what OrbStack reports: {have!r}"
    )


def has_user(found: MachineData, user: str) -> bool | None:
    """Whether this is a machine's default user; None if unknown."""
    key = orbctl.machine_key(found["name"], "username")
    have = found["username"]
    if user == have or user == (setting := ask(OrbStackConfigValue, key=key)):
        return True
    if not have and not setting:
        return None
    log_change(f"the default user of machine {found['name']} is {have or setting}, not {user}")
    return False


def changed_settings(name: str, settings: dict[str, str]) -> dict[str, str]:
    """The settings of a machine whose values differ from the requested ones."""
    changes = {}
    for setting, value in settings.items():
        have = ask(OrbStackConfigValue, key=orbctl.machine_key(name, setting))
        if not same_value(value, have):
            log_change(f"machine {name}: {setting} is {have or 'not set'}, not {value}")
            changes[setting] = value
    return changes


def setting_text(value: str | float | bool) -> str:
    """A setting in `orbctl`'s notation."""
    if not isinstance(value, (str, int, float)):
        raise orbctl.BadValue(f"a setting must be text, a number or a boolean, not {value!r}")
    return str(value).lower() if isinstance(value, bool) else str(value)


def same_value(wanted: str, have: str) -> bool:
    """Whether two settings mean the same; an empty one equals 0."""
    try:
        return float(wanted or 0) == float(have or 0)
    except ValueError:
        return wanted == have
