"""What the network does to its host, on this host and on others."""

from __future__ import annotations

import os
import re
import subprocess
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.simulator.network.virtual import (
    FETCH,
    Machine,
    Net,
    eventually,
    host_now,
    other_host,
    other_mounts,
    python,
    run,
    serve,
)

pytestmark = pytest.mark.boot


def test_isolated_from_addresses_that_the_host_gets_later(
    tmp_path: Path, stack: ExitStack, servers: list[subprocess.Popen[str]]
) -> None:
    """Also from machines of other state directories, which it could reach through the host."""
    host = stack.enter_context(other_host("ip link add d0 type bridge", "ip link set d0 up"))
    net = stack.enter_context(Net(tmp_path / "state", host))
    other = stack.enter_context(Net(tmp_path / "other", host))
    alone, free = net.join("alone", isolated=True), net.join("free")
    run(*host, "ip", "addr", "add", "203.0.113.7/24", "dev", "d0")
    port = serve(servers, host, "203.0.113.7", 0, "host")
    assert free.reached(("203.0.113.7", port))
    eventually(lambda: not alone.reached(("203.0.113.7", port)))
    foreign = other.join("foreign")
    port = foreign.serve(foreign.ip4)
    assert free.reached((foreign.ip4, port))
    eventually(lambda: not alone.reached((foreign.ip4, port)))


def test_programs_have_no_rights_on_the_host(net: Net, web: Machine) -> None:
    """Processes that read the machines' packets have no rights on the host."""
    # Besides, the router starts others for a moment when the host's addresses change.
    eventually(lambda: set(net.programs()) == {"dnsmasq", "slirp4netns"}, net.programs)
    programs = net.programs()
    status = Path(f"/proc/{programs['dnsmasq']}/status").read_text()
    assert re.search(r"^Uid:\s+1100000\s+1100000", status, re.MULTILINE)
    assert re.search(r"^Groups:\s*$", status, re.MULTILINE)
    assert os.readlink(f"/proc/{programs['dnsmasq']}/ns/user") != os.readlink("/proc/self/ns/user")
    status = Path(f"/proc/{programs['slirp4netns']}/status").read_text()
    capabilities = re.search(r"^CapEff:\s+(\w+)", status, re.MULTILINE)
    assert capabilities
    assert int(capabilities[1], 16) & ~(1 << 10) == 0  # except ports below 1024
    assert os.readlink(f"/proc/{programs['slirp4netns']}/ns/mnt") != os.readlink(
        "/proc/self/ns/mnt"
    )


def test_router_holds_none_of_the_callers_files(net: Net, web: Machine) -> None:
    """No pipe that another process waits for, no variable, no directory."""
    pid = net.router()
    held = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            held.add(os.readlink(path))
    assert not {path for path in held if "/lock" in path or str(net.state) in path}
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    # `make coverage` gives every program one of its own.
    found = {entry.split(b"=")[0] for entry in variables if entry} - {b"COVERAGE_PROCESS_CONFIG"}
    assert found == {b"PATH", b"ORBCTL_SIMULATOR_CACHE"}


def test_mounts(net: Net, web: Machine) -> None:
    """There are none in the host's own namespace."""
    assert str(net.state) not in Path("/proc/self/mountinfo").read_text().replace("\\040", " ")
    assert not Path("/run/served").exists()


def namespaces() -> set[str]:
    """The network namespaces of all processes."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/ns/net"):
        with suppress(OSError):
            found.add(os.readlink(entry))
    return found


def test_the_host_is_unchanged(own: Net) -> None:
    before = host_now()
    assert own.leftovers() == []
    first, second = own.join("first"), own.join("second", isolated=True)
    namespace = os.readlink(f"/proc/{own.router()}/ns/net")
    assert namespace in namespaces()
    during = host_now()
    assert {key for key in before if before[key] != during[key]} == set()
    assert len([line for line in own.leftovers() if " scope global" in line]) <= 2
    own("leave", first.id)
    assert own.router()
    own("leave", second.id)
    assert own.router() == 0
    assert own.leftovers() == []
    assert host_now() == before
    eventually(lambda: namespace not in namespaces())


def test_two_state_directories(apart: Net, tmp_path: Path, stack: ExitStack) -> None:
    """Different subnets and interfaces, which each keeps as long as possible."""
    own, other = apart, stack.enter_context(Net(tmp_path / "other", apart.host))
    mine, theirs = own.join("web"), other.join("web")
    assert mine.gateway != theirs.gateway
    assert mine.ip6.split(":")[:3] != theirs.ip6.split(":")[:3]
    assert own.link != other.link
    for machine in (mine, theirs):
        port = machine.serve(machine.ip4)
        assert python(FETCH, machine.ip4, port, net=apart.host) == f"web to {machine.gateway}"
        assert machine.asks("web.orb.local") == machine.ip4
    own("leave", mine.id)
    other("leave", theirs.id)
    own.join(mine)
    before = theirs.gateway
    other.join(theirs)
    assert theirs.gateway == before


def test_copied_state_directory(own: Net, tmp_path: Path, stack: ExitStack) -> None:
    """A copy starts with the subnets of the original, and with the name of its router."""
    mine = own.join("web")
    copy = stack.enter_context(Net(tmp_path / "copy"))
    run("cp", "-a", f"{own.state}/network", f"{copy.state}/network")
    assert copy("connected", mine.id) == "False"
    theirs = copy.join("web")
    assert theirs.gateway != mine.gateway
    assert theirs.ip6.split(":")[:3] != mine.ip6.split(":")[:3]
    for machine in (mine, theirs):
        for address in (machine.ip4, machine.ip6):
            port = machine.serve(address)
            assert python(FETCH, address, port).startswith("web to ")
        assert machine.asks("web.orb.local") == machine.ip4


def test_subnet_that_the_host_uses(tmp_path: Path, stack: ExitStack) -> None:
    """Another one is chosen and kept; if that is used later, yet another one."""
    host = stack.enter_context(
        other_host(
            "ip link add d0 type bridge && ip addr add 198.19.249.7/24 dev d0",
            "ip link set d0 up",
            "ip route add 0.0.0.0/1 dev d0",  # how a VPN sets a default route
        )
    )
    before = host_now(host)
    net = stack.enter_context(Net(tmp_path / "state", host))
    one = net.join("one")
    first = one.gateway
    assert first.startswith(("198.18.", "198.19."))
    assert first != "198.19.249.1"
    net("leave", one.id)
    assert host_now(host) == before
    net.join(one)
    assert one.gateway == first
    net("leave", one.id)
    run(*host, "ip", "route", "add", "blackhole", f"{first.rpartition('.')[0]}.64/26")
    net.join(one)
    assert one.gateway not in (first, "198.19.249.1")
    assert net("addresses", one.id) == f"{one.ip4} {one.ip6}"
    net("leave", one.id)
    run(*host, "ip", "route", "add", "198.18.0.0/15", "dev", "d0")
    net.join(one)
    assert one.gateway.startswith("192.168.")
    net("leave", one.id)
    for wide in ("192.168.0.0/16", "10.0.0.0/8"):
        run(*host, "ip", "route", "add", wide, "dev", "d0")
    code, _, err = net.answer(*net.join_words(one))
    assert code == 1
    assert err.endswith("this host routes every subnet that a network of machines could have")


def test_host_without_ipv6(tmp_path: Path, stack: ExitStack) -> None:
    """It has no IPv6 to the machines; they have it among themselves."""
    off = " && ".join(
        f"echo 1 >/proc/sys/net/ipv6/conf/{which}/disable_ipv6" for which in ("all", "default")
    )
    host = stack.enter_context(other_host(off))
    net = stack.enter_context(Net(tmp_path / "state", host))
    one, two = net.join("one"), net.join("two")
    port = two.serve(two.ip6)
    assert one.reached((two.ip6, port))
    assert "inet6" not in run(*host, "ip", "addr")
    port = two.serve(two.ip4)
    assert python(FETCH, two.ip4, port, net=host).startswith("two to ")


def test_strict_host(tmp_path: Path, stack: ExitStack) -> None:
    """A host's own settings, which new namespaces inherit, do not break the router."""
    strict = "for name in rp_filter arp_ignore arp_announce arp_filter; do for which in all default"
    strict += "; do echo 1 >/proc/sys/net/ipv4/conf/$which/$name; done; done"
    host = stack.enter_context(other_host(strict))
    net = stack.enter_context(Net(tmp_path / "state", host))
    one, two = net.join("one"), net.join("two")
    port = two.serve(two.ip4)
    assert one.reached((two.ip4, port))
    assert python(FETCH, two.ip4, port, net=host) == f"two to {two.gateway}"


@pytest.mark.parametrize("mode", ["000", "644"])
def test_host_without_a_resolver(tmp_path: Path, stack: ExitStack, mode: str) -> None:
    """Its `resolv.conf` is empty or unreadable: the machines' own names still resolve."""
    (tmp_path / "resolv.conf").write_text("")
    os.chmod(tmp_path / "resolv.conf", int(mode, 8))
    host = other_mounts(f"mount --bind '{tmp_path}/resolv.conf' /etc/resolv.conf")
    net = stack.enter_context(Net(tmp_path / "state", stack.enter_context(host)))
    one = net.join("one")
    assert one.asks("one.orb.local") == one.ip4
