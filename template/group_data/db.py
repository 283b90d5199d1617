"""Data of the group `db`, on this computer and in production."""

from __future__ import annotations

open_to_group = {5432: "web"}
