"""Getting an image that does not exist yet: pulled from an index, or built from an archive."""

from __future__ import annotations

import os
import time
from errno import ENOSPC

from . import images, store
from .progress import Progress, size
from .state import Failure, why

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .images import Image
    from .streams import Source


def obtain(image: Image) -> tuple[store.Image | None, str]:
    """The image, or why it is not available. Failures of the last hour are not tried again.

    If several processes need the same image, the others wait for the first and use its result.
    """
    told = os.environ.get(images.VARIABLE, "")
    if told == images.HOST:
        return None, f"{images.VARIABLE} is {told}"
    if image.arch != images.host_arch():
        return None, f"this host is {images.host_arch()}"
    from .unpack import check_rights

    check_rights()
    try:
        return _obtain(image, told)
    except OSError as error:  # an error of the cache itself: each attempt reports its own
        return None, f"{error.filename or store.folder()}: {why(error).lower()}"


def _obtain(image: Image, told: str) -> tuple[store.Image | None, str]:
    reasons = []
    pulling, building = _ways(image)
    with store.Draft(image.stored, str(image)) as draft:
        found = store.current(image.stored)
        if found:
            return found, ""
        if told != "none":
            found, reason = _try(pulling, image, lambda: pull(draft, image))
            reasons.append(f"not pulled: {reason}")
        if not found and image.variant == "default":
            found, reason = _try(building, image, lambda: build(draft, image))
            reasons.append(f"not built: {reason}")
    return found, "; ".join(reasons)


def _try(way: str, image: Image, work: Callable[[], store.Image]) -> tuple[store.Image | None, str]:
    from .unpack import NoSpace
    from .web import Unreachable

    everything, this = way, f"{way} {image}"
    reason = store.recall(everything) or store.recall(this)
    if reason:
        return None, reason
    try:
        return work(), ""
    except NoSpace as failure:
        return None, str(failure)
    except Unreachable as failure:
        reason = str(failure)
        store.remember(everything, reason)
    except Failure as failure:
        reason = str(failure)
        store.remember(this, reason)
    except OSError as error:
        reason = f"{error.filename or store.folder()}: {why(error).lower()}"
    return None, reason


def _ways(image: Image) -> tuple[str, str]:
    """The names under which failures to get an image are remembered."""
    return f"pull {os.environ.get(images.VARIABLE, '')}", f"build {image.distro}"


def _forget(image: Image) -> None:
    for way in _ways(image):
        store.forget(way)
        store.forget(f"{way} {image}")


def source() -> Source:
    """Where images are pulled from on request, even if `create` would not pull any."""
    from .streams import Source

    told = os.environ.get(images.VARIABLE, "")
    return Source("" if told in ("none", images.HOST) else told)


def pull(draft: store.Draft, image: Image) -> store.Image:
    """Get the newest version from the index, unless it exists."""
    from . import streams, unpack

    place = source()
    place.reach()
    offered = streams.products(place)
    number = images.number(image)
    product = streams.find(offered, image.distro, image.version, number, image.arch, image.variant)
    current = store.current(image.stored)
    if current and current.fields.get("sha256") == product.sha256:
        return current
    detail = f": {size(product.size)} from {place}"
    part = draft.part(product.sha256)
    if unpack.free(store.folder()) < product.size:
        raise unpack.NoSpace(f"{size(product.size)} does not fit into {store.folder()}")
    with Progress(f"pulling {image}", detail) as progress:
        try:
            with streams.download(place, product, part, progress) as file:
                draft.clear()
                unpack.unpack(file, draft.rootfs, progress)
            count = unpack.tidy(draft.rootfs)
        except (unpack.NoSpace, OSError) as error:
            if isinstance(error, unpack.NoSpace) or error.errno == ENOSPC:
                os.unlink(part)  # an incomplete download would take the space
                raise unpack.NoSpace(str(error)) from None
            raise
    os.unlink(part)
    _forget(image)
    return draft.publish(
        product.serial,
        {"source": f"pulled from {place}", "sha256": product.sha256, "size": str(count)},
    )


def build(draft: store.Draft, image: Image) -> store.Image:
    """Build it from the distribution's archive."""
    from . import build, mirrors
    from .web import shown

    if image.arch != images.host_arch() or image.variant != "default":
        raise Failure(f"only for {images.host_arch()}, and only the default variant")
    archive = mirrors.find(image.distro, image.version, image.arch, images.release()[:2])
    builder = build.Builder()
    draft.clear()
    log = os.path.join(store.folder(), f"{image.stored}.log")
    mirror = shown(archive.mirror)
    detail = f" from {mirror} with {builder.name}, once, in about a minute"
    with Progress(f"building {image}", detail) as progress:
        count = build.build(builder, archive, image.arch, draft.rootfs, log, progress)
    os.unlink(log)
    _forget(image)
    return draft.publish(
        time.strftime("%Y%m%d_%H%M%S", time.gmtime()),
        {"source": f"built from {mirror} with {builder.name}", "size": str(count)},
    )
