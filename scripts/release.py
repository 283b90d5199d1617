"""`make release VERSION=1.2.3`: the commit of a release, and the commands to run after it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import ending
from release_check import REPOSITORY, UNRELEASED, VERSION, changes

ROOT = Path(__file__).resolve().parent.parent
FILES = ("pyproject.toml", "CHANGELOG.md")


def output(*argv: str) -> str:
    """The output of a command."""
    return subprocess.run(argv, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def problem(version: str) -> str | None:
    """The reason not to release this version, or None."""
    if not VERSION.fullmatch(version):
        return f"VERSION={version!r} is not a version: run, for example, make release VERSION=1.2.3"
    if output("git", "status", "--porcelain"):
        return "there are uncommitted changes: commit them first"
    if output("git", "tag", "--list", f"v{version}"):
        return f"tag v{version} already exists: choose another version"
    if not changes((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), "Unreleased"):
        return f"CHANGELOG.md has no entry below {UNRELEASED}: add one"
    return None


def write(version: str) -> None:
    """Set the version, and date its section of the changelog."""
    project = ROOT / "pyproject.toml"
    text = project.read_text(encoding="utf-8")
    text = re.sub(r'^version = ".*"$', f'version = "{version}"', text, count=1, flags=re.MULTILINE)
    project.write_text(text, encoding="utf-8")
    changelog = ROOT / "CHANGELOG.md"
    text = changelog.read_text(encoding="utf-8")
    dated = f"{UNRELEASED}\n\n## [{version}] - {date.today().isoformat()}"
    text = text.replace(UNRELEASED, dated, 1)
    links = f"[Unreleased]: {REPOSITORY}/compare/v{version}...HEAD\n"
    links += f"[{version}]: {REPOSITORY}/releases/tag/v{version}"
    text = re.sub(r"^\[Unreleased\]: .*$", links, text, count=1, flags=re.MULTILINE)
    changelog.write_text(text, encoding="utf-8")


def main() -> int:
    """Create the commit, or say in one line why not."""
    version = os.environ.get("VERSION", "")
    reason = problem(version)
    if reason:
        print(reason, file=sys.stderr)
        return 1
    done = False
    try:
        write(version)
        check = [sys.executable, "scripts/release_check.py", "--releasing"]
        done = ending.call(check, cwd=ROOT, env={**os.environ, "ITEM": ""}) == 0
    finally:
        if not done:
            output("git", "checkout", "HEAD", "--", *FILES)
    if not done:
        print("nothing was released: see above", file=sys.stderr)
        return 1
    message = f"chore(release): {version}"
    output("git", "commit", "--quiet", "--message", message, "--", *FILES)
    notes = ROOT / ".cache" / "release-notes.md"
    notes.parent.mkdir(exist_ok=True)
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    notes.write_text(changes(text, version) + "\n", encoding="utf-8")
    before = " --prerelease" if re.search("[a-z]", version) else ""
    print(f"""
Committed, and nothing was pushed. What follows, once the pull request's checks are green:

    git push origin HEAD:refs/heads/release/{version}
    git tag --annotate v{version} --message {version}
    git push --atomic origin HEAD:main v{version}
    gh release create v{version}{before} --title {version} --notes-file .cache/release-notes.md""")
    return 0


if __name__ == "__main__":
    ending.listen()
    sys.exit(main())
