"""Calls of the simulator's network, each in a separate process, as from commands.

``python -m tests.simulator.network.calls STATE join ID NAME PID [isolated]``, and the like.
"""

from __future__ import annotations

import os
import sys
import time

from orbctl_simulator.addresses import AddressBook
from orbctl_simulator.network import Network, available
from orbctl_simulator.state import Failure


def main() -> int:
    state, verb, *words = sys.argv[1:]
    os.umask(0o022)
    network = Network(state)
    try:
        if verb == "join":
            ident, name, pid, *isolated = words
            namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
            begun = time.monotonic()
            its = network.join(ident, name, namespace, bool(isolated))
            print(its.ip4, its.ip6 or "-", its.mac, f"{time.monotonic() - begun:.3f}")
        elif verb == "available":
            print(available() or "")
        elif verb == "link":
            print(AddressBook(state).link)
        elif verb == "sweep":
            network.sweep(set(words) if words else None)
        elif verb == "connected":
            print(network.connected(*words))
        elif verb == "addresses":
            its_own = network.addresses(*words)
            print(f"{its_own.ip4} {its_own.ip6}" if its_own else "none")
        else:
            {"leave": network.leave, "rename": network.rename, "forget": network.forget}[verb](
                *words
            )
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
