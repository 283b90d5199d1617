"""Images from the source that OrbStack uses: a simplestreams index, on a server or in a directory.

An index lists files and their checksums. It is trusted as far as its server is. No path in it may
lead elsewhere, and nothing of it is read without a limit.
"""

from __future__ import annotations

import os
import re
import stat
import time
from urllib.parse import quote

from . import web
from .state import Caller, Failure, why

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import IO, Any

    from .progress import Progress

DEFAULT = "https://images.linuxcontainers.org"
VARIABLE = "ORBCTL_SIMULATOR_IMAGES"
_INDEX = "streams/v1/index.json"
_FILE = "root.tar.xz"
_INDEX_SIZE, _PRODUCTS_SIZE, _FILE_SIZE = 1 << 20, 16 << 20, 16 << 30
_TRIES = 3
_BLOCK = 1 << 18

# The Linux Containers project's name for a distribution, and the variants that are its default.
_NAMES = {"alma": "almalinux", "arch": "archlinux", "rocky": "rockylinux", "void": "voidlinux"}
_DEFAULTS = {"gentoo": ("openrc", "systemd")}


class NotOffered(Failure):
    """The index has no such image."""


class Product:
    """The newest root file system of an image: its path, size and checksum."""

    def __init__(self, serial: str, path: str, size: int, sha256: str) -> None:
        self.serial, self.path, self.size, self.sha256 = serial, path, size, sha256


class Source:
    """Where images come from: a server, or a directory with the same files."""

    def __init__(self, told: str) -> None:
        told = told or DEFAULT
        self.is_web = told.startswith(("http://", "https://"))
        if not self.is_web and ("://" in told or not os.path.isdir(told)):
            raise Failure(f"{VARIABLE} must be a URL, a directory, none or host, not {told!r}")
        self._base = told[: -len(_INDEX)] if told.endswith(_INDEX) else told
        self._base = self._base.rstrip("/")

    def __str__(self) -> str:
        return web.shown(self._base)

    def reach(self) -> None:
        if self.is_web:
            web.reach(self._base)

    def read(self, path: str, most: int) -> bytes:
        _check_path(path)
        if self.is_web:
            return web.read(self._url(path), most)
        with self._open(path) as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise Failure(f"{path}: larger than {most >> 20} MB")
        return content

    def get(self, path: str, start: int) -> web.Answer | _File:
        _check_path(path)
        if self.is_web:
            return web.get(self._url(path), start)
        return _File(self._open(path), start)

    def _url(self, path: str) -> str:
        return f"{self._base}/{quote(path, safe='/:')}"

    def _open(self, path: str) -> IO[bytes]:
        """Open a file that the caller may read, and never a pipe, which would block."""
        place = os.path.join(self._base, path)
        try:
            with Caller():
                fd = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise web.Missing(f"{place}: {why(error).lower()}") from None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise Failure(f"{place}: not a file")
        return os.fdopen(fd, "rb")


class _File:
    """A file in a directory, with the interface of a server's answer."""

    left = 0

    def __init__(self, file: IO[bytes], start: int) -> None:
        self._file, self.start = file, start
        file.seek(start)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, count: int) -> bytes:
        return self._file.read(count)


def _check_path(path: str) -> None:
    parts = path.split("/")
    if "" in parts or "." in parts or ".." in parts or "\\" in path or not path.isprintable():
        raise Failure(f"the index contains a path outside its source: {web.shown(path)!r}")


def products(source: Source) -> dict[str, Any]:
    """All images that a source offers, by ``DISTRO:RELEASE:ARCH:VARIANT``."""
    found: dict[str, Any] = {}
    entries = _table(_decode(source.read(_INDEX, _INDEX_SIZE)), "index")
    for entry in list(entries.values())[:8]:
        if isinstance(entry, dict) and entry.get("datatype") == "image-downloads":
            path = entry.get("path")
            if not isinstance(path, str):
                raise Failure("decode index: it lists no file of images")
            found.update(_table(_decode(source.read(path, _PRODUCTS_SIZE)), "products"))
    return found


def _decode(content: bytes) -> Any:
    import json

    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "nested too deep"
        raise Failure(f"decode index: {web.shown(reason)}") from None


def _table(value: Any, name: str) -> dict[str, Any]:
    table = value.get(name) if isinstance(value, dict) else None
    if not isinstance(table, dict):
        raise Failure(f"decode index: no table {name!r} in it")
    return table


def find(
    offered: dict[str, Any], distro: str, version: str, number: str, arch: str, variant: str
) -> Product:
    """The newest version of an image, by its codename or number."""
    variants = (variant, *(_DEFAULTS.get(distro, ()) if variant == "default" else ()))
    for name in (_NAMES.get(distro, distro), distro):
        for release in filter(None, (version, number)):
            for kind in variants:
                product = offered.get(f"{name}:{release}:{arch}:{kind}")
                newest = _newest(product)
                if newest:
                    return newest
    raise NotOffered(f"no {distro}:{version} for {arch}, variant {variant}")


def _newest(product: Any) -> Product | None:
    versions = product.get("versions") if isinstance(product, dict) else None
    if not isinstance(versions, dict):
        return None
    for serial in sorted(versions, reverse=True):
        items = versions[serial].get("items") if isinstance(versions[serial], dict) else None
        for item in items.values() if isinstance(items, dict) else ():
            if isinstance(item, dict) and item.get("ftype") == _FILE:
                return _checked(serial, item)
    return None


def _checked(serial: str, item: dict[str, Any]) -> Product:
    path, count, digest = item.get("path"), item.get("size"), item.get("sha256")
    if not isinstance(path, str) or not isinstance(count, int) or not isinstance(digest, str):
        raise Failure(f"decode index: version {web.shown(serial)!r} lacks a path, size or sha256")
    _check_path(path)
    if not 0 < count <= _FILE_SIZE:
        raise Failure(f"decode index: {path} cannot be {count} bytes long")
    if not re.fullmatch("[0-9a-fA-F]{64}", digest):
        raise Failure(f"decode index: {path} has no sha256")
    plain = re.sub("[^A-Za-z0-9._-]", "", serial).strip("._-") or "0"
    return Product(plain[:40], path, count, digest.lower())


def listed(offered: dict[str, Any], arch: str) -> Iterator[tuple[str, str, str, Product]]:
    """The images for an architecture: distribution, release, variant, newest version."""
    ours = {name: distro for distro, name in _NAMES.items()}
    for key in sorted(offered):
        parts = key.split(":")
        if len(parts) != 4 or parts[2] != arch or not key.isprintable():
            continue
        newest = _newest(offered[key])
        if newest:
            yield ours.get(parts[0], parts[0]), parts[1], parts[3], newest


def download(source: Source, product: Product, part: str, progress: Progress) -> IO[bytes]:
    """Download the file and check it. Returns it, open at its start.

    An earlier call's download is resumed; if the checksum is then wrong, the download starts again
    from nothing.
    """
    resumed = _size(part)
    progress.step("downloading", product.size)
    while True:
        file = open(part, "a+b")  # noqa: SIM115 it is the result
        try:
            _fill(source, product, file, progress)
            if _sum(file) == product.sha256:
                file.seek(0)
                return file
        except BaseException:
            file.close()
            raise
        file.close()
        os.unlink(part)
        if not resumed:
            raise Failure(f"{source}/{product.path}: wrong checksum, not used")
        resumed = 0


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


def _fill(source: Source, product: Product, file: IO[bytes], progress: Progress) -> None:
    """Download what is missing. Reconnects as long as each connection makes progress."""
    fruitless = 0
    while True:
        had = file.seek(0, os.SEEK_END)
        if had >= product.size:
            file.truncate(product.size)
            return
        failure = Failure(f"{source}/{product.path}: shorter than its index says")
        try:
            ended = _append(source, product, file, progress)
        except web.Unreachable as error:
            ended, failure = False, error
        except web.Short:
            file.truncate(0)
            ended = True
        if ended and file.seek(0, os.SEEK_END) < product.size:
            raise failure
        fruitless = 0 if file.seek(0, os.SEEK_END) > had else fruitless + 1
        if fruitless == _TRIES:
            raise failure
        if not ended:
            time.sleep(0.3 * fruitless)


def _append(source: Source, product: Product, file: IO[bytes], progress: Progress) -> bool:
    """Returns whether the answer was complete."""
    count = file.seek(0, os.SEEK_END)
    with source.get(product.path, count) as answer:
        if answer.start != count:
            file.truncate(answer.start)
            count = answer.start
        while count < product.size:
            part = answer.read(min(_BLOCK, product.size - count))
            if not part:
                return answer.left == 0
            file.write(part)
            count += len(part)
            progress.reach(count)
    return True


def _sum(file: IO[bytes]) -> str:
    from hashlib import sha256

    told = sha256()
    file.seek(0)
    for block in iter(lambda: file.read(_BLOCK), b""):
        told.update(block)
    return told.hexdigest()
