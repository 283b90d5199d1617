"""The machines' network, on real namespaces with stand-ins for machines."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orbctl_simulator import network
from tests.simulator.virtual import (
    Machine,
    Net,
    environment,
    eventually,
    host_now,
    is_online,
    other_host,
    python,
    run,
    serve,
    stop,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces of the host need root")


@pytest.fixture(scope="module", autouse=True)
def _possible() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ORBCTL_SIMULATOR_CACHE", environment()["ORBCTL_SIMULATOR_CACHE"])
        reason = network.available()
    if reason:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no network: {reason}")


@pytest.fixture(scope="module")
def online() -> None:
    if not is_online():
        (pytest.fail if os.environ.get("CI") else pytest.skip)("deb.debian.org is not reachable")


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Net]:
    """A network for tests that leave it as it was; it must leave the host as it was, too."""
    made = Net(tmp_path_factory.mktemp("network") / "state, of: all")
    yield made
    made.end()


@pytest.fixture(scope="module")
def web(net: Net) -> Machine:
    return net.join("web")


@pytest.fixture(scope="module")
def db(net: Net) -> Machine:
    return net.join("db")


@pytest.fixture(scope="module")
def alone(net: Net) -> Machine:
    return net.join("alone", isolated=True)


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Net]:
    made = Net(tmp_path / "state")
    yield made
    made.end()


@pytest.fixture
def servers() -> Iterator[list[subprocess.Popen[str]]]:
    """Servers on the host."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for server in started:
        stop(server)


def test_machines_reach_each_other(web: Machine, db: Machine) -> None:
    for address in (db.ip4, db.ip6):
        port = db.serve(address)
        code = "print(fetch(sys.argv[1], sys.argv[2]).decode())"
        caller = web.ip6 if ":" in address else web.ip4
        assert web.python(code, address, port) == f"db to {caller}"


def test_names(net: Net, web: Machine, db: Machine) -> None:
    """By the full name and the bare one, in any case, for machines started before or after."""
    for machine in (web, db):
        for name in ("db.orb.local", "db", "DB.orb.Local"):
            assert machine.asks(name) == db.ip4
            assert machine.asks(name, 28) == db.ip6
    assert web.asks("other.orb.local") == "error 3"
    later = net.join("later")
    assert web.asks("later.orb.local") == later.ip4
    net("leave", later.id)
    assert web.asks("later.orb.local") == "error 3"


def test_rename(net: Net, web: Machine, db: Machine) -> None:
    net("rename", db.id, "data")
    assert [web.asks(name) for name in ("data.orb.local", "data")] == [db.ip4, db.ip4]
    assert web.asks("db.orb.local") == "error 3"
    net("rename", db.id, "db")
    assert web.asks("db.orb.local") == db.ip4
    assert net("addresses", db.id) == f"{db.ip4} {db.ip6}"


def test_dotted_name_takes_no_other(net: Net, web: Machine) -> None:
    """A machine that is named after a site of the internet does not stand in for it."""
    for name in ("deb.debian.org", "localhost", "host.orb.internal"):
        odd = net.join(name)
        assert web.asks(f"{name}.orb.local") == odd.ip4
        assert odd.ip4 not in web.asks(name)
        net("forget", odd.id)


def test_names_that_no_server_takes(net: Net, web: Machine) -> None:
    """They are machine names all the same, and do the others no harm."""
    for name in ("a..b", "end.", "end-", "x" * 63):
        odd = net.join(name)
        assert web.asks("web.orb.local") == web.ip4
        net("forget", odd.id)


@pytest.mark.usefixtures("online")
def test_internet(web: Machine, alone: Machine) -> None:
    """By name, through the host's resolver."""
    code = """
address = ask("deb.debian.org").split()[0]
said = b"HEAD / HTTP/1.0\\r\\nHost: deb.debian.org\\r\\n\\r\\n"
print(fetch(address, 80, said).split(b" ")[0].decode())
"""
    for machine in (web, alone):
        assert machine.python(code).startswith("HTTP/1.")


def test_host_reaches_machines(web: Machine) -> None:
    """By their addresses; they see the router's."""
    for address in (web.ip4, web.ip6):
        port = web.serve(address)
        code = "print(fetch(sys.argv[1], sys.argv[2]).decode())"
        gateway = (
            web.gateway
            if ":" not in address
            else re.sub("0:[^:]*:[^:]*:[^:]*:[^:]*$", ":1", address)
        )
        assert python(code, address, port) == f"web to {gateway}"


def test_host_by_name(web: Machine, servers: list[subprocess.Popen[str]]) -> None:
    """`host.orb.internal` is where services answer that listen on the host's loopback only."""
    port = serve(servers, [], "127.0.0.1", 0, "host")
    code = "print(fetch(ask('host.orb.internal'), sys.argv[1]).decode())"
    assert web.python(code, port) == "host to 127.0.0.1"


def test_host_by_its_veth(net: Net, web: Machine, servers: list[subprocess.Popen[str]]) -> None:
    """Machines do not reach it that way."""
    port = serve(servers, [], "0.0.0.0", 0, "host")  # noqa: S104
    own = web.gateway.rpartition(".")[0] + ".2"
    assert not web.reaches(own, port)
    web.ip("route", "add", f"{own}/32", "via", web.gateway)
    assert not web.reaches(own, port)
    web.ip("route", "del", f"{own}/32")
    shown = run("ip", "-o", "-6", "addr", "show", "dev", net.link(), "scope", "global")
    if shown:
        port = serve(servers, [], "::", 0, "host")
        assert not web.reaches(shown.split()[3].partition("/")[0], port)


def test_isolated(
    net: Net, web: Machine, alone: Machine, servers: list[subprocess.Popen[str]]
) -> None:
    """It reaches no machine and no address of the host, nor do they reach it."""
    port, port6 = web.serve(web.ip4), web.serve(web.ip6)
    on_host = serve(servers, [], "0.0.0.0", 0, "host")  # noqa: S104
    there, there6 = alone.serve(alone.ip4), alone.serve(alone.ip6)
    assert alone.asks("web.orb.local") == web.ip4
    assert not alone.reaches(web.ip4, port)
    assert not alone.reaches(web.ip6, port6)
    for address in {
        alone.asks("host.orb.internal"),
        alone.gateway.rpartition(".")[0] + ".2",
        *re.findall(r"inet ([\d.]+)", run("ip", "addr")),
    }:
        assert not alone.reaches(address, on_host), address
    assert not web.reaches(alone.ip4, there)
    assert not web.reaches(alone.ip6, there6)
    code = """
try: fetch(sys.argv[1], sys.argv[2])
except OSError: print("cut")
"""
    assert python(code, alone.ip4, there) == "cut"
    assert python(code, alone.ip6, there6) == "cut"
    assert web.reaches(web.asks("host.orb.internal"), on_host)
    # Nor by another address, or by way of the router.
    alone.ip("addr", "add", alone.gateway.rpartition(".")[0] + ".251/32", "dev", "eth0")
    alone.ip(
        "route",
        "add",
        f"{web.ip4}/32",
        "via",
        alone.gateway,
        "src",
        alone.gateway.rpartition(".")[0] + ".251",
    )
    assert not alone.reaches(web.ip4, port)
    alone.ip("route", "del", f"{web.ip4}/32")
    alone.ip("addr", "del", alone.gateway.rpartition(".")[0] + ".251/32", "dev", "eth0")


def test_isolated_from_addresses_that_the_host_gets_later(tmp_path: Path) -> None:
    """And from machines of other state directories, which it would reach through the host."""
    with other_host("ip link add d0 type bridge", "ip link set d0 up") as host:
        net, other = Net(tmp_path / "state", host), Net(tmp_path / "other", host)
        servers: list[subprocess.Popen[str]] = []
        try:
            alone, free = net.join("alone", isolated=True), net.join("free")
            run(*host, "ip", "addr", "add", "203.0.113.7/24", "dev", "d0")
            port = serve(servers, host, "203.0.113.7", 0, "host")
            assert free.reaches("203.0.113.7", port)
            eventually(lambda: not alone.reaches("203.0.113.7", port))
            foreign = other.join("foreign")
            port = foreign.serve(foreign.ip4)
            assert free.reaches(foreign.ip4, port)
            eventually(lambda: not alone.reaches(foreign.ip4, port))
        finally:
            for server in servers:
                stop(server)
            net.end()
            other.end()


def test_spoofing(web: Machine, db: Machine, net: Net) -> None:
    """What comes with another's address is dropped, what comes with nobody's is not."""
    send = """
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind((sys.argv[1], 0))
for _ in range(3): s.sendto(sys.argv[1].encode(), (sys.argv[2], 5353))
"""
    receive = """
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind((sys.argv[1], 5353)); s.settimeout(2); print("ready", flush=True)
found = set()
try:
    while True: found.add(s.recv(99).decode())
except OSError: print(*sorted(found))
"""
    third = net.join("third")
    free = web.gateway.rpartition(".")[0] + ".252"
    call = subprocess.Popen(
        [*third.net, "python3", "-c", f"import socket, sys\n{receive}", third.ip4],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert call.stdout
    assert call.stdout.readline() == "ready\n"
    for address in (db.ip4, web.gateway, free):
        web.ip("addr", "add", f"{address}/32", "dev", "eth0")
        web.python(send, address, third.ip4)
        web.ip("addr", "del", f"{address}/32", "dev", "eth0")
    web.python(send, web.ip4, third.ip4)
    assert sorted(call.communicate()[0].split()) == sorted([web.ip4, free])
    net("forget", third.id)


def test_dhcp_and_advertisements(web: Machine) -> None:
    """An image's network manager that asks gets what the machine has already."""
    code = """
import fcntl
mac = bytes.fromhex(sys.argv[1].replace(":", ""))
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
s.bind(("", 68))
head = struct.pack("!BBBBIHH16s16s", 1, 1, 6, 0, 4242, 0, 0x8000, b"", mac)
ask = b"5\\x01\\x01" + b"\\x0c\\x05rogue" + b"7\\x04\\x01\\x03\\x06\\x77\\xff"
ask = ask.replace(b"5\\x01", bytes([53, 1]), 1).replace(b"7\\x04", bytes([55, 4]), 1)
s.sendto(head + bytes(192) + b"\\x63\\x82\\x53\\x63" + ask, ("255.255.255.255", 67))
reply = s.recv(2048)
options, at, found = reply[240:], 0, {}
while options[at] != 255:
    if options[at] == 0:
        at += 1
        continue
    found[options[at]] = options[at + 2:at + 2 + options[at + 1]]
    at += 2 + options[at + 1]
print(socket.inet_ntoa(reply[16:20]), *(socket.inet_ntoa(found[n]) for n in (1, 3, 6)))
"""
    expected = f"{web.ip4} 255.255.255.0 {web.gateway} {web.gateway}"
    assert web.python(code, web.mac) == expected
    assert web.asks("rogue.orb.local") == web.asks("rogue") == "error 3"
    web.ip("addr", "flush", "dev", "eth0", "scope", "global", "to", f"{web.ip6}/64")
    assert web.ip6 not in web.ip("addr")
    path = "/proc/sys/net/ipv6/conf/eth0/accept_ra"
    web.python("open(sys.argv[1], 'w').write('1')", path)
    for state in ("down", "up"):
        web.ip("link", "set", "eth0", state)
    web.ip("route", "replace", "default", "via", web.gateway)
    eventually(lambda: f"{web.ip6}/64" in web.ip("addr"), lambda: web.ip("addr"))
    assert "default" not in web.ip("-6", "route")
    web.python("open(sys.argv[1], 'w').write('0')", path)


def test_rogue_servers(net: Net, web: Machine, db: Machine) -> None:
    """No machine hands out addresses or routes to the others."""
    advertise = """
s = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
s.bind(("fe80::" + sys.argv[1], 0, 0, socket.if_nametoindex("eth0")))
prefix = struct.pack("!BBBBIII16s", 3, 4, 64, 192, 9999, 9999, 0, socket.inet_pton(10, "fd99::"))
for _ in range(3):
    s.sendto(struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 9999, 0, 0) + prefix, ("ff02::1", 0, 0,
             socket.if_nametoindex("eth0")))
    time.sleep(0.1)
d = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
d.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
d.bind(("", 67))
d.sendto(b"offer", ("255.255.255.255", 68))
"""
    listen = """
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("", 68)); s.settimeout(2); print("ready", flush=True)
try: print(s.recv(99))
except OSError: print("nothing")
"""
    path = "/proc/sys/net/ipv6/conf/eth0/accept_ra"
    db.python("open(sys.argv[1], 'w').write('1')", path)
    call = subprocess.Popen(
        [*db.net, "python3", "-c", f"import socket, sys\n{listen}"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert call.stdout
    assert call.stdout.readline() == "ready\n"
    local = re.search(r"fe80::([0-9a-f:]+)/64", web.ip("addr"))
    assert local
    web.python(advertise, local[1])
    assert call.communicate()[0] == "nothing\n"
    assert "fd99::" not in db.ip("addr") + db.ip("-6", "route")
    db.python("open(sys.argv[1], 'w').write('0')", path)


def test_programs_are_nobody(net: Net, web: Machine) -> None:
    """What reads the machines' packets has no rights on the host."""
    programs = net.programs()
    assert set(programs) == {"dnsmasq", "slirp4netns"}
    status = Path(f"/proc/{programs['dnsmasq']}/status").read_text()
    assert re.search(r"^Uid:\s+1100000\s+1100000", status, re.MULTILINE)
    assert re.search(r"^Groups:\s*$", status, re.MULTILINE)
    assert os.readlink(f"/proc/{programs['dnsmasq']}/ns/user") != os.readlink("/proc/self/ns/user")
    status = Path(f"/proc/{programs['slirp4netns']}/status").read_text()
    capabilities = re.search(r"^CapEff:\s+(\w+)", status, re.MULTILINE)
    assert capabilities
    assert int(capabilities[1], 16) & ~(1 << 10) == 0  # but for ports below 1024
    assert os.readlink(f"/proc/{programs['slirp4netns']}/ns/mnt") != os.readlink(
        "/proc/self/ns/mnt"
    )


def test_router_holds_nothing_of_the_callers(net: Net, web: Machine) -> None:
    """No pipe that somebody waits for, no variable, no directory."""
    pid = net.router()
    held = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()}
    assert not {path for path in held if "/lock" in path or str(net.state) in path}
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    assert {entry.split(b"=")[0] for entry in variables if entry} == {
        b"PATH",
        b"ORBCTL_SIMULATOR_CACHE",
    }


def test_mounts(net: Net, web: Machine) -> None:
    """None is made in the host's own namespace."""
    assert str(net.state) not in Path("/proc/self/mountinfo").read_text().replace("\\040", " ")
    assert not Path("/run/served").exists()


def test_the_host_is_as_before(own: Net) -> None:
    before = host_now()
    assert own.leftovers() == []
    first, second = own.join("first"), own.join("second", isolated=True)
    during = host_now()
    assert {key for key in before if before[key] != during[key]} == set()
    assert len([line for line in own.leftovers() if " scope global" in line]) <= 2
    own("leave", first.id)
    assert own.router()
    own("leave", second.id)
    assert own.router() == 0
    assert own.leftovers() == []
    assert host_now() == before


def test_addresses_are_stable(own: Net) -> None:
    """Over stop and start, rename, and the end of everything; a deleted machine's is free again."""
    one, two = own.join("one"), own.join("two")
    known = {machine.id: (machine.ip4, machine.ip6, machine.mac) for machine in (one, two)}
    assert len({address for entry in known.values() for address in entry}) == 6
    own("leave", one.id)
    assert own("addresses", one.id) == " ".join(known[one.id][:2])
    own("leave", two.id)
    own("rename", two.id, "other")
    for machine in (two, one):
        own.join(machine)
        assert (machine.ip4, machine.ip6, machine.mac) == known[machine.id]
    own("forget", one.id)
    assert own("addresses", one.id) == "none"
    assert own("addresses", "01NEVER") == "none"


def test_sweep(own: Net) -> None:
    """Addresses of machines that nobody knows any more are freed, but not under one that runs."""
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
    for number in range(300):
        path = own.state / "network/machines" / f"01FULL{number}"
        path.write_text(f"number={number}\nname=full{number}\nisolated=false\nrouter=\n")
    code, out, err = own.answer(*own.join_words(own.machine("late")))
    assert (code, out) == (1, "")
    assert err == "all 241 addresses are in use: delete a machine"
    assert own("connected", one.id) == "True"


def test_two_state_directories(own: Net, tmp_path: Path) -> None:
    """Other subnets and other interfaces, each its own for as long as it can be."""
    other = Net(tmp_path / "other")
    copy = Net(tmp_path / "copy")
    try:
        mine, theirs = own.join("web"), other.join("web")
        assert mine.gateway != theirs.gateway
        assert mine.ip6.split(":")[:3] != theirs.ip6.split(":")[:3]
        assert own.link() != other.link()
        run("cp", "-a", f"{other.state}/network", f"{copy.state}/network")
        (copy.state / "network/router").unlink()
        third = copy.join("web")
        assert third.gateway not in (mine.gateway, theirs.gateway)
        for machine in (mine, theirs, third):
            port = machine.serve(machine.ip4)
            code = "print(fetch(sys.argv[1], sys.argv[2]).decode())"
            assert python(code, machine.ip4, port) == f"web to {machine.gateway}"
            assert machine.asks("web.orb.local") == machine.ip4
        own("leave", mine.id)
        other("leave", theirs.id)
        own.join(mine)
        before = theirs.gateway
        other.join(theirs)
        assert theirs.gateway == before
    finally:
        other.end()
        copy.end()


def test_subnet_that_the_host_uses(tmp_path: Path) -> None:
    """Another one is taken, and kept; when even that is used later, yet another."""
    with other_host(
        "ip link add d0 type bridge && ip addr add 198.19.249.7/24 dev d0 && ip link set d0 up",
        "ip route add 0.0.0.0/1 dev d0",  # a VPN's way of being the default route
    ) as host:
        before = host_now(host)
        net = Net(tmp_path / "state", host)
        one = net.join("one")
        first = one.gateway
        assert first.startswith(("198.18.", "198.19."))
        assert first != "198.19.249.1"
        net("leave", one.id)
        assert host_now(host) == before
        net.join(one)
        assert one.gateway == first
        net("leave", one.id)
        subnet = first.rpartition(".")[0]
        run(*host, "ip", "route", "add", "blackhole", f"{subnet}.64/26")
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
        net.end()


def test_host_without_ipv6(tmp_path: Path) -> None:
    """It has no IPv6 towards the machines; they have it among themselves."""
    off = " && ".join(
        f"echo 1 >/proc/sys/net/ipv6/conf/{which}/disable_ipv6" for which in ("all", "default")
    )
    with other_host(off) as host:
        net = Net(tmp_path / "state", host)
        one, two = net.join("one"), net.join("two")
        port = two.serve(two.ip6)
        assert one.reaches(two.ip6, port)
        assert "inet6" not in run(*host, "ip", "addr")
        port = two.serve(two.ip4)
        code = "print(fetch(sys.argv[1], sys.argv[2]).decode())"
        assert python(code, two.ip4, port, net=host).startswith("two to ")
        net.end()


def test_strict_host(tmp_path: Path) -> None:
    """A host's own settings, which new namespaces inherit, do not break the router."""
    strict = "for name in rp_filter arp_ignore arp_announce arp_filter; do for which in all default"
    strict += "; do echo 1 >/proc/sys/net/ipv4/conf/$which/$name; done; done"
    with other_host(strict) as host:
        net = Net(tmp_path / "state", host)
        one, two = net.join("one"), net.join("two")
        port = two.serve(two.ip4)
        assert one.reaches(two.ip4, port)
        code = "print(fetch(sys.argv[1], sys.argv[2]).decode())"
        assert python(code, two.ip4, port, net=host) == f"two to {two.gateway}"
        net.end()


@pytest.mark.parametrize("name", ["dnsmasq", "slirp4netns"])
def test_killed_program(own: Net, name: str, servers: list[subprocess.Popen[str]]) -> None:
    """The router starts it again."""
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


def test_killed_router(own: Net) -> None:
    """Everything of it ends; machines that still run can join again, in any order."""
    one, two = own.join("one"), own.join("two")
    before = one.ip4, one.ip6, two.ip4, two.ip6
    for _ in range(3):
        os.kill(own.router(), signal.SIGKILL)
        assert own("connected", one.id) == "False"
        own.join(two)
        assert own("connected", two.id) == "True"
        assert own("connected", one.id) == "False"
        own.join(one)
        assert (one.ip4, one.ip6, two.ip4, two.ip6) == before
        port = two.serve(two.ip4)
        assert one.reaches(two.ip4, port)
    os.kill(own.router(), signal.SIGKILL)
    eventually(lambda: not own.leftovers(), own.leftovers)
    own("leave", one.id)
    own("sweep")


def test_deleted_veth(own: Net) -> None:
    """Somebody tidies the host up: the router puts it back."""
    one = own.join("one")
    port = one.serve(one.ip4)
    run("ip", "link", "del", own.link())
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


def test_machines_that_end_by_themselves(own: Net) -> None:
    """Their names go; with the last one goes the router, and nobody has called anything."""
    one, two = own.join("one"), own.join("two")
    two.end()
    eventually(lambda: one.asks("two.orb.local") == "error 3")
    assert own("connected", one.id) == "True"
    one.end()
    eventually(lambda: not own.leftovers(), own.leftovers)
    again = own.join("again")
    assert again.asks("again") == again.ip4


def test_deleted_state_directory(own: Net) -> None:
    """The network stays while its machines run, and goes with them."""
    one = own.join("one")
    link = own.link()
    os.rename(own.state / "network", own.state / "away")
    run("rm", "-rf", str(own.state / "away"))
    one.end()
    eventually(lambda: link not in run("ip", "addr"))


def test_same_machine_twice(own: Net) -> None:
    """A machine that starts again has a new namespace, while its old one may still be there."""
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
    """Six at the same moment make one router; six that leave end it."""
    for _ in range(3):
        machines = [own.machine(f"m{number}") for number in range(6)]
        calls = [own.start(*own.join_words(machine)) for machine in machines]
        for machine, call in zip(machines, calls):
            out, err = call.communicate()
            assert call.returncode == 0, err
            own.joined(machine, out)
        assert len({machine.ip4 for machine in machines}) == 6
        assert all(machines[0].asks(machine.name) == machine.ip4 for machine in machines)
        calls = [own.start("forget", machine.id) for machine in machines]
        # The first one to start comes while the last ones leave.
        late = own.machine("late")
        calls.append(own.start(*own.join_words(late)))
        assert [call.communicate()[1] for call in calls] == [""] * 7
        assert own("connected", late.id) == "True"
        own("forget", late.id)
        assert own.leftovers() == []


def test_killed_starter(own: Net) -> None:
    """At any moment: what it has begun goes, or the next one goes on with it."""
    for step in range(24):
        machine = own.machine("web")
        call = own.start(*own.join_words(machine))
        time.sleep(0.05 + step * 0.015)
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
    """The command that waits for it says so, and nothing is left."""
    for step in range(12):
        machine = own.machine("web")
        call = own.start(*own.join_words(machine))
        link, deadline = own.link().encode(), time.monotonic() + 10
        found = 0
        while not found and call.poll() is None and time.monotonic() < deadline:
            found = next((pid for pid in _routers(link)), 0)
        time.sleep(step * 0.012)
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
    """Nothing but names and ids, and no namespace but a machine's; nothing has changed then."""
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


def test_full_disk(tmp_path: Path) -> None:
    """`join` says so and leaves nothing; `leave` and `forget` work."""
    state = tmp_path / "state"
    state.mkdir()
    setup = f"mount -t tmpfs -o size=256k,mode=700 none '{state}' && echo up && exec sleep 600"
    keeper = subprocess.Popen(
        ["unshare", "-m", "--propagation", "private", "sh", "-c", setup],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert keeper.stdout
        assert keeper.stdout.readline() == "up\n"
        inside = ["nsenter", f"--mount=/proc/{keeper.pid}/ns/mnt"]
        fill = [*inside, "sh", "-c", f"cat /dev/zero >'{state}/full' 2>/dev/null; true"]
        net = Net(state, inside)
        one, two = net.join("one"), net.join("two")
        run(*fill)
        code, _, err = net.answer(*net.join_words(net.machine("late")))
        assert code == 1
        assert err.startswith("network: No space left on device")
        net("leave", one.id)
        net("forget", one.id)
        assert two.asks("two") == two.ip4
        net("forget", two.id)
        assert not net.programs()
        run(*fill)
        code, _, err = net.answer(*net.join_words(two))
        assert code == 1
        assert err.startswith("network: No space left on device")
        run(*inside, "rm", f"{state}/full")
        net.join(two)
        assert two.asks("two") == two.ip4
        for machine in net.machines:
            net("forget", machine.id)
            machine.end()
    finally:
        stop(keeper)


@pytest.mark.parametrize("mode", ["000", "644"])
def test_host_without_a_resolver(tmp_path: Path, mode: str) -> None:
    """Its `resolv.conf` is empty or unreadable: the machines' own names are there all the same."""
    (tmp_path / "resolv.conf").write_text("")
    os.chmod(tmp_path / "resolv.conf", int(mode, 8))
    setup = f"mount --bind '{tmp_path}/resolv.conf' /etc/resolv.conf && echo up && exec sleep 600"
    keeper = subprocess.Popen(
        ["unshare", "-m", "--propagation", "private", "sh", "-c", setup],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert keeper.stdout
        assert keeper.stdout.readline() == "up\n"
        net = Net(tmp_path / "state", ["nsenter", f"--mount=/proc/{keeper.pid}/ns/mnt"])
        one = net.join("one")
        assert one.asks("one.orb.local") == one.ip4
        net.end()
    finally:
        stop(keeper)


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
