"""The way into a running machine, for whatever has to happen inside one.

A process that goes in becomes blind and deaf to the host first: it holds no file of the host's,
has none of its caller's keys, cannot be looked into, and gives up the rights that could harm the
host. It stays out of the machine's process namespace, so that nobody in there can even see it;
only the command that it starts is in that. For a moment that command shares its memory and is not
itself yet; all of the above holds for that moment, too.
"""

from __future__ import annotations

import os
import stat
from errno import ENOEXEC

from .account import Account
from .linux import (
    NoArguments,
    close_all_but,
    copy_of_mount,
    drop_capabilities,
    hide_from_others,
    import_nothing_more,
    leave_keys,
    refuse_calls,
    setns,
)
from .state import Failure, Machine, is_same_process, rpc, shown, why

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
# All signals but the two that are the C library's own.
_SIGNALS = [*range(1, 32), *range(34, 65)]


class Door:
    """The namespaces of a running machine, opened so that a reused pid cannot mislead us."""

    def __init__(self, machine: Machine) -> None:
        try:
            pid, started, clock = machine.written_process()
            self.proc = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY)
            if not is_same_process(f"/proc/self/fd/{self.proc}", started, machine.id):
                raise ProcessLookupError
            kinds = ["uts", "ipc", "mnt", "pid"] + ["time"] * (clock == "own")
            self._spaces = [self._open(f"ns/{kind}") for kind in kinds]
            self._root = self._open("root", os.O_RDONLY | os.O_DIRECTORY)
            if os.path.samestat(os.fstat(self._spaces[2]), os.stat("/proc/self/ns/mnt")):
                raise ProcessLookupError  # whatever it is, it would be the host that is entered
        except (OSError, ValueError):
            raise rpc(f"machine not running: '{machine.name}'") from None

    @staticmethod
    def of(machine: Machine) -> Door:
        if machine.boots:
            from .bootdoor import BootedDoor

            return BootedDoor(machine)
        return Door(machine)

    def own(self, fd: int) -> None:
        """Give something that the host has made to the machine's root."""

    def _open(self, name: str, flags: int = os.O_RDONLY) -> int:
        return os.open(name, flags, dir_fd=self.proc)

    def open_device(self, path: str, number: tuple[int, int]) -> int:
        """A device of the machine's own ``/dev``, or -1 if something else has taken its place."""
        *folders, name = path.split("/")
        place, flags = self._root, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
        try:
            for folder in folders:
                place = os.open(folder, _DIRECTORY, dir_fd=place)
            device = os.open(name, flags, dir_fd=place)
        except OSError:
            return -1
        status = os.fstat(device)
        if not stat.S_ISCHR(status.st_mode) or status.st_rdev != os.makedev(*number):
            os.close(device)
            return -1
        os.set_blocking(device, True)
        return device

    def mount_points(self) -> list[str]:
        """Where something is mounted in it, but for its root."""
        fd = self._open("mountinfo")
        with open(fd, encoding="utf-8", errors="surrogateescape") as file:
            points = [line.split()[4] for line in file]
        for mark, code in ((" ", "\\040"), ("\t", "\\011"), ("\n", "\\012"), ("\\", "\\134")):
            points = [point.replace(code, mark) for point in points]
        return [point for point in points if point != "/"]

    def enter(self, *kept: int, bare: bool = False, all_rights: bool = False) -> None:
        """Go in; there is no way back. Of the open files only 0, 1, 2 and `kept` are left.

        What is to be used inside must be imported before: the host's Python is out of sight there.
        With `bare` nothing is there but the machine's own files: not ``/proc``, not what is
        mounted, so nothing of the host's can be written, or be waited for.
        """
        close_all_but(self._root, *self._spaces, *kept)
        self._no_arguments = NoArguments()
        hide_from_others()
        leave_keys()
        import_nothing_more()
        for fd in self._spaces:
            setns(fd)
            os.close(fd)
        # The namespace's own root is the host's, where the simulator itself is in a chroot.
        os.fchdir(self._root)
        os.close(self._root)
        if bare:
            alone = copy_of_mount(".")
            os.fchdir(alone)
            os.close(alone)
        os.chroot(".")
        refuse_calls()
        if not all_rights:
            drop_capabilities()

    def fork(
        self,
        work: Callable[[], int | None],
        *kept: int,
        streams: dict[int, int] | None = None,
        bare: bool = False,
        all_rights: bool = False,
    ) -> int:
        """Do `work` inside, as the machine's root, in a process of its own; its pid.

        `streams` are what it has as its own standard streams, by their numbers.
        """

        def inside() -> int | None:
            os.setsid()  # what is typed at the caller's terminal is not for it
            for fd, ours in (streams or {}).items():
                os.dup2(ours, fd)
            self.enter(*kept, bare=bare, all_rights=all_rights)
            return work()

        pid = os.fork()
        if pid == 0:
            os._exit(told(inside))
        return pid

    def be_seen(self, work: Callable[[], int], *files: int) -> int:
        """Do it in one of the machine's own processes, which has nothing but these files."""
        self._no_arguments.__enter__()
        for fd in (0, 1, 2):
            os.close(fd)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = work()
            finally:
                os._exit(code)
        for fd in files:
            os.close(fd)
        return exit_code(os.waitpid(pid, 0)[1])

    def carry_out(
        self,
        account: Account,
        words: list[str],
        env: dict[str, str],
        shell: bool = False,
        terminal: str = "",
    ) -> int:
        """Run a command as `account`, whom this process, which is inside, has become.

        Its exit code. The messages are those of the login shell that runs it in OrbStack.
        """
        pid = self._start(account, words, env, shell, terminal)
        for fd in (0, 1, 2):
            os.close(fd)  # whoever waits for an end of output waits for the command alone
        return exit_code(os.waitpid(pid, 0)[1])

    def _start(
        self, account: Account, words: list[str], env: dict[str, str], shell: bool, terminal: str
    ) -> int:
        login = "-" + os.path.basename(account.shell)
        if not words:
            return self._spawn(account.shell, [login], env, terminal)
        if shell:
            return self._spawn(account.shell, [login, "-c", " ".join(words)], env, terminal)
        code, reason = 127, "command not found"
        for folder in [""] if "/" in words[0] else env["PATH"].split(":"):
            path = os.path.join(folder, words[0])
            try:
                if stat.S_ISDIR(os.stat(path).st_mode) and folder:
                    continue
                return self._spawn(path, words, env, terminal)
            except (FileNotFoundError, NotADirectoryError) as error:
                if "/" in words[0]:
                    reason = why(error)
            except PermissionError as error:
                code, reason = 126, why(error)
            except OSError as error:
                if error.errno == ENOEXEC:  # a script that names no interpreter is a shell's
                    return self._spawn("/bin/sh", ["/bin/sh", path, *words[1:]], env, terminal)
                code, reason = 126, why(error)
        raise Failure(f"{login}: line 1: {words[0]}: {reason}", code)

    def _spawn(self, path: str, words: list[str], env: dict[str, str], terminal: str) -> int:
        """Start a program in a session of its own: no signal or terminal of the caller reaches it.

        It must not inherit that Python ignores SIGPIPE, or what `nohup` ignored.
        """
        actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = []
        if terminal:  # opened by a session that has none it becomes that session's own
            actions = [(os.POSIX_SPAWN_OPEN, 0, terminal, os.O_RDWR, 0)]
            actions += [(os.POSIX_SPAWN_DUP2, 0, 1), (os.POSIX_SPAWN_DUP2, 0, 2)]
        how: dict[str, Any] = {"setsid": True, "setsigmask": [], "setsigdef": _SIGNALS}
        with self._no_arguments:
            return os.posix_spawn(path, words, env, file_actions=actions, **how)


def told(work: Callable[[], int | None]) -> int:
    """Do it where nothing may be left to Python's own ways of ending; the exit code."""
    try:
        return work() or 0
    except Failure as failure:
        complain(str(failure))
        return failure.code
    except BrokenPipeError:
        pass  # the other side has said why
    except OSError as error:
        complain(str(rpc(f"{shown(error.filename or 'run')}: {why(error).lower()}")))
    except KeyboardInterrupt:
        return 130
    except BaseException as error:
        complain(f"{type(error).__name__}: {error}")
    return 1


def complain(text: str) -> None:
    """Write to stderr without Python's own buffers, which a fork would have twice."""
    try:  # noqa: SIM105 contextlib takes longer to load than a machine takes to answer
        os.write(2, (text + "\n").encode(errors="surrogateescape"))
    except OSError:
        pass


def exit_code(status: int) -> int:
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
