"""What machines are created from: a root file system by name, or this host's root.

OrbStack has an image for every distribution. If the simulator has none, a machine uses the host's
root, and one line says so. Nothing is faked: ``/etc/os-release`` in a machine is its real base's.
"""

from __future__ import annotations

import os

from . import store
from .light import is_name
from .state import FILES, Failure, home
from .sweeping import NEW
from .values import ARCHES, VARIANTS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# The names that OrbStack accepts, its default version first; numbers are read back as codenames.
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
#: Where images are pulled from, or `HOST`.
VARIABLE = "ORBCTL_SIMULATOR_IMAGES"
#: `create` with this name uses the host's own root.
HOST = "host"
_ARCHES = {"x86_64": "amd64", "aarch64": "arm64"}


def host_arch() -> str:
    machine = os.uname().machine
    return _ARCHES.get(machine, machine)


class Image:
    """A requested image, with the names that OrbStack reports."""

    def __init__(
        self, spec: str, arch: str = "", new: bool = False, variant: str = "default"
    ) -> None:
        self.distro, _, version = spec.partition(":")
        self.arch, self.variant = arch or host_arch(), variant or "default"
        if self.arch not in ARCHES:
            raise Failure(f"unknown architecture: '{self.arch}'")
        if self.variant not in VARIANTS:
            raise Failure(f"unknown variant: '{self.variant}'")
        self.is_host = self.distro == HOST and not new
        if self.is_host:
            if version or self.arch != host_arch():
                raise Failure(f"{HOST} is this host's own root: use it without a version")
            self.distro, self.version, _ = release()
            return
        known = DISTROS.get(self.distro)
        if known is None:
            raise Failure(f"unknown distro: '{self.distro}'")
        if not is_name(f"0{version}", ".-"):
            raise Failure(f"unknown version for {self.distro}: '{version}'")
        self.version = next(iter(known))
        if not version and not os.path.isdir(self.rootfs):
            ours = (name.split("_") for name in sorted(listed()))
            mine = (name[1] for name in ours if [name[0], name[2]] == [self.distro, self.arch])
            self.version = next(mine, self.version)
        if version:
            self.version = _codename(known, version)
            if not (new or self.version in known or self._is_here()):
                raise Failure(f"unknown version for {self.distro}: '{version}'")

    @property
    def key(self) -> str:
        return f"{self.distro}_{self.version}_{self.arch}"

    @property
    def rootfs(self) -> str:
        return os.path.join(folder(), self.key, FILES)

    @property
    def stored(self) -> str:
        """Its name among the shared images."""
        return f"{self.key}_{self.variant}"

    def _is_here(self) -> bool:
        return os.path.isdir(self.rootfs) or store.current(self.stored) is not None

    def is_like_host(self) -> bool:
        distro, version, _ = release()
        known = DISTROS.get(distro, {})
        here = (distro, _codename(known, version), host_arch())
        return here == (self.distro, self.version, self.arch)

    def __str__(self) -> str:
        kind = "" if self.variant == "default" else f", {self.variant}"
        return f"{self.distro}:{self.version} ({self.arch}{kind})"


def number(image: Image) -> str:
    """Its version as a number, if its codename has one."""
    return DISTROS.get(image.distro, {}).get(image.version, "")


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


def listed() -> list[str]:
    try:
        names = os.listdir(folder())
    except FileNotFoundError:
        return []
    return [
        name
        for name in names
        if not name.endswith(NEW) and os.path.isdir(os.path.join(folder(), name, FILES))
    ]


def folder() -> str:
    """The directory of the state directory's own images."""
    return os.path.join(home(), "images")


def inside(rootfs: str, look: Callable[[], str]) -> str:
    """Run `look` with a root file system as the root directory, so no link leads out of it."""
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


def has_shell(rootfs: str) -> bool:
    return inside(rootfs, lambda: "yes" if os.path.lexists("/bin/sh") else "") == "yes"
