"""Data of the containers in inventories/containers.py, whose name makes the group `containers`."""

from __future__ import annotations

# As root from the start: images seldom have sudo.
_sudo = False
orbstack_user = "root"

app_settings = {"LOG_LEVEL": "debug"}
