"""The command lines of `orbctl`: all are built here, from checked words."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence

from pyinfra_orbstack.answers import BadValue

#: Words that have another meaning to `orbctl` than the name of a machine.
RESERVED_NAMES = frozenset({"all", "default", "docker", "k8s", "none"})
#: The architectures of machines.
ARCHS = ("arm64", "amd64")


def check_value(what: str, value: str) -> str:
    """Return ``value`` if it can be one argument of `orbctl`.

    Raises:
        BadValue: It is not text, is empty, begins with ``-``, or contains a character that no
            argument can contain.
    """
    if not isinstance(value, str):
        raise BadValue(f"{what} must be text, not {value!r}")
    if not value:
        raise BadValue(f"{what} must not be empty")
    if value.startswith("-"):
        raise BadValue(f"{what} {value!r} must not begin with '-': orbctl would read it as a flag")
    if re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", value):
        raise BadValue(f"{what} {value!r} must not contain a control character")
    if re.search(r"[\ud800-\udfff]", value):
        raise BadValue(f"{what} {value!r} must not contain a lone surrogate")
    return value


def check_name(name: str) -> str:
    """Return ``name`` if it can be the name of a machine.

    OrbStack's own rules are not documented, so this refuses only names that cannot be a hostname,
    or that have another meaning to `orbctl`.

    Raises:
        BadValue: The name is empty, reserved, begins with ``-``, or contains a space, a slash or a
            control character.

    >>> check_name("web-1")
    'web-1'
    """
    check_value("machine name", name)
    if name in RESERVED_NAMES:
        raise BadValue(f"machine name {name!r} is reserved by OrbStack: use another name")
    if re.search(r"[\s/]", name) or name in (".", ".."):
        raise BadValue(f"machine name {name!r} must not contain a space or a slash")
    return name


def check_id(machine_id: str) -> str:
    """Return ``machine_id`` if it can be the id of a machine, and thus of nothing else.

    Raises:
        BadValue: It cannot.
    """
    if not re.fullmatch(r"[0-9A-Za-z]+", check_value("machine id", machine_id)):
        raise BadValue(f"machine id {machine_id!r} must contain only letters and digits")
    return machine_id


def run_args(name: str, argv: Sequence[str], *, user: str | None = None) -> list[str]:
    """Arguments that run a command in a machine, which is started if it is stopped.

    They always include the working directory, since `orbctl` would use the caller's.
    """
    if argv[0].startswith("-"):
        raise BadValue(
            f"command {argv[0]!r} must not begin with '-': orbctl would read it as a flag"
        )
    as_user = ["-u", check_value("user", user)] if user else []
    return ["run", "-m", check_name(name), *as_user, "-w", "/", *argv]


def create_args(
    name: str,
    image: str,
    *,
    arch: str | None = None,
    user: str | None = None,
    cloud_init: str | None = None,
    cpus: str | float | None = None,
    memory: str | float | None = None,
    disk: str | float | None = None,
    isolated: bool = False,
    isolate_network: bool = False,
    mounts: Iterable[str] = (),
    forward_ssh_agent: bool = False,
) -> list[str]:
    """Arguments that create a machine.

    Args:
        name: Its name.
        image: ``DISTRO`` or ``DISTRO:VERSION``, such as ``ubuntu:noble``.
        arch: ``arm64`` or ``amd64``; None for the Mac's own.
        user: Default user; None for the Mac user.
        cloud_init: Path of a cloud-init file.
        cpus: Number of CPUs (OrbStack 2.2).
        memory: MiB, or a number with a unit such as ``4G`` (OrbStack 2.2).
        disk: A number with a unit such as ``64G`` (OrbStack 2.2).
        isolated: Share no files with the Mac (OrbStack 2.1).
        isolate_network: With ``isolated``: reach no other machine and no address of the Mac.
        mounts: ``SRC[:DEST]``, only with ``isolated``.
        forward_ssh_agent: For isolated machines, where it is off by default.

    Raises:
        BadValue: A value cannot be one argument, or flags exclude each other.
    """
    args = ["create"]
    for flag, value in (
        ("--arch", arch),
        ("--user", user),
        ("--user-data", cloud_init),
        ("--cpus", cpus),
        ("--memory", memory),
        ("--disk", disk),
    ):
        if value is not None:
            args += [flag, check_value(flag.lstrip("-"), str(value))]
    mounts = list(mounts)
    if not isolated and (isolate_network or mounts):
        raise BadValue("isolate_network and mounts require isolated")
    for flag, wanted in (
        ("--isolated", isolated),
        ("--isolate-network", isolate_network),
        ("--forward-ssh-agent", forward_ssh_agent),
    ):
        if wanted:
            args.append(flag)
    for mount in mounts:
        args += ["--mount", check_value("mount", mount)]
    return [*args, check_value("image", image), check_name(name)]


def machine_args(words: str, *names: str) -> list[str]:
    """Arguments of a command that takes only machines.

    >>> machine_args("stop --force", "web")
    ['stop', '--force', 'web']
    """
    if not names:
        raise BadValue(f"{words} requires a machine: without one it may act on all of OrbStack")
    return [*words.split(), *map(check_name, names)]


def info_args(name: str) -> list[str]:
    """Arguments that show one machine as JSON."""
    return [*machine_args("info", name), "--format", "json"]


def export_args(name: str, path: str) -> list[str]:
    """Arguments that export a machine to a file."""
    return [*machine_args("export", name), check_value("path", path)]


def import_args(path: str, name: str) -> list[str]:
    """Arguments that create a machine from an exported file."""
    return ["import", "--name", check_name(name), check_value("path", path)]


def config_args(key: str, value: str | None = None) -> list[str]:
    """Arguments that read or change a setting; an empty value clears it."""
    if re.search(r"\s", check_value("config key", key)):
        raise BadValue(f"config key {key!r} must not contain a space")
    if value is None:
        return ["config", "get", key]
    return ["config", "set", key, value and check_value(f"value of {key}", value)]


def machine_key(name: str, setting: str) -> str:
    """The config key of a machine's own setting, such as ``username`` or ``memory_mib``."""
    return f"machine.{check_name(name)}.{setting}"


def check_arch(arch: str) -> str:
    """Return ``arch`` if OrbStack supports it.

    Raises:
        BadValue: It does not.
    """
    if arch not in ARCHS:
        raise BadValue(f"arch must be {' or '.join(ARCHS)}, not {arch!r}")
    return arch


def check_image_form(key: str, image: str) -> str:
    """Return ``image`` if it has the form of an image.

    Raises:
        BadValue: It does not.

    >>> check_image_form("image", "centos:9-Stream")
    'centos:9-Stream'
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(:[A-Za-z0-9][\w.-]*)?", image, re.ASCII):
        raise BadValue(f"{key} must be DISTRO or DISTRO:VERSION, not {image!r}")
    return image


def limits(
    cpus: str | float | None = None,
    memory: str | float | None = None,
    disk: str | float | None = None,
) -> dict[str, str]:
    """The settings that limit a machine as `create_args` with these values does; 0 lifts a limit.

    Raises:
        BadValue: `orbctl create` would reject a value, or might misread it.

    >>> limits(cpus=2, memory="4G", disk="64G")
    {'cpu': '2', 'memory_mib': '4096', 'disk_bytes': '68719476736'}
    """
    found = {}
    if cpus is not None:
        if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", str(cpus)):
            raise BadValue(f"cpus must be a number such as 2, not {cpus!r}")
        found["cpu"] = f"{_finite('cpus', str(cpus)):g}"
    if memory is not None:
        size = _bytes("memory", memory, "4096 (MiB) or 4G", "M")
        if size % 1024**2:
            raise BadValue(f"memory must be a whole number of MiB, not {memory!r}")
        found["memory_mib"] = str(size >> 20)
    if disk is not None:
        found["disk_bytes"] = str(_bytes("disk", disk, "64G"))
    return found


def _bytes(what: str, value: str | float, example: str, plain: str = "") -> int:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([KMGT]?)", str(value).upper())
    if match is None or isinstance(value, bool):
        raise BadValue(f"{what} must be a size such as {example}, not {value!r}")
    unit, number = match[2] or plain, _finite(what, match[1])
    if not unit and number:
        raise BadValue(f"{what} requires a unit, as in {example}, not {value!r}")
    return int(number * 1024 ** (" KMGT".index(unit or " ")))


def _finite(what: str, digits: str) -> float:
    if float(digits) > 2**53:
        raise BadValue(f"{what} must be smaller, not {digits[:40]}")
    return float(digits)


def shell_line(args: Sequence[str]) -> str:
    """The command line for ``args``, as shown to the user."""
    return shlex.join(["orbctl", *args])
