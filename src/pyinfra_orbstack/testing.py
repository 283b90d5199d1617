"""A pytest plugin: machines and containers as fixtures, deploys applied to them and checked.

It loads with pytest wherever the package is installed, so everything heavy is imported by the
first fixture that needs it. The process is never monkey-patched: deploy files run in a process of
their own, functions and operations through pyinfra's API.
"""

from __future__ import annotations

import abc
import ast
import contextlib
import fcntl
import json
import logging
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar, Union

import pytest

if TYPE_CHECKING:
    from types import TracebackType

    from pyinfra.api.facts import FactBase
    from pyinfra.api.host import Host
    from pyinfra.api.state import State

    from pyinfra_orbstack import docker, orbctl, results

#: Names of groups, or their data by name.
Groups = Union[Sequence[str], Mapping[str, Mapping[str, Any]]]
#: A deploy file, a deploy function or an operation.
Deploy = Union[str, "os.PathLike[str]", Callable[..., Any]]

Self = TypeVar("Self", bound="Target")

RUN_KEY = pytest.StashKey[str]()
ENGINE_KEY = pytest.StashKey["Engine"]()


class Ran(NamedTuple):
    """What a command left behind."""

    status: int
    stdout: str
    stderr: str


# Options and hooks -----------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    """Say which machines there shall be."""
    group = parser.getgroup("orbstack", "machines of OrbStack")
    group.addoption(
        "--orbstack",
        choices=("auto", "real", "simulator"),
        default="auto",
        help="where machines come from: OrbStack where there is one, else its simulator (auto)",
    )
    group.addoption("--orbstack-image", metavar="IMAGE", help="image of the machines")
    group.addoption(
        "--orbstack-keep", action="store_true", help="keep the machines until the next run"
    )
    parser.addini("orbstack_image", "image of the machines", default="ubuntu:noble")


def pytest_configure(config: pytest.Config) -> None:
    """Give the run a name, which all workers of pytest-xdist share."""
    worker = getattr(config, "workerinput", {})
    config.stash[RUN_KEY] = worker.get("orbstack_run") or secrets.token_hex(4)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker of pytest-xdist the name of the run."""
    node.workerinput["orbstack_run"] = node.config.stash[RUN_KEY]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Name the machines that were kept."""
    if config.getoption("orbstack_keep"):
        for folder in _folders(config.stash[RUN_KEY]):
            for line in _lines(folder / "machines"):
                terminalreporter.write_line(f"kept until the next run: {line.split()[0]}")


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Delete whatever the run has made and not deleted, once all workers have ended."""
    engine = config.stash.get(ENGINE_KEY, None)
    if engine is not None:
        engine.close()
    kept = config.getoption("orbstack_keep", default=False)
    if not kept and not hasattr(config, "workerinput"):
        for folder in _folders(config.stash[RUN_KEY]):
            _delete_all(folder)


# Fixtures --------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def orbstack_machines(request: pytest.FixtureRequest) -> MachineFactory:
    """Make machines: ``with orbstack_machines(groups=["web"]) as machine: ...``.

    Without ``with`` a machine lives until the run ends.
    """
    config = request.config
    if ENGINE_KEY not in config.stash:
        config.stash[ENGINE_KEY] = Engine(config)
    return MachineFactory(config.stash[ENGINE_KEY])


@pytest.fixture
def orbstack_machine(orbstack_machines: MachineFactory) -> Iterator[Machine]:
    """A fresh machine for one test."""
    with orbstack_machines() as machine:
        yield machine


@pytest.fixture(scope="session")
def orbstack_containers(request: pytest.FixtureRequest) -> Iterator[ContainerFactory]:
    """Make containers: ``with orbstack_containers("debian:13") as container: ...``.

    Without ``with`` a container lives until the run ends.
    """
    factory = ContainerFactory(request.config.rootpath)
    yield factory
    factory.delete_all()


def unavailable(reason: str, what: str = "machines") -> NoReturn:
    """Skip the test, or fail it where machines and containers must be had: under CI."""
    if os.environ.get("CI", "").lower() not in ("", "0", "false"):
        pytest.fail(f"no {what}: {reason}", pytrace=False)
    pytest.skip(f"no {what}: {reason}")


# Machines and containers -----------------------------------------------------------------------


class Target(abc.ABC):
    """Where deploys are applied: what machines and containers have in common.

    Attributes:
        name: Its name.
        id: Its id.
        host: Its name as a host of pyinfra.
    """

    #: A group that it is in.
    kind: str

    def __init__(
        self, place: str, name: str, id_: str, root: Path, groups: Groups, data: Mapping[str, Any]
    ) -> None:
        self.name = name
        self.id = id_
        self.host = f"{place}/{name}"
        self._root = root
        self._groups: dict[str, dict[str, Any]] = (
            {name: dict(of_group) for name, of_group in groups.items()}
            if isinstance(groups, Mapping)
            else {name: {} for name in groups}
        )
        self._data = dict(data)
        self._connection: tuple[State, Host] | None = None

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
        """Delete it."""

    @abc.abstractmethod
    def _argv(self, words: Sequence[str], user: str | None) -> list[str]:
        """The command line on this computer that runs a command there."""

    def _environment(self) -> dict[str, str]:
        """The environment of that command line, and of a `pyinfra` in a process of its own."""
        from pyinfra_orbstack import orbctl

        env = orbctl.Orbctl.environment()
        env.pop("PYINFRA_ORBSTACK_PLAN", None)
        return env

    # Applying deploys

    def apply(
        self, deploy: Deploy, *args: Any, check: bool = True, timeout: float = 600, **kwargs: Any
    ) -> results.Result:
        """Apply a deploy and return what it did.

        Args:
            deploy: A deploy file, seen from the folder of the project's pytest configuration, or a
                deploy function or operation, which gets the other arguments.
            check: Raise `AssertionError`, with pyinfra's log, if something fails.
            timeout: Seconds that a deploy file may take.
        """
        began = time.monotonic()
        if callable(deploy):
            steps, ok, log = self._apply_function(deploy, args, kwargs)
        else:
            steps, ok, log = self._apply_file(deploy, timeout)
        from pyinfra_orbstack.results import Result

        result = Result(steps, ok, time.monotonic() - began, log)
        if check and not result.ok:
            raise AssertionError(f"{deploy} failed on {self.name}:\n{result.log}")
        return result

    def assert_idempotent(self, deploy: Deploy, *args: Any, **kwargs: Any) -> results.Result:
        """Apply a deploy twice and assert that the second run changes nothing."""
        self.apply(deploy, *args, **kwargs)
        result = self.apply(deploy, *args, **kwargs)
        assert not result.changed, f"the second run of {deploy} changed {result.changed}"
        return result

    def _apply_file(
        self, deploy: str | os.PathLike[str], timeout: float
    ) -> tuple[list[results.Step], bool, str]:
        from pyinfra_orbstack import process, project, results

        path = self._root / deploy
        if not path.is_file():
            raise FileNotFoundError(f"there is no deploy file {path}")
        with tempfile.TemporaryDirectory(prefix="pyinfra-orbstack-") as temporary:
            folder = Path(temporary)
            steps = folder / "steps.json"
            group_data = folder / "group_data"
            group_data.mkdir()
            groups: dict[str, Any] = {self.kind: [(self.host, self._data)]}
            for name, data in self._groups.items():
                groups[name] = [self.host]
                (group_data / f"{name}.py").write_text(_assignments(data))
            (folder / "inventory.py").write_text(_assignments(groups))
            (folder / "record.py").write_text(
                f"from pyinfra_orbstack.results import record\nrecord({str(steps)!r})\n"
            )
            files = [str(folder / "inventory.py"), str(folder / "record.py"), str(path)]
            debug_log = self._root / "pyinfra-debug.log"
            debug_log_was_there = debug_log.exists()
            # In the project's folder, where pyinfra finds its group_data.
            argv = project.pyinfra_argv(
                "-y", "--chdir", str(self._root), "--group-data", str(group_data), *files
            )
            try:
                done = process.run(argv, timeout=timeout, env=self._environment())
            except TimeoutError:
                raise AssertionError(f"{deploy} took more than {timeout:g} s") from None
            finally:
                # pyinfra writes it on a user's error too, and the log below says the same.
                if not debug_log_was_there:
                    debug_log.unlink(missing_ok=True)
            log = (done.stdout + done.stderr).decode("utf-8", "replace")
            return results.read(steps), done.returncode == 0, log

    def _apply_function(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[list[results.Step], bool, str]:
        from pyinfra.api.deploy import add_deploy
        from pyinfra.api.exceptions import PyinfraError
        from pyinfra.api.operations import run_ops

        from pyinfra_orbstack.results import Clock, steps

        clock = Clock()
        with _log() as log, self._connected() as (state, _):
            state.add_callback_handler(clock)
            add_deploy(state, function, *args, **kwargs)
            try:
                run_ops(state)
            except PyinfraError as failed:
                return steps(state, clock), False, f"{log()}\n{failed}"
            done = steps(state, clock)
            return done, not any(step.failed for step in done), log()

    # Looking into it

    def fact(self, fact: type[FactBase[Any]], *args: Any, **kwargs: Any) -> Any:
        """Return one of pyinfra's facts; global arguments such as ``_sudo=True`` are understood."""
        from pyinfra.api.exceptions import PyinfraError

        with _log() as log:
            if self._connection is None:
                self._connection = self._connect()
            try:
                with _context(*self._connection):
                    return self._connection[1].get_fact(fact, *args, **kwargs)
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
        """Run a command there, past pyinfra.

        Args:
            command: Text for the shell, or a list of words.
            user: Who runs it: by default a machine's user, who may use sudo, or an image's.
            stdin: What it reads.
            check: Raise `AssertionError` if its exit status is not 0.
            timeout: Seconds that it may take.
        """
        from pyinfra_orbstack import process

        words = ["sh", "-c", command] if isinstance(command, str) else list(command)
        argv = self._argv(words, user)
        done = process.run(argv, stdin=stdin, timeout=timeout, env=self._environment())
        ran = Ran(
            done.returncode,
            done.stdout.decode("utf-8", "replace"),
            done.stderr.decode("utf-8", "replace"),
        )
        if check and ran.status:
            raise AssertionError(f"{command!r} on {self.name}: exit {ran.status}: {ran.stderr}")
        return ran

    def read(self, path: str, *, user: str = "root") -> str:
        """Return the text of a file."""
        return self.run(["cat", "--", path], user=user).stdout

    # A connection of pyinfra's

    def _connect(self) -> tuple[State, Host]:
        from pyinfra.api.config import Config
        from pyinfra.api.inventory import Inventory
        from pyinfra.api.state import State

        groups = {name: ([self.host], data) for name, data in self._groups.items()}
        inventory = Inventory(([(self.host, self._data)], {}), **groups)
        state = State(inventory, Config(), check_for_changes=False)
        host = inventory.get_host(self.host)
        with _context(state, host):
            host.connect(raise_exceptions=True)
        state.activate_host(host)
        return state, host

    @contextlib.contextmanager
    def _connected(self) -> Iterator[tuple[State, Host]]:
        state, host = self._connect()
        try:
            with _context(state, host):
                yield state, host
        finally:
            host.disconnect()

    def _disconnect(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            with _context(*connection):
                connection[1].disconnect()


class Machine(Target):
    """A machine that a test may do anything to; its name is also its hostname."""

    kind = "machine"

    def __init__(
        self, engine: Engine, machine: orbctl.Machine, groups: Groups, data: Mapping[str, Any]
    ) -> None:
        super().__init__("@orbstack", machine.name, machine.id, engine.root, groups, data)
        self._engine = engine
        self._machine = machine

    def _argv(self, words: Sequence[str], user: str | None) -> list[str]:
        from pyinfra_orbstack import orbctl

        return self._engine.client.argv(orbctl.run_args(self.name, words, user=user))

    def _environment(self) -> dict[str, str]:
        from pyinfra_orbstack import orbctl

        return {**super()._environment(), orbctl.RECORD_VARIABLE: str(self._engine.record.path)}

    def restart(self) -> None:
        """Restart it and wait until it answers."""
        self._disconnect()
        self._engine.client.restart(self.name)
        self._engine.wait(self.name)

    def delete(self) -> None:
        """Delete it, unless machines are kept; the end of the run tries again if that fails."""
        from pyinfra_orbstack.orbctl import OrbctlError

        self._disconnect()
        if self._engine.keep:
            return
        try:
            self._engine.client.remove(self._machine)
            self._engine.record.forget(self.id)
        except OrbctlError as problem:
            warnings.warn(f"{self.name} was not deleted: {problem}", stacklevel=2)


class Container(Target):
    """A container that a test may do anything to."""

    kind = "container"

    def __init__(
        self,
        client: docker.Docker,
        container: docker.Container,
        holder: subprocess.Popen[bytes],
        root: Path,
        groups: Groups,
        data: Mapping[str, Any],
    ) -> None:
        place = "@orbstack/docker"
        super().__init__(place, container.name, container.id, root, groups, data)
        self._client = client
        self._holder = holder

    def _argv(self, words: Sequence[str], user: str | None) -> list[str]:
        from pyinfra_orbstack import docker

        return self._client.argv(docker.exec_args(self.id, words, user=user))

    def delete(self) -> None:
        """Delete it."""
        self._disconnect()
        _let_go(self._holder)


class MachineFactory:
    """Makes machines; see `orbstack_machines`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __call__(
        self,
        name: str = "test",
        *,
        image: str | None = None,
        user: str | None = None,
        groups: Groups = (),
        data: Mapping[str, Any] | None = None,
    ) -> Machine:
        """Make a machine: a clone of one that the run makes once for each image and user.

        Args:
            name: What its name begins with; a random end keeps it apart from all others.
            image: Image, by default what `--orbstack-image` or ``orbstack_image`` say.
            user: Its default user, by default as `orbctl create` has it.
            groups: Groups of the host, or their data by name.
            data: Data of the host, which come before that of groups.
        """
        return Machine(self._engine, self._engine.make(name, image, user), groups, data or {})


#: What the first process of a container does: say so, and wait for the end of its input.
_WAIT = "echo ready; read -r _"


class ContainerFactory:
    """Makes containers; see `orbstack_containers`.

    A container hangs on a pipe of this process, and the engine removes it when the pipe is closed:
    so none is left behind, even if this process is killed.
    """

    def __init__(self, root: Path) -> None:
        from pyinfra_orbstack import docker

        self._root = root
        self._made: list[Container] = []
        try:
            self._client = docker.Docker()
            self._client.containers()
        except docker.DockerError as problem:
            unavailable(str(problem), "containers")

    def __call__(
        self,
        image: str,
        name: str = "test",
        *,
        groups: Groups = (),
        data: Mapping[str, Any] | None = None,
    ) -> Container:
        """Make a container, in which nothing runs but a shell that waits.

        Args:
            image: Image with a shell, as in ``docker run``; it is pulled where it is missing.
            name: What its name begins with; a random end keeps it apart from all others.
            groups: Groups of the host, or their data by name.
            data: Data of the host, which come before that of groups.
        """
        from pyinfra_orbstack import docker, inventory, orbctl

        name = docker.check_name(f"{name}-{secrets.token_hex(4)}")
        image = orbctl.check_value("image", image)
        options = ["--rm", "--interactive", "--name", name, "--entrypoint", "sh"]
        with tempfile.TemporaryFile() as errors:
            holder = subprocess.Popen(
                self._client.argv(["run", *options, image, "-c", _WAIT]),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=self._client.environment(),
                # Ctrl-C shall reach the tests alone, which close the pipe when they have ended.
                start_new_session=True,
            )
            assert holder.stdout is not None
            if holder.stdout.readline() != b"ready\n":
                _let_go(holder)
                errors.seek(0)
                said = docker.error(errors.read().decode(errors="replace"), holder.returncode)
                unavailable(f"{image}: {said}", "containers")
        inventory.list_containers.cache.clear()
        container = self._client.inspect(name)
        made = Container(self._client, container, holder, self._root, groups, data or {})
        self._made.append(made)
        return made

    def delete_all(self) -> None:
        """Delete those that are still there."""
        for container in self._made:
            container.delete()


def _let_go(holder: subprocess.Popen[bytes]) -> None:
    """Close the pipe on which a container hangs, and wait until it is gone."""
    with holder:
        pass


# What makes and deletes them -------------------------------------------------------------------


class Engine:
    """Makes machines for one process of a run, and writes each one down at once."""

    def __init__(self, config: pytest.Config) -> None:
        from pyinfra_orbstack import orbctl, project

        self.root = config.rootpath
        self.keep: bool = config.getoption("orbstack_keep")
        self.image: str = config.getoption("orbstack_image") or config.getini("orbstack_image")
        self.run = config.stash[RUN_KEY]
        self._patch = pytest.MonkeyPatch()
        try:
            command = project.choose_orbctl(config.getoption("orbstack"))
            # The connector looks there, in this process and in those it starts.
            self._patch.setenv(orbctl.COMMAND_VARIABLE, command)
            self.client = orbctl.Orbctl(command)
            self.client.machines()
        except orbctl.OrbctlError as problem:
            self._patch.undo()
            unavailable(str(problem))
        reach = {orbctl.COMMAND_VARIABLE: command, **project.settings(command)}
        settings = "".join(f"{name}={value}\n" for name, value in reach.items())
        # Workers share what is made, unless each of them was given a simulator of its own.
        self.folder = _records() / f"{self.run}-{zlib.crc32(settings.encode()):08x}"
        _records().mkdir(parents=True, exist_ok=True)
        with _locked(_records()):
            if not self.keep:
                sweep(but=self.run)
            self.folder.mkdir(exist_ok=True)
            self._alive = contextlib.ExitStack()
            self._alive.enter_context(_locked(self.folder, fcntl.LOCK_SH))
        (self.folder / "settings").write_text(settings)
        self.record = orbctl.Record(self.folder / "machines")

    def close(self) -> None:
        """Let go of the run."""
        self._alive.close()
        self._patch.undo()

    def make(self, name: str, image: str | None, user: str | None) -> orbctl.Machine:
        """Make a machine that runs."""
        from pyinfra_orbstack import orbctl

        source = self._base(image or self.image, user)
        name = f"{name}-{secrets.token_hex(4)}"
        machine = self._make(name, orbctl.machine_args("clone", source, name))
        self.client.start(name)
        self.wait(name)
        return machine

    def _base(self, image: str, user: str | None) -> str:
        """Name of a stopped machine to be cloned, made by the first worker that needs it."""
        from pyinfra_orbstack import orbctl

        key = json.dumps([image, user])
        known = self.folder / "bases"
        known.touch()
        with _locked(known):
            bases = dict(line.split("\t") for line in _lines(known))
            if key not in bases:
                name = f"base-{self.run}-{secrets.token_hex(4)}"
                args = orbctl.create_args(name, image, user=user)
                try:
                    self._make(name, args)
                    self.wait(name)
                    self.client.stop(name)
                except orbctl.OrbctlError as problem:
                    unavailable(f"{image}: {problem}")
                with known.open("a") as file:
                    file.write(f"{key}\t{name}\n")
                bases[key] = name
        return bases[key]

    def _make(self, name: str, args: Sequence[str]) -> orbctl.Machine:
        """Make a machine and write it down; what an interruption leaves half made is removed."""
        from pyinfra_orbstack import interrupts, making, orbctl

        made = making.Making(self.client, name, args, self.record)
        with interrupts.at_interrupt(made.give_up):
            try:
                return made.finish(orbctl.CREATE_TIMEOUT, _tell)
            except BaseException:
                made.undo(_tell)
                raise

    def wait(self, name: str, seconds: float = 120) -> None:
        """Wait until a machine runs commands."""
        from pyinfra_orbstack import waiting

        waiting.until_it_answers(self.client, name, seconds)


def _tell(line: str) -> None:
    print(line, file=sys.stderr)


# Records of runs -------------------------------------------------------------------------------
#
# Each run has a folder: the machines that it made, and how to reach the `orbctl` that has them. Its
# processes hold a shared lock on it, so a folder that can be locked is a crashed run's.


def _records() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state, "pyinfra-orbstack", "tests")


@contextlib.contextmanager
def _locked(path: Path, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, how)
        yield
    finally:
        os.close(fd)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _folders(run: str = "*") -> list[Path]:
    return [path for path in _records().glob(f"{run}-*") if path.is_dir()]


def sweep(but: str = "") -> None:
    """Delete what crashed runs left behind."""
    for folder in _folders():
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            if folder.name.partition("-")[0] != but:
                with _locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    _delete_all(folder)


def _delete_all(folder: Path) -> None:
    """Delete the machines of one run that are still there, and then its folder."""
    from pyinfra_orbstack import orbctl

    with pytest.MonkeyPatch.context() as patch:
        for line in _lines(folder / "settings"):
            patch.setenv(*line.split("=", 1))
        record = orbctl.Record(folder / "machines")
        try:
            # Nobody else gives machines such names.
            record.delete_all(orbctl.Orbctl(), names_are_ours=True)
        except orbctl.OrbctlError as problem:
            names = ", ".join(record.machines())
            print(f"the next run tries again to delete {names}: {problem}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)


# Small helpers ---------------------------------------------------------------------------------


def _assignments(values: Mapping[str, Any]) -> str:
    """Python text that gives these names these values, whatever the names are."""
    values = dict(values)
    try:
        faithful = ast.literal_eval(repr(values)) == values
    except (SyntaxError, ValueError):
        faithful = False
    if not faithful:
        raise TypeError(f"groups and data can hold plain values only: {values!r}")
    return f"globals().update({values!r})\n"


@contextlib.contextmanager
def _context(state: State, host: Host) -> Iterator[None]:
    """Make state and host pyinfra's current ones; its own way forgets to undo that on errors."""
    from pyinfra.context import ctx_host, ctx_state

    before = ctx_state.get(), ctx_host.get()
    ctx_state.set(state)
    ctx_host.set(host)
    try:
        yield
    finally:
        ctx_state.set(before[0])
        ctx_host.set(before[1])


@contextlib.contextmanager
def _log() -> Iterator[Callable[[], str]]:
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
