"""What a machine looks like from inside."""

from __future__ import annotations

import socket

import pytest

from tests.contract.conftest import Made
from tests.contract.program import Program


@pytest.fixture
def user(orb: Program, machine: str) -> str:
    return str(orb("info", machine, "-f", "json").json["record"]["config"]["default_username"])


@pytest.mark.fact("recorded")
def test_user(orb: Program, machine: str, user: str) -> None:
    """The default user has uid 501 and a private home."""
    assert orb("run", "-m", machine, "id", "-u").text == "501\n"
    shown = orb("run", "-m", machine, "stat", "-c", "%a %U", f"/home/{user}")
    assert shown.text == f"700 {user}\n"


@pytest.mark.fact("recorded")
def test_groups(orb: Program, machine: str) -> None:
    """It is in the administrators' group and in `orbstack`, gid 67278."""
    groups = orb("run", "-m", machine, "id", "-Gn").text.split()
    assert {"sudo", "wheel"} & set(groups)
    assert "orbstack" in groups
    assert "67278" in orb("run", "-m", machine, "id", "-G").text.split()


@pytest.mark.fact("inferred")
def test_sudo(orb: Program, machine: str, user: str) -> None:
    """Sudo without a password, and without output on stderr."""
    answer = orb("run", "-m", machine, "sudo", "-n", "sh", "-c", "id -u; echo $SUDO_USER")
    assert answer.text.split() == ["0", user]
    assert answer.err == b""


@pytest.mark.fact("inferred")
def test_home_is_filled(orb: Program, machine: str) -> None:
    """The home was created from the distribution's skeleton, and belongs to the user."""
    assert (
        orb("run", "-m", machine, "sh", "-c", "test -O ~/.bashrc || test -O ~/.profile").code == 0
    )


@pytest.mark.fact("inferred")
def test_hostname(orb: Program, machine: str) -> None:
    """The machine's name is its hostname, and resolves."""
    assert orb("run", "-m", machine, "hostname").text.strip() == machine
    assert orb("run", "-m", machine, "cat", "/etc/hostname").text.strip() == machine
    assert orb("run", "-m", machine, "getent", "hosts", machine).code == 0


@pytest.mark.fact("recorded")
def test_one_kernel(orb: Program, machine: str, made: Made) -> None:
    """One kernel and one VM for all machines."""
    other = made.clone(machine)
    for script in ("uname -r", "cat /proc/sys/kernel/random/boot_id"):
        words = ["sh", "-c", script]
        assert orb("run", "-m", machine, *words).text == orb("run", "-m", other, *words).text


@pytest.mark.fact("inferred")
def test_architecture(orb: Program, machine: str) -> None:
    """`image.arch` is the machine's architecture."""
    arch = orb("info", machine, "-f", "json").json["record"]["image"]["arch"]
    names = {"x86_64": "amd64", "aarch64": "arm64"}
    assert names[orb("run", "-m", machine, "uname", "-m").text.strip()] == arch


@pytest.mark.fact("recorded")
def test_guest_tools(orb: Program, machine: str) -> None:
    """OrbStack's own files are in ``/opt/orbstack-guest``."""
    assert orb("run", "-m", machine, "test", "-d", "/opt/orbstack-guest").code == 0


@pytest.mark.fact("recorded")
def test_host_by_name(orb: Program, machine: str) -> None:
    """`host.orb.internal` reaches a service on the host's loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        script = f"exec 3<>/dev/tcp/host.orb.internal/{port} && read -r line <&3 && echo $line"
        call = orb.started("run", "-m", machine, "bash", "-c", script)
        server.settimeout(30)
        connection, _ = server.accept()
        connection.sendall(b"hello\n")
        out, _ = call.communicate(timeout=30)
        connection.close()
    assert out == b"hello\n"


@pytest.mark.fact("documented")
def test_isolated_machine_has_no_mac(orb: Program, isolated: str) -> None:
    """Isolated: `mac` stays on PATH but fails; there is no ``/mnt/mac``."""
    answer = orb("run", "-m", isolated, "mac", "true")
    assert answer.code != 0
    assert b"dial" in answer.err
    assert orb("run", "-m", isolated, "test", "-e", "/mnt/mac").code != 0


@pytest.mark.fact("documented")
def test_record_of_an_isolated_machine(orb: Program, isolated: str) -> None:
    """The record shows the isolation; the SSH agent is not forwarded by default."""
    config = orb("info", isolated, "-f", "json").json["record"]["config"]
    assert config["isolated"] is True
    assert config["forward_ssh_agent"] is False


@pytest.mark.fact("recorded")
def test_root_in_an_isolated_machine(orb: Program, isolated: str) -> None:
    """Root: ``-u root`` also works there."""
    assert orb("run", "-m", isolated, "-u", "root", "id", "-u").text == "0\n"
