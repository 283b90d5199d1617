"""`orbctl` for Linux: machines without OrbStack.

This package imports nothing from pyinfra. ``orbctl-simulator run`` imports nothing that is slow to
load, because every command of a deploy calls it.
"""

from __future__ import annotations
