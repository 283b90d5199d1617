"""Waiting for machines: until one answers, until cloud-init is done, until its state settles.

shell/machines.sh does the same for operations, which wait on another host.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import gevent

from pyinfra_orbstack import orbctl, shell
from pyinfra_orbstack.answers import Machine, OrbctlError

#: Seconds between two checks; waiting for one host must not keep others waiting.
PAUSE = 0.5
#: States in which OrbStack accepts commands; in any other state it is busy with the machine.
SETTLED = ("running", "stopped")

T = TypeVar("T")


def until(attempt: Callable[[], T], failure: type[Exception], deadline: float) -> T:
    """Retry something until it succeeds or the deadline passes; then raise the last failure.

    Args:
        attempt: The function to call.
        failure: The exception that leads to another attempt.
        deadline: Point of `time.monotonic`.
    """
    while True:
        try:
            return attempt()
        except failure:
            if time.monotonic() >= deadline:
                raise
        gevent.sleep(PAUSE)


class Busy(OrbctlError):
    """OrbStack is busy with the machine."""


def settled(client: orbctl.Orbctl, name: str, deadline: float) -> Machine:
    """A machine once it is not being created, started or stopped.

    Raises:
        MachineNotFound: It does not exist, or disappeared meanwhile.
        Busy: It took too long.
    """

    def look() -> Machine:
        machine = client.info(name)
        if machine.state not in SETTLED:
            raise Busy(
                f"machine {name!r} is still {machine.state}: wait until it has finished, "
                "or increase orbstack_boot_timeout"
            )
        return machine

    return until(look, Busy, deadline)


def until_it_answers(client: orbctl.Orbctl, name: str, seconds: float) -> None:
    """Wait until a machine runs commands."""
    args = orbctl.run_args(name, ["true"])
    until(lambda: client.call(*args), OrbctlError, time.monotonic() + seconds)


def cloud_init() -> str:
    """Shell text that waits for cloud-init in a machine, and fails with cloud-init's message."""
    return shell.text("cloud-init")
