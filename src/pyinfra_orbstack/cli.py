"""The command ``pyinfra-orbstack``: the verbs that a generated project's Makefile calls.

They are part of this package and not of the project, so that upgrading the package fixes them in
every project. pyinfra itself does the work, in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from pyinfra_orbstack import docker, hostkeys, inventory_files, orbctl, plans
from pyinfra_orbstack.inventory_files import (
    CommandError,
    deploy_file,
    find_inventory,
    hosts_of,
    inventory_hosts,
    is_container,
    is_machine,
    is_pattern,
    limit_words,
)
from pyinfra_orbstack.programs import choose_orbctl, is_simulator, pyinfra_argv
from pyinfra_orbstack.targets import CONTAINERS, MACHINES

COMMAND = "pyinfra-orbstack"
#: Relative to the project's directory; `.gitignore` lists it.
RECORD = Path(".orbstack", "machines")


def call(argv: Sequence[str], env: Mapping[str, str]) -> int:
    """Run an executable in this terminal and return its exit status as a shell reports it."""
    return _call(argv, env)[0]


def _call(
    argv: Sequence[str], env: Mapping[str, str], stdout: int | None = None
) -> tuple[int, str]:
    """The exit status of an executable, and its output if that goes to a pipe.

    It receives Ctrl-C too, and signals that end this process are forwarded to it, because it has to
    clean up before it ends.
    """
    child = subprocess.Popen(argv, env=env, stdout=stdout)

    def hand_on(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        while True:
            with contextlib.suppress(KeyboardInterrupt):
                output, _ = child.communicate()
                status = child.returncode
                text = (output or b"").decode(errors="replace")
                return (128 - status if status < 0 else status), text
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Verbs -----------------------------------------------------------------------------------------


def deploy(args: argparse.Namespace) -> int:
    """Apply a deploy. Machines on this host are created if missing and need no confirmation."""
    chosen = choose(args)
    words = pyinfra_words(args.args)
    size = batch_size(args.serial)
    # Nothing here created the containers and servers, and no deploy can recreate them.
    unasked = args.yes or all(map(is_machine, chosen.hosts))
    if not (unasked or sys.stdin.isatty()):
        raise CommandError(
            f"{chosen.inventory} targets more than local machines, and stdin is not a terminal: "
            "confirm with YES=1"
        )
    words = [*(["-y"] if unasked else []), *chosen.words, *words]
    if not size:
        limit = limit_words(chosen.hosts) if chosen.limited else []
        return pyinfra(chosen.hosts, *limit, *words)
    prepare(chosen.hosts)
    every = [host.name for host in inventory_files.read(chosen.inventory)]
    every = chosen.hosts if chosen.limited else every
    for first in range(0, len(every), size):
        batch, later = every[first : first + size], every[first + size :]
        print(f"deploying to {', '.join(batch)}", flush=True)
        status = pyinfra(batch, *limit_words(batch), *words)
        if status:
            print(
                f"stopped at a failure; not deployed to: {', '.join(later) or '-'}", file=sys.stderr
            )
            return status
    return 0


def batch_size(serial: str) -> int:
    """How many hosts a rolling deploy updates at a time; 0 for all.

    Raises:
        CommandError: The text is not a number.
    """
    if not re.fullmatch(r"([1-9][0-9]{0,5})?", serial):
        raise CommandError(f"SERIAL must be a number of hosts, such as 1, not {serial!r}")
    return int(serial or 0)


def plan(args: argparse.Namespace) -> int:
    """Show what a deploy would change; nothing is created or started."""
    words = pyinfra_words(args.args)
    ahead = look_ahead(choose(args))
    if not ahead.ready:
        return ahead.status
    # Without --diff, which would show the content of files, secrets included.
    return pyinfra(ahead.ready, "--dry", *ahead.words, *words, plan=True) or ahead.status


def drift(args: argparse.Namespace) -> int:
    """List what a deploy would change; exit status 0: nothing, 2: changes, 1: an error."""
    plans.check_version()
    words = pyinfra_words(args.args)
    ahead = look_ahead(choose(args))
    changes: list[str] = []
    status = ahead.status
    if ahead.ready:
        prepare(ahead.ready)
        argv = pyinfra_argv("--dry", "--json", *ahead.words, *words)
        ended, said = _call(argv, environment(plan=True), subprocess.PIPE)
        if ended > 128:
            return ended
        status = 1 if ended else status
        try:
            changes = plans.changes(said)
        except plans.NoPlan:
            if not ended:  # else pyinfra has reported the reason
                raise
    for change in changes:
        print(change)
    if not (changes or ahead.unready or status):
        print(f"{args.inventory}: nothing would change")
    return status or (2 if changes or ahead.unready else 0)


class Ahead(NamedTuple):
    """The basis of a plan.

    Attributes:
        ready: Hosts that are ready to be queried.
        unready: Hosts that a deploy would create or start first.
        status: 1 if there is a host that a deploy could not make ready.
        words: `pyinfra` arguments for the ready hosts.
    """

    ready: list[str]
    unready: list[str]
    status: int
    words: list[str]


def look_ahead(chosen: Chosen) -> Ahead:
    """Say what a deploy would do first, and find the hosts that can already be queried."""
    states = local_states(chosen.hosts)
    waiting = [host for host, state in states.items() if state != "running"]
    joined, unready, status = announce(chosen.inventory, waiting) if waiting else ([], [], 0)
    ready = [host for host in states if host not in waiting or host in joined]
    limit = limit_words(ready) if chosen.limited or ready != chosen.hosts else []
    return Ahead(ready, unready, status, [*limit, *chosen.words])


class Chosen(NamedTuple):
    """The hosts that a verb applies to.

    Attributes:
        inventory: The inventory file.
        hosts: Their names; under a limit, full names as pyinfra uses them.
        limited: Whether the user gave a limit.
    """

    inventory: Path
    hosts: list[str]
    limited: bool

    @property
    def words(self) -> list[str]:
        """`pyinfra` arguments: the inventory and its deploy file."""
        return [str(self.inventory), deploy_file(self.inventory)]


def choose(args: argparse.Namespace) -> Chosen:
    """The hosts of a non-empty inventory, or those that the user's limit selects.

    Raises:
        CommandError: There are none.
    """
    inventory = find_inventory(args.inventory)
    hosts = hosts_of(inventory)
    if args.limit is None:
        return Chosen(inventory, hosts, limited=False)
    prepare(hosts)
    found = inventory_files.limited(inventory_files.read(inventory), inventory, args.limit)
    return Chosen(inventory, found, limited=True)


#: pyinfra options that the verbs pass themselves, and the user's way to set them.
OURS = {"--limit": "LIMIT", "--yes": "YES=1", "-y": "YES=1"}


def pyinfra_words(text: str) -> list[str]:
    """More `pyinfra` arguments, split as a shell splits them, without executing anything.

    Raises:
        CommandError: The text cannot be split, or contains an option that has its own variable.
    """
    try:
        words = shlex.split(text)
    except ValueError as broken:
        raise CommandError(
            f"cannot split ARGS into words: {broken}; quote it as in a shell"
        ) from None
    for word in words:
        option = word.partition("=")[0]
        # Short options can be joined: -vvy.
        option = "-y" if re.fullmatch(r"-[a-z]*y[a-z]*", word) else option
        if option in OURS:
            raise CommandError(f"ARGS cannot contain {option}: use {OURS[option]}")
    return words


def local_states(hosts: Sequence[str]) -> dict[str, str]:
    """States of hosts, with patterns resolved; "missing" if it does not exist.

    Hosts elsewhere count as "running", and so does a name that means nothing here: pyinfra will
    report it.
    """
    machines, containers = {}, {}
    if any(map(is_machine, hosts)):
        use_orbctl()
        machines = {MACHINES + one.name: one.state for one in orbctl.Orbctl().machines()}
    if any(map(is_container, hosts)):
        there = docker.Docker().containers()
        containers = {CONTAINERS + one.name: one.state for one in there}
        # A container may be named by an id prefix.
        containers.update(
            (host, one.state)
            for host in filter(is_container, hosts)
            for one in there
            if host not in containers and one.id.startswith(host[len(CONTAINERS) :] or "-")
        )
    states: dict[str, str] = {}
    for host in hosts:
        known = containers if is_container(host) else machines
        if not is_machine(host) and not is_container(host):
            states[host] = "running"
        elif f"{host}/" in (MACHINES, CONTAINERS) or is_pattern(host):
            pattern = host if is_pattern(host) else f"{host}/*"
            # A machine pattern includes stopped machines.
            every = is_machine(host) and pattern == host
            found = {name: state for name, state in known.items() if fnmatchcase(name, pattern)}
            found = {name: state for name, state in found.items() if every or state == "running"}
            states.update(found or {host: "running"})
        else:
            states[host] = known.get(host, "missing")
    return states


def announce(inventory: Path, hosts: Sequence[str]) -> tuple[list[str], list[str], int]:
    """Say what a deploy would do first with hosts that are not ready for it.

    The connector reports it: pyinfra gives it their data, and it checks the specification of each
    missing machine, but may neither create nor start one now.

    Returns:
        Hosts that are ready after all, hosts that a deploy would make ready, and 1 if there is a
        host that it could not make ready.
    """
    argv = pyinfra_argv("-y", *limit_words(hosts), str(inventory), "exec", "--", "true")
    done = subprocess.run(
        argv,
        env=environment(plan=True),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    ready, unready, status = [], [], 0
    for host in hosts:
        said = re.findall(rf"^ *\[{re.escape(host)}\] *(.*)$", done.stderr, re.MULTILINE)
        if not said:  # nothing tried to connect
            print(done.stderr.strip(), file=sys.stderr)
            return [], [], 1
        name = host[len(MACHINES) :]
        verb = re.search(r"may not be (created|started) now", said[-1])
        if "Connected" in said:
            ready.append(host)
        elif verb:
            print(f"{name} would be {verb[1]}, then everything applied to it", flush=True)
            unready.append(host)
        else:
            print(f"{name}: {said[-1]}", file=sys.stderr, flush=True)
            status = 1
    return ready, unready, status


def trust(args: argparse.Namespace) -> int:
    """Record SSH host keys of servers in the file that their data names, after asking."""
    return hostkeys.trust(find_inventory(args.inventory), args.limit, yes=args.yes)


def shell(args: argparse.Namespace) -> int:
    """Open a shell in a machine, or in a container: docker/NAME."""
    login = ["sh", "-c", 'cd; exec "${SHELL:-/bin/sh}" -l']
    if args.machine.startswith("docker/"):
        engine = docker.Docker()
        name = args.machine.partition("/")[2]
        try:
            container = engine.inspect(name)
        except docker.ContainerNotFound:
            known = ", ".join(f"docker/{one.name}" for one in engine.containers())
            advice = f"set M to one of: {known}" if known else "start one"
            raise CommandError(f"there is no container {name!r}: {advice}") from None
        words = docker.exec_args(container.id, login, tty=sys.stdin.isatty())
        return call(engine.argv(words), engine.environment())
    use_orbctl()
    client = orbctl.Orbctl()
    names = [machine.name for machine in client.machines()]
    if args.machine not in names:
        advice = f"set M to one of: {', '.join(names)}" if names else "create it with `make deploy`"
        raise CommandError(f"there is no machine {args.machine!r}: {advice}")
    return call(client.argv(orbctl.run_args(args.machine, login)), client.environment())


def destroy(args: argparse.Namespace) -> int:
    """Delete the machines that this project created, of one inventory or all, after asking."""
    inventory = None if args.inventory is None else find_inventory(args.inventory)
    wanted = machines_of(inventory) if inventory else None
    if wanted == []:
        raise CommandError(f"{inventory} contains no local machines: there is nothing to delete")
    record = orbctl.Record(RECORD)
    recorded = {machine_id: name for name, machine_id in record.machines().items()}
    machines: list[orbctl.Machine] = []
    if recorded:
        use_orbctl()
        machines = record.existing(orbctl.Orbctl())
    if wanted is not None:
        tell_forgotten([one.name for one in machines if recorded.get(one.id) not in wanted])
        machines = [one for one in machines if recorded.get(one.id) in wanted]
    names = [machine.name for machine in machines]
    if not names:
        where = f"{inventory} contains no machine" if inventory else "there is no machine"
        print(f"{where} that this project created")
        return 0
    if not args.yes:
        if not sys.stdin.isatty():
            raise CommandError(f"would delete {', '.join(names)}: confirm with YES=1")
        try:
            answer = input(f"Delete {', '.join(names)}? [y/N] ")
        except EOFError:  # Ctrl-D means no
            print()
            answer = ""
        if answer.strip().lower() not in ("y", "yes"):
            return 1
    deleted, problems = record.delete(machines, orbctl.Orbctl())
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"deleted: {', '.join(deleted) or 'nothing'}")
    return 1 if problems else 0


def machines_of(inventory: Path) -> list[str]:
    """Names of the machines that a deploy of an inventory creates."""
    hosts = filter(is_machine, inventory_hosts(inventory))
    # Machines that match a pattern, or the bare name, were not created by the deploy.
    names = (host[len(MACHINES) :] for host in hosts if not is_pattern(host))
    return [name for name in names if name]


def tell_forgotten(names: Sequence[str]) -> None:
    """List the machines created here that no inventory names."""
    known: list[str] = []
    try:
        for inventory in Path("inventories").glob("*.py"):
            known += machines_of(inventory)
    except CommandError:
        return
    forgotten = sorted(set(names) - set(known))
    if forgotten:
        print(f"also created here, but no longer in any inventory: {', '.join(forgotten)}")
        command = Path(sys.executable).with_name(COMMAND)
        print(f"(to delete all machines created here: {command} destroy)")


def use_orbctl() -> None:
    """Choose `orbctl` for this process and its children, and say so if it is not OrbStack."""
    command = choose_orbctl()
    if is_simulator(command) and not os.environ.get(orbctl.COMMAND_VARIABLE):
        print(f"no OrbStack here: {orbctl.COMMAND_VARIABLE}={command}", flush=True)
        os.environ[orbctl.COMMAND_VARIABLE] = command


def environment(*, plan: bool = False) -> dict[str, str]:
    """The environment of a `pyinfra` that records the machines that it creates."""
    record = {orbctl.RECORD_VARIABLE: str(RECORD.absolute())}
    given = {**os.environ, **record}
    if plan:
        # The variable of pyinfra's own -y, with which it does not look for changes.
        given.pop("PYINFRA_YES", None)
        given[orbctl.PLAN_VARIABLE] = "1"
    return given


def prepare(hosts: Sequence[str]) -> None:
    """Choose `orbctl` if a host needs one."""
    if any(map(is_machine, hosts)):
        use_orbctl()


def pyinfra(hosts: Sequence[str], *words: str, plan: bool = False) -> int:
    """Run `pyinfra` on these hosts."""
    prepare(hosts)
    return call(pyinfra_argv(*words), environment(plan=plan))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status."""
    try:
        args = parser().parse_args(argv)
    except SystemExit as ended:
        # argparse exits with 2, which means drift here.
        if ended.code and (sys.argv[1:] if argv is None else argv)[:1] == [drift.__name__]:
            return 1
        raise
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except (CommandError, plans.NoPlan, orbctl.OrbctlError, docker.DockerError) as problem:
        print(problem, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    """Build the command-line parser."""
    command = argparse.ArgumentParser(
        prog=COMMAND,
        description="Deploy the project in this directory to the hosts of an inventory.",
        epilog=f"`{COMMAND} VERB --help` explains a verb.",
    )
    verbs = command.add_subparsers(required=True, metavar="VERB")
    inventory = "name of a file in inventories/, without .py"
    for run in (deploy, plan, drift, trust):
        verb = add_verb(verbs, run, yes=run in (deploy, trust))
        verb.add_argument("inventory", help=inventory)
        verb.add_argument(
            "--limit", metavar="HOSTS", help="only these hosts, groups, or patterns such as 'web*'"
        )
        if run is deploy:
            serial = "roll out to N hosts at a time, and stop when one fails"
            verb.add_argument("--serial", metavar="N", default="", help=serial)
        if run is not trust:
            words = "more options of pyinfra, such as --args='-v --data key=value'"
            verb.add_argument("--args", metavar="WORDS", default="", help=words)
    machine = "name of a machine, or docker/NAME for a container"
    add_verb(verbs, shell).add_argument("machine", help=machine)
    every = f"{inventory}; every machine by default"
    add_verb(verbs, destroy, yes=True).add_argument("inventory", nargs="?", help=every)
    return command


def add_verb(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser],
    run: Callable[[argparse.Namespace], int],
    *,
    yes: bool = False,
) -> argparse.ArgumentParser:
    """Add a verb named after the function that implements it."""
    text = (run.__doc__ or "").replace("%", "%%")
    verb = verbs.add_parser(run.__name__, help=text, description=text)
    verb.set_defaults(run=run)
    if yes:
        verb.add_argument(
            "-y",
            "--yes",
            action="store_true",
            default=os.environ.get("YES") == "1",
            help="do not ask; the environment variable YES=1 does the same",
        )
    return verb
