"""The template's output, checked within a few seconds."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from yaml import safe_load

from tests.template.conftest import ROOT, Render
from tests.template.project import WITHOUT_MACHINES, Project, run, tool

ODD = 'It\'s "5 \\ 7" {{ project_name }} {% raw %} ünïcode ☃ # no: comment'
FILLED = {
    "user_name": "Zoë O'Neil",
    "user_email": "zoe@example.org",
    "github_user": "zoe-dev",
}


@pytest.mark.template
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("boots")
def test_default_project_passes_its_own_tests(render: Render) -> None:
    """With packages from the distribution, as on a user's host."""
    project = render()
    project.check_files()
    assert project.answers == {
        **{key: project.answers[key] for key in ("_commit", "_src_path")},
        "project_name": "myproj",
        "description": "Deploys for our servers, tested on local machines first",
        "user_name": "",
        "user_email": "",
        "github_user": "",
        "license": "MIT",
        "image": "ubuntu:noble",
        "docker": False,
        "deploy_from_ci": False,
        "publish_to_pypi": True,
        "codecov": False,
    }
    project.check_tests()


@pytest.mark.template
def test_hosts_can_be_written_in_every_form_that_pyinfra_reads(render: Render) -> None:
    project = render(docker=True)
    project.write(
        "inventories/local.py",
        "web = [",
        """_hidden = ["@orbstack/other"]
queue = (["@orbstack/myproj-q-1", ("@orbstack/myproj-q-2", MACHINE)], {"port": 1})
cache: list[str] = ["@orbstack/myproj-cache-1", "@local"]
web = [""",
    )
    project.write(
        "inventories/production.py", "web: list", "queue = ['q.example']\ncache = []\nweb: list"
    )
    project.write(
        "inventories/containers.py", "web = [", "web = [('@orbstack/docker/myproj-x', {}), "
    )
    named = [
        "tests/test_inventories.py",
        "tests/test_containers.py",
        "-k",
        "named or groups or only",
    ]
    project.check_tests(*named)
    project.write("inventories/local.py", "@orbstack/myproj-q-1", "@orbstack/q-1")
    with pytest.raises(AssertionError, match="test_machines_are_named_after_the_project"):
        project.check_tests(*named)


@pytest.mark.template
@pytest.mark.usefixtures("client")
def test_project_with_containers_passes_its_own_tests(render: Render, small_image: str) -> None:
    project = render(docker=True)
    project.check_files()
    project.use_image(small_image)
    project.check_tests("tests/test_containers.py", "tests/test_inventories.py")


@pytest.mark.template
@pytest.mark.usefixtures("client")
def test_library_comes_from_a_checkout(render: Render) -> None:
    project = render()
    run(project.path, tool("uv"), "add", "--quiet", "--group", "test", "--editable", str(ROOT))
    # Other tests run it with machines; this one checks where the plugin comes from.
    project.make("test", **WITHOUT_MACHINES)
    code = "import pyinfra_orbstack as it; print(it.__file__)"
    said = run(project.path, tool("uv"), "run", "--quiet", "python", "-c", code)
    assert said == f"{ROOT}/src/pyinfra_orbstack/__init__.py\n"


def test_free_text_is_kept_unchanged(render: Render) -> None:
    project = render(description=ODD, user_name=ODD.replace(",", ""))
    project.check_files(odd=True)
    assert project.toml["project"]["description"] == ODD
    assert project.toml["project"]["authors"] == [{"name": ODD}]
    assert project.answers["description"] == ODD
    assert ODD in project.text("README.md")
    assert f"Copyright (c) {ODD}" in project.text("LICENSE")


def test_an_empty_identity_leaves_no_gaps(render: Render) -> None:
    project = render()
    meta = project.toml["project"]
    assert "authors" not in meta
    assert "urls" not in meta
    assert "the myproj authors" in project.text("LICENSE")
    assert "| Owner |" not in project.text("docs/releasing.md")
    for path in project.files():
        assert "github.com//" not in path.read_text(encoding="utf-8"), path
    assert "actions/workflows" not in project.text("README.md")


def test_filled_identity_is_used(render: Render) -> None:
    project = render(**FILLED, codecov=True)
    meta = project.toml["project"]
    assert meta["authors"] == [{"name": "Zoë O'Neil", "email": "zoe@example.org"}]
    assert meta["urls"]["Homepage"] == "https://github.com/zoe-dev/myproj"
    assert "Zoë O'Neil" in project.text("LICENSE")
    assert "zoe@example.org" in project.text("SECURITY.md")
    releasing = project.text("docs/releasing.md")
    for cell in ("zoe-dev", "myproj", "publish.yml", "pypi", "testpypi"):
        assert f"| `{cell}` |" in releasing
    readme = project.text("README.md")
    for badge in ("actions/workflows/ci.yml", "codecov.io/gh/zoe-dev/myproj", "pypi/v/myproj"):
        assert badge in readme


def test_declined_features_are_not_rendered(render: Render) -> None:
    project = render(publish_to_pypi=False)
    assert not project.has(".github/workflows/publish.yml")
    assert not project.has(".github/workflows/coverage.yml")
    assert not project.has("docs/releasing.md")
    assert not project.has("scripts")
    for name in ("SECURITY.md", ".github/ISSUE_TEMPLATE", ".github/PULL_REQUEST_TEMPLATE.md"):
        assert not project.has(name), name
    meta = project.toml["project"]
    assert meta["classifiers"] == ["Private :: Do Not Upload"]
    assert meta["license"] == "LicenseRef-Proprietary"
    assert "All rights reserved" in project.text("LICENSE")
    test = safe_load(project.text(".github/workflows/ci.yml"))["jobs"]["test"]
    assert test["name"] == "Test"
    assert not {"strategy", "env"} & set(test)
    assert "release" not in project.text("Makefile")
    assert "pypi" not in project.text("README.md")
    assert "codecov" not in project.answers
    for path in project.files():
        if path.name != ".copier-answers.yml":
            assert "docker" not in str(path) + path.read_text().lower(), path


def test_a_published_project_has_all_its_files(render: Render) -> None:
    project = render()
    for name in ("SECURITY.md", ".github/ISSUE_TEMPLATE", ".github/PULL_REQUEST_TEMPLATE.md"):
        assert project.has(name), name
    meta = project.toml["project"]
    assert not any(one.startswith("Private") for one in meta["classifiers"])
    pythons = [one.rpartition(" ")[2] for one in meta["classifiers"] if ":: 3." in one]
    test = safe_load(project.text(".github/workflows/ci.yml"))["jobs"]["test"]
    assert len(pythons) == 5
    assert test["strategy"]["matrix"]["python"] == pythons
    assert test["env"] == {"UV_PYTHON": "${{ matrix.python }}"}
    assert "MIT License" in project.text("LICENSE")


def test_a_chosen_license_stays(render: Render) -> None:
    assert render(publish_to_pypi=False, license="Apache-2.0").answers["license"] == "Apache-2.0"


def test_instructions_for_agents_are_short(render: Render) -> None:
    project = render()
    text = project.text("AGENTS.md")
    assert len(text.splitlines()) <= 30
    assert "no `INVENTORY=production`" in text
    targets = set(re.findall(r"^([a-z-]+):", project.text("Makefile"), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z]+)", text)) <= targets
    for name in re.findall(r"`([\w/]+(?:/|\.py|\.md))`", text):
        assert project.has(name), name


@pytest.mark.parametrize(
    ("license", "spdx", "words"),
    [
        ("MIT", "MIT", "MIT License"),
        ("Apache-2.0", "Apache-2.0", "Apache License"),
        ("BSD-3-Clause", "BSD-3-Clause", "Redistribution and use"),
        ("proprietary", "LicenseRef-Proprietary", "All rights reserved"),
    ],
)
def test_licenses(render: Render, license: str, spdx: str, words: str) -> None:
    project = render(license=license, user_name="Zoë")
    assert project.toml["project"]["license"] == spdx
    assert words in project.text("LICENSE")
    assert "Zoë" in project.text("LICENSE")


def test_two_projects_have_different_machines(render: Render) -> None:
    one, two = render("one"), render("two")
    assert one.machines()
    assert not set(one.machines()) & set(two.machines())


@pytest.mark.parametrize("target", ["some where/it's", "."])
def test_the_message_shows_the_directory(template: Path, tmp_path: Path, target: str) -> None:
    here = tmp_path / "here"
    here.mkdir()
    argv = [sys.executable, "-m", "copier", "copy", "--defaults", "-r", "HEAD", str(template)]
    said = subprocess.run([*argv, target], cwd=here, capture_output=True, text=True).stderr
    words = [shlex.split(line) for line in said.splitlines() if line.strip().startswith("cd ")]
    assert words == ([] if target == "." else [["cd", target]])
    assert "git init" in said
    assert "make test" in said
    assert "In a directory of an existing repository, omit `git init`" in said


@pytest.mark.usefixtures("client")
def test_makefile_without_uv_or_python_prints_an_error(render: Render, tmp_path: Path) -> None:
    project = render()
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("make", "sh", "awk", "env"):
        for folder in os.environ["PATH"].split(os.pathsep):
            if (Path(folder) / name).exists() and not (tools / name).exists():
                (tools / name).symlink_to(Path(folder) / name)
    env = {**os.environ, "PATH": str(tools)}
    done = subprocess.run(
        ["make", "test"], cwd=project.path, env=env, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "needs uv (https://docs.astral.sh/uv) or Python 3.10 or later" in done.stderr
    assert not project.has(".venv")
    listed = subprocess.run(["make"], cwd=project.path, env=env, capture_output=True, text=True)
    assert "make deploy" in listed.stdout


def broken_deploy(project: Project) -> None:
    project.write("deploy.py", "access.ssh(", "access.nothing(")


def deploy_that_never_settles(project: Project) -> None:
    with (project.path / "deploy.py").open("a") as file:
        file.write("from pyinfra.operations import server\nserver.shell(commands='date')\n")


@pytest.mark.template
@pytest.mark.usefixtures("client")
@pytest.mark.parametrize(
    "fault",
    [
        lambda project: project.write("deploy_containers.py", "settings.put(", "settings.lines("),
        lambda project: project.write("group_data/containers.py", "_sudo = False", "_sudo = True"),
    ],
)
def test_the_projects_tests_find_a_broken_deploy_of_containers(
    render: Render, small_image: str, fault: Callable[[Project], None]
) -> None:
    project = render(docker=True)
    project.use_image(small_image)
    fault(project)
    with pytest.raises(AssertionError, match=r"ERROR tests/test_containers\.py"):
        project.check_tests("tests/test_containers.py")


@pytest.mark.template
@pytest.mark.usefixtures("prepared")
@pytest.mark.parametrize("fault", [broken_deploy, deploy_that_never_settles])
def test_the_projects_tests_find_a_broken_deploy(render: Render, fault: object) -> None:
    assert callable(fault)
    project = render()
    fault(project)
    with pytest.raises(AssertionError, match="failed"):
        project.check_tests()
