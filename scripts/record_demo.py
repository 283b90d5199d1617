"""docs/demo.svg: what `make demo` prints, recorded from a real run in a fresh clone."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "demo.svg"
WIDTH = 100


def record(folder: Path) -> str:
    """What a terminal would show of `make demo`."""
    reader, writer = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(WIDTH), "TERM": "xterm-256color"}
    child = subprocess.Popen(
        ["make", "demo"],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=writer,
        stderr=writer,
    )
    os.close(writer)
    said = b""
    while True:
        try:
            chunk = os.read(reader, 65536)
        except OSError:  # Linux's way to say that the other end was closed
            break
        if not chunk:
            break
        said += chunk
    if child.wait():
        raise SystemExit(said.decode(errors="replace"))
    return said.decode(errors="replace").replace("\r\n", "\n")


def main() -> None:
    """Record, and draw."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "pyinfra-orbstack"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
        try:
            said = record(folder)
        finally:
            subprocess.run(["make", "clean"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    # Where the checkout lay is nobody's business, and makes the lines too long to be read.
    said = said.replace(str(folder), "~/pyinfra-orbstack")
    # A full line and its end count once.
    console = Console(record=True, width=WIDTH, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    console.print(Text("$ make demo", style="bold"))
    for line in said.rstrip().split("\n"):
        shown = Text.from_ansi(re.sub(r"[ \t]+$", "", line))
        shown.truncate(WIDTH, overflow="ellipsis")
        console.print(shown)
    svg = console.export_svg(title="make demo", unique_id="demo")
    # Nothing is fetched from elsewhere when it is looked at.
    svg = re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    TARGET.write_text("\n".join(line.rstrip() for line in svg.split("\n")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
