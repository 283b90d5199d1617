"""One command for each operation."""

from __future__ import annotations

from pyinfra import host
from pyinfra.operations import server

for number in range(host.data.count):
    server.shell(name=f"shell {number}", commands=[f"echo {number} >>{host.data.folder}/{number}"])
