"""Machines on connect: found, created, started, waited for, and removed if that fails."""

from __future__ import annotations

import contextlib
import os
import shlex
import time
from collections.abc import Iterator
from typing import Protocol

from pyinfra import logger
from pyinfra.api.exceptions import ConnectError
from pyinfra.progress import progress_spinner

from pyinfra_orbstack import docker, interrupts, inventory, making, orbctl, waiting
from pyinfra_orbstack.places import place_of
from pyinfra_orbstack.record import Record
from pyinfra_orbstack.runner import CommandTimeout, Runner
from pyinfra_orbstack.session import NotStarted
from pyinfra_orbstack.specification import (
    MachineSpec,
    Settings,
    check_image,
    expanded,
    read_cloud_init,
)
from pyinfra_orbstack.targets import ContainerTarget, MachineTarget, Target


class OpenRunner(Protocol):
    """Opens the first session in a target, and returns a runner for its commands."""

    def __call__(self, target: Target, *, anywhere: bool = False) -> Runner:
        """Open it in the working directory of the host's data, or ``anywhere``."""


class Provision:
    """Makes the target of one host ready for commands.

    Args:
        settings: The settings in the host's data that say how to reach it.
        open_runner: Called to open the first session in a target.
        prefix: Prefix of each log line.

    Every method raises `ConnectError`, `OrbctlError` or `OSError`, with a one-line message.
    """

    def __init__(self, settings: Settings, *, open_runner: OpenRunner, prefix: str = "") -> None:
        self._settings = settings
        self._place = place_of(settings.ssh)
        self._open_runner = open_runner
        self._prefix = prefix

    def container(self, name: str) -> None:
        """Make a container ready; it is started if needed, never created."""
        engine = docker.Docker(self._place)
        try:
            container = engine.inspect(name)
        except docker.ContainerNotFound:
            raise ConnectError(
                f"there is no container {name!r}{inventory.known(engine.containers())}"
            ) from None
        self._start(ContainerTarget(engine, container))
        self._wait(ContainerTarget(engine, container), 0.0)

    def machine(self, spec: MachineSpec) -> None:
        """Make a machine ready; create it if it does not exist and its data says how."""
        client, name = orbctl.Orbctl(place=self._place), spec.name
        # A shell in it is enough, unless there is more to wait for. It may have stopped since it
        # was listed; then a shell would start it, or fail because it is gone.
        pending = _has_intents(name)
        if self._settings.may_start and not spec.cloud_init and not pending:
            listed = inventory.just_listed(name, self._place)
            if listed is not None:
                target = MachineTarget(client, listed)
                with contextlib.suppress(NotStarted), progress_spinner({f"waiting for {target}"}):
                    self._open_runner(target)
                    return
        try:
            machine = client.info(name)
            if pending:
                self._resolve_intents(client, name)
            self._ensure_ready(client, machine, spec)
        except orbctl.MachineNotFound:
            self._create_and_start(client, spec)

    def _resolve_intents(self, client: orbctl.Orbctl, name: str) -> None:
        """Check whether the machine is one that an earlier run created but could not record."""
        record = Record.from_environment()
        # The state of the record does not decide whether the machine is usable.
        with contextlib.suppress(orbctl.OrbctlError):
            for line in record.settle(client, only=name) if record else ():
                self._warn(line)

    def _create_and_start(self, client: orbctl.Orbctl, spec: MachineSpec) -> None:
        self._check_creation(client, spec)
        with self._there(spec) as args:
            if self._make(client, spec, args):
                return
        self._ensure_ready(client, client.info(spec.name), spec)

    @contextlib.contextmanager
    def _there(self, spec: MachineSpec) -> Iterator[list[str]]:
        """The arguments that create the machine where `orbctl` is, with a copy of its files."""
        if not self._place.far:
            yield spec.create_args(here=True)
            return
        lent = ""
        try:
            if spec.cloud_init:
                lent = self._place.lend(read_cloud_init(spec.cloud_init).encode())
            yield spec.at(self._place, lent).create_args(here=True)
        finally:
            if lent:
                self._place.take_back(lent)

    def _make(self, client: orbctl.Orbctl, spec: MachineSpec, args: list[str]) -> bool:
        """Create the machine and make it ready; False if another process has created it."""
        made = making.Making(client, spec.name, args, Record.from_environment())
        with interrupts.at_interrupt(made.give_up):
            try:
                with progress_spinner({f"creating {spec.name} from {spec.image}"}):
                    machine = made.finish(orbctl.CREATE_TIMEOUT, self._warn)
                logger.info(f"{self._prefix}created machine {spec.name} from {spec.image}")
                for difference in spec.unlike(machine.distro, machine.version, machine.arch):
                    self._warn(f"machine {spec.name} was created, but {difference}")
                self._ensure_ready(client, machine, spec)
                return True
            except orbctl.MachineExists:
                # Someone else created it first; it is theirs, and good enough to connect to.
                return False
            except BaseException:
                made.undo(self._warn)
                raise

    def _check_creation(self, client: orbctl.Orbctl, spec: MachineSpec) -> None:
        """Check that the machine can be created, and may be."""
        if not spec.image:
            raise ConnectError(
                f"there is no machine {spec.name!r}{inventory.known(client.machines())}: "
                "to create it, set orbstack_image in its data"
            )
        spec.check_files(mounts=not self._place.far)
        if not self._settings.may_create:
            # In a deploy `orbctl` itself knows its images; a plan cannot ask it.
            check_image(spec.image)
            first, line = self._steps(client, spec)
            raise ConnectError(
                f"there is no machine {spec.name!r} and it may not be created now; "
                f"to create it, {first}run: {line}"
            )

    def _steps(self, client: orbctl.Orbctl, spec: MachineSpec) -> tuple[str, str]:
        """How the user can create the machine: what to do first, and the command line."""
        first = ""
        if self._place.far:
            copy = ""
            if spec.cloud_init:
                path = expanded("cloud_init", spec.cloud_init)
                copy = self._place.mac_path(f"~/{os.path.basename(path)}")
                first = f"copy {path} to {shlex.quote(copy)} on {self._place.name}, then "
            spec = spec.at(self._place, copy)
        return first, client.line(spec.create_args(here=True))

    def _warn(self, line: str) -> None:
        logger.warning(f"{self._prefix}{line}")

    def _ensure_ready(
        self, client: orbctl.Orbctl, machine: orbctl.Machine, spec: MachineSpec
    ) -> None:
        deadline = time.monotonic() + self._settings.boot_timeout
        machine = self._settled(client, machine, deadline)
        try:
            self._start(MachineTarget(client, machine))
        except orbctl.OrbctlError:
            # Another process may have started it, or be starting it.
            if self._settled(client, client.info(machine.name), deadline).state != "running":
                raise
        target = MachineTarget(client, machine)
        # Cloud-init may create the directory in which commands start.
        runner = self._wait(target, deadline, anywhere=bool(spec.cloud_init))
        if spec.cloud_init:
            with progress_spinner({f"waiting for cloud-init in {machine.name}"}):
                _wait_for_cloud_init(runner, deadline)
            if self._settings.workdir is not None:
                self._open_runner(target)

    def _settled(
        self, client: orbctl.Orbctl, machine: orbctl.Machine, deadline: float
    ) -> orbctl.Machine:
        if machine.state in waiting.SETTLED:
            return machine
        with progress_spinner({f"waiting for machine {machine.name!r}, {machine.state}"}):
            return waiting.settled(client, machine.name, deadline)

    def _start(self, target: Target) -> None:
        if target.state == "running":
            return
        if not self._settings.may_start:
            raise ConnectError(
                f"{target} is {target.state} and may not be started now; "
                f"to start it, run: {target.start_line()}"
            )
        with progress_spinner({f"starting {target}"}):
            target.start()

    def _wait(self, target: Target, deadline: float, *, anywhere: bool = False) -> Runner:
        with progress_spinner({f"waiting for {target}"}):
            try:
                return waiting.until(
                    lambda: self._open_runner(target, anywhere=anywhere), NotStarted, deadline
                )
            except NotStarted as silent:
                reason = target.explain(str(silent))
                raise ConnectError(f"{target} does not answer: {reason}") from None


def _has_intents(name: str) -> bool:
    record = Record.from_environment()
    with contextlib.suppress(orbctl.OrbctlError):
        return record is not None and any(one.name == name for one in record.intents())
    return False


def _wait_for_cloud_init(runner: Runner, deadline: float) -> None:
    try:
        status, output = runner.run_lines(
            waiting.cloud_init(), timeout=max(1.0, deadline - time.monotonic())
        )
    except CommandTimeout:
        raise ConnectError(
            "cloud-init did not finish in time: increase orbstack_boot_timeout"
        ) from None
    if status != 0:
        raise ConnectError(f"cloud-init failed: {' '.join(output.output.split())}")
