"""Rendered projects, checked with everything that a user, GitHub or an index would use."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyinfra_orbstack.orbctl import Orbctl, create_args
from tests.containers import Containers
from tests.template.conftest import Render
from tests.template.project import WITHOUT_MACHINES, Project, git, run, tool

pytestmark = [pytest.mark.template, pytest.mark.timeout(1800), pytest.mark.usefixtures("index")]

FILLED = {"user_name": 'Zoë "Z" O\'Neil', "user_email": "zoe@example.org", "github_user": "zoe-dev"}
LONG = "a-project-whose-name-has-forty-characters"[:40]
#: Every combination of yes and no, with and without identity; every other choice at least once.
#: Those that change something in tests with machines run them, with a prepared image; other tests
#: use both original images, without the sample's packages.
COMBINATIONS: list[dict[str, Any]] = [
    {"publish_to_pypi": True, "codecov": False, "license": "MIT"},
    {
        "publish_to_pypi": True,
        "codecov": True,
        "license": "Apache-2.0",
        "project_name": LONG,
        "docker": True,
    },
    {"publish_to_pypi": False, "license": "proprietary", "project_name": "x"},
    {"publish_to_pypi": True, "codecov": False, "license": "BSD-3-Clause", **FILLED},
    {"publish_to_pypi": True, "codecov": True, "image": "debian:bookworm", **FILLED},
    {
        "publish_to_pypi": False,
        "description": "A \"quoted\" \\ 'text' {{ x }} ☃",
        **FILLED,
        "docker": True,
        "deploy_from_ci": True,
    },
]


@pytest.fixture
def shared_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One environment for all projects of a worker: answers do not change dependencies."""
    folder = tmp_path_factory.getbasetemp() / "shared"
    monkeypatch.setenv("UV_PROJECT_ENVIRONMENT", str(folder / "venv"))
    monkeypatch.setenv("MYPY_CACHE_DIR", str(folder / "mypy"))


@pytest.mark.usefixtures("client", "shared_environment")
@pytest.mark.parametrize("answers", COMBINATIONS, ids=range(1, len(COMBINATIONS) + 1))
def test_every_combination_passes_everything(
    render: Render,
    answers: dict[str, Any],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the lock file committed, as in CI."""
    project = render(**answers)
    if answers.get("docker"):
        project.use_image(request.getfixturevalue("small_image"))
    request.getfixturevalue("prepared")  # from here on, other machines are used
    project.make("lock")
    project.commit()
    monkeypatch.setenv("UV_LOCKED", "1")
    project.all_checks(machines="project_name" in answers)
    assert git(project.path, "status", "--porcelain") == ""


@pytest.mark.usefixtures("boots")
def test_the_lowest_required_versions_work(render: Render) -> None:
    """As in CI, so that nothing is skipped, and with an image other than the default one."""
    project = render(image="debian:bookworm")
    assert " passed" in project.make("test", UV_RESOLUTION="lowest-direct", CI="true")
    versions = run(project.path, tool("uv"), "pip", "freeze", "--python", ".venv")
    assert "pyinfra==3.9\n" in versions or "pyinfra==3.9.0\n" in versions


def test_only_the_index_is_needed(render: Render) -> None:
    """On the host, that is; machines have a network of their own."""
    project = render()
    run(project.path, tool("uv"), "sync", "--quiet")
    nowhere = "http://127.0.0.1:9"
    offline = {"UV_OFFLINE": "1", "HTTP_PROXY": nowhere, "HTTPS_PROXY": nowhere}
    project.make("lint", **offline)
    assert " passed" in project.make("test", **WITHOUT_MACHINES, **offline)


@pytest.mark.usefixtures("client")
def test_without_uv_the_project_installs_it(render: Render, tmp_path: Path) -> None:
    project = render()
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "python3").symlink_to(sys._base_executable)  # type: ignore[attr-defined]
    path = os.pathsep.join([str(tools), "/usr/bin", "/bin", "/usr/sbin", "/sbin"])
    project.make("lint", PATH=path)
    assert project.has(".venv/bin/uv")
    project.make("lint", PATH=path)
    assert project.has(".venv/bin/uv")


def test_commands(
    render: Render, client: Orbctl, prepared: str, destroy: Callable[[Project], None]
) -> None:
    project = render("commands", image=prepared)
    destroy(project)
    web, db = names = project.machines()
    assert [name.split("-")[1] for name in names] == ["web", "db"]

    said = project.make("plan")
    assert all(f"{name} would be created" in said for name in names)
    assert not set(names) & {machine.name for machine in client.machines()}
    first = project.make("deploy")
    assert all(f"created machine {name}" in first for name in names)
    second = project.make("deploy")
    total = next(line for line in second.splitlines() if "Grand total" in line)
    assert total.split()[2:] == ["30", "-", "-", "30"]
    assert "local: nothing would change" in project.make("drift")
    client.call("run", "-m", web, "sudo", "rm", "/etc/ssh/sshd_config.d/10-commands.conf")
    with pytest.raises(AssertionError, match=rf"@orbstack/{web}: SSH server \| "):
        project.make("drift")
    assert "nothing would change" not in project.make("deploy")
    client.stop(web)
    said = project.make("plan")
    assert f"{web} would be started" in said
    assert "Database | " in said
    assert not client.info(web).running
    client.start(web)
    assert "Operator | Create user ops" in project.make("plan")
    with pytest.raises(AssertionError, match=f"set M to one of: .*{web}"):
        project.make("shell", M="$(touch hacked)")
    project.make("shell", M=web)

    both = rf"({web}, {db}|{db}, {web})"
    with pytest.raises(AssertionError, match=rf"would delete {both}: confirm with YES=1"):
        project.make("destroy")
    assert re.search(f"deleted: {both}", project.make("destroy", YES="1"))
    assert not set(names) & {machine.name for machine in client.machines()}
    # A machine that another process created must not be deleted.
    client.create(create_args(web, prepared))
    stranger = client.info(web)
    try:
        assert "no machine that this project created" in project.make("destroy", YES="1")
        assert client.info(web).id == stranger.id
    finally:
        client.delete(web, stranger.id)


def test_commands_for_containers(render: Render, containers: Containers, small_image: str) -> None:
    project = render(project_name=containers.prefix, docker=True)
    to = {"INVENTORY": "containers"}
    with pytest.raises(AssertionError, match="there is no container"):
        project.make("plan", **to)
    name = containers.run(small_image, "--user", "65534", name="web-1")
    assert "Settings | Write the settings" in project.make("plan", **to)
    with pytest.raises(AssertionError, match="stdin is not a terminal: confirm with YES=1"):
        project.make("deploy", **to)
    for left in ("2", "-"):
        said = project.make("deploy", YES="1", **to)
        total = next(line for line in said.splitlines() if "Grand total" in line)
        assert total.split()[3] == left, said
    project.make("shell", M=f"docker/{name}")
    with pytest.raises(AssertionError, match=f"set M to one of: .*docker/{name}"):
        project.make("shell", M="docker/missing")
    with pytest.raises(AssertionError, match="is not a valid name or id of a container"):
        project.make("shell", M="docker/$(touch hacked)")
    containers.call("stop", "-t", "1", name)
    assert f"docker/{name} would be started" in project.make("plan", **to)
    assert not containers.client.inspect(name).running
    assert "no machine that this project created" in project.make("destroy", YES="1")
    assert not project.has("hacked")


@pytest.mark.usefixtures("client")
def test_servers_are_never_changed_without_confirmation(render: Render) -> None:
    project = render()
    with pytest.raises(AssertionError, match=r"production.py has no hosts yet"):
        project.make("deploy", INVENTORY="production")
    with pytest.raises(AssertionError, match="set INVENTORY to one of: local, production"):
        project.make("deploy", INVENTORY="; touch hacked")
    with pytest.raises(AssertionError, match="set INVENTORY to one of: local, production"):
        project.make("plan", INVENTORY="--help")
    project.write("inventories/production.py", "web: list", "queue = ['127.0.0.1']\nweb: list")
    with pytest.raises(AssertionError, match="stdin is not a terminal: confirm with YES=1"):
        project.make("deploy", INVENTORY="production")
    assert not project.has("hacked")


@pytest.mark.usefixtures("client")
def test_release(render: Render) -> None:
    project = render()
    project.commit()
    for version in ("", "1", "v1.0.0", "$(touch hacked)"):
        with pytest.raises(AssertionError, match="is not a version: make release VERSION"):
            project.make("release", VERSION=version)
    git(project.path, "add", "-A")
    git(project.path, "commit", "-qm", "Lock")
    # A tag that cannot be signed: the commit that was made for it is undone.
    before = git(project.path, "rev-parse", "HEAD")
    for key, value in (("tag.gpgSign", "true"), ("gpg.program", "false")):
        git(project.path, "config", key, value)
    with pytest.raises(AssertionError, match="nothing was released"):
        project.make("release", VERSION="1.2.3", **WITHOUT_MACHINES)
    assert git(project.path, "rev-parse", "HEAD") == before
    assert git(project.path, "status", "--porcelain") == ""
    git(project.path, "config", "tag.gpgSign", "false")
    # Its tests run, but those that need machines are skipped.
    said = project.make("release", VERSION="1.2.3", **WITHOUT_MACHINES)
    assert "git push --atomic origin HEAD v1.2.3" in said
    assert project.toml["project"]["version"] == "1.2.3"
    assert "## [Unreleased]\n\n## [1.2.3] - 20" in project.text("CHANGELOG.md")
    assert git(project.path, "tag").split() == ["v1.2.3"]
    assert git(project.path, "status", "--porcelain") == ""
    for version, reason in (("1.2.3", "v1.2.3 already exists"), ("1.2.4", "has no entry below")):
        with pytest.raises(AssertionError, match=reason):
            project.make("release", VERSION=version)
    assert not project.has("hacked")


def test_archives_contain_only_the_package(render: Render) -> None:
    project = render(**FILLED)
    planted = "host-1.internal.example"
    secret = "correct-horse-battery-staple"
    project.write("inventories/production.py", "web: list", f"queue = ['{planted}']\nweb: list")
    for name in ("group_data/all.py", "group_data/production.py", "deploy.py", "Makefile"):
        with (project.path / name).open("a") as file:
            file.write(f"# {planted} {secret}\n")
    (project.path / "group_data" / "secret.txt").write_text(secret)
    project.commit()
    run(project.path, tool("uv"), "build", "--quiet")

    archives = project.archives()
    assert any(name.endswith("templates/sudoers.j2") for name in archives)
    for name, content in archives.items():
        assert not {"inventories", "group_data", "deploy.py", ".copier-answers.yml"} & set(
            Path(name).parts
        ), name
        assert planted.encode() not in content, name
        assert secret.encode() not in content, name


def test_installed_package_deploys_from_anywhere(
    render: Render, tmp_path: Path, client: Orbctl, destroy: Callable[[Project], None]
) -> None:
    project = render("published")
    destroy(project)
    run(project.path, tool("uv"), "build", "--quiet", "--wheel")
    (wheel,) = (project.path / "dist").glob("*.whl")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(elsewhere, tool("uv"), "venv", "--quiet", "--python", sys.executable, "env")
    install = [tool("uv"), "pip", "install", "--quiet", "--python", "env"]
    run(elsewhere, *install, str(wheel), "pyinfra-orbstack")
    (elsewhere / "inventory.py").write_text(
        'hosts = [("@orbstack/published-1", {"orbstack_image": "ubuntu"})]\n'
    )
    (elsewhere / "mine.py").write_text(
        "from published import access\n"
        "access.operator(user='admin', _sudo=True)\n"
        "access.ssh(_sudo=True)\n"
    )
    record = str(project.path / ".orbstack" / "machines")
    argv = [str(elsewhere / "env" / "bin" / "pyinfra"), "-y", "inventory.py", "mine.py"]
    run(elsewhere, *argv, env={"PYINFRA_ORBSTACK_RECORD": record})
    said = client.call("run", "-m", "published-1", "sudo", "cat", "/etc/sudoers.d/published")
    assert b"admin ALL=(ALL:ALL) NOPASSWD: ALL" in said.stdout


def spoil(name: str, old: str, new: str) -> Callable[[Project], None]:
    def fault(project: Project) -> None:
        project.write(name, old, new)

    return fault


CI = ".github/workflows/ci.yml"
PUBLISH = ".github/workflows/publish.yml"
DEPLOY = ".github/workflows/deploy.yml"


#: With these answers, a project has every workflow.
ALL_WORKFLOWS = {"codecov": True, "docker": True, "deploy_from_ci": True}


def test_workflows_without_faults_pass(render: Render) -> None:
    """So that the next test finds its faults and nothing else."""
    render(**ALL_WORKFLOWS).check_workflows()


@pytest.mark.parametrize(
    "fault",
    [
        spoil(CI, "timeout-minutes: 10", "timeout-minute: 10"),
        spoil(CI, "permissions: {}", "permissions: write-all"),
        spoil(CI, "@3d3c42e5aac5ba805825da76410c181273ba90b1 # v7.0.1", "@v7"),
        spoil(CI, "- run: make lint", "- run: echo ${{ github.event.pull_request.title }}"),
        spoil(PUBLISH, "id-token: write", "id-token: sure"),
        spoil(DEPLOY, "  pull_request:\n", "  pull_request_target:\n"),
        spoil(DEPLOY, "make deploy", "make deploy ARGS=${{ github.head_ref }}"),
        spoil(".github/dependabot.yml", "interval: weekly", "interval: sometimes"),
        spoil("compose.yaml", "image: ", "imag: "),
    ],
)
def test_faults_in_workflows_are_caught(render: Render, fault: Callable[[Project], None]) -> None:
    project = render(**ALL_WORKFLOWS)
    fault(project)
    with pytest.raises(AssertionError):
        project.check_workflows()


@pytest.mark.parametrize(
    ("target", "fault"),
    [
        ("lint", spoil("deploy.py", "user=host", "usr=host")),
        ("lint", spoil("group_data/all.py", "_sudo = True", "import os\n_sudo = True")),
        ("release-check", spoil("pyproject.toml", 'readme = "README.md"\n', "")),
        ("release-check", spoil("pyproject.toml", 'license = "MIT"', 'license = "GPL"')),
    ],
)
def test_faults_in_a_project_are_caught(
    render: Render, target: str, fault: Callable[[Project], None]
) -> None:
    project = render()
    fault(project)
    with pytest.raises(AssertionError):
        project.make(target)


@pytest.mark.parametrize(
    "fault",
    [
        spoil("inventories/production.py", "web: list", "app: list"),
        spoil("inventories/production.py", "\ndb: list", "\n_db: list"),
        spoil("inventories/local.py", "\ndb = ", "\nqueue = "),
    ],
)
def test_a_group_missing_from_one_inventory_is_found(
    render: Render, fault: Callable[[Project], None]
) -> None:
    """With or without machines: here without, which is faster."""
    project = render()
    fault(project)
    caught = "FAILED tests/test_inventories.py::test_every_inventory_has_the_same_groups"
    with pytest.raises(AssertionError, match=caught):
        project.make("test", **WITHOUT_MACHINES)
