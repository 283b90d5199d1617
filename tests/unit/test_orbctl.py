"""The parsers and builders for calls of `orbctl`."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyinfra_orbstack import orbctl
from pyinfra_orbstack.orbctl import BadAnswer, BadValue, Record

RECORD = {
    "id": "01KHVDCW7HTAGRPMB823KADP9B",
    "name": "ubuntu",
    "image": {"distro": "ubuntu", "version": "noble", "arch": "arm64", "variant": "default"},
    "config": {"isolated": False, "default_username": "alice"},
    "builtin": False,
    "state": "running",
}
BANNER = (
    "╭──────────────────────────────╮\n│ OrbStack update available! [2.2.4] │\n╰──────────────╯\n"
)


def test_list_is_parsed() -> None:
    (machine,) = orbctl.parse_list(json.dumps([RECORD]))
    assert (machine.name, machine.distro, machine.version) == ("ubuntu", "ubuntu", "noble")
    assert machine.running
    assert machine.username == "alice"
    assert machine.isolated is False


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(("before", "after"), [("", ""), (BANNER, ""), ("", BANNER)])
def test_list_is_parsed_despite_the_update_banner(
    indent: int | None, before: str, after: str
) -> None:
    text = before + json.dumps([RECORD], indent=indent) + "\n" + after
    assert [machine.name for machine in orbctl.parse_list(text)] == ["ubuntu"]


def test_an_empty_list_means_no_machines() -> None:
    assert orbctl.parse_list("[]\n") == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "{}",
        "garbage",
        json.dumps([RECORD])[:-20],
        json.dumps([RECORD, RECORD]),
        "[null]",
        '["ubuntu"]',
        # Limits of Python's own reader.
        "[" * 100_000,
        f"[{'1' * 5000}]",
        json.dumps([{**RECORD, "name": None}]),
        json.dumps([{**RECORD, "image": "ubuntu"}]),
    ],
)
def test_a_malformed_list_is_an_error_not_an_empty_list(text: str) -> None:
    with pytest.raises(BadAnswer):
        orbctl.parse_list(text)


def test_builtin_machines_are_left_out() -> None:
    text = json.dumps([RECORD, {**RECORD, "name": "docker", "builtin": True}])
    assert [machine.name for machine in orbctl.parse_list(text)] == ["ubuntu"]


def test_fields_that_this_orbstack_does_not_report_are_unknown() -> None:
    (machine,) = orbctl.parse_list('[{"id": "X", "name": "a", "state": "running"}]')
    assert machine.isolated is None
    assert machine.version == ""
    assert machine.created is None


def test_info_is_parsed_in_both_forms() -> None:
    new = {"record": RECORD, "disk_size": 847974400, "ip4": "192.168.139.64", "ip6": ""}
    machine = orbctl.parse_info(json.dumps(new))
    assert (machine.ip4, machine.ip6, machine.disk_size) == ("192.168.139.64", None, 847974400)
    assert orbctl.parse_info(json.dumps(RECORD)).name == "ubuntu"


def test_the_time_of_creation_is_read_from_the_id() -> None:
    machine = orbctl.Machine(id="01ARZ3NDEKTSV4RRFFQ69G5FAV", name="a", state="running")
    assert machine.created == datetime(2016, 7, 30, 23, 54, 10, 259000, tzinfo=timezone.utc)


@pytest.mark.parametrize("moment", ["7ZZZZZZZZZ", "ZZZZZZZZZZ"])
def test_an_id_whose_moment_no_calendar_has(moment: str) -> None:
    assert orbctl.Machine(moment + "R0VY6W46N3Z0D7C9", "web", "running").created is None


@pytest.mark.parametrize(
    ("stderr", "kind", "text"),
    [
        ("[-32098] machine not found: 'x'\n", orbctl.MachineNotFound, "machine not found: 'x'"),
        ("[-32602] no machine found: 'x'\n", orbctl.MachineNotFound, "no machine found: 'x'"),
        (
            BANNER + "[-32098] create 'a': machine already exists: 'a'\n" + BANNER,
            orbctl.MachineExists,
            "create 'a': machine already exists: 'a'",
        ),
        ("", orbctl.OrbctlError, "exit code 3, nothing on stderr"),
    ],
)
def test_errors_are_typed_and_have_one_line(stderr: str, kind: type, text: str) -> None:
    error = orbctl.error_of(stderr, 3)
    assert type(error) is kind
    assert str(error) == text


@pytest.mark.parametrize("name", ["web-1", "Web.1", "größe", "a_b", "$(id)", "a;b", "'"])
def test_valid_machine_names_are_passed_on(name: str) -> None:
    assert orbctl.check_name(name) == name
    assert orbctl.run_args(name, ["true"]) == ["run", "-m", name, "-w", "/", "true"]


@pytest.mark.parametrize(
    "name",
    ["", "-m", "--help", "-m; rm -rf", "a b", "../x", ".", "..", "a\nb", "a\0b", "a\tb", "docker"]
    + ["k8s", "default", "all", "none"],
)
def test_names_with_another_meaning_are_rejected(name: str) -> None:
    with pytest.raises(BadValue):
        orbctl.check_name(name)


@given(st.text())
def test_no_name_becomes_a_flag_or_disappears(name: str) -> None:
    try:
        args = orbctl.run_args(name, ["true"])
    except BadValue:
        return
    assert args[:3] == ["run", "-m", name]
    assert name
    assert not name.startswith("-")


@pytest.mark.parametrize("key", ["arch", "user", "cloud_init", "cpus", "memory", "disk"])
@pytest.mark.parametrize("value", ["-x", "", "a\nb"])
def test_no_value_of_create_becomes_a_flag(key: str, value: str) -> None:
    with pytest.raises(BadValue):
        orbctl.create_args("web", "ubuntu", **{key: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(("image", "mount"), [("-x", "/a"), ("ubuntu", "-x")])
def test_image_and_mounts_cannot_be_flags(image: str, mount: str) -> None:
    with pytest.raises(BadValue):
        orbctl.create_args("web", image, isolated=True, mounts=[mount])


def test_create_passes_every_flag() -> None:
    args = orbctl.create_args(
        "web",
        "ubuntu:noble",
        arch="amd64",
        user="bob",
        cloud_init="/c.yml",
        cpus=2,
        memory="4G",
        disk="64G",
        isolated=True,
        isolate_network=True,
        mounts=["~/a:/b"],
        forward_ssh_agent=True,
    )
    assert " ".join(args) == (
        "create --arch amd64 --user bob --user-data /c.yml --cpus 2 --memory 4G --disk 64G "
        "--isolated --isolate-network --forward-ssh-agent --mount ~/a:/b ubuntu:noble web"
    )


def test_mounts_need_isolation() -> None:
    with pytest.raises(BadValue, match="require isolated"):
        orbctl.create_args("web", "ubuntu", mounts=["/a"])


def test_record_keeps_names_and_ids(tmp_path: Path) -> None:
    record = Record(tmp_path / "folder" / "record")
    assert record.machines() == {}
    first = orbctl.Machine(id="ID1", name="a", state="running")
    second = orbctl.Machine(id="ID2", name="b", state="running")
    record.add(first)
    record.add(second)
    with record.path.open("a") as file:
        file.write("c")  # as a crash would leave it
    assert record.machines() == {"a": "ID1", "b": "ID2"}
    record.forget("ID1")
    assert record.machines() == {"b": "ID2"}
