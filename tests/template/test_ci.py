"""A project's workflows: the image that they cache, and the lock file that they use."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.simulator.mirror import Mirror, archive
from tests.template.conftest import Render
from tests.template.project import Project, git, run, tool

IMAGE = "alpine:3.99"
ARCH = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]


def steps(project: Project) -> list[dict[str, Any]]:
    """The steps before `make test` that run commands."""
    test = yaml.safe_load(project.text(".github/workflows/ci.yml"))["jobs"]["test"]
    assert test["steps"][-1]["run"] == "make test"
    return [step for step in test["steps"][:-1] if "run" in step]


class Runner:
    """A GitHub runner, as far as these steps need it."""

    def __init__(self, place: Path, project: Project, images: str) -> None:
        self.project = project
        beside = Path(sys.executable).with_name("orbctl-simulator")
        (place / "bin").mkdir(parents=True)
        uv = place / "bin" / "uv"
        uv.write_text(f'#!/bin/sh\nshift 2\nexec "{beside}" "$@"\n')
        uv.chmod(0o755)
        self.env = {
            "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
            "HOME": str(place),
            "GITHUB_ENV": str(place / "env"),
            "ORBCTL_SIMULATOR_HOME": str(place / "state"),
            "ORBCTL_SIMULATOR_CACHE": str(place / "cache"),
            "ORBCTL_SIMULATOR_IMAGES": images,
        }

    def __call__(self, cached: bool) -> None:
        for step in steps(self.project):
            if f"cache-hit {'!=' if cached else '=='}" in step.get("if", ""):
                continue
            run(self.project.path, "bash", "-e", "-c", step["run"], env=self.env)
            line = (Path(self.env["GITHUB_ENV"])).read_text()
            self.env.update([line.rstrip("\n").split("=", 1)])

    def images(self) -> list[str]:
        simulator = [sys.executable, "-m", "orbctl_simulator"]
        shown = run(self.project.path, *simulator, "image", "list", env=self.env)
        return [line.split()[0] for line in shown.splitlines()]


@pytest.mark.usefixtures("root_only")
def test_the_image_is_fetched_once(render: Render, tmp_path: Path) -> None:
    """A run without the image pulls and stores it; a later run elsewhere needs no server."""
    root = tmp_path / "root"
    for name, text in (("etc/os-release", "ID=alpine\n"), ("bin/sh", "")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    mirror = Mirror(tmp_path / "mirror")
    packed = archive(root, tmp_path / "root.tar.xz").read_bytes()
    mirror.offer(f"alpine:3.99:{ARCH}:default", packed)
    project = render(image=IMAGE)

    first = Runner(tmp_path / "first", project, str(mirror.place))
    first(cached=False)
    assert first.images() == [IMAGE]
    kept = tmp_path / "first" / "image.tar.zst"

    second = Runner(tmp_path / "second", project, "none")
    kept.rename(tmp_path / "second" / kept.name)
    second(cached=True)
    assert second.images() == [IMAGE]


# The lock ---------------------------------------------------------------------------------------


def started(template: Path, place: Path, without: str = "") -> Project:
    """A project committed with exactly the commands that copier prints."""
    place.mkdir()
    argv = [sys.executable, "-m", "copier", "copy", "--defaults", "-r", "HEAD", str(template)]
    done = subprocess.run([*argv, "myproj"], cwd=place, capture_output=True, text=True, check=True)
    words = [line for line in done.stderr.splitlines() if line.startswith("    ")]
    first = next(number for number, line in enumerate(words) if "git commit" in line)
    text = "\n".join(words[: first + 1])
    assert without in text
    run(place, "sh", "-exc", text.replace(without, ""), env=with_uv())
    return Project(place / "myproj")


def with_uv() -> dict[str, str]:
    """An environment with uv."""
    return {"PATH": os.pathsep.join([str(Path(tool("uv")).parent), os.environ["PATH"]])}


def environment(project: Project, workflow: str) -> dict[str, str]:
    """The environment that a workflow sets for every step."""
    found: dict[str, str] = yaml.safe_load(project.text(f".github/workflows/{workflow}.yml"))["env"]
    return {**with_uv(), **found}


@pytest.mark.template
@pytest.mark.usefixtures("index")
@pytest.mark.parametrize("workflow", ["ci", "coverage"])
def test_the_lock_file_is_committed_and_ci_uses_it(
    template: Path, tmp_path: Path, workflow: str
) -> None:
    project = started(template, tmp_path / "here")
    if workflow == "coverage":
        (project.path / ".github/workflows/coverage.yml").write_text(
            (template / "template/.github/workflows/coverage.yml").read_text()
        )
    assert "uv.lock" in git(project.path, "ls-files").split()
    locked = project.text("uv.lock")
    env = environment(project, workflow)

    # The lock file is enough.
    run(project.path, "uv", "lock", env=env)
    # A requirement was added without updating the lock, or the lock is missing.
    project.write("pyproject.toml", '"jinja2>=3.1,<4"', '"jinja2>=3.1,<4", "six>=1.16"')
    for lint in (["make", "lint"], ["uv", "run", "true"]):
        with pytest.raises(AssertionError, match=r"needs to be updated"):
            run(project.path, *lint, env=env)
    assert project.text("uv.lock") == locked
    (project.path / "uv.lock").unlink()
    with pytest.raises(AssertionError, match=r"Unable to find lockfile"):
        project.make("lint", **env)
    project.make("lock", **with_uv())
    assert 'name = "six"' in project.text("uv.lock")
    run(project.path, "uv", "lock", env=env)


def test_every_workflow_that_runs_uv_is_locked(render: Render) -> None:
    project = render(codecov=True, deploy_from_ci=True)
    for path in sorted(project.path.glob(".github/workflows/*.yml")):
        workflow = yaml.safe_load(path.read_text())
        commands = "\n".join(
            step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]
        )
        if re.search("uv (run|audit)|make ", commands):
            assert workflow.get("env", {}).get("UV_LOCKED") == "1", path.name


@pytest.mark.template
@pytest.mark.usefixtures("index")
def test_in_a_larger_repository_it_is_committed_there(template: Path, tmp_path: Path) -> None:
    """By the same commands, without `git init`."""
    top = tmp_path / "top"
    top.mkdir()
    git(top, "init", "-q")
    project = started(template, top / "deeper", without="git init -b main && ")
    assert not project.has(".git")
    assert "deeper/myproj/uv.lock" in git(top, "ls-files").split()
    assert git(top, "status", "--porcelain") == ""
