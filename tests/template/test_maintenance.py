"""Staying current: the commands of the workflow *Maintenance*, and `make lint`."""

from __future__ import annotations

import http.server
import json
import random
import re
import shlex
import shutil
import string
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.template.conftest import ROOT, Render
from tests.template.project import Project, git, run, tool
from tests.template.runner import Runner

pytestmark = pytest.mark.template

WORKFLOWS = ROOT / "template/.github/workflows"


def instead(runner: Runner, name: str, script: str) -> None:
    """Put an executable where a runner finds it."""
    path = runner.place / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


# A new version of the template ------------------------------------------------------------------


def test_one_issue_is_open_while_the_template_is_outdated(
    render: Render, template: Path, tmp_path: Path
) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(template, repository)
    git(repository, "tag", "v90.0.0")
    project = render(source=repository, answers_file_path="conf/it's mine.yml")
    project.commit()
    runner = Runner(project, tmp_path / "runner")
    # Behind `uv tool run --from WHAT copier`.
    instead(runner, "uv", f'shift 5; exec {shlex.quote(sys.executable)} -m copier "$@"')

    def check() -> list[str]:
        runner.job("maintenance", "template", github_token="token")
        return runner.asked()

    listed = (
        "issue list --state open --label template-update --limit 1 --json number --jq .[].number"
    )
    assert check() == [listed]
    git(repository, "commit", "-q", "--allow-empty", "-m", "New")
    git(repository, "tag", "v90.1.0")
    first, _, created, text = check()
    title = "--title The template has a new version --body-file -"
    assert (first, created) == (listed, f"issue create --label template-update {title}")
    assert text.startswith("| The template is at 90.1.0, this project at 90.0.0:")
    git(repository, "tag", "v90.2.0")
    assert check()[1] == f"issue edit 7 {title}"
    project.write("conf/it's mine.yml", "_commit: v90.0.0", "_commit: v90.2.0")
    assert check() == [listed, "issue close 7 --comment This no longer applies."]

    git(repository, "tag", "-d", "v90.0.0", "v90.1.0", "v90.2.0")
    shutil.rmtree(repository / ".git")
    with pytest.raises(AssertionError, match="only supported in git-tracked"):
        check()
    assert runner.asked() == [], "an error is no news about versions"


# Audits -----------------------------------------------------------------------------------------


class Vulnerable(http.server.BaseHTTPRequestHandler):
    """The service that `uv audit` queries: one package has a vulnerability."""

    package = ""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        found = {"vulns": [{"id": "OSV-1", "modified": "2026-01-01T00:00:00Z"}]}
        names = [one["package"]["name"] for one in asked["queries"]]
        self.answer({"results": [found if name == self.package else {} for name in names]})

    def do_GET(self) -> None:
        affected = {"package": {"name": self.package, "ecosystem": "PyPI"}}
        now = "2026-01-01T00:00:00Z"
        self.answer({"id": "OSV-1", "modified": now, "published": now, "affected": [affected]})

    def answer(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def service() -> Iterator[str]:
    """Its URL."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Vulnerable) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.mark.template
@pytest.mark.usefixtures("index")
def test_a_known_vulnerability_fails(
    render: Render, tmp_path: Path, service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = render()
    project.make("lock")
    runner = Runner(project, tmp_path / "runner")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # Only the service is different.
    uv = shlex.quote(tool("uv"))
    instead(runner, "uv", f'verb=$1; shift; exec {uv} "$verb" --service-url {service} "$@"')
    monkeypatch.setattr(Vulnerable, "package", "no-such-package")
    runner.job("maintenance", "packages")
    monkeypatch.setattr(Vulnerable, "package", "jinja2")
    with pytest.raises(AssertionError, match=r"jinja2 .* has 1 known vulnerability"):
        runner.job("maintenance", "packages")


def test_an_insecure_workflow_fails(render: Render, tmp_path: Path) -> None:
    project = render()
    runner = Runner(project, tmp_path / "runner")
    zizmor = shlex.quote(tool("zizmor"))
    instead(runner, "uvx", f'shift; unset GH_TOKEN; exec {zizmor} --offline "$@"')
    runner.job("maintenance", "workflows", github_token="token")
    title = "- run: echo ${{ github.event.pull_request.title }}"
    project.write(".github/workflows/ci.yml", "- run: make lint", title)
    with pytest.raises(AssertionError, match="template-injection"):
        runner.job("maintenance", "workflows", github_token="token")


def test_each_schedule_starts_its_own_job(render: Render) -> None:
    workflow = yaml.safe_load(render().text(".github/workflows/maintenance.yml"))
    week, month = (one["cron"] for one in workflow[True]["schedule"])
    left_out = {
        name: re.findall("event.schedule != '(.*)'", job["if"])
        for name, job in workflow["jobs"].items()
    }
    assert left_out == {"packages": [month], "workflows": [month], "template": [week]}


# Pinned actions ---------------------------------------------------------------------------------


def test_dependabot_covers_every_action() -> None:
    """It reads only files that end in .yml, so actions pinned elsewhere must match them."""

    def used(paths: list[Path]) -> set[str]:
        return {line for path in paths for line in re.findall("uses: (.*)", path.read_text())}

    seen = used([*WORKFLOWS.glob("*.yml"), *ROOT.glob(".github/workflows/*.yml")])
    others = used(list(WORKFLOWS.glob("*.jinja")))
    # The project's own Dependabot updates this one.
    assert {line.partition("@")[0] for line in others - seen} == {"actions/cache"}


# Secrets and conflict markers -------------------------------------------------------------------

LETTERS = string.ascii_letters + string.digits


def token(count: int, letters: str = LETTERS) -> str:
    return "".join(random.Random(count).choices(letters, k=count))


#: Not a real secret, and in none of our files.
PLANTED = {
    "GitHub": f'TOKEN = "ghp_{token(36)}"',
    "AWS": f'KEY = "AKIA{token(16, string.ascii_uppercase)}"',
    "password": f'db_password = "{token(20)}"',
    "address": f'DATABASE = "postgres://app:{token(20)}@db.example.org/app"',
    "private key": "-----BEGIN OPENSSH " + "PRIVATE KEY-----",
    "conflict": "<" * 7 + " HEAD",
    "rest of a conflict": ">" * 7 + " theirs",
}


@pytest.fixture
def scanned(render: Render, index: None) -> Project:
    """A project without findings, with all options."""
    project = render(docker=True, codecov=True, deploy_from_ci=True, github_user="zoe-dev")
    project.make("scan")  # before `git init`
    project.commit()
    project.make("scan")
    return project


@pytest.mark.template
def test_secrets_and_conflicts_are_found(scanned: Project) -> None:
    for kind, line in PLANTED.items():
        for name in ("group_data/planted.py", "it's a note.md"):
            path = scanned.path / name
            path.write_text(f"first = 1\n{line}\n")
            with pytest.raises(AssertionError, match=re.escape(path.name)) as said:
                scanned.make("lint")
            secret = line.split('"')[1] if '"' in line else "no secret"
            assert secret not in str(said.value), f"{kind} is printed"
            path.unlink()
    # What git ignores is never committed.
    (scanned.path / ".venv/planted.py").write_text(PLANTED["GitHub"])
    # Public keys and hashes are not secrets.
    public = f"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI{token(43)} ops@example"
    (scanned.path / "known_hosts").write_text(f"web1.example.org {public.rsplit(' ', 1)[0]}\n")
    (scanned.path / "group_data/mine.py").write_text(
        f'KEYS = ["{public}"]\nSHA = "{"ab12" * 16}"\n'
    )
    scanned.make("scan")


@pytest.mark.template
def test_the_hook_finds_secrets_before_a_commit(scanned: Project) -> None:
    install = [tool("uv"), "tool", "run", "--quiet", "pre-commit", "install"]
    run(scanned.path, *install)
    (scanned.path / "planted.md").write_text(PLANTED["GitHub"])
    git(scanned.path, "add", "-A")
    with pytest.raises(AssertionError, match=r"secrets and conflict markers\.+Failed"):
        git(scanned.path, "commit", "-qm", "Planted")
    git(scanned.path, "rm", "-qf", "planted.md")
    git(scanned.path, "commit", "-q", "--allow-empty", "-m", "Clean")
