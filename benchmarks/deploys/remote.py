"""Bare commands, uploads and downloads, each timed separately, on a remote host."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from pyinfra import host

SIZE = 1_000_000


def timed(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    if not action():
        raise SystemExit("a step failed")
    return time.perf_counter() - begun


content, arrived = os.urandom(SIZE), io.BytesIO()
path = f"{host.data.folder}/file"
taken = {
    "command": [timed(lambda: host.run_shell_command("true")[0]) for _ in range(host.data.count)],
    "upload": [timed(lambda: host.put_file(io.BytesIO(content), path)) for _ in range(3)],
    "download": [timed(lambda: host.get_file(path, arrived)) for _ in range(1)],
}
if arrived.getvalue() != content:
    raise SystemExit("the download differs")
Path(host.data.results).write_text(json.dumps(taken))
