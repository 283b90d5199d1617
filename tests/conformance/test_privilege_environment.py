"""Sections P, E and Y: users, shells, environments and terminals."""

from __future__ import annotations

import os
import pty
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest

from pyinfra_orbstack import sudo
from pyinfra_orbstack.orbctl import Orbctl
from pyinfra_orbstack.protocol import OutcomeUnknown

from ..containers import Containers
from .conftest import PASSWORD, PLACES, TRANSPORTS, Guest, Remote, way

PYINFRA = os.path.join(os.path.dirname(sys.executable), "pyinfra")


@pytest.fixture
def bob(machine: str, transport: str, connect: Callable[..., Remote]) -> Remote:
    """A native session of a user whose sudo asks for a password."""
    return connect(machine, orbstack_user="bob", orbstack_transport=transport)


@pytest.mark.smoke
def test_P1_sudo_to_root(remote: Remote) -> None:
    assert remote.out("id -un", _sudo=True) == "root"


@pytest.mark.smoke
def test_P2_sudo_to_a_user(remote: Remote) -> None:
    assert remote.out("id -un", _sudo=True, _sudo_user="alice") == "alice"


@pytest.mark.smoke
def test_P3_sudo_with_the_right_password(bob: Remote) -> None:
    assert bob.out("id -un", _sudo=True, _sudo_password=PASSWORD) == "root"
    ran = bob.run("id -un", _sudo=True, _sudo_user="alice", _sudo_password=PASSWORD)
    assert ran == (True, ["alice"], [])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A terminal on which the password is typed; the prompts that were shown."""
    prompts: list[str] = []
    monkeypatch.setattr(sudo, "_typed", [])
    monkeypatch.setattr(
        "pyinfra.connectors.util.getpass", lambda prompt: prompts.append(prompt) or PASSWORD
    )
    master, slave = pty.openpty()
    with open(slave) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield prompts
    os.close(master)


@pytest.mark.smoke
def test_P3_there_is_one_password_prompt(bob: Remote, asked: list[str]) -> None:
    """If sudo requires one; then both the failed command and later ones work."""
    assert bob.out("id -un", _sudo=True) == "root"
    assert bob.out("id -un", _sudo=True) == "root"
    assert len(asked) == 1


@pytest.mark.parametrize(
    "stdin", [["a", "b"], b"x" * 100_000, "generator"], ids=["few", "many", "once"]
)
def test_P3_stdin_arrives_complete_after_the_password(
    bob: Remote, asked: list[str], stdin: Any
) -> None:
    size = 4 if isinstance(stdin, list) else 100_000
    if stdin == "generator":
        stdin = (b"x" * 1000 for _ in range(100))
    assert bob.out("wc -c", _sudo=True, _stdin=stdin).strip() == str(size)
    assert len(asked) == 1


@pytest.mark.parametrize("how", [{}, {"_get_pty": True}], ids=["pipes", "terminal"])
@pytest.mark.parametrize("line", sudo.REQUIRED)
@pytest.mark.parametrize("privilege", [{}, {"_sudo": True}], ids=["plain", "sudo"])
def test_P3_a_command_that_prints_sudos_messages_runs_once(
    machine: str,
    transport: str,
    connect: Callable[..., Remote],
    guest: Guest,
    asked: list[str],
    privilege: dict[str, bool],
    line: str,
    how: dict[str, bool],
) -> None:
    remote = connect(machine, orbstack_user="likedash", orbstack_transport=transport)
    guest.sh("rm -f /tmp/p3; touch /tmp/p3; chmod 666 /tmp/p3")
    for status, more in ((1, ""), (1, "echo more;"), (0, ""), (3, "")):
        text = f"echo x >>/tmp/p3; {more} echo {line!r} >&2; exit {status}"
        remote.exits(text, status, **privilege, **how)
    assert guest.sh("cat /tmp/p3").split() == [b"x"] * 4
    assert asked == []


@pytest.mark.smoke
def test_P3_without_a_terminal_there_is_no_prompt(
    machine: str, transport: str, tmp_path: Path, guest: Guest
) -> None:
    """The other host continues, and a one-line error says what to do."""
    (tmp_path / "inventory.py").write_text(
        f"a = [('@orbstack/{machine}', {{'orbstack_user': 'bob'}}), '@local']\n"
    )
    (tmp_path / "deploy.py").write_text(
        "from pyinfra import host\nfrom pyinfra.operations import server\n"
        "server.shell(name='a', commands=['true'], _sudo=host.name != '@local')\n"
        f"server.shell(name='b', commands=['echo it went on >{tmp_path / 'on'}'])\n"
    )
    done = subprocess.run(
        [PYINFRA, "-y", "inventory.py", "deploy.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        check=False,
        env={**os.environ, "PYINFRA_ORBSTACK_TRANSPORT": way(transport)},
    )
    assert "Traceback" not in done.stderr
    assert "EOFError" not in done.stderr
    assert done.stderr.count("set _sudo_password in the host's data") == 1
    assert (tmp_path / "on").exists()


def test_P3_one_password_for_all_hosts(
    machine: str, fresh_machine: str, transport: str, tmp_path: Path
) -> None:
    """It is typed once on a real terminal; both hosts need it at the same time."""
    if transport != "session":
        pytest.skip("asking knows nothing of transports")
    (tmp_path / "inventory.py").write_text(
        f"a = ['@orbstack/{machine}', '@orbstack/{fresh_machine}']\n"
    )
    command = [PYINFRA, "-y", "--data", "orbstack_user=bob", "--sudo", "inventory.py", "exec"]
    pid, fd = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execvpe(PYINFRA, [*command, "--", "id -un"], {**os.environ, "LC_ALL": "C.UTF-8"})
    seen = b""
    try:
        while b"sudo password:" not in seen:
            seen += os.read(fd, 65536)
        time.sleep(0.5)
        os.write(fd, f"{PASSWORD}\n".encode())
        while data := os.read(fd, 65536):
            seen += data
    except OSError:
        pass
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, seen
    os.close(fd)
    assert seen.count(b"sudo password:") == 1
    # pyinfra pads the shorter name.
    assert len(re.findall(rb"\] +root", seen)) == 2, seen
    assert PASSWORD.split()[-1].encode() not in seen


def test_P4_a_wrong_password(bob: Remote, guest: Guest) -> None:
    guest.sh("rm -f /tmp/ran")
    ran = bob.run("touch /tmp/ran", _sudo=True, _sudo_password="wrong")
    assert not ran.ok
    assert any("incorrect password" in line for line in ran.err)
    # sudo itself prompts `passwd_tries` times; another run would double that.
    assert sum("try again" in line.lower() for line in ran.err) <= 2
    guest.sh("test ! -e /tmp/ran")


def test_P5_sudo_denied(machine: str, connect: Callable[..., Remote], transport: str) -> None:
    alice = connect(machine, orbstack_user="alice", orbstack_transport=transport)
    ran = alice.run("id", _sudo=True, _sudo_password="x")
    assert not ran.ok
    assert ran.err


def test_P6_sudo_missing(one: Remote) -> None:
    ran = one.exits("PATH=/nowhere; sudo -n true", 127)
    assert "sudo" in " ".join(ran.err)


def test_P7_the_wording_of_sudo_rs(bob: Remote, guest: Guest, asked: list[str]) -> None:
    """Here it wraps sudo, and passes on its stdin."""
    path = "/usr/local/bin/sudo"
    guest.sh(
        'cat >"$1" && chmod 755 "$1"',
        path,
        stdin=b'#!/bin/sh\ncase " $* " in *\' -A \'*) exec /usr/bin/sudo "$@";; esac\n'
        b"echo 'sudo-rs: interactive authentication is required' >&2; exit 1\n",
    )
    try:
        assert bob.out("id -un", _sudo=True) == "root"
        assert len(asked) == 1
    finally:
        guest.sh('rm -f "$1"', path)


def test_P8_requiretty(
    machine: str, guest: Guest, connect: Callable[..., Remote], transport: str
) -> None:
    path = "/etc/sudoers.d/zz-requiretty"
    guest.sh('echo "Defaults:likedash requiretty" >"$1" && chmod 440 "$1"', path)
    try:
        remote = connect(machine, orbstack_user="likedash", orbstack_transport=transport)
        ran = remote.run("id -un", _sudo=True)
        assert not ran.ok
        assert "must have a tty" in " ".join(ran.err)
        assert "root" in remote.out("id -un", _sudo=True, _get_pty=True)
    finally:
        guest.sh('rm -f "$1"', path)


@pytest.mark.smoke
def test_P9_su_with_and_without_a_password(
    remote: Remote, bob: Remote, machine: str, connect: Callable[..., Remote]
) -> None:
    root = connect(machine, orbstack_user="root")
    assert root.out("id -un", _su_user="alice") == "alice"
    if not supports("_su_password"):
        pytest.skip("this pyinfra has no _su_password")
    assert bob.out("id -un", _su_user="root", _su_password=PASSWORD) == "root"


def supports(argument: str) -> bool:
    from pyinfra.api.arguments import all_argument_meta

    return argument in all_argument_meta


def test_P10_su_login(machine: str, connect: Callable[..., Remote], transport: str) -> None:
    root = connect(machine, orbstack_user="root", orbstack_transport=transport)
    ran = root.run("id -un; pwd", _su_user="alice", _use_su_login=True)
    assert ran.out == ["alice", "/home/alice"]


@pytest.mark.smoke
def test_P11_doas(remote: Remote) -> None:
    assert remote.out("id -un", _doas=True) == "root"
    assert remote.out("id -un", _doas=True, _doas_user="alice") == "alice"


@pytest.mark.smoke
def test_P13_environment_kept(remote: Remote) -> None:
    shown = "sudo -n -E sh -c 'echo $KEPT'"
    assert remote.out(shown, _env={"KEPT": "yes"}) == "yes"


def test_P13_environment_kept_by_pyinfras_own_argument(
    shared_machine: str, client: Orbctl, connect: Callable[..., Remote]
) -> None:
    guest = Guest(client, shared_machine)
    guest.sh("cp /etc/environment /root/environment; echo KEPT=yes >>/etc/environment")
    try:
        remote = connect(shared_machine)
        assert remote.out("echo $KEPT") == "yes"
        assert remote.out('echo "$KEPT."', _sudo=True) == "."
        assert remote.out('echo "$KEPT."', _sudo=True, _preserve_sudo_env=True) == "yes."
    finally:
        guest.sh("mv /root/environment /etc/environment")


def test_P14_home_of_the_target_user(remote: Remote) -> None:
    assert remote.out("echo ~ $HOME", _sudo=True, _sudo_user="alice") == "/home/alice /home/alice"
    assert remote.out("echo ~ $HOME", _sudo=True) == "/root /root"


@pytest.mark.smoke
def test_P15_native_root(machine: str, connect: Callable[..., Remote], transport: str) -> None:
    root = connect(machine, orbstack_user="root", orbstack_transport=transport)
    assert root.run("id -un; echo $HOME; pwd").out == ["root", "/root", "/root"]


@pytest.mark.smoke
@pytest.mark.parametrize(
    "value", ["a b", "it's", 'say "x"', "two\nlines", "$HOME `id` \\", "", "=", "ü 🦀"]
)
def test_E1_env(remote: Remote, value: str) -> None:
    import pyinfra

    if tuple(map(int, pyinfra.__version__.split(".")[:2])) < (3, 8) and set(value) & set('"$`\\'):
        pytest.skip("before 3.8 pyinfra itself puts values into double quotes")
    assert remote.out("printf '%s|' \"$KEY\"", _env={"KEY": value}) == f"{value}|"


def test_E2_our_environment_does_not_leak(
    machine: str, connect: Callable[..., Remote], monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    monkeypatch.setenv("PYINFRA_TEST_LEAK", "leaked")
    remote = connect(machine, orbstack_transport=transport)
    assert "PYINFRA" not in remote.out("env")


def test_E3_orbenv_is_not_set(
    machine: str, connect: Callable[..., Remote], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's own ORBENV still works, because OrbStack's client reads it."""
    assert "ORBENV" not in Orbctl.environment()
    monkeypatch.setenv("ORBENV", "PYINFRA_TEST_WANTED")
    monkeypatch.setenv("PYINFRA_TEST_WANTED", "yes")
    assert connect(machine).out("echo $PYINFRA_TEST_WANTED") == "yes"


@pytest.mark.smoke
def test_E4_chdir(remote: Remote) -> None:
    assert remote.out("pwd", _chdir="/usr/lib") == "/usr/lib"
    assert remote.out("pwd", _chdir="/usr/lib", _sudo=True) == "/usr/lib"
    assert not remote.run("pwd", _chdir="/no/such folder").ok
    assert not remote.run("pwd", _chdir="/root").ok


@pytest.mark.smoke
def test_E6_directory_does_not_persist(remote: Remote) -> None:
    home = remote.out("pwd")
    remote.run("cd /usr")
    assert remote.out("pwd") == home


def test_E7_nothing_persists(remote: Remote) -> None:
    before = remote.out("umask; ulimit -n; export -p | sort; command -v leftover || true")
    remote.run("export LEFT=1; umask 077; ulimit -n 99; leftover() { :; }; set -u; exec 1>&2")
    after = remote.out("umask; ulimit -n; export -p | sort; command -v leftover || true")
    assert after == before


@pytest.mark.smoke
@pytest.mark.parametrize("shell", ["bash", "sh", None])
def test_E8_shell_executable(remote: Remote, shell: str | None) -> None:
    shown = remote.out("echo ${BASH_VERSION:+bash} $((1 + 1))", _shell_executable=shell)
    assert shown == ("bash 2" if shell == "bash" else "2")


@pytest.mark.parametrize("shell", ["fish", "zsh", "nologin", "ksh", "dash", "busybox"])
def test_E9_E13_login_shells(machine: str, connect: Callable[..., Remote], shell: str) -> None:
    """All login shells: whatever a user's login shell is, commands run in sh."""
    user = f"like{shell}"
    remote = connect(machine, orbstack_user=user)
    assert remote.out("for i in 1 2; do printf '%s ' \"$i\" 'a  b'; done") == "1 a  b 2 a  b "
    if shell != "nologin":
        assert remote.out("id -un", _sudo=True) == "root"
    remote.exits("exit 3", 3)


def test_E10_environment_as_sshd_sets_it(remote: Remote, machine: str, client: Orbctl) -> None:
    user = client.info(machine).username
    shown = remote.out('echo "$HOME $USER $LOGNAME"; echo "$PATH"').split("\n")
    assert shown[0] == f"/home/{user} {user} {user}"
    assert {"/usr/bin", "/bin"} <= set(shown[1].split(":"))


@pytest.mark.parametrize("mask", ["022", "077"])
def test_E11_umask(remote: Remote, mask: str) -> None:
    assert remote.out(f"umask {mask}; rm -f ~/new; touch ~/new; stat -c %a ~/new") == (
        "644" if mask == "022" else "600"
    )
    remote.run("rm ~/new")


def test_E12_home_missing_here(
    machine: str, connect: Callable[..., Remote], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HOME")
    assert connect(machine).out("echo on") == "on"


@pytest.mark.parametrize("shell", ["dash", "bash", "busyboxsh", "ksh"])
def test_E13_shells_of_a_command(remote: Remote, shell: str) -> None:
    words = "for i in \"a 'b'\" '$x'; do printf '<%s>' \"$i\"; done"
    assert remote.out(words, _shell_executable=shell) == "<a 'b'><$x>"
    assert remote.out(words, _shell_executable=shell, _sudo=True) == "<a 'b'><$x>"


def on_a_terminal(command: list[str]) -> bytes:
    """Run a command with a local terminal as all its streams."""
    master, slave = pty.openpty()
    running = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    output = b""
    try:
        while data := os.read(master, 65536):
            output += data
    except OSError:
        pass
    os.close(master)
    assert running.wait(timeout=30) == 0, output
    return output


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_Y1_no_terminal_by_default(
    machine: str, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYINFRA_ORBSTACK_TRANSPORT", way(transport))
    text = "for i in 0 1 2; do test -t $i && echo tty-$i; done; echo none"
    output = on_a_terminal([PYINFRA, "-y", f"@orbstack/{machine}", "exec", "--", text])
    assert b"none" in output
    assert b"] tty-" not in output


@pytest.mark.smoke
def test_Y2_get_pty_gives_a_terminal(remote: Remote) -> None:
    assert "yes" in remote.out("test -t 0 && test -t 1 && test -t 2 && echo yes", _get_pty=True)
    remote.exits("exit 7", 7, _get_pty=True)
    assert remote.out("cat", _get_pty=True, _stdin="typed").split()[-1] == "typed"
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        remote.run("sleep 60", _get_pty=True, _timeout=1)
    assert time.monotonic() - began < 15


WHOSE = {
    "plain": ("likedash", {}),
    "sudo": ("likedash", {"_sudo": True}),
    "sudo to a user": ("likedash", {"_sudo": True, "_sudo_user": "alice"}),
    "sudo with a password": ("bob", {"_sudo": True, "_sudo_password": PASSWORD}),
    "su": ("root", {"_su_user": "alice"}),
    "doas": (None, {"_doas": True}),
}


# With a terminal, all transports are the same.
@pytest.mark.parametrize("transport", PLACES)
@pytest.mark.parametrize("own_terminal", [True, False])
@pytest.mark.parametrize("whose", WHOSE)
def test_Y2_typed_input_arrives_and_ends(
    machine: str,
    transport: str,
    connect: Callable[..., Remote],
    guest: Guest,
    whose: str,
    own_terminal: bool,
) -> None:
    """Only the command's own output appears, with sudo's own terminal and without."""
    user, privilege = WHOSE[whose]
    path = "/etc/sudoers.d/zz-terminal"
    guest.sh(f'echo "Defaults {"" if own_terminal else "!"}use_pty" >"$1"; chmod 440 "$1"', path)
    try:
        remote = connect(machine, orbstack_user=user, orbstack_transport=transport)
        how = {"_get_pty": True, "_timeout": 120, **privilege}

        def shows(stdin: Any, seen: str) -> None:
            ran = remote.run("stty -opost 2>/dev/null; od -An -v -tc", _stdin=stdin, **how)
            assert ran.ok
            assert " ".join(" ".join(ran.out).split()) == seen

        def reads_again() -> None:
            ran = remote.run("sleep 1; cat; echo; cat; echo end", _stdin="one", **how)
            assert "".join(ran.out).split() == ["one", "end"]

        # Each has its own terminal, and mostly waits.
        running = [gevent.spawn(reads_again), gevent.spawn(shows, None, "")]
        running.append(gevent.spawn(shows, "typed", "t y p e d \\n"))
        running.append(gevent.spawn(shows, b"no end", "n o e n d"))
        gevent.joinall(running, raise_error=True)
    finally:
        guest.sh('rm -f "$1"', path)


@pytest.mark.parametrize("transport", PLACES)
def test_Y2_sudo_within_a_command(remote: Remote) -> None:
    for text in ("sleep 1; sudo -n cat -A", "sudo -n sudo -n -u alice cat -A"):
        ran = remote.run(text, _stdin="typed", _get_pty=True, _timeout=120)
        assert [line.strip() for line in ran.out] == ["typed$"]


# Like the `cat` of Ubuntu 26.04, with this kernel's number of the system call.
SPLICE = """case $(uname -m) in x86_64) n=275 ;; *) n=76 ;; esac
perl -e 'pipe(R, W);
while (($n = syscall($ARGV[0] + 0, 0, 0, fileno(W), 0, 65536, 0)) > 0) {
sysread(R, $b, $n); syswrite(STDOUT, $b) }' $n"""


@pytest.mark.parametrize("transport", PLACES)
def test_Y2_typed_input_is_spliced(remote: Remote) -> None:
    ran = remote.run(f"sleep 1; {SPLICE}", _stdin="typed", _get_pty=True, _timeout=120)
    assert [line.strip() for line in ran.out][-1] == "typed"


@pytest.mark.parametrize("transport", PLACES)
def test_Y2_odd_texts(remote: Remote) -> None:
    for word in ('it\'s "$HOME"', "a\tb\x03\x04\x1bc", "日本 🦀", "\\041", "x" * 100_000):
        shown = remote.out(f"printf %s {shlex.quote(word)} | od -An -v -tx1", _get_pty=True)
        assert bytes.fromhex(shown).decode() == word


def test_Y2_without_stty(bare: str, connect: Callable[..., Remote], containers: Containers) -> None:
    """The terminal shows the input typed to the command, but none of ours."""
    containers.call("exec", bare, "rm", "/bin/stty")
    remote = connect(f"docker/{bare}")
    ran = remote.run("echo on; : s3cr3t", _get_pty=True)
    assert [line.strip() for line in ran.out] == ["on"]
    ran = remote.run("cat", _stdin="typed", _get_pty=True, _timeout=120)
    assert {line.strip("^D\b\r ") for line in ran.out} == {"typed"}


def test_Y2_an_interrupt_that_is_typed(remote: Remote) -> None:
    def later() -> Iterator[bytes]:
        gevent.sleep(1)
        yield b"\x03"

    for text, status in (("sleep 60", 130), ("trap 'exit 7' INT; sleep 60", 7)):
        # Without pyinfra's shell around it, which would be interrupted too.
        how = {"_get_pty": True, "_timeout": 120, "_shell_executable": None}
        remote.exits(text, status, _stdin=later(), **how)


def test_Y2_the_control_shell_is_killed(remote: Remote) -> None:
    ancestors = (
        "p=$$; all=; while set -- $(cat /proc/$p/stat) && [ $4 -gt 1 ]; do "
        'p=$4 all="$4 $all"; done; kill -9 $all'
    )
    with pytest.raises(OutcomeUnknown, match="unknown"):
        remote.run(f"echo begun; {ancestors}", _get_pty=True)


def test_Y2_the_text_is_in_no_argv(remote: Remote, guest: Guest) -> None:
    """With a terminal, the text goes through a private file, which is removed afterwards."""
    remote.out("true secret-in-a-pty", _get_pty=True)
    assert guest.leftovers() == []


def test_Y3_a_terminal_has_one_stream(remote: Remote) -> None:
    ran = remote.run("echo out; echo err >&2", _get_pty=True)
    assert [line.strip() for line in ran.out if line.strip() != "^D"] == ["out", "err"]
    assert ran.err == []
