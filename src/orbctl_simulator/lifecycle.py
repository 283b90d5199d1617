"""Creating, starting, stopping and deleting machines."""

from __future__ import annotations

import os
import select
import sys
import time

from . import images, layers
from .bases import Base, Init, base_for
from .boot import begin, halt, is_up, start, stop
from .config import power_off, take_resumed, wake
from .door import Door
from .guest import set_hostname
from .light import is_name, suppress
from .linux import sethostname
from .packages import wait_for_packages
from .shares import resolve
from .state import (
    Failure,
    Machine,
    Transition,
    everything,
    find,
    find_all,
    home,
    machines,
    new_id,
    rpc,
    say,
    shown,
)
from .sweeping import discard, sweep
from .values import check_user, cpus, mebibytes, size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from .cli import Options
    from .supervisors import Supervisor

_PANIC = """\
panic: runtime error: invalid memory address or nil pointer dereference
[signal SIGSEGV: segmentation violation]

goroutine 1 [running]:
main.main()"""
_SIGCONT, _SIGSTOP = 18, 19
_RESERVED = ("all", "default", "docker", "k8s", "none")


def create(
    options: Options, words: list[str], ident: str, supervisor: Supervisor | None = None
) -> int:
    """`ident` is the new machine's id, `supervisor` the one that it gets if it boots."""
    name = words[1] if len(words) > 1 else words[0].partition(":")[0]
    try:
        cloud = "cloud" if options.has("user-data") else ""
        variant = options.text("variant") or cloud
        image = images.Image(words[0], options.text("arch"), variant=variant)
        fields = _wanted(options, image)
        check_name(name)
        if any(machine.name == name for machine in machines()):
            raise Failure(f"machine already exists: '{name}'")
        init = Init()
        user_data = _user_data(options, init)
        base = base_for(image, _is_strict(options), init, user_data is not None)
        if base.note:
            say(base.note)
        if user_data is not None:
            fields["cloud_init"] = "true"
            _check_cloud_init(init)
        if options.on("isolate-network") and not init.kind:
            say("--isolate-network is not enforced: without init, machines use this host's network")
        password = _ask_password() if options.on("set-password") else ""
        fields["init"] = init.kind
        draft = Draft(name, {**fields, **base.fields}, options.call.hold, ident)
        make(draft, base, password, user_data, supervisor)
        if init.note:
            say(init.note)
    except Failure as failure:
        if str(failure).startswith("["):
            raise
        raise rpc(f"create '{name}': {failure}") from None
    return 0


def _user_data(options: Options, init: Init) -> bytes | None:
    if not options.has("user-data"):
        return None
    _check_cloud_init(init)
    from .cloud import read_user_data

    return read_user_data(options.text("user-data"))


def _check_cloud_init(init: Init) -> None:
    if not init.kind:
        raise Failure("the simulator has no cloud-init for machines without init")


def _wanted(options: Options, image: images.Image) -> dict[str, str]:
    isolated = options.on("isolated")
    for flag in ("isolate-network", "mount"):
        if options.has(flag) and not isolated:
            raise Failure(f"--{flag} needs --isolated")
    user = options.text("user") or _caller()
    check_user(user)
    agent = "forward-ssh-agent"
    forwarded = options.on(agent) if options.has(agent) else not isolated
    shares = [] if isolated else os.environ.get("ORBCTL_SIMULATOR_SHARE", "").split(":")
    return {
        "user": user,
        "distro": image.distro,
        "version": image.version,
        "arch": image.arch,
        "variant": image.variant,
        "isolated": "true" if isolated else "false",
        "isolate_network": "true" if options.on("isolate-network") else "false",
        "forward_ssh_agent": "true" if forwarded else "false",
        "cpu": cpus(options.text("cpus") or "0"),
        "memory_mib": str(mebibytes(options.text("memory"))),
        "disk_bytes": str(size(options.text("disk"), 30)),
        "mounts": "\t".join(options.many("mount")),
        "sources": resolve(options.many("mount")),
        "shares": resolve([*filter(None, shares)]),
    }


def _caller() -> str:
    """The calling user, as on a Mac, where root is not a login user."""
    from pwd import getpwuid

    try:
        name = os.environ.get("SUDO_USER") or getpwuid(os.getuid()).pw_name
    except KeyError:  # the host has no entry for this uid
        name = "root"
    return "user" if name == "root" else name


def _ask_password() -> str:
    """Prompt for it: any user can read command lines."""
    if sys.stdin.isatty():
        from getpass import getpass

        password = getpass("Password: ")
    else:
        password = sys.stdin.readline().rstrip("\n")
    if len(password) > 512:
        raise Failure("the password is longer than 512 characters")
    return password


def check_name(name: str) -> None:
    if not is_name(name) or len(name) > 63:
        raise Failure(f"invalid machine name: '{shown(name)}'")
    if name in _RESERVED:
        raise Failure(f"machine name is reserved: '{name}'")


def _is_strict(options: Options) -> bool:
    strict = os.environ.get("ORBCTL_SIMULATOR_STRICT_IMAGES") == "1"
    return strict or options.on("strict-images")


class Draft:
    """A machine being created: if anything fails, or this process is killed, nothing remains.

    Its name is reserved at once, and its lock is held until it is finished. So if the lock of an
    unfinished machine is free, the process that was creating it has died.
    """

    def __init__(self, name: str, fields: dict[str, str], hold: float = 0, ident: str = "") -> None:
        wake()
        check_name(name)
        sweep()
        with everything():
            if any(machine.name == name for machine in machines()):
                raise Failure(f"machine already exists: '{name}'")
            path = os.path.join(home(), "machines", ident or new_id())
            self.machine = Machine(path, {"name": name, **fields})
            os.makedirs(path, mode=0o700)
            self._lock = self.machine.lock()
            self.machine.lock_fd = self._lock.__enter__().fd
            self.machine.show_transition("creating")
            self.machine.save()
        self._hold = hold

    def __enter__(self) -> Machine:
        try:
            time.sleep(self._hold)
            layers.lay_out(self.machine)
        except BaseException:
            self.__exit__(BaseException)
            raise
        return self.machine

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            halt(self.machine)
            discard(self.machine)
        self.machine.hide_transition()
        self._lock.__exit__()

    def finish(self) -> None:
        layers.hide_private(self.machine)
        self.machine.fields["made"] = "yes"
        self.machine.save()


def make(
    draft: Draft,
    base: Base,
    password: str = "",
    user_data: bytes | None = None,
    supervisor: Supervisor | None = None,
) -> None:
    with draft as machine:
        wait_for_packages(machine.base)
        layers.hide_private(machine)  # first, as it says what a file system lacks
        for files in base.copied:
            layers.fill_plain(machine, files)
        layers.hide_private(machine)
        if user_data is not None:
            layers.seed(machine, user_data)
        with begin(machine, True, password, supervisor) as started:
            draft.finish()
            started.commit()


def clone(options: Options, words: list[str]) -> int:
    """Copy the machine's changes while its processes are paused."""
    source, name = find(words[0]), words[1]
    try:
        with Transition(source, "cloning", "clone", shown=False):
            fields = {key: value for key, value in source.fields.items() if key != "made"}
            draft = Draft(name, {**fields, "name": name}, options.call.hold)
            with draft as machine, paused(source):
                layers.fill(machine, source.upper)
                if machine.on("cloud_init"):
                    layers.seed(machine)
                draft.finish()
    except Failure as failure:
        if str(failure).startswith("["):
            raise
        raise rpc(f"clone '{source.name}': {failure}") from None
    return 0


def paused(machine: Machine) -> AbstractContextManager[None]:
    """In this context, a machine's processes are paused."""
    if machine.boots:
        from . import booted

        return booted.Pause(machine)
    return Pause(machine)


class Pause:
    """Pauses a running machine's processes. They continue also if this process is killed."""

    def __init__(self, machine: Machine) -> None:
        self._machine, self._pid, self._go_on = machine, 0, -1

    def __enter__(self) -> None:
        if self._machine.process() is None:
            return
        waits, self._go_on = os.pipe()
        ready, stopped = os.pipe()

        def hold() -> int:
            _signal_all(_SIGSTOP)
            os.write(stopped, b"!")
            os.close(stopped)
            os.read(waits, 1)
            return _signal_all(_SIGCONT)

        door = Door(self._machine)
        self._pid = door.fork(lambda: door.be_seen(hold, waits, stopped), waits, stopped)
        os.close(waits)
        os.close(stopped)
        still = _is_ready(ready) and os.read(ready, 1) == b"!"
        os.close(ready)
        if not still:
            self.__exit__()
            raise Failure("its processes could not be paused")

    def __exit__(self, *_: object) -> None:
        if self._pid:
            os.close(self._go_on)
            if not _has_done(self._pid):
                door = Door(self._machine)
                _has_done(door.fork(lambda: door.be_seen(lambda: _signal_all(_SIGCONT))))


def _is_ready(fd: int) -> bool:
    """Whether it becomes readable soon: a machine's root can stop the processes that it sees."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(5000))


def _has_done(pid: int) -> bool:
    """Whether a child has exited with 0; it is killed after a while."""
    ended = os.pidfd_open(pid)
    if not _is_ready(ended):
        os.kill(pid, 9)
    os.close(ended)
    return os.waitpid(pid, 0)[1] == 0


def _signal_all(number: int) -> int:
    with suppress(ProcessLookupError):  # the machine has no other processes
        os.kill(-1, number)
    return 0


def rename(options: Options, words: list[str]) -> int:
    sweep()
    machine, name = find(words[0]), words[1]
    try:
        check_name(name)
        with Transition(machine, "renaming", "rename", shown=False):
            with everything():
                if any(other.name == name for other in machines()):
                    raise Failure(f"machine already exists: '{name}'")
                machine.fields["name"] = name
                machine.save()
            if machine.boots:
                from .network import Network

                Network(home()).rename(machine.id, name)
            if is_up(machine):
                _rename_inside(machine, name)
    except Failure as failure:
        if str(failure).startswith("["):
            raise
        raise rpc(f"rename '{words[0]}': {failure}") from None
    return 0


def _rename_inside(machine: Machine, name: str) -> None:
    def work() -> None:
        sethostname(name)
        set_hostname(name)  # an error is reported: a deploy may have replaced these files

    os.waitpid(Door.of(machine).fork(work, bare=True, all_rights=True), 0)


def _chosen(options: Options, names: list[str]) -> list[Machine]:
    return list(machines()) if options.on("all") else find_all(names)


def start_(options: Options, names: list[str]) -> int:
    """Start machines. Without a name, start OrbStack and the machines that its stop stopped."""
    wake()
    sweep()
    resumed = [] if names or options.on("all") else take_resumed()
    hold = options.call.hold
    return each(_chosen(options, names) + resumed, lambda m: start(m, "start", hold))


def stop_(options: Options, names: list[str]) -> int:
    """Stop machines. Without a name, stop OrbStack, and so every machine."""
    sweep()
    hold, at_once = options.call.hold, options.on("force")
    if names or options.on("all"):
        return each(_chosen(options, names), lambda m: stop(m, hold, at_once))
    # One that reboots is starting.
    ended = [machine for machine in machines() if machine.life() in ("running", "starting")]
    each(ended, lambda m: stop(m, hold, at_once))
    power_off(ended)
    return 0


def restart(options: Options, names: list[str]) -> int:
    wake()
    sweep()
    if not names and not options.on("all"):
        return stop_(options, names) or start_(options, names)
    hold = options.call.hold

    def again(machine: Machine) -> None:
        stop(machine, hold)
        start(machine, "start", hold)

    return each(_chosen(options, names), again)


def each(chosen: list[Machine], act: Callable[[Machine], None]) -> int:
    """Apply `act` to each machine, also after a failure. One error contains all reasons."""
    failures = []
    for machine in chosen:
        try:
            act(machine)
        except Failure as failure:
            failures.append(str(failure))
    if failures:
        raise Failure("\n".join(failures))
    return 0


def delete(options: Options, names: list[str]) -> int:
    if not names and not options.on("all"):
        raise Failure("requires at least 1 arg(s), only received 0")
    sweep()
    chosen = _chosen(options, names)
    if any(machine.id in names for machine in chosen):
        say(_PANIC)
        return 2
    if chosen and not options.on("force") and not _confirmed(chosen):
        raise Failure("aborted")

    def end(machine: Machine) -> None:
        with Transition(machine, "deleting", "delete", hold=options.call.hold):
            halt(machine)
            discard(machine)

    return each(chosen, end)


def _confirmed(chosen: list[Machine]) -> bool:
    """Prompt even without a terminal: a script without ``-f`` must not pass here by luck."""
    shown = ", ".join(f"'{machine.name}'" for machine in chosen)
    sys.stderr.write(f"Delete {shown}? All their data will be lost. [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")
