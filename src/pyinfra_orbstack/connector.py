"""The ``@orbstack`` connector: OrbStack's machines and containers as pyinfra hosts."""

from __future__ import annotations

import contextlib
import math
import os
import posixpath
from collections.abc import Iterable, Iterator
from typing import IO, TYPE_CHECKING, Any

if not TYPE_CHECKING:
    from pyinfra_orbstack._compat import half_imported as __getattr__  # noqa: F401

import pyinfra.api  # noqa: F401  (first, and whole)
from pyinfra import logger
from pyinfra.api.arguments import CONNECTOR_ARGUMENT_KEYS
from pyinfra.api.command import StringCommand
from pyinfra.api.exceptions import ConnectError, PyinfraError
from pyinfra.connectors.base import BaseConnector, DataMeta
from pyinfra.connectors.util import (
    CommandOutput,
    OutputLine,
    extract_control_arguments,
    make_unix_command_for_host,
)
from typing_extensions import TypedDict, override

from pyinfra_orbstack import (
    interrupts,
    inventory,
    launch,
    orbctl,
    rsync,
    specification,
    sudo,
    transfer,
)
from pyinfra_orbstack._compat import echo, red
from pyinfra_orbstack.localfile import printable
from pyinfra_orbstack.places import SSH_KEY
from pyinfra_orbstack.provision import Provision
from pyinfra_orbstack.runner import (
    TRANSPORTS,
    CommandTimeout,
    Runner,
    can_be_read_again,
    choose_transport,
    stdin_pieces,
)
from pyinfra_orbstack.targets import Target, meaning

if TYPE_CHECKING:
    from pyinfra.api.host import Host
    from pyinfra.api.state import State

#: Seconds for sudo to say whether it needs a password.
PROBE_TIMEOUT = 30.0


# Any value reaches `connect`, where a wrong one fails its own host and no other.
class ConnectorData(TypedDict):
    orbstack_image: Any
    orbstack_arch: Any
    orbstack_create_user: Any
    orbstack_cloud_init: Any
    orbstack_isolated: Any
    orbstack_isolate_network: Any
    orbstack_mounts: Any
    orbstack_cpus: Any
    orbstack_memory: Any
    orbstack_disk: Any
    orbstack_user: Any
    orbstack_workdir: Any
    orbstack_create: Any
    orbstack_start: Any
    orbstack_boot_timeout: Any
    orbstack_transport: Any
    orbstack_ssh: Any


_DESCRIPTIONS = {
    "orbstack_image": "Image to create the machine from when it does not exist",
    "orbstack_arch": "Architecture of a created machine: arm64 or amd64",
    "orbstack_create_user": "Default user of a created machine",
    "orbstack_cloud_init": "Path of a cloud-init file for a created machine",
    "orbstack_isolated": "Whether a created machine shares no files with the Mac",
    "orbstack_isolate_network": (
        "Whether a created, isolated machine reaches neither the Mac nor other machines"
    ),
    "orbstack_mounts": "Directories to mount in a created, isolated machine: SRC[:DEST]",
    "orbstack_cpus": "CPU limit of a created machine",
    "orbstack_memory": "Memory limit of a created machine: MiB, or with a unit as in 4G",
    "orbstack_disk": "Disk limit of a created machine, such as 64G",
    "orbstack_user": "User to run commands as, without sudo",
    "orbstack_workdir": "Directory in which commands start, the user's home by default",
    "orbstack_create": "Whether connecting may create the machine",
    "orbstack_start": "Whether connecting may start the machine",
    "orbstack_boot_timeout": "Seconds to wait for a machine to answer",
    "orbstack_transport": "How commands run: session (one open shell) or spawn",
    "orbstack_ssh": "SSH destination of the Mac that has the machine, such as me@mac",
}
connector_data_meta: dict[str, DataMeta] = {
    key: DataMeta(description, specification.DEFAULTS.get(key))
    for key, description in _DESCRIPTIONS.items()
}


class OrbStackConnector(BaseConnector):
    """
    Runs commands in OrbStack machines, through its command line ``orbctl``, and in containers of
    its engine, through the docker command.

    + ``@orbstack``: all running machines.
    + ``@orbstack/NAME``: that machine. It is started if it is stopped, and created if it does not
      exist and its data contains ``orbstack_image``.
    + ``@orbstack/web-*``: every machine that matches, running or not.
    + ``@orbstack/docker``: all running containers; ``@orbstack/docker/web-*``: the running
      containers that match.
    + ``@orbstack/docker/NAME``: that container, by name or by an id prefix. It is started if it is
      stopped.
    + ``@orbstack/plain/NAME``, and ``@orbstack/plain`` before any of the others: the same hosts,
      which pyinfra then calls ``NAME``.

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
        self.runner: Runner | None = None
        self._transport = TRANSPORTS[0]
        self._askpass = sudo.AskpassFiles(host)
        # Deploys also read the data of hosts that are not connected. Connecting reports errors.
        with contextlib.suppress(Exception):
            inventory.check_place(host, host.data.get(SSH_KEY))
        # pyinfra ends such a run with success, and does not say what a limit would match.
        ours = (one for one in state.inventory if one.connector_cls is type(self))
        if state.limit_hosts == [] and host is next(ours):
            logger.warning(
                "--limit and --exclude leave no host: use groups, patterns of names, or whole "
                f"names such as {host.name}"
            )

    @override
    @staticmethod
    def make_names_data(name: str | None = None) -> Iterator[inventory.Host]:
        return inventory.hosts(name)

    # Connecting

    @override
    def connect(self) -> None:
        """
        Make the machine ready for commands: create, start and wait for it, as its data says.

        A container is started if needed, never created. Raises ``ConnectError``, with one line that
        says what to do.
        """
        interrupts.watch()
        try:
            with interrupts.interruptible():
                self._close()
                self._provide()
        except (orbctl.OrbctlError, OSError) as broken:
            raise ConnectError(str(broken)) from None

    def _provide(self) -> None:
        # No data says what kind of host this is, only the name in the inventory.
        asked = meaning(self.host)
        if asked is None:
            raise ConnectError(f"{self.host.name} is not a host of this connector")
        if asked.is_pattern:
            raise ConnectError(inventory.no_match(asked))
        if not asked.container:
            orbctl.check_name(asked.name)
        given = self.host.data.dict()
        specification.check_keys(given)
        data = specification.check_data(given)
        if os.environ.get(orbctl.PLAN_VARIABLE) == "1":
            data.update(orbstack_create=False, orbstack_start=False)
        self._settings = specification.Settings.from_data(data)
        self._transport = choose_transport(self._settings.transport)
        inventory.check_place(self.host, self._settings.ssh)
        provision = Provision(
            self._settings, open_runner=self._open_runner, prefix=self.host.print_prefix
        )
        if asked.container:
            provision.container(asked.name)
        else:
            provision.machine(specification.MachineSpec.from_data(asked.name, data))

    def _open_runner(self, target: Target, *, anywhere: bool = False) -> Runner:
        """Open the first session in the target that this host refers to from now on."""
        self._close()
        self.runner = Runner(
            target,
            user=self._settings.user,
            workdir=None if anywhere else self._settings.workdir,
            transport=self._transport,
            on_restart=self._askpass.forget,
            prefix=self.host.print_prefix,
        )
        try:
            self.runner.open()
            # Otherwise the commands of all hosts would fail, and not only the hosts too many.
            launch.check_spare()
        except BaseException:
            self._close()
            raise
        return self.runner

    def _close(self) -> None:
        runner, self.runner = self.runner, None
        if runner is not None:
            runner.close()

    def _connected(self) -> Runner:
        if self.runner is None:
            raise OSError("not connected")
        return self.runner

    @override
    def disconnect(self) -> None:
        """Close the session and remove temporary files from the machine; never fails."""
        runner, self.runner = self.runner, None
        try:
            self._askpass.forget()
            # pyinfra removes them after this call, which would start a stopped machine again.
            if runner is not None:
                self._askpass.remove(runner)
        except Exception as broken:
            logger.debug(f"{self.host.print_prefix}disconnecting: {broken}")
        finally:
            if runner is not None:
                with contextlib.suppress(Exception):
                    runner.close()

    # Running commands

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
        ``OSError`` if its outcome is unknown, ``TimeoutError`` if it took too long.
        """
        runner = self._connected()
        control = extract_control_arguments(arguments)  # type: ignore[arg-type]
        stdin, pty = control.get("_stdin"), bool(control.get("_get_pty"))

        def execute() -> tuple[int, CommandOutput]:
            unix = self._unix_command(command, arguments)
            logger.debug("--> Running command in %s: %s", runner.target, unix)
            if print_input:
                self._print_input(unix)
            try:
                return runner.run_lines(
                    unix.get_raw_value(),
                    self._print_line if print_output else None,
                    stdin=stdin_pieces(stdin),
                    timeout=_seconds(control.get("_timeout")),
                    pty=pty,
                )
            except CommandTimeout as late:
                if not print_output:
                    for line in late.output.combined_lines:
                        self._print_line(line)
                raise

        with interrupts.interruptible():
            asked = not arguments.get("_sudo") or bool(arguments.get("_sudo_password"))
            if not asked and not can_be_read_again(stdin):
                self._ask_password(arguments, pty)
            status, output = execute()
            if not asked and sudo.refused(status, output) and self._ask_password(arguments, pty):
                status, output = execute()
        return status in (control.get("_success_exit_codes") or [0]), output

    def _ask_password(self, arguments: dict[str, Any], pty: bool) -> bool:
        """Prompt for the sudo password if sudo needs one; return whether there is one now."""
        kinds = ("_sudo", "_use_sudo", "_preserve_sudo")
        only = {key: value for key, value in arguments.items() if key.startswith(kinds)}

        def probe() -> tuple[int, CommandOutput]:
            text = self._unix_command(StringCommand("true"), only).get_raw_value()
            return self._connected().run_lines(text, timeout=PROBE_TIMEOUT, pty=pty)

        return sudo.refused(*probe()) and sudo.ask(self.host, lambda: probe()[0] == 0)

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
            # During a run pyinfra catches only OSError; anything else ends it for every host.
            raise OSError(str(broken)) from None
        finally:
            self._askpass.note()

    def _print_input(self, command: str | StringCommand) -> None:
        echo(f"{self.host.print_prefix}>>> {command}")

    def _print_line(self, line: OutputLine) -> None:
        text = red(line.line) if line.buffer_name == "stderr" else line.line
        echo(f"{self.host.print_prefix}{text}")

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
        Write a local file, or the content of an IO object, into the machine.

        The user that ``_sudo`` and similar arguments select writes the file beside its target,
        checks it there and renames it to the target. An existing file keeps its owner, its mode
        and its links. Raises ``OSError``; the target is then unchanged.
        """
        if print_input:
            self._print_input(f"upload {printable(remote_filename)}")
        folder = arguments.get("_temp_dir") or posixpath.dirname(remote_temp_filename or "")
        transfer.Upload(
            self._connected(),
            remote_filename,
            lambda command: self._unix_command(command, arguments),
            place=folder or self.state.config.TEMP_DIR or "",
            **_transfer_options(arguments),
        ).put(filename_or_io)
        if print_output:
            echo(f"{self.host.print_prefix}file uploaded: {remote_filename}")
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

        Nothing local changes before all of the file has arrived and was checked. Raises
        ``OSError``.
        """
        if print_input:
            self._print_input(f"download {printable(remote_filename)}")
        transfer.Download(
            self._connected(),
            remote_filename,
            lambda command: self._unix_command(command, arguments),
            **_transfer_options(arguments),
        ).get(filename_or_io)
        if print_output:
            echo(f"{self.host.print_prefix}file downloaded: {remote_filename}")
        return True

    @override
    def check_can_rsync(self) -> None:
        """
        Warn, before any operation runs, if rsync is missing here or in the machine.

        An earlier operation may install it. If this raised, pyinfra would end the run of all hosts,
        so ``rsync`` raises instead.
        """
        if self.host.executing_op_hash is None:
            given: Any = self.host.current_op_global_arguments or {}
            arguments: Any = {key: given[key] for key in CONNECTOR_ARGUMENT_KEYS if key in given}
            extract_control_arguments(arguments)
            with contextlib.suppress(OSError):
                for problem in (rsync.missing(), self._no_rsync(**arguments)):
                    if problem:
                        logger.warning(f"{self.host.print_prefix}{problem}")

    def _no_rsync(self, **arguments: Any) -> str:
        """Why rsync cannot run in the machine; "" if it can."""
        _, output = self.run_shell_command(rsync.FIND, **arguments, _timeout=PROBE_TIMEOUT)
        if output.stdout_lines:
            return ""
        # An error is sudo's, or that of another wrapper.
        return " ".join(output.stderr_lines) or rsync.missing_in(self._connected().target)

    @override
    def rsync(
        self,
        src: str,
        dest: str,
        flags: Iterable[str],
        print_output: bool = False,
        print_input: bool = False,
        **arguments: Any,
    ) -> bool:
        """
        Copy local files into the machine with rsync's own client.

        The user that ``_sudo`` and similar arguments select runs rsync in the machine. Raises
        ``OSError``.
        """
        runner = self._connected()
        control = extract_control_arguments(arguments)  # type: ignore[arg-type]
        if arguments.get("_su_user") and arguments.get("_su_password"):
            raise OSError(
                "files.rsync cannot use _su_password, as su reads it from stdin: use _sudo"
            )
        work = rsync.Transfer(src, dest, flags)
        if problem := rsync.missing() or (work.needs_rsync and self._no_rsync(**arguments)):
            raise OSError(problem)
        unix = self._unix_command(work.server, arguments)
        if print_input:
            echo(f"{self.host.print_prefix}>>> {work}")
        status, output = runner.relay_lines(
            work.client,
            unix.get_raw_value(),
            self._print_line if print_output else None,
            _seconds(control.get("_timeout")),
        )
        if status not in (control.get("_success_exit_codes") or [0]):
            raise OSError(rsync.failure(status, output))
        return True


def _transfer_options(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of pyinfra's arguments that apply to a transfer, and not to its commands."""
    return {
        "timeout": _seconds(
            extract_control_arguments(arguments).get("_timeout")  # type: ignore[arg-type]
        ),
        # su reads its password from stdin.
        "stdin_taken": bool(arguments.get("_su_user") and arguments.get("_su_password")),
    }


def _seconds(timeout: Any) -> float | None:
    """A `_timeout`, which may be text in a host's data."""
    try:
        number = None if timeout is None else float(timeout)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if number is not None and math.isnan(number):
        raise OSError(f"_timeout must be a number of seconds, not {timeout!r}")
    return number
