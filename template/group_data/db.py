"""Data of the group `db`, in all inventories."""

from __future__ import annotations

open_to_group = {5432: "web"}
