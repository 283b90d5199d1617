"""Running a command in a machine: `run`, and whatever else has to happen inside one."""

from __future__ import annotations

import os
import stat
from errno import ENOEXEC

from .boot import start
from .linux import close_all_but, default_signals, drop_capabilities, setns
from .state import Failure, Machine, find, is_same_process, rpc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from .cli import Options

NO_MACHINE = """\
To use Docker:
    docker run ...
See "orb docker" for more info.

To create a Linux machine:
    orb create ubuntu
See "orb create --help" for supported distros and options."""

_PATHS = {True: "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
_PATHS[False] = "/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games"


class Door:
    """The namespaces of a running machine, opened so that a reused pid cannot mislead us."""

    def __init__(self, machine: Machine) -> None:
        try:
            pid, started, clock = machine.written_process()
            self.proc = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY)
            if not is_same_process(f"/proc/self/fd/{self.proc}", started, machine.id):
                raise ProcessLookupError
            kinds = ("uts", "ipc", "mnt") if clock == "shared" else ("time", "uts", "ipc", "mnt")
            self._others = [self._open(f"ns/{kind}") for kind in kinds]
            self._processes = self._open("ns/pid")
            self._root = self._open("root", os.O_RDONLY | os.O_DIRECTORY)
        except (OSError, ValueError):
            raise rpc(f"machine not running: '{machine.name}'") from None

    def _open(self, name: str, flags: int = os.O_RDONLY) -> int:
        return os.open(name, flags, dir_fd=self.proc)

    def open_pty(self) -> int:
        return self._open("root/dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY)

    def fork(self, work: Callable[[], object], all_rights: bool = False) -> int:
        """Do `work` in a new process inside the machine, as its root; the process's pid.

        All that `work` needs must be imported before: the host's Python may be out of sight there.
        """
        own = os.open("/proc/self/ns/pid", os.O_RDONLY)
        setns(self._processes)
        pid = os.fork()
        if pid:
            setns(own)
            os.close(own)
            return pid
        code = 1
        try:
            for fd in self._others:
                setns(fd)
            # The namespace's own root is the host's, where the simulator itself is in a chroot.
            os.fchdir(self._root)
            os.chroot(".")
            if not all_rights:
                drop_capabilities()
            work()
            code = 0
        except Failure as failure:
            complain(str(failure))
            code = failure.code
        except OSError as error:
            complain(str(rpc(f"{error.filename or 'run'}: {why(error).lower()}")))
        except BaseException as error:
            complain(f"{type(error).__name__}: {error}")
        finally:
            os._exit(code)


def why(error: OSError) -> str:
    return error.strerror or str(error)


def complain(text: str) -> None:
    """Write to stderr without Python's own buffers, which a fork would have twice."""
    try:  # noqa: SIM105 contextlib takes longer to load than a machine takes to answer
        os.write(2, (text + "\n").encode(errors="surrogateescape"))
    except OSError:
        pass


class Account:
    """A user as the machine's own files name it; read from inside the machine."""

    def __init__(self, name: str) -> None:
        for line in _lines("/etc/passwd"):
            fields = line.split(":")
            if len(fields) > 6 and name in (fields[0], fields[2]):
                break
        else:
            raise rpc(f"user not found: '{name}'")
        self.name, self.home, self.shell = fields[0], fields[5] or "/", fields[6] or "/bin/sh"
        self.uid, self.gid = int(fields[2]), int(fields[3])
        self.groups = [self.gid]
        for line in _lines("/etc/group"):
            fields = line.split(":")
            if len(fields) > 3 and self.name in fields[3].split(","):
                self.groups.append(int(fields[2]))

    def become(self) -> None:
        os.setgroups(self.groups)
        os.setgid(self.gid)
        os.setuid(self.uid)

    def environment(self) -> dict[str, str]:
        """What a login gives, and nothing of the caller's."""
        env = {
            "HOME": self.home,
            "LOGNAME": self.name,
            "PATH": _PATHS[self.uid == 0],
            "SHELL": self.shell,
            "USER": self.name,
        }
        for path in ("/etc/default/locale", "/etc/locale.conf", "/etc/environment"):
            for line in _lines(path):
                key, equals, value = line.strip().partition("=")
                key = key[7:].lstrip() if key.startswith("export ") else key
                if equals and not key.startswith("#"):
                    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
                    env[key] = value[1:-1] if quoted else value
        return env


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read().split("\n")
    except OSError:
        return []


def select(selector: str) -> Machine:
    """The machine that a command means, which without a name is the default one."""
    if selector:
        return find(selector)
    from .config import default_machine

    machine = default_machine()
    if machine is None:
        raise Failure(NO_MACHINE)
    return machine


def running(machine: Machine) -> Door:
    """The door to a machine, started when it is stopped."""
    start(machine)
    try:
        return Door(machine)
    except Failure:
        start(machine)  # stopped just now by another process
        return Door(machine)


def run(options: Options, words: list[str]) -> int:
    machine = select(options.text("machine"))
    door = running(machine)
    user = options.text("user") or machine.user
    workdir = options.text("workdir")
    forwarded = {
        name: os.environ[name]
        for name in os.environ.get("ORBENV", "").split(":")
        if name and name in os.environ
    }
    if options.on("path"):
        words = words[:1] + [_translate(word) for word in words[1:]]
    here = _caller_directory()
    terminals = [os.isatty(fd) for fd in (0, 1, 2)]

    def work() -> None:
        account = Account(user)
        env = account.environment()
        if terminals[0] and terminals[1] and "TERM" in os.environ:
            env["TERM"] = os.environ["TERM"]
        env.update(forwarded)
        for fd in (0, 1, 2):
            _give(fd, account.uid)
        account.become()
        _enter_directory(workdir, here, account.home)
        os.umask(0o022)
        execute(account, words, env, options.on("shell"))

    if options.call is None and not any(terminals):
        pid = door.fork(lambda: _alone(work))
        return exit_code(os.waitpid(pid, 0)[1])
    from .relay import relay

    return relay(door, machine, work, options.call, terminals)


def _alone(work: Callable[[], None]) -> None:
    """In a session of its own, so that what is typed at the caller's terminal is not for it."""
    os.setsid()
    work()


def exit_code(status: int) -> int:
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def _caller_directory() -> str:
    try:
        return os.getcwd()
    except OSError:
        return ""


def _translate(word: str) -> str:
    """``-p``: absolute paths are the caller's, but for those that say they are the machine's."""
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


def execute(account: Account, words: list[str], env: dict[str, str], shell: bool) -> NoReturn:
    """Become the command; the messages are those of the login shell that runs it in OrbStack."""
    close_all_but()
    default_signals()
    login = "-" + os.path.basename(account.shell)
    if not words:
        os.execve(account.shell, [login], env)
    if shell:
        os.execve(account.shell, [login, "-c", " ".join(words)], env)
    code, reason = 127, "command not found"
    folders = [""] if "/" in words[0] else env["PATH"].split(":")
    for folder in folders:
        path = os.path.join(folder, words[0])
        if folder and os.path.isdir(path):
            continue
        try:
            os.execve(path, words, env)
        except (FileNotFoundError, NotADirectoryError) as error:
            if "/" in words[0]:
                reason = why(error)
        except PermissionError as error:
            code, reason = 126, why(error)
        except OSError as error:
            if error.errno == ENOEXEC:  # a script that names no interpreter is a shell's
                os.execve("/bin/sh", ["/bin/sh", path, *words[1:]], env)
            code, reason = 126, why(error)
    raise Failure(f"{login}: line 1: {words[0]}: {reason}", code)
