"""Parsers for `orbctl`'s output: machines, settings and errors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any


class OrbctlError(Exception):
    """`orbctl` is missing, failed, or printed something invalid; the text is one line."""


class OrbctlMissing(OrbctlError):
    """No `orbctl` was found."""


class MachineNotFound(OrbctlError):
    """OrbStack has no machine of that name."""


class MachineExists(OrbctlError):
    """A machine of that name already exists."""


class BadAnswer(OrbctlError):
    """`orbctl` printed something that cannot be an answer."""


class BadValue(OrbctlError, ValueError):
    """A value that must not reach `orbctl`; nothing was run."""


@dataclass(frozen=True)
class Machine:
    """One machine as `orbctl list` and `orbctl info` show it.

    Attributes:
        id: ULID, which renames and restarts do not change.
        name: Name, also the guest's hostname.
        state: ``running`` and ``stopped`` are certain; anything else means busy.
        distro: Such as ``ubuntu``.
        version: The codename, such as ``noble``, whatever was typed at creation.
        arch: ``arm64`` or ``amd64``.
        variant: ``default``, or ``cloud`` if created with cloud-init.
        username: The default user.
        isolated: Whether it is cut off from the Mac's files; None if OrbStack does not report it.
        builtin: Whether it is one of OrbStack's own.
        record: The whole record, for values that only some versions of OrbStack report.
        ip4: IPv4 address, only from `info` of a running machine.
        ip6: IPv6 address, likewise.
        disk_size: Bytes used, only from `info`.
    """

    id: str
    name: str
    state: str
    distro: str = ""
    version: str = ""
    arch: str = ""
    variant: str = ""
    username: str = ""
    isolated: bool | None = None
    builtin: bool = False
    record: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    ip4: str | None = None
    ip6: str | None = None
    disk_size: int | None = None

    @property
    def running(self) -> bool:
        """Whether its state is ``running``."""
        return self.state == "running"

    @property
    def domain(self) -> str:
        """Its domain name, by which the Mac and other machines can reach it."""
        return f"{self.name}.orb.local"

    @property
    def created(self) -> datetime | None:
        """When it was created, read from the first ten characters of its ULID."""
        alphabet = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
        stamp = self.id[:10].upper()
        if len(self.id) != 26 or any(letter not in alphabet for letter in stamp):
            return None
        millis = 0
        for letter in stamp:
            millis = millis * 32 + alphabet.index(letter)
        try:
            return datetime.fromtimestamp(millis / 1000, tz=timezone.utc)
        except (ValueError, OverflowError, OSError):
            return None  # beyond the calendar


def _json(text: str, opening: str) -> Any:
    """Read the JSON in an answer, around which `orbctl` may print its update banner."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r"^\s*" + re.escape(opening), text, re.MULTILINE):
        try:
            return decoder.raw_decode(text, match.end() - 1)[0]
        except (ValueError, RecursionError):  # also a number that is too long for Python
            continue
    shown = " ".join(text.split())
    raise BadAnswer(f"orbctl did not print JSON: {shown[:120]!r}")


def _machine(record: Any, **extra: Any) -> Machine:
    if not isinstance(record, dict):
        raise BadAnswer(f"orbctl listed something that is not a machine: {record!r:.120}")
    for key in ("id", "name", "state"):
        if not isinstance(record.get(key), str) or not record[key]:
            raise BadAnswer(f"orbctl listed a machine without {key}: {record!r:.120}")
    image, config = record.get("image") or {}, record.get("config") or {}
    if not isinstance(image, dict) or not isinstance(config, dict):
        raise BadAnswer(f"orbctl listed a machine with an invalid image or config: {record!r:.120}")
    isolated = config.get("isolated")
    return Machine(
        id=record["id"],
        name=record["name"],
        state=record["state"],
        distro=str(image.get("distro") or ""),
        version=str(image.get("version") or ""),
        arch=str(image.get("arch") or ""),
        variant=str(image.get("variant") or ""),
        username=str(config.get("default_username") or ""),
        isolated=isolated if isinstance(isolated, bool) else None,
        builtin=record.get("builtin") is True,
        record=record,
        **extra,
    )


def parse_list(text: str) -> list[Machine]:
    """Read ``orbctl list --format json``.

    Raises:
        BadAnswer: It is not a list of machines, or names one twice.
    """
    machines = [_machine(record) for record in _json(text, "[")]
    names = [machine.name for machine in machines]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BadAnswer(f"orbctl listed {', '.join(twice)} twice")
    return [machine for machine in machines if not machine.builtin]


def parse_info(text: str) -> Machine:
    """Read ``orbctl info NAME --format json``; older versions print the bare record.

    Raises:
        BadAnswer: It does not describe a machine.
    """
    info = _json(text, "{")
    if "record" not in info:
        return _machine(info)
    size = info.get("disk_size")
    return _machine(
        info["record"],
        ip4=info.get("ip4") or None,
        ip6=info.get("ip6") or None,
        disk_size=size if isinstance(size, int) else None,
    )


def parse_version(text: str) -> str:
    """Read ``orbctl version``.

    Raises:
        BadAnswer: It contains no version.
    """
    match = re.search(r"^Version: (\d+\.\d+\S*)", text, re.MULTILINE)
    if match is None:
        raise BadAnswer(f"orbctl did not report its version: {text.strip()[:120]!r}")
    return match[1]


def parse_status(text: str) -> str:
    """Read ``orbctl status``: ``running``, ``starting`` or ``stopped``.

    Raises:
        BadAnswer: It is none of these.
    """
    match = re.search(r"^(Running|Starting|Stopped)\s*$", text, re.MULTILINE)
    if match is None:
        raise BadAnswer(f"orbctl did not report its status: {text.strip()[:120]!r}")
    return match[1].lower()


def parse_config(text: str) -> dict[str, bool | int | str]:
    """Read ``orbctl config show``.

    Raises:
        BadAnswer: It contains no setting.
    """
    lines = re.findall(r"^([a-z][^\s:]*):(?: (.*))?$", text, re.MULTILINE)
    if not lines:
        raise BadAnswer(f"orbctl printed no settings: {text.strip()[:120]!r}")
    return {key: _typed(value) for key, value in lines}


def parse_ssh(text: str) -> dict[str, bool | int | str]:
    """Read ``orbctl ssh``: the values after the colons, by the lower-case words before them.

    Lines that could be part of a key are dropped: the result includes only a key's path.

    Raises:
        BadAnswer: It contains no such line.
    """
    lines = re.findall(r"^\s*([A-Za-z][A-Za-z ]*):[ \t]*(\S.*)$", text, re.MULTILINE)
    if not lines:
        raise BadAnswer(f"orbctl printed no SSH details: {text.strip()[:120]!r}")
    return {
        key.lower().replace(" ", "_"): _typed(value.strip())
        for key, value in lines
        if not re.search(r"[A-Za-z0-9+/=]{60}|PRIVATE KEY", value)
    }


def parse_value(text: str) -> str:
    """Read a bare value, around which `orbctl` may print its update banner."""
    lines = [line.strip() for line in text.splitlines()]
    return "\n".join(line for line in lines if line and line[0] not in "╭│╰")


def _typed(value: str) -> bool | int | str:
    if value in ("true", "false"):
        return value == "true"
    return int(value) if value.isdecimal() else value


def error_of(stderr: str, status: int) -> OrbctlError:
    """Turn the output of a failed `orbctl` into one typed line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    # The number in "[-32098] ..." differs between versions; the words do not.
    said = next((line for line in lines if line.startswith("[-32")), lines[-1] if lines else "")
    text = re.sub(r"^\[-32\d+\]\s*", "", said) or f"exit code {status}, nothing on stderr"
    if re.search(r"machine not found|no machine found", text):
        return MachineNotFound(text)
    if "already exists" in text:
        return MachineExists(text)
    return OrbctlError(text)


def plain_lines(text: str) -> list[str]:
    """The lines visible on a terminal: no colours, no spinner frames, no update banner.

    >>> plain_lines("\\x1b[?25l\u2839 Creating\\r\u2838 Creating\\r\\x1b[Kubuntu is missing\\n")
    ['ubuntu is missing']
    """
    text = re.sub(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|.)", "", text)
    # Overwritten text is invisible, but a line that merely ends in a carriage return is complete.
    lines = (line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
    plain = ("".join(letter for letter in line if letter.isprintable()).strip() for line in lines)
    return [line for line in plain if line and not re.match("[\u2500-\u257f\u2800-\u28ff]", line)]
