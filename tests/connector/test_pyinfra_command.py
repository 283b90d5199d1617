"""The `pyinfra` command as users type it, with machines and without."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pyinfra.api.arguments import all_argument_meta

from pyinfra_orbstack.orbctl import Orbctl

from ..conftest import Machines
from .conftest import PYINFRA, Run

pytestmark = pytest.mark.smoke

TRANSPORTS = ("session", "spawn")

DEPLOY = r"""
from io import StringIO
from pyinfra import host
from pyinfra.facts.server import Hostname
from pyinfra.operations import files, server

assert host.get_fact(Hostname) == host.data.vm_name
assert "orbstack_running" in host.groups
files.directory(name="folder", path="/opt/smoke", user="root", mode="755", _sudo=True)
put = files.put(
    name="put", src=StringIO("it's\n"), dest="/opt/smoke/put", mode="600", _sudo=True
)
files.template(name="template", src="greeting.j2", dest="greeting", who=host.data.who)
files.line(name="line", path="/opt/smoke/lines", line="more", _sudo=True)
server.user(name="user", user="carol", home="/home/carol", ensure_home=True, _sudo=True)
server.shell(
    name="shell",
    commands=["test -f put && echo \"$A\" $LOGNAME | tr a-z A-Z >/tmp/marker"],
    _env={"A": "b  c"},
    _chdir="/opt/smoke",
    _sudo=True,
    _if=put.did_change,
)
files.get(name="get", src="/opt/smoke/put", dest="fetched", _sudo=True)
"""


def test_local_works_where_the_package_is_installed(pyinfra: Run) -> None:
    """pyinfra 3.2 loads every plugin while its own modules are partly imported."""
    done = pyinfra("@local", "exec", "--", "true")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


API = """
from pyinfra.api import Config, Inventory, State
from pyinfra.api.connect import connect_all
from pyinfra_orbstack import process

state = State(Inventory((["@local"], {})), Config())
connect_all(state)
process.run(["true"])
(host,) = state.inventory
print(sum(host.run_shell_command("exit 3")[0] for _ in range(200)))
"""


def test_simulator_is_installed_and_works(simulated: bool, client: Orbctl) -> None:
    if not simulated:
        pytest.skip("OrbStack is used here, and the simulator needs Linux")
    program = Path(sys.executable).with_name("orbctl-simulator")
    told = subprocess.run([program, "doctor"], capture_output=True, text=True)
    assert (told.returncode, told.stderr) == (0, "")
    assert "ok      machines: created and removed one\n" in told.stdout


OWN_TEST = """
def test_a_machine(orbstack_machines):
    with orbstack_machines() as machine:
        assert machine.run("echo it works").stdout == "it works\\n"
"""


def test_plugin_works_in_a_separate_project(client: Orbctl, tmp_path: Path) -> None:
    (tmp_path / "test_own.py").write_text(OWN_TEST)
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "test_own.py"]
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_failure_of_local_is_reported_in_an_api_program() -> None:
    """There, gevent has patched nothing, and pyinfra before 3.8 would use another Popen."""
    done = subprocess.run([sys.executable, "-c", API], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("verbosity", [[], ["-vvv"]])
def test_exec(pyinfra: Run, pair: tuple[str, str], transport: str, verbosity: list[str]) -> None:
    done = pyinfra(
        *verbosity,
        f"@orbstack/{pair[0]}",
        "exec",
        "--",
        "hostname; echo wörld >&2",
        PYINFRA_ORBSTACK_TRANSPORT=transport,
    )
    assert done.returncode == 0, done.stderr
    assert f"[@orbstack/{pair[0]}] {pair[0]}" in done.stderr
    assert "wörld" in done.stderr
    assert (">>> " in done.stderr) == bool(verbosity)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_exec_fails_with_its_command(pyinfra: Run, pair: tuple[str, str]) -> None:
    done = pyinfra(f"@orbstack/{pair[0]}", "exec", "--", "exit 3")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_many_names_at_once(pyinfra: Run, pair: tuple[str, str]) -> None:
    """A pattern includes stopped machines, and starts them; the bare name does not."""
    common = pair[0].rpartition("-")[0]
    bare = pyinfra("@orbstack", "--limit", f"@orbstack/{common}*", "exec", "--", "hostname")
    assert bare.returncode == 0, bare.stderr
    # Names are padded to the longest.
    assert f"[@orbstack/{pair[0]}] {pair[0]}" in " ".join(bare.stderr.split())
    assert f"@orbstack/{pair[1]}]" not in bare.stderr


def test_fact(pyinfra: Run, pair: tuple[str, str]) -> None:
    done = pyinfra(f"@orbstack/{pair[0]}", "fact", "server.Hostname")
    assert done.returncode == 0, done.stderr
    assert pair[0] in done.stderr + done.stdout


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_second_deploy_changes_nothing(
    pyinfra: Run, machines: Machines, tmp_path: Path, transport: str
) -> None:
    name = machines.create()
    data = {"who": "it's $HOME", "orbstack_transport": transport}
    (tmp_path / "inventory.py").write_text(f"web = [('@orbstack/{name}', {data})]\n")
    (tmp_path / "greeting.j2").write_text("hello {{ who }}\n")
    (tmp_path / "deploy.py").write_text(DEPLOY)
    first = pyinfra("inventory.py", "deploy.py")
    assert first.returncode == 0, first.stderr
    assert (tmp_path / "fetched").read_text() == "it's\n"
    second = pyinfra("inventory.py", "deploy.py")
    assert second.returncode == 0, second.stderr
    assert "] Success" not in second.stderr
    done = pyinfra(f"@orbstack/{name}", "exec", "--", "cat greeting /tmp/marker; ls -A /tmp")
    assert "hello it's $HOME" in done.stderr
    assert "B  C ROOT" in done.stderr
    assert "pyinfra-" not in done.stderr.replace(name, "")


TRANSFERS = """
from io import StringIO
from pyinfra.operations import files

with_su = {"_su_user": "root", "_su_password": "Sesam-1"}
for name, options in {"plain": {}, "sudo": {"_sudo": True}, "su": with_su}.items():
    files.put(name=f"put {name}", src=StringIO("x" * 10_000), dest=f"/tmp/a {name}", **options)
    files.get(name=f"get {name}", src=f"/tmp/a {name}", dest=name, force=True, **options)
"""


@pytest.mark.skipif("_su_password" not in all_argument_meta, reason="pyinfra before 3.7")
def test_a_transfer_is_shown_as_one_line(
    pair: tuple[str, str], client: Orbctl, pyinfra: Run, tmp_path: Path
) -> None:
    text = "rm -f /tmp/a*; echo root:Sesam-1 | chpasswd"
    client.call("run", "-m", pair[0], "-u", "root", "sh", "-c", text)
    (tmp_path / "deploy.py").write_text(TRANSFERS)
    done = pyinfra("-vv", f"@orbstack/{pair[0]}", "deploy.py")
    assert done.returncode == 0, done.stderr
    for name in ("plain", "sudo", "su"):
        assert (tmp_path / name).read_text() == "x" * 10_000
        for verb in ("upload", "download"):
            assert f"[@orbstack/{pair[0]}] >>> {verb} /tmp/a {name}\n" in done.stderr
    assert "su root" in done.stderr
    assert "iflag=fullblock" not in done.stderr
    assert "Sesam" not in done.stderr


UPLOAD = """
import io
from pyinfra import host
from pyinfra.operations import files, server
files.put(name="put", src=io.BytesIO(b"x" * 100_000), dest=f"/tmp/{host.name[-9:]}", force=True)
server.shell(name="limits", commands="ulimit -Sn")
"""


@pytest.mark.parametrize("limit", ["ulimit -S -n 64", "ulimit -n 64"], ids=["soft", "hard"])
def test_a_low_limit_of_open_files(
    pair: tuple[str, str], machines: Machines, client: Orbctl, tmp_path: Path, limit: str
) -> None:
    """All hosts fit, or each one that does not fails with one line and the others work."""
    names = [pair[0], machines.create(), machines.create()]
    hosts = [*(f"@orbstack/plain/{name}" for name in names), *(f"@orbstack/{x}" for x in names)]
    (tmp_path / "inventory.py").write_text(f"web = {hosts!r}\n")
    (tmp_path / "deploy.py").write_text(UPLOAD)
    pyinfra = [PYINFRA, "-y", "inventory.py", "deploy.py"]
    done = subprocess.run(
        ["sh", "-c", f'{limit}; exec "$@"', "sh", *pyinfra],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    lines = [line.split() for line in done.stderr.splitlines()]
    fitted = [words[0] for words in lines if words[1:] == ["Connected"]]
    refused = [words[0] for words in lines if words[1:4] == ["too", "many", "open"]]
    worked = [words[0] for words in lines if words[1:] == ["Success"]]
    assert len({*fitted, *refused}) == len(fitted) + len(refused) == 6, done.stderr
    assert bool(refused) == (limit == "ulimit -n 64")
    assert len(fitted) > 2
    assert sorted(worked) == sorted(2 * fitted), done.stderr
    assert "Traceback" not in done.stderr
