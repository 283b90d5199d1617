"""`make coverage`: the test suite, and what it reaches of `src/`.

What was found is kept for the content of the checkout that it was found for, so that
`make release-check` does not run everything again.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(".cache", "coverage")
RESULT = CACHE / "result.json"
#: What `make test` leaves: the content for which it passed.
PASSED = Path(".cache", "tests-passed")
#: What is wanted, and what is asked for as long as the former is not reached: never lowered.
WANTED, NEEDED = 99.0, 60.0
#: These tests are other targets' own, and run what is measured here a second time.
LEFT_OUT = ("docs", "release", "template")

SETTINGS = """\
[run]
parallel = true
patch = subprocess, _exit
data_file = {root}/.cache/coverage/data
source = {root}/src/pyinfra_orbstack
disable_warnings = no-data-collected, module-not-imported, no-sysmon
"""


def tree(root: Path) -> str:
    """Name of the content of a checkout, with what is not committed yet; "" where git has none."""
    if not (root / ".git").exists():
        return ""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "GIT_INDEX_FILE": str(Path(folder, "index"))}
        for words in (["add", "--all"], ["write-tree"]):
            done = subprocess.run(
                ["git", *words], cwd=root, env=environment, check=True, capture_output=True
            )
    return done.stdout.decode().strip()


def note_passed(root: Path, content: str) -> None:
    """Write down that the tests passed for some content."""
    (root / PASSED).parent.mkdir(exist_ok=True)
    (root / PASSED).write_text(content)


def have_passed(root: Path) -> bool:
    """Whether the tests passed for just this content."""
    path = root / PASSED
    return path.exists() and path.read_text() == tree(root) != ""


def recorded(root: Path) -> dict[str, Any] | None:
    """What was measured of just this content, if anything was."""
    try:
        result: dict[str, Any] = json.loads((root / RESULT).read_text())
    except (OSError, ValueError):
        return None
    return result if result["tree"] == tree(root) else None


def measure(root: Path) -> dict[str, Any]:
    """Run the tests and write down how they ended and what they reached."""
    folder = root / CACHE
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    settings = folder / "settings"
    settings.write_text(SETTINGS.format(root=root))
    content = tree(root)
    coverage = [sys.executable, "-m", "coverage"]
    options = [f"--rcfile={settings}"]
    markers = " and ".join(f"not {marker}" for marker in LEFT_OUT)
    tests = [*coverage, "run", *options, "-m", "pytest", "tests", "-m", markers]
    # As in `make test`: the tests of one file share machines.
    tests += ["-n", "auto", "--dist", "loadfile"]
    # The path comes first, also where the interpreter knows another checkout.
    paths = [str(root / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    failed = subprocess.run(tests, cwd=root, env=environment).returncode
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
    (root / RESULT).write_text(json.dumps(result))
    return result


def show(result: dict[str, Any]) -> None:
    """A table of the files that are not reached wholly."""
    for name, (percent, missing) in sorted(result["files"].items(), key=lambda item: item[1][0]):
        if missing:
            print(f"{percent:5.1f} %  {len(missing):4} lines not reached  {name}")
    print(f"{result['percent']:5.1f} %  of src/ (needed {NEEDED:g} %, wanted {WANTED:g} %)")


def main() -> int:
    """Measure, unless that was done, and show it."""
    result = recorded(ROOT) or measure(ROOT)
    show(result)
    if not result["passed"]:
        print("the tests failed", file=sys.stderr)
    return 0 if result["passed"] and result["percent"] >= NEEDED else 1


if __name__ == "__main__":
    sys.exit(main())
