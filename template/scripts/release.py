"""`make release VERSION=1.2.3`: everything that makes a release, but for the push.

`release.py notes 1.2.3` prints what the changelog says about a version, for publish.yml.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

CHANGELOG = Path("CHANGELOG.md")
UNRELEASED = "## [Unreleased]\n"


def output(*argv: str) -> str:
    """What a command printed."""
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def notes(version: str) -> str:
    """What the changelog says about a version."""
    text = "\n" + CHANGELOG.read_text(encoding="utf-8")
    section = text.partition(f"\n## [{version}]")[2].split("\n## ")[0]
    return section.partition("\n")[2].strip()


def print_notes(version: str) -> int:
    """Print what the changelog says about a version, which must be something."""
    found = notes(version)
    if not found:
        print(f"{CHANGELOG} says nothing about {version}", file=sys.stderr)
        return 1
    print(found)
    return 0


def problem(version: str) -> str | None:
    """What stands in the way of releasing this version."""
    if not re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", version):
        return f"VERSION={version!r} is no version: make release VERSION=1.2.3"
    if output("git", "status", "--porcelain"):
        return "there are changes that are not committed"
    if output("git", "tag", "--list", f"v{version}"):
        return f"there is a tag v{version} already"
    if not notes("Unreleased"):
        return f"{CHANGELOG} says nothing below {UNRELEASED.strip()}"
    return None


def main() -> int:
    """Make the release, or say in one line why not."""
    version = os.environ.get("VERSION", "")
    reason = problem(version)
    if reason:
        print(reason, file=sys.stderr)
        return 1
    uv = os.environ.get("UV", "uv")  # set by `uv run`
    try:
        subprocess.run(["make", "lint", "test"], check=True)
        subprocess.run([uv, "version", "--quiet", version], check=True)
        text = CHANGELOG.read_text(encoding="utf-8")
        dated = f"{UNRELEASED}\n## [{version}] - {date.today().isoformat()}\n"
        CHANGELOG.write_text(text.replace(UNRELEASED, dated, 1), encoding="utf-8")
        subprocess.run(["make", "release-check"], check=True)
        subprocess.run(["git", "commit", "--quiet", "-am", f"Release {version}"], check=True)
        subprocess.run(["git", "tag", "-a", f"v{version}", "-m", version], check=True)
    except subprocess.CalledProcessError as failed:
        subprocess.run(["git", "checkout", "--quiet", "HEAD", "--", "."])
        print(f"nothing was released: {failed}", file=sys.stderr)
        return 1
    print(f"Released here. To publish: git push --atomic origin HEAD v{version}")
    return 0


if __name__ == "__main__":
    sys.exit(print_notes(sys.argv[2]) if sys.argv[1:2] == ["notes"] else main())
