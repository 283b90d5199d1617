"""A part of the suite, run as on hosts that differ from this one."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from .. import sharing
from ..conftest import ROOT
from ..protection import protection

LINUX = sys.platform == "linux"
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
OTHERS_FILES = [
    f"tests/conformance/test_files.py::test_F9_{name}"
    for name in ("owner_of_new_and_old_files", "with_passwords")
]
#: Tests of files, processes and errors, which need no machine.
WITHOUT_MACHINES = [
    *(f"tests/unit/test_{name}.py" for name in ("docker", "errors", "localfile", "orbctl")),
    *(f"tests/unit/test_{name}.py" for name in ("places", "process", "protocol", "record")),
    "tests/testing/test_runs.py",
    "tests/connector",
]


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


def run_sample(
    host: Host, folder: Path, shared: Path, tests: Sequence[str]
) -> subprocess.CompletedProcess[str]:
    """Run tests as on that host, with machines: if they were skipped, that would prove nothing."""
    settings = ("env", "CI=true", f"{sharing.VARIABLE}={shared}")
    return run(host, folder, *settings, *PYTEST, *tests)


@pytest.mark.skipif(not LINUX or os.geteuid() != 0, reason="needs root on Linux")
@pytest.mark.parametrize("name", HOSTS)
def test_a_sample_of_all_tests_passes(name: str, tmp_path: Path, shared_directory: Path) -> None:
    host = HOSTS[name]
    tests, setting = SOME, contextlib.nullcontext()
    if host.sticky is not None:
        tests, setting = SOME + OTHERS_FILES, protection(protected_regular=host.sticky)
    with setting:
        done = run_sample(host, tmp_path, shared_directory, tests)
    assert done.returncode == 0, done.stdout[-6000:]
    assert set(outcomes(done.stdout)) == {"passed"}


@pytest.mark.skipif(not LINUX or os.geteuid() != 0, reason="needs root on Linux")
def test_files_of_other_users_can_be_written_without_protection(
    tmp_path: Path, shared_directory: Path
) -> None:
    with protection(protected_regular=0):
        done = run_sample(Host(), tmp_path, shared_directory, OTHERS_FILES)
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
