"""The connector and the operation wait for a real cloud-init, and report its failure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulator.conftest import IMAGE, Booted

pytestmark = [
    pytest.mark.boot,
    pytest.mark.timeout(1800),
    pytest.mark.usefixtures("archive"),  # cloud-init is installed into the image
]

WORKS = "#cloud-config\nruncmd:\n  - sleep 2; echo done >/root/ran\n"
FAILS = "#cloud-config\nruncmd:\n  - exit 3\n"
NAME = "cloudy"
RAN = "from pyinfra.operations import server\n"
RAN += "server.shell(commands='test -e /root/ran', _sudo=True)\n"


@pytest.fixture(params=["connect", "operation"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def deploy(
    booted: Booted, place: Path, kind: str, user_data: str
) -> subprocess.CompletedProcess[str]:
    """Create a machine, by connecting or with the operation, and check what cloud-init did."""
    (place / "user data").write_text(user_data)
    if kind == "connect":
        data = {"orbstack_image": IMAGE, "orbstack_cloud_init": str(place / "user data")}
        (place / "inventory.py").write_text(f"hosts = [('@orbstack/{NAME}', {data!r})]\n")
        (place / "deploy.py").write_text(RAN)
    else:
        (place / "inventory.py").write_text("hosts = ['@local']\n")
        call = (
            f"orbstack.machine({NAME!r}, image={IMAGE!r}, cloud_init={str(place / 'user data')!r})"
        )
        (place / "deploy.py").write_text(
            f"from pyinfra_orbstack.operations import orbstack\n{call}\n"
        )
    beside = Path(sys.executable).with_name("orbctl-simulator")
    env = {**os.environ, **booted.program.env, "PYINFRA_ORBSTACK_ORBCTL": str(beside)}
    command = [sys.executable, "-m", "pyinfra", "-y", "inventory.py", "deploy.py"]
    env.update(XDG_STATE_HOME=str(place / "state"))
    return subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=900)


def test_cloud_init_is_waited_for(booted: Booted, tmp_path: Path, kind: str) -> None:
    done = deploy(booted, tmp_path, kind, WORKS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert booted.root_in(NAME, "cat /root/ran").text == "done\n"
    again = deploy(booted, tmp_path, kind, WORKS)
    assert again.returncode == 0, again.stdout + again.stderr
    assert booted("delete", NAME).code == 0


def test_a_cloud_init_failure_fails_its_host(booted: Booted, tmp_path: Path, kind: str) -> None:
    done = deploy(booted, tmp_path, kind, FAILS)
    told = done.stdout + done.stderr
    assert done.returncode == 1, told
    assert "cloud-init failed" in told
    assert "status: error" in told
    assert "Traceback" not in told
    booted("delete", NAME)
    assert booted("info", NAME).code == 1
