"""Machines are created, started, copied, stopped and deleted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.contract.conftest import IMAGE, Made
from tests.contract.program import Program


def state(orb: Program, name: str) -> str:
    return str(orb("info", name, "-f", "json").json["record"]["state"])


@pytest.mark.fact("conflict")
def test_create_is_synchronous(orb: Program, made: Made) -> None:
    """The machine runs, and accepts commands, when `create` returns."""
    name = made.create()
    assert state(orb, name) == "running"
    assert orb("run", "-m", name, "hostname").text.strip() == name


@pytest.mark.parametrize("alias", ["add", "new"])
@pytest.mark.fact("documented")
def test_aliases_of_create(orb: Program, made: Made, alias: str) -> None:
    """`add` and `new` are `create`; flags may follow the words."""
    name = made.name()
    assert orb(alias, IMAGE, name, "--user", "someone").code == 0
    made.own(name)
    record = orb("info", name, "-f", "json").json["record"]
    assert record["config"]["default_username"] == "someone"
    assert orb("run", "-m", name, "id", "-un").text == "someone\n"


@pytest.mark.fact("recorded")
def test_name_that_exists(orb: Program, machine: str) -> None:
    """Errors: the name is taken."""
    answer = orb("create", IMAGE, machine)
    assert (answer.code, answer.out) == (1, b"")
    expected = f"[-32098] create '{machine}': machine already exists: '{machine}'"
    assert expected.encode() in answer.err


@pytest.mark.parametrize("image", ["nosuchdistro", "debian:nosuchversion"])
@pytest.mark.fact("inferred")
def test_unknown_image(orb: Program, made: Made, image: str) -> None:
    """An error; a `create` that fails leaves no machine."""
    name = made.name()
    answer = orb("create", image, name)
    assert answer.code != 0
    assert name.encode() in answer.err
    assert name not in orb("list", "-q").lines


@pytest.mark.parametrize("name", ["", "a b", "a/b", "-a", "docker", "k8s", "x" * 300])
@pytest.mark.fact("inferred")
def test_invalid_names(orb: Program, name: str) -> None:
    """Names of the builtin machines, and names that cannot be hostnames, are rejected."""
    before = orb("list", "-q").text
    assert orb("create", IMAGE, name).code != 0
    assert orb("list", "-q").text == before


@pytest.mark.fact("documented")
def test_limits(orb: Program, made: Made) -> None:
    """Flags: `config get` reads limits back; they show in the machine."""
    if orb("version").text < "Version: 2.2":
        pytest.skip("limits came with OrbStack 2.2")
    name = made.create("--cpus", "1", "--memory", "512M", "--disk", "8G")
    assert orb("config", "get", f"machine.{name}.cpu").text.strip() == "1"
    assert orb("config", "get", f"machine.{name}.memory_mib").text.strip() == "512"
    assert orb("config", "get", f"machine.{name}.disk_bytes").text.strip() == str(8 << 30)
    shown = orb("run", "-m", name, "cat", "/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/memory.max")
    assert shown.text.split() == ["100000", "100000", str(512 << 20)]


@pytest.mark.fact("documented")
def test_mounts(orb: Program, made: Made, isolated: str, tmp_path: Path) -> None:
    """Flags: ``--mount SRC:DEST`` shares one directory with an isolated machine."""
    (tmp_path / "file").write_text("shared")
    (tmp_path / "file").chmod(0o644)
    tmp_path.chmod(0o755)
    name = made.create("--isolated", "--mount", f"{tmp_path}:/work/here")
    assert orb("run", "-m", name, "cat", "/work/here/file").text == "shared"
    assert f"{tmp_path}:/work/here" in orb("config", "get", f"machine.{name}.mounts").text


@pytest.mark.fact("inferred")
def test_start_and_stop_twice(orb: Program, stopped: str) -> None:
    """`start` of a running machine does nothing; neither does `stop` of a stopped one."""
    assert orb("stop", stopped).code == 0
    for _ in range(2):
        assert orb("start", stopped).code == 0
        assert state(orb, stopped) == "running"
    for _ in range(2):
        assert orb("stop", stopped).code == 0
        assert state(orb, stopped) == "stopped"


@pytest.mark.fact("inferred")
def test_stop_ends_processes(orb: Program, stopped: str) -> None:
    """`stop` returns when it is done; the machine's processes have ended."""
    orb("start", stopped)
    call = orb.started("run", "-m", stopped, "sleep", "60")
    while orb("run", "-m", stopped, "pgrep", "-x", "sleep").code:
        pass
    assert orb("stop", "--force", stopped).code == 0
    call.communicate(timeout=10)
    assert call.returncode != 0


@pytest.mark.fact("inferred")
def test_restart(orb: Program, stopped: str) -> None:
    """`restart` boots the same machine again."""
    script = "cut -d' ' -f22 /proc/1/stat; touch ~/kept /tmp/lost"
    before = orb("run", "-m", stopped, "sh", "-c", script).text
    assert orb("restart", stopped).code == 0
    assert state(orb, stopped) == "running"
    script = "cut -d' ' -f22 /proc/1/stat; test -e ~/kept"
    assert orb("run", "-m", stopped, "sh", "-c", script).text != before


@pytest.mark.fact("recorded")
def test_clone(orb: Program, made: Made) -> None:
    """`clone`: stopped, with the files but without ``/tmp``; its hostname is the new name."""
    source = made.create()
    script = "echo data >~/data; echo lost >/tmp/lost; hostname"
    assert orb("run", "-m", source, "sh", "-c", script).text.strip() == source
    name = made.clone(source)
    assert state(orb, name) == "stopped"
    assert state(orb, source) == "running"
    assert orb("run", "-m", name, "sh", "-c", "hostname; cat ~/data; ls /tmp").lines == [
        name,
        "data",
    ]
    orb("run", "-m", name, "sh", "-c", "echo other >~/data")
    assert orb("run", "-m", source, "sh", "-c", "cat ~/data").text == "data\n"


@pytest.mark.fact("recorded")
def test_clone_inherits(orb: Program, made: Made, isolated: str) -> None:
    """`clone`: the configuration, isolation included, is inherited; the id is not."""
    name = made.clone(isolated)
    record, source = (orb("info", which, "-f", "json").json["record"] for which in (name, isolated))
    assert record["config"] == source["config"]
    assert record["image"] == source["image"]
    assert record["id"] != source["id"]


@pytest.mark.fact("inferred")
def test_clone_over_another(orb: Program, machine: str, stopped: str) -> None:
    """`clone`: never replaces an existing machine."""
    answer = orb("clone", machine, stopped)
    assert answer.code != 0
    assert b"machine already exists" in answer.err


@pytest.mark.fact("documented")
def test_export_and_import(orb: Program, made: Made, stopped: str, tmp_path: Path) -> None:
    """`export` to a ``.tar.zst``, `import` under another name."""
    script = "echo data >~/data; ln ~/data ~/hard; ln -s data ~/soft; chmod 640 ~/data"
    assert orb("run", "-m", stopped, "sh", "-c", script).code == 0
    file = tmp_path / "machine.tar.zst"
    assert orb("export", stopped, str(file)).code == 0
    assert file.read_bytes()[:4] == b"\x28\xb5\x2f\xfd"
    name = made.name()
    assert orb("import", "--name", name, str(file)).code == 0
    made.own(name)
    script = "cat ~/soft; stat -c '%a %h %U' ~/data; hostname"
    user = orb("run", "-m", stopped, "id", "-un").text.strip()
    assert orb("run", "-m", name, "sh", "-c", script).lines == ["data", f"640 2 {user}", name]


@pytest.mark.fact("recorded")
def test_delete(orb: Program, stopped: str) -> None:
    """`delete`: ``-f`` does not prompt, and the machine is gone."""
    orb("start", stopped)
    assert orb("delete", "-f", stopped).code == 0
    assert stopped not in orb("list", "-q").lines
    assert b"machine not found" in orb("info", stopped).err


@pytest.mark.fact("recorded")
def test_delete_by_id(orb: Program, stopped: str) -> None:
    """`delete`: by id it crashes, and the machine is left intact."""
    record = orb("info", stopped, "-f", "json").json["record"]
    assert orb("delete", "--force", record["id"]).code != 0
    assert orb("info", stopped, "-f", "json").json["record"] == record


@pytest.mark.parametrize(
    "words",
    [["info"], ["start"], ["stop"], ["restart"], ["delete", "-f"], ["logs"], ["info", "-fjson"]],
)
@pytest.mark.fact("recorded")
def test_not_found(orb: Program, words: list[str]) -> None:
    """Not found: one text, on stderr, with exit code 1 and an empty stdout."""
    answer = orb(*words, "no-such-machine")
    assert (answer.code, answer.out) == (1, b"")
    assert answer.err == b"[-32098] machine not found: 'no-such-machine'\n"


@pytest.mark.fact("documented")
def test_json_of_two_calls_agrees(orb: Program, machine: str) -> None:
    """`list` and `info` report the same, whatever the layout."""
    shown = orb("list", "-f", "json").out
    assert json.loads(shown) == orb("list", "--format=json").json
