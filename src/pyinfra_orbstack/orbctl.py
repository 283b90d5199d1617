"""The one door to OrbStack: `orbctl` command lines are built here, and its answers read.

Whoever needs OrbStack goes through this module: the connector and the tests call `Orbctl`, facts
and operations take the argument lists and parsers alone, since they run on the host they target.
How `orbctl` behaves is held by tests/contract, and what cannot be seen there by docs/simulator.md;
what is only believed is handled under every reading.
"""

from __future__ import annotations

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
from typing import Any

from pyinfra_orbstack import process
from pyinfra_orbstack.record import RECORD_VARIABLE as RECORD_VARIABLE
from pyinfra_orbstack.record import Record as Record

#: Names a program to be used as `orbctl`, before any other place is looked at.
COMMAND_VARIABLE = "PYINFRA_ORBSTACK_ORBCTL"

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
        BadValue: It is no text, is empty, begins with ``-`` or holds a control character.
    """
    if not isinstance(value, str):
        raise BadValue(f"{what} must be text, not {value!r}")
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


def check_id(machine_id: str) -> str:
    """Return ``machine_id`` if it can be the id of a machine, and thus of nothing else.

    Raises:
        BadValue: It cannot.
    """
    if not re.fullmatch(r"[0-9A-Za-z]+", check_value("machine id", machine_id)):
        raise BadValue(f"machine id {machine_id!r} holds more than letters and digits")
    return machine_id


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


def machine_args(words: str, *names: str) -> list[str]:
    """Arguments of a command that takes nothing but machines.

    >>> machine_args("stop --force", "web")
    ['stop', '--force', 'web']
    """
    if not names:
        raise BadValue(f"{words} needs a machine: without one it may mean all of OrbStack")
    return [*words.split(), *map(check_name, names)]


def info_args(name: str) -> list[str]:
    """Arguments that show one machine as JSON."""
    return [*machine_args("info", name), "--format", "json"]


def export_args(name: str, path: str) -> list[str]:
    """Arguments that write a machine to a file."""
    return [*machine_args("export", name), check_value("path", path)]


def import_args(path: str, name: str) -> list[str]:
    """Arguments that make a machine from such a file."""
    return ["import", "--name", check_name(name), check_value("path", path)]


def config_args(key: str, value: str | None = None) -> list[str]:
    """Arguments that read a setting, or change it; an empty value clears it."""
    if re.search(r"\s", check_value("config key", key)):
        raise BadValue(f"config key {key!r} holds a space")
    if value is None:
        return ["config", "get", key]
    return ["config", "set", key, value and check_value(f"value of {key}", value)]


def machine_key(name: str, setting: str) -> str:
    """The config key of a machine's own setting, such as ``username`` or ``memory_mib``."""
    return f"machine.{check_name(name)}.{setting}"


def check_arch(arch: str) -> str:
    """Return ``arch`` if OrbStack has machines of it.

    Raises:
        BadValue: It has not.
    """
    if arch not in ("arm64", "amd64"):
        raise BadValue(f"arch is arm64 or amd64, not {arch!r}")
    return arch


def limits(
    cpus: str | float | None = None, memory: str | int | None = None, disk: str | int | None = None
) -> dict[str, str]:
    """The settings that limit a machine as `create_args` with these values does; 0 lifts a limit.

    Raises:
        BadValue: A value that `orbctl create` would not take, or might take for something else.

    >>> limits(cpus=2, memory="4G", disk="64G")
    {'cpu': '2', 'memory_mib': '4096', 'disk_bytes': '68719476736'}
    """
    found = {}
    if cpus is not None:
        if not re.fullmatch(r"\d+(\.\d+)?", str(cpus)):
            raise BadValue(f"cpus is a number such as 2, not {cpus!r}")
        found["cpu"] = f"{float(cpus):g}"
    if memory is not None:
        size = _bytes("memory", memory, "4096 (MiB) or 4G", "M")
        if size % 1024**2:
            raise BadValue(f"memory is a whole number of MiB, not {memory!r}")
        found["memory_mib"] = str(size >> 20)
    if disk is not None:
        found["disk_bytes"] = str(_bytes("disk", disk, "64G"))
    return found


def _bytes(what: str, value: str | int, example: str, plain: str = "") -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)", str(value).upper())
    if match is None or isinstance(value, bool):
        raise BadValue(f"{what} is a size such as {example}, not {value!r}")
    unit = match[2] or plain
    if not unit and float(match[1]):
        raise BadValue(f"{what} needs a unit, as in {example}, not {value!r}")
    return int(float(match[1]) * 1024 ** (" KMGT".index(unit or " ")))


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


def parse_version(text: str) -> str:
    """Read ``orbctl version``.

    Raises:
        BadAnswer: There is no version in it.
    """
    match = re.search(r"^Version: (\d+\.\d+\S*)", text, re.MULTILINE)
    if match is None:
        raise BadAnswer(f"orbctl did not tell its version: {text.strip()[:120]!r}")
    return match[1]


def parse_status(text: str) -> str:
    """Read ``orbctl status``: ``running``, ``starting`` or ``stopped``.

    Raises:
        BadAnswer: It is none of these.
    """
    match = re.search(r"^(Running|Starting|Stopped)\s*$", text, re.MULTILINE)
    if match is None:
        raise BadAnswer(f"orbctl did not tell its status: {text.strip()[:120]!r}")
    return match[1].lower()


def parse_config(text: str) -> dict[str, bool | int | str]:
    """Read ``orbctl config show``.

    Raises:
        BadAnswer: There is no setting in it.
    """
    lines = re.findall(r"^([a-z][^\s:]*):(?: (.*))?$", text, re.MULTILINE)
    if not lines:
        raise BadAnswer(f"orbctl showed no settings: {text.strip()[:120]!r}")
    return {key: _typed(value) for key, value in lines}


def parse_ssh(text: str) -> dict[str, bool | int | str]:
    """Read ``orbctl ssh``: what stands behind the colons, by lower-case words before them.

    A line that could be a part of a key is left out: only where a key lies is told.

    Raises:
        BadAnswer: There is nothing of that kind in it.
    """
    lines = re.findall(r"^\s*([A-Za-z][A-Za-z ]*):[ \t]*(\S.*)$", text, re.MULTILINE)
    if not lines:
        raise BadAnswer(f"orbctl showed no SSH details: {text.strip()[:120]!r}")
    return {
        key.lower().replace(" ", "_"): _typed(value.strip())
        for key, value in lines
        if not re.search(r"[A-Za-z0-9+/=]{60}|PRIVATE KEY", value)
    }


def parse_value(text: str) -> str:
    """Read a bare value, around which `orbctl` may have printed its update banner."""
    lines = [line.strip() for line in text.splitlines()]
    return "\n".join(line for line in lines if line and line[0] not in "╭│╰")


def _typed(value: str) -> bool | int | str:
    if value in ("true", "false"):
        return value == "true"
    return int(value) if value.isdecimal() else value


# The names that OrbStack's index has for numbers; other versions read back as they were typed.
_CODENAMES = {
    "centos": {"9": "9-Stream", "10": "10-Stream"},
    "debian": {"11": "bullseye", "12": "bookworm", "13": "trixie", "14": "forky"},
    "devuan": {"4": "chimaera", "5": "daedalus", "6": "excalibur"},
    "ubuntu": {"22.04": "jammy", "24.04": "noble", "25.10": "questing", "26.04": "resolute"},
}


def same_image(image: str, distro: str, version: str) -> bool | None:
    """Whether a machine was made from ``image``; None where that cannot be known.

    >>> same_image("ubuntu:24.04", "ubuntu", "noble"), same_image("ubuntu", "ubuntu", "noble")
    (True, True)
    """
    wanted_distro, _, wanted = image.partition(":")
    if not distro:
        return None
    if wanted_distro != distro:
        return False
    codenames = _CODENAMES.get(distro, {})
    wanted, version = codenames.get(wanted, wanted), codenames.get(version, version)
    if not wanted or wanted == version:
        return True
    both = {wanted, version}
    known = both <= set(codenames.values())
    return False if known or all(re.fullmatch(r"[\d.]+", one) for one in both) else None


def same_mounts(wanted: Sequence[str], told: str) -> bool | None:
    """Whether the ``mounts`` setting of a machine says this; None where that cannot be known.

    How several mounts are told, and whether ``~`` is kept, is not documented.
    """
    if re.search(r"[][{}\"']", told) or any("," in mount for mount in wanted):
        return None
    left = [mount for mount in re.split(r"[,\n]", told) if mount.strip()]
    for mount in wanted:
        found = next((one for one in left if _same_mount(mount, one)), None)
        if found is None:
            return False
        left.remove(found)
    return not left


def _same_mount(one: str, other: str) -> bool:
    ends = []
    for mount in (one, other):
        source, _, target = mount.strip().partition(":")
        ends.append([path.rstrip("/") for path in (source, target or source)])
    return all(
        a == b or (a[:2] == "~/" and b.endswith(a[1:])) or (b[:2] == "~/" and a.endswith(b[1:]))
        for a, b in zip(*ends)
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


# Calling it through a shell, on whatever host that runs ---------------------------------------

# `PYINFRA_ORBSTACK_ORBCTL` counts where the shell has it in its environment: a local one has ours.
_SHELL = (
    'PATH="$PATH:'
    + ":".join(folder.replace("~", "$HOME", 1) for folder in KNOWN_FOLDERS)
    + f'"; orbctl=${{{COMMAND_VARIABLE}:-orbctl}}; '
)
# All that can go wrong is told on stdout, with exit code 0: pyinfra takes no output, and a missing
# command, for "there is nothing", and shows all that a failed command printed.
_ASK = (
    'command -v "$orbctl" >/dev/null || { echo "orbctl: missing"; exit; }; exec 3>&1; '
    'ask() { e=$("$orbctl" "$@" 2>&1 >&3 3>&- </dev/null); s=$?; '
    """printf '\\norbctl: exit %s: %s\\n' "$s" "$(printf %s "$e" | tr '\\n' '\\t')"; }; """
)
_ASKED = re.compile(r"orbctl: exit (\d+): ?(.*)")


def shell_command(script: str) -> str:
    """A shell command in which ``"$orbctl"`` is OrbStack's, wherever the host has it."""
    return _SHELL + script


def shell_words(args: Sequence[str]) -> str:
    """Shell text that calls it; every argument is quoted."""
    return f'"$orbctl" {shlex.join(args)}'


def ask(*args: str, then: str = "") -> str:
    """A shell command that calls `orbctl` and tells all about it, for `answers` to read.

    Args:
        args: The arguments.
        then: More shell text, in which ``ask ARGS...`` is another call.
    """
    return shell_command(_ASK + shlex.join(["ask", *args]) + then)


def answer(lines: Sequence[str]) -> str:
    """What `orbctl` printed when the command of `ask` was run.

    Raises:
        OrbctlError: It is missing, failed, or was cut short.
    """
    return answers(lines, whole=True)[0]


def answers(lines: Sequence[str], *, whole: bool = False, accept: Sequence[int] = ()) -> list[str]:
    """What each of several calls of `orbctl` printed; a later one that failed is left out.

    Args:
        lines: The output of a command of `ask`.
        whole: There was one call, and what looks like the end of another is its own text.
        accept: Exit codes, besides 0, that are no failure.

    Raises:
        OrbctlError: It is missing, was cut short, or its first call failed.
    """
    if lines[-1:] == ["orbctl: missing"]:
        raise OrbctlMissing(
            "there is no orbctl on this host, neither on PATH nor in OrbStack's and Homebrew's "
            f"folders: install OrbStack there, or set {COMMAND_VARIABLE}"
        )
    found, text = [], []
    for number, line in enumerate(lines, 1):
        end = _ASKED.fullmatch(line)
        if end is None or (whole and number < len(lines)):
            text.append(line)
            continue
        status = int(end[1])
        if status == 0 or status in accept:
            found.append("\n".join(text))
        elif not found:
            raise error(end[2].replace("\t", "\n"), status)
        text = []
    if text or not found:
        raise BadAnswer("the answer of orbctl was cut short")
    return found


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
        """Ours, with HOME, without which `orbctl` does not find OrbStack.

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
        """Call `orbctl` and return what it printed."""
        timeout = READ_TIMEOUT if timeout is None else timeout
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

    def create(self, args: Sequence[str]) -> None:
        """Create a machine from `create_args`.

        Raises:
            MachineExists: There already is one of that name.
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
            False if there is no such machine any more.
        """
        try:
            if self.info(name).id != machine_id:
                return False
            self.call("delete", "-f", check_name(name), timeout=CHANGE_TIMEOUT)
        except MachineNotFound:
            return False
        return True
