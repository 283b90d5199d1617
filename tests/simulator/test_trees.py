"""Trees that a machine or an image controls: nothing in them leads out, and none is too deep."""

from __future__ import annotations

import io
import os
import resource
import stat
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from orbctl_simulator import archives, things, trees
from orbctl_simulator.state import Failure
from tests.contract.program import Answer, Program
from tests.simulator.conftest import script_in


def few_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))


# The walkers -----------------------------------------------------------------------------------


#: More than Python's stack depth, the limit of open files, and the length of a path allow.
DEPTH = 1100


def copied(source: Path, target: Path, use: things.Use = things.LAYER) -> None:
    target.mkdir(exist_ok=True)
    with trees.folder(str(source)) as theirs, trees.folder(str(target)) as ours:
        things.copy(theirs, ours, use)


def deep(folder: Path, depth: int) -> None:
    fd = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("deep", dir_fd=fd)
        inner = os.open("deep", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=fd))
    os.close(fd)


def depth_of(folder: Path) -> int:
    with trees.folder(str(folder)) as root:
        return max(len(found.parts) for found in trees.walk(root))


@pytest.mark.usefixtures("root_only")
def test_deep_trees(tmp_path: Path) -> None:
    """They are measured, copied, packed, unpacked and removed with few open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    (tmp_path / "source").mkdir()
    deep(tmp_path / "source", DEPTH)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        copied(tmp_path / "source", tmp_path / "copy")
        assert depth_of(tmp_path / "copy") == DEPTH + 1
        packed = io.BytesIO()
        with archives.writing(packed) as archive, trees.folder(str(tmp_path / "copy")) as root:
            packer = archives.Packer(archive, things.LAYER)
            for thing in things.things_in(root):
                packer.put("0", thing)
        packed.seek(0)
        (tmp_path / "unpacked").mkdir()
        with trees.folder(str(tmp_path / "unpacked")) as root:
            writer = things.Writer(root, things.LAYER)
            for thing in archives.members(archives.reading(packed)):
                writer.put(thing)
            writer.finish()
        assert depth_of(tmp_path / "unpacked") == DEPTH + 2
        for name in ("source", "copy", "unpacked"):
            trees.remove(str(tmp_path / name))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_removal_of_odd_files_and_links(tmp_path: Path, outside: Path) -> None:
    """Links are removed, but not their targets; names may be odd."""
    tree = tmp_path / "tree"
    for name in ("a/b", "a/\n", "x" * 255, "a/-rf", "\udcff", "a/.", "full"):
        (tree / name).mkdir(parents=True, exist_ok=True)
    (tree / "a" / "b" / "link").symlink_to(outside)
    (tree / "link").symlink_to(outside)
    for number in range(40):
        (tree / "full" / str(number) / "inner" / str(number)).mkdir(parents=True)
        (tree / "full" / str(number) / "file").write_text("x")
    os.mkfifo(tree / "a" / "pipe")
    trees.remove(str(tree))
    assert not tree.exists()
    (tmp_path / "link").symlink_to(outside)
    trees.remove(str(tmp_path / "link"))
    assert not (tmp_path / "link").is_symlink()
    trees.remove(str(tmp_path / "nothing"))


def swapping(stop: threading.Event, folder: Path, outside: Path) -> Callable[[], None]:
    """Repeatedly replace a directory with a link to `outside`, and back."""

    def swap() -> None:
        place, aside, link = folder / "trap", folder / "aside", folder / "link"
        while not stop.is_set():
            link.symlink_to(outside)
            place.rename(aside)
            link.rename(place)
            place.unlink()
            aside.rename(place)

    return swap


@pytest.mark.usefixtures("root_only")
def test_links_that_appear_during_a_walk(tmp_path: Path, outside: Path) -> None:
    """The file that is checked is the one that is opened, or the walk ends."""
    source = tmp_path / "source"
    (source / "trap" / "cron.d").mkdir(parents=True)
    (source / "trap" / "passwd").write_text("inside")
    (source / "trap" / "cron.d" / "job").write_text("inside")
    stop = threading.Event()
    swapper = threading.Thread(target=swapping(stop, source, outside))
    swapper.start()
    whole = 0
    try:
        for number in range(300):
            target = tmp_path / "copies" / str(number)
            target.mkdir(parents=True)
            try:
                copied(source, target)
                whole += 1
            except Failure:
                pass
            trees.disk_usage(str(source))
    finally:
        stop.set()
        swapper.join()
    assert whole
    stolen = [p for p in (tmp_path / "copies").rglob("*") if p.is_file() and not p.is_symlink()]
    assert {path.read_text() for path in stolen} == {"inside"}


@pytest.mark.usefixtures("root_only")
def test_copies_keep_attributes(tmp_path: Path) -> None:
    """Hard links, holes, owners, modes, times, attributes; only one of overlayfs' own."""
    source = tmp_path / "source"
    (source / "folder").mkdir(parents=True)
    (source / "file").write_text("x")
    os.link(source / "file", source / "folder" / "again")
    with open(source / "holes", "wb") as file:
        file.truncate(1 << 40)
        file.seek(1 << 30)
        file.write(b"in the middle")
    os.mkfifo(source / "pipe", 0o640)
    os.mknod(source / "deleted", stat.S_IFCHR, 0)
    os.mknod(source / "disk", stat.S_IFBLK | 0o666, os.makedev(254, 77))
    (source / "link").symlink_to("/nowhere")
    os.chown(source / "file", 42, 43)
    os.chmod(source / "file", 0o4710)  # noqa: S103
    os.chown(source / "link", 44, 45, follow_symlinks=False)
    os.setxattr(source / "file", "user.note", b"\xff\0")
    for mark in ("opaque", "redirect", "metacopy", "origin"):
        os.setxattr(source / "folder", f"trusted.overlay.{mark}", b"y")
    os.utime(source / "folder", ns=(1, 1234567890123456789))
    target = tmp_path / "target"
    copied(source, target)
    status = (target / "file").stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (42, 43, 0o4710)
    assert status.st_ino == (target / "folder" / "again").stat().st_ino
    assert os.getxattr(target / "file", "user.note") == b"\xff\0"
    assert os.listxattr(target / "folder") == ["trusted.overlay.opaque"]
    assert (target / "folder").stat().st_mtime_ns == 1234567890123456789
    assert (target / "holes").stat().st_size == 1 << 40
    assert (target / "holes").stat().st_blocks < 100
    with open(target / "holes", "rb") as file:
        file.seek(1 << 30)
        assert file.read(13) == b"in the middle"
    assert (target / "link").lstat().st_uid == 44
    assert stat.S_ISFIFO((target / "pipe").stat().st_mode)
    assert stat.S_ISCHR((target / "deleted").stat().st_mode)
    assert not (target / "disk").exists()
    copied(source, tmp_path / "image", things.IMAGE)
    assert os.listxattr(tmp_path / "image" / "folder") == []
    assert not (tmp_path / "image" / "deleted").exists()


def test_copy_into_itself(tmp_path: Path) -> None:
    (tmp_path / "source" / "inner").mkdir(parents=True)
    with pytest.raises(Failure, match="inner: the copy would contain itself"):
        copied(tmp_path / "source", tmp_path / "source" / "inner")


# Machines --------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.usefixtures("root_only")
def test_deep_machine(own: Program, tmp_path: Path) -> None:
    """It is listed, cloned, copied from and deleted; others can still be created."""
    assert own("create", "debian", "m").code == 0
    script = f"cd; for i in $(seq {DEPTH}); do mkdir deep; cd -P deep; done; echo end >file"
    assert script_in(own, "m", script, "user").code == 0
    calls = (
        ["list"],
        ["info", "m"],
        ["clone", "m", "n"],
        ["pull", "-m", "m", "deep", str(tmp_path)],
        ["delete", "-f", "m", "n"],
        ["create", "debian", "m"],
    )
    for words in calls:
        answer = own(*words, preexec_fn=few_files)
        assert answer.code == 0, (words, answer)
    assert depth_of(tmp_path / "deep") == DEPTH
    trees.remove(str(tmp_path / "deep"))
    assert own("list", "-q").lines == ["m"]
    assert not (tmp_path / "state" / "trash").exists()


@pytest.mark.usefixtures("root_only")
def test_nothing_leads_to_the_hosts_root(own: Program, tmp_path: Path) -> None:
    """Tools such as `pytest` find no link out of a state directory inside a project."""
    assert own("create", "debian", "m").code == 0
    assert script_in(own, "m", "ln -s / ~/way-out; ln -s / /way-out", "root").code == 0
    words = ["find", str(tmp_path), "-name", ".*", "-prune", "-o", "-type", "l", "-print"]
    assert subprocess.run(words, capture_output=True).stdout == b""
    (tmp_path / "test_it.py").write_text("def test_it(): pass\n")
    words = ["python", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    shown = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert "1 passed" in shown.stdout, shown


@pytest.mark.parametrize("first", ["file", "link", "folder"])
def test_pull_over_an_earlier_pull(
    orb: Program, victim: str, tmp_path: Path, outside: Path, first: str
) -> None:
    """Whatever an earlier copy contains, the next one stays below its target."""
    make = {
        "file": "echo x >$p/s; echo x >$p/f",
        "link": f"ln -s {outside}/cron.d $p/s; ln -s {outside}/passwd $p/f",
        "folder": "mkdir $p/s $p/f; echo evil >$p/s/job; echo evil >$p/f/passwd",
    }
    for then in make:
        target = tmp_path / then
        target.mkdir()
        for how in (first, then):
            script = (
                f"cd; rm -rf out; mkdir -p out/deep; for p in out out/deep; do {make[how]}; done"
            )
            assert script_in(orb, victim, script, "user").code == 0
            answer = orb("pull", "-m", victim, "out", f"{target}/")
            assert answer.code in (0, 1)
            assert b"Traceback" not in answer.err
        assert (target / "out").is_dir()


def test_pull_of_one_name_twice(orb: Program, victim: str, tmp_path: Path, outside: Path) -> None:
    """If two sources have one name, the second is never written through a link of the first."""
    (tmp_path / "target").mkdir()
    script = f"cd; mkdir -p a/x b/x/s; ln -s {outside}/cron.d a/x/s; ln -s {outside}/passwd a/x/f"
    script += "; echo evil >b/x/s/job; echo evil >b/x/f; mkdir one"
    script += f"; ln -s {outside}/passwd one/f"
    assert script_in(orb, victim, script, "user").code == 0
    orb("pull", "-m", victim, "a/x", "b/x", f"{tmp_path}/target/")
    assert orb("pull", "-m", victim, "one", f"{tmp_path}/target/").code == 0
    assert script_in(orb, victim, "cd; echo evil >f", "user").code == 0
    assert orb("pull", "-m", victim, "f", f"{tmp_path}/target/one/").code == 0
    assert (tmp_path / "target/one/f").read_text() == "evil\n"
    (tmp_path / "target/one/f").unlink()
    (tmp_path / "target/one/f").symlink_to(outside / "passwd")
    refused = orb("pull", "-m", victim, "f", f"{tmp_path}/target/one/f")
    assert refused.code == 1
    assert b"a symbolic link" in refused.err


def test_files_that_pull_copies(orb: Program, victim: str, tmp_path: Path) -> None:
    """Hard links, holes and odd names are kept; pipes and the like are skipped, and named."""
    script = (
        "cd; mkdir out; cd out; echo x >a; ln a b; mkdir c; ln a c/d; truncate -s 1T holes;"
        " mkfifo p; printf x >\"$(printf 'new\\nline')\"; printf x >\"$(printf '\\377\\033[31m')\";"
        " ln -s a l; cp /bin/true suid; chmod 4755 suid; ln -s /etc/passwd absolute"
    )
    assert script_in(orb, victim, script, "user").code == 0
    answer = orb("pull", "-m", victim, "out", str(tmp_path))
    assert answer.code == 0
    assert answer.err == b"skipped: p: not a regular file, directory or symbolic link\n"
    out = tmp_path / "out"
    assert (out / "a").stat().st_ino == (out / "b").stat().st_ino == (out / "c/d").stat().st_ino
    assert (out / "holes").stat().st_size == 1 << 40
    assert (out / "holes").stat().st_blocks < 100
    assert (out / "new\nline").read_text() == "x"
    assert os.fsencode("\udcff\x1b[31m") in os.listdir(os.fsencode(out))
    assert os.readlink(out / "absolute") == "/etc/passwd"
    assert stat.S_IMODE((out / "suid").stat().st_mode) & 0o7000 == 0
    again = orb("push", "-m", victim, str(out), "back")
    assert (again.code, again.err) == (0, b"")
    linked = script_in(orb, victim, "stat -c %h ~user/back/c/d", "root")
    assert linked.text == "3\n"


def test_pull_of_an_unreadable_file(orb: Program, victim: str, tmp_path: Path) -> None:
    """A pipe does not block it, and names in messages are safe for a terminal."""
    script = "cd; mkfifo pipe; mkdir secret; : >\"secret/$(printf '\\033[31m')\"; chmod 0 secret/*"
    assert script_in(orb, victim, script, "user").code == 0
    answer = orb("pull", "-m", victim, "pipe", str(tmp_path), timeout=20)
    assert answer.code == 1
    said = b"[-32098] pipe: not a regular file or directory\n"
    assert answer.err == said
    answer = orb("pull", "-m", victim, "nothing", str(tmp_path))
    assert answer == Answer(1, b"", b"[-32098] nothing: no such file or directory\n")
    answer = orb("pull", "-m", victim, "secret", str(tmp_path))
    assert answer.code == 1
    assert b"permission denied" in answer.err
    assert b"\x1b" not in answer.err


def test_push_does_not_write_to_a_share(own: Program, tmp_path: Path) -> None:
    """A copy into a machine goes below what is mounted there, and never into it."""
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o777)
    shared.chmod(0o777)
    (tmp_path / "tree" / "share").mkdir(parents=True)
    (tmp_path / "tree" / "share" / "file").write_text("x")
    env = {"ORBCTL_SIMULATOR_SHARE": str(shared)}
    assert own("create", "debian", "m", env=env).code == 0
    script = f"mkdir -p ~user/tree; ln -s {shared} ~user/tree/share; ln -s {shared} ~user/direct"
    assert script_in(own, "m", script).code == 0
    for words in ([str(tmp_path / "tree")], [f"{tmp_path}/tree/share/file", "direct/"]):
        own("push", "-m", "m", *words)
    own("push", "-m", "m", f"{tmp_path}/tree/share/file", f"{shared}/file")
    assert list(shared.iterdir()) == []
