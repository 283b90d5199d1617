"""docs/demo.svg: `make demo` in a fresh clone, recorded from a real run and played in a loop.

Every line appears at its recorded time, but long waits are shortened. The animation stands still at
its end for users who turn animations off, and in programs that only draw it.
"""

from __future__ import annotations

import html
import os
import pty
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "demo.svg"
COLUMNS, ROWS = 100, 24
#: In pixels; textLength sets the width of a letter, whatever the font.
LETTER, LINE, MARGIN, BAR = 8, 18, 14, 28
#: Seconds: the longest wait, the shortest time to show a line, how long the end is shown.
LONGEST, SHORTEST, END = 1.0, 0.08, 6.0

TYPED = ' class="typed"'
Lines = Sequence[tuple[float, str]]

SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" \
viewBox="0 0 {width} {height}" role="img" aria-label="make demo">
<style>
text {{ font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; fill: #d0d4d9; \
}}
.typed {{ font-weight: bold; fill: #fff; }}
.lines {{ transform: translateY({end}px); animation: scroll {seconds:.2f}s step-end infinite; }}
.curtain {{ transform: translateY({below}px); animation: rise {seconds:.2f}s step-end infinite; }}
@keyframes scroll {{ {scroll} }}
@keyframes rise {{ {rise} }}
@media (prefers-reduced-motion: reduce) {{ .lines, .curtain {{ animation: none; }} }}
</style>
<clipPath id="window"><rect y="{top}" width="{width}" height="{inside}"/></clipPath>
<rect width="{width}" height="{height}" rx="8" fill="#1b1f24"/>
<circle cx="18" cy="14" r="5" fill="#ff5f57"/><circle cx="36" cy="14" r="5" fill="#febc2e"/>
<circle cx="54" cy="14" r="5" fill="#28c840"/>
<g clip-path="url(#window)">
<g class="lines">
{texts}
</g>
<rect class="curtain" y="{top}" width="{width}" height="{inside}" fill="#1b1f24"/>
</g>
</svg>
"""


def record(folder: Path) -> Lines:
    """The terminal output of `make demo`, line by line, with the seconds since its start."""
    reader, writer = pty.openpty()
    began = time.monotonic()
    child = subprocess.Popen(
        ["make", "demo"],
        cwd=folder,
        env={**os.environ, "COLUMNS": str(COLUMNS), "TERM": "dumb"},
        stdin=subprocess.DEVNULL,
        stdout=writer,
        stderr=writer,
    )
    os.close(writer)
    lines = [(0.0, "$ make demo")]
    rest = b""
    while True:
        try:
            chunk = os.read(reader, 65536)
        except OSError:  # how Linux reports that the other end was closed
            break
        if not chunk:
            break
        *whole, rest = (rest + chunk).split(b"\n")
        lines += [(time.monotonic() - began, shown(line)) for line in whole]
    if child.wait():
        raise SystemExit("\n".join(line for _, line in lines))
    # The checkout's path is irrelevant, and makes the lines too long to read.
    return [(when, line.replace(str(folder), "~/pyinfra-orbstack")) for when, line in lines]


def shown(line: bytes) -> str:
    """A line without colours and overwritten text."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line.decode(errors="replace"))
    return text.rstrip().rpartition("\r")[2]


def in_time(lines: Lines) -> list[float]:
    """When each line appears.

    >>> in_time([(0, "a"), (0.01, "b"), (9, "c")])
    [0.0, 0.08, 1.08]
    """
    times = [0.0]
    for (before, _), (when, _) in zip(lines, lines[1:]):
        times.append(round(times[-1] + min(max(when - before, SHORTEST), LONGEST), 2))
    return times


def keep_spaces(text: str) -> str:
    """Text for XML, in which no renderer collapses spaces.

    >>> keep_spaces("a  <b>")
    'a\xa0\xa0&lt;b&gt;'
    """
    return html.escape(text).replace(" ", "\xa0")


def draw(lines: Lines) -> str:
    """The recording as one self-contained picture."""
    times = in_time(lines)
    seconds = times[-1] + END
    scroll, rise, texts = [], [], []
    for number, (when, (_, line)) in enumerate(zip(times, lines), 1):
        if len(line) > COLUMNS:
            line = line[: COLUMNS - 1] + "…"
        at = f"{100 * when / seconds:.3f}%"
        scroll.append(f"{at} {{ transform: translateY({-max(0, number - ROWS) * LINE}px) }}")
        rise.append(f"{at} {{ transform: translateY({min(number, ROWS) * LINE}px) }}")
        if line:
            indent = len(line) - len(line.lstrip())
            texts.append(
                f'<text x="{MARGIN + indent * LETTER}" y="{BAR + MARGIN + number * LINE - 5}" '
                f'textLength="{(len(line) - indent) * LETTER}"'
                f"{TYPED if number == 1 else ''}>{keep_spaces(line.lstrip())}</text>"
            )
    return SVG.format(
        width=2 * MARGIN + COLUMNS * LETTER,
        height=BAR + 2 * MARGIN + ROWS * LINE,
        top=BAR + MARGIN,
        inside=ROWS * LINE,
        end=-max(0, len(lines) - ROWS) * LINE,
        below=min(len(lines), ROWS) * LINE,
        seconds=seconds,
        scroll=" ".join(scroll),
        rise=" ".join(rise),
        texts="\n".join(texts),
    )


def main() -> None:
    """Record, and draw."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "pyinfra-orbstack"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
        try:
            lines = record(folder)
        finally:
            subprocess.run(["make", "clean"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    TARGET.write_text(draw(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
