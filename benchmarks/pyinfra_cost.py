"""Shows what of a deploy's CPU time is pyinfra's own: samples of its process while it deploys.

    python -m benchmarks.pyinfra_cost [--hosts 1,10] [--operations 100]

A timer interrupts the process after some milliseconds of CPU time, and what it does is counted.
The machines' own work is not part of it. Requires root, or sudo without a password, as
`benchmarks.compare` does.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import FrameType

SECONDS = 0.001
#: What a sample counts as, in the order of the table.
IMPORTING = "starting: importing modules"
DATA = "pyinfra: looking up arguments in the data of hosts and groups"
PYINFRA = "pyinfra: everything else"
OURS = "this connector"
LOOP = "gevent's loop, in which both wait"
#: A function of pyinfra that asks the data of a host for each argument of an operation.
LOOKUP = "pop_global_arguments"


def kind(frame: FrameType | None) -> str:
    """What a process does, from its innermost function to the outermost."""
    found, names = "", set()
    while frame is not None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        names.add(name)
        if not found and "/pyinfra_orbstack/" in path:
            found = OURS
        elif not found and ("/pyinfra/" in path or "/pyinfra_cli/" in path):
            found = PYINFRA
        frame = frame.f_back
    if "_find_and_load" in names:
        return IMPORTING
    return DATA if found == PYINFRA and LOOKUP in names else found or LOOP


def sample(results: str, words: list[str]) -> None:
    """Run pyinfra in this process, and write how many samples there were of each kind."""
    seen: Counter[str] = Counter()

    def look(number: int, frame: FrameType | None) -> None:
        seen[kind(frame)] += 1

    signal.signal(signal.SIGPROF, look)
    signal.setitimer(signal.ITIMER_PROF, SECONDS, SECONDS)
    sys.argv = ["pyinfra", *words]
    try:
        runpy.run_path(str(Path(sys.executable).with_name("pyinfra")), run_name="__main__")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        Path(results).write_text(json.dumps([time.process_time(), seen]))


def main() -> None:
    from benchmarks.compare import HERE, bench
    from benchmarks.measurements import save
    from benchmarks.report import DATA

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", default="1,10", help="numbers of hosts at once, such as 1,10")
    parser.add_argument("--operations", type=int, default=100)
    parser.add_argument("--data", type=Path, default=DATA, help="file for the numbers")
    options = parser.parse_args()
    counts = [int(count) for count in options.hosts.split(",")]
    operations = {"shell": options.operations, "file": options.operations, "put": 1}
    with bench(("session",), max(counts), None, operations, containers=False) as made:
        env = {**os.environ, "PYINFRA_ORBSTACK_ORBCTL": str(made.folder / "bin" / "orbctl")}
        found: dict[str, dict[str, tuple[float, dict[str, int]]]] = {}
        for deploy in ("shell", "file"):
            shares: list[tuple[float, dict[str, int]]] = []
            for count in counts:
                folder, results = f"/var/tmp/{deploy}-{count}", made.folder / "samples"
                for machine in made.machines[:count]:
                    made.sh(machine, 'mkdir "$1"', folder)
                words = ["--data", f"count={options.operations}", "--data", f"folder={folder}"]
                subprocess.run(
                    [sys.executable, __file__, "--sample", str(results), "-y", *words]
                    + [str(made.folder / f"session-{count}.py")]
                    + [str(HERE / "deploys" / f"{deploy}.py")],
                    cwd=made.folder,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    check=True,
                )
                shares.append(json.loads(results.read_text()))
            found[f"{options.operations} x {deploy}"] = dict(zip(map(str, counts), shares))
            print(f"\n| {options.operations} x {deploy} | hosts: {' | '.join(map(str, counts))} |")
            print("|---|" + "---:|" * len(counts))
            for name in (IMPORTING, DATA, PYINFRA, OURS, LOOP):
                parts = [100 * seen.get(name, 0) / sum(seen.values()) for _, seen in shares]
                print(f"| {name} | {' | '.join(f'{part:.0f} %' for part in parts)} |")
            print(
                f"| CPU time | {' | '.join(f'{taken:.2f} s' for taken, _ in shares)} |", flush=True
            )
    save(options.data, pyinfra_cost={"deploys": found})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--sample"]:
        sample(sys.argv[2], sys.argv[3:])
    else:
        from pyinfra_orbstack.testing.signals import EndSignals

        EndSignals().begin()
        main()
