from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyinfra_orbstack.orbctl import Orbctl
from tests.template.project import Project, git

ROOT = Path(__file__).parent.parent.parent

# copier needs Python 3.10.
collect_ignore_glob = ["test_*"] if sys.version_info < (3, 10) else []

#: Renders with these answers into a folder of this name.
Render = Callable[..., Project]


@pytest.fixture(autouse=True, scope="session")
def clean_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Neither the developer's settings for copier and git, nor an active environment, count."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("settings")
    (folder / "copier.yml").write_text("{}\n")
    (folder / "gitconfig").write_text(
        "[user]\nname = Somebody\nemail = somebody@example.org\n[init]\ndefaultBranch = main\n"
    )
    patch.setenv("COPIER_SETTINGS_PATH", str(folder / "copier.yml"))
    patch.setenv("GIT_CONFIG_GLOBAL", str(folder / "gitconfig"))
    ours = ["UV_PYTHON", "UV_PROJECT_ENVIRONMENT", "VIRTUAL_ENV", "MAKEFLAGS", "MAKELEVEL"]
    for name in [*ours, "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"]:
        patch.delenv(name, raising=False)
    # Fetching an interpreter would need more of the network than the package index.
    patch.setenv("UV_PYTHON", sys.executable)
    patch.setenv("UV_PYTHON_DOWNLOADS", "never")
    yield
    patch.undo()


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The template as it is in the checkout, in a repository of its own without any tag."""
    folder = tmp_path_factory.mktemp("template")
    shutil.copy(ROOT / "copier.yml", folder)
    ignore = shutil.ignore_patterns("__pycache__", ".*_cache")
    shutil.copytree(ROOT / "template", folder / "template", ignore=ignore)
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "Template")
    return folder


@pytest.fixture
def render(template: Path, tmp_path: Path) -> Render:
    """Render the template, as a user does who trusts nothing."""

    def render(
        name: str = "myproj",
        source: Path = template,
        ref: str = "HEAD",
        answers_file_path: str | None = None,
        **answers: Any,
    ) -> Project:
        import copier

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            worker = copier.run_copy(
                str(source),
                tmp_path / name,
                data=answers,
                answers_file=answers_file_path,
                defaults=True,
                quiet=True,
                unsafe=False,
                vcs_ref=ref,
            )
        project = Project(tmp_path / name)
        given = {key: worker.answers.combined[key] for key in answers}
        assert given == answers, "an answer was not taken"
        return project

    return render


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our own wheel, since no index has this version before it is released."""
    folder = tmp_path_factory.mktemp("wheels")
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def index(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rendered projects find our wheel beside whatever the computer's index offers."""
    for name, separator in (("UV_FIND_LINKS", ","), ("PIP_FIND_LINKS", " ")):
        before = os.environ.get(name)
        monkeypatch.setenv(name, separator.join([*([before] if before else []), str(wheels)]))


@pytest.fixture
def machines_possible(client: Orbctl) -> Orbctl:
    """`orbctl` for the projects, the same as for our own tests."""
    return client
