"""Connecting a machine to the network while it is made, in a process that does nothing else."""

from __future__ import annotations

import os

from .linux import end_with_parent

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from .world import Plan

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def wire(plan: Plan, state: str, told: int, report: int, orders: int) -> NoReturn:
    """Connect the machine whose first process comes over `told`; then say ``joined``.

    What it needs is loaded while that process is made. Files that the network needs in the machine
    go to `orders`.
    """
    try:
        end_with_parent()
        os.environ["PATH"] = _PATH
        from .network import Network, guest_files

        pid = os.read(told, 20)
        if pid:
            namespace = os.open(f"/proc/{int(pid)}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            isolated = plan.fields.get("isolate_network") == "true"
            its = Network(state).join(plan.id, plan.fields["name"], namespace, isolated)
            words = (word for pair in guest_files(its).items() for word in pair)
            os.write(orders, "".join(f"{word}\0" for word in words).encode())
            os.write(report, b"joined\n")
    except ImportError:
        os.write(report, b"joined\n")
    except BaseException as error:
        os.write(report, f"error {error}\n".encode(errors="surrogateescape"))
    os._exit(0)


def unwire(plan: Plan, state: str) -> None:
    """Give its place in the network up; in a child, with which ends what that loads."""
    pid = os.fork()
    if pid == 0:
        try:
            os.environ["PATH"] = _PATH
            from .network import Network

            Network(state).leave(plan.id)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
