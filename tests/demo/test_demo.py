"""`make demo` and what it rejects, in a partial copy of the checkout."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyinfra_orbstack.orbctl import Orbctl, create_args

ROOT = Path(__file__).parent.parent.parent
MACHINE, DATABASE = "demo-web-1", "demo-db-1"

#: Operations on both machines, without those that need an init, which these machines lack.
COUNT = 16

pytestmark = pytest.mark.skipif(sys.version_info < (3, 10), reason="copier needs Python 3.10")


def copy_checkout(folder: Path) -> Path:
    ignore = shutil.ignore_patterns("__pycache__", ".*_cache")
    for name in ("scripts", "template"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    shutil.copy(ROOT / "copier.yml", folder)
    return folder


@pytest.fixture
def checkout(tmp_path: Path, client: Orbctl) -> Iterator[Path]:
    folder = copy_checkout(tmp_path / "checkout")
    yield folder
    demo(folder, "--clean")
    assert not {MACHINE, DATABASE} & {machine.name for machine in client.machines()}


@pytest.fixture
def stranger(client: Orbctl) -> Iterator[str]:
    """A machine that the demo did not create, with the name it would use; returns its id."""
    client.create(create_args(MACHINE, "ubuntu"))
    machine_id = client.info(MACHINE).id
    yield machine_id
    assert client.delete(MACHINE, machine_id), "the demo has deleted it"


def demo(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, str(folder / "scripts" / "demo.py"), *args]
    env = {**os.environ, "XDG_STATE_HOME": str(folder / "state")}
    return subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=env)


def test_demo_deploys_and_can_be_repeated_and_removed(checkout: Path, client: Orbctl) -> None:
    first = demo(checkout)
    assert first.returncode == 0, first.stdout + first.stderr
    said = re.search(r"The first run changed (\d+) things, the second none of (\d+)", first.stdout)
    assert said, first.stdout
    changed, count = map(int, said.groups())
    assert count == COUNT
    # The host, and so its machines, may already have some of the three packages.
    assert COUNT - 4 <= changed <= COUNT
    lines = first.stdout.splitlines()
    look = lines[lines.index("What it wrote, read in the machine:") + 1]
    shown = subprocess.run(look, shell=True, cwd="/", capture_output=True, text=True)  # noqa: S602
    assert "AllowTcpForwarding no" in shown.stderr

    (checkout / "demo" / "mine.txt").write_text("kept")
    again = demo(checkout)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"The first run changed 0 things, the second none of {COUNT}." in again.stdout
    assert (checkout / "demo" / "mine.txt").exists()

    shell = lines[lines.index("A shell in the machine:") + 1]
    assert MACHINE in shlex.split(shell)
    assert {MACHINE, DATABASE} <= {machine.name for machine in client.machines()}
    removed = demo(checkout, "--clean")
    deleted = [f"deleted machine {name}" for name in (DATABASE, MACHINE)]
    assert sorted(removed.stdout.splitlines()) == deleted
    assert not {MACHINE, DATABASE} & {machine.name for machine in client.machines()}


def test_an_existing_machine_of_that_name_is_rejected_and_unchanged(
    tmp_path: Path, stranger: str, client: Orbctl
) -> None:
    checkout = copy_checkout(tmp_path / "checkout")
    before = client.call("run", "-m", MACHINE, "sudo", "find", "/etc", "-newer", "/etc/hostname")
    refused = demo(checkout)
    assert refused.returncode == 1
    assert refused.stderr == (
        f"there already is a machine {MACHINE!r} that this demo did not create: "
        "rename or delete it, then try again\n"
    )
    assert not (checkout / "demo").exists()
    after = client.call("run", "-m", MACHINE, "sudo", "find", "/etc", "-newer", "/etc/hostname")
    assert before.stdout == after.stdout
    assert demo(checkout, "--clean").stdout == ""
    assert client.info(MACHINE).id == stranger


def test_a_replaced_machine_is_not_owned(checkout: Path, client: Orbctl) -> None:
    assert demo(checkout).returncode == 0
    assert client.delete(MACHINE, client.info(MACHINE).id)
    client.create(create_args(MACHINE, "ubuntu"))
    machine_id = client.info(MACHINE).id
    try:
        assert "that this demo did not create" in demo(checkout).stderr
        assert demo(checkout, "--clean").stdout == f"deleted machine {DATABASE}\n"
        assert client.info(MACHINE).id == machine_id
    finally:
        client.delete(MACHINE, machine_id)


def test_a_directory_that_the_demo_did_not_create_is_rejected(checkout: Path) -> None:
    (checkout / "demo").mkdir()
    refused = demo(checkout)
    assert refused.returncode == 1
    assert "was not created by this demo: move it away first" in refused.stderr
    assert list((checkout / "demo").iterdir()) == []


def test_a_missing_orbctl_is_a_one_line_error(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("PYINFRA_ORBSTACK_ORBCTL", "/no/such/orbctl")
        refused = demo(checkout)
    assert refused.returncode == 1
    assert refused.stderr == (
        "PYINFRA_ORBSTACK_ORBCTL is set to '/no/such/orbctl', but no such executable was found: "
        "correct or unset it\n"
    )
    assert not (checkout / "demo").exists()
