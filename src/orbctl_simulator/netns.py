"""Work in another network namespace: in a child, so that this process never loses its own."""

from __future__ import annotations

import os
from fcntl import ioctl

from .linux import setns, unshare
from .state import Failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
_NS_GET_NSTYPE = 0xB703

# Where root of the router's user namespace is on the host: nobody, and no machine's root.
_OWNER = "0 1100000 65536\n"


def check(netns: int) -> None:
    """Refuse what is no network namespace, or the one that we are in: it would be set up itself."""
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
    """What `work` returns when a child does it in there; a failure there is a failure here."""
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


def create() -> tuple[int, int]:
    """A new user namespace and a network namespace that it owns."""
    ready, report = os.pipe()
    waits, go_on = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(ready)
            os.close(go_on)
            unshare(CLONE_NEWUSER)
            os.write(report, os.readlink("/proc/self").encode() + b"\n")
            os.read(waits, 1)
            unshare(CLONE_NEWNET)
            os.write(report, b"ok\n")
            os.read(waits, 1)
        except OSError as error:
            os.write(report, f"{error}\n".encode())
        finally:
            os._exit(0)
    os.close(report)
    os.close(waits)
    try:
        with open(ready) as answers:
            pid = answers.readline().strip()
            if not pid.isdigit():
                raise Failure(f"this host allows no user namespaces ({pid})")
            for name in ("gid_map", "uid_map"):
                with open(f"/proc/{pid}/{name}", "w") as file:
                    file.write(_OWNER)
            os.write(go_on, b"!")
            answer = answers.readline().strip()
            if answer != "ok":
                raise Failure(f"this host allows no network namespaces ({answer})")
            user = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY)
            return user, os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    finally:
        os.close(go_on)
        os.waitpid(child, 0)


def set_sysctls(values: dict[str, str]) -> None:
    """Of the namespace that this process is in; a kernel that lacks one needs no setting."""
    for name, value in values.items():
        try:
            with open(f"/proc/sys/net/{name}", "w") as file:
                file.write(value)
        except FileNotFoundError:
            continue


def has_ipv6() -> bool:
    return os.path.exists("/proc/net/if_inet6")


def interfaces() -> set[str]:
    """Of the namespace that this process is in."""
    import socket

    return {name for _, name in socket.if_nameindex()}


def ports() -> set[str]:
    """The machines' ports, in a router's namespace."""
    return {name for name in interfaces() if name[0] == "m" and name[1:].isdigit()}
