"""Every message of the packages is one plain line that says what happened, then what to do.

docs/troubleshooting.md lists each one that a user can meet, with what it does not say itself.
"""

from __future__ import annotations

import re
from functools import cache

import pytest

from .. import messages
from ..messages import FIELD, ROOT, Message

PAGE = ROOT / "docs" / "troubleshooting.md"

#: The dialect that plain English replaces.
DIALECT = re.compile(
    r"(?<!there )\b(?:is|are) no\b|\bshall\b|\b(?:nobody|whoever|somebody)\b|\bfolders?\b"
    r"|\bcomputer\b|\bprograms?\b|\bmend|\banew\b|\balike\b|\b(?:was|is|are|being) made\b"
    r"|\b(?:bears?|stands?|tells?|told)\b|\bhad from\b|\btaken? away\b|\bput back\b|\bholds\b"
    r"|\bin front of\b|\bwith which\b|\bis not there\b|\ball the same\b|\bwhat is\b"
)
#: Texts of others, which are quoted or imitated as they are.
OTHERS = re.compile(
    # The C library.
    r"^(?:\.\.\.: )?(?:No such file|Is a directory|Not a directory|Too many levels|No space left)"
    # orbctl, and the library of its command line.
    r"|^Error: |^requires at least 1 arg|^To use Docker|^OrbStack's command line|^Use \"|^ +-h"
    r"|^panic: |^Available Commands|^Delete \.\.\.\?"
    # pyinfra-orbstack 0.11.
    r"|^(?:Starting|Failed|Completed) %s"
)
#: What tells a user what to do: an order, an alternative, or the rule that was broken.
ORDER = (
    "add|allow|check|choose|commit|compare|confirm|correct|create|delete|give|increase|install"
    "|leave|look|move|name|omit|open|pass|put|quote|raise|reinstall|remove|rename|resolve|run|see"
    "|set|start|target|try|unset|update|upgrade|upload|use|wait|write"
)
ADVICE = re.compile(
    rf"(?:[:;,] |\(|^)(?:then |or )?(?:{ORDER})\b|\bto [a-z ]+, (?:run|set|target)\b"
    r"|\b(?:must|requires?|needs)\b|\(existing: |\(known: |did you mean"
)
#: It passes on a reason, which is where the advice is.
REASON = re.compile(r": \.\.\.$|\(\.\.\.\)$|: \.\.\.; \.\.\.$")

#: Files whose messages only maintainers see, who read the source beside them.
MAINTAINERS = re.compile(
    r"scripts/(?:browser|checkout|measure|reached|record_demo|rehearsal|release|release_check)\.py$"
)
#: Texts that are no message to a user, by what they are.
INTERNAL = {
    "a command line, or part of one": {
        "...; print(*sys.version_info[:2])",
        '...; echo "status $? $found"',
        "add set ... orb ... { ...; }",
        "add table ... orb",
        "apt-get -q update && apt-get -qy dist-upgrade",
        "kind_of ...",
        'exec "$@" 0<>"$0"',
        """exec sh -c 'eval "$(printf "...")"'""",
        "... (on ...)",
    },
    "what one process of the package says to another": {
        "orbctl: missing",
        "kept .../old",
        "run_there: missing ...",
        "error ...",
        "init ...",
        "built ... ...",
    },
    "a word of another message": {
        "time.monotonic and logging",
        "no output",
        "... of ...",
        "... on ...",
        "it is ...",
        "mount ...",
        "umount ...",
        "mount ... on ...",
        "... (full log: ...)",
        "-h, --help   help for ...",
        "(existing: ...)",
        "(known: ...)",
        "(none exists)",
        "build ...",
        "create it with `make deploy`",
        "it could not be unpacked",
        "it is ...:..., not ...",
        "its arch is ..., not ...",
        "pull ...",
        "did you mean ...?",
        "set M to one of: ...",
        "start one",
    },
    "progress, or a difference that a step removes": {
        "...: waiting for another process that is creating it",
        "... has no ...: installing it once, with ...",
        "downloading ... once, into ...",
        "skipped ... device files in ...: machines have their own",
        "waiting for this host's package manager, which has locked ...",
        "waiting for cloud-init in machine ...",
        "... is ..., not ...",
        "... machine ...",
        "... was restarted",
        "copying machine ... to ...",
        "created machine ... from ...",
        "creating machine ... from ...",
        "deleting machine ...",
        "exporting machine ... to ...",
        "importing machine ... from ...",
        "machine ... differs: ...; deleting it",
        "machine ... is ...: waiting for it",
        "machine ... is ...; restarting it",
        "machine ... is ...; starting it",
        "machine ... is ...; stopping it",
        "machine ...: ... is ..., not ...",
        "renaming machine ... to ...",
        "stopping machine ...",
        "the default machine is ..., not ...",
        "the default user of machine ... is ..., not ...",
    },
    "Python's own text": {
        "module ... has no attribute ...",
        "module 'pyinfra_orbstack.connector' has no attribute ...",
    },
    "of a call that the package itself does not make": {
        "... is not a host of this connector",
        "invalid machine id: ...",
        "not a network namespace",
        "not connected",
        "not the name of a layer: '...'",
        "pivot_root: not known for ...",
        "stdin is closed",
        "the host's own network cannot be a machine's",
    },
}
NOT_SHOWN = set().union(*INTERNAL.values())


def starts_low(text: str) -> bool:
    """Whether it begins in lower case, or with a name or code."""
    word = re.split(r"[ :]", text.removeprefix(f"{FIELD}: "))[0]
    return not word[:1].isupper() or not word[1:].islower()


def is_for_users(message: Message) -> bool:
    """Whether a user can meet it, as it is ours."""
    ours = not OTHERS.search(message.text) and message.text not in NOT_SHOWN
    # A validator's text is the rule itself, and copier prints it beside the question.
    return ours and message.file != "copier.yml" and not MAINTAINERS.match(message.file)


@cache
def listed() -> dict[str, str]:
    """What the page says about each message in a heading or at the beginning of an item."""
    page = PAGE.read_text(encoding="utf-8")
    found: dict[str, str] = {}
    for item in re.split(r"^(?=### |- `|## )", page, flags=re.MULTILINE):
        if match := re.match(r"(?:### |- )`([^`]+)`", item := " ".join(item.split())):
            assert match[1] not in found, f"{match[1]} is there twice"
            found[match[1]] = item[match.end() :].lstrip(": ")
    return found


def on_page(text: str) -> str | None:
    """What the page says about a message, in whose text it leaves out the marks of code."""
    return listed().get(text.replace("`", ""))


def faults(message: Message) -> list[str]:
    """What is wrong with a message."""
    text = message.text
    if OTHERS.search(text) or text in NOT_SHOWN:
        return []
    says = ADVICE.search(text) or REASON.search(text) or on_page(text)
    found = {
        "begins with a capital letter": not starts_low(text),
        "ends with a full stop": text.endswith(".") and not text.endswith(FIELD),
        "has more than one line": "\n" in text.rstrip("\n"),
        "uses the dialect": bool(DIALECT.search(text)),
        "does not say what to do": not says and is_for_users(message),
    }
    return [fault for fault, is_so in found.items() if is_so]


def test_every_message_is_plain_and_says_what_to_do() -> None:
    found = [f"{message} [{fault}]" for message in messages.messages() for fault in faults(message)]
    assert not found, "\n".join(found)


def test_the_page_lists_every_message() -> None:
    missing = [
        str(message)
        for message in messages.messages()
        if is_for_users(message) and on_page(message.text) is None
    ]
    assert not missing, "\n".join(missing)


def test_nothing_is_listed_that_no_message_is() -> None:
    texts = {message.text for message in messages.messages()}
    stale = (listed().keys() - {text.replace("`", "") for text in texts}) | (NOT_SHOWN - texts)
    assert not stale, "\n".join(sorted(stale))


#: Where a message can be, with a place for its text.
PLACES = {
    "raised": "raise ValueError({!r})",
    "formatted": 'raise ValueError(f{!r} if here else "use another value")',
    "logged": "import logging\nlogging.getLogger().warning({!r})",
    "printed": "import sys\nprint({!r}, file=sys.stderr)",
    "warned": "import warnings\nwarnings.warn({!r})",
    "argparse": "parser.error({!r})",
    "an exit": "import sys\nsys.exit({!r})",
    "our error": "class Ours(OSError): pass\ndef one(): return Ours({!r})",
    "handed on": "def refuse(why): raise OSError(why)\nrefuse({!r})",
    "a reason": 'def refuse(why): raise OSError(f"cannot: {{why}}")\nrefuse({!r})',
    "returned": "def why(): return {!r}\ndef one(): raise OSError(why())",
    "assigned": "def one():\n    why = {!r}\n    raise OSError(why)",
    "collected": "def one():\n    bad = []\n    bad.append({!r})\n    raise OSError(str(bad))",
    "a table": "TABLE = {{1: {!r}}}\ndef one(): raise OSError(TABLE[1])",
}
BAD = {
    "begins with a capital letter": "Cannot start it: try again",
    "ends with a full stop": "cannot start it: try again.",
    "has more than one line": "cannot start it:\ntry again",
    "uses the dialect": "the folder is no directory: try again",
    "does not say what to do": "cannot start it",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("fault", BAD)
def test_a_bad_message_is_found(place: str, fault: str) -> None:
    source = PLACES[place].format(BAD[fault])
    found = messages.Sources({"planted.py": source}).messages()
    assert fault in {one for message in found for one in faults(message)}


@pytest.mark.parametrize("fault", [one for one in BAD if "line" not in one])
@pytest.mark.parametrize("call", ['echo "{}" >&2', "fail '{}'", 'say "failed {}"', 'why="{}"'])
def test_a_bad_message_of_a_shell_is_found(call: str, fault: str) -> None:
    found = messages.in_shell("planted.sh", call.format(BAD[fault]))
    assert fault in {one for message in found for one in faults(message)}


def test_a_bad_message_of_a_question_is_found() -> None:
    text = "name:\n  validator: >-\n    {% if name %}Wrong name{% endif %}\n"
    (found,) = messages.in_questions("copier.yml", text)
    assert (found.line, faults(found)) == (3, ["begins with a capital letter"])
