"""
Manage OrbStack: its machines as they shall be, and its settings.

These operations call ``orbctl`` on the host they target, as those of docker call docker: ``@local``
on a Mac, or a Mac that pyinfra reaches over SSH. To configure a machine from the inside, target the
machine itself, ``@orbstack/NAME``, with any of pyinfra's operations.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import shlex
from collections.abc import Callable, Generator
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

from pyinfra import host, logger, state
from pyinfra.api import (
    FactError,
    OperationError,
    OperationValueError,
    QuoteString,
    StringCommand,
    operation,
)
from pyinfra.api.exceptions import PyinfraError
from typing_extensions import ParamSpec

from pyinfra_orbstack import orbctl
from pyinfra_orbstack.facts.orbstack import (
    CLOUD_INIT_FOLDER,
    CloudInitDigest,
    MachineData,
    OrbStackConfigValue,
    OrbStackDefaultMachine,
    OrbStackMachines,
    OrbStackVersion,
    PathKind,
)

if TYPE_CHECKING:
    from pyinfra.api.arguments_typed import PyinfraOperation
    from pyinfra.api.facts import FactBase

P = ParamSpec("P")
T = TypeVar("T")
Commands = Generator[StringCommand, None, None]


class Refused(OperationError):
    """What this host has, or does not tell, stands against it."""


class NotYet(Refused):
    """Something is missing, or in the way, that an operation before this one may see to."""


def _operation(
    is_idempotent: bool = True, idempotent_notice: str | None = None, anywhere: bool = False
) -> Callable[[Callable[P, Commands]], PyinfraOperation[P]]:
    """pyinfra's decorator, for operations that raise `Refused` and `orbctl.BadValue`.

    ``anywhere``: it does not call `orbctl`, so it may target a machine.
    """

    def decorate(function: Callable[P, Commands]) -> PyinfraOperation[P]:
        @operation(is_idempotent=is_idempotent, idempotent_notice=idempotent_notice)
        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> Commands:
            try:
                if host.data.get("orbstack_vm") and not anywhere:
                    raise Refused(
                        f"{function.__name__} is about OrbStack, and {host.name} is a machine in "
                        "it: target @local, or the Mac over SSH"
                    )
                yield from function(*args, **kwargs)
            except (Refused, orbctl.BadValue) as refused:
                # While operations run, a raise would end the run of every host, with a traceback;
                # and a host that a fact has failed already is to fail alone in any case.
                if state.is_executing or host in getattr(state, "failed_hosts", ()):
                    yield _fail(str(refused))
                elif isinstance(refused, NotYet):
                    # Nothing was done yet of what this run does, and nothing runs of this either.
                    logger.warning(
                        f"{host.print_prefix}{refused}; this fails unless an operation before it "
                        "changes that"
                    )
                    yield _fail(str(refused))
                elif isinstance(refused, Refused):
                    raise OperationError(str(refused)) from None
                else:
                    raise OperationValueError(str(refused)) from None

        return run

    return decorate


def _fail(reason: str) -> StringCommand:
    return StringCommand("printf '%s\\n'", QuoteString(reason), ">&2; exit 1", _sudo=False)


# What is ----------------------------------------------------------------------------------------


def _ask(fact: type[FactBase[T]], **arguments: Any) -> T:
    known: T | None = None
    try:
        known = host.get_fact(fact, **arguments, _sudo=False, _timeout=int(orbctl.READ_TIMEOUT))
    except FactError as failed:  # pragma: no cover: before pyinfra 3.6; later it fails the host
        raise Refused(str(failed)) from None
    except PyinfraError:
        # No host is left. While operations run, pyinfra finds that out by itself after this one;
        # from here it would get out as a traceback.
        if not state.is_executing:
            raise
    if known is None:
        raise Refused(f"{fact.__name__} could not be had from orbctl, so nothing was changed")
    return known


def _machines() -> dict[str, MachineData]:
    return _ask(OrbStackMachines, addresses=False)


def _existing(name: str, machines: dict[str, MachineData] | None = None) -> MachineData:
    orbctl.check_name(name)
    machines = _machines() if machines is None else machines
    if name not in machines:
        known = f"there are: {', '.join(sorted(machines))}" if machines else "there is none"
        raise NotYet(f"there is no machine {name!r} ({known})")
    return machines[name]


def _need(version: str, **wanted: Any) -> None:
    """Refuse what is wanted if this OrbStack is too old for it."""
    named = [what for what, value in wanted.items() if value]
    if named and not _is_at_least(version):
        raise Refused(
            f"{', '.join(named)}: OrbStack {version} is needed, and this is "
            f"{_ask(OrbStackVersion)}: update it, or leave that out"
        )


def _is_at_least(version: str) -> bool:
    here, there = (
        [int(number) for number in one.split(".")[:2]] for one in (_ask(OrbStackVersion), version)
    )
    return here >= there


# What to do -------------------------------------------------------------------------------------


def _because(reason: str) -> None:
    """Say what differs: with ``--dry``, and before pyinfra asks whether to go on, too."""
    logger.info(f"{host.print_prefix}{reason}")


def _run(*steps: str) -> StringCommand:
    # OrbStack belongs to the user who is logged in; root has none.
    return StringCommand(orbctl.shell_command(" && ".join(steps)), _sudo=False)


_call = orbctl.shell_words
_CLEAN_UP = "trap 'rm -rf \"$t\"' EXIT; trap 'exit 130' HUP INT TERM; "


def _until_it_answers(name: str) -> str:
    true = _call(orbctl.run_args(name, ["true"], user="root"))
    late = shlex.quote(f"{name} does not answer: ")
    return (
        f"n=0; until e=$({true} 2>&1 </dev/null); do n=$((n + 1)); "
        f'[ "$n" -lt 60 ] || {{ echo {late}"$e" >&2; exit 1; }}; sleep 1; done'
    )


def _wait(name: str, cloud_init: bool = False) -> StringCommand:
    script = _until_it_answers(name)
    if cloud_init:
        # Its exit code 2 is a success with warnings.
        finish = (
            "command -v cloud-init >/dev/null || exit 0; "
            "cloud-init status --wait >/dev/null || [ $? = 2 ] || cloud-init status --long"
        )
        script += "; " + _call(orbctl.run_args(name, ["sh", "-c", finish], user="root"))
    return _run(script)


def _write_down(name: str, digest: str = "") -> str:
    """Shell text that records a new machine, for whoever deletes what this run has made."""
    record = f'"${orbctl.RECORD_VARIABLE}"'
    told = f'[ -z {record} ] || echo {shlex.quote(name)} "$i" >>{record}'
    if digest:
        told += f'; echo {digest} >{CLOUD_INIT_FOLDER}/"$i"'
    return (
        f"if [ -n {record}{digest} ]; then "
        f"i=$({_call(orbctl.info_args(name))} </dev/null"
        """ | sed -n 's/.*"id": *"\\([0-9A-Za-z]*\\)".*/\\1/p' | head -n 1); """
        f'if [ -n "$i" ]; then {told}; fi; fi'
    )


def _create(name: str, args: list[str], script: str, digest: str) -> StringCommand:
    if not script:
        return _run(_call(args), _write_down(name))
    # A shell that was killed leaves its file; an hour later nobody can be using it any more.
    prepare = (
        f'umask 077; d={CLOUD_INIT_FOLDER}; mkdir -p "$d" && '
        "find \"$d\" -name 'new.*' -mmin +60 -exec rm -f {} + && "
        't=$(mktemp "$d/new.XXXXXX") || exit 1; ' + _CLEAN_UP + 'cat >"$t"'
    )
    create = f'"$orbctl" create --user-data "$t" {shlex.join(args[1:])} </dev/null'
    command = _run(prepare, create, _write_down(name, digest))
    command.connector_arguments["_stdin"] = script
    return command


def _delete(found: MachineData) -> StringCommand:
    """Delete by name, which is all that `orbctl` can, but only the machine that was looked at."""
    name, machine_id = found["name"], orbctl.check_id(found["id"])
    moved = shlex.quote(f"{name} is another machine now: nothing was deleted")
    return _run(
        f"{{ {_call(orbctl.info_args(name))} </dev/null | grep -Fq '\"{machine_id}\"' "
        f"|| {{ echo {moved} >&2; exit 1; }}; }}",
        _call(orbctl.machine_args("delete --force", name)),
        f"rm -f {CLOUD_INIT_FOLDER}/{machine_id}",
    )


def _start(name: str) -> str:
    return _call(orbctl.machine_args("start", name))


def _stop(name: str) -> str:
    return _call(orbctl.machine_args("stop", name))


def _set_user(name: str, user: str, was_running: bool, running: bool) -> StringCommand:
    """Change the default user, but only to one whom the machine has: to another nobody gets in.

    It has to run to be asked. If that comes to nothing, one that was stopped is stopped again.
    """
    known = _call(orbctl.run_args(name, ["id", "-u", user], user="root"))
    unknown = shlex.quote(f"machine {name} has to have the user {user} first: ")
    set_it = _call(orbctl.config_args(orbctl.machine_key(name, "username"), user))
    change = (
        f"{{ e=$({known} 2>&1 </dev/null) || "
        f"{{ printf '%s\\n' {unknown}\"$e\" >&2; false; }}; }} && {set_it}"
    )
    if was_running:
        return _run(change)
    unless = '[ "$s" = 0 ] || ' if running else ""
    return _run(
        f"{{ {_start(name)} && ({_until_it_answers(name)}) && {change}; s=$?; "
        f'{unless}{_stop(name)} && [ "$s" = 0 ]; }}'
    )


def _reconfigure(
    name: str, settings: dict[str, str], was_running: bool, running: bool
) -> StringCommand:
    """Change settings that count from the next start.

    Stopped first, so that a run that is interrupted anywhere is completed by the next one.
    """
    change = " && ".join(
        _call(orbctl.config_args(orbctl.machine_key(name, key), value))
        for key, value in settings.items()
    )
    if was_running and running:
        # It runs again also if a value is refused.
        return _run(_stop(name), f'{{ {change}; s=$?; {_start(name)} && [ "$s" = 0 ]; }}')
    return _run(
        *([_stop(name)] if was_running else []), change, *([_start(name)] if running else [])
    )


# What differs -----------------------------------------------------------------------------------

#: The settings that limit a machine, and the arguments that set them.
_LIMITS = {"cpu": "cpus", "memory_mib": "memory", "disk_bytes": "disk"}


def _read_cloud_init(path: str) -> tuple[str, str]:
    """What the file holds, and its checksum."""
    path = os.path.expanduser(orbctl.check_value("cloud_init", path))
    try:
        with open(path, encoding="utf-8", newline="") as file:
            script = file.read()
    except (OSError, UnicodeDecodeError) as problem:
        raise orbctl.BadValue(f"cloud_init cannot be read: {problem}") from None
    if not script.strip():
        raise orbctl.BadValue(f"cloud_init {path!r} is empty")
    return script, hashlib.sha256(script.encode()).hexdigest()


def _differences(
    found: MachineData,
    image: str | None,
    arch: str | None,
    isolated: bool | None,
    isolate_network: bool | None,
    mounts: list[str] | None,
    digest: str,
) -> list[str]:
    """What only a new machine can change. Only what is known on both sides can differ."""
    compared: list[tuple[str, Any, Any]] = [
        ("arch", arch, found["arch"]),
        ("isolated", isolated, found["isolated"]),
        ("isolate_network", isolate_network, found["isolate_network"]),
    ]
    if digest:
        known = _ask(CloudInitDigest, machine_id=found["id"])
        compared.append(("SHA-256 of cloud_init", digest[:12], known[:12]))
    rows = [
        (what, value, have, None if have in (None, "") else value == have)
        for what, value, have in compared
    ]
    if image is not None:
        distro, version = found["distro"], found["version"]
        same = orbctl.same_image(image, distro, version)
        rows.append(("image", image, f"{distro}:{version}", same))
    if mounts is not None:
        told = ""
        if found["isolated"]:
            told = _ask(OrbStackConfigValue, key=orbctl.machine_key(found["name"], "mounts"))
        rows.append(("mounts", mounts, told, orbctl.same_mounts(mounts, told)))

    differences = []
    for what, value, have, same in rows:
        if same is False and value is not None:
            differences.append(f"{what} is {have}, not {value}")
        elif same is None and value:
            _warn(found, what, value, have)
    return differences


def _warn(found: MachineData, what: str, value: Any, have: Any) -> None:
    logger.warning(
        f"{host.print_prefix}machine {found['name']}: {what} should be {value}, and "
        f"cannot be compared with what OrbStack tells: {have!r}"
    )


def _has_user(found: MachineData, user: str) -> bool | None:
    """Whether this is a machine's default user; None where that cannot be known."""
    key = orbctl.machine_key(found["name"], "username")
    have = found["username"]
    if user == have or user == (setting := _ask(OrbStackConfigValue, key=key)):
        return True
    if not have and not setting:
        return None
    _because(f"the default user of machine {found['name']} is {have or setting}, not {user}")
    return False


def _changes(name: str, settings: dict[str, str]) -> dict[str, str]:
    """Those of a machine's settings that are not as they shall be."""
    changes = {}
    for setting, value in settings.items():
        have = _ask(OrbStackConfigValue, key=orbctl.machine_key(name, setting))
        if not _same_value(value, have):
            _because(f"machine {name}: {setting} is {have or 'not set'}, not {value}")
            changes[setting] = value
    return changes


def _text(value: str | float | bool) -> str:
    """A setting as `orbctl` writes it."""
    if not isinstance(value, (str, int, float)):
        raise orbctl.BadValue(f"a setting is text, a number or a switch, not {value!r}")
    return str(value).lower() if isinstance(value, bool) else str(value)


def _same_value(wanted: str, have: str) -> bool:
    """Whether two settings mean the same; nothing is as good as 0."""
    try:
        return float(wanted or 0) == float(have or 0)
    except ValueError:
        return wanted == have


# Machines ---------------------------------------------------------------------------------------


@_operation()
def machine(
    machine: str,
    image: str | None = None,
    present: bool = True,
    running: bool = True,
    user: str | None = None,
    arch: str | None = None,
    cpus: str | float | None = None,
    memory: str | int | None = None,
    disk: str | int | None = None,
    isolated: bool | None = None,
    isolate_network: bool | None = None,
    mounts: list[str] | None = None,
    forward_ssh_agent: bool | None = None,
    cloud_init: str | None = None,
    recreate: bool = False,
    wait: bool = True,
) -> Commands:
    """
    Ensure that a machine exists as described, or that it does not exist.

    + machine: name of the machine
    + image: ``DISTRO`` or ``DISTRO:VERSION``, needed to create it
    + present: whether it should exist
    + running: whether it should run
    + user: its default user; the Mac user if not given
    + arch: ``arm64`` or ``amd64``; the Mac's own if not given
    + cpus: limit of CPUs (OrbStack 2.2)
    + memory: limit of memory, in MiB or with a unit such as ``4G`` (OrbStack 2.2)
    + disk: limit of disk space, with a unit such as ``64G`` (OrbStack 2.2)
    + isolated: whether it shares nothing with the Mac (OrbStack 2.1)
    + isolate_network: with ``isolated``, whether it reaches neither other machines nor the Mac
    + mounts: with ``isolated``, folders of the Mac to share all the same, as ``SRC[:DEST]``
    + forward_ssh_agent: whether it may use the Mac's SSH agent (OrbStack 2.1)
    + cloud_init: path of a cloud-init file, on the computer that runs pyinfra
    + recreate: delete and create it anew where a difference cannot be changed in place
    + wait: whether to wait until it answers, and until cloud-init is done

    What is not given is not looked at. A limit of ``0`` is no limit; limits and
    ``forward_ssh_agent`` are changed in place, for which a running machine is restarted. ``user``
    is, too, without a restart, if the machine has that user. Any other difference fails the host,
    naming it, unless ``recreate`` is set. What OrbStack does not tell, or tells in a way that
    cannot be compared, gives a warning and never a new machine.

    Cloud-init runs once, when a machine is made. So the file's checksum is kept on the Mac, in
    ``~/.local/state/pyinfra-orbstack/cloud-init``, and a changed file counts as a difference.

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import orbstack

        orbstack.machine(
            name="Have a web server of two CPUs",
            machine="web",
            image="ubuntu:noble",
            cpus=2,
            memory="4G",
        )
        orbstack.machine(
            name="Have no old web server",
            machine="web-old",
            present=False,
        )
    """
    name = orbctl.check_name(machine)
    if not present:
        found = _machines().get(name)
        if found is None:
            host.noop(f"machine {name} does not exist")
            return
        _because(f"machine {name} shall not exist: delete it")
        yield _delete(found)
        return

    if isinstance(mounts, str):
        raise orbctl.BadValue(f"mounts is a list such as [{mounts!r}], not text")
    given: dict[str, Any] = {"cpus": cpus, "memory": memory, "disk": disk}
    settings = orbctl.limits(**given)
    limited = {_LIMITS[key]: given[_LIMITS[key]] for key in settings if float(settings[key])}
    create = orbctl.create_args(
        name,
        "image" if image is None else image,
        arch=None if arch is None else orbctl.check_arch(arch),
        user=None if user is None else orbctl.check_value("user", user),
        isolated=bool(isolated),
        isolate_network=bool(isolate_network),
        mounts=mounts or (),
        # Machines that are not isolated have it anyway.
        forward_ssh_agent=bool(forward_ssh_agent and isolated),
        **limited,
    )
    script, digest = ("", "") if cloud_init is None else _read_cloud_init(cloud_init)
    _need(
        "2.1",
        isolated=isolated,
        isolate_network=isolate_network,
        mounts=mounts,
        forward_ssh_agent=forward_ssh_agent is not None,
    )
    _need("2.2", **limited)
    if settings and not limited and not _is_at_least("2.2"):
        # It knows no limits, so there are none to lift.
        settings = {}
    if forward_ssh_agent is not None:
        settings["forward_ssh_agent"] = _text(forward_ssh_agent)

    found = _machines().get(name)
    if found is not None and found["state"] in ("creating", "provisioning"):
        # If somebody is at it, `create` says so; what a crash has left does not stop it.
        found = None
    wanted = "running" if running else "stopped"
    differences: list[str] = []
    if found is not None:
        differences = _differences(found, image, arch, isolated, isolate_network, mounts, digest)
    if differences and not recreate:
        raise Refused(
            f"machine {name} differs: {'; '.join(differences)}; this takes a new machine: with "
            "recreate=True this one is deleted, with all that is in it, and created anew"
        )
    if (found is None or differences) and image is None:
        raise (Refused if differences else NotYet)(
            f"machine {name} cannot be created without an image such as ubuntu:noble"
        )

    if found is not None and differences:
        _because(f"machine {name} differs: {'; '.join(differences)}; delete it")
        yield _delete(found)
        found = None
    if found is None:
        _because(f"machine {name} does not exist: create it from {image}")
        yield _create(name, create, script, digest)
        now = "running"
        # There is no flag for this one.
        agent = forward_ssh_agent is False and not isolated
        changes = {"forward_ssh_agent": "false"} if agent else {}
    else:
        now = found["state"]
        changes = _changes(name, settings)
        has_user = user is None or _has_user(found, user)
        if has_user is None:
            _warn(found, "user", user, "")
        if not changes and has_user is not False and now == wanted:
            host.noop(f"machine {name} is as described")
            return
        if user is not None and has_user is False:
            yield _set_user(name, user, now == "running", running)
            now = "running" if running or now == "running" else "stopped"

    if changes:
        yield _reconfigure(name, changes, now != "stopped", running)
    elif now != wanted:
        _because(f"machine {name} shall {'run' if running else 'not run'}")
        yield _run(_start(name) if running else _stop(name))
    if running and wait:
        yield _wait(name, bool(script))


@_operation()
def started(machine: str, wait: bool = True) -> Commands:
    """
    Ensure that a machine runs.

    + machine: name of the machine
    + wait: whether to wait until it answers

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import orbstack

        orbstack.started(
            name="Have the web server running",
            machine="web",
        )
    """
    found = _existing(machine)
    if found["state"] == "running":
        host.noop(f"machine {machine} runs")
        return
    _because(f"machine {machine} is {found['state']}: start it")
    yield _run(_start(machine))
    if wait:
        yield _wait(machine)


@_operation()
def stopped(machine: str, force: bool = False) -> Commands:
    """
    Ensure that a machine does not run.

    + machine: name of the machine
    + force: whether to stop it at once, as by pulling the plug

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import orbstack

        orbstack.stopped(
            name="Let the web server rest",
            machine="web",
        )
    """
    found = _existing(machine)
    if found["state"] == "stopped":
        host.noop(f"machine {machine} is stopped")
        return
    _because(f"machine {machine} is {found['state']}: stop it")
    yield _run(_call(orbctl.machine_args("stop --force", machine)) if force else _stop(machine))


@_operation(is_idempotent=False, idempotent_notice="This operation always restarts the machine.")
def restarted(machine: str, wait: bool = True) -> Commands:
    """
    Restart a machine, or start it if it does not run.

    + machine: name of the machine
    + wait: whether to wait until it answers

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import orbstack

        orbstack.restarted(
            name="Restart the web server",
            machine="web",
        )
    """
    found = _existing(machine)
    _because(f"machine {machine} is {found['state']}: restart it")
    if found["state"] == "running":
        yield _run(_call(orbctl.machine_args("restart", machine)))
    else:
        yield _run(_start(machine))
    if wait:
        yield _wait(machine)


@_operation()
def renamed(machine: str, to: str) -> Commands:
    """
    Ensure that a machine bears another name; it keeps its id and all that is in it.

    + machine: name that it has had
    + to: name that it shall have

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import orbstack

        orbstack.renamed(
            name="Call the web server www",
            machine="web",
            to="www",
        )
    """
    rename = _call(orbctl.machine_args("rename", machine, to))
    machines = _machines()
    if to in machines and (machine not in machines or machine == to):
        host.noop(f"machine {to} bears its name")
        return
    if to in machines:
        raise NotYet(f"machine {machine} cannot be renamed: there is a machine {to} already")
    _existing(machine, machines)
    _because(f"machine {machine} shall be {to}: rename it")
    yield _run(rename)


@_operation()
def cloned(source: str, machine: str) -> Commands:
    """
    Ensure that a machine exists, as a copy of another one. A new copy is stopped.

    + source: name of the machine to copy, which may run meanwhile
    + machine: name of the copy

    A machine that exists is not compared with its source: both live on after the copy.

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import orbstack

        orbstack.cloned(
            name="Have a copy of the web server to try things on",
            source="web",
            machine="web-test",
        )
    """
    clone = _call(orbctl.machine_args("clone", source, machine))
    machines = _machines()
    if machine in machines:
        host.noop(f"machine {machine} exists")
        return
    _existing(source, machines)
    _need("2.0", cloned=True)
    _because(f"machine {machine} does not exist: copy {source}")
    yield _run(clone, _write_down(machine))


@_operation()
def exported(machine: str, path: str) -> Commands:
    """
    Ensure that there is a file that holds a machine, which may run meanwhile.

    + machine: name of the machine
    + path: path of the file, such as ``web.tar.zst``, on the computer that has OrbStack

    The file is whole or not there, and only its owner can read it. One that exists is kept.

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import orbstack

        orbstack.exported(
            name="Keep the web server as it is now",
            machine="web",
            path="/tmp/web.tar.zst",
        )
    """
    folder, file = posixpath.split(orbctl.check_value("path", path))
    if not file:
        raise orbctl.BadValue(f"path {path!r} is a folder, and no file")
    # Private from the first byte on, also if OrbStack itself creates the file.
    private = posixpath.join(folder, f".{file}.partial")
    partial = posixpath.join(private, file)
    export = _call(orbctl.export_args(machine, partial))
    kind = _ask(PathKind, path=path)
    if kind == "directory":
        raise Refused(f"{path} is a folder: a machine is exported to a file")
    if kind == "file":
        host.noop(f"{path} exists")
        return
    _existing(machine)
    _need("2.0", exported=True)
    _because(f"{path} does not exist: export machine {machine} to it")
    private, partial, target = map(shlex.quote, (private, partial, path))
    yield _run(
        f't={private}; rm -rf "$t" && mkdir -m 700 "$t" || exit 1; {_CLEAN_UP}{export}',
        f"chmod 600 {partial}",
        f"mv -f {partial} {target}",
    )


@_operation()
def imported(path: str, machine: str) -> Commands:
    """
    Ensure that a machine exists, made from a file that ``exported`` has written.

    + path: path of the file, on the computer that has OrbStack
    + machine: name of the machine

    A machine that exists is not compared with the file.

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import orbstack

        orbstack.imported(
            name="Bring the web server back",
            path="/tmp/web.tar.zst",
            machine="web-restored",
        )
    """
    import_ = _call(orbctl.import_args(path, machine))
    if machine in _machines():
        host.noop(f"machine {machine} exists")
        return
    if _ask(PathKind, path=path) != "file":
        raise NotYet(f"there is no file {path} to import machine {machine} from")
    _because(f"machine {machine} does not exist: import it from {path}")
    yield _run(import_, _write_down(machine))


# Settings ---------------------------------------------------------------------------------------


@_operation()
def config(key: str, value: str | float | bool) -> Commands:
    """
    Ensure that one of OrbStack's settings has a value; some count from its next start.

    + key: name of the setting
    + value: its value; ``""`` clears it

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import orbstack

        orbstack.config(
            name="Show no machine's ports to the network",
            key="machines.expose_ports_to_lan",
            value=False,
        )
    """
    wanted = _text(value)
    change = _call(orbctl.config_args(key, wanted))
    have = _ask(OrbStackConfigValue, key=key)
    if _same_value(wanted, have):
        host.noop(f"{key} is {have!r}")
        return
    _because(f"{key} is {have!r}, not {wanted!r}")
    yield _run(change)


@_operation()
def default_machine(machine: str | None) -> Commands:
    """
    Ensure that ``orb`` uses a machine when none is named, or that none is set for it.

    + machine: name of the machine, or ``None``

    ``None`` is a change for as long as OrbStack names a machine all the same.

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import orbstack

        orbstack.default_machine(
            name="Use the web server by default",
            machine="web",
        )
    """
    if machine is not None:
        _existing(machine)
    have = _ask(OrbStackDefaultMachine)
    if have == (machine or ""):
        host.noop(f"the default machine is {machine or 'none'}")
        return
    _because(f"the default machine is {have or 'none'}, not {machine or 'none'}")
    clear = ["default", "none"]
    yield _run(_call(clear if machine is None else orbctl.machine_args("default", machine)))


@_operation()
def machine_user(machine: str, user: str) -> Commands:
    """
    Ensure that a machine has a default user, who must exist in it (``server.user`` sees to that).

    + machine: name of the machine
    + user: name of the user

    It has to run to be asked for the user: one that is stopped is started, and stopped again.

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import orbstack

        orbstack.machine_user(
            name="Work as root in the web server",
            machine="web",
            user="root",
        )
    """
    orbctl.check_value("user", user)
    found = _existing(machine)
    if _has_user(found, user):
        host.noop(f"the default user of machine {machine} is {user}")
        return
    runs = found["state"] == "running"
    yield _set_user(machine, user, runs, runs)
