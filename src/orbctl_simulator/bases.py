"""The base below a machine's layer: an image with what it lacks, or this host's own root."""

from __future__ import annotations

import os

from . import images, layers, parts, store
from .state import FILES, Failure, home, shown, write_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from .images import Image


#: Whether new machines boot their image's init; if it is not set, they do if the host can.
VARIABLE = "ORBCTL_SIMULATOR_INIT"
IMAGE, NONE = "image", "none"


class Init:
    """What a new machine runs as its first process: its image's init, or nothing."""

    def __init__(self) -> None:
        #: One line for the user about it.
        self.note = ""
        told = os.environ.get(VARIABLE, "")
        if told not in ("", IMAGE, NONE):
            raise Failure(f"{VARIABLE} must be {IMAGE} or {NONE}, not '{told}'")
        self._is_must = told == IMAGE
        #: The value in a machine's record.
        self.kind = "" if told == NONE else IMAGE
        reason = self.kind and _reason_of_host()
        if reason:
            failure = Failure(f"this host cannot boot machines: {reason}")
            self.go_without(f"this host cannot boot it: {reason}", failure)

    @property
    def needs(self) -> tuple[str, ...]:
        """The parts that a machine's root needs for it, see `parts`."""
        return ("init", "dbus", "sudo") if self.kind else ("sudo",)

    def go_without(self, reason: str, failure: Failure) -> None:
        """Use no init, and note the reason. Fails if the user requires one, or none was wanted."""
        if self._is_must or not self.kind:
            raise failure
        self.kind = ""
        self.note = f"the machine has no init, as with {VARIABLE}={NONE}: {reason}"


def _reason_of_host() -> str:
    """Why this host cannot boot machines, or nothing. A success counts until the host reboots."""
    path = os.path.join(home(), "boots")
    with open("/proc/stat") as file:
        now = next((line for line in file if line.startswith("btime")), "")
    try:
        with open(path) as file:
            if file.read() == now:
                return ""
    except OSError:
        pass
    from .trial import reason_of_host

    reason = reason_of_host()
    if not reason:
        write_file(path, now)
    return reason


class Base:
    """A root file system, by its name in a machine's record, and the layers over it."""

    def __init__(self, image: str = "", names: Iterable[str] = ()) -> None:
        self.image, self.names = image, list(names)
        #: Layers that are copied into each machine, because they cannot be stacked here.
        self.copied: list[str] = []
        #: One line for the user about it.
        self.note = ""

    @property
    def path(self) -> str:
        if not self.image:
            return "/"
        if "@" in self.image:
            return os.path.join(store.place(self.image), FILES)
        if "/" in self.image or self.image.startswith("."):
            raise Failure(f"not the name of an image: '{shown(self.image)}'")
        return os.path.join(images.folder(), self.image, FILES)

    @property
    def layers(self) -> list[str]:
        return [layers.files(self.image, name) for name in self.names]

    @property
    def fields(self) -> dict[str, str]:
        """Its fields in a machine's record."""
        return {"image": self.image, "layers": "\t".join(self.names)}

    def complete(self, title: str, init: Init, *more: str) -> None:
        """Add layers with what it lacks, and build those that do not exist; see `parts`.

        If its own package manager cannot install an init, the machine has none.
        """
        try:
            names = layers.over(self.path, self.image, title, (*init.needs, *more))
            paths = [self.path, *(layers.files(self.image, name) for name in names)]
            if init.kind and not any(map(parts.boots, paths)):
                raise Failure(f"{title} has no init")
        except Failure as failure:
            init.go_without(str(failure), failure)
            names = layers.over(self.path, self.image, title, (*init.needs, *more))
        if self.image:
            self.names = names
        else:
            self.copied = [layers.files("", name) for name in names]

    def check(self) -> None:
        """Fail unless all of it exists."""
        for path in (self.path, *self.layers):
            if not os.path.isdir(path):
                raise Failure(f"its image is not available: {shown(self.image)}")


def base_for(image: Image, strict: bool, init: Init, cloud_init: bool = False) -> Base:
    """The base of a new machine: a local image, one that is pulled or built now, or the host.

    Anything that takes more than a moment shows its progress. If the image has no init, this fails
    if the user requires one; otherwise `init` goes without. With `cloud_init`, or for the variant
    `cloud`, it has cloud-init, which the host's own root never runs in a machine.
    """
    cloud = cloud_init or image.variant == "cloud"
    base = _found(image, strict, cloud)
    more = ("cloud-init",) if cloud else ()
    base.complete(str(image) if base.image else "this host", init, *more)
    return base


def _found(image: Image, strict: bool, cloud: bool) -> Base:
    if image.is_host:
        if cloud:
            raise Failure("no cloud-init in this host's own root: name an image instead")
        return Base()
    base, reasons = local(image), ""
    if base is None:
        base, reasons = _obtained(image)
    if base is not None:
        return base
    if _hosts_root_is_meant(image) and not cloud:
        return Base()
    return _instead(image, strict, cloud, reasons)


def local(image: Image) -> Base | None:
    """The state directory's own image comes first, whatever its variant."""
    if os.path.isdir(image.rootfs):
        return Base(image.key)
    found = store.current(image.stored) if shares_images() else None
    return Base(found.name) if found else None


def shares_images() -> bool:
    """Whether shared images are used, instead of the host's root."""
    return os.environ.get(images.VARIABLE) != images.HOST


def _obtained(image: Image) -> tuple[Base | None, str]:
    from .obtain import obtain

    found, reasons = obtain(image)
    if not found and image.variant != "default":  # a layer can add the difference
        plain = images.Image(f"{image.distro}:{image.version}", image.arch)
        base = local(plain)
        if base:
            return base, ""
        found, reasons = obtain(plain)
    return (Base(found.name) if found else None), reasons


def _hosts_root_is_meant(image: Image) -> bool:
    """Whether the user asked for the host's root, and the image is of the host's own distro."""
    return not shares_images() and image.is_like_host() and image.variant == "default"


def _instead(image: Image, strict: bool, cloud: bool, reasons: str) -> Base:
    if strict:
        raise Failure(f"image not found: {image}: {reasons} (see `image add`)")
    if cloud:
        raise Failure(f"no image with cloud-init: {image}: {reasons}")
    base = Base()
    here = f"{images.release()[2]}, {images.host_arch()}, this host"
    base.note = f"{image} is not available ({reasons}): using {here}"
    return base


def base_of(fields: dict[str, str]) -> Base:
    """What a machine was created from, according to its record."""
    names = [name for name in fields.get("layers", "").split("\t") if name]
    return Base(fields.get("image", ""), names)
