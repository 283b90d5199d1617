"""Notes which lines of the simulator its processes reach, for `make coverage`.

coverage.py measures all other processes. It cannot measure these: they move into other root
directories and become other users, where they cannot write a data file, and there are many
thousands of them. They trace themselves, into a file that is opened before all that. A `.pth` file
has each Python of `.venv` run this file, before coverage.py's own `.pth` file starts a measurement.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import re
import sys
import time
from types import FrameType
from typing import Any, Callable

FOLDER = os.path.dirname(__file__)
SIMULATOR = "orbctl_simulator"
#: In the path of each of its files, wherever it is seen from.
PLACE = "/orbctl_simulator/"


def command_line() -> list[str]:
    """The words that this process was started with; `sys.argv` does not have all of them."""
    try:
        with open("/proc/self/cmdline", "rb") as file:
            return [os.fsdecode(word) for word in file.read().split(b"\0")]
    except OSError:  # a Mac, and there is no simulator
        return ["", ""]


def program_text(words: list[Any]) -> str:
    """The text after `-c`, where Python was told to read nothing at its start."""
    bare = any(re.fullmatch("-[A-Z]*S[A-Z]*", str(word)) for word in words)
    place = words.index("-c") + 1 if bare and "-c" in words else len(words)
    return "".join(map(str, words[place : place + 1]))


def is_simulator(words: list[str]) -> bool:
    """Whether it is `orbctl-simulator`, or one of the processes that it starts."""
    named = os.path.basename(words[1]) in ("orbctl-simulator", "orbctl", "orb")
    return named or words[1:3] == ["-m", SIMULATOR] or SIMULATOR in program_text(words)


def traced(words: list[Any]) -> list[Any]:
    """The same command, traced also where Python was told to read nothing at its start."""
    text = program_text(words)
    if SIMULATOR not in text:
        return words
    begin = "import os; f = {!r}; os.path.exists(f) and exec(open(f).read(), dict(__file__=f)); "
    return [begin.format(__file__) + text if word == text else word for word in words]


def before_end(save: Callable[[], object]) -> None:
    """Save what was reached before this process ends, or becomes another program."""
    end, become, kill = os._exit, os.execve, os.kill

    def _exit(status: int) -> None:
        save()
        end(status)

    def execve(path: Any, words: list[Any], env: Any) -> None:
        save()
        become(path, traced(words), env)

    def execv(path: Any, words: list[Any]) -> None:
        execve(path, words, os.environ)

    def kill_and_save(pid: int, number: int) -> None:
        if pid == os.getpid():
            save()
        kill(pid, number)

    atexit.register(save)
    os._exit = _exit  # type: ignore[assignment]
    os.execve = execve  # type: ignore[assignment]
    os.kill = kill_and_save
    os.execv = execv  # type: ignore[assignment]


def trace(is_init: bool) -> None:
    """Note the lines of `src/`: a line of JSON for each time that they are saved."""
    try:
        low = os.open(os.path.join(FOLDER, "lines"), os.O_WRONLY | os.O_APPEND)
    except OSError:  # in a machine that does not see it
        return
    # A number that is no standard stream's.
    file = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 300)
    os.close(low)
    seen: dict[str, set[int]] = {}
    tracers: dict[str, Any] = {}
    close, sleep = os.close, time.sleep

    def tracer(name: str) -> Any:
        lines = seen.setdefault(name, set())

        def line(frame: FrameType, event: str, _: object) -> Any:
            if event == "line":
                lines.add(frame.f_lineno)
            return line

        return line

    def call(frame: FrameType, _: str, __: object) -> Any:
        _, place, name = frame.f_code.co_filename.rpartition(PLACE)
        if not place:
            return None
        if name not in tracers:
            tracers[name] = tracer(name)
        return tracers[name]

    def save() -> None:
        told = {name: sorted(lines) for name, lines in seen.items() if lines}
        for lines in seen.values():
            lines.clear()
        if told:
            with contextlib.suppress(OSError):  # where a test limits the size of files
                os.write(file, json.dumps(told).encode() + b"\n")

    def close_another(fd: int) -> None:
        if fd != file:
            close(fd)

    def save_and_sleep(seconds: float) -> None:
        save()  # it may be killed in its sleep
        if is_init:
            # Nothing new comes, and a machine's first process must not have a file of the host's.
            sys.settrace(None)
            close(file)
            time.sleep = sleep
        sleep(seconds)

    os.close, time.sleep = close_another, save_and_sleep  # type: ignore[assignment]
    before_end(save)
    sys.settrace(call)


# Where two directories of a virtual environment are one, Python comes here twice.
if "reached" not in vars(sys):
    vars(sys)["reached"] = True
    command = command_line()
    if is_simulator(command):
        os.environ.pop("COVERAGE_PROCESS_CONFIG", None)
        trace(f"{SIMULATOR}.init" in program_text(command))
