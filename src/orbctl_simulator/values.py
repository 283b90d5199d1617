"""Checks of the values in a machine's record, whether from flags, `config set` or an archive."""

from __future__ import annotations

from .light import is_name
from .state import Failure, shown

_MOST_CPUS = 100_000
# Limits of a share of a CPU: the kernel rejects smaller ones.
_LEAST_CPUS = 0.01
NO_MACHINE = "it is not a machine that the simulator exported"
#: The values that an image's architecture and variant can have.
ARCHES, VARIANTS = ("amd64", "arm64"), ("default", "cloud")


def check_user(name: str) -> None:
    if name[:1] in "0123456789.-" or not is_name(f"0{name}") or len(name) > 32:
        raise Failure(f"invalid user name: '{shown(name)}'")


def cpus(text: str) -> str:
    """A number of CPUs in the form of a record; 0 means no limit."""
    try:
        number = float(text)
    except ValueError:
        number = -1
    if not (number == 0 or _LEAST_CPUS <= number <= _MOST_CPUS):  # nor NaN
        raise Failure(f"invalid CPU limit: '{shown(text)}'")
    return f"{abs(number):g}"


def size(text: str, plain: int) -> int:
    """Bytes of ``4G``, ``512MiB`` or a bare number, in units of ``1 << plain``."""
    if not text:
        return 0
    import re

    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(?:i?B)?)?", text, re.IGNORECASE)
    if match:
        unit = 10 * (1 + "KMGT".index(match[2].upper())) if match[2] else plain
        number = float(match[1]) * (1 << unit)
        if number < 1 << 63:
            return int(number)
    raise Failure(f"invalid size: '{shown(text)}'")


def mebibytes(text: str) -> int:
    """The memory limit in MiB; 0 means no limit, so less than 1 MiB is an error."""
    number = size(text, 20)
    if number < 1 << 20 and any(digit in text for digit in "123456789"):
        raise Failure(f"less than 1 MiB: '{shown(text)}'")
    return number >> 20


def check_record(fields: dict[str, str]) -> None:
    """Check the fields of a record from elsewhere that commands show or compute with."""
    checks = {
        "distro": str.isprintable,
        "version": str.isprintable,
        "arch": ARCHES.__contains__,
        "variant": VARIANTS.__contains__,
        "init": ("", "image").__contains__,
        "memory_mib": is_count,
        "disk_bytes": is_count,
    }
    missing = {"name", "user", "distro", "version", "arch", "variant"} - fields.keys()
    if missing:
        raise Failure(NO_MACHINE)
    for key, is_valid in checks.items():
        if key in fields and not is_valid(fields[key]):
            raise Failure(f"damaged: its {key} is '{shown(fields[key])}'")
    check_user(fields["user"])
    cpus(fields.get("cpu") or "0")


def is_count(text: str) -> bool:
    """Whether it is a plain number that a machine's limit can be."""
    return text.isascii() and text.isdigit() and len(text) < 20
