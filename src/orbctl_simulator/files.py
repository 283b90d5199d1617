"""Files between the caller and a machine, and machines as files."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import tarfile

from . import images
from .enter import Account, Door, select, why
from .lifecycle import Draft, Pause
from .state import Caller, Failure, Machine, find, home, rpc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import IO

    from .cli import Options

# Names of users are looked up nowhere: inside a machine that would load its libraries into us.
tarfile.pwd = tarfile.grp = None  # type: ignore[attr-defined]

_TAR = ("tar", "--xattrs", "--xattrs-include=*", "--numeric-owner", "--sparse")
_ZSTD_HEAD = b"\x28\xb5\x2f\xfd\x00\x38"  # magic number, no options, a window of 128 KiB
_BLOCK = 1 << 17


def push(options: Options, words: list[str]) -> int:
    """Copy into a machine by way of its shared root, as OrbStack does, with what that costs.

    No mode survives, only the default user's own rights count, and what lies under another mount
    of the machine, ``/tmp`` above all, is hidden by it: the copy succeeds and nothing is there.
    """
    machine, door = _shared_machine(options, "push")
    sources, target = (words[:-1], words[-1]) if len(words) > 1 else (words, "")
    _check_sources(sources)
    reader, writer = os.pipe()

    def work() -> None:
        os.close(writer)
        account = Account(machine.user)
        account.become()
        os.chdir(account.home)
        place = os.path.join(account.home, target)
        hidden = not _is_on_root(place)
        with os.fdopen(reader, "rb") as stream:
            _unpack(stream, _targets(sources, place) if not hidden else None)

    pid = door.fork(work)
    os.close(reader)
    _as_caller(lambda: _pack(writer, sources))
    return 0 if os.waitpid(pid, 0)[1] == 0 else 1


def pull(options: Options, words: list[str]) -> int:
    machine, door = _shared_machine(options, "pull")
    sources, target = (words[:-1], words[-1]) if len(words) > 1 else (words, ".")
    reader, writer = os.pipe()

    def work() -> None:
        os.close(reader)
        account = Account(machine.user)
        account.become()
        os.chdir(account.home)
        _check_sources([source if _is_on_root(source) else f"{source}/" for source in sources])
        _pack(writer, sources)

    pid = door.fork(work)
    os.close(writer)

    def unpack() -> None:
        with os.fdopen(reader, "rb") as stream:
            _unpack(stream, _targets(sources, target))

    _as_caller(unpack)
    return 0 if os.waitpid(pid, 0)[1] == 0 else 1


def _shared_machine(options: Options, verb: str) -> tuple[Machine, Door]:
    machine = select(options.text("machine"))
    if machine.on("isolated"):
        raise rpc(f"{verb}: machine is isolated: '{machine.name}'")
    return machine, Door(machine)


def _as_caller(work: Callable[[], None]) -> None:
    try:
        with Caller():
            work()
    except (tarfile.TarError, BrokenPipeError):
        pass  # the other side has said why
    except OSError as error:
        raise rpc(f"{error.filename}: {why(error).lower()}") from None


def _check_sources(sources: list[str]) -> None:
    for source in sources:
        if not os.path.exists(source):
            raise rpc(f"{source.rstrip('/')}: no such file or directory")


def _is_on_root(path: str) -> bool:
    while not os.path.isdir(path):
        path = os.path.dirname(path) or "."
    return os.stat(path).st_dev == os.stat("/").st_dev


def _targets(sources: list[str], target: str) -> list[str]:
    """Where each source goes, by the rules of `cp`."""
    if os.path.isdir(target or "."):
        return [
            target if source.endswith("/.") or source == "." else _join(target, source)
            for source in sources
        ]
    if len(sources) > 1 or target.endswith("/") or sources[0].endswith("/."):
        raise rpc(f"{target}: no such directory")
    if not os.path.isdir(os.path.dirname(target) or "."):
        raise rpc(f"{target}: no such file or directory")
    return [target]


def _join(target: str, source: str) -> str:
    return os.path.join(target, os.path.basename(source.rstrip("/")))


def _pack(writer: int, sources: list[str]) -> None:
    with os.fdopen(writer, "wb") as stream, tarfile.open(fileobj=stream, mode="w|") as archive:
        for number, source in enumerate(sources):
            archive.add(os.path.realpath(source), str(number))


def _unpack(stream: IO[bytes], targets: list[str] | None) -> None:
    """Put each source in its place, or, where the copy is lost, only read it to its end."""
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            if targets is None:
                continue
            number, _, inner = member.name.partition("/")
            path = os.path.join(targets[int(number)], inner) if inner else targets[int(number)]
            content = archive.extractfile(member) if member.isfile() else None
            if member.isdir():
                os.makedirs(path, exist_ok=True)
            elif member.issym():
                if os.path.lexists(path):
                    os.unlink(path)
                os.symlink(member.linkname, path)
            elif content is not None:
                with open(path, "wb") as file:
                    shutil.copyfileobj(content, file, 1 << 20)


def export(options: Options, words: list[str]) -> int:
    """What the machine has written, as a ``.tar.zst`` that `import` takes where its base is."""
    machine = find(words[0])
    path = os.path.abspath(words[1])
    with machine.lock(), Pause(machine.reload()):
        command = [*_TAR, "-C", machine.path, "-cf", "-", "machine", "upper"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as tar:
            assert tar.stdout is not None
            stream = tar.stdout
            _as_caller(lambda: _write_zstd(stream, path))
        if tar.returncode != 0:
            raise rpc(f"export '{machine.name}': tar failed")
    return 0


def import_(options: Options, words: list[str]) -> int:
    path = words[0]
    try:
        fields = _recorded(path)
        for key in ("made", "mounts", "shares"):  # it may be somebody else's machine
            fields.pop(key, None)
        name = options.text("name") or fields["name"]
        image = fields.get("image", "")
        base = os.path.join(home(), "images", image, "rootfs") if image else "/"
        if "/" in image or not os.path.isdir(base):
            raise Failure(f"its image is not here: {image}")
        draft = Draft(name, {**fields, "name": name})
        with draft as machine:
            images.lay_out(machine, base)
            shutil.rmtree(machine.file("upper"))
            _extract(path, machine.path)
            draft.finish()
    except Failure as failure:
        raise rpc(f"import '{path}': {failure}") from None
    return 0


def _recorded(path: str) -> dict[str, str]:
    """The machine's record, which is the archive's first member."""
    with io.BufferedReader(_Plain(path)) as plain:
        try:
            with tarfile.open(fileobj=plain, mode="r|") as archive:
                member = archive.next()
                content = archive.extractfile(member) if member else None
                if member is None or member.name != "machine" or content is None:
                    raise tarfile.ReadError
                text = content.read().decode(errors="surrogateescape")
        except tarfile.TarError:
            raise Failure("it is no machine that the simulator exported") from None
    return dict(line.partition("=")[::2] for line in text.split("\n") if line)


def _extract(path: str, folder: str) -> None:
    command = [*_TAR, "-C", folder, "-xpf", "-", "upper"]
    with io.BufferedReader(_Plain(path), _BLOCK) as plain:
        tar = subprocess.Popen(command, stdin=subprocess.PIPE)
        assert tar.stdin is not None
        with contextlib.suppress(BrokenPipeError), tar.stdin as pipe:
            shutil.copyfileobj(plain, pipe, _BLOCK)
        tar.wait()
    if tar.returncode != 0:
        raise Failure("tar failed")


def _write_zstd(stream: IO[bytes], path: str) -> None:
    """Write a zstd frame of raw blocks: any zstd reads it, and no library is needed for it."""
    with open(path, "wb") as file:
        file.write(_ZSTD_HEAD)
        while True:
            block = stream.read(_BLOCK)
            file.write((len(block) << 3 | (not block)).to_bytes(3, "little") + block)
            if not block:
                return


class _Plain(io.RawIOBase):
    """The content of a ``.zst``: our own raw blocks, or whatever the host's `zstd` can read."""

    def __init__(self, path: str) -> None:
        self._tool: subprocess.Popen[bytes] | None = None
        self._left, self._over = 0, False  # of the block that is being read; whether it is the last
        try:
            with Caller():
                self._file: IO[bytes] = open(path, "rb", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise Failure(error.strerror or "cannot be read") from None
        if self._file.read(len(_ZSTD_HEAD)) == _ZSTD_HEAD:
            return
        if not shutil.which("zstd"):
            raise Failure("reading it takes the program zstd, which is not here")
        self._file.seek(0)
        self._tool = subprocess.Popen(
            ["zstd", "-q", "-d", "-c"],
            stdin=self._file,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._file.close()
        assert self._tool.stdout is not None
        self._file = self._tool.stdout

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if self._tool is not None:
            data = self._file.read(len(buffer))
            if not data and self._tool.wait() != 0:
                raise Failure("it is no zstd file, or cut short")
        else:
            if not self._left and not self._over:
                head = self._file.read(3)
                number = int.from_bytes(head, "little")
                self._left, self._over = number >> 3, bool(number & 1)
                if len(head) < 3 or number & 6:
                    raise Failure("it is cut short, or damaged")
            data = self._file.read(min(len(buffer), self._left))
            if self._left and not data:
                raise Failure("it is cut short")
            self._left -= len(data)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        if self._tool is not None:
            self._tool.wait()
        super().close()
