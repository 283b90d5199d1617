"""The cost of the simulator: `create`, and `run ... true`, compared with a bare ``unshare true``.

    python benchmarks/simulator.py [--times N]

Prints medians in milliseconds, and ratios, which are more meaningful than times on a machine like a
CI runner. Requires root, or sudo without a password, and leaves nothing behind.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

#: How pip's console script calls it.
SIMULATOR = [
    sys.executable,
    "-c",
    "import sys; from orbctl_simulator.__main__ import main; sys.exit(main())",
]


def timed(command: list[str]) -> float:
    """Run a command that must succeed; return its duration in milliseconds."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return (time.perf_counter() - started) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=30, help="repetitions of each (20 at least)")
    times = max(20, parser.parse_args().times)
    taken: dict[str, list[float]] = {}

    def measure(name: str, command: list[str]) -> None:
        taken.setdefault(name, []).append(timed(command))

    sudo = ["sudo", "-n"] if os.geteuid() else []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ORBCTL_SIMULATOR_HOME"] = folder
        layers = Path(__file__).resolve().parent.parent / ".cache" / "simulator-layers"
        os.environ.setdefault("ORBCTL_SIMULATOR_CACHE", str(layers))
        # `benchmarks.boots` measures machines that boot.
        os.environ.update(ORBCTL_SIMULATOR_INIT="none", ORBCTL_SIMULATOR_IMAGES="host")
        try:
            timed([*SIMULATOR, "create", "debian", "warm"])
            # Alternately, so that other load on the host affects all of them equally.
            for number in range(times):
                measure("unshare true", [*sudo, "unshare", "true"])
                measure("python -c pass", [sys.executable, "-c", "pass"])
                measure("run true", [*SIMULATOR, "run", "-m", "warm", "true"])
                measure("create", [*SIMULATOR, "create", "debian", f"made-{number}"])
                measure("clone", [*SIMULATOR, "clone", "warm", f"copy-{number}"])
                measure("delete", [*SIMULATOR, "delete", "-f", f"made-{number}"])
        finally:
            timed([*SIMULATOR, "delete", "--all", "--force"])
            if sudo:
                subprocess.run([*sudo, "rm", "-rf", folder], check=False)
                os.makedirs(folder)
    medians = {name: statistics.median(values) for name, values in taken.items()}
    bare = medians["unshare true"]
    print(f"{'median of ' + str(times):<16}{'ms':>8}{'x unshare true':>16}")
    for name, median in medians.items():
        print(f"{name:<16}{median:>8.1f}{median / bare:>16.1f}")


if __name__ == "__main__":
    main()
