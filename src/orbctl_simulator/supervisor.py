"""The process on the host that boots one machine, and stays beside it while it runs.

It has an empty environment and no file of its creator's, and nobody may look into it. It waits for
the machine's init, boots it anew when that has asked for a reboot, writes down which process the
machine is, keeps what is written to its console, and removes the control groups at the end.
Whatever ends it ends the machine, too: the kernel kills an init whose parent has gone. SIGTERM asks
it to stop the machine in order, SIGINT to end it at once.
"""

from __future__ import annotations

import ctypes
import os
import select
import sys
import time

from . import cgroups, userns
from .boots import Boot
from .life import RUNNING, STARTING, STOPPING, Life
from .linux import close_all_but
from .state import read_fields, start_time
from .wiring import unwire
from .world import Plan, Share, hide_from_others

_SIGINT, _SIGTERM = 2, 15
_PR_SET_CHILD_SUBREAPER, _SIG_BLOCK, _SIGINFO = 36, 0, 128
# What is to become of the machine: it goes on, or it ends.
_NOT, _IN_ORDER, _AT_ONCE = range(3)
_GLANCE, _TICK = 0.02, 2.0  # how often it looks around, at a boot and later

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    path, control, status = sys.argv[1], *map(int, sys.argv[2:])
    close_all_but(control, status)
    hide_from_others()
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1), 0, 0, 0)
    words = _words(control)
    if words:
        Supervisor(os.path.basename(path), control, status, words).run()


def _words(control: int) -> list[str]:
    """What is to be booted, when that is known; or nothing, when nothing is."""
    data = b""
    while not data.endswith(b"\0\0"):
        more = os.read(control, 1 << 16)
        if not more:
            return []
        data += more
    return data[:-2].decode(errors="surrogateescape").split("\0")


def _plan(ident: str, words: list[str]) -> Plan:
    files, how, count, *rest = words
    plan = Plan(ident, {}, rest[: int(count)])
    plan.files, plan.is_new = files, how == "create"
    told = iter(rest[int(count) :])
    for source, target, uid, gid in zip(*[told] * 4):
        plan.shares.append(Share(source, target, int(uid), int(gid)))
    return plan


def _take_signals() -> int:
    """Get the signals that are orders as something to read."""
    wanted = (ctypes.c_uint64 * 16)(1 << (_SIGTERM - 1) | 1 << (_SIGINT - 1))
    _libc.sigprocmask(_SIG_BLOCK, wanted, None)
    return int(_libc.signalfd(-1, wanted, os.O_CLOEXEC))


class Supervisor:
    """Between a machine's boots, the command that starts it, and the commands that stop it.

    `control` is open while the first of these lives; a ``!`` from it means that the machine is to
    outlive it. `status` is told ``up`` or ``error TEXT``.
    """

    def __init__(self, ident: str, control: int, status: int, words: list[str]) -> None:
        self._control, self._status = control, status
        self._state, cache, clock, boot_time, stop_time, *rest = words
        os.environ["ORBCTL_SIMULATOR_CACHE"] = cache
        self._boot_time, self._stop_time = float(boot_time), float(stop_time)
        self._plan = _plan(ident, rest)
        # Of all its files this one is never replaced, and whoever opens it by /proc gains nothing.
        self._lock = os.open("lock", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        before = Life.read("pid")
        self._life = Life.own(clock, before.boots if before else 0)
        self._plan.is_first = before is None
        self._signals = _take_signals()
        self._end, self._deadline, self._quiet = _NOT, 0.0, 0

    def run(self) -> None:
        try:
            self._plan.first_id, ids = userns.take_range()
            while self._end == _NOT and self._live():
                pass
            cgroups.remove(self._plan.id)
            unwire(self._plan, self._state)
            os.close(ids)
        except Exception as error:
            self._tell(f"error {type(error).__name__}: {error}")

    def _live(self) -> bool:
        """One boot of the machine, to its end; whether it asks for another."""
        cgroups.remove(self._plan.id)
        self._plan.fields = read_fields("machine")
        self._life.boots += 1
        if self._life.clock == "own":  # each begins a little differently, so it can be told apart
            self._plan.clock = self._life.boots % 30 / 20
        self._write(STARTING)
        self._deadline = time.monotonic() + self._boot_time
        boot = Boot(self._plan, self._state)
        while not self._turn(boot):
            pass
        boot.reap()
        self._plan.is_new = self._plan.is_first = False
        if not boot.wants_another:
            self._tell(f"error {boot.error or 'setup: machine crashed on startup'}")
        return boot.wants_another

    def _turn(self, boot: Boot) -> bool:
        """Wait for what comes next, and do what it takes; whether the machine has ended."""
        starting = self._life.state == STARTING
        left = max(0.0, self._deadline - time.monotonic()) if self._deadline else _TICK
        files = {self._signals, *boot.files()} | ({self._control} - {-1})
        ready = {*select.select(files, [], [], min(_GLANCE if starting else _TICK, left))[0]}
        if boot.read(ready) or self._is_deserted(boot, quiet=not (ready or starting)):
            return True
        if self._signals in ready:
            number = os.read(self._signals, _SIGINFO)[0]
            self._bring_down(boot, _AT_ONCE if number == _SIGINT else _IN_ORDER)
        if self._control in ready:
            if os.read(self._control, 1) != b"!":
                self._bring_down(boot, _AT_ONCE)
            os.close(self._control)
            self._control = -1
        if boot.error or not os.fstat(self._lock).st_nlink:  # nobody could stop it any more
            self._bring_down(boot, _AT_ONCE)
        if starting and self._end == _NOT:
            self._bring_up(boot)
        elif self._deadline and time.monotonic() > self._deadline:
            self._bring_down(boot, _AT_ONCE)
        return False

    def _is_deserted(self, boot: Boot, quiet: bool) -> bool:
        """Whether nothing has been alive in it for a while, though its init has not yet ended.

        The kernel holds an init until all of its processes are reaped. A command whose caller was
        killed is the host's first process to reap, and in a container that may never do it.
        """
        if quiet and boot.is_released:
            self._quiet = self._quiet + 1 if cgroups.is_empty(self._plan.id) else 0
        return self._quiet > 1

    def _bring_up(self, boot: Boot) -> None:
        late = time.monotonic() > self._deadline
        if boot.is_made and not boot.is_released:
            self._life.init, self._life.started = boot.init, start_time(f"/proc/{boot.init}")
            self._write(STARTING)
            boot.go_on()
        elif boot.is_up() or (late and boot.has_begun()):
            self._deadline = 0
            self._write(RUNNING)
            self._tell("up")
        elif late:
            seconds = f"{self._boot_time:g}"
            boot.error = f"setup: machine didn't start in {seconds}s (missing IP address)"

    def _bring_down(self, boot: Boot, how: int) -> None:
        if how <= self._end:
            return
        self._end, self._deadline = how, time.monotonic() + self._stop_time
        self._write(STOPPING)
        if how == _AT_ONCE:
            boot.kill()
        else:
            boot.power_off()

    def _write(self, state: str) -> None:
        self._life.state = state
        try:  # noqa: SIM105 contextlib takes longer to load
            self._life.write("pid")
        except OSError:
            pass  # its directory has gone, or the disk is full: no reason to end it here

    def _tell(self, what: str) -> None:
        if self._status >= 0:
            try:  # noqa: SIM105
                os.write(self._status, f"{what}\n".encode(errors="surrogateescape"))
            except BrokenPipeError:
                pass  # whoever waited for it has gone
            os.close(self._status)
            self._status = -1
