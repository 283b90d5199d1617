"""A function gets the same data as a deploy file, and group names are never paths."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyinfra import host
from pyinfra.operations import server

from pyinfra_orbstack import inventory
from pyinfra_orbstack.testing import ContainerFactory, Machine, MachineFactory, results
from pyinfra_orbstack.testing.runs import Groups, Member, Run, check_groups

from ..containers import Containers


@pytest.fixture(scope="module")
def machine(orbstack_machines: MachineFactory) -> Iterator[Machine]:
    with orbstack_machines("runs") as machine:
        yield machine


FILES = {
    "config.py": "from pyinfra import config\nfrom values import PORT\nconfig.SHELL = 'bash'\n",
    "values.py": "PORT = 8080\n",
    "group_data/all.py": (
        "from pathlib import Path\nimport os.path\nfrom pyinfra import inventory\n"
        "_sudo = True\na = b = c = d = e = 'all'\nhosts = [host.name for host in inventory]\n"
    ),
    "group_data/web.py": "from values import PORT\nport = PORT\nb = c = d = e = 'web'\n",
    "group_data/other.py": "a = 'of another group'\n",
    "group_data/orbstack_running.py": "of_connector = 1\n",
    "group_data/listed.py": (
        "__all__ = ['listed', '_env']\nlisted, left = 1, 2\n_env = {'X': 'y'}\n"
    ),
    "group_data/machine.py": "of_kind = 1\n",
    "group_data/notes.txt": "not Python\n",
}
GROUPS = {"web": {"c": "given", "d": "given"}, "listed": {}, "Web": {"case": 1}, "größe": {"x": 1}}
#: The data that a deploy sees, as a file and as the body of a function.
DEPLOY = """
import json
from pyinfra import config, host
from pyinfra.facts.server import Command, User
from pyinfra.operations import server
seen = {"data": host.data.dict(), "groups": host.groups, "user": host.get_fact(User)}
seen["env"] = host.get_fact(Command, "echo $X $0")
seen["shell"] = config.SHELL
server.shell(name=json.dumps(seen, sort_keys=True, default=str), commands="id -u")
"""


def see() -> None:
    exec(DEPLOY, {})  # noqa: S102


@pytest.fixture
def run(machine: Machine, tmp_path: Path) -> Run:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return Run(tmp_path, [Member(machine.host, "machine", GROUPS, {"d": "own"})])


def seen(steps: list[results.Step]) -> dict[str, Any]:
    (step,) = steps
    told: dict[str, Any] = json.loads(step.name)
    # Older versions of pyinfra also treat these as data.
    for name in ("Path", "os", "inventory", "PORT", "left"):
        told["data"].pop(name, None)
    return {**told, "uid": step.output}


def test_a_function_gets_the_same_data_as_a_file(run: Run, machine: Machine) -> None:
    path = run.root / "deploy.py"
    path.write_text(DEPLOY)
    steps, ok, log = run.file(path, machine.environment(), 100)
    assert ok, log
    of_file = seen(steps)
    before = list(sys.path)
    steps, ok, log = run.function(see, (), {})
    assert ok, log
    of_function = seen(steps)
    assert sys.path == before
    assert of_function == of_file

    data = of_file["data"]
    assert [data[name] for name in "abcde"] == ["all", "web", "given", "own", "web"]
    assert (data["port"], data["of_connector"], data["of_kind"], data["case"]) == (8080, 1, 1, 1)
    assert data["hosts"] == [machine.host]
    assert data["listed"] == 1
    assert (of_file["user"], of_file["uid"], of_file["shell"]) == ("root", "0", "bash")
    assert of_file["env"] == "y bash"
    assert {"machine", "web", "Web", "größe", "orbstack_running"} <= set(of_file["groups"])
    assert "other" not in of_file["groups"]


def test_a_machine_newer_than_the_listing_is_found(
    orbstack_machines: MachineFactory, machine: Machine
) -> None:
    inventory.list_machines()
    with orbstack_machines("young") as young:
        (step,) = young.apply(lambda: server.shell(name=host.data.vm_id, commands="true")).steps
        assert step.name == young.id


def test_imported_or_private_names_are_not_data(run: Run) -> None:
    _, (host,) = run.connect()
    assert not {"Path", "os", "inventory", "PORT", "left"} & set(host.data.dict())
    host.disconnect()


def test_data_of_all_hosts_can_be_passed(run: Run, machine: Machine) -> None:
    groups = {"all": {"a": "given"}, "machine": {}}
    given = Run(run.root, [Member(machine.host, "machine", groups, {"d": "own"})])
    path = run.root / "deploy.py"
    path.write_text(DEPLOY)
    of_file = seen(given.file(path, machine.environment(), 100)[0])
    assert of_file == seen(given.function(see, (), {})[0])
    assert [of_file["data"][name] for name in "abd"] == ["given", "all", "own"]


def test_a_deploy_file_takes_no_arguments(machine: Machine, tmp_path: Path) -> None:
    path = tmp_path / "deploy.py"
    path.write_text("from pyinfra.operations import server\nserver.shell('touch /tmp/ran')\n")
    with pytest.raises(TypeError, match=r"takes no arguments, .*deploy.py got typo$"):
        machine.apply(path, typo=1)
    with pytest.raises(TypeError, match=r"takes no arguments, .*deploy.py got 'x', _sudo$"):
        machine.assert_idempotent(path, "x", _sudo=True)
    assert machine.run("ls /tmp/ran", check=False).status != 0


# Names of groups -------------------------------------------------------------------------------

BAD = [
    "",
    "..",
    "a..b",
    "../x",
    "a/b",
    "/etc/x",
    "a\0b",
    "a\nb",
    "a\n",
    "-x",
    "_x",
    ".x",
    "@",
    "@/x",
]
BAD += ["a b", "self", "names_data", "override_data", "x" * 201, "\udc80"]
NAMES = st.text("ab_-.@/\0\n é", max_size=8) | st.text(max_size=8)


def refused(make: Callable[..., object]) -> None:
    for name in BAD:
        for groups in ([name], {name: {"x": 1}}):
            with pytest.raises(ValueError, match="cannot be the name of a group") as caught:
                make(groups=groups)
            assert len(str(caught.value).splitlines()) == 1


def test_an_invalid_name_is_rejected_before_a_machine_is_created(
    orbstack_machines: MachineFactory, machine: Machine
) -> None:
    before = {one.name for one in machine.engine.client.machines()}
    refused(orbstack_machines)
    assert {one.name for one in machine.engine.client.machines()} == before


def test_an_invalid_name_is_rejected_before_a_container_is_created(
    containers: Containers, orbstack_containers: ContainerFactory
) -> None:
    before = containers.client.containers()
    refused(lambda groups: orbstack_containers("no-such-image", groups=groups))
    assert containers.client.containers() == before


@pytest.mark.parametrize("groups", ["web", b"web", [1], [None], {1: {}}, [("web", {})]], ids=repr)
def test_content_that_is_not_text_is_rejected(groups: Any) -> None:
    with pytest.raises(TypeError, match=r"groups must be a list|name of a group must be text"):
        check_groups(groups)


@given(st.lists(NAMES, min_size=1, max_size=3))
def test_a_group_name_is_always_one_file_name(names: list[str]) -> None:
    try:
        groups: Groups = check_groups(names)
    except ValueError:
        return
    for name in groups:
        path = Path("/folder", f"{name}.py")
        assert (str(path.parent), path.stem) == ("/folder", name)
        assert not name.startswith(("_", ".", "-"))
        assert name.isprintable()
