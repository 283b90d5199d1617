"""README and docs: their commands run, and their links lead to something.

All blocks of a page share one directory. A block of shell commands runs there; a block in another
language is a file, whose first line names it in a comment. `blocks.py` lists the blocks that
something else runs, and those that nothing runs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from orbctl_simulator import trial
from pyinfra_orbstack.testing import unavailable

from ..conftest import ROOT
from .blocks import EXCEPTIONS

pytestmark = [pytest.mark.docs, pytest.mark.timeout(300)]

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
BLOCK = re.compile(
    r"^ *```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)
#: Pages whose machines boot an image and have a network of their own, as a reader's do.
BOOTED = {
    "docs/web-server.md": {
        "ORBCTL_SIMULATOR_IMAGES": "none",
        "ORBCTL_SIMULATOR_INIT": "image",
        "ORBCTL_SIMULATOR_BOOT_TIMEOUT": "120",  # several boot at a time
    }
}
SHELLS = ("sh", "shell", "bash", "console")
SEEN = re.compile(
    r"https://(?:github\.com/elazar/pyinfra-orbstack/(?:blob|tree|raw)"
    r"|raw\.githubusercontent\.com/elazar/pyinfra-orbstack)/main/([^)#?\s\"]+)"
)


class Block(NamedTuple):
    """A code block, and what happens to it."""

    name: str
    fate: str
    language: str
    code: str


def blocks(page: Path) -> list[Block]:
    """All blocks of a page."""
    text = page.read_text(encoding="utf-8")
    listed = EXCEPTIONS.get(str(page.relative_to(ROOT)), {})
    found: list[Block] = []
    headings: list[str] = []
    end = 0
    for block in BLOCK.finditer(text):
        headings += re.findall(r"^#+ (.*)$", text[end : block.start()], re.MULTILINE)
        end = block.end()
        count = sum(one.name.partition(" (")[0] == headings[-1] for one in found) + 1
        name = headings[-1] if count == 1 else f"{headings[-1]} ({count})"
        fate = listed.get(name) or listed.get("*") or "run"
        found.append(Block(name, fate, block["language"], block["code"]))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_block_is_run_or_listed_with_a_reason(name: str) -> None:
    page = ROOT / name
    text = page.read_text(encoding="utf-8")
    found = blocks(page)
    assert len(re.findall(r"^ *```", text, re.MULTILINE)) == 2 * len(found), "a block is not closed"
    comments = re.findall(r"<!-- (?:not )?run\b.*", text)
    assert not comments, "tests/docs/blocks.py lists what happens to a block; remove the comment"
    for block in found:
        kind, _, rest = block.fate.partition(": ")
        if kind == "run":
            assert rest in ("", "fails")
        elif kind == "run by":
            assert (ROOT / rest.split(",")[0]).exists(), rest
        else:
            assert kind == "not run"
            assert len(rest) > 10, f"no reason:\n{block.code}"


def test_listed_blocks_exist() -> None:
    for name, listed in EXCEPTIONS.items():
        found = blocks(ROOT / name)
        names = [block.name for block in found]
        assert len(names) == len(set(names)), f"{name}: a heading occurs twice"
        assert listed.keys() <= {*names, "*"}, f"{name}: no such block"
        assert listed.get("*", "run by").startswith("run by"), f"{name}: list each block"


def to_run(page: Path) -> list[Block]:
    """The blocks of a page that `make docs` runs."""
    return [block for block in blocks(page) if block.fate in ("run", "run: fails")]


def script(page: Path, folder: Path) -> list[str]:
    """Write the files of a page; return its commands as lines of a script."""
    lines = []
    for block in to_run(page):
        if block.language in SHELLS:
            code = block.code
            if block.language == "console":
                code = "".join(re.findall(r"^\$ (.*\n)", code, re.MULTILINE))
            fails = block.fate == "run: fails"
            lines.append(f"if (\n{code}) then exit 9; fi" if fails else code)
        else:
            first, _, rest = block.code.partition("\n")
            name = first.lstrip("# ")
            assert re.fullmatch(r"[\w./-]+\.\w+", name), f"no name in the first line:\n{block.code}"
            assert not (folder / name).exists(), f"{name} twice"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(rest if name.endswith(".j2") else block.code)
    return lines


@pytest.mark.parametrize("name", [name for name in NAMES if to_run(ROOT / name)])
def test_commands_of_a_page_run(name: str, tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("the page names the machines, so they need a simulator of their own")
    simulator = Path(sys.executable).with_name("orbctl-simulator")
    programs, folder = tmp_path / "bin", tmp_path / "page"
    programs.mkdir()
    folder.mkdir()
    (programs / "orbctl").symlink_to(simulator)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(programs), str(simulator.parent), os.environ["PATH"]]),
        "ORBCTL_SIMULATOR_HOME": str(tmp_path / "simulator"),
        "PYTHONPATH": str(ROOT / "src"),
        **BOOTED.get(name, {}),
    }
    cache = ROOT / ".cache" / "simulator-layers"
    environment.setdefault("ORBCTL_SIMULATOR_CACHE", str(cache))
    for left in ("PYINFRA_ORBSTACK_ORBCTL", "PYINFRA_ORBSTACK_PLAN", "COLUMNS"):
        environment.pop(left, None)
    listed = subprocess.run([simulator, "list"], env=environment, capture_output=True, text=True)
    if listed.returncode:
        unavailable(listed.stderr)
    # Only root can try; with sudo, the page itself shows it.
    if name in BOOTED and os.geteuid() == 0 and (reason := trial.why_not()):
        unavailable(f"this host boots none: {reason}")
    lines = script(ROOT / name, folder)
    try:
        done = subprocess.run(
            ["bash", "-euxo", "pipefail", "-c", "\n".join(lines)],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    finally:
        subprocess.run([simulator, "delete", "--all", "--force"], env=environment, check=False)
    assert done.returncode == 0, done.stdout
    assert lines


# Links -------------------------------------------------------------------------------------------

LINKED = [*PAGES, *(ROOT / name for name in ("CODE_OF_CONDUCT.md", "SECURITY.md", "CHANGELOG.md"))]


def anchors(page: Path) -> set[str]:
    """The anchors of a page."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    words = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"[-\s]+", "-", word) for word in words}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        seen = SEEN.match(target)
        if seen:
            assert (ROOT / seen[1]).exists(), target
        elif not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            there = page.parent / path if path else page
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), target
