"""The exchange as bytes, cut anywhere, with anything missing or malformed."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyinfra_orbstack import protocol
from pyinfra_orbstack.process import STDERR, STDOUT
from pyinfra_orbstack.protocol import (
    PIPES,
    TERMINAL,
    Began,
    Exchange,
    Hello,
    Line,
    MarkedStream,
    OutcomeUnknown,
    Output,
    Process,
    Stray,
)

SHELLS = [
    words for words in (["dash"], ["bash", "--posix"], ["busybox", "sh"]) if shutil.which(words[0])
]
PLACES = st.lists(st.integers(min_value=0), max_size=20)
STAT = b"7 (sh) S 1 7 7 0 -1 4 0 0 0 0 0 0 0 0 20 0 1 0 1234 9"


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in zip(edges, edges[1:])]


def said(exchange: Exchange, *lines: str) -> bytes:
    return b"".join(f"{exchange.token} {line}\n".encode() for line in lines)


def report(exchange: Exchange, stream: int, status: int = 0) -> bytes:
    """The control shell's report after a command."""
    return said(exchange, f"status {status}", "copied 0", "end")


@given(
    parts=st.lists(st.one_of(st.binary(max_size=60), st.integers(0, 999)), max_size=8),
    places=PLACES,
)
def test_text_and_lines_are_unchanged(parts: list[bytes | int], places: list[int]) -> None:
    token = b"0123456789abcdef" * 2
    data = b"".join(
        token + b" line %d\n" % part if isinstance(part, int) else part for part in parts
    )
    stream = MarkedStream(token)
    found = [one for piece in cut(data, places) for one in stream.feed(piece)]
    lines = [Line(b"line", b"%d" % part) for part in parts if isinstance(part, int)]
    assert [one for one in found if isinstance(one, Line)] == lines
    text = b"".join(part for part in parts if isinstance(part, bytes))
    assert b"".join(one for one in found if isinstance(one, bytes)) + stream.release() == text


@given(st.binary(max_size=100), PLACES)
def test_only_a_possible_token_is_held_back(data: bytes, places: list[int]) -> None:
    token = b"abcab"
    stream = MarkedStream(token)
    passed = b"".join(
        one for piece in cut(data, places) for one in stream.feed(piece) if isinstance(one, bytes)
    )
    if token in data:
        assert passed.startswith(data[: data.index(token)])
    else:
        assert token.startswith(data[len(passed) :])
        assert passed + stream.release() == data


@given(
    before=st.binary(max_size=50),
    body=st.binary(max_size=200),
    after=st.binary(max_size=50),
    status=st.integers(0, 255),
    places=PLACES,
    kind=st.sampled_from([PIPES, TERMINAL]),
)
def test_output_and_status_arrive_complete(
    before: bytes,
    body: bytes,
    after: bytes,
    status: int,
    places: list[int],
    kind: tuple[int, ...],
) -> None:
    exchange = Exchange(kind)
    for stream in kind:
        begin = f"begin {STAT.decode()}" if stream == STDOUT else "begin"
        data = before + said(exchange, begin) + body + said(exchange, f"status {status}") + after
        if kind == PIPES:
            data += said(exchange, "copied 0")
        events = [
            event
            for piece in cut(data + said(exchange, "end") + b"rest", places)
            for event in exchange.receive(stream, piece)
        ]
        outputs = [event for event in events if isinstance(event, Output)]
        assert {event.stream for event in outputs} <= {stream}
        assert b"".join(event.data for event in outputs) == body + after
        assert b"".join(one.data for one in events if isinstance(one, Stray)) == before
        began = [event for event in events if isinstance(event, Began)]
        assert began == ([Began(Process(7, 1, 7, 7, 1234))] if stream == STDOUT else [])
        assert exchange.has_ended(stream)
    assert exchange.finished
    assert exchange.stray == len(before) * len(kind)
    assert exchange.outcome() == status


def test_tokens_of_earlier_exchanges_are_output() -> None:
    earlier, exchange = Exchange(), Exchange()
    for stream in PIPES:
        body = said(earlier, "begin", "status 0", "copied 0", "end")
        data = said(exchange, "begin") + body + report(exchange, stream, 3)
        assert exchange.receive(stream, data)[-1] == Output(stream, body)
    assert exchange.outcome() == 3


#: Everything that a success requires, by stream.
WHOLE = {STDOUT: ["status 0", "input 0", "copied 0"], STDERR: ["status 0", "copied 0"]}


def outcome(reports: dict[int, list[str]]) -> int:
    exchange = Exchange()
    for stream, lines in reports.items():
        exchange.receive(stream, said(exchange, "begin", *lines, "end"))
    assert exchange.finished
    return exchange.outcome()


def test_a_whole_report_is_a_success() -> None:
    assert outcome(WHOLE) == 0


@pytest.mark.parametrize("stream", PIPES)
@pytest.mark.parametrize("word", ["status", "copied"])
@pytest.mark.parametrize(
    "lines",
    [[], ["{}"], ["{} "], ["{} 0", "{} 0"], ["{} 256"], ["{} -1"], ["{} 0 0"], ["{} x"], ["{} ٣"]],
    ids=["missing", "empty", "blank", "twice", "256", "negative", "two", "letter", "digit"],
)
def test_a_malformed_report_is_an_error(stream: int, word: str, lines: list[str]) -> None:
    reports = {key: list(value) for key, value in WHOLE.items()}
    reports[stream].remove(f"{word} 0")
    reports[stream] += [line.format(word) for line in lines]
    with pytest.raises(OutcomeUnknown, match="outcome is unknown"):
        outcome(reports)


@pytest.mark.parametrize("status", [1, 127, 137, 141])
@pytest.mark.parametrize("stream", PIPES)
def test_a_failed_copy_is_an_error(stream: int, status: int) -> None:
    reports = {key: list(value) for key, value in WHOLE.items()}
    reports[stream].remove("copied 0")
    reports[stream].append(f"copied {status}")
    with pytest.raises(OutcomeUnknown, match=r"copying its (stdout|stderr) failed"):
        outcome(reports)


def test_two_differing_streams_are_an_error() -> None:
    with pytest.raises(OutcomeUnknown, match="exit status did not arrive"):
        outcome({**WHOLE, STDERR: ["status 1", "copied 0"]})


def test_a_command_need_not_read_its_stdin() -> None:
    for status in (1, 141):
        assert outcome({**WHOLE, STDOUT: ["status 0", f"input {status}", "copied 0"]}) == 0
    for written in ("137", "143", ""):
        with pytest.raises(OutcomeUnknown, match="stdin was not completely written"):
            outcome({**WHOLE, STDOUT: ["status 0", f"input {written}", "copied 0"]})


def test_a_partial_token_at_a_timeout_is_output() -> None:
    exchange = Exchange()
    for stream in PIPES:
        exchange.receive(stream, said(exchange, "begin"))
    part = exchange.token[:7].encode()
    assert exchange.receive(STDOUT, b"text" + part) == [Output(STDOUT, b"text")]
    exchange.receive(STDERR, said(exchange, "end") + part)
    assert exchange.release() == [Output(STDOUT, part)]
    exchange.receive(STDOUT, exchange.token.encode() + b" en")
    assert exchange.release() == []


def test_the_handshake_covers_all_streams_and_precedes_ready() -> None:
    exchange = Exchange(hello=True)
    stat = STAT.decode()
    assert exchange.receive(STDERR, b"banner" + said(exchange, "hello")) == [Stray(b"banner")]
    assert not exchange.greeted
    line = f"hello home {stat} init {stat.partition(') ')[2]}"
    (hello,) = exchange.receive(STDOUT, said(exchange, line, "ready"))
    assert hello == Hello(True, Process(7, 1, 7, 7, 1234), "1234")
    assert exchange.greeted
    assert exchange.ready


@pytest.mark.parametrize("line", ["hello", "hello home", "hello missing 7 init", "hello home x"])
def test_a_target_that_hides_its_processes(line: str) -> None:
    exchange = Exchange(hello=True)
    exchange.receive(STDERR, said(exchange, "hello"))
    (hello,) = exchange.receive(STDOUT, said(exchange, line))
    assert isinstance(hello, Hello)
    assert (hello.shell, hello.init) == (None, "")


@given(
    comm=st.binary(max_size=15),
    numbers=st.lists(st.integers(0, 2**22), min_size=23, max_size=40),
)
def test_any_name_of_a_process(comm: bytes, numbers: list[int]) -> None:
    fields = [b"S", *(b"%d" % number for number in numbers)]
    line = b"42 (" + comm + b") " + b" ".join(fields)
    parsed = Process.parse(line)
    if b") " not in comm + b" ":
        assert parsed == Process(42, numbers[0], numbers[1], numbers[2], numbers[18])


@pytest.mark.parametrize("line", [b"", b"x", b"1 (sh) S 1", b"1 (sh) S x x x x"])
def test_no_process(line: bytes) -> None:
    assert Process.parse(line) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a\0b", "must not contain a NUL byte"),
        ("a\ud800", r"must not contain '\\ud800'"),
        ("\udfff", r"must not contain '\\udfff'"),
    ],
)
def test_texts_too_long_for_a_command_line(text: str, reason: str) -> None:
    with pytest.raises(OSError, match=reason):
        protocol.check_text(text)


def test_a_file_name_that_is_not_utf_8() -> None:
    assert protocol.check_text("cat '\udcff'") == b"cat '\xff'"


SCRIPTS = st.binary(max_size=400).map(lambda data: data.replace(b"\0", b""))


@given(st.lists(SCRIPTS, max_size=4))
def test_arguments_of_a_call_arrive(words: list[bytes]) -> None:
    script = b"f() { printf '%s|' \"$@\"; }\n" + protocol.call("f", *words, "end")
    wanted = b"".join(word + b"|" for word in [*words, b"end"])
    for shell in SHELLS:
        assert subprocess.run([*shell], input=script, capture_output=True).stdout == wanted


@given(SCRIPTS)
def test_typed_input_arrives_and_is_not_echoed(script: bytes) -> None:
    keys = protocol.typed(script)
    *lines, last, _ = keys.split(b"\n")
    digits = b"".join(lines)
    assert last == b". %d" % len(digits)
    assert max(map(len, lines), default=0) <= 1000
    # No two consecutive digits of a token.
    assert not set(b"abcdefghijklmnopqrstuvwxyz89") & set(digits)
    for shell in SHELLS:
        text = b"printf '" + digits + b"'"
        assert subprocess.run([*shell], input=text, capture_output=True).stdout == script
