"""What the Makefile's targets do: set up `.venv` as far as a target needs it, then run the tools.

Nothing but the standard library of Python 3.9 is used here, so that a Mac's own Python can start
it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import ending
import measure
from environments import (
    CACHE,
    PYTHON,
    ROOT,
    Stop,
    environment,
    find_python,
    install,
    make_venv,
    quietly,
    run,
    setup,
    usable,
)

#: A file for each run: where its temporary files are. The run holds a lock on it.
RUNS = CACHE / "runs"

#: What is promised to work together; without a number it is the newest that pip finds.
PAIRS = [("3.9", "3.2"), ("3.9", "3.5"), ("3.10", "3.6.1"), ("3.12", "3.7"), ("3.13", "")]
PAIRS += [("3.14", "")]
#: What came before, from the package index, to be compared with.
PREDECESSOR = "0.11.0"
#: So many of them have to be tested where CI=true.
FEWEST_PAIRS = 3
SMOKE = ("conformance", "connector", "facts", "machines", "operations")

#: Tests wait for machines and clocks, so more run than there are processors.
WORKERS = os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS") or str((os.cpu_count() or 1) + 2)
#: Markers of the tests that have a target of their own.
SLOW = ("boot", "docs", "hosts", "release", "template")
#: What tools leave behind in a checkout.
LEFTOVERS = ["build", "demo", "dist", "site", ".cache", ".venv", ".coverage", ".hypothesis"]
LEFTOVERS += [".mypy_cache", ".pytest_cache", ".ruff_cache"]


# Targets ---------------------------------------------------------------------------------------


def pytest(*args: object) -> None:
    """Run pytest in `.venv`."""
    run(PYTHON, "-m", "pytest", *args, env=environment())


def demo() -> None:
    """Render the template and deploy it."""
    setup("test", for_copier=True)
    run(PYTHON, "scripts/demo.py", env=environment())


def test() -> None:
    """Run everything that is not slow."""
    setup("test")
    if not usable(PYTHON):
        print("no Python 3.10 or later was found: the template's tests are left out", flush=True)
    # In larger pieces, since tests share machines: tests/conftest.py says in which.
    marked = " and ".join(f"not {marker}" for marker in SLOW)
    content = measure.tested(ROOT)
    pytest("tests", "-m", marked, "-n", WORKERS, "--dist", "loadfile")
    measure.note_passed(ROOT, content)


def boot() -> None:
    """Run the tests of machines that boot."""
    setup("test")
    pytest("tests/simulator", "tests/contract", "-m", "boot", "-n", "auto", "--dist", "loadfile")


def unit() -> None:
    """Run the quick tests that need no machine."""
    setup("test")
    marked = ("-m", "not long", "-n", "2", "-q")
    pytest("tests/unit", "tests/operations", "tests/facts", *marked)


def hosts() -> None:
    """Run the tests of how runs end, and some of all others as they would run on other hosts."""
    setup("test", "coverage")
    pytest("tests/hosts", "-m", "hosts", "-n", "auto")


def template() -> None:
    """Run the slow tests of the template."""
    setup("test", "template", for_copier=True)
    pytest("tests/template", "-m", "template", "-n", WORKERS)


def compat() -> None:
    """Run the smoke tests with each supported pair of Python and pyinfra, three pairs at a time."""
    found = [(find_python(python), python, pyinfra) for python, pyinfra in PAIRS]
    pairs = [pair for pair in found if pair[0]]
    for _, python, pyinfra in (pair for pair in found if not pair[0]):
        print(f"left out, as that Python is not here: {pair_name(python, pyinfra)}", flush=True)
    if len(pairs) < (FEWEST_PAIRS if os.environ.get("CI") == "true" else 1):
        raise Stop(f"only {len(pairs)} of {len(found)} pairs of Python and pyinfra can be tested")
    failed = []
    pool = ThreadPoolExecutor(max_workers=3)
    try:
        for done in as_completed([pool.submit(smoke, *pair) for pair in pairs]):
            name, error, output = done.result()
            print(f"\n{name}\n{output}", flush=True)
            failed += [f"{name}: {error}"] if error else []
    except KeyboardInterrupt:
        ending.hand_on()
        raise
    finally:
        # The tests that run have machines to delete before they end.
        pool.shutdown(cancel_futures=True)
    if failed:
        raise Stop("\n".join(failed))
    print(f"{len(pairs)} pairs of Python and pyinfra passed")


def pair_name(python: str, pyinfra: str) -> str:
    """A pair as it is shown."""
    return f"Python {python} with pyinfra {pyinfra or '(the newest)'}"


def smoke(interpreter: str, python: str, pyinfra: str) -> tuple[str, str, str]:
    """Run the smoke tests with one pair; return its name, what went wrong, and the output."""
    name = pair_name(python, pyinfra)
    venv = CACHE / "compat" / f"python-{python}-pyinfra-{pyinfra or 'newest'}"
    stamp = venv / "installed"
    digest = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    try:
        if not stamp.exists() or stamp.read_text() != digest:
            make_venv(interpreter, venv)
            install(venv, ["smoke"], f"pyinfra=={pyinfra}" if pyinfra else "pyinfra")
            stamp.write_text(digest)
    except Stop as stop:
        return name, str(stop), ""
    folders = [path for folder in SMOKE if (path := ROOT / "tests" / folder).exists()]
    # A container's commands take the same way as a machine's, but need an engine; what pyinfra puts
    # around a command is the same on each transport.
    chosen = "not container and not (every_wrapper and spawn)"
    words = [venv / "bin" / "python", "-m", "pytest", "-m", "smoke", "-k", chosen]
    with ending.child(
        [str(word) for word in [*words, "-p", "no:cacheprovider", *folders]],
        cwd=ROOT,
        # Without machines the tests would be skipped, and that proves nothing here.
        env={**os.environ, **environment(venv), "CI": "true"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as tests:
        output = tests.communicate()[0]
    error = f"the tests ended with exit code {tests.returncode}" if tests.returncode else ""
    return name, error, output


def bench() -> None:
    """Measure deploys beside other connectors, and write down what was found."""
    setup("bench")
    old = CACHE / "bench" / f"pyinfra-orbstack-{PREDECESSOR}"
    code = "from importlib.metadata import version; print(version('pyinfra'), end='')"
    pyinfra = subprocess.check_output([str(PYTHON), "-c", code], text=True)
    stamp = old / "installed"
    if not stamp.exists() or stamp.read_text() != pyinfra:
        make_venv(PYTHON, old)
        # Not ours beside it: both bear one name. And the same pyinfra, or that is what is measured.
        packages = (f"pyinfra-orbstack=={PREDECESSOR}", f"pyinfra=={pyinfra}")
        quietly(old / "bin" / "python", "-m", "pip", "--quiet", "install", *packages)
        stamp.write_text(pyinfra)
    run(PYTHON, "-m", "benchmarks.compare", "--predecessor", old, env=environment())
    run(PYTHON, "-m", "benchmarks.report", env=environment())
    run(PYTHON, "-m", "benchmarks.boots", env=environment())


def conformance() -> None:
    """Run the connector's suite on what `orbctl` there is, and write down how it did."""
    setup("test")
    report = ("--conformance-report", "docs/conformance.md")
    pytest("tests/conformance", "-n", "auto", "--dist", "loadfile", *report)


def faults() -> None:
    """Run 10,000 steps with random faults; FAULT_SEED repeats a run."""
    setup("test")
    os.environ.setdefault("FAULT_STEPS", "10000")
    pytest("tests", "-m", "faults", "-s")


def contract() -> None:
    """Hold an `orbctl` to what is documented of it: the simulator, or the one that ORBCTL names."""
    setup("test")
    pytest("tests/contract")


def lint() -> None:
    """Check style and types."""
    setup("test", "lint")
    run(PYTHON, "-m", "ruff", "check")
    run(PYTHON, "-m", "ruff", "format", "--check")
    run(PYTHON, "-m", "mypy")
    # There is none for Python 3.9.
    if (shellcheck := PYTHON.with_name("shellcheck")).exists():
        run(shellcheck, "--shell=sh", *sorted((ROOT / "src").rglob("*.sh")))
        run(shellcheck, ROOT / ".ci" / "run")


def coverage() -> None:
    """Run what `test` runs, and measure what it reaches."""
    setup("test", "coverage")
    run(PYTHON, "scripts/measure.py", env=environment())


def docs() -> None:
    """Build the documentation, and do what it tells to do."""
    setup("test", "docs", for_copier=True)
    build = [PYTHON, "-m", "mkdocs", "build", "--strict"]
    run(*build, env={**environment(), "NO_MKDOCS_2_WARNING": "1"})
    pytest("tests/docs", "-m", "docs")


def release_test() -> None:
    """Plant faults that `release-check` must find."""
    setup("release", for_copier=True)
    pytest("tests/release", "-m", "release", "-n", "auto")


def release_check() -> None:
    """Check all that a release needs."""
    setup("release", for_copier=True)
    run(PYTHON, "scripts/release_check.py", env=environment())


def release() -> None:
    """Make a version ready to be pushed."""
    setup("release", for_copier=True)
    run(PYTHON, "scripts/release.py", env=environment())


def clean() -> None:
    """Delete what the other targets made."""
    others = [path for path in RUNS.glob("*") if path.name not in own and not sweep(path)]
    if others:
        raise Stop(f"a run goes on, or left something: see {', '.join(map(str, others))}")
    if any(CACHE.glob("demo/machines")) or any(CACHE.glob("state/**/machines")):
        setup("test")
        run(PYTHON, "scripts/demo.py", "--clean", env=environment())
    if any(CACHE.glob("*/machines")) and not end_leftovers(CACHE):
        raise Stop(f"there are machines in {CACHE} that could not be deleted")
    measure.unhook(ROOT)
    for name in LEFTOVERS:
        path = ROOT / name
        if path.is_dir() and not path.is_symlink():
            remove(path)
        else:
            path.unlink(missing_ok=True)
    for folder in ("benchmarks", "scripts", "src", "tests"):
        for cache in list((ROOT / folder).rglob("__pycache__")):
            shutil.rmtree(cache)


# Temporary files -------------------------------------------------------------------------------

#: Names of the files in RUNS that are this process's.
own: set[str] = set()


@contextlib.contextmanager
def temporary_files() -> Iterator[None]:
    """Have a folder for those of all programs, since pytest, uv and others leave some behind.

    What a run has left that was killed is removed first.
    """
    others = [path for path in RUNS.glob("*") if not sweep(path)]
    if not others:
        measure.unhook(ROOT)
    folder = Path(tempfile.gettempdir(), f"orb-{secrets.token_hex(4)}")
    RUNS.mkdir(parents=True, exist_ok=True)
    note = RUNS / folder.name
    with note.open("w") as file:
        # Whatever this process starts goes on with the lock, if this process alone is killed.
        fcntl.flock(file, fcntl.LOCK_EX)
        own.add(note.name)
        ending.INHERITED.append(file.fileno())
        file.write(str(folder))
        file.flush()
        folder.mkdir(mode=0o700)
        os.environ["TMPDIR"] = str(folder)
        try:
            yield
        finally:
            if discard(folder):
                note.unlink(missing_ok=True)
            own.discard(note.name)
            ending.INHERITED.remove(file.fileno())


def sweep(note: Path) -> bool:
    """Remove what a run has left that was killed; False if it goes on, or something stays."""
    with contextlib.suppress(BlockingIOError, FileNotFoundError), note.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        folder = Path(file.read())
        # Half a note of a run that was killed before it had made anything.
        if re.fullmatch(r"orb-\w+", folder.name) and folder.exists():
            print(f"removing what a killed run left in {folder}", flush=True)
            if not discard(folder):
                return False
        note.unlink()
    return not note.exists()


def discard(folder: Path) -> bool:
    """Delete a folder of temporary files, and first the machines and containers in it."""
    used = folder.exists() and any(path.is_dir() for path in folder.iterdir())
    if used and not end_leftovers(folder):
        print(f"{folder} stays; `make clean` tries again", file=sys.stderr)
        return False
    remove(folder)
    return not folder.exists()


def end_leftovers(folder: Path) -> bool:
    """Put an end to machines, containers and mounts in a folder; False if something stays."""
    if not PYTHON.exists():
        setup()
    argv = [str(PYTHON), "-m", "scripts.leftovers", str(folder)]
    env = {**os.environ, **environment()}
    # What is ended is not the place for its own temporary files.
    env.pop("TMPDIR", None)
    # In a session of its own, where nothing disturbs it.
    return not subprocess.run(argv, cwd=ROOT, env=env, start_new_session=True).returncode


def remove(folder: Path) -> None:
    """Delete a folder; what the simulator made in it for an ordinary user belongs to root."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        run("sudo", "-n", "rm", "-rf", "--", folder)


TARGETS = {
    function.__name__.replace("_", "-"): function
    for function in (
        *(demo, unit, test, boot, hosts, template, compat, bench, conformance, faults, contract),
        *(lint, coverage, docs, release_test, release_check, release, clean),
    )
}


def main() -> None:
    """Run the target that the Makefile names."""
    if len(sys.argv) != 2 or sys.argv[1] not in TARGETS:
        raise SystemExit(f"usage: python3 scripts/dev.py {'|'.join(TARGETS)}")
    ending.listen()
    ending.watch_make()
    try:
        with temporary_files():
            TARGETS[sys.argv[1]]()
    except Stop as stop:
        raise SystemExit(str(stop)) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
