"""Writes docs/conformance.md from a run of the suite: `--conformance-report FILE`."""

from __future__ import annotations

import platform
import re
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import pytest

from pyinfra_orbstack.programs import choose_orbctl, is_simulator

from .catalogue import BEHAVIOURS, CANNOT, SECTIONS

HEAD = """# Conformance

This page lists how a connector must behave, and the result for this one. `make conformance`
generates it; do not edit it.

Run on {where}, {system}, Python {python}, pyinfra {pyinfra}. {more}

`session` and `spawn` are the two transports for commands in a machine. `container` is a session in
a container. A behavior that is listed with one transport only does not depend on the transport.
"""
SIMULATED = """On a Mac with OrbStack, `make
conformance` runs the same suite against OrbStack; **that has not been done yet**."""


def ids(nodeid: str) -> list[str]:
    """The ids in a test's name.

    >>> ids("test_x.py::test_words[session-Q1_single_quotes]"), ids("a::test_E9_E13_shells")
    (['Q1'], ['E9', 'E13'])
    """
    words = re.findall(r"(?<![A-Za-z0-9])[A-Z]\d+(?![A-Za-z0-9])", re.sub("_", " ", nodeid))
    return [word for word in words if word in BEHAVIOURS]


class Report:
    """Collects outcomes and writes the page at the end."""

    def __init__(self, path: Path, which: str) -> None:
        self.path = path
        self.simulated = is_simulator(choose_orbctl(which))
        self.outcomes: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        self.reasons: dict[tuple[str, str], str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        named = next((way for way in ("container", "spawn") if way in report.nodeid), "session")
        for word in ids(report.nodeid.partition("::")[2]):
            self.outcomes[word][named].add(report.outcome)
            if report.skipped and isinstance(report.longrepr, tuple):
                self.reasons[word, named] = report.longrepr[2].removeprefix("Skipped: ")

    def verdict(self, word: str) -> str:
        if word not in self.outcomes:
            return f"no test: {CANNOT[word]}" if word in CANNOT else "**not run**"
        said = []
        for way, outcomes in sorted(self.outcomes[word].items()):
            shown = ["**failed**"] if "failed" in outcomes else []
            shown += ["passed"] if outcomes == {"passed"} else []
            if "skipped" in outcomes:
                part = "skipped" if outcomes == {"skipped"} else "partly skipped"
                shown.append(f"{part} ({self.reasons[word, way]})")
            said.append(f"{way}: {', '.join(shown)}")
        return ", ".join(said)

    def pytest_sessionfinish(self) -> None:
        lines = [
            HEAD.format(
                where="the simulator" if self.simulated else "OrbStack",
                system=f"{platform.system()} {platform.machine()}",
                python=platform.python_version(),
                pyinfra=version("pyinfra"),
                more=SIMULATED if self.simulated else "",
            )
        ]
        for letter, title in SECTIONS.items():
            lines += [f"## {letter}: {title}\n", "| id | behavior | result |", "|---|---|---|"]
            for word, text in BEHAVIOURS.items():
                if word[0] == letter:
                    lines.append(f"| {word} | {text} | {self.verdict(word)} |")
            lines.append("")
        self.path.write_text("\n".join(lines), encoding="utf-8")
