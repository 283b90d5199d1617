"""Host keys of servers: scanned, shown, and recorded where pyinfra's SSH connector reads them."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pyinfra_orbstack import inventory_files
from pyinfra_orbstack.inventory_files import CommandError, is_container, is_machine

if TYPE_CHECKING:
    from pyinfra.api.host import Host

#: Seconds to wait for a server's answer.
TIMEOUT = 10

#: Keys in base64 by type, such as ssh-ed25519.
Keys = dict[str, str]


class Problem(Exception):
    """The reason why a server's keys cannot be recorded; the text is one line."""


class Server(NamedTuple):
    """Where the SSH connector finds a host and its key.

    Attributes:
        host: Its name in the inventory.
        address: Its host name or address.
        port: Its port.
        file: Its known_hosts file.
    """

    host: str
    address: str
    port: int
    file: Path

    @property
    def name(self) -> str:
        """Its name in known_hosts files.

        >>> Server("web", "web.example", 2222, Path("known_hosts")).name
        '[web.example]:2222'
        """
        return self.address if self.port == 22 else f"[{self.address}]:{self.port}"


def trust(inventory: Path, limit: str | None, *, yes: bool) -> int:
    """Record the keys of the servers in an inventory, after asking.

    Returns:
        0, or 1 if the keys of some server could not be recorded.

    Raises:
        CommandError: There is no server, or no terminal to ask on.
    """
    inventory_files.hosts_of(inventory)
    if not shutil.which("ssh-keyscan"):
        raise CommandError("ssh-keyscan not found: install the OpenSSH client")
    fresh: list[tuple[Server, Keys]] = []
    problems = 0
    for host in _hosts(inventory, limit):
        try:
            server = _server(host, inventory)
            keys = unknown_keys(server, recorded(server), scan(server))
        except Problem as problem:
            print(f"{host.name}: {problem}", file=sys.stderr)
            problems = 1
            continue
        if keys:
            print(f"{host.name} ({server.name})")
            for kind, key in keys.items():
                print(f"    {kind} {fingerprint(key)}")
            fresh.append((server, keys))
        else:
            print(f"{host.name}: its key is in {server.file}")
    if fresh and not yes and not _confirmed(fresh):
        return 1
    for server, keys in fresh:
        record(server, keys)
        print(f"{server.host}: recorded in {server.file}")
    return problems


def _hosts(inventory: Path, limit: str | None) -> list[Host]:
    """The hosts reached over SSH."""
    from pyinfra.connectors.ssh import SSHConnector

    read = inventory_files.read(
        inventory, lambda host: not (is_machine(host) or is_container(host))
    )
    chosen = None if limit is None else inventory_files.limited(read, inventory, limit)
    hosts = [
        host
        for host in read
        if host.connector_cls is SSHConnector and (chosen is None or host.name in chosen)
    ]
    if not hosts:
        raise CommandError(f"{inventory} contains no SSH hosts: there is no key to record")
    return hosts


def _server(host: Host, inventory: Path) -> Server:
    """Where the connector finds a host, with `~/.ssh/config` applied."""
    data = host.data
    file = data.get("ssh_known_hosts_file")
    if not file or data.get("ssh_strict_host_key_checking") != "yes":
        raise Problem(
            "its keys are not pinned: set ssh_known_hosts_file = 'known_hosts' and "
            f"ssh_strict_host_key_checking = 'yes' in group_data/{inventory.stem}.py"
        )
    address, port = str(data.get("ssh_hostname") or host.name), data.get("ssh_port")
    config = ["-F", os.path.expanduser(str(data.get("ssh_config_file") or "~/.ssh/config"))]
    if not os.path.exists(config[1]):
        config = ["-F", "none"]
    words = ["ssh", "-G", *config, *(["-p", str(port)] if port else []), "--", address]
    done = subprocess.run(words, capture_output=True, text=True, errors="replace")
    found = dict(line.partition(" ")[::2] for line in done.stdout.splitlines())
    if done.returncode:
        raise Problem(" ".join(done.stderr.split()))
    # Without an alias ssh prints the name in lower case; the connector uses it unchanged.
    alias = found["hostname"]
    address = address if alias == address.lower() else alias
    return Server(host.name, address, int(found["port"]), Path(os.path.expanduser(str(file))))


def scan(server: Server) -> Keys:
    """The keys that a server offers.

    Raises:
        Problem: It does not answer.
    """
    words = ["ssh-keyscan", "-T", str(TIMEOUT), "-p", str(server.port), "--", server.address]
    done = subprocess.run(words, capture_output=True, text=True, errors="replace")
    lines = [line.split() for line in done.stdout.splitlines() if line[:1] not in ("#", "")]
    keys = {words[1]: words[2] for words in lines if len(words) == 3}
    if not keys:
        # Apart from comments it prints the reason, or nothing.
        said = [line for line in done.stderr.splitlines() if line and not line.startswith("#")]
        why = f" ({said[-1]})" if said else ""
        raise Problem(f"no SSH server answers at {server.address}, port {server.port}{why}")
    return keys


def recorded(server: Server) -> Keys:
    """The known keys of a server, as the connector reads them.

    Raises:
        Problem: The file cannot be read.
    """
    from paramiko import HostKeys

    if not server.file.exists():
        return {}
    try:
        found = HostKeys(str(server.file)).lookup(server.name)
    except Exception as broken:  # whatever it finds there
        raise Problem(f"cannot read {server.file}: {' '.join(str(broken).split())}") from None
    return {kind: key.get_base64() for kind, key in found.items()} if found else {}


def unknown_keys(server: Server, known: Keys, offered: Keys) -> Keys:
    """The offered keys that are not known yet.

    Raises:
        Problem: It is not the server whose keys are known.
    """
    same = known.items() & offered.items()
    if any(known.get(kind, key) != key for kind, key in offered.items()) or (known and not same):
        raise Problem(
            f"its host key is not the one in {server.file}; if the server was replaced, remove "
            f"the old key first: ssh-keygen -R '{server.name}' -f {server.file}"
        )
    return {kind: key for kind, key in offered.items() if kind not in known}


def fingerprint(key: str) -> str:
    """A key's fingerprint as `ssh-keygen -l` prints it.

    >>> fingerprint("AAAA")
    'SHA256:cJ6AyISHokEeHuTfufIqhhSS0gxHZRUMDHlKvXD4FHw'
    """
    digest = hashlib.sha256(base64.b64decode(key)).digest()
    return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


def _confirmed(fresh: list[tuple[Server, Keys]]) -> bool:
    """Whether the user trusts these keys.

    Raises:
        CommandError: There is no terminal to ask on.
    """
    names = ", ".join(server.host for server, _ in fresh)
    if not sys.stdin.isatty():
        raise CommandError(
            f"would record the keys of {names}: compare them, then confirm with YES=1"
        )
    print("On a server, `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` prints its own.")
    try:
        return input("Are these the servers' keys? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:  # Ctrl-D means no
        print()
        return False


def record(server: Server, keys: Keys) -> None:
    """Add keys to a server's file."""
    before = server.file.read_text(encoding="utf-8") if server.file.exists() else ""
    gap = "\n" if before and not before.endswith("\n") else ""
    lines = "".join(f"{server.name} {kind} {key}\n" for kind, key in keys.items())
    with server.file.open("a", encoding="utf-8") as file:
        file.write(gap + lines)
