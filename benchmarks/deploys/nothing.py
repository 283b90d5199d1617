"""No operation at all: what starting pyinfra and connecting cost."""

from __future__ import annotations
