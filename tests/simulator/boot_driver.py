"""Calls the modules that boot machines, as long as no command of the simulator does."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from orbctl_simulator import booted, layers, stored
from orbctl_simulator.account import Account
from orbctl_simulator.entry import Entry
from orbctl_simulator.runstate import RunState
from orbctl_simulator.state import FILES, Failure, Machine, everything, find, home, new_id, rpc

FLAGS = {"--cpus": "cpu", "--memory": "memory_mib", "--mount": "mounts"}


def _shares(machine: Machine) -> list[str]:
    told = []
    for entry in machine.many("mounts"):
        source, _, target = entry.partition(":")
        owner = os.stat(source)
        told += [source, target or source, str(owner.st_uid), str(owner.st_gid)]
    return told


def _boot(start: booted.Start, machine: Machine, create: bool = False) -> None:
    start.boot([machine.fields["base"]], _shares(machine), create)


def _lay_out(machine: Machine) -> None:
    os.mkdir(machine.path, 0o700)
    machine.save()
    os.mkdir(machine.file(FILES), 0o700)
    stored.give_to_root(machine.file(FILES))
    for name in ("upper", "work", "root"):
        os.mkdir(machine.file(f"{FILES}/{name}"), 0o755)
        stored.give_to_root(machine.file(f"{FILES}/{name}"))


def create(base: str, name: str, *flags: str) -> None:
    fields = dict(zip((FLAGS[flag] for flag in flags[::2]), flags[1::2]))
    path = os.path.join(home(), "machines", new_id())
    fields = {"name": name, "user": "user", "base": base, **fields}
    machine = Machine(path, fields)
    with everything():
        _lay_out(machine)
    try:
        with machine.lock(), booted.Start(machine) as starting:
            _boot(starting, machine, create=True)
            machine.fields["made"] = "yes"
            machine.save()
            starting.commit()
    except Failure as failure:
        shutil.rmtree(path)
        raise rpc(f"create '{name}': {failure}") from None


def clone(source: str, name: str) -> None:
    before = find(source)
    machine = Machine(os.path.join(home(), "machines", new_id()), {**before.fields, "name": name})
    with everything():
        _lay_out(machine)
    with booted.Pause(before):
        layers.fill(machine, before.upper)


def start(name: str) -> None:
    machine = find(name)
    with machine.lock():
        if booted.state(machine) == "stopped":
            try:
                with booted.Start(machine) as starting:
                    _boot(starting, machine)
                    starting.commit()
            except Failure as failure:
                raise rpc(f"start '{name}': {failure}") from None


def stop(*words: str) -> None:
    machine = find(words[-1])
    with machine.lock():
        booted.end(machine, at_once="-f" in words)


def restart(name: str) -> None:
    stop(name)
    start(name)


def delete(name: str) -> None:
    stop("-f", name)
    shutil.rmtree(find(name).path)


def state(name: str) -> None:
    print(booted.state(find(name)))


def life(name: str) -> None:
    life = RunState.read(find(name).file("pid"))
    assert life
    print(life.init, life.supervisor)


def run(*words: str) -> None:
    _, name, *rest = words
    user = "user"
    if rest[0] == "-u":
        user, rest = rest[1], rest[2:]
    life = RunState.read(find(name).file("pid"))
    if life is None or not life.has_init:
        raise rpc(f"machine not running: '{name}'")
    entry = Entry(find(name).id, os.open(f"/proc/{life.init}", os.O_RDONLY))
    entry.enter()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        account = Account(user)
        account.become()
        os.chdir(account.home)
        os.execvpe(rest[0], rest, account.environment())
    for fd in (0, 1, 2):
        os.close(fd)
    status = os.waitpid(pid, 0)[1]
    os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))


def main() -> None:
    Path(home(), "machines").mkdir(parents=True, exist_ok=True)
    try:
        globals()[sys.argv[1]](*sys.argv[2:])
    except Failure as failure:
        print(failure, file=sys.stderr)
        sys.exit(failure.code)


if __name__ == "__main__":
    main()
