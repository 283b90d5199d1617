"""Calling `orbctl` as a script would: words in, bytes and an exit code out."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Answer(NamedTuple):
    code: int
    out: bytes
    err: bytes

    @property
    def text(self) -> str:
        """Its output, for a command that must succeed."""
        assert self.code == 0, self
        return self.out.decode()

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @property
    def json(self) -> Any:
        return json.loads(self.text)


class Program:
    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self.command, self.env = list(command), dict(env)

    def started(
        self,
        *words: str | bytes,
        env: Mapping[str, str] | None = None,
        cwd: Path | str | None = None,
        stdin: Any = subprocess.DEVNULL,
        **options: Any,
    ) -> subprocess.Popen[bytes]:
        """Start the program without waiting for it."""
        return subprocess.Popen(
            [*self.command, *words],
            env={**self.env, **(env or {})},
            cwd=cwd,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **options,
        )

    def __call__(
        self, *words: str | bytes, stdin: bytes = b"", timeout: float = 100, **options: Any
    ) -> Answer:
        process = self.started(*words, stdin=subprocess.PIPE, **options)
        try:
            out, err = process.communicate(stdin, timeout)
        finally:
            process.kill()
            process.wait()
        return Answer(process.returncode, out, err)

    def on_terminal(
        self,
        *words: str,
        typed: bytes = b"",
        prompt: bytes = b"ready",
        stdin: Any = None,
        env: Mapping[str, str] = {},
    ) -> Answer:
        """Run the program on a terminal of 40 lines and 120 columns, with both outputs combined."""
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        process = subprocess.Popen(
            [*self.command, *words],
            env={**self.env, **env},
            stdin=theirs if stdin is None else stdin,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        seen, deadline = b"", time.monotonic() + 60
        while time.monotonic() < deadline:
            if typed and prompt in seen:
                os.write(ours, typed)
                typed = b""
            if select.select([ours], [], [], 0.1)[0]:
                try:
                    data = os.read(ours, 65536)
                except OSError:  # Linux's error when the terminal's other side is closed
                    break
                if not data:
                    break
                seen += data
        with contextlib.suppress(OSError):
            os.close(ours)
        return Answer(process.wait(10), seen, b"")
