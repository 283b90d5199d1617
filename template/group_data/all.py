"""Data of every host. A file named after a group overrides it, a host's own data overrides both.

Secrets have no place here: docs/secrets.md says where they go.
"""

from __future__ import annotations

# Every operation runs as root, through sudo where the login user is somebody else.
_sudo = True

operator_name = "ops"
operator_keys: list[str] = []

ssh_tcp_forwarding = True

# What the firewall lets in beside SSH: ports for everybody, and for the hosts of a group alone.
open_ports: list[int] = []
open_to_group: dict[int, str] = {}
