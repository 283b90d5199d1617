"""The operations' shell code, in every shell: created machines are recorded."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from pyinfra_orbstack import shelltext
from pyinfra_orbstack.operations import orbstack
from pyinfra_orbstack.orbctl import COMMAND_VARIABLE, RECORD_VARIABLE, Machine, Orbctl, Record

from ..conftest import ROOT, Machines
from .conftest import Applier, status

SHELLS = [shell for shell in ("dash", "bash", "busybox") if shutil.which(shell)]
Shell = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def name(machines: Machines) -> Iterator[str]:
    name = machines.new_name()
    yield name
    for machine in there(machines.client, name):
        machines.client.delete(name, machine.id)


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Record:
    monkeypatch.setenv(RECORD_VARIABLE, str(tmp_path / "record"))
    return Record(tmp_path / "record")


@pytest.fixture
def wrap(
    tmp_path: Path, machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], None]]:
    def write(script: str) -> None:
        path = tmp_path / "orbctl"
        path.write_text(
            f"#!/bin/sh\nreal={machines.client.command} here={tmp_path}\n"
            "hang() { echo $$ >>$here/hanging; exec sleep 600; }\n"
            f'{script}\nexec "$real" "$@"\n'
        )
        path.chmod(0o755)
        monkeypatch.setenv(COMMAND_VARIABLE, str(path))

    yield write
    hanging = tmp_path / "hanging"
    for pid in hanging.read_text().split() if hanging.exists() else ():
        with contextlib.suppress(OSError):
            if b"sleep\x00600" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(int(pid), signal.SIGKILL)


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest) -> Iterator[Shell]:
    argv = [str(shutil.which(request.param)), *(["sh"] if request.param == "busybox" else [])]
    started: list[subprocess.Popen[str]] = []

    def run(call: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        started.append(
            subprocess.Popen(
                [*argv, "-c", shelltext.command(call)],
                stdin=subprocess.DEVNULL,
                stdout=pipe,
                stderr=pipe,
                text=True,
                start_new_session=True,
            )
        )
        return started[-1]

    yield run
    for child in started:
        child.kill()
        child.wait()


def holders(stream: IO[str], but: set[int]) -> list[str]:
    """The processes that hold the other end of one of our pipes."""
    pipe = os.readlink(f"/proc/self/fd/{stream.fileno()}")
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may exit meanwhile
            for fd in (process / "fd").iterdir():
                if os.readlink(fd) == pipe and int(process.name) not in but:
                    found.append(str(fd))
    return found


def there(client: Orbctl, name: str) -> list[Machine]:
    return [machine for machine in client.machines() if machine.name == name]


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck")
def test_every_file_is_checked() -> None:
    files = sorted(map(str, (ROOT / "src/pyinfra_orbstack/shell").glob("*.sh")))
    done = subprocess.run(
        ["shellcheck", "--shell=sh", *files], capture_output=True, text=True, check=False
    )
    assert done.stdout == ""


def test_a_call_sends_only_the_functions_it_needs() -> None:
    text = shelltext.command("orb stop web")
    assert re.findall(r"^(\w+)\(\)", text, re.MULTILINE) == ["find_orbctl", "orb"]
    assert text.endswith("\norb stop web")
    assert "#" not in text.replace("${folder#?}", "")
    for name in shelltext.functions():
        assert name in shelltext.library(name)


@pytest.mark.parametrize("verb", ["create", "clone", "import"])
def test_created_machines_are_recorded(
    shell: Shell,
    name: str,
    record: Record,
    base: str,
    machines: Machines,
    tmp_path: Path,
    verb: str,
) -> None:
    args = {"create": ["ubuntu", name], "clone": [base, name]}.get(verb, [])
    if verb == "import":
        machines.client.call("export", base, str(tmp_path / "a b.tar.zst"), timeout=60)
        args = ["--name", name, str(tmp_path / "a b.tar.zst")]
    child = shell(shelltext.words("make_machine", name, verb, *args))
    out, err = child.communicate(timeout=100)
    assert child.returncode == 0, err
    (machine,) = there(machines.client, name)
    assert record.path.read_text() == f"{name} {machine.id}\n"
    assert f'"{machine.id}"' in out, "whoever has called knows what it is"
    assert shell(shelltext.words("remove", name, machine.id)).wait(60) == 0
    assert there(machines.client, name) == []
    assert record.path.read_text() == ""


def test_another_machine_of_that_name_is_not_removed(
    shell: Shell, base: str, machines: Machines, record: Record
) -> None:
    child = shell(shelltext.words("remove", base, "01ARZ3NDEKTSV4RRFFQ69G5FAV"))
    assert f"{base} is another machine now; nothing was deleted" in child.communicate(timeout=60)[1]
    assert child.returncode == 1
    assert there(machines.client, base)


def test_an_existing_machine_is_not_recorded(shell: Shell, base: str, record: Record) -> None:
    child = shell(shelltext.words("make_machine", base, "create", "ubuntu", base))
    assert "machine already exists" in child.communicate(timeout=60)[1]
    assert child.returncode == 1
    assert record.path.read_text() == ""


def test_a_record_that_cannot_be_written_fails_the_operation(
    shell: Shell, name: str, machines: Machines, record: Record
) -> None:
    record.path.mkdir()
    child = shell(shelltext.words("make_machine", name, "create", "ubuntu", name))
    said = child.communicate(timeout=100)[1].splitlines()[-1]
    assert child.returncode == 1
    assert f"machine {name} was created, and deleted again: cannot write the record" in said
    assert there(machines.client, name) == []


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_creation_is_removed(
    shell: Shell,
    wrap: Callable[[str], None],
    name: str,
    machines: Machines,
    record: Record,
    tmp_path: Path,
    number: signal.Signals,
    group: bool,
) -> None:
    """By the terminal, which reaches all processes, or alone: then it waits for the call."""
    wait = "hang" if group else "until [ -e $here/go ]; do sleep 0.1; done; exit"
    wrap(f'[ "$1" = create ] && {{ "$real" "$@"; : >$here/made; {wait}; }}')
    child = shell(shelltext.words("make_machine", name, "create", "ubuntu", name))
    until((tmp_path / "made").exists)
    (os.killpg if group else os.kill)(child.pid, number)
    (tmp_path / "go").touch()
    said = child.communicate(timeout=100)[1]
    assert child.returncode == 130
    assert f"machine {name} was created, and deleted again: interrupted" in said
    assert there(machines.client, name) == []
    assert record.path.read_text() == ""


def test_creation_continues_without_its_caller(
    shell: Shell,
    wrap: Callable[[str], None],
    name: str,
    machines: Machines,
    record: Record,
    tmp_path: Path,
) -> None:
    """Its output has no reader anymore, and it continues."""
    wrap(
        '[ "$1" = create ] && { "$real" "$@"; s=$?; : >$here/made; echo noise >&2; '
        "until [ -e $here/go ]; do sleep 0.1; done; exit $s; }"
    )
    child = shell(shelltext.words("make_machine", name, "create", "ubuntu", name))
    until((tmp_path / "made").exists)
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    child.stderr.close()
    (tmp_path / "go").touch()
    (machine,) = there(machines.client, name)
    until(lambda: record.path.read_text() == f"{name} {machine.id}\n")


def test_waiting_for_a_missing_answer_ends(
    shell: Shell, wrap: Callable[[str], None], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions = dict(shelltext.functions())
    functions["look"] = functions["look"].replace("within 30", "within 1")
    monkeypatch.setattr(shelltext, "functions", lambda: functions)
    wrap('[ "$1" = info ] && hang')
    began = time.monotonic()
    child = shell(f'look {name}; echo $? "$told"')
    out, _ = child.communicate(timeout=60)
    assert out.split()[0] == "2"
    assert "\n" not in out.strip()
    assert time.monotonic() - began < 30
    ps = ["ps", "-s", str(child.pid), "-o", "args="]
    until(lambda: "sleep" not in subprocess.run(ps, capture_output=True, text=True).stdout)


# Through the operations


def test_output_of_create_is_logged_with_the_host(
    wrap: Callable[[str], None], name: str, apply: Applier, record: Record
) -> None:
    other = f'exec "$real" create --arch amd64 debian:12 {name}'
    wrap(f'[ "$1" = create ] && {{ echo "ubuntu is not available: using debian" >&2; {other}; }}')
    done = apply(orbstack.machine, machine=name, image="ubuntu:noble", arch="arm64")
    assert done.error == ""
    for line in (
        "ubuntu is not available: using debian",
        f"machine {name} was created, but it is debian:bookworm, not ubuntu:noble",
        f"machine {name} was created, but its arch is amd64, not arm64",
    ):
        assert f"[@local] {line}" in done.log.splitlines()


@pytest.mark.parametrize("what", ["made", "cloned", "deleted"])
def test_success_requires_a_written_record(
    name: str, base: str, apply: Applier, record: Record, machines: Machines, what: str
) -> None:
    if what == "deleted":
        assert apply(orbstack.machine, machine=name, image="ubuntu").error == ""
        record.path.unlink()
    record.path.mkdir()
    if what == "cloned":
        done = apply(orbstack.cloned, source=base, machine=name)
    else:
        done = apply(orbstack.machine, machine=name, image="ubuntu", present=what == "made")
    assert "cannot write the record" in done.error
    assert done.failed_hosts == {"@local"}
    assert there(machines.client, name) == []


def test_a_busy_machine_is_waited_for(
    wrap: Callable[[str], None], clone: str, apply: Applier, tmp_path: Path
) -> None:
    (tmp_path / "busy").touch()
    change = 's/("state": *)"[a-z]+"/\\1"starting"/'
    wrap(
        'case $1 in list|info) [ -e $here/busy ] && { "$real" "$@" | '
        f"sed -E '{change}'; [ $1 = list ] || rm $here/busy; exit; }};; esac"
    )
    done = apply(orbstack.stopped, machine=clone)
    assert done.error == ""
    assert done.changed
    assert f"machine {clone} is starting: waiting for it" in done.log


def test_a_machine_that_stays_busy_fails_its_host(
    wrap: Callable[[str], None], clone: str, apply: Applier
) -> None:
    change = 's/("state": *)"[a-z]+"/\\1"stopping"/'
    wrap(f'case $1 in list|info) "$real" "$@" | sed -E \'{change}\'; exit;; esac')
    hosts = [("@local", {"orbstack_boot_timeout": 1})]
    done = apply.all(lambda: orbstack.started(machine=clone), hosts=hosts)
    assert f"machine {clone} is still stopping after 1 s" in done.error


@pytest.mark.parametrize("data", [{"orbstack_vm": True}, {"vm_name": "web"}, {}])
def test_data_does_not_turn_a_host_into_a_machine(
    base: str, apply: Applier, data: dict[str, object]
) -> None:
    done = apply.all(lambda: orbstack.started(machine=base), hosts=[("@local", data)])
    assert (done.error, done.changed) == ("", False)


@pytest.mark.parametrize("data", [{"orbstack_vm": False}, {"orbstack_vm": None}])
def test_data_does_not_redirect_a_machine(
    base: str, apply: Applier, data: dict[str, object]
) -> None:
    hosts = [(f"@orbstack/{base}", data)]
    done = apply.all(lambda: orbstack.started(machine=base), hosts=hosts, dry=True)
    assert "target @local" in done.error


def test_tilde_works_in_paths_on_the_mac(
    base: str, apply: Applier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert apply(orbstack.exported, machine=base, path="~/a b.tar.zst").error == ""
    assert (tmp_path / "a b.tar.zst").stat().st_size > 0
    assert not apply(orbstack.exported, machine=base, path="~/a b.tar.zst").changed
    for path in ("~other/x", "~", "~/"):
        assert apply(orbstack.exported, machine=base, path=path).error


@pytest.mark.parametrize("call", ["look web", "state_of web", "until_it_answers web 60"])
def test_the_watcher_of_a_call_holds_no_streams(
    shell: Shell, wrap: Callable[[str], None], tmp_path: Path, call: str
) -> None:
    """Otherwise, a reader of that stream would wait for it after the callers are killed."""
    wrap("hang")
    running = shell(f"find_orbctl; {call}")
    hanging = tmp_path / "hanging"
    until(lambda: hanging.exists() and hanging.read_text().strip())
    pid = int(hanging.read_text())
    killed = [pid]
    while killed[-1] != running.pid:
        killed.append(int(status(killed[-1])["PPid"]))
    # Only the watcher is left.
    for one in reversed(killed):
        os.kill(one, signal.SIGKILL)
    running.wait()
    until(lambda: not Path(f"/proc/{pid}/fd").exists() or not os.listdir(f"/proc/{pid}/fd"))
    assert running.stdout is not None
    assert running.stderr is not None
    streams = (running.stdout, running.stderr)
    # What read the killed call's output is still ending; the watcher lives for 30 s.
    until(lambda: not any(holders(stream, {os.getpid()}) for stream in streams), 15)
    for fd in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getsid(int(fd.name)) == running.pid:
                os.kill(int(fd.name), signal.SIGKILL)
