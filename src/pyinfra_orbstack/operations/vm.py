"""
Operations under their names from before 1.0, for existing deploys.

New deploys use `pyinfra_orbstack.operations.orbstack`, and `pyinfra_orbstack.facts.orbstack` to
read the current state. docs/migrating.md lists the old and new names, and each call issues a
warning that names the new one. The former parameter ``name`` is now ``machine``: pyinfra reserves
``name``, so it only ever worked by position.

Operations that only show something change nothing. Without a machine parameter they show every
machine.
"""

from __future__ import annotations

import json
import re
import shlex
import warnings
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple

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

# What the old operations do that the new ones do not -------------------------------------------


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


def _show_logs(all_logs: bool) -> Commands:
    machines = ask(OrbStackMachines, addresses=False)
    yield from _show(
        {one: ask(OrbStackMachineLogs, machine=one, all_logs=all_logs) for one in machines}
    )


def _show_ssh(machine: str | None) -> Commands:
    details = ask(OrbStackSSH)
    yield from _show({**details, "command": _ssh_command(machine)})


def _ssh_command(machine: str | None) -> str:
    return f"ssh {orbctl.check_name(machine)}@orb" if machine else "ssh orb"


def _test_connectivity(target: str, method: str, count: int) -> Commands:
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
            f"method must be ping, curl or nc, and count a number, not {method!r} and {count!r}"
        )
    if method == "nc" and not (address and re.fullmatch("[0-9]+", port)):
        raise orbctl.BadValue(f"target must be NAME or NAME:PORT for nc, not {target!r}")
    yield from _probe(commands[method])


def _dns_lookup(hostname: str, lookup_type: str) -> Commands:
    if not re.fullmatch(r"[A-Za-z0-9]+", lookup_type):
        raise orbctl.BadValue(f"lookup_type must be a word such as A or MX, not {lookup_type!r}")
    yield from _probe(["host", "-t", lookup_type, orbctl.check_value("hostname", hostname)])


def _probe(words: list[str]) -> Commands:
    """Run a command that changes nothing, once earlier operations of the deploy have run."""
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


# The table --------------------------------------------------------------------------------------


class Old(NamedTuple):
    """An operation from before 1.0.

    Attributes:
        function: Its parameters and implementation.
        does: The first sentence of its description.
        instead: Its replacement.
        example: A call of it.
        parameters: Descriptions of its parameters, by name.
        decorate: Turns it into a pyinfra operation.
    """

    function: Callable[..., Commands]
    does: str
    instead: str
    example: str
    parameters: dict[str, str] = {}
    decorate: Callable[[Any], Any] = operation()


MACHINE = {"machine": "name of the machine"}
ONE_FACT = "the fact ``OrbStackMachine``"
SHOWS = orbstack_operation()
LOOKS = orbstack_operation(anywhere=True)
NOTICE = "This operation always restarts the machine."

TABLE = {
    "vm_create": Old(
        lambda machine, image, arch=None, user=None, present=True: orbstack.machine._inner(
            machine, image, present=present, user=user, arch=arch
        ),
        "Ensure that a machine exists and runs.",
        "``orbstack.machine``",
        'vm.vm_create("web", "ubuntu:noble")',
        {
            "machine": "name of the machine",
            "image": "``DISTRO`` or ``DISTRO:VERSION``",
            "arch": "``arm64`` or ``amd64``",
            "user": "its default user",
            "present": "whether it should exist",
        },
    ),
    "vm_clone": Old(
        lambda source_name, new_name: orbstack.cloned._inner(source_name, new_name),
        "Ensure that a machine exists, as a copy of another one.",
        "``orbstack.cloned``",
        'vm.vm_clone("web", "web-test")',
        {"source_name": "name of the machine to copy", "new_name": "name of the copy"},
    ),
    "vm_export": Old(
        lambda machine, output_path: orbstack.exported._inner(machine, output_path),
        "Ensure that an archive file of a machine exists.",
        "``orbstack.exported``",
        'vm.vm_export("web", "/tmp/web.tar.zst")',
        {"machine": "name of the machine", "output_path": "path of the file"},
    ),
    "vm_import": Old(
        lambda input_path, machine: orbstack.imported._inner(input_path, machine),
        "Ensure that a machine exists, created from an exported one.",
        "``orbstack.imported``",
        'vm.vm_import("/tmp/web.tar.zst", "web-restored")',
        {"input_path": "path of the file", "machine": "name of the machine"},
    ),
    "vm_rename": Old(
        lambda old_name, new_name: orbstack.renamed._inner(old_name, new_name),
        "Ensure that a machine has a new name.",
        "``orbstack.renamed``",
        'vm.vm_rename("web", "www")',
        {"old_name": "its current name", "new_name": "its new name"},
    ),
    "vm_delete": Old(
        lambda machine, force=False: orbstack.machine._inner(machine, present=False),
        "Ensure that a machine does not exist.",
        "``orbstack.machine`` with ``present=False``",
        'vm.vm_delete("web-old", force=True)',
        {
            "machine": "name of the machine",
            "force": "has no effect: there is no prompt to skip",
        },
    ),
    "vm_start": Old(
        lambda machine: orbstack.started._inner(machine),
        "Ensure that a machine runs.",
        "``orbstack.started``",
        'vm.vm_start("web")',
        MACHINE,
    ),
    "vm_stop": Old(
        lambda machine, force=False: orbstack.stopped._inner(machine, force=force),
        "Ensure that a machine does not run.",
        "``orbstack.stopped``",
        'vm.vm_stop("web")',
        {"machine": "name of the machine", "force": "whether to stop it at once"},
    ),
    "vm_restart": Old(
        lambda machine: orbstack.restarted._inner(machine),
        "Restart a machine.",
        "``orbstack.restarted``",
        'vm.vm_restart("web")',
        MACHINE,
        decorate=operation(is_idempotent=False, idempotent_notice=NOTICE),
    ),
    "vm_username_set": Old(
        lambda vm_name, username: orbstack.machine_user._inner(vm_name, username),
        "Ensure that a machine has a default user.",
        "``orbstack.machine_user``",
        'vm.vm_username_set("web", "root")',
        {"vm_name": "name of the machine", "username": "name of the user"},
    ),
    "vm_info": Old(
        lambda: _show_machines(),
        "Show all details of machines.",
        ONE_FACT,
        "vm.vm_info()",
        decorate=SHOWS,
    ),
    "vm_status_detailed": Old(
        lambda: _show_machines(),
        "Show all details of machines.",
        ONE_FACT,
        "vm.vm_status_detailed()",
        decorate=SHOWS,
    ),
    "vm_status": Old(
        lambda: _show_machines("state"),
        "Show the state of machines.",
        ONE_FACT,
        "vm.vm_status()",
        decorate=SHOWS,
    ),
    "vm_ip": Old(
        lambda: _show_machines("ip4"),
        "Show the addresses of machines.",
        ONE_FACT,
        "vm.vm_ip()",
        decorate=SHOWS,
    ),
    "vm_network_info": Old(
        lambda: _show_machines("ip4", "ip6", "domain"),
        "Show addresses and domains of machines.",
        ONE_FACT,
        "vm.vm_network_info()",
        decorate=SHOWS,
    ),
    "vm_network_details": Old(
        lambda: _show_machines("ip4", "ip6", "domain"),
        "Show addresses and domains of machines.",
        ONE_FACT,
        "vm.vm_network_details()",
        decorate=SHOWS,
    ),
    "vm_list": Old(
        lambda: _show(list(ask(OrbStackMachines).values())),
        "Show every machine.",
        "the fact ``OrbStackMachines``",
        "vm.vm_list()",
        decorate=SHOWS,
    ),
    "vm_logs": Old(
        lambda all_logs=False: _show_logs(all_logs),
        "Show the logs of machines.",
        "the fact ``OrbStackMachineLogs``",
        "vm.vm_logs()",
        {"all_logs": "whether to include OrbStack's own log messages"},
        decorate=SHOWS,
    ),
    "ssh_info": Old(
        lambda machine=None: _show_ssh(machine),
        "Show how to reach machines over SSH.",
        "the fact ``OrbStackSSH``",
        'vm.ssh_info("web")',
        MACHINE,
        decorate=SHOWS,
    ),
    "ssh_connect_string": Old(
        lambda machine=None: _show(_ssh_command(machine)),
        "Show the command that opens a shell over SSH.",
        "``ssh NAME@orb``",
        'vm.ssh_connect_string("web")',
        MACHINE,
        decorate=SHOWS,
    ),
    "orbstack_config_get": Old(
        lambda key: _show({key: ask(OrbStackConfigValue, key=key)}),
        "Show a setting.",
        "the fact ``OrbStackConfigValue``",
        'vm.orbstack_config_get("memory_mib")',
        {"key": "name of the setting"},
        decorate=SHOWS,
    ),
    "orbstack_config_show": Old(
        lambda: _show(ask(OrbStackConfig)),
        "Show all settings.",
        "the fact ``OrbStackConfig``",
        "vm.orbstack_config_show()",
        decorate=SHOWS,
    ),
    "orbstack_config_set": Old(
        lambda key, value: orbstack.config._inner(key, value),
        "Ensure that a setting has a value.",
        "``orbstack.config``",
        'vm.orbstack_config_set("memory_mib", "8192")',
        {"key": "name of the setting", "value": "its value"},
    ),
    "vm_test_connectivity": Old(
        lambda target, method="ping", count=3: _test_connectivity(target, method, count),
        "Fail unless the host, which may be a machine, reaches something.",
        "``server.shell`` with ``ping``, ``curl`` or ``nc``",
        'vm.vm_test_connectivity("web.orb.local:22", method="nc")',
        {
            "target": "a name or an address; a URL for ``curl``; with ``:PORT`` for ``nc``, "
            "else 22",
            "method": "``ping``, ``curl`` or ``nc``",
            "count": "how often to ping",
        },
        decorate=LOOKS,
    ),
    "vm_dns_lookup": Old(
        lambda hostname, lookup_type="A": _dns_lookup(hostname, lookup_type),
        "Fail unless the host, which may be a machine, resolves a name.",
        "``server.shell`` with ``host``",
        'vm.vm_dns_lookup("web.orb.local")',
        {"hostname": "the name", "lookup_type": "type of the record, such as ``A`` or ``MX``"},
        decorate=LOOKS,
    ),
}


def _operation(name: str, old: Old) -> Any:
    """A pyinfra operation that names its replacement at each call."""
    function = old.function
    function.__name__ = function.__qualname__ = name
    told = "".join(f"+ {parameter}: {text}\n" for parameter, text in old.parameters.items())
    function.__doc__ = f"""
{old.does} Deprecated: use {old.instead}.

{told}
**Example:**

.. code:: python

    from pyinfra_orbstack.operations import vm

    {old.example}
"""
    run = old.decorate(function)
    text = f"vm.{name} is deprecated: use {old.instead}".replace("``", "")

    @wraps(run)
    def call(*args: Any, **kwargs: Any) -> Any:
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        return run(*args, **kwargs)

    return call


globals().update({name: _operation(name, old) for name, old in TABLE.items()})

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...
