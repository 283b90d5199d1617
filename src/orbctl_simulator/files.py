"""Files between the caller and a machine, and machines as files."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import tarfile

from .account import Account
from .archives import (
    Damaged,
    Packer,
    Plain,
    StoredContent,
    ZstdWriter,
    limit_memory,
    members,
    reading,
    writing,
)
from .bases import base_of
from .door import Door, complain, exit_code
from .enter import select
from .lifecycle import Draft, paused
from .state import Caller, Failure, Machine, Transition, find, rpc, why
from .stored import with_plain_owners
from .things import FILES, LAYER, FileContent, Thing, Writer, name_of, things_in, traits_of
from .trees import Parts, folder
from .values import NO_MACHINE, check_record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import IO

    from .cli import Options

_MOST_RECORD = 1 << 20


def push(options: Options, words: list[str]) -> int:
    """Copy into a machine through its shared root, as OrbStack does, with the same drawbacks.

    Modes are lost, and only the default user's own rights count. A mount in the machine, such as
    ``/tmp``, hides what is copied below it: the copy succeeds and nothing arrives.
    """
    machine, door = _shared_machine(options, "push")
    sources, target = (words[:-1], words[-1]) if len(words) > 1 else (words, "")
    points = door.mount_points()
    reader, writer = os.pipe()

    def work() -> None:
        account = _as_default_user(machine)
        place = os.path.join(account.home, target)
        with open(reader, "rb") as stream:
            if _is_hidden(place, points):
                _read_all(stream)
            else:
                _unpack(stream, _places(sources, place))

    def pack() -> None:
        with open(writer, "wb") as stream:
            _pack(stream, sources)

    _as_caller(lambda: _check_sources(sources))
    return _both(door, work, reader, pack)


def pull(options: Options, words: list[str]) -> int:
    machine, door = _shared_machine(options, "pull")
    sources, target = (words[:-1], words[-1]) if len(words) > 1 else (words, ".")
    reader, writer = os.pipe()

    def work() -> None:
        _as_default_user(machine)
        _check_sources(sources)
        with open(writer, "wb") as stream:
            _pack(stream, sources)

    def unpack() -> None:
        with open(reader, "rb") as stream:
            _unpack(stream, _places(sources, target))

    return _both(door, work, writer, unpack)


def _both(door: Door, theirs: Callable[[], None], end: int, ours: Callable[[], None]) -> int:
    """Run one half of a copy inside the machine, with one end of a pipe, and the other here."""
    pid = door.fork(theirs, end, bare=True)
    os.close(end)
    try:
        _as_caller(ours)
    finally:
        status = os.waitpid(pid, 0)[1]
    return exit_code(status)


def _shared_machine(options: Options, verb: str) -> tuple[Machine, Door]:
    machine = select(options.text("machine"))
    if machine.on("isolated"):
        raise rpc(f"{verb}: machine is isolated: '{machine.name}'")
    return machine, Door.of(machine)


def _as_default_user(machine: Machine) -> Account:
    account = Account(machine.user)
    account.become()
    os.chdir(account.home)
    return account


def _as_caller(work: Callable[[], None]) -> None:
    try:
        with Caller():
            work()
    except (BrokenPipeError, Damaged):
        pass  # the other side has reported why
    except Failure as failure:
        raise failure if str(failure).startswith("[") else rpc(str(failure)) from None
    except OSError as error:
        raise rpc(f"{error.filename}: {why(error).lower()}") from None


def _check_sources(sources: list[str]) -> None:
    for source in sources:
        if not os.path.exists(source):
            raise rpc(f"{source.rstrip('/')}: no such file or directory")


def _is_hidden(path: str, points: list[str]) -> bool:
    real = os.path.realpath(path)
    return any(real == point or real.startswith(point + "/") for point in points)


def _places(sources: list[str], target: str) -> list[tuple[str, Parts]]:
    """Where each source goes, according to `cp`'s rules: a directory, and the names below it."""
    if os.path.isdir(target or "."):
        names = [os.path.basename(source.rstrip("/")) for source in sources]
        return [(target or ".", () if name in ("", ".", "..") else (name,)) for name in names]
    if len(sources) > 1 or target.endswith("/") or sources[0].endswith("/."):
        raise rpc(f"{target}: no such directory")
    top, name = os.path.split(target)
    if not os.path.isdir(top or "."):
        raise rpc(f"{target}: no such file or directory")
    if os.path.islink(target):
        raise rpc(f"{target}: a symbolic link; name its target instead")
    return [(top or ".", (name,))]


def _pack(stream: IO[bytes], sources: list[str]) -> None:
    with contextlib.closing(writing(stream)) as archive:
        packer = Packer(archive, FILES)
        for number, source in enumerate(sources):
            fd = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
            try:
                status = os.fstat(fd)
                kind, traits = stat.S_IFMT(status.st_mode), traits_of(status)
                if kind not in (stat.S_IFDIR, stat.S_IFREG):
                    raise rpc(f"{source}: not a regular file or directory")
                top = Thing((), kind, traits)
                if kind == stat.S_IFREG:
                    top.content = FileContent(fd, (os.path.basename(source),))
                packer.put(str(number), top)
                for thing in things_in(fd) if kind == stat.S_IFDIR else ():
                    packer.put(str(number), thing)
            finally:
                os.close(fd)
    for parts in sorted(packer.left):
        complain(f"skipped: {name_of(parts)}: not a regular file, directory or symbolic link")


def _unpack(stream: IO[bytes], places: list[tuple[str, Parts]]) -> None:
    """Put each source in its place."""
    with contextlib.ExitStack() as stack:
        writers = []
        for top, _ in places:
            fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, fd)
            writers.append(stack.enter_context(contextlib.closing(Writer(fd, FILES))))
        for thing in members(reading(stream)):
            number = int(thing.parts[0])
            writers[number].put(_moved(thing, places[number][1]))


def _moved(thing: Thing, above: Parts) -> Thing:
    """The same thing, with other names instead of its first one."""
    thing.parts = above + thing.parts[1:]
    if thing.first is not None:
        thing.first = above + thing.first[1:]
    return thing


def _read_all(stream: IO[bytes]) -> None:
    while stream.read(1 << 16):
        pass


def export(options: Options, words: list[str]) -> int:
    """Write the machine's changes to a ``.tar.zst``, which `import` accepts if its base exists."""
    machine, path = find(words[0]), os.path.abspath(words[1])
    try:
        with Transition(machine, "exporting", "export", shown=False), paused(machine):
            with Caller():
                file = open(path, "wb")  # noqa: SIM115
            try:
                with file:
                    _write(machine, file)
            except BaseException:
                if os.path.isfile(path) and not os.path.islink(path):
                    os.unlink(path)
                raise
    except OSError as error:
        if error.filename is None:
            raise rpc(f"export '{machine.name}': {why(error).lower()}") from None
        raise rpc(f"export '{machine.name}': {error.filename}: {why(error).lower()}") from None
    except Failure as failure:
        if str(failure).startswith("["):
            raise
        raise rpc(f"export '{machine.name}': {failure}") from None
    return 0


def _write(machine: Machine, file: IO[bytes]) -> None:
    """Write the archive with the owners that files have in the machine."""

    def work() -> None:
        _write_machine(machine, file)
        file.flush()

    if machine.boots:
        with_plain_owners(machine.upper, work)
    else:
        work()


def _write_machine(machine: Machine, file: IO[bytes]) -> None:
    packed = ZstdWriter(file)
    with contextlib.closing(writing(packed)) as archive, folder(machine.upper) as layer:
        text = "".join(f"{key}={value}\n" for key, value in machine.fields.items())
        data = text.encode(errors="surrogateescape")
        head = tarfile.TarInfo("machine")
        head.size, head.mode = len(data), 0o600
        archive.addfile(head, io.BytesIO(data))
        packer = Packer(archive, LAYER)
        packer.put("upper", Thing((), stat.S_IFDIR, traits_of(os.fstat(layer), layer)))
        for thing in things_in(layer):
            packer.put("upper", thing)
    packed.finish()


def import_(options: Options, words: list[str]) -> int:
    path = words[0]
    try:
        limit_memory()
        with Plain(path) as plain:
            stream = io.BufferedReader(plain, 1 << 17)
            things = members(reading(stream))
            fields = _recorded(things)
            fields["name"] = options.text("name") or fields["name"]
            draft = Draft(fields["name"], fields, options.call.hold)
            with draft as machine:

                def work() -> None:
                    _fill(machine, things)
                    _read_all(stream)

                if machine.boots:
                    with_plain_owners(machine.upper, work)
                else:
                    work()
                draft.finish()
    except Failure as failure:
        raise rpc(f"import '{path}': {failure}") from None
    return 0


def _recorded(things: Iterator[Thing]) -> dict[str, str]:
    """The machine's record, the archive's first member, without fields that refer to this host."""
    thing = next(things, None)
    if thing is None or thing.parts != ("machine",) or not isinstance(thing.content, StoredContent):
        raise Failure(NO_MACHINE)
    text = thing.content.read(_MOST_RECORD).decode(errors="surrogateescape")
    fields = dict(line.partition("=")[::2] for line in text.split("\n") if line)
    for key in ("made", "mounts", "shares", "sources"):  # it may come from another user
        fields.pop(key, None)
    check_record(fields)
    fields.setdefault("image", "")
    base_of(fields).check()
    return fields


def _fill(machine: Machine, things: Iterator[Thing]) -> None:
    with folder(machine.upper) as layer:
        writer = Writer(layer, LAYER)
        with contextlib.closing(writer):
            whole = False
            for thing in things:
                if thing.parts[:1] == ("upper",) and (thing.first or ("upper",))[0] == "upper":
                    whole = whole or (len(thing.parts) == 1 and thing.kind == stat.S_IFDIR)
                    if len(thing.parts) > 1 or thing.kind == stat.S_IFDIR:
                        writer.put(_moved(thing, ()))
            if not whole:
                raise Failure("contains no files of a machine")
            writer.finish()
