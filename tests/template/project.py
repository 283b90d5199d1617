"""A rendered project, and its checks, which raise if they fail."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


#: With this, no machine can be created, and tests that need one are skipped.
WITHOUT_MACHINES = {"CI": "", "ORBCTL_SIMULATOR_HOME": "/dev/null"}


def run(folder: Path, *argv: str, env: dict[str, str] | None = None, timeout: float = 1200) -> str:
    """Run a command that must succeed, and return its output."""
    done = subprocess.run(
        argv,
        cwd=folder,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    if done.returncode:
        raise AssertionError(f"{' '.join(argv)} in {folder}: {done.returncode}\n{done.stdout}")
    return done.stdout


def git(folder: Path, *args: str) -> str:
    """Run git."""
    return run(folder, "git", *args)


def tool(name: str) -> str:
    """An executable next to this interpreter, or on PATH."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name) or name


class Project:
    """A rendered project."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def text(self, name: str) -> str:
        """Content of a file."""
        return (self.path / name).read_text(encoding="utf-8")

    def has(self, name: str) -> bool:
        """Whether a file or directory exists."""
        return (self.path / name).exists()

    def write(self, name: str, old: str, new: str) -> None:
        """Replace a text that must exist."""
        text = self.text(name)
        assert old in text, f"{old!r} is not in {name}"
        (self.path / name).write_text(text.replace(old, new, 1), encoding="utf-8")

    @property
    def toml(self) -> dict[str, Any]:
        """pyproject.toml."""
        return tomllib.loads(self.text("pyproject.toml"))

    @property
    def answers(self) -> dict[str, Any]:
        """The recorded answers."""
        answers: dict[str, Any] = yaml.safe_load(self.text(".copier-answers.yml"))
        return answers

    @property
    def package(self) -> str:
        """Name of its package."""
        (folder,) = (path for path in (self.path / "src").iterdir() if path.is_dir())
        return folder.name

    def commit(self) -> None:
        """Commit everything."""
        if not self.has(".git"):
            git(self.path, "init", "-q")
        git(self.path, "add", "-A")
        git(self.path, "commit", "-q", "--allow-empty", "-m", "Work")

    def make(self, *args: str, **env: str) -> str:
        """Run a target as a user would."""
        return run(self.path, "make", *args, env=env)

    def use_image(self, image: str) -> None:
        """Use a local image for its containers."""
        self.write("compose.yaml", "debian:bookworm-slim", image)

    def machines(self) -> list[str]:
        """Names of its local machines."""
        from pyinfra_orbstack.inventory_files import inventory_hosts

        hosts = inventory_hosts(self.path / "inventories" / "local.py")
        return [host.split("/", 1)[1] for host in hosts]

    def update(self, source: Path, **data: Any) -> None:
        """`copier update` to the latest tag of a template, which must leave no conflict."""
        import copier

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            copier.run_update(
                self.path, data=data, defaults=True, overwrite=True, quiet=True, unsafe=False
            )
        self.check_no_conflict()
        assert self.answers["_src_path"] == str(source)

    # Checks

    def check_files(self, *, odd: bool = False) -> None:
        """Every file that other tools parse is valid, and no template syntax is left.

        Args:
            odd: Whether the answers look like template syntax.
        """
        assert self.toml["project"]["name"] == self.answers["project_name"]
        for path in self.files():
            text = path.read_text(encoding="utf-8")
            if path.suffix in (".yml", ".yaml"):
                yaml.safe_load(text)
            elif path.suffix == ".py":
                compile(text, str(path), "exec")
            if path.suffix != ".j2" and not odd:
                assert "{%" not in text, f"{path} has template syntax"
            assert text == "" or text.endswith("\n"), f"{path} has no newline at its end"
            assert not text.endswith("\n\n"), f"{path} ends in empty lines"

    def files(self) -> list[Path]:
        """The rendered files, without those that tools add."""
        made = {".git", ".venv", "dist", "__pycache__", "uv.lock", ".orbstack"}
        return [
            path
            for path in self.path.rglob("*")
            if path.is_file()
            and not any(part in made or part.endswith("_cache") for part in path.parts)
        ]

    def check_tests(self, *files: str) -> None:
        """Its own tests, or some of them, pass here: faster than in its own environment."""
        # Under CI, missing machines or containers fail instead of being skipped.
        self._pytest(*files, env={"CI": "true"})

    def check_tests_without_machines(self) -> None:
        """The tests that need no machine pass; the others are skipped."""
        said = self._pytest("--orbstack", "simulator", env=WITHOUT_MACHINES)
        passed, skipped = map(int, re.findall(r"(\d+) (?:passed|skipped)", said))
        assert passed > 20, said
        assert skipped > 10, said

    def _pytest(self, *words: str, env: dict[str, str]) -> str:
        command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", *words]
        return run(self.path, *command, env={"PYTHONPATH": str(self.path / "src"), **env})

    def check_workflows(self) -> None:
        """GitHub's schemas accept its workflows, and zizmor finds nothing."""
        schema = tool("check-jsonschema")
        workflows = sorted(str(path) for path in self.path.glob(".github/workflows/*.yml"))
        assert workflows
        run(self.path, schema, "--builtin-schema", "vendor.github-workflows", *workflows)
        run(
            self.path,
            schema,
            "--builtin-schema",
            "vendor.dependabot",
            ".github/dependabot.yml",
        )
        if self.has(".github/ISSUE_TEMPLATE"):
            templates = sorted(self.path.glob(".github/ISSUE_TEMPLATE/*.yml"))
            forms = [str(path) for path in templates if path.name != "config.yml"]
            run(self.path, schema, "--builtin-schema", "vendor.github-issue-forms", *forms)
            run(
                self.path,
                schema,
                "--builtin-schema",
                "vendor.github-issue-config",
                ".github/ISSUE_TEMPLATE/config.yml",
            )
        if self.has("compose.yaml"):
            run(self.path, schema, "--builtin-schema", "vendor.compose-spec", "compose.yaml")
        run(self.path, tool("zizmor"), "--offline", "--no-progress", ".")
        for name in workflows:
            self.check_workflow(yaml.safe_load(Path(name).read_text()), name)
        try:
            run(self.path, tool("actionlint"), *workflows)
        except (AssertionError, OSError) as said:
            # This is a fork by one author, and may be wrong.
            warnings.warn(f"actionlint: {said}", stacklevel=1)

    @staticmethod
    def check_workflow(workflow: dict[str, Any], name: str) -> None:
        """Every job has its own permissions and a timeout, and every action is pinned."""
        assert workflow["permissions"] == {}, name
        for job in workflow["jobs"].values():
            assert job["timeout-minutes"] <= 30, name
            assert "permissions" in job, name
            for step in job["steps"]:
                uses = step.get("uses")
                assert uses is None or len(uses.partition("@")[2]) == 40, f"{name}: {uses}"

    def check_no_conflict(self) -> None:
        """An update left no conflict."""
        for path in self.files():
            assert "<<<<<<<" not in path.read_text(encoding="utf-8"), f"conflict in {path}"
        assert not list(self.path.rglob("*.rej"))
        states = {line[:2] for line in git(self.path, "status", "--porcelain").splitlines()}
        assert "UU" not in states

    def archives(self) -> dict[str, bytes]:
        """Every file in its sdist and its wheel."""
        contents: dict[str, bytes] = {}
        for archive in (self.path / "dist").iterdir():
            if archive.suffix == ".whl":
                with zipfile.ZipFile(archive) as wheel:
                    contents.update({name: wheel.read(name) for name in wheel.namelist()})
            elif archive.name.endswith(".tar.gz"):
                with tarfile.open(archive) as sdist:
                    for member in sdist.getmembers():
                        file = sdist.extractfile(member)
                        contents[member.name] = file.read() if file else b""
        assert contents
        return contents

    def all_checks(self, *, machines: bool = True) -> None:
        """Everything that a user and GitHub would run.

        Args:
            machines: Whether its tests create machines; if not, those that need one are skipped.
        """
        self.check_files()
        self.make("lint")
        assert " passed" in self.make("test", **({"CI": "true"} if machines else WITHOUT_MACHINES))
        if self.answers["publish_to_pypi"]:
            self.make("release-check")
        else:
            run(self.path, tool("uv"), "build", "--quiet", "--no-sources")
            dist = [str(path) for path in (self.path / "dist").iterdir() if path.name[0] != "."]
            run(self.path, tool("twine"), "check", "--strict", *dist)
            run(self.path, tool("check-wheel-contents"), "dist")
        self.check_workflows()
