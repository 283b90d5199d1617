"""A deploy of services that need each other, as docs/services.md shows it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.contract.conftest import ROOT
from tests.simulator.conftest import Booted, wait_for

pytestmark = [pytest.mark.boot, pytest.mark.timeout(1800)]

DEPLOY = Path(__file__).parent / "deploy"
PAGE = ROOT / "docs" / "services.md"


def apply(booted: Booted) -> tuple[int, int, str]:
    """How many operations changed something, how many did not, and what pyinfra printed."""
    beside = Path(sys.executable).with_name("orbctl-simulator")
    env = {**booted.program.env, "PYINFRA_ORBSTACK_ORBCTL": str(beside)}
    command = [sys.executable, "-m", "pyinfra", "-y", "inventory.py", "deploy.py"]
    done = subprocess.run(command, cwd=DEPLOY, env=env, capture_output=True, text=True)
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    total = re.search(r"Grand total +(\d+) +(\d+|-) +(\d+|-) +(\d+|-)", told)
    assert total, told
    _, changed, failed, unchanged = (int(word.replace("-", "0")) for word in total.groups())
    assert failed == 0, told
    return changed, unchanged, told


def fetch(address: str, port: int = 8080) -> str:
    with urllib.request.urlopen(f"http://{address}:{port}/", timeout=5) as answer:
        return str(answer.read().decode())


def answers(address: str) -> bool:
    try:
        return fetch(address) == "shop\n"
    except OSError:
        return False


@pytest.mark.skipif(sys.version_info < (3, 10), reason="the newest pyinfra needs Python 3.10")
def test_services(booted: Booted) -> None:
    """The first run changes, the second nothing, and so does the third after a restart."""
    os.environ.pop("http_proxy", None)
    changed, _, _ = apply(booted)
    assert changed > 15
    address = booted("info", "web", "-f", "json").json["ip4"]
    wait_for(lambda: answers(address))
    with pytest.raises(OSError, match="timed out"):
        fetch(address, 80)  # nginx listens there, too: the firewall drops it
    assert booted.root_in("web", "sysctl -n net.core.somaxconn").text == "1024\n"
    assert float(booted.root_in("web", "cut -d' ' -f1 /proc/uptime").text) < changed * 60
    changed, unchanged, told = apply(booted)
    assert changed == 0, told
    assert unchanged > 15
    assert booted("restart", "web", "db").code == 0
    changed, _, told = apply(booted)
    assert changed == 0, told
    wait_for(lambda: answers(address))
    begun = time.monotonic()
    assert booted.root_in("web", "systemctl is-system-running --wait").text == "running\n"
    assert time.monotonic() - begun < 60


@pytest.mark.parametrize("name", sorted(path.name for path in DEPLOY.iterdir() if path.is_file()))
def test_page_shows_the_deploy(name: str) -> None:
    assert f"\n{(DEPLOY / name).read_text()}```" in PAGE.read_text()
