"""What only machines that boot have: services, and a network of their own."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from tests.contract.conftest import IMAGE, Made
from tests.contract.program import Answer, Program

pytestmark = pytest.mark.boot

#: For the simulator; OrbStack's machines always boot.
BOOTS = {"ORBCTL_SIMULATOR_INIT": "image", "ORBCTL_SIMULATOR_IMAGES": "none"}
LISTEN = (
    "use Socket; socket(S, AF_INET, SOCK_STREAM, 0); bind(S, sockaddr_in(8000, INADDR_ANY));"
    "listen(S, 5); sleep 100"
)


def create(orb: Program, made: Made, *flags: str) -> str:
    name = made.name()
    answer = orb("create", *flags, IMAGE, name, env=BOOTS, timeout=280)
    assert answer.code == 0, answer
    return made.own(name)


@pytest.fixture(scope="session")
def booted(orb: Program, made: Made) -> str:
    return create(orb, made)


def as_root(orb: Program, machine: str, script: str) -> Answer:
    return orb("run", "-m", machine, "-u", "root", "-w", "/", "sh", "-c", script)


@pytest.mark.fact("conflict")
def test_init(orb: Program, booted: str) -> None:
    """The machine boots as part of `create`, and systemd is its first process."""
    assert as_root(orb, booted, "cat /proc/1/comm").text == "systemd\n"
    assert as_root(orb, booted, "systemctl is-system-running --wait").text == "running\n"


@pytest.mark.fact("inferred")
def test_services_at_start(orb: Program, booted: str) -> None:
    """Enabled services run after `restart`."""
    unit = "[Service]\nType=oneshot\nExecStart=touch /run/started\n"
    unit += "[Install]\nWantedBy=multi-user.target\n"
    script = f"printf '{unit}' >/etc/systemd/system/own.service && systemctl enable own"
    assert as_root(orb, booted, script).code == 0
    assert as_root(orb, booted, "test -e /run/started").code == 1
    assert orb("restart", booted).code == 0
    assert (
        as_root(orb, booted, "systemctl is-system-running --wait; test -e /run/started").code == 0
    )


@pytest.mark.fact("inferred")
def test_addresses_answer(orb: Program, booted: str) -> None:
    """`info` prints the machine's own addresses, which the host can reach."""
    info = orb("info", booted, "-f", "json").json
    shown = as_root(orb, booted, "ip -o addr show scope global").text
    assert f" {info['ip4']}/" in shown
    assert f" {info['ip6']}/" in shown
    assert as_root(orb, booted, f"systemd-run -q --unit=listen perl -e '{LISTEN}'").code == 0
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection((info["ip4"], 8000), timeout=5).close()
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.mark.fact("inferred")
def test_names(orb: Program, made: Made, booted: str) -> None:
    """`NAME.orb.local` is the machine, also from other machines."""
    ip4 = orb("info", booted, "-f", "json").json["ip4"]
    other = create(orb, made)
    for machine in (booted, other):
        shown = as_root(orb, machine, f"getent ahostsv4 {booted}.orb.local").text
        assert shown.split()[0] == ip4
    assert as_root(orb, other, "getent hosts host.orb.internal").code == 0


@pytest.mark.fact("documented")
def test_an_isolated_network_keeps_internet_access(orb: Program, made: Made, booted: str) -> None:
    """`--isolate-network` cuts off other machines."""
    if not orb("version").text.startswith(("Version: 2.1", "Version: 2.2")):
        pytest.skip("isolated machines came with OrbStack 2.1")
    alone = create(orb, made, "--isolated", "--isolate-network")
    ip4 = orb("info", booted, "-f", "json").json["ip4"]
    assert as_root(orb, alone, f"ping -c1 -W2 {ip4}").code != 0
    assert as_root(orb, alone, "ip route show default").text.startswith("default via")


@pytest.mark.fact("inferred")
def test_reboot(orb: Program, booted: str) -> None:
    """`reboot` in a machine boots it again; its files are kept."""
    as_root(orb, booted, "touch /run/before /root/kept; reboot")
    deadline = time.monotonic() + 60
    while as_root(orb, booted, "test ! -e /run/before && test -e /root/kept").code:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert orb("info", booted, "-f", "json").json["record"]["state"] == "running"


@pytest.mark.fact("documented")
def test_cloud_init(orb: Program, made: Made, tmp_path: Path) -> None:
    """`--user-data` is for cloud-init, which `create` need not wait for."""
    (tmp_path / "data").write_text("#cloud-config\nruncmd:\n  - echo done >/root/ran\n")
    name = create(orb, made, "--user-data", str(tmp_path / "data"))
    assert orb("info", name, "-f", "json").json["record"]["image"]["variant"] == "cloud"
    waited = as_root(orb, name, "cloud-init status --wait")
    assert waited.text.endswith("status: done\n"), waited
    assert as_root(orb, name, "cat /root/ran").text == "done\n"
