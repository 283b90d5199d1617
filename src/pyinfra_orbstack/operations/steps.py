"""The shell commands of OrbStack operations: calls of the functions in shell/machines.sh."""

from __future__ import annotations

import contextlib
import shlex
from typing import Any

from pyinfra import host, logger
from pyinfra.api import StringCommand
from pyinfra.api.host import Host
from pyinfra.api.state import State
from typing_extensions import override

from pyinfra_orbstack import orbctl, shelltext, waiting
from pyinfra_orbstack.answers import plain_lines
from pyinfra_orbstack.facts.orbstack import MachineData
from pyinfra_orbstack.specification import MachineSpec

call = shelltext.words


def log_change(reason: str) -> None:
    """Log a difference, with ``--dry`` and before pyinfra asks for confirmation, too."""
    logger.info(f"{host.print_prefix}{reason}")


class Making(StringCommand):
    """A command that creates a machine and logs what you should know about the result.

    Attributes:
        spec: The specification of the machine, if known.
    """

    spec: MachineSpec | None = None

    @override
    def execute(self, state: State, host: Host, connector_arguments: Any) -> Any:
        """Run it and check the result."""
        status, output = super().execute(state, host, connector_arguments)
        if status:
            said = [] if state.print_output else plain_lines(output.stderr)
            for line in [*said, *self._differences(output.stdout)]:
                logger.warning(f"{host.print_prefix}{line}")
        return status, output

    def _differences(self, told: str) -> list[str]:
        with contextlib.suppress(orbctl.BadAnswer):
            if self.spec is not None:
                made = orbctl.parse_info(told)
                found = self.spec.unlike(made.distro, made.version, made.arch)
                return [f"machine {made.name} was created, but {one}" for one in found]
        return []


def run(*calls: str) -> StringCommand:
    """A chain of calls; each runs only if the one before it succeeds."""
    # OrbStack belongs to the user who is logged in; root has none.
    return StringCommand(shelltext.command(" && ".join(calls)), _sudo=False)


def make(call: str) -> Making:
    """A call that creates a machine."""
    return Making(shelltext.command(call), _sudo=False)


def orb(*args: str) -> str:
    """A call of `orbctl` that changes something."""
    return call("orb", *args)


def start(name: str) -> str:
    """A call that starts a machine."""
    return orb(*orbctl.machine_args("start", name))


def stop(name: str, force: bool = False) -> str:
    """A call that stops a machine."""
    return orb(*orbctl.machine_args("stop --force" if force else "stop", name))


def wait(name: str, seconds: int, cloud_init: bool = False) -> StringCommand:
    """Wait until a machine answers, and until cloud-init is done."""
    calls = [call("until_it_answers", orbctl.check_name(name), seconds)]
    if cloud_init:
        calls.append(call("finish_cloud_init", name, waiting.cloud_init()))
    return run(*calls)


def create(spec: MachineSpec, script: str, digest: str) -> StringCommand:
    """Create a machine and record it; a cloud-init file arrives on stdin."""
    args = spec.create_args()
    words = [
        shelltext.mac_path(word) if before == "--mount" else shlex.quote(word)
        for before, word in zip(["", *args], args)
    ]
    length = len(script.encode())
    function = ["make_from_user_data", digest, length] if script else ["make_machine"]
    command = make(" ".join([call(*function, spec.name), *words]))
    command.spec = spec
    if script:
        command.connector_arguments["_stdin"] = script
    return command


def clone(source: str, name: str) -> StringCommand:
    """Copy a machine and record the copy."""
    return make(call("make_machine", name, *orbctl.machine_args("clone", source, name)))


def import_(path: str, name: str) -> StringCommand:
    """Create a machine from a file and record it."""
    *args, last = orbctl.import_args(path, name)
    return make(f"{call('make_machine', name, *args)} {shelltext.mac_path(last)}")


def delete(found: MachineData) -> StringCommand:
    """Delete by name, as `orbctl` requires, but only the machine that was checked."""
    name, machine_id = orbctl.check_name(found["name"]), orbctl.check_id(found["id"])
    return run(call("remove_all_of", name, machine_id))


def set_user(
    name: str, user: str, seconds: int, *, was_running: bool, running: bool
) -> StringCommand:
    """Change the default user, which requires the machine to run."""
    words = [orbctl.check_name(name), orbctl.check_value("user", user)]
    if was_running:
        return run(call("set_user", *words))
    stay = ["stay"] if running else []
    return run(call("set_user_when_stopped", *words, seconds, *stay))


def reconfigure(
    name: str, settings: dict[str, str], *, was_running: bool, running: bool
) -> StringCommand:
    """Change settings that take effect at the next start.

    The machine stops first, so that the next run completes one that was interrupted anywhere.
    """
    pairs = [word for pair in settings.items() for word in pair]
    if was_running and running:
        return run(call("restart_with", orbctl.check_name(name), *pairs))
    return run(
        *([stop(name)] if was_running else []),
        call("change_settings", orbctl.check_name(name), *pairs),
        *([start(name)] if running else []),
    )
