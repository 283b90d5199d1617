"""The commands with machines that boot, and with their network."""

from __future__ import annotations

import os
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.simulator.conftest import IMAGE, Booted, supervisors_of, wait_for

pytestmark = pytest.mark.boot


@pytest.fixture(scope="session")
def copy(booted: Booted, box: str) -> str:
    """A running clone."""
    script = "echo kept >/root/kept; install -o 501 -m 600 /dev/null /home/user/own"
    assert booted.root_in(box, script).code == 0
    assert booted("clone", box, "copy").code == 0
    assert booted.state("copy") == "stopped"
    assert booted("start", "copy").code == 0
    return "copy"


def address(booted: Booted, name: str) -> str:
    ip4 = booted("info", name, "-f", "json").json["ip4"]
    assert isinstance(ip4, str)
    return ip4


def test_contents_of_a_clone(booted: Booted, box: str, copy: str) -> None:
    """Its files with their owners, its own name, id and address."""
    look = "cat /root/kept; stat -c %U:%a /home/user/own; hostname"
    assert booted.root_in(copy, look).text == f"kept\nuser:600\n{copy}\n"
    assert booted.state(box) == "running"
    assert address(booted, box) != address(booted, copy)


def test_names(booted: Booted, box: str, copy: str) -> None:
    """Machines reach each other by name."""
    script = "ping -c1 -W5 {0}.orb.local && ping -4 -c1 -W5 {0}"
    for one, other in ((box, copy), (copy, box)):
        assert booted.root_in(one, script.format(other)).code == 0
    shown = booted("run", "-m", box, "getent", "ahostsv4", f"{copy}.orb.local").text
    assert shown.split()[0] == address(booted, copy)


def test_address_answers_on_the_host(booted: Booted, box: str) -> None:
    script = (
        "use Socket; socket(S, AF_INET, SOCK_STREAM, 0);"
        "bind(S, sockaddr_in(8000, INADDR_ANY)); listen(S, 1); accept(C, S);"
        'until (scalar(readline(C)) eq "\\r\\n") {}'
        'print C "HTTP/1.0 200 OK\\r\\n\\r\\nhere"; close C;'
    )
    unit = f"systemd-run -q --unit=answer perl -e '{script}'"
    assert booted.root_in(box, unit).code == 0
    url = f"http://{address(booted, box)}:8000/"
    seen: list[bytes] = []

    def answered() -> bool:
        try:
            seen.append(urllib.request.urlopen(url, timeout=5).read())
        except OSError:
            return False
        return True

    wait_for(answered)
    assert seen == [b"here"]


def test_output_of_list_and_info(booted: Booted, box: str) -> None:
    lines = [line for line in booted("list").lines if line.startswith(f"{box} ")]
    assert lines[0].split()[-1] == address(booted, box)
    info = booted("info", box, "-f", "json").json
    shown = booted.root_in(box, "ip -o addr show dev eth0 scope global").text
    assert f"inet {info['ip4']}/24" in shown
    assert f"inet6 {info['ip6']}/64" in shown
    assert booted("config", "get", "network.subnet4").text == "198.19.248.0/23\n"


def test_isolated_from_the_network(booted: Booted, box: str) -> None:
    """It reaches neither machines nor the host, but its router, and so the internet."""
    assert booted("create", IMAGE, "alone", "--isolated", "--isolate-network").err == b""
    ping = "ping -c1 -W1 {}"
    assert booted.root_in("alone", ping.format(address(booted, box))).code != 0
    assert booted.root_in(box, ping.format(address(booted, "alone"))).code != 0
    assert booted.root_in("alone", "getent hosts alone.orb.local").code == 0
    assert booted("delete", "alone").code == 0


def test_rename(booted: Booted, own_box: str, box: str) -> None:
    """A running machine has its new name at once, also for others."""
    before = address(booted, own_box)
    assert booted("rename", own_box, "other-name").code == 0
    try:
        shown = booted.root_in("other-name", "hostname; cat /etc/hostname")
        assert shown.text == "other-name\n" * 2
        assert booted.root_in(box, "ping -c1 -W5 other-name.orb.local").code == 0
        assert booted.root_in(box, f"getent hosts {own_box}.orb.local").code != 0
        assert address(booted, "other-name") == before
    finally:
        assert booted("rename", "other-name", own_box).code == 0


def test_export_and_import(booted: Booted, copy: str, tmp_path: Path) -> None:
    """The archive contains the machine's owners, and `import` restores them."""
    archive = tmp_path / "copy.tar.zst"
    assert booted("export", copy, str(archive)).code == 0
    assert booted("import", str(archive), "-n", "imported").code == 0
    assert booted("start", "imported").code == 0
    look = "cat /root/kept; stat -c %U:%a /home/user/own; hostname"
    assert booted.root_in("imported", look).text == "kept\nuser:600\nimported\n"
    assert booted.root_in("imported", "systemctl is-system-running").text == "running\n"
    assert booted("delete", "imported").code == 0


def test_push_and_pull(booted: Booted, own_box: str, tmp_path: Path) -> None:
    """They use the machine's files, and not what is mounted in it."""
    (tmp_path / "file").write_text("pushed")
    for target in ("one", "/tmp/lost"):
        assert booted("push", "-m", own_box, str(tmp_path / "file"), target).code == 0
    shown = booted("run", "-m", own_box, "-w", "/tmp", "sh", "-c", "cat ~/one; ls lost; id -u").text
    assert shown == "pushed501\n"
    assert booted("pull", "-m", own_box, "one", str(tmp_path / "back")).code == 0
    assert (tmp_path / "back").read_text() == "pushed"


def test_terminal(booted: Booted, box: str) -> None:
    """A command has the machine's own terminal, which belongs to its user."""
    script = 'tty; stat -c %U "$(tty)"; echo err >/dev/stderr; echo out >/dev/stdout'
    shown = booted.program.on_terminal("run", "-m", box, "sh", "-c", script)
    assert re.fullmatch(r"/dev/pts/\d+\r\nuser\r\nerr\r\nout\r\n", shown.text)


def test_streams_can_be_opened_again(booted: Booted, box: str) -> None:
    for user in ("root", "user"):
        script = "echo out >/dev/stdout; echo err >/dev/stderr; cat /dev/stdin"
        answer = booted("run", "-m", box, "-u", user, "sh", "-c", script, stdin=b"in\n")
        assert answer == (0, b"out\nin\n", b"err\n")


def test_password(booted: Booted) -> None:
    assert booted("create", "-p", IMAGE, "secret", stdin=b"se:cret\n").code == 0
    hashes = booted.root_in("secret", "grep -E '^(user|root):' /etc/shadow | cut -d: -f2").lines
    assert all(entry.startswith("$") for entry in hashes)
    assert len(hashes) == 2
    assert booted("delete", "secret").code == 0


def test_run_starts_a_stopped_machine(booted: Booted, own_box: str) -> None:
    assert booted("stop", own_box).code == 0
    assert booted("run", "-m", own_box, "systemctl", "is-system-running").text == "running\n"


def test_run_waits_for_a_reboot(booted: Booted, own_box: str) -> None:
    booted.root_in(own_box, "touch /run/before; reboot")
    wait_for(lambda: booted.root_in(own_box, "test -e /run/before").code == 1)
    assert booted.root_in(own_box, "systemctl is-system-running").text == "running\n"


def test_two_processes_start_one_machine(booted: Booted, own_box: str) -> None:
    assert booted("stop", own_box).code == 0
    calls = [booted.program.started("start", own_box) for _ in range(3)]
    told = [call.communicate()[1] for call in calls]
    assert 0 in [call.returncode for call in calls]
    assert all(b"invalid transition from starting" in text for text in told if text)
    ident = booted.directory(own_box).name
    paths = [Path(f"/proc/{pid}/cmdline") for pid in supervisors_of(booted.home)]
    assert sum(ident.encode() in path.read_bytes() for path in paths) == 1


def test_router_that_was_killed(booted: Booted, own_box: str) -> None:
    """`start` reconnects a running machine."""
    pid = int((booted.home / "network/router").read_text().split()[0])
    os.kill(pid, 9)
    assert booted("start", own_box).code == 0
    assert booted.root_in(own_box, f"ping -c1 -W5 {own_box}.orb.local").code == 0
    for line in booted("list", "-q", "-r").lines:  # also the others, for the next tests
        assert booted("start", line).code == 0


USER_DATA = b"""#cloud-config
write_files:
  - {path: /etc/from-cloud, content: here}
runcmd:
  - sleep 2; echo done >/root/ran
"""


@pytest.fixture(scope="session")
def in_cloud(booted: Booted, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A machine with cloud-init, which is still running when `create` returns."""
    path = tmp_path_factory.mktemp("cloud") / "user data"
    path.write_bytes(USER_DATA)
    assert booted("create", "--user-data", str(path), IMAGE, "cloud").code == 0
    yield "cloud"
    assert booted("delete", "cloud").code == 0


def test_cloud_init(booted: Booted, in_cloud: str) -> None:
    assert booted.root_in(in_cloud, "test -e /root/ran").code == 1
    waited = booted.root_in(in_cloud, "cloud-init status --wait")
    assert waited.text.endswith("status: done\n")
    assert booted.root_in(in_cloud, "cat /etc/from-cloud /root/ran").text == "heredone\n"
    assert booted("info", in_cloud, "-f", "json").json["record"]["image"]["variant"] == "cloud"


def test_clone_of_a_machine_with_cloud_init(booted: Booted, in_cloud: str) -> None:
    """To cloud-init, the clone is another machine, so it runs there again."""
    assert booted.root_in(in_cloud, "cloud-init status --wait; rm /root/ran").code == 0
    assert booted("clone", in_cloud, "cloud-copy").code == 0
    assert booted("start", "cloud-copy").code == 0
    assert booted.root_in("cloud-copy", "cloud-init status --wait; cat /root/ran").code == 0
    assert booted("delete", "cloud-copy").code == 0


def test_cloud_init_that_fails(booted: Booted, in_cloud: str, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("#cloud-config\nruncmd:\n  - exit 3\n")
    assert booted("create", "--user-data", str(tmp_path / "data"), IMAGE, "failing").code == 0
    waited = booted.root_in("failing", "cloud-init status --wait")
    assert waited.code == 1
    assert waited.out.endswith(b"status: error\n")
    assert booted("delete", "failing").code == 0
