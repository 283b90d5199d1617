"""LIMIT, SERIAL and ARGS: which hosts, how many at a time, and which options."""

from __future__ import annotations

import io
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyinfra_orbstack import cli, inventory_files
from pyinfra_orbstack.orbctl import Orbctl

from ..conftest import Machines

#: Fails on the machine that `broken` names, after writing its trace.
DEPLOY = """
from pyinfra import host
from pyinfra.operations import server
server.shell(name='First', commands='date +%s%N >/tmp/first')
server.shell(name='Second', commands='date +%s%N >/tmp/second')
if host.name.endswith(host.data.get('broken', '-')):
    server.shell(name='Break', commands='false')
"""


@pytest.fixture(scope="module")
def names(machines: Machines) -> list[str]:
    return [machines.create() for _ in range(3)]


@pytest.fixture
def folder(
    tmp_path: Path, names: list[str], client: Orbctl, monkeypatch: pytest.MonkeyPatch
) -> Path:
    for name in names:
        client.call("run", "-m", name, "sh", "-c", "rm -f /tmp/first /tmp/second")
    first, *others = [f"@orbstack/{name}" for name in names]
    (tmp_path / "inventories").mkdir()
    (tmp_path / "inventories" / "local.py").write_text(
        f"db = [{first!r}]\nweb = ({others!r}, {{'x': 1}})\n"
    )
    (tmp_path / "inventories" / "mixed.py").write_text(f"web = [{first!r}, 'server.example']\n")
    (tmp_path / "deploy.py").write_text(DEPLOY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("YES", raising=False)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    return tmp_path


def when(client: Orbctl, name: str, step: str) -> int:
    """When a machine ran a step; 0: it did not."""
    text = f"cat /tmp/{step} 2>/dev/null || echo 0"
    return int(client.call("run", "-m", name, "sh", "-c", text).stdout)


def reached(client: Orbctl, names: list[str]) -> list[int]:
    return [index for index, name in enumerate(names) if when(client, name, "first")]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("db", [0]),
        ("@orbstack/NAME2", [2]),
        ("@orbstack/NAME1,db", [0, 1]),
        ("*NAME1 web", [1, 2]),
        ("local", [0, 1, 2]),
    ],
)
def test_a_deploy_is_limited(
    folder: Path, names: list[str], client: Orbctl, limit: str, expected: list[int]
) -> None:
    for index, name in enumerate(names):
        limit = limit.replace(f"NAME{index}", name)
    assert cli.main(["deploy", f"--limit={limit}", "local"]) == 0
    assert reached(client, names) == expected


@pytest.mark.parametrize("verb", ["deploy", "plan", "drift"])
@pytest.mark.parametrize("limit", ["wbe", "db,wbe", "@orbstack/nothing-*", "", " ", ",", "$(id)"])
def test_a_limit_without_a_match_is_a_one_line_error(
    folder: Path,
    names: list[str],
    client: Orbctl,
    verb: str,
    limit: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert cli.main([verb, f"--limit={limit}", "local"]) == 1
    printed = capfd.readouterr()
    line = printed.err.rstrip("\n")
    assert "\n" not in line
    assert line.startswith("LIMIT")
    if limit.strip(" ,"):
        assert repr(limit.split(",")[-1]) in line
        assert "groups: @orbstack, db, local, " in line
        assert f"@orbstack/{names[2]}" in line
    assert reached(client, names) == []


@pytest.mark.long
def test_a_plan_and_drift_are_limited(
    folder: Path, names: list[str], client: Orbctl, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "--limit=web", "local"]) == 0
    # pyinfra pads the shorter names.
    said = " ".join(capfd.readouterr().err.split())
    assert [f"[@orbstack/{name}] Connected" in said for name in names] == [False, True, True]
    assert cli.main(["drift", "--limit=db", "local"]) == 2
    lines = capfd.readouterr().out.splitlines()
    assert lines == [f"@orbstack/{names[0]}: First", f"@orbstack/{names[0]}: Second"]
    # A stopped machine is checked only if it is selected.
    client.stop(names[1])
    try:
        assert cli.main(["plan", "--limit=db", "local"]) == 0
        assert "would be started" not in capfd.readouterr().out
        assert cli.main(["plan", f"--limit=*{names[1]}", "local"]) == 0
        assert f"{names[1]} would be started" in capfd.readouterr().out
    finally:
        client.start(names[1])
    assert reached(client, names) == []


def test_confirmation_covers_only_the_selected_hosts(
    folder: Path, names: list[str], client: Orbctl, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["deploy", "--limit=*.example", "mixed"]) == 1
    assert "stdin is not a terminal: confirm with YES=1" in capfd.readouterr().err
    assert cli.main(["deploy", "--limit=@orbstack", "mixed"]) == 0
    assert reached(client, names) == [0]


@pytest.mark.long
@pytest.mark.parametrize("size", [1, 2])
def test_a_rolling_deploy_runs_in_batches(
    folder: Path, names: list[str], client: Orbctl, size: int, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["deploy", f"--serial={size}", "local"]) == 0
    batches = [names[first : first + size] for first in range(0, 3, size)]
    for earlier, later in zip(batches, batches[1:]):
        ended = max(when(client, name, "second") for name in earlier)
        assert 0 < ended < min(when(client, name, "first") for name in later)
    told = [f"deploying to {', '.join(f'@orbstack/{n}' for n in batch)}" for batch in batches]
    assert capfd.readouterr().out.splitlines() == told


def test_a_rolling_deploy_stops_at_the_first_failure(
    folder: Path, names: list[str], client: Orbctl, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = ["deploy", "--serial=1", f"--args=--data broken={names[1]}", "local"]
    assert cli.main(argv) == 1
    assert reached(client, names) == [0, 1]
    last = capfd.readouterr().err.splitlines()[-1]
    assert last == f"stopped at a failure; not deployed to: @orbstack/{names[2]}"


@pytest.mark.long
def test_a_limited_deploy_can_be_rolling(folder: Path, names: list[str], client: Orbctl) -> None:
    assert cli.main(["deploy", "--limit=web", "--serial=1", "local"]) == 0
    assert reached(client, names) == [1, 2]


@pytest.mark.parametrize("serial", ["0", "-1", "x", "1.5", "$(id)", " 1", "1 ", "٣", "9999999"])
def test_an_invalid_number_is_a_one_line_error(
    folder: Path, serial: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["deploy", f"--serial={serial}", "local"]) == 1
    assert capfd.readouterr().err == (
        f"SERIAL must be a number of hosts, such as 1, not {serial!r}\n"
    )


@pytest.mark.long
def test_arguments_reach_pyinfra_unchanged(
    folder: Path, names: list[str], client: Orbctl, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "deploy.py").write_text(
        "from pyinfra import host\nfrom pyinfra.operations import server\n"
        "print(host.data.said)\nserver.shell(name='Say', commands='echo of deploy')\n"
    )
    odd = "a 'b' $(touch pwned) `touch pwned`; touch pwned #"
    words = subprocess.list2cmdline([f"said={odd}"])
    for verb in ("plan", "drift", "deploy"):
        cli.main([verb, "--limit=db", f"--args=-vvv --data {words}", "local"])
        printed = capfd.readouterr()
        assert odd in printed.out + printed.err or verb == "drift"
        said = " ".join(printed.err.split())
        assert (f"[@orbstack/{names[0]}] of deploy" in said) is (verb == "deploy")
    assert not list(folder.glob("pwned"))


@pytest.mark.parametrize("verb", ["deploy", "plan", "drift"])
@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("'", "cannot split ARGS into words: No closing quotation; quote it as in a shell"),
        ("--limit db", "ARGS cannot contain --limit: use LIMIT"),
        ("-v --limit=db", "ARGS cannot contain --limit: use LIMIT"),
        ("--yes", "ARGS cannot contain --yes: use YES=1"),
        ("-vvy", "ARGS cannot contain -y: use YES=1"),
    ],
)
def test_invalid_arguments_are_rejected(
    folder: Path, verb: str, words: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([verb, f"--args={words}", "local"]) == 1
    assert capfd.readouterr().err == f"{reason}\n"


@pytest.mark.usefixtures("folder")
def test_no_environment_variable_hides_drift(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYINFRA_YES", "1")
    assert cli.main(["drift", "--limit=db", "local"]) == 2
    assert cli.main(["plan", "--limit=db", "local"]) == 0
    assert "Skipping change detection" not in capfd.readouterr().err


# Reading files ---------------------------------------------------------------------------------


def test_hosts_have_the_same_data_as_in_pyinfra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("inventories/group_data", "group_data"):
        (tmp_path / folder).mkdir(parents=True)
    path = Path("inventories", "staging.py")
    path.write_text(
        "from typing import Any\nfrom shared import PORT\n"
        "web = [('a', {'own': 1}), 'b']\ndb: list[Any] = (['c'], {'of_db': 2})\n_no = ['d']\n"
    )
    (tmp_path / "shared.py").write_text("PORT = 3\n")
    (tmp_path / "group_data" / "all.py").write_text(
        "import os\nfrom shared import PORT\nall_ = 3\n"
    )
    (tmp_path / "group_data" / "staging.py").write_text("stage = 4\nown = 5\n")
    (tmp_path / "inventories" / "group_data" / "web.py").write_text("stage = 6\n")
    found = {host.name: host for host in inventory_files.read(path)}
    assert sorted(found) == ["a", "b", "c"]
    keys = ("own", "of_db", "all_", "stage", "os", "PORT")
    values = {name: [host.data.get(key) for key in keys] for name, host in found.items()}
    assert values["a"][0] == 1
    assert values["b"] == [5, None, 3, values["b"][3], None, None]
    assert values["c"] == [5, 2, 3, 4, None, None]
    pyinfra = subprocess.run(
        [str(Path(sys.executable).with_name("pyinfra")), str(path), "debug-inventory"],
        capture_output=True,
        text=True,
    )
    assert f'"stage": {values["b"][3]}' in pyinfra.stdout + pyinfra.stderr
    (tmp_path / "group_data" / "web.py").write_text("1 / 0\n")
    with pytest.raises(inventory_files.CommandError, match=r"group_data/web.py:1: "):
        inventory_files.read(path)


@given(host=st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_a_limit_pattern_matches_only_its_host(host: str) -> None:
    _, pattern = inventory_files.limit_words([host])
    assert fnmatch(host, pattern)
    if host[0].isalnum():
        assert pattern != host
    if not host.startswith("@"):
        assert not fnmatch(f"{host}x", pattern)
