"""Section D: failures are reported honestly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
import pytest
from pyinfra.api.exceptions import ConnectError, InventoryError

from pyinfra_orbstack import inventory, orbctl, session, shell
from pyinfra_orbstack.connector import OrbStackConnector
from pyinfra_orbstack.orbctl import Orbctl

from .conftest import PASSWORD, PLACES, WAYS, Guest, Proxy, Remote

PYINFRA = os.path.join(os.path.dirname(sys.executable), "pyinfra")


def pyinfra(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PYINFRA, "-y", *words], capture_output=True, text=True, timeout=100, check=False, **options
    )


@pytest.fixture(autouse=True)
def _fresh_listing() -> None:
    inventory.list_machines.cache.clear()
    inventory.list_containers.cache.clear()


@pytest.fixture
def asked_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing relies on the listing."""
    monkeypatch.setattr(inventory, "FRESH", 0.0)


# D1: orbctl itself


@pytest.mark.smoke
def test_D1_orbctl_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(orbctl.COMMAND_VARIABLE, raising=False)
    monkeypatch.setattr(orbctl, "KNOWN_FOLDERS", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(orbctl.OrbctlMissing, match="orbctl not found"):
        orbctl.find()


@pytest.mark.skipif(sys.platform == "darwin", reason="on a Mac the line says to install OrbStack")
def test_D1_orbctl_missing_names_the_simulator() -> None:
    env = {key: value for key, value in os.environ.items() if key != orbctl.COMMAND_VARIABLE}
    done = pyinfra("@orbstack/x", "exec", "--", "id", env=env)
    assert done.returncode == 1
    assert "PYINFRA_ORBSTACK_ORBCTL=orbctl-simulator" in done.stderr
    assert "Traceback" not in done.stderr


def test_D1_orbctl_not_executable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, connect: Callable[..., Remote]
) -> None:
    (tmp_path / "orbctl").write_text("no program")
    monkeypatch.setenv(orbctl.COMMAND_VARIABLE, str(tmp_path / "orbctl"))
    with pytest.raises(ConnectError, match="no such executable"):
        connect("any")
    (tmp_path / "orbctl").chmod(0o755)
    with pytest.raises(ConnectError, match="cannot run"):
        connect("any")


@pytest.mark.parametrize("transport", PLACES)
def test_D1_the_client_crashes(
    proxy: Proxy, machine: str, connect: Callable[..., Remote], transport: str
) -> None:
    proxy.tell("any exit 2 panic: nil pointer dereference")
    with pytest.raises(ConnectError, match="panic: nil pointer"):
        connect(machine)
    proxy.tell(f"{proxy.run} exit 2 panic: nil pointer dereference")
    with pytest.raises(ConnectError, match="panic: nil pointer"):
        connect(machine, orbstack_boot_timeout=1)


@pytest.mark.parametrize("transport", PLACES)
def test_D1_a_spinner_is_not_a_failure(
    proxy: Proxy, machine: str, connect: Callable[..., Remote], transport: str
) -> None:
    proxy.tell("any spinner")
    remote = connect(machine)
    assert remote.run("echo on") == (True, ["on"], [])


# D2, D3: OrbStack and its listing


@pytest.mark.parametrize("transport", PLACES)
def test_D2_orbstack_not_running(
    proxy: Proxy, connect: Callable[..., Remote], transport: str
) -> None:
    proxy.tell("any exit 1 OrbStack is not running")
    with pytest.raises(InventoryError, match="not running"):
        list(OrbStackConnector.make_names_data(proxy.place))
    with pytest.raises(ConnectError, match="not running"):
        connect(f"{proxy.place}any")


@pytest.mark.parametrize(
    "answer", ["null", "garbage", '[{"id": "A", "name":', "{}", "", '[{"name": "a"}]']
)
@pytest.mark.parametrize("transport", PLACES)
def test_D3_odd_listings(proxy: Proxy, machine: str, answer: str, transport: str) -> None:
    proxy.tell(f"{proxy.listing} print {answer}")
    with pytest.raises(InventoryError, match=r"cannot list (OrbStack's machines|containers)"):
        list(OrbStackConnector.make_names_data(proxy.place))
    # A pattern becomes a host that fails on connect, and only that host.
    pattern = f"{proxy.place}*"
    assert [host for host, _, _ in OrbStackConnector.make_names_data(pattern)] == [
        f"@orbstack/{pattern}"
    ]
    with pytest.raises(ConnectError, match=r"cannot list (OrbStack's machines|containers)"):
        Remote(pattern).connect()
    # A named host is checked on connect.
    named = proxy.place + "web"
    assert [host for host, _, _ in OrbStackConnector.make_names_data(named)] == [
        f"@orbstack/{named}"
    ]


@pytest.mark.parametrize("transport", ["container"])
def test_D3_odd_ids(proxy: Proxy, transport: str) -> None:
    proxy.tell("ps print no ids")
    with pytest.raises(InventoryError, match="cannot list containers: docker did not print"):
        list(OrbStackConnector.make_names_data("docker"))


def test_D3_a_machine_listed_twice(proxy: Proxy) -> None:
    one = '{"id":"A","name":"a","state":"running"}'
    proxy.tell(f"list print [{one},{one}]")
    with pytest.raises(InventoryError, match="twice"):
        list(OrbStackConnector.make_names_data(None))


@pytest.mark.parametrize("transport", PLACES)
def test_D3_an_odd_info(
    proxy: Proxy,
    machine: str,
    connect: Callable[..., Remote],
    transport: str,
    asked_afresh: None,
) -> None:
    proxy.tell(f"{proxy.info} print garbage")
    with pytest.raises(ConnectError, match=r"did not print (JSON|a list of containers)"):
        connect(machine)


# D4 to D11: the machine


@pytest.mark.smoke
def test_D4_stopped_before_a_command(
    client: Orbctl, fresh_machine: str, connect: Callable[..., Remote]
) -> None:
    """`orbctl run` starts it again, as for its own users."""
    remote = connect(fresh_machine)
    remote.run("echo 1 >>~/count")
    client.stop(fresh_machine)
    assert remote.out("echo 1 >>~/count; cat ~/count") == "1\n1"


@pytest.mark.parametrize("transport", ["session", "spawn"])
def test_D5_stopped_during_a_command(
    client: Orbctl, fresh_machine: str, connect: Callable[..., Remote], transport: str
) -> None:
    remote = connect(fresh_machine, orbstack_transport=transport)
    mark = f"60.{time.monotonic_ns() % 10**8}"
    running = gevent.spawn(remote.run, f"echo 1 >>~/count; echo begun; sleep {mark}")
    Guest(client, fresh_machine).wait_for(f"sleep {mark}", seconds=60)
    client.stop(fresh_machine)
    with pytest.raises(OSError, match="unknown"):
        running.get(timeout=20)
    assert remote.out("cat ~/count") == "1"


def test_D6_deleted_during_a_deploy(
    client: Orbctl, fresh_machine: str, connect: Callable[..., Remote], machine: str
) -> None:
    remote, other = connect(fresh_machine), connect(machine)
    client.delete(fresh_machine, client.info(fresh_machine).id)
    with pytest.raises(OSError, match="not found"):
        remote.run("true")
    assert other.out("echo on") == "on"


def test_D6_replaced_by_another_of_the_same_name(
    client: Orbctl, machines: Any, base: str, connect: Callable[..., Remote]
) -> None:
    name = machines.clone(base)
    remotes = [connect(name, orbstack_transport=way) for way in ("session", "spawn")]
    client.delete(name, client.info(name).id)
    client.clone(base, name)
    machines.own(name)
    client.start(name)
    for remote in remotes:
        with pytest.raises(OSError, match="was replaced"):
            remote.run("touch ~/touched")
    Guest(client, name).sh("! find /home -name touched | grep .")


def test_D8_renamed_during_a_deploy(
    client: Orbctl, machines: Any, base: str, connect: Callable[..., Remote]
) -> None:
    """An open session continues; a new connection reports that the name does not exist."""
    name = machines.clone(base)
    remote = connect(name)
    client.call("rename", name, f"{name}-b")
    machines.own(f"{name}-b")
    remote.drop_session()
    with pytest.raises(OSError, match="not found"):
        remote.run("true")


def test_D9_rebooted_by_an_operation(
    client: Orbctl, fresh_machine: str, connect: Callable[..., Remote]
) -> None:
    """What server.reboot does: the machine restarts, pyinfra disconnects and connects again."""
    remote = connect(fresh_machine)
    first = remote.out("cat /proc/1/stat").split()[21]
    client.restart(fresh_machine)
    remote.host.disconnect()
    remote.connect()
    assert remote.out("cat /proc/1/stat").split()[21] != first


@pytest.mark.smoke
def test_D9_server_reboot(
    client: Orbctl, fresh_machine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pyinfra's own operation, with a sudo password; nothing can reboot a machine from inside."""
    monkeypatch.setenv("ORBCTL_SIMULATOR_UPTIME", "own")
    client.stop(fresh_machine)
    client.start(fresh_machine)
    guest = Guest(client, fresh_machine)
    guest.sh('printf "#!/bin/sh\\n>/tmp/reboot\\n" >"$1"; chmod 755 "$1"', "/usr/local/sbin/reboot")
    if Path(client.command).name != "orbctl-simulator":
        pytest.skip("needs an uptime that begins anew")
    (tmp_path / "inventory.py").write_text(
        f"x = [('@orbstack/{fresh_machine}', {{'orbstack_user': 'bob', '_sudo': True, "
        f"'_sudo_password': {PASSWORD!r}}})]\n"
    )
    (tmp_path / "deploy.py").write_text(
        "import os, time\n"
        "from pyinfra.operations import server\n"
        "def wait_for_the_restart(seconds):\n"
        "    while not os.path.exists('restarted'):\n"
        "        time.sleep(0.1)\n"
        # Otherwise a restart that takes longer than the delay interrupts the first command.
        "server.sleep = wait_for_the_restart\n"
        "server.shell(name='before', commands=['true'])\n"
        "server.reboot(name='reboot', delay=20, interval=1, reboot_timeout=20)\n"
        "server.shell(name='after', commands=['id -un'])\n"
    )
    running = subprocess.Popen(
        [PYINFRA, "-y", "inventory.py", "deploy.py"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        deadline = time.monotonic() + 30
        while not guest.sh("ls /tmp/reboot 2>/dev/null; true"):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        client.restart(fresh_machine)
        (tmp_path / "restarted").touch()
        output, _ = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 0, output
    assert b"Traceback" not in output
    assert guest.leftovers() == []


@pytest.mark.parametrize(
    "left", [None, 7, "", "relative", b"/bytes", ["/list"], "/tmp/pyinfra-gone"], ids=repr
)
def test_D9_disconnecting_never_fails(
    machine: str, connect: Callable[..., Remote], guest: Guest, left: object
) -> None:
    """Whatever the host's data is: before connecting, twice, and after a broken session."""
    remote = Remote(machine)
    remote.host.connector.disconnect()
    remote.connect()
    for key in ("sudo_askpass_path", "su_askpass_path__/tmp", "sudo_askpass_path__", "other"):
        remote.host.connector_data[key] = left
    remote.host.connector.disconnect()
    assert remote.host.connector_data == {"other": left}
    remote.host.connector.disconnect()
    remote.host.disconnect()
    with pytest.raises(OSError, match="not connected"):
        remote.run("true")
    remote.connect()
    remote.drop_session()
    remote.host.connector_data["sudo_askpass_path"] = left
    remote.host.disconnect()
    remote.connect()
    assert remote.out("echo on") == "on"
    remote.close()


def test_D9_disconnecting_after_everything_broke(
    client: Orbctl, machines: Any, base: str, connect: Callable[..., Remote], proxy: Proxy
) -> None:
    name = machines.clone(base)
    remote, other = connect(name, orbstack_user="bob"), connect(name, orbstack_user="bob")
    for one in (remote, other):
        assert one.out("id -un", _sudo=True, _sudo_password=PASSWORD) == "root"
    client.delete(name, client.info(name).id)
    remote.close()
    proxy.tell("any exit 2 panic: nil pointer dereference")
    other.close()


@pytest.mark.smoke
def test_D9_a_restart_drops_askpass_files(
    client: Orbctl, fresh_machine: str, connect: Callable[..., Remote]
) -> None:
    remote = connect(fresh_machine, orbstack_user="bob")
    for _ in range(2):
        assert remote.out("id -un", _sudo=True, _sudo_password=PASSWORD) == "root"
        client.restart(fresh_machine)
        assert remote.out("echo on") == "on"


@pytest.mark.parametrize("transport", WAYS)
def test_D10_the_client_is_killed(
    machine: str, connect: Callable[..., Remote], guest: Guest, transport: str
) -> None:
    remote = connect(machine, orbstack_transport=transport)
    guest.sh("rm -f /tmp/count; touch /tmp/count; chmod 666 /tmp/count")
    mark = f"60.{time.monotonic_ns() % 10**8}"
    running = gevent.spawn(remote.run, f"echo 1 >>/tmp/count; sleep {mark}")
    guest.wait_for(f"sleep {mark}", seconds=60)
    for pid in children():
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(OSError, match="unknown"):
        running.get(timeout=20)
    assert remote.out("cat /tmp/count") == "1"


def children() -> list[int]:
    """The processes that this one started."""
    found = subprocess.run(
        ["ps", "-o", "pid=,comm=", "--ppid", str(os.getpid())], capture_output=True, check=False
    )
    return [int(line.split()[0]) for line in found.stdout.splitlines() if b" ps" not in line]


def test_D11_orbstack_restarted(
    client: Orbctl, fresh_machine: str, connect: Callable[..., Remote], proxy: Proxy
) -> None:
    """All machines stop, and `orbctl` fails for a while."""
    remote = connect(fresh_machine)
    client.stop(fresh_machine)
    proxy.tell("run exit 1 OrbStack is not running")
    with pytest.raises(OSError, match="not running"):
        remote.run("true")
    proxy.tell("")
    assert remote.out("echo on") == "on"


# D12 to D15: the protocol


@pytest.mark.parametrize("transport", WAYS)
def test_D12_nothing_is_replayed_after_start(
    machine: str, proxy: Proxy, connect: Callable[..., Remote], guest: Guest, transport: str
) -> None:
    remote = connect(machine, orbstack_transport=transport)
    guest.sh("rm -f /tmp/count; touch /tmp/count; chmod 666 /tmp/count")
    outcomes = []
    # From the middle of the handshake to the end of the output of a command of this length.
    for number, length in enumerate(range(100, 1000, 60)):
        remote.drop_session()
        before = guest.sh("cat /tmp/count").split()
        proxy.tell(f"{proxy.run} once cut-out {length} 0")
        try:
            remote.run(f"echo {number} >>/tmp/count; echo done")
        except session.OutcomeUnknown:
            outcomes.append("unknown")
        else:
            outcomes.append("ran")
            # Cut before START: it was retried, and ran once.
            assert len(guest.sh("cat /tmp/count").split()) == len(before) + 1
        proxy.tell("")
        lines = guest.sh("cat /tmp/count").split()
        assert len(lines) == len(set(lines))
    assert {"unknown", "ran"} == set(outcomes), outcomes


@pytest.mark.parametrize("transport", WAYS)
def test_D13_before_start_it_is_retried_once(
    machine: str, proxy: Proxy, connect: Callable[..., Remote], transport: str
) -> None:
    remote = connect(machine, orbstack_transport=transport)
    remote.drop_session()
    proxy.tell(f"{proxy.run} once cut-in 10 0")
    before = proxy.calls(proxy.run)
    assert remote.out("echo on") == "on"
    assert proxy.calls(proxy.run) == before + 2
    remote.drop_session()
    proxy.tell(f"{proxy.run} exit 1 broken for good")
    before = proxy.calls(proxy.run)
    with pytest.raises(OSError, match="broken for good"):
        remote.run("true")
    assert proxy.calls(proxy.run) == before + 2


@pytest.mark.smoke
@pytest.mark.parametrize("transport", WAYS)
def test_D15_stray_bytes(
    machine: str, proxy: Proxy, connect: Callable[..., Remote], transport: str
) -> None:
    proxy.tell(f"{proxy.run} stray 60000")
    remote = connect(machine, orbstack_transport=transport)
    assert remote.out("echo on") == "on"
    remote.close()
    proxy.tell(f"{proxy.run} stray 70000")
    with pytest.raises(ConnectError, match="more than 65536 bytes"):
        connect(machine, orbstack_transport=transport, orbstack_boot_timeout=1)


# D17 to D21: creation and the guest


def test_D17_create_hangs_but_the_machine_exists(
    client: Orbctl,
    proxy: Proxy,
    machines: Any,
    connect: Callable[..., Remote],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """It is removed again: a machine that never became ready is not left behind."""
    monkeypatch.setattr(orbctl, "CREATE_TIMEOUT", 3.0)
    slow = tmp_path / "slow"
    slow.write_text(
        f'#!/bin/sh\n[ "$1" = create ] && {{ {client.command!r} "$@"; exec sleep 60; }}\n'
        f'exec {client.command!r} "$@"\n'
    )
    slow.chmod(0o755)
    monkeypatch.setenv(orbctl.COMMAND_VARIABLE, str(slow))
    name = machines.new_name()
    with pytest.raises(ConnectError, match="create did not answer"):
        connect(name, orbstack_image="ubuntu")
    assert name not in [machine.name for machine in client.machines()]


@pytest.mark.parametrize("whom", ["process", "group"])
def test_D18_create_interrupted(
    client: Orbctl, machines: Any, tmp_path: Path, whom: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = machines.new_name()
    slow = tmp_path / "slow"
    # Interrupted after the machine is created and before this is reported.
    slow.write_text(
        f'#!/bin/sh\n[ "$1" = create ] && {{ {client.command!r} "$@"; '
        f'touch {str(tmp_path / "made")!r}; exec sleep 60; }}\nexec {client.command!r} "$@"\n'
    )
    slow.chmod(0o755)
    monkeypatch.setenv(orbctl.COMMAND_VARIABLE, str(slow))
    (tmp_path / "inventory.py").write_text(
        f"hosts = [('@orbstack/{name}', {{'orbstack_image': 'ubuntu'}})]\n"
    )
    running = subprocess.Popen(
        [PYINFRA, "-y", "inventory.py", "exec", "--", "true"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "made").exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        if whom == "group":
            os.killpg(running.pid, signal.SIGINT)
        else:
            running.send_signal(signal.SIGINT)
        output, _ = running.communicate(timeout=20)
    finally:
        running.kill()
    assert b"Traceback" not in output
    assert name not in [machine.name for machine in client.machines()]


def test_D18_a_machine_that_never_answers_is_removed(
    client: Orbctl,
    proxy: Proxy,
    machines: Any,
    connect: Callable[..., Remote],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Only the shell has a short timeout: on a busy host, removing the machine may take a while.
    monkeypatch.setattr(session, "ANSWER_TIMEOUT", 1.0)
    proxy.tell("run hang")
    name = machines.new_name()
    with pytest.raises(ConnectError, match="does not answer"):
        connect(name, orbstack_image="ubuntu", orbstack_boot_timeout=1)
    assert name not in [machine.name for machine in client.machines()]


def test_D19_running_without_an_address(
    client: Orbctl,
    proxy: Proxy,
    machine: str,
    connect: Callable[..., Remote],
    asked_afresh: None,
) -> None:
    info = client.call("info", machine, "--format", "json").stdout.decode()
    bare = " ".join(info.split()).replace('"ip4"', '"no4"').replace('"ip6"', '"no6"')
    proxy.tell(f"info print {bare}")
    assert connect(machine).out("echo on") == "on"


@pytest.mark.parametrize("transport", WAYS)
def test_D20_the_disk_is_full(
    machine: str,
    connect: Callable[..., Remote],
    guest: Guest,
    transport: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """RLIMIT_FSIZE makes every write beyond 64 KiB fail, as a full disk does."""
    import io

    remote = connect(machine, orbstack_transport=transport)
    guest.sh(
        "rm -rf /var/tmp/full; mkdir -m 777 /var/tmp/full; cd /var/tmp/full; "
        "for name in file linked; do printf old >$name; done; ln linked other; chmod 666 *"
    )
    text = shell.text
    limited = "trap '' XFSZ\nulimit -f 128\n"
    monkeypatch.setattr(shell, "text", lambda name: limited + text(name))
    for name in ("file", "linked", "new"):
        for arguments in ({}, {"_sudo": True}):
            path = f"/var/tmp/full/{name}"
            with pytest.raises(OSError, match=f"^cannot write {path}: File too large$"):
                remote.put(io.BytesIO(b"x" * 300_000), path, **arguments)
    remote.put(io.BytesIO(b"fits"), "/var/tmp/full/fits")
    shown = guest.sh("cd /var/tmp/full; cat file linked other fits; ls -A; rm -r /var/tmp/full")
    assert shown == b"oldoldoldfitsfile\nfits\nlinked\nother\n"
    assert guest.leftovers() == []


def test_D21_tmp_missing(
    client: Orbctl, fresh_machine: str, connect: Callable[..., Remote]
) -> None:
    """Without a usable /tmp, temporary files go to another directory; none of them is executed."""
    import io

    guest = Guest(client, fresh_machine)
    guest.sh(
        "chmod 0 /tmp; mkdir /srv/closed; printf old >/srv/closed/file; chmod 666 /srv/closed/file"
    )
    remote = connect(fresh_machine)
    for path in ("file", "/srv/closed/file"):
        remote.put(io.BytesIO(b"x" * 100_000), path)
        assert remote.out(f"wc -c <{path}; ls -A ~ | grep pyinfra || true").split() == ["100000"]
    assert guest.leftovers() == []
