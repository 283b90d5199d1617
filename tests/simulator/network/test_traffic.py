"""What machines can and cannot reach, with stand-ins for machines in real namespaces."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.simulator.network.virtual import (
    FETCH,
    Machine,
    Net,
    eventually,
    python,
    reached,
    run,
    serve,
)

pytestmark = pytest.mark.boot


def near(machine: Machine, number: int) -> str:
    """An address on its network."""
    return f"{machine.gateway.rpartition('.')[0]}.{number}"


def test_machines_reach_each_other(web: Machine, db: Machine) -> None:
    for address in (db.ip4, db.ip6):
        port = db.serve(address)
        caller = web.ip6 if ":" in address else web.ip4
        assert web.python(FETCH, address, port) == f"db to {caller}"


def test_names(net: Net, web: Machine, db: Machine) -> None:
    """The full and the plain name, in upper or lower case, of machines started before or after."""
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


def test_a_dotted_name_does_not_replace_a_public_one(net: Net, web: Machine) -> None:
    """A machine that is named after a website does not replace it."""
    for name in ("deb.debian.org", "localhost", "host.orb.internal"):
        odd = net.join(name)
        assert web.asks(f"{name}.orb.local") == odd.ip4
        assert odd.ip4 not in web.asks(name)
        net("forget", odd.id)


def test_names_that_are_not_valid_in_dns(net: Net, web: Machine) -> None:
    """They are valid machine names, and do not affect the others."""
    for name in ("a..b", "end.", "end-", "x" * 63):
        odd = net.join(name)
        assert web.asks("web.orb.local") == web.ip4
        net("forget", odd.id)


@pytest.mark.usefixtures("online")
def test_internet(web: Machine, alone: Machine) -> None:
    """By name, through the host's resolver. Servers on the way may fail a few times."""
    code = """
address = ask("deb.debian.org").split()[0]
said = b"HEAD / HTTP/1.0\\r\\nHost: deb.debian.org\\r\\n\\r\\n"
for wait in (1, 2, 4, 8, 0):
    try:
        print(fetch(address, 80, said).split(b" ")[0].decode())
        break
    except OSError:
        time.sleep(wait)
"""
    for machine in (web, alone):
        assert machine.python(code).startswith("HTTP/1.")


def test_host_reaches_machines(web: Machine) -> None:
    """By their addresses; they see the router's address."""
    for address in (web.ip4, web.ip6):
        port = web.serve(address)
        gateway = (
            web.gateway
            if ":" not in address
            else re.sub("0:[^:]*:[^:]*:[^:]*:[^:]*$", ":1", address)
        )
        assert python(FETCH, address, port) == f"web to {gateway}"


def test_host_by_name(web: Machine, servers: list[subprocess.Popen[str]]) -> None:
    """Services that listen only on the host's loopback answer at `host.orb.internal`."""
    port = serve(servers, [], "127.0.0.1", 0, "host")
    code = "print(fetch(ask('host.orb.internal'), sys.argv[1]).decode())"
    assert web.python(code, port) == "host to 127.0.0.1"


def test_host_by_its_veth(net: Net, web: Machine, servers: list[subprocess.Popen[str]]) -> None:
    """Machines cannot reach it that way."""
    port = serve(servers, [], "0.0.0.0", 0, "host")  # noqa: S104
    own = near(web, 2), port
    assert web.reached(own) == []
    web.ip("route", "add", f"{own[0]}/32", "via", web.gateway)
    assert web.reached(own) == []
    web.ip("route", "del", f"{own[0]}/32")
    shown = run("ip", "-o", "-6", "addr", "show", "dev", net.link, "scope", "global")
    if shown:
        port = serve(servers, [], "::", 0, "host")
        assert web.reached((shown.split()[3].partition("/")[0], port)) == []


def test_isolated(
    net: Net, web: Machine, alone: Machine, servers: list[subprocess.Popen[str]]
) -> None:
    """It reaches no machine and no address of the host, nor do they reach it."""
    on_host = serve(servers, [], "0.0.0.0", 0, "host")  # noqa: S104
    mine = [(address, alone.serve(address)) for address in (alone.ip4, alone.ip6)]
    theirs = [(address, web.serve(address)) for address in (web.ip4, web.ip6)]
    host = alone.asks("host.orb.internal")
    assert alone.asks("web.orb.local") == web.ip4
    addresses = {host, near(alone, 2), *re.findall(r"inet ([\d.]+)", run("ip", "addr"))}
    assert alone.reached(*theirs) == []
    # Those of other networks may be new: they are blocked a moment later.
    eventually(lambda: alone.reached(*((address, on_host) for address in addresses)) == [])
    assert web.reached(*mine, *theirs, (host, on_host)) == [*theirs, (host, on_host)]
    assert reached(mine) == []
    # Nor through the router, with an unassigned address.
    alone.ip("addr", "add", f"{near(alone, 251)}/32", "dev", "eth0")
    way = ["via", alone.gateway, "src", near(alone, 251)]
    alone.ip("route", "add", f"{web.ip4}/32", *way)
    assert alone.reached(theirs[0]) == []
    alone.ip("route", "del", f"{web.ip4}/32")
    alone.ip("addr", "del", f"{near(alone, 251)}/32", "dev", "eth0")


def test_isolated_from_one_way_packets(web: Machine, alone: Machine) -> None:
    listen = """
s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
s.bind(("::", 5354)); s.settimeout(2); print("ready", flush=True)
try: print(s.recv(99))
except OSError: print("nothing")
"""
    send = """
for address, family in zip(sys.argv[1:], (socket.AF_INET, socket.AF_INET6)):
    socket.socket(family, socket.SOCK_DGRAM).sendto(b"x", (address, 5354))
"""
    call = alone.started(listen)
    for words in ([], web.net):
        python(send, alone.ip4, alone.ip6, net=words)
    assert call.communicate()[0] == "nothing\n"


def test_spoofing(web: Machine, db: Machine, net: Net) -> None:
    """Packets with another machine's address are dropped, those with an unassigned one are not."""
    send = """
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind((sys.argv[1], 0))
for _ in range(3): s.sendto(sys.argv[1].encode(), (sys.argv[2], 5353))
"""
    receive = """
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind((sys.argv[1], 5353)); s.settimeout(60); print("ready", flush=True)
found = set()
try:
    while True:
        found.add(s.recv(99).decode())
        if sys.argv[2] in found: s.settimeout(1)
except OSError: print(*sorted(found))
"""
    third = net.join("third")
    free = near(web, 252)
    call = third.started(receive, third.ip4, web.ip4)
    for address in (db.ip4, web.gateway, free):
        web.ip("addr", "add", f"{address}/32", "dev", "eth0")
        web.python(send, address, third.ip4)
        web.ip("addr", "del", f"{address}/32", "dev", "eth0")
    # Priority-tagged: the receiver removes the tag.
    tagged = """
mac = [bytes.fromhex(word.replace(":", "")) for word in sys.argv[1:3]]
source, target = map(socket.inet_aton, sys.argv[3:5])
head = struct.pack("!BBHHHBBH4s4s", 69, 0, 35, 0, 0, 64, 17, 0, source, target)
total = sum(struct.unpack("!10H", head))
total = (total & 65535) + (total >> 16)
head = head[:10] + struct.pack("!H", ~total & 65535) + head[12:]
udp = struct.pack("!HHHH", 9, 5353, 15, 0) + b"tagged" + b"!"
frame = mac[1] + mac[0] + bytes([0x81, 0, 0, 0, 8, 0]) + head + udp
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.bind(("eth0", 0))
for _ in range(3): s.send(frame)
"""
    web.python(tagged, web.mac, third.mac, db.ip4, third.ip4)
    web.python(send, web.ip4, third.ip4)
    assert sorted(call.communicate()[0].split()) == sorted([web.ip4, free])
    net("forget", third.id)


def test_dhcp_and_advertisements(web: Machine) -> None:
    """An image's network manager that requests addresses gets those that the machine has."""
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
    """No machine can serve addresses or routes to the others."""
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
    call = db.started(listen)
    # Nothing can be sent from an address while the kernel looks for duplicates of it.
    eventually(lambda: "tentative" not in web.ip("addr"), lambda: web.ip("addr"))
    local = re.search(r"fe80::([0-9a-f:]+)/64", web.ip("addr"))
    assert local
    web.python(advertise, local[1])
    assert call.communicate()[0] == "nothing\n"
    assert "fd99::" not in db.ip("addr") + db.ip("-6", "route")
    db.python("open(sys.argv[1], 'w').write('0')", path)
