"""`make release VERSION=1.2.3`: prepare a release, except for the push.

`release.py notes 1.2.3` prints the changelog's section for a version; publish.yml uses it.
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
    """Return the output of a command."""
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def notes(version: str) -> str:
    """Return the changelog's section for a version."""
    text = "\n" + CHANGELOG.read_text(encoding="utf-8")
    section = text.partition(f"\n## [{version}]")[2].split("\n## ")[0]
    return section.partition("\n")[2].strip()


def print_notes(version: str) -> int:
    """Print the changelog's section for a version; fail if it is empty."""
    found = notes(version)
    if not found:
        print(f"{CHANGELOG} has no entry for {version}", file=sys.stderr)
        return 1
    print(found)
    return 0


def problem(version: str) -> str | None:
    """Return why this version cannot be released, or None."""
    if not re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", version):
        return f"VERSION={version!r} is not a version: make release VERSION=1.2.3"
    if output("git", "status", "--porcelain"):
        return "there are uncommitted changes: commit them first"
    if output("git", "tag", "--list", f"v{version}"):
        return f"the tag v{version} already exists"
    if not notes("Unreleased"):
        return f"{CHANGELOG} has no entry below {UNRELEASED.strip()}"
    return None


def main() -> int:
    """Prepare the release, or print in one line why not."""
    version = os.environ.get("VERSION", "")
    reason = problem(version)
    if reason:
        print(reason, file=sys.stderr)
        return 1
    uv = os.environ.get("UV", "uv")  # set by `uv run`
    before = output("git", "rev-parse", "HEAD").strip()
    why = "interrupted"
    try:
        subprocess.run(["make", "lint", "test"], check=True)
        subprocess.run([uv, "version", "--quiet", version], check=True)
        text = CHANGELOG.read_text(encoding="utf-8")
        dated = f"{UNRELEASED}\n## [{version}] - {date.today().isoformat()}\n"
        CHANGELOG.write_text(text.replace(UNRELEASED, dated, 1), encoding="utf-8")
        subprocess.run(["make", "release-check"], check=True)
        subprocess.run(["git", "commit", "--quiet", "-am", f"Release {version}"], check=True)
        subprocess.run(["git", "tag", "-a", f"v{version}", "-m", version], check=True)
        why = ""
    except KeyboardInterrupt:
        pass
    except subprocess.CalledProcessError as failed:
        why = str(failed)
    finally:
        # Nothing else is lost: everything was committed.
        if why:
            subprocess.run(["git", "reset", "--quiet", "--hard", before])
    if why:
        print(f"nothing was released: {why}", file=sys.stderr)
        return 1
    print(f"Release prepared. To publish: git push --atomic origin HEAD v{version}")
    return 0


if __name__ == "__main__":
    sys.exit(print_notes(sys.argv[2]) if sys.argv[1:2] == ["notes"] else main())
