"""Section M of the behaviour catalogue: each operation, applied for real."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gevent
import pytest

from pyinfra_orbstack.operations import orbstack, vm
from pyinfra_orbstack.orbctl import MachineNotFound, Orbctl

from ..conftest import Machines
from .conftest import Applied, Applier, read_calls

OPERATIONS = "pyinfra_orbstack.operations"


class World:
    """What a case may use: machines to begin with, and a look at what has become of them."""

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
        """A machine that any case may use in turn, in this state."""
        if not self._spare:
            self._spare = self.clone(running=False)
        if state == "running":
            self.client.start(self._spare)
        else:
            self.client.stop(self._spare)
        return self._spare

    def exported(self) -> str:
        path = self.folder / "given.tar.zst"
        if not path.exists():
            self.client.call("export", self.base, str(path))
        return str(path)

    def state(self, name: str) -> str:
        try:
            return self.client.info(name).state
        except MachineNotFound:
            return "absent"

    def config(self, key: str) -> str:
        return self.client.call("config", "get", key).stdout.decode().strip()


@dataclass(frozen=True)
class Case:
    """One operation from one state: its arguments, and how the result is seen."""

    operation: Callable[..., Any]
    begin: Callable[[World], dict[str, Any]]
    holds: Callable[[World, dict[str, Any]], bool]
    #: The commands that it may call to change something.
    calls: set[str] = field(default_factory=set)
    idempotent: bool = True
    #: Calls at which it is killed, to be completed by the next run.
    interrupt: tuple[str, ...] = ()


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
    ),
    "stopped-force": Case(
        orbstack.stopped,
        lambda world: {"machine": world.spare("running"), "force": True},
        _state("stopped"),
        {"stop"},
    ),
    "restarted": Case(
        orbstack.restarted,
        lambda world: {"machine": world.spare("running")},
        _state("running"),
        {"restart", "run"},
        idempotent=False,
    ),
    "restarted-stopped": Case(
        orbstack.restarted,
        lambda world: {"machine": world.spare("stopped")},
        _state("running"),
        {"start", "run"},
        idempotent=False,
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
    ),
    "config-switch": Case(
        orbstack.config,
        lambda world: {"key": "rosetta", "value": world.config("rosetta") != "true"},
        lambda world, args: world.config("rosetta") == str(args["value"]).lower(),
        {"config"},
    ),
    "default_machine": Case(
        orbstack.default_machine,
        lambda world: {"machine": world.spare("stopped")},
        lambda world, args: world.client.call("default").stdout.decode().strip() == args["machine"],
        {"default"},
    ),
    "machine_user": Case(
        orbstack.machine_user,
        lambda world: {"machine": world.spare("stopped"), "user": "root"},
        lambda world, args: world.client.info(args["machine"]).username == "root",
        {"config"},
    ),
    "vm_create": Case(
        vm.vm_create,
        lambda world: {"machine": world.machines.new_name(), "image": "ubuntu", "user": "alice"},
        _state("running"),
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
        vm.vm_stop, lambda world: {"machine": world.spare("running")}, _state("stopped"), {"stop"}
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
        lambda world: {"vm_name": world.spare("stopped"), "username": "daemon"},
        lambda world, args: world.client.info(args["vm_name"]).username == "daemon",
        {"config"},
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
    """A case told to its end: planned, applied, and applied again."""

    case: Case
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
def story(request: pytest.FixtureRequest, world: World, apply_session: Applier) -> Story:
    case = CASES[request.param]
    args = case.begin(world)

    def holds() -> bool:
        try:
            return case.holds(world, args)
        except (MachineNotFound, FileNotFoundError):
            return False

    planned = apply_session(case.operation, dry=True, **args)
    held = holds()
    first = apply_session(case.operation, **args)
    held_then = holds()
    return Story(case, planned, held, first, held_then, apply_session(case.operation, **args))


def test_M1_first_run_changed(story: Story) -> None:
    assert story.first.error == ""
    assert story.first.changed
    assert {words[0] for words in story.first.changing} == story.case.calls


def test_M2_second_run_no_change(story: Story) -> None:
    assert story.second.error == ""
    if not story.case.idempotent:
        pytest.skip("it restarts by its meaning; pyinfra shows its notice")
    assert not story.second.changed
    assert story.second.changing == []


def test_M3_dry_run_says_why_and_changes_nothing(story: Story) -> None:
    assert story.planned.error == ""
    assert story.planned.will_change
    assert story.planned.changing == []
    assert "[@local]" in story.planned.log.replace("\x1b[1m", "")
    assert any(
        word in story.planned.log
        for word in ("create", "delete", "start", "stop", "not", "shall", "copy", "export")
    )
    if story.case.idempotent:
        assert not story.held_after_plan


def test_M4_real_state_equals_desired(story: Story) -> None:
    assert story.holds


def _kill_at(at: str, log: Path) -> None:
    """Kill the shell that calls `orbctl`, and with it what it calls, as a crash would."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for line in log.read_text().splitlines() if log.exists() else ():
            call = json.loads(line)
            if at in " ".join(call["argv"]) and call["exit"] is None:
                status = Path(f"/proc/{call['pid']}/status").read_text()
                parent = next(row for row in status.splitlines() if row.startswith("PPid"))
                os.kill(int(parent.split()[1]), signal.SIGKILL)
                os.kill(call["pid"], signal.SIGKILL)
                return
        gevent.sleep(0.02)


@pytest.mark.parametrize(
    ("name", "at"), [(name, at) for name, case in CASES.items() for at in case.interrupt]
)
def test_M5_interrupted_run_is_completed_by_the_next(
    name: str,
    at: str,
    world: World,
    apply: Applier,
    faults: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = CASES[name]
    args = case.begin(world)
    if name == "exported":
        args["path"] = str(tmp_path / "interrupted.tar.zst")
    with monkeypatch.context() as patch:
        patch.setenv("ORBCTL_SIMULATOR_FAULTS", json.dumps([{"match": at, "hang": True}]))
        killer = gevent.spawn(_kill_at, at, apply.log)
        assert apply(case.operation, **args).error
        killer.get(timeout=5)
    again = apply(case.operation, **args)
    assert again.error == ""
    assert case.holds(world, args)
    if case.idempotent:
        assert not apply(case.operation, dry=True, **args).will_change


def test_M5_killed_pyinfra_is_completed_by_the_next(
    world: World, apply: Applier, tmp_path: Path
) -> None:
    """The whole run, killed at no chosen moment, several times."""
    name = world.machines.new_name()
    argv = [sys.executable, "-m", "pyinfra", "-y", "@local"]
    argv += [f"{OPERATIONS}.orbstack.machine", f"machine={name}", "image=ubuntu"]
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


# Differences ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def isolated(machines: Machines) -> str:
    """A machine with a property of each kind; no test changes it."""
    return machines.create(
        "debian:bookworm", user="alice", isolated=True, mounts=["/opt:/opt", "/srv"]
    )


DIFFERENCES: dict[str, tuple[dict[str, Any], str]] = {
    "distro": ({"image": "ubuntu"}, "image is debian:bookworm, not ubuntu"),
    "version": ({"image": "debian:13"}, "image is debian:bookworm, not debian:13"),
    "arch": ({"arch": "arm64"}, "arch is amd64, not arm64"),
    "user": ({"user": "bob"}, "user is alice, not bob"),
    "isolated": ({"isolated": False}, "isolated is True, not False"),
    "network": (
        {"isolated": True, "isolate_network": True},
        "isolate_network is False, not True",
    ),
    "mount": ({"isolated": True, "mounts": ["/opt:/opt"]}, "mounts is /opt:/opt,/srv, not"),
    "no-mount": ({"mounts": []}, "mounts is /opt:/opt,/srv, not []"),
}


@pytest.mark.parametrize(("wanted", "told"), DIFFERENCES.values(), ids=DIFFERENCES)
def test_M6_difference_fails_and_is_named(
    wanted: dict[str, Any], told: str, isolated: str, apply: Applier, client: Orbctl
) -> None:
    before = client.info(isolated)
    done = apply(orbstack.machine, machine=isolated, **{"image": "debian", **wanted})
    assert told in done.error
    assert "recreate=True" in done.error
    assert "\n" not in done.error
    assert done.changing == []
    assert client.info(isolated) == before


@pytest.mark.parametrize("what", ["version", "arch", "user", "no-mount"])
def test_M6_recreate_makes_a_new_machine(
    what: str, machines: Machines, apply: Applier, client: Orbctl
) -> None:
    name = machines.create(
        "debian:bookworm", user="alice", isolated=True, mounts=["/opt:/opt", "/srv"]
    )
    old = client.info(name)
    args = {"machine": name, "image": "debian", **DIFFERENCES[what][0]}
    done = apply(orbstack.machine, recreate=True, wait=False, **args)
    assert done.error == ""
    assert [words[0] for words in done.changing] == ["delete", "create"]
    assert client.info(name).id != old.id
    assert not apply(orbstack.machine, recreate=True, **args).changed


def test_M6_several_differences_are_named_at_once(isolated: str, apply: Applier) -> None:
    done = apply(orbstack.machine, machine=isolated, image="ubuntu", user="bob", isolated=False)
    for told in ("image is", "user is", "isolated is"):
        assert told in done.error


@pytest.mark.parametrize(
    ("machine_image", "image"),
    [
        ("ubuntu:noble", "ubuntu"),
        ("ubuntu:noble", "ubuntu:24.04"),
        ("ubuntu:noble", "ubuntu:noble"),
    ],
)
def test_M7_other_words_for_an_image_are_no_difference(
    machine_image: str, image: str, base: str, apply: Applier
) -> None:
    done = apply(orbstack.machine, machine=base, image=image)
    assert not done.changed
    assert done.error == ""


@pytest.mark.parametrize("image", ["ubuntu:26.10", "ubuntu:plucky"])
def test_M7_unknown_version_is_a_warning_and_never_a_new_machine(
    image: str, base: str, apply: Applier
) -> None:
    done = apply(orbstack.machine, machine=base, image=image, recreate=True)
    assert not done.changed
    assert done.error == ""
    assert f"image should be {image}" in done.log


def test_M8_limit_of_zero_is_no_limit(clone: str, apply: Applier, client: Orbctl) -> None:
    none = {"machine": clone, "cpus": 0, "memory": "0G", "disk": 0}
    assert not apply(orbstack.machine, **none).changed
    apply(orbstack.machine, machine=clone, cpus=1, memory=512)
    lifted = apply(orbstack.machine, **none)
    assert lifted.changed
    assert client.call("config", "get", f"machine.{clone}.cpu").stdout == b"0\n"
    assert not apply(orbstack.machine, **none).changed


def test_M9_limits_restart_a_running_machine_only(
    machines: Machines, base: str, apply: Applier, client: Orbctl
) -> None:
    name = machines.new_name()
    client.clone(base, name)
    before = machines.own(name)
    stopped = apply(orbstack.machine, machine=name, cpus=2, running=False)
    assert [words[0] for words in stopped.changing] == ["config"]
    assert client.info(name).state == "stopped"
    client.start(name)
    running = apply(orbstack.machine, machine=name, cpus=3, wait=False)
    assert [words[0] for words in running.changing] == ["stop", "config", "start"]
    assert client.info(name).running
    assert client.info(name).id == before.id


def test_M9_refused_value_leaves_the_machine_running(
    clone: str, apply: Applier, client: Orbctl, faults: Callable[..., None]
) -> None:
    faults(match="config set", exit=1, stderr="[-32098] not today")
    done = apply(orbstack.machine, machine=clone, cpus=2)
    assert "not today" in done.error
    assert client.info(clone).running


def test_M10_rename_keeps_the_id(clone: str, machines: Machines, apply: Applier) -> None:
    before, to = machines.client.info(clone), machines.new_name()
    apply(orbstack.renamed, machine=clone, to=to)
    assert machines.own(to).id == before.id


@pytest.mark.parametrize("others", [0, 1])
def test_M10_rename_refuses_a_name_in_use(
    others: int, clone: str, base: str, apply: Applier, machines: Machines
) -> None:
    taken = apply(orbstack.renamed, machine=clone, to=base)
    assert f"there is a machine {base} already" in taken.error
    missing = apply(orbstack.renamed, machine=machines.new_name(), to=machines.new_name())
    assert "there is no machine" in missing.error
    assert taken.changing == missing.changing == []


def test_M11_deleting_an_absent_machine_changes_nothing(machines: Machines, apply: Applier) -> None:
    done = apply(orbstack.machine, machine=machines.new_name(), present=False)
    assert (done.changed, done.error, done.changing) == (False, "", [])


def test_M11_only_the_machine_that_was_looked_at_is_deleted(
    machines: Machines, base: str, apply: Applier, client: Orbctl
) -> None:
    """Another machine takes its name between the look and the deletion."""
    name = machines.new_name()
    client.clone(base, name)
    old = machines.own(name)
    commands: list[Any] = []

    def look() -> None:
        commands.extend(orbstack.machine._inner(name, present=False))

    apply.all(look, dry=True)
    assert client.delete(name, old.id)
    client.clone(base, name)
    other = machines.own(name)
    ran = subprocess.run(
        ["sh", "-c", commands[0].get_raw_value()], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 1
    assert "another machine now" in ran.stderr
    assert client.info(name).id == other.id


# Cloud-init -------------------------------------------------------------------------------------

# The simulator has no cloud-init: this takes its file, as OrbStack would, and goes on without.
_WRAPPER = """#!/bin/sh
if [ "$1" = create ] && [ "$2" = --user-data ]; then
  stat -c %a "$3" >"$SEEN.mode"; cp "$3" "$SEEN"; echo "$3" >"$SEEN.path"
  shift 3; set -- create "$@"
fi
exec "$SIMULATOR" "$@"
"""


@dataclass
class CloudInit:
    """A cloud-init file, and what `orbctl` has seen of it."""

    path: Path
    seen: Path

    def left(self) -> list[str]:
        return [one.name for one in _digests().glob("new.*")] if _digests().exists() else []


def _digests() -> Path:
    return Path(os.environ["XDG_STATE_HOME"]) / "pyinfra-orbstack" / "cloud-init"


@pytest.fixture
def cloud_init(tmp_path: Path, client: Orbctl, monkeypatch: pytest.MonkeyPatch) -> CloudInit:
    wrapper = tmp_path / "orb ctl"
    wrapper.write_text(_WRAPPER)
    wrapper.chmod(0o755)
    monkeypatch.setenv("SIMULATOR", client.command)
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    monkeypatch.setenv("PYINFRA_ORBSTACK_ORBCTL", str(wrapper))
    path = tmp_path / "cloud init.yaml"
    path.write_text("#cloud-config\npassword: $(hunter2) '\"\n")
    return CloudInit(path, tmp_path / "seen")


def test_M13_changed_cloud_init_is_a_difference(
    cloud_init: CloudInit, machines: Machines, apply: Applier, client: Orbctl
) -> None:
    name = machines.new_name()
    args = {"machine": name, "image": "ubuntu", "cloud_init": str(cloud_init.path)}
    assert apply(orbstack.machine, dry=True, **args).changing == []
    assert apply(orbstack.machine, **args).error == ""
    assert cloud_init.seen.read_bytes() == cloud_init.path.read_bytes()
    machine = client.info(name)
    assert (_digests() / machine.id).read_text().strip()
    assert not apply(orbstack.machine, **args).changed

    cloud_init.path.write_text("#cloud-config\npackages: [curl]\n")
    changed = apply(orbstack.machine, **args)
    assert "SHA-256 of cloud_init is" in changed.error
    assert changed.changing == []
    assert apply(orbstack.machine, recreate=True, **args).error == ""
    assert client.info(name).id != machine.id
    assert not (_digests() / machine.id).exists()
    assert not apply(orbstack.machine, **args).changed


def test_M13_machine_made_without_a_record_is_a_warning(
    cloud_init: CloudInit, base: str, apply: Applier
) -> None:
    done = apply(orbstack.machine, machine=base, cloud_init=str(cloud_init.path), recreate=True)
    assert not done.changed
    assert "cloud_init should be" in done.log


def test_S6_cloud_init_file_is_private_and_removed(
    cloud_init: CloudInit, machines: Machines, apply: Applier
) -> None:
    args = {"image": "ubuntu", "cloud_init": str(cloud_init.path)}
    done = apply(orbstack.machine, machine=machines.new_name(), **args)
    assert Path(f"{cloud_init.seen}.mode").read_text() == "600\n"
    assert not Path(Path(f"{cloud_init.seen}.path").read_text().strip()).exists()
    assert cloud_init.left() == []
    assert "hunter2" not in done.log + str(done.calls)


def test_S6_cloud_init_file_is_removed_after_a_failure(
    cloud_init: CloudInit, machines: Machines, apply: Applier, faults: Callable[..., None]
) -> None:
    faults(match="create", exit=1, stderr="[-32098] no")
    args = {"image": "ubuntu", "cloud_init": str(cloud_init.path)}
    assert apply(orbstack.machine, machine=machines.new_name(), **args).error
    assert cloud_init.left() == []


def test_S6_cloud_init_file_is_removed_when_pyinfra_is_killed(
    cloud_init: CloudInit, machines: Machines, apply: Applier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in a terminal reaches the shell, too; a killed pyinfra leaves it to end by itself."""
    monkeypatch.setenv("ORBCTL_SIMULATOR_FAULTS", '{"match": "create", "hang": true}')
    apply.log.unlink(missing_ok=True)
    child = subprocess.Popen(
        [sys.executable, "-m", "pyinfra", "-y", "@local", f"{OPERATIONS}.orbstack.machine"]
        + [f"machine={machines.new_name()}", "image=ubuntu", f"cloud_init={cloud_init.path}"],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 20
    while not any(words[0] == "create" for words in read_calls(apply.log)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert cloud_init.left()
    os.killpg(child.pid, signal.SIGINT)
    child.wait(10)
    while cloud_init.left() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert cloud_init.left() == []


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe"], ids=["missing", "empty", "binary"])
def test_M13_cloud_init_is_checked_before_anything(
    content: bytes | None, machines: Machines, apply: Applier, tmp_path: Path
) -> None:
    path = tmp_path / "init.yaml"
    if content is not None:
        path.write_bytes(content)
    done = apply(
        orbstack.machine, machine=machines.new_name(), image="ubuntu", cloud_init=str(path)
    )
    assert done.error.startswith("cloud_init")
    assert done.calls == []


# Versions ---------------------------------------------------------------------------------------

GATED: dict[str, tuple[str, dict[str, Any], str]] = {
    "isolated": ("2.0", {"isolated": True}, "isolated: OrbStack 2.1 is needed"),
    "mounts": (
        "2.0",
        {"isolated": True, "mounts": ["/opt"]},
        "isolated, mounts: OrbStack 2.1 is needed, and this is 2.0.5",
    ),
    "agent": ("2.0", {"forward_ssh_agent": True}, "forward_ssh_agent: OrbStack 2.1 is needed"),
    "limits": (
        "2.1",
        {"cpus": 1, "memory": "1G", "disk": "9G"},
        "cpus, memory, disk: OrbStack 2.2 is needed, and this is 2.1.1",
    ),
}


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
@pytest.mark.parametrize(("profile", "wanted", "told"), GATED.values(), ids=GATED)
def test_M14_too_old_an_orbstack_gives_one_line(
    profile: str,
    wanted: dict[str, Any],
    told: str,
    existing: bool,
    base: str,
    machines: Machines,
    apply: Applier,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ORBCTL_SIMULATOR_PROFILE", profile)
    name = base if existing else machines.new_name()
    done = apply(orbstack.machine, machine=name, image="ubuntu:noble", **wanted)
    assert done.error.startswith(told)
    assert "\n" not in done.error
    assert done.changing == []


def test_M14_what_old_versions_lack_can_be_wanted_off(
    base: str, apply: Applier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORBCTL_SIMULATOR_PROFILE", "2.0")
    off = {"isolated": False, "isolate_network": False, "mounts": [], "cpus": 0, "memory": 0}
    done = apply(orbstack.machine, machine=base, image="ubuntu", **off)
    assert (done.error, done.changed) == ("", False)
    assert "cannot be compared" not in done.log


# Copies -----------------------------------------------------------------------------------------


def test_M15_running_source_runs_on_and_its_copy_is_stopped(
    base: str, machines: Machines, apply: Applier, client: Orbctl
) -> None:
    name = machines.new_name()
    apply(orbstack.cloned, source=base, machine=name)
    assert client.info(base).running
    assert client.info(name).state == "stopped"
    assert (
        "there is no machine"
        in apply(orbstack.cloned, source=machines.new_name(), machine=machines.new_name()).error
    )


@pytest.mark.parametrize("state", ["running", "stopped"])
def test_M16_export_leaves_the_state_as_found(
    state: str, clone: str, apply: Applier, client: Orbctl, tmp_path: Path
) -> None:
    if state == "stopped":
        client.stop(clone)
    path = tmp_path / "one.tar.zst"
    assert apply(orbstack.exported, machine=clone, path=str(path)).error == ""
    assert client.info(clone).state == state


def test_S8_failed_export_leaves_no_file(
    base: str, apply: Applier, tmp_path: Path, faults: Callable[..., None]
) -> None:
    faults(match="export", exit=1, stderr="[-32098] disk full")
    done = apply(orbstack.exported, machine=base, path=str(tmp_path / "one.tar.zst"))
    assert "disk full" in done.error
    assert list(tmp_path.iterdir()) == []


def test_S8_existing_file_and_folder_are_kept(base: str, apply: Applier, tmp_path: Path) -> None:
    path = tmp_path / "one.tar.zst"
    path.write_text("mine")
    assert not apply(orbstack.exported, machine=base, path=str(path)).changed
    assert path.read_text() == "mine"
    assert "is a folder" in apply(orbstack.exported, machine=base, path=str(tmp_path)).error


def test_M18_what_operations_make_is_written_down(
    base: str, machines: Machines, apply: Applier, tmp_path: Path
) -> None:
    made = [machines.new_name() for _ in range(3)]
    archive = str(tmp_path / "one.tar.zst")
    apply(orbstack.machine, machine=made[0], image="ubuntu")
    apply(orbstack.cloned, source=base, machine=made[1])
    apply(orbstack.exported, machine=base, path=archive)
    apply(orbstack.imported, path=archive, machine=made[2])
    recorded = machines.record.machines()
    assert [recorded[name] for name in made] == [machines.client.info(name).id for name in made]
