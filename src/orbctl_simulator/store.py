"""The images that all state directories share, in the cache.

``images/KEY/SERIAL/.files``   the files below machines' layers; never changed once it exists
``images/KEY/SERIAL/image``    its record
``images/KEY/SERIAL/layers``   what it lacks, see `layers`
``images/KEY/SERIAL/users``    a file for each machine created from it, with its directory
``images/KEY/current``         a link to the SERIAL that new machines get
``images/KEY.new.lock``        held by the process that creates, completes or removes KEY
``images/KEY.new``             an unfinished image; if the lock is free, a killed call left it
``images/KEY.SHA.part``        a download that can be resumed
``failed/NAME``                why an image was recently not available
"""

from __future__ import annotations

import os
import time

from .light import is_name, suppress
from .state import FILES, Failure, Lock, cache, read_fields, say, write_fields
from .sweeping import LOCK, NEW
from .trees import remove as remove_tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_REMEMBERED = 3600  # seconds that a failure is remembered
_PART_KEPT = 7 * 86400  # seconds that an incomplete download is kept


class Image:
    """One version of an image, according to its directory."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.key, self.serial = path.split(os.sep)[-2:]
        self.fields = read_fields(os.path.join(path, "image"))

    @property
    def rootfs(self) -> str:
        return os.path.join(self.path, FILES)

    @property
    def name(self) -> str:
        """Its name in a machine's record."""
        return f"{self.key}@{self.serial}"

    def half_layers(self) -> list[str]:
        """Layers that a killed call did not finish."""
        place = os.path.join(self.path, "layers")
        found = []
        for name in os.listdir(place) if os.path.isdir(place) else ():
            if name.endswith(NEW):
                with Lock(os.path.join(place, name + LOCK), wait=False) as lock:
                    if lock.held:
                        found.append(os.path.join(place, name))
        return found

    def users(self) -> list[str]:
        """The directories of the machines that use it, in any state directory."""
        folder = os.path.join(self.path, "users")
        found = []
        for entry in sorted(os.listdir(folder)):
            with suppress(OSError, KeyError):
                with open(os.path.join(folder, entry), errors="surrogateescape") as file:
                    path = file.read()
                if read_fields(os.path.join(path, "machine"))["image"] == self.name:
                    found.append(path)
                    continue
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(folder, entry))
        return found


def folder() -> str:
    return os.path.join(cache(), "images")


def place(name: str) -> str:
    """The directory of one version, by its name in a machine's record."""
    key, at, version = name.partition("@")
    if not (at and is_name(key) and is_name(version)):
        raise Failure(f"not the name of an image: '{name}'")
    return os.path.join(folder(), *name.split("@"))


def current(key: str) -> Image | None:
    """The version that a new machine gets."""
    try:
        return Image(os.path.realpath(os.path.join(folder(), key, "current")))
    except (FileNotFoundError, NotADirectoryError):
        return None


def everything() -> list[Image]:
    """All images, each in its current version."""
    try:
        names = sorted(os.listdir(folder()))
    except FileNotFoundError:
        return []
    return [image for image in map(current, names) if image]


def _versions(key: str) -> Iterator[Image]:
    place = os.path.join(folder(), key)
    for serial in sorted(os.listdir(place)) if os.path.isdir(place) else ():
        if serial != "current":
            with suppress(FileNotFoundError):
                yield Image(os.path.join(place, serial))


def registry() -> Lock:
    """The lock on which machines use which image, never held for long."""
    os.makedirs(folder(), mode=0o700, exist_ok=True)
    return Lock(os.path.join(folder(), "lock"))


def hold(name: str, machine: str) -> None:
    """Record that a machine uses an image, so that the image is not removed.

    The machine's own record already says so; without that, the entry has no effect.
    """
    path = place(name)
    with registry():
        if not os.path.isdir(path):
            raise Failure(f"image {name} no longer exists: try again")
        entry = os.path.join(path, "users", os.path.basename(machine))
        with open(entry, "w", errors="surrogateescape") as file:
            file.write(machine)


class _PatientLock(Lock):
    """Waits for processes that only look at an image, not for one that creates it."""

    def __init__(self, path: str) -> None:
        super().__init__(path, wait=False)

    def __enter__(self) -> Lock:
        for _ in range(20):
            if super().__enter__().held:
                break
            self.__exit__()
            time.sleep(0.02)
        else:
            super().__enter__()
        return self


class Draft:
    """An unfinished image, which exists only once it is published."""

    def __init__(self, key: str, shown: str) -> None:
        os.makedirs(folder(), mode=0o700, exist_ok=True)
        self.key, self._shown, self._base = key, shown, os.path.join(folder(), key)
        self.path = self._base + NEW
        self.rootfs = os.path.join(self.path, FILES)
        self._lock: Lock = _PatientLock(self._base + NEW + LOCK)

    def __enter__(self) -> Draft:
        if not self._lock.__enter__().held:
            say(f"{self._shown}: waiting for another process that is creating it")
            self._lock.__exit__()
            self._lock = Lock(self._base + NEW + LOCK)
            self._lock.__enter__()
        _settle(self.key)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            discard(self.path)
        finally:
            self._lock.__exit__()

    def clear(self) -> None:
        """Start with nothing."""
        discard(self.path)
        os.makedirs(self.rootfs, mode=0o755)
        os.mkdir(os.path.join(self.path, "users"))
        os.chmod(self.path, 0o700)

    def part(self, sha256: str) -> str:
        """The path of its download. Downloads of other files are removed."""
        mine = f"{self.key}.{sha256[:16]}.part"
        _drop_parts(self.key, mine)
        return os.path.join(folder(), mine)

    def publish(self, serial: str, fields: dict[str, str]) -> Image:
        write_fields(os.path.join(self.path, "image"), fields)
        taken = {"current", *(image.serial for image in _versions(self.key))}
        names = (serial, *(f"{serial}-{number}" for number in range(1, 1000)))
        serial = next(name for name in names if name not in taken)
        os.makedirs(self._base, mode=0o700, exist_ok=True)
        os.rename(self.path, os.path.join(self._base, serial))
        _settle(self.key, serial)
        image = current(self.key)
        assert image is not None
        return image


def _settle(key: str, serial: str = "") -> None:
    """Make one version the current one; remove those that no machine uses anymore.

    A killed call may have left a finished version that is not current yet.
    """
    base = os.path.join(folder(), key)
    if not serial and current(key) is None:
        serial = max((image.serial for image in _versions(key)), default="")
    if serial:
        with suppress(FileNotFoundError):
            os.unlink(base + ".link")
        os.symlink(serial, base + ".link")
        os.replace(base + ".link", os.path.join(base, "current"))
    kept = current(key)
    with registry():
        for image in _versions(key):
            if kept and image.serial != kept.serial and not image.users():
                discard(image.path)
                continue
            for layer in image.half_layers():
                discard(layer)


def _drop_parts(key: str, kept: str = "") -> None:
    for name in os.listdir(folder()):
        if name.startswith(key + ".") and name.endswith(".part") and name != kept:
            os.unlink(os.path.join(folder(), name))


def remove(key: str, shown: str) -> None:
    """Remove all versions, unless a machine uses one of them."""
    with _PatientLock(os.path.join(folder(), key + NEW + LOCK)) as lock:
        if not lock.held:
            raise Failure(f"image {shown} is being created by another process: try again later")
        with registry():
            users = [path for image in _versions(key) for path in image.users()]
            if users:
                raise Failure(f"image {shown} is in use by {_shown_users(users)}")
            discard(os.path.join(folder(), key))
        _drop_parts(key)
        discard(os.path.join(folder(), key + NEW))


def _shown_users(paths: list[str]) -> str:
    """Machines by name, and their state directories."""
    homes: dict[str, list[str]] = {}
    for path in paths:
        name = read_fields(os.path.join(path, "machine"))["name"]
        homes.setdefault(os.path.dirname(os.path.dirname(path)), []).append(name)
    return "; ".join(f"{', '.join(names)} of {home}" for home, names in homes.items())


def sweep() -> None:
    """Remove what killed calls left."""
    try:
        names = os.listdir(folder())
    except FileNotFoundError:
        return
    for name in names:
        path = os.path.join(folder(), name)
        if name.endswith(".trash"):
            remove_tree(path)
        elif name.endswith(".part"):
            with suppress(FileNotFoundError):
                if time.time() - os.stat(path).st_mtime > _PART_KEPT:
                    os.unlink(path)
        elif os.path.isdir(path):
            key = name[: -len(NEW)] if name.endswith(NEW) else name
            with Lock(os.path.join(folder(), key + NEW + LOCK), wait=False) as lock:
                if lock.held and key != name:
                    discard(path)
                elif lock.held:
                    _settle(key)


def discard(path: str) -> None:
    """Hide it in one step, then remove it."""
    trash = os.path.join(folder(), f"{os.path.basename(path)}.{os.getpid()}.{time.time_ns()}.trash")
    try:
        os.rename(path, trash)
    except FileNotFoundError:
        return
    remove_tree(trash)


def remember(name: str, reason: str) -> None:
    """Record that something was not available, so that the next call does not wait for it."""
    os.makedirs(os.path.join(cache(), "failed"), mode=0o700, exist_ok=True)
    write_fields(_note(name), {"reason": " ".join(reason.split())})


def recall(name: str) -> str:
    """Why it was not available within the last hour, or nothing."""
    try:
        age = time.time() - os.stat(_note(name)).st_mtime
        return read_fields(_note(name))["reason"] if 0 <= age < _REMEMBERED else ""
    except (FileNotFoundError, KeyError):
        return ""


def forget(name: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(_note(name))


def _note(name: str) -> str:
    from hashlib import sha256

    return os.path.join(cache(), "failed", sha256(os.fsencode(name)).hexdigest()[:16])
