"""docs/secrets.md of a rendered project: what it tells is so."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest

from pyinfra_orbstack.orbctl import Orbctl
from tests.conftest import Machines
from tests.template.conftest import ROOT, Render

PAGE = (ROOT / "template" / "docs" / "secrets.md").read_text(encoding="utf-8")
HELPER, CALL, PROMPTS, OPERATIONS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
IMPORTS = "from io import StringIO\nfrom pyinfra.operations import files, server\n"
SECRET = "correct-horse"
COMMAND = [str(Path(sys.executable).with_name("pyinfra-orbstack"))]


pytestmark = pytest.mark.template


@pytest.fixture(scope="module")
def names(machines: Machines) -> list[str]:
    return [machines.create(), machines.create()]


@pytest.fixture
def folder(tmp_path: Path, names: list[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "inventories").mkdir()
    hosts = [(f"@orbstack/{name}", {"port": 8080}) for name in names]
    for inventory in ("local", "production"):
        (tmp_path / "inventories" / f"{inventory}.py").write_text(f"web = {hosts!r}\n")
    (tmp_path / "secret.py").write_text(HELPER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("APP_TOKEN", raising=False)
    return tmp_path


def put(path: str) -> str:
    """What the page tells to do, below a home."""
    return OPERATIONS.replace("/etc/app", path)


def project(
    verb: str, inventory: str = "local", **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, verb, inventory],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def test_a_secret_of_the_environment(folder: Path, names: list[str], client: Orbctl) -> None:
    first = "server.shell(name='First', commands='touch first')\n"
    deploy = f"from secret import secret\n{CALL}{IMPORTS}{first}"
    (folder / "deploy.py").write_text(deploy + put("app"))
    for verb, given in (("plan", {}), ("deploy", {}), ("deploy", {"APP_TOKEN": ""})):
        missing = project(verb, "production", **given)
        assert missing.returncode != 0
        *_, last = missing.stdout.splitlines()
        assert re.search(r"@orbstack/\S+ needs a secret: set APP_TOKEN in the environment$", last)
        assert "Traceback" not in missing.stdout
    for name in names:
        assert client.call("run", "-m", name, "sh", "-c", "cd; ls").stdout == b""

    for verb, secret in (
        ("plan", SECRET),
        ("deploy", SECRET),
        ("plan", "another"),
        ("deploy", "x"),
    ):
        done = project(verb, "production", APP_TOKEN=f"{secret}\n")
        assert done.returncode == 0, done.stdout
        assert "Token" in done.stdout
        assert SECRET not in done.stdout
        assert "another" not in done.stdout
    listed = client.call(
        "run", "-m", names[0], "sh", "-c", "cd; stat -c %a app app/token; cat app/*"
    )
    assert listed.stdout == b"700\n600\nx\n"
    # Here the secret is neither needed nor used.
    for given in ({}, {"APP_TOKEN": SECRET}):
        done = project("deploy", **given)
        assert done.returncode == 0, done.stdout
        said = client.call("run", "-m", names[0], "sh", "-c", "cd; cat app/token").stdout
        assert said == b"no-secret-APP_TOKEN"


def test_a_prompt_appears_once_for_all_hosts(
    folder: Path, names: list[str], client: Orbctl
) -> None:
    (folder / "prompts.py").write_text(PROMPTS)
    asked = "import prompts\ntoken = prompts.app_token()\n"
    (folder / "deploy.py").write_text(IMPORTS + asked + put("prompted"))
    for verb in ("plan", "deploy"):
        said = typed(f"{SECRET}\n", verb)
        assert said.count("App token: ") == 1
        assert SECRET not in said
    for name in names:
        token = client.call("run", "-m", name, "sh", "-c", "cd; cat prompted/token").stdout
        assert token.decode() == SECRET


def typed(answer: str, verb: str) -> str:
    """What a verb prints on a terminal on which every prompt is answered."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(COMMAND[0], [*COMMAND, verb, "local"])
    said, answered = "", 0
    while select.select([terminal], [], [], 100)[0]:
        try:
            piece = os.read(terminal, 4096).decode(errors="replace")
        except OSError:  # its other end is closed
            break
        said += piece
        while answered < said.count("App token: "):
            os.write(terminal, answer.encode())
            answered += 1
    os.close(terminal)
    assert os.waitpid(pid, 0)[1] == 0, said
    return said


def test_what_is_shown(folder: Path, names: list[str]) -> None:
    host = f"@orbstack/{names[0]}"

    def pyinfra(*words: str) -> str:
        done = subprocess.run(["pyinfra", *words], capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    assert '"port": 8080' in pyinfra("inventories/local.py", "debug-inventory")
    (folder / "deploy.py").write_text(
        f"{IMPORTS}server.shell(name='Say', commands='echo {SECRET}')\n"
    )
    assert SECRET not in pyinfra("-y", host, "deploy.py")
    assert f"echo {SECRET}" in pyinfra("-y", "-vv", host, "deploy.py")
    (folder / "deploy.py").write_text(f"{IMPORTS}server.shell(commands='echo {SECRET}')\n")
    assert f"echo {SECRET}" in pyinfra("-y", host, "deploy.py")
    put = f"files.put(name='Put', src=StringIO('{SECRET}\\n'), dest='shown')\n"
    (folder / "deploy.py").write_text(IMPORTS + put)
    assert SECRET not in pyinfra("--dry", host, "deploy.py")
    assert SECRET in pyinfra("--dry", "--diff", host, "deploy.py")


@pytest.mark.usefixtures("prepared")
def test_its_own_tests_need_no_secret(render: Render, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the page tells, done in a project, leaves `make test` and CI green."""
    monkeypatch.delenv("APP_TOKEN", raising=False)
    project = render()
    (project.path / "src" / project.package / "secret.py").write_text(HELPER)
    deploy = f"from {project.package}.secret import secret\n{CALL}{IMPORTS}{OPERATIONS}"
    with (project.path / "deploy.py").open("a") as file:
        file.write(deploy)
    project.check_tests("tests/test_deploy.py")
