"""A Mac on loopback: a real sshd on this host; `provide` sets its `orbctl`.

If this host has no sshd, apt downloads one and it is extracted into the cache; nothing is
installed. The account and the directory that sshd requires as root exist only in its own mount
namespace.
"""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from pyinfra_orbstack.places import Mac, place_of

from .sharing import prepared

ROOT = Path(__file__).parent.parent
#: The SSH destination.
MAC = "mac"

CONFIG = """\
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host-key
PidFile none
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin yes
Subsystem sftp internal-sftp
LogLevel ERROR
SetEnv {environment}
ForceCommand exec sh {folder}/login
"""
# What a profile prints, then what a login shell does.
LOGIN = """\
cat '{folder}/greeting'
exec /bin/sh -c "$SSH_ORIGINAL_COMMAND"
"""
CLIENT = """\
Host {mac} nobody@{mac}
HostName 127.0.0.1
Port {port}
IdentityFile {folder}/key
IdentitiesOnly yes
IdentityAgent none
UserKnownHostsFile {folder}/known-hosts
GlobalKnownHostsFile /dev/null
"""
# In a mount namespace of its own.
PRIVILEGED = r"""
set -e
mount -t tmpfs tmpfs "$1"
# A shell that reads no profile of this account.
sed 's|^\(root:.*:\)[^:]*$|\1/bin/sh|' /etc/passwd >"$1/passwd"
grep -q ^sshd: /etc/passwd ||
    echo 'sshd:x:65533:65534::/run/sshd:/usr/sbin/nologin' >>"$1/passwd"
mount --bind "$1/passwd" /etc/passwd
if [ ! -d /run/sshd ]; then
    mkdir "$1/new" "$1/work"
    mount -t overlay -o "lowerdir=/run,upperdir=$1/new,workdir=$1/work" overlay /run
    mkdir -m 755 /run/sshd
fi
shift
exec "$@"
"""


class Unavailable(Exception):
    """sshd is not available."""


def free_port() -> int:
    """A free port below those that the kernel assigns to clients, so that no client gets it."""
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def find(cache: Path = ROOT / ".cache" / "sshd") -> list[str]:
    """The command of an sshd.

    Raises:
        Unavailable: There is none, and none can be downloaded.
    """
    here = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if here:
        return [here]
    root = cache / "root"
    if not root.exists():
        sys.path.insert(0, str(ROOT / "scripts"))
        try:
            import browser

            cache.mkdir(parents=True, exist_ok=True)
            # Workers of a run need it at the same time.
            prepared(cache, "root", lambda part: browser.fetch("openssh-server", cache, part))
        except browser.Unavailable as reason:
            raise Unavailable(f"no sshd: {reason}") from None
        finally:
            sys.path.remove(str(ROOT / "scripts"))
    libraries = {str(path.parent) for path in root.glob("**/lib/**/*.so*")}
    path = os.pathsep.join(sorted(libraries))
    return ["env", f"LD_LIBRARY_PATH={path}", str(root / "usr/sbin/sshd")]


class Loopback:
    """The Mac.

    Args:
        folder: A directory for its files.
        environment: Variables of its commands.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.port = free_port()
        self.bin = folder / "bin"
        self._sshd: subprocess.Popen[bytes] | None = None
        self._environment = {
            **environment,
            "PATH": f"{self.bin}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        }
        self.bin.mkdir(parents=True)
        client = folder / "client"
        client.mkdir()
        self._write(client / "ssh", ["ssh", "-F", str(folder / "client-config")])
        (folder / "login").write_text(LOGIN.format(folder=folder))
        self.greet("")
        #: What a process of ours needs to reach it.
        self.path = f"{client}{os.pathsep}{os.environ['PATH']}"
        self.new_key("key")
        self.new_host_key()
        self.reach(self.port)

    def _write(self, path: Path, words: list[str]) -> None:
        words[0] = shutil.which(words[0]) or words[0]
        path.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        path.chmod(0o755)

    def provide(self, name: str, *words: str) -> None:
        """Make a command available there."""
        self._write(self.bin / name, list(words))

    def greet(self, text: str) -> None:
        """Set what the profile of the account prints."""
        (self.folder / "greeting").write_text(text)

    def new_key(self, name: str) -> None:
        for path in (self.folder / name, self.folder / f"{name}.pub"):
            path.unlink(missing_ok=True)
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)]
        subprocess.run(words, check=True)

    def new_host_key(self, *, known: bool = True) -> None:
        """Create a host key; a running server keeps its old one."""
        self.new_key("host-key")
        if known:
            self.know(self.port)

    def know(self, port: int) -> None:
        """Make the host key known under a port."""
        kind, key = (self.folder / "host-key.pub").read_text().split()[:2]
        (self.folder / "known-hosts").write_text(f"[127.0.0.1]:{port} {kind} {key}\n")

    def reach(self, port: int) -> None:
        """Set the port that the client connects to."""
        settings = CLIENT.format(mac=MAC, port=port, folder=self.folder)
        (self.folder / "client-config").write_text(settings)
        if (self.folder / "host-key.pub").exists():
            self.know(port)

    def start(self) -> None:
        """Start the server."""
        environment = " ".join(f"{key}={value}" for key, value in self._environment.items())
        config = self.folder / "sshd-config"
        text = CONFIG.format(port=self.port, folder=self.folder, environment=environment)
        config.write_text(text)
        command = [*find(), "-D", "-e", "-f", str(config)]
        if os.geteuid() == 0:
            private = self.folder / "private"
            private.mkdir(exist_ok=True)
            command = ["unshare", "-m", "sh", "-c", PRIVILEGED, "sh", str(private), *command]
        if shutil.which("setpriv"):
            # A worker that is killed cannot stop it.
            command = ["setpriv", "--pdeathsig", "TERM", *command]
        with open(self.folder / "log", "ab") as log:
            self._sshd = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 10
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            if self._sshd.poll() is not None or time.monotonic() > deadline:
                raise Unavailable(f"sshd did not start: {(self.folder / 'log').read_text()}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Stop the server; open connections remain."""
        if self._sshd is not None:
            self._sshd.terminate()
            self._sshd.wait()
            self._sshd = None


@contextlib.contextmanager
def loopback(folder: Path, environment: Mapping[str, str]) -> Iterator[Loopback]:
    """A running `Loopback`, and no control connection afterwards."""
    made = Loopback(folder, environment)
    before = os.environ["PATH"]
    os.environ["PATH"] = made.path
    try:
        made.start()
        yield made
    finally:
        try:
            disconnect()
        finally:
            made.stop()
            os.environ["PATH"] = before


def disconnect(destination: str = MAC) -> None:
    """End the control connection of this process, and wait for that."""
    mac = place_of(destination)
    assert isinstance(mac, Mac)
    link = mac._link
    mac.close()
    if link is not None:
        assert link._keeper.wait(10), "the keeper still waits"
