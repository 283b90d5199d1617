"""Shell text for OrbStack hosts: a call, and the functions of shell/*.sh that it needs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path

FILES = ("record.sh", "machines.sh", "facts.sh", "place.sh")

#: Where OrbStack and Homebrew install `orbctl` and `docker`, for processes with a short PATH.
KNOWN_FOLDERS = (
    "/usr/local/bin",
    "/opt/homebrew/bin",
    "~/.orbstack/bin",
    "/Applications/OrbStack.app/Contents/MacOS/bin",
)


@cache
def functions() -> dict[str, str]:
    """The functions of those files by name, without comments."""
    found = {}
    for name in FILES:
        text = (Path(__file__).parent / "shell" / name).read_text(encoding="utf-8")
        for match in re.finditer(r"^(\w+)\(\) (?:\{\n.*?^\}|\(\n.*?^\))$", text, re.M | re.S):
            found[match[1]] = re.sub(r"^[ \t]*(#.*\n)?", "", match[0], flags=re.MULTILINE)
    return found


def library(call: str) -> str:
    """The functions that shell text calls, directly or indirectly."""
    known, needed, new = functions(), set[str](), [call]
    while new:
        words = set(re.findall(r"\w+", new.pop()))
        more = words & known.keys() - needed
        needed |= more
        new += [known[name] for name in more]
    return "".join(f"{known[name]}\n" for name in known if name in needed)


def command(call: str) -> str:
    """A shell command in which ``$orbctl`` is OrbStack's, wherever the host has it."""
    # `PYINFRA_ORBSTACK_ORBCTL` applies if the shell has it: a local shell inherits our environment.
    call = f"{words('find_orbctl', *KNOWN_FOLDERS)}\n{call}"
    return f"{library(call)}{call}"


def words(*argv: str | int) -> str:
    """A call of a function; every argument is quoted."""
    return shlex.join(map(str, argv))


def mac_path(path: str) -> str:
    """A word for a path on the OrbStack host, where ``~`` is the user's home."""
    return '"$HOME"' + shlex.quote(path[1:]) if re.match("~(/|:|$)", path) else shlex.quote(path)


def mac_words(argv: Sequence[str]) -> str:
    """Words in which a leading ``~`` marks paths on the OrbStack host."""
    return " ".join(map(mac_path, argv))
