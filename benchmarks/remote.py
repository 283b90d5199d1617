"""Compares `@orbstack` on a remote Mac with `@ssh` to a server in the same machine.

    python -m benchmarks.remote [--rounds N] [--delay SECONDS] [--data FILE]

The Mac is a real sshd on loopback with the simulator behind it. Both connections go through a relay
(`benchmarks.relay`) that adds the delay, half of it in each direction. Adds the numbers to the file
that `benchmarks.compare` writes, as `remote`. Has the same requirements, and sshd.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
from pathlib import Path
from typing import Any

from benchmarks.compare import bench, in_turn
from benchmarks.measurements import save
from benchmarks.relay import relay
from benchmarks.report import DATA
from pyinfra_orbstack.testing.signals import EndSignals
from tests.loopback import MAC, loopback

ROOT = Path(__file__).resolve().parent.parent
#: How many times a command is run in each round.
COMMANDS = 20
STEPS = ("start and connect", "command", "upload", "download")


def measure(rounds: int, delay: float, count: int) -> dict[str, Any]:
    """Seconds of each step for each contender: the median of each round."""
    counts = dict.fromkeys(("put", "shell", "file", "commands"), 1)
    found: dict[str, dict[str, list[float]]] = {step: {} for step in STEPS}
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(bench(("ssh",), 1, None, counts, containers=False))
        kept = ("ORBCTL_SIMULATOR_", "PYTHONPATH")
        environment = {key: value for key, value in os.environ.items() if key.startswith(kept)}
        mac = stack.enter_context(loopback(made.folder / "mac", environment))
        mac.provide("orbctl", str(made.folder / "bin" / "orbctl"))
        mac.reach(stack.enter_context(relay(mac.port, delay / 2))[0])
        ((name, data),) = _hosts(made.folder / "ssh-1.py")
        port, _ = stack.enter_context(relay(data["ssh_port"], delay / 2))
        hosts: dict[str, tuple[str, dict[str, Any]]] = {
            "orbstack": (f"@orbstack/{made.machines[0]}", {"orbstack_ssh": MAC}),
            "ssh": (name, {**data, "ssh_port": port}),
        }
        for contender, host in hosts.items():
            (made.folder / f"{contender}-1.py").write_text(f"hosts = [{host!r}]\n")
        results = made.folder / "results"
        for number in range(rounds):
            for contender in in_turn(hosts, number):
                bare = made.pyinfra(contender, 1, "nothing")
                made.pyinfra(contender, 1, "remote", folder="/tmp", results=results, count=count)
                taken = {"start and connect": [bare], **json.loads(results.read_text())}
                for step in STEPS:
                    median = round(statistics.median(taken[step]), 4)
                    found[step].setdefault(contender, []).append(median)
                    print(f"round {number + 1}, {step}, {contender}: {median:.3f} s", flush=True)
    return {"delay": delay, "rounds": rounds, "steps": found}


def _hosts(path: Path) -> list[tuple[str, dict[str, Any]]]:
    values: dict[str, Any] = {}
    exec(path.read_text(), values)  # noqa: S102  (the benchmark's own)
    hosts: list[tuple[str, dict[str, Any]]] = values["hosts"]
    return hosts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--delay", type=float, default=0.05, help="seconds there and back")
    parser.add_argument("--commands", type=int, default=COMMANDS)
    parser.add_argument("--data", type=Path, default=DATA, help="file for the numbers")
    options = parser.parse_args()
    save(options.data, remote=measure(options.rounds, options.delay, options.commands))


if __name__ == "__main__":
    EndSignals().begin()
    main()
