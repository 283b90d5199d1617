"""A state folder of its own for these tests, and a look at the host when they are over."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.conftest import ROOT, Made
from tests.contract.program import Answer, Program


def make_program(home: Path, **env: str) -> Program:
    """A simulator with a state folder of its own."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("ORBCTL_")}
    cache = os.environ.get("ORBCTL_SIMULATOR_CACHE", str(ROOT / ".cache" / "simulator-layers"))
    own = {"ORBCTL_SIMULATOR_HOME": str(home), "ORBCTL_SIMULATOR_CACHE": cache}
    env = {**own, "ORBCTL_SIMULATOR_IMAGES": "host", **env}
    return Program([sys.executable, "-m", "orbctl_simulator"], {**kept, **env})


def processes_of(home: Path) -> list[str]:
    """All processes of machines in a state folder, by the path that their pid 1 was given."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            line = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
        except OSError:
            continue
        if os.fsencode(home) in line and b"simulator.init" in line:
            found.append(entry.name)
    return found


def mounts_of(home: Path) -> list[str]:
    """What is mounted in the host's own namespace from, or in, a state folder."""
    mounts = Path("/proc/self/mountinfo").read_text().replace("\\040", " ").splitlines()
    return [line for line in mounts if str(home) in line or "upperdir=upper" in line]


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("simulator state") / "home, of: all"


@pytest.fixture(scope="session")
def orb(home: Path) -> Iterator[Program]:
    program = make_program(home)
    trial = program("doctor")
    if trial.code != 0:
        reason = f"no machines on this host: {trial.out.decode()}{trial.err.decode()}"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    yield program
    assert processes_of(home) == []
    assert mounts_of(home) == []
    program("list")
    if os.geteuid() == 0:
        assert list((home / "machines").glob("*")) == []


@pytest.fixture(scope="session")
def made(orb: Program) -> Iterator[Made]:
    made = Made(orb)
    yield made
    made.delete_all()


@pytest.fixture(scope="session")
def machine(made: Made) -> str:
    """A running machine for tests that leave it as it was."""
    return made.create()


@pytest.fixture
def own(tmp_path: Path, orb: Program) -> Iterator[Program]:
    """A simulator with a state folder for one test, whose machines may all be deleted."""
    program = make_program(tmp_path / "state")
    yield program
    program("delete", "--all", "--force")
    assert processes_of(tmp_path / "state") == []


@pytest.fixture(scope="session")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root file system of a few programs of this host, with what they are linked to."""
    before = os.umask(0o022)  # every user of a machine is to read it, whoever makes it
    try:
        return make_rootfs(tmp_path_factory.mktemp("rootfs"))
    finally:
        os.umask(before)


def make_rootfs(root: Path) -> Path:
    needed = []
    for name in ("sh", "cat", "id", "hostname", "ls"):
        program = shutil.which(name)
        assert program
        shown = subprocess.run(["ldd", program], capture_output=True, text=True).stdout
        needed += [word for word in shown.split() if word.startswith("/")]
        (root / "bin").mkdir(exist_ok=True)
        shutil.copy2(program, root / "bin" / name)
    for library in needed:
        (root / library[1:]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(library, root / library[1:])
    for folder in ("etc", "usr/bin", "root"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "usr/bin/sudo").write_text("there")
    (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nold:x:501:501::/:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\nwheel:x:10:old\nother:x:501:\n")
    (root / "etc/os-release").write_text('ID=alpine\nVERSION_ID="3.22"\nPRETTY_NAME="Tiny"\n')
    return root


@pytest.fixture
def victim(orb: Program, made: Made, machine: str) -> str:
    """A running machine whose files a test may spoil."""
    name = made.clone(machine)
    assert orb("start", name).code == 0
    return name


def script_in(orb: Program, machine: str, script: str, user: str = "root") -> Answer:
    return orb("run", "-m", machine, "-u", user, "sh", "-c", script)


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A directory of the host's that nothing may reach."""
    folder = tmp_path / "outside"
    folder.mkdir()
    for name in ("passwd", "cron.d/job", "var/log/canary", "var/cache/canary"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("original")
    before = listing(folder)
    yield folder
    assert listing(folder) == before


def listing(folder: Path) -> list[tuple[str, int, int, bytes]]:
    """All that there is to be seen of a tree."""
    seen = []
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        seen.append((str(path), status.st_mode, status.st_uid, content))
    return seen


class Elsewhere:
    """The simulator in a mount namespace of its own, prepared by a script."""

    def __init__(self, place: Path, cache: str) -> None:
        self.place, self.cache = place, cache
        (place / "state").mkdir()

    def __call__(self, script: str) -> Answer:
        """Run a script; in it `orb` is the simulator, whose state folder is ``state``."""
        program = make_program(self.place / "state", ORBCTL_SIMULATOR_CACHE=self.cache)
        head = (
            f'set -e; cd "{self.place}"; orb() {{ "{sys.executable}" -m orbctl_simulator "$@"; }}; '
        )
        words = ["unshare", "-m", "--propagation", "private", "sh", "-c", head + script]
        return Program(words, program.env)()


@pytest.fixture
def elsewhere(orb: Program, root_only: None, tmp_path: Path) -> Elsewhere:
    return Elsewhere(tmp_path, orb.env["ORBCTL_SIMULATOR_CACHE"])
