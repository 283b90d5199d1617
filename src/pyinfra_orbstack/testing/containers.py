"""Containers for tests, and their factory."""

from __future__ import annotations

import secrets
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyinfra_orbstack import docker, inventory, orbctl
from pyinfra_orbstack.targets import HostName
from pyinfra_orbstack.testing import runs
from pyinfra_orbstack.testing.engine import unavailable
from pyinfra_orbstack.testing.targets import Target


class Container(Target):
    """A disposable container, which a test may change in any way.

    **Example:**

    .. code:: python

        def test_tools(orbstack_containers):
            with orbstack_containers("debian:13") as container:
                container.assert_idempotent("deploy_containers.py")
    """

    kind = "container"

    def __init__(
        self,
        client: docker.Docker,
        container: docker.Container,
        holder: subprocess.Popen[bytes],
        root: Path,
        groups: runs.Groups,
        data: Mapping[str, Any],
    ) -> None:
        super().__init__(HostName(True, container.name), container.id, root, groups, data)
        self._client = client
        self._holder = holder

    def argv(self, *words: str, user: str | None = None, tty: bool = False) -> list[str]:
        """Return the local command line that runs a command in the container.

        + words: the command and its arguments
        + user: who runs it; the image's user by default
        + tty: whether to give it a terminal

        **Returns:** the words of the command line, for ``subprocess``

        **Example:**

        .. code:: python

            subprocess.run(container.argv("cat", "/etc/os-release"), check=True)
        """
        return self._client.argv(docker.exec_args(self.id, words, user=user, tty=tty))

    def delete(self) -> None:
        """Delete the container.

        **Example:**

        .. code:: python

            container.delete()  # earlier than at the end of the run
        """
        self._disconnect()
        _let_go(self._holder)


#: The first process of a container: it reports that it is ready, then waits for end of input.
_WAIT = "echo ready; read -r _"


class ContainerFactory:
    """Creates containers; the fixture ``orbstack_containers`` is one.

    This process holds a pipe open for each container, and the engine removes the container when
    the pipe closes. None is left behind, even if this process is killed.

    **Example:**

    .. code:: python

        with orbstack_containers("debian:13") as container:
            container.apply("deploy.py")
    """

    def __init__(self, root: Path) -> None:
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
        groups: runs.Groups = (),
        data: Mapping[str, Any] | None = None,
    ) -> Container:
        """Create a container that runs only a waiting shell.

        + image: image with a shell, as in ``docker run``; it is pulled if it is missing
        + name: prefix of its name; a random suffix makes the name unique
        + groups: groups of the host, by name or with their data
        + data: data of the host, which takes precedence over that of groups

        **Returns:** the container, which runs

        **Example:**

        .. code:: python

            container = orbstack_containers("debian:13", "tools", groups=["tools"])
        """
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
                # Ctrl-C must reach only the tests, which close the pipe when they have ended.
                start_new_session=True,
            )
            assert holder.stdout is not None
            if holder.stdout.readline() != b"ready\n":
                _let_go(holder)
                errors.seek(0)
                said = docker.error_of(errors.read().decode(errors="replace"), holder.returncode)
                unavailable(f"{image}: {said}", "containers")
        inventory.list_containers.cache.clear()
        container = self._client.inspect(name)
        made = Container(self._client, container, holder, self._root, groups, data or {})
        self._made.append(made)
        return made

    def delete_all(self) -> None:
        """Delete the remaining containers.

        **Example:**

        .. code:: python

            orbstack_containers.delete_all()  # earlier than at the end of the run
        """
        for container in self._made:
            container.delete()


def _let_go(holder: subprocess.Popen[bytes]) -> None:
    """Close the pipe that keeps a container alive, and wait until it is gone."""
    with holder:
        pass
