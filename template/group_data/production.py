"""Data of the servers in inventories/production.py; the file name defines the group."""

from __future__ import annotations

# Connect only to servers whose keys are in this file; `make trust INVENTORY=production` adds them.
ssh_known_hosts_file = "known_hosts"
ssh_strict_host_key_checking = "yes"

# Public keys, one per string. Once there is a key, SSH refuses passwords on every server.
operator_keys: list[str] = []
