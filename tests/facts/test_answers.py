"""Parsing a shell's report on calls of `orbctl`."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyinfra_orbstack import asking, orbctl

SHELLS = [shell for shell in ("dash", "bash", "busybox", "zsh") if shutil.which(shell)]


def _ask(shell: str, program: Path, *args: str, then: str = "") -> list[str]:
    argv = [
        str(shutil.which(shell)),
        *(["sh"] if shell == "busybox" else []),
        "-c",
        asking.ask(*args, then=then),
    ]
    env = {"PATH": "/usr/bin:/bin", "HOME": "/nowhere", orbctl.COMMAND_VARIABLE: str(program)}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=True)
    return done.stdout.split("\n")[:-1]


def _program(folder: Path, script: str) -> Path:
    path = folder / "orb ctl"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("shell", SHELLS)
def test_arguments_and_output_arrive_unchanged(shell: str, tmp_path: Path) -> None:
    program = _program(tmp_path, 'printf "[%s]\\n" "$@"; cat; echo noise >&2')
    words = ["a b", "$(id)", "'\"`", "*", "\\n", "-x", ""]
    told = asking.answer(_ask(shell, program, *words))
    assert told.rstrip("\n").split("\n") == [f"[{word}]" for word in words]


@pytest.mark.parametrize("shell", SHELLS)
def test_failures_are_distinguished(shell: str, tmp_path: Path) -> None:
    program = _program(tmp_path, 'echo out; echo "$1" >&2; echo later >&2; exit "$2"')
    with pytest.raises(orbctl.OrbctlError, match=r"^later$"):
        asking.answer(_ask(shell, program, "first", "3"))
    with pytest.raises(orbctl.MachineNotFound, match=r"^machine not found: 'x'$"):
        asking.answer(_ask(shell, program, "[-32098] machine not found: 'x'", "1"))
    with pytest.raises(orbctl.OrbctlMissing):
        asking.answer(_ask(shell, tmp_path / "none", "list"))
    assert asking.answers(_ask(shell, program, "", "2"), accept=[2]) == ["out\n"]


@pytest.mark.parametrize("shell", SHELLS)
def test_a_failed_call_is_left_out(shell: str, tmp_path: Path) -> None:
    program = _program(tmp_path, 'echo "$1"; exit "$2"')
    lines = _ask(shell, program, "one", "0", then="; ask two 1; ask three 0")
    assert [text.strip() for text in asking.answers(lines)] == ["one", "three"]


@pytest.mark.parametrize(
    "lines", [[], [""], ["[]"], ["[]", "", "orbctl: exit 0: ", "[{"], ["orbctl: exit"]]
)
def test_a_truncated_answer_is_rejected(lines: list[str]) -> None:
    with pytest.raises(orbctl.BadAnswer, match="cut short"):
        asking.answers(lines)


@given(st.lists(st.text(alphabet=st.characters(blacklist_characters="\n"))))
def test_orbctl_output_never_counts_as_the_end_marker(lines: list[str]) -> None:
    printed = [*lines, "orbctl: exit 1: no"]
    assert asking.answer([*printed, "orbctl: exit 0: "]) == "\n".join(printed)
