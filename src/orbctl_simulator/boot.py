"""Starting and stopping a machine's first process, on the host's side."""

from __future__ import annotations

import os
import select
import sys
import time

from . import shares
from .config import wake
from .linux import CLONE_NEWPID, CLONE_NEWTIME, close_all_but, unshare
from .packages import wait_for_packages
from .state import (
    FILES,
    Failure,
    Machine,
    Transition,
    cache,
    home,
    python,
    readable,
    rpc,
    start_time,
    write_file,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

    from .booted import Start
    from .supervisors import Supervisor

_SECONDS = 30  # time for a machine to start, as in OrbStack's message


class Boot:
    """A started machine that still ends with this process or this block, until `commit`.

    Between this process and the machine's first process is that one's parent. It kills the machine
    as soon as this process has ended, for whatever reason and whatever the machine is doing. Until
    then it holds the machine's lock, so no other process considers the machine stopped too early.
    """

    def __init__(self, machine: Machine, create: bool = False, password: str = "") -> None:
        self.machine, self.pid, self._started = machine, 0, ""
        self._own_uptime = os.environ.get("ORBCTL_SIMULATOR_UPTIME") == "own"
        lower = machine.lower
        arguments = ["create" if create else "start", str(len(lower)), *lower]
        arguments += [home(), cache(), *shares.of(machine)]
        secret = readable(password)
        control, self._control = os.pipe()
        status, report = os.pipe()
        self._parent = os.fork()
        if self._parent == 0:
            try:
                close_all_but(control, report, secret, machine.lock_fd)
                self._be_parent(control, report, secret, arguments)
            except PermissionError as error:
                text = (
                    f"error this host does not allow namespaces ({error}): if it is a container,"
                    " run it with --privileged\n"
                )
                os.write(report, text.encode(errors="surrogateescape"))
            except BaseException as error:
                os.write(report, f"error {error}\n".encode(errors="surrogateescape"))
            os._exit(1)
        for fd in (control, report, secret):
            os.close(fd)
        try:
            self._wait(status)
        except BaseException:
            self.abandon()
            raise
        finally:
            os.close(status)
        note(machine, f"started, pid {self.pid}")

    def _be_parent(self, control: int, report: int, secret: int, arguments: list[str]) -> None:
        """Fork into a new process namespace; the fork becomes `init`, this process its parent."""
        os.setsid()
        os.chdir(self.machine.file(FILES))
        unshare(CLONE_NEWPID)
        if self._own_uptime:
            unshare(CLONE_NEWTIME)
            with open("/proc/self/timens_offsets", "w") as file:
                file.write(f"boottime -{int(time.clock_gettime(time.CLOCK_BOOTTIME))} 0\n")
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        pid = os.fork()
        if pid == 0:
            for fd in (report, secret):
                os.set_inheritable(fd, True)
            words = [self.machine.id, str(report), str(secret), *arguments]
            os.execve(sys.executable, python("init", *words), {})
        close_all_but(control, report, self.machine.lock_fd)
        os.write(report, f"pid {pid}\n".encode())
        os.close(report)
        if os.read(control, 1) != b"!":
            os.kill(pid, 9)
            os.waitpid(pid, 0)
        os._exit(0)

    def _wait(self, status: int) -> None:
        """Wait until it is up. Only then is its pid recorded, so that commands can enter it."""
        told, deadline = b"", time.monotonic() + _SECONDS
        ready = select.poll()
        ready.register(status, select.POLLIN)
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not ready.poll(left * 1000):
                raise Failure(f"setup: machine didn't start in {_SECONDS}s")
            data = os.read(status, 4096)
            told += data
            lines = told.decode(errors="surrogateescape").split("\n")[:-1]
            answers = dict(line.partition(" ")[::2] for line in lines)
            if "pid" in answers and not self.pid:
                self.pid = int(answers["pid"])
                self._started = start_time(f"/proc/{self.pid}")
            if not data:
                break
        if "error" in answers or "ok" not in answers:
            raise Failure(answers.get("error") or "setup: machine crashed on startup")
        clock = "own" if self._own_uptime else "shared"
        write_file(self.machine.file("pid"), f"{self.pid} {self._started} {clock}\n")

    def commit(self) -> None:
        try:
            os.write(self._control, b"!")
        except BrokenPipeError:
            self.abandon()
            raise Failure("setup: machine crashed on startup") from None
        os.close(self._control)
        os.waitpid(self._parent, 0)
        self._parent = 0

    def abandon(self) -> None:
        """Kill it and all its processes."""
        if self._parent:
            os.close(self._control)
            os.waitpid(self._parent, 0)
            self._parent = 0
            if self.pid and _is_there(self.pid, self._started):  # its parent was killed
                os.kill(self.pid, 9)

    def __enter__(self) -> Boot:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abandon()


def note(machine: Machine, text: str) -> None:
    """Append a line to the machine's log, which `logs` shows."""
    with open(machine.file("console"), "a") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {machine.name}: {text}\n")


def begin(
    machine: Machine,
    create: bool = False,
    password: str = "",
    supervisor: Supervisor | None = None,
) -> Boot | Start:
    """Start it with or without init, as it was created."""
    if not machine.boots:
        return Boot(machine, create, password)
    from . import booted

    started = booted.Start(machine, create, password, supervisor)
    note(machine, f"started, pid {machine.process()}")
    return started


def start(machine: Machine, verb: str = "", hold: float = 0) -> None:
    """Start it unless it runs. With a command's `verb`, fail if it is in another transition."""
    if machine.finished and machine.state == "running":
        if machine.boots:
            reconnect(machine)
        return
    with Transition(machine, "starting", verb, hold=hold):
        if not is_up(machine):
            try:
                wait_for_packages(machine.base)
                with begin(machine) as started:
                    started.commit()
                wake()
            except Failure as failure:
                raise rpc(f"start '{machine.name}': {failure}") from None


def reconnect(machine: Machine) -> None:
    """Reconnect a machine that has lost its network, for example after the router was killed."""
    from .network import Network

    network, init = Network(home()), machine.process()
    if init is None or network.connected(machine.id):
        return
    space = os.open(f"/proc/{init}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        network.join(machine.id, machine.name, space, machine.on("isolate_network"))
    finally:
        os.close(space)


def is_up(machine: Machine) -> bool:
    """Whether it runs. The caller holds its lock, but it may be rebooting by itself."""
    if machine.boots:
        from .booted import settle

        return settle(machine)
    return machine.process() is not None


def stop(machine: Machine, hold: float = 0, at_once: bool = False) -> None:
    with Transition(machine, "stopping", "stop", hold=hold):
        halt(machine, at_once)


def halt(machine: Machine, at_once: bool = True) -> None:
    """Kill pid 1; the kernel then kills every process of the machine."""
    if machine.boots:
        from .booted import end

        end(machine, at_once)
        return
    pid = machine.process()
    if pid is None:
        return
    started, namespace = machine.written_process()[1], os.readlink(f"/proc/{pid}/ns/pid")
    os.kill(pid, 9)
    begun = time.monotonic()
    # `process` does not report it once it is exiting, but it exits only after all the others.
    while _is_there(pid, started):
        waited = time.monotonic() - begun
        if waited > 1 and not _others_live_in(namespace, pid):
            break
        if waited > 10:  # pragma: no cover: requires a process that hangs in the kernel
            raise rpc(f"stop '{machine.name}': one of its processes does not exit")
        time.sleep(0.002)
    note(machine, "stopped")


def _is_there(pid: int, started: str) -> bool:
    try:
        return start_time(f"/proc/{pid}") == started
    except OSError:
        return False


def _others_live_in(namespace: str, pid: int) -> bool:
    """Whether processes other than zombies are left there, apart from pid 1.

    If a command's client was killed, the host's pid 1 has to reap the command, and the machine's
    pid 1 waits for that. In a container, the host's pid 1 may be a program that never reaps.
    """
    for entry in os.listdir("/proc"):
        try:
            if not entry.isdigit() or int(entry) == pid or not start_time(f"/proc/{entry}"):
                continue
            if os.readlink(f"/proc/{entry}/ns/pid") == namespace:
                return True
        except OSError:
            continue
    return False
