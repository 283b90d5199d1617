"""Shows how often pyinfra copies the data of a host's groups: for each argument of each operation.

    python group_data.py

Requires pyinfra 3.10 or later, and nothing else. Hosts of `@fake` run no commands, so all of the
time is pyinfra's own. Nothing of pyinfra is patched.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from pyinfra.api import Config, Inventory, State
from pyinfra.api.connect import connect_all
from pyinfra.api.operation import add_op
from pyinfra.api.operations import run_ops
from pyinfra.operations import server

OPERATIONS = 100


class Counted(dict):  # type: ignore[type-arg]
    """Data that counts how often it is copied into another dictionary."""

    copies = 0

    def __iter__(self) -> Iterator[str]:
        Counted.copies += 1
        return super().__iter__()

    keys = __iter__  # type: ignore[assignment]


def deploy(groups: int, values: int, kind: type[dict[str, int]]) -> float:
    """Run operations without arguments on a host in these groups; return the CPU seconds."""
    data = {
        f"group {group}": kind({f"{group} {n}": n for n in range(values)})
        for group in range(groups)
    }
    members = {name: (["@fake/web"], each) for name, each in data.items()}
    host = ("@fake/web", {"fake_delay": 0.0, "fake_delay_jitter": 0.0})
    state = State(Inventory(([host], {}), **members), Config())
    connect_all(state)
    Counted.copies = 0
    begun = time.process_time()
    for number in range(OPERATIONS):
        add_op(state, server.shell, name=f"shell {number}", commands=["true"])
    run_ops(state)
    return time.process_time() - begun


if __name__ == "__main__":
    print("groups  values of each  copies of each per operation  ms per operation")
    for groups, values in ((1, 0), (1, 10), (10, 10), (10, 100)):
        deploy(groups, values, Counted)
        copies = Counted.copies // OPERATIONS // groups
        taken = min(deploy(groups, values, dict) for _ in range(3)) / OPERATIONS * 1000
        print(f"{groups:6}  {values:14}  {copies:28}  {taken:16.2f}")
