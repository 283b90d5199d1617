"""Data of the servers in inventories/production.py, whose name makes the group `production`."""

from __future__ import annotations

# Only servers whose keys are in this file: `make trust INVENTORY=production` records them.
ssh_known_hosts_file = "known_hosts"
ssh_strict_host_key_checking = "yes"

# Lines of public keys. Once there is one, SSH refuses passwords on every server.
operator_keys: list[str] = []
