"""The verbs of a generated project's Makefile, in a folder with nothing but inventories."""

from __future__ import annotations

import io
import secrets
import sys
from pathlib import Path

import pytest

from pyinfra_orbstack import orbctl, project
from pyinfra_orbstack.orbctl import Orbctl, OrbctlMissing, Record, create_args

from ..containers import Containers

LOCAL = """
MACHINE = {"orbstack_image": "ubuntu"}
_hidden = ["@orbstack/hidden"]
web = [("@orbstack/NAME", MACHINE)]
also = (["@orbstack/NAME", "@orbstack/stopped-*"], {"x": 1})
number = 3
"""


@pytest.fixture
def name() -> str:
    return f"project-{secrets.token_hex(4)}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> Path:
    (tmp_path / "inventories").mkdir()
    local = f'web = [("@orbstack/{name}", {{"orbstack_image": "ubuntu"}})]\n'
    (tmp_path / "inventories" / "local.py").write_text(local)
    (tmp_path / "inventories" / "empty.py").write_text("web = []\n")
    (tmp_path / "inventories" / "servers.py").write_text("web = ['server.example']\n")
    (tmp_path / "deploy.py").write_text(
        "from pyinfra.operations import files\nfiles.directory(path='/tmp/made')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("YES", raising=False)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    return tmp_path


def test_hosts_of_an_inventory_are_read_as_pyinfra_does(tmp_path: Path) -> None:
    path = tmp_path / "inventory.py"
    path.write_text(LOCAL)
    assert project.inventory_hosts(path) == ["@orbstack/NAME", "@orbstack/stopped-*"]


@pytest.mark.parametrize(
    ("host", "what"),
    [
        ("@orbstack", (True, False)),
        ("@orbstack/web-*", (True, False)),
        ("@orbstack/docker-1", (True, False)),
        ("@orbstack/docker", (False, True)),
        ("@orbstack/docker/web-1", (False, True)),
        ("@orbstacks/web", (False, False)),
        ("@docker/web", (False, False)),
        ("web.example", (False, False)),
    ],
)
def test_machines_containers_and_servers(host: str, what: tuple[bool, bool]) -> None:
    assert (project.is_machine(host), project.is_container(host)) == what


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["deploy", "nowhere"], "there is no inventory 'nowhere'; INVENTORY can be: empty, local,"),
        (["deploy", "--", "-x"], "there is no inventory '-x'"),
        (["plan", "--", "../inventories/local"], "there is no inventory"),
        (["deploy", "empty"], "inventories/empty.py has no hosts yet"),
        (["deploy", "servers"], "nobody to ask: confirm with YES=1"),
        (["shell", "--", "-x"], "there is no machine '-x'"),
        (["shell", "--", ""], "there is no machine ''"),
    ],
)
def test_mistakes_are_one_line(
    argv: list[str], reason: str, capsys: pytest.CaptureFixture[str], client: Orbctl
) -> None:
    assert client
    assert project.main(argv) == 1
    said = capsys.readouterr().err
    assert reason in said
    assert said.count("\n") == 1


def test_life_of_a_project(
    folder: Path,
    name: str,
    client: Orbctl,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = Record(folder / ".orbstack" / "machines")
    try:
        assert project.main(["plan", "local"]) == 0
        assert f"{name} would be created" in capfd.readouterr().out
        with pytest.raises(orbctl.MachineNotFound):
            client.info(name)

        assert project.main(["deploy", "local"]) == 0
        assert record.machines() == {name: client.info(name).id}
        assert project.main(["plan", "local"]) == 0
        assert "files.directory" in capfd.readouterr().err

        assert project.main(["destroy"]) == 1
        assert f"would delete {name}: confirm with YES=1" in capfd.readouterr().err
        assert client.info(name).running
        client.stop(name)
        assert project.main(["plan", "local"]) == 0
        assert f"{name} would be started" in capfd.readouterr().out
        assert not client.info(name).running

        client.call("rename", name, f"{name}-2")
        monkeypatch.setenv("YES", "1")
        assert project.main(["destroy"]) == 0
        assert capfd.readouterr().out.endswith(f"deleted: {name}-2\n")
        assert project.main(["destroy"]) == 0
        assert "has made no machine" in capfd.readouterr().out
    finally:
        record.delete_all(client)


def test_containers_have_a_deploy_of_their_own(
    folder: Path,
    containers: Containers,
    small_image: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Neither is `orbctl` looked for.
    monkeypatch.setenv(orbctl.COMMAND_VARIABLE, "/no such")
    name = containers.run(small_image)
    (folder / "inventories" / "app.py").write_text(f"web = ['@orbstack/docker/{name}']\n")
    (folder / "deploy_app.py").write_text(
        "from pyinfra.operations import files\nfiles.directory(name='Own', path='/srv/own')\n"
    )
    assert project.main(["plan", "app"]) == 0
    assert "Own" in capfd.readouterr().err
    assert project.main(["deploy", "app"]) == 1
    assert "nobody to ask: confirm with YES=1" in capfd.readouterr().err
    containers.call("exec", name, "test", "!", "-e", "/srv/own")

    monkeypatch.setenv("YES", "1")
    assert project.main(["deploy", "app"]) == 0
    containers.call("exec", name, "test", "-d", "/srv/own")
    assert project.main(["shell", f"docker/{name}"]) == 0

    containers.call("stop", "-t", "1", name)
    capfd.readouterr()
    assert project.main(["plan", "app"]) == 0
    assert f"docker/{name} would be started" in capfd.readouterr().out
    assert not containers.client.inspect(name).running

    assert project.main(["destroy"]) == 0
    assert containers.client.inspect(name).id
    containers.remove(name)
    assert project.main(["plan", "app"]) == 1
    assert f"there is no container '{name}'" in capfd.readouterr().err
    assert project.main(["shell", f"docker/{name}"]) == 1
    assert f"there is no container '{name}'; M can be: " in capfd.readouterr().err
    assert project.main(["shell", "docker/"]) == 1
    assert "'' cannot be a container's name" in capfd.readouterr().err


def test_machines_of_others_are_not_destroyed(
    folder: Path, name: str, client: Orbctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.create(create_args(name, "ubuntu"))
    machine = client.info(name)
    try:
        path = folder / ".orbstack" / "machines"
        path.parent.mkdir()
        path.write_text(f"{name} 01AAAAAAAAAAAAAAAAAAAAAAAA\n")
        monkeypatch.setenv("YES", "1")
        assert project.main(["destroy"]) == 0
        assert client.info(name).id == machine.id
    finally:
        client.delete(name, machine.id)


def test_choice_of_orbctl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(orbctl.COMMAND_VARIABLE, raising=False)
    monkeypatch.setattr(orbctl, "KNOWN_FOLDERS", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    if sys.platform != "darwin":
        assert project.is_simulator(project.choose_orbctl())
        with pytest.raises(OrbctlMissing, match="orbctl not found"):
            project.choose_orbctl("real")
    real = tmp_path / "orbctl"
    real.write_text("#!/bin/sh\n")
    real.chmod(0o755)
    assert project.choose_orbctl() == project.choose_orbctl("real") == str(real)
    assert project.is_simulator(project.choose_orbctl("simulator"))
    assert project.settings(str(real)) == {}
    monkeypatch.setenv(orbctl.COMMAND_VARIABLE, project.choose_orbctl("simulator"))
    assert project.is_simulator(project.choose_orbctl())
    with pytest.raises(OrbctlMissing, match="is the simulator"):
        project.choose_orbctl("real")
