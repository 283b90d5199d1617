"""Data of all hosts. Group data overrides it, and a host's own data overrides both.

Never put secrets here: see docs/secrets.md.
"""

from __future__ import annotations

# Every operation runs as root, through sudo if the login user is not root.
_sudo = True

operator_name = "ops"
operator_keys: list[str] = []

ssh_tcp_forwarding = True

# Ports that the firewall allows besides SSH: from anywhere, or only from the hosts of a group.
open_ports: list[int] = []
open_to_group: dict[int, str] = {}
