"""Code for targets and this host: `.sh` files for sh (dash, bash, busybox), and one for perl."""

from __future__ import annotations

import functools
from pathlib import Path


@functools.cache
def text(name: str, kind: str = "sh") -> str:
    """Return the file ``name.kind`` of this package, without comments and indentation."""
    lines = Path(__file__).with_name(f"{name}.{kind}").read_text(encoding="utf-8").splitlines()
    kept = (line.strip() for line in lines)
    return "".join(f"{line}\n" for line in kept if line and not line.startswith("#"))
