"""Facts about OrbStack."""

from __future__ import annotations
