"""How commands are called, and which commands exist."""

from __future__ import annotations

import re

import pytest

from tests.contract.conftest import Made
from tests.contract.program import Program


@pytest.fixture
def ident(orb: Program, machine: str) -> str:
    return str(orb("info", machine, "-f", "json").json["record"]["id"])


@pytest.mark.fact("recorded")
def test_info_takes_an_id(orb: Program, machine: str, ident: str) -> None:
    """Machines can be addressed by name or by id."""
    assert orb("info", ident, "-f", "json").json["record"]["name"] == machine


@pytest.mark.fact("recorded")
def test_run_takes_an_id(orb: Program, machine: str, ident: str) -> None:
    """`run` by id."""
    assert orb("run", "-m", ident, "hostname").text.strip() == machine


@pytest.mark.fact("inferred")
def test_start_and_stop_take_an_id(orb: Program, stopped: str) -> None:
    """`start` and `stop` by id."""
    ident = orb("info", stopped, "-f", "json").json["record"]["id"]
    assert orb("start", ident).code == 0
    assert orb("info", stopped, "-f", "json").json["record"]["state"] == "running"
    assert orb("stop", ident).code == 0
    assert orb("info", stopped, "-f", "json").json["record"]["state"] == "stopped"


@pytest.mark.fact("recorded")
def test_rename_takes_an_id(orb: Program, made: Made, stopped: str) -> None:
    """`rename` by id."""
    ident = orb("info", stopped, "-f", "json").json["record"]["id"]
    new = made.name()
    assert orb("rename", ident, new).code == 0
    assert orb("info", new, "-f", "json").json["record"]["id"] == ident


@pytest.mark.fact("inferred")
def test_double_dash_before_the_command(orb: Program, machine: str) -> None:
    """`--` before the guest's command is consumed."""
    assert orb("run", "-m", machine, "--", "echo", "a").text == "a\n"


@pytest.mark.fact("recorded")
def test_flags_end_at_the_first_word(orb: Program, machine: str) -> None:
    """`run`: everything after the first word that is not a flag goes to the guest verbatim."""
    answer = orb("run", "-m", machine, "printf", "%s.", "-m", "-u", "--user", "root", "--", "-h")
    assert answer.text == "-m.-u.--user.root.--.-h."


@pytest.mark.fact("inferred")
def test_short_flags_can_be_joined(orb: Program, machine: str) -> None:
    """Pflag's rules apply, such as ``-rq`` and ``-mNAME``."""
    assert machine in orb("list", "-rq").lines
    assert orb("run", f"-m{machine}", "-uroot", "id", "-u").text == "0\n"
    assert orb("run", f"--machine={machine}", "--user=root", "id", "-u").text == "0\n"


@pytest.mark.parametrize("alias", ["exec", "shell"])
@pytest.mark.fact("inferred")
def test_aliases_of_run(orb: Program, machine: str, alias: str) -> None:
    """`exec` and `shell` are `run`; so a name after `shell` is a command."""
    assert orb(alias, "-m", machine, "echo", "a").text == "a\n"
    assert orb(alias, "-m", machine, machine).code == 127


@pytest.mark.fact("documented")
def test_list_quiet(orb: Program, machine: str) -> None:
    """``list -q`` prints one name per line, and nothing else."""
    assert machine in orb("list", "-q").lines
    assert machine in orb("list", "--quiet").lines


@pytest.mark.fact("documented")
def test_list_running(orb: Program, machine: str, stopped: str) -> None:
    """``list -r`` omits stopped machines."""
    shown = orb("list", "-r", "-q").lines
    assert machine in shown
    assert stopped not in shown
    assert stopped in orb("list", "-q").lines


@pytest.mark.parametrize("place", ["before", "after", "long"])
@pytest.mark.fact("recorded")
def test_info_flag_anywhere(orb: Program, machine: str, place: str) -> None:
    """The flag of `info` may be before or after the name."""
    words = {
        "before": ["-f", "json", machine],
        "after": [machine, "-f", "json"],
        "long": ["--format=json", machine],
    }[place]
    assert orb("info", *words).json["record"]["name"] == machine


@pytest.mark.fact("recorded")
def test_delete_several(orb: Program, made: Made, machine: str) -> None:
    """Several names at once."""
    names = [made.clone(machine), made.clone(machine)]
    assert orb("delete", "--force", *names).code == 0
    assert not set(names) & set(orb("list", "-q").lines)


@pytest.mark.fact("recorded")
def test_rename_keeps_the_id(orb: Program, made: Made, stopped: str) -> None:
    """The id survives a rename; the name is the hostname."""
    before = orb("info", stopped, "-f", "json").json["record"]["id"]
    new = made.name()
    assert orb("rename", stopped, new).code == 0
    assert orb("info", new, "-f", "json").json["record"]["id"] == before
    assert stopped not in orb("list", "-q").lines
    assert orb("run", "-m", new, "hostname").text.strip() == new


@pytest.mark.fact("recorded")
def test_default_is_a_name(orb: Program, machine: str) -> None:
    """Bare `default` prints a name, or nothing."""
    shown = orb("default").lines
    assert len(shown) <= 1
    assert set(shown) <= set(orb("list", "-q").lines)


@pytest.mark.fact("documented")
def test_ssh_prints_a_port(orb: Program, machine: str) -> None:
    """`ssh` connects to nothing; its output has a line with the port."""
    lines = [line for line in orb("ssh").lines if "Port" in line]
    assert lines
    assert int(lines[0].split(":")[1]) == 32222


@pytest.mark.parametrize("alias", ["logs", "log", "console"])
@pytest.mark.fact("documented")
def test_logs(orb: Program, machine: str, alias: str) -> None:
    """`logs` and its aliases print a machine's log."""
    assert orb(alias, machine).code == 0


@pytest.mark.fact("recorded")
def test_status_of_a_running_orbstack(orb: Program, machine: str) -> None:
    """`status` prints `Running` and exits with 0."""
    assert orb("status").text == "Running\n"


@pytest.mark.fact("recorded")
def test_help_of_config(orb: Program) -> None:
    """Help follows cobra's layout, with the name that the program was called by."""
    shown = orb("config", "--help").text
    for line in ("Usage:", "Available Commands:", "Flags:"):
        assert line in shown.splitlines()
    assert re.search(r"^  get +Get a config value$", shown, re.MULTILINE)
    assert re.search(r"^  -h, --help   help for config$", shown, re.MULTILINE)


@pytest.mark.parametrize("word", ["frobnicate", "--frobnicate"])
@pytest.mark.fact("inferred")
def test_unknown_words(orb: Program, word: str) -> None:
    """`orbctl` rejects unknown words, on stderr."""
    answer = orb(word)
    assert answer.code != 0
    assert answer.out == b""
    assert b"unknown" in answer.err
    assert b"frobnicate" in answer.err


@pytest.mark.parametrize(
    "words", [["list", "--frobnicate"], ["info"], ["rename", "a"], ["run", "-m"], ["list", "-Z"]]
)
@pytest.mark.fact("inferred")
def test_wrong_flags_and_counts(orb: Program, words: list[str]) -> None:
    """Wrong flags and numbers of words are errors, on stderr."""
    answer = orb(*words)
    assert answer.code != 0
    assert answer.out == b""
    assert answer.err
