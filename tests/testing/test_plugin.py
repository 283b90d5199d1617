"""The plugin in pytest runs: it leaves nothing behind, whatever happens to them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from pyinfra_orbstack import testing
from pyinfra_orbstack.orbctl import COMMAND_VARIABLE, Orbctl, Record, create_args
from pyinfra_orbstack.places import SSH_VARIABLE
from pyinfra_orbstack.programs import is_simulator

pytest_plugins = ["pytester"]

TWO_TESTS = """
    def test_one(orbstack_machine):
        assert orbstack_machine.run("echo hi").stdout == "hi\\n"

    def test_two(orbstack_machines):
        orbstack_machines("forgotten")
        assert 0, "as planned"

    def test_three():
        pass
"""


@pytest.fixture(autouse=True)
def state(monkeypatch: pytest.MonkeyPatch, pytester: pytest.Pytester) -> None:
    """Separate records; a run within pytester does not fail without machines."""
    monkeypatch.setenv("XDG_STATE_HOME", str(pytester.path / "state"))
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)


def names(client: Orbctl) -> set[str]:
    return {machine.name for machine in client.machines()}


@pytest.fixture
def nothing_left(client: Orbctl, pytester: pytest.Pytester) -> Iterator[None]:
    """After the test, the same machines exist as before, and no records."""
    before = names(client)
    yield
    assert names(client) == before
    assert not [path for path in (pytester.path / "state").rglob("*") if path.is_file()]


def test_loading_the_plugin_imports_nothing_heavy() -> None:
    code = "import sys, pyinfra_orbstack.testing; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert not {"pyinfra", "gevent", "pyinfra_orbstack.orbctl"} & set(loaded.split())


def test_every_public_name_can_be_imported() -> None:
    loaded = {name: getattr(testing, name) for name in testing.__all__}
    assert loaded["Machine"].__mro__[1] is loaded["Target"] is loaded["Container"].__mro__[1]
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        testing.Nothing  # noqa: B018


def test_names_cannot_collide(pytester: pytest.Pytester) -> None:
    said = pytester.runpytest_subprocess("--fixtures", "-q").stdout.str()
    ours = said.partition("pyinfra_orbstack.testing")[2].partition("fixtures defined")[0]
    assert set(re.findall(r"^(\w+)(?: \[.*\])? -- ", ours, re.MULTILINE)) == {
        "orbstack_containers",
        "orbstack_machine",
        "orbstack_machines",
    }


@pytest.mark.long
@pytest.mark.parametrize("named", [True, False])
def test_machine_files_are_not_collected_as_tests(
    pytester: pytest.Pytester, client: Orbctl, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    if not is_simulator(client.command):
        pytest.skip("only a simulator has machines in a folder")
    pytester.makepyfile("def test(): pass")
    home = pytester.path / "simulator"
    monkeypatch.setenv("ORBCTL_SIMULATOR_HOME", str(home))
    client.create(create_args("planted", "ubuntu"))
    try:
        script = "echo 'assert 0, \"collected\"' | sudo tee /test_planted.py /srv/test_planted.py"
        client.call("run", "-m", "planted", "sh", "-c", script)
        planted = list(home.rglob("test_planted.py"))
        assert os.geteuid() or planted
        if not named:
            monkeypatch.delenv("ORBCTL_SIMULATOR_HOME")
        for words in ([], ["."], ["simulator"]):
            ended = pytester.runpytest_subprocess(*words)
            ended.assert_outcomes(passed=0 if words == ["simulator"] else 1)
    finally:
        monkeypatch.setenv("ORBCTL_SIMULATOR_HOME", str(home))
        client.delete("planted", client.info("planted").id)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("mac", ["", "me@nowhere.invalid"])
def test_remaining_machines_are_deleted_at_the_end(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, mac: str
) -> None:
    """Also if `PYINFRA_ORBSTACK_SSH` is set, which is not for tests."""
    monkeypatch.setenv(SSH_VARIABLE, mac)
    pytester.makepyfile(TWO_TESTS)
    pytester.runpytest_subprocess().assert_outcomes(passed=2, failed=1)


def test_machines_are_here_if_group_data_names_a_mac(pytester: pytest.Pytester) -> None:
    pytester.mkdir("group_data").joinpath("all.py").write_text(
        'orbstack_ssh = "me@nowhere.invalid"\norbstack_image = "debian"\n'
    )
    pytester.makepyfile(deploy="from pyinfra.operations import server\nserver.shell('true')\n")
    pytester.makepyfile(
        """
        from pyinfra.operations import files

        def test(orbstack_machine):
            assert orbstack_machine.apply("deploy.py").ok
            assert orbstack_machine.apply(files.file, "/tmp/here").ok
            assert orbstack_machine.read("/tmp/here") == ""
        """
    )
    pytester.runpytest_subprocess().assert_outcomes(passed=1)


@pytest.mark.long
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("args", [["-x"], ["-k", "test_two"]])
def test_a_run_that_stops_early_leaves_nothing(pytester: pytest.Pytester, args: list[str]) -> None:
    pytester.makepyfile(TWO_TESTS)
    assert pytester.runpytest_subprocess(*args).ret == 1


def test_nothing_happens_without_the_fixtures(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test(): pass")
    pytester.runpytest_subprocess("--orbstack=real").assert_outcomes(passed=1)
    assert not (pytester.path / "state").exists()


@pytest.mark.long
@pytest.mark.usefixtures("nothing_left")
def test_workers_share_one_base(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest, pathlib

        @pytest.mark.parametrize("number", range(4))
        def test(orbstack_machine, orbstack_machines, number):
            engine = orbstack_machines.engine
            bases = [n for n in engine.record.machines() if n.startswith("base-")]
            pathlib.Path(f"bases-{number}").write_text(" ".join(bases))
        """
    )
    pytester.runpytest_subprocess("-n", "2").assert_outcomes(passed=4)
    assert len({path.read_text() for path in pytester.path.glob("bases-*")}) == 1


@pytest.mark.long
@pytest.mark.usefixtures("nothing_left")
def test_workers_with_separate_simulators_share_nothing(
    pytester: pytest.Pytester, client: Orbctl
) -> None:
    if not is_simulator(client.command):
        pytest.skip("OrbStack has one place for machines")
    pytester.makeconftest(
        """
        import os, pytest

        @pytest.fixture(autouse=True, scope="session")
        def own(tmp_path_factory):
            os.environ["ORBCTL_SIMULATOR_HOME"] = str(tmp_path_factory.mktemp("own"))
        """
    )
    pytester.makepyfile(
        """
        import os, pathlib, pytest

        @pytest.mark.parametrize("number", range(4))
        def test(orbstack_machine, number):
            pathlib.Path(f"homes-{number}").write_text(os.environ["ORBCTL_SIMULATOR_HOME"])
        """
    )
    pytester.runpytest_subprocess("-n", "2").assert_outcomes(passed=4)
    homes = {path.read_text() for path in pytester.path.glob("homes-*")}
    assert len(homes) == 2
    for home in homes:
        env = {**os.environ, "ORBCTL_SIMULATOR_HOME": home}
        argv = [client.command, "list", "-q"]
        assert subprocess.run(argv, env=env, capture_output=True, check=True).stdout == b""


@pytest.mark.parametrize(("ci", "outcome"), [("", "skipped"), ("true", "errors")])
def test_missing_machines_skip_tests_and_fail_in_ci(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, ci: str, outcome: str
) -> None:
    monkeypatch.setenv("PYINFRA_ORBSTACK_ORBCTL", "/no/such/orbctl")
    monkeypatch.setenv("CI", ci)
    pytester.makepyfile("def test(orbstack_machine): pass")
    result = pytester.runpytest_subprocess("-rs")
    result.assert_outcomes(**{outcome: 1})
    result.stdout.fnmatch_lines(
        ["*no machines: *is set to '/no/such/orbctl', but no such executable was found*"]
    )


def test_the_option_real_requires_orbstack(pytester: pytest.Pytester, client: Orbctl) -> None:
    pytester.makepyfile("def test(orbstack_machine): pass")
    result = pytester.runpytest_subprocess("--orbstack=real", "-rs")
    result.assert_outcomes(**({"skipped": 1} if is_simulator(client.command) else {"passed": 1}))


@pytest.mark.usefixtures("nothing_left")
def test_an_unknown_image_skips_the_test(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test(orbstack_machine): pass")
    result = pytester.runpytest_subprocess("--orbstack-image=nosuchdistro:1", "-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*no machines: nosuchdistro:1: *"])


@pytest.mark.long
@pytest.mark.usefixtures("nothing_left")
def test_kept_machines_stay_until_the_next_run(pytester: pytest.Pytester, client: Orbctl) -> None:
    pytester.makepyfile("def test(orbstack_machine): pass")
    result = pytester.runpytest_subprocess("--orbstack-keep")
    kept = set(re.findall(r"kept until the next run: (\S+)", result.stdout.str()))
    assert len(kept) == 2  # the machine and the base it was cloned from
    assert kept <= names(client)
    pytester.runpytest_subprocess().assert_outcomes(passed=1)


SLEEPER = """
    import pathlib, time

    def test(orbstack_machine):
        orbstack_machine.run("sleep 0")
        pathlib.Path("ready").touch()
        orbstack_machine.run("sleep 600", timeout=900)
"""


def start(pytester: pytest.Pytester, *options: str) -> subprocess.Popen[bytes]:
    """Start a run and wait until its test is running."""
    pytester.makepyfile(SLEEPER)
    ready = pytester.path / "ready"
    ready.unlink(missing_ok=True)
    argv = [sys.executable, "-m", "pytest", "-q", *options]
    run = subprocess.Popen(argv, start_new_session=True)
    while not ready.exists():
        assert run.poll() is None
        time.sleep(0.05)
    time.sleep(0.2)
    return run


INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


@pytest.mark.long
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("number", "whom", "options"),
    [
        (INT, "group", []),
        (TERM, "process", []),
        (HUP, "group", []),
        (TERM, "process", ["-n", "2"]),
        (TERM, "group", ["-n", "2"]),
    ],
)
def test_a_terminated_run_leaves_nothing(
    pytester: pytest.Pytester, number: int, whom: str, options: list[str]
) -> None:
    run = start(pytester, *options)
    (os.killpg if whom == "group" else os.kill)(run.pid, number)
    assert run.wait(120) == pytest.ExitCode.INTERRUPTED


@pytest.mark.long
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("seconds", [0.5, 1, 2])
def test_a_run_terminated_at_its_start_leaves_nothing(
    pytester: pytest.Pytester, seconds: float
) -> None:
    """While Python starts, the base is created, or a machine is cloned."""
    pytester.makepyfile(SLEEPER)
    run = subprocess.Popen([sys.executable, "-m", "pytest", "-q"], start_new_session=True)
    time.sleep(seconds)
    run.terminate()
    assert run.wait(120) in (pytest.ExitCode.INTERRUPTED, -TERM)


@pytest.mark.long
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(("first", "then", "seconds"), [(INT, TERM, 0.1), (TERM, HUP, 0.5)])
def test_cleanup_is_not_interrupted(
    pytester: pytest.Pytester, first: int, then: int, seconds: float
) -> None:
    """Like a CI system at its time limit, except for its last signal."""
    run = start(pytester)
    os.killpg(run.pid, first)
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.pid, then)
    # After its cleanup, when pytest is about to exit, a signal ends it as usual.
    assert run.wait(120) in (pytest.ExitCode.INTERRUPTED, -then)


HANDLERS = """
    import signal

    def test():
        assert signal.getsignal(signal.SIGTERM) is signal.{0}
        assert signal.getsignal(signal.SIGHUP) not in (signal.SIG_DFL, signal.SIG_IGN)
"""


def test_signal_handlers_set_by_others_stay(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        "import signal\nsignal.signal(signal.SIGTERM, signal.default_int_handler)"
    )
    pytester.makepyfile(HANDLERS.format("default_int_handler"))
    pytester.runpytest_subprocess().assert_outcomes(passed=1)


def test_signal_handlers_are_restored(pytester: pytest.Pytester) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    pytester.makepyfile("def test(): pass")
    pytester.runpytest_inprocess().assert_outcomes(passed=1)
    code = (
        "import pytest, signal; pytest.main(['-q']); "
        "print(signal.getsignal(signal.SIGTERM).name, signal.getsignal(signal.SIGHUP).name)"
    )
    said = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert said.endswith("SIG_DFL SIG_DFL\n")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before


@pytest.mark.long
@pytest.mark.usefixtures("nothing_left")
def test_the_next_run_deletes_only_what_a_killed_run_left(
    pytester: pytest.Pytester, client: Orbctl
) -> None:
    before = names(client)
    run = start(pytester)
    left = names(client) - before
    assert len(left) == 2
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    # Another machine now has the name of a recorded one.
    taken = next(name for name in left if name.startswith("base-"))
    client.delete(taken, client.info(taken).id)
    client.create(create_args(taken, "ubuntu"))
    stranger = client.info(taken)
    try:
        pytester.makepyfile("def test(orbstack_machine): pass")
        pytester.runpytest_subprocess().assert_outcomes(passed=1)
        assert names(client) == before | {taken}
        assert client.info(taken).id == stranger.id
    finally:
        client.delete(taken, stranger.id)


@pytest.mark.long
def test_machines_of_a_current_run_are_not_deleted(
    pytester: pytest.Pytester, client: Orbctl
) -> None:
    before = names(client)
    run = start(pytester)
    try:
        others = names(client) - before
        pytester.makepyfile("def test(orbstack_machine): pass")
        pytester.runpytest_subprocess().assert_outcomes(passed=1)
        assert names(client) - before == others
    finally:
        os.killpg(run.pid, signal.SIGINT)
        run.wait(120)
    assert names(client) == before


@pytest.mark.long
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_ends_during_creation_leaves_no_machine(
    pytester: pytest.Pytester, client: Orbctl, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """After a kill, the creating shell continues, and records the machine for the next run."""
    slow, made, go = (pytester.path / name for name in ("orbctl-slow", "made", "go"))
    slow.write_text(
        f'#!/bin/sh\n[ $1 = create ] && {{ {client.command} "$@"; : >{made}; '
        f"until [ -e {go} ]; do sleep 0.05; done; exit; }}\n"
        f'exec {client.command} "$@"\n'
    )
    slow.chmod(0o755)
    monkeypatch.setenv(COMMAND_VARIABLE, str(slow))
    pytester.makepyfile("def test(orbstack_machine): pass")
    run = subprocess.Popen([sys.executable, "-m", "pytest", "-q"], start_new_session=True)
    while not made.exists():
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(number)
    if number == signal.SIGKILL:
        run.wait()
    go.touch()
    run.wait()
    if number == signal.SIGTERM:
        assert not any("machines" in path.name for path in (pytester.path / "state").rglob("*"))
        return
    (record,) = (pytester.path / "state").rglob("machines")
    deadline = time.monotonic() + 60
    while not Record(record).machines():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (left,) = Record(record).machines()
    assert left in names(client)
    pytester.runpytest_subprocess().assert_outcomes(passed=1)


@pytest.mark.parametrize("init", ["none", "image"])
def test_init(pytester: pytest.Pytester, init: str) -> None:
    """The option overrides the environment."""
    pytester.makepyfile(
        f"""
        import os

        def test_variable():
            assert os.environ["ORBCTL_SIMULATOR_INIT"] == {init!r}
        """
    )
    before = os.environ.get("ORBCTL_SIMULATOR_INIT")
    pytester.runpytest_inprocess("--orbstack-init", init).assert_outcomes(passed=1)
    assert os.environ.get("ORBCTL_SIMULATOR_INIT") == before
