"""`make coverage`: run the test suite, and measure its coverage of `src/`.

The result is cached for the content of the checkout that it belongs to, so that
`make release-check` does not run everything again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ending

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(".cache", "coverage")
RESULT = CACHE / "result.json"
#: Each target saves the content for which it passed, in a file of its name.
PASSED = Path(".cache", "passed")
TARGETS = ("test", "thorough")
#: The simulator's processes run this; it is in CACHE during a measurement.
PROGRAM = "reached.py"
#: Required percentage of the lines of src/. Of the others, most handle errors of the operating
#: system that no test can cause, or run in a process that is killed right after.
NEEDED = 96.0
#: These tests have targets of their own, and would run the measured tests a second time.
LEFT_OUT = ("docs", "hosts", "release", "template")

SETTINGS = """\
[run]
parallel = true
patch = subprocess, _exit, execv
concurrency = greenlet, thread
data_file = {folder}/data
source =
    {root}/src/orbctl_simulator
    {root}/src/pyinfra_orbstack
disable_warnings = no-data-collected, module-not-imported, no-sysmon
"""
#: Every Python of this environment reads it at startup; it does nothing once its file is gone.
HOOK = """\
import os; os.path.exists({0!r}) and exec(open({0!r}).read(), dict(__file__={0!r}))
"""


def tree(root: Path) -> str:
    """An identifier for the content of a checkout, uncommitted changes included; "" without git."""
    return _tree(root, released=True)


def tested(root: Path) -> str:
    """The same, without the version and the changelog: `make release` sets them after the tests."""
    return _tree(root, released=False)


def _tree(root: Path, released: bool) -> str:
    if not (root / ".git").exists():
        return ""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "GIT_INDEX_FILE": str(Path(folder, "index"))}

        def git(*words: str, stdin: str = "") -> str:
            done = subprocess.run(
                ["git", *words],
                cwd=root,
                env=environment,
                check=True,
                capture_output=True,
                input=stdin,
                encoding="utf-8",
            )
            return done.stdout.strip()

        git("add", "--all")
        if not released:
            text = (root / "pyproject.toml").read_text(encoding="utf-8")
            text = re.sub(r'^version = ".*"$', "", text, count=1, flags=re.MULTILINE)
            without = git("hash-object", "-w", "--stdin", stdin=text)
            git("update-index", "--cacheinfo", f"100644,{without},pyproject.toml")
            git("update-index", "--force-remove", "CHANGELOG.md")
        return git("write-tree")


def note_passed(root: Path, target: str, content: str) -> None:
    """Record that the tests of a target passed for some content."""
    (root / PASSED).mkdir(parents=True, exist_ok=True)
    (root / PASSED / target).write_text(content)


def have_passed(root: Path) -> bool:
    """Whether the tests passed for exactly this content."""
    notes = [root / PASSED / target for target in TARGETS]
    content = tested(root)
    return content != "" and all(note.exists() and note.read_text() == content for note in notes)


def recorded(root: Path) -> dict[str, Any] | None:
    """The measurement of exactly this content, or None."""
    try:
        result: dict[str, Any] = json.loads((root / RESULT).read_text())
    except (OSError, ValueError):
        return None
    return result if result["tree"] == tested(root) != "" else None


@contextlib.contextmanager
def hooked(root: Path) -> Iterator[None]:
    """In the body, the simulator's processes record the lines that they reach, see `reached.py`."""
    folder = root / CACHE
    (folder / "lines").touch()
    (folder / "lines").chmod(0o666)  # for processes of other users
    program = folder / PROGRAM
    shutil.copyfile(Path(__file__).with_name(PROGRAM), program)
    name = hashlib.sha256(os.fsencode(root)).hexdigest()[:8]
    # Python reads these files in the order of their names: this one before coverage.py's.
    hook = Path(sysconfig.get_path("purelib"), f"a0_reached-{name}.pth")
    # First, so that it is found again whatever happens.
    (folder / "hook").write_text(str(hook))
    hook.write_text(HOOK.format(str(program)))
    try:
        yield
    finally:
        unhook(root)


def unhook(root: Path) -> None:
    """Stop measuring, including in a run that was killed."""
    folder = root / CACHE
    (folder / PROGRAM).unlink(missing_ok=True)
    place = folder / "hook"
    if place.exists():
        hook = Path(place.read_text())
        if hook.suffix == ".pth" and hook.name.startswith("a0_reached-"):
            hook.unlink(missing_ok=True)
        place.unlink()


def add_lines(folder: Path) -> None:
    """Add the lines that the simulator's processes recorded to coverage.py's data."""
    from coverage import CoverageData

    source = folder.parent.parent / "src" / "orbctl_simulator"
    reached: dict[str, set[int]] = {}
    for line in (folder / "lines").read_text().splitlines():
        for name, numbers in json.loads(line).items():
            reached.setdefault(str(source / name), set()).update(numbers)
    data = CoverageData(str(folder / "data.simulator"))
    data.add_lines(reached)
    data.write()


def measure(root: Path, *places: str) -> dict[str, Any]:
    """Run all tests or those in some places; save their outcome and coverage."""
    folder = root / CACHE
    unhook(root)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    content = tested(root)
    markers = " and ".join(f"not {marker}" for marker in LEFT_OUT)
    coverage = [sys.executable, "-m", "coverage"]
    options = [f"--rcfile={folder / 'settings'}"]
    (folder / "settings").write_text(SETTINGS.format(folder=folder, root=root))
    tests = [*coverage, "run", *options, "-m", "pytest", *(places or ["tests"]), "-m", markers]
    # As in `make test`: the tests of one file share machines.
    tests += ["-n", "auto", "--dist", "loadfile"]
    # The path comes first, even if the interpreter knows another checkout.
    paths = [str(root / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with hooked(root):
        failed = ending.call(tests, cwd=root, env=environment)
    add_lines(folder)
    subprocess.run([*coverage, "combine", "--quiet", *options], cwd=root, check=not failed)
    report = folder / "report.json"
    for kind in (["json", "-o", str(report)], ["xml", "-o", str(folder / "coverage.xml")]):
        subprocess.run([*coverage, *kind, "--quiet", *options], cwd=root, check=not failed)
    found = json.loads(report.read_text()) if report.exists() else {"files": {}, "totals": {}}
    result = {
        "tree": content,
        "passed": failed == 0,
        "percent": found["totals"].get("percent_covered", 0.0),
        "files": {
            str(Path(name).relative_to(root) if Path(name).is_absolute() else name): [
                file["summary"]["percent_covered"],
                file["missing_lines"],
            ]
            for name, file in found["files"].items()
        },
    }
    if not places:
        (root / RESULT).write_text(json.dumps(result))
    return result


def show(result: dict[str, Any]) -> None:
    """Print a table of the files that are not fully covered."""
    for name, (percent, missing) in sorted(result["files"].items(), key=lambda item: item[1][0]):
        if missing:
            print(f"{percent:5.1f} %  {len(missing):4} lines not reached  {name}")
    print(f"{result['percent']:5.1f} %  of src/ (needed {NEEDED:g} %)")


def main() -> int:
    """Measure unless that is done, and show the result; arguments select some of the tests."""
    ending.listen()
    places = sys.argv[1:]
    result = measure(ROOT, *places) if places else recorded(ROOT) or measure(ROOT)
    show(result)
    if not result["passed"]:
        print("the tests failed", file=sys.stderr)
    return 0 if result["passed"] and result["percent"] >= NEEDED else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
