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
    """A machine that starts, and dies with us still; `commit` lets it live on.

    The process that is to stand beside it loads what it needs while we get its files ready.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        waits, self._control = os.pipe()
        self._status, report = os.pipe()
        child = os.fork()
        if child == 0:
            self._become_supervisor(waits, report)
        os.close(waits)
        os.close(report)
        os.waitpid(child, 0)

    def _become_supervisor(self, control: int, report: int) -> None:
        """In a child's child, so that nobody has to wait for it."""
        try:
            os.setsid()
            if os.fork():
                os._exit(0)
            os.chdir(self._machine.path)
            null = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            for fd in (control, report):
                os.set_inheritable(fd, True)
            command = [sys.executable, "-I", "-S", "-B", "-c", _PROGRAM, self._machine.path]
            os.execve(sys.executable, [*command, str(control), str(report)], {})
        except BaseException as error:
            os.write(report, f"error {error}\n".encode(errors="surrogateescape"))
        finally:
            os._exit(1)

    def boot(self, lowers: list[str], shares: list[str], create: bool = False) -> None:
        """Return when it is up; `lowers` are its root file systems, the uppermost first.

        `shares` are sources, targets and the ids of whom each belongs to.
        """
        clock = os.environ.get("ORBCTL_SIMULATOR_UPTIME") or "own"
        how = "create" if create else "start"
        words = [home(), cache(), clock, *_patience(), ".", how, str(len(lowers)), *lowers, *shares]
        text = "".join(f"{word}\0" for word in words) + "\0"
        try:  # noqa: SIM105 contextlib takes longer to load
            os.write(self._control, text.encode(errors="surrogateescape"))
        except BrokenPipeError:
            pass  # it says why
        with open(self._status, errors="surrogateescape") as file:
            word, _, text = file.readline().rstrip("\n").partition(" ")
        if word != "up":
            raise Failure(text or "setup: the process beside the machine has ended")

    def commit(self) -> None:
        os.write(self._control, b"!")
        os.close(self._control)
        self._control = -1

    def __enter__(self) -> Start:
        return self

    def __exit__(self, *_: object) -> None:
        """End it and all its processes, unless it is to live on."""
        if self._control >= 0:
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
