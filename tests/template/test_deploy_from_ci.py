"""`deploy_from_ci`: the workflow's commands, run against a server, and its permissions."""

from __future__ import annotations

import json
import re
import subprocess
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests.conformance.conftest import Guest
from tests.loopback import free_port
from tests.sshd import Sshd
from tests.template.conftest import Render
from tests.template.project import Project, git, run, tool
from tests.template.runner import Runner
from tests.template.test_publish import Gh

pytestmark = pytest.mark.template

DEPLOY = """from io import StringIO

from pyinfra.operations import files

files.put(name="A file", src=StringIO("as it should be\\n"), dest="/etc/from-ci")
"""


class Server(NamedTuple):
    """An SSH server on a loopback port, the private key that it accepts, and its own public key."""

    guest: Guest
    port: int
    key: str
    host_key: str


@pytest.fixture(scope="module")
def server(sshd: Sshd) -> Server:
    port = free_port()
    sshd.start(port, kinds="ed25519")
    key = sshd.guest.sh("cat /root/.ssh/id").decode()
    scanned = subprocess.run(
        ["ssh-keyscan", "-T", "60", "-t", "ed25519", "-p", str(port), "127.0.0.1"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert scanned.stdout
    return Server(sshd.guest, port, key, scanned.stdout)


@pytest.fixture
def project(render: Render, server: Server, index: None) -> Project:
    """A project whose production is that server, with its host key pinned."""
    project = render(deploy_from_ci=True, github_user="zoe-dev")
    (project.path / "deploy.py").write_text(DEPLOY)
    (project.path / "known_hosts").write_text(server.host_key)
    (project.path / "group_data/production.py").write_text(
        "ssh_known_hosts_file = 'known_hosts'\nssh_strict_host_key_checking = 'yes'\n"
    )
    host = ("127.0.0.1", {"ssh_user": "root", "ssh_port": server.port})
    (project.path / "inventories/production.py").write_text(f"web = [{host!r}]\n")
    project.make("lock")
    project.commit()
    return project


def here(project: Project) -> str:
    """The commit that is checked out."""
    return git(project.path, "rev-parse", "HEAD").strip()


@pytest.mark.timeout(1800)
def test_the_commands_reach_a_server(project: Project, server: Server, tmp_path: Path) -> None:
    runner = Runner(project, tmp_path / "runner")
    secrets = {"secrets_SSH_KEY": server.key, "github_token": "token"}

    runner.job("deploy", "plan", **secrets)
    assert runner.summary.startswith("### Plan for production\n\n    ")
    assert "A file" in runner.summary
    assert "as it should be" not in runner.summary
    assert server.guest.sh("ls /etc/from-ci 2>&1 || true").startswith(b"ls:")

    (runner.place / "newest").write_text("another\n")
    with pytest.raises(AssertionError, match="main is at another, and this commit would undo it"):
        runner.job("deploy", "deploy", GITHUB_SHA=here(project), **secrets)
    (runner.place / "newest").write_text(here(project))
    runner.job("deploy", "deploy", GITHUB_SHA=here(project), **secrets)
    assert server.guest.sh("cat /etc/from-ci") == b"as it should be\n"
    runner.asked()

    def drift() -> tuple[str, list[str]]:
        changes = runner.job("deploy", "drift", **secrets).get("changes", "")
        runner.job("deploy", "report", needs_drift_outputs_changes=changes, **secrets)
        return changes, runner.asked()

    found = "issue list --state open --label drift --limit 1 --json number --jq .[].number"
    assert drift() == ("", [found])
    server.guest.sh("echo otherwise >/etc/from-ci")
    changes, (listed, _, created, *text) = drift()
    assert changes == "127.0.0.1: A file"
    assert (listed, created) == (
        found,
        "issue create --label drift --title Servers differ from main --body-file -",
    )
    assert "|     127.0.0.1: A file" in text
    assert drift()[1][1] == "issue edit 7 --title Servers differ from main --body-file -"
    runner.job("deploy", "deploy", GITHUB_SHA=here(project), **secrets)
    runner.asked()
    assert drift() == ("", [found, "issue close 7 --comment This no longer applies."])

    assert not any(line in runner.printed for line in server.key.splitlines()[1:-1])
    left = [path for path in project.path.rglob("*") if path.is_file() and ".venv" not in str(path)]
    assert not any(server.key.splitlines()[1].encode() in path.read_bytes() for path in left)


@pytest.mark.timeout(1800)
def test_an_unsafe_change_fails_before_any_change(
    project: Project, server: Server, tmp_path: Path
) -> None:
    runner = Runner(project, tmp_path / "runner")
    with pytest.raises(AssertionError, match="has no secret SSH_KEY"):
        runner.job("deploy", "drift", secrets_SSH_KEY="")
    run(tmp_path, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "other")
    _, kind, _ = server.host_key.split()
    another = (tmp_path / "other.pub").read_text().split()[1]
    (project.path / "known_hosts").write_text(f"[127.0.0.1]:{server.port} {kind} {another}\n")
    with pytest.raises(AssertionError, match=r"(?i)host key"):
        runner.job("deploy", "drift", secrets_SSH_KEY=server.key)
    (project.path / "known_hosts").write_text("# None yet.\n")
    with pytest.raises(AssertionError, match="known_hosts contains no host keys"):
        runner.job("deploy", "plan", secrets_SSH_KEY=server.key)


# Permissions ----------------------------------------------------------------------------------


def jobs(project: Project) -> dict[str, dict[str, Any]]:
    """The jobs of deploy.yml."""
    found: dict[str, dict[str, Any]] = yaml.safe_load(project.text(".github/workflows/deploy.yml"))[
        "jobs"
    ]
    return found


def test_secrets_are_out_of_reach_of_forks(render: Render) -> None:
    project = render(deploy_from_ci=True)
    text = project.text(".github/workflows/deploy.yml")
    # `on` is a boolean in YAML 1.1.
    events = yaml.safe_load(text)[True]
    assert set(events) == {"pull_request", "push", "schedule", "workflow_dispatch"}
    assert events["push"] == {"branches": ["main"]}
    secret = {name: job for name, job in jobs(project).items() if "secrets." in yaml.dump(job)}
    assert {name: job["environment"] for name, job in secret.items()} == {
        "plan": "plan",
        "deploy": "production",
        "drift": "drift",
    }
    assert "head.repo.full_name == github.repository" in secret["plan"]["if"]
    assert set(re.findall(r"secrets\.(\w+)", text)) == {"SSH_KEY"}
    assert all(job["permissions"] == {"contents": "read"} for job in secret.values())


def test_only_one_deploy_runs_of_the_approved_commit(render: Render) -> None:
    deploy = jobs(render(deploy_from_ci=True))["deploy"]
    assert deploy["concurrency"] == {"group": "production", "cancel-in-progress": False}
    assert deploy["steps"][0]["with"]["ref"] == "${{ github.sha }}"
    assert deploy["if"].startswith("github.ref == 'refs/heads/main' && ")


def test_code_owners(render: Render) -> None:
    project = render(deploy_from_ci=True, github_user="zoe-dev")
    owned = dict(
        line.split() for line in project.text(".github/CODEOWNERS").splitlines() if line[0] != "#"
    )
    assert set(owned.values()) == {"@zoe-dev"}
    assert set(owned) == {
        "/.github/",
        "/group_data/production.py",
        "/inventories/production.py",
        "/known_hosts",
    }
    for answers in ({"deploy_from_ci": True}, {"github_user": "zoe-dev"}):
        assert not render("other-" + next(iter(answers)).replace("_", "-"), **answers).has(
            ".github/CODEOWNERS"
        )


def test_nothing_of_ci_deploys_is_rendered_by_default(render: Render) -> None:
    project = render()
    for name in (".github/workflows/deploy.yml", ".github/load-key.sh", "docs/deploying.md"):
        assert not project.has(name), name


def test_workflows_and_scripts_pass_the_linters(render: Render) -> None:
    project = render(deploy_from_ci=True, github_user="zoe-dev", publish_to_pypi=False)
    project.check_files()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # actionlint's findings
        project.check_workflows()
    run(project.path, tool("shellcheck"), *map(str, project.path.glob(".github/*.sh")))


def test_the_settings_on_the_page_are_valid(render: Render, tmp_path: Path) -> None:
    """Run with a `gh` that only records calls: environments have branches, reviewers and keys."""
    project = render(deploy_from_ci=True)
    (block,) = re.findall(r"```sh\n(.*?)```", project.text("docs/deploying.md"), re.DOTALL)
    (project.path / "deploy_key").write_text("key\n")
    gh = Gh(tmp_path / "bin", "if words[:2] == ['api', 'user']: print(4711)")
    run(project.path, "sh", "-euc", block, env=gh.env)
    reviewed, branches, keys = {}, {}, []
    for words, said in gh.asked()[1:]:
        name = words[3].partition("environments/")[2].partition("/")[0]
        if words[:2] == ["secret", "set"]:
            keys.append(words[2:])
        elif words[2] == "PUT":
            asked = json.loads(said)
            assert asked["deployment_branch_policy"]["custom_branch_policies"] is True
            reviewed[name] = "reviewers" in asked
        else:
            branches[name] = words[5]
    assert reviewed == {"production": True, "plan": True, "drift": False}
    assert branches == {
        "production": "name=main",
        "plan": "name=refs/pull/*/merge",
        "drift": "name=main",
    }
    assert keys == [["SSH_KEY", "--env", name] for name in reviewed]
    used = {job["environment"] for job in jobs(project).values() if "environment" in job}
    assert set(reviewed) == used
