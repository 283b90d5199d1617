"""An executable between the connector and `orbctl` or docker; its fault file says how to misbehave.

`proxy.py FOLDER REAL... -- ARGUMENTS...`: the file FOLDER/fault contains the subcommand to
disturb, and one of these faults:

- `exit N [TEXT]`: prints TEXT on stderr and exits with N.
- `print TEXT`: prints TEXT on stdout and exits with 0.
- `hang`: never answers.
- `cut-in N CODE`, `cut-out N CODE`, `cut-err N CODE`: passes N bytes of that stream, then kills the
  real client and exits with CODE.
- `stray N`: prints N bytes on stdout before anything else.
- `spinner`: prints a spinner on stderr.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from pathlib import Path


def relay(argv: list[str], limits: dict[int, int], code: int) -> int:
    """Run the real client, passing on at most this many bytes of each stream."""
    pipes = subprocess.PIPE
    real = subprocess.Popen(argv, stdin=pipes, stdout=pipes, stderr=pipes)
    assert real.stdin
    assert real.stdout
    assert real.stderr
    routes = {0: real.stdin.fileno(), real.stdout.fileno(): 1, real.stderr.fileno(): 2}
    number = {0: 0, real.stdout.fileno(): 1, real.stderr.fileno(): 2}
    while len(routes) > (0 in routes):
        for source in select.select(list(routes), [], [])[0]:
            data = os.read(source, 65536)
            left = limits.get(number[source])
            if left is not None:
                data, limits[number[source]] = data[:left], left - len(data)
            try:
                os.write(routes[source], data)
            except BrokenPipeError:
                data = b""
            if left is not None and limits[number[source]] <= 0:
                real.kill()
                return code
            if not data:
                target = routes.pop(source)
                if source == 0:
                    os.close(target)
                    real.stdin = None
    return real.wait()


def main() -> int:
    folder = Path(sys.argv[1])
    dashes = sys.argv.index("--")
    real, given = sys.argv[2:dashes], sys.argv[dashes + 1 :]
    argv = [*real, *given]
    with (folder / "calls").open("a") as calls:
        calls.write(given[0] + "\n")
    try:
        verb, fault, *words = (folder / "fault").read_text().split(maxsplit=3)
    except (FileNotFoundError, ValueError):
        verb, fault, words = "", "", []
    if verb not in (given[0], "any"):
        os.execv(argv[0], argv)
    if fault == "once":
        (folder / "fault").unlink()
        fault, *words = " ".join(words).split(maxsplit=2)
    if fault == "exit":
        print(" ".join(words[1:]), file=sys.stderr)
        return int(words[0])
    if fault == "print":
        print(" ".join(words))
        return 0
    if fault == "hang":
        time.sleep(600)
    if fault == "spinner":
        print("\x1b[?25l⠋ Starting...\r⠙ Starting...\x1b[?25h", file=sys.stderr)
    if fault == "stray":
        os.write(1, b"x" * int(words[0]))
    if fault.startswith("cut-"):
        stream = {"cut-in": 0, "cut-out": 1, "cut-err": 2}[fault]
        return relay(argv, {stream: int(words[0])}, int(words[1]))
    os.execv(argv[0], argv)


if __name__ == "__main__":
    sys.exit(main())
