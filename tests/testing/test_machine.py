"""Features of the plugin's machines, each on a real machine."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyinfra import host
from pyinfra.api import FactBase, deploy
from pyinfra.facts.files import File
from pyinfra.facts.server import Hostname, Users
from pyinfra.operations import files, server

from pyinfra_orbstack.testing import Machine, MachineFactory
from pyinfra_orbstack.testing.results import Result

DEPLOY = """
from pyinfra import host
from pyinfra.operations import files
files.line(name="Say hello", path="/tmp/hello", line=host.data.get("word", "hello"))
files.directory(name="Root's folder", path="/srv/app", _sudo=True)
"""


@pytest.fixture(scope="module")
def machine(orbstack_machines: MachineFactory) -> Iterator[Machine]:
    with orbstack_machines("mine") as machine:
        yield machine


@deploy("Folder")
def folder(path: str) -> None:
    assert host.name.startswith("@orbstack/mine-")
    files.directory(name="Make it", path=path)


def test_a_deploy_file_runs_in_a_child_process_and_reports_results(
    machine: Machine, tmp_path: Path
) -> None:
    path = tmp_path / "deploy.py"
    path.write_text(DEPLOY)
    before = set(sys.modules)

    result = machine.apply(path)

    assert result.ok
    assert result.changed == ["Say hello", "Root's folder"]
    assert result.failed == []
    assert result.seconds > max(step.seconds for step in result.steps) > 0
    assert "Grand total" in result.log
    assert machine.read("/tmp/hello") == "hello\n"
    assert machine.assert_idempotent(path).changed == []
    # gevent's monkey patches would reach every test of the process.
    assert socket.socket.__module__ == "socket"
    added = set(sys.modules) - before
    assert not any(name.split(".")[0] == "pyinfra_cli" for name in added)


def test_functions_and_operations_give_the_same_object(machine: Machine) -> None:
    for first in (
        machine.apply(folder, "/tmp/one"),
        machine.apply(files.directory, path="/tmp/two", name="Make it"),
        machine.apply(lambda: files.directory(name="Make it", path="/tmp/three")),
    ):
        assert isinstance(first, Result)
        assert [step.name.split(" | ")[-1] for step in first.steps] == ["Make it"]
        assert first.ok
        assert len(first.changed) == 1
    assert machine.fact(File, path="/tmp/one") is False  # a directory, not a file
    assert machine.assert_idempotent(folder, "/tmp/one").changed == []
    assert socket.socket.__module__ == "socket"


def test_an_operation_that_always_changes_is_not_idempotent(machine: Machine) -> None:
    with pytest.raises(AssertionError, match=r"changed.*Always"):
        machine.assert_idempotent(server.shell, commands="true", name="Always")


@pytest.mark.parametrize("how", ["file", "function"])
def test_failures_are_reported(machine: Machine, tmp_path: Path, how: str) -> None:
    path = tmp_path / "deploy.py"
    path.write_text(
        "from pyinfra.operations import server\n"
        "server.shell(name='Good', commands='true')\n"
        "server.shell(name='Bad', commands='echo hopeless >&2; false')\n"
        "server.shell(name='Never', commands='true')\n"
    )

    def function() -> None:
        server.shell(name="Good", commands="true")
        server.shell(name="Bad", commands="echo hopeless >&2; false")
        server.shell(name="Never", commands="true")

    what = path if how == "file" else function
    result = machine.apply(what, check=False)
    assert not result.ok
    assert (result.changed, result.failed) == (["Good"], ["Bad"])
    assert result.steps[-1].output == "hopeless"
    with pytest.raises(AssertionError, match="hopeless"):
        machine.apply(what)


def test_a_deploy_file_with_invalid_python_fails(machine: Machine, tmp_path: Path) -> None:
    path = tmp_path / "deploy.py"
    path.write_text("this is no Python\n")
    with pytest.raises(AssertionError, match="this is no Python"):
        machine.apply(path)
    with pytest.raises(FileNotFoundError, match=r"no deploy file .*nowhere.py"):
        machine.apply(tmp_path / "nowhere.py")


def test_a_deploy_file_that_hangs_is_killed(machine: Machine, tmp_path: Path) -> None:
    path = tmp_path / "deploy.py"
    path.write_text("import time\ntime.sleep(300)\n")
    with pytest.raises(AssertionError, match="more than 4 s"):
        machine.apply(path, timeout=4)


def test_reading_a_machine(machine: Machine) -> None:
    assert machine.fact(Hostname) == machine.name
    assert "root" in machine.fact(Users)
    assert machine.run("echo $((1 + 1)); exit 3", check=False)[:2] == (3, "2\n")
    assert machine.run(["printf", "%s", "a b'c"]).stdout == "a b'c"
    assert machine.run(["cat"], stdin=b"x").stdout == "x"
    assert machine.run("whoami", user="root").stdout == "root\n"
    assert machine.run("sudo -n whoami").stdout == "root\n"
    with pytest.raises(AssertionError, match="exit 1"):
        machine.run("false")
    with pytest.raises(AssertionError, match="No such file"):
        machine.read("/nowhere")


def test_a_command_that_takes_too_long_is_killed(machine: Machine) -> None:
    with pytest.raises(TimeoutError, match=r"'sleep 4321 & sleep 4321' on .* within 1 s"):
        machine.run("sleep 4321 & sleep 4321", timeout=1)
    assert machine.run("pgrep -f 'sleep 432[1]'", check=False).stdout == ""


class Broken(FactBase[str]):
    def command(self) -> str:
        return "echo hopeless >&2; false"


def test_a_failed_fact_says_why_and_affects_no_other_host(machine: Machine) -> None:
    with pytest.raises(AssertionError, match="hopeless"):
        machine.fact(Broken)
    assert machine.fact(Hostname) == machine.name


def test_restart_keeps_files_but_not_processes(machine: Machine) -> None:
    machine.run("touch ~/kept; nohup sleep 1234 >/dev/null 2>&1 &")
    assert machine.fact(Hostname)
    machine.restart()
    assert machine.run("ls ~/kept; pgrep -f 'sleep 123[4]'", check=False).status == 1
    assert machine.fact(Hostname) == machine.name


def test_groups_and_data_reach_the_deploy(
    orbstack_machines: MachineFactory, tmp_path: Path
) -> None:
    path = tmp_path / "deploy.py"
    path.write_text(
        "from pyinfra import host\n"
        "from pyinfra.operations import server\n"
        "words = [*sorted(host.groups), host.data.get('a'), host.data.get('b')]\n"
        "server.shell(name=' '.join(map(str, words)), commands='true')\n"
    )

    def function() -> None:
        words = [*sorted(host.groups), host.data.get("a"), host.data.get("b")]
        server.shell(name=" ".join(map(str, words)), commands="true")

    with orbstack_machines(groups={"web-1": {"a": 1, "b": 2}}, data={"b": [3]}) as machine:
        for what in (path, function):
            (name,) = machine.apply(what).changed
            assert "web-1" in name
            assert name.endswith(" 1 [3]")


def test_data_that_cannot_be_written_to_a_file_is_rejected(
    orbstack_machines: MachineFactory, tmp_path: Path
) -> None:
    path = tmp_path / "deploy.py"
    path.write_text("")
    with (
        orbstack_machines(data={"where": Path("/x")}) as machine,
        pytest.raises(TypeError, match="only plain values"),
    ):
        machine.apply(path)


def test_user_and_name_of_a_machine(orbstack_machines: MachineFactory) -> None:
    with orbstack_machines("db", user="alice") as machine:
        assert machine.name.startswith("db-")
        assert machine.run("whoami").stdout == "alice\n"


# Ignored failures, steps that run every time ----------------------------------------------------

IGNORING = """
from pyinfra.operations import server
server.shell(name="Allowed", commands="echo hopeless >&2; false", _ignore_errors=True)
server.shell(name="After", commands="true")
"""


@pytest.mark.parametrize("how", ["file", "function"])
def test_an_ignored_error_is_not_a_failure(machine: Machine, tmp_path: Path, how: str) -> None:
    (tmp_path / "deploy.py").write_text(IGNORING)

    def function() -> None:
        exec(IGNORING, {})  # noqa: S102

    result = machine.apply(tmp_path / "deploy.py" if how == "file" else function)
    assert result.ok
    assert (result.changed, result.failed, result.ignored) == (["After"], [], ["Allowed"])
    allowed, after = result.steps
    assert (allowed.ignored, allowed.failed, allowed.changed) == (True, False, False)
    assert (after.ignored, after.failed, after.changed) == (False, False, True)
    assert "hopeless" in allowed.output


@deploy("Site")
def site(path: str) -> None:
    server.shell(name="Reload", commands="true")
    files.directory(name="Make it", path=path)


@pytest.mark.long
def test_steps_that_run_every_time(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "deploy.py").write_text(
        "from pyinfra.operations import server\n"
        "server.shell(name='Reload', commands='true')\n"
        "server.shell(name='Always', commands='true')\n"
    )
    for names in (["Site | Reload"], ["Reload"]):
        result = machine.assert_idempotent(site, "/tmp/site", but=names)
        assert result.changed == ["Site | Reload"]
    with pytest.raises(AssertionError, match=r"changed \['Site \| Reload'\]"):
        machine.assert_idempotent(site, "/tmp/site")
    with pytest.raises(AssertionError, match=r"changed \['Always'\]"):
        machine.assert_idempotent(tmp_path / "deploy.py", but=["Reload"])
    machine.assert_idempotent(tmp_path / "deploy.py", but=["Reload", "Always"])
    with pytest.raises(
        ValueError, match=r"has no operation 'Relaod'; use one of \['Always', 'Reload'\]"
    ):
        machine.assert_idempotent(tmp_path / "deploy.py", but=["Relaod"])
    with pytest.raises(TypeError, match="a list of names, not 'Reload'"):
        machine.assert_idempotent(tmp_path / "deploy.py", but="Reload")


def test_how_an_inventory_host_is_reached(machine: Machine) -> None:
    assert machine.ip4 == machine.engine.client.info(machine.name).ip4
    assert machine.domain == f"{machine.name}.orb.local"
