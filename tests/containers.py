"""Containers for the tests, from an existing engine or from one that is set up for the run.

Debian's podman serves as the docker command. Its packages are unpacked below `.cache`, not
installed, so nothing else on this host changes. Images and containers are in a temporary
directory.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import platform
import resource
import secrets
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from pyinfra_orbstack import docker, orbctl, process
from pyinfra_orbstack.docker import Docker, DockerError
from pyinfra_orbstack.orbctl import Orbctl

from .sharing import prepared

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".cache" / "podman"
PREFIX = "podman-"
#: The maximum length of the path of podman's runtime directory.
LONGEST_RUNROOT = 50

# runc, because crun rejects hosts that mix cgroup v1 and v2; limits that need no rights to raise.
CONFIG = """
[containers]
netns = "host"
default_ulimits = ["nofile={files}:{files}", "nproc={processes}:{processes}"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "none"
conmon_env_vars = ["LD_LIBRARY_PATH={libraries}", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"]
lock_type = "file"
stop_timeout = 1
conmon_path = ["{root}/usr/bin/conmon"]
[engine.runtimes]
runc = ["{root}/usr/sbin/runc"]
"""
WRAPPER = """#!/bin/sh
export HOME={folder} TMPDIR={folder} LD_LIBRARY_PATH={libraries}
export CONTAINERS_CONF={folder}/containers.conf
exec {root}/usr/bin/podman --root {folder}/store --runroot {folder}/r --tmpdir {folder}/tmp \\
--storage-driver overlay --storage-opt overlay.skip_mount_home=true "$@"
"""

# A machine's root file system: some packages and changed files, without docs.
PACK = r"""
cd /
packages=$(dpkg-query -W -f '${Package}\n' "$@" base-files base-passwd bash coreutils dash \
diffutils findutils grep hostname libc-bin login sed tar 2>/dev/null || true)
{ dpkg -L $(apt-cache depends --recurse --installed --no-recommends --no-suggests --no-conflicts \
--no-breaks --no-replaces --no-enhances $packages | grep '^[a-z0-9]' | sort -u)
find /etc /home /usr/local/bin/busyboxsh /usr/lib/locale /root /var/tmp /tmp -xdev -path '*/tmp/*' \
-prune -o -print
find /usr/bin -lname '/etc/alternatives/*'; } 2>/dev/null |
sed -n 's,^/\(bin\|sbin\|lib\|lib64\)\(/\|$\),/usr/\1\2,; s,^/\([^.]\),\1,p' |
grep -Ev '^usr/share/(doc|man|info|locale|bug|lintian)/' | sort -u >/tmp/pack
tar --ignore-failed-read --no-recursion -c -T /tmp/pack bin sbin lib lib64 2>/dev/null
rm /tmp/pack
"""


class Unavailable(Exception):
    """The reason why containers cannot run here."""


class Containers:
    """Creates images and containers with unique names, and removes only those."""

    def __init__(self, client: Docker) -> None:
        self.client = client
        self.prefix = f"pyinfra-test-{secrets.token_hex(3)}"
        self._made: list[str] = []
        self._images: list[str] = []

    def call(self, *args: str) -> str:
        """Call docker, which must succeed."""
        done = process.run(self.client.argv(args), timeout=100, env=self.client.environment())
        assert done.returncode == 0, done
        return done.stdout.decode()

    def pack(
        self, name: str, source: Orbctl, machine: str, *packages: str, user: str = "root"
    ) -> str:
        """Make an image of a small Debian and these packages of a machine."""
        return self.image(name, source, machine, PACK, *packages, user=user)

    def image(
        self, name: str, source: Orbctl, machine: str, script: str, *words: str, user: str = "root"
    ) -> str:
        """Import the archive that a script prints in a machine."""
        image = f"localhost/{self.prefix}-{name}:1"
        args = self.client.argv(["import", "--change", f"USER {user}", "-", image])
        inside = orbctl.run_args(machine, ["sh", "-c", script, "sh", *words], user="root")
        archive, env = source.argv(inside), source.environment()
        with subprocess.Popen(archive, stdout=subprocess.PIPE, env=env) as packing:
            done = subprocess.run(
                args,
                stdin=packing.stdout,
                check=False,
                capture_output=True,
                env=self.client.environment(),
            )
        assert (packing.returncode, done.returncode) == (0, 0), done
        self._images.append(image)
        return image

    def run(
        self,
        image: str,
        *options: str,
        command: Sequence[str] = ("sleep", "9999"),
        name: str | None = None,
    ) -> str:
        """Start a container and return its name, which starts with our prefix."""
        name = f"{self.prefix}-{name or len(self._made) + 1}"
        self._made.append(name)
        # Its first process must exit when told to, because `stop` waits for it.
        named = ("run", "-d", "--name", name, "--hostname", name, "--stop-signal", "KILL")
        # With the host's network, sudo looks up the container's name in vain.
        self.call(*named, "--add-host", f"{name}:127.0.0.1", *options, image, *command)
        return name

    def remove(self, name: str) -> str:
        """Remove a container."""
        # On a busy host, podman may not wait long enough for the container's processes to exit.
        with contextlib.suppress(AssertionError):
            return self.call("rm", "-f", name)
        time.sleep(5)
        return self.call("rm", "-f", name)

    def remove_all(self) -> None:
        """Remove everything that was created."""
        there = {one.name for one in self.client.containers()}
        for name in self._made:
            if name in there:
                self.remove(name)
        for image in self._images:
            self.call("rmi", "-f", image)


@contextlib.contextmanager
def engine() -> Iterator[Docker]:
    """The docker command; processes that tests start use the same one.

    Raises:
        Unavailable: No engine exists, and none can be set up.
    """
    before = os.environ.get(docker.COMMAND_VARIABLE)
    try:
        client = Docker()
        client.containers()
    except DockerError as reason:
        if before:
            raise Unavailable(str(reason)) from None
    else:
        yield client
        return
    sweep(*places())
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=places()[0]))
    owner = (folder / "owner").open("w")
    fcntl.flock(owner, fcntl.LOCK_EX)
    # podman stores layers here, and no option changes that.
    memory = Path("/var/lib/containers")
    remembered = memory.exists()
    try:
        os.environ[docker.COMMAND_VARIABLE] = str(_podman(folder))
        client = Docker()
        client.containers()
        yield client
    except DockerError as reason:
        raise Unavailable(f"podman does not work here: {reason}") from None
    finally:
        os.environ.pop(docker.COMMAND_VARIABLE, None)
        wait_for_podman(folder)
        shutil.rmtree(folder)
        owner.close()
        if not remembered:
            shutil.rmtree(memory, ignore_errors=True)
        for group in glob.glob("/sys/fs/cgroup/**/libpod_parent", recursive=True):
            with contextlib.suppress(OSError):
                os.rmdir(group)


def places() -> list[Path]:
    """Where engines' directories are created, and where others may be."""
    folder = Path(tempfile.gettempdir())
    fits = len(str(folder / f"{PREFIX}12345678" / "r")) <= LONGEST_RUNROOT
    return [folder] if fits else [Path("/tmp"), folder]


def sweep(*folders: Path) -> list[str]:
    """Remove what killed runs left; current runs hold a lock.

    Returns:
        The errors.
    """
    problems = []
    for owner in (owner for folder in folders for owner in folder.glob(f"{PREFIX}*/owner")):
        with owner.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            remove = [str(owner.with_name("docker")), "rm", "--all", "--force", "--time", "0"]
            try:
                done = subprocess.run(remove, check=False, capture_output=True, text=True)
                if done.returncode:  # as in `Containers.remove`
                    time.sleep(5)
                    done = subprocess.run(remove, check=False, capture_output=True, text=True)
            except OSError:  # killed before it was created
                pass
            else:
                if done.returncode:
                    problems.append(f"containers in {owner.parent}: {done.stderr.strip()}")
                    continue
            wait_for_podman(owner.parent)
            shutil.rmtree(owner.parent, ignore_errors=True)
    return problems


def wait_for_podman(folder: Path) -> None:
    """Wait for what podman leaves running for a moment; it would create the directory again."""
    deadline = time.monotonic() + 20
    while any(map(partial(_is_below, folder), Path("/proc").glob("[0-9]*"))):
        if time.monotonic() > deadline:
            return
        time.sleep(0.05)


def _is_below(folder: Path, process: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.fsencode(folder) in (process / "cmdline").read_bytes()
    return False


def at_most(wanted: int, what: str) -> int:
    """As much of a resource as needs no rights."""
    hard = resource.getrlimit(getattr(resource, f"RLIMIT_{what}"))[1]
    return wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)


def _podman(folder: Path) -> Path:
    """Create a docker command that keeps everything in one directory."""
    root = _unpacked()
    libraries = next((root / "usr/lib").glob("*-linux-*"), root)
    limits = {"files": at_most(1024, "NOFILE"), "processes": at_most(4096, "NPROC")}
    text = CONFIG.format(root=root, libraries=libraries, **limits)
    (folder / "containers.conf").write_text(text)
    policy = folder / ".config" / "containers" / "policy.json"
    policy.parent.mkdir(parents=True)
    shutil.copy(root / "etc/containers/policy.json", policy)
    command = folder / "docker"
    paths = {"root": root, "folder": folder, "libraries": libraries}
    quoted = {name: shlex.quote(str(path)) for name, path in paths.items()}
    command.write_text(WRAPPER.format(**quoted))
    command.chmod(0o755)
    return command


def _unpacked() -> Path:
    """Debian's podman, downloaded once."""
    if platform.system() != "Linux" or os.geteuid() != 0 or not shutil.which("apt-get"):
        raise Unavailable(
            "no container engine answers, and podman is set up for tests on Debian as root alone"
        )
    CACHE.mkdir(parents=True, exist_ok=True)
    return prepared(CACHE, "root", _unpack)


def _unpack(root: Path) -> None:
    shutil.rmtree(root, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        folder = Path(name)
        for part in ("archives", "lists"):
            (folder / part / "partial").mkdir(parents=True)
        options = [f"Dir::Cache::archives={folder}/archives", "Debug::NoLocking=1"]
        options.append(f"Dir::State::lists={folder}/lists")
        words = ["install", "--download-only", "--no-install-recommends", "podman", "runc"]
        for command in (["update"], words):
            done = subprocess.run(
                ["apt-get", "-qq", "-y", *(f"-o{option}" for option in options), *command],
                capture_output=True,
                text=True,
                check=False,
            )
        if done.returncode != 0:
            raise Unavailable(f"podman cannot be downloaded: {done.stderr.strip()[-300:]}")
        for package in (folder / "archives").glob("*.deb"):
            subprocess.run(["dpkg", "-x", package, root], check=True)
