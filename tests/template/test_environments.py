"""docs/environments.md of a rendered project: more environments, some hosts, one after another."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pyinfra_orbstack import inventory_files
from tests.template.conftest import ROOT, Render
from tests.template.project import Project

pytestmark = pytest.mark.template

PAGE = (ROOT / "template" / "docs" / "environments.md").read_text(encoding="utf-8")
STAGING, DATA, HOSTS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
#: The files on the page, by name.
FILES = {re.match(r"# (\S+)\n", text)[1]: text.split("\n", 1)[1] for text in (STAGING, DATA)}  # type: ignore[index]


def with_staging(project: Project, inventory: str = FILES["inventories/staging.py"]) -> Project:
    for name, text in FILES.items():
        (project.path / name).write_text(inventory if name.startswith("inv") else text)
    return project


def inventories_pass(project: Project) -> bool:
    """Whether its own test of inventories passes."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/test_inventories.py",
        ],
        cwd=project.path,
        env={**os.environ, "PYTHONPATH": str(project.path / "src")},
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    if done.returncode:
        assert "test_every_inventory_has_the_same_groups" in done.stdout
    return done.returncode == 0


def groups_of(project: Project, inventory: str) -> str:
    """An inventory with the same groups as another one, without hosts."""
    read = inventory_files.execute(project.path / "inventories" / f"{inventory}.py")
    names = [name for name, value in read.items() if isinstance(value, list) and name[0] != "_"]
    return "".join(f"{name}: list[str] = []\n" for name in names)


def test_any_number_of_inventories_has_the_same_groups(render: Render) -> None:
    project = render()
    same = groups_of(project, "production")
    assert inventories_pass(with_staging(project, same))
    (project.path / "inventories" / "qa.py").write_text(same)
    assert inventories_pass(project)
    # One group too few, or too many, in one of them.
    for wrong in (same.split("\n", 1)[1], f"{same}other: list[str] = []\n"):
        (project.path / "inventories" / "qa.py").write_text(wrong)
        assert not inventories_pass(project)


@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("index")
def test_staging_from_the_page_passes_the_linter(render: Render) -> None:
    project = render()
    assert inventories_pass(with_staging(project))
    project.make("lint")


def test_data_of_one_host_and_of_an_environment(
    render: Render, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = with_staging(render(), HOSTS)
    monkeypatch.chdir(project.path)
    first, second = inventory_files.read(Path("inventories", "staging.py"))
    assert first.data.get("ssh_tcp_forwarding") is False
    assert second.data.get("ssh_tcp_forwarding") is True
    assert first.data.get("operator_name") == "ops"
    project.write("inventories/production.py", "]] = []", "]] = [('a', {})]")
    (production,) = inventory_files.read(Path("inventories", "production.py"))
    for host in (first, production):
        assert host.data.get("ssh_known_hosts_file") == "known_hosts"
        assert host.data.get("ssh_strict_host_key_checking") == "yes"


ODD = "a 'b' \"c\" $(touch pwned) $$x `touch pwned`; #"


#: The variables of a target, and the first arguments of `pyinfra-orbstack`.
GIVEN: list[tuple[str, dict[str, str], list[str]]] = [
    ("deploy", {}, ["deploy", "--serial=", "--args=", "--", "local"]),
    ("plan", {}, ["plan", "--args=", "--", "local"]),
    ("drift", {}, ["drift", "--args=", "--", "local"]),
    ("trust", {}, ["trust", "--", "local"]),
    (
        "deploy",
        {"LIMIT": ODD, "SERIAL": ODD, "ARGS": ODD, "INVENTORY": ODD},
        ["deploy", f"--limit={ODD}", f"--serial={ODD}", f"--args={ODD}", "--", ODD],
    ),
    ("plan", {"LIMIT": ODD, "ARGS": ODD}, ["plan", f"--limit={ODD}", f"--args={ODD}"]),
    ("drift", {"LIMIT": ODD, "ARGS": ODD}, ["drift", f"--limit={ODD}", f"--args={ODD}"]),
    ("trust", {"LIMIT": ODD}, ["trust", f"--limit={ODD}", "--", "local"]),
    # A script's unset variable must not select every host.
    ("deploy", {"LIMIT": ""}, ["deploy", "--limit=", "--serial="]),
]


def test_make_passes_its_variables_on(render: Render, tmp_path: Path) -> None:
    project = render()
    (tmp_path / "bin").mkdir()
    uv = tmp_path / "bin" / "uv"
    uv.write_text(f"#!/bin/sh\nprintf '%s\\0' \"$@\" >{tmp_path}/words\n")
    uv.chmod(0o755)
    ours = ("MAKEFLAGS", "MAKELEVEL", "LIMIT", "SERIAL", "ARGS", "INVENTORY")
    env = {name: value for name, value in os.environ.items() if name not in ours}
    env["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{env['PATH']}"
    for target, variables, words in GIVEN:
        for given, more in (
            ([f"{name}={value}" for name, value in variables.items()], {}),
            ([], variables),
        ):
            argv = ["make", target, *given]
            subprocess.run(argv, cwd=project.path, env={**env, **more}, check=True)
            *passed, _ = (tmp_path / "words").read_text().split("\0")
            start = passed.index("pyinfra-orbstack") + 1
            assert passed[start:][: len(words)] == words
    assert not (project.path / "pwned").exists()


def test_pyinfra_does_not_notice_a_failure_without_waiting(tmp_path: Path) -> None:
    """That is why a rolling deploy does not use `--no-wait`; the page says so."""
    (tmp_path / "deploy.py").write_text(
        "from pyinfra.operations import server\nserver.shell(name='Break', commands='false')\n"
    )
    for words, status in (((), 1), (("--no-wait",), 0)):
        argv = ["pyinfra", "-y", *words, "@local", "deploy.py"]
        done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
