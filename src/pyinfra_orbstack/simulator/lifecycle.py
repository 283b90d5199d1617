"""Making, starting, stopping and removing machines."""

from __future__ import annotations

import os
import shutil
import sys

from . import images
from .boot import Boot, halt, start, stop
from .config import power_off, take_resumed, wake
from .state import (
    Failure,
    Machine,
    everything,
    find_all,
    home,
    machines,
    new_id,
    rpc,
    say,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .cli import Options

_PANIC = """\
panic: runtime error: invalid memory address or nil pointer dereference
[signal SIGSEGV: segmentation violation]

goroutine 1 [running]:
main.main()"""
_RESERVED = ("all", "default", "docker", "k8s", "none")


def create(options: Options, words: list[str]) -> int:
    name = words[1] if len(words) > 1 else words[0].partition(":")[0]
    try:
        image = images.Image(words[0], options.text("arch"))
        fields = _wanted(options, image)
        check_name(name)
        _explain_base(options, image)
        make(name, fields, image.base)
    except Failure as failure:
        if str(failure).startswith("["):
            raise
        raise rpc(f"create '{name}': {failure}") from None
    return 0


def _wanted(options: Options, image: images.Image) -> dict[str, str]:
    user = options.text("user") or _caller()
    if not user.replace("-", "a").replace(".", "a").replace("_", "a").isalnum() or not (
        user[0].isalpha() or user[0] == "_"
    ):
        raise Failure(f"invalid user name: '{user}'")
    fields = {
        "user": user,
        "distro": image.distro,
        "version": image.version,
        "arch": image.arch,
        "variant": "default",
    }
    return fields


def _caller() -> str:
    """The user who calls, as on a Mac; root is nobody's login there."""
    from pwd import getpwuid

    name = os.environ.get("SUDO_USER") or getpwuid(os.getuid()).pw_name
    return "user" if name == "root" else name


def check_name(name: str) -> None:
    plain = name.replace("-", "a").replace(".", "a").replace("_", "a")
    if not (plain.isascii() and plain.isalnum() and name[0].isalnum() and len(name) <= 63):
        raise Failure(f"invalid machine name: '{name}'")
    if name in _RESERVED:
        raise Failure(f"machine name is reserved: '{name}'")


def _explain_base(options: Options, image: images.Image) -> None:
    if image.is_there():
        return
    strict = options.on("strict-images") or os.environ.get("ORBCTL_SIMULATOR_STRICT_IMAGES") == "1"
    if strict:
        raise Failure(f"image not found: {image} (see `image add`)")
    say(f"{image} is not here: using {images.release('/')[2]}, {images.host_arch()}, this host")


def make(name: str, fields: dict[str, str], base: str) -> Machine:
    """A new machine, running; if anything fails, or we are killed, nothing of it stays."""
    wake()
    with everything():
        sweep()
        if any(machine.name == name for machine in machines()):
            raise Failure(f"machine already exists: '{name}'")
        machine = Machine(os.path.join(home(), "machines", new_id()), {"name": name, **fields})
        os.makedirs(machine.path, mode=0o700)
        held = machine.lock().__enter__()
        machine.save()
    try:
        layer = images.seed(base)
        images.lay_out(machine, base)
        if layer:
            copy_tree(layer, machine.file("upper"))
        boot = Boot(machine, create=True)
        machine.fields["made"] = "yes"
        machine.save()
        boot.commit()
    except BaseException:
        halt(machine)
        discard(machine)
        raise
    finally:
        held.__exit__()
    return machine


def copy_tree(source: str, target: str) -> None:
    """Copy everything of a layer, with its owners, links, marks and whiteouts."""
    command = ["cp", "-a", "--reflink=auto", "-T", "--", source, target]
    if os.waitpid(os.posix_spawnp("cp", command, os.environ), 0)[1] != 0:
        raise Failure(f"cannot copy {source}")


def discard(machine: Machine) -> None:
    """Out of sight in one step, then out of the way."""
    trash = os.path.join(home(), "trash")
    os.makedirs(trash, mode=0o700, exist_ok=True)
    gone = os.path.join(trash, machine.id)
    try:
        os.rename(machine.path, gone)
    except FileNotFoundError:
        return
    shutil.rmtree(gone, ignore_errors=True)


def sweep() -> None:
    """Remove what a killed simulator left half made or half removed."""
    for machine in machines():
        if not machine.finished:
            with machine.lock(wait=False) as lock:
                if lock.held:
                    discard(machine)
    shutil.rmtree(os.path.join(home(), "trash"), ignore_errors=True)


def _chosen(options: Options, names: list[str]) -> list[Machine]:
    return list(machines()) if options.on("all") else find_all(names)


def start_(options: Options, names: list[str]) -> int:
    """Without a name it is OrbStack that starts, with the machines that its stop ended."""
    wake()
    resumed = [] if names or options.on("all") else take_resumed()
    for machine in _chosen(options, names) + resumed:
        start(machine)
    return 0


def stop_(options: Options, names: list[str]) -> int:
    """Without a name it is OrbStack that stops: every machine with it."""
    if names or options.on("all"):
        for machine in _chosen(options, names):
            stop(machine)
        return 0
    ended = [machine for machine in machines() if machine.state == "running"]
    for machine in ended:
        stop(machine)
    power_off(ended)
    return 0


def restart(options: Options, names: list[str]) -> int:
    wake()
    if not names and not options.on("all"):
        return stop_(options, names) or start_(options, names)
    for machine in _chosen(options, names):
        stop(machine)
        start(machine)
    return 0


def delete(options: Options, names: list[str]) -> int:
    if not names and not options.on("all"):
        raise Failure("requires at least 1 arg(s), only received 0")
    chosen = _chosen(options, names)
    if any(machine.id in names for machine in chosen):
        say(_PANIC)
        return 2
    if chosen and not options.on("force") and not _confirmed(chosen):
        raise Failure("aborted")
    for machine in chosen:
        with everything():
            with machine.lock():
                halt(machine.reload())
            discard(machine)
    return 0


def _confirmed(chosen: list[Machine]) -> bool:
    """Ask, also where no terminal is: a script that forgot ``-f`` must not pass here by luck."""
    shown = ", ".join(f"'{machine.name}'" for machine in chosen)
    sys.stderr.write(f"Delete {shown}? All their data will be lost. [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")
