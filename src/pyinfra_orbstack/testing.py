"""A pytest plugin: machines and containers as fixtures, deploys applied to them and checked.

It loads with pytest wherever the package is installed, so everything heavy is imported by the
first fixture that needs it. The process is never monkey-patched: deploy files run in a process of
their own, functions and operations through pyinfra's API.
"""

from __future__ import annotations

import abc
import contextlib
import fcntl
import json
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

from pyinfra_orbstack.endings import Endings

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
ENDINGS_KEY = pytest.StashKey[Endings]()


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
    group.addoption(
        "--orbstack-init",
        choices=("image", "none"),
        help="whether the simulator's machines boot the init of their image; by default they do"
        " where the host can, and none is faster",
    )
    group.addoption("--orbstack-image", metavar="IMAGE", help="image of the machines")
    group.addoption(
        "--orbstack-keep", action="store_true", help="keep the machines until the next run"
    )
    parser.addini("orbstack_image", "image of the machines", default="ubuntu:noble")


def pytest_configure(config: pytest.Config) -> None:
    """Give the run a name, which all workers of pytest-xdist share, and see that it can end."""
    endings = config.stash[ENDINGS_KEY] = Endings()
    endings.begin()
    config.pluginmanager.register(_CtrlC(endings))
    init = config.getoption("orbstack_init")
    if init:
        patch = pytest.MonkeyPatch()  # of the environment, which all that is started here gets
        patch.setenv("ORBCTL_SIMULATOR_INIT", init)
        config.add_cleanup(patch.undo)
    worker = getattr(config, "workerinput", {})
    config.stash[RUN_KEY] = worker.get("orbstack_run") or secrets.token_hex(4)


class _CtrlC:
    """Sees that nothing disturbs what is put in order after Ctrl-C."""

    def __init__(self, endings: Endings) -> None:
        self._endings = endings

    @pytest.hookimpl(tryfirst=True)
    def pytest_keyboard_interrupt(self) -> None:
        self._endings.over = True


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Look for no tests in the machines of a simulator, whose files are a whole system's."""
    # One that is named on the command line is not ignored itself, but what is in it can be.
    return True if any(map(_has_machines, (collection_path, collection_path.parent))) else None


def _has_machines(folder: Path) -> bool:
    named = os.environ.get("ORBCTL_SIMULATOR_HOME")
    if named and os.path.realpath(named) == os.path.realpath(folder):
        return True
    try:
        machines = os.listdir(folder / "machines")
    except PermissionError:
        return True
    except OSError:
        return False
    # Each has its id for a name.
    return bool(machines) and all(len(name) == 26 and name.isupper() for name in machines)


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
    endings = config.stash[ENDINGS_KEY]
    endings.over = True
    engine = config.stash.get(ENGINE_KEY, None)
    if engine is not None:
        engine.close()
    kept = config.getoption("orbstack_keep", default=False)
    if not kept and not hasattr(config, "workerinput"):
        for folder in _folders(config.stash[RUN_KEY]):
            _delete_all(folder)
    endings.end()


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
        from pyinfra_orbstack import runs

        self._root = root
        self._run = runs.Run(root, self.host, self.kind, runs.check_groups(groups), dict(data))
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
        from pyinfra_orbstack.results import Result

        began = time.monotonic()
        if callable(deploy):
            steps, ok, log = self._run.function(deploy, args, kwargs)
        else:
            path = self._deploy_file(deploy, args, kwargs)
            try:
                steps, ok, log = self._run.file(path, self._environment(), timeout)
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
            raise TypeError(f"a deploy file takes no arguments, {deploy} got {', '.join(given)}")
        path = self._root / deploy
        if not path.is_file():
            raise FileNotFoundError(f"there is no deploy file {path}")
        return path

    def assert_idempotent(self, deploy: Deploy, *args: Any, **kwargs: Any) -> results.Result:
        """Apply a deploy twice and assert that the second run changes nothing."""
        self.apply(deploy, *args, **kwargs)
        result = self.apply(deploy, *args, **kwargs)
        assert not result.changed, f"the second run of {deploy} changed {result.changed}"
        return result

    # Looking into it

    def fact(self, fact: type[FactBase[Any]], *args: Any, **kwargs: Any) -> Any:
        """Return one of pyinfra's facts; global arguments such as ``_sudo=True`` are understood."""
        from pyinfra.api.exceptions import PyinfraError

        from pyinfra_orbstack import runs

        with runs.log() as log:
            if self._connection is None:
                self._connection = self._run.connect()
            try:
                with runs.current(*self._connection):
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

    def _disconnect(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            from pyinfra_orbstack import runs

            with runs.current(*connection):
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
        from pyinfra_orbstack import runs

        groups = runs.check_groups(groups)
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
        from pyinfra_orbstack import docker, inventory, orbctl, runs

        groups = runs.check_groups(groups)
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
