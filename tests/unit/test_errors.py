"""Failures of other executables are one typed error with the reason."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pyinfra.api.exceptions import FactValueError

from pyinfra_orbstack import docker, making, orbctl, process, timing
from pyinfra_orbstack.docker import Docker, DockerError
from pyinfra_orbstack.facts.orbstack import OrbStackMachine
from pyinfra_orbstack.orbctl import BadValue, Orbctl, OrbctlError, OrbctlMissing, Record
from pyinfra_orbstack.process import Child


def program(folder: Path, name: str, script: str) -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


# orbctl ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine_id", ["", "-f", "01KH/..", "a b", "a\nb"])
def test_invalid_ids(machine_id: str) -> None:
    with pytest.raises(BadValue, match="machine id"):
        orbctl.check_id(machine_id)


def test_no_command_becomes_a_flag() -> None:
    with pytest.raises(BadValue, match="would read it as a flag"):
        orbctl.run_args("web", ["-u", "root"])


def test_orbctl_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(orbctl.COMMAND_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(OrbctlMissing, match="no such executable"):
        Orbctl()
    monkeypatch.delenv(orbctl.COMMAND_VARIABLE)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(orbctl, "KNOWN_FOLDERS", [str(tmp_path)])
    for platform, advice in (("darwin", "brew install orbstack"), ("linux", "orbctl-simulator")):
        monkeypatch.setattr(sys, "platform", platform)
        with pytest.raises(OrbctlMissing, match=advice):
            Orbctl()
    with pytest.raises(OrbctlMissing, match=r"cannot run .*none: No such file"):
        Orbctl(str(tmp_path / "none")).machines()


def test_orbctl_hangs(tmp_path: Path) -> None:
    hanging = Orbctl(program(tmp_path, "orbctl", "sleep 60"))
    with pytest.raises(OrbctlError, match=r"orbctl list did not answer in 0\.2 s"):
        hanging.call("list", timeout=0.2)


def test_the_shell_that_creates_a_machine_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host fails, and not the run, whatever arrived before."""
    shown = '{"id": "01KHVDCW7HTAGRPMB823KADP9B", "name": "status 0 01K"}'
    monkeypatch.setattr(making.shelltext, "command", lambda _: f"echo '{shown}'; kill -9 $$")
    made = making.Making(Orbctl(program(tmp_path, "orbctl", "")), "web", ["create"], None)
    with pytest.raises(OrbctlError, match="exit code 1"):
        made.finish(30, lambda line: None)
    made.undo(lambda line: None)
    monkeypatch.setattr(making.shelltext, "command", lambda _: "echo '{}'; kill -9 $$")
    made = making.Making(Orbctl(program(tmp_path, "orbctl", "")), "web", ["create"], None)
    with pytest.raises(OrbctlError, match="exit code 1"):
        made.finish(30, lambda line: None)
    made.undo(lambda line: None)


def test_machine_replaced_meanwhile(tmp_path: Path) -> None:
    answer = '{"record": {"id": "01KHVDCW7HTAGRPMB823KADP9B", "name": "web", "state": "running"}}'
    called = tmp_path / "called"
    client = Orbctl(program(tmp_path, "orbctl", f"echo $1 >>'{called}'; echo '{answer}'"))
    assert not client.delete("web", "01KHVDCW7HTAGRPMB823KADP9C")
    assert called.read_text() == "info\n"
    assert client.delete("web", "01KHVDCW7HTAGRPMB823KADP9B")
    assert called.read_text() == "info\ninfo\ndelete\n"
    script = "echo \"[-32098] machine not found: 'web'\" >&2; exit 1"
    gone = Orbctl(program(tmp_path, "orbctl", script))
    assert not gone.delete("web", "01KHVDCW7HTAGRPMB823KADP9B")


def test_missing_record(tmp_path: Path) -> None:
    record = Record(tmp_path / "none")
    record.forget("01KHVDCW7HTAGRPMB823KADP9B")
    assert record.machines() == {}
    assert not (tmp_path / "none").exists()


def test_fact_about_an_invalid_machine_name() -> None:
    with pytest.raises(FactValueError, match="machine name"):
        OrbStackMachine().command("-x")


# docker ----------------------------------------------------------------------------------------


def test_docker_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(docker.COMMAND_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(orbctl, "KNOWN_FOLDERS", [str(tmp_path)])
    with pytest.raises(DockerError, match="docker not found"):
        Docker()


def test_docker_is_not_executable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "docker"
    broken.write_text("#!/no/such/interpreter\n")
    broken.chmod(0o755)
    monkeypatch.setenv(docker.COMMAND_VARIABLE, str(broken))
    with pytest.raises(DockerError, match=r"cannot run .*docker: No such file"):
        Docker().containers()


def test_docker_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "[ $1 = start ] && { echo 'Error: no space' >&2; exit 1; }; echo '[]'"
    monkeypatch.setenv(docker.COMMAND_VARIABLE, program(tmp_path, "docker", script))
    with pytest.raises(DockerError, match="no space"):
        Docker().start("web")
    with pytest.raises(DockerError, match="docker reported 0 containers 'web'"):
        Docker().inspect("web")


# Processes -------------------------------------------------------------------------------------


def test_terminal_for_a_missing_program() -> None:
    before = len(os.listdir("/dev/fd"))
    with pytest.raises(FileNotFoundError):
        Child(["/no/such/program"], tty=True)
    assert len(os.listdir("/dev/fd")) == before


def test_unreadable_input_is_an_error() -> None:
    def pieces() -> object:
        yield b"half"
        raise ValueError("no more")

    with pytest.raises(OSError, match="cannot read the input: no more"):
        process.run(["cat"], stdin=pieces(), timeout=20)  # type: ignore[arg-type]


def test_output_that_another_process_holds_open() -> None:
    """It ends with the started process, and all of its output is there."""
    done = process.run(["sh", "-c", "sleep 60 & echo pid $!"], timeout=20)
    assert done.returncode == 0
    word, pid = done.stdout.split()
    assert word == b"pid"
    os.kill(int(pid), 9)


def test_writing_after_the_end() -> None:
    # In a separate Python: gevent's subprocesses in other tests may reap it.
    code = """if True:
        from pyinfra_orbstack.process import Child
        child = Child(["cat"])
        child.close_stdin()
        try:
            child.write(b"more")
        except BrokenPipeError as error:
            print(error)
        print(child.wait(10))
        child.end()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["stdin is closed", "0"], done.stderr


def test_process_that_keeps_running() -> None:
    child = Child(["sleep", "60"])
    assert child.wait(0.1) is None
    child.end()
    # Its status may be reaped: other tests in this process use gevent's subprocesses.
    assert child.gone


def test_logging_is_set_up_once(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []
    try:
        timing.configure_logging()
        timing.configure_logging(logging.DEBUG)
        root.info("told")
        root.debug("not told")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    said = capsys.readouterr().err
    assert said.endswith(" - root - INFO - told\n")
    assert said.count("\n") == 1
