"""Servers, reached over SSH: the groups of local.py, with other hosts in them.

    web = [("web1.example.com", {"ssh_user": "admin"})]
"""

from __future__ import annotations

from typing import Any

web: list[tuple[str, dict[str, Any]]] = []
