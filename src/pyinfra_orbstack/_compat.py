"""Differences between the versions of pyinfra."""

from __future__ import annotations

from typing import Any


def half_imported(name: str) -> Any:
    """Stand in for attributes of a module that is still being imported.

    pyinfra 3.2 loads every connector in the middle of its own import, to find `@ssh`. If the
    connector's module is what imports pyinfra, its class does not exist yet, and no host can need
    it either.
    """
    if name == "OrbStackConnector":  # pragma: no cover: pyinfra 3.2
        from pyinfra.connectors.base import BaseConnector

        return BaseConnector
    raise AttributeError(f"module 'pyinfra_orbstack.connector' has no attribute {name!r}")


def echo(line: str) -> None:
    """Print a line to the stream where pyinfra prints everything except results."""
    _output("echo", "echo")(line, err=True)


def red(text: str) -> str:
    """Colour text as pyinfra colours errors."""
    return str(_output("format_text", "style")(text, "red"))


def _output(name: str, old: str) -> Any:
    try:
        from pyinfra.api import output
    except ImportError:  # pragma: no cover: before pyinfra 3.8
        import click

        return getattr(click, old)
    return getattr(output, name)
