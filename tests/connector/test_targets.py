"""Which target a host is: only its name decides, not its data."""

from __future__ import annotations

import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyinfra.api import Config, Inventory, State
from pyinfra.api.exceptions import ConnectError

from pyinfra_orbstack import docker, inventory
from pyinfra_orbstack.connector import OrbStackConnector
from pyinfra_orbstack.orbctl import Orbctl
from pyinfra_orbstack.targets import CONTAINERS, MACHINES, HostName, parse

from .conftest import Run

#: Data that the connector sets, under names that a project may also use.
OUTPUT = ("container_name", "container_id", "vm_name", "vm_id", "orbstack_vm")


def told(stderr: str) -> list[str]:
    """The output of commands, by host."""
    return [
        line.strip() for line in stderr.splitlines() if "] " in line and "Connected" not in line
    ]


@pytest.mark.parametrize(
    ("host", "is_what"),
    [
        ("@orbstack/web", HostName(False, "web")),
        ("@orbstack/docker", HostName(True, "")),
        ("@orbstack/docker/", HostName(True, "")),
        ("@orbstack/docker/web", HostName(True, "web")),
        ("@orbstack/docker/a/b", HostName(True, "a/b")),
        ("@orbstack/dockerish", HostName(False, "dockerish")),
        ("@orbstack/docker-*", HostName(False, "docker-*")),
        ("@orbstack/a/docker/b", HostName(False, "a/docker/b")),
        ("@orbstack", HostName(False, "")),
        ("@orbstack/", HostName(False, "")),
        ("@orbstacks/web", None),
        ("@docker/web", None),
        ("@local", None),
        ("web", None),
        ("orbstack/web", None),
    ],
)
def test_a_name_selects_one_kind_of_host(host: str, is_what: HostName | None) -> None:
    assert parse(host) == is_what


@given(st.text(max_size=20))
def test_any_name_is_taken_literally(name: str) -> None:
    parsed = parse(f"@orbstack/{name}")
    assert parsed is not None
    place = CONTAINERS if parsed.container else MACHINES
    assert f"{place}{parsed.name}".rstrip("/") == f"@orbstack/{name}".rstrip("/")


@pytest.mark.parametrize("key", OUTPUT)
def test_a_hosts_data_never_redirects_it(
    pair: tuple[str, str], pyinfra: Run, tmp_path: Path, client: Orbctl, key: str
) -> None:
    """In group data, on the command line and in the inventory; also if it names a machine."""
    name, other = pair
    inventory_file = tmp_path / "inventory.py"
    group_data = tmp_path / "group_data"
    inventory_file.write_text(f"web = ['@orbstack/{name}']\n")
    group_data.mkdir()
    (group_data / "all.py").write_text(f"{key} = {other!r}\n")
    for words in (["inventory.py"], [f"@orbstack/{name}", "--data", f"{key}={other}"]):
        done = pyinfra(*words, "exec", "--", "hostname")
        assert f"[@orbstack/{name}] {name}" in told(done.stderr), done.stderr
    (group_data / "all.py").unlink()
    inventory_file.write_text(f"web = [('@orbstack/{name}', {{{key!r}: {other!r}}})]\n")
    done = pyinfra("inventory.py", "exec", "--", "hostname")
    assert f"[@orbstack/{name}] {name}" in told(done.stderr), done.stderr
    assert not client.info(other).running


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A docker command with two containers, which logs its calls."""
    records = [
        {"Id": digit * 64, "Name": f"/{name}", "State": {"Status": "running"}, "Config": {}}
        for digit, name in (("a", "web"), ("b", "other"))
    ]
    calls = tmp_path / "calls"
    for record in records:
        (tmp_path / record["Name"][1:]).write_text(json.dumps([record]))  # type: ignore[index]
    both = json.dumps(records)
    path = tmp_path / "docker"
    path.write_text(
        f'#!/bin/sh\necho "$@" >>{calls}\n'
        f"case \"$*\" in ps*) printf '%s\\n' {'a' * 64} {'b' * 64};;\n"
        f"*inspect*a*b*) cat <<'E'\n{both}\nE\n;;\n"
        f"*inspect*other) cat {tmp_path}/other;; *inspect*) cat {tmp_path}/web;;\n"
        "*) echo 'no shell today' >&2; exit 1;; esac\n"
    )
    path.chmod(0o755)
    monkeypatch.setenv(docker.COMMAND_VARIABLE, str(path))
    inventory.list_containers.cache.clear()
    return calls


@pytest.mark.parametrize("key", OUTPUT)
def test_a_container_is_never_redirected(engine: Path, key: str) -> None:
    hosts = Inventory(([("@orbstack/docker/web", {key: "other"})], {}))
    State(hosts, Config())
    with pytest.raises(ConnectError, match=r"'web' does not answer: .*no shell today"):
        hosts.get_host("@orbstack/docker/web").connect(show_errors=False, raise_exceptions=True)
    called = engine.read_text().splitlines()
    assert "container inspect web" in called
    assert f"exec --interactive {'a' * 64} sh" in called
    assert not any("other" in line or f"exec --interactive {'b' * 64}" in line for line in called)


def test_a_container_found_by_id_prefix_has_its_name(engine: Path) -> None:
    assert [host for host, _, _ in OrbStackConnector.make_names_data("docker/aaaa")] == [
        "@orbstack/docker/web"
    ]


def connect(host: str, **data: Any) -> None:
    hosts = Inventory(([(host, data)], {}))
    State(hosts, Config())
    hosts.get_host(host).connect(show_errors=False, raise_exceptions=True)


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("@orbstack/a/b", "machine name 'a/b' must not contain a space or a slash"),
        ("@orbstack/docker/a/b", "'a/b' is not a valid name or id of a container"),
        ("@orbstack/docker/-v", "'-v' is not a valid name or id of a container"),
        ("@orbstack/\ud800", r"machine name '\\ud800' must not contain a lone surrogate"),
    ],
)
@pytest.mark.usefixtures("client", "engine")
def test_invalid_names(host: str, reason: str) -> None:
    with pytest.raises(ConnectError, match=reason):
        connect(host)


def test_a_host_of_two_patterns_is_one_host(pair: tuple[str, str], pyinfra: Run) -> None:
    name = pair[0]
    done = pyinfra(f"@orbstack/?{name[1:]},@orbstack/*{name[3:]}", "exec", "--", "hostname")
    lines = [line for line in told(done.stderr) if line.startswith(f"[@orbstack/{name}]")]
    assert lines.count(f"[@orbstack/{name}] {name}") == 1, done.stderr


# Groups


@pytest.mark.parametrize("word", ["../x", "a b", "a\nb", "*", "", "-x", "größe", "a/b"])
def test_only_words_name_groups(word: str) -> None:
    labels = {"com.docker.compose.project": word}
    container = docker.Container("1" * 64, "web", "sha256:" + "0" * 64, "running", labels)
    data, groups = inventory.container_host(HostName(True, "web"), container, named=True)
    assert data.meaning.called == "@orbstack/docker/web"
    assert groups == ["@orbstack", "orbstack_containers"]
    assert data["container_project"] == word


@pytest.mark.parametrize("word", ["running", "stopped", "containers", "vm"])
def test_no_distro_group_collides_with_a_state_group(word: str) -> None:
    from pyinfra_orbstack.orbctl import Machine

    machine = Machine("ID", "web", "creating", distro=word, arch=word)
    groups = inventory.machine_host(HostName(False, "web"), machine)[1]
    assert groups == ["@orbstack", "orbstack", "orbstack_stopped"]


# Failures of one host


@pytest.mark.parametrize("trouble", ["no match", "fails", "nonsense", "denied", "homeless"])
def test_a_failing_pattern_fails_only_its_host(
    pyinfra: Run, tmp_path: Path, client: Orbctl, trouble: str
) -> None:
    """If ``--limit`` excludes it, it is not mentioned."""
    program = tmp_path / "orbctl"
    scripts = {"fails": "echo 'not today' >&2; exit 1", "nonsense": "echo '<html>'"}
    program.write_text(f"#!/bin/sh\n{scripts.get(trouble, 'echo []')}\n")
    program.chmod(0o755)
    env = {"PYINFRA_ORBSTACK_ORBCTL": str(program)}
    reason = {
        "no match": "no OrbStack machine matches 'zz-*'",
        "fails": "cannot list OrbStack's machines: not today",
        "nonsense": "cannot list OrbStack's machines: orbctl did not print JSON",
        "denied": "cannot list OrbStack's machines: cannot run",
        "homeless": "cannot list OrbStack's machines: HOME is not set, and user",
    }[trouble]
    if trouble == "denied":
        program.write_text("#!/no/such/interpreter\n")
    if trouble == "homeless":
        env["PYINFRA_TEST_HOMELESS"] = "1"
        (tmp_path / "sitecustomize.py").write_text(
            "import os, pwd\nos.environ.pop('HOME', None)\n"
            "def nobody(uid): raise KeyError(uid)\npwd.getpwuid = nobody\n"
        )
        env["PYTHONPATH"] = str(tmp_path)
    (tmp_path / "inventory.py").write_text("both = ['@orbstack/zz-*', '@local']\n")
    done = pyinfra("inventory.py", "--limit", "@local", "exec", "--", "echo on", **env)
    assert done.returncode == 0, done.stderr
    assert "zz" not in done.stderr
    done = pyinfra("inventory.py", "exec", "--", "echo on", **env)
    assert re.search(r"\[@local\] +on$", done.stderr, re.MULTILINE), done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "zz-*]" in line]
    assert reason in line
    assert "Traceback" not in done.stderr


def test_a_failed_listing_is_not_repeated_for_each_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, calls = tmp_path / "orbctl", tmp_path / "calls"
    program.write_text(f"#!/bin/sh\necho $1 >>{calls}\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PYINFRA_ORBSTACK_ORBCTL", str(program))
    Inventory(([f"@orbstack/web-{number}" for number in range(5)], {}))
    # It is called twice, because the failure may be temporary.
    assert calls.read_text().split() == ["list", "list"]


def test_a_read_only_call_is_retried_once(
    pair: tuple[str, str], client: Orbctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, calls = tmp_path / "orbctl", tmp_path / "calls"
    for how in ("echo not today >&2; exit 1", "echo '[{'", "echo '{'"):
        calls.write_text("")
        program.write_text(
            f"#!/bin/sh\necho $1 >>{calls}\n"
            f"[ $(grep -c $1 {calls}) -gt 1 ] || {{ {how}; exit; }}\n"
            f'exec {client.command} "$@"\n'
        )
        program.chmod(0o755)
        asked = Orbctl(str(program))
        assert pair[0] in [machine.name for machine in asked.machines()]
        assert asked.info(pair[0]).name == pair[0]
        assert calls.read_text().split() == ["list", "list", "info", "info"]
    calls.write_text("")
    from pyinfra_orbstack.orbctl import MachineNotFound, OrbctlError

    program.write_text(
        f"#!/bin/sh\necho $1 >>{calls}\necho \"[-32098] machine not found: 'x'\" >&2\nexit 1\n"
    )
    with pytest.raises(MachineNotFound):
        asked.info("x")
    assert calls.read_text().split() == ["info"], "an answer is no failure"
    program.write_text(f"#!/bin/sh\necho $1 >>{calls}\necho boom >&2\nexit 1\n")
    for change in (asked.start, asked.stop, asked.restart):
        calls.write_text("")
        with pytest.raises(OrbctlError, match="boom"):
            change("x")
        assert len(calls.read_text().split()) == 1, "nothing is changed twice"


# Data


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (
            {"orbstack_imag": "ubuntu"},
            "orbstack_imag is not a key of this connector; did you mean orbstack_image?",
        ),
        (
            {"orbstack_qqqqqqqqqqqq": 1},
            "orbstack_qqqqqqqqqqqq is not a key of this connector (known: orbstack_arch, ",
        ),
        ({"orbstack_cpus": "many"}, "orbstack_cpus must be a number such as 2, not 'many'"),
        ({"orbstack_cpus": float("nan")}, "orbstack_cpus must be a number such as 2, not nan"),
        ({"orbstack_cpus": []}, "orbstack_cpus must be a number such as 2, not []"),
        ({"orbstack_memory": "4 apples"}, "orbstack_memory must be a size such as"),
        ({"orbstack_memory": "9" * 400}, "orbstack_memory must be smaller"),
        ({"orbstack_disk": {}}, "orbstack_disk must be a size such as 64G, not {}"),
        ({"orbstack_arch": "x86"}, "orbstack_arch must be arm64 or amd64, not 'x86'"),
        (
            {"orbstack_image": "ubuntu; id"},
            "orbstack_image must be DISTRO or DISTRO:VERSION, not 'ubuntu; id'",
        ),
        ({"orbstack_image": 24.04}, "orbstack_image must be text, not 24.04"),
        (
            {"orbstack_create_user": "a\nb"},
            "orbstack_create_user 'a\\nb' must not contain a control character",
        ),
        ({"orbstack_user": True}, "orbstack_user must be text, not True"),
        (
            {"orbstack_user": "a\ud800"},
            "orbstack_user 'a\\ud800' must not contain a lone surrogate",
        ),
        ({"orbstack_workdir": "-P"}, "orbstack_workdir '-P' must not begin with '-'"),
        (
            {"orbstack_workdir": "~"},
            "orbstack_workdir must be an absolute path in the machine, without ~, not '~'",
        ),
        (
            {"orbstack_workdir": "/a\x85"},
            "orbstack_workdir '/a\\x85' must not contain a control character",
        ),
        (
            {"orbstack_cloud_init": "~other/x"},
            "orbstack_cloud_init '~other/x': ~ works only for your own home",
        ),
        ({"orbstack_mounts": ["/a"]}, "orbstack_mounts requires orbstack_isolated"),
        (
            {"orbstack_isolated": True, "orbstack_mounts": "/a"},
            "orbstack_mounts must be a list such as ['/a'], not text",
        ),
        (
            {"orbstack_isolated": True, "orbstack_mounts": ["/a:~/b"]},
            "orbstack_mounts must be an absolute path in the machine, without ~, not '~/b'",
        ),
        ({"orbstack_isolated": "no"}, "orbstack_isolated must be True or False, not 'no'"),
        (
            {"orbstack_boot_timeout": 0},
            "orbstack_boot_timeout must be a number of seconds above 0, not 0",
        ),
        (
            {"orbstack_boot_timeout": -1},
            "orbstack_boot_timeout must be a number of seconds above 0, not -1",
        ),
        (
            {"orbstack_boot_timeout": float("nan")},
            "orbstack_boot_timeout must be a number of seconds above 0",
        ),
        (
            {"orbstack_boot_timeout": True},
            "orbstack_boot_timeout must be a number of seconds above 0",
        ),
        ({"orbstack_transport": "telepathy"}, "unknown transport 'telepathy'"),
    ],
)
@pytest.mark.parametrize("plan", ["", "1"])
def test_a_bad_value_is_a_one_line_error_before_any_change(
    client: Orbctl,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    data: dict[str, Any],
    reason: str,
    plan: str,
) -> None:
    """Also in a plan, and for a machine that does not exist yet."""
    calls = tmp_path / "calls"
    program = tmp_path / "orbctl"
    program.write_text(f'#!/bin/sh\necho $1 >>{calls}\nexec {client.command} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PYINFRA_ORBSTACK_ORBCTL", str(program))
    monkeypatch.setenv("PYINFRA_ORBSTACK_PLAN", plan)
    with pytest.raises(ConnectError) as refused:
        connect("@orbstack/no-such", **{"orbstack_image": "ubuntu", **data})
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)
    assert set(calls.read_text().split()) == {"list"}


def test_a_bad_value_fails_only_its_host(
    pair: tuple[str, str], pyinfra: Run, tmp_path: Path
) -> None:
    (tmp_path / "inventory.py").write_text(
        f"web = ['@orbstack/{pair[0]}', ('@orbstack/zz', {{'orbstack_user': '\\ud800'}}), "
        "('@orbstack/yy', {'orbstack_cpus': []})]\n"
    )
    done = pyinfra("inventory.py", "exec", "--", "echo on")
    assert any(line.endswith("] on") or " on" in line for line in told(done.stderr))
    for name, key in (("zz", "orbstack_user"), ("yy", "orbstack_cpus")):
        (line,) = [line for line in done.stderr.splitlines() if f"/{name}]" in line]
        assert key in line
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "word",
    ["orbstack_cpus=0.5", "orbstack_boot_timeout=7.5", "orbstack_isolated=false"]
    + ["orbstack_mounts=[]", "orbstack_user=501", "orbstack_memory=512"],
)
def test_usual_spellings_are_accepted(
    pair: tuple[str, str], client: Orbctl, pyinfra: Run, word: str
) -> None:
    done = pyinfra(f"@orbstack/{pair[0]}", "--data", word, "exec", "--", "id -u")
    uid = client.call("run", "-m", pair[0], "-w", "/", "id", "-u").stdout.decode().strip()
    wanted = "501" if "user" in word else uid
    assert f"[@orbstack/{pair[0]}] {wanted}" in told(done.stderr), done.stderr


def test_tilde_is_the_users_home_on_the_mac(
    client: Orbctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "src").mkdir()
    (tmp_path / "init.yml").write_text("#cloud-config\n")
    monkeypatch.setenv("PYINFRA_ORBSTACK_PLAN", "1")
    data = {
        "orbstack_image": "ubuntu",
        "orbstack_isolated": True,
        "orbstack_mounts": ["~/src:/src"],
        "orbstack_cloud_init": "~/init.yml",
    }
    with pytest.raises(ConnectError) as planned:
        connect("@orbstack/no-such", **data)
    assert f"--user-data {tmp_path}/init.yml" in str(planned.value)
    assert f"--mount {tmp_path}/src:/src" in str(planned.value)
    for missing, reason in (
        ({"orbstack_mounts": ["~/none:/src"]}, f"mounts: there is no '{tmp_path}/none'"),
        ({"orbstack_cloud_init": "~/none"}, f"cloud_init cannot be read|not '{tmp_path}/none'"),
        ({"orbstack_image": "ubunto"}, "unknown distro; did you mean ubuntu"),
    ):
        with pytest.raises(ConnectError, match=reason):
            connect("@orbstack/no-such", **{**data, **missing})


def test_all_keys_are_described_and_checked() -> None:
    from pyinfra_orbstack import specification
    from pyinfra_orbstack.connector import ConnectorData, connector_data_meta

    assert list(connector_data_meta) == list(specification.KEYS)
    assert list(ConnectorData.__annotations__) == list(specification.KEYS)
    defaults = {key: meta.default for key, meta in connector_data_meta.items()}
    assert {key: one for key, one in defaults.items() if one is not None} == specification.DEFAULTS


def test_connecting_twice_leaves_one_session(pair: tuple[str, str]) -> None:
    hosts = Inventory(([f"@orbstack/{pair[0]}"], {}))
    State(hosts, Config())
    host = hosts.get_host(f"@orbstack/{pair[0]}")
    before = len(os.listdir("/proc/self/fd"))
    for _ in itertools.repeat(None, 3):
        host.connector.connect()
    assert host.run_shell_command("echo on")[1].stdout == "on"
    host.connector.disconnect()
    assert len(os.listdir("/proc/self/fd")) <= before + 1
