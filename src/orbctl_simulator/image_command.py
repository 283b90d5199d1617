"""`image`: the images that machines are created from, local and remote."""

from __future__ import annotations

import contextlib
import os
import stat

from . import images, store
from .images import Image, listed
from .state import (
    FILES,
    Caller,
    Failure,
    Lock,
    everything,
    machines,
    read_fields,
    say,
    why,
    write_fields,
)
from .sweeping import LOCK, NEW
from .trees import folder, remove

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import IO

    from .cli import Options

_WORDS = {"add": 2, "build": 1, "list": 0, "pull": 1, "remove": 1, "save": 2}


def image(options: Options, words: list[str]) -> int:
    verb, *rest = words
    if _WORDS.get(verb) != len(rest):
        raise Failure(
            "image: add NAME[:VERSION] ROOTFS, build, pull, remove NAME[:VERSION], list, or"
            " save NAME[:VERSION] FILE"
        )
    try:
        _carry_out(options, verb, rest)
    except OSError as error:
        place = error.filename or store.folder()
        raise Failure(f"{place}: {why(error).lower()}") from None
    return 0


def _carry_out(options: Options, verb: str, rest: list[str]) -> None:
    store.sweep()
    if verb == "list":
        _list_remote(options) if options.on("remote") else _list()
        return
    chosen = Image(rest[0], options.text("arch"), new=True, variant=options.text("variant"))
    if verb == "add":
        if options.has("variant"):
            raise Failure("image add: --variant is only for pulled images: leave it out")
        _add(chosen, rest[1])
    elif verb == "remove":
        _remove(chosen)
    elif verb == "save":
        _save(chosen, rest[1])
    else:
        _make(chosen, verb)


def _make(image: Image, verb: str) -> None:
    from . import obtain, unpack

    unpack.check_rights()
    make = obtain.pull if verb == "pull" else obtain.build
    with store.Draft(image.stored, str(image)) as draft:
        made = make(draft, image)
    print(f"{image} {made.serial}: {made.fields['source']}")


def _list() -> None:
    """Print the images that `create` accepts."""
    from .bases import shares_images
    from .progress import size

    rows = []
    for name in sorted(listed()):
        distro, version, arch = name.split("_")
        fields = read_fields(_record(name)) if os.path.exists(_record(name)) else {}
        count = size(int(fields["size"])) if "size" in fields else "-"
        rows.append((f"{distro}:{version}", arch, "default", count, fields.get("source", "added")))
    for image in store.everything() if shares_images() else ():
        distro, version, arch, variant = image.key.split("_")
        source = f"{image.fields.get('source', '-')}, {image.serial}"
        count = size(int(image.fields.get("size", 0)))
        rows.append((f"{distro}:{version}", arch, variant, count, source))
    _print(rows)


def _list_remote(options: Options) -> None:
    from . import obtain, streams
    from .progress import size

    source = obtain.source()
    source.reach()
    arch = options.text("arch") or images.host_arch()
    _print(
        [
            (f"{distro}:{release}", arch, variant, size(product.size), product.serial)
            for distro, release, variant, product in streams.listed(streams.products(source), arch)
            if distro in images.DISTROS
        ]
    )


def _print(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def _record(key: str) -> str:
    return os.path.join(images.folder(), key, "image")


def _add(image: Image, source: str) -> None:
    from .unpack import tidy

    place = os.path.join(images.folder(), image.key)
    new = place + NEW
    os.makedirs(images.folder(), mode=0o700, exist_ok=True)
    with Lock(new + LOCK):
        if os.path.lexists(place):
            raise Failure(f"image {image} already exists: remove it first")
        remove(new)
        rootfs = os.path.join(new, FILES)
        try:
            os.mkdir(new, 0o700)  # it may contain setuid executables
            os.mkdir(rootfs, 0o700)
            left = _copied(source, new, rootfs)
            try:
                count = tidy(rootfs)
            except Failure as failure:
                raise Failure(f"{source}: {failure}") from None
            fields = {"source": f"added from {os.path.abspath(source)}", "size": str(count)}
            write_fields(os.path.join(new, "image"), fields)
            os.rename(new, place)
        finally:
            remove(new)
    if left:
        say(f"skipped {left} device files in {source}: machines have their own")


def _copied(source: str, place: str, rootfs: str) -> int:
    """Copy a directory or unpack an archive. Returns how many files images cannot contain."""
    from . import things, unpack
    from .progress import Progress

    if os.path.isdir(source):
        with folder(rootfs) as target:
            fd = os.open(source, os.O_RDONLY | os.O_DIRECTORY)
            try:
                return len(things.copy(fd, target, things.IMAGE))
            finally:
                os.close(fd)
    try:
        with _opened(source, place) as file, Progress(f"adding {source}") as progress:
            return unpack.unpack(file, rootfs, progress)
    except OSError as error:
        raise Failure(f"cannot read {source}: {why(error).lower()}") from None
    except Failure as failure:
        raise Failure(f"cannot read {source}: {failure}") from None


def _opened(source: str, place: str) -> IO[bytes]:
    """Open an archive that the caller may read. Data from a pipe is copied into a file first."""
    from .unpack import free

    with Caller():
        file = open(source, "rb")  # noqa: SIM115 it is the result
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    spool, most = open(os.path.join(place, "archive"), "w+b"), free(place)  # noqa: SIM115
    os.unlink(spool.name)
    with file:
        for block in iter(lambda: file.read(1 << 18), b""):
            most -= spool.write(block)
            if most < 0:
                raise Failure("no space left for it")
    spool.flush()
    return spool


def _remove(image: Image) -> None:
    """Remove the state directory's own image, otherwise the shared one."""
    if not os.path.isdir(image.rootfs):
        if store.current(image.stored) is None:
            raise Failure(f"image {image} does not exist")
        store.remove(image.stored, str(image))
        return
    gone = os.path.join(images.folder(), image.key + NEW)  # handled as an unfinished image
    with Lock(gone + LOCK):
        remove(gone)
        with everything():  # machines get their records under this lock
            users = [m.name for m in machines() if m.fields.get("image") == image.key]
            if users:
                raise Failure(f"image {image} is in use by {', '.join(users)}")
            os.rename(os.path.dirname(image.rootfs), gone)
        remove(gone)


def _save(image: Image, path: str) -> None:
    """Write it as an archive that the caller owns and `add` accepts, on another host or in CI."""
    from . import archives, things
    from .bases import local

    base = local(image)
    if base is None:
        raise Failure(f"image {image} does not exist")
    with Caller():
        file = open(path, "wb")  # noqa: SIM115 only open() needs the caller's rights
    with file, folder(base.path) as root:
        packed = archives.ZstdWriter(file)
        with contextlib.closing(archives.writing(packed)) as archive:
            packer = archives.Packer(archive, things.IMAGE)
            for thing in things.things_in(root):
                packer.put(".", thing)
        packed.finish()
