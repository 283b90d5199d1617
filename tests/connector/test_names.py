"""Plain names, `@orbstack/plain/NAME`, and what `--limit` does with names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyinfra.api import Config, Inventory, State
from pyinfra.api.exceptions import ConnectError, InventoryError

from pyinfra_orbstack import cli
from pyinfra_orbstack.connector import OrbStackConnector
from pyinfra_orbstack.inventory import list_machines
from pyinfra_orbstack.orbctl import Orbctl
from pyinfra_orbstack.targets import parse

from ..conftest import Machines
from ..containers import Containers
from .conftest import Run

Write = Callable[[str], str]

DEPLOY = """
from pyinfra import host, inventory
from pyinfra.operations import server
assert inventory.get_host(host.name).groups == host.groups
assert type(host.name) is str
there = f"{host.data.vm_name} {host.data.get('own')} {host.data.get('of_web')}"
server.shell(name=f"{host.name}: {there}", commands=f"test $(hostname) = {host.name}")
"""


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(text: str) -> str:
        (tmp_path / "inventory.py").write_text(text)
        return "inventory.py"

    return written


def reached(stderr: str) -> set[str]:
    words = (line.split() for line in stderr.splitlines())
    return {one[0].strip("[]") for one in words if one[1:] == ["Connected"]}


@pytest.mark.smoke
def test_a_plain_name_is_the_name_of_the_machine(pair: tuple[str, str], pyinfra: Run) -> None:
    done = pyinfra(f"@orbstack/plain/{pair[0]}", "exec", "--", "hostname")
    assert done.returncode == 0, done.stderr
    assert f"[{pair[0]}] {pair[0]}" in done.stderr


@pytest.mark.smoke
def test_groups_and_data_of_a_plain_name(
    pair: tuple[str, str], pyinfra: Run, write: Write, tmp_path: Path
) -> None:
    """No data leads to another machine."""
    own = {"own": 1, "vm_name": pair[1], "vm_id": "1", "name": pair[1], "meaning": pair[1]}
    write(f"web = [('@orbstack/plain/{pair[0]}', {own!r})]\n")
    (tmp_path / "group_data").mkdir()
    (tmp_path / "group_data" / "web.py").write_text("of_web = 2\n")
    (tmp_path / "deploy.py").write_text(DEPLOY)
    done = pyinfra("inventory.py", "deploy.py")
    assert done.returncode == 0, done.stderr
    assert f"{pair[0]}: {pair[1]} 1 2" in done.stderr


@pytest.mark.smoke
@pytest.mark.parametrize("limit", ["NAM?", "@orbstack/plain/NAME"])
def test_limit_takes_both_names(
    pair: tuple[str, str], pyinfra: Run, write: Write, limit: str
) -> None:
    write(f"web = ['@orbstack/plain/{pair[0]}']\nother = ['@local']\n")
    limit = limit.replace("NAM?", f"{pair[0][:-1]}[{pair[0][-1]}]").replace("NAME", pair[0])
    done = pyinfra("inventory.py", "--limit", limit, "exec", "--", "hostname")
    assert done.returncode == 0, done.stderr
    assert reached(done.stderr) == {pair[0]}


@pytest.mark.smoke
def test_a_limit_without_a_match_tells_what_matches(
    pair: tuple[str, str], pyinfra: Run, write: Write
) -> None:
    write(f"web = ['@local', '@orbstack/{pair[0]}', '@orbstack/{pair[1]}']\n")
    done = pyinfra("inventory.py", "--limit", pair[0], "exec", "--", "hostname")
    assert (done.returncode, reached(done.stderr)) == (0, set())
    assert done.stderr.count("--limit and --exclude leave no host: ") == 1
    assert f"whole names such as @orbstack/{pair[0]}\n" in done.stderr


def test_patterns_and_all_running_machines(pair: tuple[str, str]) -> None:
    def names(name: str) -> set[str]:
        return {host for host, _, _ in OrbStackConnector.make_names_data(name)}

    assert names(f"plain/{pair[0].rpartition('-')[0]}-*") >= set(pair)
    assert pair[0] in names("plain")
    assert pair[1] not in names("plain")
    assert names("plain/no-such-*") == {"@orbstack/plain/no-such-*"}


@pytest.mark.parametrize("other", ["NAME", ("NAME", {"x": 1}), "@orbstack/plain/docker/NAME"])
@pytest.mark.parametrize("last", [False, True])
def test_two_hosts_of_the_same_name_are_refused(
    pair: tuple[str, str], other: str | tuple[str, dict[str, int]], last: bool
) -> None:
    """pyinfra would make one of both, and configure a server as if it were the machine."""
    named = (pair[0], other[1]) if isinstance(other, tuple) else other.replace("NAME", pair[0])
    hosts: list[Any] = [f"@orbstack/plain/{pair[0]}", named]
    names = hosts[::-1] if last else hosts
    with pytest.raises(InventoryError, match=f"two hosts are called '{pair[0]}': ") as caught:
        Inventory((names, {}))
    assert f"machine '{pair[0]}'" in str(caught.value)
    assert "use @orbstack/" in str(caught.value)


@pytest.mark.smoke
def test_a_server_of_the_same_name_is_one_line(
    pair: tuple[str, str], pyinfra: Run, write: Write
) -> None:
    write(f"web = ['@orbstack/plain/{pair[0][:-1]}*']\nlive = [('{pair[0]}', {{'x': 1}})]\n")
    done = pyinfra("inventory.py", "exec", "--", "hostname")
    assert (done.returncode, reached(done.stderr)) == (1, set())
    assert f"two hosts are called '{pair[0]}': " in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_the_same_machine_twice_is_one_host(pair: tuple[str, str]) -> None:
    plain = f"@orbstack/plain/{pair[0]}"
    assert pair[0] in Inventory(([plain, f"{plain[:-1]}[0-9]", plain], {})).hosts


@pytest.mark.parametrize("name", ["@orbstack/NAME", "docker/NAME", "NAME/", "../NAME"])
def test_a_plain_name_cannot_be_another_host(pair: tuple[str, str], name: str) -> None:
    inventory = Inventory(([f"@orbstack/plain/{name.replace('NAME', pair[0])}"], {}))
    State(inventory, Config())
    (host,) = inventory
    with pytest.raises(ConnectError):
        host.connect(show_errors=False, raise_exceptions=True)


def test_a_machine_called_plain(machines: Machines, client: Orbctl) -> None:
    if any(machine.name == "plain" for machine in client.machines()):
        pytest.skip("there is a machine called plain")
    machines.engine.create("plain", ["create", "ubuntu", "plain"])
    list_machines.cache.clear()
    try:
        with pytest.raises(InventoryError, match="use @orbstack/plain/plain for that one"):
            list(OrbStackConnector.make_names_data("plain"))
        assert [one[0] for one in OrbStackConnector.make_names_data("plain/plain")] == ["plain"]
    finally:
        client.delete("plain", client.info("plain").id)


def test_a_container_with_a_plain_name(
    containers: Containers, small_image: str, pyinfra: Run, write: Write
) -> None:
    name = containers.run(small_image)
    write(f"web = ['@orbstack/plain/docker/{name}', '@orbstack/plain/docker/{name[:-1]}*']\n")
    done = pyinfra("inventory.py", "--limit", name, "exec", "--", "true")
    assert (done.returncode, reached(done.stderr)) == (0, {name}), done.stderr


@pytest.mark.parametrize("name", ["web", "docker/web"])
def test_a_plain_name_says_what_it_means(name: str) -> None:
    named = parse(f"@orbstack/plain/{name}")
    assert named is not None
    assert (named.called, named.written) == ("web", f"@orbstack/plain/{name}")
    assert parse(named.called) == named
    assert parse(str(named.called)) is None


@pytest.mark.long
def test_verbs_of_a_project(
    pair: tuple[str, str],
    machines: Machines,
    client: Orbctl,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Hosts that run, hosts that do not, limits, batches, and deleting what a deploy created."""
    made = machines.new_name()
    image = {"orbstack_image": "ubuntu"}
    (tmp_path / "inventories").mkdir()
    (tmp_path / "inventories" / "local.py").write_text(
        f"web = ['@orbstack/plain/{pair[0]}', '@orbstack/plain/{pair[1]}']\n"
        f"db = [('@orbstack/plain/{made}', {image!r})]\n"
    )
    (tmp_path / "deploy.py").write_text(
        "from pyinfra import host\nfrom pyinfra.operations import server\n"
        "server.shell(name='Say', commands=f'test $(hostname) = {host.name}')\n"
    )
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", "local"]) == 0
    printed = capfd.readouterr()
    assert f"{made} would be created, then" in printed.out
    assert f"{pair[1]} would be started, then" in printed.out
    assert reached(printed.err) == {pair[0]}
    assert cli.main(["drift", f"--limit={pair[0]}", "local"]) == 2
    assert capfd.readouterr().out == f"{pair[0]}: Say\n"
    assert cli.main(["plan", "--limit=nothing", "local"]) == 1
    line = capfd.readouterr().err
    assert "use groups: @orbstack, db, local, orbstack, orbstack_" in line
    assert line.endswith(f"or hosts: {pair[0]}, {pair[1]}, {made}\n")
    words = ["--serial=1", f"--limit={pair[0]},@orbstack/plain/{made}", "local"]
    assert cli.main(["deploy", *words]) == 0
    machine = machines.own(made)
    printed = capfd.readouterr()
    assert f"deploying to {pair[0]}\n" in printed.out
    assert reached(printed.err) == {pair[0], made}
    assert cli.main(["destroy", "--yes", "local"]) == 0
    assert capfd.readouterr().out == f"deleted: {made}\n"
    assert machine.id not in json.dumps([one.id for one in client.machines()])
