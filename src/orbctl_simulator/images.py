"""What machines are made of: this host's root, or a root file system given by name.

OrbStack downloads an image for every distribution; here a deploy meets what the host has, and
is told so. Nothing is faked: ``/etc/os-release`` in a machine is that of its real base.
"""

from __future__ import annotations

import os
import re
import shutil

from .boot import Boot
from .enter import Account, Door, execute, exit_code
from .state import Failure, Lock, Machine, cache, everything, home, machines, say

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .cli import Options

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

# How to install sudo, by the program that does it, and the file that tells the packages' state.
_INSTALLERS = (
    (
        "apt-get",
        "var/lib/dpkg/status",
        "export DEBIAN_FRONTEND=noninteractive; set -- install -y -q --no-install-recommends sudo;"
        ' apt-get "$@" || { apt-get update -q && apt-get "$@"; }',
    ),
    ("dnf", "var/lib/rpm", "dnf install -y sudo"),
    ("yum", "var/lib/rpm", "yum install -y sudo"),
    ("zypper", "var/lib/rpm", "zypper -n install sudo"),
    ("apk", "lib/apk/db/installed", "apk add sudo"),
    ("pacman", "var/lib/pacman/local", "pacman -Sy --noconfirm sudo"),
    ("xbps-install", "var/db/xbps", "xbps-install -Sy sudo"),
)
_CLUTTER = (
    *("etc/hostname", "etc/hosts", "opt/orbstack-guest", "tmp", "run", "root", "home"),
    *("var/cache", "var/log", "var/tmp", "var/lib/apt/lists"),
    *("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info"),
)


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
        return os.path.join(home(), "images", self.key, "rootfs")

    @property
    def base(self) -> str:
        """The directory that takes its place: its own root file system, else the host's root."""
        return self.rootfs if os.path.isdir(self.rootfs) else "/"

    def is_there(self) -> bool:
        return self.base != "/" or (self.arch == host_arch() and self._is_host())

    def _is_host(self) -> bool:
        distro, version, _ = release("/")
        known = DISTROS.get(distro, {})
        return distro == self.distro and _codename(known, version) == self.version

    def __str__(self) -> str:
        return f"{self.distro}:{self.version} ({self.arch})"


def _codename(known: dict[str, str], version: str) -> str:
    numbered = (name for name, number in known.items() if number and number == version)
    return next(numbered, version)


def release(root: str) -> tuple[str, str, str]:
    """Distribution, version and name of a root file system."""
    fields: dict[str, str] = {}
    for name in ("etc/os-release", "usr/lib/os-release"):
        path = os.path.join(root, name)
        if os.path.isfile(path):
            with open(path, encoding="utf-8", errors="replace") as file:
                pairs = (line.strip().partition("=") for line in file)
                fields = {key: value.strip("\"'") for key, _, value in pairs}
            break
    distro = {"almalinux": "alma", "ol": "oracle"}.get(fields.get("ID", ""), fields.get("ID", ""))
    version = fields.get("VERSION_CODENAME") or fields.get("VERSION_ID", "")
    return distro, version, fields.get("PRETTY_NAME", "this host")


def seed(base: str) -> str | None:
    """A directory with what `base` lacks for a deploy, or nothing when it lacks nothing.

    It is copied into each new machine, not stacked under it: the kernel refuses a layer that
    lies inside another one, and below the host's root everything does.
    """
    if os.path.exists(os.path.join(base, "usr/bin/sudo")):
        return None
    for installer in _INSTALLERS:
        if any(os.path.exists(os.path.join(base, f, installer[0])) for f in ("usr/bin", "sbin")):
            break
    else:
        raise Failure(f"{base} has no sudo, and no package manager that is known here")
    program, database, script = installer
    layer = os.path.join(cache(), _key(base, database))
    if not os.path.isdir(layer):
        os.makedirs(cache(), mode=0o700, exist_ok=True)
        with Lock(layer + ".lock"):
            if not os.path.isdir(layer):
                _build_layer(base, program, script, layer)
    return layer


def _key(base: str, database: str) -> str:
    from hashlib import sha256

    state = os.stat(os.path.join(base, database))
    image = os.path.basename(os.path.dirname(base))  # whichever state folder it lies in
    told = f"1 {image} {database} {state.st_size} {state.st_mtime_ns}"
    return "sudo-" + sha256(os.fsencode(told)).hexdigest()[:16]


def _build_layer(base: str, program: str, script: str, layer: str) -> None:
    """Install sudo in a machine that is never committed, and keep what that changed."""
    say(f"{base} has no sudo: installing it once, with {program}, into {layer}")
    place = layer + ".build"
    shutil.rmtree(place, ignore_errors=True)
    machine = Machine(place, {"name": "layer", "user": "root"})
    lay_out(machine, base)
    log = os.path.join(place, "log")
    boot = Boot(machine)
    try:
        if _install(machine, script, log) != 0:
            with open(log, errors="replace") as file:
                lines = [line.strip() for line in file if line.strip()] or ["no output"]
            raise Failure(f"sudo could not be installed in {base}: {lines[-1]} (all of it: {log})")
    finally:
        boot.abandon()
    upper = machine.file("upper")
    for name in _CLUTTER:
        path = os.path.join(upper, name)
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        elif os.path.lexists(path):
            os.unlink(path)
    os.rename(upper, layer)
    shutil.rmtree(place, ignore_errors=True)


def _install(machine: Machine, script: str, log: str) -> int:
    proxies = {k: v for k, v in os.environ.items() if k.lower().endswith("_proxy")}
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)

    def work() -> None:
        os.setsid()
        root = Account("root")
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        execute(root, ["/bin/sh", "-c", script], {**root.environment(), **proxies}, False)

    pid = Door(machine).fork(work)
    os.close(output)
    return exit_code(os.waitpid(pid, 0)[1])


def lay_out(machine: Machine, base: str) -> None:
    """The directories of a machine, with the host's private ones hidden by opaque ones."""
    os.makedirs(machine.path, mode=0o700, exist_ok=True)
    machine.save()
    for name in ("upper", "work", "root"):
        os.mkdir(machine.file(name), 0o755)
    os.symlink(base, machine.file("base"))
    if base == "/":
        for name, mode in (("root", 0o700), ("home", 0o755)):
            path = os.path.join(machine.file("upper"), name)
            os.mkdir(path, mode)
            try:
                os.setxattr(path, "trusted.overlay.opaque", b"y")
            except OSError as error:
                raise Failure(
                    f"this host cannot hide its {name} in {machine.path} ({error.strerror}): put"
                    " ORBCTL_SIMULATOR_HOME on ext4, xfs, btrfs or a tmpfs"
                ) from None


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
    with everything():
        if verb == "add":
            _add(chosen, rest[1])
        else:
            _remove(chosen)
    return 0


def listed() -> list[str]:
    try:
        names = os.listdir(os.path.join(home(), "images"))
    except FileNotFoundError:
        return []
    return [name for name in names if not name.endswith(".new")]


def _add(image: Image, source: str) -> None:
    place = os.path.dirname(image.rootfs)
    new = place + ".new"
    shutil.rmtree(new, ignore_errors=True)
    if os.path.exists(place):
        raise Failure(f"image {image} is there already")
    os.makedirs(new, mode=0o700)
    rootfs = os.path.join(new, "rootfs")
    if os.path.isdir(source):
        command = ["cp", "-a", "--reflink=auto", "-T", "--", source, rootfs]
    else:
        os.mkdir(rootfs, 0o755)
        command = ["tar", "--xattrs", "--xattrs-include=*", "--numeric-owner", "-C", rootfs]
        command += ["-xpf", os.path.abspath(source)]
    done = os.waitpid(os.posix_spawnp(command[0], command, os.environ), 0)[1] == 0
    if not done or not os.path.lexists(os.path.join(rootfs, "bin/sh")):
        shutil.rmtree(new, ignore_errors=True)
        raise Failure(f"{source} is no root file system" if done else f"cannot read {source}")
    os.rename(new, place)


def _remove(image: Image) -> None:
    users = [machine.name for machine in machines() if machine.fields.get("image") == image.key]
    if users:
        raise Failure(f"image {image} is in use by {', '.join(users)}")
    if not os.path.isdir(image.rootfs):
        raise Failure(f"image {image} is not there")
    shutil.rmtree(os.path.dirname(image.rootfs))
