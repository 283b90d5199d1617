"""One boot of a machine, as its supervisor sees it."""

from __future__ import annotations

import os

from . import userns
from .console import Console
from .entry import Entry
from .life import children
from .linux import default_signals, end_with_parent
from .wiring import wire
from .world import ENVIRONMENT, Builder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from .world import Plan

_SIGHUP, _SIGKILL = 1, 9
_POWER_OFF = 34 + 4  # SIGRTMIN+4: systemd's
_PIDFD_GETFD = 438
# Names of what an init of the older kind waits for while it boots.
_SCRIPTS = {"init", "openrc", "rc", "rcS", "startpar", "sysinit"}
_GLANCES = 5  # that must find none of them


class Boot:
    """From the machine's first process to the end of its init.

    `reports` are two pipes with lines about it: its maker's (see `world.Builder`), and ``joined``
    from the process that connects it. Either may say ``error TEXT``.
    """

    def __init__(self, plan: Plan, state: str) -> None:
        self.init = self.pidfd = self.socket = -1
        self.console: Console | None = None
        self.error, self.status, self.is_released = "", -1, False
        self._plan = plan
        self._is_systemd = self._is_wired = self._is_told = self._has_begun = False
        self._glances = 0
        self._making, report = os.pipe()
        orders, self._orders = os.pipe()
        self._helpers = [os.fork()]
        if self._helpers[0] == 0:
            os.close(self._orders)
            Builder(plan, report, orders).run()
        os.close(report)
        os.close(orders)
        wiring, report = os.pipe()
        told, self._tell = os.pipe()
        self._helpers.append(os.fork())
        if self._helpers[1] == 0:
            os.close(self._tell)
            wire(plan, state, told, report, self._orders)
        os.close(report)
        os.close(told)
        self.reports = {self._making: b"", wiring: b""}

    def _read_report(self, report: int) -> None:
        data = os.read(report, 4096)
        *lines, rest = (self.reports.pop(report) + data).split(b"\n")
        if data:
            self.reports[report] = rest
        else:
            os.close(report)
        for line in lines:
            word, _, text = line.decode(errors="surrogateescape").partition(" ")
            if word == "init":
                self.init = int(text)
                self.pidfd = os.pidfd_open(self.init)
                try:  # noqa: SIM105 contextlib takes longer to load
                    os.write(self._tell, text.encode())
                except BrokenPipeError:
                    pass  # it has failed, and says so
            elif word == "built":
                *fds, kind = text.split()
                self._is_systemd = kind == "systemd"
                ours, theirs, self.socket = map(self._take, fds)
                self.console = Console("console", ours, theirs)
            elif word == "joined":
                self._is_wired = True
            elif not self.error:
                self.error = text

    def _take(self, fd: str) -> int:
        return userns.system_call(_PIDFD_GETFD, "console", self.pidfd, int(fd), 0)

    def files(self) -> set[int]:
        """Those that have something to read, at times."""
        more = {self.pidfd, self.socket, self.console.terminal if self.console else -1}
        return {*self.reports, *more} - {-1}

    def read(self, ready: set[int]) -> bool:
        """Take what there is in them; whether it is over."""
        for report in ready & self.reports.keys():
            self._read_report(report)
        if self.socket in ready:
            self._is_told = b"READY=1" in os.read(self.socket, 4096).split(b"\n") or self._is_told
        if self.console and self.console.terminal in ready:
            self.console.read()
        return self.pidfd in ready or (self.init < 0 and self._making not in self.reports)

    @property
    def is_made(self) -> bool:
        return self._is_wired and self.console is not None

    def go_on(self) -> None:
        """Let its first process become its init, which ends with its parent: with us, by now."""
        os.waitpid(self._helpers.pop(0), 0)
        self.is_released = True
        os.write(self._orders, b"!\0")

    def is_up(self) -> bool:
        """Whether its init has done what it does at a boot, as far as can be seen from here."""
        if self._is_systemd or not self.is_made:
            return self._is_told
        names = set(children(self.init))
        self._has_begun = self._has_begun or bool(names)
        self._glances = 0 if names & _SCRIPTS else self._glances + 1
        return self._glances >= (_GLANCES if self._has_begun else 10 * _GLANCES)

    def has_begun(self) -> bool:
        """Whether there is more of it than an init that does nothing."""
        return self.is_made and next(children(self.init), None) is not None

    @property
    def wants_another(self) -> bool:
        """The kernel's word for a reboot that was asked for in a process namespace."""
        return os.WIFSIGNALED(self.status) and os.WTERMSIG(self.status) == _SIGHUP

    def power_off(self) -> None:
        """Ask its init to end in order."""
        if not self.is_made:
            self.kill()
        elif self._is_systemd:
            os.kill(self.init, _POWER_OFF)
        else:
            self._helpers.append(os.fork())
            if self._helpers[-1] == 0:
                self._call_poweroff()

    def _call_poweroff(self) -> NoReturn:
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
        for pid in (self.init, *self._helpers):
            if pid > 0:
                os.kill(pid, _SIGKILL)

    def reap(self) -> None:
        """Take its outcome, if there is one, and end its helpers."""
        os.close(self._tell)
        os.close(self._orders)
        if self.init > 0:
            self.status = os.waitpid(self.init, os.WNOHANG)[1]
        for pid in self._helpers:
            os.kill(pid, _SIGKILL)
            os.waitpid(pid, 0)
        if self.console:
            self.console.close()
        for fd in (*self.reports, self.pidfd, self.socket):
            if fd >= 0:
                os.close(fd)
