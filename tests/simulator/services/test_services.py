"""A deploy of services that need each other, as shown in docs/services.md."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from orbctl_simulator.runstate import RunState
from tests.contract.conftest import ROOT
from tests.simulator.conftest import Booted, wait_for

pytestmark = [pytest.mark.boot, pytest.mark.timeout(1800)]

DEPLOY = Path(__file__).parent / "deploy"
PAGE = ROOT / "docs" / "services.md"


def apply(booted: Booted) -> tuple[int, int, str]:
    """The numbers of operations that changed something and that did not, and pyinfra's output."""
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
def test_services(booted: Booted, archive: None) -> None:
    """Only the first run changes something; neither the second nor one after a restart does."""
    os.environ.pop("http_proxy", None)
    changed, _, _ = apply(booted)
    assert changed > 15
    address = booted("info", "web", "-f", "json").json["ip4"]
    wait_for(lambda: answers(address))
    with pytest.raises(OSError, match="timed out"):
        fetch(address, 80)  # nginx also listens there: the firewall drops it
    assert booted.root_in("web", "sysctl -n net.core.somaxconn").text == "1024\n"
    state = RunState.read(str(booted.directory("web") / "pid"))
    assert state
    assert state.boots == 2  # the deploy reboots it
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


def test_firewalls_and_tracing(booted: Booted, own_box: str, archive: None) -> None:
    """Tools other than nft work as the machine's root, and their rules survive `restart`."""
    install = "apt-get update && apt-get install -y ufw iptables strace nginx-light"
    installed = booted.root_in(own_box, f"export DEBIAN_FRONTEND=noninteractive; {install}")
    assert installed.code == 0, installed
    address = booted("info", own_box, "-f", "json").json["ip4"]
    assert "nginx" in fetch(address, 80)
    assert booted.root_in(own_box, "ufw --force enable").code == 0
    with pytest.raises(OSError, match="timed out"):
        fetch(address, 80)
    assert booted.root_in(own_box, "ufw allow 80/tcp").code == 0
    assert booted("restart", own_box).code == 0
    assert booted.root_in(own_box, "ufw status").text.startswith("Status: active\n")
    assert "nginx" in fetch(address, 80)
    for program in ("iptables", "iptables-legacy", "ip6tables"):
        change = f"{program} -A INPUT -p tcp --dport 99 -j DROP && {program} -S INPUT"
        assert "--dport 99 -j DROP" in booted.root_in(own_box, change).text, program
    traced = booted.root_in(own_box, "strace -f -e trace=openat sh -c true")
    assert b"exited with 0" in traced.err
    limits = [booted.root_in(own_box, f"grep nice /proc/{who}/limits").text for who in (1, "self")]
    assert limits[0] == limits[1]
    with open("/proc/self/status") as status:  # a host without sys_resource cannot raise limits
        rights = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))
    if rights >> 24 & 1:
        assert booted.root_in(own_box, "nice -n -10 nice; ulimit -Hl").text == "-10\nunlimited\n"
    assert b'("nginx",pid=' in booted.root_in(own_box, "ss -ltnp").out
    assert booted.root_in(own_box, "ip link add bridge0 type bridge").code == 0


@pytest.mark.parametrize("name", sorted(path.name for path in DEPLOY.iterdir() if path.is_file()))
def test_page_shows_the_deploy(name: str) -> None:
    assert f"\n{(DEPLOY / name).read_text()}```" in PAGE.read_text()
