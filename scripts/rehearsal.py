"""A rehearsed release: uploaded to an index on this host, installed from it, and used."""

from __future__ import annotations

import contextlib
import io
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

import measure
from checkout import BIN, NAME, Checkout, Problem, need, read_metadata

#: Asks pyinfra itself, in a clean environment.
SEEN = """\
from pyinfra.api.connectors import get_all_connectors
import pyinfra_orbstack
print(pyinfra_orbstack.__version__, get_all_connectors()["orbstack"].__name__)
"""


@contextlib.contextmanager
def package_index(folder: Path) -> Iterator[str]:
    """An index on loopback that contains only what is uploaded to it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    packages = folder / "packages"
    packages.mkdir()
    argv = [sys.executable, "-m", "pypiserver", "run", "-i", "127.0.0.1", "-p", str(port)]
    # Its cache would not know a copied file at once.
    argv += ["--backend", "simple-dir", "--disable-fallback", "-P", ".", "-a", ".", str(packages)]
    with (folder / "index.log").open("wb") as log:
        server = subprocess.Popen(argv, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(url, timeout=5).close()
                break
            time.sleep(0.1)
        else:
            raise Problem(f"the index does not answer\n{(folder / 'index.log').read_text()}")
        yield url
    finally:
        server.terminate()
        server.wait()


def clone(checkout: Checkout, folder: Path) -> Checkout:
    """The content of the checkout in a separate repository, tagged with its version."""
    archive = subprocess.run(
        ["git", "archive", measure.tree(checkout.root)],
        cwd=checkout.root,
        check=True,
        stdout=subprocess.PIPE,
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder)  # noqa: S202 our own files
    copy = Checkout(folder)
    who = ("-c", "user.name=Nobody", "-c", "user.email=nobody@example.org")
    copy.git("init", "--quiet")
    copy.git("add", "--all", "--force")
    copy.git(*who, "commit", "--quiet", "--message", "Release")
    copy.git(*who, "tag", "--annotate", f"v{checkout.version}", "--message", checkout.version)
    return copy


def rehearse(checkout: Checkout) -> str:
    """Do everything that follows a release; raise `Problem` if something goes wrong."""
    folder = Path(tempfile.mkdtemp(prefix="rehearsal-"))
    try:
        copy = clone(checkout, folder / "clone")
        with package_index(folder) as url:
            upload(copy, url)
            programs = [install(copy, url, folder / "venv"), *install_with_uv(copy, url, folder)]
            exec_in_machine(copy, folder, programs)
            render(copy, url, folder)
    finally:
        # Root owns files that the simulator creates for an ordinary user: the session deletes them.
        shutil.rmtree(folder, ignore_errors=True)
    return f"{checkout.version} uploaded once, installed in three ways, used, and asked for"


def upload(copy: Checkout, url: str) -> None:
    """An index accepts the archives once, and not again."""
    account = ("--username", "nobody", "--password", "nothing")
    twine = ("twine", "upload", "--non-interactive", "--disable-progress-bar", *account)
    copy.tool(*twine, "--repository-url", f"{url}/", *copy.dist)
    try:
        copy.tool(*twine, "--repository-url", f"{url}/", *copy.dist)
    except Problem as refused:
        answered = re.search(r"HTTPError: 4\d\d", str(refused))
        need(answered, f"the second upload failed in an unexpected way: {refused}")
    else:
        raise Problem("the index took the same files twice")


def install(copy: Checkout, url: str, venv: Path) -> Path:
    """The name alone installs a working version in an empty environment.

    Returns the path of its `pyinfra`, as do the other ways to install.
    """
    copy.run(sys.executable, "-m", "venv", venv)
    python = venv / "bin" / "python"
    pip = (python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install")
    # With two indexes at once it would be uncertain which one ours comes from.
    copy.run(*pip, *(read_metadata(copy.wheel.read_bytes()).get_all("Requires-Dist") or []))
    ours = ("--no-deps", "--no-cache-dir", "--index-url", f"{url}/simple/")
    copy.run(*pip, *ours, f"{NAME}=={copy.version}", PIP_EXTRA_INDEX_URL="", PIP_FIND_LINKS="")
    copy.run(*pip[:3], "check")
    look_at(copy, python)
    with zipfile.ZipFile(copy.wheel) as archive:
        named = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        found = named and "pytest11" in archive.read(named[0]).decode()
        need(found, "the pytest plugin is missing")
    return venv / "bin" / "pyinfra"


def look_at(copy: Checkout, python: Path) -> None:
    """An environment has the uploaded version, and pyinfra finds the connector in it."""
    said = copy.run(python, "-I", "-c", SEEN).split()
    right = [copy.version, "OrbStackConnector"]
    need(said == right, f"the installed package reports {said}, not {right}")


def install_with_uv(copy: Checkout, url: str, folder: Path) -> list[Path]:
    """The same with uv, as in the README: into a project, and beside the command pyinfra."""
    project, tools = Checkout(folder / "project"), folder / "tools"
    environment = uv_environment(copy, url, project.root)
    environment.update(UV_TOOL_DIR=str(tools), UV_TOOL_BIN_DIR=str(folder / "commands"))
    project.root.mkdir()
    project.run("uv", "init", "--quiet", "--bare", "--name", "trial", **environment)
    project.run("uv", "add", "--quiet", NAME, **environment)
    check_lock(copy, url, project.root)
    both = ("pyinfra", "--with-executables-from", NAME)
    project.run("uv", "tool", "install", "--quiet", *both, **environment)
    need((folder / "commands" / "orbctl-simulator").exists(), "uv did not install the simulator")
    for venv in (project.root / ".venv", tools / "pyinfra"):
        look_at(copy, venv / "bin" / "python")
    return [project.root / ".venv" / "bin" / "pyinfra", folder / "commands" / "pyinfra"]


def uv_environment(copy: Checkout, url: str, root: Path) -> dict[str, str]:
    """Settings with which uv, in a directory, takes ours from our index and the rest as usual."""
    environment = {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "UV_INDEX": " ".join([f"{url}/simple/", *filter(None, [os.environ.get("UV_INDEX")])]),
        "UV_PYTHON": sys.executable,
        "UV_PYTHON_DOWNLOADS": "never",
        "UV_PROJECT_ENVIRONMENT": str(root / ".venv"),
        "PYTHONPATH": "",
        "VIRTUAL_ENV": "",
    }
    if is_pre(copy):
        environment["UV_PRERELEASE"] = "allow"
    return environment


def is_pre(copy: Checkout) -> bool:
    """Whether installers take the version only when told to."""
    return re.search("[a-z]", copy.version) is not None


def check_lock(copy: Checkout, url: str, root: Path) -> None:
    """A project's lock file pins the uploaded version."""
    lock = (root / "uv.lock").read_text()
    mine = re.search(rf'name = "{NAME}"\nversion = "([^"]+)"\nsource = (.*)', lock)
    need(mine and mine[1] == copy.version and url in mine[2], f"not from the index: {mine}")


def exec_in_machine(copy: Checkout, folder: Path, programs: list[Path]) -> None:
    """Each installed pyinfra runs a command in a machine of the installed simulator."""
    simulator = folder / "venv" / "bin" / "orbctl-simulator"
    machine = f"rehearsal-{secrets.token_hex(3)}"
    environment = {
        "ORBCTL_SIMULATOR_HOME": str(folder / "simulator"),
        "PYINFRA_ORBSTACK_ORBCTL": str(simulator),
        "PYTHONPATH": "",
    }
    copy.run(simulator, "create", "debian", machine, **environment)
    try:
        host = f"@orbstack/{machine}"
        for pyinfra in programs:
            said = copy.run(pyinfra, host, "exec", "--", "hostname", **environment)
            right = re.search(rf"\] {machine}$", said, re.MULTILINE)
            need(right, f"{pyinfra}: no hostname in\n{said}")
    finally:
        copy.run(simulator, "delete", "-f", machine, **environment)


def render(copy: Checkout, url: str, folder: Path) -> None:
    """A project rendered from the tag requires the uploaded version, and works with it."""
    import copier

    settings = folder / "copier.yml"
    settings.write_text("{}\n")
    os.environ["COPIER_SETTINGS_PATH"] = str(settings)
    target = folder / "myproj"
    pre = is_pre(copy)
    copier.run_copy(
        str(copy.root), target, defaults=True, quiet=True, unsafe=False, use_prereleases=pre
    )
    answers = (target / ".copier-answers.yml").read_text()
    need(f"_commit: v{copy.version}\n" in answers, f"rendered from elsewhere:\n{answers}")
    project = Checkout(target)
    project.git("init", "--quiet")
    project.git("add", "--all")
    environment = {
        **uv_environment(copy, url, target),
        "ORBCTL_SIMULATOR_HOME": str(folder / "simulator"),
        "XDG_STATE_HOME": str(folder / "state"),
        "CI": "true",
    }
    # Variables that an outer make passes on would reach the project's own.
    for name in ("MAKEFLAGS", "MAKELEVEL", "ITEM", "VERSION"):
        environment[name] = ""
    need(shutil.which("make"), "make is missing")
    if pre:
        # It requires the coming version, which a candidate is not; docs/releasing.md explains this.
        candidate = f"{NAME}=={copy.version}"
        project.run("uv", "add", "--quiet", "--group", "test", candidate, **environment)
    project.run("make", "lint", **environment)
    # All of its tests run in `make template`; these use the plugin and the simulator, and need no
    # machine that boots and installs packages.
    quick = {"ORBCTL_SIMULATOR_INIT": "none", "ORBCTL_SIMULATOR_IMAGES": "host"}
    chosen = ("-k", "secret or inventories")
    project.run("uv", "run", "--quiet", "pytest", *chosen, **environment, **quick)
    check_lock(copy, url, target)
