"""Starting and ending a booted machine, from the side of the commands."""

from __future__ import annotations

import os
import re
import select
import signal
import sys

from . import cgroups
from .life import Life
from .state import Failure, Machine, cache, home, rpc

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_PROGRAM = (
    f"import sys; sys.path.insert(0, {_ROOT!r});"
    " from orbctl_simulator.supervisor import main; main()"
)


_LONGEST = 10.0


def _patience() -> tuple[str, str]:
    """How many seconds a machine may take to boot, and to shut down."""
    names = ("ORBCTL_SIMULATOR_BOOT_TIMEOUT", "ORBCTL_SIMULATOR_STOP_TIMEOUT")
    boot, stop = (os.environ.get(name) or default for name, default in zip(names, ("30", "10")))
    for name, value in zip(names, (boot, stop)):
        if not re.fullmatch(r"\d+(\.\d+)?", value):
            raise Failure(f"{name}: not a number of seconds: '{value}'")
    return boot, stop


class Start:
    """A started machine that still dies with us; `commit` lets it live on."""

    def __init__(
        self, machine: Machine, lowers: list[str], shares: list[str], create: bool = False
    ) -> None:
        self._machine = machine
        clock = os.environ.get("ORBCTL_SIMULATOR_UPTIME") or "own"
        how = "create" if create else "start"
        words = [home(), cache(), clock, *_patience(), ".", how, str(len(lowers)), *lowers, *shares]
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
            raise Failure(text or "setup: the process beside the machine has ended")

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


def state(machine: Machine) -> str:
    life = Life.read(machine.file("pid"))
    return life.state if life and life.is_supervised else "stopped"


class Pause:
    """A running machine's processes stand still; they go on, too, if we are killed meanwhile."""

    def __init__(self, machine: Machine) -> None:
        self._machine, self._watcher, self._go_on = machine, 0, -1

    def __enter__(self) -> None:
        if state(self._machine) == "stopped":
            return
        waits, self._go_on = os.pipe()
        self._watcher = os.fork()
        if self._watcher == 0:
            os.setsid()
            os.close(self._go_on)
            os.read(waits, 1)
            _freeze(self._machine, False)
            os._exit(0)
        os.close(waits)
        _freeze(self._machine, True)

    def __exit__(self, *_: object) -> None:
        if self._watcher:
            os.close(self._go_on)
            os.waitpid(self._watcher, 0)


def _freeze(machine: Machine, frozen: bool) -> None:
    try:  # noqa: SIM105 contextlib takes longer to load
        cgroups.freeze(machine.id, frozen)
    except FileNotFoundError:
        pass  # it has just ended


def end(machine: Machine, at_once: bool = False) -> None:
    """Shut it down, and return when nothing of it is left; what a killed supervisor left, too."""
    life = Life.read(machine.file("pid"))
    if life is not None and life.is_supervised:
        with open(f"/proc/{life.supervisor}/stat", "rb"):
            pidfd = os.pidfd_open(life.supervisor)
        if life.is_supervised:
            number = signal.SIGINT if at_once else signal.SIGTERM
            signal.pidfd_send_signal(pidfd, number)
            _wait_for(pidfd, _LONGEST + (0 if at_once else float(_patience()[1])))
        os.close(pidfd)
    try:
        cgroups.remove(machine.id)
    except OSError as error:
        raise rpc(f"stop '{machine.name}': {error.strerror}") from None


def _wait_for(supervisor: int, seconds: float) -> None:
    """It knows how long to wait for its machine; when it hangs itself, it is ended."""
    if not select.select([supervisor], [], [], seconds)[0]:
        signal.pidfd_send_signal(supervisor, signal.SIGKILL)
        select.select([supervisor], [], [])
