"""A checkout with a small suite, whose `make` runs can be interrupted."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ..conftest import ROOT
from ..containers import CACHE as PODMAN

NOX = ROOT / ".cache" / "nox"
SUITE = """
import os, pathlib, time

def test_one(machines, orbstack_machine, tmp_path, request):
    machines.create()
    if os.environ.get("WITH_CONTAINER"):
        containers = request.getfixturevalue("containers")
        containers.run(request.getfixturevalue("small_image"))
    (tmp_path / "big").write_bytes(bytes(10**6))
    pathlib.Path(os.environ["READY"]).touch()
    time.sleep(300)
"""


PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def _end_with_parent() -> None:
    """A run in its own session would outlive the tests if these are killed."""
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class Checkout:
    """A partial copy that `make` can run in, with its own temporary files."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "check out"
        # Near the top, because podman accepts no long paths.
        self.temporary = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
        self.ready = folder / "ready"
        self.log = folder / "log"
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "scripts", self.path / "scripts", ignore=ignore)
        (self.path / "tests").mkdir()
        kept = [f"tests/{name}.py" for name in ("__init__", "conftest", "containers", "sharing")]
        for name in ("Makefile", "noxfile.py", "pyproject.toml", *kept):
            shutil.copy(ROOT / name, self.path / name)
        (self.path / "tests" / "test_small.py").write_text(SUITE)
        (self.path / ".cache").mkdir()
        PODMAN.mkdir(parents=True, exist_ok=True)
        (self.path / ".cache" / "podman").symlink_to(PODMAN)
        if not (NOX / "bin" / "nox").exists():  # pytest was started manually
            subprocess.run(["make", ".cache/nox/bin/nox"], cwd=ROOT, check=True)
        (self.path / ".cache" / "nox").symlink_to(NOX)
        self._environment()

    def _environment(self) -> None:
        """The environment in which these tests run."""
        programs = self.path / ".venv" / "bin"
        programs.mkdir(parents=True)
        python = programs / "python"
        python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
        python.chmod(0o755)
        digest = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
        (programs.parent / "installed").write_text("\n".join([digest, "coverage", "lint", "test"]))

    def start(self, target: str, **env: str) -> subprocess.Popen[bytes]:
        """Start a target in its own session and process group."""
        return self._start(["make", target, f"PYTHON={sys.executable}"], env)

    def ci(self) -> subprocess.Popen[bytes]:
        """Start .ci/run with only the tests as its target, and wait until they run."""
        program = self.path / ".ci" / "run"
        program.parent.mkdir()
        text = (ROOT / ".ci" / "run").read_text()
        program.write_text(re.sub("^targets=.*", 'targets="test:5"', text, flags=re.MULTILINE))
        # make finds this Python on its own.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        running = self._start(["bash", str(program)], {"PATH": path})
        self.wait_for(self.ready.exists, running)
        return running

    def _start(self, argv: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
        self.ready.unlink(missing_ok=True)
        clean = {k: v for k, v in os.environ.items() if k[:6] not in ("PYTEST", "MAKEFL", "MAKELE")}
        # Without workers, it exits faster.
        clean["PYTEST_XDIST_AUTO_NUM_WORKERS"] = "0"
        for name in ("XDG_STATE_HOME", "ORBCTL_SIMULATOR_HOME", "CI", "PYINFRA_ORBSTACK_ORBCTL"):
            clean.pop(name, None)
        clean.update(TMPDIR=str(self.temporary), READY=str(self.ready), **env)
        with self.log.open("ab") as log:
            return subprocess.Popen(
                argv,
                cwd=self.path,
                env=clean,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    def test(self, target: str = "test", **env: str) -> subprocess.Popen[bytes]:
        """Start the tests, and wait until everything that they need exists."""
        make = self.start(target, **env)
        self.wait_for(self.ready.exists, make)
        return make

    def make(self, target: str) -> int:
        """Run a target to completion."""
        return self.start(target).wait(600)

    def wait_for(self, condition: object, make: subprocess.Popen[bytes] | None = None) -> None:
        assert callable(condition)
        deadline = time.monotonic() + 600
        while not condition():
            assert time.monotonic() < deadline, self.log.read_text()
            assert make is None or make.poll() is None, self.log.read_text()
            time.sleep(0.05)

    def left(self) -> list[str]:
        """What runs left behind: processes, mounts, temporary files, records."""
        found = [str(path) for path in self.temporary.iterdir()]
        cache = self.path / ".cache"
        found += [str(path) for path in cache.glob("runs/*")]
        found += [str(path) for path in cache.glob("state/**/machines")]
        found += [f"process {pid}: {text}" for pid, text in self.processes()]
        mounted = Path("/proc/self/mountinfo").read_text().splitlines()
        return found + [f"mount {line}" for line in mounted if self.mark in line]

    @property
    def mark(self) -> str:
        """The text that all paths of this checkout contain."""
        return str(self.temporary)

    def processes(self) -> Iterator[tuple[int, str]]:
        """Processes that belong to it, by arguments, environment or mounts."""
        mark = self.mark.encode()
        for folder in Path("/proc").glob("[0-9]*"):
            pid = int(folder.name)
            if pid == os.getpid():
                continue
            try:
                words = (folder / "cmdline").read_bytes()
                about = words + (folder / "environ").read_bytes()
                about += (folder / "mountinfo").read_bytes()
            except OSError:
                continue
            # Mounts are shared with other processes; only a machine's mounts name its directory.
            if mark in about:
                yield pid, words.replace(b"\0", b" ").decode(errors="replace")[:200]

    def end(self) -> None:
        """Kill what is left if a test failed, and delete its temporary files."""
        for pid, _ in list(self.processes()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.temporary, ignore_errors=True)


def child_of(pid: int) -> int:
    """The first child of a process."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(") ")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            return int(stat.parent.name)
    raise LookupError(f"process {pid} has no child")
