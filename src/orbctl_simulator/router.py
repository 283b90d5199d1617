"""The router: the one process that keeps a state directory's network alive.

It is process 1 of a process namespace, so the user-mode NAT and the name server end with it,
however it ends. It is also in the network namespace that it keeps: the bridge, every machine's
port, and the veth to the host with its address and routes are removed with it. It restarts its two
programs when they exit, watches the host's addresses, and exits when no machine is left.

The process that starts it shares the network's lock with it, so no second router starts while this
one is being set up, even if that process is killed.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import time
from fcntl import fcntl

from . import firewall, names, netns, tools, uplink, userns
from .addresses import AddressBook, new_prefix
from .firewall import BRIDGE, BRIDGE_MAC, MTU, TAP, UPLINK
from .linux import (
    CLONE_NEWNS,
    MS_BIND,
    MS_REC,
    close_all_but,
    mount,
    setns,
    unshare,
)
from .state import Failure, Lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_MS_SLAVE = 1 << 19
# Host ids of the router's user namespace: no user of the host and no machine has them.
_IDS = "0 1100000 65536\n"
_LINKS, _ADDRESSES, _ROUTES = 0x1, 0x10 | 0x100, 0x40 | 0x400  # groups of rtnetlink
_SANDBOXES = (("--enable-sandbox", "--enable-seccomp"), ("--enable-sandbox",), ())
# A new namespace inherits the host's, which may be strict.
_OFF = {
    "ipv4": "rp_filter arp_ignore arp_announce arp_filter send_redirects accept_redirects",
    "ipv6": "accept_ra accept_redirects disable_ipv6",
    "bridge": "iptables ip6tables arptables",
}


def _settings() -> dict[str, str]:
    values = {f"bridge/bridge-nf-call-{name}": "0" for name in _OFF["bridge"].split()}
    for family in ("ipv4", "ipv6"):
        for name in _OFF[family].split():
            values.update({f"{family}/conf/{which}/{name}": "0" for which in ("all", "default")})
    return {**values, "ipv4/ip_forward": "1", "ipv6/conf/all/forwarding": "1"}


def main() -> None:
    link, control, status, lock, path = sys.argv[1:]
    fds = int(control), int(status), int(lock)
    close_all_but(*fds)
    for fd in fds:
        os.set_inheritable(fd, False)
    os.umask(0o022)
    os.chdir("/")
    try:
        router = Router(AddressBook(path), link)
        router.start()
        os.write(int(status), f"ok {os.readlink('/proc/self')}\n".encode())
    except Exception as error:
        text = netns.reason(error)
        os.write(int(status), f"error {text}\n".encode(errors="surrogateescape"))
        os._exit(1)
    os.close(int(status))
    if os.read(int(control), 1) != b"!":
        os._exit(1)
    os.close(int(control))
    os.close(int(lock))
    router.keep()


class Service:
    """A program that the router keeps running."""

    def __init__(self, start: Callable[[], int]) -> None:
        self._start = start
        self.pid, self._due = 0, 0.0

    def start(self) -> None:
        self._due = time.monotonic() + 1  # for the next start, if this one exits at once
        self.pid = self._start()

    def has_ended(self) -> bool:
        """Reliable only while no other code reaps."""
        return os.waitpid(self.pid, os.WNOHANG)[0] != 0

    def note_end(self, reaped: list[int]) -> None:
        if self.pid in reaped:
            self.pid = 0

    def is_up(self) -> bool:
        if not self.pid and time.monotonic() >= self._due:
            self.start()
        return self.pid != 0

    def hang_up(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGHUP)


def create_spaces() -> tuple[int, int]:
    """The router's user namespace and network namespace."""
    return userns.make_with_network(_IDS, _IDS)


class Router:
    def __init__(self, book: AddressBook, link: str) -> None:
        self.book, self.link = book, link
        self.host = os.open("/proc/self/ns/net", os.O_RDONLY)
        self._host_changes = _watch(_ADDRESSES | _ROUTES)
        self.owner, self.netns = create_spaces()
        self.subnets = book.subnets()
        self.known: set[str] = set()
        self._blocked, self._log = "", 0
        self._sandboxes = list(_SANDBOXES)
        self._nat, self._name_server = Service(self._start_nat), Service(self._start_name_server)

    def start(self) -> None:
        netns.enter(self.netns)
        self._link_changes = _watch(_LINKS)
        self._wake = _catch_signals()
        netns.set_sysctls(_settings())
        if not netns.has_ipv6():
            self.subnets.prefix6 = ""
        elif not self.subnets.prefix6:
            self.subnets.prefix6 = new_prefix()
        self.subnets = uplink.connect(self.host, self.link, self.subnets)
        self.book.save(self.subnets)
        self._configure()
        self._route_to_host()
        self._nat.start()
        tools.call("nft", "-f", "-", text=firewall.rules())
        self.block_host()
        mark = names.publish(self.book, set())
        self._name_server.start()
        if not names.has_read(self.subnets, mark, ended=self._name_server.has_ended):
            raise Failure(f"dnsmasq: {_read_log(self._log)}")

    def _configure(self) -> None:
        lines = [
            "link set lo up",
            f"link add {BRIDGE} address {BRIDGE_MAC} mtu {MTU} type bridge forward_delay 0"
            " mcast_snooping 0",
            f"addr add {self.subnets.gateway}/24 dev {BRIDGE}",
            f"link set {BRIDGE} up",
        ]
        if self.subnets.prefix6:
            lines += [
                f"addr add fe80::1/64 dev {BRIDGE} nodad",
                f"addr add {self.subnets.gateway6}/64 dev {BRIDGE} nodad",
            ]
        tools.ip(lines)

    def _route_to_host(self) -> None:
        lines = [f"route add {self.subnets.host}/32 dev {UPLINK}"]
        if self.subnets.prefix6:
            lines.append(f"route add {self.subnets.host6}/128 dev {UPLINK}")
        tools.ip(lines)

    def _start_nat(self) -> int:
        """Start the NAT, in the host's network and the strictest sandbox that this host allows."""
        said = ""
        for sandbox in self._sandboxes:
            log, (ready, report) = _open_log(), os.pipe()
            words = [*sandbox, f"--cidr={self.subnets.link}.0/24", f"--mtu={MTU}"]
            words += ["--configure", f"--ready-fd={report}", "--netns-type=path"]
            words += [f"/proc/self/fd/{self.netns}", TAP]

            def become(words: list[str] = words, log: int = log, report: int = report) -> None:
                setns(self.host)
                os.set_inheritable(self.netns, True)
                os.set_inheritable(report, True)
                _execute(tools.find("slirp4netns"), words, log)

            pid = _fork(become, log)
            os.close(report)
            begun = select.select([ready], [], [], 10)[0] and os.read(ready, 1)
            said = _read_log(log)
            os.close(ready)
            os.close(log)
            if begun:
                self._sandboxes = [sandbox]
                return pid
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        raise Failure(f"slirp4netns: {said}")

    def _start_name_server(self) -> int:
        """Start dnsmasq with an unassigned id on the host, because it parses what machines send."""
        tool = tools.find("dnsmasq")
        log = _open_log()

        def become() -> None:
            unshare(CLONE_NEWNS)
            mount(None, "/", None, MS_REC | _MS_SLAVE)
            served, place = self.book.file("served"), "/run/tools"
            sources = [(served, names.PLACE)] + ([(tool.root, place)] if tool.root else [])
            opened = [(os.open(source, os.O_PATH), target) for source, target in sources]
            mount("tmpfs", "/run", "tmpfs", 0, "mode=755,size=64k")
            for source, target in opened:
                os.mkdir(target, 0o755)
                mount(f"/proc/self/fd/{source}", target, None, MS_BIND)
            setns(self.owner)
            os.setgroups([])
            os.setgid(0)
            os.setuid(0)
            moved = tool.seen_at(place) if tool.root else tool
            _execute(moved, names.arguments(self.subnets), log)

        if self._log:
            os.close(self._log)
        self._log = log
        return _fork(become, log)

    def keep(self) -> None:
        """Run until no machine is left."""
        poll, pause = select.poll(), 0.1
        sources = {self._wake: self._look_at_services}
        sources[self._link_changes.fileno()] = self._look_at_ports
        sources[self._host_changes.fileno()] = self._look_at_host
        for fd in sources:
            poll.register(fd, select.POLLIN)
        todo = set(sources.values())
        while True:
            todo = {task for task in todo if not _done(task)}
            pause = min(pause * 2, 2.0) if todo else 0.1
            for fd, _ in poll.poll(pause * 1000 if todo else None):
                told = _drain(fd)
                if fd == self._wake and signal.SIGHUP in told:
                    self._name_server.hang_up()
                todo.add(sources[fd])
                pause = 0.05

    def _look_at_services(self) -> bool:
        """Restart services that have exited."""
        reaped = []
        while True:
            try:
                pid = os.waitpid(-1, os.WNOHANG)[0]
            except ChildProcessError:
                pid = 0
            if not pid:
                break
            reaped.append(pid)
        services = self._nat, self._name_server
        for service in services:
            service.note_end(reaped)
        up = [_done(service.is_up) for service in services]
        return all(up)

    def _look_at_ports(self) -> bool:
        """Exit after the last machine; remove the names of a machine that has ended."""
        ports = netns.ports()
        if ports and ports >= self.known:
            self.known = ports
            return True
        try:
            with Lock(self.book.file("lock"), wait=False) as lock:
                if not lock.held:
                    return False
                ports = netns.ports()
                if not ports:
                    self.end()
                names.publish(self.book, ports)
                self._name_server.hang_up()
                self.known = ports
                return True
        except FileNotFoundError:  # the state directory is gone
            if not ports:
                self.end()
            return False

    def end(self) -> None:
        """Remove the veth first: the kernel would do it too late for an immediate next router."""
        with contextlib.suppress(OSError):
            os.unlink(self.book.file("router"))  # so that no call considers this router alive
        with contextlib.suppress(Failure):
            tools.call("ip", "link", "del", UPLINK)
        os._exit(0)

    def _look_at_host(self) -> bool:
        """Follow the host's addresses; restore the veth if it was deleted."""
        time.sleep(0.05)  # many change at a time
        self.block_host()
        if self.link in netns.inside(self.host, lambda: " ".join(netns.interfaces())).split():
            return True
        with Lock(self.book.file("lock"), wait=False) as lock:
            if lock.held and netns.ports():
                uplink.connect(self.host, self.link, self.subnets, move=False)
                self._route_to_host()
                return True
        return False

    def block_host(self) -> None:
        found = netns.inside(self.host, lambda: "\n".join(uplink.host_addresses()))
        own = f"{self.subnets.link}.0/24"
        if found != self._blocked:
            text = firewall.host_addresses([own, *found.split("\n")])
            tools.call("nft", "-f", "-", text=text)
            self._blocked = found


def _done(task: Callable[[], bool]) -> bool:
    try:
        return task()
    except (OSError, Failure):
        return False  # a full disk, or too many processes: later


def _watch(groups: int) -> socket.socket:
    watch = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
    watch.bind((0, groups))
    return watch


def _drain(fd: int) -> bytes:
    told = b""
    try:
        while True:
            told += os.read(fd, 65536)
    except OSError:  # nothing is left, or its buffer overflowed
        return told


def _catch_signals() -> int:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    return reader


def _fork(become: Callable[[], None], log: int) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until dnsmasq listens
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            become()
        except BaseException as error:
            os.write(log, netns.reason(error).encode(errors="replace"))
        finally:
            os._exit(127)
    return pid


def _execute(tool: tools.Tool, words: list[str], log: int) -> None:
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.execve(tool.path, [tool.path, *words], tool.environment)


def _open_log() -> int:
    """Space for a program's errors when it fails to start; later output is dropped."""
    log = os.memfd_create("log", 2)  # MFD_ALLOW_SEALING
    os.truncate(log, 4096)
    fcntl(log, 1033, 2 | 4)  # F_ADD_SEALS: neither smaller nor larger
    return log


def _read_log(log: int) -> str:
    lines = os.pread(log, 4096, 0).replace(b"\0", b"").decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "does not start")
