"""A separate state directory for these tests, and a check of the host after them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orbctl_simulator.runstate import RunState
from tests.contract.conftest import ROOT, Made
from tests.contract.program import Answer, Program


def make_program(home: Path, **env: str) -> Program:
    """A simulator with its own state directory."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("ORBCTL_")}
    cache = os.environ.get("ORBCTL_SIMULATOR_CACHE", str(ROOT / ".cache" / "simulator-layers"))
    own = {"ORBCTL_SIMULATOR_HOME": str(home), "ORBCTL_SIMULATOR_CACHE": cache}
    env = {**own, "ORBCTL_SIMULATOR_IMAGES": "host", "ORBCTL_SIMULATOR_INIT": "none", **env}
    return Program([sys.executable, "-m", "orbctl_simulator"], {**kept, **env})


def processes_of(home: Path) -> list[str]:
    """All processes of machines in a state directory, found by their pid 1's arguments."""
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
    """Mounts from, or in, a state directory in the host's own namespace."""
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
    """A running machine for tests that do not change it."""
    return made.create()


@pytest.fixture
def own(tmp_path: Path, orb: Program) -> Iterator[Program]:
    """A simulator with a state directory for one test, whose machines may all be deleted."""
    program = make_program(tmp_path / "state")
    yield program
    program("delete", "--all", "--force")
    assert processes_of(tmp_path / "state") == []


@pytest.fixture(scope="session")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root file system with a few of this host's executables and their libraries."""
    before = os.umask(0o022)  # every user of a machine must be able to read it
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
    """A running machine whose files a test may damage."""
    name = made.clone(machine)
    assert orb("start", name).code == 0
    return name


def script_in(orb: Program, machine: str, script: str, user: str = "root") -> Answer:
    return orb("run", "-m", machine, "-u", user, "sh", "-c", script)


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A directory of the host that nothing may reach."""
    folder = tmp_path / "outside"
    folder.mkdir()
    for name in ("passwd", "cron.d/job", "var/log/canary", "var/cache/canary"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("original")
    before = listing(folder)
    yield folder
    assert listing(folder) == before


def listing(folder: Path) -> list[tuple[str, int, int, bytes]]:
    """Everything that can be seen of a tree."""
    seen = []
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        seen.append((str(path), status.st_mode, status.st_uid, content))
    return seen


class Elsewhere:
    """The simulator in its own mount namespace, prepared by a script."""

    def __init__(self, place: Path, cache: str) -> None:
        self.place, self.cache = place, cache
        (place / "state").mkdir()

    def __call__(self, script: str) -> Answer:
        """Run a script in which `orb` is the simulator, with the state directory ``state``."""
        program = make_program(self.place / "state", ORBCTL_SIMULATOR_CACHE=self.cache)
        head = (
            f'set -e; cd "{self.place}"; orb() {{ "{sys.executable}" -m orbctl_simulator "$@"; }}; '
        )
        words = ["unshare", "-m", "--propagation", "private", "sh", "-c", head + script]
        return Program(words, program.env)()


@pytest.fixture
def elsewhere(orb: Program, root_only: None, tmp_path: Path) -> Elsewhere:
    return Elsewhere(tmp_path, orb.env["ORBCTL_SIMULATOR_CACHE"])


#: The image of booted machines, unless a test uses another one.
IMAGE = "debian:bookworm"


class Booted:
    """The simulator, with a state directory whose machines boot."""

    def __init__(self, program: Program, home: Path) -> None:
        self.program, self.home = program, home
        self._machines = self._images = 0

    def __call__(self, *words: str, **options: Any) -> Answer:
        words = ("delete", "-f", *words[1:]) if words[0] == "delete" else words
        return self.program(*words, **options)

    def image(self, root: Path) -> str:
        """Add a root file system as an image."""
        self._images += 1
        name = f"debian:test{self._images}"
        assert self("image", "add", name, str(root)).code == 0
        return name

    def create(self, *flags: str, image: str = IMAGE, root: Path | None = None) -> str:
        self._machines += 1
        name = f"boot-{self._machines}"
        answer = self("create", self.image(root) if root else image, name, *flags)
        assert answer.code == 0, answer
        return name

    def root_in(self, name: str, script: str) -> Answer:
        return self("run", "-m", name, "-u", "root", "-w", "/", "sh", "-c", script)

    def state(self, name: str) -> str:
        state: str = self("info", name, "-f", "json").json["record"]["state"]
        return state

    def pids(self, name: str) -> tuple[int, int]:
        """The process ids of its init and its supervisor."""
        found = RunState.read(str(self.directory(name) / "pid"))
        assert found
        return found.init, found.supervisor

    def directory(self, name: str) -> Path:
        for path in (self.home / "machines").iterdir():
            if f"name={name}\n" in (path / "machine").read_text():
                return path
        raise KeyError(name)


def control_groups() -> set[str]:
    """The control groups of all machines, in every hierarchy."""
    lines = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    roots = [Path(fields[1]) for fields in lines if fields[2] in ("cgroup", "cgroup2")]
    return {str(path) for root in roots for path in root.glob("orb-*")}


def orphaned_groups() -> set[str]:
    """Control groups without a supervisor. Other users' machines may run at the same time."""
    groups, words = control_groups(), b""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words += path.read_bytes()
    return {group for group in groups if group.rpartition("orb-")[2].encode() not in words}


def supervisors_of(home: Path, machine: str = "") -> list[int]:
    """The supervisors of a state directory's machines, or of the one with this id."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            ours = any(word.startswith(os.fsencode(f"{home}/machines/{machine}")) for word in words)
            if ours and b"simulator.supervisor" in b"".join(words):
                found.append(int(entry.name))
    return found


def make_booted(home: Path, **env: str) -> Booted:
    """A simulator whose machines use an image that is built once."""
    env = {"ORBCTL_SIMULATOR_IMAGES": "none", "ORBCTL_SIMULATOR_STRICT_IMAGES": "1", **env}
    return Booted(make_program(home, ORBCTL_SIMULATOR_INIT="image", **env), home)


@pytest.fixture(scope="session")
def booted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    from orbctl_simulator import trial

    before = orphaned_groups()
    home = tmp_path_factory.mktemp("booted state") / "é, of: all"
    booted = make_booted(home)
    reason = trial.why_not()
    if not reason:
        answer = booted("create", IMAGE, "first")
        reason = answer.err.decode() if answer.code else ""
    if reason:
        text = f"this host cannot boot machines: {reason}"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(text)
    yield booted
    assert booted("delete", "--all").code == 0
    assert supervisors_of(home) == []
    assert mounts_of(home) == []
    wait_for(lambda: orphaned_groups() <= before)


@pytest.fixture(scope="session")
def box(booted: Booted) -> str:
    """A booted machine for tests that do not change it."""
    return "first"


@pytest.fixture(scope="session")
def archive(booted: Booted) -> None:
    """Debian's packages, as a machine reaches them."""
    answer = booted.root_in("first", "apt-get update -q -o APT::Update::Error-Mode=any")
    if answer.code:
        text = f"machines cannot download packages: {answer.err.decode()}"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(text)


@pytest.fixture
def own_box(booted: Booted) -> Iterator[str]:
    """A booted machine for one test."""
    name = booted.create()
    yield name
    booted("delete", name)


@pytest.fixture
def small_root(rootfs: Path, tmp_path: Path) -> Path:
    """A root file system for an init that a test provides."""
    root = tmp_path / "small"
    shutil.copytree(rootfs, root, symlinks=True)
    for name in ("sbin", "proc", "sys", "dev"):
        (root / name).mkdir(exist_ok=True)
    return root


#: An init with a child is considered booted.
WITH_CHILD = "cat /dev/console >/dev/null &"


def have_init(root: Path, script: str) -> None:
    (root / "sbin/init").write_text(f"#!/bin/sh\n{script}\n")
    (root / "sbin/init").chmod(0o755)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


def wait_for(what: object, seconds: float = 30) -> None:
    """Wait until `what` is true; only a hanging machine takes this long."""
    deadline = time.monotonic() + seconds
    assert callable(what)
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)
