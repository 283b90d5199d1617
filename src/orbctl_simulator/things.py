"""Files, links and directories with all their attributes, and where they are written.

They come from a tree or an archive, and go into a tree or an archive. This module decides what is
taken: devices never are, pipes and sockets only for trees that the simulator keeps.
"""

from __future__ import annotations

import os
import stat
from errno import EEXIST, ENXIO

from .light import suppress
from .state import Failure, shown
from .trees import Descent, Found, Parts, changed, denied, walk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Protocol

    class Content(Protocol):
        """The content of a file."""

        def fill(self, target: int) -> None:
            """Write it into an open file that is empty."""


#: Overlayfs' attribute of a directory that hides the base's content.
OPAQUE = "trusted.overlay.opaque"


class Traits:
    """A thing's attributes, without its content."""

    def __init__(
        self, mode: int, uid: int, gid: int, changed: int, marks: dict[str, bytes]
    ) -> None:
        self.mode, self.uid, self.gid = mode, uid, gid
        self.changed = changed  # nanoseconds since the epoch
        self.marks = marks  # extended attributes


class Thing:
    """A file, a directory, a link or something else, by the names that lead to it."""

    def __init__(self, parts: Parts, kind: int, traits: Traits) -> None:
        self.parts, self.traits = parts, traits
        self.kind = kind  # as in a file's mode
        self.link, self.device = "", 0
        self.first: Parts | None = None  # the earlier name of the same thing
        self.content: Content | None = None


class Use:
    """The use of a tree, which decides what is taken into it."""

    def __init__(self, exact: bool, specials: bool, deletions: bool) -> None:
        self.exact = exact  # keep owners, modes, times and extended attributes
        self.specials = specials  # take pipes and sockets
        self.deletions = deletions  # it may hide what is below it, like a layer

    def takes(self, thing: Thing) -> bool:
        if thing.kind in (stat.S_IFDIR, stat.S_IFREG, stat.S_IFLNK):
            return True
        if thing.kind in (stat.S_IFIFO, stat.S_IFSOCK):
            return self.specials
        return self.deletions and thing.kind == stat.S_IFCHR and thing.device == 0

    def marks(self, marks: dict[str, bytes]) -> dict[str, bytes]:
        """Without overlayfs' own, with which a layer could point anywhere in its base."""
        return {
            name: value
            for name, value in marks.items()
            if self.exact and (self.deletions if name == OPAQUE else _is_plain(name))
        }


def _is_plain(mark: str) -> bool:
    return not mark.startswith(("trusted.", "user.overlay.", "security.evm", "security.ima"))


#: A machine's layer over its base; an image, which has nothing below; a user's files.
LAYER, IMAGE, FILES = Use(True, True, True), Use(True, True, False), Use(False, False, False)


class FileContent:
    """The content of a file in a tree."""

    def __init__(self, fd: int, parts: Parts) -> None:
        self.fd, self.parts = fd, parts
        self.size = os.fstat(fd).st_size

    def segments(self) -> Iterator[tuple[int, int]]:
        """The parts with data, as offsets and lengths; between them are holes."""
        place = 0
        while place < self.size:
            try:
                start = os.lseek(self.fd, place, os.SEEK_DATA)
            except OSError as error:
                if error.errno == ENXIO:
                    return
                raise
            place = min(os.lseek(self.fd, start, os.SEEK_HOLE), self.size)
            if start < place:
                yield start, place - start

    def fill(self, target: int) -> None:
        for start, length in self.segments():
            os.lseek(target, start, os.SEEK_SET)
            while length:
                done = self._send(target, start, length)
                if not done:
                    raise changed(self.parts)
                start, length = start + done, length - done
        os.ftruncate(target, self.size)

    def _send(self, target: int, start: int, length: int) -> int:
        with suppress(OSError):  # between file systems, or on an old one
            return os.copy_file_range(self.fd, target, length, start)
        return os.sendfile(target, self.fd, start, length)


def things_in(root: int, without: int = -1) -> Iterator[Thing]:
    """Everything below a directory. A file's content is available until the next thing."""
    seen: dict[tuple[int, int], Parts] = {}
    for found in walk(root, without=without):
        ident = (found.status.st_dev, found.status.st_ino)
        thing = Thing(found.parts, found.kind, traits_of(found.status))
        thing.device = found.status.st_rdev
        if found.kind != stat.S_IFDIR and found.status.st_nlink > 1:
            thing.first = seen.get(ident)
            seen.setdefault(ident, found.parts)
        if found.kind == stat.S_IFLNK:
            thing.link = _target(found)
        if found.kind not in (stat.S_IFDIR, stat.S_IFREG) or thing.first is not None:
            yield thing
            continue
        fd = found.open()
        try:
            thing.traits = traits_of(os.fstat(fd), fd)
            if found.kind == stat.S_IFREG:
                thing.content = FileContent(fd, found.parts)
            yield thing
        finally:
            os.close(fd)


def _target(found: Found) -> str:
    try:
        return os.readlink(found.name, dir_fd=found.parent)
    except OSError as error:
        raise denied(found.parts, error) from None


def traits_of(status: os.stat_result, fd: int = -1) -> Traits:
    marks = {}
    for name in os.listxattr(fd) if fd >= 0 else ():
        with suppress(OSError):
            marks[name] = os.getxattr(fd, name)
    mode = stat.S_IMODE(status.st_mode)
    return Traits(mode, status.st_uid, status.st_gid, status.st_mtime_ns, marks)


class Writer:
    """Writes things below one directory, and nowhere else, whatever exists there."""

    def __init__(self, root: int, use: Use) -> None:
        self._use = use
        self._descent, self._others = Descent(root, make=use.exact), Descent(root)
        self._folders: list[tuple[Parts, Traits]] = []
        #: The things that were skipped.
        self.left: set[Parts] = set()
        self._put = 0

    @property
    def made(self) -> int:
        """How many files and directories it has created, including those above a thing."""
        return self._put + self._descent.made

    def put(self, thing: Thing) -> None:
        parts = thing.parts
        if not self._use.takes(thing) or thing.first in self.left:
            self.left.add(parts)
            return
        self._put += 1
        if thing.first == ():
            raise Failure(f"{name_of(parts)}: links to the topmost directory")
        try:
            parent, name = self._descent.to(parts[:-1]), parts[-1] if parts else "."
            if thing.kind == stat.S_IFDIR:
                self._put_folder(parent, name, thing)
            elif thing.first is not None:
                source = self._others.to(thing.first[:-1])
                _make_way(parent, name)
                first = thing.first[-1]
                os.link(first, name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
            elif thing.kind == stat.S_IFREG:
                self._put_file(parent, name, thing)
            else:
                _make_way(parent, name)
                if thing.kind == stat.S_IFLNK:
                    os.symlink(thing.link, name, dir_fd=parent)
                else:
                    os.mknod(name, thing.kind | 0o600, 0, dir_fd=parent)
                if self._use.exact:
                    self._dress(parent, name, thing)
        except OSError as error:
            raise denied(parts, error) from None
        except (OverflowError, ValueError) as error:  # an impossible number or name
            raise Failure(f"{name_of(parts)}: {error}") from None

    def _put_folder(self, parent: int, name: str, thing: Thing) -> None:
        if thing.parts and _kind(parent, name) != stat.S_IFDIR:
            os.mkdir(name, 0o755, dir_fd=parent)
        if self._use.exact:
            self._folders.append((thing.parts, thing.traits))

    def _put_file(self, parent: int, name: str, thing: Thing) -> None:
        kind = _kind(parent, name)
        if self._use.exact or kind == stat.S_IFLNK:
            _make_way(parent, name)
            kind = 0
        if kind not in (0, stat.S_IFREG):
            raise OSError(EEXIST, "exists and is not a regular file")
        # Without O_CREAT for an existing file: in /tmp, that may be forbidden.
        flags = os.O_WRONLY | os.O_NOFOLLOW | (0 if kind else os.O_CREAT | os.O_EXCL)
        fd = os.open(name, flags | os.O_NONBLOCK, 0o666, dir_fd=parent)
        try:
            os.ftruncate(fd, 0)
            if thing.content is not None:
                thing.content.fill(fd)
            if self._use.exact:
                self._dress_open(fd, thing.traits)
        finally:
            os.close(fd)

    def _dress(self, parent: int, name: str, thing: Thing) -> None:
        traits, times = thing.traits, (thing.traits.changed, thing.traits.changed)
        os.chown(name, traits.uid, traits.gid, dir_fd=parent, follow_symlinks=False)
        if thing.kind in (stat.S_IFIFO, stat.S_IFSOCK):
            os.chmod(name, traits.mode, dir_fd=parent)
        os.utime(name, ns=times, dir_fd=parent, follow_symlinks=False)

    def _dress_open(self, fd: int, traits: Traits) -> None:
        os.fchown(fd, traits.uid, traits.gid)
        os.fchmod(fd, traits.mode)
        for mark, value in self._use.marks(traits.marks).items():
            try:
                os.setxattr(fd, mark, value)
            except OSError:
                if mark == OPAQUE:
                    raise  # without it, the base's content would show
        os.utime(fd, ns=(traits.changed, traits.changed))

    def finish(self) -> None:
        """Set the directories' traits, once nothing more is written into them."""
        for parts, traits in reversed(self._folders):
            try:
                self._dress_open(self._descent.to(parts), traits)
            except OSError as error:
                raise denied(parts, error) from None
        self.close()

    def close(self) -> None:
        self._descent.close()
        self._others.close()


def _kind(parent: int, name: str) -> int:
    try:
        return stat.S_IFMT(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return 0


def _make_way(parent: int, name: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=parent)


def copy(source: int, target: int, use: Use) -> set[Parts]:
    """Copy a tree, including the traits of its topmost directory. Returns what was skipped."""
    writer = Writer(target, use)
    try:
        writer.put(Thing((), stat.S_IFDIR, traits_of(os.fstat(source), source)))
        for thing in things_in(source, without=target):
            writer.put(thing)
        writer.finish()
    finally:
        writer.close()
    return writer.left


def name_of(parts: Parts) -> str:
    return shown("/".join(parts))
