"""The local end of a transfer: files and IO objects, completely or not at all."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest

from pyinfra_orbstack import localfile
from pyinfra_orbstack.localfile import ROOM

OLD = b"old content\n" * 9
NEW = b"new\n"


def write(destination: Any, data: bytes) -> None:
    with localfile.writing(destination) as arrival:
        arrival.write(data)
        arrival.commit()


def read(source: Any) -> bytes:
    return b"".join(localfile.pieces(source))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A directory in which none of our files stays."""
    yield tmp_path
    assert [path.name for path in tmp_path.rglob(f"{ROOM}*")] == []


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No file grows beyond 64 KiB, as on a full disk. Python ignores the signal."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Reading -----------------------------------------------------------------------------------------


def test_sources(folder: Path) -> None:
    path = folder / "file"
    path.write_bytes(OLD)
    moved = io.BytesIO(OLD)
    moved.seek(5)
    for source in (str(path), path, moved, io.StringIO(OLD.decode()), bytes_once(OLD)):
        assert read(source) == OLD
    assert read(os.devnull) == b""
    with path.open() as text, path.open("rb", buffering=0) as raw:
        assert read(text) == read(raw) == OLD


def bytes_once(data: bytes) -> Any:
    class Once(io.RawIOBase):
        def __init__(self) -> None:
            self._file = io.BytesIO(data)

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            return self._file.readinto(buffer)

    return Once()


def test_text_is_sent_unchanged() -> None:
    assert read(io.StringIO("a\r\nb\rc\n", newline="")) == b"a\r\nb\rc\n"
    assert read(io.StringIO("ü\0🦀")) == "ü\0🦀".encode()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing", "No such file or directory"),
        ("dir", "it is a directory"),
        ("fifo", "it is a FIFO"),
        ("socket", "(it is a socket|No such device or address|Operation not supported)"),
        ("file/", "Not a directory"),
        ("a" * 256, "File name too long"),
        ("a\0b", "embedded null byte"),
        ("\ud800", "surrogates not allowed"),
        ("loop", "Too many levels"),
    ],
)
def test_sources_that_cannot_be_read(
    folder: Path, name: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    monkeypatch.chdir(folder)
    (folder / "dir").mkdir()
    (folder / "file").touch()
    os.mkfifo("fifo")
    (folder / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        with pytest.raises(OSError, match=f"^cannot read .*: .*{reason}") as told:
            read(name)
    assert "\n" not in str(told.value)
    assert str(told.value).isprintable()


@pytest.mark.skipif(not os.geteuid(), reason="root may read everything")
def test_an_unreadable_source(folder: Path) -> None:
    (folder / "secret").touch(mode=0)
    with pytest.raises(PermissionError, match="Permission denied"):
        read(folder / "secret")


def test_an_endless_device_is_rejected_as_a_source() -> None:
    with pytest.raises(OSError, match="cannot read /dev/zero: it is a device"):
        read("/dev/zero")


class Odd(io.RawIOBase):
    """An object that misbehaves after a while."""

    def __init__(self, *answers: Any) -> None:
        self._answers = list(answers)

    def read(self, size: int = -1) -> Any:
        answer = self._answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (OSError(5, "Input/output error"), "Input/output error"),
        (RuntimeError("two\nlines"), "two lines"),
        (ZeroDivisionError(), "ZeroDivisionError"),
        (None, "no data yet"),
        ("lone \ud800", "surrogates not allowed"),
        (3.5, "float"),
    ],
)
def test_an_io_object_that_fails_midway(answer: Any, reason: str) -> None:
    pieces = localfile.pieces(Odd(b"one", answer))
    assert next(pieces) == b"one"
    with pytest.raises(OSError, match=f"^cannot read the Odd object: .*{reason}"):
        next(pieces)


def test_a_closed_object() -> None:
    closed = io.BytesIO()
    closed.close()
    with pytest.raises(OSError, match="closed file"):
        read(closed)
    with pytest.raises(OSError, match="closed file"):
        write(closed, NEW)


def test_a_blocking_pipe_does_not_block_other_greenlets() -> None:
    """Waiting for a process's output does not block other hosts."""
    reader, writer = os.pipe()
    turns: list[int] = []

    def other() -> None:
        for turn in range(5):
            turns.append(turn)
            gevent.sleep(0.01)
        os.write(writer, b"late")
        os.close(writer)

    gevent.spawn(other)
    with open(reader, "rb") as source:
        assert read(source) == b"late"
    assert turns == [0, 1, 2, 3, 4]


def test_waiting_for_a_pipe_can_be_aborted() -> None:
    """Neither a timeout nor the end of pyinfra waits for it."""
    code = (
        "import os, gevent\n"
        "from pyinfra_orbstack import localfile\n"
        "reader, writer = os.pipe()\n"
        "try:\n"
        "    with gevent.Timeout(0.2):\n"
        "        list(localfile.pieces(open(reader, 'rb')))\n"
        "except gevent.Timeout:\n"
        "    print('gave up', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.stdout == "gave up\n", done.stderr


# Writing files -----------------------------------------------------------------------------------


def test_a_new_file_respects_the_umask(folder: Path) -> None:
    for mask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        before = os.umask(mask)
        write(str(folder / f"new{mask}"), NEW)
        os.umask(before)
        assert (folder / f"new{mask}").read_bytes() == NEW
        assert (folder / f"new{mask}").stat().st_mode & 0o7777 == mode


def test_an_existing_file_keeps_its_attributes(folder: Path) -> None:
    path = folder / "file"
    path.write_bytes(OLD)
    path.chmod(0o640)
    (folder / "link").symlink_to("file")
    if not os.geteuid():
        os.chown(path, 1234, 4321)
    before = path.stat()
    write(folder / "link", NEW)
    after = path.stat()
    assert path.read_bytes() == NEW
    assert (folder / "link").is_symlink()
    assert (after.st_mode, after.st_uid, after.st_gid) == (
        before.st_mode,
        before.st_uid,
        before.st_gid,
    )
    assert after.st_ino != before.st_ino, "it is replaced at once"
    assert after.st_mtime > time.time() - 60


@pytest.mark.skipif(not hasattr(os, "setxattr"), reason="Python has no attributes here")
def test_attributes_are_kept(folder: Path) -> None:
    path = folder / "file"
    path.write_bytes(OLD)
    try:
        os.setxattr(path, "user.note", b"kept")
    except OSError as no:
        pytest.skip(f"this file system has no attributes: {no}")
    write(path, NEW)
    assert os.getxattr(path, "user.note") == b"kept"


def test_all_hard_links_of_a_file_change(folder: Path) -> None:
    path, other = folder / "file", folder / "other"
    path.write_bytes(OLD)
    os.link(path, other)
    write(path, NEW)
    assert other.read_bytes() == path.read_bytes() == NEW
    assert path.stat().st_nlink == 2


def test_a_dangling_link_target_is_created(folder: Path) -> None:
    (folder / "link").symlink_to("new")
    write(folder / "link", NEW)
    assert (folder / "link").is_symlink()
    assert (folder / "new").read_bytes() == NEW


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("dir", "Is a directory"),
        ("dir/", "Is a directory"),
        ("new/", "Is a directory"),
        ("no/parent", "No such file or directory"),
        ("file/child", "Not a directory"),
        ("fifo", "it is a FIFO"),
        ("", "No such file or directory"),
        ("a" * 256, "File name too long"),
        ("a\0b", "embedded null"),
        ("\ud800", "surrogates"),
        ("loop", "Too many levels"),
    ],
)
def test_files_that_cannot_be_written(
    folder: Path, name: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "dir").mkdir()
    (folder / "file").write_bytes(OLD)
    os.mkfifo("fifo")
    (folder / "loop").symlink_to("loop")
    before = sorted(os.listdir(folder))
    with pytest.raises(OSError, match=f"^cannot write .*: .*{reason}") as told:
        write(name, NEW)
    assert str(told.value).isprintable()
    assert sorted(os.listdir(folder)) == before
    assert (folder / "file").read_bytes() == OLD


def test_devices_are_written_directly() -> None:
    write(os.devnull, NEW)
    assert not Path(os.devnull).is_file()
    if Path("/dev/full").exists():  # macOS has none
        with pytest.raises(OSError, match="cannot write /dev/full: No space left on device"):
            write("/dev/full", NEW)


def test_a_full_file_system_keeps_the_old_file(folder: Path, full: None) -> None:
    path = folder / "file"
    path.write_bytes(OLD)
    for target in (path, folder / "new"):
        with pytest.raises(OSError, match=f"cannot write {target}: File too large"):
            write(target, b"x" * 100_000)
    assert path.read_bytes() == OLD
    assert not (folder / "new").exists()


def test_a_full_file_system_keeps_a_hard_linked_file(
    folder: Path, full: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "file"
    path.write_bytes(OLD)
    os.link(path, folder / "other")
    overwrite = localfile.overwrite
    fits = iter([False])

    def first_time_full(target: str, source: str) -> None:
        if next(fits, True):
            overwrite(target, source)
            return
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(localfile, "overwrite", first_time_full)
    with pytest.raises(OSError, match=r"No space left on device$"):
        write(path, NEW)
    assert path.read_bytes() == OLD
    fits = iter([False, False])
    with pytest.raises(OSError, match=r"not be restored and is kept in .*/kept") as told:
        write(path, NEW)
    kept = Path(str(told.value).rpartition(" is kept in ")[2])
    assert kept.read_bytes() == OLD
    kept.unlink()
    kept.parent.rmdir()


def test_nothing_changes_before_the_transfer_is_complete(folder: Path) -> None:
    path = folder / "file"
    path.write_bytes(OLD)
    held = io.BytesIO(OLD)
    for destination in (path, folder / "new", held):
        with contextlib.suppress(ZeroDivisionError), localfile.writing(destination) as arrival:
            arrival.write(NEW)
            raise ZeroDivisionError
    assert path.read_bytes() == held.getvalue() == OLD
    assert held.tell() == 0
    assert not (folder / "new").exists()


def test_a_transfer_can_be_restarted(folder: Path) -> None:
    for destination in (folder / "new", io.BytesIO()):
        with localfile.writing(destination) as arrival:
            arrival.write(b"half of something else")
            arrival.restart()
            arrival.write(NEW)
            arrival.commit()
        done = destination.read_bytes() if isinstance(destination, Path) else destination.getvalue()
        assert done == NEW


def test_other_users_cannot_read_the_partial_file(folder: Path) -> None:
    with localfile.writing(folder / "new") as arrival:
        (room,) = folder.glob(f"{ROOM}*")
        assert room.stat().st_mode & 0o777 == 0o700
        arrival.commit()


@pytest.mark.skipif(bool(os.geteuid()), reason="root alone becomes somebody else")
def test_a_file_that_can_only_be_overwritten(folder: Path) -> None:
    """Its directory accepts no new files: it is overwritten, and keeps its owner and mode."""
    for outer in Path(tempfile.gettempdir()).parents:
        if not outer.stat().st_mode & 0o001:
            pytest.skip(f"other users cannot enter {outer}, where temporary files are")
    folder.chmod(0o755)
    path = folder / "file"
    path.write_bytes(OLD)
    path.chmod(0o666)
    elsewhere = tempfile.mkdtemp()
    os.chmod(elsewhere, 0o777)  # noqa: S103
    code = (
        "import os, sys, tempfile\n"
        "from pyinfra_orbstack import localfile\n"
        f"tempfile.tempdir = {elsewhere!r}\n"
        "os.setgid(1234); os.setuid(1234)\n"
        f"with localfile.writing({str(path)!r}) as arrival:\n"
        "    arrival.write(b'new'); arrival.commit()\n"
        "try:\n"
        f"    with localfile.writing({str(folder / 'other')!r}): pass\n"
        "except OSError as no:\n"
        "    print(no)\n"
    )
    for parent in folder.parents:
        if str(parent).startswith(tempfile.gettempdir()):
            parent.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.stdout == f"cannot write {folder / 'other'}: Permission denied\n", done.stderr
    assert path.read_bytes() == b"new"
    assert (path.stat().st_uid, path.stat().st_mode & 0o777) == (0, 0o666)
    assert os.listdir(elsewhere) == []
    os.rmdir(elsewhere)


def test_the_next_file_removes_leftovers_of_a_killed_process(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from pyinfra_orbstack import localfile\n"
        f"with localfile.writing({str(tmp_path / 'file')!r}) as arrival:\n"
        "    arrival.write(b'x' * 100000); print('now', flush=True); time.sleep(60)\n"
    )
    killed = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert killed.stdout
    assert killed.stdout.readline() == b"now\n"
    with localfile.writing(tmp_path / "other") as arrival:
        assert len(list(tmp_path.glob(f"{ROOM}*"))) == 2, "one that lives is left alone"
        arrival.commit()
    assert len(list(tmp_path.glob(f"{ROOM}*"))) == 1
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    write(tmp_path / "other", NEW)
    assert sorted(os.listdir(tmp_path)) == ["other"]


def test_leftovers_of_another_host_name_go_after_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name of a Mac changes with its network."""
    room = tmp_path / f"{ROOM}mac.local-{os.getpid()}-x"
    room.mkdir()
    write(tmp_path / "file", NEW)
    assert room.exists()
    os.utime(room, (0, 0))
    write(tmp_path / "file", NEW)
    assert not room.exists()


# Writing into objects ----------------------------------------------------------------------------


def objects(folder: Path) -> Iterator[tuple[Any, Any]]:
    """Objects with longer content, and how to read them."""
    yield (held := io.BytesIO(OLD)), held.getvalue
    yield (text := io.StringIO(OLD.decode())), lambda: text.getvalue().encode()
    for number, mode in enumerate(("r+b", "r+", "w+b", "w+", "wb", "w", "a+b")):
        path = folder / f"io{number}"
        path.write_bytes(b"" if "a" in mode else OLD)
        file = path.open(mode)
        yield file, lambda file=file, path=path: (file.flush(), path.read_bytes())[1]
    path = folder / "raw"
    path.write_bytes(OLD)
    yield path.open("r+b", buffering=0), path.read_bytes
    named = tempfile.NamedTemporaryFile("w+", dir=folder)  # noqa: SIM115
    named.write(OLD.decode())
    yield named, lambda: Path(named.name).read_bytes()
    spooled = tempfile.SpooledTemporaryFile(mode="w+")  # noqa: SIM115
    spooled.write(OLD.decode())
    yield spooled, lambda: (spooled.seek(0), spooled.read())[1].encode()


def test_io_objects_contain_exactly_the_transferred_bytes(folder: Path) -> None:
    for number, (held, content) in enumerate(objects(folder)):
        write(held, NEW)
        assert content() == NEW, number
        held.close()


def test_io_objects_that_cannot_be_truncated(folder: Path) -> None:
    class Simple:
        def __init__(self, data: bytes) -> None:
            self._file = io.BytesIO(data)
            for name in ("write", "seek", "tell", "read"):
                setattr(self, name, getattr(self._file, name))

    short = Simple(b"ab")
    write(short, NEW)
    assert short._file.getvalue() == NEW
    with pytest.raises(OSError, match="cannot write the Simple object: it contained more"):
        write(Simple(OLD), NEW)

    class Sink:
        data = b""

        def write(self, data: bytes) -> None:
            self.data += data

    sink = Sink()
    write(sink, NEW)
    assert sink.data == NEW


def test_an_error_leaves_an_io_object_unchanged(folder: Path) -> None:
    class Breaks(io.BytesIO):
        left = 1

        def write(self, data: Any) -> int:
            self.left -= 1
            if self.left == 0:
                super().write(data[:2])
                raise OSError(28, "No space left on device")
            return super().write(data)

    held = Breaks(OLD)
    held.seek(3)
    with pytest.raises(OSError, match="cannot write the Breaks object: No space left on device"):
        write(held, NEW)
    assert (held.getvalue(), held.tell()) == (OLD, 3)


@pytest.mark.parametrize("data", [b"\xff", "ä 🦀".encode()])
def test_text_that_is_not_utf_8_leaves_the_object_unchanged(folder: Path, data: bytes) -> None:
    """Bytes that are not text, and characters that its encoding lacks."""
    with (folder / "latin").open("w+", encoding="latin-1") as text:
        text.write("old ü")
        text.seek(2)
        with pytest.raises(OSError, match=r"cannot write .*codec can't"):
            write(text, data)
        assert text.tell() == 2
        text.seek(0)
        assert text.read() == "old ü"


def test_a_full_disk_leaves_an_open_file_unchanged(folder: Path, full: None) -> None:
    path = folder / "file"
    path.write_bytes(OLD)
    too_large = pytest.raises(OSError, match=f"cannot write {path}: File too large")
    with path.open("r+b") as file, too_large:
        write(file, b"x" * 200_000)
    assert path.read_bytes() == OLD


def test_an_io_object_in_use(folder: Path) -> None:
    held = io.BytesIO(OLD)
    with (
        held.getbuffer(),
        pytest.raises(OSError, match=r"cannot write the BytesIO object: .*export"),
    ):
        write(held, NEW)
    assert held.getvalue() == OLD


def test_large_content_is_not_buffered_in_memory() -> None:
    with open(os.devnull, "wb") as nowhere, localfile.writing(nowhere) as arrival:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(64):
            arrival.write(b"x" * 1024 * 1024)
        arrival.commit()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 30 * 1024 * (1024 if sys.platform == "darwin" else 1)
