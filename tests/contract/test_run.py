"""`run` in detail."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.contract.program import Program

BINARY = bytes(range(256)) * 257 + b"no newline at the end\xff"


@pytest.mark.parametrize("code", [0, 1, 7, 126, 255])
@pytest.mark.fact("recorded")
def test_exit_code(orb: Program, machine: str, code: int) -> None:
    """Exit code: propagated verbatim."""
    assert orb("run", "-m", machine, "sh", "-c", f"exit {code}").code == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV])
@pytest.mark.fact("inferred")
def test_death_by_signal(orb: Program, machine: str, number: int) -> None:
    """The code is unknown; a shell's 128+n is assumed."""
    assert orb("run", "-m", machine, "sh", "-c", f"kill -{int(number)} $$").code == 128 + number


@pytest.mark.fact("inferred")
def test_command_not_found(orb: Program, machine: str) -> None:
    """Command not found: a login bash's message, and 127."""
    answer = orb("run", "-m", machine, "no-such-command")
    assert answer.code == 127
    assert answer.out == b""
    assert b"no-such-command: command not found" in answer.err


@pytest.mark.fact("inferred")
def test_command_not_executable(orb: Program, machine: str) -> None:
    """Command not found: 126 for a file that exists but cannot be executed."""
    answer = orb("run", "-m", machine, "/etc/passwd")
    assert answer.code == 126
    assert b"ermission denied" in answer.err


WORDS = [
    *("", " ", "a b", "a\nb", "'", '"', "\\", "$HOME", "`id`", "*", "~", "!!", ";", "#", "-n"),
    *("--", "\t", "ü", "日本語", "a=b", "{a,b}", "\x01", "%s", "&&", "(", "<", ">"),
]


@pytest.mark.fact("conflict")
def test_arguments_arrive_unchanged(orb: Program, machine: str) -> None:
    """Quoting: every word arrives unchanged, and none is joined or split."""
    answer = orb("run", "-m", machine, "printf", r"%s\0", *WORDS)
    assert answer.text.split("\0")[:-1] == WORDS


@pytest.mark.fact("conflict")
def test_arguments_may_be_any_bytes(orb: Program, machine: str) -> None:
    """Quoting: a word may contain any byte except NUL."""
    word = bytes(range(1, 256))
    assert orb("run", "-m", machine, "printf", "%s", word).out == word


@pytest.mark.fact("recorded")
def test_script_with_arguments(orb: Program, machine: str) -> None:
    """`run`: ``sh -c SCRIPT ARG0 ARG1`` works as separate words."""
    script = 'printf "%s|" "$0" "$@"'
    assert orb("run", "-m", machine, "sh", "-c", script, "zero", "one two").text == "zero|one two|"


@pytest.mark.fact("recorded")
def test_stdin_is_exact(orb: Program, machine: str) -> None:
    """Stdin: byte-exact, including its end, whatever the bytes."""
    answer = orb("run", "-m", machine, "sh", "-c", "wc -c; exit 3", stdin=BINARY)
    assert (answer.code, answer.out.strip()) == (3, str(len(BINARY)).encode())


@pytest.mark.fact("conflict")
def test_binary_both_ways(orb: Program, machine: str) -> None:
    """Binary stdout: the output is not corrupted either."""
    assert orb("run", "-m", machine, "cat", stdin=BINARY * 20).out == BINARY * 20


@pytest.mark.fact("recorded")
def test_stdin_closed(orb: Program, machine: str) -> None:
    """Stdin closed: works, without a prompt for root."""
    answer = orb("run", "-m", machine, "-u", "root", "cat")
    assert (answer.code, answer.out) == (0, b"")
    process = orb.started("run", "-m", machine, "id", "-u", stdin=None, preexec_fn=_close_stdin)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, b"501\n")


def _close_stdin() -> None:
    os.close(0)


@pytest.mark.fact("conflict")
def test_streams_are_apart(orb: Program, machine: str) -> None:
    """Stdout and stderr: separate descriptors."""
    answer = orb("run", "-m", machine, "sh", "-c", r"printf 'o\377'; printf 'e\376' >&2")
    assert (answer.out, answer.err) == (b"o\xff", b"e\xfe")


@pytest.mark.fact("recorded")
def test_no_terminal_without_one(orb: Program, machine: str) -> None:
    """Tty: if the caller has no terminal, the command has none."""
    answer = orb("run", "-m", machine, "sh", "-c", "for i in 0 1 2; do test -t $i; echo $?; done")
    assert answer.text.split() == ["1", "1", "1"]


@pytest.mark.fact("inferred")
def test_a_terminal_is_used_if_there_is_one(orb: Program, machine: str) -> None:
    """Tty and TERM: on a terminal, the command has one of the caller's size."""
    answer = orb.on_terminal(
        *("run", "-m", machine, "sh", "-c"),
        "for i in 0 1 2; do test -t $i || echo no $i; done; stty size; echo $TERM; tty; exit 4",
        env={"TERM": "xterm-256color"},
    )
    assert answer.code == 4
    shown = answer.out.decode()
    assert "no " not in shown
    assert "40 120" in shown
    assert "xterm-256color" in shown
    assert "/dev/pts/" in shown


@pytest.mark.fact("inferred")
def test_typing(orb: Program, machine: str) -> None:
    """Tty: typed input arrives, ^C as a signal in the machine."""
    script = "echo ready; read line; echo got $line; exit 6"
    answer = orb.on_terminal("run", "-m", machine, "sh", "-c", script, typed=b"words\n")
    assert answer.code == 6
    assert b"got words" in answer.out
    script = "trap 'exit 9' INT; echo ready; while :; do sleep 0.1; done"
    answer = orb.on_terminal("run", "-m", machine, "sh", "-c", script, typed=b"\x03")
    assert answer.code == 9


@pytest.mark.fact("recorded")
def test_default_user(orb: Program, machine: str) -> None:
    """`run`: the default user is the one in the record."""
    user = orb("info", machine, "-f", "json").json["record"]["config"]["default_username"]
    assert orb("run", "-m", machine, "id", "-un").text.strip() == user


@pytest.mark.fact("inferred")
def test_root(orb: Program, machine: str) -> None:
    """Root: ``-u root`` without a password."""
    answer = orb("run", "-m", machine, "-u", "root", "sh", "-c", "id -u; echo $HOME; echo $USER")
    assert answer.text.split() == ["0", "/root", "root"]


@pytest.mark.fact("inferred")
def test_unknown_user(orb: Program, machine: str) -> None:
    """Wrong user: an error, whose text is unknown."""
    answer = orb("run", "-m", machine, "-u", "no-such-user", "true")
    assert answer.code != 0
    assert answer.err


@pytest.mark.fact("documented")
def test_working_directory(orb: Program, machine: str) -> None:
    """Flags: ``-w``."""
    assert orb("run", "-m", machine, "-w", "/etc", "pwd").text == "/etc\n"
    assert orb("run", "-m", machine, "--workdir", "/usr/bin", "pwd").text == "/usr/bin\n"


@pytest.mark.fact("inferred")
def test_bad_working_directory(orb: Program, machine: str) -> None:
    """Bad workdir: the command does not run in another directory instead."""
    answer = orb("run", "-m", machine, "-w", "/no/such/dir", "echo", "ran")
    assert answer.code != 0
    assert b"ran" not in answer.out


@pytest.mark.fact("recorded")
def test_directory_of_the_caller(orb: Program, machine: str) -> None:
    """Cwd: the caller's, if it exists in the machine."""
    assert orb("run", "-m", machine, "pwd", cwd="/usr").text == "/usr\n"


@pytest.mark.fact("inferred")
def test_directory_that_does_not_exist(orb: Program, isolated: str, tmp_path: Path) -> None:
    """Cwd: the command also runs if the path does not exist in the machine."""
    assert orb("run", "-m", isolated, "echo", "ran", cwd=tmp_path).text == "ran\n"


@pytest.mark.fact("inferred")
def test_login_environment(orb: Program, machine: str) -> None:
    """Login env: a login's variables, and none of the caller's."""
    answer = orb("run", "-m", machine, "env", env={"CONTRACT_SECRET": "1", "LC_TEST": "1"})
    env = dict(line.split("=", 1) for line in answer.lines if "=" in line)
    assert env["HOME"] == f"/home/{env['USER']}"
    assert {"PATH", "SHELL", "LOGNAME"} <= env.keys()
    assert not {"CONTRACT_SECRET", "LC_TEST"} & env.keys()


@pytest.mark.fact("documented")
def test_forwarded_environment(orb: Program, machine: str) -> None:
    """`run`: only the variables listed in ORBENV are forwarded."""
    env = {"ORBENV": "ONE:TWO:THREE", "ONE": "1 a\n'", "TWO": "", "FOUR": "4"}
    script = 'printf "%s|" "$ONE" "${TWO-unset}" "${THREE-unset}" "${FOUR-unset}"'
    assert orb("run", "-m", machine, "sh", "-c", script, env=env).text == "1 a\n'||unset|unset|"


@pytest.mark.fact("recorded")
def test_etc_environment(orb: Program, stopped: str) -> None:
    """Login env: ``/etc/environment`` is applied, ``~/.bashrc`` is not."""
    script = "echo 'CONTRACT=\"a b\"' >>/etc/environment"
    assert orb("run", "-m", stopped, "-u", "root", "sh", "-c", script).code == 0
    script = "printf 'export FROM_RC=1\\n%s\\n' \"$(cat ~/.bashrc)\" >~/.bashrc"
    assert orb("run", "-m", stopped, "sh", "-c", script).code == 0
    shown = orb("run", "-m", stopped, "sh", "-c", 'echo "$CONTRACT|${FROM_RC-unset}"').text
    assert shown == "a b|unset\n"
    assert orb("run", "-m", stopped, "bash", "-ic", "echo $FROM_RC").text == "1\n"


@pytest.mark.fact("documented")
def test_login_shell(orb: Program, machine: str) -> None:
    """Flags: ``-s`` uses the login shell instead of running the command directly."""
    assert orb("run", "-m", machine, "-s", "echo $((1 + 1)) $0").text.split()[0] == "2"


@pytest.mark.fact("inferred")
def test_without_a_command(orb: Program, machine: str) -> None:
    """Without a command, a login shell runs."""
    assert orb("run", "-m", machine, stdin=b"echo $((20 + 3))\n").text == "23\n"


@pytest.mark.fact("recorded")
def test_start_on_demand(orb: Program, stopped: str) -> None:
    """Auto-start: running in a stopped machine starts it."""
    assert orb("run", "-m", stopped, "echo", "up").text == "up\n"
    assert orb("info", stopped, "-f", "json").json["record"]["state"] == "running"


@pytest.mark.fact("recorded")
def test_unknown_machine(orb: Program) -> None:
    """Not found: stderr, exit 1, and nothing on stdout."""
    answer = orb("run", "-m", "no-such-machine", "true")
    assert (answer.code, answer.out) == (1, b"")
    assert b"machine not found: 'no-such-machine'" in answer.err


@pytest.mark.fact("recorded")
def test_killing_a_parent(orb: Program, machine: str) -> None:
    """Killing the client: if only a parent is killed, the call continues."""
    mark = f"/tmp/parent-{time.time_ns()}"
    command = [*orb.command, "run", "-m", machine, "sh", "-c", f"echo up; sleep 1; touch {mark}"]
    parent = subprocess.Popen(
        ["sh", "-c", '"$@" & wait', "sh", *command],
        env=orb.env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    assert parent.stdout
    assert parent.stdout.readline() == b"up\n"
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 30
    while orb("run", "-m", machine, "test", "-e", mark).code != 0:
        assert time.monotonic() < deadline


@pytest.mark.fact("inferred")
def test_many_at_once(orb: Program, machine: str) -> None:
    """No limit is documented; concurrent calls do not affect each other."""
    calls = [orb.started("run", "-m", machine, "echo", str(number)) for number in range(10)]
    shown = [call.communicate(timeout=60)[0] for call in calls]
    assert shown == [f"{number}\n".encode() for number in range(10)]


@pytest.mark.fact("inferred")
def test_output_through_its_own_name(orb: Program, machine: str) -> None:
    """``/dev/stdout`` and ``/dev/stderr`` can be opened by the default user."""
    answer = orb("run", "-m", machine, "sh", "-c", "echo o >/dev/stdout; echo e >/dev/stderr")
    assert (answer.out, answer.err) == (b"o\n", b"e\n")


@pytest.mark.fact("inferred")
def test_no_stray_descriptors(orb: Program, machine: str) -> None:
    """The command has 0, 1 and 2, and no other descriptor of the caller."""
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    process = orb.started(
        *("run", "-m", machine, "sh", "-c", "ls -l /proc/$$/fd"), pass_fds=(writer,)
    )
    out, _ = process.communicate(timeout=60)
    os.close(reader)
    os.close(writer)
    held = re.findall(r" (\d+) -> ", out.decode())
    assert held == ["0", "1", "2"]
