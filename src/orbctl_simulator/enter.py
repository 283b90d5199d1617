"""`run`: a command in a machine, with the caller's streams."""

from __future__ import annotations

import os
import stat

from .account import Account
from .door import Door, told
from .packages import wait_for_packages
from .state import Failure, Machine, find, rpc, why

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .cli import Options

NO_MACHINE = """\
To use Docker:
    docker run ...
See "orb docker" for more info.

To create a Linux machine:
    orb create ubuntu
See "orb create --help" for supported distros and options."""

_NULL = os.makedev(1, 3)


def select(selector: str) -> Machine:
    """The machine that a command refers to; without a name, the default machine."""
    if selector:
        return find(selector)
    from .config import default_machine  # too slow to load for `run -m`

    machine = default_machine()
    if machine is None:
        raise Failure(NO_MACHINE)
    return machine


def running(machine: Machine, hold: float = 0) -> Door:
    """The door of a machine, which is started if it is stopped."""
    try:
        if machine.finished:
            return Door.of(machine)
    except Failure:
        pass
    from .boot import start

    start(machine, hold=hold)
    try:
        return Door.of(machine)
    except Failure:
        start(machine, hold=hold)  # stopped just now by another process
        return Door.of(machine)


class _Command:
    """The command to run, and how it is started once this process is inside."""

    def __init__(self, door: Door, machine: Machine, options: Options, words: list[str]) -> None:
        self._door, self._user = door, options.text("user") or machine.user
        self._words, self._shell = words, options.on("shell")
        if options.on("path"):
            self._words = words[:1] + [_translate(word) for word in words[1:]]
        self._workdir, self._here = options.text("workdir"), _caller_directory()
        names = os.environ.get("ORBENV", "").split(":")
        self._env = {name: os.environ[name] for name in names if name and name in os.environ}

    def __call__(self, terminal: str = "") -> int:
        account = Account(self._user)
        env = account.environment()
        if terminal and "TERM" in os.environ:
            env["TERM"] = os.environ["TERM"]
        env.update(self._env)
        for fd in (0, 1, 2):
            _give(fd, account.uid)
        account.become()
        _enter_directory(self._workdir, self._here, account.home)
        os.umask(0o022)
        return self._door.carry_out(account, self._words, env, self._shell, terminal)


def run(options: Options, words: list[str]) -> int:
    machine = select(options.text("machine"))
    wait_for_packages(machine.base)
    door = running(machine, options.call.hold)
    command = _Command(door, machine, options, words)
    kinds = [_kind(fd) for fd in (0, 1, 2)]
    for fd, kind in enumerate(kinds):
        if kind == "null":
            null = door.open_device("dev/null", (1, 3))
            if null < 0:
                kinds[fd] = "file"  # its own is broken, and it must not get the host's
            else:
                os.dup2(null, fd)
    if kinds[:2] == ["terminal", "terminal"]:
        from .terminal import with_terminal  # these take longer to load than most commands take

        return with_terminal(door, machine, command, options.call)
    if options.call.watches or {"terminal", "file"} & {*kinds}:
        from .relay import relay

        return relay(door, machine, command, options.call, kinds)

    def alone() -> int:
        door.enter()
        return command()

    # Nothing is left to do on the host: this process itself enters, and waits.
    os._exit(told(alone))


def _kind(fd: int) -> str:
    """The kind of one of the caller's streams, which decides whether a machine may get it.

    It may get a pipe. A process inside could reopen a file of the host through /proc, for writing
    and with its owner's rights; a terminal or a socket also leads to the host.
    """
    status = os.fstat(fd)
    if stat.S_ISCHR(status.st_mode) and status.st_rdev == _NULL:
        return "null"
    if os.isatty(fd):
        return "terminal"
    named = os.readlink(f"/proc/self/fd/{fd}")
    return "pipe" if stat.S_ISFIFO(status.st_mode) and named.startswith("pipe:") else "file"


def _caller_directory() -> str:
    try:
        return os.getcwd()
    except OSError:
        return ""


def _translate(word: str) -> str:
    """``-p``: absolute paths are the caller's, except those marked as the machine's."""
    if word.startswith("/mnt/linux/"):
        return word[len("/mnt/linux") :]
    return f"/mnt/mac{word}" if word.startswith("/") else word


def _give(fd: int, uid: int) -> None:
    """Let the user reopen its own output as /dev/stdout and /dev/stderr, as container tools do."""
    if uid and (stat.S_ISFIFO(os.fstat(fd).st_mode) or os.isatty(fd)):
        os.fchown(fd, uid, -1)


def _enter_directory(workdir: str, here: str, home: str) -> None:
    if workdir:
        for step in (home, workdir):
            try:
                os.chdir(step)
            except OSError as error:
                if step is workdir:
                    raise rpc(f"chdir {workdir}: {why(error).lower()}") from None
        return
    for folder in (here, home, "/"):
        try:
            os.chdir(folder)
            return
        except OSError:
            continue
