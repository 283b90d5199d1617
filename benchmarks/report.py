"""A report on the numbers of `benchmarks.compare` and other benchmarks: an answer, a picture and a
table for each question; and the goals.

    python -m benchmarks.report [DATA]

Writes them into docs/performance.md, between its markers, and into docs/performance. Questions
whose numbers are missing are left out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.measurements import (
    CONTAINER,
    NOTHING,
    SHOWN,
    deploy_rows,
    growth,
    hosts_word,
    over_floor,
    places,
    ratio,
    row,
    runs,
)
from benchmarks.picture import draw
from benchmarks.questions import NSPAWN, OVER_FLOOR, OVER_NSPAWN, TEN_HOSTS, sections

DOCS = Path(__file__).resolve().parent.parent / "docs"
DATA = DOCS / "performance-data.json"
PAGE = DOCS / "performance.md"
PICTURES = DOCS / "performance"

BEGIN, END = "<!-- numbers: begin -->", "<!-- numbers: end -->"
#: How many times as fast `@orbstack` should be, in deploys and in single commands.
WANTED = {"local": (1.0, 0.0), "ssh": (3.0, 10.0), "0.11.0": (3.0, 10.0)}
#: The same, in a container.
WANTED_IN_CONTAINER = 3.0


class Goal(NamedTuple):
    """A goal, and its result in the numbers."""

    text: str
    wanted: str
    found: list[str]
    missed: list[str]


def between(text: str, new: str) -> str:
    """Replace the text between the markers.

    >>> between(f"a {BEGIN} old {END} b", "new").split("\\n")
    ['a <!-- numbers: begin -->', 'new', '<!-- numbers: end --> b']
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"there is no {BEGIN} ... {END} to write to")
    return f"{head}{BEGIN}\n{new}\n{END}{tail}"


# Goals


def goals(data: dict[str, Any]) -> Iterator[Goal]:
    """Each goal, with the cases that reach it and those that miss it."""
    one = {case: rows for case, rows in deploy_rows(data, "1").items() if case != NOTHING}
    for other, (deploys, commands) in WANTED.items():
        found = {case: rows[other].ratio for case, rows in one.items() if other in rows}
        if not found:
            continue
        yield at_least(f"whole deploys compared with {SHOWN[other]}", found, deploys)
        command = row(data, "commands", other, base="session")
        if commands and command:
            text = f"one command compared with {SHOWN[other]}"
            yield at_least(text, {"one command": command.ratio}, commands)
    for count in places(data):
        if count == CONTAINER:
            beside = {
                case: rows["docker"].ratio
                for case, rows in deploy_rows(data, count).items()
                if case != NOTHING and "docker" in rows
            }
            yield at_least("a container compared with `@docker`", beside, WANTED_IN_CONTAINER)
        elif count == "10":
            grown = {case: growth(data, count, case) or 0 for case in one}
            some = {case: value for case, value in grown.items() if value}
            how = f"less than {TEN_HOSTS:g}x the time"
            yield goal(
                f"{count} hosts compared with one", how, some, lambda value: value < TEN_HOSTS
            )
    for kind, most in OVER_FLOOR.items():
        for count, cases in over_floor(data, kind).items():
            what = "time" if kind == "deploys" else "CPU time"
            yield goal(
                f"{hosts_word(count)} compared with pyinfra alone",
                f"at most {most:g}x the {what}",
                {case: own.ratio for case, (own, _) in cases.items() if case != NOTHING},
                lambda value, most=most: value <= most,  # type: ignore[misc]
                "{:.2f}x",
            )
    boots = data.get("boots")
    if boots:
        taken = boots["seconds"]
        found = {"create": ratio(taken["create"], taken[NSPAWN])}
        yield goal(
            "a machine that boots compared with systemd-nspawn",
            f"at most {OVER_NSPAWN:g}x the time",
            found,
            lambda value: value <= OVER_NSPAWN,
        )


def at_least(text: str, found: dict[str, float], wanted: float) -> Goal:
    how = f"at least {wanted:g}x as fast" if wanted > 1 else "not slower"
    return goal(text, how, found, lambda value: value >= wanted)


def goal(
    text: str,
    wanted: str,
    found: dict[str, float],
    good: Callable[[float], bool],
    form: str = "{:.1f}x",
) -> Goal:
    """Sort cases by whether they reach the goal."""
    reached: list[str] = []
    missed: list[str] = []
    for case, value in found.items():
        (reached if good(value) else missed).append(f"{case} {form.format(value)}")
    return Goal(text, wanted, reached, missed)


def goal_table(data: dict[str, Any]) -> str:
    """Goals, with the cases that miss them in a separate column."""
    lines = ["| goal | target | met | missed |", "|---|---|---|---|"]
    for each in goals(data):
        cells = [each.text, each.wanted, "; ".join(each.found), "; ".join(each.missed)]
        lines.append(f"| {' | '.join(cell or '-' for cell in cells)} |")
    return "\n".join(lines)


def circumstances(run: dict[str, Any]) -> str:
    """Where and how the numbers of a run were measured."""
    rounds = len(run["load"])
    busy = ", ".join(f"{load:.1f}" for load in run["load"])
    return (
        f"{rounds} {'round' if rounds == 1 else 'rounds'} on {run['date']}: {run['cpus']} cores, "
        f"{run['system']}, Python {run['python']}, pyinfra {run['pyinfra']}. Load average "
        f"before each round: {busy}."
    )


def report(data: dict[str, Any]) -> str:
    """The whole text between the markers."""
    parts = []
    for one in sections(data):
        alt = f"{one.question} Bars with a time and a ratio for each row of the table below"
        parts += [f"## {one.question}", one.answer, f"![{alt}](performance/{one.name}.svg)"]
        parts += [one.caption] if one.caption else []
        if one.table:
            parts.append(details("The numbers", one.table))
    parts += ["## Which goals are met?", goal_table(data)]
    listed = "\n".join(f"- {circumstances(run)}" for run in runs(data))
    parts += ["## Where was it measured?", listed]
    return "\n\n".join(parts)


def details(summary: str, content: str) -> str:
    """A block that is closed at first; both GitHub and the site read Markdown in it."""
    return f'<details markdown="1">\n<summary>{summary}</summary>\n\n{content}\n\n</details>'


def draw_all(data: dict[str, Any], folder: Path) -> None:
    """Draw a picture for each question, and remove those of earlier reports."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.svg"):
        old.unlink()
    for one in sections(data):
        text = draw(one.question, one.panels, one.legend)
        (folder / f"{one.name}.svg").write_text(text, encoding="utf-8")


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else DATA
    data = json.loads(path.read_text(encoding="utf-8"))
    text = between(PAGE.read_text(encoding="utf-8"), report(data))
    draw_all(data, PICTURES)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
