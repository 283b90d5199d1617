"""Reading, copying, writing and deleting trees of files that others control.

A machine or an image determines their content, and may change it meanwhile. So every step is one
name in an open directory, and no link is followed. Trees may be of any depth, and paths of any
length.
"""

from __future__ import annotations

import os
import stat
from errno import ELOOP, ENOTDIR

from .light import suppress
from .state import Failure, shown, why

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Parts = tuple[str, ...]
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
_MOST_OPEN = 32


class Found:
    """One thing in a tree: its path as names, and its directory, open."""

    def __init__(self, parts: Parts, parent: int, status: os.stat_result) -> None:
        self.parts, self.name, self.parent, self.status = parts, parts[-1], parent, status

    @property
    def kind(self) -> int:
        return stat.S_IFMT(self.status.st_mode)

    def open(self) -> int:
        """Open the file or directory, unless something else has replaced it."""
        try:
            fd = os.open(self.name, _FILE, dir_fd=self.parent)
        except OSError as error:
            raise denied(self.parts, error) from None
        if stat.S_IFMT(os.fstat(fd).st_mode) != self.kind:
            os.close(fd)
            raise changed(self.parts)
        return fd


def changed(parts: Sequence[str]) -> Failure:
    return Failure(f"{shown('/'.join(parts))}: changed while it was read")


def denied(parts: Sequence[str], error: OSError) -> Failure:
    return Failure(f"{shown('/'.join(parts))}: {why(error).lower()}")


class Descent:
    """The current directory below an open one, and the last few above it."""

    def __init__(self, root: int, make: bool = False) -> None:
        self._root, self._make = root, make
        #: How many directories it has created.
        self.made = 0
        self._parts: list[str] = []
        self._ids: list[tuple[int, int]] = []
        self._open: dict[int, int] = {}  # by depth

    def to(self, parts: Sequence[str]) -> int:
        """Go there. Returns the directory, which stays open until the next call."""
        same = 0
        for ours, theirs in zip(self._parts, parts):
            if ours != theirs:
                break
            same += 1
        for depth in [depth for depth in self._open if depth > same]:
            os.close(self._open.pop(depth))
        del self._parts[same:], self._ids[same:]
        for depth in range(same if same in self._open else 0, len(parts)):
            self._step(depth, parts)
        return self._at(len(parts))

    def _at(self, depth: int) -> int:
        return self._open[depth] if depth else self._root

    def _step(self, depth: int, parts: Sequence[str]) -> None:
        try:
            fd = self._enter(self._at(depth), parts[depth])
        except OSError as error:
            raise denied(parts[: depth + 1], error) from None
        self._open[depth + 1] = fd
        status = os.fstat(fd)
        ident = (status.st_dev, status.st_ino)
        if depth == len(self._parts):
            self._parts.append(parts[depth])
            self._ids.append(ident)
        elif self._ids[depth] != ident:
            raise changed(parts[: depth + 1])
        if depth + 1 - _MOST_OPEN in self._open:
            os.close(self._open.pop(depth + 1 - _MOST_OPEN))

    def _enter(self, parent: int, name: str) -> int:
        try:
            return os.open(name, _FOLDER, dir_fd=parent)
        except FileNotFoundError:
            if not self._make:
                raise
        os.mkdir(name, 0o755, dir_fd=parent)
        self.made += 1
        return os.open(name, _FOLDER, dir_fd=parent)

    def close(self) -> None:
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()


def walk(root: int, strict: bool = True, without: int = -1) -> Iterator[Found]:
    """Everything below a directory, without other file systems; a directory before its content.

    If `strict`, something that changes meanwhile and cannot be read is an error. Finding the
    directory `without`, the destination of a copy, is always an error.
    """
    avoided = os.fstat(without) if without >= 0 else None
    device, descent = os.fstat(root).st_dev, Descent(root)
    path: list[str] = []
    names = [iter(os.listdir(root))]
    here = root
    try:
        while names:
            name = next(names[-1], None)
            try:
                if name is None:
                    names.pop()
                    del path[-1:]
                    here = descent.to(path)
                    continue
                status = os.stat(name, dir_fd=here, follow_symlinks=False)
                if avoided is not None and os.path.samestat(status, avoided):
                    raise Failure(
                        f"{shown('/'.join([*path, name]))}: the copy would contain itself"
                    )
                yield Found((*path, name), here, status)
                if stat.S_ISDIR(status.st_mode) and status.st_dev == device:
                    inner = descent.to([*path, name])
                    names.append(iter(os.listdir(inner)))
                    path.append(name)
                    here = inner
            except FileNotFoundError as error:
                if strict:
                    raise denied((*path, name or ""), error) from None
            except Failure:
                if strict:
                    raise
                if name is None:
                    return  # the way back is gone
    finally:
        descent.close()


def disk_usage(path: str) -> int:
    """The size of the files below a directory."""
    with suppress(FileNotFoundError), folder(path) as root:
        return sum(
            found.status.st_blocks * 512
            for found in walk(root, strict=False)
            if not stat.S_ISDIR(found.status.st_mode)
        )
    return 0


class folder:
    """In this context, one of our own directories is open."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> int:
        self._fd = os.open(self._path, _FOLDER)
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def remove(path: str, parent: int | None = None) -> None:
    """Delete a tree of any depth. What cannot be deleted makes a later step fail.

    Each directory is moved up beside the topmost ones before it is emptied, so none is ever more
    than one step away.
    """
    try:
        top = os.open(path, _FOLDER, dir_fd=parent)
    except OSError as error:
        if error.errno in (ENOTDIR, ELOOP):
            with suppress(FileNotFoundError):
                os.unlink(path, dir_fd=parent)
        return
    try:
        mark, count, before = f".{os.urandom(8).hex()}-", 0, (0, 0)
        while (names := os.listdir(top)) and (count, len(names)) != before:
            before = (count, len(names))
            for name in names:
                count = _clear(top, name, mark, count)
    finally:
        os.close(top)
    with suppress(OSError):
        os.rmdir(path, dir_fd=parent)


def _clear(top: int, name: str, mark: str, count: int) -> int:
    """Remove a file, or move a directory's content to `top` under numbers. Returns the last one."""
    with suppress(OSError):
        os.unlink(name, dir_fd=top)
        return count
    with suppress(OSError):
        fd = os.open(name, _FOLDER, dir_fd=top)
        try:
            for inner in os.listdir(fd):
                try:
                    os.unlink(inner, dir_fd=fd)
                except OSError:  # a directory
                    count += 1
                    os.rename(inner, f"{mark}{count}", src_dir_fd=fd, dst_dir_fd=top)
        finally:
            os.close(fd)
        os.rmdir(name, dir_fd=top)
    return count
