"""Servers, reached over SSH: the groups of local.py, with other hosts in them."""

from __future__ import annotations

from typing import Any

# A server: ("web1.example.com", {"ssh_user": "admin"})
web: list[tuple[str, dict[str, Any]]] = []
