"""What a machine is a layer over: an image and what it lacks, or this host's own root."""

from __future__ import annotations

import os

from . import images, layers, store
from .state import FILES, Failure, home, write_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from .images import Image


#: Says whether new machines boot the init of their image; without it, where the host can.
VARIABLE = "ORBCTL_SIMULATOR_INIT"
IMAGE, NONE = "image", "none"


def choose_init() -> tuple[str, str]:
    """What a new machine's record has as its `init`, and what is to be said about that.

    It is that of its image, or nothing.
    """
    told = os.environ.get(VARIABLE, "")
    if told not in ("", IMAGE, NONE):
        raise Failure(f"{VARIABLE}: {IMAGE} or {NONE}, not '{told}'")
    if told == NONE:
        return "", ""
    reason = _reason_of_host()
    if reason and told == IMAGE:
        raise Failure(f"this host cannot boot machines: {reason}")
    if reason:
        return "", f"it has no init, as with {VARIABLE}={NONE}: this host cannot boot it: {reason}"
    return IMAGE, ""


def _reason_of_host() -> str:
    """Why this host can boot no machines, or nothing. Once it can, it can until it reboots."""
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


def needs(init: str) -> tuple[str, ...]:
    """What a machine needs of its root, by its record's `init`."""
    return ("init", "dbus", "sudo") if init else ("sudo",)


class Base:
    """A root file system as a machine's record names it, and the layers over it."""

    def __init__(self, image: str = "", names: Iterable[str] = ()) -> None:
        self.image, self.names = image, list(names)
        #: What there is to say about it, in one line.
        self.note = ""

    @property
    def path(self) -> str:
        if not self.image:
            return "/"
        if "@" in self.image:
            return os.path.join(store.place(self.image), FILES)
        if "/" in self.image or self.image.startswith("."):
            raise Failure(f"not the name of an image: '{self.image}'")
        return os.path.join(images.folder(), self.image, FILES)

    @property
    def layers(self) -> list[str]:
        return [os.path.join(layers.place(self.image, name), FILES) for name in self.names]

    @property
    def fields(self) -> dict[str, str]:
        """What a machine's record keeps of it."""
        return {"image": self.image, "layers": "\t".join(self.names)}

    def check(self) -> None:
        """See that all of it is here."""
        for path in (self.path, *self.layers):
            if not os.path.isdir(path):
                raise Failure(f"its image is not here: {self.image}")


def base_for(image: Image, strict: bool, wanted: Iterable[str]) -> Base:
    """The base of a new machine: a local image, one that is pulled or built now, or the host.

    `wanted` are the parts that it must have, see `parts`; of the host's root, what it lacks is
    for `layers.seed`. What takes longer than a moment shows its progress.
    """
    if image.is_host:
        return Base()
    base, reasons = local(image), ""
    if base is None:
        base, reasons = _obtained(image)
    if base is not None:
        more = ("cloud-init",) if image.variant == "cloud" else ()
        base.names = layers.over(base.path, base.image, str(image), (*wanted, *more))
        return base
    return Base() if _hosts_root_is_meant(image) else _instead(image, strict, reasons)


def local(image: Image) -> Base | None:
    """The state directory's own image comes first, of whichever variant it is."""
    if os.path.isdir(image.rootfs):
        return Base(image.key)
    found = store.current(image.stored) if shares_images() else None
    return Base(found.name) if found else None


def shares_images() -> bool:
    """Whether images that all share are taken, and not the host's root in their place."""
    return os.environ.get(images.VARIABLE) != images.HOST


def _obtained(image: Image) -> tuple[Base | None, str]:
    from .obtain import obtain

    found, reasons = obtain(image)
    if not found and image.variant != "default":  # what it has more can be put into a layer
        plain = images.Image(f"{image.distro}:{image.version}", image.arch)
        base = local(plain)
        if base:
            return base, ""
        found, reasons = obtain(plain)
    return (Base(found.name) if found else None), reasons


def _hosts_root_is_meant(image: Image) -> bool:
    """Whether the user asked for the host's root, and the image is of the host's own distro."""
    return not shares_images() and image.is_like_host() and image.variant == "default"


def _instead(image: Image, strict: bool, reasons: str) -> Base:
    if strict:
        raise Failure(f"image not found: {image}: {reasons} (see `image add`)")
    if image.variant == "cloud":
        raise Failure(f"no image with cloud-init: {image}: {reasons}")
    base = Base()
    here = f"{images.release()[2]}, {images.host_arch()}, this host"
    base.note = f"{image} is not here ({reasons}): using {here}"
    return base


def base_of(fields: dict[str, str]) -> Base:
    """What a machine was made from, by its record."""
    names = [name for name in fields.get("layers", "").split("\t") if name]
    return Base(fields.get("image", ""), names)
