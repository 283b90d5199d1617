"""The questions that a benchmark's numbers answer, each with sentences, a picture and a table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from benchmarks.measurements import (
    CONTAINER,
    NOTHING,
    SHOWN,
    Dates,
    Row,
    cases_of,
    command_rows,
    deploy_rows,
    growth,
    hosts_word,
    is_faster,
    over_floor,
    own_of,
    places,
    ratio,
    seconds,
    span,
    times_as_long,
    two_digits,
)
from benchmarks.measurements import row as newest
from benchmarks.picture import Bar, Group, Panel

#: The most that `@orbstack` should take compared with the floor: of time, and of CPU time.
OVER_FLOOR = {"deploys": 1.6, "cpu": 1.2}
#: Ten hosts should take less than this many times as long as one.
TEN_HOSTS = 2.0
#: The most that `create` should take compared with systemd-nspawn.
OVER_NSPAWN = 0.8
NSPAWN = "systemd-nspawn --boot"


class Section(NamedTuple):
    """A question with its answer.

    Attributes:
        name: Name of the picture's file.
        question: The heading.
        answer: Sentences that answer it.
        caption: When it was measured.
        panels: What the picture shows.
        legend: Kinds of bars, and what they mean.
        table: The numbers.
    """

    name: str
    question: str
    answer: str
    caption: str
    panels: list[Panel]
    legend: list[tuple[str, str]]
    table: str


def sections(data: dict[str, Any]) -> list[Section]:
    """All questions for which there are numbers."""
    counts = [place for place in places(data) if place != CONTAINER]
    found = [
        *(deploys(data, count) for count in counts),
        more_hosts(data),
        floor(data, "deploys"),
        floor(data, "cpu"),
        own_share(data),
        one_command(data),
        deploys(data, CONTAINER),
        far_away(data),
        process(data),
        boot(data),
    ]
    return [section for section in found if section]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; all columns but the first contain numbers.

    >>> print(table(["a", "b"], [["x", "1"]]))
    | a | b |
    |---|---:|
    | x | 1 |
    """
    rule = "|".join(["---", *["---:"] * (len(head) - 1)])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(head)} |", f"|{rule}|", *lines])


def contender(name: str, row: Row, own: str, dates: Dates) -> Bar:
    """The bar of a contender, compared with our own."""
    label, mark = SHOWN.get(name, name).strip("`"), dates.mark(row)
    if name == own:
        return Bar(label, row.median, seconds(row.median), note=mark, kind="own")
    faster = is_faster(row.ratio)
    shown, kind = times_as_long(row.ratio), "faster" if faster else "other"
    return Bar(label, row.median, seconds(row.median), shown, mark, kind, lost=faster)


def legend(panels: Iterable[Panel], own: str = "session") -> list[tuple[str, str]]:
    """What the kinds of bars mean that `contender` draws."""
    name = SHOWN[own].strip("`")
    kinds = {bar.kind for panel in panels for group in panel.groups for bar in group.bars}
    meanings = {"own": name, "other": f"not faster than {name}", "faster": f"faster than {name}"}
    return [(kind, meaning) for kind, meaning in meanings.items() if kind in kinds]


def faster(wins: Sequence[str], own: str = "session") -> str:
    """A sentence about everything that is faster than our own."""
    return f"Faster than {SHOWN[own]}: {', '.join(wins) or 'nothing'}."


# Whole deploys


def deploys(data: dict[str, Any], place: str) -> Section | None:
    """How long deploys take through each connector."""
    found, own = deploy_rows(data, place), own_of(place)
    if not found:
        return None
    dates = Dates(row for rows in found.values() for row in rows.values())
    panel = Panel(
        "",
        [
            Group(case, [contender(name, row, own, dates) for name, row in rows.items()])
            for case, rows in found.items()
        ],
    )
    main = {case: rows for case, rows in found.items() if case != NOTHING} or found
    ratios = {
        name: [rows[name].ratio for rows in main.values() if name in rows]
        for name in SHOWN
        if name != own
    }
    wins = [
        f'{SHOWN[name]} in "{case}" ({row.ratio:.1f}x)'
        for case, rows in found.items()
        for name, row in rows.items()
        if is_faster(row.ratio)
    ]
    mine = span((rows[own].median for rows in main.values() if own in rows), "{:.2f}")
    others = ", ".join(f"{SHOWN[name]} {span(each)}x" for name, each in ratios.items() if each)
    answer = f"Deploys with operations take {mine} s through {SHOWN[own]}."
    if others:
        answer += f" In comparison: {others}. {faster(wins, own)}"
    return Section(
        hosts_word(place).replace(" ", "-"),
        f"How long does a deploy take {'in' if place == CONTAINER else 'on'} {hosts_word(place)}?",
        answer,
        dates.caption,
        [panel],
        legend([panel], own),
        deploy_table(data, place),
    )


def deploy_table(data: dict[str, Any], place: str) -> str:
    """Whole `pyinfra` processes: seconds of `@orbstack`, and how many times as long others take."""
    found, own = deploy_rows(data, place), own_of(place)
    others = [
        name for name in SHOWN if name != own and any(name in rows for rows in found.values())
    ]
    dates = Dates(row for rows in found.values() for row in rows.values())
    many = place not in ("1", CONTAINER) and "1" in places(data)
    lines = []
    for case, rows in found.items():
        mine = rows.get(own)
        line = [case, f"{mine.median:.2f} s {dates.mark(mine)}".strip() if mine else "-"]
        for name in others:
            row = rows.get(name)
            line.append(f"{row.ratio:.1f}x {dates.mark(row)}".strip() if row else "-")
        if many:
            grown = growth(data, place, case)
            line.append(f"{grown:.1f}x" if grown else "-")
        lines.append(line)
    more = ["compared with one host"] if many else []
    return table([hosts_word(place), *(SHOWN[name] for name in (own, *others)), *more], lines)


def more_hosts(data: dict[str, Any]) -> Section | None:
    """How much many hosts cost compared with one."""
    counts = [place for place in places(data) if place != CONTAINER]
    groups, lines = [], []
    ratios: dict[str, list[float]] = {}
    found = {
        (case, count): newest(data, "deploys", count, case, "session", base="session")
        for case in cases_of(data, "1")
        for count in counts
    }
    dates = Dates(row for row in found.values() if row)
    for case in cases_of(data, "1"):
        bars, line = [], [case]
        for count in counts:
            row = found[case, count]
            grown = growth(data, count, case)
            if row is None or grown is None:
                line.append("-")
                continue
            text, shown = seconds(row.median), "" if count == "1" else f"{grown:.1f}x as long"
            lost = count == "10" and case != NOTHING and grown >= TEN_HOSTS
            notes = [f"(goal: below {TEN_HOSTS:g}x)"] if lost else []
            note = " ".join([*notes, *filter(None, [dates.mark(row)])])
            bars.append(Bar(hosts_word(count), row.median, text, shown, note, "own", lost=lost))
            line.append(f"{text}, {grown:.1f}x" if shown else text)
            if shown and case != NOTHING:
                ratios.setdefault(count, []).append(grown)
        groups.append(Group(case, bars))
        lines.append(line)
    if not ratios:
        return None
    answer = "; ".join(
        f"{hosts_word(count)} take {span(values)} times as long as one host: "
        f"{span((value / int(count) for value in values), '{:.2f}')} of one host's time per host"
        for count, values in ratios.items()
    )
    return Section(
        "more-hosts",
        "How much longer do many hosts take than one?",
        f"{answer[0].upper()}{answer[1:]}.",
        dates.caption,
        [Panel("", groups)],
        [],
        table(["`@orbstack`", *map(hosts_word, counts)], lines),
    )


def floor(data: dict[str, Any], kind: str) -> Section | None:
    """How much of a deploy's time, or CPU time, pyinfra needs without any connection."""
    found = over_floor(data, kind)
    if not found:
        return None
    goal = OVER_FLOOR[kind]
    dates = Dates(row for cases in found.values() for both in cases.values() for row in both)
    panels, answers, lines = [], [], []
    all_ratios: list[float] = []
    for place, cases in found.items():
        bars = []
        for case, (own, alone) in cases.items():
            lost = own.ratio > goal and case != NOTHING
            notes = [f"(goal: {goal:g}x)"] if lost else []
            note = " ".join([*notes, *filter(None, [dates.mark(own)])])
            text, shown = seconds(own.median), f"{own.ratio:.2f}x"
            part = min(alone.median, own.median)
            bars.append(Bar(case, own.median, text, shown, note, "own", lost=lost, part=part))
            times = [f"{alone.median:.2f} s", f"{own.median:.2f} s", f"{own.ratio:.2f}x"]
            lines.append([f"{hosts_word(place)}, {case}", *times])
        panels.append(Panel(hosts_word(place), [Group("", bars)]))
        ratios = [own.ratio for case, (own, _) in cases.items() if case != NOTHING]
        all_ratios += ratios
        if ratios:
            answers.append(f"{span(ratios, '{:.2f}')} on {hosts_word(place)}")
    added = "@orbstack and the machines" if kind == "deploys" else "@orbstack"
    answer = (
        "Compared with a connector that does nothing, a deploy with operations through `@orbstack` "
        f"takes this many times as {'long' if kind == 'deploys' else 'much'}: "
        f"{', '.join(answers)}. The goal is at most {goal:g}."
    )
    if kind == "deploys":
        own_share = (100 / ratio for ratio in all_ratios)
        answer += f" So pyinfra alone is {span(own_share, '{:.0f}')} % of the time."
    return Section(
        "floor" if kind == "deploys" else "cpu",
        "Where does the time go?"
        if kind == "deploys"
        else "How much CPU time does pyinfra's own process need?",
        answer,
        f"{dates.caption} Each number of hosts has its own scale.",
        panels,
        [("part", "pyinfra alone"), ("own", f"added by {added}")],
        table(["", "pyinfra alone", "`@orbstack`", "compared"], lines),
    )


# Single commands


def one_command(data: dict[str, Any]) -> Section | None:
    """What each connector, and what is beneath, takes for a command."""
    found = command_rows(data, "session")
    if "session" not in found:
        return None
    dates = Dates(found.values())
    panel = Panel(
        "", [Group("", [contender(n, row, "session", dates) for n, row in found.items()])]
    )
    named = {SHOWN.get(name, f"`{name}`"): row for name, row in found.items() if name != "session"}
    others = [f"{name} {two_digits(row.ratio)}x" for name, row in named.items()]
    wins = [f"{n} ({two_digits(row.ratio)}x)" for n, row in named.items() if is_faster(row.ratio)]
    return Section(
        "command",
        "What does one command cost?",
        f"It takes {seconds(found['session'].median)} through `@orbstack`, on an open connection. "
        f"In comparison: {', '.join(others)}. {faster(wins)}",
        dates.caption,
        [panel],
        legend([panel]),
        command_table(data),
    )


def command_table(data: dict[str, Any]) -> str:
    """The cost of one command, compared with what is beneath."""
    found = command_rows(data, "session")
    bare = {name: command_rows(data, name) for name in found if name not in SHOWN}
    bare = dict(sorted(bare.items()))
    dates = Dates(found.values())
    lines = []
    for name, row in found.items():
        time = f"{row.median * 1000:.1f} {dates.mark(row)}".strip()
        compared = (f"{two_digits(each[name].ratio)}x" for each in bare.values())
        lines.append([SHOWN.get(name, f"`{name}`"), time, *compared])
    return table(["one command", "ms", *(f"compared with `{name}`" for name in bare)], lines)


# Numbers of other benchmarks


def run_of(data: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """The run of a benchmark that may not have noted its date."""
    return {"date": part.get("date") or data["date"]}


def far_away(data: dict[str, Any]) -> Section | None:
    """Steps on a remote Mac with a delay; `benchmarks.remote` measures them."""
    remote = data.get("remote")
    if not remote:
        return None
    delay, run = remote["delay"], run_of(data, remote)
    panels, lines, others, wins, measured = [], [], [], [], []
    for step, times in remote["steps"].items():
        own = Row(run, times["orbstack"], 1.0)
        ssh = Row(run, times["ssh"], ratio(times["ssh"], times["orbstack"]))
        measured += [own, ssh]
        dates = Dates([own, ssh])
        bars = [contender(n, r, "session", dates) for n, r in (("session", own), ("ssh", ssh))]
        if step == "command":
            bars.append(Bar("the delay", delay, seconds(delay), kind="part"))
        panels.append(Panel(step, [Group("", bars)]))
        lines.append([step, f"{own.median:.3f} s", f"{ssh.median:.3f} s", f"{ssh.ratio:.1f}x"])
        others.append(f"{step} {ssh.ratio:.1f}x")
        wins += [f'`@ssh` in "{step}" ({ssh.ratio:.1f}x)'] if is_faster(ssh.ratio) else []
    return Section(
        "remote",
        "How much does a remote Mac cost?",
        f"With {delay * 1000:.0f} ms there and back, `@ssh` to a server in the same machine takes, "
        f"in comparison: {', '.join(others)}. {faster(wins)}",
        f"{Dates(measured).caption} Each step has its own scale.",
        panels,
        legend(panels),
        table(["", "`@orbstack`", "`@ssh`", "compared"], lines),
    )


def own_share(data: dict[str, Any]) -> Section | None:
    """What pyinfra's process does in its CPU time; `benchmarks.pyinfra_cost` counts samples."""
    cost = data.get("pyinfra_cost")
    if not cost:
        return None
    panels, lines, shares = [], [], []
    for deploy, counts in cost["deploys"].items():
        kinds = {kind: 0 for _, seen in counts.values() for kind in seen}
        groups = []
        for kind in kinds:
            bars, line = [], [f"{deploy}: {kind}"]
            for count, (taken, seen) in counts.items():
                part = seen.get(kind, 0) / sum(seen.values())
                spent, color = part * taken, "own" if kind.startswith("this") else "other"
                shown = f"{100 * part:.0f} %"
                bars.append(Bar(hosts_word(count), spent, seconds(spent), shown, kind=color))
                line.append(shown)
            groups.append(Group(kind, bars))
            lines.append(line)
        panels.append(Panel(deploy, groups))
        for _, seen in counts.values():
            own = sum(number for kind, number in seen.items() if kind.startswith("pyinfra"))
            shares.append(100 * own / sum(seen.values()))
    hosts = list({count: 0 for counts in cost["deploys"].values() for count in counts})
    return Section(
        "pyinfra",
        "What does pyinfra's process spend its CPU time on?",
        f"pyinfra's own code, without its start and without this connector, takes "
        f"{span(shares, '{:.0f}')} % of the CPU time of its process.",
        f"Sampled on {run_of(data, cost)['date']}. Each deploy has its own scale.",
        panels,
        [("own", "this connector"), ("other", "everything else")],
        table(["", *map(hosts_word, hosts)], lines),
    )


#: What `benchmarks.many` measures: a title, the key, and how it is written.
PROCESS: list[tuple[str, str, Callable[[float], str]]] = [
    ("time until all hosts are connected", "connected", seconds),
    ("memory of pyinfra's process", "memory", lambda value: f"{value / 2**20:.0f} MiB"),
    ("most files that it opens at once", "most_files", lambda value: f"{value:.0f}"),
]


def process(data: dict[str, Any]) -> Section | None:
    """What many hosts cost pyinfra's process; `benchmarks.many` measures it."""
    many = {count: of for count, of in data.get("many", {}).items() if count.isdecimal()}
    if not many:
        return None
    medians = {
        count: {key: statistics.median(values[key]) for _, key, _ in PROCESS}
        for count, values in sorted(many.items(), key=lambda item: int(item[0]))
    }
    first = next(iter(medians.values()))
    most, last = list(medians.items())[-1]
    panels = []
    for title, key, form in PROCESS:
        bars = []
        for count, values in medians.items():
            shown = "" if values is first else f"{values[key] / first[key]:.1f}x"
            bars.append(Bar(hosts_word(count), values[key], form(values[key]), shown, kind="own"))
        panels.append(Panel(title, [Group("", bars)]))
    rows = [Row(run_of(data, data["many"]), of["connected"], 1.0) for of in many.values()]
    connected, memory, files = (form(last[key]) for _, key, form in PROCESS)
    return Section(
        "process",
        "What do many hosts cost pyinfra's process?",
        f"pyinfra is connected to {hosts_word(most)} {connected} after its start. During an upload "
        f"to all of them, it uses at most {memory} and {files} open files.",
        Dates(rows).caption,
        panels,
        [],
        table(
            ["", *(title for title, _, _ in PROCESS)],
            (
                [hosts_word(count), *(form(values[key]) for _, key, form in PROCESS)]
                for count, values in medians.items()
            ),
        ),
    )


def boot(data: dict[str, Any]) -> Section | None:
    """Machines that boot; `benchmarks.boots` measures them."""
    boots = data.get("boots")
    if not boots:
        return None
    run, taken = run_of(data, boots), boots["seconds"]
    rows = {name: Row(run, times, 1.0) for name, times in taken.items()}
    nspawn = Row(run, taken[NSPAWN], ratio(taken[NSPAWN], taken["create"]))
    compared = ratio(taken["create"], taken[NSPAWN])
    bars, lines = [], []
    for name, row in rows.items():
        bar = contender(name, nspawn, "", Dates([row])) if name == NSPAWN else None
        bars.append(bar or Bar(name, row.median, seconds(row.median), kind="own"))
        beside = {"create": f"{compared:.2f}x", NSPAWN: "1x"}.get(name, "")
        lines.append([f"`{name}`", seconds(row.median), beside])
    idle = f"{boots['memory']:.0f} MiB"
    lines.append(["memory of an idle machine, with its supervisor", idle, ""])
    return Section(
        "boot",
        "How long does a machine take to boot?",
        f"`create` takes {seconds(rows['create'].median)}, {compared:.2f} times as long as "
        f"`{NSPAWN}` of the same root file system. The goal of at most {OVER_NSPAWN:g} is "
        f"{'met' if compared <= OVER_NSPAWN else 'missed'}. An idle machine uses {idle}.",
        f"Medians of {boots['rounds']} rounds on {run['date']}.",
        [Panel("", [Group("", bars)])],
        [],
        table(["", "time", "compared with systemd-nspawn"], lines),
    )
