"""Makefiles and scripts use only a Mac's own tools: GNU make 3.81, bash 3.2, BSD tools."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.template.conftest import ROOT, Render
from tests.template.project import git

#: Patterns of features, and the tool that lacks them.
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
def test_files_use_only_tools_that_a_mac_has(path: Path) -> None:
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
def test_each_fault_is_found(line: str) -> None:
    assert len(list(flaws(line))) == 1


@pytest.mark.parametrize("path", FILES[::2], ids=["ours", "theirs"])
def test_help_is_the_first_target(path: Path) -> None:
    targets = re.findall(r"^([a-z][a-z-]*):", path.read_text(), re.MULTILINE)
    assert targets[0] == "help"


def test_makefile_and_noxfile_have_the_same_targets() -> None:
    text = (ROOT / "Makefile").read_text()
    listed = set(re.findall(r"^([a-z][a-z-]*):.*##", text, re.MULTILINE)) - {"help"}
    sessions = re.findall(
        r"^@target\(.*\)\ndef (\w+)", (ROOT / "noxfile.py").read_text(), re.MULTILINE
    )
    # `compat` starts it.
    assert {name.replace("_", "-") for name in sessions} - {"pair"} == listed
    assert listed <= set(re.search(r"^\.PHONY: (.*)", text, re.MULTILINE)[1].split())  # type: ignore[index]


def program(path: Path, script: str) -> None:
    """Put an executable first on PATH for `make`."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def make(folder: Path, *words: str, path: Path, **variables: str) -> str:
    """The output of make and of its processes."""
    environment = {**os.environ, **variables}
    environment["PATH"] = f"{path}{os.pathsep}{os.environ['PATH']}"
    for name in {"EXACTLY", "MAKEFLAGS", "MAKELEVEL"} - set(variables):
        environment.pop(name, None)
    argv = ["make", "--silent", "-C", str(folder), *words]
    return subprocess.run(
        argv, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    ).stdout


def test_make_detects_an_explicit_python(tmp_path: Path) -> None:
    program(tmp_path / "python3", "exit 0")
    folder = tmp_path / "checkout"
    programs = folder / ".cache" / "nox" / "bin"
    programs.mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", folder)
    program(programs / "nox", "exit 1")
    program(programs / "python", 'echo "${EXACTLY:-any}" "$PYTHON" "$@"')
    any_python = "any python3 -m nox --session test\n"
    assert any_python in make(folder, "test", path=tmp_path)
    assert any_python in make(folder, "test", path=tmp_path, EXACTLY="yes")
    named = f"PYTHON={tmp_path}/python3"
    assert f"1 {tmp_path}/python3 -m nox" in make(folder, "test", named, path=tmp_path)


# Values are data --------------------------------------------------------------------------------


class Makefile(NamedTuple):
    """A Makefile that calls our executables, in the directory `folder`."""

    folder: Path
    path: Path
    targets: list[str]
    variables: list[str]


@pytest.fixture
def makefile(request: pytest.FixtureRequest, render: Render, tmp_path: Path) -> Makefile:
    """Our own, or a rendered one with all options."""
    folder, programs = tmp_path / "ours", tmp_path / "bin"
    if request.param == "theirs":
        folder = render(docker=True).path
        git(folder, "init", "-q")
    else:
        folder.mkdir()
        shutil.copy(ROOT / "Makefile", folder)
    programs.mkdir()
    for name in ("uv", "python3"):
        program(programs / name, 'printf %s "$VERSION" >value')
    text = (folder / "Makefile").read_text()
    targets = re.findall(r"^([a-z][a-z-]*):.*##", text, re.MULTILINE)
    variables = re.findall(r"^(?:override )?([A-Z]+) [:?]?=|[(]foreach ([^,]*)", text, re.MULTILINE)
    exported = " ".join(re.findall(r"^export (.*)", text, re.MULTILINE)).split()
    return Makefile(folder, programs, targets, [*map("".join, variables), *exported])


BOTH = pytest.mark.parametrize("makefile", ["ours", "theirs"], indirect=True)
#: `make` would expand some of these, a shell the others.
ODD = ["$(shell touch pwned)", "${shell touch pwned}", "`touch pwned`", "$$(touch pwned)"]
ODD += ['"; touch pwned; "', "'; touch pwned; '", "touch pwned;", "$(info $(shell touch pwned))"]


@BOTH
@pytest.mark.parametrize("odd", ODD)
def test_no_value_is_run(makefile: Makefile, odd: str) -> None:
    assert {"VERSION", "it.is"} <= set(makefile.variables)
    # ANYTHING is not used: variables from the command line reach every process.
    names = {*makefile.variables, "CURDIR", "ANYTHING"}
    for target in makefile.targets:
        # Without these two, nothing is started.
        for some in (names - {"PYTHON", "UV"}, names, {"SHELL"}):
            words = [f"{name}={odd}" for name in sorted(some)]
            make(makefile.folder, target, *words, path=makefile.path)
            assert not (makefile.folder / "pwned").exists(), f"make {target} {words}"
        make(makefile.folder, target, path=makefile.path, **dict.fromkeys(names, odd))
        assert not (makefile.folder / "pwned").exists(), f"{names} make {target}"


# make itself drops white space before a value.
VALUES = st.text(st.characters(codec="utf-8", exclude_characters="\0")).map(str.lstrip)


@BOTH
@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(value=VALUES | st.sampled_from(ODD))
def test_every_value_arrives_unchanged(makefile: Makefile, value: str) -> None:
    for words, variables in ([f"VERSION={value}"], {}), ([], {"VERSION": value}):
        make(makefile.folder, "release", *words, path=makefile.path, **variables)
        assert (makefile.folder / "value").read_bytes() == value.encode()
    assert not (makefile.folder / "pwned").exists()


@pytest.mark.parametrize("exactly", ["", "1"], ids=["any", "exactly"])
def test_an_explicit_python_is_used(exactly: str, tmp_path: Path) -> None:
    """Otherwise, the oldest is replaced by one that copier supports."""
    begin = f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r}); import environments; "

    def run(python: str, code: str) -> str:
        environment = {**os.environ, "EXACTLY": exactly, "PYTHON": python}
        return subprocess.check_output([python, "-c", begin + code], env=environment, text=True)

    if not (ROOT / ".cache" / "nox" / "bin" / "uv").exists():
        pytest.skip("no uv: these tests were not started by make")
    oldest = run(sys.executable, "print(environments.find_python('3.9'))").strip()
    if not oldest:
        pytest.skip("no Python 3.9 here")
    venv = tmp_path / "venv"
    run(
        oldest,
        f"environments.VENV = environments.Path({str(venv)!r}); environments.create_venv(False)",
    )
    taken = run(sys.executable, f"print(environments.ask({str(venv / 'bin' / 'python')!r})[1])")
    assert (taken == "(3, 9)\n") is bool(exactly)
