"""What a base lacks for a deploy, sudo that is, in a layer that new machines start with."""

from __future__ import annotations

import contextlib
import os
import select

from .account import Account
from .boot import Boot
from .door import Door, exit_code
from .images import inside
from .packages import wait_for_packages
from .state import FILES, Failure, Lock, Machine, cache, say, shown
from .sweeping import LOCK, NEW
from .things import LAYER, OPAQUE, copy
from .trees import Descent, folder, remove

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO

# How to install sudo, by the program that does it, and the file that tells the packages' state.
_INSTALLERS = {
    "apt-get": (
        "var/lib/dpkg/status",
        "export DEBIAN_FRONTEND=noninteractive; set -- install -y -q --no-install-recommends sudo;"
        ' apt-get "$@" || { apt-get update -q && apt-get "$@"; }',
    ),
    "dnf": ("var/lib/rpm", "dnf install -y sudo"),
    "yum": ("var/lib/rpm", "yum install -y sudo"),
    "zypper": ("var/lib/rpm", "zypper -n install sudo"),
    "apk": ("lib/apk/db/installed", "apk add sudo"),
    "pacman": ("var/lib/pacman/local", "pacman -Sy --noconfirm sudo"),
    "xbps-install": ("var/db/xbps", "xbps-install -Sy sudo"),
}
_CLUTTER = (
    *("etc/hostname", "etc/hosts", "opt/orbstack-guest", "tmp", "run", "root", "home"),
    *("var/cache", "var/log", "var/tmp", "var/lib/apt/lists"),
    *("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info"),
)
_MOST_LOG = 1 << 20


def seed(base: str, image: str) -> str | None:
    """A directory with what `base` lacks for a deploy, or nothing when it lacks nothing.

    It is copied into each new machine, not stacked under it: the kernel refuses a layer that
    lies inside another one, and below the host's root everything does.
    """
    seen = _look() if base == "/" else inside(base, _look)
    has_sudo, program, state = (seen + "\n\n").split("\n")[:3]
    if has_sudo:
        return None
    if not program:
        raise Failure(f"{base} has no sudo, and no package manager that is known here")
    place = os.path.join(cache(), _key(image, state))
    if not os.path.isdir(place):
        os.makedirs(cache(), mode=0o700, exist_ok=True)
        with Lock(place + NEW + LOCK):
            if not os.path.isdir(place):
                _build(base, image, program, place)
    return os.path.join(place, FILES)


def _look() -> str:
    if os.path.exists("/usr/bin/sudo"):
        return "sudo"
    for program, (database, _) in _INSTALLERS.items():
        is_there = any(os.path.exists(f"/{place}/{program}") for place in ("usr/bin", "sbin"))
        if is_there and os.path.exists(f"/{database}"):
            status = os.stat(f"/{database}")
            return f"\n{program}\n{database} {status.st_size} {status.st_mtime_ns}"
    return ""


def _key(image: str, state: str) -> str:
    from hashlib import sha256

    return "sudo-" + sha256(os.fsencode(f"2 {image} {state}")).hexdigest()[:16]


def _build(base: str, image: str, program: str, place: str) -> None:
    """Install sudo in a machine that is never committed, and keep what that changed."""
    say(f"{base} has no sudo: installing it once, with {program}, into {place}")
    building = place + NEW
    remove(building)
    machine = Machine(building, {"name": "layer", "user": "root", "image": image})
    try:
        lay_out(machine)
        wait_for_packages(base)
        with Boot(machine):
            code = _install(machine, _INSTALLERS[program][1])
        if code != 0:
            log = place + ".log"
            os.replace(machine.file("log"), log)
            with open(log, errors="replace") as file:
                lines = [line.strip() for line in file if line.strip()] or ["no output"]
            last = shown(lines[-1])
            raise Failure(f"sudo could not be installed in {base}: {last} (all of it: {log})")
        with folder(machine.upper) as layer:
            for path in _CLUTTER:
                _remove_below(layer, path)
        os.rename(machine.file(FILES), machine.file("all"))
        os.rename(machine.file("all/upper"), machine.file(FILES))
        for name in os.listdir(building):
            if name != FILES:
                remove(os.path.join(building, name))
        os.rename(building, place)
    finally:
        remove(building)


def _remove_below(root: int, path: str) -> None:
    """Remove what a path without links leads to, and nothing when there is a link on it."""
    *folders, name = path.split("/")
    descent = Descent(root)
    with contextlib.suppress(Failure), contextlib.closing(descent):
        remove(name, descent.to(folders))


def _install(machine: Machine, script: str) -> int:
    """Its output comes through a pipe: a machine gets no file of the host's."""
    proxies = {k: v for k, v in os.environ.items() if k.lower().endswith("_proxy")}
    door = Door(machine)
    reader, writer = os.pipe()
    null = door.open_device("dev/null", (1, 3))

    def work() -> int:
        root = Account("root")
        env = {**root.environment(), **proxies}
        return door.carry_out(root, ["/bin/sh", "-c", script], env)

    pid = door.fork(work, streams={0: null, 1: writer, 2: writer})
    os.close(writer)
    os.close(null)
    with open(machine.file("log"), "wb", buffering=0) as log:
        _write_log(reader, pid, log)
    os.close(reader)
    return exit_code(os.waitpid(pid, 0)[1])


def _write_log(reader: int, pid: int, log: IO[bytes]) -> None:
    """What comes until a process has ended, whatever it leaves running; not more than so much."""
    ended, poll = os.pidfd_open(pid), select.poll()
    for fd in (reader, ended):
        poll.register(fd, select.POLLIN)
    while True:
        ready = {fd for fd, _ in poll.poll()}
        data = os.read(reader, 1 << 16) if reader in ready else b""
        log.write(data)
        if log.tell() > _MOST_LOG:
            log.seek(0)
            log.truncate()
        if not data and reader in ready:
            poll.unregister(reader)
        if not data and ended in ready:
            break
    os.close(ended)


def lay_out(machine: Machine) -> None:
    """The directories of a machine."""
    os.makedirs(machine.path, mode=0o700, exist_ok=True)
    machine.save()
    os.mkdir(machine.file(FILES), 0o700)
    for name in ("upper", "work", "root"):
        os.mkdir(machine.file(f"{FILES}/{name}"), 0o755)
    hide_private(machine)


def fill(machine: Machine, source: str) -> None:
    """Copy everything of another layer, with its owners, links, marks and whiteouts."""
    try:
        with folder(source) as theirs, folder(machine.upper) as ours:
            copy(theirs, ours, LAYER)
    except OSError as error:
        raise Failure(f"cannot copy {source}: {error.strerror}") from None


def hide_private(machine: Machine) -> None:
    """Let none of the host's own ``/root`` and ``/home`` show through, whatever the layer has."""
    if machine.base != "/":
        return
    with folder(machine.upper) as layer:
        for name, mode in (("root", 0o700), ("home", 0o755)):
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, mode, dir_fd=layer)
            try:
                fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=layer)
            except OSError:
                continue  # a file or a link hides it, too
            try:
                os.setxattr(fd, OPAQUE, b"y")
            except OSError as error:
                raise Failure(
                    f"this host cannot hide its {name} in {machine.path} ({error.strerror}): put"
                    " ORBCTL_SIMULATOR_HOME on ext4, xfs, btrfs or a tmpfs"
                ) from None
            finally:
                os.close(fd)
