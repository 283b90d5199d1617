"""What the Makefile of a generated project calls: ``python -m pyinfra_orbstack.project VERB``.

The verbs live here and not in the project, so that an upgrade of the package mends them in every
project; pyinfra itself does the work, in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pyinfra_orbstack import docker, orbctl

SIMULATOR = "orbctl-simulator"
#: Below the project's folder; `.gitignore` names it.
RECORD = Path(".orbstack", "machines")
PREFIX = "@orbstack/"
CONTAINERS = "@orbstack/docker"


class Refused(Exception):
    """The user has to do something first; the text is one line and nothing was changed."""


# Which orbctl ----------------------------------------------------------------------------------


def is_simulator(command: str) -> bool:
    """Whether this `orbctl` is the simulator."""
    return Path(command).name == SIMULATOR


def choose_orbctl(which: str = "auto") -> str:
    """Return the `orbctl` to use: real OrbStack where there is one, else the simulator.

    Args:
        which: ``real``, ``simulator``, or ``auto``, which honours `PYINFRA_ORBSTACK_ORBCTL`.

    Raises:
        OrbctlMissing: There is none of that kind.
    """
    if which == "simulator":
        beside = Path(sys.executable).with_name(SIMULATOR)
        found = str(beside) if beside.exists() else shutil.which(SIMULATOR)
        if not found:
            raise orbctl.OrbctlMissing(f"{SIMULATOR} not found beside {sys.executable}")
        return found
    if which == "real":
        found = orbctl.find()
        if is_simulator(found):
            raise orbctl.OrbctlMissing(f"orbctl is the simulator ({orbctl.COMMAND_VARIABLE})")
        return found
    if os.environ.get(orbctl.COMMAND_VARIABLE):
        return orbctl.find()
    try:
        return orbctl.find()
    except orbctl.OrbctlMissing:
        if sys.platform == "darwin":
            raise
        return choose_orbctl("simulator")


def settings(command: str) -> dict[str, str]:
    """The environment that somebody else needs to reach the same machines."""
    if not is_simulator(command):
        return {}
    names = ("ORBCTL_SIMULATOR_HOME", "ORBCTL_SIMULATOR_CACHE")
    kept = {name: os.environ[name] for name in names if os.environ.get(name)}
    return {orbctl.COMMAND_VARIABLE: command, **kept}


def pyinfra_argv(*words: str) -> list[str]:
    """The command line of the `pyinfra` that is installed beside this interpreter.

    The script, not ``-m pyinfra``: before 3.10 that loads gevent first and patches it afterwards.
    """
    beside = Path(sys.executable).with_name("pyinfra")
    return [str(beside) if beside.exists() else "pyinfra", *words]


def call(argv: Sequence[str], env: Mapping[str, str]) -> int:
    """Run a program in this terminal and return its exit status.

    Ctrl-C reaches it too, and it has things to put in order before it ends.
    """
    child = subprocess.Popen(argv, env=env)
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            return child.wait()


# Inventories -----------------------------------------------------------------------------------


def inventory_hosts(path: str | os.PathLike[str]) -> list[str]:
    """Names of the hosts in an inventory file, read as pyinfra reads it."""
    names: dict[str, None] = {}
    for key, group in runpy.run_path(os.fspath(path)).items():
        if key.startswith("_") or not isinstance(group, (list, tuple)):
            continue
        hosts = group[0] if isinstance(group, tuple) else group
        for host in hosts if isinstance(hosts, (list, tuple)) else ():
            names[host[0] if isinstance(host, tuple) else host] = None
    return [name for name in names if isinstance(name, str)]


def find_inventory(name: str) -> Path:
    """The file of an inventory.

    Raises:
        Refused: There is none of that name.
    """
    known = sorted(path.stem for path in Path("inventories").glob("*.py"))
    if name not in known:
        raise Refused(f"there is no inventory {name!r}; INVENTORY can be: {', '.join(known)}")
    return Path("inventories", f"{name}.py")


def hosts_of(inventory: Path) -> list[str]:
    """Names of the hosts of an inventory that has some.

    Raises:
        Refused: It has none.
    """
    hosts = inventory_hosts(inventory)
    if not hosts:
        raise Refused(f"{inventory} has no hosts yet: add some to its groups")
    return hosts


def is_container(host: str) -> bool:
    """Whether a host, or a pattern of hosts, means containers."""
    return f"{host}/".startswith(f"{CONTAINERS}/")


def is_machine(host: str) -> bool:
    """Whether a host, or a pattern of hosts, means machines on this computer."""
    return f"{host}/".startswith(PREFIX) and not is_container(host)


def deploy_file(inventory: Path) -> str:
    """The deploy of an inventory: deploy_NAME.py where there is one, else deploy.py."""
    own = Path(f"deploy_{inventory.stem}.py")
    return str(own) if own.is_file() else "deploy.py"


# Verbs -----------------------------------------------------------------------------------------


def deploy(args: argparse.Namespace) -> int:
    """Apply a deploy; machines on this computer are made where missing, and not asked about."""
    inventory = find_inventory(args.inventory)
    hosts = hosts_of(inventory)
    # Containers and servers were made by somebody else, and no deploy makes them again.
    unasked = args.yes or all(map(is_machine, hosts))
    if not (unasked or sys.stdin.isatty()):
        raise Refused(
            f"{inventory} holds more than machines of this computer, and there is nobody to ask: "
            "confirm with YES=1"
        )
    return pyinfra(hosts, *(["-y"] if unasked else []), str(inventory), deploy_file(inventory))


def plan(args: argparse.Namespace) -> int:
    """Show what a deploy would change; what is not there, or stopped, stays so."""
    inventory = find_inventory(args.inventory)
    hosts = hosts_of(inventory)
    states = local_states(hosts)
    ready = []
    for host in hosts:
        state = states.get(host, "running")
        if state == "running":
            ready.append(host)
        else:
            verb = "created" if state == "missing" else "started"
            name = host[len(PREFIX) :]
            print(f"{name} would be {verb}, then everything applied to it", flush=True)
    if not ready:
        return 0
    limits = [word for host in ready for word in ("--limit", host)] if ready != hosts else []
    words = ("--dry", "--diff", *limits, str(inventory), deploy_file(inventory))
    return pyinfra(ready, *words, plan=True)


def local_states(hosts: Sequence[str]) -> dict[str, str]:
    """States of the machines and containers that are named; "missing" is what would be created."""
    named = [host for host in hosts if "/" in host and not set("*?[") & set(host)]
    machines = [host for host in named if is_machine(host)]
    containers = [host for host in named if is_container(host) and host != CONTAINERS]
    states = dict.fromkeys(machines, "missing")
    if machines:
        use_orbctl()
        states.update({PREFIX + one.name: one.state for one in orbctl.Orbctl().machines()})
    if containers:
        engine = docker.Docker()
        for host in containers:
            # Nothing creates one: pyinfra will say that there is none, and which there are.
            with contextlib.suppress(docker.ContainerNotFound):
                states[host] = engine.inspect(host[len(CONTAINERS) + 1 :]).state
    return states


def shell(args: argparse.Namespace) -> int:
    """Open a shell in a machine, or in a container: docker/NAME."""
    login = ["sh", "-c", 'cd; exec "${SHELL:-/bin/sh}" -l']
    if args.machine.startswith("docker/"):
        engine = docker.Docker()
        name = args.machine.partition("/")[2]
        try:
            container = engine.inspect(name)
        except docker.ContainerNotFound:
            known = ", ".join(f"docker/{one.name}" for one in engine.containers()) or "none yet"
            raise Refused(f"there is no container {name!r}; M can be: {known}") from None
        words = docker.exec_args(container.id, login, tty=sys.stdin.isatty())
        return call(engine.argv(words), engine.environment())
    use_orbctl()
    client = orbctl.Orbctl()
    names = [machine.name for machine in client.machines()]
    if args.machine not in names:
        known = ", ".join(names) or "none yet, `make deploy` makes them"
        raise Refused(f"there is no machine {args.machine!r}; M can be: {known}")
    return call(client.argv(orbctl.run_args(args.machine, login)), client.environment())


def destroy(args: argparse.Namespace) -> int:
    """Delete the machines that this project made, by name and id, after asking."""
    record = orbctl.Record(RECORD)
    names = []
    if record.machines():
        use_orbctl()
        names = [machine.name for machine in record.existing(orbctl.Orbctl())]
    if not names:
        print("this project has made no machine that is still there")
        return 0
    if not args.yes:
        if not sys.stdin.isatty():
            raise Refused(f"would delete {', '.join(names)}: confirm with YES=1")
        if input(f"Delete {', '.join(names)}? [y/N] ").strip().lower() not in ("y", "yes"):
            return 1
    deleted = record.delete_all(orbctl.Orbctl())
    print(f"deleted: {', '.join(deleted) or 'nothing, they were gone'}")
    return 0


def use_orbctl() -> None:
    """Choose `orbctl` for this process and the ones it starts, and say so if it is not OrbStack."""
    command = choose_orbctl()
    if is_simulator(command) and not os.environ.get(orbctl.COMMAND_VARIABLE):
        print(f"no OrbStack here: {orbctl.COMMAND_VARIABLE}={command}", flush=True)
        os.environ[orbctl.COMMAND_VARIABLE] = command


def pyinfra(hosts: Sequence[str], *words: str, plan: bool = False) -> int:
    """Run `pyinfra` on these hosts, writing down the machines that it makes."""
    if any(map(is_machine, hosts)):
        use_orbctl()
    extra: Mapping[str, str] = {
        orbctl.RECORD_VARIABLE: str(RECORD.absolute()),
        **({"PYINFRA_ORBSTACK_PLAN": "1"} if plan else {}),
    }
    return call(pyinfra_argv(*words), {**os.environ, **extra})


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m pyinfra_orbstack.project")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for verb, argument in ((deploy, "inventory"), (plan, "inventory"), (shell, "machine")):
        add_verb(verbs, verb).add_argument(argument)
    add_verb(verbs, destroy)
    args = parser.parse_args(argv)
    args.yes = os.environ.get("YES") == "1"
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except (Refused, orbctl.OrbctlError, docker.DockerError) as problem:
        print(problem, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def add_verb(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser],
    run: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    """Add a verb named after the function that carries it out."""
    verb = verbs.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
    verb.set_defaults(run=run)
    return verb


if __name__ == "__main__":
    sys.exit(main())
