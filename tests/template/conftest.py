from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyinfra_orbstack.orbctl import Orbctl, Record
from pyinfra_orbstack.testing import unavailable
from tests import sharing
from tests.template.project import Project, git

ROOT = Path(__file__).parent.parent.parent

# copier needs Python 3.10.
collect_ignore_glob = ["test_*"] if sys.version_info < (3, 10) else []

#: Renders with these answers into a directory of this name.
Render = Callable[..., Project]


@pytest.fixture(autouse=True, scope="session")
def clean_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Ignore the developer's settings for copier and git, and an active environment."""
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
    # Downloading an interpreter would need more than the package index.
    patch.setenv("UV_PYTHON", sys.executable)
    patch.setenv("UV_PYTHON_DOWNLOADS", "never")
    yield
    patch.undo()


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The template of this checkout, in a separate repository without tags."""
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
    """Render the template without `--trust`."""

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
    """Our own wheel, because no index has this version before its release."""
    folder = tmp_path_factory.mktemp("wheels")
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def index(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rendered projects find our wheel in addition to the host's index."""
    for name, separator in (("UV_FIND_LINKS", ","), ("PIP_FIND_LINKS", " ")):
        before = os.environ.get(name)
        monkeypatch.setenv(name, separator.join([*([before] if before else []), str(wheels)]))


@pytest.fixture
def destroy(client: Orbctl) -> Iterator[Callable[[Project], None]]:
    """Delete everything that projects created at the end, even if the test fails."""
    projects: list[Project] = []
    yield projects.append
    for project in projects:
        Record(project.path / ".orbstack" / "machines").delete_all(client)


# Machines that boot ------------------------------------------------------------------------------

#: Booting machines of real images, as users have them; other tests use the host's root.
BOOTED = {"ORBCTL_SIMULATOR_IMAGES": "none", "ORBCTL_SIMULATOR_INIT": "image"}
#: Longer than usual, since several boot at a time.
BOOTED["ORBCTL_SIMULATOR_BOOT_TIMEOUT"] = "120"
#: Ubuntu with the sample's packages, under a name that no other test uses.
PREPARED = "devuan:daedalus"
#: Stops the packages' services, and removes what must differ between machines.
PREPARE = """
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qqy --no-install-recommends nginx nftables postgresql openssh-server
systemctl disable --now --quiet nftables
systemctl stop nginx postgresql 'postgresql@*'
apt-get clean
: >/etc/machine-id
"""
PACK = "tar -C / --one-file-system --numeric-owner --exclude ./var/lib/apt/lists -cf - ."


@pytest.fixture
def boots(client: Orbctl, monkeypatch: pytest.MonkeyPatch) -> None:
    """Projects' machines boot, and install packages from the distribution."""
    for name, value in BOOTED.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def prepared_image(client: Orbctl, simulated: bool, shared_directory: Path) -> str:
    """ubuntu:noble with the sample's packages, prepared once for all workers."""
    if not simulated:
        return "ubuntu:noble"
    packed = sharing.prepared(shared_directory, "prepared.tar", prepare)
    simulator("image", "add", PREPARED, str(packed))
    return PREPARED


def simulator(*words: str, stdin: str = "") -> None:
    """Run a command of the simulator, with machines that boot."""
    program = Path(sys.executable).with_name("orbctl-simulator")
    env = {**os.environ, **BOOTED}
    done = subprocess.run([program, *words], env=env, input=stdin, capture_output=True, text=True)
    if done.returncode:
        unavailable(f"{' '.join(words)}: {done.stderr}")


def prepare(packed: Path) -> None:
    """Write the root file system of a machine with the packages."""
    name = f"prepare-{secrets.token_hex(4)}"
    simulator("create", "--user", "root", "ubuntu:noble", name)
    try:
        simulator("run", "-m", name, "-u", "root", "sh", "-e", stdin=PREPARE)
        program = Path(sys.executable).with_name("orbctl-simulator")
        pack = [program, "run", "-m", name, "-u", "root", "sh", "-c", PACK]
        with packed.open("wb") as file:
            subprocess.run(pack, stdout=file, check=True)
    finally:
        simulator("delete", "-f", name)


@pytest.fixture
def prepared(boots: None, prepared_image: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The projects' tests use this image instead of their own, so no package is downloaded."""
    # Stop at the first failure.
    monkeypatch.setenv("PYTEST_ADDOPTS", f"-x --orbstack-image {prepared_image}")
    return prepared_image
