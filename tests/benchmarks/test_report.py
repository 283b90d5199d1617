"""The report on a benchmark's numbers."""

from __future__ import annotations

import copy
import doctest
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import measurements, picture, questions, report

DATA: dict[str, Any] = {
    "date": "2026-01-02",
    "python": "3.13.0",
    "pyinfra": "3.10.0",
    "system": "Linux 6 x86_64",
    "cpus": 2,
    "load": [0.25, 1.0, 0.5],
    "deploys": {
        "1": {
            "nothing": {"session": [1, 1, 1], "local": [1, 1, 1], "ssh": [1, 1, 1]},
            "shell": {"session": [2, 2, 4], "local": [4, 4, 8], "ssh": [6, 6, 12]},
            "put": {"session": [4, 2, 2], "local": [2, 1, 1], "ssh": [8, 4, 4]},
        },
        "10": {
            "nothing": {"session": [1, 1, 1], "ssh": [1, 1, 1]},
            "shell": {"session": [3, 3, 6], "ssh": [9, 9, 9]},
            "put": {"session": [8, 4, 4], "ssh": [9, 9, 9]},
        },
        "container": {
            "nothing": {"container": [1, 1, 1], "docker": [1, 1, 1]},
            "shell": {"container": [1, 2, 2], "docker": [4, 8, 8]},
        },
    },
    "commands": {"session": [0.002] * 3, "ssh": [0.02] * 3, "orbctl run true": [0.04] * 3},
}


#: A later run of some of the rows, with the floor; and what other benchmarks add.
LATER: dict[str, Any] = {
    **DATA,
    "date": "2026-01-03",
    "load": [0.1],
    "deploys": {
        "1": {"shell": {"session": [1.5], "ssh": [1.2], "floor": [1]}},
        "50": {"shell": {"session": [40], "ssh": [80], "floor": [20]}},
    },
    "cpu": {"1": {"shell": {"session": [0.6], "floor": [0.5]}}},
    "commands": {"session": [0.002]},
}
MORE: dict[str, Any] = {
    "remote": {
        "delay": 0.05,
        "steps": {
            "connect": {"orbstack": [2, 2], "ssh": [1, 1]},
            "command": {"orbstack": [0.06, 0.06], "ssh": [0.18, 0.18]},
        },
    },
    "many": {
        count: {"connected": [value], "memory": [value * 2**20], "most_files": [value]}
        for count, value in (("1", 10), ("10", 20), ("50", 50))
    },
    "boots": {
        "date": "2026-01-04",
        "rounds": 3,
        "seconds": {"create": [3, 3, 3], "systemd-nspawn --boot": [2, 2, 2]},
        "memory": 25,
    },
    "pyinfra_cost": {"deploys": {"shell": {"1": [2, {"pyinfra: data": 30, "this connector": 10}]}}},
}


def found(data: dict[str, Any]) -> dict[str, questions.Section]:
    return {section.name: section for section in questions.sections(data)}


@pytest.mark.parametrize("module", [measurements, picture, questions, report])
def test_examples_in_docstrings(module: Any) -> None:
    assert doctest.testmod(module).failed == 0


def test_a_busy_round_does_not_change_ratios() -> None:
    assert measurements.ratio([3, 3, 300], [1, 1, 100]) == 3
    assert measurements.ratio([3, 3, 300], [1, 1, 1]) == 3


def test_tables() -> None:
    one = questions.deploy_table(DATA, "1").splitlines()
    assert one[0] == "| one host | `@orbstack` | `@local` | `@ssh` |"
    assert one[3:] == ["| shell | 2.00 s | 2.0x | 3.0x |", "| put | 2.00 s | 0.5x | 2.0x |"]
    ten = questions.deploy_table(DATA, "10").splitlines()
    assert ten[0] == "| 10 hosts | `@orbstack` | `@ssh` | compared with one host |"
    assert ten[3:] == ["| shell | 3.00 s | 3.0x | 1.5x |", "| put | 4.00 s | 2.2x | 2.0x |"]
    container = questions.deploy_table(DATA, "container").splitlines()
    assert container[0] == "| one container | `@orbstack/docker` | `@docker` |"
    assert container[3:] == ["| shell | 2.00 s | 4.0x |"]
    commands = questions.command_table(DATA).splitlines()
    assert commands[0] == "| one command | ms | compared with `orbctl run true` |"
    assert commands[2:] == [
        "| `@orbstack` | 2.0 | 0.05x |",
        "| `@ssh` | 20.0 | 0.5x |",
        "| `orbctl run true` | 40.0 | 1x |",
    ]


def test_goals_list_the_cases_that_miss_them() -> None:
    assert list(report.goals(DATA)) == [
        ("whole deploys compared with `@local`", "not slower", ["shell 2.0x"], ["put 0.5x"]),
        ("whole deploys compared with `@ssh`", "at least 3x as fast", ["shell 3.0x"], ["put 2.0x"]),
        ("one command compared with `@ssh`", "at least 10x as fast", ["one command 10.0x"], []),
        ("10 hosts compared with one", "less than 2x the time", ["shell 1.5x"], ["put 2.0x"]),
        ("a container compared with `@docker`", "at least 3x as fast", ["shell 4.0x"], []),
    ]


def test_markers_are_required() -> None:
    with pytest.raises(SystemExit, match="numbers: begin"):
        report.between("no markers", "new")


def test_rows_of_an_earlier_run_keep_their_date_and_their_ratio() -> None:
    data = measurements.merged(DATA, LATER)
    assert questions.deploy_table(data, "1").splitlines()[2:] == [
        "| shell | 1.50 s | 2.0x (Jan 02) | 0.8x |",
        "| nothing | 1.00 s (Jan 02) | 1.0x (Jan 02) | 1.0x (Jan 02) |",
        "| put | 2.00 s (Jan 02) | 0.5x (Jan 02) | 2.0x (Jan 02) |",
    ]
    text = report.report(data)
    assert "Medians of 1 round on 2026-01-03, and of 3 rounds on 2026-01-02 where" in text
    assert text.count("- 3 rounds on 2026-01-02: 2 cores") == 1
    assert measurements.merged(data, copy.deepcopy(DATA)).get("earlier") == [
        {key: LATER[key] for key in DATA}
    ]  # still needed for the floor and 50 hosts


def test_questions_without_numbers_are_left_out() -> None:
    names = ["one-host", "10-hosts", "more-hosts", "command", "one-container"]
    assert list(found(DATA)) == names
    more = ["floor", "cpu", "50-hosts", "remote", "process", "boot", "pyinfra"]
    assert sorted(found({**measurements.merged(DATA, LATER), **MORE})) == sorted(names + more)


def test_losses_are_as_plain_as_gains() -> None:
    one = found(DATA)["one-host"]
    assert "`@local` 0.5 to 2.0x" in one.answer
    assert one.answer.endswith('Faster than `@orbstack`: `@local` in "put" (0.5x).')
    (put,) = (group for group in one.panels[0].groups if group.title == "put")
    assert [(bar.label, bar.ratio, bar.kind, bar.lost) for bar in put.bars] == [
        ("@orbstack", "", "own", False),
        ("@local", "0.5x, faster", "faster", True),
        ("@ssh", "2.0x as long", "other", False),
    ]
    floor = found(LATER)["floor"]
    bars = [panel.groups[0].bars[0] for panel in floor.panels]
    assert [(bar.ratio, bar.note, bar.lost) for bar in bars] == [
        ("1.50x", "", False),
        ("2.00x", "(goal: 1.6x)", True),
    ]
    assert report.goal_table(LATER).splitlines()[-3:] == [
        "| one host compared with pyinfra alone | at most 1.6x the time | shell 1.50x | - |",
        "| 50 hosts compared with pyinfra alone | at most 1.6x the time | - | shell 2.00x |",
        "| one host compared with pyinfra alone | at most 1.2x the CPU time | shell 1.20x | - |",
    ]


def test_numbers_of_other_benchmarks() -> None:
    sections = found({**DATA, **MORE})
    assert sections["remote"].table.splitlines()[2:] == [
        "| connect | 2.000 s | 1.000 s | 0.5x |",
        "| command | 0.060 s | 0.180 s | 3.0x |",
    ]
    assert "(0.5x)" in sections["remote"].answer
    begins = "pyinfra is connected to 50 hosts 50.00 s after its start"
    assert sections["process"].answer.startswith(begins)
    only = found({**DATA, "many": {"50": MORE["many"]["50"]}})
    assert only["process"].answer == sections["process"].answer
    assert "1.50 times as long" in sections["boot"].answer
    assert "75 % of the CPU time" in sections["pyinfra"].answer


def test_other_benchmarks_keep_the_rest_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps(DATA))
    measurements.save(path, boots={"rounds": 1})
    data = json.loads(path.read_text())
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", data["boots"].pop("date"))
    assert data == {**DATA, "boots": {"rounds": 1}}


def test_pictures(tmp_path: Path) -> None:
    data = {**measurements.merged(DATA, LATER), **MORE}
    (tmp_path / "old.svg").touch()
    report.draw_all(data, tmp_path)
    drawn = {path.stem: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert sorted(drawn) == sorted(found(data))
    text = report.report(data)
    assert all(f"](performance/{name}.svg)" in text for name in drawn)
    report.draw_all(data, tmp_path)
    for name, old in drawn.items():
        assert (tmp_path / f"{name}.svg").read_text(encoding="utf-8") == old
        ends = []
        for one in ElementTree.fromstring(old).iter("{http://www.w3.org/2000/svg}rect"):  # noqa: S314
            ends.append(float(one.get("x", 0)) + float(one.get("width", 0)))
        assert max(ends) <= picture.WIDTH
    assert "0.8x, faster" in drawn["one-host"]


def test_the_page_is_that_of_its_numbers() -> None:
    data = json.loads(report.DATA.read_text(encoding="utf-8"))
    page = report.PAGE.read_text(encoding="utf-8")
    assert report.between(page, report.report(data)) == page
    names = {f"{section.name}.svg" for section in questions.sections(data)}
    assert {path.name for path in report.PICTURES.iterdir()} == names
