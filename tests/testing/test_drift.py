"""`pyinfra-orbstack drift`: its exit status, what it lists, and what it never shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyinfra_orbstack import cli, plans
from pyinfra_orbstack.orbctl import Orbctl

from ..conftest import Machines

SECRET = "correct-horse-battery"
DEPLOY = f"""
from io import StringIO
from pyinfra import host
from pyinfra.api import deploy
from pyinfra.operations import files, server

@deploy("App")
def app():
    text = StringIO("{SECRET}\\n")
    token = files.put(name="Token", src=text, dest="/tmp/token", mode="600")
    server.shell(name="Reload", commands="true {SECRET}", _if=token.did_change)
    files.line(path="/tmp/lines", line="password={SECRET}")

print('{{"plan": "the deploy prints, too"}}')
app()
"""

pytestmark = pytest.mark.skipif(
    sys.version_info < (3, 10), reason="the pyinfra that tells its plan needs Python 3.10"
)


@pytest.fixture
def names(machines: Machines) -> list[str]:
    return [machines.create(), machines.create()]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str]) -> Path:
    (tmp_path / "inventories").mkdir()
    hosts = [f"@orbstack/{name}" for name in names]
    (tmp_path / "inventories" / "local.py").write_text(f"web = {hosts!r}\n")
    (tmp_path / "deploy.py").write_text(DEPLOY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def drift(*words: str) -> tuple[int, list[str], str]:
    """The exit status, the lines on stdout, and the whole output."""
    command = Path(sys.executable).with_name("pyinfra-orbstack")
    done = subprocess.run(
        [str(command), "drift", *(words or ("local",))],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert SECRET not in done.stdout + done.stderr
    return done.returncode, done.stdout.splitlines(), done.stdout + done.stderr


def test_drift_lists_only_what_changed(folder: Path, names: list[str], client: Orbctl) -> None:
    everything = sorted(
        f"@orbstack/{name}: App | {what}" for name in names for what in ("Token", "files.line")
    )
    status, lines, _ = drift()
    assert (status, sorted(lines)) == (2, everything)
    assert cli.main(["deploy", "local"]) == 0
    assert drift()[:2] == (0, ["local: nothing would change"])

    # One of them was changed by hand.
    client.call("run", "-m", names[1], "sh", "-c", "echo other >>/tmp/token")
    assert drift()[:2] == (2, [f"@orbstack/{names[1]}: App | Token"])
    # Drift only read it.
    said = client.call("run", "-m", names[1], "cat", "/tmp/token").stdout
    assert said == f"{SECRET}\nother\n".encode()


@pytest.mark.long
def test_a_machine_that_is_not_running_is_drift(
    folder: Path, names: list[str], machines: Machines, client: Orbctl
) -> None:
    assert cli.main(["deploy", "local"]) == 0
    client.stop(names[0])
    status, lines, _ = drift()
    assert (status, lines) == (2, [f"{names[0]} would be started, then everything applied to it"])
    assert not client.info(names[0]).running

    new = machines.new_name()
    hosts = [f"@orbstack/{names[1]}", (f"@orbstack/{new}", {"orbstack_image": "ubuntu"})]
    (folder / "inventories" / "local.py").write_text(f"web = {hosts!r}\n")
    status, lines, _ = drift()
    assert (status, lines) == (2, [f"{new} would be created, then everything applied to it"])
    assert new not in [machine.name for machine in client.machines()]


@pytest.mark.long
def test_an_error_is_not_drift(folder: Path, names: list[str], machines: Machines) -> None:
    # One host cannot be reached; differences on the others are still listed.
    missing = machines.new_name()
    hosts = [f"@orbstack/{names[0]}", f"@orbstack/{missing}"]
    (folder / "inventories" / "some.py").write_text(f"web = {hosts!r}\n")
    status, lines, said = drift("some")
    assert status == 1
    assert f"{missing}: there is no machine" in said
    assert f"@orbstack/{names[0]}: App | Token" in lines
    (folder / "inventories" / "servers.py").write_text(
        "web = [('127.0.0.1', {'ssh_port': 9, 'ssh_connect_timeout': 2})]\n"
    )
    status, lines, _ = drift("servers")
    assert (status, lines) == (1, [])

    for text in ("1 / 0\n", "not Python\n", "import sys\nsys.exit(2)\n"):
        (folder / "deploy.py").write_text(text)
        status, lines, said = drift()
        assert (status, lines) == (1, []), said
    (folder / "deploy.py").unlink()
    assert drift()[:2] == (1, [])


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("words", [["nowhere"], ["--", "-x"], ["--nonsense"], ["local", "more"]])
def test_mistakes_are_not_drift(words: list[str]) -> None:
    status, lines, said = drift(*words)
    assert (status, lines) == (1, []), said


def test_mistakes_in_other_commands_are_unchanged() -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan"])
    assert ended.value.code == 2
    assert cli.main(["drift"]) == 1


# pyinfra's reports -----------------------------------------------------------------------------


def operation(name: str, *hosts: str, maybe: tuple[str, ...] = ()) -> dict[str, object]:
    return {
        "op_hash": "x",
        "name": f"{name} (src={SECRET})",
        "names": [name],
        "args": [f"src={SECRET}"],
        "hosts_with_change": list(hosts),
        "hosts_with_conditional_change": list(maybe),
    }


def test_hosts_and_names_are_reported() -> None:
    plan = [operation("A\n b", "x", "y"), operation("C", maybe=("x",)), operation("D")]
    printed = f"loading\n{{}}\n[1]\n{json.dumps({'plan': plan, 'results': None})}\nbye\n"
    assert plans.changes(printed) == ["x: A b", "y: A b"]
    assert plans.changes(json.dumps({"plan": []})) == []
    for nothing in ("", "{}", "null", '{"results": null}'):
        with pytest.raises(plans.NoPlan, match="printed no plan"):
            plans.changes(nothing)


def test_a_pyinfra_that_is_too_old_is_an_error() -> None:
    for good in ("3.9", "3.9.1", "3.10.0", "4.0", "3.10rc1"):
        plans.check_version(good)
    for old in ("3.8.2", "3.2", "2.9"):
        with pytest.raises(plans.NoPlan, match=rf"requires pyinfra 3.9 or later: .* {old}$"):
            plans.check_version(old)


def test_make_fails_when_something_would_change(tmp_path: Path) -> None:
    """The target passes on the command's exit status, as far as make can."""
    text = (Path(__file__).parents[2] / "template" / "Makefile.jinja").read_text()
    (recipe,) = [line for line in text.splitlines() if "$(PROJECT) drift " in line]
    (tmp_path / "Makefile").write_text(f"PROJECT = sh -c 'exit $$CODE' x\ndrift:\n{recipe}\n")
    for code, made in ((0, 0), (1, 2), (2, 2)):
        env = {**os.environ, "CODE": str(code), "INVENTORY": "local"}
        env.pop("MAKEFLAGS", None)
        done = subprocess.run(["make", "drift"], cwd=tmp_path, env=env, capture_output=True)
        assert done.returncode == made
