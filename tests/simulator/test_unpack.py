"""Malicious archives: files outside that they refer to do not change."""

from __future__ import annotations

import io
import os
import shutil
import struct
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orbctl_simulator import trees, unpack
from orbctl_simulator.progress import Progress
from tests.contract.program import Answer, Program
from tests.simulator.conftest import make_program
from tests.simulator.mirror import Mirror, archive

from .test_images import KEY, NAME, left, store_root

CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)  # cap_net_raw=ep


class Hostile:
    """Adds members to an archive of a small root; the canary is a directory outside."""

    def __init__(self, rootfs: Path, canary: Path) -> None:
        self.canary = canary
        self._buffer = io.BytesIO()
        self._tar = tarfile.TarFile(fileobj=self._buffer, mode="w", format=tarfile.PAX_FORMAT)
        self._tar.add(rootfs, ".", filter=self._owned)

    def _owned(self, member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        return member

    def put(
        self, name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, **told: object
    ) -> None:
        member = tarfile.TarInfo(name)
        member.type, member.size = kind, len(content)
        for key, value in told.items():
            setattr(member, key, value)
        self._tar.addfile(member, io.BytesIO(content))

    def link(self, name: str, target: str, hard: bool = False) -> None:
        self.put(name, kind=tarfile.LNKTYPE if hard else tarfile.SYMTYPE, linkname=target)

    def content(self) -> bytes:
        self._tar.close()
        return self._buffer.getvalue()


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    place = tmp_path / "canary"
    place.mkdir()
    (place / "file").write_text("as it was")
    return place


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def hostile(rootfs: Path, canary: Path) -> Hostile:
    return Hostile(rootfs, canary)


@pytest.fixture
def program(tmp_path: Path, cache: Path, orb: Program) -> Iterator[Program]:
    program = make_program(
        tmp_path / "state",
        ORBCTL_SIMULATOR_CACHE=str(cache),
        ORBCTL_SIMULATOR_IMAGES=str(tmp_path / "mirror"),
    )
    yield program
    program("delete", "--all", "--force")


@pytest.fixture
def pull(tmp_path: Path, program: Program) -> Callable[[bytes], Answer]:
    def pull(content: bytes) -> Answer:
        Mirror(tmp_path / "mirror").offer(NAME, content)
        return program("image", "pull", "alpine:3.22")

    return pull


def status_of(canary: Path) -> list[tuple[str, int, int, str]]:
    found = []
    for path in sorted([canary, *canary.rglob("*")]):
        status = path.lstat()
        text = path.read_text() if path.is_file() else ""
        found.append((path.name, status.st_mode, status.st_nlink, text))
    return found


def absolute(hostile: Hostile) -> None:
    hostile.put(f"{hostile.canary}/file", b"harm")
    hostile.put(f"{hostile.canary}/new", b"harm")


def upwards(hostile: Hostile) -> None:
    up = "../" * 40
    hostile.put(f"{up}{hostile.canary}/file", b"harm")
    hostile.put(f"etc/{up}{hostile.canary}/new", b"harm")


def through_a_link(hostile: Hostile) -> None:
    hostile.link("out", str(hostile.canary))
    hostile.put("out/file", b"harm")
    hostile.put("out/new", b"harm")


def through_a_link_upwards(hostile: Hostile) -> None:
    hostile.link("etc/out", "../" * 40 + str(hostile.canary))
    hostile.put("etc/out/file", b"harm")
    hostile.put("etc/out/new/deep", b"harm")


def through_two_links(hostile: Hostile) -> None:
    hostile.link("a", ".")
    hostile.link("a/b", "../" * 40)
    hostile.put(f"b{hostile.canary}/file", b"harm")


def over_a_link(hostile: Hostile) -> None:
    hostile.link("out", f"{hostile.canary}/file")
    hostile.put("out", b"harm")


def directory_over_a_link(hostile: Hostile) -> None:
    hostile.link("out", str(hostile.canary))
    hostile.put("out", kind=tarfile.DIRTYPE, mode=0o777)
    hostile.put("out/file", b"harm")


def hard_link(hostile: Hostile) -> None:
    hostile.link("stolen", f"{hostile.canary}/file", hard=True)
    hostile.put("stolen", b"harm")


def hard_link_upwards(hostile: Hostile) -> None:
    hostile.link("stolen", "../" * 40 + f"{hostile.canary}/file", hard=True)


def hard_link_through_a_link(hostile: Hostile) -> None:
    hostile.link("out", str(hostile.canary))
    hostile.link("stolen", "out/file", hard=True)
    hostile.put("stolen", b"harm")


def machine_id_is_a_link(hostile: Hostile) -> None:
    hostile.link("etc/machine-id", f"{hostile.canary}/file")
    hostile.link("usr/sbin", str(hostile.canary))
    hostile.link(".dockerenv", f"{hostile.canary}/file")


def etc_is_a_link(hostile: Hostile) -> None:
    hostile.put("etc/machine-id", b"4242")
    hostile.link("var", str(hostile.canary))


def to_the_host_by_proc(hostile: Hostile) -> None:
    hostile.link("out", f"/proc/self/root{hostile.canary}")
    hostile.put("out/file", b"harm")


ATTACKS = [
    *(absolute, upwards, through_a_link, through_a_link_upwards, through_two_links, over_a_link),
    *(directory_over_a_link, hard_link, hard_link_upwards, hard_link_through_a_link),
    *(machine_id_is_a_link, etc_is_a_link, to_the_host_by_proc),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
@pytest.mark.parametrize("way", ["pull", "add"])
def test_nothing_outside_is_touched(
    attack: Callable[[Hostile], None],
    way: str,
    hostile: Hostile,
    canary: Path,
    pull: Callable[[bytes], Answer],
    program: Program,
    tmp_path: Path,
) -> None:
    """Rejected, or written below the image's own root."""
    before = status_of(canary)
    attack(hostile)
    content = hostile.content()
    if way == "pull":
        answer = pull(content)
    else:
        (tmp_path / "root.tar").write_bytes(content)
        answer = program("image", "add", "alpine:3.22", str(tmp_path / "root.tar"))
    assert status_of(canary) == before
    assert b"Traceback" not in answer.err
    if answer.code != 0:
        assert len(answer.err.splitlines()) == 1 + (way == "pull")  # one line at the start
        assert program("image", "list").text == ""


def test_attributes_that_are_kept(
    hostile: Hostile, pull: Callable[[bytes], Answer], cache: Path, program: Program
) -> None:
    """Owners by number, modes with their set-uid bits, times, links, holes, capabilities."""
    if os.geteuid() != 0:
        pytest.skip("reads root's files")
    hostile.put("usr/bin/tool", b"tool", mode=0o6755, uid=0, gid=4242, mtime=1234567890)
    hostile.put("home", kind=tarfile.DIRTYPE, mode=0o1777)
    hostile.put("home/mine", b"mine", uid=1234, gid=67278, mode=0o640)
    hostile.link("home/same", "home/mine", hard=True)
    hostile.link("home/link", "/etc/passwd")
    marks = {
        "SCHILY.xattr.security.capability": CAPABILITY.decode("utf-8", "surrogateescape"),
        "SCHILY.xattr.user.note": "kept",
        "SCHILY.xattr.user.overlay.opaque": "y",
        "SCHILY.xattr.trusted.overlay.opaque": "y",
    }
    hostile.put("usr/bin/ping", b"ping", mode=0o755, pax_headers=marks)
    assert pull(hostile.content()).code == 0
    root = store_root(cache)
    tool = (root / "usr/bin/tool").stat()
    assert (tool.st_mode & 0o7777, tool.st_uid, tool.st_gid) == (0o6755, 0, 4242)
    assert int(tool.st_mtime) == 1234567890
    mine = (root / "home/mine").stat()
    assert (mine.st_uid, mine.st_gid, mine.st_nlink) == (1234, 67278, 2)
    assert (root / "home").stat().st_mode & 0o7777 == 0o1777
    assert os.readlink(root / "home/link") == "/etc/passwd"
    ping = root / "usr/bin/ping"
    assert sorted(os.listxattr(ping)) == ["security.capability", "user.note"]
    assert os.getxattr(ping, "security.capability") == CAPABILITY


def test_devices_are_left_out(
    hostile: Hostile, pull: Callable[[bytes], Answer], cache: Path, program: Program
) -> None:
    """Wherever they are: a machine has its own devices."""
    for name in ("dev/null", "dev/sda", "lib/udev/sda", "sda"):
        hostile.put(name, kind=tarfile.BLKTYPE, devmajor=8, devminor=0, mode=0o666)
        hostile.put(f"{name}c", kind=tarfile.CHRTYPE, devmajor=1, devminor=1, mode=0o666)
    hostile.put("fifo", kind=tarfile.FIFOTYPE)
    assert pull(hostile.content()).code == 0
    kinds = subprocess.run(
        ["find", store_root(cache), "(", "-type", "b", "-o", "-type", "c", ")"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert kinds.stdout == ""
    assert program("create", "--strict-images", "alpine:3.22", "one").code == 0
    assert program("run", "-m", "one", "ls", "/sda").code != 0


def test_container_markers(
    hostile: Hostile, pull: Callable[[bytes], Answer], program: Program
) -> None:
    """Files that prevent services from starting, or that machines must not share, are removed."""
    hostile.put(".dockerenv")
    hostile.put("usr/sbin/policy-rc.d", b"#!/bin/sh\nexit 101\n", mode=0o755)
    hostile.put("etc/machine-id", b"0123456789abcdef0123456789abcdef\n")
    hostile.put("var/lib/dbus/machine-id", b"0123456789abcdef0123456789abcdef\n")
    assert pull(hostile.content()).code == 0
    program("create", "alpine:3.22", "one")
    script = "cat /etc/machine-id; ls -a / /usr/sbin /var/lib/dbus"
    shown = program("run", "-m", "one", "sh", "-c", script).lines
    assert shown[0] != "0123456789abcdef0123456789abcdef"
    assert not {".dockerenv", "policy-rc.d", "machine-id"} & set(shown)


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("zstd"), reason="needs zstd to make the archive")
def test_archive_that_fills_a_disk(
    tmp_path: Path, pull: Callable[[bytes], Answer], cache: Path
) -> None:
    """A few kilobytes that would expand to gigabytes."""
    head = tarfile.TarInfo("zeros")
    head.size = 3 << 30
    script = "cat /dev/stdin; head -c 3221225472 /dev/zero"
    with subprocess.Popen(
        ["sh", "-c", f"{{ {script}; }} | zstd -q -1"], stdin=-1, stdout=-1
    ) as process:
        content = process.communicate(head.tobuf())[0]
    assert len(content) < 1 << 20
    answer = pull(content)
    assert answer.code == 1
    assert b"takes more than" in answer.err
    assert left(cache) == [] or left(cache)[0].endswith(".part")


@pytest.mark.usefixtures("root_only")
@pytest.mark.parametrize("names", [[f"d{one}" for one in range(1500)], ["d/" * 700]])
@pytest.mark.parametrize("fits", [True, False])
def test_each_file_takes_a_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], fits: bool
) -> None:
    """An archive of empty directories is shorter than what they take on a disk."""
    with tarfile.open(tmp_path / "archive", "w", format=tarfile.PAX_FORMAT) as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.type, member.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(member)
    root = tmp_path / "root"
    root.mkdir()
    monkeypatch.setattr(unpack, "free", lambda _: (9 if fits else 2) << 20)
    with open(tmp_path / "archive", "rb") as file:
        assert os.fstat(file.fileno()).st_size < 2 << 20
        if fits:
            assert unpack.unpack(file, str(root), Progress("test")) == 0
        else:
            with pytest.raises(unpack.NoSpace, match="it takes more than 2 MB"):
                unpack.unpack(file, str(root), Progress("test"))
    trees.remove(str(root))


def test_holes(hostile: Hostile, pull: Callable[[bytes], Answer], tmp_path: Path) -> None:
    """A sparse file of a terabyte is rejected: a change to it would copy it."""
    place = tmp_path / "sparse"
    place.mkdir()
    with open(place / "vast", "wb") as file:
        file.truncate(1 << 40)
    file_name = tmp_path / "sparse.tar"
    subprocess.run(["tar", "-S", "-C", place, "-cf", file_name, "vast"], check=True)
    answer = pull(file_name.read_bytes())
    assert answer.code == 1
    assert b"Traceback" not in answer.err


def deep(hostile: Hostile) -> None:
    path = "deep"
    for _ in range(1500):
        hostile.put(path, kind=tarfile.DIRTYPE, mode=0o755)
        path += "/d"


def deeper(hostile: Hostile) -> None:
    hostile.put("/".join(["d"] * 2500), b"x")


def long_name(hostile: Hostile) -> None:
    hostile.put("n" * 300, b"x")


def vast_name(hostile: Hostile) -> None:
    hostile.put("n" * (8 << 20), b"x")


def odd_names(hostile: Hostile) -> None:
    for name in ("new\nline", "\x1b[31mred", "-rf", "--checkpoint-action=exec=id", "*", "a\\b"):
        hostile.put(name, b"x")


@pytest.mark.long
@pytest.mark.parametrize("attack", [deep, deeper, long_name, vast_name, odd_names])
def test_odd_archives(
    attack: Callable[[Hostile], None],
    hostile: Hostile,
    pull: Callable[[bytes], Answer],
    program: Program,
    cache: Path,
) -> None:
    """Accepted, or rejected in one printable line; an accepted image can be used and removed."""
    attack(hostile)
    answer = pull(hostile.content())
    lines = answer.err.decode().splitlines()
    assert len(lines) == 1 + answer.code
    assert all(line.isprintable() for line in lines)
    if answer.code == 0:
        assert program("create", "--strict-images", "alpine:3.22", "one").code == 0
        assert program("delete", "-f", "one").code == 0
        assert program("image", "remove", "alpine:3.22").code == 0
    assert [name for name in left(cache) if not name.endswith(".part")] == []


@pytest.mark.long
def test_archive_from_a_pipe(program: Program, rootfs: Path, tmp_path: Path) -> None:
    """As from the shell's ``<(docker export ...)``."""
    os.mkfifo(tmp_path / "pipe")
    content = archive(rootfs, tmp_path / "root.tar.xz").read_bytes()
    with program.started("image", "add", "alpine:3.22", str(tmp_path / "pipe")) as process:
        (tmp_path / "pipe").write_bytes(content)
        assert process.communicate() == (b"", b"")
    assert process.returncode == 0
    assert program("create", "--strict-images", "alpine:3.22", "one").code == 0


@pytest.mark.long
def test_old_image_of_the_same_name_stays(
    rootfs: Path,
    tmp_path: Path,
    hostile: Hostile,
    pull: Callable[[bytes], Answer],
    program: Program,
) -> None:
    """A bad update does not remove the existing image."""
    assert pull(archive(rootfs, tmp_path / "good.tar.xz").read_bytes()).code == 0
    mirror = Mirror(tmp_path / "mirror")
    mirror.offer(NAME, b"bad" * 9999, "20260909_00:00")
    assert program("image", "pull", "alpine:3.22").code == 1
    assert program("create", "--strict-images", "alpine:3.22", "one").code == 0
    assert KEY.startswith("alpine_3.22")
