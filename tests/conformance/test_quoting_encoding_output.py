"""Sections Q, U and O: input and output are exact."""

from __future__ import annotations

import gc
import io
import os
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from .conftest import Guest, Remote


def echo(remote: Remote, *words: str) -> str:
    """The output of `printf` for arguments that were quoted once."""
    return remote.out("printf '<%s>' " + " ".join(map(shlex.quote, words)))


@pytest.mark.smoke
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["it's", "'", "''"], id="Q1_single_quotes"),
        pytest.param(['say "hi"', '"'], id="Q2_double_quotes"),
        pytest.param(["a\\b", "\\", "\\\\n", "\\'"], id="Q3_backslashes"),
        pytest.param(["$HOME $(id) `id` ${x}"], id="Q4_expansions"),
        pytest.param(["a\nb", "\n"], id="Q5_newline"),
        pytest.param(["-n", "--help", "-"], id="Q6_leading_dash"),
        pytest.param(["", "x", ""], id="Q7_empty"),
        pytest.param(["*", "?[a-z]", "~", "{a,b}"], id="Q8_globs"),
        pytest.param(["hi!", "!!", "!$"], id="Q9_exclamation_mark"),
    ],
)
def test_words(remote: Remote, words: list[str]) -> None:
    assert echo(remote, *words) == "".join(f"<{word}>" for word in words)


@pytest.mark.smoke
def test_Q10_long_arguments(remote: Remote) -> None:
    for length in (4_000, 120 * 1024):
        assert remote.out(f"x={'y' * length}; echo ${{#x}}") == str(length)
    with pytest.raises(OSError, match="upload it as a file"):
        remote.run("true " + "y" * 200 * 1024)
    assert remote.out("echo on") == "on"


def test_Q11_unbalanced_quote(remote: Remote) -> None:
    remote.exits("echo 'open", 2)
    assert remote.out("echo on") == "on"


def test_Q12_unterminated_here_document(remote: Remote) -> None:
    assert remote.run("cat <<END\ntext").out == ["text"]


def test_Q14_comment_at_the_end(remote: Remote) -> None:
    assert remote.out("echo text # comment") == "text"


def test_U1_cjk_and_emoji(remote: Remote) -> None:
    assert echo(remote, "日本語 🦀 ñ ß") == "<日本語 🦀 ñ ß>"


@pytest.mark.smoke
def test_U2_latin1_is_visible(remote: Remote) -> None:
    ran = remote.run(r"printf 'caf\351 noir\nnext\n'; exit 3", _success_exit_codes=[3])
    assert ran == (True, ["caf\ufffd noir", "next"], [])


def test_U3_latin1_then_much(remote: Remote) -> None:
    ran = remote.run(r"printf '\351\n'; head -c 300000 /dev/zero | tr '\0' x")
    assert ran.out == ["\ufffd", "x" * 300_000]


def test_U4_file_names_that_are_not_utf8(remote: Remote, guest: Guest) -> None:
    name = os.fsdecode(b"/tmp/caf\xe9")
    remote.put(io.BytesIO(b"content"), name)
    assert guest.sh('cat "$(printf "/tmp/caf\\351")"') == b"content"
    arrived = io.BytesIO()
    remote.get(name, arrived)
    assert arrived.getvalue() == b"content"
    guest.sh('rm "$(printf "/tmp/caf\\351")"')


@pytest.mark.parametrize(
    "locale",
    [
        pytest.param("C", id="U6_c_locale"),
        pytest.param("en_US.ISO-8859-15", id="U7_latin9_locale"),
    ],
)
def test_guest_locale(remote: Remote, locale: str) -> None:
    assert echo(remote, "é€") == "<é€>"
    printed = remote.out("printf '%s' é; printf '%s' \"$LC_ALL\"", _env={"LC_ALL": locale})
    assert printed == f"é{locale}"


def test_U7_latin9_guest(
    machines: Any, base: str, client: Any, connect: Callable[..., Remote]
) -> None:
    name = machines.clone(base)
    Guest(client, name).sh("printf 'LANG=en_US.ISO-8859-15\\n' >/etc/default/locale")
    remote = connect(name)
    assert echo(remote, "é€") == "<é€>"
    data = bytes(range(256))
    remote.put(io.BytesIO(data), "all")
    arrived = io.BytesIO()
    remote.get("all", arrived)
    assert arrived.getvalue() == data


def test_U8_nul_bytes(remote: Remote) -> None:
    assert remote.out(r"printf 'a\0b'") == "a\0b"
    with pytest.raises(OSError, match="NUL"):
        remote.run("echo a\0b")


@pytest.mark.smoke
def test_U9_all_bytes(remote: Remote) -> None:
    printed = remote.out("cat", _stdin=bytes(range(256)))
    assert printed == bytes(range(256)).decode("utf-8", "replace")


def test_U12_colours(remote: Remote) -> None:
    assert remote.out(r"printf '\033[31mred\033[0m\r'") == "\x1b[31mred\x1b[0m\r"


def test_O1_nothing(remote: Remote) -> None:
    assert remote.run("true") == (True, [], [])


@pytest.mark.smoke
def test_O2_no_newline_at_the_end(remote: Remote) -> None:
    assert remote.run("printf a; printf b >&2") == (True, ["a"], ["b"])


def test_O3_only_newlines(remote: Remote) -> None:
    assert remote.run(r"printf '\n\n'; printf '\n' >&2") == (True, ["", ""], [""])


@pytest.mark.smoke
def test_O4_three_mebibytes(remote: Remote) -> None:
    ran = remote.run("head -c 3145728 /dev/zero | tr '\\0' x")
    assert [len(line) for line in ran.out] == [3145728]


def test_O5_much_output_in_bounded_memory(one: Remote) -> None:
    """Downloads are not buffered: 100 MiB need less than 40 MiB of extra memory."""
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    one.run("head -c 104857600 /dev/zero >/tmp/much")
    with open(os.devnull, "wb") as nowhere:
        one.get("/tmp/much", nowhere)
    one.run("rm /tmp/much")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 40 * 1024 * (1024 if sys.platform == "darwin" else 1)


def test_O7_much_on_stderr(remote: Remote) -> None:
    ran = remote.run("head -c 10485760 /dev/zero | tr '\\0' x >&2")
    assert ran.out == []
    assert [len(line) for line in ran.err] == [10485760]


def test_O8_interleaved_lines_keep_their_order(remote: Remote) -> None:
    ran = remote.run("i=0; while [ $i -lt 1000 ]; do echo $i; echo $i >&2; i=$((i+1)); done")
    assert ran.out == ran.err == [str(number) for number in range(1000)]


def test_O10_stdout_closed_by_the_command(remote: Remote) -> None:
    assert remote.run("echo a; exec >&-; sleep 0.1; echo b >&2") == (True, ["a"], ["b"])


def test_O12_lines_are_shown_immediately(machine: str) -> None:
    text = "echo first; sleep 2; echo second; echo err >&2"
    seen = {}
    with pyinfra(machine, text, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as running:
        assert running.stderr is not None
        for line in running.stderr:
            for word in (b"first", b"second", b"err"):
                if line.split()[1:] == [word]:
                    seen[word] = time.monotonic()
    assert seen[b"second"] - seen[b"first"] > 1
    assert b"err" in seen


def pyinfra(machine: str, text: str, **options: Any) -> subprocess.Popen[bytes]:
    command = os.path.join(os.path.dirname(sys.executable), "pyinfra")
    return subprocess.Popen([command, "-y", f"@orbstack/{machine}", "exec", "--", text], **options)


def test_O14_a_consumer_that_exits(machine: str) -> None:
    """If pyinfra's output goes to a process that exits early, pyinfra exits too."""
    out = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with pyinfra(machine, "seq 1 100000", **out) as running:
        assert running.stderr is not None
        running.stderr.readline()
        running.stderr.close()
        assert running.wait(timeout=60) is not None
