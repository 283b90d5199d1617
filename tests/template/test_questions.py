"""The questions: each has a default, and invalid answers are rejected."""

from __future__ import annotations

import fcntl
import keyword
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from pyinfra_orbstack import __version__
from tests.template.conftest import ROOT, Render
from tests.template.project import git

COPIER = yaml.safe_load((ROOT / "copier.yml").read_text())
QUESTIONS = {name: asked for name, asked in COPIER.items() if not name.startswith("_")}
ASKED = {name: asked for name, asked in QUESTIONS.items() if asked.get("when") is not False}

#: Descriptions of computed defaults.
FOLLOWS = {
    "project_name": "the directory's name, turned into a valid package name",
    "license": "`MIT` when publishing, else `proprietary`",
}


def flaws(questions: dict[str, Any]) -> Iterator[str]:
    """Faults in questions."""
    for name, asked in questions.items():
        if "default" not in asked:
            yield f"{name} has no default"
        if asked.get("when") is False:
            continue
        if not asked.get("help"):
            yield f"{name} has no help"
        if asked["type"] != "bool" and not (asked.get("choices") or asked.get("validator")):
            yield f"{name} takes anything"


def table() -> str:
    """The table of docs/template.md."""
    lines = ["| Question | Asks | Default |", "| --- | --- | --- |"]
    for name, asked in ASKED.items():
        default = str(asked["default"])
        if "{%" in default:
            default = FOLLOWS[name]
        else:
            default = {"True": "yes", "False": "no", "": "empty"}.get(default, f"`{default}`")
        choices = ", ".join(f"`{value}`" for value in asked.get("choices", {}).values())
        text = " ".join(asked["help"].split()) + (f" ({choices})" if choices else "")
        when = "; asked when publishing" if "publish_to_pypi" in str(asked.get("when")) else ""
        lines.append(f"| `{name}` | {text}{when} | {default} |")
    return "\n".join(lines)


def test_every_question_has_default_help_and_a_limit() -> None:
    assert list(flaws(QUESTIONS)) == []


def test_a_question_without_default_is_detected() -> None:
    spoilt = {**QUESTIONS, "new": {"type": "str", "help": "Really?", "validator": "x"}}
    assert list(flaws(spoilt)) == ["new has no default"]


def test_no_trust_is_required() -> None:
    assert not {"_tasks", "_migrations", "_jinja_extensions"} & set(COPIER)


def test_documented_questions_are_the_ones_asked() -> None:
    assert table() in (ROOT / "docs" / "template.md").read_text(), f"it should have:\n{table()}"


def test_reserved_names_cover_what_python_reserves() -> None:
    reserved = set(QUESTIONS["reserved_names"]["default"].split())
    names = {*sys.stdlib_module_names, *keyword.kwlist, *keyword.softkwlist}
    assert {name for name in names if re.fullmatch("[a-z][a-z0-9_]*", name)} <= reserved


def test_the_minimum_version_exists(render: Render) -> None:
    group = render().toml["dependency-groups"]["test"]
    requirements = [Requirement(line) for line in group if isinstance(line, str)]
    (floor,) = (
        Version(one.version)
        for needed in requirements
        if needed.name == "pyinfra-orbstack"
        for one in needed.specifier
        if one.operator == ">="
    )
    # A release candidate counts as its final version.
    assert floor <= Version(Version(__version__).base_version)


def newest_tag() -> str | None:
    """The tag that `copier copy` would take."""

    def version(tag: str) -> Version | None:
        try:
            return Version(tag)
        except InvalidVersion:
            return None

    tags = {tag: version(tag) for tag in git(ROOT, "tag").split()}
    known = {tag: one for tag, one in tags.items() if one is not None and not one.is_prerelease}
    return max(known, key=lambda tag: known[tag]) if known else None


def test_the_newest_tag_contains_the_template() -> None:
    tag = newest_tag()
    if tag is None:
        pytest.skip("no tags in this clone")
    git(ROOT, "cat-file", "-e", f"{tag}:copier.yml")


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("My Infra", "my-infra"),
        ("2024", "my-infra"),
        ("json", "json-infra"),
        ("class", "class-infra"),
        ("tests", "tests-infra"),
        ("pyinfra", "pyinfra-infra"),
        ("con", "con-infra"),
        ("Ünïcode", "n-code"),
        ("a--b__c", "a-b-c"),
        ("x" * 60, "x" * 34),
    ],
)
def test_odd_directory_names_render_valid_projects(render: Render, folder: str, name: str) -> None:
    project = render(folder)
    assert project.answers["project_name"] == name
    assert project.package == name.replace("-", "_")
    project.check_files()


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        ("project_name", "my Project", "only a-z, 0-9 and single hyphens"),
        ("project_name", "My Project", "must begin with a letter a-z"),
        ("project_name", "-x", "must begin with a letter a-z"),
        ("project_name", "a--b", "only a-z, 0-9 and single hyphens"),
        ("project_name", "a-", "only a-z, 0-9 and single hyphens"),
        ("project_name", "", "must begin with a letter a-z"),
        ("project_name", "json", "taken: Python"),
        ("project_name", "con", "taken: Python"),
        ("project_name", "x" * 41, "at most 40 characters"),
        ("description", "two\nlines", "one line"),
        ("user_name", "Doe, Jane", "without , < and >"),
        ("user_email", "somebody", "not an email address"),
        ("github_user", "a/b", "letters, digits, single hyphens"),
        ("license", "GPL", "Invalid choice"),
        ("image", "--help", "use DISTRO or DISTRO:VERSION"),
        ("image", "ubuntu; true", "use DISTRO or DISTRO:VERSION"),
    ],
)
def test_invalid_answers_are_rejected(
    render: Render, tmp_path: Path, question: str, answer: str, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        render(**{question: answer})
    assert not (tmp_path / "myproj").exists()


def texts(validator: str) -> list[str]:
    """The possible messages of a validator, as copier shows them."""
    parts = (" ".join(part.split()) for part in re.split(r"{%.*?%}", validator, flags=re.DOTALL))
    return [part for part in parts if part]


def shown(question: str, text: str) -> str:
    """The message as copier shows it."""
    return f"Validation error for question '{question}': {text}"


def test_no_validator_message_is_truncated() -> None:
    found = [
        shown(name, text)
        for name, asked in ASKED.items()
        for text in texts(asked.get("validator", ""))
    ]
    assert len(found) >= 9
    # A message that repeats the answer could have any length.
    assert [text for text in found if len(text) > 79 or "{{" in text] == []


def test_a_text_of_that_length_is_not_truncated(template: Path, tmp_path: Path) -> None:
    copier = template / "copier.yml"
    before = copier.read_text()
    text = "at most 40 characters".ljust(79 - len(shown("project_name", "")), "x")
    copier.write_text(before.replace("at most 40 characters", text))
    argv = [
        sys.executable,
        "-m",
        "copier",
        "copy",
        "-r",
        "HEAD",
        str(template),
        str(tmp_path / "x"),
    ]
    try:
        said = asked_in_a_terminal(argv, b"x" * 41 + b"\r", "Validation error")
        assert shown("project_name", text) in said
    finally:
        copier.write_text(before)
    assert not (tmp_path / "x").exists()


def asked_in_a_terminal(argv: list[str], typed: bytes, last: str) -> str:
    """The output of an executable on a terminal of the usual width, after this input."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(argv[0], argv)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    said = b""
    try:
        # No more output means that everything is shown.
        while select.select([terminal], [], [], 1 if last.encode() in said else 60)[0]:
            said += os.read(terminal, 4096)
            if b"\x1b[6n" in said:  # it asks where the cursor is
                said = said.replace(b"\x1b[6n", b"")
                os.write(terminal, b"\x1b[1;1R")
            if b"package; machine names" in said and typed:
                os.write(terminal, b"\x15" + typed)  # instead of the default
                typed = b""
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(terminal)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode(errors="replace"))


@pytest.mark.template
def test_a_bad_answers_file_is_a_one_line_error(template: Path, tmp_path: Path) -> None:
    answers, target = tmp_path / "answers.yml", tmp_path / "project"
    answers.write_text("project_name: my Project\n")
    argv = [sys.executable, "-m", "copier", "copy", "--defaults", "--data-file", str(answers)]
    done = subprocess.run(
        [*argv, "-r", "HEAD", str(template), str(target)], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == (
        "ValueError: Validation error for question 'project_name': only a-z, 0-9 and single hyphens"
    )
    assert not target.exists()
