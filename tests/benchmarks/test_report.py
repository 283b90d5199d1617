"""The report on a benchmark's numbers."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report

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


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(report).failed == 0


def test_a_busy_round_does_not_change_ratios() -> None:
    assert report.ratio([3, 3, 300], [1, 1, 100]) == 3
    assert report.ratio([3, 3, 300], [1, 1, 1]) == 3


def test_tables() -> None:
    one = report.deploy_table(DATA, "1").splitlines()
    assert one[0] == "| one host | `@orbstack` | `@local` | `@ssh` |"
    assert one[3:] == ["| shell | 2.00 s | 2.0x | 3.0x |", "| put | 2.00 s | 0.5x | 2.0x |"]
    ten = report.deploy_table(DATA, "10").splitlines()
    assert ten[0] == "| 10 hosts | `@orbstack` | `@ssh` | compared with one host |"
    assert ten[3:] == ["| shell | 3.00 s | 3.0x | 1.5x |", "| put | 4.00 s | 2.2x | 2.0x |"]
    container = report.deploy_table(DATA, "container").splitlines()
    assert container[0] == "| one container | `@orbstack/docker` | `@docker` |"
    assert container[3:] == ["| shell | 2.00 s | 4.0x |"]
    commands = report.command_table(DATA).splitlines()
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


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="only `make bench` installs matplotlib")
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    report.draw(DATA, first)
    report.draw(DATA, second)
    assert first.read_bytes() == second.read_bytes()
    assert "whole deploys, 10 hosts" in first.read_text()
