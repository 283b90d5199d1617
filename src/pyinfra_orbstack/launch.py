"""Starting our own processes, and waiting for those and no others."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import shutil
import signal
import time
import tty
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack

import gevent
from gevent.monkey import get_original

from pyinfra_orbstack import shell

# gevent's patches make the first two watch all children of this process, and its close waits for
# the loop's next event since 25.8.1.
_spawn, _waitpid, close = get_original("os", ["posix_spawnp", "waitpid", "close"])

_REPORT, _LIMITED = map(shell.text, ("report", "limited"))

#: Descriptors of a process by their numbers there, all of them below `FREE`.
Files = dict[int, int]
STDIN, STDOUT, STDERR, STATUS, FREE = 0, 1, 2, 3, 5
#: The name of the intermediate shell, in its own messages.
NAME = "pyinfra-orbstack"
#: Open files that this process may have: as many as macOS allows, even if it says "unlimited".
MOST_FILES = 10240


class TooManyFiles(OSError):
    """This process, or this host, has too many open files."""

    def __str__(self) -> str:
        return str(self.strerror or self.args[0])


class Launched:
    """A process that we started; we wait for no others.

    Args:
        argv: The command line.
        env: The whole environment, or None for ours.
        files: Its descriptors; without a stdin it has an empty one.
        report: Run it through a shell that writes its exit status to `STATUS`.
    """

    def __init__(
        self, argv: Sequence[str], env: Mapping[str, str] | None, files: Files, *, report: bool
    ) -> None:
        for one in list(unreaped):
            one.poll()
        env = os.environ if env is None else env
        name, limit = argv[0], _raised(files)
        if report or limit:
            _check_program(name, env)
        if report:
            argv = ["/bin/sh", "-c", _REPORT, NAME, *argv]
        if limit:
            if not shutil.which(name, path=env.get("PATH")):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
            argv = ["/bin/sh", "-c", _LIMITED, NAME, str(limit), *argv]
        actions: list[tuple[object, ...]]
        actions = [(os.POSIX_SPAWN_DUP2, ours, theirs) for theirs, ours in files.items()]
        actions += [(os.POSIX_SPAWN_CLOSE, fd) for fd in _inheritable() if fd not in files]
        if STDIN not in files:
            actions.append((os.POSIX_SPAWN_OPEN, STDIN, os.devnull, os.O_RDONLY, 0))
        try:
            self.pid: int = _spawn(
                argv[0],
                argv,
                env,
                file_actions=actions,
                setsid=True,
                setsigmask=(),
                # Python ignores these signals, and its children would inherit that.
                setsigdef=(signal.SIGPIPE, signal.SIGXFSZ),
            )
        except NotImplementedError:
            raise OSError(
                errno.ENOSYS, "this Python was built for an old macOS: use another one"
            ) from None
        except ValueError as bad:
            # A NUL, or a character that has no bytes.
            raise OSError(
                errno.EINVAL, f"a command line cannot contain this argument ({bad})"
            ) from None
        self._gone = False
        #: Its exit status, negative for a signal; None while it runs, or if other code took it.
        self.status: int | None = None

    def poll(self) -> bool:
        """Whether it has ended."""
        if not self._gone:
            try:
                pid, status = _waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                self._gone = True
            else:
                if pid:
                    self._gone, self.status = True, os.waitstatus_to_exitcode(status)
            if self._gone:
                unreaped.discard(self)
        return self._gone

    def wait(self, timeout: float) -> bool:
        """Wait for it to end, and return whether it did."""
        deadline, pause = time.monotonic() + timeout, 0.0005
        while not self.poll():
            if time.monotonic() >= deadline:
                unreaped.add(self)
                return False
            gevent.sleep(pause)
            pause = min(2 * pause, 0.05)
        return True

    def kill(self) -> None:
        """Kill it and its group, unless it has ended."""
        if not self.poll():
            # We may not signal a client that is sudo; closing its streams ends it.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)


#: Processes that nothing waits for any more; starting the next one reaps them.
unreaped: set[Launched] = set()

_limit_before = 0


def _raised(files: Files) -> int:
    """Raise the limit of open files once a quarter is used; return the limit of our processes.

    Child processes keep the limit that this process was started with, because some programs are
    slow or fail with a high one. Returns 0 if our limit was not raised. A Mac's is 256; a host
    takes 3.
    """
    global _limit_before
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(MOST_FILES, hard)
    if not _limit_before and soft < most and max(files.values()) >= soft // 4:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            _limit_before = soft
    return _limit_before


def _check_program(name: str, env: Mapping[str, str]) -> None:
    """Reject files that the system would refuse to start, but a shell takes for a script."""
    head = b"#!"
    # An unreadable file may still be executable.
    with contextlib.suppress(PermissionError):
        if found := shutil.which(name, path=env.get("PATH")):
            with open(found, "rb") as file:
                head = file.read(2)
    # macOS's own formats begin with bytes beyond ASCII, Linux's with a control character.
    if head != b"#!" and head.isascii() and head.decode().isprintable():
        raise OSError(errno.ENOEXEC, os.strerror(errno.ENOEXEC), name)


def pipes(ours: ExitStack, theirs: ExitStack) -> tuple[Files, Files]:
    mine, other = {}, {}
    for stream in (STDIN, STDOUT, STDERR):
        mine[stream], other[stream] = pipe(ours, theirs, writing=not stream)
    return mine, other


def pipe(ours: ExitStack, theirs: ExitStack, *, writing: bool = False) -> tuple[int, int]:
    """Our end and the process's end; `writing` if ours is the one to write to."""
    reader, writer = os.pipe()
    return _owned(ours, theirs, *((writer, reader) if writing else (reader, writer)))


def terminal(ours: ExitStack, theirs: ExitStack) -> tuple[Files, Files]:
    master, slave = _owned(ours, theirs, *os.openpty())
    # The terminal that matters is the target's own; this one only passes data on to it.
    tty.setraw(slave)
    copy = os.dup(master)
    ours.callback(close, copy)
    return {STDIN: master, STDOUT: copy}, dict.fromkeys((STDIN, STDOUT, STDERR), slave)


def _owned(ours: ExitStack, theirs: ExitStack, mine: int, other: int) -> tuple[int, int]:
    """Hand two descriptors to the stacks that close them."""
    with ExitStack() as guard:
        guard.callback(close, other)
        mine = _own(ours, mine, theirs)
        guard.pop_all()
    return mine, _own(theirs, other, theirs)


def _own(stack: ExitStack, fd: int, scratch: ExitStack) -> int:
    """Hand a descriptor to the stack that closes it, under a number that `Files` does not use.

    A process without standard streams gets their numbers for the files that it opens.
    """
    if fd < FREE:
        scratch.callback(close, fd)
        fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FREE)
    stack.callback(close, fd)
    return fd


def _inheritable() -> Iterator[int]:
    """Descriptors that a new process would inherit, besides its standard streams."""
    # If the limit was lowered later, there may be descriptors beyond it; no action may name those.
    limit = os.sysconf("SC_OPEN_MAX")
    limit = limit if limit >= 0 else MOST_FILES  # unlimited
    for fd in map(int, os.listdir("/dev/fd")):
        with contextlib.suppress(OSError):
            if STDERR < fd < limit and os.get_inheritable(fd):
                yield fd


def check_spare() -> None:
    """Check that the open files leave enough for what hosts do at once.

    A host keeps 3 open, and takes up to 6 more while it works.

    Raises:
        TooManyFiles: They do not.
    """
    with explained():
        used = len(os.listdir("/dev/fd"))
        if used > resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 3:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Say what to do if there are too many open files."""
    try:
        yield
    except OSError as broken:
        if broken.errno in (errno.EMFILE, errno.ENFILE):
            raise TooManyFiles(
                broken.errno, "too many open files: raise the limit (ulimit -n) or use fewer hosts"
            ) from None
        raise
