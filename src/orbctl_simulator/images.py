"""What machines are made of: this host's root, or a root file system given by name.

OrbStack downloads an image for every distribution; here a deploy meets what the host has, and
is told so. Nothing is faked: ``/etc/os-release`` in a machine is that of its real base.
"""

from __future__ import annotations

import os
import re

from .state import FILES, Failure, Lock, everything, home, machines, say
from .sweeping import LOCK, NEW
from .trees import folder, remove

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .cli import Options
    from .trees import Parts

# The names that OrbStack knows, its default version first; numbers read back as codenames.
DISTROS: dict[str, dict[str, str]] = {
    "alma": {"10": "", "9": "", "8": ""},
    "alpine": {"3.23": "", "3.22": "", "3.21": "", "3.20": "", "edge": ""},
    "arch": {"current": ""},
    "centos": {"10-Stream": "10", "9-Stream": "9"},
    "debian": {"bookworm": "12", "trixie": "13", "bullseye": "11", "forky": "14", "sid": ""},
    "devuan": {"excalibur": "6", "daedalus": "5", "chimaera": "4"},
    "fedora": {"44": "", "43": "", "42": ""},
    "gentoo": {"current": ""},
    "kali": {"current": ""},
    "nixos": {"25.11": "", "25.05": "", "unstable": ""},
    "openeuler": {"24.03": "", "22.03": "", "20.03": ""},
    "opensuse": {"16.0": "", "15.6": "", "tumbleweed": ""},
    "oracle": {"10": "", "9": "", "8": ""},
    "rocky": {"10": "", "9": "", "8": ""},
    "ubuntu": {"resolute": "26.04", "questing": "25.10", "noble": "24.04", "jammy": "22.04"},
    "void": {"current": ""},
}
_ARCHES = {"x86_64": "amd64", "aarch64": "arm64"}


def host_arch() -> str:
    machine = os.uname().machine
    return _ARCHES.get(machine, machine)


class Image:
    """What was asked for, by the names OrbStack reads it back with."""

    def __init__(self, spec: str, arch: str = "", new: bool = False) -> None:
        self.distro, _, version = spec.partition(":")
        self.arch = arch or host_arch()
        if self.arch not in ("amd64", "arm64"):
            raise Failure(f"unknown architecture: '{self.arch}'")
        known = DISTROS.get(self.distro)
        if known is None:
            raise Failure(f"unknown distro: '{self.distro}'")
        if not re.fullmatch(r"[A-Za-z0-9.-]*", version):
            raise Failure(f"unknown version for {self.distro}: '{version}'")
        self.version = next(iter(known))
        if not version and not os.path.isdir(self.rootfs):
            ours = (name.split("_") for name in sorted(listed()))
            mine = (name[1] for name in ours if [name[0], name[2]] == [self.distro, self.arch])
            self.version = next(mine, self.version)
        if version:
            self.version = _codename(known, version)
            if not (new or self.version in known or os.path.isdir(self.rootfs)):
                raise Failure(f"unknown version for {self.distro}: '{version}'")

    @property
    def key(self) -> str:
        return f"{self.distro}_{self.version}_{self.arch}"

    @property
    def rootfs(self) -> str:
        return os.path.join(_folder(), self.key, FILES)

    @property
    def base(self) -> str:
        """The directory that takes its place: its own root file system, else the host's root."""
        return self.rootfs if os.path.isdir(self.rootfs) else "/"

    def is_there(self) -> bool:
        return self.base != "/" or (self.arch == host_arch() and self._is_host())

    def _is_host(self) -> bool:
        distro, version, _ = release()
        known = DISTROS.get(distro, {})
        return distro == self.distro and _codename(known, version) == self.version

    def __str__(self) -> str:
        return f"{self.distro}:{self.version} ({self.arch})"


def _codename(known: dict[str, str], version: str) -> str:
    numbered = (name for name, number in known.items() if number and number == version)
    return next(numbered, version)


def release() -> tuple[str, str, str]:
    """Distribution, version and name of this host."""
    fields: dict[str, str] = {}
    for path in ("/etc/os-release", "/usr/lib/os-release"):
        if os.path.isfile(path):
            with open(path, encoding="utf-8", errors="replace") as file:
                pairs = (line.strip().partition("=") for line in file)
                fields = {key: value.strip("\"'") for key, _, value in pairs}
            break
    distro = {"almalinux": "alma", "ol": "oracle"}.get(fields.get("ID", ""), fields.get("ID", ""))
    version = fields.get("VERSION_CODENAME") or fields.get("VERSION_ID", "")
    return distro, version, fields.get("PRETTY_NAME", "this host")


def image(options: Options, words: list[str]) -> int:
    """``image add NAME[:VERSION] ROOTFS``, ``image list``, ``image remove NAME[:VERSION]``."""
    verb, *rest = words
    if {"add": 2, "list": 0, "remove": 1}.get(verb) != len(rest):
        raise Failure("image: add NAME[:VERSION] ROOTFS, list, or remove NAME[:VERSION]")
    if verb == "list":
        for name in sorted(listed()):
            distro, version, arch = name.split("_")
            print(f"{distro}:{version}  {arch}")
        return 0
    chosen = Image(rest[0], options.text("arch"), new=True)
    if verb == "add":
        _add(chosen, rest[1])
    else:
        _remove(chosen)
    return 0


def listed() -> list[str]:
    try:
        names = os.listdir(_folder())
    except FileNotFoundError:
        return []
    return [
        name
        for name in names
        if not name.endswith(NEW) and os.path.isdir(os.path.join(_folder(), name, FILES))
    ]


def _folder() -> str:
    return os.path.join(home(), "images")


def _add(image: Image, source: str) -> None:
    place = os.path.join(_folder(), image.key)
    new = os.path.join(_folder(), image.key + NEW)
    os.makedirs(_folder(), mode=0o700, exist_ok=True)
    with Lock(new + LOCK):
        if os.path.lexists(place):
            raise Failure(f"image {image} is there already")
        remove(new)
        rootfs = os.path.join(new, FILES)
        try:
            os.mkdir(new, 0o700)  # whatever setuid programs there are in it
            os.mkdir(rootfs, 0o700)
            left = _copied(source, rootfs)
            if not _has_shell(rootfs):
                raise Failure(f"{source} is no root file system")
            os.rename(new, place)
        finally:
            remove(new)
    if left:
        say(f"left out {len(left)} device files of {source}: machines have their own")


def _copied(source: str, rootfs: str) -> set[Parts]:
    """Put a directory's or an archive's content there; what has no place in an image."""
    from . import archives, things

    with folder(rootfs) as target:
        if os.path.isdir(source):
            fd = os.open(source, os.O_RDONLY | os.O_DIRECTORY)
            try:
                return things.copy(fd, target, things.IMAGE)
            finally:
                os.close(fd)
        archives.limit_memory()
        writer = things.Writer(target, things.IMAGE)
        try:
            with archives.Plain(source, compressed=False) as plain:
                for thing in archives.members(archives.reading(plain, compressed=True)):
                    writer.put(thing)
            writer.finish()
        except Failure as failure:
            raise Failure(f"cannot read {source}: {failure}") from None
        finally:
            writer.close()
        return writer.left


def _has_shell(rootfs: str) -> bool:
    return inside(rootfs, lambda: "yes" if os.path.lexists("/bin/sh") else "") == "yes"


def inside(rootfs: str, look: Callable[[], str]) -> str:
    """What a look at a root file system shows where no link in it leads out of it."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.chroot(rootfs)
            os.chdir("/")
            os.write(writer, look().encode(errors="surrogateescape"))
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8", errors="surrogateescape") as file:
        seen = file.read()
    os.waitpid(pid, 0)
    return seen


def _remove(image: Image) -> None:
    gone = os.path.join(_folder(), image.key + NEW)  # half removed is as half made
    if not os.path.isdir(image.rootfs):
        raise Failure(f"image {image} is not there")
    with Lock(gone + LOCK):
        remove(gone)
        with everything():  # under it machines get their records
            users = [m.name for m in machines() if m.fields.get("image") == image.key]
            if users:
                raise Failure(f"image {image} is in use by {', '.join(users)}")
            os.rename(os.path.dirname(image.rootfs), gone)
        remove(gone)
