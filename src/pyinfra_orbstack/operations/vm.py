"""
Operations by the names they had before 1.0, for deploys that use them.

New deploys use `pyinfra_orbstack.operations.orbstack`, and `pyinfra_orbstack.facts.orbstack` for
what there is; docs/migrating.md has the names side by side. What was a parameter ``name`` is
``machine`` now: pyinfra keeps that word for itself, so it never worked but by position.

What only shows something changes nothing. Where no machine is a parameter, it shows every one.
"""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

from pyinfra import host, logger, state
from pyinfra.api import operation
from pyinfra.facts.server import Command

from pyinfra_orbstack import orbctl
from pyinfra_orbstack.facts.orbstack import (
    OrbStackConfig,
    OrbStackConfigValue,
    OrbStackMachineLogs,
    OrbStackMachines,
    OrbStackSSH,
)
from pyinfra_orbstack.operations import orbstack
from pyinfra_orbstack.operations.common import Commands, ask, fail, orbstack_operation


def _show(value: Any) -> Commands:
    if state.is_executing:
        for line in json.dumps(value, indent=2, default=str).splitlines():
            logger.info(f"{host.print_prefix}{line}")
    host.noop("this only shows something")
    yield from ()


def _show_machines(*keys: str) -> Commands:
    machines = ask(OrbStackMachines)
    found: dict[str, dict[str, Any]] = {name: {**one} for name, one in machines.items()}
    yield from _show(
        {name: {key: one.get(key) for key in keys or one} for name, one in found.items()}
    )


# Machines ---------------------------------------------------------------------------------------


@operation()
def vm_create(
    machine: str,
    image: str,
    arch: str | None = None,
    user: str | None = None,
    present: bool = True,
) -> Commands:
    """
    Ensure that a machine exists and runs. Now ``orbstack.machine``.

    + machine: name of the machine
    + image: ``DISTRO`` or ``DISTRO:VERSION``
    + arch: ``arm64`` or ``amd64``
    + user: its default user
    + present: whether it should exist

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import vm

        vm.vm_create("web", "ubuntu:noble")
    """
    yield from orbstack.machine._inner(machine, image, present=present, user=user, arch=arch)


@operation()
def vm_clone(source_name: str, new_name: str) -> Commands:
    """
    Ensure that a machine exists, as a copy of another one. Now ``orbstack.cloned``.

    + source_name: name of the machine to copy
    + new_name: name of the copy

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import vm

        vm.vm_clone("web", "web-test")
    """
    yield from orbstack.cloned._inner(source_name, new_name)


@operation()
def vm_export(machine: str, output_path: str) -> Commands:
    """
    Ensure that there is a file that holds a machine. Now ``orbstack.exported``.

    + machine: name of the machine
    + output_path: path of the file

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import vm

        vm.vm_export("web", "/tmp/web.tar.zst")
    """
    yield from orbstack.exported._inner(machine, output_path)


@operation()
def vm_import(input_path: str, machine: str) -> Commands:
    """
    Ensure that a machine exists, made from an exported one. Now ``orbstack.imported``.

    + input_path: path of the file
    + machine: name of the machine

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import vm

        vm.vm_import("/tmp/web.tar.zst", "web-restored")
    """
    yield from orbstack.imported._inner(input_path, machine)


@operation()
def vm_rename(old_name: str, new_name: str) -> Commands:
    """
    Ensure that a machine bears another name. Now ``orbstack.renamed``.

    + old_name: name that it has had
    + new_name: name that it shall have

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import vm

        vm.vm_rename("web", "www")
    """
    yield from orbstack.renamed._inner(old_name, new_name)


@operation()
def vm_delete(machine: str, force: bool = False) -> Commands:
    """
    Ensure that a machine does not exist. Now ``orbstack.machine`` with ``present=False``.

    + machine: name of the machine
    + force: makes no difference: nobody is there to be asked

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import vm

        vm.vm_delete("web-old", force=True)
    """
    yield from orbstack.machine._inner(machine, present=False)


@operation()
def vm_start(machine: str) -> Commands:
    """
    Ensure that a machine runs. Now ``orbstack.started``.

    + machine: name of the machine

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import vm

        vm.vm_start("web")
    """
    yield from orbstack.started._inner(machine)


@operation()
def vm_stop(machine: str, force: bool = False) -> Commands:
    """
    Ensure that a machine does not run. Now ``orbstack.stopped``.

    + machine: name of the machine
    + force: whether to stop it at once

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import vm

        vm.vm_stop("web")
    """
    yield from orbstack.stopped._inner(machine, force=force)


@operation(is_idempotent=False, idempotent_notice="This operation always restarts the machine.")
def vm_restart(machine: str) -> Commands:
    """
    Restart a machine. Now ``orbstack.restarted``.

    + machine: name of the machine

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import vm

        vm.vm_restart("web")
    """
    yield from orbstack.restarted._inner(machine)


@operation()
def vm_username_set(vm_name: str, username: str) -> Commands:
    """
    Ensure that a machine has a default user. Now ``orbstack.machine_user``.

    + vm_name: name of the machine
    + username: name of the user

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import vm

        vm.vm_username_set("web", "root")
    """
    yield from orbstack.machine_user._inner(vm_name, username)


# What only shows something ----------------------------------------------------------------------


@orbstack_operation()
def vm_info() -> Commands:
    """
    Show all about machines. To use them, ask for the fact ``OrbStackMachine``.

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import vm

        vm.vm_info()
    """
    yield from _show_machines()


@orbstack_operation()
def vm_status_detailed() -> Commands:
    """
    Show all about machines. To use them, ask for the fact ``OrbStackMachine``.

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import vm

        vm.vm_status_detailed()
    """
    yield from _show_machines()


@orbstack_operation()
def vm_status() -> Commands:
    """
    Show the state of machines. To use them, ask for the fact ``OrbStackMachine``.

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import vm

        vm.vm_status()
    """
    yield from _show_machines("state")


@orbstack_operation()
def vm_ip() -> Commands:
    """
    Show the addresses of machines. To use them, ask for the fact ``OrbStackMachine``.

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import vm

        vm.vm_ip()
    """
    yield from _show_machines("ip4")


@orbstack_operation()
def vm_network_info() -> Commands:
    """
    Show addresses and domains of machines. To use them, ask for the fact ``OrbStackMachine``.

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import vm

        vm.vm_network_info()
    """
    yield from _show_machines("ip4", "ip6", "domain")


@orbstack_operation()
def vm_network_details() -> Commands:
    """
    Show addresses and domains of machines. To use them, ask for the fact ``OrbStackMachine``.

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import vm

        vm.vm_network_details()
    """
    yield from _show_machines("ip4", "ip6", "domain")


@orbstack_operation()
def vm_list() -> Commands:
    """
    Show every machine. To use them, ask for the fact ``OrbStackMachines``.

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import vm

        vm.vm_list()
    """
    yield from _show(list(ask(OrbStackMachines).values()))


@orbstack_operation()
def vm_logs(all_logs: bool = False) -> Commands:
    """
    Show the logs of machines. To use them, ask for the fact ``OrbStackMachineLogs``.

    + all_logs: whether to show what OrbStack itself logs, too

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import vm

        vm.vm_logs()
    """
    machines = ask(OrbStackMachines, addresses=False)
    yield from _show(
        {one: ask(OrbStackMachineLogs, machine=one, all_logs=all_logs) for one in machines}
    )


@orbstack_operation()
def ssh_info(machine: str | None = None) -> Commands:
    """
    Show how to reach machines over SSH. To use it, ask for the fact ``OrbStackSSH``.

    + machine: name of the machine

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import vm

        vm.ssh_info("web")
    """
    details = ask(OrbStackSSH)
    yield from _show({**details, "command": _ssh_command(machine)})


@orbstack_operation()
def ssh_connect_string(machine: str | None = None) -> Commands:
    """
    Show the command that opens a shell over SSH. To use it, write ``ssh NAME@orb``.

    + machine: name of the machine

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import vm

        vm.ssh_connect_string("web")
    """
    yield from _show(_ssh_command(machine))


def _ssh_command(machine: str | None) -> str:
    return f"ssh {orbctl.check_name(machine)}@orb" if machine else "ssh orb"


# Settings ---------------------------------------------------------------------------------------


@orbstack_operation()
def orbstack_config_get(key: str) -> Commands:
    """
    Show a setting. To use it, ask for the fact ``OrbStackConfig``.

    + key: name of the setting

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import vm

        vm.orbstack_config_get("memory_mib")
    """
    yield from _show({key: ask(OrbStackConfigValue, key=key)})


@orbstack_operation()
def orbstack_config_show() -> Commands:
    """
    Show all settings. To use them, ask for the fact ``OrbStackConfig``.

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import vm

        vm.orbstack_config_show()
    """
    yield from _show(ask(OrbStackConfig))


@operation()
def orbstack_config_set(key: str, value: str) -> Commands:
    """
    Ensure that a setting has a value. Now ``orbstack.config``.

    + key: name of the setting
    + value: its value

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import vm

        vm.orbstack_config_set("memory_mib", "8192")
    """
    yield from orbstack.config._inner(key, value)


# From inside a machine --------------------------------------------------------------------------


@orbstack_operation(anywhere=True)
def vm_test_connectivity(target: str, method: str = "ping", count: int = 3) -> Commands:
    """
    Fail unless the host, which may be a machine, reaches something. Nothing is changed.

    + target: a name or an address; a URL for ``curl``; with ``:PORT``, 22 if not given, for ``nc``
    + method: ``ping``, ``curl`` or ``nc``
    + count: how often to ping

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import vm

        vm.vm_test_connectivity("web.orb.local:22", method="nc")
    """
    orbctl.check_value("target", target)
    address, _, port = target.rpartition(":") if ":" in target else (target, "", "22")
    commands = {
        "ping": ["ping", "-c", str(count), target],
        "curl": ["curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}\n"]
        + ["--connect-timeout", "5", target],
        "nc": ["nc", "-zv", "-w", "5", address, port],
    }
    if method not in commands or not str(count).isdigit():
        raise orbctl.BadValue(
            f"method is ping, curl or nc, and count a number, not {method!r} and {count!r}"
        )
    yield from _probe(commands[method])


@orbstack_operation(anywhere=True)
def vm_dns_lookup(hostname: str, lookup_type: str = "A") -> Commands:
    """
    Fail unless the host, which may be a machine, resolves a name. Nothing is changed.

    + hostname: the name
    + lookup_type: type of the record, such as ``A`` or ``MX``

    **Example:**

    .. code:: python

        from pyinfra_orbstack.operations import vm

        vm.vm_dns_lookup("web.orb.local")
    """
    if not re.fullmatch(r"[A-Za-z0-9]+", lookup_type):
        raise orbctl.BadValue(f"lookup_type is a word such as A or MX, not {lookup_type!r}")
    yield from _probe(["host", "-t", lookup_type, orbctl.check_value("hostname", hostname)])


def _probe(words: list[str]) -> Commands:
    """Run a command that changes nothing, where the host is as the deploy has made it so far."""
    if not state.is_executing:
        host.noop("this only looks")
        return
    *said, status = host.get_fact(
        Command, command=f"( {shlex.join(words)} ) 2>&1; echo $?"
    ).splitlines()
    for line in said:
        logger.info(f"{host.print_prefix}{line}")
    if status != "0":
        yield fail(f"{shlex.join(words)}: exit code {status}")
