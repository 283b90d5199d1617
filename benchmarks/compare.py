"""Compares deploys through `@orbstack` with `@local`, `@ssh`, the previous version 0.11.0 and a
connector that does nothing (`floor`), and deploys to a container with pyinfra's `@docker`.

    python -m benchmarks.compare [--rounds N] [--hosts 1,10,50] [--predecessor ENVIRONMENT] ...

Everything runs on the same machines of one simulator, alternately, so that other load on the host
affects all of them equally. Every deploy's result is checked before its time counts. Requires root,
or sudo without a password; leaves nothing behind but the file with the numbers. Without a
container engine, containers are skipped. Numbers in that file that are not measured again stay
there, with their date.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.measurements import CONTAINER, FLOOR, merged
from benchmarks.report import DATA
from benchmarks.simulator import SIMULATOR, timed
from pyinfra_orbstack import docker
from pyinfra_orbstack.orbctl import Orbctl
from pyinfra_orbstack.testing.signals import EndSignals
from tests.containers import Containers, Unavailable, engine

HERE = Path(__file__).resolve().parent
LAYERS = HERE.parent / ".cache" / "simulator-layers"
SUDO = ["sudo", "-n"] if os.geteuid() else []
CONTENDERS = ("session", "spawn", "local", "ssh", "0.11.0", FLOOR)
#: The same deploys again, in a container.
IN_CONTAINERS = ("container", "docker")
#: More hosts than this take long, so fewer contenders and cases run there, in fewer rounds.
MANY = 10
OF_MANY = ("session", "ssh", FLOOR)

# In a machine: an SSH server as Debian configures it, but on a loopback port. Its installation must
# not start it, since port 22 is the host's.
SSHD = r"""
set -e
export DEBIAN_FRONTEND=noninteractive
printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
chmod 755 /usr/sbin/policy-rc.d
apt-get -qq update >/dev/null
apt-get -qq install -y --no-install-recommends openssh-server >/dev/null
usermod -p '*' "$1"
"""
KEY = r"""
set -e
umask 077
mkdir -p ~/.ssh
ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/bench
cp ~/.ssh/bench.pub ~/.ssh/authorized_keys
cat ~/.ssh/bench
"""
START_SSHD = "mkdir -p /run/sshd; exec /usr/sbin/sshd -p $1 -o ListenAddress=127.0.0.1"


#: Seconds of each round, by place, case and contender.
Measurements = dict[str, dict[str, dict[str, list[float]]]]


class Case(NamedTuple):
    """One deploy, as it is shown and run."""

    name: str
    deploy: str
    #: Whether each operation creates a file.
    makes_files: bool = True
    #: Whether it runs again on the results of the previous case.
    again: bool = False


CASES = (
    Case("nothing", "nothing", makes_files=False),
    Case("100 server.shell", "shell"),
    Case("100 files.file", "file"),
    Case("100 files.file, no change", "file", again=True),
    Case("50 files.put", "put"),
)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


class Bench:
    """Machines of a simulator, with everything that can be compared on them.

    Args:
        folder: A directory for files that it needs while it runs.
        contenders: Some of `CONTENDERS`.
        most: Maximum number of hosts.
        predecessor: A virtual environment that contains pyinfra-orbstack 0.11.0.
        counts: Number of operations of each deploy, by the deploy's name.
    """

    def __init__(
        self,
        folder: Path,
        contenders: tuple[str, ...],
        most: int,
        predecessor: Path | None,
        counts: Mapping[str, int],
    ) -> None:
        self.folder = folder
        self.contenders = contenders
        self.predecessor = predecessor
        self.counts = counts
        self.machines = [f"bench-{number}" for number in range(1, most + 1)]
        self.containers: Containers | None = None
        self._container = ""
        #: CPU seconds of the latest pyinfra process itself, without those of its children.
        self.cpu = 0.0
        self._targets: dict[tuple[str, str, int], str] = {}
        self._number = 0

    # Machines

    def orbctl(self, *words: str) -> str:
        done = subprocess.run(
            [*SIMULATOR, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"orbctl {' '.join(words)}: {done.stderr or done.stdout}")
        return done.stdout

    def sh(self, machine: str, text: str, *words: str, user: str = "") -> str:
        as_user = ["-u", user] if user else []
        return self.orbctl("run", "-m", machine, *as_user, "sh", "-c", text, "sh", *words)

    def prepare(self) -> None:
        """Create the machines, and the inventories that name them."""
        first, *others = self.machines
        (self.folder / "bin").mkdir()
        self._shim("orbctl", SIMULATOR)
        self.orbctl("create", "debian", first)
        user = self.sh(first, "id -un").strip()
        if "ssh" in self.contenders:
            self.sh(first, SSHD, user, user="root")
            key = self.folder / "key"
            key.touch(0o600)
            key.write_text(self.sh(first, KEY))
        for name in others:
            self.orbctl("clone", first, name)
            self.orbctl("start", name)
        hosts: dict[str, list[tuple[str, dict[str, Any]]]] = {"local": [("@local", {})]}
        for transport in ("session", "spawn"):
            data = {"orbstack_transport": transport}
            hosts[transport] = [(f"@orbstack/{name}", data) for name in self.machines]
        hosts["0.11.0"] = [(f"@orbstack/{name}", {}) for name in self.machines]
        hosts[FLOOR] = [(f"@floor/{name}", {}) for name in self.machines]
        if "ssh" in self.contenders:
            hosts["ssh"] = [(name, self._ssh(name, user)) for name in self.machines]
        for name, listed in hosts.items():
            for count in range(1, len(listed) + 1):
                path = self.folder / f"{name}-{count}.py"
                path.write_text(f"hosts = {listed[:count]!r}\n")
        sources = self.folder / "sources"
        sources.mkdir()
        for number in range(self.counts["put"]):
            (sources / str(number)).write_text(f"file {number}\n" * 100)

    def _shim(self, name: str, command: Sequence[str]) -> None:
        """Make a command available by its name."""
        path = self.folder / "bin" / name
        path.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        path.chmod(0o755)

    def prepare_container(self, containers: Containers) -> None:
        """Create a container with the content of the first machine."""
        self.containers = containers
        first = self.machines[0]
        user = self.sh(first, "id -un").strip()
        client = Orbctl(str(self.folder / "bin" / "orbctl"))
        image = containers.pack("bench", client, first, "sudo", "util-linux", user=user)
        self._container = containers.run(image)
        self._shim("docker", containers.client.command)
        for contender, host in (("container", "@orbstack/docker"), ("docker", "@docker")):
            path = self.folder / f"{contender}-1.py"
            path.write_text(f"hosts = ['{host}/{self._container}']\n")

    def _ssh(self, machine: str, user: str) -> dict[str, Any]:
        port = free_port()
        self.sh(machine, START_SSHD, str(port), user="root")
        return {
            "ssh_hostname": "127.0.0.1",
            "ssh_port": port,
            "ssh_user": user,
            "ssh_key": str(self.folder / "key"),
            "ssh_known_hosts_file": str(self.folder / "known_hosts"),
            "ssh_strict_host_key_checking": "accept-new",
        }

    # Deploys

    def can(self, contender: str, hosts: int, case: Case) -> bool:
        if contender == FLOOR and case.again:
            return False  # it keeps no results to run on again
        if hosts > MANY:
            return contender in OF_MANY
        # There is one local host; and spawn is for single commands, ten times as slow.
        return hosts == 1 or contender not in ("local", "spawn")

    def pyinfra(self, contender: str, hosts: int, deploy: str, **data: object) -> float:
        """Run a deploy and return the seconds that the whole process took."""
        home = Path(sys.executable).parent
        if contender == "0.11.0":
            assert self.predecessor is not None
            home = self.predecessor / "bin"
        data = {"count": self.counts.get(deploy, 0), **data}
        words = [word for key in data for word in ("--data", f"{key}={data[key]}")]
        shim = self.folder / "bin"
        env = {**os.environ, "PATH": f"{shim}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
        env["PYINFRA_ORBSTACK_ORBCTL"] = str(shim / "orbctl")
        # For all contenders, so that it costs each of them the same.
        paths = [str(HERE / "floor"), *filter(None, [env.get("PYTHONPATH")])]
        cpu = self.folder / "cpu"
        env.update(PYTHONPATH=os.pathsep.join(paths), BENCHMARK_CPU=str(cpu))
        inventory = self.folder / f"{contender}-{hosts}.py"
        command = [str(home / "pyinfra"), "-y", *words, str(inventory)]
        begun = time.perf_counter()
        done = subprocess.run(
            [*command, str(HERE / "deploys" / f"{deploy}.py")],
            cwd=self.folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        taken = time.perf_counter() - begun
        if done.returncode:
            raise SystemExit(f"{contender}, {deploy}:\n{done.stdout.decode(errors='replace')}")
        self.cpu = float(cpu.read_text())
        cpu.unlink()
        return taken

    def deploy(self, contender: str, hosts: int, case: Case) -> float:
        """Run a case once, and check its result on each host."""
        deploy = case.deploy
        target = self._targets.get((contender, deploy, hosts), "")
        if not case.again:
            self._number += 1
            parent = self.folder if contender == "local" else "/var/tmp"
            target = self._targets[contender, deploy, hosts] = f"{parent}/{self._number}"
            if contender != FLOOR:
                self._on_each(contender, hosts, 'mkdir "$1"', target)
        taken = self.pyinfra(
            contender, hosts, deploy, folder=target, sources=self.folder / "sources"
        )
        if contender == FLOOR:
            return taken
        found = self._on_each(contender, hosts, 'ls "$1" | wc -l', target)
        wanted = self.counts[deploy] if case.makes_files else 0
        if any(int(count) != wanted for count in found):
            raise SystemExit(f"{contender}, {deploy}: not {wanted} files, but {found}")
        return taken

    def _on_each(self, contender: str, hosts: int, text: str, *words: str) -> list[str]:
        if contender == "local":
            command = ["sh", "-c", text, "sh", *words]
            return [subprocess.run(command, check=True, capture_output=True, text=True).stdout]
        if contender in IN_CONTAINERS:
            assert self.containers is not None
            inside = docker.exec_args(self._container, ["sh", "-c", text, "sh", *words])
            return [self.containers.call(*inside)]
        return [self.sh(machine, text, *words) for machine in self.machines[:hosts]]

    def commands(self, contender: str) -> float:
        """The median of bare commands in one run, in seconds."""
        results = self.folder / "results"
        self.pyinfra(contender, 1, "commands", results=results)
        taken: list[float] = json.loads(results.read_text())
        return statistics.median(taken)

    def calls(self, *command: str) -> float:
        """The median of starting an executable that does nothing, in seconds."""
        return statistics.median(timed(list(command)) for _ in range(10)) / 1000

    def clean(self) -> None:
        self.orbctl("delete", "--all", "--force")
        if SUDO:
            simulator = os.environ["ORBCTL_SIMULATOR_HOME"]
            subprocess.run([*SUDO, "rm", "-rf", simulator], check=True)


@contextlib.contextmanager
def bench(*args: Any, containers: bool) -> Iterator[Bench]:
    """A prepared `Bench`, removed afterwards."""
    with contextlib.ExitStack() as stack:
        # pyinfra's @local cannot put a file if its path, or that of its copy, contains a space.
        place = "/tmp" if " " in tempfile.gettempdir() else None
        made_for_it = tempfile.TemporaryDirectory(prefix="bench-", dir=place)
        folder = Path(stack.enter_context(made_for_it))
        os.environ["TMPDIR"] = str(folder)
        os.environ["ORBCTL_SIMULATOR_HOME"] = str(folder / "simulator")
        # Only connections are compared, whatever the machines are made of.
        os.environ.update(ORBCTL_SIMULATOR_INIT="none", ORBCTL_SIMULATOR_IMAGES="host")
        os.environ.setdefault("ORBCTL_SIMULATOR_CACHE", str(LAYERS))
        made = Bench(folder, *args)
        stack.callback(made.clean)
        made.prepare()
        if containers:
            try:
                there = Containers(stack.enter_context(engine()))
            except Unavailable as reason:
                print(f"without containers: {reason}", flush=True)
            else:
                stack.callback(there.remove_all)
                made.prepare_container(there)
        yield made


def in_turn(contenders: Iterable[str], number: int) -> list[str]:
    """The contenders in a different order each round."""
    order = sorted(contenders)
    turn = number % len(order)
    return order[turn:] + order[:turn]


def measure(
    made: Bench,
    rounds: int,
    host_counts: list[int],
    rounds_of_many: int,
    cases_of_many: Iterable[Case],
) -> Iterator[dict[str, Any]]:
    """Measure everything repeatedly, each round in another order; yield all results so far."""
    deploys: Measurements = {}
    cpu: Measurements = {}
    commands: dict[str, list[float]] = {}
    places = {str(hosts): (hosts, made.contenders) for hosts in host_counts}
    if made.containers is not None:
        places[CONTAINER] = (1, IN_CONTAINERS)
    loads = []
    for number in range(rounds):
        loads.append(os.getloadavg()[0])
        for contender in in_turn({one for _, some in places.values() for one in some}, number):
            if contender != FLOOR:
                commands.setdefault(contender, []).append(made.commands(contender))
        bare = [*SIMULATOR, "run", "-m", made.machines[0], "true"]
        commands.setdefault("orbctl run true", []).append(made.calls(*bare))
        commands.setdefault("unshare true", []).append(made.calls(*SUDO, "unshare", "true"))
        for place, (hosts, contenders) in places.items():
            if hosts > MANY and number >= rounds_of_many:
                continue
            for case in cases_of_many if hosts > MANY else CASES:
                for contender in in_turn(contenders, number):
                    if not made.can(contender, hosts, case):
                        continue
                    taken = made.deploy(contender, hosts, case)
                    for kind, value in ((deploys, taken), (cpu, made.cpu)):
                        of_case = kind.setdefault(place, {}).setdefault(case.name, {})
                        of_case.setdefault(contender, []).append(round(value, 4))
                    print(
                        f"round {number + 1}, {hosts} hosts, {case.name}, {contender}: "
                        f"{taken:.2f} s, {made.cpu:.2f} s of CPU",
                        flush=True,
                    )
        yield summary(loads, deploys, commands, cpu)


def summary(
    loads: list[float],
    deploys: Measurements,
    commands: dict[str, list[float]],
    cpu: Measurements | None = None,
) -> dict[str, Any]:
    """The measurements so far, and their circumstances."""
    return {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "pyinfra": version("pyinfra"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "load": loads,
        "deploys": deploys,
        "cpu": cpu or {},
        "commands": {name: [round(one, 6) for one in each] for name, each in commands.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--hosts", default="1,10,50", help="numbers of hosts at once")
    many = f"more than {MANY} hosts"
    parser.add_argument("--many-rounds", type=int, default=2, help=f"rounds of {many}")
    once = [case.deploy for case in CASES if not case.again]
    parser.add_argument("--many-cases", default=",".join(once), help=f"deploys on {many}")
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--no-containers", dest="containers", action="store_false")
    parser.add_argument("--predecessor", type=Path, help="environment with pyinfra-orbstack 0.11.0")
    parser.add_argument("--scale", type=float, default=1, help="factor for operation counts")
    parser.add_argument("--data", type=Path, default=DATA, help="file for the numbers")
    options = parser.parse_args()
    wanted = {"shell": 100, "file": 100, "put": 50, "commands": 100}
    counts = {name: max(1, round(count * options.scale)) for name, count in wanted.items()}
    host_counts = [int(count) for count in options.hosts.split(",")]
    contenders = tuple(options.contenders.split(","))
    if "0.11.0" in contenders and options.predecessor is None:
        parser.error("0.11.0 needs --predecessor")
    of_many = options.many_cases.split(",")
    if not set(of_many) <= set(once):
        parser.error(f"--many-cases can be {', '.join(once)}")
    cases = [case for case in CASES if case.deploy in of_many and not case.again]
    # Its executables are called from another directory.
    predecessor = options.predecessor and options.predecessor.resolve()
    old = json.loads(options.data.read_text()) if options.data.exists() else {}
    most = max(host_counts)
    with bench(contenders, most, predecessor, counts, containers=options.containers) as made:
        for data in measure(made, options.rounds, host_counts, options.many_rounds, cases):
            options.data.write_text(json.dumps(merged(old, data), indent=1) + "\n")


if __name__ == "__main__":
    EndSignals().begin()
    main()
