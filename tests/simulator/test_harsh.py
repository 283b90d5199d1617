"""The harsh readings: where OrbStack's behavior is unknown, nothing must pass here by luck."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from orbctl_simulator.enter import NO_MACHINE
from tests.contract.program import Program
from tests.simulator.conftest import make_program


@pytest.fixture
def two(own: Program) -> Program:
    assert own("create", "debian", "one").code == 0
    assert own("clone", "one", "two").code == 0
    return own


def test_delete_asks(two: Program) -> None:
    """Without ``-f`` it prompts, even without a terminal."""
    for answer in (b"", b"n\n", b"\n"):
        refused = two("delete", "one", stdin=answer)
        assert refused.code == 1
        assert b"Delete 'one'?" in refused.err
    assert two("list", "-q").lines == ["one", "two"]
    assert two("delete", "one", "two", stdin=b"y\n" * 5).code == 0
    assert two("list", "-q").text == ""


def test_delete_by_id_crashes(two: Program) -> None:
    """A nil-pointer panic; nothing is changed."""
    ident = two("info", "one", "-f", "json").json["record"]["id"]
    for words in (["-f", ident], ["--force", "two", ident]):
        answer = two("delete", *words)
        assert answer.code == 2
        assert b"nil pointer dereference" in answer.err
    assert two("list", "-q").lines == ["one", "two"]


def test_delete_of_several_is_all_or_none(two: Program) -> None:
    assert two("delete", "-f", "one", "no-such-machine").code == 1
    assert two("list", "-q").lines == ["one", "two"]


def test_stop_without_a_name_stops_everything(two: Program) -> None:
    """All of OrbStack; `start` starts the machines that ran."""
    assert two("stop").code == 0
    stopped = two("status")
    assert (stopped.code, stopped.out) == (1, b"Stopped\n")
    assert two("list", "-r", "-q").text == ""
    assert two("status").text == "Running\n"
    assert two("start").code == 0
    assert two("list", "-r", "-q").lines == ["one"]
    assert two("stop", "--all").code == 0
    assert two("status").text == "Running\n"
    assert two("start", "--all").code == 0
    assert two("list", "-r", "-q").lines == ["one", "two"]


def test_run_wakes_orbstack(two: Program) -> None:
    """A command that needs OrbStack starts it, and the machine that it refers to."""
    two("stop")
    assert two("run", "-m", "two", "hostname").text == "two\n"
    assert two("status").text == "Running\n"
    assert two("list", "-r", "-q").lines == ["two"]


def test_push_to_tmp_is_lost(two: Program, tmp_path: Path) -> None:
    """Exit code 0, and nothing arrives."""
    (tmp_path / "file").write_text("lost")
    for target in ("/tmp/", "/tmp/file", "/tmp/no/such/dir", "/run/user", "/dev/shm/file"):
        assert two("push", "-m", "one", str(tmp_path / "file"), target).code == 0
    assert two("run", "-m", "one", "find", "/tmp", "/dev/shm", "-type", "f").text == ""
    assert two("run", "-m", "one", "touch", "/tmp/there").code == 0
    assert two("pull", "-m", "one", "/tmp/there", str(tmp_path)).code != 0


def test_push_keeps_no_mode(two: Program, tmp_path: Path) -> None:
    """Callers set the mode themselves."""
    (tmp_path / "script").write_text("#!/bin/sh\n")
    (tmp_path / "script").chmod(0o750)
    assert two("push", "-m", "one", str(tmp_path / "script")).code == 0
    assert two("run", "-m", "one", "sh", "-c", "stat -c %a ~/script").text == "644\n"


def test_push_to_a_stopped_machine(two: Program, tmp_path: Path) -> None:
    """Unknown; here it fails."""
    (tmp_path / "file").write_text("x")
    assert two("push", "-m", "two", str(tmp_path / "file")).code == 1


def test_no_machine_at_all(own: Program) -> None:
    """A hint on stderr, nothing on stdout."""
    answer = own("run", "true")
    assert (answer.code, answer.out) == (1, b"")
    assert answer.err.decode() == NO_MACHINE + "\n"
    assert own("list").text == own("list", "-q").text == own("default").text == ""
    assert own("list", "-f", "json").json == []


def test_default(two: Program) -> None:
    """`default NAME`, bare `default`, `default none`."""
    assert two("default", "two").code == 0
    assert two("default").text == "two\n"
    assert two("run", "hostname").text == "two\n"
    assert two("rename", "two", "three").code == 0
    assert two("default").text == "three\n"
    assert two("default", "none").code == 0
    assert two("default").text == ""
    assert two("run", "hostname").text == "one\n"
    assert two("default", "no-such-machine").code == 1


def test_name_from_the_distribution(own: Program) -> None:
    """Without a name, the machine is named after its distribution."""
    assert own("create", "debian:bookworm").code == 0
    assert own("list", "-q").lines == ["debian"]


def test_reserved_names(two: Program) -> None:
    for name in ("docker", "k8s", "default", "all", "none", "-x", "a b", "ä", ".a"):
        assert two("create", "debian", "--", name).code == 1
        assert two("rename", "one", "--", name).code == 1
        assert two("clone", "one", "--", name).code == 1
    assert two("list", "-q").lines == ["one", "two"]


def test_flags_that_need_isolation(own: Program, tmp_path: Path) -> None:
    """`--mount` and `--isolate-network` are for isolated machines."""
    for flags in (["--mount", str(tmp_path)], ["--isolate-network"]):
        assert own("create", *flags, "debian", "x").code == 1
    assert own("create", "--isolated", "--mount", "/no/such/dir", "debian", "x").code == 1
    assert own("list", "-q").text == ""


@pytest.mark.parametrize(
    "flags",
    [["--cpus", "x"], ["--memory", "4X"], ["--disk", "-1"], ["-a", "sparc"], ["-u", "a b"]],
)
def test_invalid_values(own: Program, flags: list[str]) -> None:
    answer = own("create", *flags, "debian", "x")
    assert answer.code == 1
    assert answer.err.startswith(b"[-32098] create 'x': ")


def test_cloud_init_is_rejected(own: Program, tmp_path: Path) -> None:
    """With one line that says what is required."""
    answer = own("create", "--user-data", str(tmp_path / "x"), "debian", "x")
    assert answer.code == 1
    assert answer.err.count(b"\n") == 1
    assert b"cloud-init" in answer.err


def test_password(own: Program) -> None:
    """`-p` prompts; it takes no value from the command line."""
    assert own("create", "-p", "debian", "x", stdin=b"se:cret\n").code == 0
    hashes = own("run", "-m", "x", "-u", "root", "cut", "-d:", "-f2", "/etc/shadow").lines
    assert sum(entry.startswith("$") for entry in hashes) >= 2
    assert own("create", "--set-password=secret", "debian", "y").code == 1


def test_orb(own: Program, tmp_path: Path) -> None:
    """Under the name `orb`, anything that is not a subcommand is a command for Linux."""
    program = tmp_path / "orb"
    text = "import sys; from orbctl_simulator.__main__ import main; sys.exit(main())"
    program.write_text(f"#!{sys.executable}\n{text}\n")
    program.chmod(0o755)
    orb = Program([str(program)], own.env)
    assert orb("create", "debian", "one").code == 0
    assert orb("list", "-q").lines == ["one"]
    assert orb("echo", "-n", "a b").text == "a b"
    assert orb("-u", "root", "id", "-u").text == "0\n"
    assert orb("reclaim").code == 127
    assert orb(stdin=b"hostname\n").text == "one\n"
    assert orb("config", "--help").text.count("orb config [command]") == 2


@pytest.mark.parametrize("word", ["docker", "k8s", "update", "reset", "debug"])
def test_commands_that_are_not_simulated(own: Program, word: str) -> None:
    answer = own(word)
    assert answer.code == 1
    assert answer.err.count(b"\n") == 1
    assert b"needs OrbStack" in answer.err


def test_translation_of_paths(own: Program, tmp_path: Path) -> None:
    """``-p`` makes absolute paths the host's, except ``/mnt/linux``."""
    folder = tmp_path / "shared"
    folder.mkdir()
    (folder / "file").write_text("on the host")
    program = make_program(tmp_path / "state", ORBCTL_SIMULATOR_SHARE=str(folder))
    assert program("create", "debian", "one").code == 0
    words = ["run", "-m", "one", "-u", "root", "-p", "cat"]
    assert program(*words, str(folder / "file")).text == "on the host"
    assert program(*words, "/mnt/linux/etc/hostname").text == "one\n"
    assert program("run", "-m", "one", "-u", "root", "pwd", cwd=folder).text == f"{folder}\n"


def test_tmp_is_not_kept(two: Program) -> None:
    two("run", "-m", "one", "touch", "/tmp/x")
    two("restart", "one")
    assert two("run", "-m", "one", "ls", "/tmp").text == ""


def test_help_goes_to_stdout(own: Program) -> None:
    """Cobra's help, with exit code 0."""
    for words in ([], ["--help"], ["help"], ["-h"]):
        assert "Available Commands:" in own(*words).text
    for words in (["run", "--help"], ["help", "run"], ["run", "-h"]):
        shown = own(*words).text
        assert "--machine string" in shown
        assert "run, exec, shell" in shown


def test_errors_of_cobra(own: Program) -> None:
    expected = {
        ("frob",): 'Error: unknown command "frob" for "orbctl-simulator"',
        ("list", "--frob"): "Error: unknown flag: --frob",
        ("list", "-Zq"): "Error: unknown shorthand flag: 'Z' in -Zq",
        ("run", "-m"): "Error: flag needs an argument: 'm' in -m",
        ("run", "--machine"): "Error: flag needs an argument: --machine",
        ("rename", "a"): "Error: accepts 2 arg(s), received 1",
        ("push",): "Error: requires at least 1 arg(s), only received 0",
        ("create", "a", "b", "c"): "Error: accepts at most 2 arg(s), received 3",
    }
    for words, text in expected.items():
        answer = own(*words)
        assert (answer.code, answer.out) == (1, b"")
        assert answer.err.decode().splitlines()[0] == text


def test_writing_to_a_closed_pipe(two: Program) -> None:
    """If the reader exits, the command ends, as it would on the host."""
    call = two.started("run", "-m", "one", "yes")
    assert call.stdout
    call.stdout.read(10)
    call.stdout.close()
    assert call.wait(10) == 141
    assert call.stderr
    call.stderr.close()
