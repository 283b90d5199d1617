"""A report on the numbers of `benchmarks.compare`: ratios, tables, goals and a picture.

    python -m benchmarks.report [DATA]

Writes them into docs/performance.md, between its markers, and beside it.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

DOCS = Path(__file__).resolve().parent.parent / "docs"
DATA = DOCS / "performance-data.json"
PAGE = DOCS / "performance.md"
PICTURE = DOCS / "performance.svg"

BEGIN, END = "<!-- numbers: begin -->", "<!-- numbers: end -->"
#: Contenders as they are shown.
SHOWN = {
    "session": "`@orbstack`",
    "spawn": "spawn",
    "local": "`@local`",
    "ssh": "`@ssh`",
    "0.11.0": "0.11.0",
    "container": "`@orbstack/docker`",
    "docker": "`@docker`",
}
#: The contender that runs deploys in a container, in place of a number of hosts.
CONTAINER = "container"
#: The case that only starts and connects; goals concern deploys.
NOTHING = "nothing"
#: How many times as fast `@orbstack` should be, in deploys and in single commands.
WANTED = {"local": (1.0, 0.0), "ssh": (3.0, 10.0), "0.11.0": (3.0, 10.0)}
#: The same, in a container.
WANTED_IN_CONTAINER = 3.0
#: Many hosts should take less than this many times as long as one.
MANY = 2.0

Times = Sequence[float]


class Goal(NamedTuple):
    """A goal, and its result in the numbers."""

    text: str
    wanted: str
    found: list[str]
    missed: list[str]


def ratio(times: Times, base: Times) -> float:
    """How many times as long one takes as the other: the median of the rounds' ratios.

    Each round is compared separately, because a busy host slows both down.

    >>> ratio([2.0, 6.0, 30.0], [1.0, 3.0, 10.0])
    2.0
    """
    return statistics.median(one / other for one, other in zip(times, base))


def two_digits(value: float) -> str:
    """A number without false precision.

    >>> two_digits(0.0437), two_digits(3.14), two_digits(112.6)
    ('0.044', '3.1', '113')
    """
    return f"{value:.2g}" if value < 99.5 else f"{value:.0f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; all columns but the first contain numbers.

    >>> print(table(["a", "b"], [["x", "1"]]))
    | a | b |
    |---|---:|
    | x | 1 |
    """
    rule = "|".join(["---", *["---:"] * (len(head) - 1)])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(head)} |", f"|{rule}|", *lines])


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


def hosts_word(count: str) -> str:
    if count == CONTAINER:
        return "one container"
    return "one host" if count == "1" else f"{count} hosts"


def deploy_table(data: dict[str, Any], count: str) -> str:
    """Whole `pyinfra` processes: seconds of `@orbstack`, and how many times as long others take."""
    cases = data["deploys"][count]
    own = CONTAINER if count == CONTAINER else "session"
    others = [name for name in SHOWN if name != own and name in cases[NOTHING]]
    many = count not in ("1", CONTAINER) and "1" in data["deploys"]
    more = ["compared with one host"] if many else []
    rows = []
    for case, times in cases.items():
        mine = times[own]
        row = [case, f"{statistics.median(mine):.2f} s"]
        row += [f"{ratio(times[name], mine):.1f}x" for name in others]
        if more:
            row.append(f"{ratio(mine, data['deploys']['1'][case]['session']):.1f}x")
        rows.append(row)
    return table([hosts_word(count), *(SHOWN[name] for name in (own, *others)), *more], rows)


def command_table(data: dict[str, Any]) -> str:
    """The cost of one command."""
    times = data["commands"]
    bare = [name for name in times if name not in SHOWN]
    head = ["one command", "ms", *(f"compared with `{name}`" for name in bare)]
    rows = []
    for name, taken in sorted(times.items(), key=lambda item: statistics.median(item[1])):
        row = [SHOWN.get(name, f"`{name}`"), f"{statistics.median(taken) * 1000:.1f}"]
        rows.append([*row, *(f"{two_digits(ratio(taken, times[other]))}x" for other in bare)])
    return table(head, rows)


def goals(data: dict[str, Any]) -> Iterator[Goal]:
    """Each goal, with the cases that reach it and those that miss it."""
    one = {case: times for case, times in data["deploys"]["1"].items() if case != NOTHING}
    for other, (deploys, commands) in WANTED.items():
        if not all(other in times for times in one.values()):
            continue
        found = {case: ratio(times[other], times["session"]) for case, times in one.items()}
        yield goal(f"whole deploys compared with {SHOWN[other]}", found, deploys)
        if commands:
            each = data["commands"]
            yield goal(
                f"one command compared with {SHOWN[other]}",
                {"one command": ratio(each[other], each["session"])},
                commands,
            )
    for count, cases in data["deploys"].items():
        if count == CONTAINER:
            beside = {
                case: ratio(times["docker"], times[CONTAINER])
                for case, times in cases.items()
                if case != NOTHING
            }
            yield goal("a container compared with `@docker`", beside, WANTED_IN_CONTAINER)
        elif count != "1":
            found = {
                case: ratio(cases[case]["session"], times["session"]) for case, times in one.items()
            }
            yield goal(f"{count} hosts compared with one", found, MANY, at_most=True)


def goal(text: str, found: dict[str, float], wanted: float, at_most: bool = False) -> Goal:
    """Sort cases by whether they reach the goal."""
    reached: list[str] = []
    missed: list[str] = []
    for case, value in found.items():
        good = value < wanted if at_most else value >= wanted
        (reached if good else missed).append(f"{case} {value:.1f}x")
    if at_most:
        return Goal(text, f"less than {wanted:g}x the time", reached, missed)
    how = f"at least {wanted:g}x as fast" if wanted > 1 else "not slower"
    return Goal(text, how, reached, missed)


def goal_table(data: dict[str, Any]) -> str:
    """Goals, with the cases that miss them in a separate column."""
    lines = ["| goal | wanted | reached | missed |", "|---|---|---|---|"]
    for each in goals(data):
        cells = [each.text, each.wanted, "; ".join(each.found), "; ".join(each.missed)]
        lines.append(f"| {' | '.join(cell or '-' for cell in cells)} |")
    return "\n".join(lines)


def circumstances(data: dict[str, Any]) -> str:
    """Where and how the numbers were measured."""
    rounds = len(data["load"])
    busy = ", ".join(f"{load:.1f}" for load in data["load"])
    return (
        f"Medians of {rounds} rounds on {data['date']}: {data['cpus']} cores, {data['system']}, "
        f"Python {data['python']}, pyinfra {data['pyinfra']}. Load of the computer before each "
        f"round: {busy}."
    )


def report(data: dict[str, Any]) -> str:
    """The whole text between the markers."""
    parts = [circumstances(data)]
    parts += [deploy_table(data, count) for count in data["deploys"]]
    parts += [command_table(data), goal_table(data)]
    return "\n\n".join(parts)


def draw(data: dict[str, Any], path: Path) -> None:
    """The same as a picture: how long whole deploys and single commands take."""
    import matplotlib

    matplotlib.use("svg")
    # Text remains text, and the same numbers produce the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 9})
    from matplotlib import pyplot

    counts = list(data["deploys"])
    # In two columns, so that the text can be read beside that of the page.
    rows = (len(counts) + 2) // 2
    figure, grid = pyplot.subplots(rows, 2, figsize=(8, 3.2 * rows), layout="constrained")
    axes = [*grid.flat][: len(counts) + 1]
    for axis in grid.flat[len(axes) :]:
        axis.remove()
    colours = dict(zip(SHOWN, ("#2f6fde", "#8fb4f0", "#7a7a7a", "#d98324", "#b04a4a")))
    colours.update(container=colours["session"], docker="#5a9367")
    key: dict[str, Any] = {}
    for axis, count in zip(axes, counts):
        cases = data["deploys"][count]
        names = [name for name in SHOWN if name in cases[NOTHING]]
        for place, name in enumerate(names):
            width = 0.8 / len(names)
            at = [row + place * width - 0.4 + width / 2 for row in range(len(cases))]
            seconds = [statistics.median(times[name]) for times in cases.values()]
            axis.barh(at, seconds, width, color=colours[name], label=SHOWN[name].strip("`"))
        axis.set_yticks(range(len(cases)), list(cases))
        axis.set_title(f"whole deploys, {hosts_word(count)}")
        key.update(dict(zip(*reversed(axis.get_legend_handles_labels()))))
    each = {name: statistics.median(times) * 1000 for name, times in data["commands"].items()}
    names = sorted(each, key=each.__getitem__)
    grey = "#bbbbbb"
    axes[-1].barh(
        [SHOWN.get(name, name).strip("`") for name in names],
        [each[name] for name in names],
        color=[colours.get(name, grey) for name in names],
    )
    axes[-1].set_title("one command")
    for axis in axes:
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("milliseconds" if axis is axes[-1] else "seconds")
    figure.legend(key.values(), key, frameon=False, loc="outside lower center", ncols=4)
    figure.savefig(path, metadata={"Date": None})
    # matplotlib leaves spaces at line ends, which no editor of this project would keep.
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else DATA
    data = json.loads(path.read_text(encoding="utf-8"))
    draw(data, PICTURE)
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(between(page, report(data)), encoding="utf-8")


if __name__ == "__main__":
    main()
