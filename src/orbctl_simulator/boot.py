"""Starting and stopping a machine's first process, from the host's side."""

from __future__ import annotations

import os
import sys
import time

from .config import wake
from .linux import CLONE_NEWPID, CLONE_NEWTIME, unshare
from .state import Failure, Machine, cache, home, rpc, start_time, write_file

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_PROGRAM = (
    f"import sys; sys.path.insert(0, {_ROOT!r}); from orbctl_simulator.init import main; main()"
)


class Boot:
    """A started machine that still dies with us; `commit` lets it live on."""

    def __init__(self, machine: Machine, create: bool = False) -> None:
        self.machine = machine
        self._own_uptime = os.environ.get("ORBCTL_SIMULATOR_UPTIME") == "own"
        paths = [home(), cache(), *_shared(machine)]
        control, self._control = os.pipe()
        status, report = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                self._become_init(control, report, ["create" if create else "start", *paths])
            except PermissionError as error:
                text = f"error this host, or the container it is, allows no namespaces ({error})\n"
                os.write(report, text.encode(errors="surrogateescape"))
            except BaseException as error:
                os.write(report, f"error {error}\n".encode(errors="surrogateescape"))
            os._exit(1)
        os.close(control)
        os.close(report)
        os.waitpid(child, 0)
        with open(status, errors="surrogateescape") as file:
            answers = dict(line.rstrip("\n").partition(" ")[::2] for line in file)
        if "error" in answers or "ok" not in answers:
            os.close(self._control)
            raise Failure(answers.get("error") or "setup: machine crashed on startup")
        self.pid = int(answers["pid"])
        clock = "own" if self._own_uptime else "shared"
        write_file(machine.file("pid"), f"{self.pid} {start_time(f'/proc/{self.pid}')} {clock}\n")
        note(machine, f"started, pid {self.pid}")

    def _become_init(self, control: int, report: int, arguments: list[str]) -> None:
        """Fork into a new process namespace, and let the fork become `init`."""
        os.setsid()
        os.chdir(self.machine.path)
        unshare(CLONE_NEWPID)
        if self._own_uptime:
            unshare(CLONE_NEWTIME)
            with open("/proc/self/timens_offsets", "w") as file:
                file.write(f"boottime -{int(time.clock_gettime(time.CLOCK_BOOTTIME))} 0\n")
        pid = os.fork()
        if pid:
            os.write(report, f"pid {pid}\n".encode())
            os._exit(0)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.set_inheritable(control, True)
        os.set_inheritable(report, True)
        command = [sys.executable, "-I", "-S", "-B", "-c", _PROGRAM, self.machine.id]
        command += [str(control), str(report), *arguments]
        os.execve(sys.executable, command, {})

    def commit(self) -> None:
        os.write(self._control, b"!")
        os.close(self._control)

    def abandon(self) -> None:
        """End it and all its processes."""
        os.close(self._control)
        halt(self.machine)


def note(machine: Machine, text: str) -> None:
    """A line of the machine's log, which `logs` shows."""
    with open(machine.file("console"), "a") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {machine.name}: {text}\n")


def _shared(machine: Machine) -> list[str]:
    """Host directories that the machine is to see, as pairs of source and target."""
    pairs = []
    for entry in machine.many("mounts") + machine.many("shares"):
        source, _, target = entry.partition(":")
        source = os.path.realpath(os.path.expanduser(source))
        if not os.path.exists(source):
            raise Failure(f"mount {entry}: no such file or directory")
        pairs += [source, os.path.normpath(target) if target else source]
    for entry in machine.many("shares"):
        pairs += [os.path.realpath(entry), f"/mnt/mac{os.path.realpath(entry)}"]
    return pairs


def start(machine: Machine) -> None:
    """Start it unless it runs; safe against another process that does the same."""
    if machine.finished and machine.process():
        return
    with machine.lock():
        if machine.reload().process() is None:
            try:
                Boot(machine).commit()
                wake()
            except Failure as failure:
                raise rpc(f"start '{machine.name}': {failure}") from None


def stop(machine: Machine) -> None:
    with machine.lock():
        halt(machine.reload())


def halt(machine: Machine) -> None:
    """End pid 1, and with it, by the kernel's own rule, every process of the machine."""
    pid = machine.process()
    if pid is None:
        return
    started, namespace = machine.written_process()[1], os.readlink(f"/proc/{pid}/ns/pid")
    os.kill(pid, 9)
    begun = time.monotonic()
    # Not `process`, which no longer knows it once it is ending: it ends after all the others.
    while _is_there(pid, started):
        waited = time.monotonic() - begun
        if waited > 1 and not _others_live_in(namespace, pid):
            break
        if waited > 10:  # pragma: no cover: it takes a process that hangs in the kernel
            raise rpc(f"stop '{machine.name}': a process of it does not end")
        time.sleep(0.002)
    note(machine, "stopped")


def _is_there(pid: int, started: str) -> bool:
    try:
        return start_time(f"/proc/{pid}") == started
    except OSError:
        return False


def _others_live_in(namespace: str, pid: int) -> bool:
    """Whether more than zombies is left there, beside pid 1.

    A command whose client was killed is the host's pid 1 to reap, and the machine's pid 1 waits
    for that; in a container the host's pid 1 may be a program that never does.
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
