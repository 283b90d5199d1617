"""docs/adopting.md, followed word for word in a repository without the template."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from tests.template.conftest import ROOT
from tests.template.project import Project, git, run, tool

PAGE = ROOT / "docs" / "adopting.md"

#: A typical repository: includes, a directory for a role, one inventory, pyinfra's config.
REPOSITORY = {
    "README.md": "# Shop\n\nOur servers.\n",
    "requirements.txt": "pyinfra\n",
    ".gitignore": "*.pyc\n__pycache__/\n.venv/\npyinfra-debug.log\n",
    "inventory.py": (
        "web = [('web1.example.com', {'ssh_user': 'admin'}), 'web2.example.com']\n"
        "db = ['db1.example.com']\n"
    ),
    "config.py": "from pyinfra import config\nconfig.SUDO = True\n",
    "group_data/all.py": "shop_port = 80\n",
    "group_data/web.py": "shop_port = 8080\n",
    "deploy.py": (
        "from pyinfra import local\n\n"
        "local.include('tasks/motd.py')\n"
        "local.include('roles/app/tasks.py')\n"
    ),
    "tasks/motd.py": (
        "from pyinfra.operations import files\n\n"
        "files.put(name='Message', src='files/motd', dest='/etc/motd')\n"
    ),
    "files/motd": "The shop's.\n",
    "roles/app/tasks.py": (
        "from pyinfra import host\nfrom pyinfra.operations import files\n\n"
        "files.template(name='Settings', src='roles/app/templates/shop.conf.j2',\n"
        "    dest='/etc/shop.conf', port=host.data.shop_port)\n"
    ),
    "roles/app/templates/shop.conf.j2": "port = {{ port }}\n",
    "tests/test_ours.py": "def test_ours() -> None:\n    assert True\n",
}


@pytest.fixture
def repository(template: Path, tmp_path: Path) -> Path:
    """The template, with a version."""
    folder = tmp_path / "template"
    shutil.copytree(template, folder)
    git(folder, "tag", "v90.0.0")
    return folder


@pytest.fixture
def tools(tmp_path: Path) -> dict[str, str]:
    """An environment with uv, in which `copier` is the installed one."""
    folder = tmp_path / "tools"
    folder.mkdir()
    copier, uv = f"{shlex.quote(sys.executable)} -m copier", shlex.quote(tool("uv"))
    scripts = {
        "uvx": f'shift; exec {copier} "$@"',
        "uv": f'[ "$1 $2" = "tool run" ] || exec {uv} "$@"; shift 5; exec {copier} "$@"',
    }
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    return {"PATH": os.pathsep.join([str(folder), os.environ["PATH"]]), "CI": "true"}


@pytest.fixture
def shop(tmp_path: Path) -> Project:
    """The repository."""
    project = Project(tmp_path / "shop")
    for name, text in REPOSITORY.items():
        path = project.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    project.commit()
    return project


def blocks() -> list[tuple[str, str]]:
    """Language and text of each block of the page."""
    found: list[tuple[str, str]] = re.findall(
        r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL
    )
    return found


@pytest.mark.template
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("client", "index")
def test_a_repository_can_follow_the_page(
    shop: Project, tools: dict[str, str], repository: Path
) -> None:
    *steps, (_, update) = blocks()
    committed = []
    for language, text in steps:
        if language == "python":
            name = text.partition("\n")[0].lstrip("# ")
            (shop.path / name).write_text(text)
            continue
        text = text.replace("copier copy", "copier copy --defaults")
        text = text.replace("gh:elazar/pyinfra-orbstack", str(repository))
        said = run(shop.path, "sh", "-exc", text, env={**tools, "GIT_PAGER": "cat"})
        if "copier copy" in text:
            # Existing files are unchanged.
            kept = {name: words for name, words in REPOSITORY.items() if name != "inventory.py"}
            assert {name: shop.text(name) for name in kept} == kept
            assert shop.text("inventories/production.py") == REPOSITORY["inventory.py"]
        if "git clean" in text:
            assert shop.has("tests/test_ours.py")
            assert not shop.has("src/shop/access.py")
        if "make lint test" in text:
            assert re.search(r"\b([3-9]|1\d) passed", said), said
            assert "shop-web-1 would be created" in said or "plan" not in text
        if "git commit" in text:
            assert git(shop.path, "status", "--porcelain") == ""
            committed.append(git(shop.path, "log", "-1", "--format=%s").strip())
    assert committed == ["Adopt the template", "Move the settings into the package"]
    assert shop.answers["project_name"] == "shop"

    readme = repository / "template" / "README.md.jinja"
    readme.write_text(readme.read_text() + "\nNew words.\n")
    (repository / "template" / "docs" / "new.md").write_text("# New\n")
    git(repository, "add", "-A")
    git(repository, "commit", "-qm", "New")
    git(repository, "tag", "v90.1.0")
    run(shop.path, "sh", "-exc", update, env=tools)
    assert shop.has("docs/new.md")
    assert shop.text("README.md") == REPOSITORY["README.md"]
    assert shop.answers["_commit"] == "v90.1.0"
    shop.check_no_conflict()
