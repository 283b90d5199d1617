"""A checkout and its build results, for `make release-check`."""

from __future__ import annotations

import email
import email.message
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
NAME = "pyinfra-orbstack"


class Problem(Exception):
    """A check that failed; the text is the reason."""


class Checkout:
    """A checkout of the project, and its build results."""

    def __init__(self, root: Path = ROOT, releasing: bool = False) -> None:
        self.root = root
        self.releasing = releasing
        self._dist: tempfile.TemporaryDirectory[str] | None = None

    def text(self, name: str) -> str:
        """The content of a file."""
        return (self.root / name).read_text(encoding="utf-8")

    @property
    def project(self) -> dict[str, Any]:
        """The table `project` of pyproject.toml."""
        table: dict[str, Any] = tomllib.loads(self.text("pyproject.toml"))["project"]
        return table

    @property
    def version(self) -> str:
        """The version to release."""
        return str(self.project["version"])

    def git(self, *args: str) -> str:
        """The output of a git command."""
        return self.run("git", *args).strip()

    def run(self, *argv: object, fail: str = "", **env: str) -> str:
        """Run a command that must succeed; the problem is `fail`, else the command's output."""
        words = [str(word) for word in argv]
        done = subprocess.run(
            words,
            cwd=self.root,
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        if done.returncode:
            raise Problem(f"{fail or ' '.join(words)}\n{done.stdout.strip()}")
        return done.stdout

    def tool(self, name: str, *args: object) -> str:
        """Run a tool that is installed beside this interpreter."""
        return self.run(BIN / name, *args)

    def files(self) -> set[str]:
        """The files that git tracks."""
        return set(self.git("ls-files").splitlines())

    @property
    def dist(self) -> list[Path]:
        """Wheel and sdist, built once."""
        if self._dist is None:
            folder = tempfile.TemporaryDirectory()
            self.run(sys.executable, "-m", "build", "--outdir", folder.name)
            self._dist = folder
        return sorted(Path(self._dist.name).iterdir())

    @property
    def wheel(self) -> Path:
        (path,) = (path for path in self.dist if path.suffix == ".whl")
        return path

    @property
    def sdist(self) -> Path:
        (path,) = (path for path in self.dist if path.name.endswith(".tar.gz"))
        return path

    @property
    def metadata(self) -> email.message.Message:
        """The metadata in the wheel."""
        return read_metadata(self.wheel.read_bytes())


def read_metadata(wheel: bytes) -> email.message.Message:
    """The metadata in a wheel."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def need(condition: object, problem: str) -> None:
    """Raise `Problem` unless a condition is true."""
    if not condition:
        raise Problem(problem)
