"""What `@orbstack` and its names mean in an inventory, through the pyinfra command."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from pyinfra.api import Config, Inventory, State
from pyinfra.api.exceptions import ConnectError
from pyinfra.api.host import Host

from pyinfra_orbstack import orbctl
from pyinfra_orbstack.connector import OrbStackConnector
from pyinfra_orbstack.inventory import list_machines
from pyinfra_orbstack.orbctl import Orbctl, Record

from .conftest import Run


def hosts(name: str | None = None) -> dict[str, tuple[dict[str, Any], list[str]]]:
    return {host: (data, groups) for host, data, groups in OrbStackConnector.make_names_data(name)}


@pytest.mark.smoke
def test_the_bare_name_selects_every_running_machine(pair: tuple[str, str]) -> None:
    found = hosts()
    assert f"@orbstack/{pair[0]}" in found
    assert f"@orbstack/{pair[1]}" not in found


@pytest.mark.smoke
def test_a_star_selects_every_machine(pair: tuple[str, str]) -> None:
    assert {f"@orbstack/{name}" for name in pair} <= set(hosts("*"))


@pytest.mark.smoke
def test_a_pattern_selects_matching_machines(pair: tuple[str, str]) -> None:
    assert list(hosts(f"*{pair[1][-9:]}")) == [f"@orbstack/{pair[1]}"]
    assert list(hosts(pair[1][:-1] + "?"))


@pytest.mark.smoke
def test_data_and_groups(pair: tuple[str, str], client: Orbctl) -> None:
    machine = client.info(pair[0])
    data, groups = hosts(pair[0])[f"@orbstack/{pair[0]}"]
    assert data == {
        "orbstack_vm": True,
        "vm_name": machine.name,
        "vm_id": machine.id,
        "vm_status": "running",
        "vm_distro": machine.distro,
        "vm_version": machine.version,
        "vm_arch": machine.arch,
        "vm_username": machine.username,
    }
    assert set(groups) == {
        "@orbstack",
        "orbstack",
        "orbstack_running",
        f"orbstack_{machine.arch}",
        f"orbstack_{machine.distro}",
    }
    assert "orbstack_stopped" in hosts(pair[1])[f"@orbstack/{pair[1]}"][1]


REACHED = """
from pyinfra import host, inventory
from pyinfra.operations import server

for other in inventory:
    found = other.data.get("orbstack_ip4"), other.data.get("orbstack_domain")
    server.shell(name=f"{other.name} is at {found}", commands="true")
"""


@pytest.mark.long
def test_how_a_machine_is_reached(
    pair: tuple[str, str], machines: Any, client: Orbctl, pyinfra: Run, tmp_path: Path
) -> None:
    """Including machines that connecting created or started, or that the run excludes."""
    made, started, left = machines.new_name(), machines.create(), machines.create()
    client.stop(started)
    off = machines.create()
    client.stop(off)
    hosts = [f"@orbstack/{name}" for name in (pair[0], started, left, off)]
    (tmp_path / "inventory.py").write_text(
        f"web = {hosts!r} + [('@orbstack/{made}', {{'orbstack_image': 'ubuntu'}})]\n"
        f"named = [('@orbstack/{started}', {{'orbstack_domain': 'own.example'}})]\n"
        "servers = [('@local', {'orbstack_ip4': '192.0.2.1', 'orbstack_domain': 'x.example'})]\n"
    )
    (tmp_path / "deploy.py").write_text(REACHED)
    limit = [word for name in (pair[0], started, made) for word in ("--limit", f"@orbstack/{name}")]
    done = pyinfra(*limit, "inventory.py", "deploy.py")
    machines.own(made)
    assert done.returncode == 0, done.stderr
    for name in (pair[0], started, left, made):
        ip4 = client.info(name).ip4
        assert ip4
        domain = "own.example" if name == started else f"{name}.orb.local"
        assert f"@orbstack/{name} is at ('{ip4}', '{domain}')" in done.stderr
    assert f"@orbstack/{off} is at (None, None)" in done.stderr
    assert "@local is at ('192.0.2.1', 'x.example')" in done.stderr
    assert not client.info(off).running


@pytest.mark.long
def test_addresses_are_not_queried_unless_used(
    pair: tuple[str, str], simulated: bool, pyinfra: Run, tmp_path: Path
) -> None:
    if not simulated:
        pytest.skip("only the simulator writes down its calls")
    log = tmp_path / "log"
    (tmp_path / "deploy.py").write_text(
        "from pyinfra import host\nassert host.data.orbstack_ip4 and host.data.orbstack_domain\n"
        "assert host.data.get('orbstack_ip6') is None\n"
    )
    done = pyinfra(f"@orbstack/{pair[0]}", "deploy.py", ORBCTL_SIMULATOR_LOG=str(log))
    assert done.returncode == 0, done.stderr
    assert sorted(called(log)) == ["info", "list"]


@pytest.mark.long
def test_a_failed_query_is_a_one_line_error(
    pair: tuple[str, str], pyinfra: Run, tmp_path: Path
) -> None:
    (tmp_path / "deploy.py").write_text(
        "import os\nfrom pyinfra import host\n"
        "os.environ['PYINFRA_ORBSTACK_ORBCTL'] = '/nowhere/orbctl'\nhost.data.orbstack_ip4\n"
    )
    done = pyinfra(f"@orbstack/{pair[0]}", "deploy.py")
    assert done.returncode == 1
    assert f"orbstack_ip4 of @orbstack/{pair[0]}: " in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_the_listing_is_read_once_and_its_data_is_not_shared(
    pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    machines = Orbctl.machines
    monkeypatch.setattr(Orbctl, "machines", lambda self: calls.append(1) or machines(self))
    first = hosts(pair[0])[f"@orbstack/{pair[0]}"][0]
    first["vm_name"] = "changed"
    assert hosts(pair[0])[f"@orbstack/{pair[0]}"][0]["vm_name"] == pair[0]
    assert len(calls) == 1


def called(log: Path) -> list[str]:
    """The calls that ask for something; a call that is killed at the end is not in the log."""
    calls = [json.loads(line)["argv"][1] for line in log.read_text().splitlines()]
    return [word for word in calls if word != "run"]


@pytest.mark.long
def test_a_machine_just_listed_is_not_queried_again(
    pair: tuple[str, str], pyinfra: Run, simulated: bool, tmp_path: Path
) -> None:
    if not simulated:
        pytest.skip("only the simulator writes down its calls")
    log = tmp_path / "log"
    names = [f"@orbstack/{pair[0]}", "exec", "--", "id"]
    assert pyinfra(*names, ORBCTL_SIMULATOR_LOG=str(log)).returncode == 0
    assert called(log) == ["list"]
    log.unlink()
    # A machine that may not be started must be known to run.
    forbidden = ["--data", "orbstack_start=False"]
    assert pyinfra(*forbidden, *names, ORBCTL_SIMULATOR_LOG=str(log)).returncode == 0
    assert called(log) == ["list", "info"]


def test_changes_since_the_listing(machines: Any, client: Orbctl) -> None:
    name = machines.create()

    def listed(**data: Any) -> Host:
        list_machines.cache.clear()
        inventory = Inventory(([(f"@orbstack/{name}", data)], {}))
        State(inventory, Config())
        return inventory.get_host(f"@orbstack/{name}")

    allowed, forbidden = listed(), listed(orbstack_start=False)
    client.stop(name)
    with pytest.raises(ConnectError, match="is stopped and may not be started now"):
        forbidden.connect(show_errors=False, raise_exceptions=True)
    assert not client.info(name).running
    allowed.connect(show_errors=False, raise_exceptions=True)
    assert client.info(name).running
    allowed.disconnect()
    gone = listed()
    client.delete(name, client.info(name).id)
    with pytest.raises(ConnectError, match=f"there is no machine '{name}'"):
        gone.connect(show_errors=False, raise_exceptions=True)


@pytest.mark.smoke
def test_an_unknown_machine_error_lists_the_existing_ones(
    pair: tuple[str, str], pyinfra: Run
) -> None:
    done = pyinfra("@orbstack/no-such-machine", "exec", "--", "id")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "no-such-machine]" in line]
    assert "there is no machine 'no-such-machine'" in line
    assert pair[0] in line
    assert "orbstack_image" in line
    assert "Traceback" not in done.stderr


@pytest.mark.smoke
def test_a_pattern_without_a_match(pair: tuple[str, str], pyinfra: Run) -> None:
    done = pyinfra("@orbstack/zz-*", "exec", "--", "id")
    assert done.returncode == 1
    assert "no OrbStack machine matches 'zz-*'" in done.stderr


def test_a_name_starting_with_a_dash(pyinfra: Run, tmp_path: Path) -> None:
    log = tmp_path / "log"
    done = pyinfra("@orbstack/-x", "exec", "--", "id", ORBCTL_SIMULATOR_LOG=str(log))
    assert done.returncode == 1
    assert "machine name '-x' must not begin with '-'" in done.stderr
    assert "Traceback" not in done.stderr
    if log.exists():
        assert set(called(log)) == {"list"}


def test_a_listing_that_is_not_json(pyinfra: Run, tmp_path: Path) -> None:
    fake = tmp_path / "orbctl"
    fake.write_text("#!/bin/sh\necho '<html>oops</html>'\n")
    fake.chmod(0o755)
    done = pyinfra("@orbstack", "exec", "--", "id", PYINFRA_ORBSTACK_ORBCTL=str(fake))
    assert done.returncode == 1
    assert "did not print JSON: '<html>oops</html>'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_stopped_machine_is_started(machines: Any, client: Orbctl, pyinfra: Run) -> None:
    name = machines.create()
    client.stop(name)
    assert pyinfra(f"@orbstack/{name}", "exec", "--", "true").returncode == 0
    assert client.info(name).running


def test_limit_takes_patterns(pair: tuple[str, str], pyinfra: Run, tmp_path: Path) -> None:
    (tmp_path / "inventory.py").write_text(f"web = ['@orbstack/{pair[0]}', '@local']\n")
    done = pyinfra("inventory.py", "--limit", "@orbstack/*", "exec", "--", "echo here")
    assert done.returncode == 0
    assert f"[@orbstack/{pair[0]}] here" in done.stderr
    assert "[@local]" not in done.stderr


@pytest.mark.long
@pytest.mark.smoke
def test_a_machine_declared_in_the_inventory_is_created(
    machines: Any, client: Orbctl, pyinfra: Run, tmp_path: Path
) -> None:
    name = machines.new_name()
    (tmp_path / "inventory.py").write_text(
        f"web = [('@orbstack/{name}', "
        "{'orbstack_image': 'ubuntu:noble', 'orbstack_create_user': 'carol'})]\n"
    )
    record = tmp_path / "record"
    planned = pyinfra("inventory.py", "exec", "--", "id", PYINFRA_ORBSTACK_PLAN="1")
    assert planned.returncode == 1
    assert f"orbctl create --user carol ubuntu:noble {name}" in planned.stderr
    assert name not in [machine.name for machine in client.machines()]

    done = pyinfra("inventory.py", "exec", "--", "id -un", PYINFRA_ORBSTACK_RECORD=str(record))
    machine = machines.own(name)
    assert done.returncode == 0, done.stderr
    assert f"[@orbstack/{name}] carol" in done.stderr
    assert Record(record).machines() == {name: machine.id}
    assert (machine.distro, machine.version, machine.username) == ("ubuntu", "noble", "carol")

    again = pyinfra("inventory.py", "exec", "--", "id", PYINFRA_ORBSTACK_RECORD=str(record))
    assert again.returncode == 0
    assert len(record.read_text().splitlines()) == 1

    client.stop(name)
    planned = pyinfra("inventory.py", "exec", "--", "id", PYINFRA_ORBSTACK_PLAN="1")
    assert f"orbctl start {name}" in planned.stderr
    assert not client.info(name).running


@pytest.mark.parametrize("key", ["orbstack_create", "orbstack_start"])
def test_creating_and_starting_can_be_forbidden(
    pair: tuple[str, str], machines: Any, client: Orbctl, pyinfra: Run, tmp_path: Path, key: str
) -> None:
    name = machines.new_name() if key == "orbstack_create" else pair[1]
    (tmp_path / "inventory.py").write_text(
        f"web = [('@orbstack/{name}', {{'orbstack_image': 'ubuntu', {key!r}: False}})]\n"
    )
    done = pyinfra("inventory.py", "exec", "--", "true")
    assert done.returncode == 1
    assert "may not be" in done.stderr
    assert not client.info(pair[1]).running


@pytest.mark.smoke
def test_group_data_by_the_connectors_groups(
    pair: tuple[str, str], client: Orbctl, pyinfra: Run, tmp_path: Path
) -> None:
    distro = client.info(pair[0]).distro
    (tmp_path / "inventory.py").write_text(f"web = ['@orbstack/{pair[0]}']\n")
    (tmp_path / "group_data").mkdir()
    (tmp_path / "group_data" / f"orbstack_{distro}.py").write_text("from_distro = 'one'\n")
    (tmp_path / "group_data" / "@orbstack.py").write_text("from_all = 'two'\n")
    (tmp_path / "deploy.py").write_text(
        "from pyinfra import host\nfrom pyinfra.operations import server\n"
        "server.shell(name='x', commands=[f'echo {host.data.from_distro} {host.data.from_all}'])\n"
    )
    done = pyinfra("-vvv", "inventory.py", "deploy.py")
    assert f"[@orbstack/{pair[0]}] one two" in done.stderr


def test_the_users_data_wins(pair: tuple[str, str], pyinfra: Run, tmp_path: Path) -> None:
    (tmp_path / "inventory.py").write_text(
        f"web = [('@orbstack/{pair[0]}', {{'orbstack_workdir': '/usr/lib'}})]\n"
    )
    done = pyinfra("inventory.py", "exec", "--", "pwd")
    assert f"[@orbstack/{pair[0]}] /usr/lib" in done.stderr


def test_a_missing_workdir_is_a_one_line_error(pair: tuple[str, str], pyinfra: Run) -> None:
    done = pyinfra(
        f"@orbstack/{pair[0]}",
        "--data",
        "orbstack_workdir=/no/such",
        "exec",
        "--",
        "pwd",
    )
    assert done.returncode == 1
    assert "there is no directory '/no/such'" in done.stderr


@pytest.mark.parametrize("how", ["data", "environment"])
def test_an_unknown_transport_is_a_one_line_error(
    pair: tuple[str, str], pyinfra: Run, how: str
) -> None:
    words = ["--data", "orbstack_transport=telepathy"] if how == "data" else []
    env = {} if how == "data" else {"PYINFRA_ORBSTACK_TRANSPORT": "telepathy"}
    done = pyinfra(f"@orbstack/{pair[0]}", *words, "exec", "--", "pwd", **env)
    assert done.returncode == 1
    assert "unknown transport 'telepathy'" in done.stderr
    assert "session or spawn" in done.stderr


@pytest.mark.parametrize(
    "data",
    ["'orbstack_cpus': []", "'orbstack_mounts': 'text'", "'orbstack_create': 'no'"],
)
def test_data_of_the_wrong_type_is_a_one_line_error(
    pair: tuple[str, str], pyinfra: Run, tmp_path: Path, data: str
) -> None:
    (tmp_path / "inventory.py").write_text(f"web = [('@orbstack/{pair[0]}', {{{data}}})]\n")
    done = pyinfra("inventory.py", "exec", "--", "true")
    assert done.returncode == 1
    assert data.split("'")[1] in done.stderr
    assert "Traceback" not in done.stderr


def test_stdout_stays_empty(pair: tuple[str, str], pyinfra: Run) -> None:
    """It belongs to `--json`."""
    for transport in ("session", "spawn"):
        done = pyinfra(
            "-vvv",
            f"@orbstack/{pair[0]}",
            "exec",
            "--",
            "echo out; echo err >&2",
            PYINFRA_ORBSTACK_TRANSPORT=transport,
        )
        assert done.stdout == ""
        assert f"[@orbstack/{pair[0]}] out" in done.stderr
        assert "err" in done.stderr


def test_orbctl_is_found_in_this_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("named", "path", "known"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "orbctl").write_text("#!/bin/sh\n")
        (tmp_path / place / "orbctl").chmod(0o755)
    monkeypatch.setattr(orbctl, "KNOWN_FOLDERS", (str(tmp_path / "known"),))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setenv(orbctl.COMMAND_VARIABLE, str(tmp_path / "named" / "orbctl"))
    for place in ("named", "path", "known"):
        assert orbctl.find() == str(tmp_path / place / "orbctl")
        shutil.rmtree(tmp_path / place)
        monkeypatch.delenv(orbctl.COMMAND_VARIABLE, raising=False)
    with pytest.raises(orbctl.OrbctlMissing):
        orbctl.find()


@pytest.mark.smoke
def test_the_entry_point_and_the_package_import_little() -> None:
    """pyinfra 3.2 loads connectors while its API is partly imported, in every run."""
    import subprocess

    code = (
        "import sys, pyinfra_orbstack.connector as c\n"
        "bad = [m for m in sys.modules if m.startswith(('pyinfra.operations', 'pyinfra.facts',"
        " 'pyinfra_cli', 'pyinfra_orbstack.facts', 'pyinfra_orbstack.operations',"
        " 'orbctl_simulator'))]\n"
        "import pyinfra_orbstack; print(bad, pyinfra_orbstack.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # pyinfra's own API imports facts; our package must not import more.
    assert "pyinfra_orbstack." not in done.stdout.split("]")[0]
    assert "pyinfra_cli" not in done.stdout
    assert done.stdout.split()[-1].count(".") == 2
