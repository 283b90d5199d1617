"""What is written down of a booted machine that runs: which processes it is, and how far it is."""

from __future__ import annotations

import os

from .state import start_time, write_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

STARTING, RUNNING, STOPPING = "starting", "running", "stopping"


class Life:
    """The file ``pid``: the first three fields are those of a machine that is not booted, too."""

    def __init__(self, words: list[str]) -> None:
        pid, self.started, self.clock, supervisor, self.supervisor_started, self.state, boots = (
            words
        )
        self.init, self.supervisor, self.boots = int(pid), int(supervisor), int(boots)

    @classmethod
    def own(cls, clock: str, boots: int) -> Life:
        """That of the machine whose supervisor this process is, before its init is there."""
        pid = os.getpid()
        words = ["0", "-", clock, str(pid), start_time(f"/proc/{pid}"), STARTING, str(boots)]
        return cls(words)

    @classmethod
    def read(cls, path: str) -> Life | None:
        try:
            with open(path) as file:
                return cls(file.read().split())
        except (FileNotFoundError, ValueError):
            return None

    def write(self, path: str) -> None:
        words = (self.init, self.started, self.clock, self.supervisor, self.supervisor_started)
        write_file(path, " ".join(map(str, (*words, self.state, self.boots))) + "\n")

    @property
    def is_supervised(self) -> bool:
        return _is_alive(self.supervisor, self.supervisor_started)

    @property
    def has_init(self) -> bool:
        """Never asked of the process itself: what it shows of its memory can make a reader wait."""
        return self.init > 0 and _is_alive(self.init, self.started)


def _is_alive(pid: int, started: str) -> bool:
    try:
        return start_time(f"/proc/{pid}") == started
    except OSError:
        return False


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
