"""Containers of tests, and what makes them."""

from __future__ import annotations

import secrets
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyinfra_orbstack import docker, inventory, orbctl
from pyinfra_orbstack.targets import CONTAINERS
from pyinfra_orbstack.testing import runs
from pyinfra_orbstack.testing.engine import unavailable
from pyinfra_orbstack.testing.targets import Target


class Container(Target):
    """A container that a test may do anything to."""

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
        super().__init__(CONTAINERS, container.name, container.id, root, groups, data)
        self._client = client
        self._holder = holder

    def argv(self, *words: str, user: str | None = None, tty: bool = False) -> list[str]:
        """The command line on this computer that runs a command there."""
        return self._client.argv(docker.exec_args(self.id, words, user=user, tty=tty))

    def delete(self) -> None:
        """Delete it."""
        self._disconnect()
        _let_go(self._holder)


#: What the first process of a container does: say so, and wait for the end of its input.
_WAIT = "echo ready; read -r _"


class ContainerFactory:
    """Makes containers; see `orbstack_containers`.

    A container hangs on a pipe of this process, and the engine removes it when the pipe is closed:
    so none is left behind, even if this process is killed.
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
        """Make a container, in which nothing runs but a shell that waits.

        Args:
            image: Image with a shell, as in ``docker run``; it is pulled where it is missing.
            name: What its name begins with; a random end keeps it apart from all others.
            groups: runs.Groups of the host, or their data by name.
            data: Data of the host, which come before that of groups.
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
                # Ctrl-C shall reach the tests alone, which close the pipe when they have ended.
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
        """Delete those that are still there."""
        for container in self._made:
            container.delete()


def _let_go(holder: subprocess.Popen[bytes]) -> None:
    """Close the pipe on which a container hangs, and wait until it is gone."""
    with holder:
        pass
