"""The protocol's framing, and the protocol itself with the shells that this host has."""

from __future__ import annotations

import os
import shlex
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import gevent
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyinfra_orbstack import protocol, session
from pyinfra_orbstack.places import HERE
from pyinfra_orbstack.process import STDERR, STDOUT
from pyinfra_orbstack.session import ShellSession

LINUX = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="this host is the target, and has no /proc"
)
pytestmark = LINUX

#: With this, a control shell does not use perl.
WITHOUT_PERL = ["env", "PERL5OPT=-w"]
SHELLS = {"perl": ["sh"]} if shutil.which("perl") else {}
for _name, _more in (("dash", ""), ("bash", "--posix"), ("busybox", "sh")):
    if _found := shutil.which(_name):
        SHELLS[_name] = [*WITHOUT_PERL, _found, *_more.split()]
#: Only a session uses perl.
WAYS = [(shell, way) for shell in SHELLS for way in ("session", "spawn", "terminal")]
WAYS = [(shell, way) for shell, way in WAYS if way == "session" or shell != "perl"]


class Here:
    """This host as a target, with a control shell of choice."""

    place = HERE

    def __init__(self, shell: list[str]) -> None:
        self.shell = shell

    def argv(self, *words: str, user: str | None = None, tty: bool = False) -> list[str]:
        assert words[0] == "sh"
        return [*self.shell, *words[1:]]

    def environment(self) -> dict[str, str]:
        return dict(os.environ)


class Runner:
    """Runs texts on one transport and keeps their output."""

    def __init__(self, shell: list[str], way: str, workdir: str | None = None) -> None:
        self.target = Here(shell)
        self.way = way
        self.workdir = workdir
        self.session = ShellSession(self.target, workdir=workdir)

    def __call__(
        self, text: str, stdin: bytes = b"", seconds: float = 30
    ) -> tuple[int, bytes, bytes]:
        out = {STDOUT: bytearray(), STDERR: bytearray()}

        def sink(stream: int, data: bytes) -> None:
            out[stream] += data

        deadline = time.monotonic() + seconds
        if self.way == "session":
            if not self.session.alive:
                self.session.open(deadline)
            status = self.session.run(text, sink, stdin=stdin, deadline=deadline)
        else:
            alone = ShellSession(self.target, workdir=self.workdir)
            how = alone.spawn if self.way == "spawn" else alone.terminal
            status = how(text, sink, stdin=[stdin], deadline=deadline)
        return status, bytes(out[STDOUT]), bytes(out[STDERR])


@pytest.fixture(params=["-".join(one) for one in WAYS if one[1] != "terminal"])
def run(request: pytest.FixtureRequest) -> Iterator[Runner]:
    shell, _, transport = request.param.partition("-")
    runner = Runner(SHELLS[shell], transport)
    yield runner
    runner.session.close()


@pytest.mark.parametrize("shell", SHELLS)
def test_a_session_uses_perl_where_it_works(shell: str) -> None:
    runner = Runner(SHELLS[shell], "session")
    assert runner("exec ls -l /proc/$PPID/exe")[0] == 0
    assert runner.session.ending.shell is not None
    program = os.readlink(f"/proc/{runner.session.ending.shell.pid}/exe")
    assert ("perl" in program) == (shell == "perl")
    runner.session.close()


def test_a_command_without_stdin_has_none_after_one_with_stdin(run: Runner) -> None:
    assert run("cat", b"input") == (0, b"input", b"")
    assert run("cat", seconds=5) == (0, b"", b"")


def test_output_before_a_command_closes_its_outputs(run: Runner) -> None:
    """It arrives at once, and is not lost if the command is killed."""
    text = "echo early; echo wrong >&2; exec >/dev/null 2>&1; sleep 60"
    out = {STDOUT: bytearray(), STDERR: bytearray()}

    def sink(stream: int, data: bytes) -> None:
        out[stream] += data

    if run.way == "session":
        run.session.open()
    start = run.session.run if run.way == "session" else run.session.spawn
    with pytest.raises(TimeoutError):
        start(text, sink, deadline=time.monotonic() + 2)
    assert (bytes(out[STDOUT]), bytes(out[STDERR])) == (b"early\n", b"wrong\n")


@pytest.mark.skipif("perl" not in SHELLS, reason="it is about perl")
def test_a_command_never_gets_the_input_of_the_control_shell() -> None:
    # So few that the streams of a command cannot be duplicated.
    runner = Runner(["sh", "-c", "ulimit -n 12; exec sh"], "session")
    status, out, err = runner("echo run; cat", b"input", seconds=5)
    assert (status, out) == (126, b"")
    assert b"Too many open files" in err
    runner.session.close()


@pytest.mark.skipif("perl" not in SHELLS, reason="it is about perl")
def test_a_system_call_that_is_not_setsid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.which("perl")
    (tmp_path / "perl").write_text(
        "#!/bin/sh\n"
        'program=$(printf %s "$3" | sed "s/62 => 112, 183 => 157/62 => 9999, 183 => 9999/")\n'
        f'shift 3\nexec {real} -C0 -e "$program" "$@"\n'
    )
    (tmp_path / "perl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    runner = Runner(["sh"], "session")
    assert runner('ps -o sid= -p $$ | grep -cx " *$$"') == (0, b"1\n", b"")
    runner.session.close()


ABOUT_ITSELF = """
grep -E '^(Sig(Blk|Ign|Cgt)|Umask|Groups|NoNewPrivs)' /proc/self/status
ls /proc/self/fd | grep -vx 3; cat /proc/self/limits /proc/self/cgroup; pwd
tr '\\0' '\\n' </proc/self/environ | grep -vE '^(_|SHLVL|PERL5OPT)=' | sort
readlink /proc/self/fd/0; ps -o sid= -p $$ | grep -cx " *$$"
"""


@pytest.mark.parametrize("shell", SHELLS)
def test_a_command_finds_the_same_process_whatever_the_control_shell_is(shell: str) -> None:
    def tell(name: str) -> tuple[int, bytes, bytes]:
        runner = Runner(SHELLS[name], "session")
        try:
            return runner(ABOUT_ITSELF)
        finally:
            runner.session.close()

    status, out, err = tell(shell)
    assert (status, err) == (0, b"")
    assert out.endswith(b"/dev/null\n1\n")
    assert out.splitlines() == tell("dash")[1].splitlines()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PERL_UNICODE", "SAD"),
        ("PERLIO", ":crlf"),
        ("PERLIO", ":utf8"),
        ("PERL5OPT", "-w"),
        ("PERL5OPT", "-d"),
        ("PERL5OPT", "-Mre=debug"),
        ("LC_ALL", "xx_YY.UTF-8"),
        ("PERL5LIB", "/no/such"),
    ],
)
def test_settings_of_perl_change_nothing(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    data = bytes(range(256)) * 20
    runner = Runner(["sh"], "session")
    assert runner("cat; echo \u00fc; echo err >&2; exit 3", data) == (
        3,
        data + "\u00fc\n".encode(),
        b"err\n",
    )
    assert runner(f"printf %s ${name}")[1] == value.encode()
    runner.session.close()


@pytest.mark.parametrize("body", ["exit 0", "kill -9 $$", "echo no >&2; exit 127"])
def test_a_program_called_perl_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    (tmp_path / "perl").write_text(f"#!/bin/sh\n{body}\n")
    (tmp_path / "perl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    runner = Runner(["sh"], "session")
    assert runner("echo on") == (0, b"on\n", b"")
    runner.session.close()


@pytest.mark.parametrize(
    "text",
    [
        "; }\n",
        "echo '; }\n'; { orb_exchange a b c d; }\n",
        "'\"" * 15_000,
        "\\" * 3 + "\n" * 3,
    ],
    ids=["end of a frame", "a frame", "many quotes", "backslashes"],
)
def test_text_that_looks_like_a_frame(run: Runner, text: str) -> None:
    assert run(f"printf %s {shlex.quote(text)} | wc -c")[1].strip() == b"%d" % len(text)


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40))
def test_a_text_for_sh_means_the_same_without_a_second_shell(text: str) -> None:
    for whole in (text, f"sh -c {text}", f"sh -c {shlex.quote(text)}", f"sh -c '{text}'"):
        words = [word.decode() for word in protocol.command_words(whole)]
        if words != ["sh", "-c", whole]:
            assert shlex.split(whole) in (words, ["sh", "-c", shlex.join(words)])


@pytest.mark.parametrize("text", ["sh", "sh -c sh", "sh -c 'sh'"])
def test_a_shell_that_reads_its_input(run: Runner, text: str) -> None:
    assert run(text, b"echo $0; exit 3") == (3, b"sh\n", b"")


@pytest.mark.long
@settings(max_examples=40, deadline=None)
@given(
    words=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), max_size=4),
    stdin=st.binary(max_size=300),
)
def test_any_arguments_and_stdin_arrive_unchanged(words: list[str], stdin: bytes) -> None:
    for shell in SHELLS.values():
        runner = Runner(shell, "session")
        try:
            text = "printf '%s\\0' " + shlex.join([*words, "last"]) + "; cat"
            wanted = b"".join(word.encode() + b"\0" for word in [*words, "last"]) + stdin
            assert runner(text, stdin) == (0, wanted, b"")
        finally:
            runner.session.close()


@pytest.mark.parametrize("status", [0, 1, 2, 99, 126, 127, 128, 255])
def test_exit_codes(run: Runner, status: int) -> None:
    assert run(f"exit {status}")[0] == status


@pytest.mark.parametrize(("name", "status"), [("TERM", 143), ("KILL", 137), ("SEGV", 139)])
def test_signals_exit_with_128_plus_n_and_print_nothing(
    run: Runner, name: str, status: int
) -> None:
    assert run(f"kill -{name} $$") == (status, b"", b"")


def test_streams_are_apart(run: Runner) -> None:
    assert run("echo out; echo err >&2") == (0, b"out\n", b"err\n")


def test_all_bytes_pass_in_both_directions(run: Runner) -> None:
    data = bytes(range(256)) * 200
    assert run("cat", data) == (0, data, b"")
    assert run("cat >&2", data) == (0, b"", data)


def test_stdin_is_empty_by_default(run: Runner) -> None:
    assert run("wc -c")[1].strip() == b"0"


def test_a_command_gets_only_three_open_files(run: Runner) -> None:
    listed = run("for f in /proc/self/fd/*; do echo ${f##*/}; done")[1].split()
    assert {b"0", b"1", b"2"} <= set(listed)
    # The loop's own directory, open while it runs, is the only other one.
    assert len(listed) <= 4


def test_unread_stdin_is_not_an_error(run: Runner) -> None:
    assert run("true", b"x" * 60_000) == (0, b"", b"")


@pytest.mark.parametrize("text", ["echo 'open", "(", "if true"])
def test_broken_syntax_is_reported_by_the_shell(run: Runner, text: str) -> None:
    assert run(text)[0] == 2
    assert run("echo on") == (0, b"on\n", b"")


def test_no_state_reaches_the_next_command(run: Runner) -> None:
    run("cd /usr; umask 077; export LEFT=over; f() { :; }; exec 3>&1; trap 'echo bye' EXIT")
    assert run("echo ${LEFT-none} $(umask); pwd; command -v f")[1] == (
        b"none %04o\n%s\n" % (current_umask(), os.path.expanduser("~").encode())
    )


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_text_that_is_too_long_is_rejected_before_it_is_sent(run: Runner) -> None:
    assert run("true " + "x" * 120_000)[0] == 0
    with pytest.raises(OSError, match="bytes long"):
        run("true " + "x" * 200_000)
    assert run("echo on")[1] == b"on\n"


def test_a_timeout_kills_everything_the_command_started(run: Runner) -> None:
    name = f"34567.{os.getpid()}"
    with pytest.raises(TimeoutError):
        run(f"sleep {name} & setsid sleep {name} & (sleep {name}; true)", seconds=0.3)
    assert running(name) == []
    assert run("echo on")[1] == b"on\n"


def running(word: str) -> list[str]:
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                words = file.read().split(b"\0")
        except OSError:
            continue
        if word.encode() in words:
            found.append(pid)
    return found


@pytest.mark.parametrize(
    "stream",
    ["", "profile says hello\n" * 3],
)
def test_profile_output_is_dropped(stream: str) -> None:
    noisy = f"printf '%s' {stream!r} >&2; printf '%s' {stream!r}; exec sh \"$@\""
    runner = Runner(["sh", "-c", noisy, "sh"], "session")
    try:
        assert runner("echo mine; echo too >&2") == (0, b"mine\n", b"too\n")
    finally:
        runner.session.close()


def test_a_connection_without_a_shell_quotes_its_output() -> None:
    with pytest.raises(session.NotStarted, match="no such machine"):
        Runner(["sh", "-c", "echo no such machine >&2; exit 1"], "session")("true")


def test_a_connection_that_ends_early_is_an_error() -> None:
    runner = Runner(["sh"], "session")
    runner.session.open()
    assert runner.session.connection is not None
    with pytest.raises(session.OutcomeUnknown):
        runner(f"kill -9 {runner.session.connection.child.pid}; sleep 0.2")
    assert runner("echo on")[1] == b"on\n"
    runner.session.close()


@pytest.mark.parametrize("stdin", [b"-none", b"-rest", b"none", b"rest", b"null", b"%s", b"-"])
def test_stdin_that_looks_like_the_protocol(run: Runner, stdin: bytes) -> None:
    assert run("cat", stdin) == (0, stdin, b"")


@pytest.mark.long
def test_an_upload_of_100_mib(run: Runner) -> None:
    size = 100 * 2**20
    seen = {STDOUT: 0, STDERR: 0}

    def count(stream: int, data: bytes) -> None:
        seen[stream] += len(data)

    text = f"head -c {size} /dev/zero; head -c {size} /dev/zero >&2"
    if run.way == "session":
        run.session.open()
        assert run.session.run(text, count) == 0
    else:
        assert ShellSession(run.target).spawn(text, count, stdin=[b"x" * 2**20]) == 0
    assert seen == {STDOUT: size, STDERR: size}


def test_closed_streams(run: Runner) -> None:
    assert run("exec <&- >&- 2>&-; exit 4", b"x") == (4, b"", b"")
    assert run("exec >&-; echo err >&2; exit 5") == (5, b"", b"err\n")


def test_children_holding_the_output_count_as_the_command(run: Runner) -> None:
    text = "(sleep 0.3; echo late; echo late >&2) & echo early; exit 6"
    assert run(text) == (6, b"early\nlate\n", b"late\n")
    # The shell exits long before its background process.
    assert run("sleep 0.3 >/dev/null 2>&1 & exit 7", b"x" * 30_000) == (7, b"", b"")


def test_a_slow_reader_gets_everything(run: Runner) -> None:
    seen = bytearray()

    def slow(stream: int, data: bytes) -> None:
        gevent.sleep(0.002)
        seen.extend(data)

    text = "i=0; while [ $i -lt 3000 ]; do i=$((i + 1)); echo line $i of three thousand; done"
    session = ShellSession(run.target)
    assert session.spawn(text, slow) == 0
    assert seen.count(b"\n") == 3000


DIRECTORIES = ["-P", "-", "--", "-L -P", "a b", "it's", "$HOME", "`id`", "~", "new\nline", "*"]


@pytest.mark.parametrize("name", DIRECTORIES)
@pytest.mark.parametrize(("shell", "way"), WAYS)
def test_a_directory_is_one_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shell: str, way: str, name: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    for parent in (tmp_path / "here", elsewhere):
        (parent / name).mkdir(parents=True)
    monkeypatch.setenv("CDPATH", str(elsewhere))
    monkeypatch.setenv("OLDPWD", "/usr")
    monkeypatch.chdir(tmp_path / "here")
    for directory in (name, str(tmp_path / "here" / name)):
        runner = Runner(SHELLS[shell], way, directory)
        assert runner("ls -di . | cut -d' ' -f1")[1].split() == [
            str(os.stat(tmp_path / "here" / name).st_ino).encode()
        ]
        runner.session.close()


@pytest.mark.parametrize("way", ["session", "spawn", "terminal"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/no/such", "no directory '/no/such'"),
        ("no\0", "the directory must not contain a NUL"),
        ("\ud800", "the directory must not contain .* not a character"),
    ],
)
def test_an_invalid_directory(way: str, name: str, reason: str) -> None:
    with pytest.raises(OSError, match=reason):
        Runner(["sh"], way, name)("true")


def test_a_directory_name_that_is_not_utf_8(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff\xfe"
    os.mkdir(name)
    for way in ("session", "spawn", "terminal"):
        runner = Runner(["sh"], way, os.fsdecode(name))
        assert runner("pwd")[1].strip() == name
        runner.session.close()
