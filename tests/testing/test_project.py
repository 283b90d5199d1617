"""The commands of a rendered project's Makefile, in a directory with only inventories."""

from __future__ import annotations

import io
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pyinfra_orbstack import cli, inventory_files, orbctl, programs
from pyinfra_orbstack.orbctl import Orbctl, OrbctlMissing, Record, create_args

from ..conftest import Machines
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
    patterns = "web = ['@orbstack/*', '@orbstack', '@orbstack/docker/web']\n"
    (tmp_path / "inventories" / "patterns.py").write_text(patterns)
    (tmp_path / "deploy.py").write_text(
        "from pyinfra.operations import files\nfiles.directory(path='/tmp/made')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("YES", raising=False)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    return tmp_path


def test_hosts_of_an_inventory_are_read_as_in_pyinfra(tmp_path: Path) -> None:
    path = tmp_path / "inventory.py"
    path.write_text(LOCAL)
    assert inventory_files.inventory_hosts(path) == ["@orbstack/NAME", "@orbstack/stopped-*"]


def test_files_that_macos_adds_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("inventories", "group_data"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "._all.py").write_bytes(b"\0\5\26\7")
    inventory = tmp_path / "inventories" / "local.py"
    inventory.write_text(LOCAL)
    with pytest.raises(inventory_files.CommandError, match=r"one of: local$"):
        inventory_files.find_inventory("none")
    assert inventory_files.setting(inventory, "_key") == {}
    assert len(inventory_files.read(inventory, lambda host: "*" not in host)) == 1


@pytest.mark.parametrize(
    ("shared", "local", "group_data"),
    [
        ('MAC = {"orbstack_" + "ssh": "mac"}', 'web = [("@local", MAC)]', ""),
        ('MAC = {"orbstack_" + "ssh": "mac"}', 'web = (["@local"], MAC)', ""),
        ('MAC = "mac"', 'web = ["@local"]', "from mac_data import *\norbstack_ssh = MAC\n"),
        ('locals()["orbstack_" + "ssh"] = "mac"', 'web = ["@local"]', "from mac_data import *"),
        ("", 'web = ["@local"]', "from pyinfra import inventory\norbstack_ssh = 'mac'"),
        ("import os", 'web = [("@local", {"orbstack_ssh": "mac"})]', ""),
    ],
)
def test_settings_may_come_from_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: str, local: str, group_data: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "mac_data", raising=False)
    Path("group_data").mkdir()
    Path("group_data", "web.py").write_text(group_data)
    Path("mac_data.py").write_text(f"{shared}\n")
    path = tmp_path / "inventory.py"
    path.write_text(f"from mac_data import *\n{local}\n")
    assert inventory_files.setting(path, "orbstack_ssh") == {"@local": "mac"}


def test_group_data_that_cannot_be_read_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may need what only pyinfra sets, or a secret of another inventory."""
    monkeypatch.chdir(tmp_path)
    Path("group_data").mkdir()
    Path("group_data", "all.py").write_text("from pyinfra import config\nconfig.SUDO = True\n")
    Path("group_data", "production.py").write_text("import os\nx = os.environ['NO_SUCH']\n")
    path = tmp_path / "inventory.py"
    path.write_text('web = ["@local"]\n')
    assert inventory_files.setting(path, "orbstack_ssh") == {}


def test_groups_of_an_inventory_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "inventory.py"
    text = "open('read', 'a').write('x')\nweb = (['a'], {'port': 80})\ndb = (['b'],)\nqueue = ()\n"
    path.write_text(text)
    groups = inventory_files.read(path).groups
    assert {name: [host.name for host in groups.get(name, [])] for name in ("web", "db")} == {
        "web": ["a"],
        "db": ["b"],
    }
    assert (tmp_path / "read").read_text() == "x"


def test_a_host_given_as_a_list_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "inventory.py").write_text('web = [["@orbstack/a"]]\n')
    with pytest.raises(inventory_files.CommandError, match="must be a name or a tuple"):
        inventory_files.inventory_hosts(tmp_path / "inventory.py")


def test_ctrl_d_means_no(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str) -> None:
    made = [SimpleNamespace(name=name, id="01AAAAAAAAAAAAAAAAAAAAAAAA")]
    cli.RECORD.parent.mkdir()
    cli.RECORD.write_text(f"{name} {made[0].id}\n")
    monkeypatch.setattr(orbctl.Record, "existing", lambda self, client: made)
    monkeypatch.setattr(cli, "use_orbctl", lambda: None)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))

    def ends(question: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", ends)
    monkeypatch.delenv("YES", raising=False)
    assert cli.main(["destroy"]) == 1


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
    assert (inventory_files.is_machine(host), inventory_files.is_container(host)) == what


@pytest.mark.parametrize(
    "words", [[], ["deploy"], ["plan"], ["drift"], ["trust"], ["shell"], ["destroy"]]
)
def test_each_verb_explains_itself(words: list[str]) -> None:
    argv = [str(Path(sys.executable).with_name("pyinfra-orbstack")), *words, "--help"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    verbs = words or ["deploy", "plan", "drift", "trust", "shell", "destroy"]
    assert done.stdout.startswith(f"usage: {' '.join(['pyinfra-orbstack', *words])} [-h]")
    assert all(verb in done.stdout for verb in verbs)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (
            ["deploy", "nowhere"],
            "there is no inventory 'nowhere': set INVENTORY to one of: empty, local,",
        ),
        (["deploy", "--", "-x"], "there is no inventory '-x'"),
        (["plan", "--", "../inventories/local"], "there is no inventory"),
        (["drift", "nowhere"], "there is no inventory 'nowhere'"),
        (["drift", "empty"], "inventories/empty.py has no hosts yet"),
        (["deploy", "empty"], "inventories/empty.py has no hosts yet"),
        (["deploy", "servers"], "stdin is not a terminal: confirm with YES=1"),
        (["shell", "--", "-x"], "there is no machine '-x'"),
        (["shell", "--", ""], "there is no machine ''"),
        (["destroy", "nowhere"], "there is no inventory 'nowhere'"),
        (["destroy", "--", ""], "there is no inventory ''"),
        (["destroy", "servers"], "inventories/servers.py contains no local machines"),
        (["destroy", "patterns"], "inventories/patterns.py contains no local machines"),
    ],
)
def test_mistakes_are_one_line_errors(
    argv: list[str], reason: str, capsys: pytest.CaptureFixture[str], client: Orbctl
) -> None:
    assert client
    assert cli.main(argv) == 1
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
        assert cli.main(["plan", "local"]) == 0
        assert f"{name} would be created" in capfd.readouterr().out
        with pytest.raises(orbctl.MachineNotFound):
            client.info(name)

        assert cli.main(["deploy", "local"]) == 0
        assert record.machines() == {name: client.info(name).id}
        assert cli.main(["plan", "local"]) == 0
        assert "files.directory" in capfd.readouterr().err

        assert cli.main(["destroy"]) == 1
        assert f"would delete {name}: confirm with YES=1" in capfd.readouterr().err
        assert client.info(name).running
        client.stop(name)
        assert cli.main(["plan", "local"]) == 0
        assert f"{name} would be started" in capfd.readouterr().out
        assert not client.info(name).running

        client.call("rename", name, f"{name}-2")
        monkeypatch.setenv("YES", "1")
        assert cli.main(["destroy"]) == 0
        assert capfd.readouterr().out.endswith(f"deleted: {name}-2\n")
        assert cli.main(["destroy"]) == 0
        assert "no machine that this project created" in capfd.readouterr().out
    finally:
        record.delete_all(client)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("web = [\n  'a'\n", "inventories/bad.py:1: '[' was never closed"),
        ("x = 1\nweb = [TOKEN]\n", "inventories/bad.py:2: NameError: name 'TOKEN' is not defined"),
        ("import os\n\nos.stat('/no/such')\n", "inventories/bad.py:3: FileNotFoundError: "),
        ("raise ValueError('one\\ntwo')", "inventories/bad.py:1: ValueError: one two"),
        ("web = ['\0']\n", "inventories/bad.py: "),
        ("import other\n", "/other.py:1: invalid syntax"),
    ],
)
@pytest.mark.parametrize("verb", ["plan", "drift", "deploy", "trust", "destroy"])
def test_an_unreadable_inventory_is_a_one_line_error(
    folder: Path,
    verb: str,
    text: str,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (folder / "inventories" / "bad.py").write_text(text)
    (folder / "other.py").write_text("a b\n")
    monkeypatch.syspath_prepend(folder)
    assert cli.main([verb, "bad"]) == 1
    line, *more = capsys.readouterr().err.splitlines()
    assert said in line
    assert more == []


def test_a_directory_without_inventories_is_a_one_line_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", "local"]) == 1
    said = f"there is no inventory in {tmp_path}/inventories: run this in a project's directory\n"
    assert capsys.readouterr().err == said


# Promises of a plan ----------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(
    ("data", "group_data", "said"),
    [
        ({}, {}, "there is no machine 'NAME'"),
        ({"orbstack_image": "u", "orbstack_mounts": ["/a"]}, {}, "requires"),
        ({"orbstack_image": "u", "orbstack_create_user": "-x"}, {}, "must not begin with '-'"),
        ({"orbstack_image": "u"}, {"orbstack_transport": "pigeon"}, "unknown transport 'pigeon'"),
        ({"orbstack_imag": "ubuntu"}, {}, "did you mean orbstack_image"),
        ({"orbstack_image": "nosuch:1"}, {}, "unknown distro"),
        ({"orbstack_image": "ubuntu:nobel"}, {}, "noble?"),
        (
            {"orbstack_image": "ubuntu", "orbstack_cpus": "many"},
            {},
            "orbstack_cpus must be a number such as 2, not 'many'",
        ),
        (
            {"orbstack_image": "ubuntu"},
            {"orbstack_memory": "4Q"},
            "orbstack_memory must be a size such as",
        ),
    ],
)
def test_a_plan_reports_what_cannot_work(
    folder: Path,
    name: str,
    machines: Machines,
    data: dict[str, object],
    group_data: dict[str, object],
    said: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """One line for that host; the others are still planned."""
    there = machines.create()
    hosts = [(f"@orbstack/{name}", data), f"@orbstack/{there}"]
    (folder / "inventories" / "some.py").write_text(f"web = {hosts!r}\n")
    (folder / "group_data").mkdir()
    lines = "".join(f"{key} = {value!r}\n" for key, value in group_data.items())
    (folder / "group_data" / "web.py").write_text(lines)
    capfd.readouterr()
    status = cli.main(["plan", "some"])
    printed = capfd.readouterr()
    (line,) = [line for line in printed.err.splitlines() if line.startswith(f"{name}: ")]
    assert said.replace("NAME", name) in line
    assert "would be" not in printed.out
    # pyinfra pads the shorter name.
    assert f"[@orbstack/{there}] Connected" in " ".join(printed.err.split()) or group_data
    assert status == 1


def test_a_plan_resolves_data_as_pyinfra_does(
    folder: Path, name: str, client: Orbctl, capfd: pytest.CaptureFixture[str]
) -> None:
    assert client
    (folder / "inventories" / "some.py").write_text(f"web = ['@orbstack/{name}']\n")
    assert cli.main(["plan", "some"]) == 1
    assert f"{name}: there is no machine" in capfd.readouterr().err
    (folder / "group_data").mkdir()
    (folder / "group_data" / "some.py").write_text("orbstack_image = 'ubuntu'\n")
    assert cli.main(["plan", "some"]) == 0
    assert capfd.readouterr().out.endswith(
        f"{name} would be created, then everything applied to it\n"
    )


def test_a_plan_that_pyinfra_cannot_start_shows_its_error(
    folder: Path, name: str, client: Orbctl, capfd: pytest.CaptureFixture[str]
) -> None:
    assert client
    (folder / "group_data").mkdir()
    (folder / "group_data" / "local.py").write_text("1 / 0\n")
    assert cli.main(["plan", "local"]) == 1
    printed = capfd.readouterr()
    assert "ZeroDivisionError" in printed.err
    assert "would be" not in printed.out


def test_a_plan_of_patterns_lists_stopped_machines(
    folder: Path, machines: Machines, client: Orbctl, capfd: pytest.CaptureFixture[str]
) -> None:
    running, stopped = machines.create(), machines.create()
    client.stop(stopped)
    pattern = f"@orbstack/{machines.prefix}-*"
    (folder / "inventories" / "some.py").write_text(f"web = [{pattern!r}, '@orbstack']\n")
    assert cli.main(["plan", "some"]) == 0
    printed = capfd.readouterr()
    assert f"{stopped} would be started" in printed.out
    assert f"[@orbstack/{running}]" in printed.err
    assert f"[@orbstack/{stopped}]" not in printed.err
    assert not client.info(stopped).running


@pytest.mark.long
def test_a_plan_shows_no_content_of_files(
    folder: Path, machines: Machines, capfd: pytest.CaptureFixture[str]
) -> None:
    name = machines.create()
    (folder / "inventories" / "some.py").write_text(f"web = ['@orbstack/{name}']\n")
    for word in ("first", "second"):
        (folder / "deploy.py").write_text(
            "from io import StringIO\nfrom pyinfra.operations import files\n"
            f"files.put(name='Token', src=StringIO('{word}-secret\\n'), dest='token')\n"
            "page = StringIO('{{ x }}\\n')\n"
            f"files.template(name='Page', src=page, dest='p', x='{word}-secret')\n"
            f"files.block(name='Block', path='b', content='{word}-secret')\n"
            f"files.line(name='Line', path='l', line='^key.*', replace='key {word}-secret')\n"
        )
        capfd.readouterr()
        assert cli.main(["plan", "some"]) == 0
        said = capfd.readouterr().err
        assert "Token" in said
        assert "secret" not in said
        assert cli.main(["deploy", "some"]) == 0


# Signals to a command --------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_to_a_command_reach_pyinfra(folder: Path, machines: Machines, number: int) -> None:
    """It gets the signal, so that it can clean up, and is waited for."""
    name = machines.create()
    (folder / "inventories" / "some.py").write_text(f"web = ['@orbstack/{name}']\n")
    (folder / "deploy.py").write_text(
        "import os, signal, sys, time\nfrom pathlib import Path\n"
        "def end(number, frame):\n    Path('ended').write_text(str(int(number)))\n    os._exit(9)\n"
        f"signal.signal({int(number)}, end)\nPath('begun').touch()\ntime.sleep(60)\n"
    )
    argv = [str(Path(sys.executable).with_name("pyinfra-orbstack")), "deploy", "some"]
    with subprocess.Popen(argv) as verb:
        while not (folder / "begun").exists():
            assert verb.poll() is None
            time.sleep(0.05)
        verb.send_signal(number)
        assert verb.wait(60) == 9
    assert (folder / "ended").read_text() == str(int(number))


def test_a_killed_program_has_the_shells_exit_status() -> None:
    assert cli.call(["sh", "-c", "kill -9 $$"], dict(os.environ)) == 128 + 9


# Which machines are destroyed ------------------------------------------------------------------


def test_destroy_applies_to_one_inventory(
    folder: Path,
    name: str,
    client: Orbctl,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("YES", "1")
    staged, renamed = f"{name}-staged", f"{name}-renamed"
    hosts = [(f"@orbstack/{one}", {"orbstack_image": "ubuntu"}) for one in (staged, renamed)]
    # Patterns and machines of another inventory do not belong to this one.
    (folder / "inventories" / "staging.py").write_text(f"web = {[*hosts, '@orbstack/*']!r}\n")
    record = Record(folder / ".orbstack" / "machines")
    try:
        assert cli.main(["deploy", "local"]) == 0
        client.clone(name, staged)
        client.clone(name, renamed)
        for one in (staged, renamed):
            record.add(client.info(one))
        client.call("rename", renamed, f"{name}-x")
        assert cli.main(["destroy", "staging"]) == 0
        deleted = capfd.readouterr().out.rpartition("deleted: ")[2].strip().split(", ")
        assert set(deleted) == {staged, f"{name}-x"}
        assert [one.name for one in record.existing(client)] == [name]
        assert cli.main(["destroy", "staging"]) == 0
        said = "inventories/staging.py contains no machine that this project created\n"
        assert said in capfd.readouterr().out

        # Machines in no inventory are reported, and deleted with all others.
        (folder / "inventories" / "local.py").write_text(f"web = ['@orbstack/{name}-new']\n")
        assert cli.main(["destroy", "local"]) == 0
        said = capfd.readouterr().out
        assert f"also created here, but no longer in any inventory: {name}\n" in said
        assert client.info(name).running
        assert cli.main(["destroy"]) == 0
        assert capfd.readouterr().out == f"deleted: {name}\n"
        assert record.existing(client) == []
    finally:
        record.delete_all(client)


def test_one_failed_deletion_does_not_stop_the_others(
    folder: Path,
    name: str,
    machines: Machines,
    client: Orbctl,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not programs.is_simulator(client.command):
        pytest.skip("a machine that cannot be deleted is the simulator's")
    source = machines.create()
    names = [f"{name}-{number}" for number in (1, 2, 3)]
    (folder / "inventories" / "some.py").write_text(
        f"web = {[f'@orbstack/{n}' for n in names]!r}\n"
    )
    record = Record(folder / ".orbstack" / "machines")
    try:
        for one in names:
            client.clone(source, one)
            record.add(client.info(one))
        capfd.readouterr()  # messages about the image
        fault = {"match": f"delete -f {names[0]}", "exit": 1, "stderr": "[-32098] not today\n"}
        (folder / "faults.json").write_text(json.dumps([fault]))
        monkeypatch.setenv("YES", "1")
        with monkeypatch.context() as patch:
            patch.setenv("ORBCTL_SIMULATOR_FAULTS", str(folder / "faults.json"))
            assert cli.main(["destroy", "some"]) == 1
        printed = capfd.readouterr()
        assert printed.err == f"{names[0]} was not deleted: not today\n"
        assert [one.name for one in record.existing(client)] == names[:1]
    finally:
        record.delete_all(client)


@pytest.mark.long
def test_containers_have_their_own_deploy(
    folder: Path,
    containers: Containers,
    small_image: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # `orbctl` is not searched for either.
    monkeypatch.setenv(orbctl.COMMAND_VARIABLE, "/no such")
    name = containers.run(small_image)
    (folder / "inventories" / "app.py").write_text(f"web = ['@orbstack/docker/{name}']\n")
    (folder / "deploy_app.py").write_text(
        "from pyinfra.operations import files\nfiles.directory(name='Own', path='/srv/own')\n"
    )
    assert cli.main(["plan", "app"]) == 0
    assert "Own" in capfd.readouterr().err
    assert cli.main(["deploy", "app"]) == 1
    assert "stdin is not a terminal: confirm with YES=1" in capfd.readouterr().err
    containers.call("exec", name, "test", "!", "-e", "/srv/own")

    monkeypatch.setenv("YES", "1")
    assert cli.main(["deploy", "app"]) == 0
    containers.call("exec", name, "test", "-d", "/srv/own")
    assert cli.main(["shell", f"docker/{name}"]) == 0

    containers.call("stop", "-t", "1", name)
    capfd.readouterr()
    assert cli.main(["plan", "app"]) == 0
    assert f"docker/{name} would be started" in capfd.readouterr().out
    assert not containers.client.inspect(name).running

    assert cli.main(["destroy"]) == 0
    assert containers.client.inspect(name).id
    containers.remove(name)
    assert cli.main(["plan", "app"]) == 1
    assert f"there is no container '{name}'" in capfd.readouterr().err
    assert cli.main(["shell", f"docker/{name}"]) == 1
    # Another test's may be there.
    assert f"there is no container '{name}': " in capfd.readouterr().err
    assert cli.main(["shell", "docker/"]) == 1
    assert "'' is not a valid name or id of a container" in capfd.readouterr().err


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
        assert cli.main(["destroy"]) == 0
        assert client.info(name).id == machine.id
    finally:
        client.delete(name, machine.id)


def test_choice_of_orbctl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(orbctl.COMMAND_VARIABLE, raising=False)
    monkeypatch.setattr(orbctl, "KNOWN_FOLDERS", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    if sys.platform != "darwin":
        assert programs.is_simulator(programs.choose_orbctl())
        with pytest.raises(OrbctlMissing, match="orbctl not found"):
            programs.choose_orbctl("real")
    real = tmp_path / "orbctl"
    real.write_text("#!/bin/sh\n")
    real.chmod(0o755)
    assert programs.choose_orbctl() == programs.choose_orbctl("real") == str(real)
    assert programs.is_simulator(programs.choose_orbctl("simulator"))
    assert programs.settings(str(real)) == {}
    monkeypatch.setenv(orbctl.COMMAND_VARIABLE, programs.choose_orbctl("simulator"))
    assert programs.is_simulator(programs.choose_orbctl())
    with pytest.raises(OrbctlMissing, match="is the simulator"):
        programs.choose_orbctl("real")
