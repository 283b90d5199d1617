"""
Manage OrbStack machines and settings.

These operations call ``orbctl`` on the target host, as the docker operations call docker:
``@local`` on a Mac, or a Mac that pyinfra reaches over SSH. To configure a machine from the inside,
target the machine itself, ``@orbstack/NAME``, with any of pyinfra's operations.
"""

# One long module, because pyinfra finds and documents operations by module.

from __future__ import annotations

import hashlib
import posixpath

from pyinfra import host

from pyinfra_orbstack import orbctl, shelltext
from pyinfra_orbstack.facts.orbstack import (
    CloudInitDigest,
    MachineData,
    OrbStackConfigValue,
    OrbStackDefaultMachine,
    PathKind,
)
from pyinfra_orbstack.operations import steps
from pyinfra_orbstack.operations.common import (
    Commands,
    PreconditionMissing,
    Refused,
    ask,
    existing,
    look,
    machines_there,
    orbstack_operation,
    patience,
    require,
    settled,
)
from pyinfra_orbstack.operations.differences import (
    changed_settings,
    find_differences,
    has_user,
    same_value,
    setting_text,
    supported_settings,
    warn_unknown,
)
from pyinfra_orbstack.operations.steps import log_change
from pyinfra_orbstack.specification import MachineSpec, mac_path, read_cloud_init

# Machines ---------------------------------------------------------------------------------------


@orbstack_operation()
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
    + image: ``DISTRO`` or ``DISTRO:VERSION``; required to create it
    + present: whether it should exist
    + running: whether it should run
    + user: its default user; the Mac user by default
    + arch: ``arm64`` or ``amd64``; the Mac's own by default
    + cpus: CPU limit (OrbStack 2.2)
    + memory: memory limit, in MiB or with a unit such as ``4G`` (OrbStack 2.2)
    + disk: disk space limit, with a unit such as ``64G`` (OrbStack 2.2)
    + isolated: whether it shares nothing with the Mac (OrbStack 2.1)
    + isolate_network: with ``isolated``, whether to block access to other machines and the Mac
    + mounts: with ``isolated``, directories of the Mac to share anyway, as ``SRC[:DEST]``
    + forward_ssh_agent: whether it may use the Mac's SSH agent (OrbStack 2.1)
    + cloud_init: path of a cloud-init file, on the host that runs pyinfra
    + recreate: whether to delete and recreate it if a difference cannot be changed in place
    + wait: whether to wait until it answers and cloud-init is done

    Arguments that you omit are not checked. A limit of ``0`` means no limit. Limits and
    ``forward_ssh_agent`` are changed in place, which restarts a running machine. ``user`` is
    changed in place without a restart if the machine has that user. Any other difference fails the
    host with a message that names it, unless ``recreate`` is set. A value that OrbStack does not
    report, or reports in a form that cannot be compared, causes a warning and never a new machine.

    Cloud-init runs once, when a machine is created. The file's checksum is therefore kept on the
    Mac, in ``~/.local/state/pyinfra-orbstack/cloud-init``, and a changed file counts as a
    difference.

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
    if not present:
        found = look(orbctl.check_name(machine))
        if found is None:
            host.noop(f"machine {machine} does not exist")
            return
        log_change(f"deleting machine {machine}")
        yield steps.delete(found)
        return
    spec = MachineSpec(
        machine,
        image,
        arch=arch,
        user=user,
        cloud_init=cloud_init,
        cpus=cpus,
        memory=memory,
        disk=disk,
        isolated=isolated,
        isolate_network=isolate_network,
        mounts=mounts,
        forward_ssh_agent=forward_ssh_agent,
    )
    script = "" if cloud_init is None else read_cloud_init(cloud_init)
    digest = hashlib.sha256(script.encode()).hexdigest() if script else ""
    settings = supported_settings(spec)
    found = look(spec.name)
    differences = [] if found is None else find_differences(found, spec, digest)
    _refuse(spec, found, differences, recreate)
    if found is not None and differences:
        log_change(f"machine {spec.name} differs: {'; '.join(differences)}; deleting it")
        yield steps.delete(found)
        found = None
    if found is None:
        yield from _make(spec, script, digest, running)
    else:
        commands = list(_change(spec, found, settings, running))
        waits = running and wait and script and _cloud_init_is_pending(found)
        if waits:
            log_change(f"waiting for cloud-init in machine {spec.name}")
        elif not commands:
            host.noop(f"machine {spec.name} is as described")
            return
        yield from commands
    if running and wait:
        yield steps.wait(spec.name, patience(), bool(script))


def _cloud_init_is_pending(found: MachineData) -> bool:
    return ask(CloudInitDigest, machine_id=found["id"]).endswith(" pending")


def _refuse(
    spec: MachineSpec, found: MachineData | None, differences: list[str], recreate: bool
) -> None:
    """Refuse what is impossible, or would delete something that must be kept."""
    if differences and not recreate:
        raise Refused(
            f"machine {spec.name} differs: {'; '.join(differences)}; this requires a new machine: "
            "pass recreate=True to delete this one, with everything in it, and create it again"
        )
    if (found is None or differences) and spec.image is None:
        raise (Refused if differences else PreconditionMissing)(
            f"machine {spec.name} does not exist: pass an image such as ubuntu:noble to create it"
        )


def _make(spec: MachineSpec, script: str, digest: str, running: bool) -> Commands:
    log_change(f"creating machine {spec.name} from {spec.image}")
    yield steps.create(spec, script, digest)
    if spec.forward_ssh_agent is False and not spec.isolated:
        # There is no flag for this one.
        agent = {"forward_ssh_agent": "false"}
        yield steps.reconfigure(spec.name, agent, was_running=True, running=running)
    elif not running:
        log_change(f"stopping machine {spec.name}")
        yield steps.run(steps.stop(spec.name))


def _change(
    spec: MachineSpec, found: MachineData, settings: dict[str, str], running: bool
) -> Commands:
    """The commands that change a machine in place."""
    runs = found["state"] == "running"
    changes = changed_settings(spec.name, settings)
    if spec.user is not None:
        is_default = has_user(found, spec.user)
        if is_default is None:
            warn_unknown(found, "user", spec.user, "")
        if is_default is False:
            yield steps.set_user(
                spec.name, spec.user, patience(), was_running=runs, running=running
            )
            runs = running or runs
    if changes:
        yield steps.reconfigure(spec.name, changes, was_running=runs, running=running)
    elif runs != running:
        log_change(f"{'starting' if running else 'stopping'} machine {spec.name}")
        yield steps.run(steps.start(spec.name) if running else steps.stop(spec.name))


@orbstack_operation()
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
    found = existing(machine)
    if found["state"] == "running":
        host.noop(f"machine {machine} runs")
        return
    log_change(f"machine {machine} is {found['state']}; starting it")
    yield steps.run(steps.start(machine))
    if wait:
        yield steps.wait(machine, patience())


@orbstack_operation()
def stopped(machine: str, force: bool = False) -> Commands:
    """
    Ensure that a machine does not run.

    + machine: name of the machine
    + force: whether to stop it at once, without a clean shutdown

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import orbstack

        orbstack.stopped(
            name="Let the web server rest",
            machine="web",
        )
    """
    found = existing(machine)
    if found["state"] == "stopped":
        host.noop(f"machine {machine} is stopped")
        return
    log_change(f"machine {machine} is {found['state']}; stopping it")
    yield steps.run(steps.stop(machine, force))


@orbstack_operation(
    is_idempotent=False, idempotent_notice="This operation always restarts the machine."
)
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
    found = existing(machine)
    log_change(f"machine {machine} is {found['state']}; restarting it")
    verb = "restart" if found["state"] == "running" else "start"
    yield steps.run(steps.orb(*orbctl.machine_args(verb, machine)))
    if wait:
        yield steps.wait(machine, patience())


@orbstack_operation()
def renamed(machine: str, to: str) -> Commands:
    """
    Ensure that a machine has a new name; it keeps its id and its contents.

    + machine: current name of the machine
    + to: new name of the machine

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import orbstack

        orbstack.renamed(
            name="Call the web server www",
            machine="web",
            to="www",
        )
    """
    rename = steps.orb(*orbctl.machine_args("rename", machine, to))
    machines = machines_there()
    if to in machines and (machine not in machines or machine == to):
        host.noop(f"machine {to} bears its name")
        return
    if to in machines:
        raise PreconditionMissing(
            f"cannot rename machine {machine}: there already is a machine {to}; use another name"
        )
    existing(machine, machines)
    log_change(f"renaming machine {machine} to {to}")
    yield steps.run(rename)


@orbstack_operation()
def cloned(source: str, machine: str) -> Commands:
    """
    Ensure that a machine exists, as a copy of another one. A new copy is stopped.

    + source: name of the machine to copy, which may be running
    + machine: name of the copy

    An existing machine is not compared with its source: both may change after the copy.

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import orbstack

        orbstack.cloned(
            name="Have a copy of the web server to try things on",
            source="web",
            machine="web-test",
        )
    """
    clone = steps.clone(source, machine)
    machines = machines_there()
    if machine in machines and settled(machines[machine]):
        host.noop(f"machine {machine} exists")
        return
    existing(source, machines)
    require("2.0", cloned=True)
    log_change(f"copying machine {source} to {machine}")
    yield clone


@orbstack_operation()
def exported(machine: str, path: str) -> Commands:
    """
    Ensure that an archive file of a machine exists; the machine may be running.

    + machine: name of the machine
    + path: path of the file, such as ``web.tar.zst``, on the OrbStack host

    The file is either complete or absent, and only its owner can read it. An existing file is kept.

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import orbstack

        orbstack.exported(
            name="Keep the web server as it is now",
            machine="web",
            path="/tmp/web.tar.zst",
        )
    """
    file = posixpath.basename(mac_path("path", path))
    if not file or path == "~":
        raise orbctl.BadValue(f"path {path!r} is a directory: pass the path of a file")
    words = steps.call("export_to", orbctl.check_name(machine))
    kind = ask(PathKind, path=path)
    if kind == "directory":
        raise Refused(f"{path} is a directory: pass the path of a file")
    if kind == "file":
        host.noop(f"{path} exists")
        return
    existing(machine)
    require("2.0", exported=True)
    log_change(f"exporting machine {machine} to {path}")
    yield steps.run(f"{words} {shelltext.mac_path(path)}")


@orbstack_operation()
def imported(path: str, machine: str) -> Commands:
    """
    Ensure that a machine exists, created from a file that ``exported`` wrote.

    + path: path of the file, on the OrbStack host
    + machine: name of the machine

    An existing machine is not compared with the file.

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import orbstack

        orbstack.imported(
            name="Bring the web server back",
            path="/tmp/web.tar.zst",
            machine="web-restored",
        )
    """
    import_ = steps.import_(mac_path("path", path), machine)
    if look(machine):
        host.noop(f"machine {machine} exists")
        return
    if ask(PathKind, path=path) != "file":
        raise PreconditionMissing(
            f"cannot import machine {machine}: there is no file {path}; check the path"
        )
    log_change(f"importing machine {machine} from {path}")
    yield import_


# Settings ---------------------------------------------------------------------------------------


@orbstack_operation()
def config(key: str, value: str | float | bool) -> Commands:
    """
    Ensure that an OrbStack setting has a value; some settings take effect at OrbStack's next start.

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
    wanted = setting_text(value)
    change = steps.orb(*orbctl.config_args(key, wanted))
    have = ask(OrbStackConfigValue, key=key)
    if same_value(wanted, have):
        host.noop(f"{key} is {have!r}")
        return
    log_change(f"{key} is {have!r}, not {wanted!r}")
    yield steps.run(change)


@orbstack_operation()
def default_machine(machine: str | None) -> Commands:
    """
    Ensure that ``orb`` uses a machine by default, or that no default is set.

    + machine: name of the machine, or ``None``

    ``None`` counts as a change for as long as OrbStack still reports a default machine.

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import orbstack

        orbstack.default_machine(
            name="Use the web server by default",
            machine="web",
        )
    """
    if machine is not None:
        existing(machine)
    have = ask(OrbStackDefaultMachine)
    if have == (machine or ""):
        host.noop(f"the default machine is {machine or 'none'}")
        return
    log_change(f"the default machine is {have or 'none'}, not {machine or 'none'}")
    clear = ["default", "none"]
    args = clear if machine is None else orbctl.machine_args("default", machine)
    yield steps.run(steps.orb(*args))


@orbstack_operation()
def machine_user(machine: str, user: str) -> Commands:
    """
    Ensure that a machine has a default user, who must exist in it (use ``server.user`` for that).

    + machine: name of the machine
    + user: name of the user

    Checking the user requires a running machine: a stopped one is started and stopped again.

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
    found = existing(machine)
    if has_user(found, user):
        host.noop(f"the default user of machine {machine} is {user}")
        return
    runs = found["state"] == "running"
    yield steps.set_user(machine, user, patience(), was_running=runs, running=runs)
