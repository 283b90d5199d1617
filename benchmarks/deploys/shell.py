"""One command for each operation."""

from __future__ import annotations

import shlex

from pyinfra import host
from pyinfra.operations import server

folder = shlex.quote(host.data.folder)
for number in range(host.data.count):
    server.shell(name=f"shell {number}", commands=[f"echo {number} >>{folder}/{number}"])
