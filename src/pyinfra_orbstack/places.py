"""Where `orbctl` and docker run: on this host, or on a Mac that OpenSSH reaches.

This is the only module that calls ssh. The user's ssh configuration, agent, jump hosts and known
hosts apply. All hosts of a Mac share one control connection, which ends with this process, however
that ends: a shell, the keeper, waits for it (shell/keeper.sh).
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from gevent.lock import RLock
from typing_extensions import override

from pyinfra_orbstack import launch, process, shell, shelltext
from pyinfra_orbstack.answers import BadValue

#: Selects the Mac for hosts whose data does not.
SSH_VARIABLE = "PYINFRA_ORBSTACK_SSH"
#: The key in a host's data that selects the Mac.
SSH_KEY = "orbstack_ssh"
#: Identifies, for shell/record.sh, the machines of an `orbctl` on another host.
PLACE_VARIABLE = "PYINFRA_ORBSTACK_PLACE"

#: Seconds for a Mac to accept a connection, and to answer while one is open (three times).
CONNECT_TIMEOUT, ALIVE_INTERVAL = 10, 5
#: Seconds for the whole login.
LOGIN_TIMEOUT = 60.0
#: Seconds after which an unused control connection ends, even if its keeper was killed.
IDLE = 30
#: A socket's path has at most about 104 bytes; ssh appends some, and expands some characters.
_SHORT = re.compile(r"[\w/.+-]{1,55}", re.ASCII)

#: What no login shell interprets between single quotes, nor `sh` between double quotes.
_PLAIN = frozenset(
    b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;/_+=@#()[]{}<>|&~^*?-"
)
#: Separates a command's output from what a login shell prints before it.
_MARK = "pyinfra-orbstack: the output begins"
_MARKED = f"echo '{_MARK}'\n"
#: Options of ssh for one command.
_SINGLE = ("-T", "-o", "ControlMaster=no")


class PlaceError(OSError):
    """The Mac cannot be reached; the text is one line."""


def check_destination(key: str, value: object) -> str:
    """Return ``value`` if ssh can only read it as a destination.

    Raises:
        BadValue: It is not text, is empty, begins with ``-``, or contains another character than
            those of users, hosts and ports.

    >>> check_destination("orbstack_ssh", "me@mac.local")
    'me@mac.local'
    """
    if not isinstance(value, str) or not value:
        raise BadValue(f"{key} must be an SSH destination such as me@mac, not {value!r}")
    if re.search(r"^-|@-|/-|[^\w.@:%/\[\]+~,-]", value):
        raise BadValue(
            f"{key} {value!r} must contain only a user, a host and a port, such as me@mac or "
            "ssh://me@mac:22; set anything else in ~/.ssh/config"
        )
    return value


class Place:
    """This host."""

    #: The SSH destination; empty for this host.
    name = ""

    @property
    def far(self) -> bool:
        """Whether each answer takes a noticeable time."""
        return bool(self.name)

    def open(self) -> None:
        """Make sure that commands can be called; do this before `argv`, which never waits.

        Raises:
            PlaceError: They cannot.
        """

    def argv(self, words: Sequence[str], *, tty: bool = False) -> list[str]:
        """The local command line that runs a command line there, with our input.

        Args:
            words: The command line; its first word is ``orbctl``, ``docker`` or an executable.
            tty: Whether the command has a terminal.
        """
        return list(words)

    def run(
        self,
        words: Sequence[str],
        *,
        env: Mapping[str, str],
        timeout: float,
        stdin: bytes = b"",
    ) -> process.Completed:
        """Run a command line there. Without input, it ends if the connection does.

        Args:
            words: The command line, as for `argv`.
            env: The environment of the local command line.
            timeout: Seconds that it may take.
            stdin: Its input.

        Raises:
            PlaceError: It cannot be reached.
            OSError: It cannot be started.
            TimeoutError: It took too long.
        """
        self.open()
        argv = self._call(words, has_input=bool(stdin))
        return self._own(process.run(argv, env=env, timeout=timeout, stdin=stdin))

    def _call(self, words: Sequence[str], *, has_input: bool) -> list[str]:
        """The local command line for `run`."""
        return list(words)

    def _own(self, done: process.Completed) -> process.Completed:
        """A result without what is not the command's own output."""
        return done

    def idle(self, argv: Sequence[str]) -> list[str]:
        """A local command line from `argv` that gets no input, and may outlive this process."""
        return list(argv)

    def holding(self, argv: Sequence[str]) -> list[str]:
        """A local command line that may outlive this process, and uses `executable` until then."""
        return list(argv)

    def executable(self, command: str) -> str:
        """A local executable that calls `orbctl` there."""
        return command

    def problem(self, status: int | None, said: str) -> str:
        """Why a command could not be reached or found there; empty if it ran, and always here."""
        return ""

    def shown(self, line: str) -> str:
        """A command line to run there, as shown to the user."""
        return line

    def mac_path(self, path: str) -> str:
        """A path there, with ``~`` replaced by the home directory."""
        return path

    def lend(self, content: bytes) -> str:
        """Write a private file there that a command needs for a moment, and return its path.

        Raises:
            PlaceError: That failed.
        """
        raise NotImplementedError

    def take_back(self, path: str) -> None:
        """Remove a lent file."""


class Mac(Place):
    """A Mac that OpenSSH reaches."""

    def __init__(self, destination: str) -> None:
        self.name = destination
        self._lock = RLock()
        self._link: _Link | None = None
        # The last failure, and when it was.
        self._failure, self._failed = "", -math.inf

    @override
    def open(self) -> None:
        """Open the control connection, unless it is open."""
        asked = time.monotonic()
        with self._lock:
            if self._link is not None and self._link.open:
                return
            # Hosts that wait for the same attempt do not each try again.
            if asked < self._failed:
                raise PlaceError(self._failure)
            try:
                link = self._connect()
            except PlaceError as broken:
                self._failure, self._failed = str(broken), time.monotonic()
                raise
            # Until then, a signal handler may use the executable of the old one: without its
            # control connection, ssh opens one for each call.
            old, self._link = self._link, link
            if old is not None:
                old.let_go()

    def close(self) -> None:
        """End the control connection as soon as no command uses it."""
        link, self._link = self._link, None
        if link is not None:
            link.let_go()

    def _connect(self) -> _Link:
        if not shutil.which("ssh"):
            raise PlaceError("ssh not found: install OpenSSH's client, or add it to PATH")
        link = _Link(self._ssh(), self.name)
        try:
            argv = self._ssh("-fN", "-o", "ControlMaster=yes", "-o", f"ControlPersist={IDLE}")
            done = process.run([*link.through(argv), "--", self.name], timeout=LOGIN_TIMEOUT)
            if done.returncode:
                raise PlaceError(self.problem(255, done.stderr.decode(errors="replace")))
            ssh = [*link.through(self._ssh(*_SINGLE)), "--", self.name]
            link.write_executable(self._prefix("idle", "orbctl"), ssh)
        except TimeoutError:
            link.let_go()
            raise PlaceError(
                f"the login on {self.name} took more than {LOGIN_TIMEOUT:g} s: check that "
                f"`ssh {self.name}` works without a prompt"
            ) from None
        except BaseException:
            link.let_go()
            raise
        return link

    def _ssh(self, *options: str) -> list[str]:
        """The beginning of a command line of ssh."""
        settings = (
            # ssh must never prompt.
            "BatchMode=yes",
            f"ConnectTimeout={CONNECT_TIMEOUT}",
            f"ServerAliveInterval={ALIVE_INTERVAL}",
            "ServerAliveCountMax=3",
            # Input is data, and errors are all that may be printed.
            "EscapeChar=none",
            "LogLevel=ERROR",
            # Those of the user's configuration are meant for the user's own sessions.
            "ClearAllForwardings=yes",
            "RemoteCommand=none",
        )
        return ["ssh", *options, *(word for one in settings for word in ("-o", one))]

    @staticmethod
    def _prefix(*words: str) -> str:
        """Shell text for the Mac that calls `run_there`, with more arguments to follow."""
        known = shelltext.functions()
        found = shelltext.words("find_orbctl", *shelltext.KNOWN_FOLDERS)
        call = shelltext.words("run_there", *words)
        return f"{known['find_orbctl']}\n{known['run_there']}\n{found}\n{call}"

    def _argv(self, text: str, *, tty: bool = False) -> list[str]:
        argv = self._ssh(*(["-tt", *_SINGLE[1:]] if tty else _SINGLE))
        if self._link is not None:
            argv = self._link.through(argv)
        return [*argv, "--", self.name, for_any_shell(text)]

    @override
    def argv(self, words: Sequence[str], *, tty: bool = False) -> list[str]:
        """The local command line that runs a command line on the Mac, with our input."""
        return self._argv(self._prefix("piped", *words), tty=tty)

    @override
    def _call(self, words: Sequence[str], *, has_input: bool) -> list[str]:
        argv = self._argv(_MARKED + self._prefix("piped" if has_input else "idle", *words))
        return argv if has_input else self.idle(argv)

    @override
    def _own(self, done: process.Completed) -> process.Completed:
        """A result without what the login shell printed first."""
        _, mark, own = done.stdout.partition(f"{_MARK}\n".encode())
        return done._replace(stdout=own) if mark else done

    @override
    def idle(self, argv: Sequence[str]) -> list[str]:
        """A local command line from `argv` that gets no input, and may outlive this process."""
        return list(argv) if self._link is None else self._link.idling(argv)

    @override
    def holding(self, argv: Sequence[str]) -> list[str]:
        """A local command line that keeps the control connection until it ends."""
        return list(argv) if self._link is None else self._link.held(argv)

    @override
    def executable(self, command: str) -> str:
        """A local executable that calls `orbctl` on the Mac; `open` the place before.

        Raises:
            PlaceError: It was never open.
        """
        if self._link is None:
            raise PlaceError(self.problem(255, "not connected"))
        return self._link.path("orbctl")

    @override
    def problem(self, status: int | None, said: str) -> str:
        """Why ssh failed, or what is missing on the Mac."""
        missing = re.search(r"^run_there: missing (.*?)\r?$", said, re.MULTILINE)
        if missing and os.path.basename(missing[1]) == "docker":
            return f"docker was not found on {self.name}: open OrbStack there once"
        if missing:
            return f"{missing[1]} was not found on {self.name}: install OrbStack there"
        if status != 255:
            return ""
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        if "REMOTE HOST IDENTIFICATION HAS CHANGED" in said:
            return (
                f"the host key of {self.name} has changed: if the Mac was reinstalled or replaced, "
                f"remove its old key with `ssh-keygen -R`, then run `ssh {self.name}` once"
            )
        if "Host key verification failed" in said or "No matching host key" in said:
            return (
                f"the host key of {self.name} is unknown: run `ssh {self.name}` once, "
                "and confirm it"
            )
        if refused := [line for line in lines if "Permission denied" in line]:
            return (
                f"{self.name} refused the login ({refused[-1]}): check that "
                f"`ssh {self.name}` works without a password"
            )
        reason = lines[-1] if lines else "the connection ended"
        if re.search(r"timed out|refused|No route|unreachable|not responding|is down", said):
            return (
                f"{self.name} cannot be reached ({reason}): check that the Mac is awake and "
                "allows Remote Login"
            )
        return f"ssh {self.name} failed ({reason}): check that `ssh {self.name}` works"

    @override
    def shown(self, line: str) -> str:
        """A command line to run on the Mac, as shown to the user."""
        return f"{line} (on {self.name})"

    @override
    def mac_path(self, path: str) -> str:
        """A path on the Mac, with ``~`` replaced by the home directory there."""
        return self._home + path[1:] if re.match("~(/|:|$)", path) else path

    @functools.cached_property
    def _home(self) -> str:
        home = self._ask('printf %s "$HOME"')
        if home[:1] != "/":
            raise PlaceError(
                f"{self.name} has no home directory for ~: write full paths, or set HOME there"
            )
        return home

    @override
    def lend(self, content: bytes) -> str:
        """Write a private file on the Mac, and return its path."""
        return self._ask(f"{shelltext.library('lend_user_data')}lend_user_data", content)

    @override
    def take_back(self, path: str) -> None:
        """Remove a lent file."""
        with contextlib.suppress(OSError):
            self._ask(shelltext.words("rm", "-f", path))

    def _ask(self, text: str, stdin: bytes = b"") -> str:
        self.open()
        try:
            done = process.run(self._argv(_MARKED + text), stdin=stdin, timeout=LOGIN_TIMEOUT)
        except TimeoutError:
            raise PlaceError(
                f"{self.name} did not answer within {LOGIN_TIMEOUT:g} s: check that the Mac is "
                "awake"
            ) from None
        said = done.stderr.decode(errors="replace")
        if done.returncode:
            why = " ".join(said.split()) or f"exit code {done.returncode}"
            raise PlaceError(
                self.problem(done.returncode, said) or f"a command failed on {self.name}: {why}"
            )
        return self._own(done).stdout.decode(errors="replace")


class _Link:
    """A control connection, its private directory, and the keeper that ends both.

    Args:
        ssh: The beginning of a command line of ssh.
        destination: Where it leads.
    """

    def __init__(self, ssh: Sequence[str], destination: str) -> None:
        there = tempfile.gettempdir()
        with launch.explained(), contextlib.ExitStack() as undo:
            self._folder = tempfile.mkdtemp(
                prefix="orb-", dir=there if _SHORT.fullmatch(there) else "/tmp"
            )
            undo.callback(shutil.rmtree, self._folder, ignore_errors=True)
            os.mkfifo(self.path("users"), 0o600)
            # Both reading and writing, so that opening it never waits.
            self._hold = os.open(self.path("users"), os.O_RDWR)
            undo.callback(launch.close, self._hold)
            stop = [*self.through(ssh), "-O", "exit", "--", destination]
            argv = ["/bin/sh", "-c", shell.text("keeper"), launch.NAME, self._folder, *stop]
            # Opened here, while there is a writer: a keeper that began too late would wait for one.
            with open(self.path("users"), "rb", 0) as users, open(os.devnull, "wb", 0) as null:
                files = {launch.STDIN: users.fileno()}
                files.update(dict.fromkeys((launch.STDOUT, launch.STDERR), null.fileno()))
                self._keeper = launch.Launched(argv, None, files, report=False)
            undo.pop_all()

    def path(self, name: str) -> str:
        """The path of a file of the connection."""
        return f"{self._folder}/{name}"

    @property
    def open(self) -> bool:
        """Whether the connection can be used; ssh removes its socket when it ends."""
        return os.path.exists(self.path("s"))

    def through(self, ssh: Sequence[str]) -> list[str]:
        """A command line of ssh that uses the connection."""
        return [*ssh, "-S", self.path("s")]

    def held(self, argv: Sequence[str]) -> list[str]:
        """A command line that keeps the connection open."""
        return ["/bin/sh", "-c", 'exec "$@" 9<>"$0"', self.path("users"), *argv]

    def idling(self, argv: Sequence[str]) -> list[str]:
        """The same, for a command whose input never has data and never ends."""
        return ["/bin/sh", "-c", 'exec "$@" 0<>"$0"', self.path("users"), *argv]

    def write_executable(self, text: str, ssh: Sequence[str]) -> None:
        """Write the local executable that adds its arguments to ``text`` and runs that there."""
        call = f'reach() {{ exec {shlex.join(ssh)} "$1" 0<>{shlex.quote(self.path("users"))}; }}'
        path = Path(self.path("orbctl"))
        script = f"#!/bin/sh\n{call}\ntext={shlex.quote(text)}\n{shell.text('reach')}"
        path.write_text(script, encoding="utf-8")
        path.chmod(0o700)

    def let_go(self) -> None:
        """Let the keeper end the connection once no process uses it."""
        launch.close(self._hold)


HERE = Place()


@functools.cache
def _mac(destination: str) -> Mac:
    return Mac(destination)


def place_of(destination: str | None = None) -> Place:
    """The Mac of that destination, else that of `PYINFRA_ORBSTACK_SSH`, else this host.

    Raises:
        BadValue: It is not a destination.
    """
    if destination:
        return _mac(check_destination(SSH_KEY, destination))
    usual = os.environ.get(SSH_VARIABLE)
    return _mac(check_destination(SSH_VARIABLE, usual)) if usual else HERE


def for_any_shell(text: str) -> str:
    """A command line that runs shell text in `sh`, in any login shell: sh, bash, zsh, fish, tcsh.

    >>> for_any_shell("echo a'b")
    'exec sh -c \\'eval "$(printf "echo a\\\\047b")"\\''
    """
    data = text.encode("utf-8", "surrogateescape")
    code = "".join(chr(byte) if byte in _PLAIN else f"\\{byte:03o}" for byte in data)
    return f'exec sh -c \'eval "$(printf "{code}")"\''
