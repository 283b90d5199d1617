"""Sections C, N and S: concurrency, odd names, and secrets."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
import pytest
from pyinfra.api import Config, Inventory, State
from pyinfra.api.connect import connect_all, disconnect_all
from pyinfra.api.exceptions import ConnectError, InventoryError

from pyinfra_orbstack import inventory, orbctl
from pyinfra_orbstack.connector import OrbStackConnector
from pyinfra_orbstack.orbctl import Orbctl

from .conftest import PASSWORD, PLACES, WAYS, Guest, Proxy, Remote

PYINFRA = os.path.join(os.path.dirname(sys.executable), "pyinfra")


def run_all(jobs: list[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[Any]:
    greenlets = [gevent.spawn(function, *words) for function, words in jobs]
    return [greenlet.get(timeout=600) for greenlet in greenlets]


def test_C1_many_machines(machines: Any) -> None:
    """50 sessions to as many machines as the suite may make, 20 commands each."""
    count = int(os.environ.get("CONFORMANCE_MACHINES", "50"))
    names = [machines.create() for _ in range(count)]
    state = State(Inventory(([f"@orbstack/{name}" for name in names], {})), Config())
    connect_all(state)
    try:

        def work(host: Any) -> list[list[str]]:
            return [
                host.run_shell_command(f"hostname; echo {number}")[1].stdout_lines
                for number in range(20)
            ]

        results = run_all([(work, (host,)) for host in state.inventory])
    finally:
        disconnect_all(state)
    assert len(results) == count
    for host, lines in zip(state.inventory, results):
        name = host.name.split("/")[1]
        assert lines == [[name, str(number)] for number in range(20)]
    for name in names:
        machines.client.delete(name, machines.record.machines()[name])


def test_C2_many_sessions_on_one_machine(machine: str, connect: Callable[..., Remote]) -> None:
    remotes = [connect(machine) for _ in range(50)]
    results = run_all([(remote.out, (f"echo {n}",)) for n, remote in enumerate(remotes)])
    assert results == [str(n) for n in range(50)]


@pytest.mark.smoke
def test_C2_greenlets_share_one_session(machine: str, connect: Callable[..., Remote]) -> None:
    """Another host's greenlet may ask this host's facts: exchanges never mix."""
    remote = connect(machine)
    results = run_all([(remote.out, (f"sleep 0.0{n % 5}; echo {n}",)) for n in range(40)])
    assert results == [str(n) for n in range(40)]


def test_C3_two_pyinfra_processes(machine: str, guest: Guest) -> None:
    guest.sh("rm -f /tmp/c3; touch /tmp/c3; chmod 666 /tmp/c3")
    text = "for i in 1 2 3 4 5 6 7 8 9; do echo x >>/tmp/c3; done"
    command = [PYINFRA, "-y", f"@orbstack/{machine}", "exec", "--", text]
    out = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    running = [subprocess.Popen(command, **out) for _ in range(2)]
    assert [process.wait(timeout=60) for process in running] == [0, 0]
    assert len(guest.sh("cat /tmp/c3").split()) == 18


def test_C4_two_creators_of_one_name(client: Orbctl, machines: Any, tmp_path: Path) -> None:
    name = machines.new_name()
    (tmp_path / "inventory.py").write_text(
        f"hosts = [('@orbstack/{name}', {{'orbstack_image': 'ubuntu'}})]\n"
    )
    record = tmp_path / "record"
    running = [
        subprocess.Popen(
            [PYINFRA, "-y", "inventory.py", "exec", "--", "hostname"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, orbctl.RECORD_VARIABLE: str(record)},
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=90)[0] for process in running]
    machines.own(name)
    assert [process.returncode for process in running] == [0, 0], outputs
    assert len(record.read_text().splitlines()) == 1


def open_files() -> int:
    return len(os.listdir("/dev/fd"))


def test_C5_open_files_are_stable(one: Remote) -> None:
    one.run("true")
    before = open_files()
    for _ in range(900):
        one.run("true")
    for _ in range(50):
        one.run("true", _stdin=b"x" * 70_000)
    for _ in range(20):
        with pytest.raises(TimeoutError):
            one.run("sleep 5", _timeout=0.05)
    one.run("true")
    assert open_files() - before <= 5


def test_C7_a_slow_host_blocks_no_other_host(
    client: Orbctl, shared_machine: str, fresh_machine: str, connect: Callable[..., Remote]
) -> None:
    slow, quick = connect(fresh_machine), connect(shared_machine)
    waiting = gevent.spawn(slow.run, "until [ -e /tmp/go ]; do sleep 0.1; done", _timeout=60)
    gevent.sleep(0.2)
    for _ in range(20):
        quick.run("true")
    assert not waiting.ready()
    Guest(client, fresh_machine).sh("touch /tmp/go")
    waiting.get(timeout=60)


THREADS = """
import io, sys, threading
from pyinfra.api import Config, Inventory, State
from pyinfra.api.connect import connect_all, disconnect_all

failed = []

def work(number, transport):
    try:
        data = {"orbstack_transport": transport}
        state = State(Inventory(([(sys.argv[1], data)], {})), Config())
        connect_all(state)
        (host,) = state.inventory
        for turn in range(5):
            ok, output = host.run_shell_command(f"echo {number} {turn}; exit {turn % 2}")
            assert (ok, output.stdout) == (turn % 2 == 0, f"{number} {turn}"), output
        path = f"/tmp/thread-{number}"
        data = bytes([number]) * 100_000
        assert host.put_file(io.BytesIO(data), path)
        arrived = io.BytesIO()
        assert host.get_file(path, arrived)
        assert arrived.getvalue() == data
        assert host.run_shell_command(f"rm {path}; test -t 0", _get_pty=True)[0]
        try:
            host.run_shell_command("sleep 30", _timeout=1)
        except TimeoutError:
            pass
        assert host.run_shell_command("true")[0]
        disconnect_all(state)
    except BaseException as error:
        failed.append(repr(error))

jobs = [threading.Thread(target=work, args=(n, ("session", "spawn")[n % 2])) for n in range(6)]
[job.start() for job in jobs]
[job.join() for job in jobs]
print(*failed, sep="\\n")
"""


@pytest.mark.parametrize("patch", ["", "from gevent import monkey; monkey.patch_all()"])
def test_C2_worker_threads(machine: str, patch: str) -> None:
    """Each has its own hosts."""
    done = subprocess.run(
        [sys.executable, "-c", patch + THREADS, f"@orbstack/{machine}"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.stdout.strip(), done.stderr) == ("", "")


SHARED = """
import io, sys, threading
from pyinfra.api import Config, Inventory, State
from pyinfra.api.connect import connect_all, disconnect_all

state = State(Inventory(([(sys.argv[1], {"orbstack_transport": sys.argv[2]})], {})), Config())
(host,) = state.inventory
found = []

def in_threads(count, work):
    jobs = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(count)]
    [job.start() for job in jobs]
    [job.join(20) for job in jobs]

def use(number):
    try:
        ok, output = host.run_shell_command(f"sleep 0.{number}; echo {number}")
        arrived = io.BytesIO()
        host.put_file(io.BytesIO(b"x" * 100_000), f"/tmp/shared-{number}")
        host.get_file(f"/tmp/shared-{number}", arrived)
        found.append((ok, output.stdout, len(arrived.getvalue())))
    except BaseException as error:
        found.append(repr(error))

in_threads(1, lambda number: connect_all(state))
use(0)
in_threads(4, use)
in_threads(1, lambda number: disconnect_all(state))
print(sorted(found) == sorted((True, str(n), 100_000) for n in (0, 0, 1, 2, 3)) or found)
"""


@pytest.mark.parametrize("transport", ["session", "spawn"])
def test_C2_threads_share_a_host(machine: str, transport: str) -> None:
    """One thread connects it; others use and disconnect it."""
    done = subprocess.run(
        [sys.executable, "-c", SHARED, f"@orbstack/{machine}", transport],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert (done.stdout.strip(), done.stderr) == ("True", "")


FEW_FILES = """
import io, os, sys
from pyinfra.api import Config, Inventory, State
from pyinfra.api.exceptions import ConnectError

hosts = []
while True:
    state = State(Inventory(([sys.argv[1]], {})), Config())
    (host,) = state.inventory
    try:
        host.connect(show_errors=False, raise_exceptions=True)
    except ConnectError as error:
        print(error)
        break
    hosts.append(host)

def attempts():
    host = hosts[-1]
    yield lambda: host.run_shell_command("true")[0]
    yield lambda: host.run_shell_command("true", _get_pty=True)[0]
    yield lambda: host.run_shell_command("true", _stdin=b"x" * 100_000)[0]
    yield lambda: host.put_file(io.BytesIO(b"x" * 100_000), "/tmp/c5")

hosts.pop(0).disconnect()
hosts.pop(0).disconnect()
for spare in range(12):
    files = []
    try:
        while True:
            files.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        [os.close(files.pop()) for _ in range(min(spare, len(files)))]
    for attempt in attempts():
        try:
            assert attempt()
        except OSError as error:
            print(error)
    [os.close(file) for file in files]
for attempt in attempts():
    assert attempt()
print("works")
hosts[-1].run_shell_command("rm -f /tmp/c5")
"""


# Not in a container: podman, which the tests use, sets the limits of a container itself.
@pytest.mark.parametrize("transport", ["session"])
def test_C5_too_many_open_files(machine: str, transport: str) -> None:
    """A one-line error, whatever needs one more; with enough, everything works again."""
    done = subprocess.run(
        ["sh", "-c", 'ulimit -n 64; exec "$@"', "sh"]
        + [sys.executable, "-c", FEW_FILES, f"@orbstack/{machine}"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.stdout.count("\n") > 2, done
    first, *lines, last = done.stdout.splitlines()
    assert "too many open files: raise the limit (ulimit -n) or use fewer hosts" in first
    assert len(lines) > 10
    assert [line for line in lines if "too many open files" not in line.lower()] == []
    assert (last, done.stderr) == ("works", "")


# N


@pytest.fixture(autouse=True)
def _fresh_listing() -> None:
    inventory.list_machines.cache.clear()


@pytest.mark.smoke
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("-m; rm -rf", id="N1"),
        pytest.param("--help", id="N2"),
        pytest.param("a b", id="N3"),
        pytest.param("../x", id="N4"),
        pytest.param("a\nb", id="N6_newline"),
        pytest.param("a\0b", id="N6_nul"),
        pytest.param("default", id="N11_default"),
        pytest.param("all", id="N11_all"),
        pytest.param("none", id="N11_none"),
        pytest.param("k8s", id="N11_k8s"),
    ],
)
def test_rejected_names(proxy: Proxy, connect: Callable[..., Remote], name: str) -> None:
    with pytest.raises(ConnectError, match="machine name"):
        connect(name, orbstack_image="ubuntu")
    for verb in ("info", "create", "run", "start", "delete"):
        assert proxy.calls(verb) == 0


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("$(id)", id="N5_substitution"),
        pytest.param("`id`;true", id="N5_backticks"),
        pytest.param("größe", id="N8_unicode"),
    ],
)
def test_literal_names(connect: Callable[..., Remote], name: str) -> None:
    with pytest.raises(ConnectError) as unknown:
        connect(name)
    assert f"there is no machine {name!r}" in str(unknown.value)


def test_N8_upper_case_and_dots(
    client: Orbctl, machines: Any, connect: Callable[..., Remote]
) -> None:
    name = f"{machines.new_name()}.Upper"
    remote = connect(name, orbstack_image="ubuntu")
    machines.own(name)
    assert remote.out("hostname") == name


def test_N9_no_double_dash() -> None:
    lines = [
        orbctl.run_args("web", ["sh"], user="x"),
        orbctl.create_args("web", "ubuntu", isolated=True, mounts=["/a"], cpus=1),
    ]
    assert not any("--" in line for line in lines)


def test_N12_an_empty_name_reaches_no_machine(client: Orbctl, proxy: Proxy) -> None:
    direct = Orbctl(str(proxy.path))
    for call in (direct.stop, direct.start, direct.restart, direct.info):
        with pytest.raises(orbctl.BadValue, match="empty"):
            call("")
    with pytest.raises(orbctl.BadValue, match="empty"):
        direct.delete("", "01KHVDCW7HTAGRPMB823KADP9B")
    for verb in ("stop", "start", "restart", "info", "delete"):
        assert proxy.calls(verb) == 0


@pytest.mark.usefixtures("shared_machine")
def test_N12_an_empty_inventory_name_is_the_bare_one() -> None:
    inventory.list_machines.cache.clear()
    bare = [host for host, _, _ in OrbStackConnector.make_names_data(None)]
    assert [host for host, _, _ in OrbStackConnector.make_names_data("")] == bare


def test_N13_builtin_machines(client: Orbctl, proxy: Proxy) -> None:
    record = '{"id":"A","name":"docker","state":"running","builtin":true}'
    proxy.tell(f"list print [{record}]")
    with pytest.raises(InventoryError, match="no OrbStack machine"):
        list(OrbStackConnector.make_names_data(None))
    for name in ("docker", "k8s"):
        with pytest.raises(orbctl.BadValue, match="reserved"):
            client.delete(name, "A")


@pytest.mark.parametrize(
    "data",
    [
        {"orbstack_image": "-x"},
        {"orbstack_image": "ubuntu", "orbstack_create_user": "-x"},
        {"orbstack_image": "ubuntu", "orbstack_isolated": True, "orbstack_mounts": ["-x"]},
        {"orbstack_image": "ubuntu", "orbstack_arch": "--help"},
        {"orbstack_image": "ubuntu", "orbstack_cloud_init": "-"},
        {"orbstack_image": "ubuntu", "orbstack_cpus": "-1"},
    ],
)
def test_N15_values_that_begin_with_a_dash(
    machines: Any, proxy: Proxy, connect: Callable[..., Remote], data: dict[str, Any]
) -> None:
    with pytest.raises(ConnectError, match="must not begin with '-'"):
        connect(machines.new_name(), **data)
    assert proxy.calls("create") == 0


def test_N15_a_user_to_run_as(machine: str, connect: Callable[..., Remote]) -> None:
    with pytest.raises(ConnectError, match="must not begin with '-'"):
        connect(machine, orbstack_user="-x")


# S


def command_lines() -> str:
    """All command lines on this host, except those inside simulated machines."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            # A process inside has a second process id, in its machine.
            status = Path(f"/proc/{pid}/status").read_text(errors="replace")
            if re.search(r"^NSpid:\t\d+$", status, re.MULTILINE):
                found.append(Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace"))
    return "\n".join(found)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads command lines from /proc")
@pytest.mark.parametrize("transport", WAYS)
def test_S1_no_password_in_an_argv_here(
    machine: str, connect: Callable[..., Remote], transport: str
) -> None:
    bob = connect(machine, orbstack_user="bob", orbstack_transport=transport)
    running = gevent.spawn(
        bob.run, "sleep 1.5", _sudo=True, _sudo_password=PASSWORD, _env={"TOKEN": "s3cr3t-env"}
    )
    seen = ""
    while not running.ready():
        gevent.sleep(0.1)
        seen += command_lines()
    assert running.get().ok
    assert ("--interactive" if transport.startswith("container") else "orbctl") in seen
    assert PASSWORD.split()[-1] not in seen
    assert "s3cr3t-env" not in seen


def test_S2_the_guests_own_process_list(
    machine: str, connect: Callable[..., Remote], guest: Guest
) -> None:
    """Documented: as over SSH, a command's text is in the guest's process list while it runs."""
    remote = connect(machine)
    running = gevent.spawn(remote.run, "sleep 15", _env={"TOKEN": "s3cr3t-in-guest"})
    guest.wait_for("s3cr3t-in-guest", seconds=14)
    assert guest.running("s3cr3t-in-guest")
    running.get(timeout=30)
    assert guest.running("s3cr3t-in-guest") == []


@pytest.mark.smoke
def test_S3_no_password_in_logs_or_tracebacks(machine: str, tmp_path: Path) -> None:
    (tmp_path / "deploy.py").write_text(
        "from pyinfra.operations import server\n"
        "server.shell(name='a', commands=['id'])\n"
        "server.shell(name='b', commands=['sleep 20'], _timeout=1)\n"
    )
    (tmp_path / "inventory.py").write_text(
        f"hosts = [('@orbstack/{machine}', {{'orbstack_user': 'bob', '_sudo': True, "
        f"'_sudo_password': {PASSWORD!r}}})]\n"
    )
    done = subprocess.run(
        [PYINFRA, "-y", "-vvv", "--debug", "inventory.py", "deploy.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    # On Python 3.9, pyinfra does not recognize this TimeoutError, so its own text is shown.
    assert re.search("timed out after 1s|did not finish within 1 s", done.stderr)
    assert PASSWORD.split()[-1] not in done.stdout + done.stderr


@pytest.mark.parametrize("transport", PLACES)
def test_S3_no_command_text_in_exceptions(
    machine: str, proxy: Proxy, connect: Callable[..., Remote], transport: str
) -> None:
    remote = connect(machine)
    for fault in ("exit 1 no", "cut-out 200 0"):
        remote.drop_session()
        proxy.tell(f"{proxy.run} {fault}")
        with pytest.raises(OSError, match=r".") as broken:
            remote.run("echo s3cr3t-thrown")
        chain: BaseException | None = broken.value
        while chain is not None:
            assert "s3cr3t-thrown" not in repr(chain)
            chain = chain.__context__


def test_S4_no_password_in_the_simulators_log(
    machine: str,
    simulated: bool,
    connect: Callable[..., Remote],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not simulated:
        pytest.skip("the log is the simulator's")
    monkeypatch.setenv("ORBCTL_SIMULATOR_LOG", str(tmp_path / "log"))
    bob = connect(machine, orbstack_user="bob")
    secret = {"_sudo": True, "_sudo_password": PASSWORD, "_env": {"A": "s3cr3t-env"}}
    bob.run("id", **secret)
    bob.run("cat", _stdin=b"s3cr3t-data" * 7000, **secret)
    bob.close()
    assert '"run"' in (tmp_path / "log").read_text()
    assert "s3cr3t" not in (tmp_path / "log").read_text()
    assert PASSWORD.split()[-1] not in (tmp_path / "log").read_text()


@pytest.mark.smoke
@pytest.mark.parametrize("ending", ["success", "failure", "timeout"])
def test_S5_the_askpass_file_is_removed(
    machine: str, connect: Callable[..., Remote], guest: Guest, ending: str
) -> None:
    bob = connect(machine, orbstack_user="bob")
    secret = {"_sudo": True, "_sudo_password": PASSWORD}
    bob.run("true", **secret)
    (path,) = guest.leftovers()
    assert "s3cr3t" not in guest.sh('cat "$1"', path).decode()
    if ending == "failure":
        assert not bob.run("false", **secret).ok
    if ending == "timeout":
        with pytest.raises(TimeoutError):
            bob.run("sleep 20", _timeout=0.5, **secret)
    bob.close()
    assert guest.leftovers() == []


def test_S5_the_askpass_file_is_removed_on_ctrl_c(
    machine: str, guest: Guest, tmp_path: Path
) -> None:
    import signal

    (tmp_path / "inventory.py").write_text(
        f"hosts = [('@orbstack/{machine}', {{'orbstack_user': 'bob', '_sudo': True, "
        f"'_sudo_password': {PASSWORD!r}}})]\n"
    )
    running = subprocess.Popen(
        [PYINFRA, "-y", "inventory.py", "exec", "--", "sleep 54321"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        guest.wait_for("sleep 54321", seconds=60)
        assert guest.leftovers()
        running.send_signal(signal.SIGINT)
        running.wait(timeout=60)
    finally:
        running.kill()
    assert guest.leftovers() == []
    assert guest.running("sleep 54321") == []


def test_S5_a_stopped_machine_stays_stopped(
    client: Orbctl, fresh_machine: str, connect: Callable[..., Remote]
) -> None:
    """pyinfra removes askpass files after disconnecting, which would start the machine again."""
    bob = connect(fresh_machine, orbstack_user="bob")
    bob.run("true", _sudo=True, _sudo_password=PASSWORD)
    client.stop(fresh_machine)
    bob.close()
    assert client.info(fresh_machine).state == "stopped"


def test_S6_cloud_init_data_is_passed_by_name(tmp_path: Path) -> None:
    """`orbctl` gets the path of the user's own file; it is not copied."""
    args = orbctl.create_args("web", "ubuntu", cloud_init=str(tmp_path / "c.yml"))
    assert str(tmp_path / "c.yml") in args


def test_S7_nothing_is_left(
    machine: str,
    connect: Callable[..., Remote],
    guest: Guest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import io

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    remote = connect(machine)
    remote.put(io.BytesIO(b"x" * 100_000), "/tmp/s7")
    remote.get("/tmp/s7", io.BytesIO())
    remote.run("id", _get_pty=True)
    with pytest.raises(OSError, match="cannot"):
        remote.get("/none", io.BytesIO())
    remote.run("rm /tmp/s7")
    remote.close()
    assert guest.leftovers() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.smoke
def test_S9_hidden_values_in_env(machine: str, tmp_path: Path) -> None:
    try:
        from pyinfra.api import HiddenValue  # noqa: F401
    except ImportError:
        pytest.skip("this pyinfra has no HiddenValue")
    (tmp_path / "deploy.py").write_text(
        "from pyinfra.api import HiddenValue\nfrom pyinfra.operations import server\n"
        "server.shell(name='a', commands=['printf %s \"$T\" | rev'],"
        " _env={'T': HiddenValue('s3cr3t-hidden')})\n"
    )
    done = subprocess.run(
        [PYINFRA, "-y", "-vvv", "--debug", f"@orbstack/{machine}", "deploy.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Only the command sees it.
    assert "s3cr3t-hidden"[::-1] in done.stderr
    assert "s3cr3t-hidden" not in done.stdout + done.stderr


def test_S11_S13_neither_sockets_nor_control_paths(
    machine: str,
    transport: str,
    connect: Callable[..., Remote],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("TMPDIR", "XDG_RUNTIME_DIR", "XDG_STATE_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    remote = connect(machine, orbstack_transport=transport)
    running = gevent.spawn(remote.run, "sleep 1; echo on")
    gevent.sleep(0.5)
    assert list(tmp_path.iterdir()) == []
    if sys.platform == "linux":
        fds = Path("/proc/self/fd")
        ours = {os.readlink(fd) for fd in fds.iterdir() if fd.is_symlink()}
        rows = Path("/proc/net/unix").read_text().splitlines()[1:]
        named = {f"socket:[{row.split()[6]}]": row for row in rows if len(row.split()) > 7}
        assert [row for socket, row in named.items() if socket in ours] == []
    assert running.get(timeout=20).out == ["on"]
