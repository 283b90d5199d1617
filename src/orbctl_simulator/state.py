"""The state folder: which machines there are, and who may change them now.

A machine is a directory named by its id; its record is a text file of ``key=value`` lines, which
takes no parser that would slow down `run`. Everything else about it is asked of the kernel, so a
killed simulator or a rebooted host leaves nothing that has to be put right by hand.
"""

from __future__ import annotations

import os
import sys
import time
from fcntl import LOCK_EX, LOCK_NB, flock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

#: The files of machines, images and layers lie in directories of this name, which tools such as
#: pytest pass over: whoever walks into one meets links that others made.
FILES = ".files"
_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Failure(Exception):
    """Ends a call: the text goes to stderr as it stands."""

    def __init__(self, text: str, code: int = 1) -> None:
        super().__init__(text)
        self.code = code


def rpc(text: str) -> Failure:
    return Failure(f"[-32098] {text}")


def python(module: str, *words: str) -> list[str]:
    """The command line of a process that runs `main` of one of our modules.

    Python takes no settings or packages from the caller: the process is root's.
    """
    path = f"import sys; sys.path.insert(0, {_ROOT!r});"
    program = f"{path} from orbctl_simulator.{module} import main; main()"
    flags = "-ISB" if sys.dont_write_bytecode else "-IS"
    return [sys.executable, flags, "-c", program, *words]


def readable(secret: str) -> int:
    """A descriptor from which whoever inherits it can read a secret, once."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with open(writer, "wb") as file:
        file.write(secret.encode(errors="surrogateescape"))
    return reader


def why(error: OSError) -> str:
    return error.strerror or str(error)


def shown(name: object) -> str:
    """A name that somebody else gave to a file, fit for a line on a terminal."""
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


#: Root's, unless it says otherwise.
SYSTEM_CACHE = "/var/cache/orbctl-simulator"


def cache() -> str:
    """Where images, layers and programs lie, for all state directories of a user.

    Root's is the system's: its ``HOME`` is whatever it was started with.
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
    """Who called: us, or an ordinary user through our own ``sudo -n``.

    As a context it lends that user's rights: what is read and written for a caller is read and
    written by the caller. (That root came by some other sudo is no reason to take rights away.)
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
            end_with_sudo()  # which the kernel has forgotten, with the change of rights


def end_with_sudo() -> None:
    """Whoever kills what they started kills sudo, which cannot pass that on to us."""
    sudo = Caller().pid
    if not sudo or sudo == os.getpid():  # it became us
        return
    from .linux import end_with_parent

    end_with_parent()
    parent = os.getppid()
    if sudo not in (parent, _parent_of(parent)):  # with `use_pty` a process of sudo's is between
        os._exit(137)


def _parent_of(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b") ")[2].split()[1])
    except OSError:
        return 0


class Lock:
    """An advisory lock that its holder's death releases."""

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

    Who finds a machine on its way is refused, as by OrbStack; who finds it only locked, as while
    it is copied, waits. The state counts for as long as the process that wrote it lives.
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
    """The lock over names, held while the set of machines changes and never for longer."""
    os.makedirs(os.path.join(home(), "machines"), mode=0o700, exist_ok=True)
    return Lock(os.path.join(home(), "lock"))


def read_fields(path: str) -> dict[str, str]:
    with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        pairs = (line.partition("=") for line in file.read().split("\n") if line)
        return {key: value for key, _, value in pairs}


def write_file(path: str, text: str) -> None:
    """Replace a file in one step: a reader, or a power cut, finds the old one or the new one."""
    temporary = f"{path}.{os.getpid()}"
    with open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        file.write(text)
    os.replace(temporary, path)


def write_fields(path: str, fields: dict[str, str]) -> None:
    for key, value in fields.items():
        if "\n" in value:
            raise Failure(f"{key}: a line break cannot stand in it: {value!r}")
    write_file(path, "".join(f"{key}={value}\n" for key, value in fields.items()))


def new_id() -> str:
    value = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10), "big")
    return "".join(_CROCKFORD[value >> shift & 31] for shift in range(125, -1, -5))


class Machine:
    """One machine as its directory tells it, read afresh by every call."""

    def __init__(self, path: str, fields: dict[str, str]) -> None:
        self.path, self.fields = path, fields
        self.lock_fd = -1  # of its lock, while this process holds it

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
        """The directory that it is a layer over."""
        return self.lower[-1]

    @property
    def lower(self) -> list[str]:
        """All that it is a layer over, the uppermost first."""
        if not self.fields.get("image"):
            return ["/"]
        from .bases import base_of

        base = base_of(self.fields)
        return [*base.layers, base.path]

    @property
    def upper(self) -> str:
        """Where what it has written lies."""
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
        """What its processes show of it, whatever a command is about to do with it."""
        if self.boots:
            from .runstate import state

            return state(self)
        return "stopped" if self.process() is None else "running"

    def transition(self) -> str:
        """The state that it is going through, or nothing."""
        return "creating" if not self.finished else self.shown_transition()

    def show_transition(self, state: str) -> None:
        """Let others see it for as long as this process lives."""
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
        """Held while the machine is made, started, stopped, copied or removed."""
        return Lock(self.file("lock"), wait=wait)

    def save(self) -> None:
        write_fields(self.file("machine"), self.fields)

    def reread(self) -> Machine:
        """The machine as it is now; it may have gone, or have got another name."""
        try:
            self.fields.update(read_fields(self.file("machine")))
        except FileNotFoundError:
            raise self.missing() from None
        return self

    def reload(self) -> Machine:
        """The machine as it is now that its lock is ours."""
        if not self.reread().finished:
            raise self.missing()  # whoever made it has died
        return self

    def missing(self) -> Failure:
        return rpc(f"machine not found: '{self.name}'")

    def process(self) -> int | None:
        """Its pid 1, if that still is its own: pids are used again, and hosts reboot."""
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
        """Pid 1 as it was written down: pid, start time, whether its clock is the host's."""
        with open(self.file("pid")) as file:
            pid, started, clock = file.read().split()
        return int(pid), started, clock


def start_time(proc: str) -> str:
    """Field 22 of ``stat``, or nothing when the process has ended and is only not yet reaped."""
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
    """All or none: a call that names several machines acts on none when one is unknown."""
    return [find(selector) for selector in selectors]
