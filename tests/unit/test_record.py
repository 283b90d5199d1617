"""The record: always complete, with one protocol in Python and in every shell."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyinfra_orbstack import record as record_module
from pyinfra_orbstack import shelltext
from pyinfra_orbstack.orbctl import COMMAND_VARIABLE, Machine, Orbctl, OrbctlError, Record
from pyinfra_orbstack.record import NotDeleted, RecordError

SHELLS = [shell for shell in ("dash", "bash", "busybox") if shutil.which(shell)]
Shell = Callable[..., "subprocess.Popen[str]"]


def machine(number: int, name: str = "") -> Machine:
    return Machine(id=f"ID{number}", name=name or f"m{number}", state="running")


@pytest.fixture(autouse=True)
def orbctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An `orbctl` whose machines are lines of a file: NAME ID."""
    there = tmp_path / "there"
    there.touch()
    program = tmp_path / "orbctl"
    program.write_text(
        f"#!{sys.executable}\n"
        "import json, os, sys\n"
        f"there = {str(there)!r}\n"
        "lines = [line.split() for line in open(there)]\n"
        "verb, names = sys.argv[1], [w for w in sys.argv[2:] if w[0] != '-' and w != 'json']\n"
        "show = lambda name, id: {'id': id, 'name': name, 'state': 'running'}\n"
        "if verb == 'list': print(json.dumps([show(*line) for line in lines])); sys.exit()\n"
        "found = [line for line in lines if line[0] == names[0]]\n"
        "if not found: sys.exit(f\"[-32098] machine not found: '{names[0]}'\")\n"
        "if verb == 'info': print(json.dumps({'record': show(*found[0])})); sys.exit()\n"
        "if names[0].startswith('keep'): sys.exit('[-32098] operation not permitted')\n"
        "open(there, 'w').writelines(' '.join(l) + '\\n' for l in lines if l[0] != names[0])\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv(COMMAND_VARIABLE, str(program))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_STATE_HOME", "ORBCTL_SIMULATOR_HOME"):
        monkeypatch.delenv(name, raising=False)
    return there


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record(tmp_path / "records" / "machines")


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest, record: Record) -> Shell:
    """Run functions of shell/record.sh in each shell."""
    argv = [str(shutil.which(request.param)), *(["sh"] if request.param == "busybox" else [])]

    def run(call: str) -> subprocess.Popen[str]:
        text = shelltext.command(f"find_record\n{call}")
        return subprocess.Popen(
            [*argv, "-c", text],
            env={**os.environ, record_module.RECORD_VARIABLE: str(record.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return run


def lines(record: Record) -> list[str]:
    return record.path.read_text().splitlines()


def left(record: Record) -> list[str]:
    """Files next to the record, except its two files."""
    names = {record.path.name, f"{record.path.name}.orbctl"}
    return sorted(one.name for one in record.path.parent.iterdir() if one.name not in names)


# Content


@pytest.mark.parametrize(
    "line",
    ["", "web", "web ID more", "-x ID", "a/b ID", "docker ID", "web -x", "web I/D", "web ?"]
    + ["web ? 1", "web ? 1 - 4", "web ? x - 4 place", "web\x00 ID", "\x1b[31mweb ID", "web ID;id"],
)
def test_truncated_or_hostile_lines_name_no_machine(record: Record, line: str) -> None:
    record.path.parent.mkdir()
    record.path.write_text(f"first ID1\n{line}\nlast ID2\n{line}")
    assert record.machines() == {"first": "ID1", "last": "ID2"}
    assert record.intents() == []
    record.add(machine(3))
    assert record.machines() == {"first": "ID1", "last": "ID2", "m3": "ID3"}
    record.forget("ID1", "ID3")
    # A file that we cannot read is never removed.
    assert lines(record) == [one for one in (line, "last ID2", line) if one]


@pytest.mark.long
@given(st.binary(max_size=200))
@settings(max_examples=50, deadline=None)
def test_any_bytes_survive(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "machines"
    path.write_bytes(data)
    record = Record(path)
    record.add(machine(1, "zz"))
    record.forget("ID1")
    kept = path.read_bytes()
    assert kept == b"".join(line + b"\n" for line in data.split(b"\n") if line)


def test_permissions_and_symlinks_are_kept(record: Record, tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.write_text("m1 ID1\n")
    real.chmod(0o640)
    record.path.parent.mkdir()
    record.path.symlink_to("../real")
    record.add(machine(2))
    record.forget("ID1")
    assert record.path.is_symlink()
    assert real.read_text() == "m2 ID2\n"
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert left(record) == []


def test_shells_follow_a_symlink_and_keep_the_mode(
    record: Record, shell: Shell, tmp_path: Path
) -> None:
    real = tmp_path / "real file"
    real.write_text("m1 ID1")  # truncated
    real.chmod(0o640)
    record.path.parent.mkdir()
    record.path.symlink_to("../real file")
    assert shell("name=web since=1; intend && confirm ID2 && forget ID1").wait(20) == 0
    assert record.path.is_symlink()
    assert real.read_text() == "web ID2\n"
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert sorted(one.name for one in tmp_path.glob("real*")) == ["real file", "real file.orbctl"]


def test_an_intent_is_replaced_by_one_line(record: Record, shell: Shell) -> None:
    """Both write the same lines, and read each other's intents."""
    assert shell("name=web since=1700000000; intend").wait(20) == 0
    (intent,) = record.intents()
    assert (intent.name, intent.since, intent.until) == ("web", 1700000000, None)
    assert intent.place == record_module.place_of(Orbctl())
    assert record.machines() == {}
    assert shell("name=web since=1700000000; was_made 1700000009").wait(20) == 0
    assert [one.until for one in record.intents()] == [None, 1700000009]
    assert shell("name=web; confirm ID7").wait(20) == 0
    assert lines(record) == ["web ID7"]
    assert left(record) == []
    place = record.path.with_name("machines.orbctl").read_text()
    record.forget("ID7")
    record.add(machine(7, "web"))
    assert record.path.with_name("machines.orbctl").read_text() == place


def test_names_that_look_like_numbers_or_patterns(record: Record, shell: Shell) -> None:
    for name in ("1", "1.0", "01", "a.b", "aXb", "größe", "a\\tb"):
        record.add(machine(1, name))
        assert shell(f"name='{name}' since=1; intend; drop_intent").wait(20) == 0
    assert shell("forget ID1").wait(20) == 0
    assert lines(record) == []
    record.add(Machine("0123", "a", "running"))
    record.add(Machine("123", "b", "running"))
    assert shell("forget 123").wait(20) == 0
    assert lines(record) == ["a 0123"]


# When it cannot be written


@pytest.mark.parametrize("trouble", ["directory", "below a file", "loop", "dangling"])
def test_an_unwritable_record_is_a_one_line_error(
    record: Record, shell: Shell, tmp_path: Path, trouble: str
) -> None:
    record.path.parent.mkdir()
    if trouble == "directory":
        record.path.mkdir()
    elif trouble == "below a file":
        (record.path.parent / "file").touch()
        record.path = record.path.parent / "file" / "machines"
    elif trouble == "loop":
        record.path.symlink_to(record.path.name)
    else:
        # Its directory is created, like that of any record.
        record.path.symlink_to("new/machines")
    child = shell("name=web since=1; confirm ID1")
    said = child.communicate(timeout=60)[1]
    if trouble == "dangling":
        assert child.returncode == 0, said
        record.add(machine(2))
        assert record.machines() == {"web": "ID1", "m2": "ID2"}
        return
    assert child.returncode == 1
    assert said.startswith(f"cannot write the record {record.path}: ")
    assert said.count("\n") == 1
    for act in (lambda: record.add(machine(1)), lambda: record.forget("ID1")):
        with pytest.raises(RecordError, match=r"cannot (read|write) the record .*: \w"):
            act()
    beside = [one.name for one in tmp_path.rglob("*")]
    assert [name for name in beside if ".lock" in name or ".next" in name] == []


def _limited(size: int) -> Callable[[], None]:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def test_a_full_disk_leaves_the_file_unchanged(record: Record) -> None:
    for number in range(1000):
        record.path.parent.mkdir(exist_ok=True)
        with record.path.open("a") as file:
            file.write(f"m{number} ID{number}\n")
    before = record.path.read_bytes()
    code = (
        "import sys\nfrom pyinfra_orbstack.orbctl import Machine, Record\n"
        "for act in (lambda r: r.forget('ID0'), lambda r: r.add(Machine('X', 'x', 'running'))):\n"
        "    try: act(Record(sys.argv[1]))\n"
        "    except OSError as full: print(full)\n"
    )
    # Without -B, its own bytecode would be cut off, and every later import fail.
    argv = [sys.executable, "-B", "-c", code, str(record.path)]
    done = subprocess.run(
        argv, preexec_fn=_limited(4096), capture_output=True, text=True, check=True
    )
    assert done.stdout.count("cannot write the record") == 2
    assert record.path.read_bytes() == before
    assert left(record) == []


@pytest.mark.parametrize("shell_name", SHELLS)
def test_a_full_disk_in_a_shell(record: Record, shell_name: str) -> None:
    """Even if awk or the shell does not report a failed write."""
    record.path.parent.mkdir()
    record.path.write_text("".join(f"m{number} ID{number}\n" for number in range(1000)))
    before = record.path.read_bytes()
    argv = [str(shutil.which(shell_name)), *(["sh"] if shell_name == "busybox" else [])]
    env = {**os.environ, record_module.RECORD_VARIABLE: str(record.path)}
    for call in ("name=x since=1; intend", "name=x; confirm X", "forget ID1"):
        done = subprocess.run(
            [*argv, "-c", shelltext.command(f"find_record\n{call}")],
            env=env,
            preexec_fn=_limited(4096),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1, (call, done)
        assert "cannot write the record" in done.stderr
        assert record.path.read_bytes() == before
    assert left(record) == []


# Many at once


ADD = """
import sys
from pyinfra_orbstack.orbctl import Machine, Record
for number in range(int(sys.argv[2]), int(sys.argv[2]) + 6):
    Record(sys.argv[1]).add(Machine(id=f"ID{number}", name=f"m{number}", state="running"))
"""


@pytest.mark.long
@pytest.mark.timeout(200)
def test_ten_writers_of_both_kinds_lose_nothing(record: Record, shell: Shell) -> None:
    record.path.parent.mkdir()
    record.path.write_text("".join(f"old{number} OLD{number}\n" for number in range(200)))
    python = [
        subprocess.Popen([sys.executable, "-c", ADD, str(record.path), str(number * 6)])
        for number in range(5)
    ]
    call = "for n in 0 1 2 3; do name=s$$.$n since=1; intend && confirm S$$x$n; done"
    shells = [shell(call) for _ in range(5)]
    for number in range(0, 100, 4):
        record.forget(f"OLD{number}", f"OLD{number + 1}", f"OLD{number + 2}", f"OLD{number + 3}")
        # A concurrent reader sees complete lines, and all that are not removed.
        read = record.machines()
        assert {f"old{other}" for other in range(100, 200)} <= set(read)
    for child in [*python, *shells]:
        assert child.wait(150) == 0
    assert len(record.machines()) == 100 + 30 + 20
    assert record.intents() == []
    assert left(record) == []


def test_a_killed_process_loses_its_lock(record: Record, shell: Shell) -> None:
    record.path.parent.mkdir()
    holding = shell('token=$$.1; hold "$record.lock"; hold "$record.next"; echo; sleep 60')
    assert holding.stdout is not None
    holding.stdout.readline()
    waiting = shell("name=web since=1; intend")
    time.sleep(0.5)
    assert waiting.poll() is None
    holding.kill()
    holding.wait()
    assert waiting.wait(20) == 0
    record.add(machine(1))
    assert [one.name for one in record.intents()] == ["web"]
    assert left(record) == []


def test_python_and_shell_respect_each_others_locks(record: Record, shell: Shell) -> None:
    code = (
        "import sys, time\nfrom pyinfra_orbstack.orbctl import Record\n"
        "with Record(sys.argv[1]).held(): print(flush=True); time.sleep(60)\n"
    )
    argv = [sys.executable, "-c", code, str(record.path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as holding:
        assert holding.stdout is not None
        holding.stdout.readline()
        waiting = shell("name=web since=1; intend")
        time.sleep(0.5)
        assert waiting.poll() is None
        # Its parent has not waited for it yet, so it stays in the process list.
        holding.kill()
        assert waiting.wait(20) == 0
    assert [one.name for one in record.intents()] == ["web"]
    assert left(record) == []


def test_a_stale_lock_is_removed(
    record: Record, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process id may be reused by now: it is a minute old."""
    record.path.parent.mkdir()
    lock = record.path.with_name("machines.lock")

    def old() -> None:
        lock.symlink_to(f"{os.getpid()}.1")
        past = time.time() - 100
        os.utime(lock, (past, past), follow_symlinks=False)

    old()
    record.add(machine(1))
    old()
    assert shell("name=web; confirm ID2").wait(20) == 0
    assert record.machines() == {"m1": "ID1", "web": "ID2"}
    assert left(record) == []


def test_waiting_for_the_lock_ends_and_blocks_no_other_host(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gevent

    monkeypatch.setattr(record_module, "LOCK_TIMEOUT", 1.0)
    record.path.parent.mkdir()
    record.path.with_name("machines.lock").symlink_to(f"{os.getpid()}.1")
    ticks: list[float] = []

    def other() -> None:
        while True:
            ticks.append(time.monotonic())
            gevent.sleep(0.05)

    ticking = gevent.spawn(other)
    with pytest.raises(RecordError, match=f"held by process {os.getpid()}"):
        record.add(machine(1))
    ticking.kill()
    assert len(ticks) > 1


@pytest.mark.long
@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_killed_writers_leave_the_record_complete(record: Record, shell: Shell) -> None:
    record.path.parent.mkdir()
    keep = [f"keep{number} KEEP{number}" for number in range(50)]
    record.path.write_text("\n".join(keep) + "\n")
    for step in range(max(12, int(os.environ.get("FAULT_STEPS", "0")) // 100)):
        child = shell(
            f"while :; do name=x{step} since=1; intend; confirm X{step}; forget X{step}; done"
        )
        time.sleep(0.05 + step % 12 * 0.03)
        child.kill()
        child.wait()
        assert set(keep) <= set(lines(record))
    # Processes of the last one may still run; they exit on their own.
    deadline = time.monotonic() + 20
    while True:
        record.add(machine(1))
        assert set(keep) <= set(lines(record))
        if not left(record):
            break
        assert time.monotonic() < deadline
        time.sleep(0.1)


# Deleting recorded machines


def test_every_deletion_is_tried_and_every_failure_reported(record: Record, orbctl: Path) -> None:
    names = ["a", "keep-1", "b", "keep-2", "c"]
    orbctl.write_text("".join(f"{name} ID{number}\n" for number, name in enumerate(names)))
    for number, name in enumerate(names):
        record.add(machine(number, name))
    with pytest.raises(NotDeleted) as failed:
        record.delete_all(Orbctl())
    for name in ("keep-1", "keep-2"):
        assert f"{name} was not deleted: operation not permitted" in str(failed.value)
    assert isinstance(failed.value, OrbctlError)
    assert failed.value.deleted == ["a", "b", "c"]
    assert record.machines() == {"keep-1": "ID1", "keep-2": "ID3"}
    assert orbctl.read_text().split() == ["keep-1", "ID1", "keep-2", "ID3"]


def test_deleted_machines_are_forgotten_by_the_orbctl_that_created_them(
    record: Record, orbctl: Path
) -> None:
    record.add(machine(1))
    assert record.delete_all(Orbctl()) == []
    assert record.machines() == {}
    assert record.path.with_name("machines.orbctl").read_text() == ""


@pytest.mark.parametrize("elsewhere", ["simulator", "program", "home", "unknown"])
def test_machines_of_another_orbctl_are_not_forgotten(
    record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: str
) -> None:
    record.add(machine(1))
    if elsewhere == "simulator":
        monkeypatch.setenv("ORBCTL_SIMULATOR_HOME", str(tmp_path / "other"))
    elif elsewhere == "program":
        other = tmp_path / "other"
        shutil.copy(tmp_path / "orbctl", other)
        monkeypatch.setenv(COMMAND_VARIABLE, str(other))
    elif elsewhere == "home":
        monkeypatch.setenv("HOME", str(tmp_path / "other"))
    else:
        record.path.with_name("machines.orbctl").unlink()
    said = r"(orbctl|other) does not list m1, which another orbctl may have created"
    with pytest.raises(NotDeleted, match=said):
        record.delete_all(Orbctl())
    assert record.machines() == {"m1": "ID1"}


def test_a_machine_renamed_meanwhile_is_deleted(
    record: Record, orbctl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    orbctl.write_text("old ID1\n")
    record.add(machine(1, "old"))
    machines = Orbctl.machines

    def renaming(self: Orbctl) -> list[Machine]:
        listed = machines(self)
        if "old ID1" in orbctl.read_text():
            orbctl.write_text("new ID1\nold ID2\n")
        return listed

    monkeypatch.setattr(Orbctl, "machines", renaming)
    assert record.delete_all(Orbctl()) == ["old"]
    assert orbctl.read_text() == "old ID2\n"
    assert record.machines() == {}


# Intents of processes that exited

#: Made at 2016-07-30 23:54:10 UTC.
ULID, MADE = "01ARZ3NDEKTSV4RRFFQ69G5FAV", 1469922850
DEAD = "999999999.1"


@pytest.fixture
def intend(record: Record) -> Iterator[Callable[..., None]]:
    def write(name: str, since: int, until: int | None = None, writer: str = DEAD) -> None:
        record.path.parent.mkdir(exist_ok=True)
        sign, end = ("?", "-") if until is None else ("!", str(until))
        with record.path.open("a") as file:
            place = record_module.place_of(Orbctl())
            file.write(f"{name} {sign} {since} {end} {writer} {place}\n")

    return write  # type: ignore[return-value]


def test_a_proven_machine_is_recorded_and_deleted(
    record: Record, orbctl: Path, intend: Callable[..., None]
) -> None:
    orbctl.write_text(f"web {ULID}\n")
    intend("web", MADE - 2, MADE + 1)
    assert record.settle(Orbctl()) == []
    assert [one.name for one in record.existing(Orbctl())] == ["web"]
    assert lines(record) == [f"web {ULID}"]
    assert record.delete_all(Orbctl()) == ["web"]
    assert orbctl.read_text() == ""


@pytest.mark.parametrize("until", [None, MADE - 1])
def test_an_unproven_machine_is_reported_and_stays(
    record: Record, orbctl: Path, intend: Callable[..., None], until: int | None
) -> None:
    orbctl.write_text(f"web {ULID}\n")
    intend("web", MADE - 2 if until is None else MADE - 9, until and until - 1)
    with pytest.raises(
        NotDeleted, match=r"web \(01A.*to delete it, run: orbctl delete --force web"
    ):
        record.delete_all(Orbctl())
    assert orbctl.read_text() == f"web {ULID}\n"
    assert len(record.intents()) == 1
    # If only we use such names, the name is enough proof.
    assert record.delete_all(Orbctl(), names_are_ours=True) == ["web"]
    assert lines(record) == []


@pytest.mark.parametrize("what", ["older", "another's", "absent"])
def test_an_intent_without_a_machine_is_removed(
    record: Record, orbctl: Path, intend: Callable[..., None], what: str
) -> None:
    since = MADE + 60 if what == "older" else MADE - 2
    if what != "absent":
        orbctl.write_text(f"web {ULID}\n")
    if what == "another's":
        record.add(Machine(ULID, "web", "running"))
    intend("web", since)
    assert record.settle(Orbctl()) == []
    assert record.intents() == []


def test_a_clock_of_orbstack_that_is_behind(
    record: Record, orbctl: Path, intend: Callable[..., None]
) -> None:
    """Its machines have a clock of their own, which lags after the Mac has slept."""
    orbctl.write_text(f"web {ULID}\n")
    intend("web", MADE + 3, MADE + 6)
    (said,) = record.settle(Orbctl())
    assert "orbctl delete --force web" in said


def test_a_machine_about_to_be_created_is_waited_for(
    record: Record,
    orbctl: Path,
    intend: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The `orbctl` of a killed run may start before we check."""
    import gevent

    monkeypatch.setattr(record_module, "SHOWN", 2.0)
    intend("web", int(time.time()))
    id_of_now = "0" + "Z" * 25
    appearing = gevent.spawn_later(0.3, orbctl.write_text, f"web {id_of_now}\n")
    (said,) = record.settle(Orbctl())
    appearing.join()
    assert "orbctl delete --force web" in said


def test_a_machine_being_created_is_left_alone(
    record: Record, orbctl: Path, intend: Callable[..., None]
) -> None:
    orbctl.write_text(f"web {ULID}\n")
    intend("web", int(time.time()), writer=f"{os.getpid()}.1")
    with pytest.raises(NotDeleted, match=f"web is being created by process {os.getpid()}"):
        record.delete_all(Orbctl(), names_are_ours=True)
    assert orbctl.read_text() == f"web {ULID}\n"


def test_an_intent_of_another_orbctl_is_reported(
    record: Record,
    orbctl: Path,
    intend: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    intend("web", MADE)
    monkeypatch.setenv("ORBCTL_SIMULATOR_HOME", str(tmp_path))
    (said,) = record.settle(Orbctl())
    assert "web may have been created by another orbctl" in said
    assert len(record.intents()) == 1
