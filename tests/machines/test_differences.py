"""Section M of the catalogue: differences, old versions, and leftovers."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gevent
import pytest

from pyinfra_orbstack import orbctl, programs, shelltext
from pyinfra_orbstack.operations import orbstack
from pyinfra_orbstack.orbctl import RECORD_VARIABLE, Orbctl, Record

from ..conformance.conftest import Guest
from ..conftest import Machines
from .conftest import Applier, kill_at, read_calls

OPERATIONS = "pyinfra_orbstack.operations"

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
    "isolated": ({"isolated": False}, "isolated is True, not False"),
    "network": (
        {"isolated": True, "isolate_network": True},
        "isolate_network is False, not True",
    ),
    "mount": ({"isolated": True, "mounts": ["/opt:/opt"]}, "mounts is /opt:/opt,/srv, not"),
    "no-mount": ({"mounts": []}, "mounts is /opt:/opt,/srv, not []"),
}


@pytest.mark.parametrize(("wanted", "told"), DIFFERENCES.values(), ids=DIFFERENCES)
def test_a_difference_fails_and_is_reported(
    wanted: dict[str, Any], told: str, isolated: str, apply: Applier, client: Orbctl
) -> None:
    before = client.info(isolated)
    done = apply(orbstack.machine, machine=isolated, **{"image": "debian", **wanted})
    assert told in done.error
    assert "recreate=True" in done.error
    assert "\n" not in done.error
    assert done.changing == []
    assert client.info(isolated) == before


@pytest.mark.parametrize("what", ["version", "arch", "no-mount"])
def test_recreate_makes_a_new_machine(
    what: str, machines: Machines, apply: Applier, client: Orbctl
) -> None:
    name = machines.create(
        "debian:bookworm", user="alice", isolated=True, mounts=["/opt:/opt", "/srv"]
    )
    old = client.info(name)
    args = {"machine": name, "image": "debian", "user": "bob", **DIFFERENCES[what][0]}
    done = apply(orbstack.machine, recreate=True, wait=False, **args)
    assert done.error == ""
    assert [words[0] for words in done.changing] == ["delete", "create"]
    assert client.info(name).id != old.id
    assert client.info(name).username == "bob"
    assert not apply(orbstack.machine, recreate=True, **args).changed


def test_several_differences_are_reported_together(isolated: str, apply: Applier) -> None:
    done = apply(orbstack.machine, machine=isolated, image="ubuntu", arch="arm64", isolated=False)
    for told in ("image is", "arch is", "isolated is"):
        assert told in done.error


def test_the_user_is_changed_in_place(clone: str, apply: Applier, client: Orbctl) -> None:
    """The only difference of M6 that never needs a new machine, even if one is allowed."""
    before = client.info(clone)
    done = apply(orbstack.machine, machine=clone, user="daemon", recreate=True, wait=False)
    assert done.error == ""
    assert [words[0] for words in done.changing] == ["run", "config"]
    assert client.info(clone).id == before.id
    assert client.call("run", "-m", clone, "-w", "/", "id", "-un").stdout == b"daemon\n"


@pytest.mark.parametrize("state", ["running", "stopped"])
@pytest.mark.parametrize("operation", [orbstack.machine, orbstack.machine_user])
def test_a_missing_user_is_rejected_before_any_change(
    operation: Any, state: str, clone: str, apply: Applier, client: Orbctl
) -> None:
    if state == "stopped":
        client.stop(clone)
    before = client.info(clone)
    limits = {"cpus": 2} if operation is orbstack.machine else {}
    done = apply(operation, machine=clone, user="nobody-here", **limits)
    assert f"machine {clone} has no user nobody-here, which must exist first: " in done.error
    assert "no such user" in done.error
    assert "\n" not in done.error
    assert {words[0] for words in done.changing} <= {"run", "start", "stop"}
    assert client.info(clone) == before
    assert client.call("config", "get", f"machine.{clone}.cpu").stdout == b"0\n"


@pytest.mark.parametrize(
    ("machine_image", "image"),
    [
        ("ubuntu:noble", "ubuntu"),
        ("ubuntu:noble", "ubuntu:24.04"),
        ("ubuntu:noble", "ubuntu:noble"),
    ],
)
def test_synonyms_of_an_image_are_not_a_difference(
    machine_image: str, image: str, base: str, apply: Applier
) -> None:
    done = apply(orbstack.machine, machine=base, image=image)
    assert not done.changed
    assert done.error == ""


@pytest.mark.parametrize("image", ["ubuntu:26.10", "ubuntu:plucky"])
def test_an_unknown_version_is_a_warning_and_never_recreates(
    image: str, base: str, apply: Applier
) -> None:
    done = apply(orbstack.machine, machine=base, image=image, recreate=True)
    assert not done.changed
    assert done.error == ""
    assert f"image should be {image}" in done.log


def test_a_limit_of_zero_means_no_limit(clone: str, apply: Applier, client: Orbctl) -> None:
    none = {"machine": clone, "cpus": 0, "memory": "0G", "disk": 0}
    assert not apply(orbstack.machine, **none).changed
    apply(orbstack.machine, machine=clone, cpus=1, memory=512)
    lifted = apply(orbstack.machine, **none)
    assert lifted.changed
    assert client.call("config", "get", f"machine.{clone}.cpu").stdout == b"0\n"
    assert not apply(orbstack.machine, **none).changed


@pytest.mark.smoke
def test_limits_restart_a_running_machine_only(
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


def test_a_rejected_value_leaves_the_machine_running(
    clone: str, apply: Applier, client: Orbctl, faults: Callable[..., None]
) -> None:
    faults(match="config set", exit=1, stderr="[-32098] not today")
    done = apply(orbstack.machine, machine=clone, cpus=2)
    assert "not today" in done.error
    assert client.info(clone).running


def test_rename_keeps_the_id(clone: str, machines: Machines, apply: Applier) -> None:
    before, to = machines.client.info(clone), machines.new_name()
    apply(orbstack.renamed, machine=clone, to=to)
    assert machines.own(to).id == before.id


def test_rename_rejects_a_name_in_use(
    clone: str, base: str, apply: Applier, machines: Machines
) -> None:
    taken = apply(orbstack.renamed, machine=clone, to=base)
    assert f"there already is a machine {base}; use another name" in taken.error
    missing = apply(orbstack.renamed, machine=machines.new_name(), to=machines.new_name())
    assert "there is no machine" in missing.error
    assert taken.changing == missing.changing == []


def test_deleting_an_absent_machine_changes_nothing(machines: Machines, apply: Applier) -> None:
    done = apply(orbstack.machine, machine=machines.new_name(), present=False)
    assert (done.changed, done.error, done.changing) == (False, "", [])


def test_only_the_machine_that_was_compared_is_deleted(
    machines: Machines, base: str, apply: Applier, client: Orbctl
) -> None:
    """Another machine gets its name between the comparison and the deletion."""
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

# The simulator has no cloud-init: this reads the file, as OrbStack would, and continues without it.
_WRAPPER = """#!/bin/sh
if [ "$1" = export ]; then stat -c %a "$(dirname "$3")" >"$SEEN.mode"; fi
if [ "$1" = create ] && [ "$2" = --user-data ]; then
  stat -c %a "$3" "$(dirname "$3")" >"$SEEN.mode"; cp "$3" "$SEEN"; echo "$3" >"$SEEN.path"
  shift 3; set -- create "$@"
fi
exec "$SIMULATOR" "$@"
"""


@dataclass
class CloudInit:
    """A cloud-init file, and its content as `orbctl` saw it."""

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


@pytest.mark.smoke
def test_changed_cloud_init_is_a_difference(
    cloud_init: CloudInit, machines: Machines, apply: Applier, client: Orbctl
) -> None:
    name = machines.new_name()
    args = {"machine": name, "image": "ubuntu", "cloud_init": str(cloud_init.path)}
    assert apply(orbstack.machine, dry=True, **args).changing == []
    first = apply(orbstack.machine, **args)
    assert (first.error, first.changed) == ("", True)
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


def test_cloud_init_that_has_not_succeeded_is_waited_for_again(
    cloud_init: CloudInit, machines: Machines, apply: Applier, client: Orbctl
) -> None:
    name = machines.new_name()
    args = {"machine": name, "image": "ubuntu", "cloud_init": str(cloud_init.path)}
    assert apply(orbstack.machine, wait=False, **args).error == ""
    digest = _digests() / machines.own(name).id
    assert digest.read_text().endswith(" pending\n")
    assert not apply(orbstack.machine, wait=False, **args).changed
    guest = Guest(client, name)
    program = "/usr/local/bin/cloud-init"
    guest.sh(
        f"printf '#!/bin/sh\necho no package; exit 1\n' >{program}; chmod 755 {program}", "root"
    )
    for _ in range(2):
        assert "cloud-init failed" in apply(orbstack.machine, **args).error
    guest.sh(f"rm {program}", "root")
    done = apply(orbstack.machine, **args)
    assert (done.error, done.changed) == ("", True)
    assert not digest.read_text().endswith(" pending\n")
    assert not apply(orbstack.machine, **args).changed


@pytest.mark.parametrize("content", [b"", b"#cloud"])
def test_a_cloud_init_file_that_is_cut_off_creates_nothing(
    machines: Machines, client: Orbctl, content: bytes
) -> None:
    """pyinfra was killed, or the connection to the Mac was lost, while it was sent."""
    name = machines.new_name()
    words = shelltext.words("make_from_user_data", "0" * 64, 20, name, "create", "ubuntu", name)
    done = subprocess.run(
        ["sh", "-c", shelltext.command(words)],
        input=content,
        capture_output=True,
        env={**os.environ, orbctl.COMMAND_VARIABLE: client.command},
    )
    assert done.returncode == 1
    assert b"arrived incomplete; nothing was created" in done.stderr
    assert name not in [machine.name for machine in client.machines()]


def test_creating_without_a_record_is_a_warning(
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
    assert Path(f"{cloud_init.seen}.mode").read_text() == "600\n700\n"
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
    """Ctrl-C in a terminal also reaches the shell; after a kill of pyinfra, it exits on its own."""
    monkeypatch.setenv("ORBCTL_SIMULATOR_FAULTS", '{"match": "create", "hang": true}')
    apply.log.unlink(missing_ok=True)
    child = subprocess.Popen(
        programs.pyinfra_argv("-y", "@local", f"{OPERATIONS}.orbstack.machine")
        + [f"machine={machines.new_name()}", "image=ubuntu", f"cloud_init={cloud_init.path}"],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not any(words[0] == "create" for words in read_calls(apply.log)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert cloud_init.left()
    os.killpg(child.pid, signal.SIGINT)
    child.wait(60)
    deadline = time.monotonic() + 60
    while cloud_init.left() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert cloud_init.left() == []


def test_interrupted_cloud_init_is_completed_by_the_next(
    cloud_init: CloudInit, machines: Machines, apply: Applier, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = {
        "machine": machines.new_name(),
        "image": "ubuntu",
        "cloud_init": str(cloud_init.path),
    }
    with monkeypatch.context() as patch:
        patch.setenv("ORBCTL_SIMULATOR_FAULTS", '{"match": "create", "hang": true}')
        killer = gevent.spawn(kill_at, "create", apply.log)
        assert apply(orbstack.machine, **args).error
        killer.get(timeout=5)
    assert apply(orbstack.machine, dry=True, **args).will_change
    again = apply(orbstack.machine, **args)
    assert (again.error, again.changed) == ("", True)
    assert (_digests() / machines.own(args["machine"]).id).read_text().strip()
    assert not apply(orbstack.machine, **args).changed


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe"], ids=["missing", "empty", "binary"])
def test_cloud_init_is_checked_before_any_change(
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
    "isolated": ("2.0", {"isolated": True}, "OrbStack 2.1 is required for isolated"),
    "mounts": (
        "2.0",
        {"isolated": True, "mounts": ["/opt"]},
        "OrbStack 2.1 is required for isolated, mounts, and this is 2.0.5",
    ),
    "agent": ("2.0", {"forward_ssh_agent": True}, "OrbStack 2.1 is required for forward_ssh_agent"),
    "limits": (
        "2.1",
        {"cpus": 1, "memory": "1G", "disk": "9G"},
        "OrbStack 2.2 is required for cpus, memory, disk, and this is 2.1.1",
    ),
}


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
@pytest.mark.parametrize(("profile", "wanted", "told"), GATED.values(), ids=GATED)
def test_an_old_orbstack_is_a_one_line_error(
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


def test_features_missing_in_old_versions_may_be_off(
    base: str, apply: Applier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORBCTL_SIMULATOR_PROFILE", "2.0")
    off = {"isolated": False, "isolate_network": False, "mounts": [], "cpus": 0, "memory": 0}
    done = apply(orbstack.machine, machine=base, image="ubuntu", **off)
    assert (done.error, done.changed) == ("", False)
    assert "cannot be compared" not in done.log


# Copies -----------------------------------------------------------------------------------------


def test_a_running_source_keeps_running_and_its_clone_is_stopped(
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
def test_export_restores_the_machines_state(
    state: str, clone: str, apply: Applier, client: Orbctl, tmp_path: Path
) -> None:
    if state == "stopped":
        client.stop(clone)
    path = tmp_path / "one.tar.zst"
    assert apply(orbstack.exported, machine=clone, path=str(path)).error == ""
    assert client.info(clone).state == state


def test_S8_export_is_readable_only_by_its_owner(
    base: str, apply: Applier, cloud_init: CloudInit, tmp_path: Path
) -> None:
    assert apply(orbstack.exported, machine=base, path=str(tmp_path / "one.tar.zst")).error == ""
    assert Path(f"{cloud_init.seen}.mode").read_text() == "700\n"


def test_S8_failed_export_leaves_no_file(
    base: str, apply: Applier, tmp_path: Path, faults: Callable[..., None]
) -> None:
    faults(match="export", exit=1, stderr="[-32098] disk full")
    done = apply(orbstack.exported, machine=base, path=str(tmp_path / "one.tar.zst"))
    assert "disk full" in done.error
    assert list(tmp_path.iterdir()) == []


def test_S8_existing_file_and_directory_are_kept(base: str, apply: Applier, tmp_path: Path) -> None:
    path = tmp_path / "one.tar.zst"
    path.write_text("mine")
    assert not apply(orbstack.exported, machine=base, path=str(path)).changed
    assert path.read_text() == "mine"
    assert "is a directory" in apply(orbstack.exported, machine=base, path=str(tmp_path)).error


def test_a_renamed_machine_is_still_owned(
    base: str, machines: Machines, apply: Applier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, client = Record(tmp_path / "record"), machines.client
    monkeypatch.setenv(RECORD_VARIABLE, str(record.path))
    first, second, third = (machines.new_name() for _ in range(3))
    apply(orbstack.cloned, source=base, machine=first)
    apply(orbstack.renamed, machine=first, to=second)
    apply(orbstack.cloned, source=base, machine=first)
    client.clone(base, third)
    other = machines.own(third)
    # Another machine under a recorded name, as after a manual rename.
    apply(orbstack.renamed, machine=first, to=f"{first}-old")
    apply(orbstack.renamed, machine=third, to=first)
    assert {one.name for one in record.existing(client)} == {second, f"{first}-old"}
    assert set(record.delete_all(client)) == {second, f"{first}-old"}
    assert client.info(first).id == other.id
    assert record.machines() == {}
    assert record.delete_all(client) == []


def test_machines_of_operations_are_recorded(
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
