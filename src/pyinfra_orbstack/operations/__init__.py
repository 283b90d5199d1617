"""Operations on OrbStack."""

from __future__ import annotations
