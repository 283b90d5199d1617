"""What a root file system lacks, and what installs it: an init, D-Bus, sudo, cloud-init.

Each is looked for in the root's files. If nothing is missing, the network is not used.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_BINARIES = ("bin", "sbin", "usr/bin", "usr/sbin")
# Where each part is looked for.
_PLACES = {
    "init": (
        *("usr/lib/systemd/systemd", "lib/systemd/systemd", "sbin/openrc", "usr/sbin/openrc"),
        *("usr/bin/openrc", "usr/bin/runit-init", "sbin/runit-init", "lib/sysvinit/init"),
    ),
    "dbus": (
        *(f"{place}/dbus-daemon" for place in _BINARIES),
        *(f"{place}/dbus-broker" for place in _BINARIES),
    ),
    "sudo": tuple(f"{place}/sudo" for place in _BINARIES),
    "cloud-init": tuple(f"{place}/cloud-init" for place in _BINARIES),
}
_SYSTEMD = _PLACES["init"][:2]
#: A machine runs the first of these that exists as its process 1.
INITS = ("/sbin/init", "/usr/sbin/init", "/lib/systemd/systemd", "/usr/lib/systemd/systemd")
# In container images, this is the name of another program, or starts nothing.
_ANY_INIT = ("sbin/init", "usr/sbin/init")
PARTS = tuple(_PLACES)

_APT = """
export DEBIAN_FRONTEND=noninteractive
install() { apt-get install -y -q --no-install-recommends "$@"; }
install "$@" || { apt-get update -q && install "$@"; }"""


class _Manager:
    """A package manager: how it installs, and which packages contain the parts."""

    def __init__(self, script: str, database: str, init: str, dbus: str = "dbus") -> None:
        self.script, self.database = script, database
        self._packages = {"init": init, "dbus": dbus, "sudo": "sudo", "cloud-init": "cloud-init"}

    def packages(self, parts: Iterable[str]) -> list[str]:
        names = " ".join(self._packages[part] for part in parts)
        return names.split()


MANAGERS = {
    "apt-get": _Manager(_APT, "var/lib/dpkg/status", "systemd-sysv libpam-systemd"),
    "dnf": _Manager('dnf install -y "$@"', "var/lib/rpm", "systemd"),
    "yum": _Manager('yum install -y "$@"', "var/lib/rpm", "systemd"),
    "zypper": _Manager('zypper -n install "$@"', "var/lib/rpm", "systemd", "dbus-1"),
    "apk": _Manager('apk add "$@"', "lib/apk/db/installed", "openrc", ""),
    "pacman": _Manager('pacman -Sy --noconfirm "$@"', "var/lib/pacman/local", "systemd-sysvcompat"),
    "xbps-install": _Manager('xbps-install -Sy "$@"', "var/db/xbps", "runit-void", ""),
}


def lacking(rootfs: str, wanted: Iterable[str]) -> list[str]:
    """The wanted parts that a root lacks; only systemd requires a bus."""
    missing = [part for part in PARTS if part in wanted and not _has(rootfs, _PLACES[part])]
    is_systemd = _has(rootfs, _SYSTEMD) or "init" in missing
    name = manager(rootfs)
    if name is None and _has(rootfs, _ANY_INIT):
        missing = [part for part in missing if part != "init"]
        is_systemd = False
    if name is not None:
        return [part for part in missing if MANAGERS[name].packages([part])]
    return [part for part in missing if part != "dbus" or is_systemd]


def boots(rootfs: str) -> bool:
    """Whether there is an executable that a machine can run as its first process."""
    return _has(rootfs, (path.lstrip("/") for path in INITS))


def _has(rootfs: str, paths: Iterable[str]) -> bool:
    return any(status(rootfs, path) for path in paths)


def status(rootfs: str, path: str) -> os.stat_result | None:
    """The status of a path, unless one of its directories is a link."""
    *folders, name = path.split("/")
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
    place = os.open(rootfs, flags)
    try:
        for folder in folders:
            inner = os.open(folder, flags, dir_fd=place)
            os.close(place)
            place = inner
        return os.stat(name, dir_fd=place, follow_symlinks=False)
    except OSError:
        return None
    finally:
        os.close(place)


def manager(rootfs: str) -> str | None:
    """The name of its package manager, if it is a supported one."""
    for name in MANAGERS:
        if _has(rootfs, [f"{place}/{name}" for place in _BINARIES]):
            return name
    return None
