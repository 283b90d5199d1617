"""Data of the containers in inventories/containers.py; the file name defines the group."""

from __future__ import annotations

# Log in as root, because few images include sudo.
_sudo = False
orbstack_user = "root"

app_settings = {"LOG_LEVEL": "debug"}
