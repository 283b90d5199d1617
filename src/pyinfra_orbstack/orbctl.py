"""The one door to OrbStack: `orbctl` command lines are built here, and its answers read.

Whoever needs OrbStack goes through this module: the connector and the tests call `Orbctl`, facts
and operations take the argument lists and parsers alone, since they run on the host they target.
How `orbctl` behaves, and how sure that is, stands in docs/orbctl.md; what is only believed is
handled under every reading.
"""

from __future__ import annotations

import fcntl
import json
import os
import pwd
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pyinfra_orbstack import process

#: Names a program to be used as `orbctl`, before any other place is looked at.
COMMAND_VARIABLE = "PYINFRA_ORBSTACK_ORBCTL"
#: Names a file in which whoever creates machines writes down their names and ids.
RECORD_VARIABLE = "PYINFRA_ORBSTACK_RECORD"

#: Where OrbStack and Homebrew put `orbctl`, for processes with a short PATH.
KNOWN_FOLDERS = (
    "/usr/local/bin",
    "/opt/homebrew/bin",
    "~/.orbstack/bin",
    "/Applications/OrbStack.app/Contents/MacOS/bin",
)
#: Words that `orbctl` takes for something else than a machine.
RESERVED_NAMES = frozenset({"all", "default", "docker", "k8s", "none"})

READ_TIMEOUT = 30.0
CHANGE_TIMEOUT = 120.0
#: `create` may download an image first.
CREATE_TIMEOUT = 900.0


class OrbctlError(Exception):
    """`orbctl` is missing, failed, or answered nonsense; the text is one line."""


class OrbctlMissing(OrbctlError):
    """There is no `orbctl` to call."""


class MachineNotFound(OrbctlError):
    """OrbStack knows no machine of that name."""


class MachineExists(OrbctlError):
    """There already is a machine of that name."""


class BadAnswer(OrbctlError):
    """`orbctl` printed something that cannot be an answer."""


class BadValue(OrbctlError, ValueError):
    """A value that must not reach `orbctl`; nothing was run."""


@dataclass(frozen=True)
class Machine:
    """One machine as `orbctl list` and `orbctl info` show it.

    Attributes:
        id: ULID, kept over renames and restarts.
        name: Name, also the guest's hostname.
        state: ``running`` and ``stopped`` are certain; anything else means busy.
        distro: Such as ``ubuntu``.
        version: The codename, such as ``noble``, whatever was typed at creation.
        arch: ``arm64`` or ``amd64``.
        variant: ``default``, or ``cloud`` when made with cloud-init.
        username: The default user.
        isolated: Whether it is cut off from the Mac's files; None when OrbStack does not say.
        builtin: Whether it is one of OrbStack's own.
        record: The whole record, for what only some versions of OrbStack report.
        ip4: Address, known from `info` of a running machine only.
        ip6: Likewise.
        disk_size: Bytes used, from `info` only.
    """

    id: str
    name: str
    state: str
    distro: str = ""
    version: str = ""
    arch: str = ""
    variant: str = ""
    username: str = ""
    isolated: bool | None = None
    builtin: bool = False
    record: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    ip4: str | None = None
    ip6: str | None = None
    disk_size: int | None = None

    @property
    def running(self) -> bool:
        """Whether its state is ``running``."""
        return self.state == "running"

    @property
    def created(self) -> datetime | None:
        """When it was made, read from the first ten characters of its ULID."""
        alphabet = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
        stamp = self.id[:10].upper()
        if len(self.id) != 26 or any(letter not in alphabet for letter in stamp):
            return None
        millis = 0
        for letter in stamp:
            millis = millis * 32 + alphabet.index(letter)
        return datetime.fromtimestamp(millis / 1000, tz=timezone.utc)


# What goes in ---------------------------------------------------------------------------------


def check_value(what: str, value: str) -> str:
    """Return ``value`` if it can be one argument of `orbctl`.

    Raises:
        BadValue: It is empty, begins with ``-`` or holds a control character.
    """
    if not value:
        raise BadValue(f"{what} is empty")
    if value.startswith("-"):
        raise BadValue(f"{what} {value!r} begins with '-', which orbctl would take for a flag")
    if re.search(r"[\x00-\x1f\x7f]", value):
        raise BadValue(f"{what} {value!r} holds a control character")
    return value


def check_name(name: str) -> str:
    """Return ``name`` if a machine can bear it.

    OrbStack's own rules are not documented, so only what cannot be a hostname, or would mean
    something else to `orbctl`, is refused.

    Raises:
        BadValue: The name is empty, reserved, begins with ``-``, or holds a space, a slash or a
            control character.

    >>> check_name("web-1")
    'web-1'
    """
    check_value("machine name", name)
    if name in RESERVED_NAMES:
        raise BadValue(f"machine name {name!r} is reserved by OrbStack")
    if re.search(r"[\s/]", name) or name in (".", ".."):
        raise BadValue(f"machine name {name!r} holds a space or a slash")
    return name


def run_args(name: str, argv: Sequence[str], *, user: str | None = None) -> list[str]:
    """Arguments that run a command in a machine, which is started if it is stopped.

    The working directory is always given: `orbctl` would take over the caller's.
    """
    if argv[0].startswith("-"):
        raise BadValue(f"command {argv[0]!r} begins with '-', which orbctl would take for a flag")
    as_user = ["-u", check_value("user", user)] if user else []
    return ["run", "-m", check_name(name), *as_user, "-w", "/", *argv]


def create_args(
    name: str,
    image: str,
    *,
    arch: str | None = None,
    user: str | None = None,
    cloud_init: str | None = None,
    cpus: str | int | None = None,
    memory: str | int | None = None,
    disk: str | int | None = None,
    isolated: bool = False,
    isolate_network: bool = False,
    mounts: Iterable[str] = (),
    forward_ssh_agent: bool = False,
) -> list[str]:
    """Arguments that create a machine.

    Args:
        name: Its name.
        image: ``DISTRO`` or ``DISTRO:VERSION``, such as ``ubuntu:noble``.
        arch: ``arm64`` or ``amd64``; None for the Mac's own.
        user: Default user; None for the Mac user.
        cloud_init: Path of a cloud-init file.
        cpus: Number of CPUs (OrbStack 2.2).
        memory: MiB, or a number with a unit such as ``4G`` (OrbStack 2.2).
        disk: A number with a unit such as ``64G`` (OrbStack 2.2).
        isolated: No file sharing with the Mac (OrbStack 2.1).
        isolate_network: With ``isolated``: no other machine and no address of the Mac either.
        mounts: ``SRC[:DEST]``, with ``isolated`` only.
        forward_ssh_agent: For isolated machines, where it is off otherwise.

    Raises:
        BadValue: A value that cannot be one argument, or flags that exclude each other.
    """
    args = ["create"]
    for flag, value in (
        ("--arch", arch),
        ("--user", user),
        ("--user-data", cloud_init),
        ("--cpus", cpus),
        ("--memory", memory),
        ("--disk", disk),
    ):
        if value is not None:
            args += [flag, check_value(flag.lstrip("-"), str(value))]
    mounts = list(mounts)
    if not isolated and (isolate_network or mounts):
        raise BadValue("isolate_network and mounts need isolated")
    for flag, wanted in (
        ("--isolated", isolated),
        ("--isolate-network", isolate_network),
        ("--forward-ssh-agent", forward_ssh_agent),
    ):
        if wanted:
            args.append(flag)
    for mount in mounts:
        args += ["--mount", check_value("mount", mount)]
    return [*args, check_value("image", image), check_name(name)]


def shell_line(args: Sequence[str]) -> str:
    """The command line for ``args``, to be shown to the user."""
    return shlex.join(["orbctl", *args])


# What comes out -------------------------------------------------------------------------------


def _json(text: str, opening: str) -> Any:
    """Read the JSON in an answer, around which `orbctl` may have printed its update banner."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r"^\s*" + re.escape(opening), text, re.MULTILINE):
        try:
            return decoder.raw_decode(text, match.end() - 1)[0]
        except json.JSONDecodeError:
            continue
    shown = " ".join(text.split())
    raise BadAnswer(f"orbctl did not answer with JSON: {shown[:120]!r}")


def _machine(record: Any, **extra: Any) -> Machine:
    if not isinstance(record, dict):
        raise BadAnswer(f"orbctl listed something that is no machine: {record!r:.120}")
    for key in ("id", "name", "state"):
        if not isinstance(record.get(key), str) or not record[key]:
            raise BadAnswer(f"orbctl listed a machine without {key}: {record!r:.120}")
    image, config = record.get("image") or {}, record.get("config") or {}
    if not isinstance(image, dict) or not isinstance(config, dict):
        raise BadAnswer(f"orbctl listed a machine with an odd image or config: {record!r:.120}")
    isolated = config.get("isolated")
    return Machine(
        id=record["id"],
        name=record["name"],
        state=record["state"],
        distro=str(image.get("distro") or ""),
        version=str(image.get("version") or ""),
        arch=str(image.get("arch") or ""),
        variant=str(image.get("variant") or ""),
        username=str(config.get("default_username") or ""),
        isolated=isolated if isinstance(isolated, bool) else None,
        builtin=record.get("builtin") is True,
        record=record,
        **extra,
    )


def parse_list(text: str) -> list[Machine]:
    """Read ``orbctl list --format json``.

    Raises:
        BadAnswer: It is not a list of machines, or names one twice.
    """
    machines = [_machine(record) for record in _json(text, "[")]
    names = [machine.name for machine in machines]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BadAnswer(f"orbctl listed {', '.join(twice)} twice")
    return [machine for machine in machines if not machine.builtin]


def parse_info(text: str) -> Machine:
    """Read ``orbctl info NAME --format json``; older versions print the bare record.

    Raises:
        BadAnswer: It is not about a machine.
    """
    info = _json(text, "{")
    if "record" not in info:
        return _machine(info)
    size = info.get("disk_size")
    return _machine(
        info["record"],
        ip4=info.get("ip4") or None,
        ip6=info.get("ip6") or None,
        disk_size=size if isinstance(size, int) else None,
    )


def error(stderr: str, status: int) -> OrbctlError:
    """Turn what a failed `orbctl` printed into one typed line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    # The number in "[-32098] ..." differs between versions; the words do not.
    said = next((line for line in lines if line.startswith("[-32")), lines[-1] if lines else "")
    text = re.sub(r"^\[-32\d+\]\s*", "", said) or f"exit code {status}, nothing on stderr"
    if re.search(r"machine not found|no machine found", text):
        return MachineNotFound(text)
    if "already exists" in text:
        return MachineExists(text)
    return OrbctlError(text)


# Calling it -----------------------------------------------------------------------------------


def find() -> str:
    """Return the `orbctl` to use.

    `PYINFRA_ORBSTACK_ORBCTL` comes first, then PATH, then the folders that OrbStack and Homebrew
    use. The simulator is never chosen by itself.

    Raises:
        OrbctlMissing: There is none.
    """
    named = os.environ.get(COMMAND_VARIABLE)
    if named:
        found = shutil.which(os.path.expanduser(named))
        if not found:
            raise OrbctlMissing(f"{COMMAND_VARIABLE} names {named!r}, which is no program")
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
    """`orbctl` on this computer.

    Args:
        command: The program; None for what `find` finds.

    Raises:
        OrbctlMissing: There is none.

    Every method raises `OrbctlError` when `orbctl` fails, hangs or answers nonsense.
    """

    def __init__(self, command: str | None = None) -> None:
        self.command = command or find()

    def argv(self, args: Sequence[str]) -> list[str]:
        """The whole command line for ``args``."""
        return [self.command, *args]

    @staticmethod
    def environment() -> dict[str, str]:
        """Ours, with HOME, without which `orbctl` does not find OrbStack."""
        env = dict(os.environ)
        env.setdefault("HOME", pwd.getpwuid(os.getuid()).pw_dir)
        return env

    def call(
        self, *args: str, timeout: float = READ_TIMEOUT, stdin: bytes = b""
    ) -> process.Completed:
        """Call `orbctl` and return what it printed."""
        try:
            done = process.run(
                self.argv(args), stdin=stdin, timeout=timeout, env=self.environment()
            )
        except TimeoutError:
            raise OrbctlError(f"orbctl {args[0]} did not answer in {timeout:g} s") from None
        except OSError as broken:
            raise OrbctlMissing(f"cannot run {self.command}: {broken.strerror}") from None
        if done.returncode != 0:
            raise error(done.stderr.decode(errors="replace"), done.returncode)
        return done

    def machines(self) -> list[Machine]:
        """All machines, running or not."""
        return parse_list(self.call("list", "--format", "json").stdout.decode(errors="replace"))

    def info(self, name: str) -> Machine:
        """One machine.

        Raises:
            MachineNotFound: There is none of that name.
        """
        answer = self.call("info", check_name(name), "--format", "json")
        return parse_info(answer.stdout.decode(errors="replace"))

    def create(self, args: Sequence[str], timeout: float = CREATE_TIMEOUT) -> None:
        """Create a machine from `create_args`.

        Raises:
            MachineExists: There already is one of that name.
        """
        self.call(*args, timeout=timeout)

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
            False if there is no such machine any more.
        """
        try:
            if self.info(name).id != machine_id:
                return False
            self.call("delete", "-f", check_name(name), timeout=CHANGE_TIMEOUT)
        except MachineNotFound:
            return False
        return True


class Record:
    """The machines that somebody created, so that only those are ever deleted.

    A text file with a name and an id on each line. Whoever creates a machine adds it at once;
    whoever deletes one reads `orbctl info` and compares both first.

    Args:
        path: The file; it need not exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @classmethod
    def from_environment(cls) -> Record | None:
        """The record that `PYINFRA_ORBSTACK_RECORD` names, if it names one."""
        path = os.environ.get(RECORD_VARIABLE)
        return cls(path) if path else None

    def machines(self) -> dict[str, str]:
        """Ids by name."""
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return {}
        # A line that a crash cut short names no machine.
        return {words[0]: words[1] for line in lines if len(words := line.split()) == 2}

    def add(self, machine: Machine) -> None:
        """Write a machine down."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(f"{machine.name} {machine.id}\n")

    def forget(self, machine_id: str) -> None:
        """Take a machine out."""
        if not self.path.exists():
            return
        with self.path.open("r+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            kept = [line for line in file if machine_id not in line.split()]
            file.seek(0)
            file.truncate()
            file.writelines(kept)

    def delete_all(self, orbctl: Orbctl) -> list[str]:
        """Delete every machine written down that is still the one that was created.

        Returns:
            The names of those that were deleted.
        """
        deleted = []
        for name, machine_id in self.machines().items():
            if orbctl.delete(name, machine_id):
                deleted.append(name)
            self.forget(machine_id)
        return deleted
