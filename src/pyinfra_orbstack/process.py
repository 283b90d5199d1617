"""The one runner of local processes: bytes in, bytes out, no stream can block another.

pyinfra runs its hosts in gevent greenlets, with or without gevent's monkey patches, so every
wait here is gevent's own. pyinfra's runner is not used: it decodes strictly, writes all of stdin
before it reads, and leaves the process running when a timeout fires.

gevent's own `Popen` is not used either. Once gevent watches one process, it reaps every child of
this one, and whoever started the others never learns how they ended. Here only our own children
are waited for. pyinfra's `@local` may still make gevent reap those, so an exit status that matters
comes through a pipe, from a shell in between, where nobody else can take it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import time
import tty
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import gevent
from gevent.monkey import get_original
from gevent.os import nb_read, nb_write
from gevent.queue import Empty, Queue

from pyinfra_orbstack import shell

# gevent's patches make the first two watch all children of this process, and its close waits for
# the loop's next event since 25.8.1.
_spawn, _waitpid, _close = get_original("os", ["posix_spawnp", "waitpid", "close"])
_poll = get_original("select", "poll")

CHUNK = 65536
STDOUT, STDERR, STATUS = 1, 2, 3
#: Seconds of silence after which the streams of a process that is gone have ended.
GRACE = 1.0

#: Descriptors of a process by their numbers there, all of them below `FREE`.
Files = dict[int, int]
FREE = 5
#: What the shell in between is called, in its own messages.
NAME = "pyinfra-orbstack"


class TooManyFiles(OSError):
    """This process, or this computer, has too many open files."""

    def __str__(self) -> str:
        return str(self.strerror)


class Completed(NamedTuple):
    """What a process left behind; its exit status is as a shell has it, 128+n for a signal."""

    returncode: int
    stdout: bytes
    stderr: bytes


class Child:
    """A local process whose output arrives in chunks, in the order in which it was read.

    It runs in a session of its own, so that Ctrl-C in a terminal reaches it only through us.

    Args:
        argv: The command line; every word is passed on as it is.
        env: The whole environment, or None for ours.
        tty: Give it a pseudo terminal instead of three pipes; all output is then `STDOUT`.
        report: Run it through a shell that writes its exit status to a stream `STATUS`.

    Raises:
        OSError: The command cannot be started.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        tty: bool = False,
        report: bool = False,
    ) -> None:
        with _explained(), ExitStack() as theirs, ExitStack() as ours:
            self._fds, files = (_terminal if tty else _pipes)(ours, theirs)
            if report:
                self._fds[STATUS], files[STATUS] = _pipe(ours, theirs)
            self._process = _Process(argv, env, files, report=report)
            ours.pop_all()
        for fd in self._fds.values():
            os.set_blocking(fd, False)
        # Bounded: a process that prints faster than it is read waits, and memory stays flat.
        self._chunks: Queue[tuple[int, bytes]] = Queue(maxsize=16)
        self._failure: Exception | None = None
        self._writing = False
        self._readers = {
            stream: gevent.spawn(self._read_all, stream) for stream in self._fds if stream
        }
        self._open = set(self._readers)

    def _read_all(self, stream: int) -> None:
        data = b"-"
        while data:
            try:
                data = nb_read(self._fds[stream], CHUNK)
            except OSError:
                # A pseudo terminal answers EIO when its other end is gone.
                data = b""
            self._chunks.put((stream, data))

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def read(self, timeout: float | None = None) -> tuple[int, bytes]:
        """Return the next chunk as (stream, bytes); empty bytes mean that the stream has ended.

        The streams of a process that is gone end, though another process holds them open.

        Raises:
            TimeoutError: Nothing came within ``timeout`` seconds.
            OSError: What should be written to stdin cannot be read.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        gone = False
        while True:
            if self._chunks.empty() and (lost := self._lost()):
                stream, data = lost, b""
                break
            left = GRACE if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                stream, data = self._chunks.get(timeout=min(GRACE, left))
                break
            except Empty:
                if deadline is not None and left < GRACE:
                    raise TimeoutError from None
            if gone:
                gevent.killall(list(self._readers.values()))
            gone = self.gone
        if self._failure is not None:
            raise OSError(f"reading the input failed: {self._failure}") from self._failure
        if not data:
            self._open.discard(stream)
        return stream, data

    def _lost(self) -> int:
        """A stream whose reader ended without a word, or 0."""
        return next((one for one in self._open if self._readers[one].ready()), 0)

    def write(self, data: bytes) -> None:
        """Write all of ``data`` to stdin.

        Raises:
            BrokenPipeError: The process reads no more.
        """
        view = memoryview(data)
        while view:
            if 0 not in self._fds:
                raise BrokenPipeError("stdin is closed")
            self._writing = True
            try:
                view = view[nb_write(self._fds[0], view[:CHUNK]) :]
            finally:
                self._writing = False

    def try_write(self, data: bytes) -> bool:
        """Write, and return whether the process still reads."""
        try:
            self.write(data)
        except OSError:
            return False
        return True

    def fail(self, reason: Exception) -> None:
        """Make `read` raise, because its process cannot be given its input."""
        self._failure = reason
        self._chunks.put((0, b""))

    def close_stdin(self) -> None:
        """Let the process read the end of its input."""
        fd = self._fds.pop(0, None)
        if fd is not None:
            # What gevent still waits for must not be closed behind its back.
            (os.close if self._writing else _close)(fd)

    @property
    def gone(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll()

    def wait(self, timeout: float) -> int | None:
        """Return the exit status, negative for a signal, or None if it still runs.

        Raises:
            OSError: It has ended, and somebody else in this process has taken its exit status.
        """
        if not self._process.wait(timeout):
            return None
        if self._process.status is None:
            raise OSError(errno.ECHILD, "how it ended is unknown")
        return self._process.status

    def settle(self) -> None:
        """Let a process that is ending come to its end."""
        self._process.wait(GRACE)

    def end(self) -> None:
        """End the process and its group, and close everything that belongs to it."""
        self.close_stdin()
        self._process.kill()
        gevent.killall(list(self._readers.values()))
        while self._fds:
            _close(self._fds.popitem()[1])
        self._process.wait(2)


def run(
    argv: Sequence[str],
    *,
    stdin: bytes | Iterable[bytes] = b"",
    timeout: float | None = None,
    env: Mapping[str, str] | None = None,
) -> Completed:
    """Run a command to its end and return what it printed.

    Args:
        argv: The command line.
        stdin: What the command reads, whole or in pieces.
        timeout: Seconds after which the command is ended.
        env: The whole environment, or None for ours.

    Raises:
        OSError: The command cannot be started, or its exit status is unknown.
        TimeoutError: It did not end in time; it and its group are gone.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    child = Child(argv, env=env, report=True)
    collected = {stream: bytearray() for stream in (STDOUT, STDERR, STATUS)}
    feeder = gevent.spawn(feed, child, [stdin] if isinstance(stdin, bytes) else stdin)
    try:
        open_streams = set(collected)
        while open_streams:
            stream, data = child.read(None if deadline is None else deadline - time.monotonic())
            collected[stream] += data
            if not data:
                open_streams.discard(stream)
        # The shell in between is as good as gone, and what it leaves running is not ours to end.
        child.settle()
        return _completed(*(bytes(collected[one]) for one in (STATUS, STDOUT, STDERR)))
    finally:
        feeder.kill()
        child.end()


def feed(child: Child, pieces: Iterable[bytes], *, close: bool = True) -> None:
    """Write all pieces to a process and close its stdin; a process may stop reading early.

    What goes wrong in making the pieces reaches whoever reads from the process: half an input
    must not look like a whole one.
    """
    try:
        for piece in pieces:
            if not child.try_write(piece):
                break
    except Exception as broken:
        child.fail(broken)
        return
    if close:
        child.close_stdin()


class Detached:
    """A command that runs to its own end, whatever happens to this process.

    It starts without the help of any greenlet, so a signal handler may start one.

    Args:
        argv: The command line.
        env: The whole environment, or None for ours.

    Raises:
        OSError: It cannot be started.
    """

    def __init__(self, argv: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        with _explained(), ExitStack() as theirs, ExitStack() as ours:
            self._stderr, stderr = _pipe(ours, theirs)
            self._status, status = _pipe(ours, theirs)
            null = _own(theirs, os.open(os.devnull, os.O_RDWR), theirs)
            # The shell in between gets our end of stderr, too: who writes there is never killed
            # because we are gone.
            files = {0: null, STDOUT: null, STDERR: stderr, STATUS: status, 4: self._stderr}
            self._process = _Process(argv, env, files, report=True)
            ours.pop_all()
        for fd in (self._stderr, self._status):
            os.set_blocking(fd, False)
        _detached.append(self)

    def result(self, timeout: float) -> Completed:
        """Wait for the command to end, and return what it left behind; this can be done once.

        Raises:
            OSError: Its exit status is unknown.
            TimeoutError: It did not end in time; it and its group are gone.
        """
        status, said = b"", b""
        try:
            with gevent.Timeout(timeout, TimeoutError):
                while data := nb_read(self._status, CHUNK):
                    status += data
            with contextlib.suppress(BlockingIOError):
                said = os.read(self._stderr, CHUNK)
        except TimeoutError:
            self._process.kill()
            raise
        finally:
            _detached.remove(self)
            for fd in (self._stderr, self._status):
                _close(fd)
            _unreaped.add(self._process)
        return _completed(status, b"", said)


def wait_for_detached(seconds: float) -> None:
    """Block, for a process that is about to die, until all `Detached` have ended."""
    deadline = time.monotonic() + seconds
    waiting = {one._status for one in _detached}
    poll = _poll()
    for fd in waiting:
        poll.register(fd)
    while waiting and (left := deadline - time.monotonic()) > 0:
        for fd, _ in poll.poll(left * 1000):
            poll.unregister(fd)
            waiting.discard(fd)


_detached: list[Detached] = []


class _Process:
    """A process that we started, the only one that is ever waited for."""

    def __init__(
        self, argv: Sequence[str], env: Mapping[str, str] | None, files: Files, *, report: bool
    ) -> None:
        for one in list(_unreaped):
            one.poll()
        env = os.environ if env is None else env
        if report:
            _check_program(argv[0], env)
            argv = ["/bin/sh", "-c", shell.text("report"), NAME, *argv]
        actions: list[tuple[int, ...]]
        actions = [(os.POSIX_SPAWN_DUP2, ours, theirs) for theirs, ours in files.items()]
        actions += [(os.POSIX_SPAWN_CLOSE, fd) for fd in _inheritable() if fd not in files]
        try:
            self.pid: int = _spawn(
                argv[0],
                argv,
                env,
                file_actions=actions,
                setsid=True,
                setsigmask=(),
                # Python ignores them, and what it starts would.
                setsigdef=(signal.SIGPIPE, signal.SIGXFSZ),
            )
        except ValueError as bad:
            # A NUL, or a character that has no bytes.
            raise OSError(errno.EINVAL, f"a word that no command line can hold ({bad})") from None
        self._gone = False
        #: Its exit status, negative for a signal; None if it runs, or somebody else has taken it.
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
                _unreaped.discard(self)
        return self._gone

    def wait(self, timeout: float) -> bool:
        """Wait for it to end, and return whether it has."""
        deadline, pause = time.monotonic() + timeout, 0.0005
        while not self.poll():
            if time.monotonic() >= deadline:
                _unreaped.add(self)
                return False
            gevent.sleep(pause)
            pause = min(2 * pause, 0.05)
        return True

    def kill(self) -> None:
        """Kill it and its group, unless it has ended."""
        if not self.poll():
            # Not ours to signal when the client is sudo: closed streams end it then.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)


#: Processes that nobody waits for any more; they are reaped when the next one is started.
_unreaped: set[_Process] = set()


def _completed(reported: bytes, stdout: bytes, stderr: bytes) -> Completed:
    """What a command left behind, as the shell in between has reported it."""
    if not reported.isdigit():
        raise OSError(errno.ECHILD, "it was killed, and how it ended is unknown")
    status = int(reported)
    if status in (126, 127) and stderr.startswith(f"{NAME}: ".encode()):
        missing = status == 127 or b"No such file" in stderr
        code = errno.ENOENT if missing else errno.EACCES
        raise OSError(code, os.strerror(code))
    return Completed(status, stdout, stderr)


def _check_program(name: str, env: Mapping[str, str]) -> None:
    """Refuse what the system would refuse to start, but a shell takes for a script."""
    head = b"#!"
    # What cannot be read may still be run.
    with contextlib.suppress(PermissionError):
        if found := shutil.which(name, path=env.get("PATH")):
            with open(found, "rb") as file:
                head = file.read(2)
    if head != b"#!" and head.decode("latin-1").isprintable():
        raise OSError(errno.ENOEXEC, os.strerror(errno.ENOEXEC), name)


def _pipes(ours: ExitStack, theirs: ExitStack) -> tuple[Files, Files]:
    mine, other = {}, {}
    for stream in (0, STDOUT, STDERR):
        mine[stream], other[stream] = _pipe(ours, theirs, writing=not stream)
    return mine, other


def _pipe(ours: ExitStack, theirs: ExitStack, *, writing: bool = False) -> tuple[int, int]:
    """Our end and that of a process; `writing` when ours is the one to write to."""
    reader, writer = os.pipe()
    return _owned(ours, theirs, *((writer, reader) if writing else (reader, writer)))


def _terminal(ours: ExitStack, theirs: ExitStack) -> tuple[Files, Files]:
    master, slave = _owned(ours, theirs, *os.openpty())
    # The terminal that counts is the target's own; this one is only on the way to it.
    tty.setraw(slave)
    copy = os.dup(master)
    ours.callback(_close, copy)
    return {0: master, STDOUT: copy}, dict.fromkeys((0, STDOUT, STDERR), slave)


def _owned(ours: ExitStack, theirs: ExitStack, mine: int, other: int) -> tuple[int, int]:
    """Give two descriptors to those who close them."""
    with ExitStack() as guard:
        guard.callback(_close, other)
        mine = _own(ours, mine, theirs)
        guard.pop_all()
    return mine, _own(theirs, other, theirs)


def _own(stack: ExitStack, fd: int, scratch: ExitStack) -> int:
    """Give a descriptor to whom closes it, under a number that `Files` does not use.

    A process without standard streams gets their numbers for whatever it opens.
    """
    if fd < FREE:
        scratch.callback(_close, fd)
        fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FREE)
    stack.callback(_close, fd)
    return fd


def _inheritable() -> Iterator[int]:
    """Descriptors that a new process would get, beside its standard streams."""
    # Where the limit was lowered later there may be others beyond it, of which nobody may speak.
    limit = os.sysconf("SC_OPEN_MAX")
    for fd in map(int, os.listdir("/dev/fd")):
        with contextlib.suppress(OSError):
            if STDERR < fd < limit and os.get_inheritable(fd):
                yield fd


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Say what to do when there are too many open files."""
    try:
        yield
    except OSError as broken:
        if broken.errno in (errno.EMFILE, errno.ENFILE):
            raise TooManyFiles(
                broken.errno, "too many open files: raise the limit (ulimit -n) or use fewer hosts"
            ) from None
        raise
