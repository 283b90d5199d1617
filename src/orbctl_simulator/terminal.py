"""The machine's own terminal for a command, connected to the caller's."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import termios
import tty

from .relay import Stream, pump
from .state import rpc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .cli import Call
    from .door import Door
    from .state import Machine

_TIOCGPTN, _TIOCSPTLCK, _TIOCGPTPEER = 0x80045430, 0x40045431, 0x5441


def with_terminal(door: Door, machine: Machine, command: Callable[[str], int], call: Call) -> int:
    master = door.open_device("dev/pts/ptmx", (5, 2))
    if master < 0:
        raise rpc("run: no terminal can be opened: /dev/pts/ptmx is missing in the machine")
    fcntl.ioctl(master, _TIOCSPTLCK, struct.pack("i", 0))
    number = struct.unpack("I", fcntl.ioctl(master, _TIOCGPTN, b"\0" * 4))[0]
    peer = fcntl.ioctl(master, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY)
    door.own(peer)
    _copy_size(master)

    def wired() -> int:
        terminal = f"/dev/pts/{number}"
        slave = os.open(terminal, os.O_RDWR | os.O_NOCTTY)
        for fd in (0, 1, 2):
            os.dup2(slave, fd)
        os.close(slave)
        return command(terminal)

    signal.signal(signal.SIGWINCH, lambda *_: _copy_size(master))
    pid = door.fork(wired)
    keys, screen = Stream(0, master, call.limits.get(0)), Stream(master, 1, call.limits.get(1))
    keys.is_input = True
    before = termios.tcgetattr(0)
    tty.setraw(0, termios.TCSANOW)
    try:
        return pump([keys, screen], pid, machine, call)
    finally:
        os.close(peer)  # kept until here, or the terminal hangs up before the command opens it
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def _copy_size(master: int) -> None:
    size = fcntl.ioctl(0, termios.TIOCGWINSZ, b"\0" * 8)
    fcntl.ioctl(master, termios.TIOCSWINSZ, size)
