"""The password that sudo asks for.

pyinfra's own retry runs a command again if sudo's message appears anywhere in its output, asks
for every host at once, and ends the run of all hosts if there is no terminal to ask on.
"""

from __future__ import annotations

import contextlib
import shlex
import sys
import termios
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import gevent
from gevent.lock import RLock
from pyinfra import logger
from pyinfra.connectors import util
from pyinfra.connectors.util import CommandOutput

if TYPE_CHECKING:
    from pyinfra.api.host import Host

    from pyinfra_orbstack.runner import Runner

#: The messages of sudo and sudo-rs when they must not prompt.
REQUIRED = ("sudo: a password is required", "sudo-rs: interactive authentication is required")

#: The key under which pyinfra stores a typed password.
TYPED = "prompted_sudo_password"

_one_at_a_time = RLock()
_typed: list[str] = []


def refused(status: int, output: CommandOutput) -> bool:
    """Whether sudo itself requires a password, and nothing else was printed."""
    lines = [line.line.strip() for line in output.combined_lines]
    said = [line for line in lines if line]
    own = all(line.startswith(("sudo: ", "sudo-rs: ")) for line in said)
    return status == 1 and own and any(line in REQUIRED for line in said)


def ask(host: Host, works: Callable[[], bool]) -> bool:
    """Ask for the password of a host, and keep it for everything that runs there.

    Hosts ask one after the other, and a password that was typed for one is tried on the others.

    Args:
        host: The host.
        works: Whether sudo accepts the password that is stored for the host.

    Returns:
        Whether there is a password now; without a terminal there is none.
    """
    with _one_at_a_time:
        if host.connector_data.get(TYPED):
            return True  # another greenlet has asked for the same host
        for password in _typed[-1:]:
            host.connector_data[TYPED] = password
            if works():
                return True
            del host.connector_data[TYPED]
        password = _read(f"{host.print_prefix}sudo password: ")
        if not password:
            logger.error(
                f"{host.print_prefix}sudo requires a password, and stdin is not a terminal: "
                "set _sudo_password in the host's data"
            )
            return False
        host.connector_data[TYPED] = password
        _typed[:] = [password]
        return True


class AskpassFiles:
    """The password files that pyinfra creates in a target, and must recreate after a restart."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._paths: set[str] = set()

    def note(self) -> list[str]:
        """Remember the current files; return the keys under which pyinfra stores them."""
        data = self._host.connector_data
        kinds = ("sudo_askpass_path", "su_askpass_path")
        keys = [key for key in list(data) if str(key).startswith(kinds)]
        paths = [data[key] for key in keys]
        self._paths |= {one for one in paths if isinstance(one, str) and one.startswith("/")}
        return keys

    def forget(self) -> None:
        """Make pyinfra create new files."""
        for key in self.note():
            del self._host.connector_data[key]

    def remove(self, runner: Runner) -> None:
        """Remove all of them, unless that would start the target."""
        if not self._paths:
            return
        words = ["rm", "-f", *sorted(self._paths)]
        if not runner.run_if_idle(shlex.join(words), timeout=10):
            runner.target.refresh()
            if runner.target.state != "running":
                return
            runner.as_root(*words)
        self._paths.clear()


def _read(prompt: str) -> str:
    """Read a password from the terminal; "" if there is no terminal or no input."""
    if sys.stdin is None or sys.stdin.closed or not sys.stdin.isatty():
        return ""
    with _terminal_restored(), contextlib.suppress(EOFError):
        # In a thread, since it blocks.
        return str(gevent.get_hub().threadpool.apply(util.getpass, (prompt,)))
    return ""


@contextlib.contextmanager
def _terminal_restored() -> Iterator[None]:
    """Restore the terminal's echo: after Ctrl-C the thread keeps waiting with the echo off."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
