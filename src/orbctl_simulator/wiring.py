"""Connecting a machine to the network, in a process of its own."""

from __future__ import annotations

import os

from .linux import end_with_parent

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from .addresses import Addresses
    from .bootplan import Plan

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def connect(plan: Plan, told: int, report: int, orders: int) -> NoReturn:
    """Connect the machine whose first process is read from `told`.

    It reports ``joined``, when files that the network needs in the machine have been written to
    `orders`, then ``named``. Imports happen while the machine is built.
    """
    is_connected = False

    def connected(addresses: Addresses) -> None:
        nonlocal is_connected
        if not is_connected:  # else by a router that was killed, and the machine boots already
            is_connected = True
            words = (word for pair in guest_files(addresses).items() for word in pair)
            os.write(orders, "".join(f"{word}\0" for word in words).encode())
            os.write(report, b"joined\n")

    try:
        end_with_parent()
        os.environ["PATH"] = _PATH
        import socket  # noqa: F401 for the children of `join`

        from .network import Network, guest_files

        pid = os.read(told, 20)
        if pid:
            namespace = os.open(f"/proc/{int(pid)}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            isolated = plan.fields.get("isolate_network") == "true"
            Network(plan.state).join(plan.id, plan.name, namespace, isolated, connected)
            os.write(report, b"named\n")
    except BaseException as error:
        os.write(report, f"error {error}\n".encode(errors="surrogateescape"))
    os._exit(0)


def disconnect(plan: Plan) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            os.environ["PATH"] = _PATH
            from .network import Network

            Network(plan.state).leave(plan.id)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
