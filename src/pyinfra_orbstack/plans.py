"""The changes in pyinfra's JSON plan, without the arguments of operations."""

from __future__ import annotations

import contextlib
import json
import re
from importlib.metadata import version

#: The first pyinfra version that prints its plan as JSON.
FIRST = (3, 9)


class NoPlan(Exception):
    """pyinfra printed no plan; the text is one line."""


def check_version(installed: str | None = None) -> None:
    """Check that pyinfra can print its plan as JSON.

    Raises:
        NoPlan: It is too old.
    """
    installed = installed or version("pyinfra")
    if tuple(map(int, re.findall(r"\d+", installed)[:2])) < FIRST:
        first = ".".join(map(str, FIRST))
        raise NoPlan(f"this requires pyinfra {first} or later: upgrade it from {installed}")


def changes(printed: str) -> list[str]:
    """A line for each change in the output of ``pyinfra --dry --json``: host and operation.

    Operations with ``_if`` are left out: only a deploy shows whether they run.

    Raises:
        NoPlan: The output contains no plan.
    """
    plan = None
    for line in printed.splitlines():  # a deploy may print, too
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            plan = value["plan"] if isinstance(value, dict) and "plan" in value else plan
    if plan is None:
        raise NoPlan("pyinfra printed no plan: see its output above")
    return [
        " ".join(f"{host}: {', '.join(operation['names'])}".split())
        for operation in plan
        for host in operation["hosts_with_change"]
    ]
