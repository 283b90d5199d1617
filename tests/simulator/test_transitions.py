"""Machines in transition between states: what other processes see, and what they cannot do."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orbctl_simulator import packages
from scripts import leftovers
from tests.contract.program import Program
from tests.simulator.conftest import Elsewhere, make_program, processes_of

VERBS = {
    "start": (["start", "m"], "starting"),
    "stop": (["stop", "m"], "stopping"),
    "delete": (["delete", "-f", "m"], "deleting"),
    "clone": (["clone", "m", "other"], "cloning"),
    "rename": (["rename", "m", "other"], "renaming"),
    "export": (["export", "m", "FILE"], "exporting"),
}


def state_of(orb: Program, name: str = "m") -> str:
    answer = orb("info", name, "-f", "json")
    return str(answer.json["record"]["state"]) if answer.code == 0 else ""


@contextlib.contextmanager
def held(orb: Program, state: str, *words: str, seconds: float = 60) -> Iterator[Any]:
    """A call whose machine stays in a state until the call is killed."""
    rule = json.dumps({"match": words[0], "hold": seconds})
    call = orb.started(*words, env={"ORBCTL_SIMULATOR_FAULTS": rule})
    deadline = time.monotonic() + 30
    while state_of(orb) != state:
        assert call.poll() is None, call.communicate()
        assert time.monotonic() < deadline
    yield call
    call.kill()
    call.communicate()


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("creating", ["create", "debian", "m"]),
        ("starting", ["start", "m"]),
        ("stopping", ["stop", "m"]),
        ("deleting", ["delete", "-f", "m"]),
    ],
)
def test_transitions(own: Program, tmp_path: Path, state: str, words: list[str]) -> None:
    """They are listed, reject every change, and end with the process that caused them."""
    if state != "creating":
        assert own("create", "debian", "m").code == 0
    if state == "starting":
        assert own("stop", "m").code == 0
    with held(own, state, *words):
        known = own("list", "-f", "json").json
        assert [(entry["name"], entry["state"]) for entry in known] == [("m", state)]
        assert own("list", "-q", "-r").text == ""
        for verb, (command, to) in VERBS.items():
            answer = own(*[str(tmp_path / "file") if word == "FILE" else word for word in command])
            said = f"[-32098] {verb} 'm': invalid transition from {state} to {to}\n"
            assert (answer.code, answer.out, answer.err.decode()) == (1, b"", said)
        several = own("delete", "-f", "--all")
        assert b"invalid transition" in several.err
        assert own("create", "debian", "m").err.count(b"already exists") == 1
    expected = {"creating": "", "starting": "stopped", "stopping": "running"}
    assert state_of(own) == expected.get(state, "running")
    assert own("delete", "-f", "--all").code == 0
    assert not (tmp_path / "file").exists()
    assert processes_of(tmp_path / "state") == []


def test_run_waits(own: Program) -> None:
    """It starts machines on demand, so it waits for one in transition."""
    assert own("create", "debian", "m").code == 0
    with held(own, "stopping", "stop", "m", seconds=10):
        assert own("run", "-m", "m", "echo", "up").text == "up\n"
    assert own("stop", "m").code == 0
    with held(own, "starting", "start", "m", seconds=10):
        assert own("run", "-m", "m", "echo", "up").text == "up\n"


def test_creating_for_clones_and_imports(own: Program, tmp_path: Path) -> None:
    """The new machine is `creating`; the one that it is created from is in no transition."""
    assert own("create", "debian", "source").code == 0
    path = str(tmp_path / "file")
    assert own("export", "source", path).code == 0
    for words in (["clone", "source", "m"], ["import", "-n", "m", path]):
        with held(own, "creating", *words):
            assert state_of(own, "source") == "running"
        assert state_of(own) == ""
    assert own("stop", "source").code == 0


def test_other_hosts_are_not_delayed(own: Program) -> None:
    """Of several machines, only the one in transition fails; the others are changed."""
    for name in ("m", "n", "o"):
        assert own("create" if name == "m" else "clone", "debian" if name == "m" else "m", name)
    assert own("start", "--all").code == 0
    with held(own, "stopping", "stop", "m"):
        answer = own("stop", "n", "m", "o")
        assert answer.code == 1
        assert answer.err.decode().count("invalid transition") == 1
        assert state_of(own, "n") == state_of(own, "o") == "stopped"


def test_leftovers_that_another_process_is_deleting(own: Program, tmp_path: Path) -> None:
    """As when a run is ended while a test deletes its machine."""
    assert own("create", "debian", "m").code == 0
    with held(own, "deleting", "delete", "-f", "m", seconds=10):
        assert list(leftovers.delete_machines(tmp_path)) == []
    assert own("info", "m").code != 0


def test_hold_is_a_number(orb: Program) -> None:
    answer = orb("list", env={"ORBCTL_SIMULATOR_FAULTS": '{"hold": "long"}'})
    assert (answer.code, answer.err.count(b"\n")) == (1, 1)


@pytest.mark.usefixtures("root_only")
def test_state_of_a_process_that_exited(own: Program, tmp_path: Path) -> None:
    """A state ends with its process, even if the pid is reused."""
    assert own("create", "debian", "m").code == 0
    (folder,) = (tmp_path / "state" / "machines").iterdir()
    for text in (f"deleting {os.getpid()} 1", "deleting 99999999 1", "deleting", ""):
        (folder / "doing").write_text(text)
        assert state_of(own) == "running"
        assert own("stop", "m").code == 0
        assert own("start", "m").code == 0


# Interrupted -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("root_only")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_create_is_interrupted(own: Program, tmp_path: Path, number: int) -> None:
    """At any point: afterwards the machine is complete, or the next command removes it."""
    begun = time.monotonic()
    assert own("create", "debian", "whole").code == 0
    whole = time.monotonic() - begun
    for step in range(8):
        call = own.started("create", "debian", f"m{step}")
        time.sleep(whole * 0.13 * (step + 1))
        call.send_signal(number)
        _, err = call.communicate(timeout=30)
        # While Python loads modules, Python itself reports it, in its own way.
        assert b"Traceback" not in err or b"import" in err
    left_nothing(own, tmp_path)


def left_nothing(own: Program, tmp_path: Path) -> None:
    """All machines run; nothing incomplete is left in the state directory or the cache."""
    known = own("list", "-f", "json").json
    deadline = time.monotonic() + 10
    running = [entry for entry in known if entry["state"] == "running"]
    while len(processes_of(tmp_path / "state")) != len(running):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert {entry["state"] for entry in known} <= {"running", "stopped"}
    folders = {path.name for path in (tmp_path / "state" / "machines").glob("*")}
    assert folders == {entry["id"] for entry in known}
    for place in (tmp_path / "state", tmp_path / "cache"):
        assert not list(place.rglob("*.new"))
        assert not (place / "trash").exists()
    for entry in known:
        assert own("run", "-m", entry["name"], "true").code == 0


@pytest.mark.usefixtures("root_only")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_layer_is_interrupted(own: Program, rootfs: Path, tmp_path: Path, number: int) -> None:
    """Also while it is built: the installer is killed, and nothing stays in the cache."""
    base = tmp_path / "base"
    subprocess.run(["cp", "-a", rootfs, base], check=True)
    (base / "usr/bin/sudo").unlink()
    (base / "var/lib/dpkg").mkdir(parents=True)
    (base / "var/lib/dpkg/status").write_text("")
    (base / "usr/bin/apt-get").write_text("#!/bin/sh\necho begun; while :; do :; done\n")
    (base / "usr/bin/apt-get").chmod(0o755)
    cache = {"ORBCTL_SIMULATOR_CACHE": str(tmp_path / "cache")}
    program = make_program(tmp_path / "state", **cache)
    assert program("image", "add", "void", str(base)).code == 0
    call = program.started("create", "void", "m")
    deadline = time.monotonic() + 30
    while not any(log.stat().st_size for log in (tmp_path / "cache").glob("*.new/log")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    call.send_signal(number)
    call.communicate(timeout=30)
    left_nothing(program, tmp_path)
    assert processes_of(tmp_path / "cache") == []
    assert not list((tmp_path / "cache").glob("*.log"))


# The package manager of the host ---------------------------------------------------------------

HOLD = """
import fcntl, sys, time
file = open(sys.argv[2], "a+")
(fcntl.flock if sys.argv[1] == "flock" else fcntl.lockf)(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(float(sys.argv[3]))
"""


@contextlib.contextmanager
def locked(how: str, path: Path) -> Iterator[None]:
    words = [sys.executable, "-c", HOLD, how, str(path), "60"]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"held\n"
        yield
        holder.kill()


def test_locks_are_checked_and_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not packages._is_record_locked(str(path))
    path.touch()
    for how, asked in (("lockf", packages._is_record_locked), ("flock", packages._is_flocked)):
        assert not asked(str(path))
        with locked(how, path):
            assert asked(str(path))
        assert not asked(str(path))


def test_package_manager_at_work(elsewhere: Elsewhere, tmp_path: Path) -> None:
    """Machines of the host's root wait for it, print so once, and continue."""
    (tmp_path / "hold.py").write_text(HOLD)
    lock = "/var/lib/dpkg/lock-frontend"
    script = (
        f"cp -a /var/lib/dpkg dpkg; mount --bind dpkg /var/lib/dpkg; touch {lock}; "
        f"orb create debian m; orb stop m; {sys.executable} hold.py lockf {lock} 10 >held & "
        "until grep -q held held; do sleep 0.05; done; "
        "orb run -m m echo up; orb delete -f m"
    )
    answer = elsewhere(script)
    assert answer.text == "up\n"
    said = f"waiting for this host's package manager, which has locked {lock}\n"
    assert answer.err.decode().count(said) == 1


def test_package_manager_that_does_not_end(elsewhere: Elsewhere, tmp_path: Path) -> None:
    """Then there is one line, and no machine."""
    (tmp_path / "hold.py").write_text(HOLD)
    lock = "/var/lib/dpkg/lock"
    program = [sys.executable, "-c", SHORT]
    script = (
        f"cp -a /var/lib/dpkg dpkg; mount --bind dpkg /var/lib/dpkg; touch {lock}; "
        f"{sys.executable} hold.py lockf {lock} 60 >held & "
        "until grep -q held held; do sleep 0.05; done; "
        f"code=0; {shlex.join(program)} create debian m || code=$?; "
        "orb list -q; kill $!; exit $code"
    )
    answer = elsewhere(script)
    assert (answer.code, answer.out) == (1, b"")
    last = answer.err.decode().splitlines()[-1]
    assert last.startswith(f"[-32098] create 'm': this host's package manager still locks {lock}")


#: The simulator, with a shorter timeout.
SHORT = """
import sys
from orbctl_simulator import __main__, packages
packages._SECONDS = 1
sys.argv[0] = "orbctl-simulator"
sys.exit(__main__.main())
"""
