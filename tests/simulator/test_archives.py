"""Archives and images of unknown origin: nothing in them leads out, or is taken unchecked."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies

from orbctl_simulator import archives, things, trees
from orbctl_simulator.state import Failure
from tests.contract.program import Answer, Program
from tests.simulator.conftest import processes_of, script_in

Member = tuple[str, bytes, str, dict[str, str]]


def archive_of(path: Path, *members: Member, plain: bool = False) -> str:
    """An archive of names, types, link targets and attributes, as an attacker writes it."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, kind, target, headers in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.mode = kind, target, 0o4755
            member.pax_headers = headers
            data = target.encode() if kind == tarfile.REGTYPE else b""
            member.size = len(data)
            if kind in (tarfile.BLKTYPE, tarfile.CHRTYPE):
                member.devmajor, member.devminor = 254, 77
            archive.addfile(member, io.BytesIO(data))
    with open(path, "wb") as file:
        if plain:
            file.write(content.getvalue())
            return str(path)
        stream = archives.ZstdWriter(file)
        stream.write(content.getvalue())
        stream.finish()
    return str(path)


RECORD = "name=m\nuser=root\ndistro=debian\nversion=bookworm\narch=amd64\nvariant=default\n"
HEAD: Member = ("machine", tarfile.REGTYPE, RECORD, {})
UPPER: Member = ("upper", tarfile.DIRTYPE, "", {})


@pytest.mark.usefixtures("root_only")
@pytest.mark.parametrize(
    "members",
    [
        [("upper", tarfile.SYMTYPE, "OUT", {})],
        [("upper", tarfile.SYMTYPE, "OUT", {}), ("upper/evil", tarfile.REGTYPE, "evil", {})],
        [UPPER, ("upper/l", tarfile.SYMTYPE, "OUT", {}), ("upper/l/evil", tarfile.REGTYPE, "", {})],
        [UPPER, ("upper/../../evil", tarfile.REGTYPE, "evil", {})],
        [UPPER, ("upper/hard", tarfile.LNKTYPE, "../../../../../../../../OUT/passwd", {})],
        [
            UPPER,
            ("upper/l", tarfile.SYMTYPE, "OUT", {}),
            ("upper/h", tarfile.LNKTYPE, "upper/l/passwd", {}),
        ],
        [UPPER, ("upper/h", tarfile.LNKTYPE, "machine", {})],
        [("upper", tarfile.REGTYPE, "x", {})],
        [("upper", tarfile.FIFOTYPE, "", {})],
        [],
    ],
)
def test_import_that_leads_out(
    own: Program, tmp_path: Path, outside: Path, members: list[Member]
) -> None:
    """It is rejected in one line, or members that lead out are skipped; nothing is left behind."""
    made = [HEAD, *((n, k, t.replace("OUT", str(outside)), h) for n, k, t, h in members)]
    answer = own("import", archive_of(tmp_path / "a", *made))
    assert b"Traceback" not in answer.err
    if answer.code == 0:
        assert own("delete", "-f", "m").code == 0
    assert own("list", "-q").text == ""
    assert list((tmp_path / "state" / "machines").iterdir()) == []


@pytest.mark.usefixtures("root_only")
@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("distro=debian\n", "", "it is not a machine that the simulator exported"),
        ("arch=amd64\nvariant=default\n", "", "it is not a machine that the simulator exported"),
        ("distro=debian", "distro=\033[2J", "damaged: its distro is '?[2J'"),
        ("arch=amd64", "arch=sparc", "damaged: its arch is 'sparc'"),
        ("user=root", "user=../x", "invalid user name: '../x'"),
        ("name=m", "name=m\033[2J", "invalid machine name: 'm?[2J'"),
        ("name=m", "name=m\ncpu=nan", "invalid CPU limit: 'nan'"),
        ("name=m", "name=m\nmemory_mib=-1", "damaged: its memory_mib is '-1'"),
        ("name=m", "name=m\nimage=\033[2J", "its image is not available: ?[2J"),
    ],
)
def test_import_of_a_damaged_record(
    own: Program, tmp_path: Path, before: str, after: str, said: str
) -> None:
    """Commands show the record, and compute with it."""
    record = RECORD.replace(before, after)
    path = archive_of(tmp_path / "a", ("machine", tarfile.REGTYPE, record, {}), UPPER)
    answer = own("import", path)
    assert answer == (1, b"", f"[-32098] import '{path}': {said}\n".encode())
    assert own("list").text == ""


@pytest.mark.usefixtures("root_only")
@pytest.mark.parametrize("target", ["upper", "upper/", ".", "/"])
def test_import_of_a_link_to_the_topmost_directory(
    own: Program, tmp_path: Path, target: str
) -> None:
    link: Member = ("upper/link", tarfile.LNKTYPE, target, {})
    answer = own("import", archive_of(tmp_path / "a", HEAD, UPPER, link))
    assert answer.code == 1
    assert answer.err.endswith(b": link: links to the topmost directory\n")
    assert own("list").text == ""


@pytest.mark.usefixtures("root_only")
def test_import_of_an_invalid_layer(own: Program, tmp_path: Path) -> None:
    """No device, no attribute that points into the base, and the host's files stay hidden."""
    private = [name for name in ("/root", "/home") if os.listdir(name)]
    redirect = {"SCHILY.xattr.trusted.overlay.redirect": private[0] if private else "/root"}
    path = archive_of(
        tmp_path / "a",
        HEAD,
        UPPER,
        ("upper/leak", tarfile.DIRTYPE, "", redirect),
        ("upper/disk", tarfile.BLKTYPE, "", {}),
        ("upper/opt/suid", tarfile.REGTYPE, "#!/bin/sh\n", {}),
    )
    assert own("import", path).code == 0
    assert script_in(own, "m", "ls -A /leak /root /home").lines == [
        "/home:",
        "",
        "/leak:",
        "",
        "/root:",
    ]
    assert script_in(own, "m", "test -e /disk").code == 1
    assert script_in(own, "m", "stat -c %a /opt/suid").text == "4755\n"


@pytest.mark.usefixtures("root_only")
def test_export_and_import_keep_attributes(own: Program, tmp_path: Path) -> None:
    """Hard links, holes, pipes, modes, attributes, deletions and odd names."""
    assert own("create", "debian", "one").code == 0
    script = (
        "cd /opt; echo x >a; ln a b; truncate -s 1T holes; mkfifo -m 640 p; chown 42:43 a;"
        " printf x | dd of=holes seek=9 bs=1M conv=notrunc status=none; chmod 4750 a;"
        " rm -rf /usr/games /srv /etc/issue; mkdir /srv; touch -d @123.5 a;"
        " printf x >\"$(printf '\\377\\n')\""
    )
    assert script_in(own, "one", script).code == 0
    path = str(tmp_path / "one.tar.zst")
    assert own("export", "one", path) == Answer(0, b"", b"")
    assert os.path.getsize(path) < 50 << 20
    assert own("import", "-n", "two", path) == Answer(0, b"", b"")
    look = (
        "cd /opt; stat -c '%n %F %a %u %g %h %s %Y' * | sort; test -e /usr/games || echo gone;"
        " test -e /etc/issue || echo gone; ls -A /srv; ls | od -c; dd if=holes skip=9 bs=1M count=1"
        " status=none | head -c 1; du -k holes"
    )
    shown = [script_in(own, name, look).out for name in ("one", "two")]
    assert shown[0] == shown[1]
    assert b"a regular file 4750 42 43 2 2 123" in shown[0]


@pytest.mark.usefixtures("root_only")
def test_image_that_leads_out(own: Program, rootfs: Path, tmp_path: Path, outside: Path) -> None:
    """An image's links are resolved in the image."""
    image = tmp_path / "image"
    subprocess.run(["cp", "-a", rootfs, image], check=True)
    os.mknod(image / "disk", stat.S_IFBLK | 0o666, os.makedev(254, 77))
    (image / "usr/bin/sudo").unlink()
    (image / "usr/bin/sudo").symlink_to("/opt/sudo")
    (image / "opt").mkdir()
    (image / "opt/sudo").write_text("there")
    (tmp_path / "link").symlink_to(image)
    added = own("image", "add", "void", str(tmp_path / "link"))
    assert added.code == 0
    assert b"skipped" in added.err
    (place,) = (tmp_path / "state" / "images").glob("void*[!k]")
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert own("create", "void", "x") == Answer(0, b"", b"")
    assert own("run", "-m", "x", "-u", "root", "sh", "-c", "test -e /disk").code == 1
    assert own("delete", "-f", "x").code == 0
    assert own("image", "remove", "void").code == 0
    assert (image / "bin/sh").exists()
    members: list[list[Member]] = [
        [("bin/sh", tarfile.REGTYPE, "", {}), ("../evil", tarfile.REGTYPE, "", {})],
        [("bin", tarfile.SYMTYPE, str(outside), {}), ("bin/sh", tarfile.REGTYPE, "evil", {})],
        [("bin", tarfile.SYMTYPE, str(outside), {}), (".", tarfile.SYMTYPE, "/", {})],
        [("bin/sh", tarfile.LNKTYPE, f"../../../../../..{outside}/passwd", {})],
        [("bin", tarfile.SYMTYPE, "/bin", {})],
    ]
    for number, entries in enumerate(members):
        path = archive_of(tmp_path / f"{number}.tar", *entries, plain=True)
        answer = own("image", "add", "void", path)
        assert answer.code == 1, entries
        assert answer.err.count(b"\n") == 1
    assert own("image", "list").text == ""


@pytest.mark.long
@pytest.mark.usefixtures("root_only")
def test_installer_that_keeps_running(own: Program, rootfs: Path, tmp_path: Path) -> None:
    """An image's package manager may leave processes and print forever; nothing waits for them."""
    image = tmp_path / "image"
    subprocess.run(["cp", "-a", rootfs, image], check=True)
    (image / "usr/bin/sudo").unlink()
    (image / "lib/apk/db").mkdir(parents=True)
    (image / "lib/apk/db/installed").touch()
    (image / "sbin").mkdir()
    script = "(while :; do :; done) & while :; do echo; done | head -c 3000000; echo >/usr/bin/sudo"
    (image / "sbin/apk").write_text(f"#!/bin/sh\n{script}\n")
    (image / "sbin/apk").chmod(0o755)
    (image / "bin/head").write_bytes(Path("/usr/bin/head").read_bytes())
    (image / "bin/head").chmod(0o755)
    assert own("image", "add", "void", str(image)).code == 0
    cache = {"ORBCTL_SIMULATOR_CACHE": str(tmp_path / "cache")}
    assert own("create", "void", "x", env=cache, timeout=60).code == 0
    assert len(processes_of(tmp_path / "cache")) == 1  # the machine's, which hides the cache


@pytest.mark.long
def test_archive_that_claims_to_be_huge(own: Program, tmp_path: Path) -> None:
    """A header that claims more data than exists does not use up the host's memory."""
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 1 << 40
    path = tmp_path / "huge.tar"
    with open(path, "wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.truncate(1 << 38)
    answer = own("image", "add", "void", str(path), timeout=60)
    assert answer.code == 1
    assert answer.err.count(b"\n") == 1
    assert own("image", "list").text == ""


def some_archive() -> bytes:
    content = io.BytesIO()
    with archives.writing(content) as archive:
        for name, kind in (("a", tarfile.DIRTYPE), ("a/b", tarfile.REGTYPE), ("a/é", b"2")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, "b", 3 * (kind == tarfile.REGTYPE)
            member.pax_headers = {"SCHILY.xattr.user.x": "y", "mtime": "1.5"}
            archive.addfile(member, io.BytesIO(b"xyz"))
    return content.getvalue()


BYTES = strategies.sampled_from(b"\0/.019~\xff") | strategies.integers(0, 255)


@settings(max_examples=300, deadline=None)
@given(data=strategies.data())
def test_archives_that_are_damaged(data: strategies.DataObject) -> None:
    """Any bytes are unpacked or rejected, and nothing is written elsewhere."""
    raw = bytearray(some_archive())
    for _ in range(data.draw(strategies.integers(1, 6))):
        place = data.draw(strategies.integers(0, len(raw) - 1))
        raw[place] = data.draw(
            strategies.sampled_from(b"\0/.019~\xff") | strategies.integers(0, 255)
        )
    with tempfile.TemporaryDirectory() as folder:
        os.mkdir(f"{folder}/inside")
        with trees.folder(f"{folder}/inside") as root, contextlib.suppress(Failure):
            writer = things.Writer(root, things.FILES)
            with contextlib.closing(writer):
                for thing in archives.members(archives.reading(io.BytesIO(bytes(raw)))):
                    writer.put(thing)
        assert os.listdir(folder) == ["inside"]
