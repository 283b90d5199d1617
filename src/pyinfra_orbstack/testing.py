"""Machines as pytest fixtures."""

from __future__ import annotations
