"""Layers with what a base lacks, below new machines, and a machine's own layer."""

from __future__ import annotations

import os
import select
import stat

from . import parts, store, stored
from .account import Account
from .boot import Boot
from .door import Door, exit_code
from .light import suppress
from .packages import wait_for_packages
from .state import FILES, SYSTEM_CACHE, Failure, Lock, Machine, cache, say, shown
from .sweeping import LOCK, NEW
from .things import LAYER, OPAQUE, copy
from .trees import Descent, folder, remove

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import IO

_CLUTTER = (
    *("etc/hostname", "etc/hosts", "etc/resolv.conf", "opt/orbstack-guest"),
    *("tmp", "run", "root", "home", "dev", "var/cache", "var/log", "var/tmp", "var/lib/apt/lists"),
    *("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info"),
)
_MOST_LOG = 1 << 20


def over(base: str, image: str, title: str, wanted: Iterable[str]) -> list[str]:
    """The names of the layers over a base for `wanted`; builds those that do not exist.

    `image` is the base's name in a machine's record, `title` its name in messages. No layer can be
    stacked on the host's root: the kernel rejects a layer inside another one, and everything is
    inside ``/``. In this case, the layer is copied into each new machine.
    """
    missing = parts.lacking(base, wanted)
    if not missing:
        return []
    manager, what = parts.manager(base), " and ".join(missing)
    if manager is None:
        raise Failure(f"{title} has no {what}, and no supported package manager")
    name = "+".join(missing) + _mark(base, image, manager)
    layer = place(image, name)
    if not os.path.isdir(layer):
        os.makedirs(os.path.dirname(layer), mode=0o700, exist_ok=True)
        with Lock(layer + NEW + LOCK):
            if not os.path.isdir(layer):
                say(f"{title} has no {what}: installing it once, with {manager}")
                reason = _build(base, image, manager, missing, layer)
                if reason:
                    raise Failure(f"{what} could not be installed in {title}: {reason}")
    return [name]


def place(image: str, name: str) -> str:
    """The directory of a layer: with its image if that is shared, otherwise in the cache."""
    if not name or "/" in name or name.startswith("."):
        raise Failure(f"not the name of a layer: '{shown(name)}'")
    if "@" in image:
        return os.path.join(store.place(image), "layers", name)
    return os.path.join(cache(), name)


def files(image: str, name: str) -> str:
    return os.path.join(place(image, name), FILES)


def _mark(base: str, image: str, manager: str) -> str:
    """Distinguishes a base's layers from those of its earlier content and of its namesakes."""
    from hashlib import sha256

    if "@" in image:
        return ""
    database = parts.MANAGERS[manager].database
    state = parts.status(base, database)
    told = f"3 {image} {database}"
    if state:
        told += f" {state.st_size} {state.st_mtime_ns}"
    return "-" + sha256(os.fsencode(told)).hexdigest()[:16]


def _build(base: str, image: str, manager: str, missing: list[str], layer: str) -> str:
    """Install it in a machine that is never finished, and keep the changes. Returns an error."""
    from .unpack import tidy

    building = layer + NEW
    remove(building)
    machine = Machine(building, {"name": "layer", "user": "root", "image": image})
    words = [parts.MANAGERS[manager].script, "sh", *parts.MANAGERS[manager].packages(missing)]
    try:
        lay_out(machine)
        hide_private(machine)
        _share_resolver(machine.upper)
        wait_for_packages(base)
        with Boot(machine):
            code = _install(machine, words)
        if code != 0:
            log = layer + ".log"
            os.replace(machine.file("log"), log)
            with open(log, errors="replace") as file:
                lines = [line.strip() for line in file if line.strip()] or ["no output"]
            return f"{shown(lines[-1])} (full log: {log})"
        with folder(machine.upper) as upper:
            for path in _CLUTTER:
                _remove_below(upper, path)
        tidy(machine.upper, whole=False)
        os.rename(machine.file(FILES), machine.file("all"))
        os.rename(machine.file("all/upper"), machine.file(FILES))
        for name in os.listdir(building):
            if name != FILES:
                remove(os.path.join(building, name))
        os.rename(building, layer)
        return ""
    finally:
        remove(building)


def _share_resolver(upper: str) -> None:
    """Use the host's resolver during the installation; the layer does not keep it."""
    try:
        with open("/etc/resolv.conf", encoding="utf-8", errors="replace") as file:
            text = file.read()
    except OSError:
        return
    os.mkdir(os.path.join(upper, "etc"), 0o755)
    with open(os.path.join(upper, "etc/resolv.conf"), "w", encoding="utf-8") as file:
        file.write(text)


def _remove_below(root: int, path: str) -> None:
    """Remove what is at a path, unless a part of the path is a link."""
    *folders, name = path.split("/")
    descent = Descent(root)
    try:
        remove(name, descent.to(folders))
    except Failure:
        pass
    finally:
        descent.close()


def _install(machine: Machine, words: list[str]) -> int:
    """Run it with a pipe for its output, because a machine must not get a file of the host."""
    proxies = {k: v for k, v in os.environ.items() if k.lower().endswith("_proxy")}
    door = Door.of(machine)
    reader, writer = os.pipe()
    null = door.open_device("dev/null", (1, 3))

    def work() -> int:
        root = Account("root")
        env = {**root.environment(), **proxies}
        return door.carry_out(root, ["/bin/sh", "-c", *words], env)

    pid = door.fork(work, streams={0: null, 1: writer, 2: writer})
    os.close(writer)
    os.close(null)
    with open(machine.file("log"), "wb", buffering=0) as log:
        _write_log(reader, pid, log)
    os.close(reader)
    return exit_code(os.waitpid(pid, 0)[1])


def _write_log(reader: int, pid: int, log: IO[bytes]) -> None:
    """Log output until a process has exited, whatever it leaves running, up to a limit."""
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
    """Create the directories of a machine. Before it is started, `hide_private` is needed."""
    os.makedirs(machine.path, mode=0o700, exist_ok=True)
    machine.save()
    os.mkdir(machine.file(FILES), 0o700)
    for name in ("upper", "work", "root"):
        os.mkdir(machine.file(f"{FILES}/{name}"), 0o755)
    for name in ("", "/upper", "/work", "/root") if machine.boots else ():
        stored.give_to_root(machine.file(FILES + name))
    if "@" in machine.fields.get("image", ""):
        store.hold(machine.fields["image"], machine.path)


def fill(machine: Machine, source: str) -> None:
    """Copy everything of another layer, with its owners, links, marks and whiteouts."""
    try:
        with folder(source) as theirs, folder(machine.upper) as ours:
            copy(theirs, ours, LAYER)
    except OSError as error:
        raise Failure(f"cannot copy {source}: {error.strerror}") from None


def fill_plain(machine: Machine, source: str) -> None:
    """Copy files whose owners are those that they should have in the machine."""
    if machine.boots:
        stored.with_plain_owners(machine.upper, lambda: fill(machine, source))
    else:
        fill(machine, source)


def seed(machine: Machine, user_data: bytes | None = None) -> None:
    """Give a booted machine cloud-init's data; a clone already has its user data."""
    from .cloud import put_seed

    def work() -> None:
        with folder(machine.upper) as upper:
            put_seed(upper, user_data, machine.id, machine.name)

    stored.with_plain_owners(machine.upper, work)


def hide_private(machine: Machine) -> None:
    """Hide the host's own ``/root``, ``/home`` and root's cache, whatever the layer contains.

    Mounts hide a user's directories elsewhere, but the machine can see those mounts.
    """
    if machine.base != "/":
        return
    with folder(machine.upper) as layer:
        _remove_cache(machine, layer)
        for name, mode in (("root", 0o700), ("home", 0o755)):
            with suppress(FileExistsError):
                os.mkdir(name, mode, dir_fd=layer)
                if machine.boots:
                    stored.give_to_root(name, layer)
            try:
                fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=layer)
            except OSError:
                continue  # a file or a link also hides it
            try:
                os.setxattr(fd, OPAQUE, b"y")
            except OSError as error:
                raise Failure(
                    f"this host cannot hide its {name} in {machine.path} ({error.strerror}): put"
                    " ORBCTL_SIMULATOR_HOME on ext4, xfs, btrfs or a tmpfs"
                ) from None
            finally:
                os.close(fd)


def _remove_cache(machine: Machine, layer: int) -> None:
    """Hide it as if the machine's root had removed it."""
    *folders, name = SYSTEM_CACHE.strip("/").split("/")
    if os.path.realpath(SYSTEM_CACHE) != SYSTEM_CACHE:
        return
    place = os.dup(layer)
    try:
        for folder_name in folders:
            with suppress(FileExistsError):
                os.mkdir(folder_name, 0o755, dir_fd=place)
                if machine.boots:
                    stored.give_to_root(folder_name, place)
            inner = os.open(folder_name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=place)
            os.close(place)
            place = inner
        os.mknod(name, stat.S_IFCHR, dir_fd=place)
    except OSError:
        pass  # the machine has something else there
    finally:
        os.close(place)
