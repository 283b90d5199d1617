"""Images built from a distribution's archive, and what a root lacks, over the real network."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from orbctl_simulator import images, mirrors
from tests.contract.program import Program
from tests.simulator.conftest import make_program, mounts_of, processes_of, wait_for
from tests.simulator.test_images import all_commands, left

pytestmark = pytest.mark.boot

DISTRO, VERSION, _ = images.release()
ARCH = images.host_arch()


@pytest.fixture(scope="session")
def archive() -> None:
    """Skip these tests, with the reason, if a build's requirements are missing."""
    reason = ""
    if not os.path.exists("/usr/share/keyrings/debian-archive-keyring.gpg"):
        reason = "needs Debian's keyring"
    else:
        try:
            socket.create_connection(("deb.debian.org", 80), 10).close()
        except OSError as error:
            reason = f"needs Debian's archive: {error}"
    if reason:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory, orb: Program) -> Path:
    """A separate cache: another run's build would prove nothing."""
    return tmp_path_factory.mktemp("builds") / "cache"


@pytest.fixture(scope="session")
def builder(
    tmp_path_factory: pytest.TempPathFactory, cache: Path, archive: None
) -> Iterator[Program]:
    home = tmp_path_factory.mktemp("state of builds")
    env = {"ORBCTL_SIMULATOR_CACHE": str(cache), "ORBCTL_SIMULATOR_IMAGES": "none"}
    program = make_program(home, **env)
    yield program
    program("delete", "--all", "--force")
    assert processes_of(home) == []
    assert mounts_of(home) == []


@pytest.fixture(scope="session")
def bookworm(builder: Program) -> str:
    """A machine from the image that the first `create` builds."""
    made = builder("create", "--strict-images", "-u", "me", "debian:bookworm", "one", timeout=280)
    assert made.code == 0, made
    lines = made.err.decode().splitlines()
    assert lines[-1].startswith("building debian:bookworm")
    return "one"


def in_machine(builder: Program, name: str, script: str) -> list[str]:
    return builder("run", "-m", name, "-u", "root", "sh", "-c", script).lines


def test_a_second_machine_is_created_at_once(builder: Program, bookworm: str) -> None:
    made = builder("create", "--strict-images", "debian:12", "two")
    assert (made.code, made.err) == (0, b"")
    (row,) = builder("image", "list").lines
    assert row.split()[:3] == ["debian:bookworm", ARCH, "default"]
    assert "built from http" in row


def test_the_base_image_is_clean(builder: Program, bookworm: str) -> None:
    """Only Debian packages that a deploy finds everywhere, and no traces of the build."""
    script = "dpkg-query -W -f '${Package}\\n'"
    packages = set(in_machine(builder, bookworm, script))
    assert packages >= {"systemd-sysv", "dbus", "sudo", "ca-certificates", "iproute2", "python3"}
    assert not packages & {"curl", "git", "openssh-server", "perl", "nginx", "mmdebstrap"}
    assert len(packages) < 150
    script = (
        "ls -A /var/lib/apt/lists /var/cache/apt /tmp /run | cat; cat /etc/machine-id;"
        "ls -A /.dockerenv /usr/sbin/policy-rc.d /etc/ssh /var/lib/dbus/machine-id 2>/dev/null;"
        "true"
    )
    shown = set(in_machine(builder, bookworm, script))
    assert not {"/.dockerenv", "/usr/sbin/policy-rc.d", "/var/lib/dbus/machine-id"} & shown
    assert not [line for line in shown if "InRelease" in line or line.endswith((".deb", ".bin"))]
    assert in_machine(builder, bookworm, "readlink /sbin/init") == ["/lib/systemd/systemd"]
    assert in_machine(builder, bookworm, "cat /etc/os-release")[0].endswith('12 (bookworm)"')


def test_apt_works_at_once(builder: Program, bookworm: str) -> None:
    """With signatures, and with this host's mirror."""
    done = builder(
        *("run", "-m", bookworm, "sudo", "sh", "-c"),
        "apt-get update && apt-get install -y --no-install-recommends tree && tree --version",
    )
    assert done.code == 0, done
    assert b"tree v" in done.out
    assert b"not signed" not in done.out + done.err
    sources = in_machine(builder, bookworm, "cat /etc/apt/sources.list")
    suites = [line.split()[2] for line in sources]
    assert suites == ["bookworm", "bookworm-updates", "bookworm-security"]
    upgradable = in_machine(builder, bookworm, "apt-get -s dist-upgrade | grep -c ^Inst; true")
    assert upgradable == ["0"]


def test_cloud_init_layer_is_added(builder: Program, bookworm: str) -> None:
    """Once, with Debian's own package; the image itself does not grow."""
    made = builder("create", "--variant", "cloud", "debian:bookworm", "cloud", timeout=280)
    assert made.code == 0, made
    assert b"has no cloud-init: installing it once, with apt-get" in made.err
    assert in_machine(builder, "cloud", "cloud-init --version")[0].startswith("/usr/bin/cloud-init")
    again = builder("create", "--variant", "cloud", "debian:bookworm", "cloud2")
    assert (again.code, again.err) == (0, b"")
    assert in_machine(builder, bookworm, "ls /usr/bin/cloud-init 2>/dev/null; true") == []
    assert in_machine(builder, "cloud2", "cat /etc/machine-id") == []


def test_killed_build_leaves_nothing(
    tmp_path: Path, cache: Path, builder: Program, bookworm: str
) -> None:
    """No processes, mounts or files, except those that the next command removes."""
    process = builder.started("image", "build", "debian:bookworm")
    new = cache / "images" / f"debian_bookworm_{ARCH}_default.new"
    while not (new / ".files/usr/bin").exists():
        assert process.poll() is None
    process.kill()
    process.communicate()
    # Its children end with it, but a moment later.
    wait_for(lambda: not all_commands(str(new)))
    builder("image", "list")
    assert not new.exists()
    assert not [name for name in left(cache) if name.endswith((".new", ".trash"))]
    assert builder("run", "-m", bookworm, "true").code == 0


def test_wrong_signature(tmp_path: Path, builder: Program) -> None:
    """An archive that is not signed with the keyring's keys results in no image."""
    if os.geteuid() != 0:
        pytest.skip("needs root to replace the keyring")
    empty = tmp_path / "empty.gpg"
    empty.write_bytes(b"")
    script = 'mount --bind "$0" /usr/share/keyrings/debian-archive-keyring.gpg && exec "$@"'
    inside = Program(
        ["unshare", "--mount", "sh", "-c", script, str(empty), *builder.command], builder.env
    )
    answer = inside("image", "build", "debian:trixie", timeout=250)
    assert answer.code == 1
    assert "trixie" not in builder("image", "list").text


@pytest.mark.parametrize("spec", ["fedora", "alpine", "debian:nosuch"])
def test_images_that_cannot_be_built(builder: Program, spec: str) -> None:
    """One line with the reason; `create --strict-images` fails."""
    answer = builder("image", "build", spec)
    assert answer.code == 1
    assert len(answer.err.splitlines()) == 1
    if ":" not in spec:
        refused = builder("create", "--strict-images", spec, "x")
        assert b"image not found: " + spec.encode() in refused.err
        assert f"not built: images of {spec} cannot be built".encode() in refused.err
        assert b"not pulled" not in refused.err


SOURCES = """\
# a comment
deb http://one.example/debian bookworm main contrib
deb-src http://src.example/debian bookworm main
deb [arch=amd64 signed-by=/x.gpg] http://two.example/debian/ bookworm-updates main # end
deb cdrom:[Debian]/ bookworm main
deb [ trusted=yes
"""
STANZAS = """\
Types: deb deb-src
# a comment
URIs: http://one.example/debian
 http://other.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /x.gpg

Enabled: no
Types: deb
URIs: http://off.example/
Suites: bookworm

types: deb
uris: https://sec.example/
suites: bookworm-security
"""


def test_sources_of_this_host() -> None:
    """Both of apt's formats, as people write them."""
    lines = [(entry.uris, entry.suites) for entry in mirrors._lines(SOURCES)]
    assert lines == [
        (["http://one.example/debian"], ["bookworm"]),
        (["http://two.example/debian/"], ["bookworm-updates"]),
        (["cdrom:[Debian]/"], ["bookworm"]),
    ]
    stanzas = list(mirrors._stanzas(STANZAS))
    assert [entry.suites for entry in stanzas] == [
        ["bookworm", "bookworm-updates"],
        ["bookworm-security"],
    ]
    assert mirrors._mirror_of(stanzas, "bookworm-security") == "https://sec.example"
    assert mirrors._mirror_of(stanzas, "bookworm") == "http://one.example/debian"
    assert mirrors._mirror_of(stanzas, "trixie") == ""


def test_mirror_with_a_password_is_not_put_into_images() -> None:
    entries = [mirrors.Entry(["http://me:secret@one.example/debian"], ["bookworm"])]
    assert mirrors._mirror_of(entries, "bookworm") == ""
