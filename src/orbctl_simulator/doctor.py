"""`doctor`: tries what this host supports, and says what to do about the rest."""

from __future__ import annotations

import os
import shutil

from . import images, layers
from .boot import Boot
from .state import FILES, Failure, Lock, Machine, cache, home
from .trees import remove

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .cli import Options

_PRIVATE = ("/proc", "/sys", "/dev", "/run", "/tmp", "/home", "/root", "/boot", "/mnt", "/media")


def doctor(options: Options, _: list[str]) -> int:
    problem = _try_machine()
    unseen = _unseen_mounts()
    own_time = os.path.exists("/proc/self/ns/time")
    release, arch = images.release()[2], images.host_arch()
    free = shutil.disk_usage(home()).free >> 20
    findings = [
        ("ok" if not problem else "MISSING", f"machines: {problem or 'created and removed one'}"),
        ("ok", f"base: {release}, {arch}, kernel {os.uname().release}"),
        *_booting(),
        _sudo(),
        _programs(),
        ("ok" if free > 500 else "note", f"state directory: {home()}, {free} MiB free"),
        ("ok" if own_time else "note", f"time namespaces: {'yes' if own_time else 'no'}"),
    ]
    if unseen:
        text = "mounted file systems that machines do not see: " + ", ".join(unseen)
        findings.append(("note", text))
    findings += _images()
    for mark, text in findings:
        print(f"{mark:<8}{text}")
    return 1 if any(mark == "MISSING" for mark, _ in findings) else 0


def _try_machine() -> str:
    os.makedirs(home(), mode=0o700, exist_ok=True)
    place = os.path.join(home(), "trial")
    machine = Machine(place, {"name": "trial", "user": "root"})
    with Lock(place + ".lock"):
        remove(place)
        try:
            layers.lay_out(machine)
            layers.hide_private(machine)
            Boot(machine).abandon()
            return ""
        except (Failure, OSError) as error:
            return str(error)
        finally:
            remove(place)


def _booting() -> list[tuple[str, str]]:
    """Whether machines boot, and what they then have that machines without init lack."""
    from . import cgroups, network, tools, trial

    unconnected = network.available()
    reason = trial.why_not() or unconnected
    try:
        limits = {} if reason else cgroups.limits()
    except OSError:
        limits = {}
    enforced = " and ".join(f"{name} ({how})" for name, how in sorted(limits.items()))
    absent = [command for _, path, command in tools.listing() if not path]
    fetched = f"; missing tools are downloaded once, or: {'; '.join(absent)}" if absent else ""
    return [
        ("note", f"init: machines have none: {reason}")
        if reason
        else ("ok", "init: machines boot their image's init"),
        ("note", f"network: machines use this host's: {unconnected}")
        if unconnected
        else ("ok", f"network: machines have their own{fetched}"),
        ("ok", f"limits: enforced: {enforced}") if enforced else ("note", "limits: not enforced"),
    ]


def _programs() -> tuple[str, str]:
    if shutil.which("zstd"):
        return "ok", "zstd: installed"
    return "note", "zstd: not installed, so archives compressed with it cannot be read"


def _sudo() -> tuple[str, str]:
    if os.path.exists("/usr/bin/sudo"):
        return "ok", "sudo: in the base"
    try:
        names = [name for name in os.listdir(cache()) if name.startswith("sudo-")]
        ready = any(os.path.isdir(os.path.join(cache(), name, FILES)) for name in names)
    except FileNotFoundError:
        ready = False
    if ready:
        return "ok", f"sudo: in a layer in {cache()}"
    return "note", "sudo: missing in the base; the first `create` installs it into a layer"


def _images() -> list[tuple[str, str]]:
    """The existing images, and whether more can be pulled or built."""
    from . import build, obtain, store

    found = [("ok", f"image: {name}") for name in sorted(images.listed())]
    for image in store.everything():
        found.append(("ok", f"image: {image.name}, {image.fields.get('source', '')}"))
    told = os.environ.get(images.VARIABLE, "")
    if told in ("none", images.HOST):
        found.append(("note", f"images to pull: {images.VARIABLE} is {told}"))
    else:
        try:
            place = obtain.source()
            place.reach()
            found.append(("ok", f"images to pull: from {place}"))
        except Failure as failure:
            found.append(("note", f"images to pull: none: {failure}"))
    ready = build.ready()
    found.append(("ok" if ready else "note", f"images to build: {ready or 'none'}"))
    return found


def _unseen_mounts() -> list[str]:
    """A machine's base is only the host's root file system, without what is mounted in it."""
    unseen = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            point, kind = before.split()[4], after.split()[0]
            private = any(point == path or point.startswith(path + "/") for path in _PRIVATE)
            if point != "/" and not private and kind not in ("tmpfs", "squashfs", "overlay"):
                unseen.append(point)
    return unseen
