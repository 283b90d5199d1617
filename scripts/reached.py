"""Records which lines of the simulator its processes reach, for `make coverage`.

coverage.py measures all other processes. It cannot measure these: they move into other root
directories and become other users, where they cannot write a data file, and there are many
thousands of them. They trace themselves, into a file that is opened before all that. A `.pth` file
makes each Python of `.venv` run this file, before coverage.py's own `.pth` file starts a
measurement.
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
#: Part of the path of each of its files, wherever it is seen from.
PLACE = "/orbctl_simulator/"


def command_line() -> list[str]:
    """The words that started this process; `sys.argv` lacks some of them."""
    try:
        with open("/proc/self/cmdline", "rb") as file:
            return [os.fsdecode(word) for word in file.read().split(b"\0")]
    except OSError:  # a Mac, which has no simulator
        return ["", ""]


def program_text(words: list[Any]) -> str:
    """The text after `-c`, if Python was told to read nothing at its start."""
    bare = any(re.fullmatch("-[A-Z]*S[A-Z]*", str(word)) for word in words)
    place = words.index("-c") + 1 if bare and "-c" in words else len(words)
    return "".join(map(str, words[place : place + 1]))


def is_simulator(words: list[str]) -> bool:
    """Whether it is `orbctl-simulator`, or one of its child processes."""
    named = os.path.basename(words[1]) in ("orbctl-simulator", "orbctl", "orb")
    return named or words[1:3] == ["-m", SIMULATOR] or SIMULATOR in program_text(words)


def traced(words: list[Any]) -> list[Any]:
    """The same command, traced even if Python was told to read nothing at its start."""
    text = program_text(words)
    if SIMULATOR not in text:
        return words
    begin = "import os; f = {!r}; os.path.exists(f) and exec(open(f).read(), dict(__file__=f)); "
    return [begin.format(__file__) + text if word == text else word for word in words]


def before_end(save: Callable[[], object]) -> None:
    """Save the reached lines before this process ends, or runs another executable."""
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
    """Record lines of `src/`: each save writes a line of JSON."""
    try:
        low = os.open(os.path.join(FOLDER, "lines"), os.O_WRONLY | os.O_APPEND)
    except OSError:  # in a machine that cannot see it
        return
    # A number that is not a standard stream's.
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
            with contextlib.suppress(OSError):  # in tests that limit the size of files
                os.write(file, json.dumps(told).encode() + b"\n")

    def close_another(fd: int) -> None:
        if fd != file:
            close(fd)

    def save_and_sleep(seconds: float) -> None:
        save()  # it may be killed while it sleeps
        if is_init:
            # Nothing new follows, and a machine's first process must not keep a host file open.
            sys.settrace(None)
            close(file)
            time.sleep = sleep
        sleep(seconds)

    os.close, time.sleep = close_another, save_and_sleep  # type: ignore[assignment]
    before_end(save)
    sys.settrace(call)


# If two directories of a virtual environment are the same, Python runs this twice.
if "reached" not in vars(sys):
    vars(sys)["reached"] = True
    command = command_line()
    if is_simulator(command):
        os.environ.pop("COVERAGE_PROCESS_CONFIG", None)
        trace(f"{SIMULATOR}.init" in program_text(command))
