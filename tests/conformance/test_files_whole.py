"""Section F: a file is old or new, whatever is killed, full, late or concurrent."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gevent
import pytest

from pyinfra_orbstack import transfer
from pyinfra_orbstack.interrupts import Interrupted
from pyinfra_orbstack.orbctl import Orbctl

from ..containers import ROOT, Containers
from ..protection import protection
from .conftest import Guest, Remote
from .test_faults import children

PYINFRA = os.path.join(os.path.dirname(sys.executable), "pyinfra")
OLD, NEW = b"o" * 1000, b"N" * 200_000
#: A file of the user, and a file of another user that root replaces.
WRITERS: dict[str, dict[str, Any]] = {"user": {}, "root": {"_sudo": True}}


class Slow(io.RawIOBase):
    """A source that pauses midway until it is told to continue."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)
        self.may_go_on = False

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, *where: int) -> int:
        return self._file.seek(*where)

    def readinto(self, buffer: Any) -> int:
        while self._file.tell() >= len(NEW) / 2 and not self.may_go_on:
            gevent.sleep(0.02)
        return self._file.readinto(buffer)


# In the machine. The first `cat` that writes to $SLOW stops midway.
ROOMS = 'ls -d "$1"/.pyinfra-orbstack-* /tmp/.pyinfra-orbstack-* 2>/dev/null; true'
SLOW_CAT = r"""#!/bin/sh
case $(readlink /proc/$$/fd/1) in
$SLOW) if mkdir /var/tmp/slow/middle 2>/dev/null; then head -c 5 ${1:+"$1"}; exec sleep 60; fi;;
esac
exec /bin/cat "$@"
"""


class Place(NamedTuple):
    """Where a test writes, and how it inspects the result."""

    guest: Guest
    folder: str

    def make(self, name: str, setting: str = "") -> str:
        """Create an old file, and other files that are requested."""
        path = f"{self.folder}/{name}"
        self.guest.sh(f'rm -rf "$1"; cat >"$1"; cd "$2"; {setting}', path, self.folder, stdin=OLD)
        return path

    def content(self, path: str) -> bytes:
        return self.guest.sh('[ ! -e "$1" ] || cat "$1"', path)

    def rooms(self) -> list[str]:
        return self.guest.sh(ROOMS, self.folder).decode().split()

    def writer(self) -> int:
        """The writing shell, once it writes."""
        deadline = time.monotonic() + 30
        while not (rooms := self.rooms()):
            assert time.monotonic() < deadline
            gevent.sleep(0.05)
        return int(rooms[0].split("-")[-3])

    def wait_for(self, path: str) -> None:
        deadline = time.monotonic() + 30
        while not self.guest.sh('[ ! -e "$1" ] || echo yes', path):
            assert time.monotonic() < deadline
            gevent.sleep(0.05)


@pytest.fixture
def place(guest: Guest) -> Iterator[Place]:
    folder = f"/var/tmp/whole-{time.monotonic_ns()}"
    guest.sh(
        'mkdir -m 777 "$1" && rm -rf /var/tmp/slow && mkdir -m 777 /var/tmp/slow && '
        "cat >/var/tmp/slow/cat && chmod 755 /var/tmp/slow/cat",
        folder,
        stdin=SLOW_CAT.encode(),
    )
    yield Place(guest, folder)
    guest.sh('rm -rf "$1" /var/tmp/slow', folder)


def kill(place: Place, what: str) -> None:
    """Kill the writer: the shell's child, both at once, or the local client."""
    writer = place.writer()
    if what == "client":
        for pid in children():
            os.kill(pid, signal.SIGKILL)
        return
    find = (
        'for f in /proc/[0-9]*/stat; do read -r p _ _ up _ <$f; [ "$up" != "$1" ] || echo $p; done'
    )
    words = {"child": "$c", "shell and child": "$1 $c", "user's": "$1 $c"}[what]
    place.guest.sh(f"c=$({find}); kill -9 {words} 2>/dev/null; true", str(writer))


def interrupt(putting: gevent.Greenlet) -> None:
    putting.kill(Interrupted("interrupted"), block=False)


WAYS = ("child", "shell and child", "client", "interrupt", "timeout", "gevent's timeout")


def fail(way: str, place: Place, put: Callable[..., Any], middle: Callable[[], None]) -> str:
    """Start a write, make it fail midway, and return the error."""
    options = {"_timeout": 8} if way == "timeout" else {}

    def run() -> None:
        with (
            gevent.Timeout(8, OSError("gevent's")) if "gevent" in way else contextlib.nullcontext()
        ):
            put(**options)

    putting = gevent.spawn(run)
    middle()
    if way == "interrupt":
        interrupt(putting)
    elif "timeout" not in way:
        kill(place, way)
    with pytest.raises(OSError) as told:  # noqa: PT011
        putting.get(timeout=60)
    assert "\n" not in str(told.value)
    return str(told.value)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("who", WRITERS)
def test_F13_an_upload_killed_in_transit_changes_nothing(
    remote: Remote, place: Place, who: str, way: str
) -> None:
    for path in (place.make("old", 'chmod 666 "$1"'), f"{place.folder}/new"):
        before = place.content(path)
        source = Slow(NEW)
        said = fail(
            way,
            place,
            lambda path=path, source=source, **options: remote.put(
                source, path, **WRITERS[who], **options
            ),
            lambda: place.writer() and gevent.sleep(0.1),
        )
        source.may_go_on = True
        assert place.content(path) == before, said
        if way == "timeout":
            assert said == f"cannot write {path}: it did not finish within 8 s"
        elif way not in ("interrupt", "gevent's timeout"):
            assert said.startswith(f"cannot write {path}: "), said
        assert place.rooms() == [], said
        remote.put(io.BytesIO(NEW), path, **WRITERS[who])
        assert place.content(path) == NEW


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["two names", "closed directory", "relative"])
def test_F13_an_overwrite_that_is_killed_is_undone(
    one: Remote, shared_machine: str, client: Orbctl, way: str, kind: str, place: Place
) -> None:
    """If a file cannot be replaced, the writer restores the old content."""
    setting = 'ln "$1" second; chmod 666 second'
    if kind == "closed directory":
        setting = 'chmod 666 "$1"; chmod 755 .; chown root .'
    path = place.make("old", setting)
    given: dict[str, Any] = {"_env": {"SLOW": path, "PATH": f"/var/tmp/slow:{PATHS}"}}
    name = path
    if kind == "relative":
        given.update(_chdir=place.folder, _sudo=True)
        name = "old"
    said = fail(
        way,
        place,
        lambda **options: one.put(io.BytesIO(NEW), name, **given, **options),
        lambda: place.wait_for("/var/tmp/slow/middle"),
    )
    assert place.content(path) == OLD, said
    assert place.rooms() == [], said
    strays = place.guest.sh("find / -xdev -name old -newer /var/tmp/slow/cat 2>/dev/null; true")
    assert set(strays.decode().split()) <= {path}, "written elsewhere"
    one.put(io.BytesIO(NEW), name, **given)
    assert place.content(path) == NEW


PATHS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


STOPPING = """
import sys
sys.path.insert(0, {root!r})
from tests.conformance.conftest import Remote
from tests.conformance.test_files_whole import NEW
import io
Remote({machine!r}).connect().put(io.BytesIO(NEW), {path!r}, **{given!r})
"""


@pytest.mark.parametrize("client_too", [False, True])
@pytest.mark.parametrize("kind", ["replaced", "two names"])
def test_F13_a_machine_that_stops_in_the_middle(
    client: Orbctl,
    fresh_machine: str,
    connect: Callable[..., Remote],
    kind: str,
    client_too: bool,
) -> None:
    """The old content is in place, or next to it, where the next upload finds it."""
    guest, folder = Guest(client, fresh_machine), "/srv/stop"
    guest.sh(
        'mkdir -m 777 "$1"; mkdir -m 777 /var/tmp/slow; cat >/var/tmp/slow/cat; '
        "chmod 755 /var/tmp/slow/cat",
        folder,
        stdin=SLOW_CAT.encode(),
    )
    place = Place(guest, folder)
    path = place.make("old", 'chmod 666 "$1"' + ('; ln "$1" two' if kind == "two names" else ""))
    # A replacement stops in transit, an overwrite stops midway.
    slow = f"{folder}/.pyinfra-*/new" if kind == "replaced" else path
    given: dict[str, Any] = {"_env": {"SLOW": slow, "PATH": f"/var/tmp/slow:{PATHS}"}}
    text = STOPPING.format(root=str(ROOT), machine=fresh_machine, path=path, given=given)
    putting = subprocess.Popen(
        [sys.executable, "-c", text], stderr=subprocess.PIPE, start_new_session=True
    )
    place.wait_for("/var/tmp/slow/middle")
    if client_too:
        # All of pyinfra's processes at once: none is left to restore anything.
        ours = descendants(putting.pid)
        for pid in ours:
            os.kill(pid, signal.SIGSTOP)
    client.stop(fresh_machine)
    if client_too:
        for pid in ours:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    _, said = putting.communicate(timeout=90)
    assert client_too or f": cannot write {path}: ".encode() in said, said
    client.start(fresh_machine)
    remote = connect(fresh_machine)
    rooms = place.rooms()
    if kind == "replaced":
        assert place.content(path) == OLD
    elif rooms:
        # This is promised: the beginning of the new content, and the old content next to it.
        assert place.content(path) == NEW[:5]
        assert place.content(f"{rooms[0]}/old") == OLD
        # The next upload restores the old content, even if it fails itself.
        guest.sh("rm -r /var/tmp/slow/middle")
        with pytest.raises(TimeoutError):
            remote.put(io.BytesIO(NEW), path, _timeout=8, **given)
        assert place.content(path) == OLD
        assert place.rooms() == []
    assert rooms or not client_too
    remote.put(io.BytesIO(NEW), path)
    assert place.content(path) == NEW
    assert place.rooms() == []


def test_F13_a_stopped_machine_is_not_started_to_clean_up(
    client: Orbctl, fresh_machine: str, connect: Callable[..., Remote]
) -> None:
    remote = connect(fresh_machine)
    upload = transfer.Upload(remote.host.connector.runner, "/tmp/x", lambda command: command)
    assert upload.recover() == ""
    client.stop(fresh_machine)
    assert upload.recover() == "; the next upload to it removes what this one left"
    assert client.info(fresh_machine).state == "stopped"


def descendants(pid: int) -> list[int]:
    """One of our processes and its descendants."""
    found = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, check=True)
    pairs = [tuple(map(int, line.split())) for line in found.stdout.splitlines()]
    tree = [pid]
    for one in tree:
        tree += [child for child, parent in pairs if parent == one]
    return tree


def test_F13_a_later_upload_removes_leftovers_of_killed_ones(remote: Remote, place: Place) -> None:
    """But not those of a running upload, of another user, or of another target."""
    guest, folder = place.guest, place.folder
    host = guest.sh("cat /proc/sys/kernel/hostname").decode().strip()
    user = remote.out("id -un")
    token = "0" * 32
    begin = f"{folder}/.pyinfra-orbstack"
    rooms = {
        "dead": f"{begin}-{host}-999999-1-{token}",
        "other's start": f"{begin}-{host}-1-1-{token}",
        "young": f"{begin}-elsewhere-1-1-{token}",
        "aged": f"{begin}-elsewhere-2-1-{token}",
        "root's": f"{begin}-{host}-999998-1-{token}",
        "other target": f"{begin}-{host}-999997-1-{token}",
    }
    for name, room in rooms.items():
        guest.sh('mkdir -m 700 "$1"; echo x >"$1/new"', room)
        if name != "root's":
            guest.sh('chown -R "$2" "$1"', room, user)
    guest.sh('touch -d "3 days ago" "$1"', rooms["aged"])
    guest.sh('cd "$1"; echo old >old; echo /etc/passwd >name; : >begun', rooms["other target"])
    slow = Slow(NEW)
    living = gevent.spawn(remote.put, slow, f"{folder}/slow")
    deadline = time.monotonic() + 30
    while len(place.rooms()) == len(rooms):
        assert time.monotonic() < deadline
        gevent.sleep(0.05)
    Remote(remote.name).connect().put(io.BytesIO(NEW), f"{folder}/file")
    stay = {rooms["young"], rooms["root's"], rooms["other target"]}
    assert stay < set(place.rooms())
    assert len(place.rooms()) == len(stay) + 1, "the living one's"
    slow.may_go_on = True
    living.get(timeout=60)
    assert place.content(f"{folder}/slow") == place.content(f"{folder}/file") == NEW
    assert set(place.rooms()) == stay


@pytest.mark.parametrize(
    ("target", "begun", "after"),
    [
        pytest.param(NEW[:5], True, OLD, id="begun"),
        pytest.param(b"", True, OLD, id="emptied"),
        pytest.param(OLD[:7], True, OLD, id="half put back"),
        pytest.param(NEW, True, NEW, id="done"),
        pytest.param(b"mended by hand", True, b"mended by hand", id="somebody else's"),
        pytest.param(b"", False, b"", id="not begun"),
    ],
)
def test_F13_only_the_writers_own_partial_write_is_undone(
    remote: Remote, place: Place, target: bytes, begun: bool, after: bytes
) -> None:
    """Later writes of other processes stay, and so does a file whose overwrite never began."""
    path = f"{place.folder}/file"
    place.guest.sh('cat >"$1"; chmod 666 "$1"', path, stdin=target)
    host = place.guest.sh("cat /proc/sys/kernel/hostname").decode().strip()
    room = f"{place.folder}/.pyinfra-orbstack-{host}-999999-1-{'0' * 32}"
    # Before the overwrite begins, the copy of the old content may be incomplete.
    for name, data in {"new": NEW, "old": OLD if begun else b"ol", "name": path.encode()}.items():
        place.guest.sh('mkdir -p "$1"; cat >"$1/$2"', room, name, stdin=data)
    place.guest.sh(
        'cd "$1"; [ -z "$2" ] || : >begun; chmod 700 .; chown -R "$3" .',
        room,
        "begun" if begun else "",
        remote.out("id -un"),
    )
    runner = remote.host.connector.runner
    assert transfer.Upload(runner, path, lambda command: command).recover() == ""
    assert place.content(path) == after
    assert place.rooms() == []


EVIL_MKDIR = r"""#!/bin/sh
/bin/mkdir "$@" || exit
for room; do :; done
mv "$room" "$room.ours" && /bin/mkdir "$room" && ln -s "$CANARY" "$room/new" || exit
chown -h alice "$room" "$room/new"; chmod 777 "$room"
"""


def test_F8_a_replaced_directory_is_not_written_to(one: Remote, place: Place) -> None:
    """The owner of the target's directory can rename its files at any moment."""
    canary = place.make("canary", 'chmod 600 "$1"')
    place.guest.sh('rm "$1/cat"; cat >"$1/mkdir"; chmod 755 "$1/mkdir"', "/var/tmp/slow",
                   stdin=EVIL_MKDIR.encode())  # fmt: skip
    given = {"_sudo": True, "_env": {"CANARY": canary, "PATH": f"/var/tmp/slow:{PATHS}"}}
    for data in (b"x", NEW):
        with pytest.raises(OSError, match=r"its temporary directory was removed$"):
            one.put(io.BytesIO(data), f"{place.folder}/file", **given)
        assert place.content(canary) == OLD
    assert place.content(f"{place.folder}/file") == b""


# Two at once -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["replaced", "new", "written over"])
@pytest.mark.parametrize("size", [3000, 150_000])
def test_F13_two_uploads_to_one_target(
    machine: str, connect: Callable[..., Remote], place: Place, kind: str, size: int, transport: str
) -> None:
    """Both succeed, and the file is one of the two."""
    path = f"{place.folder}/file"
    if kind != "new":
        place.make("file", 'chmod 666 "$1"' + ('; ln "$1" two' if kind == "written over" else ""))
    remotes = [connect(machine, orbstack_transport=way) for way in (transport, "session")]
    if kind != "new":
        # Otherwise it would belong to root.
        remotes.append(connect(machine, orbstack_user="root"))
    contents = [letter * (size + number) for number, letter in enumerate((b"a", b"b", b"c"))]
    for _ in range(4):
        if kind == "new":
            place.guest.sh('rm -f "$1"', path)
        gevent.joinall(
            [
                gevent.spawn(remote.put, io.BytesIO(content), path)
                for remote, content in zip(remotes, contents)
            ],
            raise_error=True,
        )
        assert place.content(path) in contents
        assert place.rooms() == []


def test_F13_two_pyinfra_processes_and_one_target(
    shared_machine: str, one: Remote, place: Place, tmp_path: Path
) -> None:
    path = place.make("file", 'chmod 666 "$1"')
    running = []
    for letter in "ab":
        (tmp_path / f"{letter}.py").write_text(
            "import io\nfrom pyinfra import host\n"
            f"data = {letter!r}.encode() * 150_000\n"
            f"for _ in range(20): host.put_file(io.BytesIO(data), {path!r})\n"
        )
        command = [PYINFRA, "-y", f"@orbstack/{shared_machine}", f"{letter}.py"]
        running.append(subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE))
    for process in running:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    assert place.content(path) in (b"a" * 150_000, b"b" * 150_000)
    assert place.rooms() == []


def test_F13_a_lock_that_another_process_holds(one: Remote, place: Place) -> None:
    path = place.make("file", 'chmod 666 "$1"; ln "$1" two')
    one.run(
        f"flock {path} sleep 60 </dev/null >/dev/null 2>&1 & echo $! >{place.folder}/pid; sleep 1"
    )
    with pytest.raises(TimeoutError, match=rf"^cannot write {path}: it did not finish within 2 s"):
        one.put(io.BytesIO(NEW), path, _timeout=2)
    assert place.content(path) == OLD
    one.run(f"kill $(cat {place.folder}/pid)")


# Time --------------------------------------------------------------------------------------------


def test_T1_the_timeout_covers_the_local_source(one: Remote, place: Place) -> None:
    """A pipe without a writer; other hosts continue meanwhile."""
    reader, writer = os.pipe()
    turns = []

    def other() -> None:
        while True:
            turns.append(1)
            gevent.sleep(0.05)

    ticking = gevent.spawn(other)
    late = pytest.raises(TimeoutError, match=r"cannot write .*not finish within 1 s")
    with open(reader, "rb") as source, open(writer, "wb") as pipe:
        with late:
            one.put(source, f"{place.folder}/new", _timeout=1)
        ticking.kill()
        pipe.close()
    assert len(turns) > 1
    assert place.content(f"{place.folder}/new") == b""


def test_T1_the_timeout_is_one_for_all_attempts(
    one: Remote, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer.Digest, "words", lambda self: ("0", "0", "0"))
    began = time.monotonic()
    slow = Slow(NEW)
    gevent.spawn_later(2, setattr, slow, "may_go_on", True)
    with pytest.raises(OSError, match=r"checksum changed|not finish within 3 s"):
        one.put(slow, f"{place.folder}/new", _timeout=3)
    assert time.monotonic() - began < 20
    assert place.rooms() == []


# Protected directories ---------------------------------------------------------------------------


@pytest.fixture
def protected(simulated: bool, root_only: None) -> Iterator[None]:
    """The kernel's protection of directories such as /tmp, as systemd enables it."""
    if not simulated:
        pytest.skip("OrbStack's kernel has it as it is")
    with protection(
        protected_regular=2, protected_fifos=2, protected_symlinks=1, protected_hardlinks=1
    ):
        yield


@pytest.mark.smoke
def test_F9_another_users_file_in_a_sticky_directory(
    remote: Remote, place: Place, protected: None
) -> None:
    """Root replaces it, others overwrite it if they may; links of other users are not followed."""
    place.guest.sh('chmod 1777 "$1"', place.folder)
    path = place.make("file", 'chown alice:users "$1"; chmod 666 "$1"')
    for given in ({"_sudo": True}, {}, {"_sudo": True, "_sudo_user": "bob"}):
        for data in (b"short", NEW):
            remote.put(io.BytesIO(data), path, **given)
            assert place.content(path) == data
        assert place.guest.sh('stat -c "%U %G %a" "$1"', path) == b"alice users 666\n"
    place.guest.sh('chmod 600 "$1"', path)
    with pytest.raises(OSError, match=rf"^cannot write {path}: Permission denied$"):
        remote.put(io.BytesIO(b"x"), path)
    target = f"{place.folder}/theirs"
    for name, leads_to in (("link", path), ("dangling", target)):
        link = f"{place.folder}/{name}"
        place.guest.sh('ln -s "$2" "$1"; chown -h alice "$1"', link, leads_to)
        with pytest.raises(OSError, match=rf"^cannot write {link}: Permission denied$"):
            remote.put(io.BytesIO(b"x"), link, _sudo=True)
    assert place.content(path) == NEW
    assert place.guest.sh('[ -e "$1" ] || echo none', target) == b"none\n"
    assert place.rooms() == []


@pytest.mark.parametrize("way", ["_temp_dir", "TEMP_DIR", "remote_temp_filename"])
def test_F9_a_temporary_directory_that_the_writer_cannot_enter(
    one: Remote, place: Place, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old content is kept where its writer can write."""
    private = f"{place.folder}/private"
    path = place.make("file", 'chown alice "$1"; mkdir -m 700 private; chmod 755 .')
    given: dict[str, Any] = {"_sudo": True, "_sudo_user": "alice"}
    if way == "_temp_dir":
        given["_temp_dir"] = private
    elif way == "TEMP_DIR":
        monkeypatch.setattr(one.state.config, "TEMP_DIR", private)
    else:
        given["remote_temp_filename"] = f"{private}/name"
    for data in (b"short", NEW):
        one.put(io.BytesIO(data), path, **given)
        assert place.content(path) == data
    with pytest.raises(OSError, match=r"^cannot write .*/new: Permission denied$"):
        one.put(io.BytesIO(NEW), f"{place.folder}/new", **given)
    assert place.rooms() == []


def test_F9_the_temporary_directory_is_used_where_the_targets_own_is_closed(
    one: Remote, place: Place
) -> None:
    path = place.make("file", 'chmod 666 "$1"; mkdir -m 777 temp; chmod 755 .')
    source = Slow(NEW)
    putting = gevent.spawn(one.put, source, path, remote_temp_filename=f"{place.folder}/temp/name")
    place_of_room = Place(place.guest, f"{place.folder}/temp")
    place_of_room.writer()
    source.may_go_on = True
    putting.get(timeout=60)
    assert place.content(path) == NEW
    assert place_of_room.rooms() == []


# File attributes ---------------------------------------------------------------------------------


def test_F9_attributes_and_flags_stay(one: Remote, place: Place) -> None:
    """Extended attributes are kept; flags that a new file would lack prevent a replacement."""
    path = place.make("file", 'chmod 640 "$1"')
    setting = (
        "import os, sys, struct; p = sys.argv[1]; os.setxattr(p, 'user.note', b'kept'); "
        "acl = struct.pack('<I', 2) + b''.join(struct.pack('<HHI', *entry) for entry in "
        "[(1, 6, 2**32 - 1), (2, 4, 12345), (4, 4, 2**32 - 1), (16, 4, 2**32 - 1), "
        "(32, 0, 2**32 - 1)]); os.setxattr(p, 'system.posix_acl_access', acl)"
    )
    reading = (
        "import os, sys; p = sys.argv[1]; "
        "print(os.getxattr(p, 'user.note'), os.getxattr(p, 'system.posix_acl_access').hex())"
    )
    python = 'command -v python3 >/dev/null || exit 0; python3 -c "$1" "$2" 2>&1 || true'
    if said := place.guest.sh(python, setting, path):
        pytest.skip(f"no attributes here: {said.decode().splitlines()[-1]}")
    before = place.guest.sh(python, reading, path)
    assert b"kept" in before, "there is no Python in the machine"
    for data in (b"short", NEW):
        one.put(io.BytesIO(data), path, _sudo=True)
        assert place.content(path) == data
        assert place.guest.sh(python, reading, path) == before
    number = place.guest.sh('chattr +A "$1" 2>/dev/null && stat -c %i "$1" || true', path)
    if number:
        one.put(io.BytesIO(OLD), path, _sudo=True)
        assert place.content(path) == OLD
        assert place.guest.sh('lsattr "$1" | cut -d" " -f1 | grep -c A', path) == b"1\n"


def test_F9_a_setgid_directory(remote: Remote, place: Place) -> None:
    place.guest.sh('chgrp users "$1"; chmod 2777 "$1"', place.folder)
    for size in (10, 100_000):
        remote.put(io.BytesIO(b"x" * size), f"{place.folder}/new{size}")
        found = place.guest.sh('stat -c "%G %a" "$1"', f"{place.folder}/new{size}")
        assert found == b"users 644\n"
    assert place.rooms() == []


def test_F9_unreadable_files(remote: Remote, place: Place) -> None:
    """Your own file is replaced unread; another user's could not be restored."""
    mine = place.make("mine", f'chown {remote.out("id -un")}: "$1"; chmod 200 "$1"')
    theirs = place.make("theirs", 'chmod 222 "$1"; chmod 755 .')
    place.guest.sh('chmod 777 "$1"', place.folder)
    remote.put(io.BytesIO(NEW), mine)
    assert place.content(mine) == NEW
    assert place.guest.sh('stat -c %a "$1"', mine) == b"200\n"
    with pytest.raises(OSError, match=rf"^cannot write {theirs}: .*cannot be replaced, nor read"):
        remote.put(io.BytesIO(NEW), theirs)
    assert place.content(theirs) == OLD
    assert place.rooms() == []


# Full file systems and mount points, which only containers have here ------------------------------


@pytest.fixture
def mounted(
    containers: Containers, images: dict[str, str], tmp_path: Path
) -> Iterator[tuple[Remote, Guest, Path]]:
    """A container with a small file system, a file of this host, and two read-only ones."""
    for name in ("bound", "fixed"):
        (tmp_path / name).write_bytes(OLD)
        (tmp_path / name).chmod(0o666)
    (tmp_path / "tree").mkdir(mode=0o777)
    (tmp_path / "tree" / "file").write_bytes(OLD)
    name = containers.run(
        images["full"],
        "--tmpfs",
        "/full:size=1m,mode=1777",
        *("-v", f"{tmp_path}/bound:/etc/bound"),
        *("-v", f"{tmp_path}/fixed:/etc/fixed:ro"),
        *("-v", f"{tmp_path}/tree:/tree:ro"),
    )
    remote = Remote(f"docker/{name}", orbstack_user="root").connect()
    yield remote, Guest(containers.client, name), tmp_path
    remote.close()
    containers.remove(name)


def test_F11_D20_full_and_read_only_file_systems(mounted: tuple[Remote, Guest, Path]) -> None:
    remote, guest, _ = mounted
    place = Place(guest, "/full")
    large, fits = b"x" * 2_000_000, b"y" * 300_000
    full = "No space left on device"
    remote.put(io.BytesIO(fits), "/full/file")
    for target in ("/full/file", "/full/new"):
        with pytest.raises(OSError, match=rf"^cannot write {target}: {full}$"):
            remote.put(io.BytesIO(large), target)
    guest.sh("cd /full; ln file second")
    with pytest.raises(OSError, match=rf"^cannot write /full/file: {full}$"):
        remote.put(io.BytesIO(large), "/full/file")
    # There is room for the new content, but none for a copy of the old content.
    with pytest.raises(OSError, match=rf"^cannot write /full/file: .*cannot be backed up: {full}$"):
        remote.put(io.BytesIO(b"z" * 600_000), "/full/file")
    assert place.content("/full/file") == fits
    # The old content is kept elsewhere, and the new content does not fit.
    guest.sh("cd /full; rm second; mkdir -m 755 closed; mv file closed; chmod 666 closed/file")
    user = Remote(remote.name, orbstack_user="alice").connect()
    with pytest.raises(OSError, match=rf"^cannot write .*: {full}; its old content was restored$"):
        user.put(io.BytesIO(large), "/full/closed/file")
    user.close()
    assert place.content("/full/closed/file") == fits
    for target in ("/etc/fixed", "/tree/file", "/tree/new"):
        with pytest.raises(OSError, match=rf"^cannot write {target}: Read-only file system$"):
            remote.put(io.BytesIO(NEW), target)
        assert place.content(target) == (b"" if "new" in target else OLD)
    assert place.rooms() == []
    assert guest.leftovers() == []


def test_F11_a_mounted_file_is_overwritten(mounted: tuple[Remote, Guest, Path]) -> None:
    remote, guest, folder = mounted
    for data in (b"short", NEW):
        remote.put(io.BytesIO(data), "/etc/bound")
        assert (folder / "bound").read_bytes() == data
    hosts = guest.sh("cat /etc/hosts")
    remote.put(io.BytesIO(hosts + b"127.0.0.1 added\n"), "/etc/hosts")
    assert guest.sh("cat /etc/hosts") == hosts + b"127.0.0.1 added\n"
    assert guest.leftovers() == []
