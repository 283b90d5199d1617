"""Servers, reached over SSH: the groups of local.py, with other hosts in them."""

from __future__ import annotations

from typing import Any

# A server: ("web1.example.com", {"ssh_user": "admin", "address": "192.0.2.1"}). The address is
# the one that the other servers know it by; the firewalls let that in.
web: list[tuple[str, dict[str, Any]]] = []
db: list[tuple[str, dict[str, Any]]] = []
