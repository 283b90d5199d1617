"""Machines, containers and connections for the conformance suite."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gevent
import pytest
from gevent.lock import RLock
from pyinfra.api import Config, Inventory, State, StringCommand
from pyinfra.api.host import Host

from pyinfra_orbstack import docker, orbctl, process
from pyinfra_orbstack.docker import Docker
from pyinfra_orbstack.orbctl import Orbctl
from pyinfra_orbstack.places import SSH_VARIABLE
from pyinfra_orbstack.testing import unavailable

from .. import sharing
from ..containers import Containers
from ..loopback import MAC, Loopback, Unavailable, loopback
from ..packages import install
from .catalogue import CONTAINERS_BRIEFLY, NOT_IN_CONTAINERS
from .report import ids

PASSWORD = "pass 'w' \"ö\" $HOME s3cr3tword"
#: The transports to a machine, and a container, in which the suite also runs.
TRANSPORTS = ("session", "spawn", "container")
#: Both transports and both targets, for failures on the way to a command.
WAYS = (*TRANSPORTS, "container-spawn")
#: Both targets, for failures before any command.
PLACES = ("session", "container")

FOLDER = Path(__file__).parent

# Packages that the suite needs in a machine, in addition to a bare Debian or Ubuntu.
DOAS = "$(apt-cache show doas >/dev/null 2>&1 && echo doas || echo opendoas)"
SETUP = rf"""
set -e
IFS= read -r password
{install("zsh", "fish", "ksh", "busybox", "locales", "rsync", DOAS)}
useradd -m -s /bin/bash alice
useradd -m -s /bin/bash bob
useradd -m -s /bin/sh nobodys
printf 'bob:%s\n' "$password" | chpasswd
printf 'root:%s\n' "$password" | chpasswd
echo 'bob ALL=(ALL) ALL' >/etc/sudoers.d/bob
chmod 440 /etc/sudoers.d/bob
for shell in fish zsh ksh dash; do useradd -m -s "$(command -v $shell)" "like$shell"; done
useradd -m -s /usr/sbin/nologin likenologin
printf '#!/bin/sh\nexec busybox sh "$@"\n' >/usr/local/bin/busyboxsh
chmod 755 /usr/local/bin/busyboxsh
useradd -m -s /usr/local/bin/busyboxsh likebusybox
for user in likefish likezsh likeksh likedash likenologin likebusybox; do
echo "$user ALL=(ALL) NOPASSWD: ALL" >/etc/sudoers.d/$user
chmod 440 /etc/sudoers.d/$user; done
printf 'permit nopass keepenv %s as root\npermit nopass %s as alice\n' "$1" "$1" >/etc/doas.conf
chmod 400 /etc/doas.conf
localedef -i en_US -f ISO-8859-15 en_US.ISO-8859-15
"""


# Only busybox, without the commands that an image may lack.
PACK_BUSYBOX = r"""
set -e
d=$(mktemp -d)
cd "$d"
mkdir -p bin tmp root etc home
chmod 1777 tmp
for file in $(command -v busybox) $(ldd "$(command -v busybox)" | grep -o '/[^ ]*'); do
mkdir -p ".${file%/*}"; cp -L "$file" ".$file"; done
cp "$(command -v busybox)" bin/busybox
for applet in $(busybox --list); do
case $applet in busybox|setsid|su|sha256sum|cksum) ;; *) ln -s busybox bin/$applet;; esac; done
echo 'root:x:0:0:root:/root:/bin/sh' >etc/passwd
tar -c .
rm -r "$d"
"""


class Ran(NamedTuple):
    """The result of one command."""

    ok: bool
    out: list[str]
    err: list[str]


class Remote:
    """One machine or container, connected to through pyinfra's own API."""

    def __init__(self, name: str, **data: Any) -> None:
        self.name = name
        inventory = Inventory(([(f"@orbstack/{name}", data)], {}))
        self.state = State(inventory, Config())
        self.host: Host = inventory.get_host(f"@orbstack/{name}")

    def connect(self) -> Remote:
        self.host.connect(show_errors=False, raise_exceptions=True)
        return self

    def close(self) -> None:
        if self.host.connected:
            self.host.disconnect()

    def drop_session(self) -> None:
        """Close the open session, so that the next command needs a new one."""
        session = self.host.connector.runner.session
        if session is not None:
            session.close()

    def run(self, command: str, **arguments: Any) -> Ran:
        ok, output = self.host.run_shell_command(StringCommand(command), **arguments)
        return Ran(ok, output.stdout_lines, output.stderr_lines)

    def out(self, command: str, **arguments: Any) -> str:
        """Run a command that must succeed; return its stdout."""
        ran = self.run(command, **arguments)
        assert ran.ok, ran
        return "\n".join(ran.out)

    def exits(self, command: str, status: int, **arguments: Any) -> Ran:
        """Run a command that must exit with this status."""
        ran = self.run(command, _success_exit_codes=[status], **arguments)
        assert ran.ok, (command, status, ran)
        return ran

    def put(self, source: Any, target: str, **arguments: Any) -> None:
        assert self.host.put_file(source, target, **arguments)

    def get(self, source: str, target: Any, **arguments: Any) -> None:
        assert self.host.get_file(source, target, **arguments)


# Runs shell texts one after another, each in its own shell; unread stdin is
# discarded before the next one.
SERVE = r"""
while IFS=' ' read -r mark length rest; do
text=$(head -c "$length"; echo .)
echo "$mark"
head -c "$rest" | { eval "${text%.}"; status=$?; cat >/dev/null; exit $status; }
printf '\n%s %s\n' "$mark" $?
done
"""


class RootShell:
    """A shell that stays open in a machine or container, because starting one takes time."""

    def __init__(self, client: Orbctl | Docker, name: str) -> None:
        build = docker.exec_args if isinstance(client, Docker) else orbctl.run_args
        argv = client.argv(build(name, ["sh", "-c", SERVE], user="root"))
        self._child = process.Child(argv, env=client.environment())
        self._lock = RLock()

    def ask(self, words: Sequence[str], stdin: bytes) -> tuple[int, bytes, bytes] | None:
        """Run a command line; None if it did not start, because the shell has exited.

        Returns:
            Its exit status, its stdout, and its stderr.
        """
        mark = secrets.token_hex(8).encode()
        line = os.fsencode(shlex.join(words))
        with self._lock:
            # The shell may outlive its client for a while; a silent command would then look ended.
            if self._child.gone:
                self.close()
                return None
            feeder = gevent.spawn(
                self._child.try_write,
                b"%b %d %d\n%b%b" % (mark, len(line), len(stdin), line, stdin),
            )
            seen = {process.STDOUT: bytearray(), process.STDERR: bytearray()}
            deadline = time.monotonic() + 300
            end = re.compile(rb"\n%b (\d+)\n\Z" % mark)
            out = seen[process.STDOUT]
            while not (ended := end.search(out, max(0, len(out) - 40))):
                stream, data = self._child.read(deadline - time.monotonic())
                seen[stream] += data
                if not data:
                    self.close()
                    assert not out.startswith(mark), f"the shell ended in {words}: {seen}"
                    return None
            feeder.kill()
            return int(ended[1]), bytes(out[len(mark) + 1 : ended.start()]), bytes(seen[2])

    def close(self) -> None:
        self._child.end()


class Guest:
    """Inspects a machine or a container as root, without the connector."""

    _shells: dict[tuple[str, ...], RootShell] = {}

    def __init__(self, client: Orbctl | Docker, name: str) -> None:
        self.client = client
        self.name = name.rpartition("/")[2]

    def sh(self, text: str, *words: str, stdin: bytes = b"") -> bytes:
        key = (type(self.client).__name__, self.name)
        done = None
        for _ in range(3):
            shell = self._shells.pop(key, None) or RootShell(self.client, self.name)
            if done := shell.ask(["sh", "-c", text, "sh", *words], stdin):
                self._shells[key] = shell
                break
        assert done is not None, f"no shell in {self.name}"
        status, out, err = done
        assert status == 0, (status, out, err)
        return out

    @classmethod
    def close_all(cls) -> None:
        while cls._shells:
            cls._shells.popitem()[1].close()

    def running(self, word: str) -> list[str]:
        """The command lines of all processes that contain a word, except the search itself."""
        listed = self.sh(
            "for f in /proc/[0-9]*/cmdline; do tr '\\0' ' ' <$f 2>/dev/null; echo; done"
        )
        return [line for line in listed.decode(errors="replace").splitlines() if word in line]

    def wait_for(self, word: str, there: bool = True, seconds: float = 10) -> None:
        deadline = time.monotonic() + seconds
        while bool(self.running(word)) is not there:
            assert time.monotonic() < deadline, f"{word}: {self.running(word)}"
            time.sleep(0.1)

    def leftovers(self) -> list[str]:
        """Our files, next to their targets and in the directories for temporary files."""
        places = "/tmp /var/tmp /dev/shm /home /root /etc /srv"
        names = r"\( -name 'pyinfra-*' -o -name '.pyinfra-*' \)"
        found = self.sh(f"find {places} {names} 2>/dev/null; true")
        return found.decode().split()


@pytest.fixture(scope="session", autouse=True)
def mac(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Loopback | None]:
    """With `--over-ssh`, the Mac on loopback through which the connector reaches everything."""
    if not request.config.getoption("--over-ssh"):
        yield None
        return
    # They run `orbctl` on this host themselves.
    client = request.getfixturevalue("client")
    request.getfixturevalue("machines")
    kept = ("ORBCTL_SIMULATOR_", "PYTHONPATH")
    environment = {key: value for key, value in os.environ.items() if key.startswith(kept)}
    try:
        with loopback(tmp_path_factory.mktemp("mac"), environment) as made:
            made.provide("orbctl", client.command)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv(SSH_VARIABLE, MAC)
                yield made
    except Unavailable as reason:
        unavailable(str(reason), "sshd")


@pytest.fixture(scope="session", autouse=True)
def _root_shells() -> Iterator[None]:
    yield
    Guest.close_all()


@pytest.fixture(scope="session")
def base(
    machines: Any, client: Orbctl, shared_directory: Path, request: pytest.FixtureRequest
) -> str:
    """A machine with everything that the suite needs; it is cloned, never changed."""

    def make() -> str:
        name = str(machines.create())
        user = client.info(name).username
        # Not as an argument: another worker may be searching all command lines for it (S1).
        Guest(client, name).sh(SETUP, user, stdin=f"{PASSWORD}\n".encode())
        client.stop(name)
        return name

    def export(archive: Path) -> None:
        client.call("export", make(), str(archive), timeout=orbctl.CREATE_TIMEOUT)

    if not sharing.is_shared(request.config):
        return make()
    return str(machines.load(sharing.prepared(shared_directory, "base.tar.zst", export)))


@pytest.fixture(scope="session")
def shared_machine(machines: Any, base: str) -> str:
    """A machine shared by all tests that leave it unchanged."""
    return str(machines.clone(base))


@pytest.fixture(scope="session")
def images(containers: Containers, client: Orbctl, shared_machine: str) -> dict[str, str]:
    """An image like the machine, and one with little more than a shell."""

    user = client.info(shared_machine).username
    packages = ["passwd", "perl-base", "procps", "sudo", "util-linux", "debianutils", "busybox"]
    packages += ["zsh", "fish", "ksh", "doas", "opendoas", "rsync"]
    return {
        "full": containers.pack("full", client, shared_machine, *packages, user=user),
        "busybox": containers.image("busybox", client, shared_machine, PACK_BUSYBOX),
    }


@pytest.fixture(scope="session")
def shared_container(containers: Containers, images: dict[str, str]) -> str:
    return f"docker/{containers.run(images['full'])}"


@pytest.fixture
def bare(containers: Containers, images: dict[str, str]) -> Iterator[str]:
    """A container with only busybox: no setsid, sudo, sha256sum or cksum."""
    name = containers.run(images["busybox"])
    yield name
    if any(one.name == name for one in containers.client.containers()):
        containers.remove(name)


@pytest.fixture
def machine(request: pytest.FixtureRequest) -> str:
    """Where a test runs: the shared machine, or the shared container."""
    shared = "shared_container" if in_container(request) else "shared_machine"
    return str(request.getfixturevalue(shared))


def in_container(request: pytest.FixtureRequest) -> bool:
    """Whether a test runs in a container."""
    named = "transport" in request.fixturenames and request.getfixturevalue("transport")
    return str(named).startswith("container")


@pytest.fixture
def fresh_machine(machines: Any, base: str) -> str:
    """A machine for a single test."""
    return str(machines.clone(base))


@pytest.fixture
def guest(request: pytest.FixtureRequest, client: Orbctl, machine: str) -> Guest:
    if in_container(request):
        return Guest(request.getfixturevalue("containers").client, machine)
    return Guest(client, machine)


@pytest.fixture
def connect() -> Iterator[Callable[..., Remote]]:
    """Connects to machines, and disconnects at the end."""
    opened: list[Remote] = []

    def open_one(name: str, **data: Any) -> Remote:
        if "orbstack_transport" in data:
            data["orbstack_transport"] = way(data["orbstack_transport"])
        opened.append(Remote(name, **data))
        return opened[-1].connect()

    yield open_one
    for remote in opened:
        remote.close()


@pytest.fixture(scope="session")
def _shared() -> Iterator[dict[str, Remote]]:
    shared: dict[str, Remote] = {}
    yield shared
    for remote in shared.values():
        remote.close()


def way(transport: str) -> str:
    """The value of `orbstack_transport` for one of `WAYS`."""
    return "spawn" if transport.endswith("spawn") else "session"


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def shared_remote(shared: dict[str, Remote], machine: str, transport: str) -> Remote:
    remote = shared.get(transport)
    if remote is None:
        remote = shared[transport] = Remote(machine, orbstack_transport=way(transport))
    return remote.connect()


@pytest.fixture
def remote(_shared: dict[str, Remote], machine: str, transport: str) -> Remote:
    """A connection to the shared machine, on each transport."""
    return shared_remote(_shared, machine, transport)


@pytest.fixture
def one(_shared: dict[str, Remote], shared_machine: str) -> Remote:
    """A connection to the shared machine, only on the default transport."""
    return shared_remote(_shared, shared_machine, "session")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what does not apply to a container and, except for a report, what is slow there.

    Of the rest, `make test` runs the tests marked ``smoke``, and `make thorough` all others.
    """
    here = [item for item in items if FOLDER in item.path.parents]
    for item in here:
        if not item.get_closest_marker("smoke"):
            item.add_marker("thorough")
    kept, left = [], []
    wanted: set[str] | None = CONTAINERS_BRIEFLY
    if config.getoption("--conformance-report"):
        wanted = None
    elif config.getoption("-m") == "smoke":
        # Pairs of Python and pyinfra, which do not matter in a container.
        wanted = set()
    for item in items:
        call = getattr(item, "callspec", None)
        if call is not None and str(call.params.get("transport")).startswith("container"):
            words = ids(item.nodeid.partition("::")[2])
            reasons = [NOT_IN_CONTAINERS[word] for word in words if word in NOT_IN_CONTAINERS]
            if reasons:
                item.add_marker(pytest.mark.skip(reason=reasons[0]))
            elif wanted is not None and not wanted & set(words):
                left.append(item)
                continue
        kept.append(item)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept


class Proxy:
    """An executable between the connector and `orbctl` that can be told to misbehave.

    Attributes:
        run: The subcommand that runs a command.
        info: The subcommand that shows a machine, or containers.
        listing: The subcommand that lists hosts for an inventory.
        place: The prefix of a machine's name in an inventory.
    """

    run, info, listing, place = "run", "info", "list", ""

    def __init__(self, folder: Path, real: Sequence[str]) -> None:
        self.folder = folder
        self.path = folder / "client"
        words = [sys.executable, str(Path(__file__).with_name("proxy.py")), str(folder), *real]
        self.path.write_text(f'#!/bin/sh\nexec {shlex.join(words)} -- "$@"\n')
        self.path.chmod(0o755)

    def tell(self, text: str) -> None:
        """Set the fault of the next calls: see proxy.py."""
        (self.folder / "fault").write_text(text)

    def calls(self, verb: str) -> int:
        """How often a subcommand was called."""
        path = self.folder / "calls"
        return path.read_text().split("\n").count(verb) if path.exists() else 0


class DockerProxy(Proxy):
    """The same for the docker command."""

    run, info, listing, place = "exec", "container", "container", "docker/"


@pytest.fixture
def proxy(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    client: Orbctl,
    monkeypatch: pytest.MonkeyPatch,
    mac: Loopback | None,
) -> Iterator[Proxy]:
    if in_container(request):
        made: Proxy = DockerProxy(tmp_path, request.getfixturevalue("containers").client.command)
        monkeypatch.setenv(docker.COMMAND_VARIABLE, str(made.path))
        yield made
        return
    made = Proxy(tmp_path, [client.command])
    monkeypatch.setenv(orbctl.COMMAND_VARIABLE, str(made.path))
    if mac is not None:
        mac.provide("orbctl", str(made.path))
    yield made
    if mac is not None:
        mac.provide("orbctl", client.command)
