"""Section F: files in both directions."""

from __future__ import annotations

import hashlib
import io
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyinfra_orbstack import transfer

from .conftest import PASSWORD, Guest, Remote, way

PYINFRA = os.path.join(os.path.dirname(sys.executable), "pyinfra")


@pytest.fixture
def folder(guest: Guest) -> Iterator[str]:
    """A directory in the machine that everyone may write to."""
    path = f"/var/tmp/files-{time.monotonic_ns()}"
    guest.sh('mkdir -m 1777 "$1"', path)
    yield path
    guest.sh('rm -rf "$1"', path)


def round_trip(remote: Remote, path: str, data: bytes, **arguments: Any) -> None:
    remote.put(io.BytesIO(data), path, **arguments)
    arrived = io.BytesIO()
    remote.get(path, arrived, **arguments)
    assert arrived.getvalue() == data


@pytest.mark.smoke
@pytest.mark.parametrize(
    "size",
    [
        pytest.param(0, id="F1_empty"),
        pytest.param(1, id="F2_one_byte"),
        pytest.param(65535, id="F3_64KiB_less_one"),
        pytest.param(65536, id="F3_64KiB"),
        pytest.param(65537, id="F3_64KiB_and_one"),
        pytest.param(5_000_000, id="F5_binary"),
    ],
)
def test_sizes(remote: Remote, folder: str, guest: Guest, size: int) -> None:
    data = os.urandom(size)
    round_trip(remote, f"{folder}/file", data)
    digest = guest.sh('sha256sum <"$1"', f"{folder}/file").split()[0].decode()
    assert digest == hashlib.sha256(data).hexdigest()
    assert guest.leftovers() == []


@pytest.mark.timeout(240)
def test_F4_a_gibibyte_in_constant_memory(one: Remote, folder: str, tmp_path: Path) -> None:
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(2**30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    one.put(str(big), f"{folder}/big")
    one.run(f"test $(stat -c %s {folder}/big) = {2**30}")
    with open(os.devnull, "wb") as nowhere:
        one.get(f"{folder}/big", nowhere)
    one.run(f"rm {folder}/big")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 40 * 1024 * (1024 if sys.platform == "darwin" else 1)


class Pipe(io.RawIOBase):
    """Bytes that can be read only once."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def readinto(self, buffer: Any) -> int:
        return self._file.readinto(buffer)


@pytest.mark.smoke
@pytest.mark.parametrize("length", [10, 200_000])
def test_F6_all_kinds_of_io(remote: Remote, folder: str, length: int) -> None:
    text = "zeile ü\n" * length
    for source in (io.StringIO(text), io.BytesIO(text.encode()), Pipe(text.encode())):
        remote.put(source, f"{folder}/io")
        arrived, as_text = io.BytesIO(), io.StringIO()
        remote.get(f"{folder}/io", arrived)
        remote.get(f"{folder}/io", as_text)
        assert arrived.getvalue() == text.encode()
        assert as_text.getvalue() == text
    moved = io.BytesIO(b"abc")
    moved.seek(2)
    remote.put(moved, f"{folder}/io")
    assert remote.out(f"cat {folder}/io") == "abc"


@pytest.mark.parametrize(
    "name",
    ["a b", "it's", '"quoted"', "new\nline", "-rf", "*", "$(id)", "a;b", "日本 🦀", "back\\slash"],
)
def test_F7_odd_names(remote: Remote, folder: str, guest: Guest, name: str) -> None:
    round_trip(remote, f"{folder}/{name}", b"content")
    assert guest.sh('cat "$1"', f"{folder}/{name}") == b"content"
    assert guest.sh('ls "$1" | wc -l', folder).split()[0] in (b"1", b"2")  # a newline shows as two


def test_F7_relative_names_are_in_the_home(remote: Remote, guest: Guest) -> None:
    for name in ("relative-file", "-dash"):
        round_trip(remote, name, b"x")
        remote.out(f'test -f ~/"{name}" && rm -- ~/"{name}"')


@pytest.mark.parametrize("kind", ["new", "replaced", "written over"])
def test_F8_temporary_files_are_private_and_targets_get_the_umask(
    remote: Remote, folder: str, guest: Guest, kind: str
) -> None:
    """Whatever the parts are called: another user sees the directory, but can read none of them."""
    secret = b"the secret " * 30_000
    guest.sh('cd "$1"; printf old >replaced; printf old >"written over"', folder)
    guest.sh('cd "$1"; chown "$2" *; chmod 600 *; ln "written over" second', folder, owner(remote))
    # The data that was read from the source is in transit.
    found = "find . -type f -size +1000c >/tmp/found; [ ! -s /tmp/found ] || break"
    look = (
        f'cd "$1"; for i in $(seq 200); do {found}; sleep 0.05; done; su nobodys -s /bin/sh -c '
        "\"find $1 /tmp /var/tmp -type f -exec grep -ls 'the secret' {} + 2>/dev/null; true\""
    )
    seen: list[bytes] = []
    there: list[bytes] = []

    class Watched(Pipe):
        def readinto(self, buffer: Any) -> int:
            count = super().readinto(buffer)
            if not count:
                remote.state.config.TEMP_DIR = None
                seen.append(guest.sh(look, folder))
                there.append(guest.sh("cat /tmp/found; rm /tmp/found"))
            return count

    remote.put(Watched(secret), f"{folder}/{kind}")
    assert seen == [b""]
    assert b"./.pyinfra-" in there[0], "nothing was looked at"
    mode = "644" if kind == "new" else "600"
    assert guest.sh('stat -c %a "$1"', f"{folder}/{kind}").decode().strip() == mode
    assert guest.leftovers() == []


def owner(remote: Remote) -> str:
    return remote.out("id -un")


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("arguments", "owner"),
    [
        ({"_sudo": True}, "root"),
        ({"_sudo": True, "_sudo_user": "alice"}, "alice"),
        ({"_doas": True}, "root"),
    ],
)
def test_F9_owner_of_new_and_old_files(
    remote: Remote, folder: str, guest: Guest, arguments: dict[str, Any], owner: str
) -> None:
    path = f"{folder}/owned"
    round_trip(remote, path, b"new", **arguments)
    assert guest.sh('stat -c "%U %G" "$1"', path).split() == [owner.encode(), owner.encode()]
    guest.sh('chown nobody:users "$1"; chmod 640 "$1"; ln "$1" "$1.link"', path)
    if owner == "root":
        round_trip(remote, path, b"newer", **arguments)
        assert guest.sh('stat -c "%U %G %a %h" "$1"', path) == b"nobody users 640 2\n"
        assert guest.sh('cat "$1.link"', path) == b"newer"
        guest.sh('rm "$1.link"; chmod 4751 "$1"', path)
        round_trip(remote, path, b"newest", **arguments)
        assert guest.sh('stat -c "%U %G %a %h" "$1"', path) == b"nobody users 4751 1\n"


@pytest.mark.smoke
def test_F9_with_passwords(
    machine: str, connect: Callable[..., Remote], folder: str, guest: Guest, transport: str
) -> None:
    bob = connect(machine, orbstack_user="bob", orbstack_transport=transport)
    sudo = {"_sudo": True, "_sudo_password": PASSWORD}
    for size in (10, 200_000):
        data = os.urandom(size)
        round_trip(bob, f"{folder}/sudo", data, **sudo)
        assert guest.sh('stat -c %U "$1"', f"{folder}/sudo") == b"root\n"
        round_trip(bob, f"{folder}/alices", data, _sudo_user="alice", **sudo)
        assert guest.sh('stat -c %U "$1"', f"{folder}/alices") == b"alice\n"
    from .test_privilege_environment import supports

    if supports("_su_password"):
        su = {"_su_user": "root", "_su_password": PASSWORD}
        round_trip(bob, f"{folder}/su", os.urandom(200_000), **su)
        assert guest.sh('stat -c %U "$1"', f"{folder}/su") == b"root\n"
    bob.close()
    assert guest.leftovers() == []


@pytest.mark.smoke
def test_F10_target_in_a_directory_of_root(remote: Remote, guest: Guest) -> None:
    with pytest.raises(OSError, match="cannot write /root/file"):
        remote.put(io.BytesIO(b"x"), "/root/file")
    round_trip(remote, "/root/file", b"x", _sudo=True)
    guest.sh("rm /root/file")
    assert guest.leftovers() == []


def test_F11_odd_targets(remote: Remote, folder: str, guest: Guest) -> None:
    guest.sh(
        'cd "$1"; mkdir dir; echo old >real; ln -s real link; ln -s new dangling; chmod 666 real; '
        "ln -s loop loop; mkfifo fifo; chmod 666 fifo; ln -s dir/../link far; "
        "ln -s no/such/place nowhere",
        folder,
    )
    refused = {
        "dir": "Is a directory",
        "dir/": "Is a directory",
        "new-one/": "Is a directory",
        "real/": "Not a directory",
        ".": "Is a directory",
        "no/parent": "No such file or directory",
        "nowhere": "No such file or directory",
        "real/child": "Not a directory",
        "loop": "Too many levels of symbolic links",
        "fifo": "it is a FIFO.*",
        "a" * 256: "File name too long",
        "d/" * 2100 + "x": "File name too long",
        "nul\0": "a path must not contain a NUL byte",
        "lone \ud800": "the path cannot be encoded",
    }
    for target, reason in refused.items():
        with pytest.raises(OSError, match=rf"^cannot write .*: {reason}$") as told:
            remote.put(io.BytesIO(b"x"), f"{folder}/{target}")
        assert str(told.value).isprintable()
    with pytest.raises(OSError, match=r"^cannot write '': No such file or directory$"):
        remote.put(io.BytesIO(b"x"), "")
    remote.put(io.BytesIO(b"via link"), f"{folder}/far")
    remote.put(io.BytesIO(b"via dangling"), f"{folder}/dangling")
    shown = guest.sh('cd "$1"; readlink far link dangling; cat real new', folder)
    assert shown == b"dir/../link\nreal\nnew\nvia linkvia dangling"
    long = "a" * 255
    round_trip(remote, f"{folder}/{long}", b"x")
    with pytest.raises(
        OSError, match=r"^cannot write /proc/sys/kernel/no-such-thing: No such file"
    ):
        remote.put(io.BytesIO(b"x"), "/proc/sys/kernel/no-such-thing", _sudo=True)
    assert guest.leftovers() == []


def test_F11_devices(remote: Remote, guest: Guest) -> None:
    for size in (1, 100_000):
        remote.put(io.BytesIO(b"x" * size), "/dev/null", _sudo=True)
        with pytest.raises(OSError, match=r"^cannot write /dev/full: No space left on device$"):
            remote.put(io.BytesIO(b"x" * size), "/dev/full", _sudo=True)
    guest.sh("test -c /dev/null && test -c /dev/full")
    assert guest.leftovers() == []


def test_F15_odd_sources(remote: Remote, folder: str, guest: Guest, tmp_path: Path) -> None:
    guest.sh(
        'cd "$1"; mkdir dir; echo x >real; mkfifo fifo; chmod 666 fifo; ln -s loop loop', folder
    )
    refused = {
        "dir": "Is a directory",
        "fifo": "it is a FIFO.*",
        "real/": "Not a directory",
        "real/child": "Not a directory",
        "no/parent": "No such file or directory",
        "loop": "Too many levels of symbolic links",
        "a" * 256: "File name too long",
        "nul\0": "a path must not contain a NUL byte",
        "lone \ud800": "the path cannot be encoded",
    }
    target = tmp_path / "kept"
    target.write_text("kept")
    for source, reason in refused.items():
        with pytest.raises(OSError, match=rf"^cannot read .*: {reason}$") as told:
            remote.get(f"{folder}/{source}", str(target))
        assert str(told.value).isprintable()
    for source, reason in {"": "No such file.*", "/dev/zero": "it is a device.*"}.items():
        with pytest.raises(OSError, match=rf"^cannot read .*: {reason}$"):
            remote.get(source, str(target))
    assert target.read_text() == "kept"
    assert sorted(os.listdir(tmp_path)) == ["kept"]


@pytest.mark.smoke
def test_F15_files_generated_while_read(remote: Remote) -> None:
    for source in ("/proc/uptime", "/proc/meminfo", "/proc/self/status", "/proc/version"):
        arrived = io.BytesIO()
        remote.get(source, arrived)
        assert arrived.getvalue().endswith(b"\n")
    remote.get("/proc/self/cmdline", arrived := io.BytesIO())
    assert arrived.getvalue(), "the name of a process is no end of it"


@pytest.mark.parametrize("size", [100, 300_000])
def test_F15_a_growing_file_arrives_as_of_one_moment(
    remote: Remote, folder: str, guest: Guest, size: int
) -> None:
    """The copy is the content at one moment, and the download ends."""
    path = f"{folder}/log"
    remote.run(f"head -c {size} /dev/zero >{path}")
    grow = f"n=0; while [ -e {path} ]; do n=$((n+1)); echo line $n; done >>{path} 2>/dev/null"
    remote.run(f"({grow}) </dev/null >/dev/null 2>&1 &")
    try:
        for _ in range(5):
            remote.get(path, arrived := io.BytesIO())
            length = len(arrived.getvalue())
            assert length >= size
            assert guest.sh('head -c "$1" "$2"', str(length), path) == arrived.getvalue()
    finally:
        guest.sh('rm "$1"', path)


def test_F15_a_rewritten_file_arrives_as_sent(remote: Remote, folder: str, guest: Guest) -> None:
    """The checksum covers what was sent, so a file that keeps changing is not a failure."""
    path = f"{folder}/changing"
    remote.run(f"head -c 200000 /dev/urandom >{path}")
    change = (
        f"while [ -e {path} ]; do head -c 200000 /dev/urandom | dd of={path} conv=notrunc; done"
    )
    remote.run(f"({change}) </dev/null >/dev/null 2>&1 &")
    try:
        for _ in range(5):
            remote.get(path, arrived := io.BytesIO())
            assert len(arrived.getvalue()) == 200_000
    finally:
        guest.sh('rm "$1"', path)


def test_F13_an_interrupted_upload_changes_nothing(
    machine: str, folder: str, guest: Guest, tmp_path: Path
) -> None:
    guest.sh('printf old >"$1/file"; chmod 666 "$1/file"', folder)
    fifo = tmp_path / "endless.py"
    fifo.write_text(
        "import io, time\nfrom pyinfra.operations import files\n"
        "class Slow(io.RawIOBase):\n"
        "    name = 'slow'\n"
        "    def readable(self): return True\n"
        "    def seekable(self): return True\n"
        "    def seek(self, *a): return 0\n"
        "    def read(self, n=-1):\n        time.sleep(0.05); return b'x' * 65536\n"
        "from pyinfra import host\n"
        f"host.put_file(Slow(), {folder + '/file'!r})\n"
    )
    running = subprocess.Popen(
        [PYINFRA, "-y", f"@orbstack/{machine}", str(fifo)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        deadline = time.monotonic() + 60
        while not guest.leftovers():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=20)
    finally:
        running.kill()
    assert guest.sh('cat "$1/file"', folder) == b"old"
    assert guest.leftovers() == []


def test_F13_a_source_that_breaks_changes_nothing(
    remote: Remote, folder: str, guest: Guest
) -> None:
    guest.sh('printf old >"$1/file"; chmod 666 "$1/file"', folder)

    class Broken(Pipe):
        def readinto(self, buffer: Any) -> int:
            raise OSError("the disk broke")

    class BreaksLater(Pipe):
        def readinto(self, buffer: Any) -> int:
            count = super().readinto(buffer)
            if not count:
                raise OSError("the disk broke")
            return count

    for source in (Broken(b""), BreaksLater(b"x" * 10), BreaksLater(b"x" * 300_000)):
        with pytest.raises(OSError, match="the disk broke"):
            remote.put(source, f"{folder}/file")
        assert guest.sh('cat "$1/file"', folder) == b"old"
        assert guest.leftovers() == []


@pytest.mark.smoke
def test_F15_a_missing_file(remote: Remote, tmp_path: Path) -> None:
    target = tmp_path / "arrived"
    with pytest.raises(OSError, match="cannot read /no/such file"):
        remote.get("/no/such file", str(target))
    assert not target.exists()
    target.write_text("kept")
    with pytest.raises(OSError, match="cannot read"):
        remote.get("/etc", str(target))
    assert target.read_text() == "kept"


def test_F15_a_missing_local_file(remote: Remote, guest: Guest) -> None:
    with pytest.raises(FileNotFoundError):
        remote.put("/no/such/local/file", "/tmp/x")
    assert guest.leftovers() == []


def test_F16_an_unreadable_file(remote: Remote, tmp_path: Path) -> None:
    target = tmp_path / "arrived"
    with pytest.raises(OSError, match="cannot read /etc/shadow"):
        remote.get("/etc/shadow", str(target))
    remote.get("/etc/shadow", str(target), _sudo=True)
    assert "root:" in target.read_text()


def deploy(machine: str, folder: Path, text: str) -> str:
    """Run a deploy file with the pyinfra command, and return its output."""
    (folder / "deploy.py").write_text(text)
    done = subprocess.run(
        [PYINFRA, "-y", f"@orbstack/{machine}", "deploy.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.smoke
def test_F18_F24_operations(
    machine: str,
    folder: str,
    guest: Guest,
    tmp_path: Path,
    transport: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Templates, IO objects, downloads, and directories with and without trailing slashes."""
    monkeypatch.setenv("PYINFRA_ORBSTACK_TRANSPORT", way(transport))
    (tmp_path / "tree" / "sub dir").mkdir(parents=True)
    (tmp_path / "tree" / "one").write_text("1")
    (tmp_path / "tree" / "sub dir" / "two's").write_text("2")
    (tmp_path / "tpl.j2").write_text("hello {{ who }}\n")
    text = f"""
from io import BytesIO, StringIO
from pyinfra.operations import files
files.template(name="tpl", src="tpl.j2", dest={folder + "/tpl"!r}, who="wörld")
files.put(name="put", src=StringIO("text"), dest={folder + "/put"!r}, mode="600")
files.put(name="bytes", src=BytesIO(b"\\xff"), dest={folder + "/bytes"!r}, _sudo=True)
for number, (a, b) in enumerate([("", ""), ("/", ""), ("", "/"), ("/", "/")]):
    files.sync(name=f"sync{{number}}", src="tree" + a, dest={folder + "/sync"!r} + str(number) + b)
files.get(name="get", src="/etc/hostname", dest="hostname")
"""
    first = deploy(machine, tmp_path, text)
    second = deploy(machine, tmp_path, text)
    assert "No changes" not in first
    assert "] Success" not in second, second
    assert guest.sh('cat "$1/tpl" "$1/put"', folder).decode() == "hello wörld\ntext"
    assert guest.sh('stat -c "%a %U" "$1/put" "$1/bytes"', folder).split()[0] == b"600"
    for number in range(4):
        listed = guest.sh('cd "$1" && find . -type f | sort', f"{folder}/sync{number}")
        assert listed.decode() == "./one\n./sub dir/two's\n"
    assert (tmp_path / "hostname").read_text().strip() == machine.rpartition("/")[2]
    assert guest.leftovers() == []


def test_F21_isolated_machines_behave_the_same(
    machines: Any, connect: Callable[..., Remote], transport: str
) -> None:
    remote = connect(machines.create(isolated=True), orbstack_transport=transport)
    for size in (0, 10, 200_000):
        round_trip(remote, "/tmp/file", os.urandom(size))
        round_trip(remote, "/etc/file", os.urandom(size), _sudo=True)


@pytest.mark.parametrize("size", [7, 100_000])
def test_F25_a_wrong_checksum(
    remote: Remote, folder: str, guest: Guest, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    right = transfer.Digest.words
    wrong = iter([True])

    def words(self: transfer.Digest) -> tuple[str, str, str]:
        sums = right(self)
        return ("0" * 64, "0", sums[2]) if next(wrong, False) else sums

    monkeypatch.setattr(transfer.Digest, "words", words)
    old = os.urandom(size)
    guest.sh('cat >"$1/file"; chmod 666 "$1/file"', folder, stdin=old)
    arrived = io.BytesIO()
    remote.get(f"{folder}/file", arrived)  # corrupt once, then correct
    assert arrived.getvalue() == old
    for target in ("new", "file"):
        wrong = iter([True])
        remote.put(io.BytesIO(old[::-1]), f"{folder}/{target}")
        assert guest.sh('cat "$1/$2"', folder, target) == old[::-1]
    wrong = iter([True] * 2)
    with pytest.raises(OSError, match=rf"^cannot read {folder}/file: .*its checksum changed"):
        remote.get(f"{folder}/file", arrived)
    assert arrived.getvalue() == old
    for target in ("other", "file"):
        wrong = iter([True] * 2)
        with pytest.raises(
            OSError, match=rf"^cannot write {folder}/{target}: .*its checksum changed"
        ):
            remote.put(io.BytesIO(old), f"{folder}/{target}")
    assert guest.sh('cat "$1/file"; ls -A "$1"', folder) == old[::-1] + b"file\nnew\n"
    assert guest.leftovers() == []


def test_F25_a_stream_is_not_sent_twice(
    remote: Remote, folder: str, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer.Digest, "words", lambda self: ("0" * 64, "0", "100000"))
    with pytest.raises(OSError, match=r"^cannot write .*its checksum changed"):
        remote.put(Pipe(b"x" * 100_000), f"{folder}/new")
    assert guest.sh('ls -A "$1"', folder) == b""
