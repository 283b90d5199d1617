"""A connector that does nothing, ``@floor/NAME``: with it, all of a deploy's time is pyinfra's own.

Every command succeeds and prints nothing, so operations find nothing and change everything. pyinfra
finds the connector through the metadata beside this file, if this directory is in PYTHONPATH.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyinfra.connectors.base import BaseConnector
from pyinfra.connectors.util import CommandOutput


class FloorConnector(BaseConnector):
    handles_execution = True

    @staticmethod
    def make_names_data(name: str | None = None) -> Iterator[tuple[str, dict[str, Any], list[str]]]:
        yield f"@floor/{name}", {}, []

    def run_shell_command(self, *args: Any, **arguments: Any) -> tuple[bool, CommandOutput]:
        return True, CommandOutput([])

    def put_file(self, *args: Any, **arguments: Any) -> bool:
        return True

    def get_file(self, *args: Any, **arguments: Any) -> bool:
        return True
