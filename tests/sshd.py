"""A real sshd for tests: on a loopback port, in a simulated machine without init."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from .conformance.conftest import Guest
from .packages import install

KINDS = ("ed25519", "rsa")
START = f"""
[ -x /usr/sbin/sshd ] || {{
{install("openssh-server", "openssh-client")}
}}
"""
START += r"""
mkdir -p /run/sshd /root/.ssh && chmod 700 /root/.ssh && cd /root/.ssh
[ -e id ] || { ssh-keygen -q -t ed25519 -N '' -f id && cp id.pub authorized_keys; }
n=0
if pid=$(cat "/run/sshd/$1.pid" 2>/dev/null) && kill "$pid"; then
    while kill -0 "$pid" 2>/dev/null; do [ $((n += 1)) -lt 400 ] || exit 1; sleep 0.05; done
fi
rm -f "/run/sshd/$1.pid"
for kind in $2; do
    [ -e "$kind.$3" ] || ssh-keygen -q -t "$kind" -N '' -f "$kind.$3"
    set -- "$@" -o "HostKey=/root/.ssh/$kind.$3"
done
port=$1 && shift 3
/usr/sbin/sshd -p "$port" -o ListenAddress=127.0.0.1 -o PermitRootLogin=yes \
    -o PidFile="/run/sshd/$port.pid" -o 'Subsystem=sftp internal-sftp' -f /dev/null "$@"
# It has become a daemon before it listens, and writes this file after that.
until [ -s "/run/sshd/$port.pid" ]; do [ $((n += 1)) -lt 400 ] || exit 1; sleep 0.05; done
"""


class Sshd(NamedTuple):
    """A machine that shares this host's network and runs servers on loopback ports."""

    guest: Guest

    def start(self, port: int, keys: str = "first", kinds: str = " ".join(KINDS)) -> None:
        """Run a server with these keys, instead of a running one."""
        self.guest.sh(START, str(port), kinds, keys)

    def put_key(self, path: Path) -> None:
        """Write the private key that logs in as root; a server has been started before."""
        path.touch(mode=0o600)
        path.write_bytes(self.guest.sh("cat /root/.ssh/id"))

    def fingerprint(self, kind: str, keys: str = "first") -> str:
        return (
            self.guest.sh("ssh-keygen -lf /root/.ssh/$1.pub", f"{kind}.{keys}").split()[1].decode()
        )
