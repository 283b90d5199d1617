"""``files.rsync``: rsync's own client on this host, with a target as its remote shell."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping

from pyinfra.api.command import QuoteString, StringCommand
from pyinfra.connectors.util import CommandOutput

from pyinfra_orbstack import protocol, rsync_shell

#: A command that prints nothing if rsync is not installed.
FIND = StringCommand("command -v rsync || true")
# Without `$`, which `sudo -i` would expand.
_SERVER = f'eval "`dd bs=1 count={len(rsync_shell.SERVER)} 2>/dev/null`"'


def missing() -> str:
    """What to do if this host has no rsync; "" if it has one."""
    if shutil.which("rsync"):
        return ""
    return "rsync was not found on this host: install it, for example with apt or brew"


def missing_in(target: object) -> str:
    """What to do about a target that has no rsync."""
    return (
        f"{target} has no rsync: install it there first, for example with "
        'server.packages(["rsync"])'
    )


class Transfer:
    """One run of rsync.

    Args:
        src: A local path.
        dest: A path in the target, as `files.put` takes it.
        flags: rsync's options, as pyinfra's `files.rsync` takes them: words as for a shell, which
            none expands.

    Raises:
        OSError: One of these is not valid.
    """

    def __init__(self, src: str, dest: str, flags: Iterable[str]) -> None:
        if isinstance(flags, str):
            raise OSError(f'flags must be a list, such as ["-a"], not {flags!r}')
        try:
            self._flags = shlex.split(" ".join(flags))
        except ValueError as broken:
            raise OSError(
                f"cannot split flags into words ({broken}): quote them as in a shell"
            ) from None
        self._src, self._dest = _path("src", src), _path("dest", dest)

    def __str__(self) -> str:
        return shlex.join(["rsync", *self._flags, self._src, f":{self._dest}"])

    @property
    def needs_rsync(self) -> bool:
        """Whether the server is the target's own rsync."""
        return not any(flag.startswith("--rsync-path") for flag in self._flags)

    @property
    def server(self) -> StringCommand:
        """The command to run in the target."""
        return StringCommand("sh", "-c", QuoteString(_SERVER))

    def client(
        self, argv: list[str], first: str, environment: Mapping[str, str]
    ) -> tuple[list[str], dict[str, str]]:
        """The command line of the client and its environment.

        Args:
            argv: The command line that reaches the target.
            first: The line to send there first.
            environment: The environment of that command line.
        """
        shell = " ".join(map(_word, (sys.executable, "-I", rsync_shell.__file__)))
        words = ["rsync", *self._flags, f"--rsh={shell}", "--", self._src]
        given = {
            rsync_shell.VARIABLE: json.dumps([argv, first, self._dest]),
            # If its arguments come as input, there is no destination to replace.
            "RSYNC_PROTECT_ARGS": "0",
        }
        return [*words, f"orbstack:{rsync_shell.DESTINATION}"], {**environment, **given}


def failure(status: int, output: CommandOutput) -> str:
    """One line about a run of rsync that failed."""
    said = " ".join(" ".join(output.stderr_lines).split())
    return f"rsync failed with exit code {status}: {said[-500:] or 'no output'}"


def _path(what: str, path: str) -> str:
    """A path that no version of rsync reads as an option, a host or a daemon's module."""
    path = os.fspath(path)
    protocol.encoded(what, path)
    if not path:
        raise OSError(f"{what} must not be empty: use '.' for the current directory")
    return path if path.startswith("/") else f"./{path}"


def _word(text: str) -> str:
    """A word for `--rsh`, which rsync splits by rules of its own."""
    return '"' + text.replace('"', '""') + '"' if re.search(r"[\s'\"]", text) else text
