"""The state directory: which machines exist, and which process may change them now.

A machine is a directory named by its id. Its record is a text file of ``key=value`` lines, which
needs no parser that would slow down `run`. Everything else about it comes from the kernel, so a
killed simulator or a rebooted host leaves nothing to repair.
"""

from __future__ import annotations

import os
import sys
import time
from fcntl import LOCK_EX, LOCK_NB, flock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

#: The files of machines, images and layers are in directories of this name, which tools such as
#: pytest skip: they contain links that others created.
FILES = ".files"
_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Failure(Exception):
    """Ends a call: the text goes to stderr unchanged."""

    def __init__(self, text: str, code: int = 1) -> None:
        super().__init__(text)
        self.code = code


def rpc(text: str) -> Failure:
    return Failure(f"[-32098] {text}")


def python(module: str, *words: str) -> list[str]:
    """The command line of a process that runs `main` of one of our modules.

    Python uses no settings or packages of the caller, because the process runs as root.
    """
    path = f"import sys; sys.path.insert(0, {_ROOT!r});"
    program = f"{path} from orbctl_simulator.{module} import main; main()"
    flags = "-ISB" if sys.dont_write_bytecode else "-IS"
    return [sys.executable, flags, "-c", program, *words]


def readable(secret: str) -> int:
    """A descriptor from which a process that inherits it can read a secret, once."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with open(writer, "wb") as file:
        file.write(secret.encode(errors="surrogateescape"))
    return reader


def why(error: OSError) -> str:
    return error.strerror or str(error)


def shown(name: object) -> str:
    """A file name of unknown origin, made safe for a line on a terminal."""
    return "".join(c if c.isprintable() or "\udc80" <= c <= "\udcff" else "?" for c in str(name))


def profile() -> str:
    wanted = os.environ.get("ORBCTL_SIMULATOR_PROFILE") or "2.2"
    if wanted not in ("2.0", "2.1", "2.2"):
        raise Failure(f"ORBCTL_SIMULATOR_PROFILE: 2.0, 2.1 or 2.2, not {wanted!r}")
    return wanted


def home() -> str:
    explicit = os.environ.get("ORBCTL_SIMULATOR_HOME")
    if explicit:
        return os.path.realpath(explicit)
    base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return os.path.realpath(os.path.join(base, "orbctl-simulator"))


#: Root's cache, unless a variable sets another one.
SYSTEM_CACHE = "/var/cache/orbctl-simulator"


def cache() -> str:
    """The directory of images, layers and executables, for all state directories of a user.

    Root uses the system's cache, because its ``HOME`` may be any user's.
    """
    explicit = os.environ.get("ORBCTL_SIMULATOR_CACHE")
    if explicit:
        return os.path.realpath(explicit)
    base = os.environ.get("XDG_CACHE_HOME")
    if not base and os.geteuid() == 0:
        return os.path.realpath(SYSTEM_CACHE)
    base = base or os.path.expanduser("~/.cache")
    return os.path.realpath(os.path.join(base, "orbctl-simulator"))


def say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


class Caller:
    """The caller: this process's user, or a non-root user through our own ``sudo -n``.

    In this context, files are read and written with the caller's rights. (If root came through
    another sudo, it keeps its rights.)
    """

    def __init__(self) -> None:
        told = os.environ.get("ORBCTL_SIMULATOR_CALLER", "")
        pid, _, names = told.partition(" ")
        self.pid = int(pid or 0)
        self.names = names.split(":") if names else list(os.environ)
        self._ids = (int(os.environ["SUDO_UID"]), int(os.environ["SUDO_GID"])) if told else None
        self._groups: list[int] = []

    def __enter__(self) -> None:
        if self._ids:
            self._groups = os.getgroups()
            os.setgroups([self._ids[1]])
            os.setegid(self._ids[1])
            os.seteuid(self._ids[0])

    def __exit__(self, *_: object) -> None:
        if self._ids:
            os.seteuid(0)
            os.setegid(0)
            os.setgroups(self._groups)
            end_with_sudo()  # the kernel resets it when rights change


def end_with_sudo() -> None:
    """End with our own sudo: a caller kills sudo, which cannot pass SIGKILL on."""
    sudo = Caller().pid
    if not sudo or sudo == os.getpid():  # sudo became this process
        return
    from .linux import end_with_parent

    end_with_parent()
    parent = os.getppid()
    if sudo not in (parent, _parent_of(parent)):  # `use_pty` adds a process of sudo
        os._exit(137)


def _parent_of(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b") ")[2].split()[1])
    except OSError:
        return 0


class Lock:
    """An advisory lock that is released when its holder dies."""

    def __init__(self, path: str, wait: bool = True) -> None:
        self._path, self._how = path, LOCK_EX | (0 if wait else LOCK_NB)
        self.fd = -1
        self.held = False

    def __enter__(self) -> Lock:
        self.fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            flock(self.fd, self._how)
            self.held = True
        except BlockingIOError:
            pass
        except BaseException:
            os.close(self.fd)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)
        self.held = False


class Transition:
    """A machine's lock, and, while it is held, the state that other processes see.

    A process that finds the machine in a transition fails, as with OrbStack. One that finds it only
    locked, for example while it is copied, waits. The state ends with the process that wrote it.
    """

    def __init__(
        self, machine: Machine, state: str, verb: str = "", shown: bool = True, hold: float = 0
    ) -> None:
        self._machine, self._state, self._verb = machine, state, verb
        self._shown, self._hold = shown, hold
        self._lock = machine.lock(wait=not verb)

    def __enter__(self) -> Machine:
        machine = self._machine
        try:
            self._lock.__enter__()
            while not self._lock.held:
                self._lock.__exit__()
                self._refuse()
                time.sleep(0.005)
                self._lock.__enter__()
        except FileNotFoundError:
            raise machine.missing() from None
        machine.lock_fd = self._lock.fd
        try:
            machine.reload()
            if self._shown:
                machine.show_transition(self._state)
                time.sleep(self._hold)
        except BaseException:
            self.__exit__()
            raise
        return machine

    def _refuse(self) -> None:
        now = self._machine.reread().transition()
        if now:
            name = self._machine.name
            raise rpc(f"{self._verb} '{name}': invalid transition from {now} to {self._state}")

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._machine.hide_transition()
        self._lock.__exit__()


def everything() -> Lock:
    """The lock on names, held only while the set of machines changes."""
    os.makedirs(os.path.join(home(), "machines"), mode=0o700, exist_ok=True)
    return Lock(os.path.join(home(), "lock"))


def read_fields(path: str) -> dict[str, str]:
    with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        pairs = (line.partition("=") for line in file.read().split("\n") if line)
        return {key: value for key, _, value in pairs}


def write_file(path: str, text: str) -> None:
    """Replace a file atomically: a reader, also after a power cut, finds the old or the new one."""
    temporary = f"{path}.{os.getpid()}"
    with open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        file.write(text)
    os.replace(temporary, path)


def write_fields(path: str, fields: dict[str, str]) -> None:
    for key, value in fields.items():
        if "\n" in value:
            raise Failure(f"{key}: must not contain a line break: {value!r}")
    write_file(path, "".join(f"{key}={value}\n" for key, value in fields.items()))


def new_id() -> str:
    value = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10), "big")
    return "".join(_CROCKFORD[value >> shift & 31] for shift in range(125, -1, -5))


class Machine:
    """One machine according to its directory, which every call reads again."""

    def __init__(self, path: str, fields: dict[str, str]) -> None:
        self.path, self.fields = path, fields
        self.lock_fd = -1  # the lock's descriptor, while this process holds it

    @property
    def id(self) -> str:
        return os.path.basename(self.path)

    @property
    def name(self) -> str:
        return self.fields["name"]

    @property
    def user(self) -> str:
        return self.fields["user"]

    @property
    def base(self) -> str:
        """The directory below its layer."""
        return self.lower[-1]

    @property
    def lower(self) -> list[str]:
        """All directories below its layer, the uppermost first."""
        if not self.fields.get("image"):
            return ["/"]
        from .bases import base_of

        base = base_of(self.fields)
        return [*base.layers, base.path]

    @property
    def upper(self) -> str:
        """The directory of its changes."""
        return self.file(f"{FILES}/upper")

    @property
    def boots(self) -> bool:
        """Whether its first process is its image's own init."""
        return self.fields.get("init") == "image"

    @property
    def finished(self) -> bool:
        return self.fields.get("made") == "yes"

    @property
    def state(self) -> str:
        return self.transition() or self.life()

    def life(self) -> str:
        """Its state according to its processes, without a command's transition."""
        if self.boots:
            from .runstate import state

            return state(self)
        return "stopped" if self.process() is None else "running"

    def transition(self) -> str:
        """The transition that it is in, or nothing."""
        return "creating" if not self.finished else self.shown_transition()

    def show_transition(self, state: str) -> None:
        """Show it to other processes, until this process ends."""
        text = f"{state} {os.getpid()} {start_time('/proc/self')}\n"
        write_file(self.file("doing"), text)

    def hide_transition(self) -> None:
        try:  # noqa: SIM105 contextlib is slow to load
            os.unlink(self.file("doing"))
        except FileNotFoundError:
            pass  # the machine is deleted

    def shown_transition(self) -> str:
        try:
            with open(self.file("doing")) as file:
                state, pid, started = file.read().split()
            return state if start_time(f"/proc/{pid}") == started else ""
        except (OSError, ValueError):
            return ""

    def on(self, field: str) -> bool:
        return self.fields.get(field) == "true"

    def many(self, field: str) -> list[str]:
        return [entry for entry in self.fields.get(field, "").split("\t") if entry]

    def file(self, name: str) -> str:
        return os.path.join(self.path, name)

    def lock(self, wait: bool = True) -> Lock:
        """Held while the machine is created, started, stopped, copied or deleted."""
        return Lock(self.file("lock"), wait=wait)

    def save(self) -> None:
        write_fields(self.file("machine"), self.fields)

    def reread(self) -> Machine:
        """The machine's current record; it may have been deleted or renamed."""
        try:
            self.fields.update(read_fields(self.file("machine")))
        except FileNotFoundError:
            raise self.missing() from None
        return self

    def reload(self) -> Machine:
        """The machine's current record, once this process holds its lock."""
        if not self.reread().finished:
            raise self.missing()  # the process that was creating it has died
        return self

    def missing(self) -> Failure:
        return rpc(f"machine not found: '{self.name}'")

    def process(self) -> int | None:
        """Its pid 1, if that is still the same process: pids are reused, and hosts reboot."""
        if self.boots:
            from .runstate import init_of

            return init_of(self)
        try:
            pid, started, _ = self.written_process()
            if is_same_process(f"/proc/{pid}", started, self.id):
                return pid
        except (OSError, ValueError):
            pass
        return None

    def written_process(self) -> tuple[int, str, str]:
        """Pid 1 as recorded: pid, start time, whether its clock is the host's."""
        with open(self.file("pid")) as file:
            pid, started, clock = file.read().split()
        return int(pid), started, clock


def start_time(proc: str) -> str:
    """Field 22 of ``stat``, or nothing if the process has ended but is not reaped yet."""
    with open(f"{proc}/stat", "rb") as file:
        fields = file.read().rpartition(b") ")[2].split()
    return "" if fields[0] in b"ZX" else fields[19].decode()


def is_same_process(proc: str, started: str, ident: str) -> bool:
    if start_time(proc) != started:
        return False
    with open(f"{proc}/cmdline", "rb") as file:
        return ident.encode() in file.read()


def machines() -> Iterator[Machine]:
    """All machines, oldest first (an id begins with its time)."""
    folder = os.path.join(home(), "machines")
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return
    for name in names:
        path = os.path.join(folder, name)
        try:
            yield Machine(path, read_fields(os.path.join(path, "machine")))
        except (FileNotFoundError, NotADirectoryError):
            continue


def find(selector: str) -> Machine:
    by_id = None
    for machine in machines():
        if machine.name == selector:
            return machine
        if machine.id == selector:
            by_id = machine
    if by_id is None:
        raise rpc(f"machine not found: '{selector}'")
    return by_id


def find_all(selectors: Iterable[str]) -> list[Machine]:
    """Find all or fail: a call that names several machines changes none if one is unknown."""
    return [find(selector) for selector in selectors]
