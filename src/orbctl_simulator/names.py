"""The name server: its arguments, the files that it reads, and whether it has read them.

It is dnsmasq, and root only in the router's own user namespace. It answers for the machines' names
and forwards the rest to the host's resolver, through the user-mode NAT. By DHCP and router
advertisements it gives each machine the addresses that the machine already has, so an image whose
network manager requests addresses gets the same ones. Names that a machine sends are ignored.
"""

from __future__ import annotations

import _socket
import os
import time

from . import firewall, tools
from .addresses import DOMAIN, HOST_NAME
from .firewall import BRIDGE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .addresses import AddressBook, Member, Subnets

# Where it finds the files, in its own mount namespace.
PLACE = "/run/served"
_INTERNAL = HOST_NAME.partition(".")[2]


def arguments(subnets: Subnets) -> list[str]:
    words = [
        "--keep-in-foreground",
        "--conf-file=/dev/null",
        "--pid-file=",
        "--log-facility=/dev/null",
        "--user=root",
        "--group=root",
        "--no-hosts",
        "--no-resolv",
        "--no-poll",
        f"--server={subnets.resolver}",
        f"--addn-hosts={PLACE}/hosts",
        f"--interface={BRIDGE}",
        "--except-interface=lo",
        "--bind-interfaces",
        "--domain-needed",
        f"--local=/{DOMAIN}/",
        f"--local=/{_INTERNAL}/",
        f"--local=/{_reverse(subnets.machines)}/",
        "--dhcp-authoritative",
        "--leasefile-ro",
        "--quiet-dhcp",
        "--quiet-dhcp6",
        "--quiet-ra",
        "--dhcp-ignore-names",
        f"--dhcp-hostsfile={PLACE}/leases",
        f"--dhcp-range={subnets.address(0)},static,255.255.255.0,infinite",
        f"--dhcp-option=option:domain-name,{DOMAIN}",
        f"--dhcp-option=option:domain-search,{DOMAIN}",
    ]
    if subnets.prefix6:
        # A router lifetime of zero, because IPv6 does not reach the internet.
        words += ["--enable-ra", f"--ra-param={BRIDGE},600,0"]
        words += [f"--dhcp-range={subnets.prefix6}::,ra-only,64,infinite"]
    return words


def _reverse(part: str) -> str:
    return ".".join([*reversed(part.split(".")), "in-addr.arpa"])


def publish(book: AddressBook, ports: set[str]) -> str:
    """Update the firewall and the name server with the machines that have one of these ports.

    Call it in the router's namespace. The name server reads its files on a signal; from then on it
    resolves the name that is returned.
    """
    guard, mark = start_to_publish(book, ports)
    guard.wait()
    return mark


def start_to_publish(book: AddressBook, ports: set[str]) -> tuple[tools.Call, str]:
    """Like `publish`; the firewall is updated once the returned call has ended."""
    subnets = book.subnets()
    joined = [member for member in book.members() if member.port in ports]
    # First, because it may fail, and a call that has started has to be waited for.
    mark = _write_files(book, subnets, joined)
    return tools.start("nft", "-f", "-", text=firewall.members(subnets, joined)), mark


def _write_files(book: AddressBook, subnets: Subnets, joined: list[Member]) -> str:
    mark = f"{time.time_ns():x}.{_INTERNAL}"
    hosts = [f"{subnets.loopback} {HOST_NAME}", f"{subnets.gateway} router.{_INTERNAL} {mark}"]
    leases = []
    for member in joined:
        its = member.addresses(subnets)
        names = f"{member.name}.{DOMAIN}"
        if "." not in member.name and member.name.lower() != "localhost":
            names += f" {member.name}"
        hosts += [f"{address} {names}" for address in (its.ip4, its.ip6) if address]
        leases.append(f"{its.mac},{its.ip4},infinite")
    for name, lines in (("hosts", hosts), ("leases", leases)):
        path = book.file("served", name)
        with open(f"{path}.new", "w") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write("\n".join([*lines, ""]))
        os.replace(f"{path}.new", path)
    return mark


def has_read(
    subnets: Subnets, mark: str, patience: float = 10, ended: Callable[[], bool] = bool
) -> bool:
    """Wait until it has read what `publish` wrote. Call it in the router's namespace."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in mark.split("."))
    question = b"OR\1\0\0\1\0\0\0\0\0\0" + labels + b"\0\0\1\0\1"
    wanted = _socket.inet_aton(subnets.gateway)
    deadline = time.monotonic() + patience
    asking = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
    try:
        asking.settimeout(0.2)
        asking.connect((subnets.gateway, 53))
        while time.monotonic() < deadline and not ended():
            try:
                asking.send(question)
                if asking.recv(512).endswith(wanted):
                    return True
            except OSError:
                pass  # it does not listen yet
            time.sleep(0.002)
    finally:
        asking.close()
    return False
