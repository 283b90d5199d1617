"""Machines that connecting creates: recorded, removed or reported, whatever interrupts."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyinfra_orbstack.orbctl import COMMAND_VARIABLE, RECORD_VARIABLE, Machine, Orbctl, Record

from .conftest import PYINFRA, Run

#: The script of a wrapped `orbctl`: $real is OrbStack's, $here the test's directory.
Wrap = Callable[[str], None]


@pytest.fixture
def name(machines: Any) -> str:
    return str(machines.new_name())


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record(tmp_path / "record")


@pytest.fixture(autouse=True)
def project(
    tmp_path: Path,
    name: str,
    client: Orbctl,
    record: Record,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[None]:
    """An inventory of one machine, which is deleted at the end."""
    (tmp_path / "inventory.py").write_text(
        f"web = [('@orbstack/{name}', {{'orbstack_image': 'ubuntu'}})]\n"
    )
    monkeypatch.setenv(RECORD_VARIABLE, str(record.path))
    yield
    hanging = tmp_path / "hanging"
    for pid in hanging.read_text().split() if hanging.exists() else ():
        # Some of them have no parent that waits for them.
        with contextlib.suppress(OSError):
            if b"sleep\x00600" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(int(pid), signal.SIGKILL)
    for machine in there(client, name):
        client.delete(name, machine.id)


@pytest.fixture
def wrap(tmp_path: Path, client: Orbctl, monkeypatch: pytest.MonkeyPatch) -> Wrap:
    def write(script: str) -> None:
        path = tmp_path / "orbctl"
        path.write_text(
            f"#!/bin/sh\nreal={client.command} here={tmp_path}\n"
            "hang() { echo $$ >>$here/hanging; exec sleep 600; }\n"
            f'{script}\nexec "$real" "$@"\n'
        )
        path.chmod(0o755)
        monkeypatch.setenv(COMMAND_VARIABLE, str(path))

    return write


def there(client: Orbctl, name: str) -> list[Machine]:
    return [machine for machine in client.machines() if machine.name == name]


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def command_lines() -> str:
    words = ["ps", "-axww", "-o", "args="]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


class Running:
    """A run of pyinfra in its own process group."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [PYINFRA, "-y", "inventory.py", "exec", "--", "true"],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def said(self) -> str:
        return self.log.read_text()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], Running]]:
    started: list[Running] = []

    def run() -> Running:
        started.append(Running(tmp_path))
        return started[-1]

    yield run
    for one in started:
        one.process.kill()
        one.process.wait()


HANGS_WHEN_MADE = '[ "$1" = create ] && { "$real" "$@"; : >$here/made; hang; }'


# Only machines that are proven ours are deleted


@pytest.mark.long
@pytest.mark.parametrize("said", ["[-32098] create 'x': setup: machine crashed", ""])
def test_a_machine_that_another_process_created_stays(
    wrap: Wrap, pyinfra: Run, client: Orbctl, name: str, record: Record, said: str
) -> None:
    """It is new, it has the name, and our `create` failed: that proves nothing."""
    wrap(f'[ "$1" = create ] && {{ "$real" "$@"; echo "{said}" >&2; exit 1; }}')
    done = pyinfra("inventory.py", "exec", "--", "true")
    assert done.returncode == 1
    (machine,) = there(client, name)
    assert record.machines() == {}
    assert f"to delete it, run: orbctl delete --force {name}" in done.stderr
    assert "Traceback" not in done.stderr
    # The record notes that it may be ours; nothing is done without confirmation.
    (intent,) = record.intents()
    assert intent.name == name
    again = pyinfra("inventory.py", "exec", "--", "hostname")
    assert again.returncode == 0, again.stderr
    assert f"{name} ({machine.id}) may come from a run that was killed" in again.stderr


@pytest.mark.long
def test_a_faster_creators_machine_is_waited_for_and_used(
    wrap: Wrap, pyinfra: Run, client: Orbctl, name: str, record: Record
) -> None:
    wrap('[ "$1" = create ] && "$real" "$@"')
    done = pyinfra("inventory.py", "exec", "--", "hostname")
    assert done.returncode == 0, done.stderr
    assert f"] {name}" in done.stderr
    assert record.path.read_text() == "", "the other one writes it down, if it wants to"


@pytest.mark.long
def test_a_failed_create_removes_its_intent(
    wrap: Wrap, pyinfra: Run, client: Orbctl, name: str, record: Record
) -> None:
    wrap('[ "$1" = create ] && { echo "[-32098] create \'x\': no space" >&2; exit 1; }')
    done = pyinfra("inventory.py", "exec", "--", "true")
    assert f"[@orbstack/{name}] create 'x': no space" in done.stderr
    assert there(client, name) == []
    assert record.path.read_text() == ""


# From the moment at which it may exist


@pytest.mark.long
@pytest.mark.parametrize("how", ["fails", "fails for ever", "tells nonsense"])
def test_info_fails_after_creation(
    wrap: Wrap, pyinfra: Run, client: Orbctl, name: str, record: Record, how: str
) -> None:
    broken = {"tells nonsense": "echo '<html>'; exit"}.get(how, "echo boom >&2; exit 1")
    once = "" if how == "fails for ever" else "[ -e $here/asked ] || { : >$here/asked;"
    end = "" if how == "fails for ever" else "}"
    wrap(
        '[ "$1" = create ] && { "$real" "$@"; s=$?; : >$here/made; exit $s; }\n'
        f'[ "$1" = info ] && [ -e $here/made ] && {{ {once} {broken}; {end} }}'
    )
    done = pyinfra("inventory.py", "exec", "--", "true")
    (machine,) = there(client, name)
    if how != "fails for ever":
        assert done.returncode == 0, done.stderr
        assert record.path.read_text() == f"{name} {machine.id}\n"
        return
    assert done.returncode == 1
    assert f"machine {name} was created, but its id cannot be read: boom" in done.stderr
    (intent,) = record.intents()
    assert intent.is_certainly(machine)
    # It is proven ours, so it is deleted with the others.
    os.environ.pop(COMMAND_VARIABLE, None)


@pytest.mark.parametrize("trouble", ["directory", "below a file"])
def test_an_unwritable_record(
    pyinfra: Run,
    client: Orbctl,
    name: str,
    record: Record,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trouble: str,
) -> None:
    if trouble == "directory":
        record.path.mkdir()
    else:
        monkeypatch.setenv(RECORD_VARIABLE, str(tmp_path / "inventory.py" / "record"))
    done = pyinfra("inventory.py", "exec", "--", "true")
    assert done.returncode == 1
    assert there(client, name) == []
    (line,) = [line for line in done.stderr.splitlines() if "cannot write the record" in line]
    assert f"machine {name} was created, and deleted again: cannot write the record" in line
    assert "Traceback" not in done.stderr


def test_a_full_disk(wrap: Wrap, client: Orbctl, name: str, record: Record, tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes every write beyond 4 KiB fail; the record is longer than that."""
    before = "".join(f"m{number} ID{number}\n" for number in range(1000))
    record.path.write_text(before)
    # The limit applies only to the record: `orbctl` writes to another disk.
    code = (
        "import resource, signal, sys, os; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, -1))\n"
    )
    code += "os.execvp(sys.argv[1], sys.argv[1:])"
    wrap("ulimit -S -f unlimited")
    done = subprocess.run(
        [sys.executable, "-c", code, PYINFRA, "-y", "inventory.py", "exec", "--", "true"],
        cwd=tmp_path,
        # Bytecode that is cut off would make every later import fail.
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 1
    assert f"machine {name} was created, and deleted again: cannot write the record" in done.stderr
    assert there(client, name) == []
    assert record.path.read_text() == before


@pytest.mark.long
@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("written_down", [True, False])
def test_ctrl_c_during_creation(
    wrap: Wrap,
    start: Callable[[], Running],
    client: Orbctl,
    name: str,
    record: Record,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    times: int,
    written_down: bool,
) -> None:
    """Once, or repeatedly, as an impatient user does."""
    if not written_down:
        monkeypatch.delenv(RECORD_VARIABLE)
    wrap(HANGS_WHEN_MADE)
    run = start()
    until((tmp_path / "made").exists)
    for _ in range(times):
        os.killpg(run.process.pid, signal.SIGINT)
        time.sleep(0.03)
    run.process.wait(60)
    until(lambda: not there(client, name))
    assert "Traceback" not in run.said()
    if written_down:
        until(lambda: record.path.read_text() == "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_run_terminated_during_creation(
    wrap: Wrap,
    start: Callable[[], Running],
    client: Orbctl,
    name: str,
    record: Record,
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    """The signals of a cancelled CI job, and of the kernel."""
    wrap(
        '[ "$1" = create ] && { "$real" "$@"; s=$?; : >$here/made; '
        "until [ -e $here/go ]; do sleep 0.1; done; exit $s; }"
    )
    run = start()
    until((tmp_path / "made").exists)
    (machine,) = there(client, name)
    assert [one.name for one in record.intents()] == [name]
    os.killpg(run.process.pid, number)
    if number == signal.SIGKILL:
        run.process.wait(30)
    else:
        # Then it waits for its children.
        time.sleep(1)
    (tmp_path / "go").touch()
    run.process.wait(60)
    if number == signal.SIGKILL:
        # The shell continues on its own.
        until(lambda: record.path.read_text() == f"{name} {machine.id}\n")
        assert there(client, name)
    else:
        until(lambda: not there(client, name))
        until(lambda: record.path.read_text() == "")


def test_every_process_killed_during_creation(
    wrap: Wrap,
    start: Callable[[], Running],
    client: Orbctl,
    name: str,
    record: Record,
    tmp_path: Path,
    pyinfra: Run,
) -> None:
    """Then the intent remains, and a machine that may be ours is reported and not changed."""
    wrap('[ "$1" = create ] && { "$real" "$@"; echo $PPID >$here/shell; hang; }')
    run = start()
    until((tmp_path / "shell").exists)
    until(lambda: (tmp_path / "shell").read_text().strip())
    # The call's parent is a subshell of the group leader.
    shell = os.getpgid(int((tmp_path / "shell").read_text()))
    run.process.kill()
    run.process.wait(30)
    os.killpg(shell, signal.SIGKILL)
    (machine,) = there(client, name)
    assert [one.name for one in record.intents()] == [name]
    until(lambda: not record.intents()[0].alive)
    os.environ[COMMAND_VARIABLE] = str(tmp_path / "orbctl")
    from pyinfra_orbstack.record import NotDeleted

    wrapped = Orbctl(str(tmp_path / "orbctl"))
    with pytest.raises(NotDeleted, match=f"to delete it, run: orbctl delete --force {name}"):
        record.delete_all(wrapped)
    assert [one.id for one in there(client, name)] == [machine.id]
    assert record.delete_all(wrapped, names_are_ours=True) == [name]
    assert record.path.read_text() == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_before_the_machine_answers(
    wrap: Wrap,
    start: Callable[[], Running],
    client: Orbctl,
    name: str,
    record: Record,
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    """It is created and recorded, but never became ready."""
    wrap('[ "$1" = run ] && { : >$here/asked; hang; }')
    run = start()
    until((tmp_path / "asked").exists)
    assert record.machines().keys() == {name}
    for _ in range(2):
        os.killpg(run.process.pid, number)
        time.sleep(0.03)
    run.process.wait(60)
    until(lambda: not there(client, name))
    until(lambda: record.machines() == {})


@pytest.mark.long
def test_several_hosts_interrupted_at_once(
    wrap: Wrap,
    start: Callable[[], Running],
    client: Orbctl,
    machines: Any,
    record: Record,
    tmp_path: Path,
) -> None:
    names = [machines.new_name() for _ in range(4)]
    hosts = [(f"@orbstack/{one}", {"orbstack_image": "ubuntu"}) for one in names]
    (tmp_path / "inventory.py").write_text(f"web = {hosts!r}\n")
    wrap('[ "$1" = create ] && { "$real" "$@"; echo >>$here/made; hang; }')
    run = start()
    until(lambda: (tmp_path / "made").exists() and (tmp_path / "made").stat().st_size >= 3)
    os.killpg(run.process.pid, signal.SIGINT)
    run.process.wait(90)
    until(lambda: not {one.name for one in client.machines()} & set(names))
    until(lambda: record.path.read_text() == "")
    assert "Traceback" not in run.said()


def test_a_refused_deletion_is_reported_and_the_machine_recorded(
    wrap: Wrap,
    start: Callable[[], Running],
    client: Orbctl,
    name: str,
    record: Record,
    tmp_path: Path,
) -> None:
    wrap(
        HANGS_WHEN_MADE
        + '\n[ "$1" = delete ] && { echo "[-32098] invalid transition" >&2; exit 1; }'
    )
    run = start()
    until((tmp_path / "made").exists)
    run.process.send_signal(signal.SIGINT)
    run.process.wait(60)
    (machine,) = there(client, name)
    until(lambda: record.path.read_text() == f"{name} {machine.id}\n")
    assert "deleting it failed: " in run.said()
    assert f"to delete it, run: orbctl delete --force {name}" in run.said()


# States and images


@pytest.mark.long
@pytest.mark.parametrize("state", ["creating", "starting", "stopping", "provisioning", "odd"])
def test_a_busy_machine_is_waited_for(
    wrap: Wrap, pyinfra: Run, client: Orbctl, name: str, machines: Any, state: str
) -> None:
    """If it is stopping, it is started afterwards."""
    machines.client.create(["create", "ubuntu", name])
    machines.own(name)
    if state == "stopping":
        client.stop(name)
    wrap(
        "n=$(cat $here/count 2>/dev/null || echo 0)\n"
        '[ "$1" = list ] && { echo "[]"; exit; }\n'
        '[ "$1" = info ] && [ $n -lt 3 ] && { echo $((n + 1)) >$here/count; '
        f'"$real" "$@" | sed -E \'s/("state": *)"[a-z]+"/\\1"{state}"/\'; exit; }}\n'
        '[ "$1" = start ] && [ $n -lt 3 ] && { echo "invalid transition" >&2; exit 1; }'
    )
    done = pyinfra("inventory.py", "exec", "--", "hostname")
    assert done.returncode == 0, done.stderr
    assert f"] {name}" in done.stderr


def test_a_machine_that_stays_busy_is_a_one_line_error(
    wrap: Wrap, pyinfra: Run, client: Orbctl, name: str, machines: Any
) -> None:
    machines.client.create(["create", "ubuntu", name])
    machines.own(name)
    wrap(
        '[ "$1" = list ] && { echo "[]"; exit; }\n'
        '[ "$1" = info ] && { "$real" "$@" | sed -E '
        '\'s/("state": *)"[a-z]+"/\\1"creating"/\'; exit; }'
    )
    words = ["--data", "orbstack_boot_timeout=1.5", "exec", "--", "true"]
    done = pyinfra("inventory.py", *words)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "is still" in line]
    assert f"machine '{name}' is still creating" in line


def test_a_machine_deleted_while_waiting_is_created(
    wrap: Wrap, pyinfra: Run, client: Orbctl, name: str
) -> None:
    wrap(
        '[ "$1" = info ] && [ ! -e $here/seen ] && { : >$here/seen; '
        f'echo \'{{"record": {{"id": "OLD", "name": "{name}", "state": "deleting"}}}}\'; exit; }}'
    )
    done = pyinfra("inventory.py", "exec", "--", "hostname")
    assert done.returncode == 0, done.stderr
    assert f"created machine {name}" in done.stderr


def test_output_of_create_is_logged_with_the_host(wrap: Wrap, pyinfra: Run, name: str) -> None:
    """Without escape sequences for terminals."""
    frames = "\\033[?25l\\342\\240\\213 Creating\\r\\342\\240\\231 Creating\\r\\033[K"
    note = "\\033[33mubuntu is not available: using debian\\033[0m\\n"
    wrap(
        f'[ "$1" = create ] && {{ printf \'{frames}{note}\' >&2; exec "$real" "$@" 2>/dev/null; }}'
    )
    done = pyinfra("inventory.py", "exec", "--", "true")
    lines = [line.strip() for line in done.stderr.splitlines()]
    assert f"[@orbstack/{name}] ubuntu is not available: using debian" in lines
    assert "Creating" not in done.stderr


def test_another_image_or_architecture_than_requested_is_logged(
    wrap: Wrap, pyinfra: Run, name: str, tmp_path: Path
) -> None:
    (tmp_path / "inventory.py").write_text(
        f"web = [('@orbstack/{name}', "
        "{'orbstack_image': 'ubuntu:noble', 'orbstack_arch': 'arm64'})]\n"
    )
    wrap(f'[ "$1" = create ] && exec "$real" create --arch amd64 debian:12 {name}')
    done = pyinfra("inventory.py", "exec", "--", "true")
    assert done.returncode == 0, done.stderr
    prefix = f"[@orbstack/{name}] machine {name} was created, but "
    assert f"{prefix}it is debian:bookworm, not ubuntu:noble" in done.stderr
    assert f"{prefix}its arch is amd64, not arm64" in done.stderr


@pytest.mark.long
@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_terminated_at_any_moment(
    start: Callable[[], Running], client: Orbctl, name: str, record: Record
) -> None:
    """By `kill -9`, SIGTERM or two Ctrl-C: exactly the existing machines are recorded."""
    seed = int(os.environ.get("FAULT_SEED") or 0) or random.randrange(1, 10**6)
    print(f"FAULT_SEED={seed}")
    dice = random.Random(seed)
    for _ in range(max(3, int(os.environ.get("FAULT_STEPS", "0")) // 200)):
        run = start()
        time.sleep(dice.uniform(0.2, 1.5))
        number = dice.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        run.process.send_signal(number)
        if number == signal.SIGINT:
            time.sleep(0.03)
            run.process.send_signal(number)
        run.process.wait(60)
        # The shell that creates or removes it continues, and records the result.
        until(lambda: f"make_machine {name} " not in command_lines())
        until(lambda: not record.intents())
        until(lambda: [one.id for one in there(client, name)] == list(record.machines().values()))
        record.delete_all(client)
        assert not there(client, name)
        assert record.machines() == {}
