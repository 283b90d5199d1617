"""Section M of the catalogue: each operation, applied to real machines."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gevent
import pytest

from pyinfra_orbstack import programs
from pyinfra_orbstack.operations import orbstack, vm
from pyinfra_orbstack.orbctl import MachineNotFound

from ..conftest import Machines
from .conftest import Applied, Applier, kill_at

OPERATIONS = "pyinfra_orbstack.operations"


class World:
    """The world of a case: its machines, and how to inspect them."""

    def __init__(self, machines: Machines, base: str, folder: Path) -> None:
        self.machines, self.client, self.base, self.folder = machines, machines.client, base, folder
        self.kept: dict[str, str] = {}
        self._spare = ""

    def clone(self, running: bool = True) -> str:
        name = self.machines.new_name()
        self.client.clone(self.base, name)
        self.kept[name] = self.machines.own(name).id
        if running:
            self.client.start(name)
        return name

    def spare(self, state: str) -> str:
        """A shared machine in this state."""
        if not self._spare:
            self._spare = self.clone(running=False)
        if state == "running":
            self.client.start(self._spare)
        else:
            self.client.stop(self._spare)
        return self._spare

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """Delete what a case created, because many operations query every machine."""
        made = self.machines.made
        yield
        for machine in self.client.machines():
            # Our names end in an increasing number.
            number = self.machines.number(machine.name)
            if number > made and machine.name != self._spare:
                self.client.call("delete", "--force", machine.name)

    def exported(self) -> str:
        path = self.folder / "given.tar.zst"
        if not path.exists():
            self.client.call("export", self.base, str(path))
        return str(path)

    def other_user(self, name: str) -> str:
        """A user that every machine has, and that is not this one's default user."""
        return "daemon" if self.client.info(name).username == "root" else "root"

    def not_default(self) -> str:
        """A machine that is not the default machine."""
        self.client.call("default", self.base)
        return self.spare("stopped")

    def default(self) -> str:
        return self.client.call("default").stdout.decode().strip()

    def state(self, name: str) -> str:
        try:
            return self.client.info(name).state
        except MachineNotFound:
            return "absent"

    def config(self, key: str) -> str:
        return self.client.call("config", "get", key).stdout.decode().strip()


@dataclass(frozen=True)
class Case:
    """One operation from one state: its arguments, and how to check the result."""

    operation: Callable[..., Any]
    begin: Callable[[World], dict[str, Any]]
    holds: Callable[[World, dict[str, Any]], bool]
    #: The commands that it may call to make changes.
    calls: set[str] = field(default_factory=set)
    idempotent: bool = True
    #: Calls at which it is killed; the next run must complete it.
    interrupt: tuple[str, ...] = ()

    def apply(self, apply: Applier, args: dict[str, Any], dry: bool = False) -> Applied:
        # Before 1.0, arguments could only be passed by position.
        if self.operation in vars(vm).values():
            return apply(self.operation, *args.values(), dry=dry)
        return apply(self.operation, dry=dry, **args)


def _state(state: str) -> Callable[[World, dict[str, Any]], bool]:
    return lambda world, args: world.state(args["machine"]) == state


def _limits(world: World, args: dict[str, Any]) -> bool:
    key = f"machine.{args['machine']}."
    return (
        world.config(key + "cpu") == "2"
        and world.config(key + "memory_mib") == "1024"
        and world.config(key + "disk_bytes") == str(8 << 30)
        and world.config(key + "forward_ssh_agent") == "false"
        and world.state(args["machine"]) == "running"
    )


def _user(state: str) -> Callable[[World, dict[str, Any]], bool]:
    def holds(world: World, args: dict[str, Any]) -> bool:
        machine = world.client.info(args["machine"])
        # As the default user of `run`.
        said = (
            world.client.call("run", "-m", machine.name, "-w", "/", "id", "-un")
            if (machine.running)
            else None
        )
        return (machine.username, machine.state) == (args["user"], state) and (
            said is None or said.stdout.decode().strip() == args["user"]
        )

    return holds


def _is_private_and_whole(world: World, args: dict[str, Any]) -> bool:
    path = Path(args["path"])
    left = [one.name for one in path.parent.iterdir() if one.name.endswith(".partial")]
    mode = path.stat().st_mode & 0o777
    return mode == 0o600 and path.read_bytes()[:4] == b"\x28\xb5\x2f\xfd" and not left


def _isolated(world: World, args: dict[str, Any]) -> bool:
    machine = world.client.info(args["machine"])
    config = machine.record["config"]
    return (
        machine.running
        and machine.isolated is True
        and config["isolate_network"] is True
        and config["forward_ssh_agent"] is True
        and machine.username == "alice"
        and (machine.distro, machine.version, machine.arch) == ("debian", "bookworm", "amd64")
        and world.config(f"machine.{machine.name}.mounts") == f"{world.folder}:/srv"
    )


def _renamed(world: World, args: dict[str, Any]) -> bool:
    if world.state(args["machine"]) != "absent":
        return False
    return world.machines.own(args["to"]).id == world.kept[args["machine"]]


CASES = {
    "machine-present": Case(
        orbstack.machine,
        lambda world: {"machine": world.machines.new_name(), "image": "ubuntu:24.04"},
        _state("running"),
        {"create", "run"},
        interrupt=("create", "run"),
    ),
    "machine-described": Case(
        orbstack.machine,
        lambda world: {
            "machine": world.machines.new_name(),
            "image": "debian",
            "user": "alice",
            "arch": "amd64",
            "isolated": True,
            "isolate_network": True,
            "mounts": [f"{world.folder}:/srv"],
            "forward_ssh_agent": True,
            "cpus": 1.5,
            "memory": "1G",
            "disk": "4G",
        },
        _isolated,
        {"create", "run"},
        interrupt=("create",),
    ),
    "machine-stopped": Case(
        orbstack.machine,
        lambda world: {
            "machine": world.machines.new_name(),
            "image": "ubuntu",
            "running": False,
            "forward_ssh_agent": False,
        },
        lambda world, args: (
            world.state(args["machine"]) == "stopped"
            and world.config(f"machine.{args['machine']}.forward_ssh_agent") == "false"
        ),
        {"create", "stop", "config"},
        interrupt=("config set",),
    ),
    "machine-user": Case(
        orbstack.machine,
        lambda world: {"machine": world.clone(), "image": "ubuntu", "user": "daemon"},
        _user("running"),
        {"run", "config"},
        interrupt=("run", "config set"),
    ),
    "machine-user-stopped": Case(
        orbstack.machine,
        lambda world: {"machine": world.clone(running=False), "user": "root", "running": False},
        _user("stopped"),
        {"start", "run", "config", "stop"},
        interrupt=("start", "config set", "stop"),
    ),
    "machine-user-started": Case(
        orbstack.machine,
        lambda world: {"machine": world.clone(running=False), "user": "root", "cpus": 1},
        _user("running"),
        {"start", "run", "config", "stop"},
        interrupt=("config set",),
    ),
    "machine-limits": Case(
        orbstack.machine,
        lambda world: {
            "machine": world.clone(),
            "cpus": 2,
            "memory": "1G",
            "disk": "8G",
            "forward_ssh_agent": False,
        },
        _limits,
        {"stop", "config", "start", "run"},
        interrupt=("config set", "start"),
    ),
    "machine-absent": Case(
        orbstack.machine,
        lambda world: {"machine": world.clone(), "present": False},
        _state("absent"),
        {"delete"},
        interrupt=("delete",),
    ),
    "machine-recreated": Case(
        orbstack.machine,
        lambda world: {"machine": world.clone(), "image": "debian:12", "recreate": True},
        lambda world, args: (
            world.client.info(args["machine"]).version == "bookworm"
            and world.client.info(args["machine"]).id != world.kept[args["machine"]]
        ),
        {"delete", "create", "run"},
        interrupt=("create",),
    ),
    "started": Case(
        orbstack.started,
        lambda world: {"machine": world.spare("stopped")},
        _state("running"),
        {"start", "run"},
        interrupt=("start",),
    ),
    "stopped": Case(
        orbstack.stopped,
        lambda world: {"machine": world.spare("running")},
        _state("stopped"),
        {"stop"},
        interrupt=("stop",),
    ),
    "stopped-force": Case(
        orbstack.stopped,
        lambda world: {"machine": world.spare("running"), "force": True},
        _state("stopped"),
        {"stop"},
        interrupt=("stop",),
    ),
    "restarted": Case(
        orbstack.restarted,
        lambda world: {"machine": world.spare("running")},
        _state("running"),
        {"restart", "run"},
        idempotent=False,
        interrupt=("restart",),
    ),
    "restarted-stopped": Case(
        orbstack.restarted,
        lambda world: {"machine": world.spare("stopped")},
        _state("running"),
        {"start", "run"},
        idempotent=False,
        interrupt=("start",),
    ),
    "renamed": Case(
        orbstack.renamed,
        lambda world: {"machine": world.clone(), "to": world.machines.new_name()},
        _renamed,
        {"rename"},
        interrupt=("rename",),
    ),
    "cloned": Case(
        orbstack.cloned,
        lambda world: {"source": world.base, "machine": world.machines.new_name()},
        lambda world, args: (
            world.state(args["machine"]) == "stopped" and world.state(world.base) == "running"
        ),
        {"clone"},
        interrupt=("clone",),
    ),
    "exported": Case(
        orbstack.exported,
        lambda world: {"machine": world.base, "path": str(world.folder / "a b;'c.tar.zst")},
        _is_private_and_whole,
        {"export"},
        interrupt=("export",),
    ),
    "imported": Case(
        orbstack.imported,
        lambda world: {"path": world.exported(), "machine": world.machines.new_name()},
        lambda world, args: world.state(args["machine"]) != "absent",
        {"import"},
        interrupt=("import",),
    ),
    "config": Case(
        orbstack.config,
        lambda world: {"key": "docker.node_name", "value": world.machines.new_name()},
        lambda world, args: world.config(args["key"]) == args["value"],
        {"config"},
        interrupt=("config set",),
    ),
    "config-switch": Case(
        orbstack.config,
        lambda world: {"key": "rosetta", "value": world.config("rosetta") != "true"},
        lambda world, args: world.config("rosetta") == str(args["value"]).lower(),
        {"config"},
        interrupt=("config set",),
    ),
    "default_machine": Case(
        orbstack.default_machine,
        lambda world: {"machine": world.not_default()},
        lambda world, args: world.default() == args["machine"],
        {"default"},
        interrupt=("default {machine}",),
    ),
    "default_machine-none": Case(
        orbstack.default_machine,
        lambda world: {"machine": None} if world.not_default() else {},
        lambda world, args: world.default() == "",
        {"default"},
        interrupt=("default none",),
    ),
    "machine_user": Case(
        orbstack.machine_user,
        lambda world: {
            "machine": (name := world.spare("stopped")),
            "user": world.other_user(name),
        },
        _user("stopped"),
        {"start", "run", "config", "stop"},
    ),
    "machine_user-running": Case(
        orbstack.machine_user,
        lambda world: {
            "machine": (name := world.spare("running")),
            "user": world.other_user(name),
        },
        _user("running"),
        {"run", "config"},
        interrupt=("run", "config set"),
    ),
    # The old names call the new operations, whose interruptions are tested above.
    "vm_create": Case(
        vm.vm_create,
        lambda world: {
            "machine": world.machines.new_name(),
            "image": "ubuntu",
            "arch": "amd64",
            "user": "alice",
            "present": True,
        },
        _user("running"),
        {"create", "run"},
    ),
    "vm_clone": Case(
        vm.vm_clone,
        lambda world: {"source_name": world.base, "new_name": world.machines.new_name()},
        lambda world, args: world.state(args["new_name"]) == "stopped",
        {"clone"},
    ),
    "vm_export": Case(
        vm.vm_export,
        lambda world: {"machine": world.base, "output_path": str(world.folder / "old.tar.zst")},
        lambda world, args: _is_private_and_whole(world, {"path": args["output_path"]}),
        {"export"},
    ),
    "vm_import": Case(
        vm.vm_import,
        lambda world: {"input_path": world.exported(), "machine": world.machines.new_name()},
        lambda world, args: world.state(args["machine"]) != "absent",
        {"import"},
    ),
    "vm_rename": Case(
        vm.vm_rename,
        lambda world: {"old_name": world.clone(), "new_name": world.machines.new_name()},
        lambda world, args: _renamed(world, {"machine": args["old_name"], "to": args["new_name"]}),
        {"rename"},
    ),
    "vm_delete": Case(
        vm.vm_delete,
        lambda world: {"machine": world.clone()},
        _state("absent"),
        {"delete"},
    ),
    "vm_start": Case(
        vm.vm_start,
        lambda world: {"machine": world.spare("stopped")},
        _state("running"),
        {"start", "run"},
    ),
    "vm_stop": Case(
        vm.vm_stop,
        lambda world: {"machine": world.spare("running")},
        _state("stopped"),
        {"stop"},
    ),
    "vm_restart": Case(
        vm.vm_restart,
        lambda world: {"machine": world.spare("running")},
        _state("running"),
        {"restart", "run"},
        idempotent=False,
    ),
    "vm_username_set": Case(
        vm.vm_username_set,
        lambda world: {
            "vm_name": (name := world.spare("running")),
            "username": world.other_user(name),
        },
        lambda world, args: (
            world.client.info(args["vm_name"]).username == args["username"]
            and world.state(args["vm_name"]) == "running"
        ),
        {"run", "config"},
    ),
    "orbstack_config_set": Case(
        vm.orbstack_config_set,
        lambda world: {"key": "network_proxy", "value": world.machines.new_name()},
        lambda world, args: world.config(args["key"]) == args["value"],
        {"config"},
    ),
}


@dataclass
class Story:
    """A complete case: planned, applied, and applied again."""

    case: Case
    args: dict[str, Any]
    planned: Applied
    held_after_plan: bool
    first: Applied
    holds: bool
    second: Applied


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def world(machines: Machines, base: str, folder: Path) -> World:
    return World(machines, base, folder)


@pytest.fixture(scope="module", params=CASES)
def story(request: pytest.FixtureRequest, world: World, apply_session: Applier) -> Iterator[Story]:
    with world.passing():
        yield tell(CASES[request.param], world, apply_session)


def tell(case: Case, world: World, apply: Applier) -> Story:
    args = case.begin(world)

    def holds() -> bool:
        try:
            return case.holds(world, args)
        except (MachineNotFound, FileNotFoundError):
            return False

    planned = case.apply(apply, args, dry=True)
    held = holds()
    first = case.apply(apply, args)
    held_then = holds()
    return Story(case, args, planned, held, first, held_then, case.apply(apply, args))


@pytest.mark.smoke
def test_first_run_changed(story: Story) -> None:
    assert story.first.error == ""
    assert story.first.changed
    assert {words[0] for words in story.first.changing} == story.case.calls


@pytest.mark.smoke
def test_second_run(story: Story) -> None:
    assert story.second.error == ""
    # A restart always changes something, and declares that to pyinfra.
    assert story.case.operation.is_idempotent is story.case.idempotent
    assert story.second.changed is not story.case.idempotent
    if story.case.idempotent:
        assert story.second.changing == []


def test_dry_run_says_why_and_changes_nothing(story: Story) -> None:
    assert story.planned.error == ""
    assert story.planned.will_change
    assert story.planned.changing == []
    first = next(iter(story.args.values())) or "none"
    about = str(story.args.get("path") or story.args.get("key") or first)
    reasons = [line for line in story.planned.log.splitlines() if "Connected" not in line]
    assert any(line.startswith("[@local] ") and about in line for line in reasons)
    if story.case.idempotent:
        assert not story.held_after_plan


@pytest.mark.smoke
def test_real_state_equals_desired(story: Story) -> None:
    assert story.holds


@pytest.mark.parametrize(
    ("name", "at"), [(name, at) for name, case in CASES.items() for at in case.interrupt]
)
def test_interrupted_run_is_completed_by_the_next(
    name: str,
    at: str,
    world: World,
    apply: Applier,
    faults: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with world.passing():
        case = CASES[name]
        args = case.begin(world)
        at = at.format(**args)
        for path in {"path", "output_path"} & args.keys():
            if at == "export":
                args[path] = str(tmp_path / "interrupted.tar.zst")
        with monkeypatch.context() as patch:
            patch.setenv("ORBCTL_SIMULATOR_FAULTS", json.dumps([{"match": at, "hang": True}]))
            killer = gevent.spawn(kill_at, at, apply.log)
            assert case.apply(apply, args).error
            killer.get(timeout=5)
        again = case.apply(apply, args)
        assert again.error == ""
        assert case.holds(world, args)
        if case.idempotent:
            assert not case.apply(apply, args, dry=True).will_change


def test_killed_pyinfra_is_completed_by_the_next(
    world: World, apply: Applier, tmp_path: Path
) -> None:
    """The whole run, killed several times at random moments."""
    name = world.machines.new_name()
    argv = programs.pyinfra_argv("-y", "@local", f"{OPERATIONS}.orbstack.machine")
    argv += [f"machine={name}", "image=ubuntu"]
    for seconds in (0.9, 1.0, 1.1):
        child = subprocess.Popen(
            argv, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    assert apply(orbstack.machine, machine=name, image="ubuntu").error == ""
    assert world.machines.own(name).running
    assert not apply(orbstack.machine, machine=name, image="ubuntu").changed


def test_only_a_dry_run_misses_machines_of_earlier_operations(
    world: World, apply: Applier, tmp_path: Path
) -> None:
    first, second, third, last = (world.machines.new_name() for _ in range(4))
    archive = str(tmp_path / "one.tar.zst")

    def deploy() -> Any:
        orbstack.machine(machine=first, image="ubuntu")
        orbstack.machine_user(machine=first, user="root")
        orbstack.default_machine(machine=first)
        orbstack.cloned(source=first, machine=second)
        orbstack.machine(machine=second, cpus=1)
        orbstack.exported(machine=second, path=archive)
        orbstack.imported(path=archive, machine=third)
        orbstack.stopped(machine=first)
        orbstack.renamed(machine=first, to=last)
        return orbstack.renamed(machine=second, to=first)

    planned = apply.all(deploy, dry=True)
    assert (planned.error, planned.will_change, planned.changing) == ("", True, [])
    assert planned.log.count("this operation fails unless an earlier one changes that") == 9
    assert apply.all(deploy).error == ""
    for name in (first, third, last):
        world.machines.own(name)
    assert world.state(second) == "absent"
    assert world.client.info(last).username == "root"
    assert world.config(f"machine.{first}.cpu") == "1"


def test_missing_machine_fails_its_host_when_it_is_still_missing(
    world: World, apply: Applier
) -> None:
    done = apply(orbstack.started, machine=world.machines.new_name())
    assert "there is no machine" in done.error
    assert done.failed_hosts == {"@local"}
    assert done.changing == []
