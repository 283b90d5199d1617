"""The cost of many hosts at once: time to connect, open files and memory of pyinfra's process.

    python -m benchmarks.many [--hosts 1,10,50] [--rounds N] [--data FILE]

Every host is a machine of the simulator, and gets an upload that is checked. Prints a table; with
``--data`` it also saves the numbers. Requires root, or sudo without a password, and leaves nothing
else behind.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from benchmarks.compare import Bench, bench
from benchmarks.measurements import save
from benchmarks.report import DATA

#: Bytes of the upload: more than a session carries.
SIZE = 100_000


def measure(made: Bench, hosts: int, number: int) -> dict[str, float]:
    """Connect to some hosts, upload to all of them, and return what it took."""
    folder, results = f"/var/tmp/many-{number}", made.folder / f"many-{number}"
    for machine in made.machines[:hosts]:
        made.sh(machine, 'mkdir "$1"', folder)
    begun = time.time()
    taken = made.pyinfra("session", hosts, "many", folder=folder, results=results, size=SIZE)
    for machine in made.machines[:hosts]:
        if made.sh(machine, 'wc -c <"$1"', f"{folder}/put").strip() != str(SIZE):
            raise SystemExit(f"the upload to {machine} did not arrive")
    found: dict[str, float] = json.loads(results.read_text())
    found["connected"] -= begun
    return {**found, "seconds": taken}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hosts", default="1,10,50", help="numbers of hosts at once")
    parser.add_argument("--data", type=Path, default=DATA, help="file for the numbers")
    options = parser.parse_args()
    counts = [int(count) for count in options.hosts.split(",")]
    many: dict[str, dict[str, list[float]]] = {}
    with bench(("session",), max(counts), None, {"put": 0}, containers=False) as made:
        for number in range(options.rounds * len(counts)):
            hosts = counts[number % len(counts)]
            for key, value in measure(made, hosts, number).items():
                many.setdefault(str(hosts), {}).setdefault(key, []).append(round(value, 3))
    print(f"{'hosts':<8}{'connected':>12}{'all':>9}{'files':>8}{'most':>8}{'memory':>10}")
    for name, values in many.items():
        one = {key: statistics.median(each) for key, each in values.items()}
        print(
            f"{name:<8}{one['connected']:>10.2f} s{one['seconds']:>7.2f} s{one['files']:>8.0f}"
            f"{one['most_files']:>8.0f}{one['memory'] / 2**20:>6.0f} MiB"
        )
    save(options.data, many=many)


if __name__ == "__main__":
    main()
