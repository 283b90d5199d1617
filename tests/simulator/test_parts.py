"""What an image lacks, and cloud-init's data."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from orbctl_simulator import cloud, layers, parts, unpack
from orbctl_simulator.state import Failure
from tests.contract.program import Program
from tests.simulator.conftest import make_program, mounts_of, processes_of
from tests.simulator.mirror import Mirror, archive
from tests.simulator.test_images import KEY, NAME
from tests.simulator.test_tools import without_sudo

FILES = {
    "systemd": "usr/lib/systemd/systemd",
    "old systemd": "lib/systemd/systemd",
    "openrc": "sbin/openrc",
    "dbus": "usr/bin/dbus-daemon",
    "sudo": "usr/bin/sudo",
    "cloud-init": "usr/bin/cloud-init",
    "apt": "usr/bin/apt-get",
    "apk": "sbin/apk",
}
ROOTS = [
    (["systemd", "dbus", "sudo", "cloud-init"], []),
    (["old systemd", "dbus"], ["sudo", "cloud-init"]),
    (["systemd"], ["dbus", "sudo", "cloud-init"]),
    (["openrc", "apk"], ["sudo", "cloud-init"]),
    (["apk"], ["init", "sudo", "cloud-init"]),
    (["apt"], ["init", "dbus", "sudo", "cloud-init"]),
    ([], ["init", "dbus", "sudo", "cloud-init"]),
]


@pytest.mark.parametrize(("there", "expected"), ROOTS, ids=lambda value: "+".join(value) or "none")
def test_missing_parts_are_found(tmp_path: Path, there: list[str], expected: list[str]) -> None:
    """Only systemd requires a bus."""
    for name in there:
        (tmp_path / FILES[name]).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / FILES[name]).write_text("")
    assert parts.lacking(str(tmp_path), parts.PARTS) == expected
    assert parts.lacking(str(tmp_path), ["sudo"]) == [part for part in expected if part == "sudo"]


def test_links_are_not_followed(tmp_path: Path) -> None:
    """The host's files behind an image's links do not count."""
    (tmp_path / "usr").symlink_to("/usr")
    (tmp_path / "bin").symlink_to("/usr/bin")
    assert parts.lacking(str(tmp_path), ["init", "sudo"]) == ["init", "sudo"]


@pytest.fixture
def program(tmp_path: Path, orb: Program, monkeypatch: pytest.MonkeyPatch) -> Iterator[Program]:
    """A state directory that this process uses, to request more than `create` does."""
    if os.geteuid() != 0:
        pytest.skip("needs root: builds layers in this process")
    env = {
        "ORBCTL_SIMULATOR_CACHE": str(tmp_path / "cache"),
        "ORBCTL_SIMULATOR_IMAGES": str(tmp_path / "mirror"),
    }
    home = tmp_path / "state"
    for name, value in {**env, "ORBCTL_SIMULATOR_HOME": str(home)}.items():
        monkeypatch.setenv(name, value)
    program = make_program(home, **env)
    yield program
    program("delete", "--all", "--force")
    assert processes_of(home) == []
    assert mounts_of(home) == []


INSTALL = """
[ "$1" = update ] && exit 0
for name in "$@"; do case $name in -*|install) ;; *) echo "$name" >"/usr/bin/$name" ;; esac; done
id >/usr/lib/systemd/systemd
"""


@pytest.mark.long
def test_all_parts_in_one_layer(program: Program, rootfs: Path, tmp_path: Path) -> None:
    """Installed once, and stacked over the image, which does not change."""
    root = without_sudo(rootfs, tmp_path / "root", INSTALL)
    (root / "usr/lib/systemd").mkdir(parents=True)
    mirror = Mirror(tmp_path / "mirror")
    mirror.offer(NAME, archive(root, tmp_path / "root.tar.xz").read_bytes())
    assert program("image", "pull", "alpine:3.22").code == 0
    files = tmp_path / "cache/images" / KEY / "current/.files"
    before = sorted(path.name for path in files.rglob("*"))
    base = (str(files.resolve()), f"{KEY}@20260101_0524", "the image", parts.PARTS[:3])
    assert layers.over(*base) == ["init+dbus+sudo"]
    layer = files.parent / "layers/init+dbus+sudo"
    content = layer / ".files"
    assert (content / "usr/lib/systemd/systemd").read_text().startswith("uid=0(root)")
    for name in ("systemd-sysv", "dbus", "sudo"):
        assert (content / "usr/bin" / name).read_text() == f"{name}\n"
    assert sorted(path.name for path in files.rglob("*")) == before
    (root / "usr/bin/apt-get").unlink()
    assert layers.over(*base) == ["init+dbus+sudo"]
    assert os.listdir(layer) == [".files"]
    assert not list(layer.parent.glob("*.new"))
    assert program("image", "remove", "alpine:3.22").code == 0


def test_opaque_directories_of_a_layer(tmp_path: Path) -> None:
    """They are also opaque for overlays in user namespaces, which read other attributes."""
    if os.geteuid() != 0:
        pytest.skip("needs root: sets attributes")
    for name in ("plain", "opaque"):
        (tmp_path / "a" / name).mkdir(parents=True)
    os.setxattr(tmp_path / "a/opaque", "trusted.overlay.opaque", b"y")
    os.mknod(tmp_path / "a/whiteout", 0o20000, 0)
    unpack.tidy(str(tmp_path), whole=False)
    assert os.getxattr(tmp_path / "a/opaque", "user.overlay.opaque") == b"y"
    assert os.listxattr(tmp_path / "a/plain") == []
    assert (tmp_path / "a/whiteout").is_char_device()


@pytest.mark.long
def test_layer_of_a_killed_call(program: Program, rootfs: Path, tmp_path: Path) -> None:
    """It is removed, and built again by the next call that needs it."""
    root = without_sudo(
        rootfs, tmp_path / "root", "id >/usr/bin/sudo; [ -e /fast ] || cat /dev/zero"
    )
    Mirror(tmp_path / "mirror").offer(NAME, archive(root, tmp_path / "a.tar.xz").read_bytes())
    assert program("image", "pull", "alpine:3.22").code == 0
    process = program.started("create", "alpine:3.22", "one")
    image = tmp_path / "cache/images" / KEY / "current"
    while not list(image.glob("layers/*.new/.files/upper/usr/bin/sudo")):
        assert process.poll() is None
    process.kill()
    process.communicate()
    (image / ".files/fast").write_text("")
    while processes_of(tmp_path / "state"):
        pass
    program("image", "list")
    assert not list(image.glob("layers/*.new"))
    assert program("create", "alpine:3.22", "one").code == 0
    assert program("run", "-m", "one", "cat", "/usr/bin/sudo").text.startswith("uid=0")


def opened(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY)


SEED = "var/lib/cloud/seed/nocloud"


def test_seed(tmp_path: Path) -> None:
    """The data is where cloud-init's NoCloud looks; other sources are turned off."""
    root = opened(tmp_path)
    for data in (b"#cloud-config\n\xff", b"#!/bin/sh\n"):
        cloud.put_seed(root, data, "01ABC", "web")
        assert (tmp_path / SEED / "user-data").read_bytes() == data
    os.close(root)
    meta = (tmp_path / SEED / "meta-data").read_text()
    assert meta == "instance-id: 01ABC\nlocal-hostname: web\n"
    assert (tmp_path / SEED / "user-data").stat().st_mode & 0o777 == 0o600
    (config,) = (tmp_path / "etc/cloud/cloud.cfg.d").iterdir()
    assert "datasource_list: [ NoCloud, None ]" in config.read_text()


@pytest.mark.parametrize("place", ["var", "var/lib/cloud", SEED, "etc", "etc/cloud/cloud.cfg.d"])
@pytest.mark.parametrize("kind", ["link", "file", "dangling"])
def test_a_seed_is_never_written_outside_the_image(tmp_path: Path, place: str, kind: str) -> None:
    """An image whose directories are something else gets no data: one line says so."""
    outside, root = tmp_path / "outside", tmp_path / "root"
    outside.mkdir()
    (root / place).parent.mkdir(parents=True)
    if kind == "file":
        (root / place).write_text("")
    else:
        (root / place).symlink_to(outside if kind == "link" else tmp_path / "nowhere")
    fd = opened(root)
    with pytest.raises(Failure, match="not a directory"):
        cloud.put_seed(fd, b"harm", "01ABC", "web")
    os.close(fd)
    assert list(outside.iterdir()) == []
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("name", ["user-data", "meta-data"])
@pytest.mark.parametrize("kind", ["link", "hard link", "pipe"])
def test_a_seed_replaces_files_of_the_same_name(tmp_path: Path, name: str, kind: str) -> None:
    """It writes new files, and never into an existing one."""
    outside, root = tmp_path / "outside", tmp_path / "root"
    outside.write_text("as it was")
    (root / SEED).mkdir(parents=True)
    path = root / SEED / name
    if kind == "pipe":
        os.mkfifo(path)
    else:
        (os.link if kind == "hard link" else os.symlink)(outside, path)
    fd = opened(root)
    cloud.put_seed(fd, b"data", "01ABC", "web")
    os.close(fd)
    assert outside.read_text() == "as it was"
    assert path.is_file()
    assert not path.is_symlink()


def test_user_data_of_the_caller(tmp_path: Path) -> None:
    """A file of usual size; anything else is rejected, and no pipe blocks."""
    (tmp_path / "data").write_bytes(b"#cloud-config\n")
    assert cloud.read_user_data(str(tmp_path / "data")) == b"#cloud-config\n"
    (tmp_path / "large").write_bytes(b"x" * ((1 << 20) + 1))
    os.mkfifo(tmp_path / "pipe")
    for name in ("none", "large", "pipe", "."):
        with pytest.raises(Failure):
            cloud.read_user_data(str(tmp_path / name))


def test_rootfs_is_left_alone(rootfs: Path, tmp_path: Path) -> None:
    """A root with all parts needs no layer, no network and no package manager."""
    root = tmp_path / "root"
    shutil.copytree(rootfs, root, symlinks=True)
    assert layers.over(str(root), "void", "the image", ["sudo"]) == []
