"""Starting and stopping booted machines, on the commands' side."""

from __future__ import annotations

import os
import re
import select
import signal
import sys
import time

from . import cgroups
from .runstate import RUNNING, STARTING, STOPPED, STOPPING, RunState, state
from .state import FILES, Failure, Machine, cache, home, python, readable, rpc

_CHECK = 0.02
_PATIENCE = 10.0  # seconds until a supervisor is considered to hang


def _timeouts() -> tuple[str, str]:
    """The number of seconds that a machine may take to boot, and to shut down."""
    names = ("ORBCTL_SIMULATOR_BOOT_TIMEOUT", "ORBCTL_SIMULATOR_STOP_TIMEOUT")
    boot, stop = (os.environ.get(name) or default for name, default in zip(names, ("30", "10")))
    for name, value in zip(names, (boot, stop)):
        if not re.fullmatch(r"\d+(\.\d+)?", value):
            raise Failure(f"{name}: not a number of seconds: '{value}'")
    return boot, stop


class Start:
    """A started machine that is up. Unless it is committed, it is killed when this process ends or
    this context is left.

    `shares` are groups of four words: source, target, and the ids of the owner.
    """

    def __init__(
        self, machine: Machine, shares: list[str], create: bool = False, password: str = ""
    ) -> None:
        self._machine = machine
        self._start_supervisor(password)
        try:
            self._boot(machine.lower, shares, "create" if create else "start")
        except BaseException:
            self.__exit__()
            raise

    def _start_supervisor(self, password: str) -> None:
        waits, self._control = os.pipe()
        self._status, report = os.pipe()
        secret = readable(password)
        child = os.fork()
        if child == 0:
            self._become_supervisor(waits, report, secret)
        for fd in (waits, report, secret):
            os.close(fd)
        os.waitpid(child, 0)

    def _become_supervisor(self, control: int, report: int, secret: int) -> None:
        """Fork once more, so that no process has to wait for the supervisor."""
        try:
            os.setsid()
            if os.fork():
                os._exit(0)
            os.chdir(self._machine.path)
            null = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            for fd in (control, report, secret):
                os.set_inheritable(fd, True)
            words = [self._machine.path, str(control), str(report), str(secret)]
            os.execve(sys.executable, python("supervisor", *words), {})
        except BaseException as error:
            os.write(report, f"error {error}\n".encode(errors="surrogateescape"))
        finally:
            os._exit(1)

    def _boot(self, lowers: list[str], shares: list[str], how: str) -> None:
        clock = os.environ.get("ORBCTL_SIMULATOR_UPTIME") or "own"
        plan = [how, FILES, home(), cache(), str(len(lowers)), *lowers, *shares]
        text = "".join(f"{word}\0" for word in (clock, *_timeouts(), *plan)) + "\0"
        try:  # noqa: SIM105 contextlib is slow to import
            os.write(self._control, text.encode(errors="surrogateescape"))
        except BrokenPipeError:
            pass  # the supervisor has reported why it exited
        with open(self._status, errors="surrogateescape") as file:
            word, _, reason = file.readline().rstrip("\n").partition(" ")
        if word != "up":
            raise Failure(reason or "setup: the machine's supervisor was killed")

    def commit(self) -> None:
        os.write(self._control, b"!")
        os.close(self._control)
        self._control = -1

    def __enter__(self) -> Start:
        return self

    def __exit__(self, *_: object) -> None:
        if self._control >= 0:
            os.close(self._control)
            end(self._machine, at_once=True)


def settle(machine: Machine) -> bool:
    """Wait until a machine has finished what it does by itself. Returns whether it runs.

    It may be rebooting, or shutting down after a command was killed.
    """
    while state(machine) == STARTING:
        time.sleep(_CHECK)
    if state(machine) == STOPPING:
        end(machine)
    return state(machine) == RUNNING


class Pause:
    """In this context, a machine's processes are frozen. They are thawed if this process dies."""

    def __init__(self, machine: Machine) -> None:
        self._machine, self._watcher, self._go_on = machine, 0, -1

    def __enter__(self) -> None:
        if state(self._machine) == STOPPED:
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
    try:  # noqa: SIM105 contextlib is slow to import
        cgroups.freeze(machine.id, frozen)
    except FileNotFoundError:
        pass  # it has just stopped


def end(machine: Machine, at_once: bool = False) -> None:
    """Shut a machine down, or kill it; also cleans up after a killed supervisor."""
    found = RunState.read(machine.file("pid"))
    if found is not None and found.is_supervised:
        try:
            supervisor = os.pidfd_open(found.supervisor)
        except ProcessLookupError:
            supervisor = -1
        if supervisor >= 0 and found.is_supervised:
            number = signal.SIGINT if at_once else signal.SIGTERM
            signal.pidfd_send_signal(supervisor, number)
            _wait_for(supervisor, _PATIENCE + (0 if at_once else float(_timeouts()[1])))
        if supervisor >= 0:
            os.close(supervisor)
    try:
        cgroups.remove(machine.id)
    except OSError as error:
        raise rpc(f"stop '{machine.name}': {error.strerror}") from None


def _wait_for(supervisor: int, seconds: float) -> None:
    """Wait until a supervisor has exited; kill it if it hangs."""
    if not select.select([supervisor], [], [], seconds)[0]:
        signal.pidfd_send_signal(supervisor, signal.SIGKILL)
        select.select([supervisor], [], [])
