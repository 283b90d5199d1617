"""Creates and deletes the machines of a test run."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import pytest

from pyinfra_orbstack import interrupts, making, orbctl, programs, waiting
from pyinfra_orbstack.places import HERE, SSH_VARIABLE
from pyinfra_orbstack.testing import folders


def unavailable(reason: str, what: str = "machines") -> NoReturn:
    """Skip the test, or fail it where machines and containers are required: under CI."""
    if os.environ.get("CI", "").lower() not in ("", "0", "false"):
        pytest.fail(f"no {what}: {reason}", pytrace=False)
    pytest.skip(f"no {what}: {reason}")


class Engine:
    """Creates machines for one process of a run, and records each one immediately."""

    def __init__(self, config: pytest.Config, run: str) -> None:
        self.root = config.rootpath
        self.keep: bool = config.getoption("orbstack_keep")
        self.image: str = config.getoption("orbstack_image") or config.getini("orbstack_image")
        self.run = run
        self._patch = pytest.MonkeyPatch()
        try:
            command = programs.choose_orbctl(config.getoption("orbstack"))
            # The connector reads it, in this process and in child processes.
            self._patch.setenv(orbctl.COMMAND_VARIABLE, command)
            # Machines for tests are on this host.
            self._patch.delenv(SSH_VARIABLE, raising=False)
            self.client = orbctl.Orbctl(command)
            self.client.machines()
        except orbctl.OrbctlError as problem:
            self._patch.undo()
            unavailable(str(problem))
        reach = {orbctl.COMMAND_VARIABLE: command, **programs.settings(command)}
        settings = "".join(f"{name}={value}\n" for name, value in reach.items())
        # Workers share machines, unless each of them was given a simulator of its own.
        self.folder = folders.root() / f"{self.run}-{zlib.crc32(settings.encode()):08x}"
        folders.root().mkdir(parents=True, exist_ok=True)
        with folders.locked(folders.root()):
            if not self.keep:
                sweep(but=self.run)
            self.folder.mkdir(exist_ok=True)
            self._alive = contextlib.ExitStack()
            self._alive.enter_context(folders.locked(self.folder, fcntl.LOCK_SH))
        (self.folder / "settings").write_text(settings)
        self.record = orbctl.Record(self.folder / "machines")

    def close(self) -> None:
        """Release the run."""
        self._alive.close()
        self._patch.undo()

    def make(self, name: str, image: str | None, user: str | None) -> orbctl.Machine:
        """Create a running machine."""
        source = self._base(image or self.image, user)
        name = f"{name}-{secrets.token_hex(4)}"
        machine = self.create(name, orbctl.machine_args("clone", source, name))
        self.client.start(name)
        self.wait(name)
        return machine

    def _base(self, image: str, user: str | None) -> str:
        """Name of a stopped machine to clone, created by the first worker that needs it."""
        key = json.dumps([image, user])
        known = self.folder / "bases"
        known.touch()
        with folders.locked(known):
            bases = dict(line.split("\t") for line in folders.lines(known))
            if key not in bases:
                name = f"base-{self.run}-{secrets.token_hex(4)}"
                args = orbctl.create_args(name, image, user=user)
                try:
                    self.create(name, args)
                    self.wait(name)
                    self.client.stop(name)
                except orbctl.OrbctlError as problem:
                    unavailable(f"{image}: {problem}")
                with known.open("a") as file:
                    file.write(f"{key}\t{name}\n")
                bases[key] = name
        return bases[key]

    def create(self, name: str, args: Sequence[str]) -> orbctl.Machine:
        """Create a machine and record it; remove a half-created one after an interruption."""
        made = making.Making(self.client, name, args, self.record)
        with interrupts.at_interrupt(made.give_up):
            try:
                return made.finish(orbctl.CREATE_TIMEOUT, _tell)
            except BaseException:
                made.undo(_tell)
                raise

    def wait(self, name: str, seconds: float = 120) -> None:
        """Wait until a machine runs commands."""
        waiting.until_it_answers(self.client, name, seconds)


def _tell(line: str) -> None:
    print(line, file=sys.stderr)


def sweep(but: str = "") -> None:
    """Delete the machines that crashed runs left behind."""
    for folder in folders.of_run():
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            if folder.name.partition("-")[0] != but:
                with folders.locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    delete_all(folder)


def delete_all(folder: Path) -> None:
    """Delete the remaining machines of one run, and then its directory."""
    with pytest.MonkeyPatch.context() as patch:
        for line in folders.lines(folder / "settings"):
            patch.setenv(*line.split("=", 1))
        record = orbctl.Record(folder / "machines")
        try:
            # Nothing else gives machines such names.
            record.delete_all(orbctl.Orbctl(place=HERE), names_are_ours=True)
        except orbctl.OrbctlError as problem:
            names = ", ".join(record.names().values())
            print(f"cannot delete {names} (the next run tries again): {problem}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)
