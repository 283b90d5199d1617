"""What tests can observe and change of a call: the call log, faults by rule, the update banner."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import time
from hashlib import sha256

from .cli import Call, find_command
from .config import wake
from .state import Caller, Failure, Lock, home, say, write_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

_KEYS = {
    *("match", "nth", "exit", "stdout", "stderr", "delay", "hang", "silent", "stop", "list"),
    *("cut", "cut_stderr", "cut_stdin", "hold"),
}
_LISTS = ("null", "garbage", "truncated", "empty", "duplicate")
_GARBAGE = "\x1b[31mpanic:\x1b[0m <html>502 Bad Gateway</html>\n"
_BANNER = """\
╭──────────────────────────────────────────────╮
│  OrbStack update available! 2.2.3 → 2.3.0    │
╰──────────────────────────────────────────────╯
"""


class _Ended(BaseException):
    """A signal that ends this process, once the call log is written."""


class SpoiledCall(Call):
    """A call whose streams are logged, or that fails as a rule says."""

    watches = True

    def __init__(self, argv: list[str]) -> None:
        self.argv, self.words = argv, argv[1:]
        self.logs = bool(os.environ.get("ORBCTL_SIMULATOR_LOG"))
        self.rule: dict[str, Any] = {}
        self._started = time.time()
        self._stdin, self._stdin_length = sha256(), 0

    @property
    def limits(self) -> dict[int, int]:
        """The number of bytes after which the streams of a `run` are cut."""
        names = {0: "cut_stdin", 1: "cut", 2: "cut_stderr"}
        return {fd: self.rule[name] for fd, name in names.items() if name in self.rule}

    def stdin_seen(self, data: bytes) -> None:
        self._stdin.update(data)
        self._stdin_length += len(data)

    def carry_out(self, work: Callable[[], int]) -> int:
        if self.logs:
            for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
                signal.signal(number, _end)
        try:
            code = self._spoiled(work)
        except Failure as failure:
            sys.stdout.flush()
            say(str(failure))
            code = failure.code
        except _Ended as ended:
            number = ended.args[0]
            self._write_log(128 + number)
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._write_log(code)
        return code

    def _spoiled(self, work: Callable[[], int]) -> int:
        self.rule = _next_rule(self.words)
        rule = self.rule
        self.hold = float(rule.get("hold", 0))
        self.cut_exit = int(rule.get("exit", 1))
        self.stop_after = float(rule.get("delay", 0.1)) if rule.get("stop") else None
        stream, _, where = os.environ.get("ORBCTL_SIMULATOR_BANNER", "").partition(":")
        if where != "after":
            _print(stream, _BANNER)
        if not rule.get("stop"):
            time.sleep(rule.get("delay", 0))
        _print("stdout", rule.get("stdout", ""))
        _print("stderr", rule.get("stderr", ""))
        if rule.get("hang"):
            self._write_log(None)
            while True:
                time.sleep(3600)
        if rule.get("silent"):
            return 0
        command = find_command(self.words[0]) if self.words else None
        name = command.name if command else ""
        if "exit" in rule and not (self.limits or rule.get("stop")):
            return int(rule["exit"])
        if name == "run":
            code = work()
        elif "list" in rule and name == "list":
            code = _spoil_list(str(rule["list"]), work)
        elif self.limits:
            code = _cut_output(self.limits, work, self.cut_exit)
        else:
            code = work()
        if where:
            _print(stream, _BANNER)
        return code

    def _write_log(self, code: int | None) -> None:
        """Write one line at once, so that concurrent calls do not mix.

        It contains only the names of environment variables and a digest of stdin: logs may be kept.
        """
        path = os.environ.get("ORBCTL_SIMULATOR_LOG")
        if not path or not self.logs:
            return
        self.logs, caller = False, Caller()
        try:
            here = os.getcwd()
        except OSError:
            here = ""
        line = {
            "argv": self.argv,
            "cwd": here,
            "env": sorted(caller.names),
            "exit": code,
            "fault": self.rule or None,
            "pid": os.getpid(),
            "seconds": round(time.time() - self._started, 6),
            "started": self._started,
            "stdin": {"length": self._stdin_length, "sha256": self._stdin.hexdigest()},
            "ttys": [os.isatty(fd) for fd in (0, 1, 2)],
        }
        with caller:
            fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(fd, (json.dumps(line) + "\n").encode())
        os.close(fd)


def _end(number: int, _: object) -> NoReturn:
    raise _Ended(number)


def _print(stream: str, text: str) -> None:
    if text and stream in ("stdout", "stderr"):
        target = sys.stdout if stream == "stdout" else sys.stderr
        target.flush()
        os.write(target.fileno(), text.encode(errors="surrogateescape"))


def _captured(work: Callable[[], int]) -> tuple[str, int]:
    real, sys.stdout = sys.stdout, io.StringIO()
    try:
        code = work()
        return sys.stdout.getvalue(), code
    finally:
        sys.stdout = real


def _cut_output(limits: dict[int, int], work: Callable[[], int], cut_exit: int) -> int:
    text, code = _captured(work)
    raw = text.encode(errors="surrogateescape")
    cut = raw[: limits.get(1, len(raw))]
    _print("stdout", cut.decode(errors="surrogateescape"))
    return code if cut == raw else cut_exit


def _spoil_list(how: str, work: Callable[[], int]) -> int:
    wake()
    text, code = _captured(work)
    if how == "null":
        text = "null\n"
    elif how == "garbage":
        text = _GARBAGE
    elif how == "empty":
        text = ""
    elif how == "truncated":
        text = text[: len(text) // 2]
    elif text.startswith("["):
        text = json.dumps(json.loads(text) * 2, indent=2) + "\n"
    else:
        text += text
    _print("stdout", text)
    return code


def _next_rule(words: list[str]) -> dict[str, Any]:
    """The first rule whose turn it is. Each rule counts its own matches, across processes."""
    told = os.environ.get("ORBCTL_SIMULATOR_FAULTS", "").strip()
    if not told:
        return {}
    if told.startswith(("[", "{")):
        folder = os.path.join(home(), "faults")
        os.makedirs(folder, mode=0o700, exist_ok=True)
        digest = sha256(told.encode(errors="replace")).hexdigest()[:16]
        return _take_turn(_checked(told), os.path.join(folder, digest), words)
    with Caller():
        try:
            with open(told, encoding="utf-8") as file:
                rules = _checked(file.read())
            return _take_turn(rules, told + ".counts", words)
        except (OSError, UnicodeDecodeError) as error:
            raise Failure(f"ORBCTL_SIMULATOR_FAULTS: {error}") from None


def _take_turn(rules: list[dict[str, Any]], counts: str, words: list[str]) -> dict[str, Any]:
    with Lock(counts + ".lock"):
        try:
            with open(counts) as file:
                seen = [int(number) for number in file.read().split()]
        except FileNotFoundError:
            seen = []
        except ValueError:
            text = f"ORBCTL_SIMULATOR_FAULTS: {counts} is not a list of counters: delete it"
            raise Failure(text) from None
        seen += [0] * (len(rules) - len(seen))
        chosen: dict[str, Any] = {}
        for index, rule in enumerate(rules):
            if _matches(rule.get("match", ""), words):
                seen[index] += 1
                turns = rule.get("nth", seen[index])
                if not chosen and seen[index] in (turns if isinstance(turns, list) else [turns]):
                    chosen = rule
        write_file(counts, " ".join(map(str, seen)))
    return chosen


def _matches(match: str, words: list[str]) -> bool:
    """Whether a rule's text is a name of the command, or part of the command line."""
    named = find_command(match)
    if named is not None:
        return bool(words) and find_command(words[0]) is named
    return match in " ".join(words)


def _checked(told: str) -> list[dict[str, Any]]:
    """Check the rules: one with a typo would never fire, and its test would pass."""
    try:
        rules = json.loads(told)
    except ValueError as error:
        raise Failure(f"ORBCTL_SIMULATOR_FAULTS: not valid JSON: {error}") from None
    rules = [rules] if isinstance(rules, dict) else rules
    for rule in rules if isinstance(rules, list) else [rules]:
        if not isinstance(rule, dict) or not rule.keys() <= _KEYS:
            raise Failure(f"ORBCTL_SIMULATOR_FAULTS: use only the keys {sorted(_KEYS)}: {rule}")
        for names, is_valid, kind in _VALUES:
            for name in names:
                if name in rule and not is_valid(rule[name]):
                    raise Failure(f"ORBCTL_SIMULATOR_FAULTS: {name} must be {kind}: {rule}")
        if rule.get("list", "null") not in _LISTS:
            raise Failure(f"ORBCTL_SIMULATOR_FAULTS: list must be one of {_LISTS}: {rule}")
    return list(rules)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_seconds(value: object) -> bool:
    """Whether it is a number of seconds that one can wait (JSON has NaN, in Python)."""
    return type(value) in (int, float) and 0 <= value < 1e6  # type: ignore[operator]


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_code(value: object) -> bool:
    return _is_count(value) and value < 256  # type: ignore[operator]


def _is_turn(value: object) -> bool:
    return all(map(_is_count, value)) if isinstance(value, list) else _is_count(value)


_VALUES = (
    (("match", "stdout", "stderr"), _is_text, "a text"),
    (("delay", "hold"), _is_seconds, "a number of seconds"),
    (("cut", "cut_stderr", "cut_stdin"), _is_count, "a number of bytes"),
    (("exit",), _is_code, "an exit code"),
    (("nth",), _is_turn, "a number, or a list of numbers"),
)
