"""docs/removing-the-sample.md of a rendered project, followed step by step."""

from __future__ import annotations

import re

import pytest

from tests.template.conftest import Render
from tests.template.project import run

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LEFT = {"__init__.py", "operations.py", "py.typed", "secrets.py", "services.py"}


@pytest.mark.template
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("client", "index")
def test_project_without_the_sample_passes_its_checks(
    render: Render, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_ADDOPTS", "--orbstack-init none")
    project = render("bare", image="debian")
    package = project.path / "src" / project.package
    for language, code in BLOCK.findall(project.text("docs/removing-the-sample.md")):
        if language == "python":
            name, _, text = code.partition("\n")
            assert project.has(name[2:])
            (project.path / name[2:]).write_text(text)
        elif "make" in code:
            said = run(project.path, "sh", "-exc", code, env={"CI": "true"})
            assert re.search(r"\b[4-9] passed", said), said
        else:
            run(project.path, "sh", "-exc", code)
    assert {path.name for path in package.iterdir()} - {"__pycache__"} == LEFT
