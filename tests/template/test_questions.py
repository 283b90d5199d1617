"""The questions: each can be left to its default, and no bad answer gets through."""

from __future__ import annotations

import keyword
import re
import subprocess
import sys
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


def flaws(questions: dict[str, Any]) -> Iterator[str]:
    """What is wrong with questions."""
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
            default = "the folder's name, made into one of a package"
        else:
            default = {"True": "yes", "False": "no", "": "empty"}.get(default, f"`{default}`")
        choices = ", ".join(f"`{value}`" for value in asked.get("choices", {}).values())
        text = " ".join(asked["help"].split()) + (f" ({choices})" if choices else "")
        when = "; asked when publishing" if "publish_to_pypi" in str(asked.get("when")) else ""
        lines.append(f"| `{name}` | {text}{when} | {default} |")
    return "\n".join(lines)


def test_every_question_has_default_help_and_a_limit() -> None:
    assert list(flaws(QUESTIONS)) == []


def test_a_question_without_default_would_be_noticed() -> None:
    spoilt = {**QUESTIONS, "new": {"type": "str", "help": "Really?", "validator": "x"}}
    assert list(flaws(spoilt)) == ["new has no default"]


def test_nothing_needs_trust() -> None:
    assert not {"_tasks", "_migrations", "_jinja_extensions"} & set(COPIER)


def test_documented_questions_are_the_ones_asked() -> None:
    assert table() in (ROOT / "docs" / "template.md").read_text(), f"it should have:\n{table()}"


def test_reserved_names_cover_what_python_reserves() -> None:
    reserved = set(QUESTIONS["reserved_names"]["default"].split())
    names = {*sys.stdlib_module_names, *keyword.kwlist, *keyword.softkwlist}
    assert {name for name in names if re.fullmatch("[a-z][a-z0-9_]*", name)} <= reserved


def test_floor_is_a_version_that_there_is(render: Render) -> None:
    group = render().toml["dependency-groups"]["test"]
    requirements = [Requirement(line) for line in group if isinstance(line, str)]
    (floor,) = (
        Version(one.version)
        for needed in requirements
        if needed.name == "pyinfra-orbstack"
        for one in needed.specifier
        if one.operator == ">="
    )
    # A candidate stands for the version to come.
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


def test_newest_tag_holds_the_template() -> None:
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
def test_odd_folder_names_give_good_projects(render: Render, folder: str, name: str) -> None:
    project = render(folder)
    assert project.answers["project_name"] == name
    assert project.package == name.replace("-", "_")
    project.check_files()


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        ("project_name", "My Project", "is no package name"),
        ("project_name", "-x", "is no package name"),
        ("project_name", "a--b", "is no package name"),
        ("project_name", "", "is no package name"),
        ("project_name", "json", "is taken"),
        ("project_name", "con", "is taken"),
        ("project_name", "x" * 41, "at most 40 characters"),
        ("description", "two\nlines", "one line"),
        ("user_name", "Doe, Jane", "no commas"),
        ("user_email", "somebody", "no email address"),
        ("github_user", "a/b", "no name on GitHub"),
        ("license", "GPL", "Invalid choice"),
        ("image", "--help", "is no image"),
        ("image", "ubuntu; true", "is no image"),
    ],
)
def test_bad_answers_are_refused(
    render: Render, tmp_path: Path, question: str, answer: str, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        render(**{question: answer})
    assert not (tmp_path / "myproj").exists()


def test_a_bad_answers_file_ends_in_one_clear_line(template: Path, tmp_path: Path) -> None:
    answers, target = tmp_path / "answers.yml", tmp_path / "project"
    answers.write_text("project_name: My Project\n")
    argv = [sys.executable, "-m", "copier", "copy", "--defaults", "--data-file", str(answers)]
    done = subprocess.run(
        [*argv, "-r", "HEAD", str(template), str(target)], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == (
        "ValueError: Validation error for question 'project_name': \"My Project\" is no package "
        "name: lower case letters, digits and single hyphens, a letter first"
    )
    assert not target.exists()
