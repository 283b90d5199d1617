"""rsync's remote shell: starts the server in a target, and copies data between it and the client.

rsync runs this file as `rsync_shell.py HOST WORD...`. It uses the standard library only, so that it
starts quickly.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import subprocess
import sys
import threading

#: Contains, as JSON, the command line that reaches the target, the line to send there first, and
#: the destination.
VARIABLE = "PYINFRA_ORBSTACK_RSYNC"
#: Stands for the destination on rsync's own command line. Old versions of rsync pass it on as text
#: for a shell, newer ones escape it in their own way, and this word is the same in all of them.
DESTINATION = "destination"
#: Begins the input of the command in the target: shell text that runs the first line after it,
#: which is octal numbers.
SERVER = b'IFS= read -r orb_words && eval "$(printf "$orb_words")";'
CHUNK = 65536


def main() -> int:
    """Run the server and return its exit status."""
    argv, first, destination = json.loads(os.environ.pop(VARIABLE))
    *words, last = sys.argv[2:]
    if last != DESTINATION:
        print(
            "rsync must not send its arguments as input: remove -s (--protect-args, "
            "--secluded-args) from flags",
            file=sys.stderr,
        )
        return 1
    mark = secrets.token_hex(16)
    # Any remote shell joins the words, and rsync has prepared them for that.
    command = os.fsencode(f"echo {mark}; {' '.join(words)} ")
    command += shlex.quote(destination).encode("utf-8", "surrogateescape")
    start = b"%s\n%s%s\n" % (first.encode(), SERVER, octal(command))
    # rsync leaves this pipe non-blocking unless its remote shell is rsh.
    os.set_blocking(1, True)
    server = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    # rsync closes our input only after this process has ended.
    threading.Thread(target=feed, args=(server, start), daemon=True).start()
    with contextlib.suppress(BrokenPipeError):
        answer(server, mark.encode() + b"\n")
    os.close(1)
    status = server.wait()
    return 128 - status if status < 0 else status


def octal(data: bytes) -> bytes:
    """``data`` as a `printf` format in one line."""
    return b"".join(b"\\%03o" % byte for byte in data)


def feed(server: subprocess.Popen[bytes], piece: bytes) -> None:
    """Pass on a first piece and all of our input, until one side closes."""
    assert server.stdin is not None
    with contextlib.suppress(BrokenPipeError), server.stdin as pipe:
        while piece:
            write(pipe.fileno(), piece)
            piece = os.read(0, CHUNK)


def answer(server: subprocess.Popen[bytes], mark: bytes) -> None:
    """Pass on the server's output, without what others print before it begins."""
    assert server.stdout is not None
    stray = b""
    while mark not in stray:
        piece = os.read(server.stdout.fileno(), CHUNK)
        stray += piece
        if not piece or len(stray) > CHUNK:
            write(2, stray[:CHUNK])
            return
    piece = stray.partition(mark)[2] or os.read(server.stdout.fileno(), CHUNK)
    while piece:
        write(1, piece)
        piece = os.read(server.stdout.fileno(), CHUNK)


def write(fd: int, data: bytes) -> None:
    """Write all of ``data``."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


if __name__ == "__main__":
    # The other thread may still wait.
    os._exit(main())
