"""One boot of a machine, from its first process to the end of its init."""

from __future__ import annotations

import os
from errno import EBADF, ESRCH

from . import generators, userns
from .console import Console
from .entry import Entry
from .linux import default_signals, end_with_parent
from .runstate import children
from .wiring import connect
from .world import ENVIRONMENT, Builder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from .bootplan import Plan

_SIGHUP, _SIGKILL = 1, 9
_POWER_OFF = 34 + 4  # SIGRTMIN+4, for systemd
_PIDFD_GETFD = 438
# An init other than systemd is booting while it has a child with one of these names.
_SCRIPTS = {"init", "openrc", "rc", "rcS", "startpar", "sysinit"}
# With one of these, systemd has set up the system; only services and cloud-init are left to run.
_BUSES = {"dbus-daemon", "dbus-broker-lau"}
_QUIET_CHECKS = 5  # in a row, before it is considered booted


class Boot:
    """A boot as the supervisor sees it.

    Two processes report lines to it: the builder (see `world.Builder`), and the one that connects
    the network (``joined`` and ``named``). Both may report ``error TEXT``. systemd takes long
    enough to load its units, so it is executed while the network is being completed.
    """

    def __init__(self, plan: Plan, secret: int) -> None:
        self.init = self.pidfd = self.socket = self.bare = -1
        self._masks: list[int] = []
        self.console: Console | None = None
        self.error, self.status, self.is_released = "", -1, False
        self._plan = plan
        self._is_systemd = self._is_connected = self._is_named = False
        self._is_ready = self._has_children = False
        self._quiet_checks = 0
        self._reports: dict[int, bytes] = {}
        self._helpers: list[int] = []
        self._building = self._orders = self._connector = -1
        self._parts: list[str] = []
        try:
            spaces = userns.of_machine(plan.first_id)
        except OSError as error:
            self.error = str(error)
        else:
            self._start_helpers(spaces, secret)

    def _start_helpers(self, spaces: tuple[int, int], secret: int) -> None:
        self._building, report = os.pipe()
        connecting, joined = os.pipe()
        orders, self._orders = os.pipe()
        self._helpers = [os.fork()]
        if self._helpers[0] == 0:
            os.close(joined)
            os.close(self._orders)
            Builder(self._plan, report, orders, spaces, secret).run()
        self._connector = os.fork()
        if self._connector == 0:
            os.close(report)
            connect(self._plan, spaces[1], joined, self._orders)
        self._helpers.append(self._connector)
        for fd in (report, joined, orders, *spaces):
            os.close(fd)
        self._reports = {self._building: b"", connecting: b""}

    def files(self) -> set[int]:
        """Descriptors to wait for."""
        others = {self.pidfd, self.socket, self.console.terminal if self.console else -1}
        return {*self._reports, *others} - {-1}

    def read(self, ready: set[int]) -> bool:
        """Read from descriptors that are ready. Returns whether the boot is over."""
        for report in ready & self._reports.keys():
            self._read_report(report)
        if self.socket in ready:
            self._is_ready |= b"READY=1" in os.read(self.socket, 4096).split(b"\n")
        if self.console and self.console.terminal in ready:
            self.console.read()
        return self.pidfd in ready or (self.init < 0 and self._building not in self._reports)

    def _read_report(self, report: int) -> None:
        data = os.read(report, 4096)
        *lines, rest = (self._reports.pop(report) + data).split(b"\n")
        if data:
            self._reports[report] = rest
        else:
            os.close(report)
            if report != self._building:
                os.waitpid(self._connector, 0)
                self._helpers.remove(self._connector)
                if not (self._is_named or self.error) and self._orders >= 0:
                    self.error = "network: a process was killed: try again"
        for line in lines:
            word, _, text = line.decode(errors="surrogateescape").partition(" ")
            if word == "init":
                self.init = int(text)
                self.pidfd = os.pidfd_open(self.init)
            elif word == "built":
                self._parts = text.split()
            elif word == "joined":
                self._is_connected = True
            elif word == "named":
                self._is_named = True
            elif not self.error:
                self.error = text
        if self._parts and self.pidfd >= 0:  # the builder and its child report in any order
            self._take_parts()

    def _take_parts(self) -> None:
        *fds, kind = self._parts
        self._parts = []
        self._is_systemd = kind == "systemd"
        try:
            ours, theirs, self.socket, self.bare, *self._masks = map(self._take, fds)
        except OSError as error:
            if error.errno not in (ESRCH, EBADF):
                raise
            return  # it has been killed since, so `pidfd` is ready
        self.console = Console("console", ours, theirs)

    def _take(self, fd: str) -> int:
        return userns.system_call(_PIDFD_GETFD, "console", self.pidfd, int(fd), 0)

    @property
    def is_built(self) -> bool:
        is_connected = self._is_connected if self._is_systemd else self._is_named
        return is_connected and self.console is not None

    def release(self) -> None:
        """Let the first process execute the init.

        It ends with its parent, which is this process once the builder has ended.
        """
        os.waitpid(self._helpers.pop(0), 0)
        self.is_released = True
        try:  # noqa: SIM105
            os.write(self._orders, b"!\0")
        except BrokenPipeError:
            pass  # it has just been killed

    @property
    def _reports_when_up(self) -> bool:
        return self._is_systemd and not self._plan.has_cloud_init

    def is_up(self) -> bool:
        """Whether the init has finished booting, as far as can be seen from outside."""
        if not self._is_named:
            return False
        if self._is_ready or not self.is_built or self._reports_when_up:
            return self._is_ready
        names = set(children(self.init))
        if self._is_systemd:
            return not _BUSES.isdisjoint(names)
        self._has_children |= bool(names)
        self._quiet_checks = 0 if names & _SCRIPTS else self._quiet_checks + 1
        return self._has_children and self._quiet_checks >= _QUIET_CHECKS

    def note_up(self) -> None:
        while self._masks:
            generators.unmask(self._masks.pop())

    def has_started_anything(self) -> bool:
        return self.is_built and next(children(self.init), None) is not None

    @property
    def wants_reboot(self) -> bool:
        """The kernel kills the init with SIGHUP when a reboot is requested in its namespace."""
        return os.WIFSIGNALED(self.status) and os.WTERMSIG(self.status) == _SIGHUP

    def power_off(self) -> None:
        """Ask the init to shut down."""
        if not self.is_built:
            self.kill()
        elif self._is_systemd:
            os.kill(self.init, _POWER_OFF)
        else:
            self._helpers.append(os.fork())
            if self._helpers[-1] == 0:
                self._run_poweroff()

    def _run_poweroff(self) -> NoReturn:
        try:
            end_with_parent()
            proc = os.open(f"/proc/{self.init}", os.O_RDONLY | os.O_DIRECTORY)
            Entry(self._plan.id, proc).enter()
            default_signals()
            words = ["sh", "-c", "exec poweroff </dev/null >/dev/console 2>&1"]
            os.waitpid(os.posix_spawn("/bin/sh", words, ENVIRONMENT), 0)
        finally:
            os._exit(0)

    def kill(self) -> None:
        """Kill its processes. A first process that is not reported yet exits without orders."""
        if self._orders >= 0:
            os.close(self._orders)
            self._orders = -1
        for pid in (self.init, *self._helpers):
            if pid > 0:
                os.kill(pid, _SIGKILL)

    def finish(self) -> None:
        """Kill the helpers, and get the init's exit status, if it has one."""
        for pid in self._helpers:
            os.kill(pid, _SIGKILL)
            os.waitpid(pid, 0)
        if self.init > 0:  # a child of this process, now that the builder has ended
            self.status = os.waitpid(self.init, os.WNOHANG)[1]
        if self.console:
            self.console.close()
        for fd in (*self._reports, self._orders, self.pidfd, self.socket, self.bare, *self._masks):
            if fd >= 0:
                os.close(fd)
