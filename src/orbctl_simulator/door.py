"""How processes enter a running machine, for everything that has to happen inside one.

Before a process enters, it cuts its ties to the host: it closes the host's files, leaves its
caller's keyring, cannot be inspected, and drops the rights that could harm the host. It stays out
of the machine's process namespace, so processes in there cannot even see it. Only the command that
it starts is visible. Until that command executes its own program, it shares this process's memory;
all of the above applies during that moment, too.
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
# All signals except the two that the C library uses itself.
_SIGNALS = [*range(1, 32), *range(34, 65)]


class Door:
    """The namespaces of a running machine, opened so that a reused pid does no harm."""

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
                raise ProcessLookupError  # whatever it is, entering it would enter the host
        except (OSError, ValueError):
            raise rpc(f"machine not running: '{machine.name}'") from None

    @staticmethod
    def of(machine: Machine) -> Door:
        if machine.boots:
            from .bootdoor import BootedDoor

            return BootedDoor(machine)
        return Door(machine)

    def own(self, fd: int) -> None:
        """Make the machine's root the owner of something that the host created."""

    def _open(self, name: str, flags: int = os.O_RDONLY) -> int:
        return os.open(name, flags, dir_fd=self.proc)

    def open_device(self, path: str, number: tuple[int, int]) -> int:
        """A device in the machine's own ``/dev``, or -1 if something else is in its place."""
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
        """Its mount points, except its root."""
        fd = self._open("mountinfo")
        with open(fd, encoding="utf-8", errors="surrogateescape") as file:
            points = [line.split()[4] for line in file]
        for mark, code in ((" ", "\\040"), ("\t", "\\011"), ("\n", "\\012"), ("\\", "\\134")):
            points = [point.replace(code, mark) for point in points]
        return [point for point in points if point != "/"]

    def enter(self, *kept: int, bare: bool = False, all_rights: bool = False) -> None:
        """Enter, with no way back. Keeps only the open files 0, 1, 2 and `kept`.

        Import what is used inside before: the host's Python cannot be reached from there. With
        `bare`, only the machine's own files are visible, without ``/proc`` and without mounts, so
        nothing of the host can be written, or block.
        """
        close_all_but(self._root, *self._spaces, *kept)
        self._no_arguments = NoArguments()
        hide_from_others()
        leave_keys()
        import_nothing_more()
        for fd in self._spaces:
            setns(fd)
            os.close(fd)
        # If the simulator itself is in a chroot, the namespace's own root is the host's.
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
        """Run `work` inside, as the machine's root, in a new process. Returns its pid.

        `streams` maps the numbers of its standard streams to descriptors.
        """

        def inside() -> int | None:
            os.setsid()  # keys typed at the caller's terminal must not reach it
            for fd, ours in (streams or {}).items():
                os.dup2(ours, fd)
            self.enter(*kept, bare=bare, all_rights=all_rights)
            return work()

        pid = os.fork()
        if pid == 0:
            os._exit(told(inside))
        return pid

    def be_seen(self, work: Callable[[], int], *files: int) -> int:
        """Run it in one of the machine's own processes, which has only these files open."""
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
        """Run a command as `account`, which this process, inside the machine, has become.

        Returns its exit code. The messages are those of the login shell that runs it in OrbStack.
        """
        pid = self._start(account, words, env, shell, terminal)
        for fd in (0, 1, 2):
            os.close(fd)  # end of output depends on the command alone
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
                if error.errno == ENOEXEC:  # a script without an interpreter line
                    return self._spawn("/bin/sh", ["/bin/sh", path, *words[1:]], env, terminal)
                code, reason = 126, why(error)
        raise Failure(f"{login}: line 1: {words[0]}: {reason}", code)

    def _spawn(self, path: str, words: list[str], env: dict[str, str], terminal: str) -> int:
        """Start a program in its own session: no signal or terminal of the caller reaches it.

        It must not inherit signals that Python (SIGPIPE) or `nohup` ignored.
        """
        actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = []
        if terminal:  # a session without a terminal gets the first one that it opens
            actions = [(os.POSIX_SPAWN_OPEN, 0, terminal, os.O_RDWR, 0)]
            actions += [(os.POSIX_SPAWN_DUP2, 0, 1), (os.POSIX_SPAWN_DUP2, 0, 2)]
        how: dict[str, Any] = {"setsid": True, "setsigmask": [], "setsigdef": _SIGNALS}
        with self._no_arguments:
            return os.posix_spawn(path, words, env, file_actions=actions, **how)


def told(work: Callable[[], int | None]) -> int:
    """Run it where Python's own exit must not run. Returns the exit code."""
    try:
        return work() or 0
    except Failure as failure:
        complain(str(failure))
        return failure.code
    except BrokenPipeError:
        pass  # the other side has reported why
    except OSError as error:
        complain(str(rpc(f"{shown(error.filename or 'run')}: {why(error).lower()}")))
    except KeyboardInterrupt:
        return 130
    except BaseException as error:
        complain(f"{type(error).__name__}: {error}")
    return 1


def complain(text: str) -> None:
    """Write to stderr without Python's buffers, which a fork would duplicate."""
    try:  # noqa: SIM105 contextlib takes longer to load than a machine takes to answer
        os.write(2, (text + "\n").encode(errors="surrogateescape"))
    except OSError:
        pass


def exit_code(status: int) -> int:
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
