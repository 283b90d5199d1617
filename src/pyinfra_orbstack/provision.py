"""Machines on connect: found, created, started, waited for, and removed when that fails."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from pyinfra import logger
from pyinfra.api.exceptions import ConnectError
from pyinfra.progress import progress_spinner

from pyinfra_orbstack import docker, inventory, orbctl
from pyinfra_orbstack.record import Record
from pyinfra_orbstack.runner import Runner
from pyinfra_orbstack.session import NotStarted
from pyinfra_orbstack.targets import ContainerTarget, MachineTarget, Target


class Provision:
    """Makes the target of one host ready for commands.

    Args:
        data: The host's `orbstack_*` data.
        may_create: Whether a machine may be created.
        may_start: Whether a target may be started.
        open_runner: Opens the first session in a target, and returns what runs commands there.
        prefix: What stands before each line that is logged.

    Every method raises `ConnectError`, `OrbctlError` or `OSError`, with one line.
    """

    def __init__(
        self,
        data: Mapping[str, Any],
        *,
        may_create: bool,
        may_start: bool,
        open_runner: Callable[[Target], Runner],
        prefix: str = "",
    ) -> None:
        self._data = data
        self._may_create = may_create
        self._may_start = may_start
        self._open_runner = open_runner
        self._prefix = prefix

    def container(self, name: str) -> None:
        """Make a container ready; it is started at most."""
        engine = docker.Docker()
        try:
            container = engine.inspect(name)
        except docker.ContainerNotFound:
            raise ConnectError(
                f"there is no container {name!r}{inventory.known(engine.containers())}"
            ) from None
        self._ensure_ready(ContainerTarget(engine, container))

    def machine(self, name: str) -> None:
        """Make a machine ready; it is created where it does not exist and its data say how."""
        orbctl.check_name(name)
        client = orbctl.Orbctl()
        # A shell in it is all it takes, unless there is more to wait for. It may have ended since
        # it was listed; then a shell would start it, or there is none.
        if self._may_start and not self._data["orbstack_cloud_init"]:
            listed = inventory.just_listed(name)
            if listed is not None:
                target = MachineTarget(client, listed)
                with contextlib.suppress(NotStarted), progress_spinner({f"waiting for {target}"}):
                    self._open_runner(target)
                    return
        machine, made = self._ensure_exists(client, name)
        try:
            self._ensure_ready(MachineTarget(client, machine))
        except BaseException:
            if made:
                self._remove(client, machine)
            raise

    def _ensure_exists(self, client: orbctl.Orbctl, name: str) -> tuple[orbctl.Machine, bool]:
        """Return the machine, and whether it was made just now."""
        with contextlib.suppress(orbctl.MachineNotFound):
            return client.info(name), False
        data, image = self._data, self._data["orbstack_image"]
        if not image:
            raise ConnectError(
                f"there is no machine {name!r}{inventory.known(client.machines())}; "
                "to have it created, set orbstack_image in its data"
            )
        args = orbctl.create_args(
            name,
            image,
            arch=data["orbstack_arch"],
            user=data["orbstack_create_user"],
            cloud_init=data["orbstack_cloud_init"],
            isolated=data["orbstack_isolated"],
            isolate_network=data["orbstack_isolate_network"],
            mounts=data["orbstack_mounts"],
            cpus=data["orbstack_cpus"],
            memory=data["orbstack_memory"],
            disk=data["orbstack_disk"],
        )
        if not self._may_create:
            raise ConnectError(
                f"there is no machine {name!r} and it may not be created now; "
                f"this makes it: {orbctl.shell_line(args)}"
            )
        began = time.time()
        try:
            with progress_spinner({f"creating {name} from {image}"}):
                client.create(args)
        except orbctl.MachineExists:
            # Somebody else was faster; it is theirs, and good enough to connect to.
            return client.info(name), False
        except BaseException:
            self._remove_half_made(client, name, began)
            raise
        machine = client.info(name)
        record = Record.from_environment()
        if record:
            record.add(machine)
        logger.info(f"{self._prefix}created machine {name} from {image}")
        return machine, True

    def _remove_half_made(self, client: orbctl.Orbctl, name: str, began: float) -> None:
        with contextlib.suppress(orbctl.OrbctlError):
            machine = client.info(name)
            # The name was free before, so a machine younger than our call is what it left.
            if machine.created and machine.created.timestamp() >= began:
                self._remove(client, machine)

    def _remove(self, client: orbctl.Orbctl, machine: orbctl.Machine) -> None:
        try:
            client.delete(machine.name, machine.id)
        except orbctl.OrbctlError as broken:
            logger.warning(
                f"{self._prefix}machine {machine.name} was made and cannot be used; "
                f"deleting it failed too: {broken}"
            )
            return
        record = Record.from_environment()
        if record:
            record.forget(machine.id)

    def _ensure_ready(self, target: Target) -> None:
        deadline = time.monotonic() + self._data["orbstack_boot_timeout"]
        if target.state != "running":
            if not self._may_start:
                raise ConnectError(
                    f"{target} is {target.state} and may not be started now; "
                    f"this starts it: {target.start_line()}"
                )
            with progress_spinner({f"starting {target}"}):
                target.start()
        with progress_spinner({f"waiting for {target}"}):
            while True:
                try:
                    runner = self._open_runner(target)
                    break
                except NotStarted as silent:
                    if not target.boots or time.monotonic() > deadline:
                        reason = target.explain(str(silent))
                        raise ConnectError(f"{target} does not answer: {reason}") from None
                    time.sleep(0.5)
            if self._data["orbstack_cloud_init"]:
                _wait_for_cloud_init(runner, deadline)


def _wait_for_cloud_init(runner: Runner, deadline: float) -> None:
    status, output = runner.run_lines(
        "command -v cloud-init >/dev/null || exit 0; cloud-init status --wait",
        timeout=max(1.0, deadline - time.monotonic()),
    )
    # 2 means that it is done, with warnings.
    if status not in (0, 2):
        raise ConnectError(f"cloud-init failed: {output.output}")
