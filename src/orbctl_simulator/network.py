"""The machines' network: one for each state directory, while at least one of its machines runs.

The **router** is a network namespace with one process that keeps it (see `router`). It has a
bridge with a port for each machine, the user-mode NAT slirp4netns to the internet, the name server
dnsmasq, and one veth to the host, which reaches machines by their addresses. Nothing else of the
host changes: no forwarding, firewall rule, sysctl or name. The first `join` starts the router and
the last `leave` stops it; it also exits when its last machine has ended in any other way.

Contract for the code that boots a machine, in this order:

1. Call `join` with a descriptor of the machine's new network namespace, before its init runs. It
   creates ``eth0`` there with MAC, MTU, addresses and default route, so an image that configures
   nothing has a network, and calls `connected`. When it returns, ``eth0`` also carries traffic, and
   the machine's names resolve.
2. Write what `guest_files` returns into the machine's root, replacing existing files and symbolic
   links; ``/run`` is the tmpfs that its init finds. ``/etc/resolv.conf`` contains the router.
   NetworkManager is configured to ignore ``eth0``. systemd-networkd, ifupdown, dhcpcd, netplan and
   cloud-init need no file: by DHCP and router advertisement the router gives them what ``eth0``
   already has.
3. Close the descriptor, which would keep the namespace alive, and run the init. When the machine
   has ended, call `leave`.

Every boot joins again, whatever is left of the last one. `rename` and `delete` of a machine call
`rename` and `forget`. After the router was killed, `connected` is false for a machine that still
runs: `join` it again with its namespace. Calls take the network's lock, and no other lock while
they hold it.

A machine cannot use the address or MAC of another machine or of the router, and cannot serve DHCP
or router advertisements. Through the router it reaches the host only at ``host.orb.internal``. An
isolated machine reaches neither the host nor other machines, nor do they reach it. dnsmasq, which
parses what machines send, has an id that no user of the host has; slirp4netns has its own sandbox.
"""

from __future__ import annotations

import os
import sys
import time

from . import firewall, names, netns, tools
from .addresses import DOMAIN, AddressBook, Addresses, Member, check_id, check_name
from .light import suppress
from .linux import CLONE_NEWPID, unshare
from .state import Failure, Lock, cache, is_same_process, python, start_time, write_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_ETH = "eth0"
_SIGHUP, _SIGKILL = 1, 9


class Network:
    """The network of one state directory."""

    def __init__(self, state: str) -> None:
        self._state = os.path.realpath(state)
        self._book = AddressBook(self._state)

    def join(
        self,
        ident: str,
        name: str,
        machine: int,
        isolated: bool = False,
        connected: Callable[[Addresses], None] | None = None,
    ) -> Addresses:
        """Connect a machine by a descriptor of its network namespace.

        `connected` is called in another process as soon as ``eth0`` is configured, a moment before
        the firewall lets it carry traffic. If the router is killed, it is called again.
        """
        check_id(ident)
        check_name(name)
        netns.check(machine)
        tools.ensure()
        try:
            with self._lock() as lock:
                for _ in range(2):
                    with suppress(_Ended):
                        return self._join(lock, ident, name, machine, isolated, connected)
                return self._join(lock, ident, name, machine, isolated, connected)
        except (OSError, Failure) as error:
            raise Failure(f"network: {netns.reason(error)}") from None

    def _join(
        self,
        lock: Lock,
        ident: str,
        name: str,
        machine: int,
        isolated: bool,
        connected: Callable[[Addresses], None] | None,
    ) -> Addresses:
        router = self._running() or self._start(lock)
        port = ""
        try:
            member = self._book.enrol(ident, name, isolated, router=router.key)
            port, its = member.port, member.addresses(self._book.subnets())
            router.wait_for(router.connect(member, its, machine, connected))
        except BaseException:
            self._disconnect(router, port)
            raise
        return its

    def leave(self, ident: str) -> None:
        """Disconnect it; the last one stops the router. Does nothing if it is not connected."""
        member = self._book.member(ident)
        if member and os.path.isdir(self._book.path):
            with self._lock():
                router = self._running()
                if router:
                    self._disconnect(router, member.port)

    def rename(self, ident: str, name: str) -> None:
        check_name(name)
        if self._book.member(ident) is None:
            return
        try:
            with self._lock():
                member = self._book.member(ident)
                if member is None:
                    return
                self._book.enrol(ident, name, member.isolated, router=member.router)
                router = self._running()
                with suppress(_Ended):  # the next router starts with the new name
                    if router:
                        router.wait_for(router.publish())
        except (OSError, Failure) as error:
            raise Failure(f"network: {netns.reason(error)}") from None

    def forget(self, ident: str) -> None:
        """Free its address, because the machine is deleted."""
        self.leave(ident)
        self._book.forget(ident)

    def addresses(self, ident: str) -> Addresses | None:
        """The addresses that it has or will have when it starts; none before its first `join`."""
        member = self._book.member(ident)
        return member.addresses(self._book.subnets()) if member else None

    def connected(self, ident: str) -> bool:
        """Whether the router that this machine joined still runs. Starts no process."""
        member, router = self._book.member(ident), self._running()
        return bool(member and router and member.router == router.key)

    def sweep(self, known: set[str] | None = None) -> None:
        """Remove what killed processes left, and the addresses of machines not in `known`."""
        if not os.path.isdir(self._book.path):
            return
        with self._lock():
            router = self._running()
            ports = router.ports() if router else set()
            if router and not ports:
                router.end()
            self._book.tidy()
            for member in self._book.members():
                if known is not None and member.id not in known and member.port not in ports:
                    self._book.forget(member.id)

    def _lock(self) -> Lock:
        self._book.make()
        return Lock(self._book.file("lock"))

    def _disconnect(self, router: _Router, port: str) -> None:
        try:
            left = router.disconnect(port)
        except Failure:
            left = True
        if not left:
            router.end()

    def _running(self) -> _Router | None:
        try:
            return _Router(self._book)
        except (OSError, ValueError):
            return None

    def _start(self, lock: Lock) -> _Router:
        waits, control = os.pipe()
        answers, report = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                _become_router(self._book.link, [waits, report, lock.fd], self._state)
            except BaseException as error:
                text = netns.reason(error)
                os.write(report, f"error {text}\n".encode(errors="surrogateescape"))
            os._exit(1)
        os.close(waits)
        os.close(report)
        os.waitpid(child, 0)
        try:
            with open(answers, errors="surrogateescape") as file:
                word, _, text = file.read().strip().partition(" ")
            if not word:
                raise _Ended("the router was killed while it started")
            if word != "ok":
                raise Failure(text)
            write_file(self._book.file("router"), f"{text} {start_time(f'/proc/{text}')}\n")
            router = _Router(self._book)
            os.write(control, b"!")
            return router
        finally:
            os.close(control)


class _Ended(Failure):
    """The router was killed during a call; the call may succeed with another one."""


class _Router:
    """A running router, opened so that a reused process id does no harm."""

    def __init__(self, book: AddressBook) -> None:
        self._book, self._proc, self._netns = book, -1, -1
        with open(book.file("router")) as file:
            self.key = file.read().strip()
        pid, _, started = self.key.partition(" ")
        self._pid = int(pid)
        self._proc = os.open(f"/proc/{self._pid}", os.O_RDONLY | os.O_DIRECTORY)
        if not is_same_process(f"/proc/self/fd/{self._proc}", started, book.link):
            raise ProcessLookupError
        self._netns = os.open("ns/net", os.O_RDONLY, dir_fd=self._proc)

    def __del__(self) -> None:
        for fd in (self._proc, self._netns):
            if fd >= 0:
                os.close(fd)

    def ports(self) -> set[str]:
        return set(netns.inside(self._netns, lambda: " ".join(netns.ports())).split())

    def connect(
        self,
        member: Member,
        its: Addresses,
        machine: int,
        connected: Callable[[Addresses], None] | None,
    ) -> str:
        """Create its ``eth0`` and its port, which is guarded before it is up."""

        def work() -> str:
            _remove_old()
            netns.enter(self._netns)
            ports = netns.ports()
            guard, mark = names.start_to_publish(self._book, ports | {member.port})
            os.set_inheritable(machine, True)
            mtu = f"mtu {firewall.MTU}"
            pair = f"link add {member.port} {mtu} type veth peer name {_ETH}"
            peer = f"address {its.mac} {mtu} netns /proc/self/fd/{machine}"
            try:
                if member.port in ports:
                    _remove_port(member.port)
                tools.ip([f"{pair} {peer}", f"link set {member.port} master {firewall.BRIDGE}"])
                netns.enter(machine)
                _configure(its)
                if connected:
                    connected(its)
            finally:
                guard.wait()
            netns.enter(self._netns)
            netns.set_up(member.port)
            return mark

        mark = netns.inside(machine, work)
        self._reread()
        return mark

    def disconnect(self, port: str) -> bool:
        """Remove a port. Returns whether others are left."""

        def work() -> str:
            ports = netns.ports()
            if port in ports:
                _remove_port(port)
            ports.discard(port)
            try:
                return names.publish(self._book, ports) if ports else "none"
            except (OSError, Failure):
                return ""  # a full disk: the next call does it

        mark = netns.inside(self._netns, work)
        if mark not in ("", "none"):
            self._reread()
            self.wait_for(mark, 2)
        return mark != "none"

    def publish(self) -> str:
        mark = netns.inside(self._netns, lambda: names.publish(self._book, netns.ports()))
        self._reread()
        return mark

    def _reread(self) -> None:
        if not self._signal(_SIGHUP):
            raise _Ended("the router was killed")

    def wait_for(self, mark: str, patience: float = 10) -> None:
        subnets = self._book.subnets()

        def work() -> str:
            return "yes" * names.has_read(subnets, mark, patience, self._has_ended)

        if not netns.inside(self._netns, work):
            if self._has_ended():
                raise _Ended("the router was killed")
            raise Failure("the name server does not answer")

    def _has_ended(self) -> bool:
        try:
            return not start_time(f"/proc/self/fd/{self._proc}")
        except OSError:
            return True

    def _signal(self, number: int) -> bool:
        if self._has_ended():
            return False
        os.kill(self._pid, number)
        return True

    def end(self) -> None:
        """Remove the veth first: the kernel would do it too late for an immediate next router."""
        with suppress(Failure):  # it may be exiting by itself
            netns.inside(self._netns, lambda: tools.call("ip", "link", "del", firewall.UPLINK))
        with suppress(OSError):
            os.unlink(self._book.file("router"))
        deadline = time.monotonic() + 10
        while self._signal(_SIGKILL) and time.monotonic() < deadline:
            time.sleep(0.002)


def _remove_old() -> None:
    """Remove what a killed router left: the kernel also does that, but a moment later."""
    for _ in range(9):
        if _ETH not in netns.interfaces():
            return
        with suppress(Failure):
            tools.call("ip", "link", "del", _ETH)
    raise Failure(f"the machine's {_ETH} cannot be replaced")


def _remove_port(port: str) -> None:
    """Remove a port; if its machine has ended, the kernel does that, too, at any moment."""
    try:
        tools.call("ip", "link", "del", port)
    except Failure:
        if port in netns.ports():
            raise


def _configure(its: Addresses) -> None:
    """Configure ``eth0``, in the machine's namespace."""
    settings = {"ipv6/conf/all/disable_ipv6": "0", f"ipv6/conf/{_ETH}/disable_ipv6": "0"}
    # It already has its address; a network manager in it reads advertisements by itself.
    netns.set_sysctls({**settings, f"ipv6/conf/{_ETH}/accept_ra": "0"})
    lines = ["link set lo up", f"addr add {its.ip4}/24 broadcast + dev {_ETH}"]
    if its.ip6:
        lines.append(f"addr add {its.ip6}/64 dev {_ETH} nodad")
    lines += [f"link set {_ETH} up", f"route replace default via {its.gateway} dev {_ETH}"]
    tools.ip(lines)


def _become_router(link: str, fds: list[int], state: str) -> None:
    """Fork into a new process namespace, and let the fork become the router."""
    os.setsid()
    os.chdir("/")
    unshare(CLONE_NEWPID)
    if os.fork():
        os._exit(0)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    for fd in fds:
        os.set_inheritable(fd, True)
    command = python("router", link, *map(str, fds), state)
    kept = {"PATH": os.environ.get("PATH", os.defpath), "ORBCTL_SIMULATOR_CACHE": cache()}
    os.execve(sys.executable, command, kept)


def guest_files(its: Addresses) -> dict[str, str]:
    """The files that a machine's root must contain when its init starts."""
    return {
        "/etc/resolv.conf": f"nameserver {its.gateway}\nsearch {DOMAIN}\n",
        "/run/NetworkManager/conf.d/00-orb.conf": (
            f"[keyfile]\nunmanaged-devices=interface-name:{_ETH}\n"
        ),
    }


def available() -> str | None:
    """Try whether this host can have a network of machines. Returns the reason if not."""
    if os.geteuid() != 0:
        return "needs root"
    missing = [name for name, path, _ in tools.listing() if not path]
    if missing and not tools.can_fetch():
        return f"{', '.join(missing)}: not installed: {tools.install_command(missing)}"
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
    except OSError as error:
        return f"/dev/net/tun: {error.strerror}: modprobe tun"
    from .router import create_spaces

    try:
        owner, router = create_spaces()
        os.close(owner)
        try:
            if not missing:
                netns.inside(router, _try_rules)
        finally:
            os.close(router)
    except (Failure, OSError) as error:
        return str(error)
    return None


def _try_rules() -> None:
    netns.set_sysctls({"ipv4/ip_forward": "1"})
    tools.ip([f"link add {firewall.BRIDGE} type bridge", "link add m1 type veth peer name m2"])
    tools.call("nft", "-f", "-", text=firewall.rules())
