"""docs/first-deploy.md of a rendered project, followed step by step, up to a server."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pyinfra_orbstack.orbctl import Orbctl
from tests.conftest import Machines
from tests.template.conftest import Render
from tests.template.project import Project, run

pytestmark = [pytest.mark.template, pytest.mark.timeout(1800), pytest.mark.usefixtures("index")]

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAME = re.compile(r"# (\S+)\n")
#: The page's placeholders for the reader's own values.
SERVER, ADDRESS, KEY = "web1.example.com", "192.0.2.1", "ssh-ed25519 AAAA... you@example.com"


class Server:
    """A machine with an SSH server that accepts one user, only by key."""

    def __init__(self, client: Orbctl, name: str, home: Path) -> None:
        self.client, self.name, self.home = client, name, home
        self.address = client.info(name).ip4
        keys = home / ".ssh"
        keys.mkdir(parents=True, mode=0o700)
        make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / "id_ed25519")]
        subprocess.run(make, check=True)
        self.key = (keys / "id_ed25519.pub").read_text().strip()
        script = (
            "useradd --create-home --shell /bin/bash admin\n"
            "echo 'admin ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/admin\n"
            "install -d -m 700 -o admin /home/admin/.ssh\n"
            f"echo '{self.key}' >/home/admin/.ssh/authorized_keys\n"
        )
        self.root(script)

    def root(self, script: str) -> str:
        """Run a script as root and return its output."""
        argv = self.client.argv(["run", "-m", self.name, "-u", "root", "sh", "-ec", script])
        return run(self.home, *argv, env=self.client.environment())


@pytest.fixture
def server(machines: Machines, prepared: str, tmp_path: Path) -> Server:
    return Server(machines.client, machines.create(prepared), tmp_path / "home")


def change(project: Project, block: str) -> None:
    """Apply a diff to a file."""
    name, *lines = block.splitlines()
    for part in "\n".join(lines).split("\n\n"):
        kept = [line for line in part.splitlines() if line]
        old = [line[1:] for line in kept if line[0] in " -"]
        new = [line[1:] for line in kept if line[0] in " +"]
        project.write(name[2:], "\n".join(old) + "\n", "\n".join(new) + "\n")


def do(project: Project, language: str, block: str, env: dict[str, str]) -> str:
    """Carry out a block; return the output of its commands."""
    if language == "sh":
        return run(project.path, "sh", "-exc", block, env=env)
    if language == "diff":
        change(project, block)
        return ""
    first = NAME.match(block)
    assert language == "python"
    assert first, f"no name in the first line:\n{block}"
    with (project.path / first[1]).open("a", encoding="utf-8") as file:
        file.write(block[first.end() :])
    return ""


def test_the_page_can_be_followed(
    render: Render,
    client: Orbctl,
    prepared: str,
    server: Server,
    destroy: Callable[[Project], None],
) -> None:
    project = render("first", image=prepared)
    destroy(project)
    project.commit()
    page = project.text("docs/first-deploy.md")
    page = page.replace(SERVER, server.address).replace(ADDRESS, server.address)
    assert KEY in page
    page = page.replace(KEY, server.key)
    blocks = BLOCK.findall(page)
    assert len(blocks) == page.count("```") / 2 > 8
    said = []
    for language, block in blocks:
        env = {}
        if "INVENTORY=production" in block:
            # The reader's own keys, and the answer to the question.
            env = {"HOME": str(server.home), "YES": "1"}
        said.append(do(project, language, block, env))

    journal = "cat /etc/systemd/journald.conf.d/10-first.conf"
    web, db = project.machines()
    for name, size in ((web, "500M"), (db, "2G")):
        shown = client.call("run", "-m", name, "sh", "-c", journal).stdout.decode()
        assert shown == f"[Journal]\nSystemMaxUse={size}\n"
    assert "SystemMaxUse=500M" in server.root(journal)
    assert any("Journal | Settings" in text and "make plan" in text for text in said)

    # The server's state, as the page describes it.
    ssh = ["ssh", "-i", str(server.home / ".ssh" / "id_ed25519"), "-o", "BatchMode=yes"]
    ssh += ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
    assert run(project.path, *ssh, f"ops@{server.address}", "sudo", "id", "-un").endswith("root\n")
    asked = subprocess.run(
        [*ssh, "-o", "PreferredAuthentications=none", f"ops@{server.address}"],
        capture_output=True,
        text=True,
    )
    assert "Permission denied (publickey)" in asked.stderr
    assert not os.path.exists(project.path / "pyinfra-debug.log")
