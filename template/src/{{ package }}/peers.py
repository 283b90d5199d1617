"""What a host knows about others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from ipaddress import ip_address

from pyinfra import inventory
from pyinfra.api import deploy
from pyinfra.api.exceptions import OperationValueError
from pyinfra.operations import files


def addresses(group: str) -> list[str]:
    """Return where the hosts of a group are reached by others.

    A local machine tells its address as long as it runs. For a server it is in the inventory.
    """
    found = []
    for peer in inventory.get_group(group, default=[]):  # pyinfra knows no group without hosts
        address = peer.data.get("address") or peer.data.get("orbstack_ip4")
        if address:
            found.append(check_address(peer.name, address))
        elif not peer.name.startswith("@orbstack/"):
            raise OperationValueError(f"{peer.name}: its inventory has to give it an address")
    return found


def check_address(name: str, address: str) -> str:
    """Return the address if it is one; it goes into other hosts' configuration."""
    try:
        return str(ip_address(address))
    except ValueError:
        raise OperationValueError(f"{name}: {address!r} is not an IP address") from None


@deploy("Other hosts")
def find_as(alias: str, known: Sequence[str]) -> None:
    """Have programs on this host find the first of these addresses by a name of its own."""
    files.line(
        name=f"Where {alias} is",
        path="/etc/hosts",
        line=rf"^\S+\s+{re.escape(alias)}$",
        replace=f"{known[0]} {alias}" if known else None,
        present=bool(known),
    )
