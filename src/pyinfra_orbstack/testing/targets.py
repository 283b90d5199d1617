"""Targets for deploys: what machines and containers in tests share.

The process is never monkey-patched: deploy files run in a process of their own, functions and
operations through pyinfra's API.
"""

from __future__ import annotations

import abc
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar, Union

from pyinfra.api.exceptions import PyinfraError
from pyinfra.api.facts import FactBase
from pyinfra.api.host import Host
from pyinfra.api.state import State

from pyinfra_orbstack import orbctl, process
from pyinfra_orbstack.session import ShellSession
from pyinfra_orbstack.testing import runs
from pyinfra_orbstack.testing.results import Result, Step

#: A deploy file, a deploy function or an operation.
Deploy = Union[str, "os.PathLike[str]", Callable[..., Any]]

Self = TypeVar("Self", bound="Deployable")


class Ran(NamedTuple):
    """The result of a command."""

    status: int
    stdout: str
    stderr: str


class Deployable(abc.ABC):
    """Something that deploys are applied to: one host, or all hosts of an inventory.

    Attributes:
        name: Its name, or their names.
    """

    name: str
    _root: Path
    _run: runs.Run

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.delete()

    @abc.abstractmethod
    def delete(self) -> None:
        """Delete the target."""

    def environment(self) -> dict[str, str]:
        """The environment of that command line, and of a `pyinfra` in a process of its own."""
        env = orbctl.Orbctl.environment()
        env.pop(orbctl.PLAN_VARIABLE, None)
        return env

    # Applying deploys

    def apply(
        self, deploy: Deploy, *args: Any, check: bool = True, timeout: float = 600, **kwargs: Any
    ) -> Result:
        """Apply a deploy and return its result.

        Args:
            deploy: A deploy file, relative to the directory of the project's pytest configuration,
                or a deploy function or operation, which receives the other arguments.
            check: Raise `AssertionError`, with pyinfra's log, if something fails.
            timeout: Time limit for a deploy file, in seconds.
        """
        began = time.monotonic()
        if callable(deploy):
            steps, ok, log = self._run.function(deploy, args, kwargs)
        else:
            path = self._deploy_file(deploy, args, kwargs)
            try:
                steps, ok, log = self._run.file(path, self.environment(), timeout)
            except TimeoutError:
                raise AssertionError(f"{deploy} took more than {timeout:g} s") from None
        result = Result(steps, ok, time.monotonic() - began, log)
        if check and not result.ok:
            raise AssertionError(f"{deploy} failed on {self.name}:\n{result.log}")
        return result

    def _deploy_file(
        self, deploy: str | os.PathLike[str], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Path:
        given = [*map(repr, args), *kwargs]
        if given:
            raise TypeError(
                f"a deploy file takes no arguments, but {deploy} got {', '.join(given)}"
            )
        path = self._root / deploy
        if not path.is_file():
            raise FileNotFoundError(f"there is no deploy file {path}: check its path")
        return path

    def assert_idempotent(
        self, deploy: Deploy, *args: Any, but: Sequence[str] = (), **kwargs: Any
    ) -> Result:
        """Apply a deploy twice and assert that the second run changes nothing.

        Args:
            deploy: As for `apply`, as are the other arguments.
            but: Names of operations that the deploy runs every time; ``Name`` also matches
                ``Deploy | Name``.

        Raises:
            ValueError: The deploy has no operation with one of these names.
        """
        if isinstance(but, str):
            raise TypeError(f"but must be a list of names, not {but!r}")
        self.apply(deploy, *args, **kwargs)
        result = self.apply(deploy, *args, **kwargs)
        names = {name for step in result.steps for name in _names(step)}
        unknown = [name for name in but if name not in names]
        if unknown:
            raise ValueError(
                f"{deploy} has no operation {unknown[0]!r}; use one of {sorted(names)}"
            )
        settled = [step for step in result.steps if not _names(step) & set(but)]
        changed = [step.name for step in settled if step.changed]
        assert not changed, f"the second run of {deploy} changed {changed}"
        return result


def _names(step: Step) -> set[str]:
    """The names of an operation, with and without the deploys that contain it."""
    return {step.name, step.name.rpartition(" | ")[2]}


class Target(Deployable):
    """A single host for deploys: what machines and containers share.

    Attributes:
        name: Its name.
        id: Its id.
        host: Its pyinfra host name.
    """

    #: The group that contains it.
    kind: str

    def __init__(
        self,
        place: str,
        name: str,
        id_: str,
        root: Path,
        groups: runs.Groups,
        data: Mapping[str, Any],
    ) -> None:
        self.name = name
        self.id = id_
        self.host = f"{place}{name}"
        self._root = root
        self.member = runs.Member(self.host, self.kind, runs.check_groups(groups), dict(data))
        self._run = runs.Run(root, [self.member])
        self._connection: tuple[State, list[Host]] | None = None

    @abc.abstractmethod
    def argv(self, *words: str, user: str | None = None, tty: bool = False) -> list[str]:
        """The local command line that runs a command in the target."""

    # Inspecting

    def fact(self, fact: type[FactBase[Any]], *args: Any, **kwargs: Any) -> Any:
        """Return one of pyinfra's facts; global arguments such as ``_sudo=True`` work."""
        with runs.log() as log:
            if self._connection is None:
                self._connection = self._run.connect()
            try:
                state, (host,) = self._connection
                with runs.current(state, host):
                    return host.get_fact(fact, *args, **kwargs)
            except PyinfraError as failed:
                self._disconnect()
                raise AssertionError(
                    f"fact {fact.__name__} of {self.name}: {failed}\n{log()}"
                ) from None

    def run(
        self,
        command: str | Sequence[str],
        *,
        user: str | None = None,
        stdin: bytes = b"",
        check: bool = True,
        timeout: float = 120,
    ) -> Ran:
        """Run a command in the target, without pyinfra.

        Args:
            command: Text for the shell, or a list of words.
            user: Who runs it; by default a machine's user, who may use sudo, or an image's.
            stdin: Its input.
            check: Raise `AssertionError` if its exit status is not 0.
            timeout: Time limit in seconds.

        Raises:
            TimeoutError: It took too long; it and everything that it started are killed.
        """
        text = command if isinstance(command, str) else shlex.join(command)
        printed = {process.STDOUT: bytearray(), process.STDERR: bytearray()}
        deadline = time.monotonic() + timeout
        try:
            status = ShellSession(self, user).spawn(
                text,
                lambda stream, data: printed[stream].extend(data),
                stdin=[stdin] if stdin else [],
                deadline=deadline,
            )
        except TimeoutError:
            raise TimeoutError(
                f"{command!r} on {self.name} did not finish within {timeout:g} s and was killed"
            ) from None
        ran = Ran(status, *(data.decode("utf-8", "replace") for data in printed.values()))
        if check and ran.status:
            raise AssertionError(f"{command!r} on {self.name}: exit {ran.status}: {ran.stderr}")
        return ran

    def read(self, path: str, *, user: str = "root") -> str:
        """Return the text of a file."""
        return self.run(["cat", "--", path], user=user).stdout

    def _disconnect(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            runs.disconnect(*connection)
