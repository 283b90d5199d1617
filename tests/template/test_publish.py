"""Publishing a rendered project: only from tags, and with the documented GitHub settings."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.template.conftest import ROOT, Render
from tests.template.project import Project, run

WORKFLOWS = [
    ROOT / ".github" / "workflows" / "publish.yml",
    ROOT / "template" / ".github" / "workflows" / "publish.yml",
]
BOTH = pytest.mark.parametrize("path", WORKFLOWS, ids=["ours", "theirs"])


def jobs(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text())["jobs"]
    return found


@BOTH
@pytest.mark.parametrize(
    ("ref", "good"),
    [
        ("refs/tags/v1.2.3", True),
        ("refs/tags/v1.2.3rc1", True),
        ("refs/heads/main", False),
        ("refs/heads/v1.2.3", False),
        ("refs/heads/refs/tags/v1.2.3", False),
        ("refs/tags/nightly", False),
        ("refs/pull/1/merge", False),
    ],
)
def test_only_tags_are_published(path: Path, ref: str, good: bool, tmp_path: Path) -> None:
    first = jobs(path)["build"]["steps"][0]
    words = ("bash", "-e", "-c", first["run"])
    if good:
        assert run(tmp_path, *words, env={"GITHUB_REF": ref}) == ""
        return
    with pytest.raises(AssertionError, match=f"::error::{ref} is not a version tag: choose one"):
        run(tmp_path, *words, env={"GITHUB_REF": ref})


@BOTH
def test_every_job_waits_for_the_tag_check(path: Path) -> None:
    needs = {name: job.get("needs", []) for name, job in jobs(path).items()}
    needs = {name: [of] if isinstance(of, str) else of for name, of in needs.items()}
    assert [name for name, of in needs.items() if not of] == ["build"]
    assert "if" not in jobs(path)["build"]["steps"][0]
    # With a condition, a job could run even though a required job failed.
    assert not [name for name, job in jobs(path).items() if "if" in job]


class Gh:
    """A stand-in for `gh` that records its requests to GitHub."""

    def __init__(self, folder: Path, answers: str = "") -> None:
        folder.mkdir()
        self._asked = folder / "asked"
        script = f"""#!/usr/bin/env python3
import json, sys
words = sys.argv[1:]
said = sys.stdin.read() if "--input" in words else ""
with open({str(self._asked)!r}, "a") as file:
    file.write(json.dumps([words, said]) + "\\n")
{answers}
"""
        (folder / "gh").write_text(script)
        (folder / "gh").chmod(0o755)
        self.env = {"PATH": os.pathsep.join([str(folder), os.environ["PATH"]])}

    def asked(self) -> list[tuple[list[str], str]]:
        return [tuple(json.loads(line)) for line in self._asked.read_text().splitlines()]


def test_the_settings_on_the_page_are_valid(render: Render, tmp_path: Path) -> None:
    project = render()
    page = project.text("docs/releasing.md")
    gh = Gh(tmp_path / "bin", "if words[:2] == ['api', 'user']: print(4711)")
    for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL):
        run(project.path, "sh", "-euc", block, env=gh.env)
    put, posted = {}, []
    for words, said in gh.asked()[1:]:
        assert words[:2] == ["api", "-X"]
        place = words[3].replace("repos/{owner}/{repo}/", "")
        if words[2] == "PUT":
            put[place] = json.loads(said)
        else:
            posted.append((place, json.loads(said) if said else words[4:]))
    # Only custom policies apply, and the only one is for tags.
    custom = {"protected_branches": False, "custom_branch_policies": True}
    environments = {
        job["environment"] for job in jobs(WORKFLOWS[1]).values() if "environment" in job
    }
    assert set(put) == {f"environments/{name}" for name in environments}
    assert all(each["deployment_branch_policy"] == custom for each in put.values())
    assert put["environments/pypi"]["reviewers"] == [{"type": "User", "id": 4711}]
    policy = ["-f", "name=v*", "-f", "type=tag"]
    for name in environments:
        assert (f"environments/{name}/deployment-branch-policies", policy) in posted
    ci = jobs(project.path / ".github/workflows/ci.yml")
    check_rules([rules for place, rules in posted if place == "rulesets"], ci["passed"]["name"])


def check_rules(rulesets: list[Any], check: str) -> None:
    """Branches require CI's check; nobody can move the tag of a version."""
    main, new, versions = rulesets
    assert all(one["enforcement"] == "active" for one in rulesets)
    (required,) = (rule for rule in main["rules"] if rule["type"] == "required_status_checks")
    (context,) = required["parameters"]["required_status_checks"]
    assert context["context"] == check
    for tags in (new, versions):
        assert tags["target"] == "tag"
        assert tags["conditions"]["ref_name"]["include"] == ["refs/tags/v*"]
    assert [rule["type"] for rule in new["rules"]] == ["creation"]
    assert {rule["type"] for rule in versions["rules"]} == {"deletion", "update"}
    assert "bypass_actors" not in versions


# The release on GitHub --------------------------------------------------------------------------

CHANGELOG = """# Changelog

## [Unreleased]

- Not yet.

## [2.0.0rc1] - 2026-02-03

- Try it.

## [1.2.30] - 2026-02-02

- Another.

## [1.2.3] - 2026-01-01

### Added

- Ours: `## [1.2.3]` and [a link](https://example.org).

## [1.2.2] - 2025-01-01

- Old.
"""
NOTES = "### Added\n\n- Ours: `## [1.2.3]` and [a link](https://example.org).\n"


def release_on_github(project: Project, gh: Gh, tag: str) -> None:
    """Run the workflow's last step in the project's directory."""
    (step,) = (step for step in jobs(WORKFLOWS[1])["release"]["steps"] if "run" in step)
    (project.path / "CHANGELOG.md").write_text(CHANGELOG)
    (project.path / "dist").mkdir(exist_ok=True)
    (project.path / "dist" / "x.whl").touch()
    env = {**gh.env, "GITHUB_REF_NAME": tag}
    run(project.path, "bash", "-e", "-c", step["run"], env=env)


@pytest.mark.parametrize(("version", "notes"), [("1.2.3", NOTES), ("2.0.0rc1", "- Try it.\n")])
def test_the_release_has_the_section(
    render: Render, tmp_path: Path, version: str, notes: str
) -> None:
    project = render()
    gh = Gh(tmp_path / "bin", "sys.exit(words[:2] == ['release', 'view'])")
    release_on_github(project, gh, f"v{version}")
    assert project.text("notes.md") == notes
    words, _ = gh.asked()[-1]
    assert words[:3] == ["release", "create", f"v{version}"]
    assert "--verify-tag" in words
    assert words[-1] == "dist/x.whl"
    assert ("--prerelease" in words) is ("rc" in version)


def test_an_existing_release_stays(render: Render, tmp_path: Path) -> None:
    project = render()
    gh = Gh(tmp_path / "bin")
    release_on_github(project, gh, "v1.2.3")
    assert [words[1] for words, _ in gh.asked()] == ["view"]


def test_no_release_without_a_section(render: Render, tmp_path: Path) -> None:
    project = render()
    gh = Gh(tmp_path / "bin", "sys.exit(words[:2] == ['release', 'view'])")
    with pytest.raises(AssertionError, match=r"CHANGELOG.md has no entry for 9\.9\.9"):
        release_on_github(project, gh, "v9.9.9")
    assert [words[1] for words, _ in gh.asked()] == ["view"]


@pytest.mark.parametrize("place", ["ours", "rendered"])
def test_a_change_passes_when_every_job_passes(place: str, render: Render) -> None:
    """Protected branches require one job, which needs all others."""
    folder = ROOT if place == "ours" else render().path
    found = jobs(folder / ".github/workflows/ci.yml")
    assert set(found["passed"]["needs"]) == {*found} - {"passed"}
