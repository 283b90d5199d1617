"""Slow operations: creation, cloud-init, reboots, large files; and other connectors' hosts."""

from __future__ import annotations

import io
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyinfra_orbstack import process, provision, transfer
from pyinfra_orbstack.orbctl import Orbctl

from ..conformance.conftest import Guest, Remote
from ..packages import install
from .conftest import Run


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts passed to pyinfra's spinner, which draws only on terminals."""
    import contextlib

    seen: list[str] = []

    @contextlib.contextmanager
    def spinner(items: set[str]) -> Iterator[None]:
        seen.extend(items)
        yield

    for module in (provision, transfer):
        monkeypatch.setattr(module, "progress_spinner", spinner)
    return seen


def test_waiting_is_shown(machines: Any, client: Orbctl, shown: list[str]) -> None:
    name = machines.new_name()
    remote = Remote(name, orbstack_image="ubuntu").connect()
    machines.own(name)
    assert f"creating {name} from ubuntu" in shown
    remote.close()
    client.stop(name)
    remote.connect()
    assert f"starting machine {name!r}" in shown
    remote.put(io.BytesIO(b"x" * 5_000_000), "large")
    assert "uploading large" in shown
    remote.get("large", io.BytesIO())
    assert "downloading large" in shown
    remote.put(io.BytesIO(b"x" * 500_000), "small")
    assert not any("small" in title for title in shown)
    remote.close()


def with_cloud_init(client: Orbctl, folder: Path, script: str) -> str:
    """An `orbctl` whose new machines contain a `cloud-init` that runs ``script``."""
    path = folder / "orbctl-with-cloud-init"
    install = f"cat >/usr/local/bin/cloud-init <<'X'\n#!/bin/sh\n{script}\nX\nchmod 755 " + (
        "/usr/local/bin/cloud-init"
    )
    (folder / "install").write_text(install)
    path.write_text(
        f"#!{sys.executable}\nimport subprocess, sys\n"
        f"real, argv = {client.command!r}, sys.argv[1:]\n"
        "if argv[0] != 'create':\n    import os; os.execv(real, [real, *argv])\n"
        "at = argv.index('--user-data'); del argv[at:at + 2]\n"
        "subprocess.run([real, *argv], check=True)\n"
        f"text = open({str(folder / 'install')!r}).read()\n"
        "run = [real, 'run', '-m', argv[-1], '-u', 'root', '-w', '/', 'sh', '-c', text]\n"
        "sys.exit(subprocess.run(run, stdin=subprocess.DEVNULL).returncode)\n"
    )
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("script", "answer"),
    [
        ("sleep 2; touch /tmp/ready; echo done", "ready"),
        ("touch /tmp/ready; echo 'status: done'; exit 2", "ready"),
        ("echo 'status: error: no such package'; exit 1", "no such package"),
    ],
)
def test_cloud_init_is_waited_for(
    machines: Any, client: Orbctl, tmp_path: Path, pyinfra: Run, script: str, answer: str
) -> None:
    """The simulator has no cloud-init, so the machine gets an executable of that name."""
    name = machines.new_name()
    (tmp_path / "user-data").write_text("#cloud-config\n")
    (tmp_path / "inventory.py").write_text(
        f"web = [('@orbstack/{name}', {{'orbstack_image': 'ubuntu', "
        f"'orbstack_cloud_init': {str(tmp_path / 'user-data')!r}}})]\n"
    )
    wrapped = with_cloud_init(client, tmp_path, script)
    done = pyinfra("inventory.py", "exec", "--", "ls /tmp/ready", PYINFRA_ORBSTACK_ORBCTL=wrapped)
    assert answer in done.stderr
    assert (done.returncode == 0) is (answer == "ready")
    exists = name in [machine.name for machine in client.machines()]
    assert exists is (answer == "ready"), "a machine that failed to come up is removed"
    if exists:
        machines.own(name)


def test_cloud_init_may_create_the_working_directory(
    machines: Any, client: Orbctl, tmp_path: Path, pyinfra: Run
) -> None:
    name = machines.new_name()
    (tmp_path / "user-data").write_text("#cloud-config\n")
    data = {
        "orbstack_image": "ubuntu",
        "orbstack_cloud_init": str(tmp_path / "user-data"),
        "orbstack_workdir": "/tmp/app",
    }
    (tmp_path / "inventory.py").write_text(f"web = [('@orbstack/{name}', {data!r})]\n")
    wrapped = with_cloud_init(client, tmp_path, "mkdir -p /tmp/app")
    done = pyinfra("inventory.py", "exec", "--", "pwd", PYINFRA_ORBSTACK_ORBCTL=wrapped)
    assert done.returncode == 0, done.stderr
    assert "] /tmp/app" in done.stderr
    machines.own(name)


@pytest.mark.long
def test_server_reboot(
    machines: Any,
    client: Orbctl,
    simulated: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pyinfra: Run,
) -> None:
    """pyinfra's own operation; it notices that a machine with its own uptime is back."""
    if not simulated:
        pytest.skip("whether /proc/uptime belongs to the machine is not known of OrbStack")
    monkeypatch.setenv("ORBCTL_SIMULATOR_UPTIME", "own")
    name = machines.create()
    guest = Guest(client, name)
    # A machine cannot reboot from inside, so a watcher outside acts for OrbStack.
    guest.sh(
        "printf '#!/bin/sh\\ntouch /var/tmp/reboot\\n' >/usr/local/sbin/reboot; "
        "chmod 755 /usr/local/sbin/reboot"
    )
    # In memory: the start time of pid 1 is about the same in every uptime of its own.
    guest.sh("touch /dev/shm/before")

    def watch() -> None:
        for _ in range(300):
            done = subprocess.run(
                [client.command, "run", "-m", name, "test", "-e", "/var/tmp/reboot"], check=False
            )
            if done.returncode == 0:
                subprocess.run([client.command, "restart", name], check=True)
                (tmp_path / "restarted").touch()
                return
            time.sleep(0.2)

    watcher = threading.Thread(target=watch)
    watcher.start()
    (tmp_path / "deploy.py").write_text(
        "import os, time\n"
        "from pyinfra.operations import server\n"
        "def wait_for_the_restart(seconds):\n"
        f"    while not os.path.exists({str(tmp_path / 'restarted')!r}):\n"
        "        time.sleep(0.1)\n"
        # During the restart, its facts would fail.
        "server.sleep = wait_for_the_restart\n"
        "server.reboot(name='reboot', delay=20, interval=1, reboot_timeout=30, _sudo=True)\n"
        "server.shell(name='after', commands=['echo back again'])\n"
    )
    done = pyinfra("-vvv", f"@orbstack/{name}", "deploy.py")
    watcher.join()
    assert done.returncode == 0, done.stderr
    assert "back again" in done.stderr
    assert guest.sh("ls /dev/shm") == b""


@pytest.fixture
def ssh_host(machines: Any, client: Orbctl, simulated: bool, tmp_path: Path) -> Iterator[int]:
    """An sshd on a loopback port, in a simulated machine, which shares this host's network."""
    if not simulated:
        pytest.skip("needs a machine that shares this host's network")
    name = machines.create()
    guest = Guest(client, name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    guest.sh(
        f"{install('openssh-server', 'openssh-client')}"
        "mkdir -p /run/sshd /root/.ssh; ssh-keygen -q -t ed25519 -N '' -f /root/.ssh/id; "
        "cp /root/.ssh/id.pub /root/.ssh/authorized_keys; chmod 700 /root/.ssh; "
        f"/usr/sbin/sshd -p {port} -o ListenAddress=127.0.0.1 -o PermitRootLogin=yes"
    )
    key = tmp_path / "key"
    key.write_bytes(guest.sh("cat /root/.ssh/id"))
    key.chmod(0o600)
    yield port
    client.stop(name)


@pytest.mark.long
def test_a_machine_beside_an_ssh_host(
    machines: Any, ssh_host: int, tmp_path: Path, pyinfra: Run
) -> None:
    name = machines.create()
    (tmp_path / "inventory.py").write_text(
        f"both = [('@orbstack/{name}', {{'_sudo': True}}), ('127.0.0.1', {{'ssh_port': {ssh_host}, "
        f"'ssh_user': 'root', 'ssh_key': {str(tmp_path / 'key')!r}, "
        "'ssh_strict_host_key_checking': 'off', "
        f"'ssh_known_hosts_file': {str(tmp_path / 'known')!r}}})]\n"
    )
    (tmp_path / "deploy.py").write_text(
        "from io import StringIO\nfrom pyinfra.operations import files\n"
        "files.put(name='put', src=StringIO('same'), dest='/etc/same')\n"
    )
    first, second = (pyinfra("inventory.py", "deploy.py") for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr
    for host in (f"@orbstack/{name}", "127.0.0.1"):
        assert f"[{host}] Success" in " ".join(first.stderr.split())
        assert f"[{host}] No changes" in " ".join(second.stderr.split())


def test_abandoned_processes_are_killed() -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        process.run(["sh", "-c", "sleep 4242 & sleep 4242"], timeout=0.3)
    assert time.monotonic() - began < 30
    deadline = time.monotonic() + 20
    while b"sleep 4242" in subprocess.run(["ps", "ax"], capture_output=True, check=True).stdout:
        assert time.monotonic() < deadline
