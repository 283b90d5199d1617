"""Virtual environments, as far as a target of `make` needs them, and the Python for each.

A newer Python, for copier, is looked for where people keep theirs. Like dev.py this needs Python
3.9 and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ending

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
CACHE = ROOT / ".cache"
STAMP = VENV / "installed.json"

#: Whether somebody has named a Python, as in `make test PYTHON=python3.9`.
EXACTLY = bool(os.environ.get("EXACTLY"))
#: copier needs the first; nothing is known of versions after the second.
OLDEST_FOR_COPIER, NEWEST = (3, 10), (3, 14)
BREW = ("/opt/homebrew/bin", "/usr/local/bin", "/home/linuxbrew/.linuxbrew/bin")
#: Works on every Python from 3.9 on; needed only where Python comes without ensurepip.
PIP = "25.3"


class Stop(Exception):
    """Something that the user has to do; the text is one line."""


def run(*argv: object, env: Mapping[str, str] | None = None) -> None:
    """Run a command in the checkout; its own output says what went wrong."""
    words = [str(word) for word in argv]
    status = ending.call(words, cwd=ROOT, env={**os.environ, **(env or {})})
    if status:
        raise SystemExit(status if status > 0 else 128 - status)


def quietly(*argv: object) -> None:
    """Run a command whose output matters only when it fails."""
    words = [str(word) for word in argv]
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.stderr.buffer.write(done.stdout)
        raise Stop(f"failed: {' '.join(words)}")


def version(python: object) -> tuple[int, ...]:
    """Version of an interpreter, () if it is none."""
    code = "import sys, venv; print(*sys.version_info[:2])"
    try:
        done = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    except OSError:
        return ()
    return tuple(map(int, done.stdout.split())) if done.returncode == 0 else ()


def has(python: object, module: str) -> bool:
    """Whether an interpreter can import a module."""
    return not subprocess.run(
        [str(python), "-c", f"import {module}"], capture_output=True
    ).returncode


def pythons(*minors: int) -> Iterator[str]:
    """Places of these versions of Python 3, by PATH, pyenv and Homebrew."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    for minor in minors:
        name = f"python3.{minor}"
        for path in (None, os.pathsep.join(BREW)):
            yield shutil.which(name, path=path) or ""
        for home in sorted(pyenv.glob(f"3.{minor}.*"), reverse=True):
            yield str(home / "bin" / name)


def newer_pythons() -> Iterator[str]:
    """Interpreters that copier can run on, the newest first."""
    return pythons(*range(NEWEST[1], OLDEST_FOR_COPIER[1] - 1, -1))


def find_python(wanted: str) -> str:
    """An interpreter of just this version, such as 3.9, or ""."""
    parts = tuple(map(int, wanted.split(".")))
    found = next((path for path in pythons(parts[1]) if version(path) == parts), "")
    uv = shutil.which("uv")
    if not found and uv:
        done = subprocess.run([uv, "python", "find", wanted], capture_output=True, text=True)
        found = done.stdout.strip() if done.returncode == 0 else ""
    return found


def usable(python: object) -> bool:
    """Whether copier runs on this interpreter."""
    return OLDEST_FOR_COPIER <= version(python) <= NEWEST


def create_venv(for_copier: bool) -> None:
    """Make `.venv` with the best Python that can be had."""
    # The real one, should this be running from a virtual environment, maybe this very `.venv`.
    python = getattr(sys, "_base_executable", None) or sys.executable
    uv = shutil.which("uv")
    if not usable(python) and not EXACTLY:
        python = next(filter(usable, newer_pythons()), python)
    if not usable(python) and uv and not EXACTLY:
        quietly(uv, "venv", "--quiet", "--clear", "--seed", "--python", ">=3.10,<3.15", VENV)
        return
    if not usable(python) and for_copier:
        raise Stop(
            "copier needs Python 3.10 to 3.14 and only "
            f"{'.'.join(map(str, sys.version_info[:2]))} was found: install a newer Python, or uv"
        )
    make_venv(python, VENV)


def make_venv(python: object, venv: Path) -> None:
    """Make a virtual environment that has pip."""
    uv = shutil.which("uv")
    if has(python, "ensurepip"):
        quietly(python, "-m", "venv", "--clear", venv)
    elif uv:
        quietly(uv, "venv", "--quiet", "--clear", "--seed", "--python", python, venv)
    else:
        quietly(python, "-m", "venv", "--clear", "--without-pip", venv)
        bootstrap_pip(python, venv)


def fetch(url: str) -> bytes:
    """Get something from the package index."""
    tls = ssl.create_default_context(cafile=os.environ.get("PIP_CERT"))
    with urllib.request.urlopen(url, context=tls, timeout=60) as answer:  # noqa: S310
        content: bytes = answer.read()
    return content


def bootstrap_pip(python: object, venv: Path) -> None:
    """Put pip into an environment where Python comes without ensurepip, as Debian's does."""
    index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/") + "/pip/"
    name = f"pip-{PIP}-py3-none-any.whl"
    try:
        link = re.search(rf'"([^"]*/{re.escape(name)})#sha256=([0-9a-f]+)"', fetch(index).decode())
        if not link:
            raise OSError(f"{index} has no {name}")
        wheel = fetch(urllib.parse.urljoin(index, link[1]))
        if hashlib.sha256(wheel).hexdigest() != link[2]:
            raise OSError(f"{name} is damaged")
    except OSError as error:
        shutil.rmtree(venv)
        raise Stop(
            f"{python} has no ensurepip, and pip could not be fetched ({error}): "
            "install it (Debian: apt-get install python3-venv)"
        ) from None
    path = venv / name
    path.write_bytes(wheel)
    quietly(venv / "bin" / "python", f"{path}/pip", "install", "--quiet", path)


def setup(*groups: str, for_copier: bool = False) -> None:
    """Make `.venv` and install the package with these dependency groups, unless that is done."""
    project = (ROOT / "pyproject.toml").read_bytes()
    installed: dict[str, Any] = {}
    right = version(PYTHON) == sys.version_info[:2] if EXACTLY else version(PYTHON)
    if not (for_copier and not usable(PYTHON)) and right and has(PYTHON, "pip"):
        installed = json.loads(STAMP.read_text()) if STAMP.exists() else {}
    else:
        print("setting up .venv", flush=True)
        create_venv(for_copier)
    digest = hashlib.sha256(project).hexdigest()
    if installed.get("digest") == digest:
        if set(groups) <= set(installed["groups"]):
            return
        groups = tuple(sorted({*groups, *installed["groups"]}))
    print(f"installing {', '.join(groups) or 'the package'} into .venv", flush=True)
    install(VENV, groups)
    STAMP.write_text(json.dumps({"digest": digest, "groups": groups}))


def install(venv: Path, groups: Iterable[str], *packages: str) -> None:
    """Install the package, editable, with these groups and packages."""
    python = venv / "bin" / "python"
    pip = (python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install")
    quietly(*pip, "--upgrade", "pip>=25.1")
    wanted = [word for group in groups for word in ("--group", group)]
    quietly(*pip, "--editable", ".", *wanted, *packages)


def environment(venv: Path = VENV) -> dict[str, str]:
    """`.venv` first on PATH, and whatever tests and demo leave behind inside the checkout."""
    return {
        "PATH": os.pathsep.join([str(venv / "bin"), os.environ.get("PATH", os.defpath)]),
        "XDG_STATE_HOME": str(CACHE / "state"),
        "ORBCTL_SIMULATOR_HOME": str(CACHE / "simulator"),
        "ORBCTL_SIMULATOR_CACHE": str(CACHE / "simulator-layers"),
    }
