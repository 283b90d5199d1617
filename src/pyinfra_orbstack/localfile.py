"""The local end of a transfer: files and IO objects, read and written completely or not at all.

Every failure is an `OSError` with a one-line message.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO, Any, cast

import gevent

from pyinfra_orbstack.process import CHUNK

#: Bytes for an IO object that wait in memory; more of them wait in a temporary file.
SPOOLED = 1024 * 1024
#: Prefix of directories in which files wait until they are complete.
ROOM = ".pyinfra-orbstack-"
#: Seconds after which a room of another host name is abandoned.
OLD = 86400.0


def printable(name: object) -> str:
    """A name in a form that fits in one line."""
    text = str(name)
    return text if text and text.isprintable() else repr(text)


def worded(broken: BaseException, text: str) -> OSError:
    """An error of the same kind with our own text: pyinfra shows it to the user."""
    kind = type(broken)
    if not issubclass(kind, OSError) or issubclass(kind, (ValueError, UnicodeError)):
        return OSError(text)
    return kind(text)


def reason(broken: BaseException) -> str:
    """The reason, without the number and the name that Python adds."""
    said = broken.strerror if isinstance(broken, OSError) and broken.strerror else str(broken)
    return " ".join(said.split()) or type(broken).__name__


@contextlib.contextmanager
def _saying(action: str, name: str) -> Iterator[None]:
    try:
        yield
    except Exception as broken:
        raise worded(broken, f"cannot {action} {name}: {reason(broken)}") from None


# Reading -----------------------------------------------------------------------------------------


def seekable(file: Any) -> bool:
    """Whether an IO object can be read a second time."""
    try:
        return hasattr(file, "seek") and bool(getattr(file, "seekable", lambda: True)())
    except ValueError:
        return False  # it is closed; reading it will report that


def is_text(file: Any) -> bool:
    """Whether an IO object takes str; a wrapper of `tempfile` counts as its inner file."""
    return isinstance(file, io.TextIOBase) or hasattr(file, "encoding")


def pieces(source: Any) -> Generator[bytes, None, None]:
    """The content of a local file or an IO object from its beginning, in pieces.

    Raises:
        OSError: It cannot be read.
    """
    name = name_of(source)
    with contextlib.ExitStack() as stack, _saying("read", name):
        if not hasattr(source, "read"):
            source = stack.enter_context(_open(source))
        elif seekable(source):
            source.seek(0)
        read = _patient_read(source)
        while data := _bytes(read(CHUNK)):
            yield data


def _bytes(data: Any) -> bytes:
    if data is None:
        raise BlockingIOError("it is non-blocking and has no data yet")
    return data.encode() if isinstance(data, str) else bytes(data)


def name_of(file: Any) -> str:
    """The name of a path or an IO object for messages."""
    if hasattr(file, "read") or hasattr(file, "write"):
        file = getattr(file, "name", None) or f"the {type(file).__name__} object"
    return printable(file)


def _open(path: Any) -> IO[bytes]:
    """Open files that have an end, and never block: opening a FIFO would stop all hosts."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        kind = _odd_kind(found)
        if kind and not os.path.samestat(found, os.stat(os.devnull)):
            raise OSError(f"it is {kind}")
        return open(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


def _odd_kind(found: os.stat_result) -> str:
    """The kind of something that is not a regular file."""
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(found.st_mode), "")


def _patient_read(file: IO[Any]) -> Any:
    """Its `read`; that of a pipe waits in a thread, so that other hosts continue meanwhile."""
    if type(file).__module__.startswith("gevent"):
        return file.read
    try:
        odd = _odd_kind(os.fstat(file.fileno()))
    except (AttributeError, OSError, ValueError, TypeError):
        return file.read
    if odd in ("", "a directory"):
        return file.read
    return lambda size: gevent.get_hub().threadpool.apply(file.read, (size,))


# Writing -----------------------------------------------------------------------------------------


class Arrival:
    """A temporary file whose content becomes that of a local file, or of an IO object.

    That happens in `commit`; until then, and if it fails, nothing has changed.
    """

    def __init__(self, name: str, file: IO[bytes]) -> None:
        self.name = name
        self.file = file
        #: Why a piece could not be written.
        self.failure: OSError | None = None

    def write(self, data: bytes) -> None:
        """Take a piece of the content."""
        try:
            with _saying("write", self.name):
                self.file.write(data)
        except OSError as broken:
            self.failure = broken
            raise

    def restart(self) -> None:
        """Begin again."""
        with _saying("write", self.name):
            self.file.seek(0)
            self.file.truncate()

    def commit(self) -> None:
        """Put the content in its place."""
        with _saying("write", self.name):
            self.file.flush()
            self.file.seek(0)
            self._place()

    def _place(self) -> None:
        raise NotImplementedError


@contextlib.contextmanager
def writing(destination: Any) -> Iterator[Arrival]:
    """An object that receives the new content of a local file or an IO object.

    Raises:
        OSError: It cannot be written.
    """
    with contextlib.ExitStack() as stack:
        with _saying("write", name_of(destination)):
            kind = _IntoObject if hasattr(destination, "write") else _IntoFile
            arrival: Arrival = kind(destination, stack)
        yield arrival


class _IntoObject(Arrival):
    def __init__(self, target: Any, stack: contextlib.ExitStack) -> None:
        file = tempfile.SpooledTemporaryFile(max_size=SPOOLED)  # noqa: SIM115
        super().__init__(name_of(target), cast(IO[bytes], file))
        stack.callback(self.file.close)
        self._target = target

    def _place(self) -> None:
        if is_text(self._target):
            pieces: Iterator[Any] = iter([self.file.read().decode()])
        else:
            pieces = iter(lambda: self.file.read(CHUNK), b"")
        if not seekable(self._target):
            _write_all(self._target, pieces)
            return
        with _restored_on_failure(self._target):
            self._target.seek(0)
            _write_all(self._target, pieces)
            _cut(self._target)
            if hasattr(self._target, "flush"):
                self._target.flush()


def _write_all(file: Any, pieces: Iterator[Any]) -> None:
    for piece in pieces:
        written = file.write(piece)
        # An unbuffered file may write only part of it.
        while isinstance(piece, bytes) and isinstance(written, int) and 0 < written < len(piece):
            piece = piece[written:]
            written = file.write(piece)


def _cut(file: Any) -> None:
    """Drop the rest of an IO object's old content, after its new content."""
    try:
        file.truncate()
    except Exception:
        # Devices and simple objects cannot; that matters only if something is left.
        end = file.tell()
        if file.seek(0, os.SEEK_END) not in (None, end):
            raise OSError("it contained more and cannot be truncated") from None


@contextlib.contextmanager
def _restored_on_failure(file: Any) -> Iterator[None]:
    where = file.tell() if hasattr(file, "tell") else 0
    with contextlib.ExitStack() as stack:
        old: Any = None
        if getattr(file, "readable", bool)():
            text = is_text(file)
            old = io.StringIO(newline="") if text else stack.enter_context(tempfile.TemporaryFile())
            file.seek(0)
            shutil.copyfileobj(file, old)
        try:
            yield
        except BaseException:
            with contextlib.suppress(Exception):
                if old is not None:
                    old.seek(0)
                    file.seek(0)
                    file.truncate()
                    _write_all(file, iter(lambda: old.read(CHUNK), old.read(0)))
                file.seek(where)
            raise


class _IntoFile(Arrival):
    """The file waits in a *room*, a private directory beside its target, and is renamed from there.

    If renaming would change what the target is, such as one of several links to a file, the content
    is copied over the old content, and the room keeps a copy of that until the end.
    """

    def __init__(self, path: Any, stack: contextlib.ExitStack) -> None:
        given = os.fsdecode(path)
        self._old = _look(given)
        # A link remains; the file that it points to is replaced.
        self._path = os.path.realpath(given)
        self._room, self._beside = self._make_room(stack)
        self._new = os.path.join(self._room, "new")
        super().__init__(printable(given), open(self._new, "x+b"))  # noqa: SIM115
        stack.callback(self.file.close)

    def _make_room(self, stack: contextlib.ExitStack) -> tuple[str, bool]:
        parent = os.path.dirname(self._path)
        prefix = f"{ROOM}{_hostname()}-{os.getpid()}-"
        stack.callback(_sweep, parent)
        special = self._old is not None and _odd_kind(self._old)
        try:
            beside = not special
            room = tempfile.mkdtemp(prefix=prefix, dir=parent if beside else None)
        except OSError:
            if self._old is None:
                raise
            room, beside = tempfile.mkdtemp(prefix=prefix), False
        stack.callback(self._leave_room, room)
        return room, beside

    def _leave_room(self, room: str) -> None:
        if os.path.exists(os.path.join(room, "kept")):
            os.unlink(os.path.join(room, "new"))
        else:
            shutil.rmtree(room, ignore_errors=True)

    def _place(self) -> None:
        if self._old is None:
            os.replace(self._new, self._path)
        elif _odd_kind(self._old):
            with open(self._path, "r+b", buffering=0) as target:
                shutil.copyfileobj(self.file, target)
        elif not self._rename():
            self._copy_over()

    def _rename(self) -> bool:
        """Give the new file the old one's attributes and rename it; False if that is impossible."""
        if not self._beside:
            return False
        try:
            old = os.stat(self._path)
            shutil.copystat(self._path, self._new)
            os.utime(self._new)
            new = os.stat(self._new)
            if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
                os.chown(self._new, old.st_uid, old.st_gid)
                os.chmod(self._new, stat.S_IMODE(old.st_mode))
            if old.st_nlink != 1 or os.stat(self._new).st_mode != old.st_mode:
                return False
            os.replace(self._new, self._path)
        except OSError:
            return False
        return True

    def _copy_over(self) -> None:
        kept = os.path.join(self._room, "old")
        shutil.copyfile(self._path, kept)
        try:
            overwrite(self._path, self._new)
        except BaseException as broken:
            try:
                overwrite(self._path, kept)
            except OSError:
                os.replace(kept, os.path.join(self._room, "kept"))
                raise OSError(
                    f"{reason(broken)}; its old content could not be restored and is kept in "
                    f"{os.path.join(self._room, 'kept')}"
                ) from None
            raise


def _look(path: str) -> os.stat_result | None:
    """The status of a path that is to be written; None if nothing exists there."""
    if not path or path.endswith("/"):
        number = errno.EISDIR if path else errno.ENOENT
        raise OSError(number, os.strerror(number))
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if stat.S_ISFIFO(found.st_mode) or stat.S_ISSOCK(found.st_mode):
        raise OSError(f"it is {_odd_kind(found)}")
    if not os.access(path, os.W_OK):
        os.close(os.open(path, os.O_WRONLY))
    return found


def overwrite(path: str, source: str) -> None:
    # Without O_CREAT, which fs.protected_regular forbids for others' files in /tmp.
    with open(source, "rb") as new, open(os.open(path, os.O_WRONLY), "wb") as target:
        shutil.copyfileobj(new, target)
        target.truncate()


def _hostname() -> str:
    return socket.gethostname().replace("/", "-")


def _sweep(folder: str) -> None:
    """Remove the rooms that killed processes of ours left, except kept content."""
    with contextlib.suppress(OSError):
        for room in Path(folder).glob(f"{ROOM}*"):
            host, _, pid = room.name[len(ROOM) :].rpartition("-")[0].rpartition("-")
            found = room.lstat()
            # The name of a Mac changes with its network.
            is_left = not _runs(pid) if host == _hostname() else time.time() - found.st_mtime > OLD
            ours = found.st_uid == os.geteuid()
            if ours and is_left and not {"old", "kept"} & set(os.listdir(room)):
                shutil.rmtree(room, ignore_errors=True)


def _runs(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
