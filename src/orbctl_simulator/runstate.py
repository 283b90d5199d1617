"""The state of a running booted machine, in the file ``pid`` of its directory."""

from __future__ import annotations

import os

from .state import start_time, write_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from .state import Machine

#: The origin of a signal that has a value: for a supervisor's SIGTERM, the milliseconds to wait.
SI_QUEUE = -1
STARTING, RUNNING, STOPPING, STOPPED = "starting", "running", "stopping", "stopped"


class RunState:
    """The machine's init and its supervisor, each with its start time, and what they are doing.

    `bare` is the supervisor's descriptor of the machine's files without what is mounted in them.
    The first three words are the same as for a machine without init.
    """

    def __init__(self, words: list[str]) -> None:
        init, self.started, self.clock, supervisor, self.supervisor_started, self.state = words[:6]
        self.init, self.supervisor = int(init), int(supervisor)
        self.boots, self.bare = map(int, words[6:])

    @classmethod
    def of_supervisor(cls, clock: str, boots: int) -> RunState:
        """The state of this process's machine, before it has an init."""
        pid = os.getpid()
        words = ["0", "-", clock, str(pid), start_time(f"/proc/{pid}"), STARTING, str(boots), "-1"]
        return cls(words)

    @classmethod
    def read(cls, path: str) -> RunState | None:
        try:
            with open(path) as file:
                return cls(file.read().split())
        except (FileNotFoundError, ValueError):
            return None

    def write(self, path: str) -> None:
        words = (self.init, self.started, self.clock, self.supervisor, self.supervisor_started)
        write_file(path, " ".join(map(str, (*words, self.state, self.boots, self.bare))) + "\n")

    @property
    def is_supervised(self) -> bool:
        return _is_alive(self.supervisor, self.supervisor_started)

    @property
    def has_init(self) -> bool:
        return self.init > 0 and _is_alive(self.init, self.started)


def _is_alive(pid: int, started: str) -> bool:
    """Reads no file that depends on the process's memory, which its owner could make block."""
    try:
        return start_time(f"/proc/{pid}") == started
    except OSError:
        return False


def state(machine: Machine) -> str:
    found = RunState.read(machine.file("pid"))
    if not found or not found.is_supervised:
        return STOPPED
    if found.state == RUNNING and not found.has_init:
        return STARTING  # until the supervisor has noticed; only it knows whether it boots again
    return found.state


def init_of(machine: Machine) -> int | None:
    found = RunState.read(machine.file("pid"))
    return found.init if found and found.has_init else None


def children(pid: int) -> Iterator[str]:
    """The names of a process's children."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", "rb") as file:
                    before, _, after = file.read().rpartition(b") ")
            except OSError:
                continue
            if int(after.split()[1]) == pid:
                yield before.partition(b"(")[2].decode(errors="replace")
