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
from pyinfra_orbstack.places import HERE, SSH_KEY
from pyinfra_orbstack.session import ShellSession
from pyinfra_orbstack.targets import HostName
from pyinfra_orbstack.testing import runs
from pyinfra_orbstack.testing.results import Result, Step

#: A deploy file, a deploy function or an operation.
Deploy = Union[str, "os.PathLike[str]", Callable[..., Any]]

Self = TypeVar("Self", bound="Deployable")


class Ran(NamedTuple):
    """The result of a command.

    + status: its exit status
    + stdout: its output
    + stderr: its error output

    **Example:**

    .. code:: python

        assert machine.run("hostname").stdout.strip() == machine.name
    """

    status: int
    stdout: str
    stderr: str


class Deployable(abc.ABC):
    """Something that deploys are applied to: one host, or all hosts of an inventory.

    + name: its name, or their names

    **Example:**

    .. code:: python

        machine.assert_idempotent("deploy.py")
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
        """Delete the target.

        **Example:**

        .. code:: python

            machine.delete()  # earlier than at the end of the run
        """

    def environment(self) -> dict[str, str]:
        """Return the environment of a ``pyinfra`` or ``orbctl`` that a test starts itself.

        **Returns:** this process's environment, with what selects the same machines

        **Example:**

        .. code:: python

            argv = ["pyinfra", machine.host, "exec", "--", "uptime"]
            subprocess.run(argv, env=machine.environment(), check=True)
        """
        env = orbctl.Orbctl.environment()
        env.pop(orbctl.PLAN_VARIABLE, None)
        return env

    # Applying deploys

    def apply(
        self, deploy: Deploy, *args: Any, check: bool = True, timeout: float = 600, **kwargs: Any
    ) -> Result:
        """Apply a deploy and return its result.

        + deploy: a deploy file, relative to the directory of the project's pytest configuration,
          or a deploy function or operation
        + args: arguments of the function or operation
        + check: whether to raise an error, with pyinfra's log, if something fails
        + timeout: time limit for a deploy file, in seconds
        + kwargs: keyword arguments of the function or operation

        **Returns:** what each operation changed, and pyinfra's log

        **Raises:**

        + AssertionError: an operation failed, or the deploy file exceeded the time limit
        + FileNotFoundError: there is no such deploy file
        + TypeError: a deploy file was given arguments

        **Example:**

        .. code:: python

            assert machine.apply("deploy.py").changed
            machine.apply(server.user, name="Create the shop user", user="shop", _sudo=True)
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

        + deploy: a deploy file, function or operation, as for ``apply``
        + args: arguments, as for ``apply``
        + but: names of operations that the deploy runs every time; ``Name`` also matches
          ``Deploy | Name``
        + kwargs: keyword arguments, as for ``apply``

        **Returns:** the result of the second run

        **Raises:**

        + AssertionError: a run failed, or the second one changed something
        + TypeError: ``but`` is a single text instead of a list
        + ValueError: the deploy has no operation with one of the names in ``but``

        **Example:**

        .. code:: python

            machine.assert_idempotent("deploy.py", but=["Restart the site"])
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

    + name: its name
    + id: its id
    + host: its name in an inventory

    **Example:**

    .. code:: python

        assert machine.host == f"@orbstack/{machine.name}"
    """

    #: The group that contains it.
    kind: str
    #: It is on this host.
    place = HERE

    def __init__(
        self,
        named: HostName,
        id_: str,
        root: Path,
        groups: runs.Groups,
        data: Mapping[str, Any],
    ) -> None:
        self.name = named.name
        self.id = id_
        self.host = named.written
        self._root = root
        # The project's group data may name a Mac.
        here = {**data, SSH_KEY: None}
        self.member = runs.Member(self.host, self.kind, runs.check_groups(groups), here)
        self._run = runs.Run(root, [self.member])
        self._connection: tuple[State, list[Host]] | None = None

    @abc.abstractmethod
    def argv(self, *words: str, user: str | None = None, tty: bool = False) -> list[str]:
        """Return the local command line that runs a command in the target.

        + words: the command and its arguments
        + user: who runs it
        + tty: whether to give it a terminal

        **Returns:** the words of the command line, for ``subprocess``

        **Example:**

        .. code:: python

            subprocess.run(machine.argv("uptime"), check=True)
        """

    # Inspecting

    def fact(self, fact: type[FactBase[Any]], *args: Any, **kwargs: Any) -> Any:
        """Return one of pyinfra's facts.

        + fact: the fact
        + args: arguments of the fact
        + kwargs: keyword arguments of the fact, and global ones such as ``_sudo=True``

        **Returns:** the value of the fact

        **Raises:**

        + AssertionError: the fact could not be read, with pyinfra's log

        **Example:**

        .. code:: python

            from pyinfra.facts.deb import DebPackages

            assert "nginx" in machine.fact(DebPackages)
        """
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

        + command: text for the shell, or a list of words
        + user: who runs it; by default a machine's user, who may use sudo, or an image's
        + stdin: its input
        + check: whether to raise an error if its exit status is not 0
        + timeout: time limit in seconds

        **Returns:** its exit status and output

        **Raises:**

        + AssertionError: its exit status is not 0, and ``check`` is set
        + TimeoutError: it took too long; it and everything that it started are killed

        **Example:**

        .. code:: python

            assert machine.run("systemctl is-active nginx").stdout.strip() == "active"
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
        """Return the text of a file.

        + path: path of the file in the target
        + user: who reads it

        **Returns:** its text

        **Raises:**

        + AssertionError: that user cannot read it, or there is no such file

        **Example:**

        .. code:: python

            assert "shop" in machine.read("/etc/passwd")
        """
        return self.run(["cat", "--", path], user=user).stdout

    def _disconnect(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            runs.disconnect(*connection)
