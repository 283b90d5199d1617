"""Kills, deletions, full disks and concurrent calls: nothing is left, and the next call works."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from orbctl_simulator import netns, network, tools
from tests.simulator.network.virtual import (
    Net,
    cache,
    eventually,
    other_mounts,
    python,
    run,
    serve,
)

pytestmark = pytest.mark.boot


def test_addresses_are_stable(apart: Net) -> None:
    """They survive stop and start, rename, and the router; a deleted machine's is free again."""
    one, two = apart.join("one"), apart.join("two")
    known = {machine.id: (machine.ip4, machine.ip6, machine.mac) for machine in (one, two)}
    assert len({address for entry in known.values() for address in entry}) == 6
    apart("leave", one.id)
    assert apart("addresses", one.id) == " ".join(known[one.id][:2])
    apart("leave", two.id)
    apart("rename", two.id, "other")
    for machine in (two, one):
        apart.join(machine)
        assert (machine.ip4, machine.ip6, machine.mac) == known[machine.id]
    apart("forget", one.id)
    assert apart("addresses", one.id) == "none"
    assert apart("addresses", "01NEVER") == "none"


def test_port_that_ends_with_its_machine(own: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel removes it a moment later, here just after the ports are listed."""
    real = netns.ports

    def ports() -> set[str]:
        found = real()
        for port in found:
            run("ip", "link", "del", port)
        return found

    one, other = own.join("one"), own.machine("one")
    own_network = network.Network(str(own.state))
    monkeypatch.setattr(netns, "ports", ports)
    with open(f"/proc/{other.pid}/ns/net") as file:
        own_network.join(one.id, "one", file.fileno())
    assert own.router()
    own_network.leave(one.id)
    assert not own.router()


def test_sweep(own: Net) -> None:
    """Addresses of unknown machines are freed, unless the machine runs."""
    one, two, three = own.join("one"), own.join("two"), own.join("three")
    own("leave", three.id)
    (own.state / "network/machines/01X.99").write_text("half a fi")
    own("sweep", two.id)
    assert own("addresses", three.id) == "none"
    assert own("addresses", one.id) == f"{one.ip4} {one.ip6}"
    own("leave", one.id)
    own("leave", two.id)
    own("sweep", two.id)
    assert [path.name for path in (own.state / "network/machines").iterdir()] == [two.id]
    own("sweep")
    assert own("addresses", two.id) != "none"


def test_all_addresses_in_use(own: Net) -> None:
    one = own.join("one")
    for number in range(10, 251):
        path = own.state / "network/machines" / f"01FULL{number}"
        path.write_text(f"number={number}\nname=full{number}\nisolated=false\nrouter=\n")
    code, out, err = own.answer(*own.join_words(own.machine("late")))
    assert (code, out) == (1, "")
    assert err == "network: all 241 addresses are in use: delete a machine"
    assert own("connected", one.id) == "True"


@pytest.mark.parametrize("name", ["dnsmasq", "slirp4netns"])
def test_killed_program(own: Net, name: str, servers: list[subprocess.Popen[str]]) -> None:
    """The router restarts it."""
    one = own.join("one")
    port = serve(servers, [], "127.0.0.1", 0, "host")
    for _ in range(2):
        pid = own.programs()[name]
        os.kill(pid, signal.SIGKILL)
        eventually(lambda pid=pid: own.programs().get(name, pid) != pid)
        code = """
until = time.monotonic() + 20
while time.monotonic() < until:
    try:
        print(fetch(ask("host.orb.internal"), sys.argv[1]).decode())
        break
    except OSError: time.sleep(0.1)
"""
        assert one.python(code, port) == "host to 127.0.0.1"
        assert one.asks("one.orb.local") == one.ip4
        assert own("connected", one.id) == "True"


def test_killed_router(apart: Net) -> None:
    """All of its processes end; machines that still run can join again, in any order."""
    one, two = apart.join("one"), apart.join("two")
    before = one.ip4, one.ip6, two.ip4, two.ip6
    for _ in range(3):
        os.kill(apart.router(), signal.SIGKILL)
        assert apart("connected", one.id) == "False"
        apart.join(two)
        assert apart("connected", two.id) == "True"
        assert apart("connected", one.id) == "False"
        apart.join(one)
        assert (one.ip4, one.ip6, two.ip4, two.ip6) == before
        port = two.serve(two.ip4)
        assert one.reached((two.ip4, port))
    os.kill(apart.router(), signal.SIGKILL)
    eventually(lambda: not apart.leftovers(), apart.leftovers)
    apart("leave", one.id)
    apart("sweep")


def test_deleted_veth(own: Net) -> None:
    """If someone deletes it, the router restores it."""
    one = own.join("one")
    port = one.serve(one.ip4)
    run("ip", "link", "del", own.link)
    code = """
until = time.monotonic() + 20
while time.monotonic() < until:
    try:
        print(fetch(sys.argv[1], sys.argv[2]).decode())
        break
    except OSError: time.sleep(0.1)
"""
    assert python(code, one.ip4, port) == f"one to {one.gateway}"
    assert one.asks("one.orb.local") == one.ip4


def test_machines_that_shut_down_themselves(own: Net) -> None:
    """Their names are removed; with the last one, the router exits. No call is needed."""
    one, two = own.join("one"), own.join("two")
    two.end()
    eventually(lambda: one.asks("two.orb.local") == "error 3")
    assert own("connected", one.id) == "True"
    one.end()
    eventually(lambda: not own.leftovers(), own.leftovers)
    again = own.join("again")
    assert again.asks("again") == again.ip4


def test_deleted_state_directory(own: Net) -> None:
    """The network stays while its machines run, and ends with them."""
    one = own.join("one")
    link = own.link
    os.rename(own.state / "network", own.state / "away")
    run("rm", "-rf", str(own.state / "away"))
    one.end()
    eventually(lambda: link not in run("ip", "addr"))


def test_same_machine_twice(own: Net) -> None:
    """A machine that starts again has a new namespace, while its old one may still exist."""
    old = own.join("web")
    new = own.machine("web")
    new.id = old.id
    own.join(new)
    assert (new.ip4, new.mac) == (old.ip4, old.mac)
    assert "eth0" not in old.ip("link")
    assert new.asks("web.orb.local") == new.ip4
    own.join(new)
    assert new.asks("web.orb.local") == new.ip4


def test_starters_at_once(own: Net) -> None:
    """Six at the same moment start one router; six that leave stop it."""
    for _ in range(2):
        machines = [own.machine(f"m{number}") for number in range(6)]
        calls = [own.start(*own.join_words(machine)) for machine in machines]
        for machine, call in zip(machines, calls):
            out, err = call.communicate()
            assert call.returncode == 0, err
            own.joined(machine, out)
        assert len({machine.ip4 for machine in machines}) == 6
        assert all(machines[0].asks(machine.name) == machine.ip4 for machine in machines)
        calls = [own.start("forget", machine.id) for machine in machines]
        # The first one starts while the last ones leave.
        late = own.machine("late")
        calls.append(own.start(*own.join_words(late)))
        assert [call.communicate()[1] for call in calls] == [""] * 7
        assert own("connected", late.id) == "True"
        own("forget", late.id)
        assert own.leftovers() == []


def test_killed_starter(own: Net) -> None:
    """At any moment: its incomplete work is removed, or the next call continues it."""
    for step in range(18):
        machine = own.machine("web")
        call = own.start(*own.join_words(machine))
        time.sleep(0.05 + step * 0.02)
        call.kill()
        call.communicate()
        if step % 3 == 0:
            own.join(machine)
            assert machine.asks("web.orb.local") == machine.ip4
        elif step % 3 == 1:
            other = own.join("other")
            assert other.asks("other") == other.ip4
            own("forget", other.id)
        machine.end()
        if step % 2:
            eventually(lambda: not own.leftovers(), own.leftovers)
        own("forget", machine.id)
    assert own.router() == 0
    assert own.leftovers() == []


def test_router_killed_while_it_starts(own: Net) -> None:
    """The waiting command reports it, and nothing is left."""
    for step in range(8):
        machine = own.machine("web")
        call = own.start(*own.join_words(machine))
        link, deadline = own.link.encode(), time.monotonic() + 10
        found = 0
        while not found and call.poll() is None and time.monotonic() < deadline:
            found = next((pid for pid in _routers(link)), 0)
        time.sleep(step * 0.018)
        if found:
            os.kill(found, signal.SIGKILL)
        _, err = call.communicate(timeout=60)
        assert call.returncode == 0 or err.startswith("network: "), err
        own.join(machine)
        assert machine.asks("web") == machine.ip4
        machine.end()
        own("forget", machine.id)


def _routers(link: bytes) -> Iterator[int]:
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                shown = Path(f"/proc/{entry}/cmdline").read_bytes()
            except OSError:
                continue
            if link in shown and b"orbctl_simulator.router" in shown:
                yield int(entry)


def test_refused(own: Net) -> None:
    """Invalid names and ids, and namespaces other than a machine's, change nothing."""
    machine = own.machine("web")
    for name in ("a b", "a\nb", "-x", "*", "a/b", "", "é", "a\tb", "#x", "x" * 64, "--conf-file=x"):
        code, _, err = own.answer("join", machine.id, name, machine.pid)
        assert (code, err) == (1, f"invalid machine name: {name!r}")
    for ident in ("../x", "", "a b", "x" * 65, "é"):
        code, _, err = own.answer("join", ident, "web", machine.pid)
        assert (code, err) == (1, f"invalid machine id: {ident!r}")
        assert own.answer("forget", ident)[0] == 1
    assert own.answer("join", machine.id, "web", os.getpid())[2] == (
        "the host's own network cannot be a machine's"
    )
    with open("/proc/self/ns/mnt") as file, pytest.raises(Exception, match="not a network"):
        network.Network(str(own.state)).join(machine.id, "web", file.fileno())
    assert own.leftovers() == []


def program(folder: Path, name: str, script: str) -> dict[str, str]:
    """An environment in which a script replaces an executable, which it runs as "$REAL"."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ORBCTL_SIMULATOR_CACHE", cache())
        real = tools.find(name)
    folder.mkdir()
    libraries = real.environment.get("LD_LIBRARY_PATH", "")
    lines = ["#!/bin/sh", f"REAL='{real.path}'", f"export LD_LIBRARY_PATH='{libraries}'", script]
    (folder / name).write_text("\n".join(lines))
    (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.parametrize("name", ["nft", "ip", "slirp4netns", "dnsmasq"])
def test_program_that_fails(tmp_path: Path, stack: ExitStack, name: str) -> None:
    """Its own error is the reason, and nothing is left; the next call works."""
    script = "echo Error: out of luck >&2; exit 3"
    env = program(tmp_path / "bin", name, script)
    net = stack.enter_context(Net(tmp_path / "state", **env))
    one = net.machine("one")
    code, out, err = net.answer(*net.join_words(one))
    reason = "Permission denied: " if name == "dnsmasq" else "Error: out of luck"
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith(f"network: {name}: {reason}")
    eventually(lambda: not net.leftovers(), net.leftovers)
    net.env.clear()
    net.join(one)
    assert one.asks("one") == one.ip4


def test_host_without_sandboxes(tmp_path: Path, stack: ExitStack) -> None:
    """The user-mode NAT then runs in what this host allows, also after a restart."""
    script = 'case "$*" in *--enable-sandbox*) exit 1;; esac; exec "$REAL" "$@"'
    env = program(tmp_path / "bin", "slirp4netns", script)
    net = stack.enter_context(Net(tmp_path / "state", **env))
    one = net.join("one")
    pid = net.programs()["slirp4netns"]
    assert b"--enable" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: net.programs().get("slirp4netns", pid) != pid)
    assert one.asks("one") == one.ip4


def used_by(pid: int) -> tuple[int, float]:
    """A process's open files, and the CPU time in seconds of it and of its children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    ticks = sum(map(int, fields[11:15]))
    return len(os.listdir(f"/proc/{pid}/fd")), ticks / os.sysconf("SC_CLK_TCK")


def test_full_disk(tmp_path: Path, stack: ExitStack) -> None:
    """`join` reports it and leaves nothing; `leave` and `forget` work."""
    state = tmp_path / "state"
    state.mkdir()
    mount = f"mount -t tmpfs -o size=256k,mode=700 none '{state}'"
    host = stack.enter_context(other_mounts(mount))
    net = stack.enter_context(Net(state, host))
    fill = [*host, "sh", "-c", f"cat /dev/zero >'{state}/full' 2>/dev/null; true"]
    one, two, three = net.join("one"), net.join("two"), net.join("three")
    run(*fill)
    code, _, err = net.answer(*net.join_words(net.machine("late")))
    assert code == 1
    assert err.startswith("network: No space left on device")
    net("leave", one.id)
    net("forget", one.id)
    assert two.asks("two") == two.ip4
    run(*fill)
    three.end()  # without `leave`: the router tries to forget its name
    router = int(run(*host, "cat", f"{state}/network/router").split()[0])
    files, seconds = used_by(router)
    time.sleep(2)
    files_later, seconds_later = used_by(router)
    assert files_later <= files + 2
    assert seconds_later - seconds < 0.5
    net("forget", three.id)
    net("forget", two.id)
    assert net.leftovers() == []
    run(*fill)
    code, _, err = net.answer(*net.join_words(two))
    assert code == 1
    assert err.startswith("network: No space left on device")
    run(*host, "rm", f"{state}/full")
    net.join(two)
    assert two.asks("two") == two.ip4


def test_fifty(own: Net, capsys: pytest.CaptureFixture[str]) -> None:
    """As many as a large test suite starts; the times are printed."""
    machines = [own.join(f"m{number}") for number in range(50)]
    assert len({machine.ip4 for machine in machines}) == 50
    assert machines[0].asks("m49.orb.local") == machines[49].ip4
    assert machines[49].asks("m0.orb.local") == machines[0].ip4
    took = sorted(machine.took for machine in machines[1:])
    with capsys.disabled():
        print(
            f" first join {machines[0].took * 1000:.0f} ms, then {took[24] * 1000:.0f} ms", end=""
        )
