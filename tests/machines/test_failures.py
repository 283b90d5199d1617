"""Malformed answers, and hostile arguments."""

from __future__ import annotations

import json
import re
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyinfra.api import Config, Inventory, State, exceptions
from pyinfra.api.connect import connect_all
from pyinfra.api.exceptions import PyinfraError
from pyinfra.context import ctx_host, ctx_state

from pyinfra_orbstack import orbctl, programs
from pyinfra_orbstack.facts import orbstack as facts
from pyinfra_orbstack.operations import orbstack, vm

from ..conftest import Machines
from .conftest import Applier

# Facts ------------------------------------------------------------------------------------------

WRONG_LISTS = ["null", "garbage", "truncated", "empty", "duplicate"]


#: Earlier versions end the whole run, with one line, if a fact cannot parse an answer.
FAILS_THE_HOST = hasattr(exceptions, "FactProcessError")


def ask(fact: type[Any], **arguments: Any) -> tuple[Any, State, str]:
    """Read a fact of ``@local``; also return pyinfra's exception."""
    state = State(Inventory((["@local"], {})), Config())
    connect_all(state)
    host = next(iter(state.inventory))
    with ctx_state.use(state), ctx_host.use(host):
        try:
            return host.get_fact(fact, **arguments), state, ""
        except PyinfraError as error:
            return None, state, str(error)


def ask_in_vain(
    fact: type[Any], arguments: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> str:
    """Read a fact that must fail, and return the error."""
    value, state, error = ask(fact, **arguments)
    assert value is None
    assert error
    assert len(state.failed_hosts) == FAILS_THE_HOST
    return "\n".join([record.getMessage() for record in caplog.records] + [error])


@pytest.mark.smoke
def test_facts_of_a_running_machine(base: str) -> None:
    machines, _, _ = ask(facts.OrbStackMachines)
    machine = machines[base]
    assert machine == ask(facts.OrbStackMachine, machine=base)[0]
    assert machine["name"] == base
    assert (machine["distro"], machine["version"]) == ("ubuntu", "noble")
    assert machine["domain"] == f"{base}.orb.local"
    assert re.fullmatch(r"[\d.]+", machine["ip4"])
    assert ":" in machine["ip6"]
    assert machine["created"].year >= 2026


def test_addresses_of_a_stopped_machine_are_not_known(clone: str, client: orbctl.Orbctl) -> None:
    client.stop(clone)
    machine = ask(facts.OrbStackMachines)[0][clone]
    assert (machine["state"], machine["ip4"], machine["ip6"]) == ("stopped", None, None)


def test_addresses_can_be_left_out(base: str, apply: Applier) -> None:
    machine = ask(facts.OrbStackMachines, addresses=False)[0][base]
    assert machine["ip4"] is None


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("fact", "arguments", "kind"),
    [
        (facts.OrbStackConfig, {}, dict),
        (facts.OrbStackConfigValue, {"key": "cpu"}, str),
        (facts.OrbStackVersion, {}, str),
        (facts.OrbStackStatus, {}, str),
        (facts.OrbStackDefaultMachine, {}, str),
        (facts.OrbStackSSH, {}, dict),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_other_facts(fact: type[Any], arguments: dict[str, Any], kind: type, base: str) -> None:
    value, _, error = ask(fact, **arguments)
    assert error == ""
    assert isinstance(value, kind)


@pytest.mark.parametrize("banner", ["stdout", "stderr", "stdout:after", "stderr:after"])
def test_the_update_banner_is_not_an_answer(
    banner: str, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = [(fact, args, ask(fact, **args)[0]) for fact, args, _ in FACTS if "machine" not in args]
    monkeypatch.setenv("ORBCTL_SIMULATOR_BANNER", banner)
    for fact, args, plain in every:
        assert ask(fact, **args)[0] == plain, fact


def test_logs(base: str) -> None:
    lines, _, _ = ask(facts.OrbStackMachineLogs, machine=base)
    assert any(base in line for line in lines)


def test_deleting_a_missing_machine_is_not_a_failure(machines: Machines) -> None:
    assert ask(facts.OrbStackMachine, machine=machines.new_name())[::2] == ({}, "")


def test_status_does_not_start_orbstack(
    monkeypatch: pytest.MonkeyPatch, client: orbctl.Orbctl, tmp_path: Path
) -> None:
    monkeypatch.setenv("ORBCTL_SIMULATOR_HOME", str(tmp_path))
    assert ask(facts.OrbStackMachines)[::2] == ({}, "")
    client.call("stop")
    assert ask(facts.OrbStackStatus)[0] == "stopped"
    assert ask(facts.OrbStackStatus)[0] == "stopped"


@pytest.mark.smoke
@pytest.mark.parametrize("fault", WRONG_LISTS)
def test_D3_a_malformed_list_is_never_an_empty_one(
    fault: str, faults: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    faults(match="list", list=fault)
    told = ask_in_vain(facts.OrbStackMachines, {}, caplog)
    assert "twice" in told if fault == "duplicate" else "did not print JSON" in told


FACTS = [
    (facts.OrbStackMachines, {}, "list"),
    (facts.OrbStackMachine, {"machine": "web"}, "info"),
    (facts.OrbStackConfig, {}, "config"),
    (facts.OrbStackConfigValue, {"key": "cpu"}, "config"),
    (facts.OrbStackVersion, {}, "version"),
    (facts.OrbStackStatus, {}, "status"),
    (facts.OrbStackDefaultMachine, {}, "default"),
    (facts.OrbStackSSH, {}, "ssh"),
    (facts.OrbStackMachineLogs, {"machine": "web"}, "logs"),
]


def _fact(value: object) -> str:
    return getattr(value, "__name__", "")


@pytest.mark.parametrize(("fact", "arguments", "command"), FACTS, ids=_fact)
def test_D1_failing_orbctl_fails_the_host(
    fact: type[Any],
    arguments: dict[str, Any],
    command: str,
    faults: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    faults(match=command, exit=7, stderr="warming up\n[-32098] the disk is on fire\n")
    told = ask_in_vain(fact, arguments, caplog)
    if fact is not facts.OrbStackStatus:
        assert told.count("the disk is on fire") == 1
        assert "warming up" not in told


@pytest.mark.parametrize(
    ("fact", "arguments", "command"),
    # These three may be empty.
    [one for one in FACTS if one[2] not in ("logs", "default") and "key" not in one[1]],
    ids=_fact,
)
def test_D1_silent_orbctl_fails_the_host(
    fact: type[Any],
    arguments: dict[str, Any],
    command: str,
    faults: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    faults(match=command, silent=True)
    ask_in_vain(fact, arguments, caplog)


@pytest.mark.smoke
@pytest.mark.parametrize(("fact", "arguments", "command"), FACTS, ids=_fact)
def test_D1_missing_orbctl_fails_the_host(
    fact: type[Any],
    arguments: dict[str, Any],
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv(orbctl.COMMAND_VARIABLE, "/nowhere/orbctl")
    assert "orbctl was not found on this host" in ask_in_vain(fact, arguments, caplog)


def test_orbctl_is_found_on_a_short_path(
    client: orbctl.Orbctl, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As over SSH on a Mac, where the shell is not a login shell."""
    monkeypatch.delenv(orbctl.COMMAND_VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".orbstack" / "bin"
    folder.mkdir(parents=True)
    program = folder / "orbctl"
    program.write_text(f'#!/bin/sh\nexec {client.command} "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert ask(facts.OrbStackVersion)[0] == "2.2.3"


def test_a_log_line_that_looks_like_an_error_is_a_log_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "orbctl"
    program.write_text("#!/bin/sh\necho one; echo 'orbctl: exit 1: two'; echo three >&2\n")
    program.chmod(0o755)
    monkeypatch.setenv(orbctl.COMMAND_VARIABLE, str(program))
    assert ask(facts.OrbStackMachineLogs, machine="web")[0] == ["one", "orbctl: exit 1: two"]


# Operations -------------------------------------------------------------------------------------

# Each with arguments that would change something.
CHANGING: dict[str, Callable[[str, str, Path], tuple[Callable[..., Any], dict[str, Any]]]] = {
    "machine": lambda base, new, path: (orbstack.machine, {"machine": new, "image": "ubuntu"}),
    "absent": lambda base, new, path: (orbstack.machine, {"machine": base, "present": False}),
    "recreated": lambda base, new, path: (
        orbstack.machine,
        {"machine": base, "image": "debian", "recreate": True},
    ),
    "started": lambda base, new, path: (orbstack.started, {"machine": base}),
    "stopped": lambda base, new, path: (orbstack.stopped, {"machine": base}),
    "restarted": lambda base, new, path: (orbstack.restarted, {"machine": base}),
    "renamed": lambda base, new, path: (orbstack.renamed, {"machine": base, "to": new}),
    "cloned": lambda base, new, path: (orbstack.cloned, {"source": base, "machine": new}),
    "exported": lambda base, new, path: (
        orbstack.exported,
        {"machine": base, "path": str(path / "new")},
    ),
    "imported": lambda base, new, path: (
        orbstack.imported,
        {"path": "/etc/hostname", "machine": new},
    ),
    "default_machine": lambda base, new, path: (orbstack.default_machine, {"machine": base}),
    "user": lambda base, new, path: (orbstack.machine, {"machine": base, "user": "root"}),
    "machine_user": lambda base, new, path: (
        orbstack.machine_user,
        {"machine": base, "user": "root"},
    ),
    "vm_list": lambda base, new, path: (vm.vm_list, {}),
}


@pytest.mark.parametrize("dry", [True, False], ids=["dry", "run"])
@pytest.mark.parametrize("what", CHANGING)
def test_D3_failed_listing_changes_nothing(
    what: str,
    dry: bool,
    base: str,
    machines: Machines,
    apply: Applier,
    faults: Callable[..., None],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    faults(match="list", exit=1, stderr="[-32098] no")
    operation, args = CHANGING[what](base, machines.new_name(), tmp_path)
    done = apply(operation, dry=dry, **args)
    assert done.error
    assert not done.changed
    assert done.changing == []
    assert done.failed_hosts == ({"@local"} if FAILS_THE_HOST or not dry else set())
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.smoke
@pytest.mark.parametrize("fault", WRONG_LISTS)
def test_D3_wrong_list_creates_nothing(
    fault: str, base: str, apply: Applier, faults: Callable[..., None]
) -> None:
    faults(match="list", list=fault)
    done = apply(orbstack.machine, machine=base, image="ubuntu")
    assert done.error
    assert done.changing == []


@pytest.mark.smoke
@pytest.mark.parametrize("dry", [True, False], ids=["dry", "run"])
@pytest.mark.usefixtures("root_only")  # for @chroot
def test_one_host_fails_alone(dry: bool, machines: Machines, apply: Applier) -> None:
    """Two hosts that should have OrbStack; one has none."""
    name = machines.new_name()
    if dry and not FAILS_THE_HOST:
        pytest.skip("this pyinfra fails the whole run for one host's fact")
    broken = ("@chroot//", {"_env": {orbctl.COMMAND_VARIABLE: "/nowhere"}})
    done = apply.all(
        lambda: orbstack.machine(machine=name, image="ubuntu"), hosts=["@local", broken], dry=dry
    )
    assert done.failed_hosts == {"@chroot//"}
    # An exception would end both.
    assert ("could not be read" in done.error or "orbctl was not found" in done.error) is not dry
    assert [words[0] for words in done.changing] == ([] if dry else ["create", "run"])


@pytest.mark.usefixtures("root_only")  # for @chroot
def test_a_difference_fails_only_its_host(base: str, apply: Applier) -> None:
    done = apply.all(
        lambda: orbstack.machine(machine=base, image="debian"), hosts=["@local", "@chroot//"]
    )
    assert "image is ubuntu:noble, not debian" in done.error
    assert done.failed_hosts == {"@local", "@chroot//"}


def test_operations_on_orbstack_are_rejected_inside_a_machine(base: str, apply: Applier) -> None:
    for operation, args in (
        (orbstack.machine, {"machine": base, "present": False}),
        (orbstack.config, {"key": "cpu", "value": 1}),
        (vm.vm_delete, {"machine": base}),
        (vm.vm_info, {}),
    ):
        done = apply.all(lambda: operation(**args), hosts=[f"@orbstack/{base}"], dry=True)  # noqa: B023
        assert "target @local" in done.error
        assert done.changing == [] or {words[0] for words in done.changing} == {"run"}


def test_sudo_of_a_deploy_does_not_reach_orbctl(
    machines: Machines, apply: Applier, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """OrbStack belongs to the user; root has none."""
    sudo = tmp_path / "sudo"
    # The simulator needs it to become root.
    own = '"-n true" | *orbctl_simulator*'
    real = f'case "$*" in {own}) exec {shutil.which("sudo")} "$@";; esac'
    sudo.write_text(f"#!/bin/sh\n{real}\nexit 66\n")
    sudo.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    done = apply.all(
        lambda: orbstack.machine(machine=machines.new_name(), image="ubuntu"),
        config=Config(SUDO=True),
    )
    assert (done.error, done.changed) == ("", True)


# Hostile values ---------------------------------------------------------------------------------

HOSTILE = {
    "command": "x; touch CANARY",
    "substitution": "$(touch CANARY)`touch CANARY`",
    "single": "a' ; touch CANARY; '",
    "double": 'a" ; touch CANARY; "\\',
    "newline": "a\ntouch CANARY",
    "nul": "a\0b",
    "flag": "--all",
    "letter": "-a",
    "space": "a b",
    "glob": "*",
    "empty": "",
    "all": "all",
    "number": 5,
    "nothing": None,
}

PARAMETERS: dict[str, Callable[[str, str, Any], tuple[Callable[..., Any], dict[str, Any]]]] = {
    "machine": lambda base, new, bad: (orbstack.machine, {"machine": bad, "image": "ubuntu"}),
    "absent": lambda base, new, bad: (orbstack.machine, {"machine": bad, "present": False}),
    "image": lambda base, new, bad: (orbstack.machine, {"machine": new, "image": bad}),
    "arch": lambda base, new, bad: (
        orbstack.machine,
        {"machine": new, "image": "ubuntu", "arch": bad},
    ),
    "user": lambda base, new, bad: (
        orbstack.machine,
        {"machine": new, "image": "ubuntu", "user": bad},
    ),
    "user-existing": lambda base, new, bad: (orbstack.machine, {"machine": base, "user": bad}),
    "memory": lambda base, new, bad: (
        orbstack.machine,
        {"machine": new, "image": "ubuntu", "memory": bad},
    ),
    "mounts": lambda base, new, bad: (
        orbstack.machine,
        {"machine": new, "image": "ubuntu", "isolated": True, "mounts": [bad]},
    ),
    "cloud_init": lambda base, new, bad: (
        orbstack.machine,
        {"machine": new, "image": "ubuntu", "cloud_init": bad},
    ),
    "started": lambda base, new, bad: (orbstack.started, {"machine": bad}),
    "stopped": lambda base, new, bad: (orbstack.stopped, {"machine": bad}),
    "restarted": lambda base, new, bad: (orbstack.restarted, {"machine": bad}),
    "renamed-from": lambda base, new, bad: (orbstack.renamed, {"machine": bad, "to": new}),
    "renamed-to": lambda base, new, bad: (orbstack.renamed, {"machine": base, "to": bad}),
    "cloned-from": lambda base, new, bad: (orbstack.cloned, {"source": bad, "machine": new}),
    "cloned-to": lambda base, new, bad: (orbstack.cloned, {"source": base, "machine": bad}),
    "exported": lambda base, new, bad: (orbstack.exported, {"machine": bad, "path": "new"}),
    "exported-path": lambda base, new, bad: (orbstack.exported, {"machine": base, "path": bad}),
    "imported": lambda base, new, bad: (
        orbstack.imported,
        {"machine": bad, "path": "/etc/hostname"},
    ),
    "imported-path": lambda base, new, bad: (orbstack.imported, {"machine": new, "path": bad}),
    "config-key": lambda base, new, bad: (orbstack.config, {"key": bad, "value": "1"}),
    "config-value": lambda base, new, bad: (
        orbstack.config,
        {"key": "docker.node_name", "value": bad},
    ),
    "default_machine": lambda base, new, bad: (orbstack.default_machine, {"machine": bad}),
    "machine_user": lambda base, new, bad: (orbstack.machine_user, {"machine": base, "user": bad}),
    "machine_user-machine": lambda base, new, bad: (
        orbstack.machine_user,
        {"machine": bad, "user": "root"},
    ),
}

#: `None` is a valid value for these.
OPTIONAL = {"arch", "user", "user-existing", "memory", "image", "cloud_init", "default_machine"}


@pytest.mark.long
@pytest.mark.parametrize("what", PARAMETERS)
def test_N_hostile_values_are_literal_or_rejected(
    what: str,
    machines: Machines,
    base: str,
    apply: Applier,
    client: orbctl.Orbctl,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    canary = tmp_path / "canary"
    before = client.machines()
    if what not in ("exported-path", "config-value"):
        # The log shows what gets through; no machine is needed.
        makers = ("create", "clone", "import", "rename", "export", "config set")
        rules = [{"match": verb, "exit": 1, "stderr": "[-32098] no"} for verb in makers]
        monkeypatch.setenv("ORBCTL_SIMULATOR_FAULTS", json.dumps(rules))
    for kind, word in HOSTILE.items():
        if word is None and what in OPTIONAL:
            continue
        bad = word.replace("CANARY", str(canary)) if isinstance(word, str) else word
        operation, args = PARAMETERS[what](base, machines.new_name(), bad)
        done = apply(operation, **args)
        assert not canary.exists(), (kind, done)
        for words in done.changing:
            # It got through as one argument that is not a flag; `orbctl` itself may reject it.
            literal = str(bad).rpartition("/")[2] if what == "exported-path" else str(bad)
            assert any(literal in one for one in words), (kind, words)
            assert not str(bad).startswith("-"), (kind, words)
            assert bad is not None, (kind, words)
            assert bad != "" or what == "config-value", (kind, words)
        if not done.changing:
            assert done.error or not done.changed, kind
        if done.error:
            assert not done.changed, kind
    assert "Traceback" not in capfd.readouterr().err
    assert {one.id for one in before} == {one.id for one in client.machines()}
    assert client.info(base).running


@pytest.mark.smoke
@pytest.mark.parametrize("flag", ["-y", "--dry"])
def test_a_mistake_is_a_one_line_error_without_traceback(flag: str) -> None:
    words = ["pyinfra_orbstack.operations.orbstack.machine", "machine=a b", "image=ubuntu"]
    done = subprocess.run(
        programs.pyinfra_argv(flag, "@local", *words),
        capture_output=True,
        text=True,
        check=False,
    )
    told = done.stdout + done.stderr
    assert done.returncode != 0
    assert told.count("machine name 'a b' must not contain a space or a slash") == 1
    assert "Traceback" not in told
