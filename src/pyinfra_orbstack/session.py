"""The protocol: commands, byte-exact, through a shell that runs in a target.

A *control shell* (`sh`: dash, bash or busybox) is started in the target and prepares each command
in four steps, of which both sides see every one:

1. The client sends the command. A session's shell gets it as one `{ ...; }` compound, so that a
   text cut short is a syntax error and never runs; a spawned shell reads a counted number of bytes.
2. The shell answers READY and waits.
3. The client sends START, a word made for this command alone. Before it, nothing can have run and
   the command may be tried again; from its first byte on the outcome is unknown until it is known.
4. The command runs with pipes of its own, each copied by a `cat`, between a begin mark and an end
   mark on both streams. It is over when its process has ended and both outputs are closed. The
   exit status comes with the end mark. No end mark on both streams, no success.

Marks are 128 random bits, made for each command. What stands before a begin mark comes from a
profile or from OrbStack's update banner and is dropped.
"""

from __future__ import annotations

import contextlib
import secrets
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import gevent

from pyinfra_orbstack.process import STDERR, STDOUT, Child, Completed, feed, run

#: A command text that is longer cannot become one argument of `sh -c` (Linux, MAX_ARG_STRLEN).
LONGEST_TEXT = 128 * 1024 - 1
#: Stdin up to this size travels in the frame of a session; more goes through a spawn.
LARGEST_FRAME_STDIN = 64 * 1024
#: So much may be printed before a begin mark; more is no profile and no banner.
MOST_STRAY = 64 * 1024
#: Seconds for a control shell to come up, to take a frame, and for the call that ends a command.
ANSWER_TIMEOUT = 30.0
END_TIMEOUT = 15.0

# Why it is written so:
# - 6 and 7 are the streams to the client; 4 and 5 carry stdout and the exit status inside one
#   exchange. A command gets 0 to 2 alone, and the control shell's own stdout and stderr are
#   /dev/null, so that no job message ("Terminated") reaches the client.
# - the child is `( ... exec ... )` in the foreground: with `&` it would have SIGINT ignored.
# - it tells its own pid before it becomes the command; a `sh` in between, to have it in `$$`, was a
#   sixth of what a command costs.
# - `read` is used for single ASCII words only; it takes no byte after the newline.
# - setsid gives the command a session id of its own, by which its descendants are found later.
_FUNCTIONS = r"""
orb_setsid=$(command -v setsid)
orb_exec() {
IFS= read -r orb_s </proc/self/stat
printf '%s %s\n' "$1" "$orb_s" >&6
printf '%s\n' "$1" >&7
exec $orb_setsid sh -c "$2" 4>&- 5>&- 6>&- 7>&-
}
orb_child() {
case $1 in
null) ( orb_exec "$2" "$3" ) </dev/null 2>&1 >&4;;
rest) ( orb_exec "$2" "$3" ) 2>&1 >&4;;
*) printf "$1" 4>&- 5>&- 6>&- 7>&- | ( orb_exec "$2" "$3" ) 2>&1 >&4;;
esac
printf %s "$?" >&5
}
orb_exchange() {
printf '%s ready\n' "$1" >&6
IFS= read -r orb_go
[ "$orb_go" = "$2" ] || exit 1
orb_status=$( { { orb_child "$4" "$1" "$5" | cat >&7 4>&- 5>&- 6>&-; } 4>&1 |
cat >&6 4>&- 5>&- 7>&-; } 5>&1 )
printf '%s %s\n' "$3" "$orb_status" >&6
printf '%s\n' "$3" >&7
}
orb_open() {
orb_in=home
if [ -n "$2" ]; then cd "$2" || orb_in=missing; else cd || cd /; fi
IFS= read -r orb_s <"/proc/$$/stat"
IFS= read -r orb_i </proc/1/stat
printf '%s %s %s init %s\n' "$1" "$orb_in" "$orb_s" "${orb_i##*) }" >&6
printf '%s\n' "$1" >&7
[ "$orb_in" = home ] || exit 1
}
exec 6>&1 7>&2 >/dev/null 2>&1
"""

# The text is counted in bytes and read one by one, so that all that follows is the command's own.
_SPAWN = (
    _FUNCTIONS
    + r"""orb_open "$1" "$2"
orb_text=$(dd bs=1 count="$3"; printf x)
orb_exchange "$4" "$5" "$6" rest "${orb_text%x}"
"""
)

# A terminal would eat control characters and long lines, so the text comes in a file.
_TERMINAL = r"""orb_text=$(cat "$1" && printf x) && rm -f "$1" || exit 1
if [ -n "$2" ]; then cd "$2" || exit 1; else cd 2>/dev/null || cd /; fi
IFS= read -r orb_s <"/proc/$$/stat"
printf '%s %s\n' "$3" "$orb_s"
sh -c "${orb_text%x}"
printf '%s %s\n' "$4" "$?"
"""

# Everything that descends from the given processes, by parent, group or session: children of `su`
# have a session of their own. The pid is ours only while its start time is the one we were told.
# What was killed may take a while to go where the computer is busy.
_END = r"""
orb_find() {
for orb_f in /proc/[0-9]*/stat; do
IFS= read -r orb_s <"$orb_f" || continue
orb_p=${orb_s%% *}
set -- ${orb_s##*) }
case $1 in Z|X) continue;; esac
case " $orb_me " in *" $orb_p "*) continue;; esac
case "$orb_all" in
*" $orb_p "*) orb_live="$orb_live $orb_p";;
*" $2 "*|*" $3 "*|*" $4 "*) orb_all="$orb_all$orb_p "; orb_live="$orb_live $orb_p"; orb_new=1;;
esac
done
}
exec 2>/dev/null
orb_me="$$ $PPID" orb_all=" "
while [ $# -gt 1 ]; do
if IFS= read -r orb_s <"/proc/$1/stat"; then
orb_t=${orb_s##*) }
orb_n=0
for orb_w in $orb_t; do orb_n=$((orb_n + 1)); [ $orb_n = 20 ] && break; done
[ "$orb_w" = "$2" ] && orb_all="$orb_all$1 "
elif [ "$3" = group ]; then orb_all="$orb_all$1 "
fi
shift 3
done
[ "$orb_all" = " " ] && exit 0
orb_round=0
while [ $orb_round -lt 60 ]; do
orb_new=1
while [ $orb_new = 1 ]; do orb_new=0 orb_live=; orb_find; done
[ -n "$orb_live" ] || exit 0
kill -9 $orb_live
orb_round=$((orb_round + 1))
[ $orb_round -lt 5 ] || sleep 0.1 || sleep 1
done
exit 1
"""


class Target(Protocol):
    """Where commands run: a machine or a container."""

    def argv(self, *words: str, user: str | None = None, tty: bool = False) -> list[str]:
        """The local command line that runs ``words`` in the target."""

    def environment(self) -> dict[str, str]:
        """The environment of that command line."""


class NotStarted(OSError):
    """The command did not start; it is safe to try it again."""


class Lost(OSError):
    """The connection ended while the command ran; whether it ran to its end is unknown."""


class Marker:
    """Finds a mark, with the words behind it on its line, in bytes that come in pieces.

    >>> marker = Marker(b"MARK")
    >>> marker.feed(b"abcMA"), marker.words
    (b'abc', None)
    >>> marker.feed(b"RK 0\\nrest"), marker.words, marker.rest
    (b'', [b'0'], b'rest')
    """

    def __init__(self, mark: bytes) -> None:
        self.mark = mark
        #: What stood on the mark's line behind it, once the whole line was seen.
        self.words: list[bytes] | None = None
        #: What came after that line.
        self.rest = b""
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """Take a piece and return what certainly stands before the mark."""
        if self.words is not None:
            self.rest += data
            return b""
        data = self._held + data
        at = data.find(self.mark)
        if at < 0:
            at = len(data) - _overlap(data, self.mark)
        else:
            line, newline, rest = data[at + len(self.mark) :].partition(b"\n")
            if newline:
                self.words, self.rest, self._held = line.split(), rest, b""
                return data[:at]
        self._held = data[at:]
        return data[:at]

    def release(self) -> bytes:
        """Return what was held back because the mark could have begun with it."""
        held, self._held = self._held, b""
        return b"" if held.startswith(self.mark) else held


def _overlap(data: bytes, mark: bytes) -> int:
    """How many bytes at the end of ``data`` could be the beginning of ``mark``."""
    for length in range(min(len(mark) - 1, len(data)), 0, -1):
        if data.endswith(mark[:length]):
            return length
    return 0


class Section:
    """What one stream carries between a begin mark and an end mark."""

    def __init__(self, begin: bytes, end: bytes) -> None:
        self.begin = Marker(begin)
        self.end = Marker(end)
        self.stray = 0

    def feed(self, data: bytes) -> bytes:
        """Take a piece and return the part of it that the command printed."""
        if self.begin.words is None:
            self.stray += len(self.begin.feed(data))
            if self.begin.words is None:
                return b""
            data, self.begin.rest = self.begin.rest, b""
        return self.end.feed(data)


#: Called with `STDOUT` or `STDERR` and a piece of what the command printed there.
Sink = Callable[[int, bytes], None]


@contextlib.contextmanager
def _releasing(sections: dict[int, Section], sink: Sink) -> Iterator[None]:
    """At a timeout no mark is on its way: what looks like its beginning is the command's own."""
    try:
        yield
    except TimeoutError:
        for stream, section in sections.items():
            held = section.end.release()
            if held:
                sink(stream, held)
        raise


def _token() -> str:
    return secrets.token_hex(16)


def _octal(data: bytes) -> str:
    """``data`` as the format of a `printf`, in ASCII alone."""
    plain = set(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,:;/_+=@#()[]{}<>|&~^*?!$")
    return "".join(chr(byte) if byte in plain else f"\\{byte:03o}" for byte in data)


def check_text(text: str) -> bytes:
    """Return a command text as bytes.

    Raises:
        OSError: It is too long for Linux, or holds a NUL, which no command line can.
    """
    data = text.encode("utf-8", "surrogateescape")
    if b"\0" in data:
        raise OSError("the command holds a NUL byte, which no command line can")
    if len(data) > LONGEST_TEXT:
        raise OSError(
            f"the command is {len(data)} bytes long and Linux takes {LONGEST_TEXT} in one "
            "argument: put it into a file and run that"
        )
    return data


def frame(begin: str, start: str, end: str, text: str, stdin: bytes) -> bytes:
    """One command for a session's control shell: a compound that runs whole or not at all."""
    source = f"'{_octal(stdin)}'" if stdin else "null"
    words = f"{begin} {start} {end} {source} ".encode()
    quoted = shlex.quote(text).encode("utf-8", "surrogateescape")
    return b"{ orb_exchange " + words + quoted + b"; }\n"


class Control:
    """A control shell in a target and the exchanges with it.

    Args:
        target: Where it runs.
        user: As whom; None for the target's default user.
        workdir: Where commands start; None for that user's home.
        verify: Called with the start time of the target's first process (field 22 of
            ``/proc/1/stat``: uptime and boot id belong to the kernel that all machines share)
            before anything is run; what it raises ends the connection.
    """

    def __init__(
        self,
        target: Target,
        user: str | None = None,
        workdir: str | None = None,
        verify: Callable[[str], None] | None = None,
    ) -> None:
        self.target = target
        self._verify = verify
        self.user = user
        self.workdir = workdir
        self._child: Child | None = None
        self._processes: list[str] = []
        self._left: dict[int, bytes] = {STDOUT: b"", STDERR: b""}
        self._ended: set[int] = set()
        self._said = bytearray()
        self._busy = False

    # The connection

    @property
    def alive(self) -> bool:
        """Whether the next command can be sent."""
        return self._child is not None and not self._ended and not self._child.gone

    @property
    def idle(self) -> bool:
        """Whether it is alive and runs nothing."""
        return self.alive and not self._busy

    def open(self) -> None:
        """Start a session.

        Raises:
            NotStarted: The target does not answer; the text says what it printed instead.
        """
        hello = _token()
        self._start("sh")
        call = f"orb_open {hello} {shlex.quote(self.workdir or '')}\n"
        try:
            self._send(_FUNCTIONS.encode() + call.encode("utf-8", "surrogateescape"))
            self._hello(hello)
        except BaseException:
            self.close()
            raise

    def _start(self, *words: str, tty: bool = False) -> None:
        self.close()
        self._ended.clear()
        self._said.clear()
        self._processes.clear()
        self._left = {STDOUT: b"", STDERR: b""}
        argv = self.target.argv(*words, user=self.user, tty=tty)
        try:
            self._child = Child(argv, env=self.target.environment(), tty=tty)
        except OSError as broken:
            raise NotStarted(f"cannot run {argv[0]}: {broken.strerror}") from None

    def _hello(self, hello: str) -> None:
        section = {STDOUT: Marker(hello.encode()), STDERR: Marker(hello.encode())}
        deadline = time.monotonic() + ANSWER_TIMEOUT
        stray = 0
        while any(marker.words is None for marker in section.values()):
            stream, data = self._read_answer(deadline)
            stray += len(section[stream].feed(data))
            _check_stray(stray)
        self._left = {stream: marker.rest for stream, marker in section.items()}
        where, _, stats = b" ".join(section[STDOUT].words or [b""]).partition(b" ")
        if where == b"missing":
            # Trying again will not make it.
            raise OSError(f"there is no directory {self.workdir!r} in which to start")
        own, _, init = stats.partition(b" init ")
        self._remember(own)
        if self._verify is not None:
            fields = init.split()
            self._verify(fields[19].decode("ascii", "replace") if len(fields) > 19 else "")

    def _remember(self, stat: bytes, kind: str = "process") -> None:
        """Keep pid and start time from a line of ``/proc/PID/stat``."""
        pid, _, rest = stat.decode("ascii", "replace").partition(" ")
        times = rest.rpartition(") ")[2].split()
        if pid.isdigit() and len(times) >= 20:
            self._processes += [pid, times[19], kind]

    def _send(self, data: bytes) -> None:
        assert self._child is not None
        try:
            with gevent.Timeout(ANSWER_TIMEOUT, TimeoutError):
                self._child.write(data)
        except (TimeoutError, OSError):
            raise NotStarted(self._epitaph()) from None

    def _read(self, deadline: float | None) -> tuple[int, bytes]:
        assert self._child is not None
        for stream, data in self._left.items():
            if data:
                self._left[stream] = b""
                return stream, data
        stream, data = self._child.read(None if deadline is None else deadline - time.monotonic())
        if data:
            self._said += data[: max(0, 4096 - len(self._said))]
        else:
            self._ended.add(stream)
        return stream, data

    def _read_answer(self, limit: float, deadline: float | None = None) -> tuple[int, bytes]:
        """Read what the control shell must say by ``limit``, before any command runs."""
        try:
            stream, data = self._read(limit)
        except TimeoutError:
            if limit == deadline:
                raise
            raise NotStarted(f"the target did not answer within {ANSWER_TIMEOUT:g} s") from None
        if not data:
            raise NotStarted(self._epitaph())
        return stream, data

    def _drain(self) -> None:
        deadline = time.monotonic() + 1
        with contextlib.suppress(TimeoutError):
            while len(self._ended) < 2:
                self._read(deadline)

    def _epitaph(self) -> str:
        """Why there is no control shell, in one line."""
        self._drain()
        said = " ".join(self._said.decode("utf-8", "replace").split())
        assert self._child is not None
        how = "ended"
        with contextlib.suppress(OSError):
            status = self._child.wait(1)
            how = "still runs" if status is None else f"ended with exit code {status}"
        return f"the connection gave no shell: it {how} and said {said[-300:] or 'nothing'!r}"

    def close(self) -> None:
        """Close the connection; the control shell reads the end of its input and goes."""
        child, self._child = self._child, None
        if child is not None:
            child.close_stdin()
            with contextlib.suppress(OSError):
                child.wait(0.2 if not self._ended else 0)
            child.end()

    def end_command(self) -> None:
        """End the running command and all its descendants, then close the connection.

        It takes a second call, as root: the login user cannot signal what sudo started.

        Raises:
            OSError: The target did not confirm it.
        """
        processes = list(self._processes)
        try:
            if processes:
                self._end_processes(processes)
        finally:
            self.close()

    def _end_processes(self, processes: Sequence[str]) -> None:
        argv = self.target.argv("sh", "-c", _END, "sh", *processes, user="root")
        try:
            done = run(argv, timeout=END_TIMEOUT, env=self.target.environment())
        except (OSError, TimeoutError) as broken:
            done = Completed(1, b"", str(broken).encode())
        if done.returncode != 0:
            said = " ".join(done.stderr.decode("utf-8", "replace").split())
            raise OSError(
                "the command may still run: the call that should end it failed "
                f"({said[-300:] or f'exit code {done.returncode}'})"
            )

    # The exchange

    def run(
        self, text: str, sink: Sink, *, stdin: bytes = b"", deadline: float | None = None
    ) -> int:
        """Run a command in the open session.

        Args:
            text: Shell text, run by `sh -c`.
            sink: Takes what the command prints, piece by piece, as it comes.
            stdin: What it reads, at most `LARGEST_FRAME_STDIN` bytes.
            deadline: Point of `time.monotonic` at which the command is ended.

        Returns:
            Its exit status as a shell has it, 128+n for a signal.

        Raises:
            NotStarted: It did not run.
            Lost: It started, and nobody knows how it went.
            TimeoutError: The deadline came; the command and its descendants are gone.
        """
        check_text(text)
        begin, start, end = _token(), _token(), _token()
        del self._processes[3:]
        with self._ending_on_failure():
            self._send(frame(begin, start, end, text, stdin))
            return self._exchange(begin, start, end, sink, (), deadline, keep_open=True)

    def spawn(
        self,
        text: str,
        sink: Sink,
        *,
        stdin: Iterable[bytes] = (),
        deadline: float | None = None,
    ) -> int:
        """Run a command through a control shell of its own, with a stdin of any size.

        Arguments, result and errors are those of `run`; ``stdin`` comes in pieces.
        """
        data = check_text(text)
        hello, begin, start, end = _token(), _token(), _token(), _token()
        words = (hello, self.workdir or "", str(len(data)), begin, start, end)
        with self._ending_on_failure():
            self._start("sh", "-c", _SPAWN, "sh", *words)
            self._send(data)
            self._hello(hello)
            status = self._exchange(begin, start, end, sink, stdin, deadline, keep_open=False)
        self.close()
        return status

    def terminal(
        self,
        path: str,
        sink: Sink,
        *,
        stdin: Iterable[bytes] = (),
        deadline: float | None = None,
    ) -> int:
        """Run a command on a pseudo terminal, where stdout and stderr are one.

        Arguments, result and errors are those of `run`, but for:

        Args:
            path: A private file in the target that holds the command text; it is removed.
            stdin: Typed on the terminal once the command runs, followed by its end-of-file key.
        """
        begin, end = _token(), _token()
        section = Section(begin.encode(), end.encode())
        words = (path, self.workdir or "", begin, end)
        with self._ending_on_failure(), _releasing({STDOUT: section}, sink):
            self._start("sh", "-c", _TERMINAL, "sh", *words, tty=True)
            assert self._child is not None
            while section.end.words is None:
                stream, data = self._read(deadline)
                if not data:
                    raise Lost(f"the terminal ended before the command: {self._epitaph()}")
                begun = section.begin.words
                body = section.feed(data)
                if begun is None and section.begin.words is not None:
                    self._remember(b" ".join(section.begin.words))
                    typed = _chain(stdin, [b"\x04"])
                    gevent.spawn(feed, self._child, typed, close=False)
                if body:
                    sink(stream, body)
        self.close()
        return int((section.end.words or [b"1"])[0])

    @contextlib.contextmanager
    def _ending_on_failure(self) -> Iterator[None]:
        """Leave no command behind when anything interrupts, be it Ctrl-C or gevent's own."""
        self._busy = True
        try:
            yield
        except NotStarted:
            self.close()
            raise
        except TimeoutError:
            self.end_command()
            raise
        except BaseException:
            with contextlib.suppress(OSError):
                self.end_command()
            raise
        finally:
            self._busy = False

    def _exchange(
        self,
        begin: str,
        start: str,
        end: str,
        sink: Sink,
        stdin: Iterable[bytes],
        deadline: float | None,
        keep_open: bool,
    ) -> int:
        child = self._child
        assert child is not None
        self._await_ready(begin, deadline)
        sections = {
            STDOUT: Section(begin.encode(), end.encode()),
            STDERR: Section(begin.encode(), end.encode()),
        }
        feeder = None
        try:
            # From here on the outcome is unknown until both end marks are in.
            pieces = [start.encode() + b"\n"]
            if keep_open:
                with contextlib.suppress(OSError):
                    child.write(pieces[0])
            else:
                feeder = gevent.spawn(feed, child, _chain(pieces, stdin))
            with _releasing(sections, sink):
                self._read_sections(sections, sink, deadline)
        finally:
            if feeder is not None:
                feeder.kill()
        self._left = {stream: section.end.rest for stream, section in sections.items()}
        words = sections[STDOUT].end.words or []
        if len(words) != 1 or not words[0].isdigit():
            raise Lost("the control shell gave no exit status")
        return int(words[0])

    def _read_sections(
        self, sections: dict[int, Section], sink: Sink, deadline: float | None
    ) -> None:
        while any(section.end.words is None for section in sections.values()):
            stream, data = self._read(deadline)
            if not data and sections[stream].end.words is None:
                raise Lost(
                    "the connection ended while the command ran: "
                    "whether it ran to its end is unknown, so it is not repeated"
                )
            section = sections[stream]
            begun = section.begin.words
            body = section.feed(data)
            if begun is None and section.begin.words is not None and stream == STDOUT:
                self._remember(b" ".join(section.begin.words), "group")
            if section.stray > MOST_STRAY:
                raise Lost(f"more than {MOST_STRAY} bytes came before the command's output")
            if body:
                sink(stream, body)

    def _await_ready(self, begin: str, deadline: float | None) -> None:
        answer = time.monotonic() + ANSWER_TIMEOUT
        limit = answer if deadline is None else min(answer, deadline)
        ready = Marker(begin.encode())
        stray = 0
        while ready.words is None:
            stream, data = self._read_answer(limit, deadline)
            if stream == STDOUT:
                stray += len(ready.feed(data))
            else:
                stray += len(data)
            _check_stray(stray)
        self._left[STDOUT] = ready.rest


def _check_stray(count: int) -> None:
    if count > MOST_STRAY:
        raise NotStarted(f"more than {MOST_STRAY} bytes came where an answer was expected")


def _chain(first: Iterable[bytes], second: Iterable[bytes]) -> Iterator[bytes]:
    yield from first
    yield from second
