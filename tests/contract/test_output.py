"""What `list`, `info`, `version` and `config` print."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest

from tests.contract.conftest import Made
from tests.contract.program import Program


@pytest.fixture
def record(orb: Program, machine: str) -> dict[str, Any]:
    return next(entry for entry in orb("list", "-f", "json").json if entry["name"] == machine)


@pytest.mark.fact("recorded")
def test_list_is_an_array(orb: Program, record: dict[str, Any]) -> None:
    """An array of records, without the builtin machines."""
    shown = orb("list", "--format", "json").json
    assert isinstance(shown, list)
    assert not any(entry["builtin"] for entry in shown)
    assert record in shown


@pytest.mark.fact("recorded")
def test_id_is_a_ulid(record: dict[str, Any]) -> None:
    """26 characters of Crockford's base32; the first ten are the time of creation."""
    assert re.fullmatch(r"[0-7][0-9A-HJKMNP-TV-Z]{25}", record["id"])
    digits = ["0123456789ABCDEFGHJKMNPQRSTVWXYZ".index(letter) for letter in record["id"][:10]]
    seconds = sum(digit << 5 * (9 - place) for place, digit in enumerate(digits)) / 1000
    assert 0 <= time.time() - seconds < 3600


@pytest.mark.fact("recorded")
def test_image(record: dict[str, Any]) -> None:
    """`image` contains distribution, version, architecture and variant."""
    image = record["image"]
    assert image["distro"] == "debian"
    assert image["version"] == "bookworm"
    assert image["arch"] in ("arm64", "amd64")
    assert image["variant"] == "default"


@pytest.mark.fact("recorded")
def test_config(orb: Program, record: dict[str, Any]) -> None:
    """`isolated` and `default_username` in all versions, four more since 2.1."""
    config = record["config"]
    assert config["isolated"] is False
    assert isinstance(config["default_username"], str)
    if orb("version").text >= "Version: 2.1":
        assert isinstance(config["forward_ssh_agent"], bool)
        assert config["isolate_network"] is False
        assert isinstance(config["http_port"], int)
        assert isinstance(config["https_port"], int)


@pytest.mark.fact("recorded")
def test_states(orb: Program, record: dict[str, Any], stopped: str) -> None:
    """`running` and `stopped`."""
    assert record["state"] == "running"
    states = {entry["name"]: entry["state"] for entry in orb("list", "-f", "json").json}
    assert states[stopped] == "stopped"


@pytest.mark.fact("recorded")
def test_a_number_reads_back_as_a_codename(orb: Program, made: Made) -> None:
    """The version is the codename, not what was typed."""
    name = made.create(image="debian:12")
    assert orb("info", name, "-f", "json").json["record"]["image"]["version"] == "bookworm"


@pytest.mark.fact("recorded")
def test_info_wraps_the_record(orb: Program, machine: str, record: dict[str, Any]) -> None:
    """The same record, plus size and addresses."""
    shown = orb("info", machine, "-f", "json").json
    assert shown["record"] == record
    assert shown["disk_size"] is None or isinstance(shown["disk_size"], int)


@pytest.mark.fact("recorded")
def test_addresses_of_a_running_machine(orb: Program, machine: str) -> None:
    """`ip4` and `ip6` in OrbStack's ranges."""
    shown = orb("info", machine, "-f", "json").json
    assert re.fullmatch(r"(192\.168\.13[89]|198\.19\.249)\.\d+", shown["ip4"])
    assert shown["ip6"].startswith("fd07:b51a:cc66:")
    assert shown == {**orb("info", machine, "-f", "json").json, "disk_size": shown["disk_size"]}


@pytest.mark.fact("inferred")
def test_addresses_of_a_stopped_machine(orb: Program, stopped: str) -> None:
    """`ip4` and `ip6` are absent."""
    shown = orb("info", stopped, "-f", "json").json
    assert "ip4" not in shown
    assert "ip6" not in shown


@pytest.mark.fact("recorded")
def test_info_as_text(orb: Program, machine: str) -> None:
    """Lines of ``Key: value``, including an architecture and an address."""
    shown = dict(line.split(": ", 1) for line in orb("info", machine).lines if ": " in line)
    assert "Architecture" in shown
    assert shown["IPv4"].startswith("19")


@pytest.mark.fact("recorded")
def test_table_without_header(orb: Program, machine: str) -> None:
    """Seven columns, two spaces apart; no header if stdout is not a terminal."""
    lines = orb("list").lines
    assert not any(line.startswith(("NAME", "----")) for line in lines)
    row = next(line for line in lines if line.split()[0] == machine)
    columns = re.split(r"\s{2,}", row)
    assert columns[:5] == [machine, "running", "debian", "bookworm", columns[4]]
    assert re.fullmatch(r"[\d.]+ (B|KB|MB|GB)", columns[5])
    assert len(columns) == 7


@pytest.mark.fact("recorded")
def test_table_with_header(orb: Program, machine: str) -> None:
    """A header of two lines on a terminal."""
    lines = orb.on_terminal("list").out.decode().splitlines()
    heads = next(line for line in lines if line.startswith("NAME")).split()
    assert heads == ["NAME", "STATE", "DISTRO", "VERSION", "ARCH", "SIZE", "IP"]
    assert any(re.match(r"----  +-----", line) for line in lines)


@pytest.mark.fact("recorded")
def test_version(orb: Program) -> None:
    """The version with its number, then the commit."""
    first, second = orb("version").lines[:2]
    match = re.fullmatch(r"Version: (\d+)\.(\d+)\.(\d+) \((\d+)\)", first)
    assert match
    major, minor, patch, number = map(int, match.groups())
    assert number == major * 1000000 + minor * 10000 + patch * 100
    assert re.fullmatch(rf"Commit: [0-9a-f]+ \(v{major}\.{minor}\.{patch}\)", second)


@pytest.mark.fact("recorded")
def test_config_show(orb: Program, machine: str) -> None:
    """One ``key: value`` per line, with every machine's own keys."""
    shown = dict(line.split(":", 1) for line in orb("config", "show").lines)
    assert {"cpu", "memory_mib", "network.subnet4", "rosetta"} <= shown.keys()
    user = orb("info", machine, "-f", "json").json["record"]["config"]["default_username"]
    assert shown[f"machine.{machine}.username"].strip() == user


@pytest.mark.fact("recorded")
def test_config_get(orb: Program) -> None:
    """The bare value."""
    shown = dict(line.split(": ", 1) for line in orb("config", "show").lines if ": " in line)
    assert orb("config", "get", "memory_mib").text == shown["memory_mib"] + "\n"
    assert orb("config", "get", "machines.forward_ports").text.strip() in ("true", "false")


@pytest.mark.fact("inferred")
def test_config_of_a_machine(orb: Program, made: Made, stopped: str) -> None:
    """A machine's limits and mounts, since 2.1 and 2.2; 0 means no limit."""
    if orb("version").text < "Version: 2.2":
        pytest.skip("limits came with OrbStack 2.2")
    for key, value in (("cpu", "2"), ("memory_mib", "1024"), ("disk_bytes", "8589934592")):
        name = f"machine.{stopped}.{key}"
        assert orb("config", "get", name).text.strip() in ("0", "")
        assert orb("config", "set", name, value).code == 0
        assert orb("config", "get", name).text.strip() == value
    new = made.name()
    assert orb("rename", stopped, new).code == 0
    assert orb("config", "get", f"machine.{new}.cpu").text.strip() == "2"


@pytest.mark.fact("inferred")
def test_unknown_config_key(orb: Program) -> None:
    """A key that does not exist is an error."""
    answer = orb("config", "get", "no.such.key")
    assert answer.code != 0
    assert answer.out == b""
