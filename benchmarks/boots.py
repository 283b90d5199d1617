"""Compares machines that boot with systemd-nspawn: `create`, `run`, ten at once, and memory.

    python -m benchmarks.boots [--times N] [--data FILE]

`create` is compared with `systemd-nspawn --boot` of the same root file system, alternately, from
the start of the command until systemd reports that it is up. Both store what the machine writes on
the same disk. Requires root, and systemd-nspawn, which apt downloads if it is not installed. Adds
the numbers to the file that `benchmarks.compare` writes, as `boots`, and leaves nothing else
behind.
"""

from __future__ import annotations

import argparse
import compileall
import os
import shutil
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measurements import save
from benchmarks.report import DATA
from benchmarks.simulator import SIMULATOR, timed

IMAGE = "debian:bookworm"
STACK = (
    'mkdir "$1/u" "$1/w" "$1/m";'
    ' mount -t overlay -o "lowerdir=$2,upperdir=$1/u,workdir=$1/w" overlay "$1/m"; exec "$3"'
    ' -q -D "$1/m" --boot --register=no --keep-unit --private-network --notify-ready=yes'
    " >/dev/null 2>&1"
)


def nspawn(folder: Path) -> str:
    """The path of systemd-nspawn."""
    found = shutil.which("systemd-nspawn")
    if found is None:
        command = ["apt-get", "download", "-q", "-o", "APT::Sandbox::User=root"]
        subprocess.run([*command, "systemd-container"], cwd=folder, check=True, capture_output=True)
        (package,) = folder.glob("systemd-container_*.deb")
        subprocess.run(["dpkg", "-x", str(package), str(folder / "container")], check=True)
        found = str(folder / "container/usr/bin/systemd-nspawn")
    return found


def boot_with_nspawn(program: str, root: Path) -> float:
    """Milliseconds until systemd is up."""
    with tempfile.TemporaryDirectory() as place:
        path = f"{place}/notify"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        listener.bind(path)
        listener.settimeout(60)
        words = ["unshare", "-m", "sh", "-ec", STACK, "sh", f"{place}/all", str(root), program]
        os.mkdir(f"{place}/all")
        began = time.perf_counter()
        process = subprocess.Popen(words, env={**os.environ, "NOTIFY_SOCKET": path})
        try:
            while b"READY=1" not in listener.recv(4096).split(b"\n"):
                pass
            return (time.perf_counter() - began) * 1000
        finally:
            process.send_signal(signal.SIGTERM)  # shuts the container down
            process.wait(60)
            listener.close()


def memory(init: int) -> float:
    """MiB of all processes of a machine and its supervisor; shared pages count in proportion."""
    space, total = os.readlink(f"/proc/{init}/ns/pid"), 0
    supervisor = Path(f"/proc/{init}/stat").read_text().rpartition(") ")[2].split()[1]
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if entry.name == supervisor or os.readlink(entry / "ns/pid") == space:
                lines = (entry / "smaps_rollup").read_text().splitlines()
                total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        except OSError:
            continue
    return total / 1024


def ten_at_once() -> float:
    began = time.perf_counter()
    names = [f"ten-{number}" for number in range(10)]
    calls = [subprocess.Popen([*SIMULATOR, "create", IMAGE, name]) for name in names]
    assert [call.wait() for call in calls] == [0] * 10
    took = (time.perf_counter() - began) * 1000
    timed([*SIMULATOR, "delete", "-f", *names])
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=10, help="repetitions of each")
    parser.add_argument("--data", type=Path, default=DATA, help="file for the numbers")
    options = parser.parse_args()
    times = options.times
    if os.geteuid():
        print("machines that boot are left out: their processes and files can only be read by root")
        return
    # As pip leaves an installed package; a checkout has no bytecode of the code in machines.
    source = Path(__file__).resolve().parent.parent / "src" / "orbctl_simulator"
    compileall.compile_dir(str(source), quiet=1)
    taken: dict[str, list[float]] = {}

    def note(name: str, took: float) -> None:
        taken.setdefault(name, []).append(took)

    without = {**os.environ, "ORBCTL_SIMULATOR_INIT": "none"}
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder, "state")
        os.environ.update(ORBCTL_SIMULATOR_HOME=str(state), ORBCTL_SIMULATOR_INIT="image")
        without["ORBCTL_SIMULATOR_HOME"] = str(state)
        layers = Path(__file__).resolve().parent.parent / ".cache" / "simulator-layers"
        cache = Path(os.environ.setdefault("ORBCTL_SIMULATOR_CACHE", str(layers)))
        program = nspawn(Path(folder))
        try:
            timed([*SIMULATOR, "create", IMAGE, "warm"])
            subprocess.run([*SIMULATOR, "create", IMAGE, "plain"], env=without, check=True)
            (machine,) = (p for p in state.glob("machines/*") if "name=warm" in text(p / "machine"))
            init = int(text(machine / "pid").split()[0])
            base = text(machine / "machine").partition("\nimage=")[2].partition("\n")[0]
            stored, _, version = base.partition("@")
            root = cache / "images" / stored / version / ".files"
            for number in range(times):
                note("create", timed([*SIMULATOR, "create", IMAGE, f"made-{number}"]))
                timed([*SIMULATOR, "delete", "-f", f"made-{number}"])
                note("systemd-nspawn --boot", boot_with_nspawn(program, root))
                note("run true", timed([*SIMULATOR, "run", "-m", "warm", "true"]))
                plain = [*SIMULATOR, "run", "-m", "plain", "true"]
                note("run true, machine without init", timed(plain))
            note("create, ten at once", ten_at_once())
            idle = memory(init)
        finally:
            timed([*SIMULATOR, "delete", "--all", "--force"])
    medians = {name: statistics.median(values) for name, values in taken.items()}
    for name, median in medians.items():
        print(f"{name:<36}{median:>8.0f} ms")
    print(f"{'memory of an idle one':<36}{idle:>8.1f} MiB")
    ratio = medians["create"] / medians["systemd-nspawn --boot"]
    print(f"{'create : nspawn':<36}{ratio:>8.2f}")
    measured: dict[str, Any] = {
        "rounds": times,
        "seconds": {name: [round(one / 1000, 4) for one in each] for name, each in taken.items()},
        "memory": round(idle, 1),
    }
    save(options.data, boots=measured)


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


if __name__ == "__main__":
    main()
