"""Work in another network namespace: in a child, so that this process never loses its own."""

from __future__ import annotations

import _socket
import os
from fcntl import ioctl

from .linux import setns
from .state import Failure
from .userns import CLONE_NEWNET

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_NS_GET_NSTYPE = 0xB703
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _NAME_SIZE, _REQUEST_SIZE, _UP = 0x8913, 0x8914, 16, 40, 1


def check(netns: int) -> None:
    """Reject anything that is not a network namespace, and the current one, to protect the host."""
    try:
        kind = ioctl(netns, _NS_GET_NSTYPE)
    except OSError:
        kind = 0
    if kind != CLONE_NEWNET:
        raise Failure("not a network namespace")
    if os.path.samestat(os.fstat(netns), os.stat("/proc/self/ns/net")):
        raise Failure("the host's own network cannot be a machine's")


def enter(netns: int) -> None:
    check(netns)
    setns(netns)


def inside(netns: int, work: Callable[[], str | None]) -> str:
    """Run `work` there, in a child. Returns its result, and raises its failure."""
    answer, report = os.pipe()
    child = os.fork()
    if child == 0:
        text = "-"
        try:
            os.close(answer)
            enter(netns)
            text = "+" + (work() or "")
        except BaseException as error:
            text = f"-{reason(error)}"
        finally:
            _write_all(report, text.encode(errors="surrogateescape"))
            os._exit(0)
    os.close(report)
    with open(answer, encoding="utf-8", errors="surrogateescape") as file:
        text = file.read()
    os.waitpid(child, 0)
    if not text.startswith("+"):
        raise Failure(text[1:] or "a helper process was killed")
    return text[1:]


def reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def set_sysctls(values: dict[str, str]) -> None:
    """Set them in this process's namespace, skipping those that this kernel does not have."""
    for name, value in values.items():
        try:
            with open(f"/proc/sys/net/{name}", "w") as file:
                file.write(value)
        except FileNotFoundError:
            continue


def has_ipv6() -> bool:
    return os.path.exists("/proc/net/if_inet6")


def interfaces() -> set[str]:
    """The interfaces in this process's namespace."""
    return {name for _, name in _socket.if_nameindex()}


def set_up(name: str) -> None:
    """Set up an interface in this process's namespace."""
    channel = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
    told = os.fsencode(name).ljust(_NAME_SIZE, b"\0") + bytes(_REQUEST_SIZE - _NAME_SIZE)
    answer = bytearray(ioctl(channel.fileno(), _SIOCGIFFLAGS, told))
    answer[_NAME_SIZE] |= _UP
    ioctl(channel.fileno(), _SIOCSIFFLAGS, bytes(answer))
    channel.close()


def ports() -> set[str]:
    """The machines' ports, in the router's namespace."""
    return {name for name in interfaces() if name[0] == "m" and name[1:].isdigit()}
