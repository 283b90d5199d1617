"""The process on the host that boots a machine and stays with it.

It reaps the machine's init, boots the machine again if it requested a reboot, records the machine's
state, logs its console, and removes its control groups at the end. It has an empty environment and
no file of its creator, and cannot be inspected. If it is killed, the kernel kills the init. SIGTERM
shuts the machine down, in the time that the signal's sender allows; SIGINT kills it.
"""

from __future__ import annotations

import ctypes
import os
import select
import struct
import sys
import time

from . import cgroups, console, userns
from .bootplan import Plan
from .boots import Boot
from .linux import close_all_but
from .netns import reason
from .rights import hide_from_others
from .runstate import RUNNING, SI_QUEUE, STARTING, STOPPING, RunState
from .state import read_fields, start_time
from .wiring import disconnect

_SIGINT, _SIGTERM = 2, 15
_PR_SET_CHILD_SUBREAPER, _SIG_BLOCK, _SIGINFO = 36, 0, 128
_SIGNAL = struct.Struct("@Iii32xi")  # number, error, origin and value, as signalfd tells them
_NO_END, _SHUT_DOWN, _KILL = range(3)
_CHECK, _TICK = 0.02, 2.0  # seconds between checks, during a boot and later
_GRACE = 1.0  # seconds for commands to exit after their machine

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    path, control, status, secret = sys.argv[1], *map(int, sys.argv[2:])
    os.chdir("/")
    close_all_but(control, status, secret)
    for fd in (control, status, secret):
        os.set_inheritable(fd, False)
    hide_from_others()
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1), 0, 0, 0)
    words = _read_words(control)
    if words:
        os.chdir(path)
        # The only file of the machine's directory that is never replaced.
        lock = os.open("lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        # Commands use another kind of lock on it. Another supervisor holds this one until it exits,
        # if its command was killed before it recorded itself.
        os.lockf(lock, os.F_LOCK, 0)
        if not select.select([control], [], [], 0)[0]:  # otherwise closed since
            console.create("console")
            Supervisor(os.path.basename(path), lock, control, status, secret, words).run()


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
    the machine may outlive it. Only then is the machine recorded as running: another command must
    not rely on one that ends with this command. `status` gets ``up`` and then ``running``, or
    ``error TEXT``. From `secret`, the first boot reads the users' password, if they are to have
    one.
    """

    def __init__(
        self, ident: str, lock: int, control: int, status: int, secret: int, words: list[str]
    ) -> None:
        self._lock, self._control, self._status, self._secret = lock, control, status, secret
        clock, boot_time, stop_time, *rest = words
        self._boot_time, self._stop_time = float(boot_time), float(stop_time)
        self._plan = Plan(ident, rest)
        os.environ["ORBCTL_SIMULATOR_CACHE"] = self._plan.cache
        before = RunState.read("pid")
        self._state = RunState.of_supervisor(clock, before.boots if before else 0)
        self._plan.is_first_boot = before is None or not before.boots
        self._signals = _block_signals()
        self._end, self._deadline, self._empty_ticks = _NO_END, 0.0, 0
        self._is_recorded = True

    def run(self) -> None:
        try:
            self._plan.first_id, ids = userns.take_range()
        except OSError as error:
            self._fail(reason(error))
            return
        steps = (
            self._boot_until_it_ends,
            lambda: cgroups.remove(self._plan.id, _GRACE),
            lambda: disconnect(self._plan),
            lambda: userns.release_range(self._plan.first_id, ids),
        )
        for step in steps:
            try:
                step()
            except Exception as error:
                self._fail(reason(error))

    def _boot_until_it_ends(self) -> None:
        try:
            while self._boot():
                pass
        finally:
            self._record(STOPPING)

    def _boot(self) -> bool:
        """Boot the machine, and wait until it has ended. Returns whether it boots again."""
        self._record(STARTING)  # before anything that takes time: commands wait for the next boot
        cgroups.remove(self._plan.id, _GRACE)
        self._plan.fields = read_fields("machine")
        if self._state.clock == "own":
            # Slightly different each time: the start time of process 1 tells boots apart.
            self._plan.clock = (self._state.boots + 1) % 30 / 20
        if not self._deadline:  # reboots before it is up get no more time
            self._deadline = time.monotonic() + self._boot_time
        boot = Boot(self._plan, self._secret)
        if self._secret >= 0:
            os.close(self._secret)
            self._secret = -1
        try:
            while not self._wait(boot):
                pass
        except BaseException:
            boot.kill()
            raise
        finally:
            boot.finish()
        if boot.error and self._plan.is_first_boot:
            self._state.boots = 0  # its files may not have been set up
        self._plan.is_new = self._plan.is_first_boot = False
        if boot.wants_reboot and self._end == _NO_END and not boot.error:
            if not 0 < self._deadline < time.monotonic():
                return True
            self._give_up(boot)
        if boot.error or self._status >= 0:
            self._fail(boot.error or "setup: machine crashed on startup")
        return False

    def _give_up(self, boot: Boot) -> None:
        seconds = f"{self._boot_time:g}"
        boot.error = f"setup: machine didn't start in {seconds}s (missing IP address)"

    def _wait(self, boot: Boot) -> bool:
        """Wait for the next event and handle it. Returns whether the machine has ended."""
        if not self._is_recorded:
            self._record(self._state.state)
        starting = self._deadline > 0 and self._end == _NO_END
        left = max(_CHECK, self._deadline - time.monotonic()) if self._deadline else _TICK
        files = {self._signals, *boot.files()} | ({self._control} - {-1})
        ready = {*select.select(files, [], [], min(_CHECK if starting else _TICK, left))[0]}
        if boot.read(ready) or self._is_deserted(boot, idle=not (ready or starting)):
            return True
        if self._signals in ready:
            number, _, origin, value = _SIGNAL.unpack_from(os.read(self._signals, _SIGINFO))
            if origin == SI_QUEUE:
                self._stop_time = value / 1000
            self._bring_down(boot, _KILL if number == _SIGINT else _SHUT_DOWN)
        if self._control in ready:
            is_kept = os.read(self._control, 1) == b"!"
            os.close(self._control)
            self._control = -1
            if is_kept:
                self._note_running()
            else:
                self._bring_down(boot, _KILL)
        if boot.error or self._is_deleted:
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
            self._state.init = boot.init
            self._state.started = start_time(f"/proc/{boot.init}") or "-"
            self._state.bare = boot.bare
            self._state.boots += 1
            self._record(STARTING)
            boot.release()
        elif boot.is_up() or (late and boot.has_started_anything()):
            self._deadline = 0
            boot.note_up()
            self._tell("up")
            self._note_running()
        elif late:
            self._give_up(boot)

    def _note_running(self) -> None:
        """Record the machine as running if it is up, and may outlive the command that starts it."""
        if self._control < 0 and not self._deadline:
            self._record(RUNNING)
            self._tell("running")

    def _bring_down(self, boot: Boot, how: int) -> None:
        if how < self._end or how == self._end == _KILL:
            return
        # Another call that stops it brings its own time.
        is_new, self._end = how > self._end, how
        self._deadline = time.monotonic() + self._stop_time
        if not is_new:
            return
        self._record(STOPPING)
        if how == _KILL:
            boot.kill()
        else:
            boot.power_off()

    @property
    def _is_deleted(self) -> bool:
        """Whether the machine's directory is deleted; then no command can stop the machine."""
        return not os.fstat(self._lock).st_nlink

    def _record(self, state: str) -> None:
        self._state.state = state
        if self._is_deleted:
            return  # a new file would disturb the deletion of the directory
        try:
            self._state.write("pid")
            self._is_recorded = True
        except OSError:  # the machine goes on when the disk is full
            self._is_recorded = False

    def _fail(self, text: str) -> None:
        """Report an error to the waiting command, or in the log if no command is waiting."""
        if self._status < 0:
            line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n"
            console.log("console", line.encode(errors="surrogateescape"))
        self._tell(f"error {text}")

    def _tell(self, what: str) -> None:
        if self._status >= 0:
            try:  # noqa: SIM105
                os.write(self._status, f"{what}\n".encode(errors="surrogateescape"))
            except BrokenPipeError:
                pass  # the command was killed
            if what != "up":
                os.close(self._status)
                self._status = -1
