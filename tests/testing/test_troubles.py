"""Failures while machines are created, used and deleted, and users' answers."""

from __future__ import annotations

import io
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gevent
import pytest

from pyinfra_orbstack import cli, orbctl, programs
from pyinfra_orbstack.orbctl import Orbctl, OrbctlMissing, Record
from pyinfra_orbstack.testing import Machine, MachineFactory
from pyinfra_orbstack.testing.engine import delete_all


def failing(folder: Path) -> str:
    """An `orbctl` that always fails."""
    path = folder / "failing-orbctl"
    path.write_text("#!/bin/sh\necho 'not today' >&2\nexit 1\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture(scope="module")
def machine(orbstack_machines: MachineFactory) -> Iterator[Machine]:
    with orbstack_machines("troubles") as machine:
        yield machine


def test_a_machine_is_shown_by_its_name(machine: Machine) -> None:
    assert repr(machine) == f"<Machine {machine.name}>"


def test_a_machine_that_cannot_be_deleted_is_named(
    orbstack_machines: MachineFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = orbstack_machines("stays")
    client = machine.engine.client
    with monkeypatch.context() as patch:
        patch.setattr(client, "command", failing(tmp_path))
        with pytest.warns(UserWarning, match=f"{machine.name} was not deleted: not today"):
            machine.delete()
    assert client.info(machine.name).id == machine.id
    machine.delete()
    with pytest.raises(orbctl.MachineNotFound):
        client.info(machine.name)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_a_partly_created_machine_is_removed(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """Interrupted during a clone, when a machine already exists."""
    engine, name = machine.engine, f"half-{secrets.token_hex(4)}"
    real, made = engine.client.command, tmp_path / "made"
    slow = tmp_path / "orbctl"
    slow.write_text(
        f'#!/bin/sh\n[ $1 = clone ] && {{ {real} "$@"; : >{made}; exec sleep 60; }}\n'
        f'exec {real} "$@"\n'
    )
    slow.chmod(0o755)
    main = gevent.getcurrent()

    def interrupt() -> None:
        while not made.exists():
            gevent.sleep(0.05)
        main.throw(error)

    with monkeypatch.context() as patch:
        patch.setattr(engine.client, "command", str(slow))
        gevent.spawn(interrupt)
        with pytest.raises(error):
            engine.create(name, orbctl.machine_args("clone", machine.name, name))
    with pytest.raises(orbctl.MachineNotFound):
        engine.client.info(name)
    assert name not in engine.record.machines()
    assert engine.record.intents() == []


def test_a_machine_that_cannot_be_recorded_is_removed(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, name = machine.engine, f"lost-{secrets.token_hex(4)}"
    with monkeypatch.context() as patch:
        patch.setattr(engine, "record", Record(tmp_path))
        with pytest.raises(orbctl.OrbctlError, match="deleted again: cannot write the record"):
            engine.create(name, orbctl.machine_args("clone", machine.name, name))
    with pytest.raises(orbctl.MachineNotFound):
        engine.client.info(name)


def test_a_machine_that_does_not_answer_is_waited_for(machine: Machine) -> None:
    with pytest.raises(orbctl.MachineNotFound):
        machine.engine.wait("no-such-machine", seconds=0.6)


def test_records_that_cannot_be_processed_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "settings").write_text(f"{orbctl.COMMAND_VARIABLE}={failing(tmp_path)}\n")
    (folder / "machines").write_text("left 01KHVDCW7HTAGRPMB823KADP9B\n")
    delete_all(folder)
    said = capsys.readouterr().err
    assert said == "cannot delete left (the next run tries again): not today\n"
    assert Record(folder / "machines").machines() == {"left": "01KHVDCW7HTAGRPMB823KADP9B"}


# Commands of a project -------------------------------------------------------------------------


def test_a_shell_starts_in_the_home_directory(machine: Machine) -> None:
    words = [str(Path(sys.executable).with_name("pyinfra-orbstack")), "shell", machine.name]
    done = subprocess.run(words, input="pwd; exit 3\n", capture_output=True, text=True, timeout=100)
    assert done.returncode == 3, done.stderr
    user = machine.run(["id", "-un"]).stdout.strip()
    assert done.stdout.endswith(f"/home/{user}\n")


class Terminal(io.StringIO):
    """A user who types."""

    def isatty(self) -> bool:
        return True


class Interrupted(Terminal):
    """A user who types Ctrl-C."""

    def readline(self, *_: object) -> str:
        raise KeyboardInterrupt


def test_destroy_asks(
    client: Orbctl,
    machine: Machine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("YES", raising=False)
    name = f"asked-{secrets.token_hex(4)}"
    client.clone(machine.name, name)
    made = client.info(name)
    Record(cli.RECORD).add(made)
    try:
        for answer, status in ((Terminal("n\n"), 1), (Terminal("\n"), 1), (Interrupted(), 130)):
            monkeypatch.setattr(sys, "stdin", answer)
            assert cli.main(["destroy"]) == status
            assert f"Delete {name}? [y/N] " in capsys.readouterr().out
            assert client.info(name).id == made.id
        monkeypatch.setattr(sys, "stdin", Terminal("Yes\n"))
        assert cli.main(["destroy"]) == 0
        assert capsys.readouterr().out.endswith(f"deleted: {name}\n")
    finally:
        client.delete(name, made.id)


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host without `orbctl`, except the simulator in this environment."""
    monkeypatch.delenv(orbctl.COMMAND_VARIABLE, raising=False)
    sudo = shutil.which("sudo")
    if sudo:  # the simulator needs it for a non-root user
        (tmp_path / "sudo").symlink_to(sudo)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(orbctl, "KNOWN_FOLDERS", [str(tmp_path)])


@pytest.mark.usefixtures("nowhere", "client")
def test_the_simulator_is_named_when_it_is_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    simulator = Path(sys.executable).with_name("orbctl-simulator")
    assert cli.main(["shell", "no-such-machine"]) == 1
    said = capsys.readouterr()
    assert said.out == f"no OrbStack here: {orbctl.COMMAND_VARIABLE}={simulator}\n"
    assert "there is no machine 'no-such-machine'" in said.err


@pytest.mark.usefixtures("nowhere")
def test_orbctl_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(OrbctlMissing, match="install OrbStack"):
        programs.choose_orbctl()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(OrbctlMissing, match="orbctl-simulator not found beside"):
        programs.choose_orbctl("simulator")
