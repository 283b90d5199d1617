"""The `create` command. The machine's supervisor starts while the rest is prepared."""

from __future__ import annotations

import os

from .state import home, new_id

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .cli import Options


def create(options: Options, words: list[str]) -> int:
    ident = new_id()
    if os.environ.get("ORBCTL_SIMULATOR_INIT") == "none":
        from . import lifecycle

        return lifecycle.create(options, words, ident)
    from .supervisors import Supervisor

    with Supervisor(os.path.join(home(), "machines", ident)) as supervisor:
        from . import lifecycle

        return lifecycle.create(options, words, ident, supervisor)
