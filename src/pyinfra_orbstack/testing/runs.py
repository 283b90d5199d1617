"""Runs of pyinfra on the hosts of a test: a deploy file in a child process, a function in this one.

Both use the same data: the project's group data and configuration, as `pyinfra` reads them,
overridden by the test's own.
"""

from __future__ import annotations

import ast
import contextlib
import logging
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

from pyinfra.api.config import Config
from pyinfra.api.deploy import add_deploy
from pyinfra.api.exceptions import PyinfraError
from pyinfra.api.host import Host
from pyinfra.api.inventory import Inventory
from pyinfra.api.operations import run_ops
from pyinfra.api.state import State
from pyinfra.context import ctx_config, ctx_host, ctx_inventory, ctx_state

from pyinfra_orbstack import inventory, process, programs
from pyinfra_orbstack.inventory_files import FILES, execute, group_data
from pyinfra_orbstack.testing import results

#: Group names, or group data by name.
Groups = Union[Sequence[str], Mapping[str, Mapping[str, Any]]]

#: The outcome of a run: its operations, whether all succeeded, pyinfra's output.
Done = tuple[list[results.Step], bool, str]


def check_groups(groups: Groups) -> dict[str, dict[str, Any]]:
    """Return the data of groups by name.

    Raises:
        TypeError: A name is not text, or a single text was given instead of a list of names.
        ValueError: A name that no file of group data could have, or that pyinfra reserves.
    """
    if isinstance(groups, (str, bytes)):
        raise TypeError(
            f"groups must be a list of names, or a dictionary of their data, not {groups!r}"
        )
    for name in groups:
        if not isinstance(name, str):
            raise TypeError(f"the name of a group must be text, not {name!r}")
        # pyinfra's own come first: arguments of its Inventory, and the extension of its files.
        taken = name in ("self", "names_data", "override_data")
        named = (
            re.fullmatch(r"@?[^\W_][\w.+-]*", name)
            and ".." not in name
            and len(name.encode()) <= 200
        )
        if taken or not named:
            raise ValueError(
                f"{name!r} cannot be the name of a group: use letters, digits, and then _ . + -"
            )
    if isinstance(groups, Mapping):
        return {name: dict(data) for name, data in groups.items()}
    return {name: {} for name in groups}


@dataclass(frozen=True)
class Member:
    """What pyinfra needs to know about a test's host.

    Attributes:
        host: Its name.
        kind: A group that contains it and all other hosts of the run.
        groups: Its other groups, with their data.
        data: Its own data.
    """

    host: str
    kind: str
    groups: Mapping[str, Mapping[str, Any]]
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """The inventory of a test.

    Attributes:
        root: The project's directory, which contains its group data.
        members: Its hosts.
    """

    root: Path
    members: Sequence[Member]

    def _groups(self) -> dict[str, tuple[list[str], dict[str, Any]]]:
        """Names of hosts, and data, by group."""
        found: dict[str, tuple[list[str], dict[str, Any]]] = {}
        for member in self.members:
            for name, data in {member.kind: {}, **member.groups}.items():
                hosts, known = found.setdefault(name, ([], {}))
                hosts.append(member.host)
                known.update(data)
        return found

    # A deploy file, in a process of its own

    def file(self, path: Path, env: Mapping[str, str], timeout: float) -> Done:
        """Apply a deploy file with the `pyinfra` command.

        Raises:
            TimeoutError: It took too long.
        """
        with tempfile.TemporaryDirectory(prefix="pyinfra-orbstack-") as temporary:
            folder = Path(temporary)
            steps = folder / "steps.json"
            # In the project's directory, where pyinfra finds its group_data.
            argv = programs.pyinfra_argv(
                "-y", "--chdir", str(self.root), *self._files(folder, steps)
            )
            debug_log = self.root / "pyinfra-debug.log"
            debug_log_was_there = debug_log.exists()
            try:
                done = process.run([*argv, str(path)], timeout=timeout, env=env)
            finally:
                # pyinfra also writes it on a user's error, and the log below says the same.
                if not debug_log_was_there:
                    debug_log.unlink(missing_ok=True)
            log = (done.stdout + done.stderr).decode("utf-8", "replace")
            return results.read(steps), done.returncode == 0, log

    def _files(self, folder: Path, steps: Path) -> list[str]:
        """Write the files that pyinfra reads, and return the arguments that name them."""
        # Named after an existing group: pyinfra adds a group with the name of an inventory.
        inventory = folder / f"{self.members[0].kind}.py"
        groups = self._groups()
        names: dict[str, Any] = {name: hosts for name, (hosts, _) in groups.items()}
        names["all"] = self._hosts()
        inventory.write_text(_assignments(names), encoding="utf-8")
        options = []
        given = {name: data for name, (_, data) in groups.items() if data}
        for number, (name, data) in enumerate(given.items()):
            # A directory for each, because a Mac's file system does not tell Web from web.
            group_data = folder / str(number)
            group_data.mkdir()
            (group_data / f"{name}.py").write_text(_assignments(data), encoding="utf-8")
            options += ["--group-data", str(group_data)]
        record = folder / "record.py"
        record.write_text(
            f"from pyinfra_orbstack.testing.results import record\nrecord({str(steps)!r})\n",
            encoding="utf-8",
        )
        return [*options, str(inventory), str(record)]

    # A function, in this process

    def function(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Done:
        """Apply a deploy function or an operation through pyinfra's API."""
        clock = results.Clock()
        with log() as lines, self._connected() as state:
            state.add_callback_handler(clock)
            names: results.Names = {}
            for host in state.inventory:
                with results.naming(state, host, names):
                    add_deploy(state, function, *args, **kwargs, host=host)
            try:
                run_ops(state)
            except PyinfraError as failed:
                return results.steps(state, clock, names), False, f"{lines()}\n{failed}"
            done = results.steps(state, clock, names)
            return done, not any(step.failed for step in done), lines()

    def connect(self) -> tuple[State, list[Host]]:
        """Connect pyinfra to the hosts."""
        config = Config()
        inventory = self._inventory(config)
        state = State(inventory, config, check_for_changes=False)
        hosts = list(inventory)
        try:
            for host in hosts:
                with current(state, host):
                    host.connect(raise_exceptions=True)
                state.activate_host(host)
        except BaseException:
            disconnect(state, hosts)
            raise
        return state, hosts

    @contextlib.contextmanager
    def _connected(self) -> Iterator[State]:
        state, hosts = self.connect()
        try:
            with current(state, hosts[0]):
                yield state
        finally:
            disconnect(state, hosts)

    def _hosts(self) -> list[tuple[str, dict[str, Any]]]:
        return [(member.host, dict(member.data)) for member in self.members]

    def _inventory(self, config: Config) -> Inventory:
        """The hosts with their data; also reads the project's configuration."""
        # A host may be newer than this process's list.
        inventory.list_machines.cache.clear()
        inventory.list_containers.cache.clear()
        own = self._groups()
        members: dict[str, Any] = {
            name: (names, {}) for name, (names, _) in own.items() if name != "all"
        }
        bare = Inventory((self._hosts(), {}), **members)
        with _set(ctx_config, config), _set(ctx_inventory, bare), _importable(self.root):
            if (self.root / "config.py").is_file():
                execute(self.root / "config.py")
            config.lock_current_state()
            files = (self.root / "group_data").glob(FILES)
            data = {path.stem: group_data(path) for path in files}
        for name, (_, values) in own.items():
            data.setdefault(name, {}).update(values)
        everything = data.pop("all", {})
        # A group without hosts may be one that the connector fills.
        groups = {
            name: (own[name][0] if name in own else [], data[name])
            for name in [*own, *data]
            if name != "all"
        }
        return Inventory((self._hosts(), everything), **groups)


# Small helpers ---------------------------------------------------------------------------------


def _assignments(values: Mapping[str, Any]) -> str:
    """Python text that assigns these values to these names, whatever the names are."""
    values = dict(values)
    try:
        faithful = ast.literal_eval(repr(values)) == values
    except (SyntaxError, ValueError):
        faithful = False
    if not faithful:
        raise TypeError(f"groups and data must contain only plain values, not {values!r}")
    return f"globals().update({values!r})\n"


@contextlib.contextmanager
def _importable(root: Path) -> Iterator[None]:
    """Let the project's files import each other, as pyinfra does."""
    added = str(root) not in sys.path
    if added:
        sys.path.append(str(root))
    try:
        yield
    finally:
        if added:
            sys.path.remove(str(root))


@contextlib.contextmanager
def _set(context: Any, value: object) -> Iterator[None]:
    """Set one of pyinfra's context objects; pyinfra's own way does not undo it after errors."""
    before = context.get()
    context.set(value)
    try:
        yield
    finally:
        context.set(before)


@contextlib.contextmanager
def current(state: State, host: Host) -> Iterator[None]:
    """Make state and host pyinfra's current ones."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_set(ctx_state, state))
        stack.enter_context(_set(ctx_config, state.config))
        stack.enter_context(_set(ctx_inventory, state.inventory))
        stack.enter_context(_set(ctx_host, host))
        yield


def disconnect(state: State, hosts: Sequence[Host]) -> None:
    """Close the connections that are open."""
    for host in hosts:
        with current(state, host):
            host.disconnect()


@contextlib.contextmanager
def log() -> Iterator[Callable[[], str]]:
    """Collect what pyinfra logs."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("pyinfra")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lambda: "\n".join(lines)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
