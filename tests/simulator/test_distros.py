"""Images of several distributions, built from their own archives, and booted."""

from __future__ import annotations

import os
import re

import pytest

from tests.simulator.conftest import Booted, wait_for

pytestmark = [pytest.mark.boot, pytest.mark.timeout(1800)]

#: What `create` prints if this host cannot reach the archive or download its keys.
NOT_AVAILABLE = re.compile(
    r"not built: (.*(not known|cannot download|refused|timed out|not found: install))"
)
COMMANDS = [
    ("systemctl is-system-running", "running"),
    ("systemctl --failed --quiet; echo none", "none"),
    ("hostnamectl status", "Static hostname: "),
    ("timedatectl status", "Time zone: "),
    ("loginctl list-users && echo ok", "ok"),
    ("logger -t test hello; journalctl --sync; journalctl -t test -o cat", "hello"),
    ("systemd-run --wait --pipe -q -p PrivateTmp=yes sh -c 'ls -A /tmp; echo ok'", "^ok$"),
    ("systemd-run --wait --pipe -q -p ProtectSystem=strict sh -c 'touch /usr/x; echo $?'", "[^0]$"),
    ("systemd-run --wait --pipe -q -p DynamicUser=yes id -u", r"^6\d{4}$"),
    ("ping -c 1 -W 5 host.orb.internal", " 0% packet loss"),
    ("getent hosts $(hostname).orb.local", r"^\S+ +\S+\.orb\.local"),
    ("sysctl -w net.core.somaxconn=1234", "1234"),
    ("apt-get update -q 2>&1 | tail -n 1", "Reading package lists"),
]


@pytest.mark.parametrize("image", ["debian:trixie", "ubuntu:noble"])
def test_distribution_boots(booted: Booted, image: str) -> None:
    """Its own systemd reports no failures, at first and after a reboot."""
    distro, version = image.split(":")
    made = booted("create", image, version, timeout=500)
    reason = NOT_AVAILABLE.search(made.err.decode())
    if reason and not (os.environ.get("CI") and distro == "debian"):
        pytest.skip(f"{image}: {reason[1]}")
    assert made.code == 0, made
    os_release = booted.root_in(version, ". /etc/os-release; echo $ID:$VERSION_CODENAME")
    assert os_release.text == f"{image}\n"
    for command, shows in COMMANDS:
        answer = booted.root_in(version, command)
        assert re.search(shows, answer.out.decode().strip(), re.MULTILINE), (command, answer)
    init = booted.pids(version)[0]
    booted.root_in(version, "touch /root/kept; reboot")
    wait_for(lambda: booted.pids(version)[0] != init and booted.state(version) == "running")
    again = booted.root_in(version, "ls /root; systemctl is-system-running")
    assert again.text == "kept\nrunning\n"
    assert booted("delete", version).code == 0
