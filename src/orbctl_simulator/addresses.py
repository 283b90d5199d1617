"""What a state directory records about its network: its subnets, and the address of each machine.

An address belongs to a machine's id from its first `join` until `forget`. Each address has its own
file, so freeing one works on a full disk. The router chooses the subnet when it starts.
"""

from __future__ import annotations

import os

from .light import sha256
from .state import Failure, read_fields, write_fields

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

DOMAIN = "orb.local"
HOST_NAME = "host.orb.internal"
_FIRST, _LAST = 10, 250
_MARKS = str.maketrans("", "", "._-")


class Addresses:
    """The addresses that a machine is reached at, and those that it needs to reach others."""

    def __init__(self, ip4: str, ip6: str, mac: str, gateway: str) -> None:
        self.ip4, self.ip6, self.mac, self.gateway = ip4, ip6, mac, gateway

    def __repr__(self) -> str:
        return f"Addresses({self.ip4}, {self.ip6 or 'no IPv6'}, {self.mac})"


class Subnets:
    """Two /24 and a /64: `link` for the user-mode NAT's end, `machines`, and the ULA."""

    def __init__(self, machines: str, link: str, prefix6: str) -> None:
        self.machines, self.link, self.prefix6 = machines, link, prefix6

    def address(self, number: int) -> str:
        return f"{self.machines}.{number}"

    @property
    def gateway(self) -> str:
        return self.address(1)

    @property
    def gateway6(self) -> str:
        return f"{self.prefix6}::1" if self.prefix6 else ""

    @property
    def host(self) -> str:
        """The host's address on its end of the veth."""
        return self.address(2)

    @property
    def host6(self) -> str:
        return f"{self.prefix6}::2" if self.prefix6 else ""

    @property
    def loopback(self) -> str:
        """The address at which the user-mode NAT answers for the host's loopback."""
        return f"{self.link}.2"

    @property
    def resolver(self) -> str:
        """The address at which it answers for the host's resolver."""
        return f"{self.link}.3"

    def member6(self, mac: str) -> str:
        """Formed from the MAC as a machine does it, so autoconfiguration gets the same address."""
        if not self.prefix6:
            return ""
        part = [int(byte, 16) for byte in mac.split(":")]
        groups = [(part[0] ^ 2) << 8 | part[1], part[2] << 8 | 0xFF, 0xFE00 | part[3]]
        groups.append(part[4] << 8 | part[5])
        return f"{self.prefix6}:" + ":".join(f"{group:x}" for group in groups)


class Member:
    """A machine with an address."""

    def __init__(self, ident: str, fields: dict[str, str]) -> None:
        self.id, self.fields = ident, fields
        self.number = int(fields["number"])
        if not _FIRST <= self.number <= _LAST:
            raise ValueError(f"no such address: {self.number}")
        self.name = fields["name"]
        self.isolated = fields.get("isolated") == "true"
        self.router = fields.get("router", "")  # the router that it joined

    @property
    def port(self) -> str:
        """The name of its interface on the router's side."""
        return f"m{self.number}"

    @property
    def mac(self) -> str:
        return mac_of(self.id)

    def addresses(self, subnets: Subnets) -> Addresses:
        ip6 = subnets.member6(self.mac)
        return Addresses(subnets.address(self.number), ip6, self.mac, subnets.gateway)


def mac_of(ident: str) -> str:
    """A local MAC; its second byte is not zero, so the address has no run of zeros to shorten."""
    digest = _digest(ident)
    return f"02:{digest[0] | 1:02x}:" + ":".join(f"{byte:02x}" for byte in digest[1:5])


def _digest(text: str) -> bytes:
    return sha256(text.encode(errors="surrogateescape")).digest()


def new_prefix() -> str:
    """A random ULA /64; only its last group is zero, for the same reason."""
    part = os.urandom(5)
    return f"fd{part[0]:02x}:{part[1] | 1:x}{part[2]:02x}:{part[3] | 1:x}{part[4]:02x}:0"


def check_id(ident: str) -> None:
    """The id becomes a file name."""
    if not (ident.isascii() and ident.isalnum() and len(ident) <= 64):
        raise Failure(f"invalid machine id: {ident!r}")


def check_name(name: str) -> None:
    """The name becomes a word in the name server's files."""
    plain = name.isascii() and name[:1].isalnum() and name.translate(_MARKS).isalnum()
    if not plain or len(name) > 63:
        raise Failure(f"invalid machine name: {name!r}")


class AddressBook:
    """The directory ``network`` of a state directory."""

    def __init__(self, state: str) -> None:
        self.path = os.path.join(os.path.realpath(state), "network")

    def file(self, *names: str) -> str:
        return os.path.join(self.path, *names)

    def make(self) -> None:
        for name in ("machines", "served"):
            os.makedirs(self.file(name), mode=0o700, exist_ok=True)
        os.chmod(self.file("served"), 0o755)  # noqa: S103 dnsmasq reads it with another id

    @property
    def link(self) -> str:
        """The veth on the host: no two directories have the same device and inode."""
        state = os.stat(os.path.dirname(self.path))
        return "orb-" + _digest(f"{state.st_dev} {state.st_ino}").hex()[:8]

    def subnets(self) -> Subnets:
        """The last choice; before the first one, the subnets that are tried first."""
        try:
            fields = read_fields(self.file("subnets"))
            return Subnets(fields["machines"], fields["link"], fields["prefix6"])
        except (OSError, KeyError):
            return Subnets("198.19.249", "198.19.248", "")

    def save(self, subnets: Subnets) -> None:
        write_fields(self.file("subnets"), dict(vars(subnets)))

    def members(self) -> Iterator[Member]:
        try:
            names = sorted(os.listdir(self.file("machines")))
        except FileNotFoundError:
            return
        for name in names:
            member = self.member(name) if name.isalnum() else None
            if member:
                yield member

    def _file_of(self, ident: str) -> str:
        check_id(ident)
        return self.file("machines", ident)

    def member(self, ident: str) -> Member | None:
        try:
            return Member(ident, read_fields(self._file_of(ident)))
        except (OSError, KeyError, ValueError):
            return None

    def enrol(self, ident: str, name: str, isolated: bool, router: str) -> Member:
        """Assign the address that its id suggests if that is free, otherwise the next free one."""
        known = self.member(ident)
        if known is None:
            taken = {member.number for member in self.members()}
            span = _LAST - _FIRST + 1
            first = int.from_bytes(_digest(ident)[8:12], "big")
            numbers = (_FIRST + (first + step) % span for step in range(span))
            number = next((number for number in numbers if number not in taken), None)
            if number is None:
                raise Failure(f"all {span} addresses are in use: delete a machine")
        else:
            number = known.number
        fields = {"number": str(number), "name": name, "router": router}
        fields["isolated"] = "true" if isolated else "false"
        write_fields(self._file_of(ident), fields)
        return Member(ident, fields)

    def forget(self, ident: str) -> None:
        try:  # noqa: SIM105 contextlib is slow to load
            os.unlink(self._file_of(ident))
        except FileNotFoundError:
            pass

    def tidy(self) -> None:
        """Remove incomplete files that killed processes left. The caller holds the lock."""
        for folder in (self.path, self.file("machines")):
            for name in os.listdir(folder):
                if "." in name:
                    os.unlink(os.path.join(folder, name))
