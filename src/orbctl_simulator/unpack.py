"""Unpacking an archive into a root file system, and preparing it for many machines.

A separate process reads an archive and writes its content, with limits on memory and disk space.
"""

from __future__ import annotations

import contextlib
import io
import os
import resource
import shutil
import stat
import subprocess

from . import tools
from .archives import limit_memory, members, reading
from .images import has_shell, inside
from .linux import CLONE_NEWNS, end_with_parent, unshare
from .state import Failure, why
from .things import IMAGE, OPAQUE, Writer
from .trees import folder, walk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import IO

    from .progress import Progress
    from .tools import Tool
    from .trees import Found

# The first bytes of each kind of compression, and the command that decompresses it.
_KINDS = (
    (b"\xfd7zXZ\x00", "xz", ("-dc", "--memlimit=512MiB")),
    (b"\x28\xb5\x2f\xfd", "zstd", ("-dcq", "--memory=512MiB")),
    (b"\x1f\x8b", "gzip", ("-dc",)),
    (b"BZh", "bzip2", ("-dc",)),
)
# A root file system compresses about four times; a higher ratio is meant to fill a disk.
_RATIO, _ALLOWANCE = 64, 1 << 30
_BLOCK = 1 << 18
_FILE = 4096  # what a file or directory takes on a disk, besides its content
# Files that mark a root as a container's, and those that each machine must have for itself.
_MARKS = (".dockerenv", "run/.containerenv", "usr/sbin/policy-rc.d", "var/lib/dbus/machine-id")


class NoSpace(Failure):
    """The disk is full, or would be."""


def free(path: str) -> int:
    """How much may be written there; a part of the free space is reserved."""
    return shutil.disk_usage(path).free * 9 // 10


def check_rights() -> None:
    """Fail early if machines cannot be created at all: getting an image takes a minute."""
    pid = os.fork()
    if pid == 0:
        try:
            unshare(CLONE_NEWNS)
            os._exit(0)
        finally:
            os._exit(1)
    if os.waitpid(pid, 0)[1]:
        raise Failure(
            "this host does not allow namespaces: if it is a container, run it with --privileged"
        )


def unpack(file: IO[bytes], rootfs: str, progress: Progress) -> int:
    """Unpack an archive, of any usual compression, into an empty directory.

    Returns how many files were skipped because images cannot contain them.
    """
    archive = file.fileno()
    size = os.fstat(archive).st_size
    budget = min(free(rootfs), _RATIO * size + _ALLOWANCE)
    command = _packer(archive)
    progress.step("unpacking", size)

    def work() -> int:
        limit_memory()
        resource.setrlimit(resource.RLIMIT_FSIZE, (budget, budget))
        with _plain(archive, command) as stream:
            raw, seen = _Counted(stream, archive, budget, progress), 0
            counted = io.BufferedReader(raw, _BLOCK)
            with folder(rootfs) as target, contextlib.closing(Writer(target, IMAGE)) as writer:
                for thing in members(reading(counted)):
                    writer.put(thing)
                    raw.use(_FILE * (writer.made - seen))
                    seen = writer.made
                writer.finish()
            while counted.read(_BLOCK):  # the decompressor checks completeness only at the end
                pass
        return len(writer.left)

    return _apart(work)


class _Counted(io.RawIOBase):
    """A stream that fails beyond a limit on what it and its files take."""

    def __init__(self, stream: int, archive: int, budget: int, progress: Progress) -> None:
        self._stream, self._archive, self._progress = stream, archive, progress
        self._budget = self._left = budget

    def use(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise NoSpace(f"no space left for it: it takes more than {self._budget >> 20} MB")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = os.read(self._stream, len(buffer))
        self.use(len(data))
        self._progress.reach(os.lseek(self._archive, 0, os.SEEK_CUR))
        buffer[: len(data)] = data
        return len(data)


def _packer(archive: int) -> tuple[Tool, Sequence[str]] | None:
    """The command that decompresses an archive, if it is compressed."""
    head = os.pread(archive, 8, 0)
    for magic, name, options in _KINDS:
        if head.startswith(magic):
            tools.ensure((name,))
            return tools.find(name, (name,)), options
    return None


@contextlib.contextmanager
def _plain(archive: int, command: tuple[Tool, Sequence[str]] | None) -> Iterator[int]:
    os.lseek(archive, 0, os.SEEK_SET)
    if command is None:
        yield archive
        return
    tool, options = command
    with subprocess.Popen(
        [tool.path, *options],
        stdin=archive,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=tool.environment,
    ) as packer:
        assert packer.stdout is not None
        try:
            yield packer.stdout.fileno()
        except BaseException:
            packer.kill()
            raise
    if packer.returncode != 0:
        raise Failure("the archive is damaged")


def _apart(work: Callable[[], int]) -> int:
    """Run it in a separate process. Returns its result, and raises its failure."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        told = "bad it could not be unpacked"
        try:
            end_with_parent()
            told = f"done {work()}"
        except (Failure, OSError, MemoryError) as error:
            full = isinstance(error, NoSpace) or "no space left" in str(error).lower()
            reason = why(error) if isinstance(error, OSError) else str(error)
            told = f"{'full' if full else 'bad'} {reason or 'it takes too much memory'}"
        finally:
            os.write(writer, told.encode(errors="surrogateescape"))
            os._exit(0)
    os.close(writer)
    try:
        with open(reader, encoding="utf-8", errors="surrogateescape") as file:
            kind, _, reason = file.read().partition(" ")
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    if kind != "done":
        raise (NoSpace if kind == "full" else Failure)(reason or "it could not be unpacked")
    return int(reason)


def tidy(
    root: str,
    unwanted: Sequence[str] = (),
    files: Sequence[tuple[str, str]] = (),
    whole: bool = True,
) -> int:
    """Prepare a root, or a layer over one, for many machines. Returns its size in bytes.

    Removes devices and the marks of a container, and empties the machine id.
    """

    if whole and not has_shell(root):
        raise Failure("it is not a root file system")

    def work() -> str:
        try:
            _tidy_here((*_MARKS, *unwanted), files)
            return "done"
        except OSError as error:
            return f"{error.filename}: {why(error).lower()}"

    answer = inside(root, work)
    if answer != "done":
        raise Failure(answer or "it could not be cleaned up")
    return _settle(root, whole)


def _tidy_here(unwanted: Sequence[str], files: Sequence[tuple[str, str]]) -> None:
    for path in unwanted:
        _remove(f"/{path}")
    if os.path.lexists("/etc/machine-id"):
        files = (*files, ("etc/machine-id", ""))
    for path, text in files:
        _remove(f"/{path}")
        os.makedirs(os.path.dirname(f"/{path}"), exist_ok=True)
        file = os.open(f"/{path}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(file, text.encode())
        os.close(file)


def _remove(path: str) -> None:
    """Remove a file, or, for a path that ends with ``/*``, a directory's content."""
    if path.endswith("/*"):
        place = path[:-2]
        for name in os.listdir(place) if os.path.isdir(place) else ():
            inner = os.path.join(place, name)
            if os.path.isdir(inner) and not os.path.islink(inner):
                _remove(f"{inner}/*")
                os.rmdir(inner)
            else:
                os.unlink(inner)
    elif os.path.lexists(path) and not os.path.isdir(path):
        os.unlink(path)


def _settle(root: str, whole: bool) -> int:
    """Remove devices, and mark directories that hide the base's content. Returns the size."""
    count, seen = 0, set()
    with folder(root) as top:
        for found in walk(top):
            if found.kind in (stat.S_IFCHR, stat.S_IFBLK) and whole:
                os.unlink(found.name, dir_fd=found.parent)
                continue
            if found.kind == stat.S_IFDIR and not whole:
                _mark_opaque(found)
            if found.status.st_nlink == 1 or found.status.st_ino not in seen:
                count += found.status.st_blocks * 512
            if found.kind != stat.S_IFDIR and found.status.st_nlink > 1:
                seen.add(found.status.st_ino)
    return count


def _mark_opaque(found: Found) -> None:
    """Mark it also for overlays in user namespaces, which cannot read the host's attribute."""
    fd = found.open()
    try:
        if os.getxattr(fd, OPAQUE) == b"y":
            os.setxattr(fd, "user.overlay.opaque", b"y")
    except OSError:
        pass  # it has none
    finally:
        os.close(fd)
