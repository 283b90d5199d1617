"""Rare events between the connector and a machine, once each."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gevent
import pytest
from pyinfra.api.arguments import all_argument_meta
from pyinfra.api.exceptions import ConnectError

from pyinfra_orbstack import connector, protocol
from pyinfra_orbstack.orbctl import MachineNotFound, Orbctl

from ..conformance.conftest import Proxy, Remote


@pytest.fixture(scope="module")
def machine(machines, client: Orbctl) -> str:  # type: ignore[no-untyped-def]
    return str(machines.create())


@pytest.fixture(params=["session", "spawn"])
def remote(machine: str, request: pytest.FixtureRequest) -> Iterator[Remote]:
    made = Remote(machine, orbstack_transport=request.param).connect()
    made.run("rm -rf /tmp/*")
    yield made
    made.close()


class Lines:
    """An object that pyinfra treats as a file, because it has this method."""

    def readlines(self) -> list[str]:
        return ["one\n", "two"]


@pytest.mark.parametrize(
    ("stdin", "arrives"),
    [
        ("one", b"one\n"),
        (b"one", b"one"),
        (["one", "two\n", b"three"], b"one\ntwo\nthree"),
        (io.StringIO("one\ntwo"), b"one\ntwo\n"),
        (io.BytesIO(b"one\ntwo"), b"one\ntwo"),
        (Lines(), b"one\ntwo\n"),
    ],
)
def test_kinds_of_stdin(remote: Remote, stdin: object, arrives: bytes) -> None:
    assert remote.out("od -An -tx1", _stdin=stdin).split() == [f"{byte:02x}" for byte in arrives]


def test_stdin_that_fails_while_it_is_read(remote: Remote) -> None:
    with pytest.raises(OSError, match="cannot send _stdin: division by zero"):
        remote.out("cat", _stdin=(1 / 0 for _ in "1"))


def test_closed_files(remote: Remote) -> None:
    closed = io.BytesIO(b"x")
    closed.close()
    for use in (
        lambda: remote.put(closed, "/tmp/closed"),
        lambda: remote.get("/etc/passwd", closed),
        lambda: remote.run("cat", _stdin=closed),
    ):
        with pytest.raises(OSError, match="closed file"):
            use()


def test_a_timeout_may_be_a_string(remote: Remote) -> None:
    assert remote.out("echo hi", _timeout="5") == "hi"
    for bad in ("soon", [1], float("nan")):
        with pytest.raises(OSError, match="_timeout must be a number of seconds, not"):
            remote.out("echo hi", _timeout=bad)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The output of the pyinfra command."""
    lines: list[str] = []
    monkeypatch.setattr(connector, "echo", lambda line, **_: lines.append(line))
    return lines


@pytest.mark.parametrize("pty", [False, True], ids=["pipes", "terminal"])
def test_output_before_a_timeout_is_shown(
    remote: Remote, shown: list[str], pty: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Including an incomplete line, and bytes that could start the end marker."""
    marks = (f"f{number:031x}" for number in itertools.count())
    monkeypatch.setattr(protocol, "secrets", SimpleNamespace(token_hex=lambda length: next(marks)))
    with pytest.raises(TimeoutError, match=r"did not finish within 6 s"):
        remote.run("echo whole; printf half; sleep 60", _timeout=6, _get_pty=pty)
    assert [line.split()[-1] for line in shown] == ["whole", "half"]


def test_commands_are_shown(remote: Remote, shown: list[str]) -> None:
    remote.put(io.BytesIO(b"x"), "/tmp/shown", print_input=True, print_output=True)
    remote.get("/tmp/shown", io.BytesIO(), print_input=True, print_output=True)
    remote.put(io.BytesIO(b"x"), "/tmp/two\nlines", print_input=True)
    assert [line.split("] ", 1)[-1] for line in shown] == [
        ">>> upload /tmp/shown",
        "file uploaded: /tmp/shown",
        ">>> download /tmp/shown",
        "file downloaded: /tmp/shown",
        r">>> upload '/tmp/two\nlines'",
    ]


def test_shell_that_does_not_open_at_first(
    remote: Remote, client: Orbctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No command has started, so it is retried, but only once."""
    proxy = Proxy(tmp_path, [client.command])
    monkeypatch.setattr(remote.host.connector.runner.target.client, "command", str(proxy.path))
    remote.drop_session()
    proxy.tell("run once exit 1 not now")
    assert remote.out("echo on") == "on"
    remote.drop_session()
    proxy.tell("run exit 1 not today")
    with pytest.raises(OSError, match="not today"):
        remote.run("echo on")


def test_shell_that_never_opens(
    machine: str, client: Orbctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that connecting created is removed again."""
    proxy = Proxy(tmp_path, [client.command])
    monkeypatch.setenv("PYINFRA_ORBSTACK_ORBCTL", str(proxy.path))
    proxy.tell("run exit 1 no shell today")
    name = f"{machine}-more"
    remote = Remote(name, orbstack_image="debian", orbstack_boot_timeout=1)
    with pytest.raises(ConnectError, match=r"does not answer: .*no shell today"):
        remote.connect()
    with pytest.raises(MachineNotFound):
        client.info(name)


@pytest.mark.parametrize("kind", ["bytes", "pipe"])
def test_upload_that_arrives_damaged(remote: Remote, kind: str) -> None:
    """It is sent twice if it can be read twice, and nothing is written."""
    lie = "#!/bin/sh\ncat >/dev/null\necho 0000 -\n"
    remote.put(io.StringIO(lie), "/usr/local/bin/sha256sum", _sudo=True)
    remote.run("chmod 755 /usr/local/bin/sha256sum; rm -f /tmp/damaged", _sudo=True)

    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

    try:
        with pytest.raises(OSError, match="checksum changed during the transfer"):
            remote.put((io.BytesIO if kind == "bytes" else Pipe)(b"data"), "/tmp/damaged")
    finally:
        remote.run("rm /usr/local/bin/sha256sum", _sudo=True)
    assert remote.out("ls /tmp") == ""


def test_upload_with_nowhere_to_go(remote: Remote) -> None:
    """No directory accepts a new file: neither the target's nor one for temporary files."""
    home = remote.out("echo $HOME")
    remote.run("touch /srv/x; chmod 666 /srv/x", _sudo=True)
    remote.run(f"chmod 500 {home}; chmod 755 /tmp /var/tmp /dev/shm", _sudo=True)
    try:
        with pytest.raises(OSError, match=r"cannot write /srv/x: no directory accepts a temporary"):
            remote.put(io.BytesIO(b"x"), "/srv/x")
    finally:
        remote.run(f"chmod 700 {home}; chmod 1777 /tmp /var/tmp /dev/shm", _sudo=True)
    remote.put(io.BytesIO(b"x"), "/srv/x")
    assert remote.out("cat /srv/x") == "x"


def test_upload_aborted_during_the_write(remote: Remote) -> None:
    """The source blocks."""

    class Still(io.RawIOBase):
        def readinto(self, buffer: Any) -> int:
            if remote.out("ls -A /tmp"):
                gevent.sleep(60)
            buffer[:1] = b"x"
            return 1

    with pytest.raises(gevent.Timeout), gevent.Timeout(3):
        remote.put(Still(), "/tmp/given-up")
    assert remote.out("ls -A /tmp") == ""


@pytest.mark.skipif("_su_password" not in all_argument_meta, reason="pyinfra before 3.7")
def test_upload_for_a_missing_user(remote: Remote) -> None:
    with pytest.raises(OSError, match="nobody2"):
        remote.put(io.BytesIO(b"x"), "/tmp/x", _su_user="nobody2", _su_password="secret")
    # pyinfra's own file for the password stays until it disconnects.
    assert remote.out("ls -A /tmp | grep -v askpass; true") == ""
