"""`copier update`: the template and the project have changed, without conflicts.

The tags are created in a temporary repository, so a clone without tags tests the same.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from yaml import safe_load

from pyinfra_orbstack.orbctl import Orbctl
from tests.template.conftest import ROOT, Render
from tests.template.project import Project, git, run

OLD, NEW = "v90.0.0", "v90.1.0"


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text, f"{old!r} is not in {path}"
    path.write_text(text.replace(old, new), encoding="utf-8")


def evolve(repository: Path) -> None:
    """Typical changes in a new version of the template."""
    folder = repository / "template"
    replace(folder / "pyproject.toml.jinja", "ruff>=0.14,<0.18", "ruff>=0.14,<0.19")
    replace(folder / ".github/workflows/ci.yml.jinja", "timeout-minutes: 20", "timeout-minutes: 25")
    replace(folder / "README.md.jinja", "## More\n", "## Even more\n")
    replace(folder / "Makefile.jinja", "GNU make 3.81 and bash", "GNU make 4 and bash")
    replace(folder / "docs/secrets.md.jinja", "Secrets come from", "All secrets come from")
    (folder / "docs" / "new.md").write_text("# New\n")
    with (repository / "copier.yml").open("a") as file:
        file.write("\nnew_question:\n  type: bool\n  help: Really?\n  default: true\n")


def release(repository: Path, tag: str) -> None:
    git(repository, "add", "-A")
    git(repository, "commit", "-qm", tag)
    git(repository, "tag", tag)


@pytest.fixture
def repository(template: Path, tmp_path: Path) -> Path:
    """The template with an old version, from which projects are rendered, and a new one."""
    folder = tmp_path / "template"
    shutil.copytree(template, folder)
    git(folder, "tag", OLD)
    return folder


def edit(project: Project) -> dict[str, str]:
    """Typical edits of users; returns the texts that must be kept, by file."""
    project.write("pyproject.toml", 'version = "0.1.0"', 'version = "1.4.0"')
    project.write(
        "pyproject.toml",
        '    { include-group = "test" },\n',
        '    { include-group = "test" },\n    "six>=1.16",\n',
    )
    project.write("pyproject.toml", '"pyinfra"]', '"pyinfra", "mine"]')
    project.write("inventories/local.py", "web = [", "queue: list[object] = []\n\nweb = [")
    project.write("inventories/production.py", "web: list", "queue: list[object] = []\n\nweb: list")
    project.write("group_data/all.py", 'operator_name = "ops"', 'operator_name = "ops"\nport = 80')
    with (project.path / "deploy.py").open("a") as file:
        file.write("\nassert host.name\n")
    project.write("CHANGELOG.md", "### Added\n\n", "### Added\n\n- Mine.\n")
    project.write("README.md", "## To a server\n", "## Mine\n\nMy words.\n\n## To a server\n")
    (project.path / "SECURITY.md").unlink(missing_ok=True)
    (project.path / "src" / project.package / "mine.py").write_text('"""Mine."""\n')
    return {
        "pyproject.toml": "six>=1.16",
        "inventories/local.py": "queue: list[object]",
        "group_data/all.py": "port = 80",
        "deploy.py": "assert host.name",
        "CHANGELOG.md": "- Mine.",
        "README.md": "My words.",
        f"src/{project.package}/mine.py": "Mine",
    }


def check_evolved(project: Project) -> None:
    assert "ruff>=0.14,<0.19" in project.text("pyproject.toml")
    assert "timeout-minutes: 25" in project.text(".github/workflows/ci.yml")
    assert "## Even more" in project.text("README.md")
    assert project.has("docs/new.md")
    assert project.answers["_commit"] == NEW
    assert project.answers["new_question"] is True
    project.check_files()


def made_from(render: Render, repository: Path, **answers: Any) -> Project:
    project = render("myproj", source=repository, **answers)
    assert project.answers["_commit"] == OLD
    project.commit()
    return project


def test_plain_update(render: Render, repository: Path) -> None:
    project = made_from(render, repository)
    evolve(repository)
    release(repository, NEW)
    project.update(repository)
    check_evolved(project)


def test_update_keeps_the_users_changes(render: Render, repository: Path) -> None:
    project = made_from(render, repository)
    kept = edit(project)
    (project.path / "uv.lock").write_text("# The project's own.\n")
    project.commit()
    evolve(repository)
    (repository / "template" / "uv.lock").write_text("# The template's.\n")
    release(repository, NEW)
    project.update(repository)
    check_evolved(project)
    assert project.text("uv.lock") == "# The project's own.\n"
    for name, words in kept.items():
        assert words in project.text(name), name
    assert project.toml["project"]["version"] == "1.4.0"
    assert not project.has("SECURITY.md")


def test_a_conflict_is_detected(render: Render, repository: Path) -> None:
    project = made_from(render, repository)
    project.write("README.md", "## More\n", "## Less\n")
    project.commit()
    evolve(repository)
    release(repository, NEW)
    with pytest.raises(AssertionError, match="conflict in"):
        project.update(repository)


# make update -----------------------------------------------------------------------------------


@pytest.fixture
def tools(tmp_path: Path) -> dict[str, str]:
    """An environment in which `uv tool run` and `uvx` run the installed copier."""
    folder = tmp_path / "tools"
    folder.mkdir()
    python = shlex.quote(sys.executable)
    for name, skipped in (("uv", 5), ("uvx", 1)):
        # What is behind `uv tool run --from WHAT copier`.
        script = f'#!/bin/sh\nshift {skipped}\nexec {python} -m copier "$@"\n'
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    return {"PATH": os.pathsep.join([str(folder), os.environ["PATH"]])}


def in_repository(render: Render, repository: Path, place: str) -> Project:
    """A project in a directory of a repository; "." means its own repository."""
    top = repository.parent / "top"
    project = render(f"top/{place}/myproj" if place != "." else "top", source=repository)
    if place != ".":
        (top / "README.md").write_text("Ours\n")
    Project(top).commit()
    return project


@pytest.mark.template
@pytest.mark.parametrize("place", [".", "deep/er"])
def test_make_update(
    render: Render, repository: Path, tools: dict[str, str], tmp_path: Path, place: str
) -> None:
    project = in_repository(render, repository, place)
    kept = edit(project)
    (project.path / "CHANGELOG.md").unlink()
    del kept["CHANGELOG.md"]
    Project(tmp_path / "top").commit()
    evolve(repository)
    replace(repository / "template" / "CHANGELOG.md.jinja", "Unreleased", "Not yet released")
    release(repository, NEW)
    project.make("update", **tools)
    check_evolved(project)
    for name, words in kept.items():
        assert words in project.text(name), name
    assert not project.has("CHANGELOG.md")
    changed = git(tmp_path / "top", "status", "--porcelain", "-z").split("\0")
    assert all(project.path in (tmp_path / "top" / line[3:]).parents for line in changed if line)


@pytest.mark.template
def test_deleted_files_stay_deleted(
    render: Render, repository: Path, tools: dict[str, str]
) -> None:
    project = made_from(render, repository, docker=True)
    keep = {".copier-answers.yml", "Makefile"}
    deleted = [path for path in project.files() if path.name not in keep]
    for path in deleted:
        path.unlink()
    project.commit()
    for path in (repository / "template").rglob("*"):
        if path.is_file() and "answers" not in path.name:
            with path.open("a") as file:
                file.write("# new\n")
    release(repository, NEW)
    project.make("update", **tools)
    assert project.text("Makefile").endswith("# new\n")
    assert [path for path in deleted if path.exists()] == []


@pytest.mark.template
def test_make_update_names_conflicts(
    render: Render, repository: Path, tools: dict[str, str]
) -> None:
    project = made_from(render, repository)
    project.write("README.md", "## More\n", "## Less\n")
    project.commit()
    evolve(repository)
    release(repository, NEW)
    with pytest.raises(AssertionError, match=r"\nresolve the conflicts in: README.md\n"):
        project.make("update", **tools)


@pytest.mark.template
def test_a_project_rendered_as_in_the_readme_can_be_updated(
    template: Path, tools: dict[str, str], tmp_path: Path
) -> None:
    checkout = tmp_path / "pyinfra-orbstack"
    shutil.copytree(template, checkout)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"^uvx copier copy --vcs-ref HEAD .*$", readme, re.MULTILINE)
    run(checkout, "sh", "-c", recipe.replace(" copy ", " copy --defaults "), env=tools)
    project = Project(tmp_path / "myproj")
    project.commit()
    evolve(checkout)
    git(checkout, "commit", "-qam", "new")
    project.make("update", **tools)
    assert "## Even more" in project.text("README.md")


@pytest.mark.parametrize(
    ("written", "good"),
    [
        (".", False),
        ("../template", False),
        ("'../it''s #1'", False),
        ("{}", True),
        ('"{}"', True),
        ("gh:elazar/pyinfra-orbstack", True),
        ("git+https://git.example/x", True),
        ("~/template", True),
    ],
)
def test_a_relative_source_is_rejected_before_copier_runs(
    render: Render, repository: Path, tmp_path: Path, written: str, good: bool
) -> None:
    project = made_from(render, repository)
    written = written.format(repository)
    project.write(".copier-answers.yml", f"_src_path: {repository}", f"_src_path: {written}")
    project.commit()
    (tmp_path / "uv").write_text("#!/bin/sh\ntouch asked\n")
    (tmp_path / "uv").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["make", "-s", "update"], cwd=project.path, env=env, capture_output=True, text=True
    )
    assert (done.returncode == 0, project.has("asked")) == (good, good), done.stderr
    said, *make = done.stderr.splitlines() or [""]
    assert good or ("is a relative path, so" in said and len(make) == 1), done.stderr


@pytest.mark.template
def test_answers_in_another_file(
    render: Render, repository: Path, tools: dict[str, str], tmp_path: Path
) -> None:
    name = "conf/it's #1 $x.yml"
    project = render(source=repository, answers_file_path=name)
    assert not project.has(".copier-answers.yml")
    project.commit()
    evolve(repository)
    release(repository, NEW)
    project.make("update", **tools)
    assert f"_commit: {NEW}\n" in project.text(name)
    assert not project.has(".copier-answers.yml")
    assert f"`{name}` records" in project.text("docs/updating.md")


@pytest.mark.template
def test_the_page_can_be_followed(
    render: Render, repository: Path, tools: dict[str, str], tmp_path: Path
) -> None:
    """Every shell block; the second one changes an answer, the last one moves a workflow."""
    project = in_repository(render, repository, "deep/er")
    page = project.text("docs/updating.md")
    update, switch, move = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    (yaml,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    update = update.replace("make lock lint test\n", "")  # tests/template/test_matrix.py does that
    evolve(repository)
    release(repository, NEW)
    env = {**tools, "GIT_PAGER": "cat"}
    run(project.path, "sh", "-exc", update, env=env)
    assert git(tmp_path / "top", "status", "--porcelain") == ""
    assert git(project.path, "log", "-1", "--format=%s") == "Update from the template\n"
    check_evolved(project)

    run(project.path, "sh", "-exc", switch.replace("=true", "=false"), env=env)
    assert project.answers["publish_to_pypi"] is False
    assert not project.has("scripts")
    Project(tmp_path / "top").commit()

    run(project.path, "sh", "-exc", move)
    workflow = tmp_path / "top" / ".github" / "workflows" / "myproj.yml"
    replace(workflow, "\npermissions: {}\n", f"\npermissions: {{}}\n\n{yaml}")
    replace(workflow, "path/of/myproj", "deep/er/myproj")
    parsed = safe_load(workflow.read_text())
    folder = tmp_path / "top" / parsed["defaults"]["run"]["working-directory"]
    assert folder == project.path
    commands = [s["run"] for job in parsed["jobs"].values() for s in job["steps"] if "run" in s]
    targets = [command for command in commands if command.startswith("make ")]
    assert targets == ["make lint", "make test"]
    Project(tmp_path / "top").commit()
    replace(
        repository / "template" / ".github/workflows/ci.yml.jinja", "minutes: 25", "minutes: 26"
    )
    release(repository, "v90.2.0")
    project.make("update", **tools)
    assert not project.has(".github/workflows/ci.yml")
    assert project.answers["_commit"] == "v90.2.0"


# Answers that change ---------------------------------------------------------------------------


def nothing(project: Project) -> dict[str, str]:
    return {}


@pytest.mark.template
@pytest.mark.parametrize("edits", [nothing, edit])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"publish_to_pypi": False}),
        ({"publish_to_pypi": False, "license": "proprietary"}, {"publish_to_pypi": True}),
        (
            {"codecov": True},
            {"codecov": False, "user_name": "Zoë", "github_user": "zoe", "license": "Apache-2.0"},
        ),
        ({"github_user": "zoe"}, {"deploy_from_ci": True}),
        ({"github_user": "zoe", "deploy_from_ci": True}, {"deploy_from_ci": False}),
    ],
)
def test_update_can_change_answers(
    render: Render,
    repository: Path,
    request: pytest.FixtureRequest,
    edits: Callable[[Project], dict[str, str]],
    before: dict[str, Any],
    after: dict[str, Any],
) -> None:
    project = made_from(render, repository, **before)
    kept = edits(project)
    project.commit()
    evolve(repository)
    release(repository, NEW)
    project.update(repository, **after)
    check_evolved(project)
    assert {key: project.answers[key] for key in after} == after
    published = project.answers["publish_to_pypi"]
    assert project.has(".github/workflows/publish.yml") == published
    # The user may have deleted existing files.
    assert edits is edit or project.has("SECURITY.md") == published
    assert project.has(".github/ISSUE_TEMPLATE") == published
    assert ("matrix" in project.text(".github/workflows/ci.yml")) == published
    assert ("Private" in str(project.toml["project"]["classifiers"])) != published
    assert project.has(".github/workflows/deploy.yml") == project.answers["deploy_from_ci"]
    assert project.has(".github/CODEOWNERS") == project.answers["deploy_from_ci"]
    for name, words in kept.items():
        assert words in project.text(name), name
    if before or edits is nothing:
        project.check_tests_without_machines()
        # The changed answers do not affect machines, so one case is enough.
        fresh = render("fresh/myproj", source=repository, ref=NEW, **{**before, **after})
        if edits is nothing:
            assert applied(project) == applied(fresh)
    else:
        request.getfixturevalue("prepared")
        project.check_tests()


def applied(project: Project) -> dict[str, str]:
    """The files of a deploy and its tests."""
    folders = ("src", "tests", "inventories", "group_data")
    files = [path for path in project.files() if path.relative_to(project.path).parts[0] in folders]
    return {
        str(path.relative_to(project.path)): path.read_text()
        for path in [*files, project.path / "deploy.py"]
    }


def without(repository: Path, question: str) -> None:
    """A version without this question."""
    copier = repository / "copier.yml"
    text = copier.read_text()
    condition = rf"{{% if not \((?:\w+ and )?{question}.*?%}}"
    files = re.findall(rf"{condition}(.*){{% endif %}}", text)
    text = re.sub(rf'  - "{condition}.*\n', "", text)
    copier.write_text(re.sub(rf"^{question}:\n(  .*\n)+\n", "", text, flags=re.MULTILINE))
    assert question not in copier.read_text()
    rendered = [path for path in (repository / "template").rglob("*") if path.is_file()]
    for path in rendered:
        name = str(path.relative_to(repository / "template"))
        if any(fnmatch(name, f"{pattern}*") for pattern in files):
            path.unlink()
            continue
        text = path.read_text(encoding="utf-8")
        block = rf"{{%-? if {question} -?%}}.*?{{%-? endif -?%}}\n?"
        path.write_text(re.sub(rf"\n{block}", "\n", text, flags=re.DOTALL), encoding="utf-8")
    assert len(files) >= 4


CONTAINERS = ["compose.yaml", "deploy_containers.py", "tests/test_containers.py"]


def before_question(
    render: Render,
    repository: Path,
    question: str,
    edits: Callable[[Project], dict[str, str]],
    **answers: Any,
) -> tuple[Project, dict[str, str]]:
    """A project from a release without the question, its edits, and a newer release."""
    git(repository, "tag", "-d", OLD)
    without(repository, question)
    release(repository, OLD)
    project = made_from(render, repository, **answers)
    assert question not in project.answers
    kept = edits(project)
    project.commit()
    git(repository, "revert", "--no-edit", "HEAD")
    git(repository, "tag", NEW)
    return project, kept


def answer_later(
    project: Project,
    repository: Path,
    question: str,
    files: Iterable[str],
    words: str,
    kept: dict[str, str],
) -> None:
    """The default, no, changes nothing; a later yes adds files, and text in the README."""
    project.update(repository)
    assert git(project.path, "diff", "--name-only").split() == [".copier-answers.yml"]
    assert project.answers[question] is False
    assert not any(map(project.has, files))
    project.commit()

    project.update(repository, **{question: True})
    assert all(map(project.has, files))
    assert words in project.text("README.md")
    for name, edited in kept.items():
        assert edited in project.text(name), name
    project.check_files()
    project.commit()


@pytest.mark.template
@pytest.mark.parametrize("edits", [nothing, edit])
def test_update_adds_the_question_about_containers(
    render: Render,
    repository: Path,
    client: Orbctl,
    small_image: str,
    edits: Callable[[Project], dict[str, str]],
) -> None:
    assert client
    project, kept = before_question(render, repository, "docker", edits)

    answer_later(project, repository, "docker", CONTAINERS, "INVENTORY=containers", kept)
    project.use_image(small_image)
    project.check_tests("tests/test_containers.py", "tests/test_inventories.py")

    git(project.path, "checkout", "-q", ".")
    project.update(repository, docker=False)
    assert not any(map(project.has, CONTAINERS))
    project.commit()
    assert git(project.path, "diff", "--name-only", "HEAD~2").split() == []


@pytest.mark.parametrize("edits", [nothing, edit])
def test_update_adds_the_question_about_deploys(
    render: Render, repository: Path, edits: Callable[[Project], dict[str, str]]
) -> None:
    project, kept = before_question(render, repository, "deploy_from_ci", edits, github_user="zoe")

    brought = [".github/workflows/deploy.yml", ".github/load-key.sh", ".github/CODEOWNERS"]
    page = "docs/deploying.md"
    answer_later(project, repository, "deploy_from_ci", [*brought, page], page, kept)

    project.update(repository, deploy_from_ci=False)
    project.commit()
    assert git(project.path, "diff", "--name-only", "HEAD~2").split() == []


@pytest.mark.template
@pytest.mark.usefixtures("prepared")
def test_update_from_every_released_version(render: Render, tmp_path: Path, template: Path) -> None:
    repository = tmp_path / "repository"
    git(tmp_path, "clone", "-q", str(ROOT), str(repository))
    tags = git(repository, "tag").split()
    with_template = [
        tag for tag in tags if git(repository, "ls-tree", "--name-only", tag, "copier.yml")
    ]
    shutil.rmtree(repository / "template")
    shutil.copytree(template / "template", repository / "template")
    shutil.copy(template / "copier.yml", repository)
    git(repository, "add", "-A")
    git(repository, "commit", "-q", "--allow-empty", "-m", NEW)
    git(repository, "tag", NEW)
    for number, tag in enumerate(with_template):
        project = render(f"from-{number}", source=repository, ref=tag)
        project.commit()
        project.update(repository)
        assert project.answers["_commit"] == NEW
        project.check_tests()
