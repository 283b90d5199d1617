"""Servers, reached over SSH: the groups of local.py, with different hosts."""

from __future__ import annotations

from typing import Any

# Example: ("web1.example.com", {"ssh_user": "admin", "address": "192.0.2.1"}). The other servers
# use this address to reach the server, and their firewalls allow it.
web: list[tuple[str, dict[str, Any]]] = []
db: list[tuple[str, dict[str, Any]]] = []
