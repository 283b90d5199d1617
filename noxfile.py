"""The Makefile's targets, as nox sessions; `nox --list` shows them.

They share `.venv`, which uv sets up as far as a session needs it, and each runs with temporary
files of its own, see `scripts/temporary.py`. Each pair of `compat` has an environment of its own.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Callable, cast

import nox

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "scripts"))

import ending  # noqa: E402 one of scripts/
import measure  # noqa: E402
import temporary  # noqa: E402
from environments import (  # noqa: E402
    CACHE,
    PYTHON,
    Stop,
    ask,
    digest,
    environment,
    find_python,
    install,
    run,
    setup,
    usable,
    uv,
)

#: Supported pairs of Python and pyinfra; "" means the latest pyinfra.
PAIRS = [("3.9", "3.2"), ("3.9", "3.5"), ("3.10", "3.6.1"), ("3.12", "3.7"), ("3.13", "")]
PAIRS += [("3.14", "")]
#: Minimum number of pairs to test if CI=true.
FEWEST_PAIRS = 3
#: Files of tests of the connector's own part: how commands run, end and print. The oldest and the
#: latest pyinfra are enough for them.
OWN_PART = "test_concurrency or test_exit_time or test_faults or test_files_rsync or test_quoting"
SMOKE = ("conformance", "connector", "machines")
#: The last version of the predecessor on the package index, for comparison.
PREDECESSOR = "0.11.0"

#: Tests wait for machines and clocks, so there are more workers than processors.
WORKERS = os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS") or str((os.cpu_count() or 1) + 2)
#: Markers of the tests that have a target of their own.
SLOW = ("boot", "docs", "hosts", "long", "release", "template", "thorough")
#: The implementation of a session.
Body = Callable[[nox.Session], None]

nox.needs_version = ">=2026.4"
nox.options.sessions = ["unit"]


def end_leftovers(folder: Path) -> bool:
    """Remove machines, containers and mounts in a directory; False if something remains."""
    setup("test")  # leftovers of a `compat` pair are found even without `.venv`
    env = {**os.environ, **environment()}
    # The directory to clear must not receive the cleaner's own temporary files.
    env.pop("TMPDIR", None)
    # In a session of its own, where nothing disturbs it.
    argv = [str(PYTHON), "-m", "scripts.leftovers", str(folder)]
    return not subprocess.run(argv, cwd=ROOT, env=env, start_new_session=True).returncode


# Sessions --------------------------------------------------------------------------------------


def target(*groups: str, for_copier: bool = False) -> Callable[[Body], Body]:
    """A session in `.venv` with these groups, and with temporary files of its own."""

    def make(body: Body) -> Body:
        @functools.wraps(body)
        def session(session: nox.Session) -> None:
            ending.listen()
            ending.watch_make()
            try:
                if not temporary.sweep(end_leftovers):
                    measure.unhook(ROOT)
                with temporary.files(end_leftovers):
                    if groups:
                        setup(*groups, for_copier=for_copier)
                    body(session)
            except Stop as stop:
                session.error(str(stop))

        made = nox.session(python=False, name=body.__name__.replace("_", "-"))(session)
        return cast("Body", made)

    return make


def pytest(*args: object, **more: str) -> None:
    """Run pytest in `.venv`, with additional environment variables."""
    run(PYTHON, "-m", "pytest", *args, env={**environment(), **more})


@target("test", for_copier=True)
def demo(session: nox.Session) -> None:
    """Render the template and deploy it."""
    run(PYTHON, "scripts/demo.py")


@target("test")
def test(session: nox.Session) -> None:
    """Run all tests that are not slow."""
    if not usable(ask(PYTHON)[1]):
        print("no Python 3.10 or later was found: the template's tests are left out", flush=True)
    # In larger groups, since tests share machines: tests/conftest.py defines the groups.
    marked = " and ".join(f"not {marker}" for marker in SLOW)
    content = measure.tested(ROOT)
    pytest("tests", "-m", marked, "-n", WORKERS, "--dist", "loadfile")
    measure.note_passed(ROOT, "test", content)


@target("test")
def thorough(session: nox.Session) -> None:
    """Run the connector's tests in all combinations, and other tests that take long."""
    content = measure.tested(ROOT)
    pytest("tests", "-m", "thorough or long", "-n", WORKERS, "--dist", "loadfile")
    # The connector's suite again, with an sshd on loopback on the way to the machine.
    chosen = ("-m", "smoke", "-k", "session", "-n", "auto", "--dist", "loadfile")
    pytest("tests/conformance", "--over-ssh", *chosen)
    measure.note_passed(ROOT, "thorough", content)


@target("test")
def boot(session: nox.Session) -> None:
    """Run the tests of machines that boot."""
    # In their order: by number, which xdist prefers, the files with the longest tests come last.
    spread = ("-n", WORKERS, "--dist", "loadfile", "--no-loadscope-reorder")
    pytest("tests/simulator", "tests/contract", "-m", "boot", *spread)
    # Tests that an init, its services and a network could affect.
    files = [f"tests/conformance/test_{name}.py" for name in ("faults", "privilege_environment")]
    chosen = ("-m", "smoke", "-k", "not container", "--orbstack-image", "debian:bookworm")
    booted = {"ORBCTL_SIMULATOR_INIT": "image", "ORBCTL_SIMULATOR_IMAGES": "none"}
    pytest(*files, *chosen, "-n", "auto", **booted)


@target("test")
def unit(session: nox.Session) -> None:
    """Run the quick tests that need no machine."""
    marked = ("-m", "not long", "-n", "2", "-q")
    pytest("tests/unit", "tests/operations", "tests/facts", *marked)


@target("test", "coverage")
def hosts(session: nox.Session) -> None:
    """Run the tests of how runs end, and some others as they would run on other hosts."""
    # The longest first, which the last file has, and one by one.
    files = sorted((ROOT / "tests" / "hosts").glob("test_*.py"), reverse=True)
    pytest(*files, "-m", "hosts", "-n", WORKERS, "--maxschedchunk", "1")


@target("test", "template", for_copier=True)
def template(session: nox.Session) -> None:
    """Run the slow tests of the template."""
    pytest("tests/template", "-m", "template", "-n", WORKERS)


@target()
def compat(session: nox.Session) -> None:
    """Run the smoke tests with each supported pair of Python and pyinfra, all pairs at once.

    They use the wheel, as users get it.
    """
    dist = CACHE / "compat" / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    uv("build", "--quiet", "--wheel", "--out-dir", dist)
    (wheel,) = dist.glob("*.whl")
    pairs = [pair for pair in PAIRS if find_python(pair[0])]
    for pair in PAIRS:
        if pair not in pairs:
            print(f"left out, as that Python is not here: {pair_name(*pair)}", flush=True)
    if len(pairs) < (FEWEST_PAIRS if os.environ.get("CI") == "true" else 1):
        raise Stop(f"only {len(pairs)} of {len(PAIRS)} pairs of Python and pyinfra can be tested")
    shared = tempfile.mkdtemp(dir=os.environ["TMPDIR"])
    failed = []
    pool = ThreadPoolExecutor(max_workers=len(pairs))
    try:
        for done in as_completed([pool.submit(smoke, wheel, shared, *pair) for pair in pairs]):
            name, error, output = done.result()
            print(f"\n{name}\n{output}", flush=True)
            failed += [f"{name}: {error}"] if error else []
    except KeyboardInterrupt:
        ending.hand_on()
        raise
    finally:
        # Running tests have machines to delete before they end.
        pool.shutdown(cancel_futures=True)
    if failed:
        raise Stop("; ".join(failed))


def pair_name(python: str, pyinfra: str) -> str:
    """The name of a pair, as shown."""
    return f"Python {python} with pyinfra {pyinfra or '(the newest)'}"


def smoke(wheel: Path, shared: str, python: str, pyinfra: str) -> tuple[str, str, str]:
    """Run the smoke tests with one pair; return its name, the error, and the output.

    `shared` is a directory for what the pairs prepare once for all.
    """
    name = pair_name(python, pyinfra)
    venv = CACHE / "compat" / f"python-{python}-pyinfra-{pyinfra or 'newest'}"
    interpreter = venv / "bin" / "python"
    stamp = venv / "installed"
    try:
        if not stamp.exists() or stamp.read_text() != digest():
            uv("venv", "--quiet", "--clear", "--python", python, venv)
            install(venv, ["smoke"], f"pyinfra=={pyinfra}" if pyinfra else "pyinfra")
            stamp.write_text(digest())
        uv("pip", "install", "--quiet", "--python", interpreter, "--no-deps", "--reinstall", wheel)
    except Stop as stop:
        return name, str(stop), ""
    folders = [path for folder in SMOKE if (path := ROOT / "tests" / folder).exists()]
    # A container's commands use the same code as a machine's, but need an engine; pyinfra wraps a
    # command in the same way on each transport, so the oldest pair alone has both.
    left_out = f"spawn or {OWN_PART}" if pyinfra else "spawn"
    if (python, pyinfra) == PAIRS[0]:
        left_out = f"spawn and (every_wrapper or {OWN_PART})"
    chosen = f"not container and not ({left_out})"
    words = [interpreter, "-m", "pytest", "-m", "smoke", "-k", chosen]
    with ending.child(
        [str(word) for word in [*words, "-p", "no:cacheprovider", *folders]],
        cwd=ROOT,
        # Without machines the tests would be skipped, and that proves nothing here.
        env={**os.environ, **environment(venv), "CI": "true", "SHARED_DIRECTORY": shared},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as tests:
        output = tests.communicate()[0]
    return name, f"exit code {tests.returncode}" if tests.returncode else "", output


@target("test")
def bench(session: nox.Session) -> None:
    """Measure deploys beside other connectors, and save the results."""
    ours, old = (CACHE / "bench" / name for name in ("ours", PREDECESSOR))
    # They contain little else, since each package makes pyinfra's start slower.
    for venv in (ours, old):
        uv("venv", "--quiet", "--clear", "--python", PYTHON, venv)
    install(ours, ["smoke"])
    python = ours / "bin" / "python"
    code = "from importlib.metadata import version; print(version('pyinfra'), end='')"
    pyinfra = subprocess.check_output([str(python), "-c", code], text=True)
    packages = ("--group", "smoke", f"pyinfra-orbstack=={PREDECESSOR}", f"pyinfra=={pyinfra}")
    uv("pip", "install", "--quiet", "--python", old / "bin" / "python", *packages)
    env = environment(ours)
    run(python, "-m", "benchmarks.compare", "--predecessor", old, env=env)
    for name in ("remote", "many", "pyinfra_cost", "boots", "report"):
        run(python, "-m", f"benchmarks.{name}", env=env)


@target("test")
def conformance(session: nox.Session) -> None:
    """Run the connector's tests on the available `orbctl`, and save the results."""
    report = ("--conformance-report", "docs/conformance.md")
    pytest("tests/conformance", "-n", "auto", "--dist", "loadfile", *report)


@target("test")
def faults(session: nox.Session) -> None:
    """Run 10,000 steps with random faults; FAULT_SEED repeats a run."""
    os.environ.setdefault("FAULT_STEPS", "10000")
    pytest("tests", "-m", "faults", "-s")


@target("test")
def contract(session: nox.Session) -> None:
    """Check an `orbctl` against its documented behaviour: the simulator, or the one in ORBCTL."""
    pytest("tests/contract")


@target("test", "lint")
def lint(session: nox.Session) -> None:
    """Check style and types."""
    run(PYTHON, "-m", "ruff", "check")
    run(PYTHON, "-m", "ruff", "format", "--check")
    run(PYTHON, "-m", "mypy")
    # shellcheck is not available for Python 3.9.
    if (shellcheck := PYTHON.with_name("shellcheck")).exists():
        run(shellcheck, "--shell=sh", *sorted((ROOT / "src").rglob("*.sh")))
        run(shellcheck, ROOT / ".ci" / "run")


@target("test", "coverage")
def coverage(session: nox.Session) -> None:
    """Run the tests of `test`, or the given ones, and measure their coverage."""
    run(PYTHON, "scripts/measure.py", *session.posargs)


@target("test", "docs", "browser", for_copier=True)
def docs(session: nox.Session) -> None:
    """Build the documentation, and run its instructions."""
    build = [PYTHON, "-m", "mkdocs", "build", "--strict"]
    run(*build, env={**environment(), "NO_MKDOCS_2_WARNING": "1"})
    # A page in one process while the browser looks at the site in another.
    pytest("tests/docs", "-m", "docs", "-n", "2", "--dist", "loadfile")


@target("release", for_copier=True)
def release_test(session: nox.Session) -> None:
    """Plant faults that `release-check` must find."""
    pytest("tests/release", "-m", "release", "-n", "auto")


@target("release", for_copier=True)
def release_check(session: nox.Session) -> None:
    """Check everything that a release needs."""
    run(PYTHON, "scripts/release_check.py")


@target("release", for_copier=True)
def release(session: nox.Session) -> None:
    """Prepare a version to be pushed."""
    run(PYTHON, "scripts/release.py")


@target()
def clean(session: nox.Session) -> None:
    """Delete everything that the other sessions created."""
    others = temporary.sweep(end_leftovers)
    if others:
        raise Stop(f"a run goes on, or left something: see {', '.join(map(str, others))}")
    if any(CACHE.glob("demo/machines")) or any(CACHE.glob("state/**/machines")):
        setup("test")
        run(PYTHON, "scripts/demo.py", "--clean")
    if any(CACHE.glob("*/machines")) and not end_leftovers(CACHE):
        raise Stop(f"there are machines in {CACHE} that could not be deleted")
    measure.unhook(ROOT)
    # This session runs in one of them and uses another; the Makefile deletes those.
    for path in CACHE.glob("*"):
        if path.name not in ("nox", "runs"):
            temporary.remove(path)
