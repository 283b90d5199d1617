"""The only interface to OrbStack: it builds `orbctl` command lines and parses their output.

All code that needs OrbStack uses this module: the connector and the tests call `Orbctl`, facts and
operations only use its argument lists and parsers, since they run on the target host.
tests/contract checks how `orbctl` behaves, and docs/simulator.md describes what those tests cannot
see. Behaviour that is only assumed is handled for every possible interpretation.
"""

from __future__ import annotations

import os
import pwd
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import gevent

from pyinfra_orbstack import places, process
from pyinfra_orbstack.answers import (
    BadAnswer,
    BadValue,
    Machine,
    MachineExists,
    MachineNotFound,
    OrbctlError,
    OrbctlMissing,
    error_of,
    parse_config,
    parse_info,
    parse_list,
    parse_ssh,
    parse_status,
    parse_value,
    parse_version,
)
from pyinfra_orbstack.arguments import (
    RESERVED_NAMES,
    check_arch,
    check_id,
    check_name,
    check_value,
    config_args,
    create_args,
    export_args,
    import_args,
    info_args,
    limits,
    machine_args,
    machine_key,
    run_args,
    shell_line,
)
from pyinfra_orbstack.places import HERE, Place, PlaceError
from pyinfra_orbstack.record import RECORD_VARIABLE, Record
from pyinfra_orbstack.shelltext import KNOWN_FOLDERS

__all__ = [
    "COMMAND_VARIABLE",
    "KNOWN_FOLDERS",
    "PLAN_VARIABLE",
    "RECORD_VARIABLE",
    "RESERVED_NAMES",
    "BadAnswer",
    "BadValue",
    "Machine",
    "MachineExists",
    "MachineNotFound",
    "Orbctl",
    "OrbctlError",
    "OrbctlMissing",
    "Record",
    "check_arch",
    "check_id",
    "check_name",
    "check_value",
    "config_args",
    "create_args",
    "error_of",
    "export_args",
    "find",
    "import_args",
    "info_args",
    "limits",
    "machine_args",
    "machine_key",
    "parse_config",
    "parse_info",
    "parse_list",
    "parse_ssh",
    "parse_status",
    "parse_value",
    "parse_version",
    "run_args",
    "shell_line",
]

#: Names the executable to use as `orbctl`, before any other place is searched.
COMMAND_VARIABLE = "PYINFRA_ORBSTACK_ORBCTL"
#: If "1", connecting neither creates nor starts machines.
PLAN_VARIABLE = "PYINFRA_ORBSTACK_PLAN"

READ_TIMEOUT = 30.0
CHANGE_TIMEOUT = 120.0
#: `create` may download an image first.
CREATE_TIMEOUT = 900.0
#: Seconds before a read-only call is repeated, after a possibly temporary error.
PAUSE = 0.5

T = TypeVar("T")


def no_executable(variable: str, value: str) -> str:
    """The message about a variable that should name an executable."""
    return f"{variable} is set to {value!r}, but no such executable was found: correct or unset it"


def find() -> str:
    """Return the `orbctl` to use.

    `PYINFRA_ORBSTACK_ORBCTL` comes first, then PATH, then the directories that OrbStack and
    Homebrew use. The simulator is never chosen automatically.

    Raises:
        OrbctlMissing: There is none.
    """
    named = os.environ.get(COMMAND_VARIABLE)
    if named:
        found = shutil.which(os.path.expanduser(named))
        if not found:
            raise OrbctlMissing(no_executable(COMMAND_VARIABLE, named))
        return found
    folders = os.pathsep.join(os.path.expanduser(folder) for folder in KNOWN_FOLDERS)
    found = shutil.which("orbctl") or shutil.which("orbctl", path=folders)
    if found:
        return found
    if sys.platform == "darwin":
        raise OrbctlMissing("orbctl not found: install OrbStack (brew install orbstack)")
    raise OrbctlMissing(
        "orbctl not found: OrbStack runs on macOS only; to use the simulator instead, "
        f"set {COMMAND_VARIABLE}=orbctl-simulator"
    )


class Orbctl:
    """`orbctl` on this host, or on a Mac that ssh reaches.

    Args:
        command: The executable on this host; None for the one that `find` returns.
        place: Where it is; by default the Mac of `PYINFRA_ORBSTACK_SSH` if that is set, and if
            ``command`` is not.

    Raises:
        OrbctlMissing: There is none.

    Every method raises `OrbctlError` if `orbctl` fails, hangs or prints something invalid.
    """

    def __init__(self, command: str | None = None, place: Place | None = None) -> None:
        self.place = place or (HERE if command else places.place_of())
        self.command = command or ("orbctl" if self.place.far else find())

    def argv(self, args: Sequence[str], *, tty: bool = False) -> list[str]:
        """The whole command line for ``args``; on a Mac, ``tty`` says whether it has a terminal."""
        return self.place.argv([self.command, *args], tty=tty)

    def line(self, args: Sequence[str]) -> str:
        """The command line for ``args``, as shown to the user."""
        return self.place.shown(shell_line(args))

    @staticmethod
    def environment() -> dict[str, str]:
        """Our environment, with HOME, without which `orbctl` does not find OrbStack.

        Raises:
            OrbctlError: There is no HOME, and no account that has one.
        """
        env = dict(os.environ)
        if not env.get("HOME"):
            user = os.getuid()
            try:
                env["HOME"] = pwd.getpwuid(user).pw_dir
            except KeyError:
                raise OrbctlError(
                    f"HOME is not set, and user {user} has no account: set HOME"
                ) from None
        return env

    def call(
        self, *args: str, timeout: float | None = None, stdin: bytes = b""
    ) -> process.Completed:
        """Call `orbctl` and return its output."""
        timeout = READ_TIMEOUT if timeout is None else timeout
        env = self.environment()
        try:
            words = [self.command, *args]
            done = self.place.run(words, stdin=stdin, timeout=timeout, env=env)
        except PlaceError as broken:
            raise OrbctlMissing(str(broken)) from None
        except TimeoutError:
            raise OrbctlError(
                f"orbctl {args[0]} did not answer in {timeout:g} s: try `orbctl status`"
            ) from None
        except OSError as broken:
            raise OrbctlMissing(f"cannot run {self.command}: {broken.strerror}") from None
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace")
            if problem := self.place.problem(done.returncode, said):
                raise OrbctlMissing(problem)
            raise error_of(said, done.returncode)
        return done

    def _read(self, parse: Callable[[str], T], *args: str) -> T:
        """The result of a read-only call; it is repeated once after a temporary error."""
        try:
            return parse(self.call(*args).stdout.decode(errors="replace"))
        except (MachineNotFound, OrbctlMissing):
            raise
        except OrbctlError:
            gevent.sleep(PAUSE)
        return parse(self.call(*args).stdout.decode(errors="replace"))

    def machines(self) -> list[Machine]:
        """All machines, running or not."""
        return self._read(parse_list, "list", "--format", "json")

    def info(self, name: str) -> Machine:
        """One machine.

        Raises:
            MachineNotFound: There is no machine of that name.
        """
        return self._read(parse_info, "info", check_name(name), "--format", "json")

    def create(self, args: Sequence[str]) -> None:
        """Create a machine from `create_args`.

        Raises:
            MachineExists: A machine of that name already exists.
        """
        self.call(*args, timeout=CREATE_TIMEOUT)

    def start(self, name: str) -> None:
        """Start a machine; starting a running one does nothing."""
        self.call("start", check_name(name), timeout=CHANGE_TIMEOUT)

    def stop(self, name: str) -> None:
        """Stop a machine."""
        self.call("stop", check_name(name), timeout=CHANGE_TIMEOUT)

    def restart(self, name: str) -> None:
        """Restart a machine."""
        self.call("restart", check_name(name), timeout=CHANGE_TIMEOUT)

    def clone(self, source: str, name: str) -> None:
        """Copy a machine; the copy is stopped."""
        self.call("clone", check_name(source), check_name(name), timeout=CHANGE_TIMEOUT)

    def delete(self, name: str, machine_id: str) -> bool:
        """Delete the machine that has this name and this id, and no other.

        By name, because `orbctl delete` crashes when it is given an id (2.2.1 to 2.2.3).

        Returns:
            False if the machine no longer exists.
        """
        try:
            if self.info(name).id != machine_id:
                return False
            self.call("delete", "-f", check_name(name), timeout=CHANGE_TIMEOUT)
        except MachineNotFound:
            return False
        return True

    def remove(self, machine: Machine) -> bool:
        """Delete a machine, even if it was renamed since the last check.

        Returns:
            False if the machine no longer exists.
        """
        if self.delete(machine.name, machine.id):
            return True
        left = next((one for one in self.machines() if one.id == machine.id), None)
        if left is None:
            return False
        if not self.delete(left.name, left.id):
            raise OrbctlError(f"it was renamed again, last to {left.name}: try again")
        return True
