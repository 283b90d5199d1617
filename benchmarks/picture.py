"""Bars as SVG, with the time at each and the ratio beside it.

The text is as large as that of a page on which the picture is 700 pixels wide. Pictures have a
background of their own, so they can be read on any page.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

WIDTH = 700
MARGIN = 16
FONT = 17
#: Width of a character, for placing text: an average of what browsers use.
CHARACTER = 9
BAR, ROW = 20, 28
#: Colours by class, on a light page and on a dark one.
COLOURS = {
    "ink": ("#1f2328", "#e6e8ee"),
    "loss": ("#b34700", "#ffa657"),
    "quiet": ("#59636e", "#9da7b3"),
    "card": ("#ffffff", "#1e2129"),
    "rule": ("#d0d7de", "#3d444d"),
    "own": ("#2f6fde", "#6f9dff"),
    "other": ("#8b949e", "#7d8590"),
    "part": ("#8b949e", "#7d8590"),
    "faster": ("#d9730d", "#f0883e"),
}


class Bar(NamedTuple):
    """A time, and what is written beside its bar.

    Attributes:
        label: What is written before it.
        value: Its length, in any unit.
        text: What is written behind it: the time.
        ratio: The ratio, if there is one.
        note: A remark behind the ratio.
        kind: `own`, `other`, or `faster` for what beats our own.
        lost: Whether the ratio is not in our favour.
        part: How much of it, from its beginning, is shown as not our own.
    """

    label: str
    value: float
    text: str
    ratio: str = ""
    note: str = ""
    kind: str = "other"
    lost: bool = False
    part: float = 0.0


class Group(NamedTuple):
    """Bars under a title, which may be empty."""

    title: str
    bars: Sequence[Bar]


class Panel(NamedTuple):
    """Groups of bars that have the same scale, under a title, which may be empty."""

    title: str
    groups: Sequence[Group]


def draw(title: str, panels: Sequence[Panel], legend: Sequence[tuple[str, str]] = ()) -> str:
    """A picture of bars.

    Args:
        title: The question that it answers.
        panels: The bars.
        legend: Kinds of bars, and what they mean.

    >>> text = draw("Why?", [Panel("", [Group("one", [Bar("a", 1, "1 s"), Bar("b", 2, "2 s")])])])
    >>> text.count('class="other"'), text.count("<svg")
    (2, 1)
    """
    all_bars = [bar for panel in panels for group in panel.groups for bar in group.bars]
    left = 2 * MARGIN + CHARACTER * max(len(bar.label) for bar in all_bars)
    room = WIDTH - left - MARGIN
    lines: list[str] = []
    y = MARGIN
    if legend:
        y += ROW
        x = MARGIN
        for kind, text in legend:
            lines.append(_box(kind, x, y - 14, 16, 16))
            lines.append(_text(x + 24, y, text))
            x += 24 + CHARACTER * len(text) + 24
        y += 8
    for number, panel in enumerate(panels):
        if number:
            y += 14
            lines.append(
                f'<rect class="rule" x="{MARGIN}" y="{y}" width="{WIDTH - 2 * MARGIN}" height="1"/>'
            )
        if panel.title:
            y += ROW + 2
            lines.append(_text(MARGIN, y, panel.title, 'font-size="20" font-weight="bold"'))
            y += 6
        scale = _scale(panel, room)
        for group in panel.groups:
            if group.title:
                y += ROW + 2
                lines.append(_text(MARGIN, y, group.title, 'font-weight="bold"'))
                y += 6
            for bar in group.bars:
                lines += _row(bar, left, y, scale)
                y += ROW
    height = y + MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            f'width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="{FONT}">',
            f"  <title>{escape(title)}</title>",
            f"  <style>{_style()}</style>",
            f'  <rect class="card" width="{WIDTH}" height="{height}" rx="8"/>',
            *(f"  {line}" for line in lines),
            "</svg>\n",
        ]
    )


def _style() -> str:
    light, dark = (
        " ".join(f".{name} {{ fill: {both[number]} }}" for name, both in COLOURS.items())
        for number in (0, 1)
    )
    return f"\n    {light}\n    @media (prefers-color-scheme: dark) {{ {dark} }}\n  "


def _scale(panel: Panel, room: int) -> float:
    """Pixels of one unit, such that all bars fit with their text."""
    scales = []
    for group in panel.groups:
        for bar in group.bars:
            letters = len(bar.text) + 1.1 * len(bar.ratio) + len(bar.note)
            if bar.value > 0:
                scales.append((room - 26 - CHARACTER * letters) / bar.value)
    return max(0.0, min(scales, default=0.0))


def _row(bar: Bar, left: int, y: int, scale: float) -> Iterator[str]:
    base = y + 20
    yield _text(left - 10, base, bar.label, 'text-anchor="end"')
    width = max(2.0, bar.value * scale)
    yield _box(bar.kind, left, y + (ROW - BAR) / 2, width, BAR)
    if bar.part:
        yield _box("part", left, y + (ROW - BAR) / 2, min(width, bar.part * scale), BAR)
    spans = [escape(bar.text)]
    if bar.ratio:
        loss = ' class="loss"' if bar.lost else ""
        spans.append(f'<tspan dx="9" font-weight="bold"{loss}>{escape(bar.ratio)}</tspan>')
    if bar.note:
        spans.append(f'<tspan dx="9" class="quiet">{escape(bar.note)}</tspan>')
    yield f'<text class="ink" x="{left + width + 8:.1f}" y="{base}">{"".join(spans)}</text>'


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text class="ink" x="{x}" y="{y}"{" " if more else ""}{more}>{escape(text)}</text>'


def _box(kind: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{kind}" x="{x}" y="{y:g}" width="{width:.1f}" height="{height}" rx="2"/>'
