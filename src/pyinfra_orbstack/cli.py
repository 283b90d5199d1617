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
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from pyinfra_orbstack import docker, hostkeys, inventory_files, orbctl, plans
from pyinfra_orbstack.inventory_files import (
    FILES,
    CommandError,
    deploy_file,
    find_inventory,
    hosts_of,
    inventory_hosts,
    is_container,
    is_machine,
    limit_words,
)
from pyinfra_orbstack.places import HERE, SSH_KEY, Place, place_of
from pyinfra_orbstack.programs import choose_orbctl, is_simulator, pyinfra_argv
from pyinfra_orbstack.record import RecordError
from pyinfra_orbstack.record import place_of as machines_place
from pyinfra_orbstack.targets import MACHINES, parse

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
        return pyinfra(chosen.here(chosen.hosts), *limit, *words)
    prepare(chosen.here(chosen.hosts))
    every = inventory_files.host_names(inventory_files.read(chosen.inventory))
    every = chosen.hosts if chosen.limited else every
    for first in range(0, len(every), size):
        batch, later = every[first : first + size], every[first + size :]
        print(f"deploying to {', '.join(batch)}", flush=True)
        status = pyinfra(chosen.here(batch), *limit_words(batch), *words)
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
    chosen = choose(args)
    ahead = look_ahead(chosen)
    if not ahead.ready:
        return ahead.status
    # Without --diff, which would show the content of files, secrets included.
    here = chosen.here(ahead.ready)
    return pyinfra(here, "--dry", *ahead.words, *words, plan=True) or ahead.status


def drift(args: argparse.Namespace) -> int:
    """List what a deploy would change; exit status 0: nothing, 2: changes, 1: an error."""
    plans.check_version()
    words = pyinfra_words(args.args)
    chosen = choose(args)
    ahead = look_ahead(chosen)
    changes: list[str] = []
    status = ahead.status
    if ahead.ready:
        prepare(chosen.here(ahead.ready))
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
    states = local_states(chosen.hosts, chosen.elsewhere)
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
        elsewhere: Hosts whose data names a Mac.
    """

    inventory: Path
    hosts: list[str]
    limited: bool
    elsewhere: Collection[str]

    def here(self, hosts: Sequence[str]) -> list[str]:
        """Those of these hosts whose data names no Mac."""
        return [host for host in hosts if host not in self.elsewhere]

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
    every = hosts_of(inventory)
    chosen = Chosen(inventory, every, False, inventory_files.setting(inventory, SSH_KEY))
    if args.limit is None:
        return chosen
    prepare(chosen.here(every))
    found = inventory_files.limited(inventory_files.read(inventory), inventory, args.limit)
    return chosen._replace(hosts=found, limited=True)


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


def local_states(hosts: Sequence[str], elsewhere: Collection[str] = ()) -> dict[str, str]:
    """States of hosts, with patterns resolved; "missing" if it does not exist.

    Servers count as "running", and so does a name that means nothing here: pyinfra will report it.

    Args:
        hosts: Their names.
        elsewhere: Those whose data names a Mac. They count as "missing": connecting finds out.
    """
    machines: list[orbctl.Machine] = []
    containers: list[docker.Container] = []
    listed = [host for host in hosts if host not in elsewhere]
    if any(map(is_machine, listed)):
        use_orbctl()
        machines = orbctl.Orbctl().machines()
    if any(map(is_container, listed)):
        containers = docker.Docker().containers()
    states: dict[str, str] = {}
    for host in hosts:
        named = parse(host)
        if named is None or host in elsewhere:
            states[host] = "running" if named is None else "missing"
            continue
        known = {one.name: one.state for one in (containers if named.container else machines)}
        if named.name and not named.is_pattern:
            if named.container and named.name not in known:
                # By the beginning of its id; pyinfra calls it by its name.
                ids = [one.name for one in containers if one.id.startswith(named.name)]
                named = named._replace(name=ids[0]) if len(ids) == 1 else named
            states[named.called] = known.get(named.name, "missing")
            continue
        # A machine pattern includes stopped machines.
        every = named.name and not named.container
        found = {
            named._replace(name=name).called: state
            for name, state in known.items()
            if fnmatchcase(name, named.name or "*") and (every or state == "running")
        }
        states.update(found or {host: "running"})
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
        name = host[len(MACHINES) :] if host.startswith(MACHINES) else host
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
    place = place_of()
    if args.inventory is not None:
        place = place_in(find_inventory(args.inventory), args.machine)
    if args.machine.startswith("docker/"):
        engine = docker.Docker(place)
        name = args.machine.partition("/")[2]
        try:
            container = engine.inspect(name)
        except docker.ContainerNotFound:
            known = ", ".join(f"docker/{one.name}" for one in engine.containers())
            advice = f"set M to one of: {known}" if known else "start one"
            raise CommandError(f"there is no container {name!r}: {advice}") from None
        tty = sys.stdin.isatty()
        words = docker.exec_args(container.id, login, tty=tty)
        return call(engine.argv(words, tty=tty), engine.environment())
    if not place.far:
        use_orbctl()
    client = orbctl.Orbctl(place=place)
    names = [machine.name for machine in client.machines()]
    if args.machine not in names:
        advice = f"set M to one of: {', '.join(names)}" if names else "create it with `make deploy`"
        raise CommandError(f"there is no machine {args.machine!r}: {advice}")
    words = orbctl.run_args(args.machine, login)
    return call(client.argv(words, tty=sys.stdin.isatty()), client.environment())


def place_in(inventory: Path, target: str) -> Place:
    """Where an inventory says that a machine, or a container `docker/NAME`, is."""
    for host, mac in inventory_files.setting(inventory, SSH_KEY).items():
        named = parse(host)
        if named and f"{'docker/' if named.container else ''}{named.name}" == target:
            return place_of(mac)
    return place_of()


def destroy(args: argparse.Namespace) -> int:
    """Delete the machines that this project created, of one inventory or all, after asking."""
    inventory = None if args.inventory is None else find_inventory(args.inventory)
    wanted = machines_of(inventory) if inventory else None
    if wanted == []:
        raise CommandError(f"{inventory} contains no local machines: there is nothing to delete")
    record = orbctl.Record(RECORD)
    clients = clients_of(record)
    asked = list(map(machines_place, clients))
    found: list[tuple[orbctl.Orbctl, list[orbctl.Machine]]] = []
    status = 0
    for client in clients:
        names_here = {name for name, place in wanted or () if place is client.place}
        if wanted and not names_here:
            continue  # a Mac that this inventory does not need may be asleep
        try:
            for line in record.settle(client, asked=asked):
                print(line, file=sys.stderr)
            recorded, machines = record.names(), record.existing(client)
        except RecordError:
            raise
        except orbctl.OrbctlError as silent:
            if not client.place.far:
                raise
            # It may be gone for good.
            print(
                f"{silent}; nothing was deleted on {client.place.name}: if that Mac no longer "
                f"exists, remove from {RECORD}: {', '.join(record.lines_of(client))}",
                file=sys.stderr,
            )
            status = 1
            continue
        if wanted:
            tell_forgotten([one.name for one in machines if recorded[one.id] not in names_here])
            machines = [one for one in machines if recorded[one.id] in names_here]
        found.append((client, machines))
    names = [
        f"{one.name} on {client.place.name}" if client.place.far else one.name
        for client, machines in found
        for one in machines
    ]
    if not names:
        if not status:
            where = f"{inventory} contains no machine" if inventory else "there is no machine"
            print(f"{where} that this project created")
        return status
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
    deleted: list[str] = []
    problems: list[str] = []
    for client, machines in found:
        gone, failed = record.delete(machines, client)
        deleted += gone
        problems += failed
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"deleted: {', '.join(deleted) or 'nothing'}")
    return 1 if problems else status


def clients_of(record: orbctl.Record) -> list[orbctl.Orbctl]:
    """The `orbctl` of each place where machines were created or begun, this host first."""
    far, here = record.places()
    found = []
    if here:
        use_orbctl()
        found.append(orbctl.Orbctl(place=HERE))
    clients = [orbctl.Orbctl(place=place_of(destination)) for destination in far]
    return found + clients


def machines_of(inventory: Path) -> list[tuple[str, Place]]:
    """Names and places of the machines that a deploy of an inventory creates."""
    macs = inventory_files.setting(inventory, SSH_KEY)
    named = ((parse(host), macs.get(host)) for host in inventory_hosts(inventory))
    # Machines that match a pattern, or the bare name, were not created by the deploy.
    return [
        (host.name, place_of(mac))
        for host, mac in named
        if host and host.name and not (host.container or host.is_pattern)
    ]


def tell_forgotten(names: Sequence[str]) -> None:
    """List the machines created here that no inventory names."""
    known: list[str] = []
    try:
        for inventory in Path("inventories").glob(FILES):
            known += [name for name, _ in machines_of(inventory)]
    except CommandError:
        return
    forgotten = sorted(set(names) - set(known))
    if forgotten:
        print(f"also created here, but no longer in any inventory: {', '.join(forgotten)}")
        command = Path(sys.executable).with_name(COMMAND)
        print(f"(to delete all machines created here: {command} destroy)")


def use_orbctl() -> None:
    """Choose `orbctl` for this process and its children, and say so if it is not OrbStack."""
    if place_of().far:
        return
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
    verb = add_verb(verbs, shell)
    verb.add_argument("machine", help=machine)
    verb.add_argument("inventory", nargs="?", help=f"{inventory}; it may name a Mac for the host")
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
