"""Archives of a machine's files, an image's files, or files copied between machine and caller.

Python's `tarfile` reads and writes them, member by member. Its own functions for unpacking are not
used: `things` decides what is taken from an archive and where it goes.
"""

from __future__ import annotations

import io
import os
import shutil
import stat
import tarfile

from .state import Caller, Failure, shown, why
from .things import FileContent, Thing, Traits, Use
from .trees import Parts, changed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import IO, Union

    Stream = Union[IO[bytes], io.RawIOBase, io.BufferedIOBase]

# User names are not looked up: inside a machine that would load its libraries into this process.
tarfile.pwd = tarfile.grp = None  # type: ignore[attr-defined]

_ZSTD_HEAD = b"\x28\xb5\x2f\xfd\x00\x38"  # magic number, no options, a window of 128 KiB
_ZSTD_MAGIC = _ZSTD_HEAD[:4]
_BLOCK = 1 << 17
_XATTR = "SCHILY.xattr."
_LARGE = 8 << 30  # above this, Python's reader loses its position after a file with holes
_TYPES = {
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
}
_DAMAGED = (tarfile.TarError, EOFError, MemoryError, RecursionError, ValueError, OverflowError)
_KINDS = {kind: number for number, kind in _TYPES.items()}


class Damaged(Failure):
    """Not an archive, truncated, or with impossible values."""


def limit_memory() -> None:
    """Limit the memory that an archive's metadata can use."""
    from resource import RLIM_INFINITY, RLIMIT_AS, getrlimit, setrlimit

    hard = getrlimit(RLIMIT_AS)[1]
    most = 1 << 30
    setrlimit(RLIMIT_AS, (most if hard == RLIM_INFINITY else min(most, hard), hard))


def writing(stream: Stream) -> tarfile.TarFile:
    errors = "surrogateescape"
    return tarfile.open(
        fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT, encoding="utf-8", errors=errors
    )


def reading(stream: Stream, compressed: bool = False) -> tarfile.TarFile:
    try:
        if compressed:
            return tarfile.open(
                fileobj=stream, mode="r|*", encoding="utf-8", errors="surrogateescape"
            )
        return tarfile.open(fileobj=stream, mode="r|", encoding="utf-8", errors="surrogateescape")
    except (tarfile.TarError, EOFError):
        raise Damaged("not an archive") from None


class Packer:
    """Adds things to an archive, below a name."""

    def __init__(self, archive: tarfile.TarFile, use: Use) -> None:
        self._archive, self._use = archive, use
        self.left: set[Parts] = set()

    def put(self, name: str, thing: Thing) -> None:
        if not self._use.takes(thing) or thing.first in self.left or thing.kind not in _TYPES:
            self.left.add(thing.parts)
            return
        info = tarfile.TarInfo("/".join((name, *thing.parts)))
        info.type, info.mode = _TYPES[thing.kind], thing.traits.mode
        info.uid, info.gid = thing.traits.uid, thing.traits.gid
        seconds, rest = divmod(thing.traits.changed, 10**9)
        info.mtime, info.linkname = seconds, thing.link
        info.devmajor = info.devminor = 0
        headers: dict[str, str] = {}
        if self._use.exact:
            headers["mtime"] = f"{seconds}.{rest:09}"
            for mark, value in self._use.marks(thing.traits.marks).items():
                headers[_XATTR + mark] = value.decode("utf-8", "surrogateescape")
        if thing.first is not None:
            info.type, info.linkname = tarfile.LNKTYPE, "/".join((name, *thing.first))
        content = thing.content if isinstance(thing.content, FileContent) else None
        try:
            stream = _prepared(info, headers, content) if content else None
            info.pax_headers = headers
            self._archive.addfile(info, stream)
        except OSError as error:
            if content is not None and "unexpected end of data" in str(error):
                raise changed(thing.parts) from None
            raise


def _prepared(
    info: tarfile.TarInfo, headers: dict[str, str], content: FileContent
) -> io.BufferedReader:
    """The content in the archive's form: a map, then only the data between the holes."""
    segments = list(content.segments())
    stored = sum(length for _, length in segments)
    if stored == content.size or stored >= _LARGE:
        info.size = content.size
        return io.BufferedReader(_Segments(content.fd, b"", [(0, content.size)]))
    segments.append((content.size, 0))
    text = "".join(f"{start}\n{length}\n" for start, length in segments)
    mapped = f"{len(segments)}\n{text}".encode()
    mapped += bytes(-len(mapped) % tarfile.BLOCKSIZE)
    told = {"major": "1", "minor": "0", "name": info.name, "realsize": str(content.size)}
    headers.update({f"GNU.sparse.{key}": value for key, value in told.items()})
    info.size = len(mapped) + stored
    return io.BufferedReader(_Segments(content.fd, mapped, segments))


class _Segments(io.RawIOBase):
    """Some bytes, then parts of a file."""

    def __init__(self, fd: int, head: bytes, segments: Iterable[tuple[int, int]]) -> None:
        self._fd, self._head, self._rest = fd, head, iter(segments)
        self._start, self._left = 0, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if self._head:
            data, self._head = self._head[: len(buffer)], self._head[len(buffer) :]
        else:
            while not self._left:
                segment = next(self._rest, None)
                if segment is None:
                    return 0
                self._start, self._left = segment
            data = os.pread(self._fd, min(len(buffer), self._left), self._start)
            self._start, self._left = self._start + len(data), self._left - len(data)
        buffer[: len(data)] = data
        return len(data)


class StoredContent:
    """The content of an archive's member, available until the next member is read."""

    def __init__(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        self._stream, self._member = archive.fileobj, member

    def fill(self, target: int) -> None:
        member, stream = self._member, self._stream
        assert stream is not None
        stream.seek(member.offset_data)
        parts: list[tuple[int, int]] = getattr(member, "sparse", None) or [(0, member.size)]
        for start, length in parts:
            if start < 0 or length < 0 or start + length > member.size:
                raise Damaged(f"{shown(member.name)}: damaged")
            os.lseek(target, start, os.SEEK_SET)
            while length:
                data = stream.read(min(length, _BLOCK))
                if not data:
                    raise Damaged("it is truncated")
                length -= len(data)
                while data:
                    data = data[os.write(target, data) :]
        os.ftruncate(target, member.size)

    def read(self, most: int) -> bytes:
        """All of it; larger content is an error."""
        if self._member.size > most or self._stream is None:
            raise Failure(f"{shown(self._member.name)}: too large")
        data = b""
        while len(data) < self._member.size:
            more = self._stream.read(self._member.size - len(data))
            if not more:
                raise Failure("it is truncated")
            data += more
        return data


def members(archive: tarfile.TarFile) -> Iterator[Thing]:
    """The members of an archive. A name that leads out of it is an error."""
    try:
        for member in archive:
            kind = stat.S_IFREG if member.isreg() or member.islnk() else _KINDS.get(member.type, 0)
            time = min(max(0, int(float(member.mtime) * 10**9)), 1 << 62)
            mode = stat.S_IMODE(member.mode)
            traits = Traits(mode, member.uid, member.gid, time, _marks(member))
            thing = Thing(_parts(member.name), kind, traits)
            thing.link = member.linkname if kind == stat.S_IFLNK else ""
            thing.device = os.makedev(member.devmajor, member.devminor)
            if member.islnk():
                thing.first = _parts(member.linkname)
            elif kind == stat.S_IFREG:
                thing.content = StoredContent(archive, member)
            yield thing
    except _DAMAGED as error:
        raise Damaged(f"damaged or truncated: {type(error).__name__}") from None


def _parts(name: str) -> Parts:
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if ".." in parts:
        raise Failure(f"{shown(name)}: points outside the archive")
    return parts


def _marks(member: tarfile.TarInfo) -> dict[str, bytes]:
    return {
        key[len(_XATTR) :]: value.encode("utf-8", "surrogateescape")
        for key, value in member.pax_headers.items()
        if key.startswith(_XATTR)
    }


class ZstdWriter(io.RawIOBase):
    """Writes a zstd frame of raw blocks: any zstd can read it, and no library is needed."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._waiting = file, bytearray()
        file.write(_ZSTD_HEAD)

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self._waiting += data
        while len(self._waiting) > _BLOCK:
            self._block(self._waiting[:_BLOCK], last=False)
            del self._waiting[:_BLOCK]
        return len(data)

    def finish(self) -> None:
        self._block(self._waiting, last=True)

    def _block(self, data: bytearray, last: bool) -> None:
        self._file.write((len(data) << 3 | last).to_bytes(3, "little") + data)


class Plain(io.RawIOBase):
    """The content of a file. A ``.zst`` is either our own, or the host's `zstd` reads it."""

    def __init__(self, path: str, compressed: bool = True) -> None:
        self._left, self._over = 0, False  # bytes left in this block; whether it is the last block
        self._process = 0
        self._ours = False
        try:
            with Caller():
                self._file: IO[bytes] = open(path, "rb", buffering=0)  # noqa: SIM115
            head = self._file.read(len(_ZSTD_HEAD))
            if head == _ZSTD_HEAD:
                self._ours = True
                return
            self._file.seek(0)
        except OSError as error:
            raise Failure(why(error)) from None
        if head[:4] == _ZSTD_MAGIC or compressed:
            self._start_tool()

    def _start_tool(self) -> None:
        if not shutil.which("zstd"):
            raise Failure("zstd is not installed: install it to read this file")
        reader, writer = os.pipe()
        actions = [
            (os.POSIX_SPAWN_DUP2, self._file.fileno(), 0),
            (os.POSIX_SPAWN_DUP2, writer, 1),
            (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
        ]
        words = ["zstd", "-q", "-d", "-c"]
        self._process = os.posix_spawnp("zstd", words, os.environ, file_actions=actions)
        os.close(writer)
        self._file.close()
        self._file = open(reader, "rb", buffering=0)  # noqa: SIM115

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if self._ours:
            data = self._read_block(len(buffer))
        else:
            data = self._file.read(len(buffer)) or b""
            if not data and self._end_tool() != 0:
                raise Failure("it is not a zstd file, or it is truncated")
        buffer[: len(data)] = data
        return len(data)

    def _read_block(self, most: int) -> bytes:
        if not self._left and not self._over:
            head = self._file.read(3)
            number = int.from_bytes(head, "little")
            self._left, self._over = number >> 3, bool(number & 1)
            if len(head) < 3 or number & 6:
                raise Failure("it is truncated or damaged")
        data = self._file.read(min(most, self._left))
        if self._left and not data:
            raise Failure("it is truncated")
        self._left -= len(data)
        return data

    def _end_tool(self) -> int:
        process, self._process = self._process, 0
        return os.waitpid(process, 0)[1] if process else 0

    def close(self) -> None:
        if not self.closed:
            self._file.close()
            self._end_tool()
        super().close()
