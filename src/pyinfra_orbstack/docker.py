"""The only interface to the docker command: it builds command lines and parses their output.

It only inspects, starts and enters containers. Building, running and removing them is left to
pyinfra's own docker connector and operations.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import gevent

from pyinfra_orbstack import orbctl, places, process
from pyinfra_orbstack.places import Place, PlaceError

#: Names the executable to use as `docker`, without adding a context.
COMMAND_VARIABLE = "PYINFRA_ORBSTACK_DOCKER"
#: The name of OrbStack's docker context.
CONTEXT = "orbstack"

READ_TIMEOUT = 30.0
START_TIMEOUT = 120.0

T = TypeVar("T")


# An OSError, because while commands run pyinfra lets no other exception fail one host alone.
class DockerError(OSError):
    """`docker` is missing, failed, or printed something invalid; the text is one line."""


class Unreachable(DockerError):
    """The Mac that has it cannot be reached, or has no docker."""


class ContainerNotFound(DockerError):
    """The engine has no container of that name or id."""


@dataclass(frozen=True)
class Container:
    """One container as ``docker container inspect`` shows it.

    Attributes:
        id: All 64 digits.
        name: Without the engine's leading slash.
        image: Its image, as it was given.
        state: ``running``, or ``created``, ``exited``, ``paused`` and more.
        labels: Its labels, including those of the image.
        ports: Ports of this host by container port, as in ``{"80/tcp": [8080]}``.
    """

    id: str
    name: str
    image: str = ""
    state: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    ports: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def running(self) -> bool:
        """Whether it can run commands."""
        return self.state == "running"

    @property
    def project(self) -> str | None:
        """The compose project that contains it."""
        return self.labels.get("com.docker.compose.project")

    @property
    def service(self) -> str | None:
        """Its service in that project."""
        return self.labels.get("com.docker.compose.service")

    @property
    def domain(self) -> str:
        """Its domain name from OrbStack on the Mac's network; the first one if there are more.

        A service's name belongs to the container that serves it: neither to one that runs a single
        command, nor to the second of several.
        """
        for own in self.labels.get("dev.orbstack.domains", "").split(","):
            if own.strip() and "*" not in own:
                return own.strip()
        name = self.name
        one_off = self.labels.get("com.docker.compose.oneoff", "").lower() == "true"
        first = self.labels.get("com.docker.compose.container-number", "1") == "1"
        if self.project and self.service and first and not one_off:
            name = f"{self.service}.{self.project}"
        # Host names contain no underscores.
        return f"{name.replace('_', '-')}.orb.local"

    @property
    def image_name(self) -> str | None:
        """The image's name alone; None if only the image's id is known.

        >>> Container("1", "a", "ghcr.io:443/acme/web:1.2@sha256:0f").image_name
        'web'
        """
        if re.fullmatch(r"(sha256:)?[0-9a-f]{12,64}", self.image):
            return None
        return re.split(r"[:@]", self.image.rpartition("/")[2])[0] or None


def check_name(name: str) -> str:
    """Return ``name`` if it can be a container's name, id or id prefix.

    Raises:
        DockerError: It cannot; nothing was run.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*", name):
        raise DockerError(f"{name!r} is not a valid name or id of a container")
    return name


def exec_args(
    container: str, argv: Sequence[str], *, user: str | None = None, tty: bool = False
) -> list[str]:
    """Arguments that run a command in a container."""
    args = ["exec", "--interactive"]
    if tty:
        args.append("--tty")
    if user:
        try:
            # By number, since an image need not know the name.
            args += ["--user", "0" if user == "root" else orbctl.check_value("user", user)]
        except orbctl.BadValue as bad:
            raise DockerError(str(bad)) from None
    return [*args, check_name(container), *argv]


def parse(text: str) -> list[Container]:
    """Read ``docker container inspect``.

    Raises:
        DockerError: It is not a list of containers.
    """
    try:
        records = json.loads(text)
        if isinstance(records, list):
            return [_container(record) for record in records]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    shown = " ".join(text.split())
    raise DockerError(f"docker did not print a list of containers: {shown[:120]!r}")


def parse_ids(text: str) -> list[str]:
    """Read ``docker ps --quiet --no-trunc``.

    Raises:
        DockerError: It contains something other than ids.
    """
    ids = text.split()
    if not all(re.fullmatch("[0-9a-f]{64}", one) for one in ids):
        raise DockerError(f"docker did not print a list of ids: {' '.join(ids)[:120]!r}")
    return ids


def _container(record: Mapping[str, Any]) -> Container:
    config = record["Config"]
    published = (record.get("NetworkSettings") or {}).get("Ports") or {}
    return Container(
        id=record["Id"],
        name=record["Name"].lstrip("/"),
        image=config.get("Image") or "",
        state=record["State"]["Status"],
        labels=config.get("Labels") or {},
        ports={
            # One address of each family, usually with the same port.
            inside: sorted({int(one["HostPort"]) for one in outside})
            for inside, outside in published.items()
            if outside
        },
    )


def error_of(stderr: str, status: int) -> DockerError:
    """Turn the output of a failed `docker` into one typed line."""
    lines = [line.strip() for line in stderr.splitlines()]
    # `docker run` ends with advice.
    lines = [line for line in lines if line and not re.match("(See|Run) 'docker .*help'", line)]
    said = lines[-1] if lines else f"exit code {status}, nothing on stderr"
    text = re.sub(r"^(docker: )?((Error response from daemon|Error): )?", "", said)
    if re.search(r"no such (container|object)", text, re.IGNORECASE):
        return ContainerNotFound(text)
    return DockerError(text)


class Docker:
    """The docker command, connected to OrbStack's engine if there is one.

    Args:
        place: Where it is; by default the Mac of `PYINFRA_ORBSTACK_SSH`, else this host.

    Raises:
        DockerError: There is none.
    """

    def __init__(self, place: Place | None = None) -> None:
        self.place = _usual() if place is None else place
        self.command = _find(self.place)

    def argv(self, args: Sequence[str], *, tty: bool = False) -> list[str]:
        """The whole command line for ``args``; on a Mac, ``tty`` says whether it has a terminal."""
        return self.place.argv([*self.command, *args], tty=tty)

    def line(self, args: Sequence[str]) -> str:
        """The command line for ``args``, as shown to the user."""
        return self.place.shown(shlex.join(["docker", *self.command[1:], *args]))

    @staticmethod
    def environment() -> dict[str, str]:
        """Our environment, with HOME, which contains the contexts.

        Raises:
            DockerError: There is none.
        """
        try:
            return orbctl.Orbctl.environment()
        except orbctl.OrbctlError as homeless:
            raise DockerError(str(homeless)) from None

    def _call(self, *args: str, timeout: float | None = None) -> process.Completed:
        timeout = READ_TIMEOUT if timeout is None else timeout
        return _run(self.place, [*self.command, *args], timeout)

    def _read(self, parse: Callable[[str], T], *args: str, some: bool = False) -> T:
        """The result of a read-only call; it is repeated once after a temporary error."""
        try:
            return self._read_once(parse, *args, some=some)
        except (ContainerNotFound, Unreachable):
            raise
        except DockerError:
            gevent.sleep(orbctl.PAUSE)
        return self._read_once(parse, *args, some=some)

    def _read_once(self, parse: Callable[[str], T], *args: str, some: bool) -> T:
        done = self._call(*args)
        if done.returncode != 0:
            failure = error_of(done.stderr.decode(errors="replace"), done.returncode)
            # The answer omits a container that was removed since the ids were listed.
            if not some or not isinstance(failure, ContainerNotFound):
                raise failure
        return parse(done.stdout.decode(errors="replace"))

    def containers(self) -> list[Container]:
        """All containers, running or not."""
        ids = self._read(parse_ids, "ps", "--all", "--quiet", "--no-trunc")
        return self._read(parse, "container", "inspect", *ids, some=True) if ids else []

    def inspect(self, name: str) -> Container:
        """One container, by its name, id or id prefix.

        Raises:
            ContainerNotFound: There is none.
        """
        found = self._read(parse, "container", "inspect", check_name(name))
        if len(found) != 1:
            raise DockerError(f"docker reported {len(found)} containers {name!r}, not 1")
        return found[0]

    def start(self, name: str) -> None:
        """Start a container; starting a running one does nothing."""
        done = self._call("start", check_name(name), timeout=START_TIMEOUT)
        if done.returncode != 0:
            raise error_of(done.stderr.decode(errors="replace"), done.returncode)


def _usual() -> Place:
    try:
        return places.place_of()
    except orbctl.BadValue as bad:
        raise DockerError(str(bad)) from None


def _run(place: Place, words: Sequence[str], timeout: float) -> process.Completed:
    try:
        done = place.run(words, timeout=timeout, env=Docker.environment())
    except PlaceError as broken:
        raise Unreachable(str(broken)) from None
    except TimeoutError:
        raise DockerError(
            f"{shlex.join(words)[:80]} did not answer in {timeout:g} s: check that OrbStack runs"
        ) from None
    except OSError as broken:
        raise DockerError(f"cannot run {words[0]}: {broken.strerror}") from None
    if problem := place.problem(done.returncode, done.stderr.decode(errors="replace")):
        raise Unreachable(problem)
    return done


def _find(place: Place) -> list[str]:
    named = None if place.far else os.environ.get(COMMAND_VARIABLE)
    if named:
        found = shutil.which(os.path.expanduser(named))
        if not found:
            raise DockerError(orbctl.no_executable(COMMAND_VARIABLE, named))
        return [found]
    found = "docker" if place.far else _find_here()
    known = _run(place, [found, "context", "inspect", CONTEXT], READ_TIMEOUT).returncode == 0
    return [found, "--context", CONTEXT] if known else [found]


def _find_here() -> str:
    folders = os.pathsep.join(os.path.expanduser(folder) for folder in orbctl.KNOWN_FOLDERS)
    found = shutil.which("docker") or shutil.which("docker", path=folders)
    if not found:
        raise DockerError(
            "docker not found: open OrbStack once, which adds it to PATH, "
            f"or set {COMMAND_VARIABLE} to another command"
        )
    return found
