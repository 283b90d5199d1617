"""Bare commands, each timed separately: the cost of a connector without pyinfra's operations."""

from __future__ import annotations

import json
import time
from pathlib import Path

from pyinfra import host

taken = []
for _ in range(host.data.count):
    begun = time.perf_counter()
    succeeded, output = host.run_shell_command("true")
    taken.append(time.perf_counter() - begun)
    if not succeeded:
        raise SystemExit(f"a bare command failed: {output}")
Path(host.data.results).write_text(json.dumps(taken))
