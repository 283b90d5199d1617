"""Facts before changes: the usual operation."""

from __future__ import annotations

from pyinfra import host
from pyinfra.operations import files

for number in range(host.data.count):
    files.file(name=f"file {number}", path=f"{host.data.folder}/{number}", mode="640")
