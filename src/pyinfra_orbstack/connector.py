"""The ``@orbstack`` connector: OrbStack's machines and containers as pyinfra hosts."""

from __future__ import annotations

import atexit
import contextlib
import os
import posixpath
import secrets
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from io import TextIOBase
from itertools import chain
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, Dict, List, Optional, Union  # noqa: UP035

import gevent
import gevent.subprocess

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        # pyinfra 3.2 loads every connector in the middle of its own import, to find `@ssh`. Where
        # this module is what imports it, ours does not exist yet, and no host can want it either.
        if name == "OrbStackConnector":  # pragma: no cover: pyinfra 3.2
            from pyinfra.connectors.base import BaseConnector

            return BaseConnector
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


import pyinfra.api  # noqa: F401  (first, and whole)
from gevent.lock import RLock
from pyinfra import logger
from pyinfra.api.command import QuoteString, StringCommand
from pyinfra.api.exceptions import ConnectError, InventoryError, PyinfraError
from pyinfra.api.util import memoize
from pyinfra.connectors import util
from pyinfra.connectors.base import BaseConnector, DataMeta
from pyinfra.connectors.util import (
    CommandOutput,
    OutputLine,
    execute_command_with_sudo_retry,
    extract_control_arguments,
    make_unix_command_for_host,
)
from pyinfra.progress import progress_spinner
from typing_extensions import TypedDict, override

from pyinfra_orbstack import docker, orbctl, process, transfer
from pyinfra_orbstack.docker import ContainerTarget
from pyinfra_orbstack.process import CHUNK, STDERR, STDOUT
from pyinfra_orbstack.session import LARGEST_FRAME_STDIN, Control, NotStarted, check_text

try:
    from pyinfra.api.output import echo, format_text
except ImportError:  # pragma: no cover: before pyinfra 3.8
    from click import echo, style as format_text  # type: ignore[assignment]  # noqa: I001

# Once gevent watches a process of ours, it collects every child of this one. Where its patches are
# not in place, the standard library takes an exit code that somebody else has collected for 0: a
# command that failed on `@local` would be a success. From 3.8 on pyinfra uses gevent's by itself.
util.Popen = gevent.subprocess.Popen

if TYPE_CHECKING:
    from pyinfra.api.host import Host
    from pyinfra.api.state import State

#: Takes `STDOUT` or `STDERR` and a piece of output.
Feed = Callable[[int, bytes], None]

#: `session` or `spawn`, where no host says which.
TRANSPORT_VARIABLE = "PYINFRA_ORBSTACK_TRANSPORT"
#: When "1", connecting neither creates nor starts machines.
PLAN_VARIABLE = "PYINFRA_ORBSTACK_PLAN"
TRANSPORTS = ("session", "spawn")
#: Seconds for which a listing tells enough to connect, which pyinfra does right after it.
FRESH = 2.0


# pyinfra evaluates these annotations, so they are written as Python 3.9 understands them.
class ConnectorData(TypedDict):
    orbstack_image: Optional[str]  # noqa: UP045
    orbstack_arch: Optional[str]  # noqa: UP045
    orbstack_create_user: Optional[str]  # noqa: UP045
    orbstack_cloud_init: Optional[str]  # noqa: UP045
    orbstack_isolated: bool
    orbstack_isolate_network: bool
    orbstack_mounts: List[str]  # noqa: UP006
    orbstack_cpus: Union[int, str, None]  # noqa: UP007
    orbstack_memory: Union[int, str, None]  # noqa: UP007
    orbstack_disk: Union[int, str, None]  # noqa: UP007
    orbstack_user: Optional[str]  # noqa: UP045
    orbstack_workdir: Optional[str]  # noqa: UP045
    orbstack_create: bool
    orbstack_start: bool
    orbstack_boot_timeout: Union[int, float]  # noqa: UP007
    orbstack_transport: Optional[str]  # noqa: UP045


connector_data_meta: Dict[str, DataMeta] = {  # noqa: UP006
    "orbstack_image": DataMeta("Image to create the machine from when it does not exist"),
    "orbstack_arch": DataMeta("Architecture of a created machine: arm64 or amd64"),
    "orbstack_create_user": DataMeta("Default user of a created machine"),
    "orbstack_cloud_init": DataMeta("Path of a cloud-init file for a created machine"),
    "orbstack_isolated": DataMeta("Whether a created machine shares no files with the Mac", False),
    "orbstack_isolate_network": DataMeta(
        "Whether a created, isolated machine reaches neither the Mac nor other machines", False
    ),
    "orbstack_mounts": DataMeta("Folders to mount in a created, isolated machine: SRC[:DEST]", []),
    "orbstack_cpus": DataMeta("CPU limit of a created machine"),
    "orbstack_memory": DataMeta("Memory limit of a created machine: MiB, or with a unit as in 4G"),
    "orbstack_disk": DataMeta("Disk limit of a created machine, such as 64G"),
    "orbstack_user": DataMeta("User to run commands as, without sudo"),
    "orbstack_workdir": DataMeta("Directory in which commands start, the user's home by default"),
    "orbstack_create": DataMeta("Whether connecting may create the machine", True),
    "orbstack_start": DataMeta("Whether connecting may start the machine", True),
    "orbstack_boot_timeout": DataMeta("Seconds to wait for a started machine to answer", 120),
    "orbstack_transport": DataMeta("How commands run: session (one open shell) or spawn"),
}


class MachineTarget:
    """A machine: the command that reaches it, and what only a machine does.

    `ContainerTarget` has the same methods; all that follows knows no difference.
    """

    #: It takes a while to answer after it was started.
    boots = True

    def __init__(self, client: orbctl.Orbctl, machine: orbctl.Machine) -> None:
        self.client = client
        self.machine = machine

    def __str__(self) -> str:
        return f"machine {self.machine.name!r}"

    def argv(self, *words: str, user: str | None = None, tty: bool = False) -> list[str]:
        """The local command line that runs ``words`` in the machine."""
        # Whether there is a terminal `orbctl` sees by itself.
        return self.client.argv(orbctl.run_args(self.machine.name, words, user=user))

    def environment(self) -> dict[str, str]:
        """The environment of that command line."""
        return self.client.environment()

    @property
    def state(self) -> str:
        """Its state when it was looked at last."""
        return self.machine.state

    def refresh(self) -> None:
        """Look again, and see that it is the one we connected to."""
        try:
            now = self.client.info(self.machine.name)
        except orbctl.OrbctlError as broken:
            raise OSError(str(broken)) from None
        if now.id != self.machine.id:
            raise OSError(
                f"machine {now.name!r} was replaced by another one of that name since pyinfra "
                "connected to it: run pyinfra again"
            )
        self.machine = now

    def start(self) -> None:
        """Start it."""
        self.client.start(self.machine.name)

    def start_line(self) -> str:
        """The command that starts it, to be shown to the user."""
        return orbctl.shell_line(["start", self.machine.name])

    def explain(self, silence: str) -> str:
        """Why it gives no shell."""
        return silence


class CommandTimeout(TimeoutError):
    """A command took longer than its ``_timeout``; what it had printed is in `output`."""

    def __init__(self, message: str, output: CommandOutput) -> None:
        super().__init__(message)
        self.output = output


# Ctrl-C -------------------------------------------------------------------------------------

_busy: set[gevent.Greenlet] = set()
_watching = False


class Interrupted(OSError):
    """Ctrl-C came while a machine was at work."""


def _watch_interrupts() -> None:
    """Make Ctrl-C end what is running in machines before pyinfra goes on to disconnect.

    pyinfra disconnects in the pool in which the commands run, so it would wait for all of them.
    """
    global _watching
    if _watching:
        return
    previous = signal.getsignal(signal.SIGINT)
    if not callable(previous):
        return

    def handle(number: int, frame: FrameType | None) -> None:
        for greenlet in list(_busy):
            greenlet.kill(Interrupted("interrupted"), block=False)
        # pyinfra does not wait for hosts that are still connecting, and they clean up now.
        atexit.register(gevent.joinall, list(_busy), timeout=30)
        previous(number, frame)

    # Python takes handlers in the main thread alone, and under gevent only it knows which that is.
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, handle)
        _watching = True


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C reach this greenlet; the main one gets it from Python itself."""
    current = gevent.getcurrent()
    if current in _busy or not isinstance(current, gevent.Greenlet):
        yield
        return
    _busy.add(current)
    try:
        yield
    finally:
        _busy.discard(current)


# Inventory ------------------------------------------------------------------------------------


@memoize
def list_machines() -> tuple[float, list[orbctl.Machine]]:
    """When all machines were asked for, and which there were.

    They are read once, because pyinfra expands each name of an inventory twice.
    ``list_machines.cache.clear()`` forgets them.
    """
    return time.monotonic(), orbctl.Orbctl().machines()


def _host(name: str, machine: orbctl.Machine | None) -> tuple[str, dict[str, Any], list[str]]:
    data: dict[str, Any] = {"orbstack_vm": True, "vm_name": name}
    groups = ["@orbstack", "orbstack"]
    if machine is not None:
        data.update(
            vm_id=machine.id,
            vm_status=machine.state,
            vm_distro=machine.distro,
            vm_version=machine.version,
            vm_arch=machine.arch,
            vm_username=machine.username,
        )
        groups += [
            f"orbstack_{word}"
            for word in ("running" if machine.running else "stopped", machine.arch, machine.distro)
            if word
        ]
    return f"@orbstack/{name}", data, groups


@memoize
def list_containers() -> list[docker.Container]:
    """All containers; memoised like `list_machines`."""
    return docker.Docker().containers()


def _container_host(
    name: str, container: docker.Container | None, *, named: bool
) -> tuple[str, dict[str, Any], list[str]]:
    # Whoever asks for all that run does not want one to be started that has ended since.
    data: dict[str, Any] = {"container_name": name} if named else {"orbstack_start": False}
    groups = ["@orbstack", "orbstack_containers"]
    if container is not None:
        name = container.name
        data.update(
            container_id=container.id,
            container_name=name,
            container_image=container.image,
            container_state=container.state,
            container_labels=dict(container.labels),
            container_project=container.project,
            container_service=container.service,
            container_domain=container.domain,
            container_ports=dict(container.ports),
        )
        if container.image_name:
            groups.append(f"orbstack_image_{container.image_name}")
        if container.project:
            groups.append(f"orbstack_project_{container.project}")
    return f"@orbstack/docker/{name}", data, groups


def _container_hosts(name: str) -> Iterator[tuple[str, dict[str, Any], list[str]]]:
    try:
        containers = list_containers()
    except docker.DockerError as broken:
        # As with machines: one that was named fails when it is connected to.
        if not name or _is_pattern(name):
            raise InventoryError(f"cannot list containers: {broken}") from None
        containers = []
    if name and not _is_pattern(name):
        called = [one for one in containers if one.name == name]
        called = called or [one for one in containers if one.id.startswith(name)]
        yield _container_host(name, called[0] if len(called) == 1 else None, named=True)
        return
    running = [one for one in containers if one.running]
    chosen = [one for one in running if fnmatchcase(one.name, name or "*")]
    if not chosen:
        if name:
            raise InventoryError(f"no running container matches {name!r}{_known(running)}")
        raise InventoryError(
            "no container is running; "
            "one that is stopped is started when it is named: @orbstack/docker/NAME"
        )
    for one in chosen:
        yield _container_host(one.name, one, named=False)


class OrbStackConnector(BaseConnector):
    """
    Runs commands in the machines of OrbStack, through its command line ``orbctl``, and in the
    containers of its engine, through the docker command.

    + ``@orbstack``: the machines that run now.
    + ``@orbstack/NAME``: that machine; started when it is stopped, and created when it does not
      exist and its data holds ``orbstack_image``.
    + ``@orbstack/web-*``: every machine that matches, running or not.
    + ``@orbstack/docker``: the containers that run now; ``@orbstack/docker/web-*``: those of them
      that match.
    + ``@orbstack/docker/NAME``: that container, by name or by the beginning of its id; started when
      it is stopped.

    **Examples:**

    .. code:: shell

        pyinfra @orbstack/web exec -- uname -a
        pyinfra @orbstack deploy.py

    .. code:: python

        # inventory.py
        web = [("@orbstack/web-1", {"orbstack_image": "ubuntu:noble"})]
    """

    __examples_doc__ = """
    An inventory file that declares a machine and provisions it:

    .. code:: python

        web = [("@orbstack/web-1", {"orbstack_image": "ubuntu:noble"})]
    """

    handles_execution = True
    data_cls = ConnectorData
    data_meta = connector_data_meta
    data: ConnectorData

    def __init__(self, state: State, host: Host) -> None:
        super().__init__(state, host)
        self._lock = RLock()
        self._control: Control | None = None
        self._target: MachineTarget | ContainerTarget | None = None
        self._init = ""
        self._transport = TRANSPORTS[0]

    @override
    @staticmethod
    def make_names_data(name: str | None = None) -> Iterator[tuple[str, dict[str, Any], list[str]]]:
        if name and name.split("/")[0] == "docker":
            yield from _container_hosts(name.partition("/")[2])
            return
        try:
            machines = list_machines()[1]
        except orbctl.OrbctlError as broken:
            # A host that was named fails when it is connected to, and alone.
            if not name or _is_pattern(name):
                raise InventoryError(f"cannot list OrbStack's machines: {broken}") from None
            machines = []
        if not name:
            chosen = [machine for machine in machines if machine.running]
            if not chosen:
                raise InventoryError("no OrbStack machine is running (@orbstack/* is every one)")
        elif _is_pattern(name):
            chosen = [machine for machine in machines if fnmatchcase(machine.name, name)]
            if not chosen:
                raise InventoryError(f"no OrbStack machine matches {name!r}{_known(machines)}")
        else:
            yield _host(name, next((one for one in machines if one.name == name), None))
            return
        for machine in chosen:
            yield _host(machine.name, machine)

    # Connecting

    @override
    def connect(self) -> None:
        """
        Make the machine ready for commands: create it, start it, wait for it, as its data says.

        A container is started at most. Raises ``ConnectError``, with one line that says what to do.
        """
        _watch_interrupts()
        try:
            with _interruptible():
                self._transport = self._check_transport()
                container = self.host.data.get("container_name")
                if container:
                    self._connect_container(str(container))
                else:
                    self._connect_machine(str(self.host.data.get("vm_name")))
        except (orbctl.OrbctlError, OSError) as broken:
            raise ConnectError(str(broken)) from None

    def _connect_container(self, name: str) -> None:
        engine = docker.Docker()
        try:
            container = engine.inspect(name)
        except docker.ContainerNotFound:
            raise ConnectError(
                f"there is no container {name!r}{_known(engine.containers())}"
            ) from None
        self._ensure_ready(ContainerTarget(engine, container))

    def _connect_machine(self, name: str) -> None:
        orbctl.check_name(name)
        client = orbctl.Orbctl()
        listed = self._just_listed(name)
        if listed is not None:
            target = MachineTarget(client, listed)
            with contextlib.suppress(NotStarted), progress_spinner({f"waiting for {target}"}):
                self._open_first(target)
                return
        machine, made = self._ensure_exists(client, name)
        try:
            self._ensure_ready(MachineTarget(client, machine))
        except BaseException:
            if made:
                self._remove(client, machine)
            raise

    def _just_listed(self, name: str) -> orbctl.Machine | None:
        """The machine, where it is known without asking again that a shell in it is all it takes.

        It may have ended since; then a shell would start it, or there is none.
        """
        if self.data["orbstack_cloud_init"] or not self._allowed("orbstack_start"):
            return None
        for when, machines in list_machines.cache.values():
            if time.monotonic() - when < FRESH:
                return next((one for one in machines if one.name == name and one.running), None)
        return None

    def _check_transport(self) -> str:
        transport = (
            self.host.data.get("orbstack_transport")
            or os.environ.get(TRANSPORT_VARIABLE)
            or TRANSPORTS[0]
        )
        if transport not in TRANSPORTS:
            raise ConnectError(
                f"transport {transport!r} is unknown: orbstack_transport and "
                f"{TRANSPORT_VARIABLE} take {' or '.join(TRANSPORTS)}"
            )
        return str(transport)

    def _allowed(self, key: str) -> bool:
        return bool(self.data[key]) and os.environ.get(PLAN_VARIABLE) != "1"  # type: ignore[literal-required]

    def _ensure_exists(self, client: orbctl.Orbctl, name: str) -> tuple[orbctl.Machine, bool]:
        """Return the machine, and whether it was made just now."""
        with contextlib.suppress(orbctl.MachineNotFound):
            return client.info(name), False
        image = self.data["orbstack_image"]
        if not image:
            raise ConnectError(
                f"there is no machine {name!r}{_known(client.machines())}; "
                "to have it created, set orbstack_image in its data"
            )
        data = self.data
        args = orbctl.create_args(
            name,
            image,
            arch=data["orbstack_arch"],
            user=data["orbstack_create_user"],
            cloud_init=data["orbstack_cloud_init"],
            isolated=data["orbstack_isolated"],
            isolate_network=data["orbstack_isolate_network"],
            mounts=data["orbstack_mounts"],
            cpus=data["orbstack_cpus"],
            memory=data["orbstack_memory"],
            disk=data["orbstack_disk"],
        )
        if not self._allowed("orbstack_create"):
            raise ConnectError(
                f"there is no machine {name!r} and it may not be created now; "
                f"this makes it: {orbctl.shell_line(args)}"
            )
        began = time.time()
        try:
            with progress_spinner({f"creating {name} from {image}"}):
                client.create(args)
        except orbctl.MachineExists:
            # Somebody else was faster; it is theirs, and good enough to connect to.
            return client.info(name), False
        except BaseException:
            self._remove_half_made(client, name, began)
            raise
        machine = client.info(name)
        record = orbctl.Record.from_environment()
        if record:
            record.add(machine)
        logger.info(f"{self.host.print_prefix}created machine {name} from {image}")
        return machine, True

    def _remove_half_made(self, client: orbctl.Orbctl, name: str, began: float) -> None:
        with contextlib.suppress(orbctl.OrbctlError):
            machine = client.info(name)
            # The name was free before, so a machine younger than our call is what it left.
            if machine.created and machine.created.timestamp() >= began:
                self._remove(client, machine)

    def _remove(self, client: orbctl.Orbctl, machine: orbctl.Machine) -> None:
        try:
            client.delete(machine.name, machine.id)
        except orbctl.OrbctlError as broken:
            logger.warning(
                f"{self.host.print_prefix}machine {machine.name} was made and cannot be used; "
                f"deleting it failed too: {broken}"
            )
            return
        record = orbctl.Record.from_environment()
        if record:
            record.forget(machine.id)

    def _ensure_ready(self, target: MachineTarget | ContainerTarget) -> None:
        deadline = time.monotonic() + self.data["orbstack_boot_timeout"]
        if target.state != "running":
            if not self._allowed("orbstack_start"):
                raise ConnectError(
                    f"{target} is {target.state} and may not be started now; "
                    f"this starts it: {target.start_line()}"
                )
            with progress_spinner({f"starting {target}"}):
                target.start()
        with progress_spinner({f"waiting for {target}"}):
            while True:
                try:
                    self._open_first(target)
                    break
                except NotStarted as silent:
                    if not target.boots or time.monotonic() > deadline:
                        reason = target.explain(str(silent))
                        raise ConnectError(f"{target} does not answer: {reason}") from None
                    time.sleep(0.5)
            if self.data["orbstack_cloud_init"]:
                self._wait_for_cloud_init(deadline)

    def _open_first(self, target: MachineTarget | ContainerTarget) -> None:
        """Open a session in what this host is from now on."""
        self._target = target
        self._init = ""
        self._open_session()

    def _wait_for_cloud_init(self, deadline: float) -> None:
        status, output = self._run_lines(
            "command -v cloud-init >/dev/null || exit 0; cloud-init status --wait",
            timeout=max(1.0, deadline - time.monotonic()),
        )
        # 2 means that it is done, with warnings.
        if status not in (0, 2):
            raise ConnectError(f"cloud-init failed: {output.output}")

    @override
    def disconnect(self) -> None:
        """Close the session and remove what was left in the machine."""
        paths = self._forget_askpass()
        control, self._control = self._control, None
        with contextlib.suppress(OSError):
            # pyinfra removes them after this call, which would start a stopped machine again.
            if paths:
                self._remove_files(control, paths)
        if control is not None:
            control.close()

    def _forget_askpass(self) -> list[str]:
        data = self.host.connector_data
        kinds = ("sudo_askpass_path", "su_askpass_path")
        return [data.pop(key) for key in list(data) if key.startswith(kinds)]

    def _remove_files(self, control: Control | None, paths: list[str]) -> None:
        if control is not None and control.idle:
            removal = StringCommand("rm", "-f", *map(QuoteString, paths))
            control.run(removal.get_raw_value(), _ignore, deadline=time.monotonic() + 10)
        elif self._target:
            self._target.refresh()
            if self._target.state == "running":
                self._as_root("rm", "-f", *paths)

    # Running commands

    def _new_control(self) -> Control:
        if self._target is None:
            raise OSError("not connected")
        return Control(
            self._target,
            user=self.host.data.get("orbstack_user"),
            workdir=self.host.data.get("orbstack_workdir"),
            verify=self._verify,
        )

    def _verify(self, init: str) -> None:
        """See that what is behind a new connection is what we connected to."""
        if init == self._init:
            return
        if self._init and self._target is not None:
            self._target.refresh()
            logger.info(f"{self.host.print_prefix}{self._target} was restarted")
            self._forget_askpass()
        self._init = init

    def _open_session(self) -> Control:
        if self._control is None or not self._control.alive:
            if self._control is not None:
                self._control.close()
            self._control = None
            control = self._new_control()
            control.open()
            self._control = control
        return self._control

    def _run(
        self,
        text: str,
        feed: Feed,
        *,
        stdin: Iterable[bytes] = (),
        timeout: float | None = None,
        pty: bool = False,
    ) -> int:
        """Run shell text in the machine, hand on what it prints and return its exit status."""
        pieces = iter(stdin)
        with _interruptible():
            if pty:
                return self._run_on_terminal(text, feed, pieces, timeout)
            first = _take(pieces, LARGEST_FRAME_STDIN)
            small = sum(map(len, first)) <= LARGEST_FRAME_STDIN
            if small and self._transport == "session":
                with self._lock:
                    return self._run_in_session(text, feed, b"".join(first), timeout)
            return self._run_spawned(text, feed, chain(first, pieces), timeout)

    def _run_lines(
        self, text: str, print_line: Callable[[OutputLine], None] | None = None, **options: Any
    ) -> tuple[int, CommandOutput]:
        """Run shell text and return its exit status and its output in lines."""
        lines = _Lines(print_line)
        try:
            status = self._run(text, lines.feed, **options)
        except TimeoutError:
            raise CommandTimeout(
                f"the command did not end within {options['timeout']:g} s and was ended, "
                "with everything it had started",
                lines.finish(),
            ) from None
        return status, lines.finish()

    def _run_in_session(self, text: str, feed: Feed, stdin: bytes, timeout: float | None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            return self._open_session().run(text, feed, stdin=stdin, deadline=deadline)
        except NotStarted as broken:
            logger.debug(f"{self.host.print_prefix}opening the session again: {broken}")
            return self._open_session().run(text, feed, stdin=stdin, deadline=deadline)

    def _run_spawned(
        self, text: str, feed: Feed, stdin: Iterable[bytes], timeout: float | None
    ) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        # Until START is sent no byte of stdin is read, so a second try has all of it.
        try:
            return self._new_control().spawn(text, feed, stdin=stdin, deadline=deadline)
        except NotStarted as broken:
            logger.debug(f"{self.host.print_prefix}trying again: {broken}")
            return self._new_control().spawn(text, feed, stdin=stdin, deadline=deadline)

    def _run_on_terminal(
        self, text: str, feed: Feed, stdin: Iterable[bytes], timeout: float | None
    ) -> int:
        with self._temporary_files(None) as files:
            path = self._upload(iter([check_text(text)]), files)
            deadline = None if timeout is None else time.monotonic() + timeout
            return self._new_control().terminal(path, feed, stdin=stdin, deadline=deadline)

    @override
    def run_shell_command(
        self,
        command: StringCommand,
        print_output: bool = False,
        print_input: bool = False,
        **arguments: Any,
    ) -> tuple[bool, CommandOutput]:
        """
        Run a command in the machine.

        Returns whether its exit code is one of ``_success_exit_codes``, and its output. Raises
        ``OSError`` when it is unknown how it went, ``TimeoutError`` when it took too long.
        """
        control = extract_control_arguments(arguments)  # type: ignore[arg-type]
        stdin = control.get("_stdin")

        def execute() -> tuple[int, CommandOutput]:
            unix = self._unix_command(command, arguments)
            logger.debug("--> Running command in %s: %s", self._target, unix)
            if print_input:
                echo(f"{self.host.print_prefix}>>> {unix}", err=True)
            try:
                return self._run_lines(
                    unix.get_raw_value(),
                    self._print_line if print_output else None,
                    stdin=_stdin_pieces(stdin),
                    timeout=control.get("_timeout"),
                    pty=bool(control.get("_get_pty")),
                )
            except CommandTimeout as late:
                if not print_output:
                    for line in late.output.combined_lines:
                        self._print_line(line)
                raise

        status, output = execute_command_with_sudo_retry(
            self.host,
            arguments,  # type: ignore[arg-type]
            execute,
        )
        return status in (control.get("_success_exit_codes") or [0]), output

    def _unix_command(
        self, command: str | StringCommand, arguments: dict[str, Any]
    ) -> StringCommand:
        try:
            return make_unix_command_for_host(
                self.state,
                self.host,
                command,  # type: ignore[arg-type]
                **arguments,
            )
        except PyinfraError as broken:
            # During a run pyinfra catches OSError alone; anything else ends it for every host.
            raise OSError(str(broken)) from None

    def _print_line(self, line: OutputLine) -> None:
        text = format_text(line.line, "red") if line.buffer_name == "stderr" else line.line
        echo(f"{self.host.print_prefix}{text}", err=True)

    # Files

    @override
    def put_file(  # type: ignore[override]
        self,
        filename_or_io: str | IO[Any],
        remote_filename: str,
        remote_temp_filename: str | None = None,
        print_output: bool = False,
        print_input: bool = False,
        **arguments: Any,
    ) -> bool:
        """
        Write a local file, or what an IO object holds, into the machine.

        It goes to a private temporary file first, is checked there, and is then written by
        whomever ``_sudo`` and the like name. An existing file keeps its owner, its mode and its
        links, and gets its content back when it cannot be written. Raises ``OSError``.
        """
        timeout = extract_control_arguments(arguments).get("_timeout")  # type: ignore[arg-type]
        folder = arguments.get("_temp_dir") or posixpath.dirname(remote_temp_filename or "")
        with self._temporary_files(folder) as files:
            title = f"uploading {remote_filename}"
            try:
                with transfer.reading(filename_or_io) as source, transfer.shown(title) as count:
                    new = self._upload(map(count, source), files, timeout)
            except transfer.ChecksumMismatch:
                with (
                    transfer.reading(filename_or_io, again=True) as source,
                    transfer.shown(title) as count,
                ):
                    new = self._upload(map(count, source), files, timeout)
            by_name = ""
            if arguments.get("_su_user") and arguments.get("_su_password"):
                # su reads its password from stdin, so the file is opened by its name instead.
                self._as_root("chown", arguments["_su_user"], new)
                by_name = new
            files.target = posixpath.join(files.cwd, remote_filename)
            write = self._unix_command(
                transfer.script(transfer.WRITE, remote_filename, files.path("old"), by_name),
                arguments,
            )
            if print_input:
                echo(f"{self.host.print_prefix}>>> {write}", err=True)
            text = str(write.get_raw_value())
            if not by_name:
                text = transfer.fed(text, new)
            status, output = self._run_lines(text)
            if by_name and status != transfer.KEPT:
                self._as_root("rm", "-f", new)
            files.clean = True
        if status != 0:
            raise OSError(f"cannot write {remote_filename}: {output.stderr or output.output}")
        if print_output:
            echo(f"{self.host.print_prefix}file uploaded: {remote_filename}", err=True)
        return True

    @override
    def get_file(  # type: ignore[override]
        self,
        remote_filename: str,
        filename_or_io: str | IO[Any],
        remote_temp_filename: str | None = None,
        print_output: bool = False,
        print_input: bool = False,
        **arguments: Any,
    ) -> bool:
        """
        Read a file of the machine into a local file or an IO object.

        Nothing local is touched before all of it has arrived and was checked. Raises ``OSError``.
        """
        timeout = extract_control_arguments(arguments).get("_timeout")  # type: ignore[arg-type]
        for attempt in (1, 2):
            mark = secrets.token_hex(8)
            command = self._unix_command(
                transfer.script(transfer.READ, remote_filename, mark), arguments
            )
            if print_input:
                echo(f"{self.host.print_prefix}>>> {command}", err=True)
            shown = transfer.shown(f"downloading {remote_filename}")
            with tempfile.TemporaryFile() as arrived, shown as count:
                digest, errors = transfer.Digest(), bytearray()

                def feed(stream: int, data: bytes) -> None:
                    if stream == STDERR:
                        errors.extend(data)  # noqa: B023
                    else:
                        digest.update(count(data))  # noqa: B023
                        arrived.write(data)

                status = self._run(command.get_raw_value(), feed, timeout=timeout)
                said = errors.decode("utf-8", "replace").splitlines()
                if status != 0:
                    reason = " ".join(line for line in said if mark not in line)
                    raise OSError(f"cannot read {remote_filename}: {reason}")
                # su's prompt may stand before it, without a newline.
                sent = next((line.partition(mark)[2].split() for line in said if mark in line), [])
                if digest.matches(sent):
                    arrived.seek(0)
                    transfer.deliver(arrived, filename_or_io)
                    break
            if attempt == 2:
                raise OSError(f"{remote_filename} arrived with another checksum, twice")
        if print_output:
            echo(f"{self.host.print_prefix}file downloaded: {remote_filename}", err=True)
        return True

    @contextlib.contextmanager
    def _temporary_files(self, folder: str | None) -> Iterator[transfer.Temporary]:
        files = transfer.Temporary(folder or self.state.config.TEMP_DIR or "")
        try:
            yield files
        finally:
            if not files.clean:
                with contextlib.suppress(OSError):
                    self._sweep(files)

    def _upload(
        self, source: Iterator[bytes], files: transfer.Temporary, timeout: float | None = None
    ) -> str:
        """Write a private temporary file in the machine, check it, and return its path."""
        files.begun = True
        digest = transfer.Digest()
        status, output = self._run_lines(
            transfer.script(transfer.UPLOAD, files.folder, files.name).get_raw_value(),
            stdin=map(digest.update, source),
            timeout=timeout,
        )
        if status != 0:
            raise OSError(f"cannot write a temporary file: {output.stderr or output.output}")
        folder, files.cwd, *sums = output.stdout_lines or ["", ""]
        files.folder = folder
        if not digest.matches(" ".join(sums).split()):
            raise transfer.ChecksumMismatch("the file arrived with another checksum")
        return files.path("new")

    def _sweep(self, files: transfer.Temporary) -> None:
        """Remove what an interrupted transfer left, and put a half-written file back."""
        if not files.begun:
            return
        words = transfer.script(transfer.SWEEP_NEW, files.folder, files.name).get_raw_value()
        self._new_control().spawn(words, _ignore, deadline=time.monotonic() + 15)
        if files.target:
            self._as_root("sh", "-c", transfer.SWEEP_OLD, "sh", files.target, files.path("old"))

    def _as_root(self, *words: str) -> None:
        if self._target is None:
            raise OSError("not connected")
        argv = self._target.argv(*words, user="root")
        done = process.run(argv, timeout=30, env=self._target.environment())
        if done.returncode != 0:
            raise OSError(done.stderr.decode("utf-8", "replace").strip())


# Small helpers --------------------------------------------------------------------------------


def _ignore(stream: int, data: bytes) -> None:
    pass


class _Lines:
    """Collects output in lines, split at newlines alone, in the order in which they ended."""

    def __init__(self, on_line: Callable[[OutputLine], None] | None = None) -> None:
        self._on_line = on_line
        self._open = {STDOUT: bytearray(), STDERR: bytearray()}
        self._lines: list[OutputLine] = []

    def feed(self, stream: int, data: bytes) -> None:
        head, newline, tail = data.rpartition(b"\n")
        if newline:
            buffer = self._open[stream]
            for line in bytes(buffer + head).split(b"\n"):
                self._add(stream, line)
            buffer.clear()
        self._open[stream] += tail

    def _add(self, stream: int, data: bytes) -> None:
        name = "stdout" if stream == STDOUT else "stderr"
        line = OutputLine(name, data.decode("utf-8", "replace"))
        self._lines.append(line)
        if self._on_line is not None:
            self._on_line(line)

    def finish(self) -> CommandOutput:
        for stream, rest in self._open.items():
            if rest:
                self._add(stream, bytes(rest))
                rest.clear()
        return CommandOutput(self._lines)


def _is_pattern(name: str) -> bool:
    return any(sign in name for sign in "*?[")


def _known(there: Iterable[orbctl.Machine | docker.Container]) -> str:
    names = sorted(one.name for one in there)
    return f" (there are: {', '.join(names)})" if names else " (there is none)"


def _take(pieces: Iterator[bytes], most: int) -> list[bytes]:
    """Take pieces until there are more than ``most`` bytes, or no more pieces."""
    taken, size = [], 0
    while size <= most:
        piece = next(pieces, None)
        if piece is None:
            break
        taken.append(piece)
        size += len(piece)
    return taken


def _stdin_pieces(stdin: Any) -> Iterator[bytes]:
    """What `_stdin` holds, as bytes.

    Text is pyinfra's: every element and every line ends in a newline. Bytes are passed as they are.
    """
    if stdin is None:
        return
    if hasattr(stdin, "read"):
        if transfer.seekable(stdin):
            stdin.seek(0)
        if isinstance(stdin, TextIOBase):
            stdin = iter(stdin)
        else:
            yield from iter(lambda: stdin.read(CHUNK), b"")
            return
    elif isinstance(stdin, (str, bytes)):
        stdin = [stdin]
    elif hasattr(stdin, "readlines"):
        stdin = stdin.readlines()
    for element in stdin:
        if isinstance(element, bytes):
            yield element
        else:
            yield (element if element.endswith("\n") else f"{element}\n").encode()
