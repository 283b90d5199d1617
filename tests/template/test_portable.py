"""Makefiles and scripts keep to what a Mac has: GNU make 3.81, bash 3.2 and BSD tools."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.template.conftest import ROOT

#: What to look for, and what lacks it.
LACKING = {
    # make 3.82 and later
    r"^\.(ONESHELL|RECIPEPREFIX|SHELLFLAGS|EXTRA_PREREQS|NOTINTERMEDIATE)\b": "make 3.81",
    r"\$\((file|guile|let|intcmp) ": "make 3.81",
    r"^[^#\t]*(!=|::=|&:)": "make 3.81",
    r"^(undefine|private) ": "make 3.81",
    r"--output-sync|\$\(\.SHELLSTATUS\)": "make 3.81",
    # bash 4 and later
    r"\b(declare|local|typeset) -[a-z]*[Anlu]": "bash 3.2",
    r"\b(mapfile|readarray|coproc)\b": "bash 3.2",
    r"\$\{\w+(\^|,|@[A-Z])": "bash 3.2",
    r"&>>|\|&|;;?&": "bash 3.2",
    r"\bwait -n\b|\[\[ -v |shopt -s globstar|EPOCHSECONDS|printf '%\(": "bash 3.2",
    # GNU's tools
    r"\bsed (-[a-zA-Z]+ )*(-r|-i (?!'')|--)": "BSD sed",
    r"\bgrep (-[a-zA-Z]+ )*-[a-zA-Z]*P": "BSD grep",
    r"\breadlink -f\b|\brealpath\b": "macOS before 12.3",
    r"\bdate (-d|--)": "BSD date",
    r"\bstat (-c|--)": "BSD stat",
    r"\bxargs (-[a-zA-Z0-9]+ )*(-r\b|-d\b|--)": "BSD xargs",
    r"\bfind .*-printf": "BSD find",
    r"\b(head|tail) -n -\d": "BSD head",
    r"\b(timeout|nproc|tac|sha256sum|md5sum|shuf)\b(?!:)": "macOS",
    r"\b(cp|ls|rm|mv|mkdir|mktemp|sort|du) (-[a-zA-Z]+ )*--[a-z]": "BSD tools",
    r"\bsort (-[a-zA-Z]+ )*-V": "BSD sort",
    r"\bawk .*(gensub|strftime|systime)": "BSD awk",
}
FILES = [ROOT / "Makefile", ROOT / ".ci" / "run", ROOT / "template" / "Makefile.jinja"]


def flaws(text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#"):
            continue
        for pattern, without in LACKING.items():
            if re.search(pattern, line):
                yield f"line {number} is not for {without}: {line.strip()}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_use_nothing_that_a_mac_lacks(path: Path) -> None:
    assert list(flaws(path.read_text())) == []


@pytest.mark.parametrize(
    "line",
    [
        ".ONESHELL:",
        "NOW != date",
        "\tdeclare -A seen",
        "\tmapfile -t lines <file",
        '\techo "${name,,}"',
        "\tcommand &>>log",
        "\tsed -i s/a/b/ file",
        "\tgrep -oP x file",
        "\tcd $$(readlink -f .)",
        "\tdate -d yesterday",
        "\tls | xargs -r rm",
        "\ttimeout 5 make",
        "\tsort -V tags",
        "\thead -n -1 file",
        "\trm --force file",
    ],
)
def test_each_would_be_found(line: str) -> None:
    assert len(list(flaws(line))) == 1


@pytest.mark.parametrize("path", FILES[::2], ids=["ours", "theirs"])
def test_help_is_the_first_target(path: Path) -> None:
    targets = re.findall(r"^([a-z][a-z-]*):", path.read_text(), re.MULTILINE)
    assert targets[0] == "help"


def test_makefile_and_script_know_the_same_targets() -> None:
    text = (ROOT / "Makefile").read_text()
    listed = set(re.findall(r"^([a-z][a-z-]*):.*##", text, re.MULTILINE)) - {"help"}
    usage = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "dev.py")], capture_output=True, text=True
    ).stderr
    assert set(usage.split()[-1].split("|")) == listed
    assert listed <= set(re.search(r"^\.PHONY: (.*)", text, re.MULTILINE)[1].split())  # type: ignore[index]


def make(target: str, *words: str, path: Path) -> str:
    """What make starts; a Python on that path prints it."""
    (path / "python3").write_text('#!/bin/sh\necho "${EXACTLY:-any}" "$@"\n')
    (path / "python3").chmod(0o755)
    environment = {**os.environ, "PATH": f"{path}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("EXACTLY", None)
    argv = ["make", "--silent", "-C", str(ROOT), target, *words]
    return subprocess.run(argv, env=environment, capture_output=True, text=True).stdout


def test_make_knows_whether_a_python_was_named(tmp_path: Path) -> None:
    assert "any scripts/dev.py test\n" in make("test", path=tmp_path)
    assert "1 scripts/dev.py test\n" in make("test", f"PYTHON={tmp_path}/python3", path=tmp_path)


@pytest.mark.parametrize("exactly", ["", "1"], ids=["any", "exactly"])
def test_python_that_is_named_is_taken(exactly: str, tmp_path: Path) -> None:
    """Else the oldest gives way to one that copier runs on."""
    begin = f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r}); import dev; "

    def run(python: str, code: str) -> str:
        environment = {**os.environ, "EXACTLY": exactly}
        return subprocess.check_output([python, "-c", begin + code], env=environment, text=True)

    oldest = run(sys.executable, "print(dev.find_python('3.9'))").strip()
    if not oldest:
        pytest.skip("no Python 3.9 here")
    venv = tmp_path / "venv"
    run(oldest, f"dev.VENV = dev.Path({str(venv)!r}); dev.create_venv(False)")
    taken = run(sys.executable, f"print(dev.version({str(venv / 'bin' / 'python')!r}))")
    assert (taken == "(3, 9)\n") is bool(exactly)
