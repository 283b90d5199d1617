"""Data of the machines in inventories/local.py; the file name defines the group."""

from __future__ import annotations

# `make shell` does not use SSH, so no keys are needed. Without keys, password login is unchanged.
operator_keys: list[str] = []
