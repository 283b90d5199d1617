"""The process on the host that boots a machine and stays with it.

It reaps the machine's init, boots the machine again if it requested a reboot, records the machine's
state, logs its console, and removes its control groups at the end. It has an empty environment and
no file of its creator, and cannot be inspected. If it is killed, the kernel kills the init. SIGTERM
shuts the machine down, SIGINT kills it.
"""

from __future__ import annotations

import ctypes
import os
import select
import sys
import time

from . import cgroups, userns
from .bootplan import Plan
from .boots import Boot
from .linux import close_all_but
from .rights import hide_from_others
from .runstate import RUNNING, STARTING, STOPPING, RunState
from .state import read_fields, start_time
from .wiring import disconnect

_SIGINT, _SIGTERM = 2, 15
_PR_SET_CHILD_SUBREAPER, _SIG_BLOCK, _SIGINFO = 36, 0, 128
_NO_END, _SHUT_DOWN, _KILL = range(3)
_CHECK, _TICK = 0.02, 2.0  # seconds between checks, during a boot and later
_GRACE = 1.0  # seconds for commands to exit after their machine

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    path, control, status, secret = sys.argv[1], *map(int, sys.argv[2:])
    close_all_but(control, status, secret)
    for fd in (control, status, secret):
        os.set_inheritable(fd, False)
    hide_from_others()
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1), 0, 0, 0)
    words = _read_words(control)
    if words:
        Supervisor(os.path.basename(path), control, status, secret, words).run()


def _read_words(control: int) -> list[str]:
    """What to boot, or nothing if the command that started this process has given up."""
    data = b""
    while not data.endswith(b"\0\0"):
        more = os.read(control, 1 << 16)
        if not more:
            return []
        data += more
    return data[:-2].decode(errors="surrogateescape").split("\0")


def _block_signals() -> int:
    """Block SIGTERM and SIGINT; returns a descriptor to read them from."""
    wanted = (ctypes.c_uint64 * 16)(1 << (_SIGTERM - 1) | 1 << (_SIGINT - 1))
    _libc.sigprocmask(_SIG_BLOCK, wanted, None)
    return int(_libc.signalfd(-1, wanted, os.O_CLOEXEC))


class Supervisor:
    """Supervises one machine over all its boots.

    `control` stays open while the command that starts the machine runs; ``!`` from it means that
    the machine may outlive it. `status` gets ``up`` or ``error TEXT``. From `secret`, the first
    boot reads the users' password, if they are to have one.
    """

    def __init__(
        self, ident: str, control: int, status: int, secret: int, words: list[str]
    ) -> None:
        self._control, self._status, self._secret = control, status, secret
        clock, boot_time, stop_time, *rest = words
        self._boot_time, self._stop_time = float(boot_time), float(stop_time)
        self._plan = Plan(ident, rest)
        os.environ["ORBCTL_SIMULATOR_CACHE"] = self._plan.cache
        # The only file of the machine's directory that is never replaced.
        self._lock = os.open("lock", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        before = RunState.read("pid")
        self._state = RunState.of_supervisor(clock, before.boots if before else 0)
        self._plan.is_first_boot = before is None
        self._signals = _block_signals()
        self._end, self._deadline, self._empty_ticks = _NO_END, 0.0, 0

    def run(self) -> None:
        try:
            self._plan.first_id, ids = userns.take_range()
            while self._end == _NO_END and self._boot():
                pass
            cgroups.remove(self._plan.id, _GRACE)
            disconnect(self._plan)
            userns.release_range(self._plan.first_id, ids)
        except Exception as error:
            self._tell(f"error {type(error).__name__}: {error}")

    def _boot(self) -> bool:
        """Boot the machine, and wait until it has ended. Returns whether it wants a reboot."""
        cgroups.remove(self._plan.id)
        self._plan.fields = read_fields("machine")
        self._state.boots += 1
        if self._state.clock == "own":
            # Slightly different each time: the start time of process 1 tells boots apart.
            self._plan.clock = self._state.boots % 30 / 20
        self._record(STARTING)
        self._deadline = time.monotonic() + self._boot_time
        boot = Boot(self._plan, self._secret)
        if self._secret >= 0:
            os.close(self._secret)
            self._secret = -1
        while not self._wait(boot):
            pass
        boot.finish()
        self._plan.is_new = self._plan.is_first_boot = False
        if not boot.wants_reboot:
            self._tell(f"error {boot.error or 'setup: machine crashed on startup'}")
        return boot.wants_reboot

    def _wait(self, boot: Boot) -> bool:
        """Wait for the next event and handle it. Returns whether the machine has ended."""
        starting = self._state.state == STARTING
        left = max(0.0, self._deadline - time.monotonic()) if self._deadline else _TICK
        files = {self._signals, *boot.files()} | ({self._control} - {-1})
        ready = {*select.select(files, [], [], min(_CHECK if starting else _TICK, left))[0]}
        if boot.read(ready) or self._is_deserted(boot, idle=not (ready or starting)):
            return True
        if self._signals in ready:
            number = os.read(self._signals, _SIGINFO)[0]
            self._bring_down(boot, _KILL if number == _SIGINT else _SHUT_DOWN)
        if self._control in ready:
            if os.read(self._control, 1) != b"!":
                self._bring_down(boot, _KILL)
            os.close(self._control)
            self._control = -1
        is_deleted = not os.fstat(self._lock).st_nlink  # then no command could stop the machine
        if boot.error or is_deleted:
            self._bring_down(boot, _KILL)
        if starting and self._end == _NO_END:
            self._bring_up(boot)
        elif self._deadline and time.monotonic() > self._deadline:
            self._bring_down(boot, _KILL)
        return False

    def _is_deserted(self, boot: Boot, idle: bool) -> bool:
        """Whether the machine has no live process, although its init has not been reaped.

        The kernel keeps an init until all processes of its namespace are reaped. Those whose parent
        was killed are reaped by the host's init, which in a container may never do that.
        """
        if idle and boot.is_released:
            self._empty_ticks = self._empty_ticks + 1 if cgroups.is_empty(self._plan.id) else 0
        return self._empty_ticks > 1

    def _bring_up(self, boot: Boot) -> None:
        late = time.monotonic() > self._deadline
        if boot.is_built and not boot.is_released:
            self._state.init, self._state.started = boot.init, start_time(f"/proc/{boot.init}")
            self._state.bare = boot.bare
            self._record(STARTING)
            boot.release()
        elif boot.is_up() or (late and boot.has_started_anything()):
            self._deadline = 0
            self._record(RUNNING)
            self._tell("up")
        elif late:
            seconds = f"{self._boot_time:g}"
            boot.error = f"setup: machine didn't start in {seconds}s (missing IP address)"

    def _bring_down(self, boot: Boot, how: int) -> None:
        if how <= self._end:
            return
        self._end, self._deadline = how, time.monotonic() + self._stop_time
        self._record(STOPPING)
        if how == _KILL:
            boot.kill()
        else:
            boot.power_off()

    def _record(self, state: str) -> None:
        self._state.state = state
        try:  # noqa: SIM105 contextlib is slow to import
            self._state.write("pid")
        except OSError:
            pass  # deleted, or a full disk: no reason to stop the machine here

    def _tell(self, what: str) -> None:
        if self._status >= 0:
            try:  # noqa: SIM105
                os.write(self._status, f"{what}\n".encode(errors="surrogateescape"))
            except BrokenPipeError:
                pass  # the command was killed
            os.close(self._status)
            self._status = -1
