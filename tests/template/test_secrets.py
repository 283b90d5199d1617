"""Secrets of a rendered project: they reach servers, and are never visible."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pyinfra_orbstack.orbctl import Orbctl
from pyinfra_orbstack.testing import MachineFactory
from tests.conftest import Machines
from tests.loopback import free_port
from tests.sshd import Sshd
from tests.template.conftest import ROOT, Render
from tests.template.project import Project, git, tool

PAGE = (ROOT / "template" / "docs" / "secrets.md.jinja").read_text(encoding="utf-8")
DEPLOY, LARGER = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
SHELL = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
(YAML,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
#: These words remain however the secret, or a line of it, is quoted.
SECRET = "it's $correct-horse\nbattery-staple"
#: The secret on one line, for tools that store single lines.
ONE_LINE = "correct-horse $battery-staple"
TRACES = ["correct-horse", "battery-staple"]
COMMAND = str(Path(sys.executable).with_name("pyinfra-orbstack"))
IMPORTS = """
from io import StringIO
from pyinfra import host
from pyinfra.api import HiddenValue, QuoteString, StringCommand
from pyinfra.operations import files, server
from myproj.secrets import secret, secret_file
"""

pytestmark = [pytest.mark.template, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def names(machines: Machines) -> list[str]:
    return [machines.create(), machines.create()]


@pytest.fixture
def project(
    render: Render, names: list[str], client: Orbctl, monkeypatch: pytest.MonkeyPatch
) -> Project:
    """A rendered project with machines as its servers, and nothing to deploy yet."""
    project = render()
    for name in names:
        client.call("run", "-m", name, "sudo", "rm", "-rf", "/etc/app")
    hosts = [f"@orbstack/{name}" for name in names]
    for inventory in ("local", "production"):
        (project.path / "inventories" / f"{inventory}.py").write_text(f"web = {hosts!r}\n")
    monkeypatch.chdir(project.path)
    monkeypatch.syspath_prepend(project.path / "src")
    monkeypatch.setenv("PYTHONPATH", str(project.path / "src"))
    monkeypatch.delenv("APP_TOKEN", raising=False)
    return project


def deploys(project: Project, text: str) -> None:
    text = text.replace("{{ package }}", project.package)
    (project.path / "deploy.py").write_text(text)


def run(
    verb: str, *words: str, inventory: str = "production", **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, verb, *words, inventory],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def read(client: Orbctl, name: str, path: str = "/etc/app/token") -> str:
    return client.call("run", "-m", name, "sudo", "cat", path).stdout.decode()


def traces(text: str) -> list[str]:
    """Lines that show the secret."""
    return [line for line in text.splitlines() if any(trace in line for trace in TRACES)]


def test_the_secret_comes_from_the_environment(
    project: Project, names: list[str], client: Orbctl
) -> None:
    first = (
        "from pyinfra.operations import server\nserver.shell(name='1', commands='touch first')\n"
    )
    deploys(project, first + DEPLOY + LARGER.replace("# deploy.py, and `", "").replace("`", "", 1))
    for verb, given in (
        ("plan", {}),
        ("drift", {}),
        ("deploy", {}),
        ("deploy", {"APP_TOKEN": ""}),
    ):
        missing = run(verb, **given)
        assert missing.returncode == 1
        # Not always in the last line: the other host may just be loading a fact.
        wanted = r"@orbstack/\S+ needs a secret: set APP_TOKEN in the environment$"
        assert re.search(wanted, missing.stdout, re.MULTILINE)
        assert "Traceback" not in missing.stdout
    for name in names:
        assert client.call("run", "-m", name, "sh", "-c", "cd; ls").stdout == b""

    for secret in (SECRET, "another\n"):
        done = run("deploy", APP_TOKEN=secret)
        assert done.returncode == 0, done.stdout
        assert [read(client, name) for name in names] == [secret, secret]
        assert read(client, names[0], "/etc/app/settings") == f"token={secret}\n"
        look = "stat -c '%a %U' /etc/app/token; ls /etc/app"
        found = client.call("run", "-m", names[0], "sudo", "sh", "-c", look).stdout
        assert found == b"600 root\nsettings\ntoken\n"
        assert "2 changed" not in run("plan", APP_TOKEN=secret).stdout
    client.call("run", "-m", names[0], "sudo", "chmod", "644", "/etc/app/token")
    assert run("drift", APP_TOKEN="another\n").returncode == 2
    assert run("deploy", APP_TOKEN="another\n").returncode == 0
    found = client.call("run", "-m", names[0], "sudo", "stat", "-c", "%a", "/etc/app/token").stdout
    assert found == b"600\n"
    # The secret is neither needed nor used here.
    for given in ({}, {"APP_TOKEN": SECRET}):
        done = run("deploy", inventory="local", **given)
        assert done.returncode == 0, done.stdout
        assert read(client, names[0]) == "not-secret-APP_TOKEN"


def test_a_large_secret_arrives_complete(
    project: Project, names: list[str], client: Orbctl
) -> None:
    """Larger than a pipe's buffer, with characters of several bytes."""
    text = f"{IMPORTS}big = HiddenValue('ä\\n' * 200_000 + 'end')\n"
    deploys(project, f"{text}secret_file(name='Big', content=big, dest='/etc/big')\n")
    assert run("deploy").returncode == 0
    assert read(client, names[0], "/etc/big") == "ä\n" * 200_000 + "end"


def test_the_secret_arrives_over_ssh_unseen(project: Project, sshd: Sshd) -> None:
    port = free_port()
    sshd.start(port)
    sshd.put_key(project.path / "key")
    data = {"ssh_port": port, "ssh_user": "root", "ssh_key": "key"}
    (project.path / "inventories" / "production.py").write_text(f"web = [('127.0.0.1', {data})]\n")
    assert run("trust", YES="1").returncode == 0
    deploys(project, DEPLOY)
    environment = {"APP_TOKEN": SECRET, "YES": "1"}
    for words in ("-vvv --debug-all --diff", "-vvv --debug-all"):
        done = run("deploy", f"--args={words}", **environment)
        assert done.returncode == 0, done.stdout
        assert traces(done.stdout) == []
    assert "No changes" in done.stdout
    assert sshd.guest.sh("cat /etc/app/token; stat -c ' %a' /etc/app/token") == (
        f"{SECRET} 600\n".encode()
    )
    deploys(project, f"{IMPORTS}token = secret('APP_TOKEN')\n{FAILING}{BREAK}")
    done = run("deploy", "--args=-vvv --debug-all", **environment)
    assert done.returncode == 1
    assert traces(done.stdout) == []


#: Operations that fail while they handle a secret.
FAILING = """
test = StringCommand("test", "-e", QuoteString(token))
late = StringCommand("sleep", "60", "||", QuoteString(token))
may = {"_ignore_errors": True}
secret_file(name="No folder", content=token, dest="/no/such/token", **may)
secret_file(content=HiddenValue(token.unmask()), dest="/no/such/folder/token", **may)
secret_file(name="No user", content=token, dest="/etc/t", user="nobody1", **may)
server.shell(name="Command", commands=[test], _retries=1, _retry_delay=0, **may)
server.shell(name="Late", commands=[late], _timeout=1, **may)
server.shell(name="Terminal", commands=[test], _get_pty=True, **may)
server.shell(name="Environment", commands="false", _env={"T": token}, **may)
files.put(name="Put", src=StringIO(token.unmask()), dest="/proc/none", **may)
"""
#: The end of a run.
BREAK = "server.shell(name='Break', commands=[test])\n"


@pytest.mark.parametrize("transport", ["session", "spawn"])
def test_no_output_shows_the_secret(
    project: Project, names: list[str], client: Orbctl, transport: str
) -> None:
    well = f"{IMPORTS}token = secret('APP_TOKEN')\n{DEPLOY.partition(chr(10))[2]}"
    environment = {"APP_TOKEN": SECRET, "PYINFRA_ORBSTACK_TRANSPORT": transport}

    def check(verb: str, words: str, expected: int) -> None:
        done = run(verb, f"--args={words}", **environment)
        assert traces(done.stdout) == [], (verb, words)
        assert done.returncode == expected, done.stdout
        log = Path("pyinfra-debug.log")
        assert not log.exists() or traces(log.read_text()) == []

    deploys(project, well)
    for verb, words, expected in (
        ("plan", "", 0),
        ("plan", "-vvv --debug-all --diff", 0),
        ("plan", "--debug-operations --debug-facts", 0),
        ("plan", "--debug-operations --json", 0),
        ("drift", "-vvv --debug-all --diff", 2),
        ("deploy", "-vvv --debug-all --diff", 0),
        ("drift", "-vvv --debug-all --diff", 0),
    ):
        check(verb, words, expected)
    assert [read(client, name) for name in names] == [SECRET, SECRET]
    # pyinfra's own diff shows the content of files: the page says so.
    deploys(project, well + FAILING + BREAK)
    for words in ("", "-vvv --debug-all"):
        check("deploy", words, 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("files.put(name='P', src=StringIO(token.unmask()), dest='/etc/p')\n", "--diff"),
        ("files.line(path='/etc/l', line=token.unmask())\n", ""),
        ("files.line(name='L', path='/etc/l', line=token.unmask())\n", "-vv"),
        ("server.shell(name='S', commands=['echo ' + token.unmask()])\n", "--debug"),
        ("server.shell(name='S', commands='cat', _stdin=token.unmask())\n", "--debug-operations"),
        ("server.shell(name='S', commands=[StringCommand('echo', QuoteString(token))])\n", "-vvv"),
    ],
    ids=["put", "arguments", "line", "command", "stdin", "output"],
)
def test_leaks_of_a_secret_are_found(project: Project, text: str, words: str) -> None:
    """The page lists each of them, and these tests find a secret that is shown."""
    deploys(project, f"{IMPORTS}token = secret('APP_TOKEN')\n{text}")
    verbs = ("plan", "deploy") if words in ("--diff", "") else ("deploy",)
    for verb in verbs:
        done = run(verb, f"--args={words}", APP_TOKEN="correct-horse")
        assert traces(done.stdout), done.stdout


@pytest.mark.parametrize("as_file", [True, False], ids=["file", "function"])
def test_the_plugin_prints_no_secret(
    project: Project,
    as_file: bool,
    orbstack_machines: MachineFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("APP_TOKEN", SECRET)
    path = str(project.path / "deploy.py")

    def function() -> None:
        runpy.run_path(path)

    deploy: Any = path if as_file else function
    put = "token = secret('APP_TOKEN')\n"
    put += "secret_file(name='Token', content=token, dest='/etc/token')\n"
    always = "server.shell(name='Always', commands=[StringCommand('true', QuoteString(token))])\n"
    with orbstack_machines(groups=["production"], data={"_sudo": True}) as machine:
        deploys(project, IMPORTS + put + FAILING)
        results = [machine.apply(deploy)]
        assert machine.read("/etc/token") == SECRET
        assert results[0].changed == ["Token"]
        assert len(results[0].ignored) == FAILING.count("**may")

        deploys(project, IMPORTS + put + FAILING + BREAK)
        results.append(machine.apply(deploy, check=False))
        assert results[1].failed == ["Break"]
        with pytest.raises(AssertionError, match="Break") as failed:
            machine.apply(deploy)
        deploys(project, IMPORTS + put + always)
        with pytest.raises(AssertionError, match="Always") as changed:
            machine.assert_idempotent(deploy)
    told = [str(failed.value), str(changed.value)]
    for result in results:
        told += [repr(result), result.log, *(step.output for step in result.steps)]
    assert [traces(text) for text in told] == [[]] * len(told)


def test_pyinfra_shows_the_data_itself(project: Project) -> None:
    """That is why it must not contain secrets."""
    (project.path / "group_data" / "web.py").write_text("port = 8080\n")
    words = ["inventories/production.py", "debug-inventory"]
    done = subprocess.run(["pyinfra", *words], capture_output=True, text=True, check=True)
    assert '"port": 8080' in done.stdout + done.stderr


@pytest.mark.usefixtures("prepared")
def test_the_projects_tests_need_no_secret(render: Render, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project that follows the page passes `make test` and CI."""
    monkeypatch.delenv("APP_TOKEN", raising=False)
    project = render()
    with (project.path / "deploy.py").open("a") as file:
        file.write(DEPLOY.replace("{{ package }}", project.package))
    project.check_tests("tests/test_deploy.py", "tests/test_secrets.py")


# Sources of secrets ---------------------------------------------------------------------------


@pytest.fixture
def shop(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project whose `make` runs this checkout through uv, with a separate home."""
    deploys(project, DEPLOY)
    tools = tmp_path / "tools"
    tools.mkdir()
    # Without the project's own environment, which would take time.
    uv = f'shift 3; exec {tool("uv")} run --quiet --no-project {COMMAND} "$@"'
    (tools / "uv").write_text(f"#!/bin/sh\n{uv}\n")
    (tools / "uv").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir(mode=0o700)
    return project


def bash(script: str, stdin: str = "") -> str:
    done = subprocess.run(
        ["bash", "-euc", script],
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.usefixtures("shop")
def test_the_secret_can_be_typed(names: list[str], client: Orbctl) -> None:
    typed = "it's $correct-horse \\n"
    assert traces(bash(SHELL[0], f"{typed}\n")) == []
    assert read(client, names[0]) == typed


@pytest.mark.usefixtures("shop")
def test_the_secret_can_come_from_pass(names: list[str], client: Orbctl) -> None:
    if not shutil.which("pass"):
        pytest.skip("pass is not installed")
    key = "%no-protection\nKey-Type: eddsa\nKey-Curve: ed25519\nName-Real: shop\n"
    key += "Subkey-Type: ecdh\nSubkey-Curve: cv25519\n%commit\n"
    try:
        bash("gpg --batch --quiet --gen-key /dev/stdin", key)
        bash("pass init shop && pass insert -e app/token", f"{ONE_LINE}\n")
        assert traces(bash(SHELL[1])) == []
    finally:
        bash("gpgconf --kill all")
    assert read(client, names[0]) == ONE_LINE


def test_the_secret_can_come_from_sops(shop: Project, names: list[str], client: Orbctl) -> None:
    if not (shutil.which("sops") and shutil.which("age-keygen")):
        pytest.skip("sops and age are not installed")
    folder = Path.home() / ".config" / "sops" / "age"
    folder.mkdir(parents=True)
    bash(f"age-keygen -o {folder}/keys.txt")
    encrypt = f'sops encrypt --age "$(age-keygen -y {folder}/keys.txt)" --in-place secrets.env'
    Path("secrets.env").write_text(f"APP_TOKEN={ONE_LINE}\n")
    bash(encrypt)
    assert traces(Path("secrets.env").read_text()) == []
    assert traces(bash(SHELL[2])) == []
    assert read(client, names[0]) == ONE_LINE


def test_the_secret_can_come_from_a_file(shop: Project, names: list[str], client: Orbctl) -> None:
    Path(".env").write_text(f"APP_TOKEN='{ONE_LINE}'\n")
    assert traces(bash(SHELL[4])) == []
    assert read(client, names[0]) == ONE_LINE
    git(shop.path, "init", "-q")
    assert git(shop.path, "status", "--porcelain", "--", ".env") == ""


def test_the_github_workflow_passes_the_secret() -> None:
    (step,) = yaml.safe_load(re.sub(r"{% (end)?raw %}", "", YAML))
    assert step["env"] == {"APP_TOKEN": "${{ secrets.APP_TOKEN }}"}
