"""Container engines from Debian's packages, in a machine."""

from __future__ import annotations

import pytest

from tests.simulator.conftest import Booted

pytestmark = [pytest.mark.boot, pytest.mark.timeout(1800)]

#: An image of one program, from an archive on stdin.
IMPORT = "mkdir -p /root/image/bin; cp /bin/busybox /root/image/bin/sh; tar -C /root/image -c ."


@pytest.mark.parametrize(("engine", "package"), [("docker", "docker.io"), ("podman", "podman")])
def test_containers_in_a_machine(
    booted: Booted, own_box: str, archive: None, engine: str, package: str
) -> None:
    """They run, reach the network, and are there after `restart`."""
    install = f"apt-get install -qy {package} busybox-static"
    get = f"export DEBIAN_FRONTEND=noninteractive; apt-get update -q && {install}"
    installed = booted.root_in(own_box, get)
    assert installed.code == 0, installed
    imported = booted.root_in(own_box, f"{{ {IMPORT}; }} | {engine} import - box:1")
    assert imported.code == 0, imported
    # Where control groups of version 1 have the controllers, podman cannot set its own up.
    flags = "--cgroups=disabled" if engine == "podman" else ""
    router = booted.root_in(own_box, "ip route show default").text.split()[2]
    look = f"nslookup {own_box}.orb.local {router} >/dev/null; echo $?; id -u"
    run = f"{engine} run --rm {flags} box:1 sh -c '{look}'"
    ran = booted.root_in(own_box, run)
    assert ran.text == "0\n0\n", ran
    assert booted("restart", own_box).code == 0
    ran = booted.root_in(own_box, run)
    assert ran.text == "0\n0\n", ran
