"""The router's rules, as one text for `nft`, which loads all of it or nothing.

The bridge decides about traffic between machines, the router about the rest. A packet of an
isolated machine gets a mark when it enters the machine's port, so changing its address does not
help the machine. An address or MAC of a machine or the router is accepted from its own port only.
Any machine may use others, because machines may share an address (VRRP) or bridge containers.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from .addresses import Member, Subnets

BRIDGE, UPLINK, TAP = "br0", "host", "tap0"
MTU = 1500
BRIDGE_MAC = "02:00:00:00:00:01"

_RULES = f"""
table bridge orb {{
    chain ports {{
        type filter hook prerouting priority -300; policy accept;
        iifname @cut meta mark set 1
        ether type {{ 8021q, 8021ad }} drop
        ether saddr @macs iifname . ether saddr != @own_macs drop
        ether type ip ip saddr @taken4 iifname . ip saddr != @own4 drop
        ether type arp arp saddr ip @taken4 iifname . arp saddr ip != @own4 drop
        ether type ip6 ip6 saddr @taken6 iifname . ip6 saddr != @own6 drop
        icmpv6 type nd-router-advert drop
        udp sport {{ 67, 547 }} drop
    }}
    chain between {{
        type filter hook forward priority 0; policy accept;
        iifname @cut drop
        oifname @cut drop
    }}
}}
table inet orb {{
    chain input {{
        type filter hook input priority 0; policy drop;
        iifname "lo" accept
        ct state established,related accept
        meta l4proto {{ icmp, icmpv6 }} accept
        iifname {{ "{BRIDGE}", "{UPLINK}" }} meta l4proto {{ tcp, udp }} th dport 53 accept
        iifname "{BRIDGE}" udp dport {{ 67, 547 }} accept
    }}
    chain through {{
        type filter hook forward priority 0; policy drop;
        meta mark 1 oifname != "{TAP}" reject with icmpx admin-prohibited
        meta mark 1 ip daddr @host4 reject with icmpx admin-prohibited
        iifname != "{TAP}" ip daddr @cut4 reject with icmpx admin-prohibited
        ip6 daddr @cut6 reject with icmpx admin-prohibited
        ct state established,related accept
        iifname "{BRIDGE}" oifname {{ "{BRIDGE}", "{TAP}" }} accept
        iifname "{UPLINK}" oifname "{BRIDGE}" meta mark set 2 accept
        reject with icmpx admin-prohibited
    }}
    chain leave {{
        type nat hook postrouting priority 100; policy accept;
        oifname "{TAP}" masquerade
        meta mark 2 masquerade
    }}
}}
"""

_SETS = {
    "bridge": {
        "cut": "type ifname",
        "macs": "type ether_addr",
        "own_macs": "type ifname . ether_addr",
        "taken4": "type ipv4_addr",
        "own4": "type ifname . ipv4_addr",
        "taken6": "type ipv6_addr",
        "own6": "type ifname . ipv6_addr",
    },
    "inet": {
        "host4": "type ipv4_addr; flags interval; auto-merge",
        "cut4": "type ipv4_addr",
        "cut6": "type ipv6_addr",
    },
}


def rules() -> str:
    """The tables with empty sets."""
    lines = []
    for family, sets in _SETS.items():
        lines.append(f"add table {family} orb")
        lines += [f"add set {family} orb {name} {{ {kind}; }}" for name, kind in sets.items()]
    return "\n".join(lines) + _RULES


def members(subnets: Subnets, joined: Iterable[Member]) -> str:
    """The sets' content for these machines."""
    cut, macs, own_macs, cut4, cut6 = [], [BRIDGE_MAC], [], [], []
    taken4, taken6 = [subnets.gateway, subnets.host], [subnets.gateway6, subnets.host6]
    own4, own6 = [], []
    for member in joined:
        its = member.addresses(subnets)
        macs.append(its.mac)
        own_macs.append(f"{member.port} . {its.mac}")
        taken4.append(its.ip4)
        own4.append(f"{member.port} . {its.ip4}")
        taken6.append(its.ip6)
        own6.append(f"{member.port} . {its.ip6}" if its.ip6 else "")
        if member.isolated:
            cut.append(member.port)
            cut4.append(its.ip4)
            cut6.append(its.ip6)
    contents = {"cut": cut, "macs": macs, "own_macs": own_macs, "taken4": taken4, "own4": own4}
    contents.update(taken6=taken6, own6=own6)
    text = "".join(_fill("bridge", name, elements) for name, elements in contents.items())
    return text + _fill("inet", "cut4", cut4) + _fill("inet", "cut6", cut6)


def host_addresses(addresses: Iterable[str]) -> str:
    """The addresses that an isolated machine must not reach through the host."""
    return _fill("inet", "host4", addresses)


def _fill(family: str, name: str, elements: Iterable[str]) -> str:
    shown = ", ".join(filter(None, elements))
    text = f"flush set {family} orb {name}\n"
    return text + (f"add element {family} orb {name} {{ {shown} }}\n" if shown else "")
