"""Starts a machine's supervisor from a command such as `create`."""

from __future__ import annotations

import os
import select
import sys
import time
from _signal import pidfd_send_signal  # type: ignore[import-not-found] # signal loads slowly

from .state import Failure, python

_SIGKILL = 9
_PAUSE = 0.004


class Haste:
    """In this context, processes move to other control groups without a delay.

    systemd moves each service that it starts. The kernel delays a move by an RCU grace
    period, about 10 ms, unless there was a move just before. So a child
    keeps moving itself to where it already is.
    """

    def __enter__(self) -> None:
        waits, self._end = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                os.close(self._end)
                self._keep(waits)
            finally:
                os._exit(0)
        os.close(waits)

    @staticmethod
    def _keep(waits: int) -> None:
        os.set_blocking(waits, False)
        group = os.open(_own_group(), os.O_WRONLY | os.O_CLOEXEC)
        while True:
            os.write(group, b"0")
            try:
                os.read(waits, 1)
                return
            except BlockingIOError:
                time.sleep(_PAUSE)

    def __exit__(self, *_: object) -> None:
        os.close(self._end)
        os.kill(self._pid, _SIGKILL)
        os.waitpid(self._pid, 0)


def _own_group() -> str:
    """The path of `cgroup.procs` of this process's cgroup (version 2)."""
    with open("/proc/self/cgroup") as file:
        own = next(line[4:].strip("/\n") for line in file if line.startswith("0::/"))
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        line = next(line for line in file if " - cgroup2 " in line)
    return os.path.join(line.split()[4].replace("\\040", " "), own, "cgroup.procs")


class Supervisor:
    """A supervisor's process. It waits until it is told what to boot.

    It has an empty environment. Until `commit`, it ends with this process.
    """

    def __init__(self, path: str) -> None:
        """`path` is the machine's directory, which may not exist yet."""
        control, self._control = os.pipe()
        status, report = os.pipe()
        secret, self._secret = os.pipe()
        fds = (control, report, secret)
        for fd in fds:
            os.set_inheritable(fd, True)
        command = python("supervisor", path, *map(str, fds))
        null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
        self._pid = os.posix_spawn(sys.executable, command, {}, file_actions=null, setsid=True)
        for fd in fds:
            os.close(fd)
        self._answers = open(status, "rb", buffering=0)  # noqa: SIM115

    def boot(self, words: list[str], password: str, seconds: float) -> None:
        """Let it boot the machine, and wait up to `seconds` until that is up."""
        self._deadline = time.monotonic() + seconds
        os.set_blocking(self._secret, False)
        try:
            os.write(self._secret, password.encode(errors="surrogateescape"))
            text = "".join(f"{word}\0" for word in words) + "\0"
            os.write(self._control, text.encode(errors="surrogateescape"))
        except BrokenPipeError:
            pass  # the supervisor has reported why it exited
        os.close(self._secret)
        self._secret = -1
        with Haste():
            self._wait_for_word("up")

    def commit(self) -> None:
        """Let the machine outlive this process."""
        try:  # noqa: SIM105 contextlib is slow to load
            os.write(self._control, b"!")
        except BrokenPipeError:
            pass  # as above
        self._wait_for_word("running")
        self.close()

    def _wait_for_word(self, wanted: str) -> None:
        word = ""
        while word != wanted:
            left = max(0.0, self._deadline - time.monotonic())
            if not select.select([self._answers], [], [], left)[0]:
                raise Failure("setup: the machine's supervisor does not answer")
            line = self._answers.readline().decode(errors="surrogateescape")
            word, _, reason = line.rstrip("\n").partition(" ")
            if word not in ("up", "running"):
                raise Failure(reason or "setup: the machine's supervisor was killed")

    def wait(self, seconds: float) -> None:
        """Wait until it has exited, after `close`; kill it if it hangs."""
        pidfd = os.pidfd_open(self._pid)
        wait_for(pidfd, seconds)
        os.close(pidfd)
        os.waitpid(self._pid, 0)

    def close(self) -> None:
        for fd in (self._control, self._secret):
            if fd >= 0:
                os.close(fd)
        self._control = self._secret = -1
        self._answers.close()

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *_: object) -> None:
        is_idle = self._secret >= 0  # once it boots, or `close` was called, it ends by itself
        self.close()
        if is_idle:
            os.kill(self._pid, _SIGKILL)
            os.waitpid(self._pid, 0)


def wait_for(supervisor: int, seconds: float) -> None:
    """Wait until a supervisor, given by its pidfd, has exited; kill it if it hangs."""
    if not select.select([supervisor], [], [], seconds)[0]:
        try:
            pidfd_send_signal(supervisor, _SIGKILL)
        except ProcessLookupError:
            return
        select.select([supervisor], [], [])
