"""The rows of a benchmark's numbers, each from the newest run that has it, and their words."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

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
#: The connector that does nothing: what remains is pyinfra's own.
FLOOR = "floor"
#: The case that only starts and connects; goals concern deploys.
NOTHING = "nothing"

Times = Sequence[float]


class Row(NamedTuple):
    """One measurement, and the run that made it.

    Attributes:
        run: The run, with its circumstances.
        times: Seconds of each round.
        ratio: How many times as long as the base in the same run.
    """

    run: dict[str, Any]
    times: Times
    ratio: float

    @property
    def median(self) -> float:
        return statistics.median(self.times)


def runs(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The newest run, and earlier ones that contain rows which it lacks."""
    return [run for run in (data, *data.get("earlier", [])) if "deploys" in run]


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A new run, with what the older file contains besides.

    >>> run = {"deploys": {"1": {"put": {"session": [1], "ssh": [2]}}}, "commands": {}}
    >>> part = {"deploys": {"1": {"put": {"session": [3]}}}, "commands": {}}
    >>> merged({**run, "remote": {}}, part) == {**part, "remote": {}, "earlier": [run]}
    True
    >>> merged(merged(run, part), run) == run
    True
    """
    kept = {key: value for key, value in old.items() if key not in new and key != "earlier"}
    seen, earlier = set(_rows(new)), []
    for run in runs(old):
        if not seen.issuperset(_rows(run)):
            earlier.append({key: run[key] for key in new if key in run})
            seen.update(_rows(run))
    return {**new, **kept, **({"earlier": earlier} if earlier else {})}


def save(path: Path, **parts: dict[str, Any]) -> None:
    """Add the numbers of other benchmarks, with today's date, to a file of `benchmarks.compare`."""
    data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    today = date.today().isoformat()
    data.update((name, {"date": today, **part}) for name, part in parts.items())
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _rows(run: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for place, cases in run["deploys"].items():
        for case, times in cases.items():
            yield from ((place, case, name) for name in times)
    yield from (("one command", name) for name in run["commands"])


def row(data: dict[str, Any], *keys: str, base: str) -> Row | None:
    """The newest measurement, compared with the base in the same run.

    Args:
        keys: Where it is in the data of a run.
        base: The contender to compare with.
    """
    for run in runs(data):
        times: Any = run
        for key in keys[:-1]:
            times = times.get(key, {})
        if keys[-1] in times and base in times:
            return Row(run, times[keys[-1]], ratio(times[keys[-1]], times[base]))
    return None


def places(data: dict[str, Any]) -> list[str]:
    """Numbers of hosts, in order, and `CONTAINER`."""
    found = {place for run in runs(data) for place in run["deploys"]}
    return sorted(found, key=lambda place: (place == CONTAINER, place.zfill(9)))


def cases_of(data: dict[str, Any], place: str) -> list[str]:
    """The cases that any run contains, in their order."""
    return list({case: 0 for run in runs(data) for case in run["deploys"].get(place, {})})


def own_of(place: str) -> str:
    return CONTAINER if place == CONTAINER else "session"


def deploy_rows(data: dict[str, Any], place: str) -> dict[str, dict[str, Row]]:
    """The seconds of each case, by contender. The floor is left out: it is not a connector."""
    found: dict[str, dict[str, Row]] = {}
    for case in cases_of(data, place):
        for name in SHOWN:
            one = row(data, "deploys", place, case, name, base=own_of(place))
            if one is not None:
                found.setdefault(case, {})[name] = one
    return found


def growth(data: dict[str, Any], place: str, case: str) -> float | None:
    """How many times as long as one host these take, in the newest run that has both."""
    for run in runs(data):
        many = run["deploys"].get(place, {}).get(case, {}).get("session")
        one = run["deploys"].get("1", {}).get(case, {}).get("session")
        if many and one:
            return ratio(many, one)
    return None


def over_floor(data: dict[str, Any], kind: str) -> dict[str, dict[str, tuple[Row, Row]]]:
    """`@orbstack` compared with the floor, and the floor, by number of hosts and case."""
    found: dict[str, dict[str, tuple[Row, Row]]] = {}
    for place in places(data):
        for case in cases_of(data, place):
            own = row(data, kind, place, case, "session", base=FLOOR)
            floor = row(data, kind, place, case, FLOOR, base="session")
            if own and floor:
                found.setdefault(place, {})[case] = own, floor
    return found


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


def is_faster(value: float) -> bool:
    """Whether a ratio is below 1 when it is written."""
    return value < 0.95


def times_as_long(value: float) -> str:
    """A ratio as it is shown beside a bar, with a word for what is not slower.

    >>> [times_as_long(value) for value in (4.44, 1.04, 0.81, 0.044)]
    ['4.4x as long', '1.0x, the same', '0.8x, faster', '0.04x, faster']
    """
    if is_faster(value):
        return f"{value:.1f}x, faster" if value >= 0.095 else f"{value:.1g}x, faster"
    return f"{value:.1f}x as long" if value >= 1.05 else "1.0x, the same"


def seconds(value: float) -> str:
    """A time with its unit.

    >>> [seconds(value) for value in (0.0043, 0.347, 2.953, 118.2)]
    ['4.3 ms', '0.35 s', '2.95 s', '118.2 s']
    """
    if value < 0.1:
        return f"{value * 1000:.1f} ms"
    return f"{value:.2f} s" if value < 99.995 else f"{value:.1f} s"


def span(values: Iterable[float], form: str = "{:.1f}") -> str:
    """The smallest and the largest of some numbers.

    >>> span([1.11, 3, 2]), span([2.01, 2])
    ('1.1 to 3.0', '2.0')
    """
    found = sorted(values)
    first, last = form.format(found[0]), form.format(found[-1])
    return first if first == last else f"{first} to {last}"


def hosts_word(count: str) -> str:
    if count == CONTAINER:
        return "one container"
    return "one host" if count == "1" else f"{count} hosts"


def command_rows(data: dict[str, Any], base: str) -> dict[str, Row]:
    """The cost of one command, cheapest first."""
    names = {name: 0 for run in runs(data) for name in run["commands"]}
    found = {name: row(data, "commands", name, base=base) for name in names}
    there = {name: one for name, one in found.items() if one}
    return dict(sorted(there.items(), key=lambda item: item[1].median))


class Dates:
    """When rows were measured: one date for all, and a mark for rows of earlier runs."""

    def __init__(self, rows: Iterable[Row]) -> None:
        rows = list(rows)
        self._rounds: dict[str, set[int]] = {}
        for one in rows:
            self._rounds.setdefault(one.run["date"], set()).add(len(one.times))
        self._newest = max(self._rounds)
        self._is_one_run = len({id(one.run) for one in rows}) == 1

    def mark(self, one: Row | None) -> str:
        """What is written beside a row of an earlier run."""
        if one is None or one.run["date"] == self._newest:
            return ""
        return f"({date.fromisoformat(one.run['date']):%b %d})"

    @property
    def caption(self) -> str:
        parts: list[str] = []
        for day in sorted(self._rounds, reverse=True):
            counts = self._rounds[day]
            rounds = span(counts, "{:.0f}")
            word = "round" if counts == {1} else "rounds"
            parts.append(f"{rounds} {word} on {day}" + (" where that is noted" if parts else ""))
        text = f"Medians of {', and of '.join(parts)}."
        if not self._is_one_run:
            text += " Ratios compare times of the same run only."
        return text
