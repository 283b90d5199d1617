"""The examples in docs and docstrings, executed."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
import subprocess
import textwrap
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyinfra
import pytest

from pyinfra_orbstack import orbctl, programs, timing
from pyinfra_orbstack.facts import orbstack as facts
from pyinfra_orbstack.operations import orbstack, vm

from ..conftest import ROOT, Machines
from .conftest import Applier, read_calls
from .test_failures import ask

FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# docs/machines.md -------------------------------------------------------------------------------


class Page:
    """The code of a page: its files, written to disk, and its commands, in order."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = folder
        self.commands: list[str] = []
        for language, code in FENCE.findall((ROOT / "docs" / name).read_text()):
            if language == "python":
                (folder / code.split("\n")[0].lstrip("# ")).write_text(code)
            else:
                self.commands += code.strip().splitlines()

    def run(self, command: str) -> str:
        program, *words = shlex.split(command)
        assert program == "pyinfra"
        done = subprocess.run(
            programs.pyinfra_argv(*words),
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr


@pytest.mark.long
def test_machines_page_runs(
    client: orbctl.Orbctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The page's names need a separate simulator.
    monkeypatch.setenv("ORBCTL_SIMULATOR_HOME", str(tmp_path / "simulator"))
    monkeypatch.setenv(orbctl.RECORD_VARIABLE, str(tmp_path / "record"))
    log = tmp_path / "log"
    monkeypatch.setenv("ORBCTL_SIMULATOR_LOG", str(log))
    folder = tmp_path / "shop"
    folder.mkdir()
    page = Page("machines.md", folder)
    dry, make, configure, remove, show = page.commands
    copies = folder / "copies.py"
    copies.write_text(copies.read_text().replace("/tmp/", f"{tmp_path}/"))
    names = {"shop-web-1", "shop-web-2", "shop-db"}
    try:
        assert len(re.findall(r"creating machine \S+ from ubuntu:noble", page.run(dry))) == 3
        assert client.machines() == []
        page.run(make)
        made = {machine.name: machine for machine in client.machines()}
        assert made.keys() == names
        assert all(machine.running for machine in made.values())
        log.unlink()
        assert page.run(make).count("No changes") == 3
        assert {words[0] for words in read_calls(log)} == {"version", "list", "config"}

        page.run(configure)
        for name in names:
            said = client.call("run", "-m", name, "cat", "/etc/motd").stdout.decode()
            assert said == f"{'web' if 'web' in name else 'database'} of the shop\n"
            client.call("run", "-m", name, "id", "shop")
        assert page.run(configure).count("No changes") == 6

        page.run("pyinfra -y @local copies.py")
        copied = {machine.name: machine.state for machine in client.machines()}
        assert copied["shop-db-test"] == "stopped"
        assert "shop-db-restored" in copied
        told = json.loads(page.run(show).split("OrbStackMachines\n", 2)[2].split("-->")[0])
        assert told["@local"].keys() == copied.keys()
        assert "shop-db: running" in page.run("pyinfra -y @local show.py")

        page.run(remove)
        assert {machine.name for machine in client.machines()} == {
            "shop-db-test",
            "shop-db-restored",
        }
    finally:
        orbctl.Record(tmp_path / "record").delete_all(client)
    assert client.machines() == []


# docs/migrating.md ------------------------------------------------------------------------------

#: The signatures before 1.0; `name` could only be passed by position.
BEFORE = {
    "vm_create": "name, image, arch=None, user=None, present=True",
    "vm_clone": "source_name, new_name",
    "vm_export": "name, output_path",
    "vm_import": "input_path, name",
    "vm_rename": "old_name, new_name",
    "vm_delete": "name, force=False",
    "vm_start": "name",
    "vm_stop": "name, force=False",
    "vm_restart": "name",
    "vm_info": "",
    "vm_list": "",
    "vm_status": "",
    "vm_ip": "",
    "vm_network_info": "",
    "vm_network_details": "",
    "vm_status_detailed": "",
    "vm_logs": "all_logs=False",
    "ssh_info": "machine=None",
    "ssh_connect_string": "machine=None",
    "vm_test_connectivity": "target, method='ping', count=3",
    "vm_dns_lookup": "hostname, lookup_type='A'",
    "orbstack_config_get": "key",
    "orbstack_config_set": "key, value",
    "orbstack_config_show": "",
    "vm_username_set": "vm_name, username",
}


def _rows() -> list[tuple[str, str]]:
    text = (ROOT / "docs" / "migrating.md").read_text()
    return re.findall(r"^`(\w+\(.*?\))` \| (.*)$", text, re.MULTILINE)


def _call(text: str) -> tuple[str, list[str]]:
    """Name and parameters of ``name(a, b=1, ...)``."""
    call = ast.parse(text.replace(", ...", ""), mode="eval").body
    assert isinstance(call, ast.Call)
    words = [ast.unparse(arg) for arg in call.args]
    return ast.unparse(call.func), words + [str(keyword.arg) for keyword in call.keywords]


@pytest.mark.parametrize("name", BEFORE)
def test_old_signatures_are_kept(name: str) -> None:
    now = inspect.signature(getattr(vm, name)._inner)
    bare = [one.replace(annotation=inspect.Parameter.empty) for one in now.parameters.values()]
    shown = str(inspect.Signature(bare)).strip("()")
    assert shown == re.sub(r"\bname\b(?!\w)", "machine", BEFORE[name])


def test_migrating_page_lists_every_old_name_and_only_existing_new_ones() -> None:
    rows = _rows()
    assert {_call(old)[0] for old, _ in rows} == BEFORE.keys()
    for old, new in rows:
        name, parameters = _call(old)
        assert parameters == list(inspect.signature(getattr(vm, name)._inner).parameters)
        for called in re.findall(r"`(\w+\(.*?\))`", new):
            name, parameters = _call(called)
            owner = facts if name.startswith("OrbStack") else orbstack
            thing = getattr(owner, name)
            real = inspect.signature(thing.command if owner is facts else thing._inner).parameters
            assert set(parameters) <= real.keys(), called


def test_no_parameter_has_a_name_reserved_by_pyinfra() -> None:
    for module in (orbstack, vm):
        for name, operation in _operations(module):
            assert "name" not in inspect.signature(operation._inner).parameters, name


def test_timing_module_exists() -> None:
    text = (ROOT / "docs" / "migrating.md").read_text()
    for name, parameters in map(
        _call, re.findall(r"`(timed\w*\(.*?\)|configure\w+\(.*?\))`", text)
    ):
        assert list(inspect.signature(getattr(timing, name)).parameters) == parameters


# The names before 1.0, applied -------------------------------------------------------------------

SHOWING = {
    "vm_info": [],
    "vm_list": [],
    "vm_status": [],
    "vm_ip": [],
    "vm_network_info": [],
    "vm_network_details": [],
    "vm_status_detailed": [],
    "vm_logs": [],
    "ssh_info": ["web"],
    "ssh_connect_string": ["web"],
    "orbstack_config_get": ["cpu"],
    "orbstack_config_show": [],
}


@pytest.mark.parametrize(
    ("name", "data"),
    [
        *((name, {}) for name in SHOWING),
        # Data that the connector sets is never an operation's argument.
        ("vm_ip", {"vm_name": "other"}),
        ("vm_logs", {"vm_name": "other"}),
    ],
)
def test_read_only_operations_change_nothing(
    name: str, data: dict[str, str], base: str, apply: Applier
) -> None:
    operation = getattr(vm, name)
    done = apply.all(lambda: operation(*SHOWING[name]), hosts=[("@local", data)])
    assert (done.error, done.changed, done.changing) == ("", False, [])
    expected = {
        "ssh_connect_string": "ssh web@orb",
        "ssh_info": '"port": 32222',
        "orbstack_config_get": '"cpu"',
        "orbstack_config_show": '"memory_mib"',
    }
    assert expected.get(name, base) in done.log
    assert re.search(r"the fact ``OrbStack|ssh NAME@orb", str(operation._inner.__doc__))


def test_connectivity_checks_change_nothing(
    apply: Applier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for program in ("ping", "curl", "nc", "host"):
        path = tmp_path / program
        path.write_text('#!/bin/sh\necho "$(basename "$0") $*"\ncase $* in *bad*) exit 3; esac\n')
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for args, told in (
        (("a.orb.local",), "ping -c 3 a.orb.local"),
        (("http://a.orb.local", "curl"), "curl -sS -o /dev/null"),
        (("a.orb.local:80", "nc"), "nc -zv -w 5 a.orb.local 80"),
        (("a.orb.local", "nc"), "nc -zv -w 5 a.orb.local 22"),
    ):
        done = apply(vm.vm_test_connectivity, *args)
        assert (done.error, done.changed) == ("", False)
        assert told in done.log
    assert "host -t MX a.orb.local" in apply(vm.vm_dns_lookup, "a.orb.local", "MX").log
    for operation in (vm.vm_test_connectivity, vm.vm_dns_lookup):
        assert "exit code 3" in apply(operation, "bad").error
        assert "must not begin with '-'" in apply(operation, "-bad").error
    assert "ping, curl or nc" in apply(vm.vm_test_connectivity, "a", "telnet").error
    for target in ("a:-e/bin/sh", "a:", ":22"):
        assert "NAME or NAME:PORT" in apply(vm.vm_test_connectivity, target, "nc").error


def test_connectivity_is_checked_from_inside_a_machine(base: str, apply: Applier) -> None:
    done = apply.all(
        lambda: vm.vm_test_connectivity("nowhere.invalid"), hosts=[f"@orbstack/{base}"]
    )
    assert "ping -c 3 nowhere.invalid: exit code" in done.error


@pytest.mark.parametrize("name", BEFORE)
def test_each_old_operation_warns_once_about_its_replacement(
    name: str, apply: Applier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The replacement on the page: an operation, a fact or something else."""
    new = next(new for old, new in _rows() if _call(old)[0] == name)
    successor = re.match(r"(?:none; the command is )?`([^`(]+)", new)
    assert successor
    # This tests only the call; other tests cover `orbctl`'s answers.
    monkeypatch.setenv(orbctl.COMMAND_VARIABLE, "/bin/false")
    needed = [
        parameter
        for parameter in inspect.signature(getattr(vm, name)._inner).parameters.values()
        if parameter.default is inspect.Parameter.empty
    ]
    with pytest.warns(DeprecationWarning, match="deprecated: use") as warned:
        apply(getattr(vm, name), *("web" for _ in needed))
    ours = [one for one in warned if str(one.message).startswith(f"vm.{name} is deprecated: use ")]
    assert len(ours) == 1
    assert successor[1] in str(ours[0].message)


def test_timing_warns_once_about_its_replacement() -> None:
    for call, successor in (
        (lambda: timing.timed("sum")(print)(), "timing.timed is deprecated: use time.monotonic"),
        (lambda: timing.timed(print)(), "timing.timed is deprecated: use time.monotonic"),
        (lambda: timing.timed_operation("sum").__enter__(), "timing.timed_operation is deprecated"),
        (timing.configure_logging, "configure_logging is deprecated: use logging.basicConfig"),
    ):
        with pytest.warns(DeprecationWarning, match="deprecated: use") as warned:
            call()
        assert [successor in str(one.message) for one in warned] == [True]
        assert warned[0].filename == __file__


def test_timing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger=timing.logger.name)

    @timing.timed("sum")
    def add(one: int, other: int) -> int:
        return one + other

    @timing.timed
    def fail() -> None:
        raise ValueError("no")

    assert add(1, 2) == 3
    with pytest.raises(ValueError, match="no"):
        fail()
    with timing.timed_operation("body"):
        pass
    told = [re.sub(r"[\d.]+s", "Ns", record.getMessage()) for record in caplog.records]
    assert told == [
        "Starting sum",
        "Completed sum in Ns",
        "Starting fail",
        "Failed fail after Ns: no",
        "Starting body",
        "Completed body in Ns",
    ]


# Docstrings -------------------------------------------------------------------------------------


def _operations(module: Any) -> list[tuple[str, Any]]:
    return [
        (name, thing)
        for name, thing in vars(module).items()
        if hasattr(thing, "_inner") and thing._inner.__module__ == module.__name__
    ]


def _example(doc: str | None) -> str:
    """The code of an ``**Example:**`` block."""
    assert doc
    head, _, code = inspect.cleandoc(doc).partition("**Example:**\n\n.. code:: python\n\n")
    assert code, head
    return textwrap.dedent(code)


OPERATIONS = [
    (f"{module.__name__.rpartition('.')[2]}.{name}", operation)
    for module in (orbstack, vm)
    for name, operation in _operations(module)
]


def test_every_old_operation_exists() -> None:
    assert {name for name, _ in OPERATIONS} >= {f"vm.{name}" for name in BEFORE}
    assert len(OPERATIONS) == len(BEFORE) + 11


@pytest.mark.parametrize(("name", "operation"), OPERATIONS, ids=[name for name, _ in OPERATIONS])
def test_docstrings_list_every_parameter(name: str, operation: Any) -> None:
    doc = inspect.cleandoc(operation._inner.__doc__)
    told = re.findall(r"^\+ (\w+): ", doc, re.MULTILINE)
    assert told == list(inspect.signature(operation._inner).parameters)
    assert not re.search(r"^\s*(Args|Returns|Raises):", doc, re.MULTILINE)


@pytest.fixture(scope="module")
def example_world(machines: Machines, base: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A machine for `web`, with a unique name, and its archive."""
    prefix = f"{machines.new_name()}-"
    folder = tmp_path_factory.mktemp("examples")
    machines.client.clone(base, f"{prefix}web")
    machines.own(f"{prefix}web")
    machines.client.start(f"{prefix}web")
    machines.client.call("export", base, str(folder / "given.tar.zst"))
    return prefix, folder


@pytest.mark.parametrize(("name", "operation"), OPERATIONS, ids=[name for name, _ in OPERATIONS])
def test_example_in_docstring_works(
    name: str,
    operation: Any,
    example_world: Any,
    machines: Machines,
    apply: Applier,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    prefix, folder = example_world
    web = f"{prefix}web"
    code = _example(operation._inner.__doc__)
    assert re.search(rf"^{name}\(", code, re.MULTILINE)
    code = re.sub(r'"(web|www)(-\w+)?"', rf'"{prefix}\1\2"', code)
    archive = tmp_path / "web.tar.zst"
    if "import" in name:
        archive = folder / "given.tar.zst"
    code = code.replace("/tmp/web.tar.zst", str(archive))
    if name in ("vm.vm_test_connectivity", "vm.vm_dns_lookup"):
        for program in ("nc", "host"):
            (tmp_path / program).write_text("#!/bin/sh\n")
            (tmp_path / program).chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    done = apply.all(lambda: exec(code, {}))  # noqa: S102
    assert done.error == "", done.log
    for new in ("www", "web-test", "web-restored"):
        if f'"{prefix}{new}"' in code:
            made = machines.own(f"{prefix}{new}")
            if new == "www":
                machines.client.call("rename", made.name, web)
            else:
                assert machines.client.delete(made.name, made.id)


FACTS = [
    (name, fact)
    for name, fact in vars(facts).items()
    if isinstance(fact, type) and fact.__module__ == facts.__name__ and name[0] != "_"
    if issubclass(fact, facts.FactBase)
]


@pytest.mark.parametrize(("name", "fact"), FACTS, ids=[name for name, _ in FACTS])
def test_fact_docstrings_document_the_return_value(
    name: str, fact: Any, base: str, apply: Applier, capsys: pytest.CaptureFixture[str]
) -> None:
    doc = inspect.cleandoc(fact.__doc__)
    assert doc.startswith("Returns ")
    told = re.findall(r"^\+ (\w+): ", doc, re.MULTILINE)
    assert told == list(inspect.signature(fact.command).parameters)[1:]
    if "**Example:**" not in doc:
        return
    code = _example(fact.__doc__)
    if not code.lstrip().startswith("{"):
        code = code.replace('"web"', repr(base))
        done = apply.all(lambda: exec(code, {"host": pyinfra.host, **dict(FACTS)}))  # noqa: S102
        assert done.error == "", done.log
        assert name != "OrbStackMachine" or re.fullmatch(r"[\d.]+\n", capsys.readouterr().out)
        return
    known = {"datetime": datetime, "timezone": timezone}
    shown = eval(code.strip(), known)  # noqa: S307
    real = ask(fact)[0]
    if name == "OrbStackMachines":
        shown, real = shown["web"], real[base]
        assert shown.keys() == real.keys()
    for key in shown.keys() & real.keys():
        assert isinstance(real[key], type(shown[key])), key
