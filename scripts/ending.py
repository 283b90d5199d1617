"""How a run ends: in order when it is told to, together with everything that it started.

SIGTERM and SIGHUP act as Ctrl-C, and signals after the first one disturb nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

#: Descriptors that every child inherits, such as locks that show that a run is in progress.
INHERITED: list[int] = []

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None

_children: set[subprocess.Popen[Any]] = set()
_began = False


def listen() -> None:
    """Raise KeyboardInterrupt for the first signal that tells this process to end."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as behind `nohup`
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    global _began
    if not _began:
        _began = True
        raise KeyboardInterrupt


def hand_on() -> None:
    """Tell child processes to end; a second such signal does them no harm."""
    for child in list(_children):
        child.terminate()


@contextlib.contextmanager
def child(argv: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """Start an executable that is told to end, on Linux even if this process is killed."""
    running = subprocess.Popen(
        argv, pass_fds=INHERITED, preexec_fn=_end_with_parent if _LIBC else None, **options
    )
    _children.add(running)
    try:
        yield running
    except BaseException:
        running.terminate()
        running.wait()
        raise
    finally:
        _children.discard(running)


def _end_with_parent() -> None:
    assert _LIBC is not None
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def call(argv: Sequence[str], **options: Any) -> int:
    """Run an executable and return its exit status; always wait for it.

    Raises:
        KeyboardInterrupt: This process was told to end, and the child has ended.
    """
    interrupted = False
    with child(argv, **options) as running:
        while True:
            try:
                status: int = running.wait()
                break
            except KeyboardInterrupt:
                interrupted = True
                hand_on()
    if interrupted:
        raise KeyboardInterrupt
    return status


def watch_make() -> None:
    """End when the `make` that started this process is killed, or waits for us in order to end."""
    make = os.getppid()
    if not os.environ.get("MAKELEVEL") or make == 1:
        return

    def watch() -> None:
        # make forwards SIGTERM; after other signals it waits, in a handler that blocks them.
        before, always = 0, _blocked(make)
        while os.getppid() == make:
            time.sleep(0.5)
            now = _blocked(make)
            always &= now
            if now & before & ~always:
                break
            before = now
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _blocked(pid: int) -> int:
    """The signals that a process currently blocks, as bits; 0 if unknown."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    (mask,) = (int(line.split()[1], 16) for line in lines if line.startswith("SigBlk:"))
    return mask & sum(1 << (number - 1) for number in SIGNALS)
