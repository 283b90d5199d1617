"""No operation at all: the cost of starting pyinfra and connecting."""

from __future__ import annotations
