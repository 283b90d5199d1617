"""Every item of `make release-check` has faults that make it fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ..conftest import ROOT


class Copy:
    """The content of the checkout, in a separate repository."""

    def __init__(self, scripts: Any, folder: Path) -> None:
        self.scripts = scripts
        self.root = folder
        files = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for name in filter(None, files.split("\0")):
            if (ROOT / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        self.git("init", "--quiet", "--initial-branch=main")
        self.commit()

    def git(self, *args: str) -> None:
        who = ("-c", "user.name=Nobody", "-c", "user.email=nobody@example.org")
        subprocess.run(["git", *who, *args], cwd=self.root, check=True, capture_output=True)

    def commit(self) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", "Work")

    def write(self, name: str, old: str, new: str) -> None:
        """Replace a text that must exist, and commit."""
        path = self.root / name
        text = path.read_text(encoding="utf-8")
        assert old in text, f"{old!r} is not in {name}"
        path.write_text(text.replace(old, new), encoding="utf-8")
        self.commit()

    def add(self, name: str, text: str) -> None:
        """Write a new file, and commit."""
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(text, encoding="utf-8")
        self.commit()

    def measured(self, **found: Any) -> None:
        """Record a result of the tests for the current content."""
        content = self.scripts.measure.tested(self.root)
        result = {"tree": content, "passed": True, "percent": 100.0}
        path = self.root / self.scripts.measure.RESULT
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**result, "files": {}, **found}))

    def check(self, item: str, releasing: bool = False) -> str:
        """The item's message; raises if the item fails."""
        said: str = self.scripts.ITEMS[item](self.scripts.Checkout(self.root, releasing))
        return said


@pytest.fixture
def copy(scripts: Any, tmp_path: Path) -> Copy:
    return Copy(scripts, tmp_path / "copy")


def plant_test(copy: Copy) -> None:
    shutil.rmtree(copy.root / "tests")
    copy.add("tests/test_it.py", "def test_it():\n    assert False\n")


def plant_low_coverage(copy: Copy) -> None:
    copy.measured(percent=copy.scripts.measure.NEEDED - 1)


def plant_pragma(copy: Copy) -> None:
    copy.write(
        "src/pyinfra_orbstack/timing.py", "import time\n", "import time # pragma: no cover\n"
    )
    copy.measured()


def plant_uncommitted(copy: Copy) -> None:
    (copy.root / "README.md").write_text("nothing\n")


def plant_badge(copy: Copy) -> None:
    (copy.root / ".github" / "workflows" / "ci.yml").rename(copy.root / "moved.yml")


def plant_tag(copy: Copy) -> None:
    copy.write("CHANGELOG.md", f"## [{copy.scripts.Checkout(copy.root).version}]", "## [0.0.1]")


FAULTS: list[tuple[str, str, Callable[[Copy], None], str]] = [
    (
        "lint",
        "unused import",
        lambda copy: copy.add("src/pyinfra_orbstack/more.py", "import os\n"),
        "F401",
    ),
    (
        "types",
        "wrong type",
        lambda copy: copy.add("scripts/more.py", '"""X."""\n\nnumber: int = "one"\n'),
        "Incompatible types",
    ),
    ("tests", "failing test", plant_test, "the tests failed"),
    ("coverage", "too little", plant_low_coverage, "needed are"),
    ("coverage", "pragma", plant_pragma, "without a reason"),
    (
        "metadata",
        "wrong URL",
        lambda copy: copy.write("pyproject.toml", "pyinfra-orbstack/issues", "other/issues"),
        "the URLs are not",
    ),
    (
        "metadata",
        "no version",
        lambda copy: copy.write("pyproject.toml", '\nversion = "1', '\nversion = "v1'),
        "validate-pyproject|semantic",
    ),
    (
        "metadata",
        "unknown classifier",
        lambda copy: copy.write("pyproject.toml", "Topic :: Utilities", "Topic :: Nonsense"),
        "validate-pyproject",
    ),
    (
        "metadata",
        "second version",
        lambda copy: copy.add("src/pyinfra_orbstack/more.py", '__version__ = "2"\n'),
        "a version of its own",
    ),
    (
        "metadata",
        "classifier left out",
        lambda copy: copy.write("pyproject.toml", '    "Typing :: Typed",\n', ""),
        "'Typing :: Typed' is missing",
    ),
    (
        "metadata",
        "another name",
        lambda copy: copy.write("pyproject.toml", 'name = "pyinfra-orbstack"', 'name = "other"'),
        "the name is not",
    ),
    (
        "metadata",
        "nobody to write to",
        lambda copy: copy.write("pyproject.toml", ', email = "me@matthewturland.com"', ""),
        "pyroma",
    ),
    ("build", "uncommitted", plant_uncommitted, "not committed: README.md"),
    (
        "build",
        "no backend",
        lambda copy: copy.write("pyproject.toml", "hatchling.build", "hatchling.nothing"),
        "nothing",
    ),
    (
        "contents",
        "template in the wheel",
        lambda copy: copy.write(
            "pyproject.toml",
            'packages = ["src/orbctl_simulator", "src/pyinfra_orbstack"]',
            'packages = ["src/orbctl_simulator", "src/pyinfra_orbstack", "template"]',
        ),
        "not in src/",
    ),
    (
        "contents",
        "file left out",
        lambda copy: copy.write(
            "pyproject.toml",
            'packages = ["src/orbctl_simulator", "src/pyinfra_orbstack"]',
            'packages = ["src/orbctl_simulator", "src/pyinfra_orbstack"]\nexclude = ["py.typed"]',
        ),
        "the wheel lacks",
    ),
    (
        "contents",
        "file left out of the sdist",
        lambda copy: copy.write(
            "pyproject.toml",
            "[tool.hatch.build.targets.wheel]",
            '[tool.hatch.build.targets.sdist]\nexclude = ["docs"]\n\n'
            "[tool.hatch.build.targets.wheel]",
        ),
        "the sdist lacks docs/",
    ),
    (
        "strict",
        "no description",
        lambda copy: copy.write("pyproject.toml", 'readme = "README.md"\n', ""),
        "long_description",
    ),
    (
        "readme",
        "relative link",
        lambda copy: copy.add("README.md", "[docs](docs/template.md)\n"),
        "means nothing on an index",
    ),
    (
        "readme",
        "dead link",
        lambda copy: copy.add(
            "README.md", f"[docs]({copy.scripts.REPOSITORY}/blob/main/docs/none.md)\n"
        ),
        "not in the repository",
    ),
    (
        "changelog",
        "no entries",
        lambda copy: copy.add("CHANGELOG.md", "# Changelog\n\n## [Unreleased]\n"),
        "no entry",
    ),
    (
        "badges",
        "workflow moved",
        plant_badge,
        "which does not exist",
    ),
    (
        "badges",
        "another project",
        lambda copy: copy.write("README.md", "/pypi/v/pyinfra-orbstack", "/pypi/v/other"),
        "of another project",
    ),
    (
        "badges",
        "one left out",
        lambda copy: copy.write("README.md", "[![License]", "[![Freedom]"),
        "lacks the badges License",
    ),
    (
        "workflows",
        "a file that is missing",
        lambda copy: (copy.root / ".github/workflows/weekly.yml").unlink(),
        "weekly.yml is missing",
    ),
    (
        "workflows",
        "updates that nobody makes",
        lambda copy: copy.write(".github/dependabot.yml", "version: 2", "version: 1"),
        "dependabot",
    ),
    (
        "workflows",
        "unpinned action",
        lambda copy: copy.write(
            ".github/workflows/ci.yml",
            "actions/checkout@3d3c42e5aac5ba805825da76410c181273ba90b1",
            "actions/checkout@v7",
        ),
        "unpinned|not pinned",
    ),
    (
        "workflows",
        "too many rights",
        lambda copy: copy.write(".github/workflows/ci.yml", "permissions: {}\n\n", ""),
        "permissions",
    ),
    (
        "workflows",
        "no job",
        lambda copy: copy.write(".github/workflows/ci.yml", "runs-on:", "run-on:"),
        "run-on",
    ),
    (
        "workflows",
        "no timeout",
        lambda copy: copy.write(".github/workflows/weekly.yml", "    timeout-minutes: 20\n", ""),
        "no timeout",
    ),
    (
        "docs",
        "dead link",
        lambda copy: copy.add("docs/template.md", "# Template\n\n[x](none.md)\n"),
        "none.md",
    ),
    (
        "docs",
        "page that nothing leads to",
        lambda copy: copy.add("docs/more.md", "# More\n"),
        "more.md",
    ),
    (
        "rehearsal",
        "connector not registered",
        lambda copy: copy.write(
            "pyproject.toml",
            '[project.entry-points."pyinfra.connectors"]',
            "[project.entry-points.x]",
        ),
        "orbstack",
    ),
    (
        "rehearsal",
        "template asks for what is not there",
        lambda copy: copy.write("template/pyproject.toml.jinja", ">=1.0,<2", ">=1.9,<2"),
        "1.9",
    ),
]


@pytest.mark.parametrize(
    ("item", "plant", "problem"),
    [(item, plant, problem) for item, _, plant, problem in FAULTS],
    ids=[f"{item}: {name}" for item, name, _, _ in FAULTS],
)
def test_fault_is_found(
    item: str, plant: Callable[[Copy], None], problem: str, copy: Copy, scripts: Any
) -> None:
    plant(copy)
    with pytest.raises(scripts.Problem, match=problem):
        copy.check(item)


def test_every_item_has_a_fault(scripts: Any) -> None:
    own = {"index"}
    assert {item for item, *_ in FAULTS} | own == set(scripts.ITEMS)


# The index: its answers cannot be planted in a checkout -----------------------------------------


@pytest.fixture(scope="module")
def packages(scripts: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("index")
    with scripts.rehearsal.package_index(folder) as url:
        yield f"{url}/simple", folder / "packages"


def test_index(
    copy: Copy, scripts: Any, packages: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, folder = packages

    def ask(url: str = url) -> str:
        # Not while wheels are built, because that needs a backend from the usual index.
        with monkeypatch.context() as patch:
            patch.setenv("PIP_INDEX_URL", url)
            return copy.check("index")

    assert ask() == "pyinfra-orbstack is free"
    checkout = scripts.Checkout(copy.root)
    shutil.copy(checkout.wheel, folder)
    with pytest.raises(scripts.Problem, match="already exists"):
        ask()
    copy.write("pyproject.toml", f'version = "{checkout.version}"', 'version = "1.99.0"')
    assert "is ours" in ask()
    copy.write("pyproject.toml", 'version = "1.99.0"', 'version = "1.98.0"')
    copy.write("pyproject.toml", "github.com/elazar/", "github.com/somebody/")
    theirs = scripts.Checkout(copy.root)
    shutil.copy(theirs.wheel, folder)
    with pytest.raises(scripts.Problem, match="not ours"):
        ask()
    assert ask("http://127.0.0.1:9/simple").startswith("unknown: ")


# The changelog, the item itself, and the release ------------------------------------------------


def test_changelog_at_a_tag(copy: Copy, scripts: Any) -> None:
    version = scripts.Checkout(copy.root).version
    text = "# Changelog\n\n## [Unreleased]\n\n- One thing.\n"
    copy.add("CHANGELOG.md", text)
    assert "not released yet" in copy.check("changelog")
    with pytest.raises(scripts.Problem, match="no section"):
        copy.check("changelog", releasing=True)
    copy.git("tag", f"v{version}")
    with pytest.raises(scripts.Problem, match="is tagged"):
        copy.check("changelog")
    dated = text.replace("- One", f"## [{version}] - 2026-01-02\n\n- One")
    copy.add("CHANGELOG.md", dated)
    copy.git("tag", "--force", f"v{version}")
    assert copy.check("changelog") == f"{version} is dated 2026-01-02"
    copy.add("CHANGELOG.md", dated.replace("2026-01-02", "soon"))
    with pytest.raises(scripts.Problem, match="no date"):
        copy.check("changelog")


def test_result_counts_for_the_same_content_only(copy: Copy, scripts: Any) -> None:
    copy.measured()
    assert "passed before" in copy.check("tests")
    assert copy.check("coverage").startswith("100.0 %")
    copy.add("CHANGELOG.md", "What `make release` changes was no part of the tests.\n")
    copy.write("pyproject.toml", '\nversion = "1', '\nversion = "2')
    assert scripts.measure.recorded(copy.root)
    copy.add("more.txt", "more\n")
    assert scripts.measure.recorded(copy.root) is None
    copy.measured()
    copy.write("pyproject.toml", "\ntimeout = ", "\ntimeout = 1")
    assert scripts.measure.recorded(copy.root) is None


def test_check_stops_at_the_first_failure(copy: Copy, capsys: Any) -> None:
    copy.add("CHANGELOG.md", "# Changelog\n")
    release_check = copy.scripts.release_check
    checkout = copy.scripts.Checkout(copy.root)
    assert release_check.check(checkout, ["changelog", "lint"]) == "changelog"
    assert "lint" not in capsys.readouterr().out


def run(copy: Copy, program: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, f"scripts/{program}"],
        cwd=copy.root,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )


def test_items_by_name(copy: Copy) -> None:
    done = run(copy, "release_check.py", ITEM="changelog")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 1
    done = run(copy, "release_check.py", ITEM="changelog,badges")
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["changelog", "badges"]
    done = run(copy, "release_check.py", ITEM="changelog,nothing")
    assert done.returncode == 2
    assert "is none of lint" in done.stderr


@pytest.fixture
def quick(copy: Copy) -> Copy:
    """A copy that checks only the changelog."""
    copy.write(
        "scripts/release_check.py", "releasing), items)", 'releasing), ["changelog", "build"])'
    )
    copy.add(
        "CHANGELOG.md",
        "# Changelog\n\n## [Unreleased]\n\n### Added\n\n- One thing.\n\n"
        "[Unreleased]: https://github.com/elazar/pyinfra-orbstack/commits/main\n",
    )
    for key, value in (("name", "Nobody"), ("email", "nobody@example.org")):
        copy.git("config", f"user.{key}", value)
    return copy


def test_release(quick: Copy) -> None:
    done = run(quick, "release.py", VERSION="3.2.1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'version = "3.2.1"' in (quick.root / "pyproject.toml").read_text()
    changelog = (quick.root / "CHANGELOG.md").read_text()
    assert "\n## [Unreleased]\n\n## [3.2.1] - 20" in changelog
    assert "/compare/v3.2.1...HEAD\n[3.2.1]: https://" in changelog
    assert "git push --atomic origin HEAD:main v3.2.1" in done.stdout
    notes = (quick.root / ".cache" / "release-notes.md").read_text()
    assert notes == "### Added\n\n- One thing.\n"
    log = subprocess.run(
        ["git", "log", "-1", "--format=%s"], cwd=quick.root, capture_output=True, text=True
    )
    assert log.stdout == "chore(release): 3.2.1\n"


@pytest.mark.parametrize(
    ("version", "reason"),
    [("", "is not a version"), ("1.0", "is not a version"), ("v1.0.0", "is not a")],
)
def test_release_refuses(quick: Copy, version: str, reason: str) -> None:
    done = run(quick, "release.py", VERSION=version)
    assert done.returncode == 1
    assert reason in done.stderr


def test_release_that_fails_leaves_nothing(quick: Copy) -> None:
    quick.write("pyproject.toml", "hatchling.build", "hatchling.nothing")
    before = (quick.root / "CHANGELOG.md").read_text()
    done = run(quick, "release.py", VERSION="3.2.1")
    assert done.returncode == 1
    assert "nothing was released" in done.stderr
    assert (quick.root / "CHANGELOG.md").read_text() == before
