"""Hosts on a Mac that ssh reaches, with a real sshd: what works, and how it fails."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
from pyinfra.api import Config, Inventory, State
from pyinfra.api.exceptions import ConnectError, InventoryError

from benchmarks.relay import relay
from pyinfra_orbstack import cli, inventory, orbctl, places, provision
from pyinfra_orbstack import record as record_module
from pyinfra_orbstack.connector import OrbStackConnector
from pyinfra_orbstack.making import Making
from pyinfra_orbstack.orbctl import Orbctl
from pyinfra_orbstack.places import SSH_KEY, SSH_VARIABLE, place_of
from pyinfra_orbstack.protocol import OutcomeUnknown
from pyinfra_orbstack.record import Record
from pyinfra_orbstack.runner import Runner
from pyinfra_orbstack.targets import Target

from ..conformance.conftest import Remote
from ..conftest import ROOT
from ..loopback import MAC, disconnect, free_port
from .conftest import HERE, Mac

pytestmark = pytest.mark.thorough

ODD = 'it\'s $HOME "`id`" \\ ü 🦀'
NAME = 'it\'s-$HOME-`id`-"x"'
#: What the profile of an account may print, before everything else.
GREETING = 'Welcome\n[1, 2]\n{"id": 1}'


def process_tree(word: str) -> list[str]:
    """Command lines on this host that contain a word, except ours."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if word in line and path.parent.name != str(os.getpid()):
            found.append(line)
    return found


def gone(word: str, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while process_tree(word):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


# What works


def test_commands(connect: Callable[..., Remote]) -> None:
    web = connect()
    assert web.run(f"printf %s '{ODD.replace(chr(39), '')}'").out == [ODD.replace("'", "")]
    assert web.run("echo out; echo err >&2") == (True, ["out"], ["err"])
    for status in (1, 127, 254, 255):
        web.exits(f"exit {status}", status)
    assert web.out("cat", _stdin=ODD) == ODD
    assert web.out("wc -c", _stdin=b"x" * 6_000_000) == "6000000"
    assert web.run("[ -t 0 ] && [ -t 1 ]", _get_pty=True).ok
    web.exits("exit 255", 255, _get_pty=True)


def test_spawned_commands(connect: Callable[..., Remote]) -> None:
    web = connect(orbstack_transport="spawn")
    assert web.out("cat", _stdin=b"x" * 100_000) == "x" * 100_000
    web.exits("exit 255", 255)


def test_files(connect: Callable[..., Remote], tmp_path: Path) -> None:
    web = connect()
    for size in (0, 10, 100_000, 1_000_000, 6_000_000):
        data = os.urandom(size)
        path = tmp_path / f"{size} {NAME}".replace("/", "")
        web.put(io.BytesIO(data), str(path))
        assert path.read_bytes() == data
        arrived = io.BytesIO()
        web.get(str(path), arrived)
        assert arrived.getvalue() == data
    with pytest.raises(OSError, match="Is a directory"):
        web.put(io.BytesIO(bytes(1_000_000)), str(tmp_path))
    assert web.out("echo on") == "on"


def test_a_command_that_takes_too_long_is_killed(connect: Callable[..., Remote]) -> None:
    web = connect()
    for options in ({}, {"_get_pty": True}):
        with pytest.raises(TimeoutError, match="was killed"):
            web.run("sleep 987654.5 & sleep 987654.5", _timeout=1, **options)
        assert not process_tree("sleep 987654.5")
        assert web.out("echo on") == "on"


def test_a_container(
    mac: Mac, connect: Callable[..., Remote], monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = "0f" * 32
    record = (
        f'[{{"Id": "{identity}", "Name": "/db", "Config": {{}}, "State": {{"Status": "running"}}}}]'
    )
    docker = mac.home / "docker"
    docker.write_text(
        "#!/bin/sh\n"
        '[ "$1" = --context ] && shift 2\n'
        "case $1 in context) ;; ps) echo " + identity + " ;;\n"
        f"container) echo '{record}' ;;\n"
        "exec) while [ $1 != " + identity + ' ]; do shift; done; shift; exec "$@" ;;\nesac\n'
    )
    mac.server.provide("docker", "sh", str(docker))
    assert connect("docker/db").out("echo $0") == "sh"
    # Whatever the account's login shell prints first.
    mac.server.greet(GREETING)
    assert connect("docker/db").out("echo $0") == "sh"
    monkeypatch.setenv(SSH_VARIABLE, MAC)
    inventory.list_containers.cache.clear()
    ((name, data, _),) = OrbStackConnector.make_names_data("docker")
    assert (name, data["container_id"]) == ("@orbstack/docker/db", identity)


def test_inventory_with_the_variable(mac: Mac, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SSH_VARIABLE, MAC)
    (mac.machines / NAME).write_text("01KHVDCW7HTAGRPMB823KADP9C\n")
    names = {name for name, _, _ in OrbStackConnector.make_names_data()}
    assert names == {"@orbstack/web", f"@orbstack/{NAME}"}
    ((_, data, groups),) = OrbStackConnector.make_names_data("w*")
    assert data["vm_id"] == "01KHVDCW7HTAGRPMB823KADP9B"
    assert "orbstack_running" in groups
    odd = Remote(NAME).connect()
    assert odd.out("echo on") == "on"
    odd.close()


def test_listed_hosts_are_those_of_one_place(
    mac: Mac, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, connect: Callable[..., Remote]
) -> None:
    here = tmp_path / "orbctl"
    here.write_text(
        f'#!/bin/sh\nexport ORBCTL_TEST_HOME="${{0%/*}}"\nexec {mac.server.bin}/orbctl "$@"\n'
    )
    here.chmod(0o755)
    (tmp_path / "machines").mkdir()
    (tmp_path / "machines" / "web").write_text("01KHVDCW7HTAGRPMB823KADP9D\n")
    monkeypatch.setenv(orbctl.COMMAND_VARIABLE, str(here))
    web = connect()
    assert web.host.connector.runner.target.machine.id.endswith("9B")
    assert "vm_id" not in web.host.data.dict()
    inventory.list_machines.cache.clear()
    listed = Inventory((["@orbstack/w*"], {"orbstack_ssh": MAC}))
    State(listed, Config())
    with pytest.raises(ConnectError, match=r"was listed on this host, .*set PYINFRA_ORBSTACK_SSH"):
        listed.get_host("@orbstack/web").connect(raise_exceptions=True)


def test_data_of_a_host_that_is_not_connected(mac: Mac, tmp_path: Path) -> None:
    """It is not that of a machine of the same name here."""
    here = tmp_path / "machines"
    here.mkdir()
    (here / "web").write_text("01KHVDCW7HTAGRPMB823KADP9D\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ORBCTL_TEST_HOME", str(tmp_path))
        patch.setenv(orbctl.COMMAND_VARIABLE, str(HERE / "orbctl.sh"))
        listed = Inventory((["@orbstack/web"], {SSH_KEY: MAC}))
        State(listed, Config())
    data = listed.get_host("@orbstack/web").data
    assert (data.vm_name, data.get("vm_id")) == ("web", None)
    assert data.get("orbstack_ip4") is None


@pytest.mark.parametrize("greeting", ["", GREETING], ids=["", "greeting"])
def test_create_on_connect(
    mac: Mac,
    connect: Callable[..., Remote],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    greeting: str,
) -> None:
    monkeypatch.setenv(orbctl.RECORD_VARIABLE, str(tmp_path / "record"))
    mac.server.greet(greeting)
    place_of(MAC).__dict__.pop("_home", None)
    data = tmp_path / "user data"
    data.write_text(f"#cloud-config\n# {ODD}\n")
    new = connect(
        "new",
        orbstack_image="debian",
        orbstack_cloud_init=str(data),
        orbstack_isolated=True,
        orbstack_mounts=["~/src:/src", "/no/such/directory/here"],
    )
    assert new.out("echo on") == "on"
    created = (mac.home / "created").read_text().splitlines()
    home = subprocess.check_output(["sh", "-c", "printf %s ~"], text=True)
    assert created[-6:] == [
        *("--mount", f"{home}/src:/src", "--mount", "/no/such/directory/here", "debian", "new")
    ]
    assert (mac.home / "user-data").read_text() == data.read_text()
    assert not Path(created[created.index("--user-data") + 1]).exists()
    record = Record(tmp_path / "record")
    made = (mac.machines / "new").read_text().strip()
    assert record.machines() == {"new": made}
    assert (tmp_path / "record.orbctl").read_text() == f"{made} ssh {MAC}\n"
    assert record.places() == ([MAC], False)
    assert record.delete_all(Orbctl(place=place_of(MAC))) == ["new"]
    assert record.machines() == {}


def test_destroy_deletes_machines_where_they_are(
    mac: Mac, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".orbstack").mkdir()
    machine = Orbctl(place=place_of(MAC)).info("web")
    Record(cli.RECORD).add(machine, Orbctl(place=place_of(MAC)))
    # One of the same name is here.
    here = tmp_path / "here"
    (here / "machines").mkdir(parents=True)
    (here / "machines" / "web").write_text("01KHVDCW7HTAGRPMB823KADP9D\n")
    monkeypatch.setenv("ORBCTL_TEST_HOME", str(here))
    monkeypatch.setenv(orbctl.COMMAND_VARIABLE, str(mac.server.bin / "orbctl"))
    assert cli.main(["destroy", "--yes"]) == 0
    assert capsys.readouterr().out == "deleted: web\n"
    assert not (mac.machines / "web").exists()
    assert (here / "machines" / "web").exists()


@pytest.fixture
def here(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The machines of this host: another one called `web`."""
    folder = project / "here" / "machines"
    folder.mkdir(parents=True)
    (folder / "web").write_text("01KHVDCW7HTAGRPMB823KADP9D\n")
    monkeypatch.setenv("ORBCTL_TEST_HOME", str(folder.parent))
    monkeypatch.setenv(orbctl.COMMAND_VARIABLE, str(HERE / "orbctl.sh"))
    return folder


def record_both() -> None:
    """The project has created the machine here and the one on the Mac."""
    record = Record(cli.RECORD)
    for client in (Orbctl(place=places.HERE), Orbctl(place=place_of(MAC))):
        record.add(client.info("web"), client)


@pytest.mark.parametrize("asleep", [False, True])
def test_destroy_deletes_the_machines_of_its_inventory_only(
    mac: Mac,
    project: Path,
    capsys: pytest.CaptureFixture[str],
    asleep: bool,
    here: Path,
) -> None:
    """Machines of one name, here and on a Mac, were created by one project."""
    (project / "inventories" / "local.py").write_text('hosts = ["@orbstack/web"]\n')
    (project / "inventories" / "far.py").write_text(
        f'hosts = [("@orbstack/web", {{"orbstack_ssh": "{MAC}"}})]\n'
    )
    record_both()
    if asleep:
        disconnect()
        mac.server.reach(free_port())
    assert cli.main(["destroy", "local", "--yes"]) == 0
    assert capsys.readouterr().out == "deleted: web\n"
    assert not (here / "web").exists()
    assert (mac.machines / "web").exists()
    assert cli.main(["destroy", "far", "--yes"]) == int(asleep)
    assert (mac.machines / "web").exists() == asleep


@pytest.mark.parametrize("words", [(), ("both",)], ids=["all", "inventory"])
def test_destroy_deletes_what_it_reaches(
    mac: Mac,
    project: Path,
    capsys: pytest.CaptureFixture[str],
    here: Path,
    words: tuple[str, ...],
) -> None:
    """A Mac that is gone for good does not keep the machines of other places."""
    (project / "inventories" / "both.py").write_text(
        f'hosts = ["@orbstack/web", ("@orbstack/plain/web", {{"orbstack_ssh": "{MAC}"}})]\n'
    )
    record_both()
    disconnect()
    mac.server.reach(free_port())
    for gone in ("deleted: web\n", ""):
        assert cli.main(["destroy", *words, "--yes"]) == 1
        shown = capsys.readouterr()
        assert shown.out == gone
        assert shown.err.startswith("mac cannot be reached (")
        assert shown.err.endswith(
            "; nothing was deleted on mac: if that Mac no longer exists, remove from "
            f"{cli.RECORD}: web 01KHVDCW7HTAGRPMB823KADP9B\n"
        )
        assert shown.err.count("\n") == 1
        assert not (here / "web").exists()
    mac.server.reach(mac.server.port)
    assert cli.main(["destroy", *words, "--yes"]) == 0
    assert not (mac.machines / "web").exists()


def test_destroy_tells_of_a_machine_that_may_come_from_a_killed_run(
    mac: Mac, capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    cli.RECORD.parent.mkdir()
    cli.RECORD.write_text(f"web ? 1 - 999999999.1 {record_module.place_of(Orbctl())}\n")
    assert cli.main(["destroy", "--yes"]) == 0
    shown = capsys.readouterr()
    assert "web (01KHVDCW7HTAGRPMB823KADP9D) may come from a run that was killed" in shown.err
    assert (here / "web").exists()


def test_a_create_that_is_interrupted_leaves_nothing(
    mac: Mac, connect: Callable[..., Remote], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orbctl, "CREATE_TIMEOUT", 1.0)
    (mac.home / "slow").touch()
    with pytest.raises(ConnectError, match="did not answer in 1 s"):
        connect("new", orbstack_image="debian")
    assert gone("orbctl.sh create")
    assert not (mac.machines / "new").exists()


def test_a_machine_is_removed_through_a_new_connection(mac: Mac) -> None:
    """The one that created it was lost while the machine booted."""
    client = Orbctl(place=place_of(MAC))
    made = Making(client, "new", ["create", "debian", "new"], None)
    said: list[str] = []
    made.finish(30, said.append)
    assert (mac.machines / "new").exists()
    disconnect()
    made.undo(said.append)
    assert said == []
    assert not (mac.machines / "new").exists()


def lose(mac: Mac) -> None:
    """End the connection as if the Mac fell asleep."""
    mac.server.reach(free_port())
    place = place_of(MAC)
    assert isinstance(place, places.Mac)
    assert place._link is not None
    argv = [*place._link.through(["ssh"]), "-O", "exit", MAC]
    subprocess.run(argv, check=True, capture_output=True)
    # ssh answers before it has ended.
    deadline = time.monotonic() + 20
    while place._link.open:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_mac_lost_after_a_create_fails_its_hosts_alone(
    mac: Mac, connect: Callable[..., Remote], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine that remains is announced."""
    said: list[str] = []
    monkeypatch.setattr(provision.Provision, "_warn", lambda _, line: said.append(line))
    real = OrbStackConnector._open_runner

    def sleeping(self: OrbStackConnector, target: Target, **options: bool) -> Runner:
        if place_of(MAC)._link.open:  # type: ignore[attr-defined]
            lose(mac)
        return real(self, target, **options)

    monkeypatch.setattr(OrbStackConnector, "_open_runner", sleeping)
    wanted = r"machine 'new' does not answer: mac cannot be reached \(.*refused\)"
    fails(connect, wanted, name="new", orbstack_image="debian", orbstack_boot_timeout=1)
    (line,) = said
    assert re.fullmatch(
        "machine new was created, but is unusable, and deleting it failed: mac cannot be reached "
        r"\(.*\): .*; to delete it, run: orbctl delete --force new \(on mac\)",
        line,
    )
    assert (mac.machines / "new").exists()


def test_a_signal_removes_a_machine_without_a_connection(mac: Mac) -> None:
    """A signal handler cannot wait for a new one."""
    client = Orbctl(place=place_of(MAC))
    made = Making(client, "new", ["create", "debian", "new"], None)
    made.finish(30, lambda line: None)
    lose(mac)
    with pytest.raises(places.PlaceError):
        client.place.open()
    mac.server.reach(mac.server.port)
    made.give_up()
    deadline = time.monotonic() + 20
    while (mac.machines / "new").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    said: list[str] = []
    made.undo(said.append)
    assert said == []


def test_more_hosts_than_a_connection_carries(mac: Mac, connect: Callable[..., Remote]) -> None:
    """sshd allows ten sessions per connection; other hosts have a connection of their own."""
    hosts = []
    for number in range(11):
        (mac.machines / f"web-{number}").write_text(f"01KHVDCW7HTAGRPMB823KADP{number:02}\n")
        hosts.append(connect(f"web-{number}"))
    jobs = [gevent.spawn(one.out, "sleep 0.2; echo on") for one in hosts]
    assert [job.get(timeout=30) for job in jobs] == ["on"] * 11


def test_one_control_connection(mac: Mac, connect: Callable[..., Remote]) -> None:
    (mac.machines / "other").write_text("01KHVDCW7HTAGRPMB823KADP9C\n")
    for name in ("web", "other"):
        assert connect(name).out("echo on") == "on"
    deadline = time.monotonic() + 20
    # That of the test before may be ending.
    while len([one for one in process_tree("ControlMaster=yes") if str(mac.home) in one]) != 1:
        assert time.monotonic() < deadline
        time.sleep(0.05)


# `pyinfra-orbstack`


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "inventories").mkdir()
    (tmp_path / "deploy.py").write_text(
        "from pyinfra.operations import server\n"
        f'server.shell(name="Write", commands=["echo on >>\'{tmp_path}/ran\'"])\n'
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(orbctl.COMMAND_VARIABLE, raising=False)
    return tmp_path


def command(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    argv = [str(Path(sys.executable).with_name("pyinfra-orbstack")), *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), **variables}
    return subprocess.run(
        argv, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100
    )


def test_deploy_and_plan(mac: Mac, project: Path) -> None:
    inventory = project / "inventories" / "far.py"
    inventory.write_text(f'hosts = [("@orbstack/web", {{"orbstack_ssh": "{MAC}"}})]\n')
    planned = command("plan", "far")
    assert planned.returncode == 0, planned
    assert not (project / "ran").exists()
    done = command("deploy", "far")
    assert done.returncode == 0, done
    assert (project / "ran").read_text() == "on\n"
    inventory.write_text('hosts = [("@orbstack/new", {"orbstack_image": "debian"})]\n')
    planned = command("plan", "far", **{SSH_VARIABLE: MAC})
    assert "new would be created" in planned.stdout, planned
    assert not (mac.machines / "new").exists()


def test_a_plan_shows_the_command_for_the_mac(
    mac: Mac, connect: Callable[..., Remote], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its `~` is the home there, and the cloud-init file is still here."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(orbctl.PLAN_VARIABLE, "1")
    place_of(MAC).__dict__.pop("_home", None)
    (tmp_path / "user data").write_text("#cloud-config\n")
    home = subprocess.check_output(
        ["env", "-u", "HOME", sys.executable, "-c", "import os; print(os.path.expanduser('~'))"],
        text=True,
    ).strip()
    assert home != str(tmp_path)
    line = (
        f"to create it, copy {tmp_path}/user data to '{home}/user data' on mac, then run: "
        f"orbctl create --user-data '{home}/user data' --isolated --mount {home}/src:/src "
        "debian new (on mac)"
    )
    data = {"orbstack_image": "debian", "orbstack_isolated": True, "name": "new"}
    mounts = {"orbstack_mounts": ["~/src:/src"]}
    fails(connect, re.escape(line) + "$", orbstack_cloud_init="~/user data", **mounts, **data)
    fails(connect, "now; to create it, run: orbctl create --isolated debian new", **data)
    assert not (mac.machines / "new").exists()


def test_plan_beside_a_local_machine_of_that_name(mac: Mac, project: Path) -> None:
    """A plan creates nothing on the Mac because of a machine here."""
    here = project / "here" / "machines"
    here.mkdir(parents=True)
    for number, name in enumerate(("new", "other")):
        (here / name).write_text(f"01KHVDCW7HTAGRPMB823KADP{number:02}\n")
    (project / "inventories" / "both.py").write_text(
        f'hosts = [("@orbstack/new", {{"orbstack_ssh": "{MAC}", "orbstack_image": "debian"}}),\n'
        '         "@orbstack/other"]\n'
    )
    local = {orbctl.COMMAND_VARIABLE: str(HERE / "orbctl.sh"), "ORBCTL_TEST_HOME": str(here.parent)}
    planned = command("plan", "both", **local)
    assert "new would be created" in planned.stdout, planned.stderr
    assert not (mac.machines / "new").exists()


def test_shell(mac: Mac, project: Path) -> None:
    """In a terminal, with its size and the status of the shell."""
    code = """if True:
        import fcntl, os, pty, struct, sys, termios
        pid, terminal = pty.fork()
        if not pid:
            os.execvp(sys.argv[1], sys.argv[1:])
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 31, 97, 0, 0))
        os.write(terminal, b"PS1=; stty size; exit 255\\n")
        said = b""
        try:
            while piece := os.read(terminal, 1000):
                said += piece
        except OSError:
            pass
        assert b"31 97" in said, said
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    """
    argv = [str(Path(sys.executable).with_name("pyinfra-orbstack")), "shell", "web"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), SSH_VARIABLE: MAC, "SHELL": "/bin/sh"}
    done = subprocess.run([sys.executable, "-c", code, *argv], env=env, timeout=60)
    assert done.returncode == 255
    missing = command("shell", "none", **{SSH_VARIABLE: MAC})
    assert missing.stderr == "there is no machine 'none': set M to one of: web\n"


def test_shell_in_a_host_of_an_inventory(mac: Mac, project: Path) -> None:
    """It is opened where the host's data says, although another one is usual."""
    here = project / "here" / "machines"
    here.mkdir(parents=True)
    (here / "other").write_text("01KHVDCW7HTAGRPMB823KADP01\n")
    local = {orbctl.COMMAND_VARIABLE: str(HERE / "orbctl.sh"), "ORBCTL_TEST_HOME": str(here.parent)}
    (project / "inventories" / "both.py").write_text(
        f'hosts = [("@orbstack/web", {{"orbstack_ssh": "{MAC}"}}), "@orbstack/other"]\n'
    )
    missing = "there is no machine 'web': set M to one of: other\n"
    assert command("shell", "web", **local).stderr == missing
    for name in ("web", "other"):
        opened = command("shell", name, "both", **local)
        assert (opened.returncode, opened.stderr) == (0, ""), opened
    assert "no inventory 'none'" in command("shell", "web", "none", **local).stderr


# How it fails


def fails(connect: Callable[..., Remote], wanted: str, **data: Any) -> None:
    with pytest.raises(ConnectError, match=wanted) as caught:
        connect(**data)
    assert "\n" not in str(caught.value)


def test_a_mac_that_cannot_be_reached(
    mac: Mac, connect: Callable[..., Remote], monkeypatch: pytest.MonkeyPatch
) -> None:
    mac.server.reach(1)
    fails(connect, r"mac cannot be reached \(.*refused\): check that the Mac is awake")
    monkeypatch.setenv(SSH_VARIABLE, MAC)
    inventory.list_machines.cache.clear()
    with pytest.raises(InventoryError, match="cannot be reached"):
        list(OrbStackConnector.make_names_data())


def test_a_mac_that_does_not_answer(
    mac: Mac, connect: Callable[..., Remote], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "CONNECT_TIMEOUT", 1)
    with relay(mac.server.port, 3600) as (port, _):
        mac.server.reach(port)
        fails(connect, r"mac cannot be reached \(.*timed out.*\)")


def test_a_changed_host_key(mac: Mac, connect: Callable[..., Remote]) -> None:
    # As if the known key were an old one.
    known = mac.server.folder / "known-hosts"
    mac.server.new_key("old-key")
    kind, key = (mac.server.folder / "old-key.pub").read_text().split()[:2]
    known.write_text(f"[127.0.0.1]:{mac.server.port} {kind} {key}\n")
    fails(connect, "the host key of mac has changed: .*ssh-keygen -R")
    known.write_text("")
    fails(connect, "the host key of mac is unknown: run `ssh mac` once")


def test_a_refused_login(mac: Mac, connect: Callable[..., Remote]) -> None:
    fails(connect, r"nobody@mac refused the login", orbstack_ssh=f"nobody@{MAC}")
    key, kept = mac.server.folder / "key", mac.server.folder / "kept"
    key.rename(kept)
    try:
        fails(connect, r"mac refused the login .*works without a password")
    finally:
        kept.rename(key)


def test_no_orbctl_there(mac: Mac, connect: Callable[..., Remote]) -> None:
    (mac.server.bin / "orbctl").unlink()
    fails(connect, "orbctl was not found on mac: install OrbStack there")


def test_an_orbctl_that_exits_with_255(mac: Mac, connect: Callable[..., Remote]) -> None:
    mac.server.provide("orbctl", "sh", "-c", "echo broken >&2; exit 255")
    fails(connect, "^broken$")


def test_what_is_not_a_destination(connect: Callable[..., Remote], tmp_path: Path) -> None:
    for value in (f"-oProxyCommand=touch {tmp_path}/ran", "a b", "-V", "", 7):
        fails(connect, "orbstack_ssh .*must", orbstack_ssh=value)
    assert not (tmp_path / "ran").exists()


def test_no_ssh_here(connect: Callable[..., Remote], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    fails(connect, "ssh not found")


@pytest.mark.parametrize("how", ["cut", "silent"])
def test_the_network_ends_while_a_command_runs(
    mac: Mac,
    connect: Callable[..., Remote],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    how: str,
) -> None:
    monkeypatch.setattr(places, "ALIVE_INTERVAL", 1)
    monkeypatch.setattr(places, "CONNECT_TIMEOUT", 10)
    with relay(mac.server.port, 0) as (port, relaying):
        mac.server.reach(port)
        web = connect()
        job = gevent.spawn(web.run, f"echo ran >>{tmp_path}/ran; sleep 60")
        while not (tmp_path / "ran").exists():
            gevent.sleep(0.05)
        relaying.send_signal(signal.SIGKILL if how == "cut" else signal.SIGSTOP)
        with pytest.raises(OutcomeUnknown, match="its outcome is unknown, so it is not repeated"):
            job.get(timeout=30)
        relaying.send_signal(signal.SIGCONT)
    # The network is back, and so is the next command.
    mac.server.reach(mac.server.port)
    assert web.out(f"cat {tmp_path}/ran") == "ran"


def test_a_command_after_the_connection_was_lost(mac: Mac, connect: Callable[..., Remote]) -> None:
    web = connect()
    assert web.out("echo on") == "on"
    disconnect()
    while web.host.connector.runner.session.alive:
        gevent.sleep(0.05)
    for _ in range(2):
        assert web.out("echo on") == "on"


# Nothing is left


@pytest.fixture
def short() -> Iterator[Path]:
    """A temporary directory whose path is short enough for sockets below it."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.parametrize("end", ["exit", "SIGTERM", "SIGKILL"])
def test_no_connection_remains(mac: Mac, end: str, short: Path) -> None:
    code = f"""if True:
        import sys, time
        from tests.conformance.conftest import Remote
        web = Remote("web", orbstack_ssh="{MAC}").connect()
        print(web.out("echo on"), flush=True)
        sys.stdin.readline() if "{end}" == "exit" else time.sleep(60)
    """
    env = {**os.environ, "TMPDIR": str(short), "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == b"on\n"
        assert list(short.glob("orb-*"))
        if end == "exit":
            child.stdin.close()
        else:
            child.send_signal(getattr(signal, end))
        child.wait(30)
    assert gone(str(mac.server.folder / "client-config"))
    deadline = time.monotonic() + 10
    while left := list(short.iterdir()):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
