"""Virtual environments, set up by uv as far as a session needs them, and the Python for each."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import ending

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
CACHE = ROOT / ".cache"
#: Lists the contents of `.venv`.
STAMP = VENV / "installed"
#: The Makefile installs it beside nox.
UV = CACHE / "nox" / "bin" / "uv"

#: copier needs at least the first; the second and later are untested.
FOR_COPIER = (3, 10), (3, 15)
#: Whether the user named a Python, as in `make test PYTHON=python3.9`.
EXACTLY = bool(os.environ.get("EXACTLY"))
PYENV = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
BREW = ["/opt/homebrew/bin", "/usr/local/bin", "/home/linuxbrew/.linuxbrew/bin"]


class Stop(Exception):
    """Something that the user has to do; the text is one line."""


def run(*argv: object, env: Mapping[str, str] | None = None) -> None:
    """Run a command in the checkout; its own output describes any error.

    nox's own way to run a command kills tests that have machines to delete.
    """
    words = [str(word) for word in argv]
    status = ending.call(words, cwd=ROOT, env={**os.environ, **(env or environment())})
    if status:
        raise Stop(f"exit code {status}: {' '.join(words)}")


def environment(venv: Path = VENV) -> dict[str, str]:
    """`.venv` first on PATH, and a place in the checkout for files that tests and demo leave.

    That includes bytecode: tests start thousands of Pythons, and each takes twice as long without.
    """
    return {
        "PATH": os.pathsep.join([str(venv / "bin"), os.environ.get("PATH", os.defpath)]),
        "PYTHONDONTWRITEBYTECODE": "",
        "XDG_STATE_HOME": str(CACHE / "state"),
        "ORBCTL_SIMULATOR_HOME": str(CACHE / "simulator"),
        "ORBCTL_SIMULATOR_CACHE": str(CACHE / "simulator-layers"),
    }


def uv_environment() -> dict[str, str]:
    """Settings with which uv also finds the Pythons of pyenv and Homebrew."""
    path = os.environ.get("PATH", os.defpath).split(os.pathsep)
    # There is a shim for each Python, and most lead nowhere.
    path = [folder for folder in path if folder != str(PYENV / "shims")]
    path += [str(folder) for folder in PYENV.glob("versions/3.*/bin")]
    return {
        "PATH": os.pathsep.join(path + BREW),
        "VIRTUAL_ENV": "",
        "UV_COMPILE_BYTECODE": "1",
    }


def uv(*words: object) -> None:
    """Run uv."""
    run(UV, *words, env=uv_environment())


def ask(python: object) -> tuple[str, tuple[int, ...]]:
    """An interpreter's real path, outside environments, and its version; () if there is none."""
    code = "import sys; print(getattr(sys, '_base_executable', 0) or sys.executable)"
    argv = [str(python), "-c", f"{code}; print(*sys.version_info[:2])"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True)
    except OSError:
        return "", ()
    place, _, version = done.stdout.partition("\n")
    return place, tuple(map(int, version.split()))


def find_python(wanted: str) -> str:
    """An interpreter of such a version, for example 3.9, or ""."""
    words = [str(UV), "python", "find", "--no-project", "--system", wanted]
    env = {**os.environ, **uv_environment()}
    return subprocess.run(words, env=env, capture_output=True, text=True).stdout.strip()


def usable(version: tuple[int, ...]) -> bool:
    """Whether copier runs on this version."""
    return FOR_COPIER[0] <= version < FOR_COPIER[1]


def create_venv(for_copier: bool) -> None:
    """Create `.venv` with the named Python, or else with one that copier supports."""
    oldest, newest = (".".join(map(str, version)) for version in FOR_COPIER)
    named, version = ask(os.environ.get("PYTHON") or sys.executable)
    choices = [named] if usable(version) or EXACTLY else [f">={oldest},<{newest}", named]
    if for_copier and not usable(version):
        choices.remove(named)
    for python in choices:
        with contextlib.suppress(Stop):
            uv("venv", "--quiet", "--clear", "--seed", "--python", python, VENV)
            return
    raise Stop(f"copier needs Python {oldest} or later, below {newest}: install one")


def setup(*groups: str, for_copier: bool = False) -> None:
    """Create `.venv` and install the package with these dependency groups, unless up to date."""
    version = ask(PYTHON)[1]
    right = bool(version) and not (EXACTLY and version != ask(os.environ["PYTHON"])[1])
    if not right or (for_copier and not usable(version)):
        print("setting up .venv", flush=True)
        create_venv(for_copier)
    old = STAMP.read_text().splitlines() if STAMP.exists() else []
    if old[:1] == [digest()]:
        if set(groups) <= set(old[1:]):
            return
        groups = tuple(sorted({*groups, *old[1:]}))
    print(f"installing {', '.join(groups) or 'the package'} into .venv", flush=True)
    install(VENV, groups)
    STAMP.write_text("\n".join([digest(), *groups]))


def digest() -> str:
    """A digest that changes with the dependencies."""
    return hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()


def install(venv: Path, groups: Iterable[str], *packages: str) -> None:
    """Install the package, editable, with these groups and packages."""
    wanted = [word for group in groups for word in ("--group", group)]
    python = venv / "bin" / "python"
    uv("pip", "install", "--quiet", "--python", python, "--editable", ".", *wanted, *packages)
