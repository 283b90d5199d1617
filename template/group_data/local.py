"""Data of the machines in inventories/local.py, whose name makes the group `local`."""

from __future__ import annotations

# No keys: `make shell` opens a shell without SSH, and without keys password login stays as it is.
operator_keys: list[str] = []
