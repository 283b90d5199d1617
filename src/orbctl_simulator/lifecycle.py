"""Making, starting, stopping and removing machines."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
from signal import SIGCONT, SIGSTOP

from . import images
from .boot import Boot, halt, start, stop
from .config import power_off, take_resumed, wake
from .enter import Account, Door, execute
from .state import (
    Failure,
    Machine,
    everything,
    find,
    find_all,
    home,
    machines,
    new_id,
    read_fields,
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
        if options.on("isolate-network"):
            say("--isolate-network is only written down: machines share this host's network")
        password = _ask_password() if options.on("set-password") else ""
        machine = make(name, fields, image.base)
        if password:
            _set_password(machine, password)
    except Failure as failure:
        if str(failure).startswith("["):
            raise
        raise rpc(f"create '{name}': {failure}") from None
    return 0


def _wanted(options: Options, image: images.Image) -> dict[str, str]:
    if options.has("user-data"):
        raise Failure("the simulator has no cloud-init: --user-data needs OrbStack")
    isolated = options.on("isolated")
    for flag in ("isolate-network", "mount"):
        if options.has(flag) and not isolated:
            raise Failure(f"--{flag} needs --isolated")
    user = options.text("user") or _caller()
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}", user):
        raise Failure(f"invalid user name: '{user}'")
    agent = "forward-ssh-agent"
    forwarded = options.on(agent) if options.has(agent) else not isolated
    shares = [] if isolated else os.environ.get("ORBCTL_SIMULATOR_SHARE", "").split(":")
    return {
        "user": user,
        "distro": image.distro,
        "version": image.version,
        "arch": image.arch,
        "variant": "default",
        "image": image.key if image.base != "/" else "",
        "isolated": "true" if isolated else "false",
        "isolate_network": "true" if options.on("isolate-network") else "false",
        "forward_ssh_agent": "true" if forwarded else "false",
        "cpu": cpus(options.text("cpus")),
        "memory_mib": str(size(options.text("memory"), 20) >> 20),
        "disk_bytes": str(size(options.text("disk"), 30)),
        "mounts": "\t".join(options.many("mount")),
        "shares": "\t".join(filter(None, shares)),
    }


def cpus(text: str) -> str:
    if not re.fullmatch(r"\d*\.?\d*", text):
        raise Failure(f"invalid CPU limit: '{text}'")
    return f"{float(text or 0):g}"


def size(text: str, plain: int) -> int:
    """Bytes of ``4G``, ``512MiB`` or a bare number, which counts units of ``1 << plain``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(?:i?B)?)?", text or "0", re.IGNORECASE)
    if match is None:
        raise Failure(f"invalid size: '{text}'")
    unit = 10 * (1 + "KMGT".index(match[2].upper())) if match[2] else plain
    return int(float(match[1]) * (1 << unit))


def _caller() -> str:
    """The user who calls, as on a Mac; root is nobody's login there."""
    from pwd import getpwuid

    name = os.environ.get("SUDO_USER") or getpwuid(os.getuid()).pw_name
    return "user" if name == "root" else name


def _ask_password() -> str:
    """Asked for and never taken from the command line, which anybody can read."""
    if sys.stdin.isatty():
        from getpass import getpass

        return getpass("Password: ")
    return sys.stdin.readline().rstrip("\n")


def _set_password(machine: Machine, password: str) -> None:
    reader, writer = os.pipe()
    os.write(writer, f"{machine.user}:{password}\nroot:{password}\n".encode())
    os.close(writer)

    def work() -> None:
        root = Account("root")
        os.dup2(reader, 0)
        execute(root, ["chpasswd"], root.environment(), False)

    if os.waitpid(Door(machine).fork(work), 0)[1] != 0:
        raise Failure("cannot set the password")


def check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", name):
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


class Draft:
    """A machine in the making: if anything fails, or we are killed, nothing of it stays.

    Its name is taken at once, and its lock is held until it is done: whoever finds an unfinished
    machine whose lock is free knows that its maker has died.
    """

    def __init__(self, name: str, fields: dict[str, str]) -> None:
        wake()
        check_name(name)
        sweep()
        with everything():
            if any(machine.name == name for machine in machines()):
                raise Failure(f"machine already exists: '{name}'")
            path = os.path.join(home(), "machines", new_id())
            self.machine = Machine(path, {"name": name, **fields})
            os.makedirs(path, mode=0o700)
            self._lock = self.machine.lock()
            self._lock.__enter__()
            self.machine.save()

    def __enter__(self) -> Machine:
        return self.machine

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            halt(self.machine)
            discard(self.machine)
        self._lock.__exit__()

    def finish(self) -> None:
        self.machine.fields["made"] = "yes"
        self.machine.save()


def make(name: str, fields: dict[str, str], base: str) -> Machine:
    draft = Draft(name, fields)
    with draft as machine:
        layer = images.seed(base)
        images.lay_out(machine, base)
        if layer:
            copy_tree(layer, machine.file("upper"))
        boot = Boot(machine, create=True)
        draft.finish()
        boot.commit()
    return machine


def clone(options: Options, words: list[str]) -> int:
    """Copy what the machine has written, with its processes stopped meanwhile."""
    source, name = find(words[0]), words[1]
    try:
        with source.lock():
            fields = {key: value for key, value in source.reload().fields.items() if key != "made"}
            draft = Draft(name, {**fields, "name": name})
            with draft as machine, Pause(source):
                images.lay_out(machine, os.readlink(source.file("base")))
                copy_tree(source.file("upper"), machine.file("upper"))
                draft.finish()
    except Failure as failure:
        raise rpc(f"clone '{source.name}': {failure}") from None
    return 0


class Pause:
    """A running machine's processes stand still; they go on, too, if we are killed meanwhile."""

    def __init__(self, machine: Machine) -> None:
        self._machine, self._pid, self._go_on = machine, 0, -1

    def __enter__(self) -> None:
        if self._machine.process() is None:
            return
        waits, self._go_on = os.pipe()
        ready, stopped = os.pipe()

        def work() -> None:
            os.setsid()
            os.close(self._go_on)
            with contextlib.suppress(ProcessLookupError):  # nothing runs in it
                os.kill(-1, SIGSTOP)
            os.close(stopped)
            os.read(waits, 1)
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, SIGCONT)

        self._pid = Door(self._machine).fork(work)
        os.close(waits)
        os.close(stopped)
        os.read(ready, 1)
        os.close(ready)

    def __exit__(self, *_: object) -> None:
        if self._pid:
            os.close(self._go_on)
            os.waitpid(self._pid, 0)


def rename(options: Options, words: list[str]) -> int:
    machine, name = find(words[0]), words[1]
    try:
        check_name(name)
        with machine.lock():
            machine.reload()
            with everything():
                if any(other.name == name for other in machines()):
                    raise Failure(f"machine already exists: '{name}'")
                machine.fields["name"] = name
                machine.save()
            if machine.process():
                _rename_inside(machine, name)
    except Failure as failure:
        raise rpc(f"rename '{words[0]}': {failure}") from None
    return 0


def _rename_inside(machine: Machine, name: str) -> None:
    from .guest import set_hostname
    from .linux import sethostname

    def work() -> None:
        sethostname(name)
        set_hostname(name)

    os.waitpid(Door(machine).fork(work, all_rights=True), 0)


def copy_tree(source: str, target: str) -> None:
    """Copy everything of a layer, with its owners, links, marks and whiteouts."""
    command = ["cp", "-a", "--reflink=auto", "-T", "--", source, target]
    if os.waitpid(os.posix_spawnp("cp", command, os.environ), 0)[1] != 0:
        raise Failure(f"cannot copy {source}")


def discard(machine: Machine) -> None:
    """Out of sight in one step, then out of the way."""
    trash = os.path.join(home(), "trash")
    os.makedirs(trash, mode=0o700, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        os.rename(machine.path, os.path.join(trash, machine.id))
    shutil.rmtree(os.path.join(trash, machine.id), ignore_errors=True)


def sweep() -> None:
    """Remove what a killed simulator left half made or half removed."""
    for machine in machines():
        if machine.finished:
            continue
        with contextlib.suppress(FileNotFoundError), machine.lock(wait=False) as lock:
            if lock.held and "made" not in read_fields(machine.file("machine")):
                halt(machine)
                discard(machine)
    folder, trash = os.path.join(home(), "machines"), os.path.join(home(), "trash")
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        if not os.path.exists(os.path.join(folder, name, "machine")):
            with everything():  # under it a machine gets its directory and its record
                if not os.path.exists(os.path.join(folder, name, "machine")):
                    discard(Machine(os.path.join(folder, name), {}))
    shutil.rmtree(trash, ignore_errors=True)


def _chosen(options: Options, names: list[str]) -> list[Machine]:
    return list(machines()) if options.on("all") else find_all(names)


def start_(options: Options, names: list[str]) -> int:
    """Without a name it is OrbStack that starts, with the machines that its stop ended."""
    wake()
    sweep()
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
