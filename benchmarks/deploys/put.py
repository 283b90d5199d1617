"""Uploads of small files."""

from __future__ import annotations

from pyinfra import host
from pyinfra.operations import files

for number in range(host.data.count):
    files.put(
        name=f"put {number}",
        src=f"{host.data.sources}/{number}",
        dest=f"{host.data.folder}/{number}",
    )
