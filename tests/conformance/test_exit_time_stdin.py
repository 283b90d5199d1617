"""Sections X, T and I: exit codes, timeouts, Ctrl-C and stdin."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
import pytest
from pyinfra.api.exceptions import ConnectError

from pyinfra_orbstack import docker, inventory, orbctl, session
from pyinfra_orbstack.orbctl import Orbctl

from .conftest import PASSWORD, PLACES, TRANSPORTS, WAYS, Guest, Proxy, Remote, way

PYINFRA = os.path.join(os.path.dirname(sys.executable), "pyinfra")


def test_X1_every_exit_code(one: Remote) -> None:
    for status in range(256):
        one.exits(f"exit {status}", status)
        assert one.run(f"exit {status}").ok is (status == 0)


@pytest.mark.smoke
def test_X1_some_exit_codes_spawned(remote: Remote) -> None:
    for status in (0, 1, 2, 126, 127, 128, 255):
        remote.exits(f"exit {status}", status)


@pytest.mark.parametrize("shell", ["dash", "bash", "busybox sh"])
@pytest.mark.parametrize(
    ("name", "status"), [("TERM", 143), ("KILL", 137), ("SEGV", 139), ("PIPE", 141)]
)
def test_X3_signals(remote: Remote, shell: str, name: str, status: int) -> None:
    remote.exits(f"exec {shell} -c 'kill -{name} $$; sleep 5'", status)


def test_X4_missing_command(remote: Remote) -> None:
    assert remote.exits("no-such-command-here", 127).err


def test_X5_not_executable(remote: Remote) -> None:
    remote.exits("/etc/passwd", 126)
    remote.exits("/etc", 126)


def test_X7_set_e(remote: Remote) -> None:
    assert remote.exits("set -e; echo a; false; echo b", 1).out == ["a"]


@pytest.mark.smoke
def test_X8_success_exit_codes(remote: Remote) -> None:
    assert remote.run("exit 4", _success_exit_codes=[0, 4]).ok
    assert not remote.run("exit 5", _success_exit_codes=[0, 4]).ok
    assert not remote.run("exit 0", _success_exit_codes=[4]).ok


@pytest.mark.parametrize("transport", WAYS)
def test_X10_an_end_of_stream_is_an_error(
    machine: str, proxy: Proxy, connect: Callable[..., Remote], transport: str
) -> None:
    remote = connect(machine, orbstack_transport=transport)
    remote.drop_session()
    for stream in ("cut-out", "cut-err"):
        # The stream ends in the handshake or in the output, and the client exits with 0.
        for length in (150, 400, 700, 1050):
            proxy.tell(f"{proxy.run} {stream} {length} 0")
            with pytest.raises(OSError, match=r"."):
                remote.run("echo text; head -c 1000 /dev/zero; head -c 1000 /dev/zero >&2")
    proxy.tell("")
    assert remote.out("echo on") == "on"


def test_X11_a_missing_end_mark_is_an_error(remote: Remote, guest: Guest) -> None:
    """The control shell is killed after the command's output and before its exit status."""
    ancestors = (
        "p=$$; all=; while set -- $(cat /proc/$p/stat) && [ $4 -gt 1 ]; do "
        # The outermost first, so that it does not see the others exit.
        'p=$4 all="$4 $all"; done; kill -9 $all'
    )
    with pytest.raises(session.OutcomeUnknown, match="unknown"):
        remote.run(f"echo done; {ancestors}")
    assert remote.out("echo on") == "on"


SPY = """for d in /proc/[0-9]*; do
echo "$(tr '\\0' ' ' <$d/cmdline) $(tr '\\0' ' ' <$d/environ) 0"; done 2>/dev/null
echo THE-END; exit 3"""


@pytest.mark.parametrize("how", [{}, {"_get_pty": True}, {"_stdin": b"x" * 70_000}], ids=str)
def test_X11_a_command_that_prints_all_command_lines(remote: Remote, how: dict[str, Any]) -> None:
    """The control shell's markers are in no argument list and no environment."""
    ran = remote.exits(SPY, 3, _timeout=30, **how)
    assert ran.out[-1].strip() == "THE-END"


# Stops the reader of one of its outputs (a cat, or the control program), prints, and kills it.
CUT = """me=$(readlink /proc/$$/fd/{0}); readers=
for p in /proc/[0-9]*; do
case $(cat $p/comm) in cat) fds=$p/fd/0 ;; pyinfra-orb*) fds=$p/fd/* ;; *) continue ;; esac
for f in $fds; do [ "$(readlink $f 2>&-)" = "$me" ] && readers="$readers ${{p#/proc/}}"; done; done
[ -n "$readers" ] || exit 9
kill -STOP $readers; echo important >&{0}; kill -KILL $readers; exit 0"""


@pytest.mark.parametrize("stream", ["1", "2"])
def test_X11_a_killed_copy_is_an_error(remote: Remote, stream: str) -> None:
    with pytest.raises(session.OutcomeUnknown, match="unknown"):
        remote.run(CUT.format(stream), _timeout=30)
    assert remote.out("echo on") == "on"


@pytest.mark.smoke
def test_T1_timeout_ends_the_command(remote: Remote) -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="did not finish within 1 s"):
        remote.run("sleep 60", _timeout=1)
    # A second, and on a busy host some more for the call that kills it.
    assert 1 <= time.monotonic() - began < 10


@pytest.mark.smoke
@pytest.mark.parametrize(
    "command",
    [
        "sleep {0}",
        "sleep {0} & sleep {0}",
        "(sleep {0}; true) | cat",
        "setsid sleep {0}; true",
        "nohup sleep {0} >/dev/null 2>&1 & sleep {0}",
        "trap '' TERM INT HUP; sleep {0}; sleep {0}",
    ],
)
@pytest.mark.parametrize("privilege", [{}, {"_sudo": True}])
def test_T2_everything_the_command_started_is_killed(
    remote: Remote, guest: Guest, command: str, privilege: dict[str, bool]
) -> None:
    mark = f"7{time.monotonic_ns() % 10**8}"
    with pytest.raises(TimeoutError):
        remote.run(command.format(mark), _timeout=0.5, **privilege)
    assert guest.running(f"sleep {mark}") == []


def test_T3_a_daemonized_process_keeps_running(remote: Remote, guest: Guest) -> None:
    """Documented: a process that has left the parent, group and session is not found."""
    mark = f"8{time.monotonic_ns() % 10**8}"
    daemon = f"setsid sh -c 'setsid sleep {mark} >/dev/null 2>&1 </dev/null & exit'"
    with pytest.raises(TimeoutError):
        remote.run(f"{daemon}; sleep 60", _timeout=6)
    assert len(guest.running(f"sleep {mark}")) == 1
    guest.sh(
        'for p in /proc/[0-9]*; do case "$(tr "\\0" " " <$p/cmdline)" in '
        f'"sleep {mark} ") kill ${{p#/proc/}};; esac; done 2>/dev/null; true'
    )


@pytest.mark.smoke
def test_T5_output_until_then_is_kept(remote: Remote, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TimeoutError) as late:
        remote.run("echo out; echo err >&2; sleep 60", _timeout=6)
    assert sorted(late.value.output.output_lines) == ["err", "out"]


@pytest.mark.parametrize("whom", ["process", pytest.param("group", marks=pytest.mark.smoke)])
@pytest.mark.parametrize("privilege", [[], ["--sudo"]])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_T7_ctrl_c_cancels_the_command(
    machine: str, guest: Guest, whom: str, privilege: list[str], transport: str
) -> None:
    mark = f"9{time.monotonic_ns() % 10**8}"
    running = subprocess.Popen(
        [PYINFRA, "-y", *privilege, f"@orbstack/{machine}", "exec", "--", f"sleep {mark}; true"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={**os.environ, "PYINFRA_ORBSTACK_TRANSPORT": way(transport)},
    )
    try:
        guest.wait_for(f"sleep {mark}", seconds=60)
        if whom == "process":
            running.send_signal(signal.SIGINT)
        else:
            os.killpg(running.pid, signal.SIGINT)
        output, _ = running.communicate(timeout=60)
    finally:
        running.kill()
    assert b"Traceback" not in output
    assert guest.running(f"sleep {mark}") == []


def started(running: subprocess.Popen[bytes]) -> set[str]:
    """The children that its main thread has started."""
    with contextlib.suppress(OSError):
        return set(Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split())
    return set()


@pytest.mark.parametrize("pause", [0.01, 0.3])
@pytest.mark.parametrize(
    "signals",
    [
        [signal.SIGINT] * 3,
        [signal.SIGTERM],
        [signal.SIGHUP, signal.SIGTERM],
        [signal.SIGINT, signal.SIGKILL],
    ],
    ids=["int", "term", "hup", "kill"],
)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_T7_any_second_signal(
    machine: str, guest: Guest, signals: list[int], pause: float, transport: str
) -> None:
    """The call that kills a command is started at once, and continues without pyinfra."""
    mark = f"4{time.monotonic_ns() % 10**8}"
    text = f"trap '' HUP INT TERM; sleep {mark}; sleep {mark}"
    running = subprocess.Popen(
        [PYINFRA, "-y", f"@orbstack/{machine}", "exec", "--", text],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "PYINFRA_ORBSTACK_TRANSPORT": way(transport)},
    )
    try:
        guest.wait_for(f"sleep {mark}", seconds=60)
        before = started(running)
        for number, after in zip(signals, [*signals[1:], None]):
            running.send_signal(number)
            deadline = time.monotonic() + 20
            while after == signal.SIGKILL and started(running) <= before:  # it has not acted yet
                assert time.monotonic() < deadline
            time.sleep(pause)
        running.wait(timeout=60)
    finally:
        running.kill()
    guest.wait_for(f"sleep {mark}", there=False, seconds=60)


def test_T7_on_several_hosts_and_a_terminal(
    client: Orbctl, machines: Any, base: str, tmp_path: Path
) -> None:
    mark = f"3{time.monotonic_ns() % 10**8}"
    names = [machines.clone(base) for _ in range(3)]
    (tmp_path / "inventory.py").write_text(f"x = {[f'@orbstack/{name}' for name in names]}\n")
    (tmp_path / "deploy.py").write_text(
        "from pyinfra.operations import server\n"
        f"server.shell(name='a', commands=['sudo sleep {mark}'], _get_pty=True)\n"
    )
    running = subprocess.Popen(
        [PYINFRA, "-y", "inventory.py", "deploy.py"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    guests = [Guest(client, name) for name in names]
    try:
        for guest in guests:
            guest.wait_for(f"sleep {mark}", seconds=60)
        running.send_signal(signal.SIGINT)
        time.sleep(0.03)
        running.send_signal(signal.SIGINT)
        running.wait(timeout=30)
    finally:
        running.kill()
    for guest in guests:
        guest.wait_for(f"sleep {mark}", there=False, seconds=60)


@pytest.mark.smoke
def test_T8_the_next_command_works(remote: Remote) -> None:
    for _ in range(3):
        with pytest.raises(TimeoutError):
            remote.run("cat /dev/zero", _timeout=0.2)
        assert remote.out("echo on") == "on"


@pytest.mark.parametrize("transport", PLACES)
def test_T9_connecting_to_a_hung_client_ends(
    machine: str,
    proxy: Proxy,
    connect: Callable[..., Remote],
    monkeypatch: pytest.MonkeyPatch,
    transport: str,
) -> None:
    monkeypatch.setattr(orbctl, "READ_TIMEOUT", 1.0)
    monkeypatch.setattr(docker, "READ_TIMEOUT", 1.0)
    monkeypatch.setattr(session, "ANSWER_TIMEOUT", 1.0)
    monkeypatch.setattr(inventory, "FRESH", 0.0)
    for verb in (proxy.info, proxy.run):
        proxy.tell(f"{verb} hang")
        began = time.monotonic()
        with pytest.raises(ConnectError, match="answer"):
            connect(machine, orbstack_boot_timeout=1)
        assert time.monotonic() - began < 30


def test_I1_end_of_input_by_default(remote: Remote) -> None:
    assert remote.out("wc -c").strip() == "0"


@pytest.mark.smoke
@pytest.mark.parametrize(
    "value",
    [
        pytest.param("text", id="I2_str"),
        pytest.param("text\n", id="I2_str_with_newline"),
        pytest.param("", id="I2_empty_str"),
        pytest.param(["a", "b\n", "", "c d"], id="I2_list"),
        pytest.param(("a", "ü"), id="I4_tuple_of_lines"),
        pytest.param(["line 1", "line 2"], id="I4_list_of_lines"),
        pytest.param(io.StringIO("a\nb"), id="I5_text_io"),
    ],
)
def test_text_is_what_local_sends(remote: Remote, tmp_path: Path, value: object) -> None:
    from pyinfra.connectors.util import write_stdin

    with (tmp_path / "sent").open("wb") as file:
        if isinstance(value, io.StringIO):
            value.seek(0)
        write_stdin(value, file)
    sent = (tmp_path / "sent").read_bytes()
    assert remote.out("od -An -tx1 -v", _stdin=value).split() == [f"{byte:02x}" for byte in sent]


@pytest.mark.smoke
def test_I3_bytes_arrive_exactly(remote: Remote) -> None:
    data = bytes(range(256))
    assert remote.out("od -An -tx1 -v", _stdin=data).split() == [f"{byte:02x}" for byte in data]
    assert remote.out("od -An -tx1 -v", _stdin=[b"a", b"\n", b"b"]).split() == ["61", "0a", "62"]


@pytest.mark.smoke
def test_I5_bytes_io(remote: Remote) -> None:
    source = io.BytesIO(b"\xff\0no newline")
    for _ in range(2):
        assert remote.out("od -An -tx1 -v -N2", _stdin=source).split() == ["ff", "00"]
    assert remote.out("wc -c", _stdin=source).strip() == "12"


@pytest.mark.smoke
def test_I6_a_megabyte_through_cat(remote: Remote) -> None:
    data = b"x" * 1_000_000
    assert remote.out("cat", _stdin=data) == data.decode()


def test_I6_an_unread_megabyte(remote: Remote) -> None:
    assert remote.run("exit 0", _stdin=b"x" * 1_000_000).ok


def test_I7_200_megabytes(one: Remote) -> None:
    block = b"0123456789abcdef" * 65536
    assert one.out("wc -c", _stdin=(block for _ in range(200))).strip() == str(200 * len(block))


@pytest.mark.smoke
def test_I9_stdin_and_a_sudo_password(machine: str, connect: Callable[..., Remote]) -> None:
    for transport in ("session", "spawn"):
        remote = connect(machine, orbstack_user="bob", orbstack_transport=transport)
        ran = remote.run("id -un; cat", _sudo=True, _sudo_password=PASSWORD, _stdin=["a", "b"])
        assert ran == (True, ["root", "a", "b"], [])
        remote.close()


@pytest.mark.smoke
@pytest.mark.parametrize(
    "value",
    [
        pytest.param(["ok", 7], id="I2_number"),
        pytest.param(7, id="I2_no_text_at_all"),
        pytest.param("\ud800", id="I2_no_character"),
        pytest.param([None], id="I4_nothing"),
    ],
)
def test_an_unsupported_stdin_is_a_one_line_error(remote: Remote, value: object) -> None:
    with pytest.raises(OSError, match="cannot send _stdin"):
        remote.run("cat", _stdin=value)
    assert remote.out("echo on") == "on"


def test_I5_more_kinds_of_files(one: Remote, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a\nb")
    with (tmp_path / "file").open() as text, (tmp_path / "file").open("rb") as data:
        assert one.out("od -An -c", _stdin=text).split() == ["a", r"\n", "b", r"\n"]
        assert one.out("od -An -c", _stdin=data).split() == ["a", r"\n", "b"]
    with tempfile.NamedTemporaryFile("w+") as wrapped:
        wrapped.write("a\nb")
        assert one.out("od -An -c", _stdin=wrapped).split() == ["a", r"\n", "b", r"\n"]
    assert one.out("cat", _stdin=(line for line in ["a", "b"])) == "a\nb"
    assert one.out("cat", _stdin=bytearray(b"bytes")) == "bytes"


def test_I5_a_slow_file_blocks_no_other_host(one: Remote, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    writer = os.open(tmp_path / "fifo", os.O_RDWR)
    with (tmp_path / "fifo").open("rb") as source:
        waiting = gevent.spawn(one.out, "cat", _stdin=source)
        began = time.monotonic()
        gevent.sleep(0.3)
        assert time.monotonic() - began < 15
        assert not waiting.ready()
        os.write(writer, b"came")
        os.close(writer)
        assert waiting.get(timeout=20) == "came"
