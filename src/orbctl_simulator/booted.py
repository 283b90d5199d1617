"""Starting and stopping booted machines, on the commands' side."""

from __future__ import annotations

import os
import struct
import time
from _signal import pidfd_send_signal  # type: ignore[import-not-found] # signal loads slowly

from . import cgroups, shares
from .runstate import RUNNING, SI_QUEUE, STARTING, STOPPED, STOPPING, RunState, state
from .state import FILES, Failure, Machine, cache, home, rpc
from .supervisors import Supervisor, wait_for
from .userns import system_call

_SIGINT, _SIGTERM = 2, 15
_PIDFD_SEND_SIGNAL, _SIGINFO = 424, 128
_CHECK = 0.02
_PATIENCE = 10.0  # seconds until a supervisor is considered to hang


def _timeouts() -> tuple[str, str]:
    """The number of seconds that a machine may take to boot, and to shut down."""
    names = ("ORBCTL_SIMULATOR_BOOT_TIMEOUT", "ORBCTL_SIMULATOR_STOP_TIMEOUT")
    boot, stop = (os.environ.get(name) or default for name, default in zip(names, ("30", "10")))
    for name, value in zip(names, (boot, stop)):
        whole, point, rest = value.partition(".")
        if not (whole.isdecimal() and (rest.isdecimal() or not point)):
            raise Failure(f"{name}: not a number of seconds: '{value}'")
    return boot, stop


class Start:
    """A started machine that is up. Unless it is committed, it is killed when this process ends or
    this context is left.
    """

    def __init__(
        self,
        machine: Machine,
        create: bool = False,
        password: str = "",
        supervisor: Supervisor | None = None,
    ) -> None:
        self._machine, self._is_committed = machine, False
        self._supervisor = supervisor or Supervisor(machine.path)
        try:
            clock = os.environ.get("ORBCTL_SIMULATOR_UPTIME") or "own"
            plan = ["create" if create else "start", FILES, home(), cache()]
            plan += [str(len(machine.lower)), *machine.lower, *shares.of(machine)]
            timeouts = _timeouts()
            limit = sum(map(float, timeouts)) + _PATIENCE
            self._supervisor.boot([clock, *timeouts, *plan], password, limit)
        except BaseException:
            self.__exit__()
            raise

    def commit(self) -> None:
        self._supervisor.commit()
        self._is_committed = True

    def __enter__(self) -> Start:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._is_committed:
            self._supervisor.close()
            end(self._machine, at_once=True)
            self._supervisor.wait(_PATIENCE)  # it may not have recorded itself


def settle(machine: Machine) -> bool:
    """Wait until a machine has finished what it does by itself. Returns whether it runs.

    It may be rebooting, or shutting down after a command was killed.
    """
    deadline = 0.0
    while True:
        now = state(machine)
        if now == STARTING:
            deadline = deadline or time.monotonic() + float(_timeouts()[0]) + _PATIENCE
            if time.monotonic() < deadline:
                time.sleep(_CHECK)
            else:  # its supervisor hangs
                end(machine, at_once=True)
        elif now == STOPPING:
            end(machine)
        else:
            return now == RUNNING


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
            try:
                os.setsid()
                os.close(self._go_on)
                os.read(waits, 1)
                _freeze(self._machine, False)
            finally:
                os._exit(0)
        os.close(waits)
        _freeze(self._machine, True)

    def __exit__(self, *_: object) -> None:
        if self._watcher:
            os.close(self._go_on)
            os.waitpid(self._watcher, 0)
            _freeze(self._machine, False)  # in case the watcher was killed


def _freeze(machine: Machine, frozen: bool) -> None:
    try:
        cgroups.freeze(machine.id, frozen)
    except FileNotFoundError:
        pass  # it has just stopped
    except OSError:  # while it is thawed, it has just stopped, too
        if frozen:
            raise


def end(machine: Machine, at_once: bool = False) -> None:
    """Shut a machine down, or kill it; also cleans up after a killed supervisor."""
    found = RunState.read(machine.file("pid"))
    seconds = 0.0 if at_once else float(_timeouts()[1])
    if found is not None and found.is_supervised:
        try:
            supervisor = os.pidfd_open(found.supervisor)
        except ProcessLookupError:
            supervisor = -1
        if supervisor >= 0 and found.is_supervised:
            try:
                if at_once:
                    pidfd_send_signal(supervisor, _SIGINT)
                else:
                    _shut_down(supervisor, seconds)
                wait_for(supervisor, _PATIENCE + seconds)
            except ProcessLookupError:
                pass  # it has just exited
        if supervisor >= 0:
            os.close(supervisor)
    try:
        cgroups.remove(machine.id)
    except OSError as error:
        raise rpc(f"stop '{machine.name}': {error.strerror}") from None


def _shut_down(supervisor: int, seconds: float) -> None:
    """Send it SIGTERM, with the milliseconds that the machine may take."""
    value = min(int(seconds * 1000), (1 << 31) - 1)
    head = struct.pack("@iii4xiIi", _SIGTERM, 0, SI_QUEUE, os.getpid(), os.getuid(), value)
    told = head.ljust(_SIGINFO, b"\0")
    system_call(_PIDFD_SEND_SIGNAL, "stop", supervisor, _SIGTERM, told, 0)
