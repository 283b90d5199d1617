"""The steps of a project's CI that keep the image of its machines for later runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.simulator.mirror import Mirror, archive
from tests.template.conftest import Render
from tests.template.project import Project, run

IMAGE = "alpine:3.99"
ARCH = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]


def steps(project: Project) -> list[dict[str, Any]]:
    """Those before `make test` that run something."""
    test = yaml.safe_load(project.text(".github/workflows/ci.yml"))["jobs"]["test"]
    assert test["steps"][-1]["run"] == "make test"
    return [step for step in test["steps"][:-1] if "run" in step]


class Runner:
    """A computer of GitHub's, as far as these steps see it."""

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
    """A run without it pulls and keeps it; a later one elsewhere needs no server."""
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
