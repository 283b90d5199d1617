"""A part of the suite, run as on hosts that differ from this one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ..conftest import ROOT

LINUX = sys.platform == "linux"
STICKY = Path("/proc/sys/fs/protected_regular")
#: From each directory, some tests that write files, or start processes and read their output.
SOME = [
    "tests/conformance/test_containers.py::test_an_image_with_only_busybox",
    "tests/conformance/test_quoting_encoding_output.py::test_U1_cjk_and_emoji",
    "tests/connector/test_pyinfra_command.py",
    "tests/contract/test_lifecycle.py::test_mounts",
    "tests/simulator/test_tools.py::test_images",
    "tests/template/test_update.py::test_make_update[.]",
    "tests/testing/test_runs.py",
    "tests/unit/test_docker.py",
    "tests/unit/test_errors.py",
]
#: Root overwrites another user's file in a directory that everyone may write to.
OTHERS_FILES = ["tests/conformance/test_files.py", "-k", "F9"]
#: Tests that need no separate machine.
WITHOUT_MACHINES = ["tests/unit", "tests/testing/test_runs.py", "tests/connector"]


@dataclass(frozen=True)
class Host:
    """The properties of a host.

    Attributes:
        umask: The umask of processes.
        files: How many files a process may have open.
        env: Variables; None removes one.
        odd_places: Whether the directory for temporary files is a link with a space in its name.
        sticky: The value of fs.protected_regular.
        through: An executable that starts all others.
    """

    umask: int = 0o022
    files: int = 1024
    env: Mapping[str, str | None] = field(default_factory=dict)
    odd_places: bool = False
    sticky: int | None = None
    through: Sequence[str] = ()


NO_LOCALE = dict.fromkeys(("LANG", "LANGUAGE", "LC_ALL", "LC_CTYPE"))
HOSTS = {
    "strict": Host(0o077, 256, {**NO_LOCALE, "LC_ALL": "C"}, odd_places=True, sticky=2),
    "shared": Host(0o027, env=NO_LOCALE),
    "old kernel": Host(
        env={**NO_LOCALE, "LANG": "C.UTF-8"},
        through=[sys.executable, str(Path(__file__).with_name("old_kernel.py"))],
    ),
}
NOBODY = Host(
    env={"HOME": "/", "USER": None, "LOGNAME": None, "CI": None},
    through=["unshare", "--user", "--map-user=12345", "--map-group=12345"],
)


@contextlib.contextmanager
def sticky(value: int | None) -> Iterator[None]:
    """Set fs.protected_regular to this value for the whole host; one test at a time."""
    if value is None:
        yield
        return
    if not STICKY.exists() or not os.access(STICKY, os.W_OK):
        pytest.skip("fs.protected_regular cannot be set here")
    with Path(tempfile.gettempdir(), "sticky.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = STICKY.read_text()
        STICKY.write_text(str(value))
        try:
            yield
        finally:
            STICKY.write_text(before)


def run(host: Host, folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run an executable as on that host, with a directory for its temporary files."""
    temporary = folder / "tmp"
    temporary.mkdir()
    if host.odd_places:
        temporary = folder / "a link"
        temporary.symlink_to(folder / "tmp")
    env = {"PATH": os.environ["PATH"], **os.environ, **host.env, "TMPDIR": str(temporary)}
    env.update(XDG_STATE_HOME=f"{temporary}/state", ORBCTL_SIMULATOR_HOME=f"{temporary}/simulator")
    given = {
        name: value
        for name, value in env.items()
        if value is not None and not name.startswith(("PYTEST", "MAKE", "PYINFRA_ORBSTACK"))
    }
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]

    def become() -> None:
        os.umask(host.umask)
        resource.setrlimit(resource.RLIMIT_NOFILE, (host.files, hard))

    return subprocess.run(
        [*host.through, *argv],
        cwd=ROOT,
        env=given,
        preexec_fn=become,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    )


def outcomes(output: str) -> dict[str, int]:
    """How many tests passed, failed and so on."""
    return {what: int(count) for count, what in re.findall(r"(\d+) (passed|failed|error)", output)}


PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]


@pytest.mark.timeout(900)
@pytest.mark.skipif(not LINUX or os.geteuid() != 0, reason="needs root on Linux")
@pytest.mark.parametrize("name", HOSTS)
def test_a_sample_of_all_tests_passes(name: str, tmp_path: Path) -> None:
    host = HOSTS[name]
    with sticky(host.sticky):
        # Without machines, the tests would be skipped, which would prove nothing.
        done = run(host, tmp_path, "env", "CI=true", *PYTEST, *SOME)
    assert done.returncode == 0, done.stdout[-6000:]
    assert set(outcomes(done.stdout)) == {"passed"}


@pytest.mark.skipif(not LINUX or os.geteuid() != 0, reason="needs root on Linux")
@pytest.mark.parametrize("value", [0, 2])
def test_files_of_other_users_can_be_written(value: int, tmp_path: Path) -> None:
    with sticky(value):
        done = run(Host(), tmp_path, "env", "CI=true", *PYTEST, *OTHERS_FILES)
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.mark.skipif(not LINUX or not shutil.which("unshare"), reason="needs unshare")
def test_a_user_without_an_account_gets_an_error(tmp_path: Path) -> None:
    probe = subprocess.run([*NOBODY.through, "true"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"no user namespaces here: {probe.stderr.strip()}")
    done = run(NOBODY, tmp_path, *PYTEST, "-m", "not long", *WITHOUT_MACHINES)
    assert done.returncode == 0, done.stdout[-6000:]
    assert outcomes(done.stdout)["passed"] > 100
    assert "machines need root" in done.stdout
