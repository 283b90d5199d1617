"""Queries to `orbctl` through a shell, on any host: calls of shell/facts.sh, and their parser."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pyinfra_orbstack import shelltext
from pyinfra_orbstack.answers import BadAnswer, OrbctlMissing, error_of
from pyinfra_orbstack.orbctl import COMMAND_VARIABLE

_ASKED = re.compile(r"orbctl: exit (\d+): ?(.*)")


def ask(*args: str, then: str = "") -> str:
    """A shell command that calls `orbctl` and reports everything about it, for `answers` to read.

    Args:
        args: The arguments.
        then: More shell text, in which ``ask ARGS...`` is another call.
    """
    return telling(shelltext.words("ask", *args) + then)


def telling(call: str) -> str:
    """A shell command that calls functions of facts.sh, for `answers` to read."""
    return shelltext.command(f"have_orbctl\n{call}")


def answer(lines: Sequence[str]) -> str:
    """`orbctl`'s output in that of a command from `ask`.

    Raises:
        OrbctlError: It is missing, failed, or was cut short.
    """
    return answers(lines, whole=True)[0]


def answers(lines: Sequence[str], *, whole: bool = False, accept: Sequence[int] = ()) -> list[str]:
    """The output of each of several calls of `orbctl`, without that of later calls that failed.

    Args:
        lines: The output of a command from `ask`.
        whole: There was one call, so text that looks like the end of a call is part of its output.
        accept: Exit statuses, besides 0, that do not count as failures.

    Raises:
        OrbctlError: It is missing, was cut short, or its first call failed.
    """
    if lines[-1:] == ["orbctl: missing"]:
        raise OrbctlMissing(
            "orbctl was not found on this host, neither on PATH nor in the directories of OrbStack "
            f"and Homebrew: install OrbStack there, or set {COMMAND_VARIABLE}"
        )
    found, text = [], []
    for number, line in enumerate(lines, 1):
        end = _ASKED.fullmatch(line)
        if end is None or (whole and number < len(lines)):
            text.append(line)
            continue
        status = int(end[1])
        if status == 0 or status in accept:
            found.append("\n".join(text))
        elif not found:
            raise error_of(end[2].replace("\t", "\n"), status)
        text = []
    if text or not found:
        raise BadAnswer("the output of orbctl was cut short: try again")
    return found
