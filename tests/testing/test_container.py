"""Containers of the plugin: what they can do, and that none is left behind."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyinfra.facts.files import File
from pyinfra.facts.server import Hostname
from pyinfra.operations import files, server

from pyinfra_orbstack import docker
from pyinfra_orbstack.testing import Container, ContainerFactory

from ..containers import Containers

pytest_plugins = ["pytester"]


@pytest.fixture(scope="module")
def container(
    containers: Containers, orbstack_containers: ContainerFactory, small_image: str
) -> Iterator[Container]:
    with orbstack_containers(small_image, "tested", data={"wanted": "/srv/app"}) as container:
        yield container
    assert container.id not in {one.id for one in containers.client.containers()}


@pytest.mark.long
def test_a_deploy_file_is_applied(container: Container, tmp_path: Path) -> None:
    deploy = tmp_path / "deploy.py"
    deploy.write_text(
        "from pyinfra import host\n"
        "from pyinfra.operations import files\n"
        "files.directory(name='Folder', path=host.data.wanted)\n"
        "files.line(name='Line', path='/etc/hosts.local', line=' '.join(sorted(host.groups)))\n"
    )
    assert container.apply(deploy).changed == ["Folder", "Line"]
    assert container.assert_idempotent(deploy).ok
    assert set(container.read("/etc/hosts.local").split()) == {
        "@orbstack",
        "container",
        "orbstack_containers",
        f"orbstack_image_{docker.Docker().inspect(container.name).image_name}",
    }


@pytest.mark.long
def test_operations_facts_and_commands(container: Container) -> None:
    made = container.apply(files.directory, path="/srv/made", mode="700")
    assert made.changed
    assert not container.apply(files.directory, path="/srv/made", mode="700").changed
    assert container.fact(File, path="/srv/made") is False
    assert container.fact(Hostname)
    assert container.host == f"@orbstack/docker/{container.name}"
    assert container.run(["id", "-un"]).stdout == "root\n"
    assert container.run("cat; exit 3", stdin=b"in", check=False) == (3, "in", "")
    with pytest.raises(AssertionError, match="exit 3"):
        container.run("exit 3", user="nobody")
    with pytest.raises(TimeoutError, match="was killed"):
        container.run("sleep 4321", timeout=2)
    running = "cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -o 'sleep 432[1]'; true"
    assert container.run(running).stdout == ""
    assert not container.apply(server.shell, commands="exit 3", check=False).ok


def test_containers_are_deleted_in_any_order(
    containers: Containers, orbstack_containers: ContainerFactory, small_image: str
) -> None:
    one, two = orbstack_containers(small_image), orbstack_containers(small_image)
    assert {one.id, two.id} <= {there.id for there in containers.client.containers()}
    one.delete()
    one.delete()
    there = {container.id for container in containers.client.containers()}
    assert (one.id in there, two.id in there) == (False, True)
    two.delete()


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A suite with one test, which creates a container from the image in IMAGE."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    pytester.makepyfile(
        """
        import os, pathlib, time

        def test(orbstack_containers):
            made = orbstack_containers(os.environ["IMAGE"])
            pathlib.Path("id").write_text(made.id)
            time.sleep(float(os.environ.get("SLEEP", 0)))
        """
    )
    return pytester


@pytest.fixture
def small_suite(
    suite: pytest.Pytester, small_image: str, monkeypatch: pytest.MonkeyPatch
) -> pytest.Pytester:
    monkeypatch.setenv("IMAGE", small_image)
    return suite


def test_a_container_without_with_lives_until_the_end(
    small_suite: pytest.Pytester, containers: Containers
) -> None:
    small_suite.runpytest_subprocess().assert_outcomes(passed=1)
    made = (small_suite.path / "id").read_text()
    assert made not in {one.id for one in containers.client.containers()}


def test_a_killed_run_leaves_no_container(
    small_suite: pytest.Pytester, containers: Containers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLEEP", "60")
    run = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q"], cwd=small_suite.path, stdout=subprocess.DEVNULL
    )
    written = small_suite.path / "id"
    deadline = time.monotonic() + 120
    while not (written.exists() and written.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    made = written.read_text()
    assert made in {one.id for one in containers.client.containers()}
    run.kill()
    run.wait()
    deadline = time.monotonic() + 120
    while made in {one.id for one in containers.client.containers()}:
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.parametrize("ci", [False, True])
def test_missing_containers_skip_tests_and_fail_in_ci(
    suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, ci: bool
) -> None:
    command = suite.path / "docker"
    command.write_text("#!/bin/sh\necho 'Cannot connect to the Docker daemon.' >&2; exit 1\n")
    command.chmod(0o755)
    monkeypatch.setenv(docker.COMMAND_VARIABLE, str(command))
    monkeypatch.setenv("CI", str(ci).lower())
    result = suite.runpytest_subprocess("-rs")
    result.assert_outcomes(**{"errors" if ci else "skipped": 1})
    result.stdout.fnmatch_lines(["*no containers: Cannot connect to the Docker daemon."])


@pytest.mark.long
@pytest.mark.usefixtures("containers")
def test_an_image_that_cannot_run_skips_the_test(
    suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMAGE", "localhost/no-such-image:1")
    result = suite.runpytest_subprocess("-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*no containers: localhost/no-such-image:1: *"])
