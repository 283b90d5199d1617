"""Addresses of other hosts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from ipaddress import ip_address

from pyinfra import inventory
from pyinfra.api import deploy
from pyinfra.api.exceptions import OperationValueError
from pyinfra.operations import files


def addresses(group: str) -> list[str]:
    """Return the addresses of the hosts of a group.

    The address of a local machine is known while it runs. That of a server is in the inventory.
    """
    found = []
    for peer in inventory.get_group(group, default=[]):  # pyinfra has no groups without hosts
        address = peer.data.get("address") or peer.data.get("orbstack_ip4")
        if address:
            found.append(check_address(peer.name, address))
        elif not peer.name.startswith("@orbstack/"):
            raise OperationValueError(f"{peer.name} has no address: add one in its inventory")
    return found


def check_address(name: str, address: str) -> str:
    """Return the address if it is valid; it is written into other hosts' configuration."""
    try:
        return str(ip_address(address))
    except ValueError:
        raise OperationValueError(f"{name}: {address!r} is not an IP address") from None


@deploy("Other hosts")
def find_as(alias: str, known: Sequence[str]) -> None:
    """Make a name on this host resolve to the first of these addresses."""
    files.line(
        name=f"Set the address of {alias}",
        path="/etc/hosts",
        line=rf"^\S+\s+{re.escape(alias)}$",
        replace=f"{known[0]} {alias}" if known else None,
        present=bool(known),
    )
