"""Finding the tools, or downloading them without changing the host."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from orbctl_simulator import tools
from tests.simulator.network.virtual import ROOT, cache, environment, host_now, other_mounts

pytestmark = pytest.mark.boot

_HIDE = 'for path in {}; do test ! -e "$path" || mount --bind /dev/null "$path" || exit 1; done'
MISSING = ("nft", "dnsmasq", "slirp4netns")
_APT = ("/var/lib/apt", "/var/cache/apt", "/var/lib/dpkg", "/var/log/apt")


def hidden(*names: str) -> str:
    """Shell commands that hide executables, in a separate mount namespace."""
    folders = tools._DIRECTORIES.split(":")
    return _HIDE.format(" ".join(f"{folder}/{name}" for folder in folders for name in names))


def call(host: list[str], place: Path, code: str) -> subprocess.CompletedProcess[str]:
    program = f"""
from orbctl_simulator import network, tools
from orbctl_simulator.state import Failure
try:
    {code}
except Failure as failure:
    raise SystemExit(str(failure))
"""
    env = {**environment(), "ORBCTL_SIMULATOR_CACHE": str(place), "PATH": tools._DIRECTORIES}
    command = [*host, sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)


def packages() -> dict[str, int]:
    """The modification times of the files of the host's package manager."""
    return {
        str(path): path.lstat().st_mtime_ns
        for place in _APT
        for path in sorted(Path(place).rglob("*"))
        if path.suffix != ".lock" and path.exists()
    }


@pytest.fixture
def apt() -> None:
    if not tools.can_fetch():
        pytest.skip("not a Debian or Ubuntu host")


@pytest.mark.usefixtures("online", "apt")
@pytest.mark.parametrize("lists", ["the host's", "none"])
def test_fetched(tmp_path: Path, stack: ExitStack, lists: str) -> None:
    """Once, with the libraries that the host lacks; apt's and dpkg's files do not change."""
    setup = hidden(*MISSING)
    if lists == "none":
        setup += " && mount -t tmpfs none /var/lib/apt/lists"
    host = stack.enter_context(other_mounts(setup))
    before = packages()
    place = tmp_path / "cache; of: all"
    for said in ("downloading nft, dnsmasq, slirp4netns once, into", ""):
        done = call(host, place, "tools.ensure(); print(tools.call('nft', '-v'))")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("nftables v")
        assert done.stderr.startswith(said)
        assert len(done.stderr.splitlines()) == bool(said)
    assert packages() == before
    assert not [path for path in place.iterdir() if ".build" in path.name]


@pytest.mark.usefixtures("online", "apt")
def test_fetched_again(tmp_path: Path, stack: ExitStack) -> None:
    """If it no longer runs after a change of the host's packages; otherwise it is only tried."""
    host = stack.enter_context(other_mounts(hidden(*MISSING)))
    assert call(host, tmp_path, "tools.ensure()").returncode == 0
    (place,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    inode = place.stat().st_ino
    (place / "stamp").write_text("0 0")
    assert call(host, tmp_path, "tools.ensure()").stderr == ""
    assert place.stat().st_ino == inode
    (place / "stamp").write_text("0 0")
    (library,) = place.rglob("libslirp.so.0")
    library.unlink()
    assert call(host, tmp_path, "tools.ensure()").stderr.startswith(
        "downloading nft, dnsmasq, slirp4netns once"
    )
    assert list(place.rglob("libslirp.so.0"))


@pytest.mark.usefixtures("apt")
def test_without_network(tmp_path: Path, stack: ExitStack) -> None:
    """One line, with the command that installs what is missing."""
    host = stack.enter_context(other_mounts(hidden(*MISSING)))
    done = call(["unshare", "--net", *host], tmp_path, "tools.ensure()")
    assert done.returncode == 1
    said, problem = done.stderr.splitlines()
    assert said == f"downloading nft, dnsmasq, slirp4netns once, into {tmp_path}"
    packages = "nftables dnsmasq-base slirp4netns"
    assert problem.startswith(f"cannot download {packages.replace(' ', ', ')} (apt-get: E: ")
    assert problem.endswith(f"): apt-get install --no-install-recommends {packages}")
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_without_a_package_manager(tmp_path: Path, stack: ExitStack) -> None:
    """The error names what is missing, also from `available`."""
    setup = hidden(*MISSING, *tools._INSTALLERS)
    host = stack.enter_context(other_mounts(setup))
    done = call(host, tmp_path, "tools.ensure()")
    words = "not installed: install the packages nftables dnsmasq slirp4netns"
    assert (done.returncode, done.stderr) == (1, f"nft, dnsmasq, slirp4netns: {words}\n")
    done = call(host, tmp_path, "print(network.available())")
    assert done.stdout == f"nft, dnsmasq, slirp4netns: {words}\n"
    done = call(host, tmp_path, "print(*tools.listing()[1], sep='|')")
    assert done.stdout == "nft||install the packages nftables\n"


def test_busybox_is_not_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its `ip` lacks most of the features used here."""
    (tmp_path / "busybox").write_text("#!/bin/sh\n")
    (tmp_path / "busybox").chmod(0o755)
    (tmp_path / "ip").symlink_to("busybox")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tools.find("ip").path != str(tmp_path / "ip")


def test_available(tmp_path: Path, stack: ExitStack) -> None:
    """Its attempt leaves nothing; without a tun device, it prints the command that creates one."""
    before = host_now()
    assert call([], Path(cache()), "print(network.available())").stdout == "None\n"
    assert host_now() == before
    host = stack.enter_context(other_mounts("mount -t tmpfs none /dev/net"))
    done = call(host, tmp_path, "print(network.available())")
    assert done.stdout == "/dev/net/tun: No such file or directory: modprobe tun\n"
