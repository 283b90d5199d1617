"""The results of a pyinfra run, operation by operation, however it was started.

This module reads only pyinfra's public state: callbacks for the times, and at the end the status
that each operation reports. `record` is for deploys that run in a process of their own.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyinfra.api.state import BaseStateCallback
from pyinfra.context import ctx_state

if TYPE_CHECKING:
    from pyinfra.api.host import Host
    from pyinfra.api.state import State


@dataclass(frozen=True)
class Step:
    """One operation on one host.

    + name: its name, as pyinfra shows it
    + host: name of the host
    + changed: whether it ran any command, and all of them succeeded
    + failed: whether a command failed, and the run with it
    + seconds: how long it took
    + output: the output of its commands
    + ignored: whether a command failed and ``_ignore_errors`` let the run continue

    **Example:**

    .. code:: python

        slowest = max(result.steps, key=lambda step: step.seconds)
        print(slowest.name, slowest.seconds)
    """

    name: str
    host: str
    changed: bool
    failed: bool
    seconds: float
    output: str
    ignored: bool = False


@dataclass(frozen=True)
class Result:
    """The result of a run.

    + steps: the operations that ran, in order
    + ok: whether the run completed and nothing failed
    + seconds: how long it took, connecting included
    + log: pyinfra's output

    **Example:**

    .. code:: python

        result = machine.apply("broken.py", check=False)
        assert not result.ok
        assert result.failed == ["Install nginx"]
    """

    steps: Sequence[Step]
    ok: bool
    seconds: float
    log: str

    @property
    def changed(self) -> list[str]:
        """Names of the operations that changed something."""
        return [step.name for step in self.steps if step.changed]

    @property
    def failed(self) -> list[str]:
        """Names of the operations that failed; if there is one, the run is not ok."""
        return [step.name for step in self.steps if step.failed]

    @property
    def ignored(self) -> list[str]:
        """Names of the operations that failed but let the run continue: ``_ignore_errors``."""
        return [step.name for step in self.steps if step.ignored]


class Clock(BaseStateCallback):
    """Times each operation on each host."""

    def __init__(self) -> None:
        self._began: dict[tuple[str, str], float] = {}
        self.seconds: dict[tuple[str, str], float] = {}

    # pyinfra declares its callbacks static, and calls them on the handler.
    def operation_host_start(self, state: State, host: Host, op_hash: str) -> None:  # type: ignore[override]
        """Start the clock."""
        self._began[host.name, op_hash] = time.monotonic()

    def _stop(self, state: State, host: Host, op_hash: str, *_: object) -> None:
        key = host.name, op_hash
        self.seconds[key] = time.monotonic() - self._began.get(key, time.monotonic())

    operation_host_success = operation_host_error = _stop  # type: ignore[assignment]


#: Names of operations, by host and hash.
Names = dict[tuple[str, str], set[str]]


@contextlib.contextmanager
def naming(state: State, host: Host, names: Names) -> Iterator[None]:
    """Note the names of operations that are added for a host in the body.

    Through its API, pyinfra merges the first operations of all hosts into one that has all their
    names, then the second ones, and so on.
    """
    others = {op_hash: set(meta.names) for op_hash, meta in state.op_meta.items()}
    for meta in state.op_meta.values():
        meta.names.clear()
    try:
        yield
    finally:
        for op_hash, meta in state.op_meta.items():
            names[host.name, op_hash] = set(meta.names)
            meta.names.update(others.get(op_hash, ()))


def steps(state: State, clock: Clock, names: Names | None = None) -> list[Step]:
    """The results of a run's operations, without those that it never reached."""
    done = []
    names = names or {}
    for op_hash in state.get_op_order():
        for host in state.inventory:
            op = state.ops[host].get(op_hash)
            if op is None or not op.operation_meta.is_complete():
                continue
            meta = op.operation_meta
            wrong, allowed = not meta.did_succeed(), bool(op.global_arguments["_ignore_errors"])
            done.append(
                Step(
                    name=", ".join(
                        sorted(names.get((host.name, op_hash)) or state.get_op_meta(op_hash).names)
                    ),
                    host=host.name,
                    changed=meta.did_change(),
                    failed=wrong and not allowed,
                    seconds=clock.seconds.get((host.name, op_hash), 0.0),
                    output="\n".join([*meta.stdout_lines, *meta.stderr_lines]),
                    ignored=wrong and allowed,
                )
            )
    return done


def record(path: str) -> None:
    """Write the steps of this run to a file when the process ends.

    Called from a deploy file that `pyinfra` runs before the actual one.
    """
    state = ctx_state.get()
    if any(isinstance(handler, Clock) for handler in state.callback_handlers):
        return  # pyinfra executes a deploy file once for each host.
    clock = Clock()
    state.add_callback_handler(clock)
    atexit.register(
        lambda: Path(path).write_text(json.dumps([asdict(step) for step in steps(state, clock)]))
    )


def read(path: Path) -> list[Step]:
    """Read what `record` wrote; nothing if the run ended before that."""
    return [Step(**step) for step in json.loads(path.read_text())] if path.exists() else []
