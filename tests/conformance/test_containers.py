"""Features of containers: bare images, an engine, and all kinds of hosts in one inventory."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
import pytest
from pyinfra.api.exceptions import ConnectError

from pyinfra_orbstack import docker, inventory, orbctl
from pyinfra_orbstack.connector import OrbStackConnector
from pyinfra_orbstack.orbctl import Orbctl

from ..containers import ROOT, Containers
from ..loopback import free_port
from ..packages import install
from .conftest import Guest, Remote

PYINFRA = os.path.join(os.path.dirname(sys.executable), "pyinfra")
Connect = Callable[..., Remote]


@pytest.fixture(autouse=True)
def _fresh_listing() -> None:
    inventory.list_containers.cache.clear()


@pytest.mark.parametrize("transport", ["session", "spawn"])
def test_an_image_with_only_busybox(
    bare: str, containers: Containers, connect: Connect, transport: str
) -> None:
    remote = connect(f"docker/{bare}", orbstack_transport=transport)
    missing = "command -v setsid sudo sha256sum cksum; id -u; pwd; echo err >&2; exit 3"
    assert remote.exits(missing, 3) == (True, ["0", "/root"], ["err"])
    for size in (0, 10, 200_000):
        data = os.urandom(size)
        remote.put(io.BytesIO(data), "/root/file")
        arrived = io.BytesIO()
        remote.get("/root/file", arrived)
        assert arrived.getvalue() == data
    assert "yes" in remote.out("test -t 0 && echo yes", _get_pty=True)
    mark = f"7{time.monotonic_ns() % 10**8}"
    with pytest.raises(TimeoutError):
        remote.run(f"sleep {mark} & (sleep {mark}; true) | cat", _timeout=1)
    guest = Guest(containers.client, bare)
    assert guest.running(f"sleep {mark}") == []
    assert guest.leftovers() == []


def test_an_image_without_a_shell(bare: str, containers: Containers, connect: Connect) -> None:
    containers.call("exec", bare, "rm", "/bin/sh")
    with pytest.raises(ConnectError, match=r"container '.*' does not answer: its image has no sh"):
        connect(f"docker/{bare}")


def test_user_and_directory(shared_container: str, connect: Connect) -> None:
    remote = connect(shared_container, orbstack_user="alice", orbstack_workdir="/usr/lib")
    assert remote.run("id -un; pwd").out == ["alice", "/usr/lib"]
    with pytest.raises(ConnectError, match="no directory"):
        connect(shared_container, orbstack_workdir="/no such")
    with pytest.raises(ConnectError, match="must not begin with '-'"):
        connect(shared_container, orbstack_user="-x")


def test_a_named_container_is_started(
    bare: str, containers: Containers, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    containers.call("stop", "-t", "1", bare)
    monkeypatch.setenv(orbctl.PLAN_VARIABLE, "1")
    with pytest.raises(ConnectError, match=f"to start it, run: docker start {bare}"):
        connect(f"docker/{bare}")
    monkeypatch.delenv(orbctl.PLAN_VARIABLE)
    with pytest.raises(ConnectError, match="may not be started now"):
        connect(f"docker/{bare}", orbstack_start=False)
    assert connect(f"docker/{bare}").out("echo on") == "on"
    short = containers.client.inspect(bare).id[:12]
    hosts = [host for host, _, _ in OrbStackConnector.make_names_data(f"docker/{short}")]
    assert hosts == [f"@orbstack/docker/{bare}"]


def test_an_unusable_container_error_gives_the_reason(
    bare: str, containers: Containers, images: dict[str, str], connect: Connect
) -> None:
    containers.call("pause", bare)
    with pytest.raises(ConnectError, match=f"is paused; to resume it, run: docker unpause {bare}"):
        connect(f"docker/{bare}")
    containers.call("unpause", bare)
    ended = containers.run(images["busybox"], command=["true"])
    with pytest.raises(ConnectError, match="has ended: use a command that keeps running"):
        connect(f"docker/{ended}")
    with pytest.raises(ConnectError, match=r"does not answer: .*nobody-here"):
        connect(f"docker/{bare}", orbstack_user="nobody-here")


def test_D2_no_engine(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, containers: Containers
) -> None:
    said = r"there is no container 'missing' \((existing: |none exists\))"
    with pytest.raises(ConnectError, match=said):
        connect("docker/missing")
    command = tmp_path / "docker"
    command.write_text("#!/bin/sh\necho 'Cannot connect to the Docker daemon' >&2; exit 1\n")
    command.chmod(0o755)
    monkeypatch.setenv(docker.COMMAND_VARIABLE, str(command))
    with pytest.raises(ConnectError, match="Cannot connect"):
        connect("docker/web")


@pytest.mark.parametrize("transport", ["session", "spawn"])
def test_D4_D5_a_container_that_stops(
    bare: str, containers: Containers, connect: Connect, transport: str
) -> None:
    remote = connect(f"docker/{bare}", orbstack_transport=transport)
    running = gevent.spawn(remote.run, "echo 1 >>/root/count; sleep 60")
    Guest(containers.client, bare).wait_for("sleep 60", seconds=60)
    containers.call("stop", "-t", "1", bare)
    with pytest.raises(OSError, match="unknown"):
        running.get(timeout=20)
    with pytest.raises(OSError, match=r"not running|container state improper"):
        remote.run("echo 1 >>/root/count")
    # As after a restart of the engine: something has started it again.
    containers.client.start(bare)
    assert remote.out("cat /root/count") == "1"


def test_D6_a_container_that_is_replaced(
    containers: Containers, images: dict[str, str], connect: Connect
) -> None:
    name = containers.run(images["busybox"])
    remote = connect(f"docker/{name}")
    containers.remove(name)
    containers.call("run", "-d", "--name", name, images["busybox"], "sleep", "9999")
    for _ in range(2):
        with pytest.raises(OSError, match=r"(?i)no such container|no container with"):
            remote.run("true")
    containers.remove(name)


def test_D11_the_engine_restarts(bare: str, containers: Containers, connect: Connect) -> None:
    remote = connect(f"docker/{bare}")
    before = remote.out("cat /proc/1/stat").split()[21]
    containers.call("stop", "-t", "1", bare)
    containers.client.start(bare)
    assert remote.out("cat /proc/1/stat").split()[21] != before


def test_hosts_are_the_engines_containers(bare: str, containers: Containers) -> None:
    name = f"docker/{containers.prefix}*"
    hosts = {host: (data, groups) for host, data, groups in OrbStackConnector.make_names_data(name)}
    data, groups = hosts[f"@orbstack/docker/{bare}"]
    assert data["container_state"] == "running"
    assert f"orbstack_image_{containers.prefix}-busybox" in groups


# docs/containers.md ---------------------------------------------------------------------------

#: Makes a machine an SSH host, only on loopback.
SSHD = rf"""
set -e
{install("openssh-server")}
mkdir -p /run/sshd /root/.ssh
printf '%s\n' "$1" >/root/.ssh/authorized_keys
chmod 700 /root/.ssh
/usr/sbin/sshd -o ListenAddress="127.0.0.1:$2" -o PidFile=/run/own.pid -o UsePAM=no \
-o PermitRootLogin=prohibit-password
"""


@pytest.mark.skipif(sys.platform == "darwin", reason="a machine's loopback is not the Mac's")
def test_one_deploy_over_a_machine_a_container_and_an_ssh_host(
    machines: Any,
    base: str,
    client: Orbctl,
    containers: Containers,
    shared_container: str,
    tmp_path: Path,
) -> None:
    """The page's inventory and deploy, unchanged except for the names."""
    import paramiko

    key = paramiko.RSAKey.generate(2048)
    key.write_private_key_file(str(tmp_path / "key"))
    (tmp_path / "known_hosts").touch()
    remote, machine, port = machines.clone(base), machines.clone(base), free_port()
    Guest(client, remote).sh(SSHD, f"ssh-rsa {key.get_base64()}", str(port))
    page = (ROOT / "docs" / "containers.md").read_text()
    files = dict(re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```$", page, re.M | re.S))
    inventory = files["inventory.py"]
    for old, new in {
        "@orbstack/shop-db": f"@orbstack/{machine}",
        "@orbstack/docker/shop-web-1": shared_container.replace("docker/", "@orbstack/docker/"),
        '"shop.example.org"': '"127.0.0.1"',
        '"ssh_user": "admin"': (
            f'"ssh_user": "root", "ssh_port": {port}, "ssh_key": {str(tmp_path / "key")!r}, '
            f'"ssh_known_hosts_file": {str(tmp_path / "known_hosts")!r}, '
            '"ssh_strict_host_key_checking": "accept-new"'
        ),
    }.items():
        assert old in inventory
        inventory = inventory.replace(old, new)
    (tmp_path / "inventory.py").write_text(inventory)
    (tmp_path / "deploy.py").write_text(files["deploy.py"])
    for run in (1, 2):
        done = subprocess.run(
            [PYINFRA, "-y", "inventory.py", "deploy.py"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        results = re.findall(r"\] +(Success|No changes)", done.stderr)
        assert results == [("Success" if run == 1 else "No changes")] * 6, done.stderr
    guests = [Guest(client, machine), Guest(client, remote)]
    for guest in [*guests, Guest(containers.client, shared_container)]:
        assert guest.sh("cat /etc/motd").startswith(b"part of the shop"), guest.name
    assert orbctl.Orbctl().info(machine).running
