"""What all OrbStack operations share: how they refuse, and how they read facts."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

from pyinfra import host, logger, state
from pyinfra.api import (
    FactError,
    OperationError,
    OperationValueError,
    QuoteString,
    StringCommand,
    operation,
)
from pyinfra.api.exceptions import PyinfraError
from typing_extensions import ParamSpec

from pyinfra_orbstack import orbctl, specification, targets, waiting
from pyinfra_orbstack.facts.orbstack import (
    MachineData,
    OrbStackMachines,
    OrbStackVersion,
    SettledMachine,
)

if TYPE_CHECKING:
    from pyinfra.api.arguments_typed import PyinfraOperation
    from pyinfra.api.facts import FactBase

P = ParamSpec("P")
T = TypeVar("T")
Commands = Generator[StringCommand, None, None]


class Refused(OperationError):
    """The host's current state does not allow this, or cannot be determined."""


class PreconditionMissing(Refused):
    """Something is missing, or in the way, that an earlier operation may take care of."""


def orbstack_operation(
    is_idempotent: bool = True, idempotent_notice: str | None = None, anywhere: bool = False
) -> Callable[[Callable[P, Commands]], PyinfraOperation[P]]:
    """pyinfra's decorator, for operations that raise `Refused` and `orbctl.BadValue`.

    ``anywhere``: the operation does not call `orbctl`, so it may target a machine.
    """

    def decorate(function: Callable[P, Commands]) -> PyinfraOperation[P]:
        @operation(is_idempotent=is_idempotent, idempotent_notice=idempotent_notice)
        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> Commands:
            try:
                if targets.meaning(host) and not anywhere:
                    raise Refused(
                        f"{function.__name__} must run on the OrbStack host, and {host.name} is "
                        "inside OrbStack: target @local, or the Mac over SSH"
                    )
                yield from function(*args, **kwargs)
            except (Refused, orbctl.BadValue) as refused:
                # While operations run, an exception would end the run of every host with a
                # traceback. A host that a fact has already failed must fail alone in any case.
                if state.is_executing or host in getattr(state, "failed_hosts", ()):
                    yield fail(str(refused))
                elif isinstance(refused, PreconditionMissing):
                    # Nothing that this run does has started, and this operation runs nothing.
                    logger.warning(
                        f"{host.print_prefix}{refused}; this operation fails unless an earlier one "
                        "changes that"
                    )
                    yield fail(str(refused))
                elif isinstance(refused, Refused):
                    raise OperationError(str(refused)) from None
                else:
                    raise OperationValueError(str(refused)) from None

        return run

    return decorate


def fail(reason: str) -> StringCommand:
    """A command that only fails, and says why."""
    return StringCommand("printf '%s\\n'", QuoteString(reason), ">&2; exit 1", _sudo=False)


# Current state ----------------------------------------------------------------------------------


def ask(fact: type[FactBase[T]], *, timeout: float = 0, **arguments: Any) -> T:
    """A fact of the OrbStack host; a failed read never looks like an empty result."""
    known: T | None = None
    timeout = int(timeout or 2 * orbctl.READ_TIMEOUT)
    try:
        known = host.get_fact(fact, **arguments, _sudo=False, _timeout=timeout)
    except FactError as failed:  # pragma: no cover: before pyinfra 3.6; later it fails the host
        raise Refused(str(failed)) from None
    except PyinfraError:
        # No host is left. While operations run, pyinfra notices after this one; an exception
        # raised from here would surface as a traceback.
        if not state.is_executing:
            raise
    if known is None:
        raise Refused(
            f"{fact.__name__} could not be read from orbctl (see above); nothing was changed"
        )
    return known


def machines_there() -> dict[str, MachineData]:
    """All machines by name."""
    return ask(OrbStackMachines, addresses=False)


def patience() -> int:
    """Seconds to wait for a machine."""
    key = "orbstack_boot_timeout"
    seconds: float = specification.check_data({key: host.data.get(key)}, [key])[key]
    return math.ceil(seconds)


def settled(found: MachineData) -> MachineData | None:
    """A machine once OrbStack is no longer busy with it; None if it disappears meanwhile."""
    if found["state"] in waiting.SETTLED:
        return found
    logger.info(f"{host.print_prefix}machine {found['name']} is {found['state']}: waiting for it")
    seconds = patience()
    # The last query may run twice.
    limit = seconds + 2 * orbctl.READ_TIMEOUT
    now = ask(SettledMachine, timeout=limit, machine=found["name"], seconds=seconds)
    if now and now["state"] not in waiting.SETTLED:
        raise Refused(
            f"machine {now['name']} is still {now['state']} after {seconds} s: wait until it has "
            "finished, or increase orbstack_boot_timeout"
        )
    return now or None  # type: ignore[return-value]


def look(name: str) -> MachineData | None:
    """The machine of that name, or None."""
    found = machines_there().get(name)
    return None if found is None else settled(found)


def existing(name: str, machines: dict[str, MachineData] | None = None) -> MachineData:
    """The machine of that name, which an earlier operation may have to create."""
    orbctl.check_name(name)
    machines = machines_there() if machines is None else machines
    found = settled(machines[name]) if name in machines else None
    if found is None:
        names = sorted(set(machines) - {name})
        known = f"existing: {', '.join(names)}" if names else "none exists"
        raise PreconditionMissing(f"there is no machine {name!r} ({known})")
    return found


def require(version: str, **wanted: Any) -> None:
    """Refuse the given options if this OrbStack is too old for them."""
    named = [what for what, value in wanted.items() if value]
    if named and not is_at_least(version):
        raise Refused(
            f"OrbStack {version} is required for {', '.join(named)}, and this is "
            f"{ask(OrbStackVersion)}: update it, or do without"
        )


def is_at_least(version: str) -> bool:
    """Whether this OrbStack has that version or a later one."""
    here, there = (
        [int(number) for number in one.split(".")[:2]] for one in (ask(OrbStackVersion), version)
    )
    return here >= there
