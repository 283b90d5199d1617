"""The pytest plugin's requests to machines over the network, on machines that boot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulator.conftest import IMAGE, Booted

pytestmark = [pytest.mark.boot, pytest.mark.timeout(1800)]

#: A page for each connection, without a package: it shows what the deploy knows about the database.
DEPLOY = r'''
from io import StringIO

from pyinfra import host, inventory
from pyinfra.operations import files, systemd

SOCKET = """\
[Socket]
ListenStream=80
Accept=yes
[Install]
WantedBy=sockets.target
"""
PAGE = """\
read -r _ path _
while read -r name value && [ "$name" != "$(printf '\r')" ]; do
    case $name in Host:) asked=$value ;; esac
done
printf 'HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n%s' "$path of ${asked%?}"
cat /etc/database
"""
SERVICE = """\
[Service]
ExecStart=/bin/sh /etc/page.sh
StandardInput=socket
"""
(db,) = inventory.get_group("db")
known = StringIO(f" with {db.data.orbstack_ip4}")
files.put(name="Know the database", src=known, dest="/etc/database")
files.put(name="Write the page", src=StringIO(PAGE), dest="/etc/page.sh")
files.put(name="Write the service", src=StringIO(SERVICE), dest="/etc/systemd/system/web@.service")
unit = files.put(
    name="Write the socket", src=StringIO(SOCKET), dest="/etc/systemd/system/web.socket"
)
if "web" in host.groups:
    new = unit.will_change
    systemd.service(name="Listen", service="web.socket", enabled=True, daemon_reload=new)
    systemd.service(name="Restart", service="web.socket", restarted=True)
'''
TESTS = """
import pytest


def test_it(orbstack_machines):
    hosts = {"web": ["web"], "db": ["db"]}
    with orbstack_machines.inventory(hosts, every={"local": {"_sudo": True}}) as site:
        web, db = site["web"], site["db"]
        site.assert_idempotent("deploy.py", but=["Restart"])
        page = f"/hello of {web.domain} with {db.ip4}"
        assert web.http("hello").text == page
        assert "of shop with" in web.http("/", headers={"Host": "shop"}).text
        # Machines know each other's names.
        assert db.ip4 in web.run(["getent", "ahostsv4", db.domain]).stdout
        web.restart()
        answer = web.http("/hello")
        assert (answer.status, answer.text) == (200, page)
        with pytest.raises(AssertionError, match="did not answer within 1 s: .*refused"):
            db.http(timeout=1)
"""


def test_machines_are_reached_over_the_network(booted: Booted, tmp_path: Path) -> None:
    (tmp_path / "deploy.py").write_text(DEPLOY)
    (tmp_path / "test_it.py").write_text(TESTS)
    beside = Path(sys.executable).with_name("orbctl-simulator")
    env = {
        **booted.program.env,
        "PYINFRA_ORBSTACK_ORBCTL": str(beside),
        "XDG_STATE_HOME": str(tmp_path / "state"),
        # A proxy would not know the machines.
        "http_proxy": "http://127.0.0.1:9",
        "CI": "true",
    }
    options = ["--orbstack-image", IMAGE, "--orbstack-init", "image", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", *options, "test_it.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
