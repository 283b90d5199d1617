"""Starting and ending a booted machine, from the side of the commands."""

from __future__ import annotations

import os
import signal
import sys

from . import cgroups
from .life import Life
from .state import Failure, Machine, cache, home, rpc
from .supervisor import PATIENCE

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_PROGRAM = (
    f"import sys; sys.path.insert(0, {_ROOT!r});"
    " from orbctl_simulator.supervisor import main; main()"
)


class Start:
    """A started machine that still dies with us; `commit` lets it live on."""

    def __init__(
        self, machine: Machine, lowers: list[str], shares: list[str], create: bool = False
    ) -> None:
        self._machine = machine
        clock = os.environ.get("ORBCTL_SIMULATOR_UPTIME") or "own"
        patience = os.environ.get("ORBCTL_SIMULATOR_BOOT_TIMEOUT") or "30"
        how = "create" if create else "start"
        words = [home(), cache(), clock, patience, ".", how, str(len(lowers)), *lowers, *shares]
        control, self._control = os.pipe()
        status, report = os.pipe()
        child = os.fork()
        if child == 0:
            self._become_supervisor(control, report, words)
        os.close(control)
        os.close(report)
        os.waitpid(child, 0)
        with open(status, errors="surrogateescape") as file:
            word, _, text = file.readline().rstrip("\n").partition(" ")
        if word != "up":
            os.close(self._control)
            raise Failure(text or "setup: machine crashed on startup")

    def _become_supervisor(self, control: int, report: int, words: list[str]) -> None:
        """In a child's child, so that nobody has to wait for it."""
        try:
            os.setsid()
            os.chdir(self._machine.path)
            if os.fork():
                os._exit(0)
            null = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            for fd in (control, report):
                os.set_inheritable(fd, True)
            command = [sys.executable, "-I", "-S", "-B", "-c", _PROGRAM, self._machine.id]
            os.execve(sys.executable, [*command, str(control), str(report), *words], {})
        except BaseException as error:
            os.write(report, f"error {error}\n".encode(errors="surrogateescape"))
        finally:
            os._exit(1)

    def commit(self) -> None:
        os.write(self._control, b"!")
        os.close(self._control)

    def abandon(self) -> None:
        """End it and all its processes."""
        os.close(self._control)
        end(self._machine, at_once=True)


def end(machine: Machine, at_once: bool = False) -> None:
    """Shut it down, and return when nothing of it is left; what a killed supervisor left, too."""
    life = Life.read(machine.file("pid"))
    if life is not None and life.is_supervised:
        with open(f"/proc/{life.supervisor}/stat", "rb"):
            pidfd = os.pidfd_open(life.supervisor)
        if life.is_supervised:
            number = signal.SIGINT if at_once else signal.SIGTERM
            signal.pidfd_send_signal(pidfd, number)
            _wait_for(pidfd, PATIENCE * 2)
        os.close(pidfd)
    try:
        cgroups.remove(machine.id)
    except OSError as error:
        raise rpc(f"stop '{machine.name}': {error.strerror}") from None


def _wait_for(pidfd: int, seconds: float) -> None:
    import select

    if not select.select([pidfd], [], [], seconds)[0]:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        select.select([pidfd], [], [], seconds)
