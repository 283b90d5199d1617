"""Data of the servers in inventories/production.py, whose name makes the group `production`."""

from __future__ import annotations

# Lines of public keys. Once there is one, SSH refuses passwords on every server.
operator_keys: list[str] = []
