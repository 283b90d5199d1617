"""The router's link to the host: one veth, one address, one route, and the choice of a subnet."""

from __future__ import annotations

import json
import os
import time
from ipaddress import IPv4Network

from . import netns, tools
from .addresses import Subnets, new_prefix
from .firewall import MTU, UPLINK
from .state import Failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_GATEWAY6 = "fe80::1"

# The first is the range of older OrbStack versions. The others are for more networks at once, and
# for hosts that use this benchmarking range themselves.
_FIRST = IPv4Network("198.19.248.0/23")
_POOLS = (
    IPv4Network("198.18.0.0/15"),
    IPv4Network("192.168.128.0/18"),
    IPv4Network("10.64.0.0/12"),
)
# A wider one is a default route, which overlaps with everything.
_WIDEST = 4


def connect(host: int, link: str, wanted: Subnets, move: bool = True) -> Subnets:
    """Create the veth from within the router, and claim a subnet that the host does not route.

    The route is the claim: if two routers try the same subnet, the kernel rejects one.
    """
    lines = [
        f"link add {UPLINK} mtu {MTU} type veth peer name {link} mtu {MTU}"
        f" netns /proc/self/fd/{host}",
        f"link set {UPLINK} up",
    ]
    if wanted.prefix6:
        lines.append(f"addr add {_GATEWAY6}/64 dev {UPLINK} nodad")
    os.set_inheritable(host, True)
    try:
        _until_gone(host, link)
        tools.ip(lines)
    finally:
        os.set_inheritable(host, False)
    blocks = _candidates(wanted, link) if move else [IPv4Network(f"{wanted.link}.0/23")]
    claim = netns.inside(host, lambda: json.dumps(vars(_claim(link, wanted, blocks))))
    return Subnets(**json.loads(claim))


def _until_gone(host: int, link: str) -> None:
    """Wait for the kernel, which removes a killed router's veth a moment later."""
    deadline = time.monotonic() + 5
    while netns.inside(host, lambda: _remove(link)) and time.monotonic() < deadline:
        time.sleep(0.01)


def _remove(link: str) -> str:
    if link not in netns.interfaces():
        return ""
    try:
        tools.call("ip", "link", "del", link)
    except Failure:
        return "still there"
    return "gone now" if link in netns.interfaces() else ""


def _claim(link: str, wanted: Subnets, blocks: Iterable[IPv4Network]) -> Subnets:
    routed = list(_routed())
    for block in blocks:
        if any(block.overlaps(other) for other in routed):
            continue
        parts = [str(half.network_address).rpartition(".")[0] for half in block.subnets()]
        subnets = Subnets(link=parts[0], machines=parts[1], prefix6=wanted.prefix6)
        route = f"{subnets.address(0)}/24 via {subnets.gateway} dev {link} onlink"
        if _take(link, f"{subnets.host}/32", route):
            while subnets.prefix6 and _has_ipv6(link):
                route = f"{subnets.prefix6}::/64 via {_GATEWAY6} dev {link}"
                if _take(link, f"{subnets.host6}/128", route):
                    break
                subnets.prefix6 = new_prefix()  # a copied state directory starts with the same one
            return subnets
    raise Failure("this host routes every subnet that a network of machines could have")


def _take(link: str, address: str, route: str) -> bool:
    """Returns False if another process added the route first."""
    nodad = " nodad" if ":" in address else ""
    lines = [f"addr add {address} dev {link}{nodad}", f"link set {link} up", f"route add {route}"]
    try:
        tools.ip(lines)
        return True
    except Failure as failure:
        if "File exists" not in str(failure):
            raise
        tools.call("ip", "addr", "del", address, "dev", link)
        return False


def _has_ipv6(link: str) -> bool:
    try:
        with open(f"/proc/sys/net/ipv6/conf/{link}/disable_ipv6") as file:
            return file.read().strip() == "0"
    except FileNotFoundError:
        return False


def _candidates(wanted: Subnets, link: str) -> Iterator[IPv4Network]:
    """Its last subnet, OrbStack's, then others, in a different order for each directory."""
    yield IPv4Network(f"{wanted.link}.0/23")
    yield _FIRST
    for pool in _POOLS:
        blocks = list(pool.subnets(new_prefix=23))
        start = int(link.rpartition("-")[2], 16) % len(blocks)
        yield from blocks[start:] + blocks[:start]


def _routed() -> Iterator[IPv4Network]:
    for route in json.loads(tools.call("ip", "-j", "-4", "route", "show", "table", "all")):
        if route["dst"] != "default":
            network = IPv4Network(route["dst"], strict=False)
            if network.prefixlen > _WIDEST:
                yield network


def host_addresses() -> list[str]:
    """Addresses of this host, or of machines in any of its networks. Call it in its namespace."""
    found = ["0.0.0.0/8", "127.0.0.0/8"]
    for interface in json.loads(tools.call("ip", "-j", "-4", "addr")):
        found += [address["local"] for address in interface.get("addr_info", []) if address]
    for route in json.loads(tools.call("ip", "-j", "-4", "route", "show")):
        if route.get("dev", "").startswith("orb-"):
            found.append(route["dst"])
    return sorted(set(found))
