"""`pyinfra-orbstack trust`: records servers' keys, which pyinfra then requires."""

from __future__ import annotations

import os
import pty
import re
import select
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pyinfra_orbstack import cli, hostkeys
from pyinfra_orbstack.hostkeys import Server

from ..loopback import free_port
from ..sshd import KINDS, Sshd

COMMAND = str(Path(sys.executable).with_name("pyinfra-orbstack"))


@pytest.fixture
def port(sshd: Sshd) -> int:
    port = free_port()
    sshd.start(port)
    return port


GROUP_DATA = "ssh_known_hosts_file = 'known_hosts'\nssh_strict_host_key_checking = 'yes'\n"


@pytest.fixture
def folder(tmp_path: Path, port: int, sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> Path:
    sshd.put_key(tmp_path / "key")
    (tmp_path / "inventories").mkdir()
    (tmp_path / "group_data").mkdir()
    (tmp_path / "group_data" / "production.py").write_text(
        f"{GROUP_DATA}ssh_user = 'root'\nssh_key = {str(tmp_path / 'key')!r}\n"
    )
    (tmp_path / "deploy.py").write_text(
        "from pyinfra.operations import server\nserver.shell(name='Say', commands='echo reached')\n"
    )
    # The user's own files are neither read nor written.
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("YES", raising=False)
    return tmp_path


def inventory(*hosts: object) -> None:
    Path("inventories", "production.py").write_text(f"web = {list(hosts)!r}\n")


def command(*words: str, **environment: str) -> tuple[int, str, str]:
    """The exit status of a command, its output and its errors."""
    done = subprocess.run(
        [COMMAND, *words, "production"],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.mark.long
def test_a_server_is_reached_only_with_its_key(folder: Path, port: int, sshd: Sshd) -> None:
    inventory(("127.0.0.1", {"ssh_port": port}))
    status, _, said = command("deploy", YES="1")
    assert status == 1
    assert f"No host key for [127.0.0.1]:{port} found in known_hosts" in said

    status, shown, said = command("trust")
    assert (status, Path("known_hosts").exists()) == (1, False)
    assert said == "would record the keys of 127.0.0.1: compare them, then confirm with YES=1\n"
    for kind in KINDS:
        assert f"    ssh-{kind} {sshd.fingerprint(kind)}\n" in shown

    status, shown, said = command("trust", YES="1")
    assert (status, said) == (0, "")
    assert shown.endswith("\n127.0.0.1: recorded in known_hosts\n")
    # OpenSSH reads it, too.
    found = subprocess.check_output(
        ["ssh-keygen", "-lF", f"[127.0.0.1]:{port}", "-f", "known_hosts"], text=True
    )
    assert all(sshd.fingerprint(kind) in found for kind in KINDS)
    status, _, said = command("deploy", YES="1")
    assert status == 0, said
    before = Path("known_hosts").read_bytes()
    assert command("trust") == (0, "127.0.0.1: its key is in known_hosts\n", "")
    assert Path("known_hosts").read_bytes() == before


@pytest.mark.long
def test_a_changed_host_key_is_rejected(folder: Path, port: int, sshd: Sshd) -> None:
    inventory(("127.0.0.1", {"ssh_port": port}))
    assert command("trust", YES="1")[0] == 0
    before = Path("known_hosts").read_bytes()
    # All keys changed; one changed; none of the known keys is offered.
    for kinds, keys in ((" ".join(KINDS), "second"), ("ecdsa", "first")):
        sshd.start(port, keys, kinds)
        status, shown, said = command("trust", YES="1")
        assert (status, shown) == (1, "")
        (line,) = said.splitlines()
        assert line.startswith("127.0.0.1: its host key is not the one in known_hosts; if ")
        assert Path("known_hosts").read_bytes() == before
        status, _, said = command("deploy", YES="1")
        assert status == 1
        assert "Connected" not in said
    # Follow its instructions.
    forget = re.search(r"ssh-keygen -R .*", line)
    assert forget
    subprocess.run(shlex.split(forget[0]), check=True, capture_output=True)
    assert command("trust", YES="1")[0] == 0
    assert command("deploy", YES="1")[0] == 0

    # An additional kind of key, besides a known one.
    sshd.start(port, "first", "ecdsa rsa")
    status, shown, _ = command("trust", YES="1")
    assert status == 0
    assert sshd.fingerprint("rsa") in shown
    assert sshd.fingerprint("ecdsa") not in shown


def test_one_silent_server_does_not_delay_the_others(folder: Path, port: int) -> None:
    silent = free_port()
    inventory(
        ("nowhere.invalid", {}),
        ("silent", {"ssh_hostname": "127.0.0.1", "ssh_port": silent}),
        ("good", {"ssh_hostname": "127.0.0.1", "ssh_port": port}),
        "@orbstack/other",
    )
    status, shown, said = command("trust", YES="1")
    assert status == 1
    assert "good: recorded in known_hosts\n" in shown
    nowhere, refused = said.splitlines()
    assert nowhere.startswith(
        "nowhere.invalid: no SSH server answers at nowhere.invalid, port 22 (getaddrinfo "
    )
    assert refused.startswith(f"silent: no SSH server answers at 127.0.0.1, port {silent}")
    assert Path("known_hosts").read_text().count(f"[127.0.0.1]:{port} ") == len(KINDS)

    assert command("trust", "--limit=good")[:2] == (0, "good: its key is in known_hosts\n")
    status, _, said = command("trust", "--limit=god")
    assert status == 1
    assert said.startswith("LIMIT 'god' matches nothing in inventories/production.py; ")


def test_an_alias_in_the_users_ssh_config_is_followed(folder: Path, port: int) -> None:
    (folder / "home" / ".ssh").mkdir(parents=True)
    (folder / "home" / ".ssh" / "config").write_text(
        f"Host shop\n  HostName 127.0.0.1\n  Port {port}\n"
    )
    inventory("shop")
    status, shown, said = command("trust", YES="1")
    assert (status, said) == (0, "")
    assert shown.startswith(f"shop ([127.0.0.1]:{port})\n")
    status, _, said = command("deploy", YES="1")
    assert status == 0, said


@pytest.mark.parametrize(("answer", "recorded"), [("y\n", True), ("\n", False), ("\x04", False)])
def test_deploys_to_servers_ask_first(folder: Path, port: int, answer: str, recorded: bool) -> None:
    inventory(("127.0.0.1", {"ssh_port": port}))
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(COMMAND, [COMMAND, "trust", "production"])
    said = b""
    while select.select([terminal], [], [], 100)[0]:
        try:
            said += os.read(terminal, 4096)
        except OSError:  # its other end is closed
            break
        if said.endswith(b"[y/N] "):
            os.write(terminal, answer.encode())
    os.close(terminal)
    assert os.WEXITSTATUS(os.waitpid(pid, 0)[1]) == (0 if recorded else 1)
    assert Path("known_hosts").exists() is recorded, said


@pytest.mark.parametrize(
    ("hosts", "data", "reason"),
    [
        ([], GROUP_DATA, "inventories/production.py has no hosts yet: add some to its groups"),
        (["@orbstack/a"], GROUP_DATA, "inventories/production.py contains no SSH hosts: "),
        (["a"], "", "a: its keys are not pinned: set ssh_known_hosts_file = 'known_hosts' and "),
        (["a"], GROUP_DATA.splitlines()[0], "a: its keys are not pinned: "),
        (["a"], "1 / 0", "group_data/production.py:1: ZeroDivisionError: "),
        ([("a", {"ssh_port": "x"})], GROUP_DATA, "a: "),
        ([("-oProxyCommand=touch hacked", {})], GROUP_DATA, "-oProxyCommand=touch hacked: "),
    ],
)
def test_mistakes_are_one_line_errors(
    folder: Path, hosts: list[object], data: str, reason: str
) -> None:
    Path("group_data", "production.py").write_text(f"{data}\n")
    inventory(*hosts)
    status, shown, said = command("trust", YES="1")
    assert (status, shown) == (1, "")
    (line,) = said.splitlines()
    assert line.startswith(reason)
    assert not Path("hacked").exists()


def test_an_unreadable_file_is_a_one_line_error(folder: Path, port: int) -> None:
    Path("known_hosts").mkdir()
    inventory(("127.0.0.1", {"ssh_port": port}))
    status, _, said = command("trust", YES="1")
    assert status == 1
    (line,) = said.splitlines()
    assert line.startswith("127.0.0.1: cannot read known_hosts: ")


def test_a_missing_openssh_client_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inventory("a")
    monkeypatch.setenv("PATH", str(folder))
    assert cli.main(["trust", "production"]) == 1
    assert capsys.readouterr().err == ("ssh-keyscan not found: install the OpenSSH client\n")


# Which keys are new ----------------------------------------------------------------------------

SERVER = Server("web", "web.example", 22, Path("known_hosts"))


@pytest.mark.parametrize(
    ("known", "offered", "new"),
    [
        ({}, {"a": "1"}, {"a": "1"}),
        ({"a": "1"}, {"a": "1"}, {}),
        ({"a": "1"}, {"a": "1", "b": "2"}, {"b": "2"}),
        ({"a": "1", "b": "2"}, {"b": "2"}, {}),
        ({"a": "1"}, {"a": "2"}, None),
        ({"a": "1"}, {"b": "2"}, None),
        ({"a": "1", "b": "2"}, {"a": "1", "b": "3"}, None),
    ],
)
def test_new_keys(known: hostkeys.Keys, offered: hostkeys.Keys, new: hostkeys.Keys | None) -> None:
    if new is not None:
        assert hostkeys.unknown_keys(SERVER, known, offered) == new
        return
    with pytest.raises(hostkeys.Problem, match=r"ssh-keygen -R 'web.example' -f known_hosts$"):
        hostkeys.unknown_keys(SERVER, known, offered)


@pytest.mark.parametrize("before", ["", "# ours\n", "# ours"])
def test_existing_entries_stay(tmp_path: Path, before: str) -> None:
    path = tmp_path / "known_hosts"
    path.write_text(before)
    hostkeys.record(SERVER._replace(file=path), {"ssh-rsa": "AAAA"})
    assert path.read_text().splitlines() == [*before.splitlines(), "web.example ssh-rsa AAAA"]
