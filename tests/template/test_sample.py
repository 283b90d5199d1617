"""The services that a rendered project deploys: its own tests notice what is wrong with them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.template.conftest import ROOT, Render

pytestmark = [pytest.mark.template, pytest.mark.timeout(1800)]

SERVICES, ACCESS = "src/myproj/services.py", "src/myproj/access.py"
FIREWALL = "src/myproj/firewall.py"
AFTER_RESTART = "test_deploy.py::test_everything_works_after_a_restart"
#: What is planted: in which file, what in place of what, and which test notices it.
FAULTS = {
    "not enabled": (SERVICES, "enabled=True", "enabled=False", AFTER_RESTART),
    "enabled if its package does it": (SERVICES, ", enabled=True", "", AFTER_RESTART),
    "not reloaded": (
        ACCESS,
        "_if=drop_in.did_change",
        "_if=lambda: False",
        "test_access.py::test_sshd_applies_a_change",
    ),
    "open": (
        "src/myproj/templates/nftables.conf.j2",
        "policy drop",
        "policy accept",
        "test_firewall.py::test_closed_ports_drop_packets",
    ),
    "SSH locked out where it was moved to": (
        FIREWALL,
        ", *map(int, listening)",
        "",
        "test_firewall.py::test_ssh_is_allowed_on_another_port",
    ),
    "another host's address": (
        "deploy.py",
        'known=peers.addresses("db")',
        'known=peers.addresses("web")',
        "test_deploy.py::test_the_deploy_has",
    ),
}


@pytest.mark.usefixtures("prepared")
@pytest.mark.parametrize("fault", FAULTS)
def test_its_tests_notice(render: Render, fault: str) -> None:
    name, old, new, test = FAULTS[fault]
    project = render()
    project.write(name, old, new)
    with pytest.raises(AssertionError, match=f"FAILED tests/{test}"):
        project.check_tests(f"tests/{test.partition('::')[0]}")


@pytest.mark.usefixtures("client", "root_only")
@pytest.mark.parametrize("ci", ["", "true"])
def test_where_no_machine_boots_its_tests_say_so(
    render: Render, simulated: bool, tmp_path: Path, ci: str
) -> None:
    """They are skipped, and in CI fail, for a reason that names what is missing."""
    if not simulated:
        pytest.skip("machines of OrbStack always boot")
    project = render()
    old = [sys.executable, str(ROOT / "tests" / "hosts" / "old_kernel.py")]
    done = subprocess.run(
        [*old, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=project.path,
        # The host's root, so that nothing is fetched; a state folder that knows of no boot yet.
        env={
            **os.environ,
            "PYTHONPATH": "src",
            "CI": ci,
            "ORBCTL_SIMULATOR_HOME": str(tmp_path / "state"),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    reason = r"no machines: ubuntu:noble: .*: this host cannot boot machines: needs Linux 5\.19"
    assert re.search(reason, done.stdout), done.stdout
    if ci:
        assert done.returncode == 1
        assert "skipped" not in done.stdout
    else:
        assert done.returncode == 0, done.stdout
        assert re.search(r"\d+ passed, \d+ skipped", done.stdout)
