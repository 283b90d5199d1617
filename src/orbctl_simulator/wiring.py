"""Connecting a machine to the network, in a separate process."""

from __future__ import annotations

import os

from .linux import end_with_parent

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from .addresses import Addresses
    from .bootplan import Plan

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def connect(plan: Plan, network: int, report: int, orders: int) -> NoReturn:
    """Connect the machine through its network namespace, while it is built.

    Reports ``joined`` once the machine has its ``eth0``, and the files that the network needs in
    it are written to `orders`. Reports ``named`` once its network is complete.
    """

    def connected(addresses: Addresses) -> None:
        words = (word for pair in guest_files(addresses).items() for word in pair)
        try:  # noqa: SIM105 contextlib is slow to import
            os.write(orders, "".join(f"{word}\0" for word in words).encode())
        except BrokenPipeError:
            pass  # the machine already boots, or building it has failed, which is reported
        os.write(report, b"joined\n")

    try:
        end_with_parent()
        os.environ["PATH"] = _PATH
        from .network import Network, guest_files

        isolated = plan.fields.get("isolate_network") == "true"
        Network(plan.state).join(plan.id, plan.name, network, isolated, connected)
        os.write(report, b"named\n")
    except BaseException as error:
        os.write(report, f"error {error}\n".encode(errors="surrogateescape"))
    os._exit(0)


def disconnect(plan: Plan) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            end_with_parent()
            os.environ["PATH"] = _PATH
            from .network import Network

            Network(plan.state).leave(plan.id)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
