"""Stand-ins for machines: a process in user and network namespaces, like a machine's init."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
_BECOME = """
import sys
from orbctl_simulator.linux import end_with_parent, unshare
end_with_parent()
unshare(0x10000000)
print("user", flush=True)
sys.stdin.readline()
unshare(0x40000000)
print("net", flush=True)
sys.stdin.read()
"""
# For `Machine.python`: functions that most programs need.
_PRELUDE = """
import os, socket, struct, sys, time
socket.setdefaulttimeout(3)
def fetch(host, port, said=b""):
    with socket.create_connection((host, int(port)), 3) as s:
        s.sendall(said)
        s.shutdown(socket.SHUT_WR)
        return s.makefile("rb").read()
def ask(name, kind=1, server=None):
    import random
    labels = b"".join(bytes([len(p)]) + p.encode() for p in name.split("."))
    ident = struct.pack("!H", random.randrange(65536))
    query = ident + b"\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0" + labels + struct.pack("!BHH", 0, kind, 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(5)
        s.sendto(query, (server or GATEWAY, 53))
        reply = s.recv(4096)
    assert reply[:2] == ident
    code, count = reply[3] & 15, struct.unpack("!H", reply[6:8])[0]
    at, found = 12 + len(labels) + 5, []
    for _ in range(count):
        while reply[at] not in (0,) and reply[at] < 192:
            at += reply[at] + 1
        at += 2 if reply[at] >= 192 else 1
        what, _, _, size = struct.unpack("!HHIH", reply[at:at + 10])
        data = reply[at + 10:at + 10 + size]
        at += 10 + size
        if what in (1, 28):
            found.append(socket.inet_ntop({1: socket.AF_INET, 28: socket.AF_INET6}[what], data))
    return " ".join(sorted(found)) if code == 0 else f"error {code}"
"""
FETCH = "print(fetch(sys.argv[1], sys.argv[2]).decode())"
_SERVE = """
import socket, sys, threading
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
server = socket.create_server((sys.argv[1], int(sys.argv[2])), family=family)
print(server.getsockname()[1], flush=True)
while True:
    caller, address = server.accept()
    with caller:
        caller.sendall(f"{sys.argv[3]} to {address[0]}".encode())
"""


def cache() -> str:
    return os.environ.get("ORBCTL_SIMULATOR_CACHE", str(ROOT / ".cache" / "simulator-layers"))


def environment() -> dict[str, str]:
    paths = f"{ROOT / 'src'}:{ROOT}"
    return {**os.environ, "ORBCTL_SIMULATOR_CACHE": cache(), "PYTHONPATH": paths}


class Machine:
    """A machine's network namespace, and an id."""

    count = 0

    def __init__(self, name: str, host: list[str]) -> None:
        Machine.count += 1
        self.id, self.name = f"01TEST{os.getpid()}X{Machine.count}", name
        self.ip4 = self.ip6 = self.mac = self.gateway = ""
        self.took = 0.0
        self._init = subprocess.Popen(
            [*host, sys.executable, "-c", _BECOME],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        assert self._init.stdin
        assert self._init.stdout
        assert self._init.stdout.readline() == "user\n"
        self.pid = self._init.pid
        for kind in ("uid_map", "gid_map"):
            Path(f"/proc/{self.pid}/{kind}").write_text("0 100000 1000000\n")
        self._init.stdin.write("\n")
        self._init.stdin.flush()
        assert self._init.stdout.readline() == "net\n"
        self._servers: list[subprocess.Popen[str]] = []

    @property
    def net(self) -> list[str]:
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net"]

    def python(self, code: str, *words: object) -> str:
        """The output of a program that runs in its network."""
        return python(code, *words, net=self.net, gateway=self.gateway)

    def started(self, code: str, *words: object) -> subprocess.Popen[str]:
        """The same, still running; it has reported that it is ready."""
        program = f"import socket, sys\n{code}"
        command = [*self.net, sys.executable, "-c", program, *map(str, words)]
        call = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert call.stdout
        assert call.stdout.readline() == "ready\n"
        return call

    def ip(self, *words: str) -> str:
        return subprocess.run(
            [*self.net, "ip", *words], check=True, capture_output=True, text=True
        ).stdout

    def serve(self, address: str = "0.0.0.0", port: int = 0) -> int:  # noqa: S104
        return serve(self._servers, self.net, address, port, self.name)

    def end(self) -> None:
        """End as if its init was killed."""
        for process in [*self._servers, self._init]:
            stop(process)

    def asks(self, name: str, kind: int = 1) -> str:
        return self.python("print(ask(sys.argv[1], int(sys.argv[2])))", name, kind)

    def reached(self, *targets: tuple[str, int]) -> list[tuple[str, int]]:
        return reached(targets, self.net)


def reached(
    targets: Sequence[tuple[str, int]], net: list[str] | None = None
) -> list[tuple[str, int]]:
    """Those of these servers that answer."""
    code = """
from concurrent.futures import ThreadPoolExecutor
def answers(target):
    try: return bool(fetch(*target))
    except OSError: return False
targets = list(zip(sys.argv[1::2], sys.argv[2::2]))
with ThreadPoolExecutor(len(targets)) as pool: print(*map(int, pool.map(answers, targets)))
"""
    answers = python(code, *(word for target in targets for word in target), net=net).split()
    return [target for target, answer in zip(targets, answers) if answer == "1"]


def stop(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream:
            stream.close()


def python(code: str, *words: object, net: list[str] | None = None, gateway: str = "") -> str:
    program = f"GATEWAY = {gateway!r}\n{_PRELUDE}\n{code}"
    command = [*(net or []), sys.executable, "-c", program, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def serve(
    servers: list[subprocess.Popen[str]], net: list[str], address: str, port: int, name: str
) -> int:
    """Start a TCP server that sends its name and the client's address."""
    command = [*net, sys.executable, "-c", _SERVE, address, str(port), name]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    servers.append(server)
    assert server.stdout
    return int(server.stdout.readline())


class Net:
    """The network of one state directory, and its machines."""

    def __init__(self, state: Path, host: list[str] | None = None, **env: str) -> None:
        state.mkdir(exist_ok=True)
        self.state, self.host, self.env = state, host or [], env
        self.machines: list[Machine] = []

    def start(self, *words: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.simulator.network.calls", str(self.state)]
        return subprocess.Popen(
            [*self.host, *command, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment(), **self.env},
            cwd=ROOT,
        )

    def answer(self, *words: object) -> tuple[int, str, str]:
        call = self.start(*words)
        out, err = call.communicate(timeout=120)
        return call.returncode, out.strip(), err.strip()

    def __call__(self, *words: object) -> str:
        code, out, err = self.answer(*words)
        assert code == 0, err
        return out

    def machine(self, name: str) -> Machine:
        made = Machine(name, self.host)
        self.machines.append(made)
        return made

    def join_words(self, machine: Machine, isolated: bool = False) -> list[str]:
        words = ["join", machine.id, machine.name, str(machine.pid)]
        return words + (["isolated"] if isolated else [])

    def join(self, machine: Machine | str, isolated: bool = False) -> Machine:
        if isinstance(machine, str):
            machine = self.machine(machine)
        self.joined(machine, self(*self.join_words(machine, isolated)))
        return machine

    def joined(self, machine: Machine, answer: str) -> None:
        ip4, ip6, machine.mac, took = answer.split()
        machine.ip4, machine.ip6 = ip4, "" if ip6 == "-" else ip6
        machine.gateway = ip4.rpartition(".")[0] + ".1"
        machine.took = float(took)

    def router(self) -> int:
        """The process that keeps the router, or 0."""
        try:
            pid = int(run(*self.host, "cat", f"{self.state}/network/router").split()[0])
            shown = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (subprocess.CalledProcessError, FileNotFoundError, ProcessLookupError):
            return 0
        return pid if os.fsencode(self.state) in shown else 0

    def programs(self) -> dict[str, int]:
        """The programs that the router runs, by name."""
        found: dict[str, int] = {}
        router = self.router()
        for entry in Path("/proc").iterdir() if router else ():
            with contextlib.suppress(OSError, IndexError):
                if entry.name.isdigit():
                    stat = (entry / "stat").read_text().rpartition(") ")[2].split()
                    if int(stat[1]) == router and stat[0] not in "ZX":
                        name = (entry / "cmdline").read_bytes().split(b"\0")[0].decode()
                        found[name.rpartition("/")[2]] = int(entry.name)
        return found

    @cached_property
    def link(self) -> str:
        return self("link")

    def leftovers(self) -> list[str]:
        """What is left of it on its host: interface, routes, processes."""
        found = [
            line
            for words in (["-o", "addr"], ["route"], ["-6", "route"])
            for line in run(*self.host, "ip", *words).splitlines()
            if self.link in line
        ]
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                shown = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
                if self.link.encode() in shown:
                    found.append(shown.replace(b"\0", b" ").decode())
        return found

    def __enter__(self) -> Net:
        return self

    def __exit__(self, *_: object) -> None:
        for machine in self.machines:
            machine.end()
        self("sweep")
        eventually(lambda: not self.leftovers(), self.leftovers)


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def eventually(
    check: Callable[[], object], shown: Callable[[], object] = str, seconds: float = 20
) -> None:
    """Wait for something that the kernel or a process does by itself."""
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, shown()
        time.sleep(0.02)


def host_now(host: list[str] | None = None) -> dict[str, Any]:
    """The host's network, without what other networks of machines add meanwhile."""
    shown: dict[str, Any] = {}
    for words in ("addr", "-4 route", "-6 route", "rule"):
        entries = json.loads(run(*(host or []), "ip", "-j", *words.split()) or "[]")
        shown[words] = [
            _lasting(entry)
            for entry in entries
            if not str(entry.get("ifname", entry.get("dev"))).startswith("orb-")
        ]
    for path in ("ipv4/ip_forward", "ipv6/conf/all/forwarding", "ipv4/conf/all/rp_filter"):
        file = Path("/proc/sys/net", path)
        shown[path] = run(*(host or []), "cat", str(file)) if file.exists() else ""
    from orbctl_simulator import tools

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ORBCTL_SIMULATOR_CACHE", cache())
        nft = tools.find("nft")
    done = subprocess.run(
        [*(host or []), nft.path, "list", "ruleset"],
        env=nft.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    shown["nft"] = done.stdout
    return shown


def _lasting(entry: dict[str, Any]) -> dict[str, Any]:
    """Without temporary values: duplicate address detection, and lifetimes."""
    passing = ("ifindex", "tentative", "valid_life_time", "preferred_life_time", "addr_info")
    kept = {key: value for key, value in entry.items() if key not in passing}
    return {**kept, "addresses": [_lasting(address) for address in entry.get("addr_info", ())]}


@contextlib.contextmanager
def other_host(*setup: str) -> Iterator[list[str]]:
    """A network namespace as the host; yields a command prefix that runs a program there."""
    keeper = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "ip link set lo up && echo up && exec sleep 600"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert keeper.stdout
        assert keeper.stdout.readline() == "up\n"
        words = ["nsenter", f"--net=/proc/{keeper.pid}/ns/net"]
        for command in setup:
            run(*words, "sh", "-c", command)
        yield words
    finally:
        stop(keeper)


@contextlib.contextmanager
def other_mounts(setup: str) -> Iterator[list[str]]:
    """A mount namespace of the host in which a command was run; yields as above."""
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c"]
    keeper = subprocess.Popen(
        [*command, f"{setup} && echo up && exec sleep 600"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert keeper.stdout
        assert keeper.stdout.readline() == "up\n"
        yield ["nsenter", f"--mount=/proc/{keeper.pid}/ns/mnt"]
    finally:
        stop(keeper)


def is_online() -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("deb.debian.org", 80), 5):
        return True
    return False
