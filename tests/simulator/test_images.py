"""Shared images: pulled from an index, used, replaced and removed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orbctl_simulator import images, store
from tests.contract.program import Program
from tests.simulator.conftest import make_program, mounts_of, processes_of
from tests.simulator.mirror import IMAGES, INDEX, Handler, Mirror, Server, archive, serving
from tests.simulator.test_tools import without_sudo

ARCH = images.host_arch()
NAME = f"alpine:3.22:{ARCH}:default"
KEY = f"alpine_3.22_{ARCH}_default"


@pytest.fixture(scope="session")
def packed(rootfs: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return archive(rootfs, tmp_path_factory.mktemp("packed") / "root.tar.xz").read_bytes()


@pytest.fixture
def mirror(tmp_path: Path, packed: bytes) -> Mirror:
    mirror = Mirror(tmp_path / "mirror")
    mirror.offer(NAME, packed)
    return mirror


@pytest.fixture
def server(mirror: Mirror) -> Iterator[Server]:
    with serving(mirror) as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache, of: all"


@pytest.fixture
def users(tmp_path: Path, cache: Path, server: Server, orb: Program) -> Iterator[list[Program]]:
    """Two state directories that share a cache."""
    env = {"ORBCTL_SIMULATOR_CACHE": str(cache), "ORBCTL_SIMULATOR_IMAGES": server.url}
    homes = [tmp_path / "state-1", tmp_path / "state-2"]
    programs = [make_program(home, **env) for home in homes]
    yield programs
    for home, program in zip(homes, programs):
        program("delete", "--all", "--force")
        assert processes_of(home) == []
        assert mounts_of(home) == []


@pytest.fixture
def with_host(users: list[Program], cache: Path, orb: Program) -> None:
    """Layers with what this host's own root lacks, built by other tests."""
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir()
    for layer in Path(orb.env["ORBCTL_SIMULATOR_CACHE"]).glob("sudo-*"):
        subprocess.run(["cp", "-a", layer, cache], check=True)


def left(cache: Path) -> list[str]:
    """The content of the image cache, without locks."""
    place = cache / "images"
    names = os.listdir(place) if place.is_dir() else []
    return sorted(name for name in names if not name.endswith("lock"))


def release(program: Program, name: str) -> str:
    return program("run", "-m", name, "cat", "/etc/os-release").lines[0]


def test_create_pulls_once(users: list[Program], server: Server, mirror: Mirror) -> None:
    """The first `create` prints one line about the pull; all others use it without the server."""
    first = users[0]("create", "--strict-images", "-u", "me", "alpine:3.22", "one")
    assert first.code == 0, first
    assert [line.split(" (")[0] for line in first.err.decode().splitlines()] == [
        "pulling alpine:3.22"
    ]
    asked = len(server.asked)
    for program, name in ((users[0], "two"), (users[1], "one")):
        made = program("create", "--strict-images", "-u", "me", "alpine:3.22", name)
        assert (made.code, made.err) == (0, b"")
        assert release(program, name) == "ID=alpine"
        assert program("run", "-m", name, "id").text.startswith("uid=501(me)")
    assert len(server.asked) == asked
    (row,) = [line.split(maxsplit=5) for line in users[1]("image", "list").lines]
    assert row[:3] == ["alpine:3.22", ARCH, "default"]
    assert row[5] == f"pulled from {server.url}, 20260101_0524"
    record = users[0]("info", "one", "-f", "json").json["record"]["image"]
    assert (record["distro"], record["version"], record["variant"]) == (
        "alpine",
        "3.22",
        "default",
    )


def test_terminal_has_a_bar(users: list[Program], cache: Path) -> None:
    """The bar is removed when the pull is done."""
    shown = users[0].on_terminal("create", "-u", "me", "alpine:3.22", "one")
    assert shown.code == 0, shown
    assert b"pulling alpine:3.22" in shown.out
    assert b"downloading [" in shown.out
    assert b"unpacking [" in shown.out
    assert shown.out.endswith(b"\r\x1b[K")
    assert left(cache) == [KEY]


@pytest.mark.parametrize("kind", ["directory", "index", "slash"])
def test_mirror_by_its_names(
    users: list[Program], mirror: Mirror, server: Server, kind: str
) -> None:
    """A directory with the same files, the URL of the index, a URL with a slash."""
    told = {"directory": str(mirror.place), "index": f"{server.url}/{INDEX}"}
    env = {"ORBCTL_SIMULATOR_IMAGES": told.get(kind, f"{server.url}/")}
    assert users[0]("image", "pull", "alpine:3.22", env=env).code == 0
    shown = users[0]("image", "list", "--remote", env=env).lines
    assert [line.split()[:3] for line in shown] == [["alpine:3.22", ARCH, "default"]]
    assert shown[0].endswith(" 20260101_0524")


def test_names_of_the_index(users: list[Program], mirror: Mirror, packed: bytes) -> None:
    """The Linux Containers project's names of distributions, and releases also by number."""
    for name in ("almalinux:9", "archlinux:current", "ubuntu:22.04"):
        mirror.offer(f"{name}:{ARCH}:default", packed)
    mirror.offer(f"gentoo:current:{ARCH}:openrc", packed)
    mirror.offer(f"slackware:15:{ARCH}:default", packed)
    mirror.offer("debian:bookworm:s390x:default", packed)
    for name in ("alma:9", "arch", "ubuntu:jammy", "gentoo"):
        assert users[0]("image", "pull", name).code == 0
    shown = [line.split()[0] for line in users[0]("image", "list", "--remote").lines]
    assert sorted(shown) == [
        "alma:9",
        "alpine:3.22",
        "arch:current",
        "gentoo:current",
        "ubuntu:22.04",
    ]
    assert users[0]("image", "pull", "debian:bookworm").code == 1


def test_newer_version(
    users: list[Program], mirror: Mirror, cache: Path, rootfs: Path, tmp_path: Path
) -> None:
    """A machine keeps the version that it was created from; a new one gets the newest local one."""
    assert users[0]("create", "alpine:3.22", "old").code == 0
    assert users[0]("image", "pull", "alpine:3.22").text.endswith(f"from {users_url(users)}\n")
    changed = tmp_path / "changed"
    shutil.copytree(rootfs, changed, symlinks=True)
    (changed / "etc/os-release").write_text("ID=alpine-new\n")
    content = archive(changed, tmp_path / "new.tar.xz").read_bytes()
    mirror.offer(NAME, content, "20260202_05:24")
    mirror.offer(NAME, b"not the newest", "20251231_05:24")
    assert users[1]("create", "alpine:3.22", "same").code == 0
    assert release(users[1], "same") == "ID=alpine"
    assert " 20260202_0524: " in users[0]("image", "pull", "alpine:3.22").text
    assert users[1]("create", "alpine:3.22", "new").code == 0
    assert users[0]("restart", "old").code == 0
    assert release(users[0], "old") == "ID=alpine"
    assert users[0]("clone", "old", "copy").code == 0
    assert release(users[0], "copy") == "ID=alpine"
    assert release(users[1], "new") == "ID=alpine-new"
    versions = cache / "images" / KEY
    assert sorted(os.listdir(versions)) == ["20260101_0524", "20260202_0524", "current"]
    assert users[0]("delete", "-f", "old", "copy").code == 0
    users[0]("image", "list")
    assert (versions / "20260101_0524").exists()  # another state directory's machine uses it
    assert users[1]("delete", "-f", "same").code == 0
    users[0]("image", "list")
    assert sorted(os.listdir(versions)) == ["20260202_0524", "current"]


def users_url(users: list[Program]) -> str:
    return users[0].env["ORBCTL_SIMULATOR_IMAGES"]


def test_remove_while_in_use(users: list[Program], cache: Path, tmp_path: Path) -> None:
    """By machines of any state directory, also stopped ones and clones; the error lists them."""
    assert users[1]("create", "alpine:3.22", "one").code == 0
    assert users[1]("clone", "one", "two").code == 0
    assert users[1]("stop", "one").code == 0
    refused = users[0]("image", "remove", "alpine:3.22")
    assert refused.code == 1
    assert refused.err.decode().endswith(f" is in use by one, two of {tmp_path / 'state-2'}\n")
    assert users[1]("delete", "-f", "one").code == 0
    assert users[0]("image", "remove", "alpine:3.22").code == 1
    assert users[1]("rename", "two", "three").code == 0
    assert b"in use by three of" in users[0]("image", "remove", "alpine:3.22").err
    assert release(users[1], "three") == "ID=alpine"
    users[1]("delete", "-f", "three")
    assert users[0]("image", "remove", "alpine:3.22").code == 0
    assert left(cache) == []
    assert users[0]("image", "remove", "alpine:3.22").code == 1


def test_remove_after_a_state_directory_was_deleted(users: list[Program], tmp_path: Path) -> None:
    """Its machines cannot be started anymore."""
    assert users[1]("create", "alpine:3.22", "one").code == 0
    users[1]("stop", "one")
    shutil.rmtree(tmp_path / "state-2")
    assert users[0]("image", "remove", "alpine:3.22").code == 0


def test_export_and_import(users: list[Program], tmp_path: Path) -> None:
    """A machine's layer requires exactly the image that it was created from."""
    users[0]("create", "-u", "me", "alpine:3.22", "one")
    users[0]("run", "-m", "one", "sh", "-c", "echo data >~/file")
    file = str(tmp_path / "one.tar.zst")
    assert users[0]("export", "one", file).code == 0
    assert users[1]("import", file).code == 0
    assert (
        users[1]("run", "-m", "one", "sh", "-c", "cat ~/file; ls -a /bin | cat").lines[0] == "data"
    )
    refused = users[0]("image", "remove", "alpine:3.22")
    assert b"state-1; one of" in refused.err
    for program in users:
        program("delete", "-f", "one")
    assert users[0]("image", "remove", "alpine:3.22").code == 0
    answer = users[1]("import", file)
    assert answer.code == 1
    assert b"its image is not available: alpine_3.22" in answer.err


def test_own_image_comes_first(users: list[Program], rootfs: Path, tmp_path: Path) -> None:
    """An image that was added to the state directory takes precedence over a shared one."""
    assert users[0]("image", "pull", "alpine:3.22").code == 0
    mine = tmp_path / "mine"
    shutil.copytree(rootfs, mine, symlinks=True)
    (mine / "etc/os-release").write_text("ID=mine\n")
    assert users[0]("image", "add", "alpine:3.22", str(mine)).code == 0
    for program, expected in zip(users, ("ID=mine", "ID=alpine")):
        assert program("create", "alpine:3.22", "one").code == 0
        assert release(program, "one") == expected
    assert users[0]("delete", "-f", "one").code == 0
    assert users[0]("image", "remove", "alpine:3.22").code == 0
    assert users[0]("create", "alpine:3.22", "one").code == 0
    assert release(users[0], "one") == "ID=alpine"


def test_two_pulls_at_once(users: list[Program], server: Server, mirror: Mirror) -> None:
    """One works; the others wait for it, print so, and use its result."""
    path = mirror.products[NAME]["versions"]["20260101_05:24"]["items"]["root.tar.xz"]["path"]
    waiting = [users[n % 2].started("create", "alpine:3.22", f"m{n}") for n in range(4)]
    answers = [process.communicate(timeout=100) for process in waiting]
    assert [process.returncode for process in waiting] == [0] * 4, answers
    assert server.asked_for(path) == [""]
    lines = sorted(line for _, err in answers for line in err.decode().splitlines())
    assert sum(line.startswith("pulling alpine:3.22") for line in lines) == 1
    assert {release(users[n % 2], f"m{n}") for n in range(4)} == {"ID=alpine"}


Spoil = Callable[[Mirror, bytes], Any]
WRONG: dict[str, tuple[Spoil, str]] = {
    "sha256": (lambda m, b: m.offer(NAME, b, sha256="ab" * 32), "wrong checksum"),
    "no sha256": (lambda m, b: m.offer(NAME, b, sha256="ab"), "has no sha256"),
    "sha256 of no text": (lambda m, b: m.offer(NAME, b, sha256=None), "lacks a path"),
    "longer": (lambda m, b: m.offer(NAME, b, size=len(b) - 1), "wrong checksum"),
    "shorter": (lambda m, b: m.offer(NAME, b, size=len(b) + 1), "shorter than its index says"),
    "negative": (lambda m, b: m.offer(NAME, b, size=-5), "bytes long"),
    "vast": (lambda m, b: m.offer(NAME, b, size=1 << 60), "bytes long"),
    "size as text": (lambda m, b: m.offer(NAME, b, size="1"), "lacks a path"),
    "up": (lambda m, b: m.offer(NAME, b, path="../../secret"), "outside its source"),
    "up in the middle": (
        lambda m, b: m.offer(NAME, b, path="images/../../secret"),
        "outside its source",
    ),
    "absolute": (lambda m, b: m.offer(NAME, b, path="/etc/passwd"), "outside its source"),
    "another server": (
        lambda m, b: m.offer(NAME, b, path="http://127.0.0.1:1/x"),
        "outside its source",
    ),
    "no path": (lambda m, b: m.offer(NAME, b, path=""), "outside its source"),
    "line break": (lambda m, b: m.offer(NAME, b, path="a\r\nHost: b"), "outside its source"),
    "missing": (lambda m, b: m.offer(NAME, b, path="images/none"), "404"),
    "not listed": (lambda m, b: m.products.clear() or m.save(), "no alpine:3.22"),
    "page": (lambda m, b: m.write(INDEX, b"<html>login</html>"), "decode index"),
    "empty": (lambda m, b: m.write(INDEX, b""), "decode index"),
    "list": (lambda m, b: m.write(INDEX, b"[]"), "decode index"),
    "number": (lambda m, b: m.write(IMAGES, b"9" * 9999), "decode index"),
    "bytes": (lambda m, b: m.write(IMAGES, b'{"products": "\xff"}'), "decode index"),
    "odd": (lambda m, b: m.write(IMAGES, b'{"products": {"%s": 1}}' % NAME.encode()), "no alpine"),
    "deep": (lambda m, b: m.write(IMAGES, b"[" * 200_000), "decode index"),
    "index too large": (lambda m, b: m.write(INDEX, b" " * (1 << 21)), "larger than 1 MB"),
    "table too large": (lambda m, b: m.write(IMAGES, b" " * (17 << 20)), "larger than 16 MB"),
    "path of the table": (
        lambda m, b: m.write(
            INDEX,
            b'{"index": {"images": {"datatype": "image-downloads", "path": "../../x"}}}',
        ),
        "outside its source",
    ),
    "no archive": (lambda m, b: m.offer(NAME, b"garbage" * 999), "not an archive"),
    "no root": (lambda m, b: m.offer(NAME, b"\0" * 10240), "not a root file system"),
    "cut archive": (lambda m, b: m.offer(NAME, b[: len(b) // 2]), ""),
}


READ_AS_FILES = ("sha256", "shorter", "up", "absolute", "no path", "missing", "table too large")


@pytest.mark.parametrize(
    ("kind", "is_web"),
    [*((kind, True) for kind in WRONG), *((kind, False) for kind in READ_AS_FILES)],
)
def test_bad_mirror(
    users: list[Program], mirror: Mirror, cache: Path, packed: bytes, kind: str, is_web: bool
) -> None:
    """One line with the reason, nothing in the store; machines use the host's root meanwhile."""
    (mirror.place.parent / "secret").write_bytes(packed)
    spoil, expected = WRONG[kind]
    spoil(mirror, packed)
    env = {} if is_web else {"ORBCTL_SIMULATOR_IMAGES": str(mirror.place)}
    answer = users[0]("image", "pull", "alpine:3.22", env=env)
    assert answer.code == 1
    last = answer.err.decode().splitlines()[-1]
    wanted = "no such file" if kind == "missing" and not is_web else expected
    assert wanted in last, answer
    assert b"Traceback" not in answer.err
    assert [name for name in left(cache) if not name.endswith(".part")] == []
    assert users[0]("image", "list").text == ""


@pytest.mark.parametrize("serial", ["current", "../../x", "..", "/", "a:b c", "\n", "-", "x" * 999])
def test_name_of_a_version(users: list[Program], mirror: Mirror, cache: Path, serial: str) -> None:
    """It becomes the name of a directory, and never another path."""
    versions = mirror.products[NAME]["versions"]
    versions[serial] = versions.pop("20260101_05:24")
    mirror.save()
    assert users[0]("image", "pull", "alpine:3.22").code == 0
    names = os.listdir(cache / "images" / KEY)
    assert len(names) == 2
    assert "current" in names
    assert users[0]("create", "--strict-images", "alpine:3.22", "one").code == 0
    assert users[0]("restart", "one").code == 0
    assert users[0]("delete", "-f", "one").code == 0
    assert users[0]("image", "remove", "alpine:3.22").code == 0
    assert left(cache) == []


def redirecting(target: str) -> Callable[[Handler], bool]:
    def behave(handler: Handler) -> bool:
        if handler.path == f"/{INDEX}":
            handler.answer(b"", 302, Location=target)
        return handler.path == f"/{INDEX}"

    return behave


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x", "gopher:x"]
)
def test_redirected_elsewhere(users: list[Program], server: Server, target: str) -> None:
    server.behave = redirecting(target)
    answer = users[0]("image", "pull", "alpine:3.22")
    assert answer.code == 1
    assert b"302" in answer.err or b"not followed" in answer.err
    assert len(answer.err.splitlines()) == 1


def test_redirected(users: list[Program], server: Server, mirror: Mirror) -> None:
    """To another server: followed. In a circle: not forever."""
    with serving(mirror) as other:
        server.behave = lambda handler: (
            handler.answer(b"", 301, Location=other.url + handler.path) or True
        )
        assert users[0]("image", "pull", "alpine:3.22").code == 0
        assert other.asked_for(INDEX) == [""]
    server.behave = redirecting(f"/{INDEX}")
    answer = users[0]("image", "list", "--remote")
    assert answer.code == 1
    assert len(answer.err.splitlines()) == 1
    assert len(server.asked_for(INDEX)) < 10


def cutting(path: str, times: int, after: int, ranges: bool = True) -> Callable[[Handler], bool]:
    """The connection is lost after some bytes, this many times."""
    rest = [times]

    def behave(handler: Handler) -> bool:
        if handler.path != f"/{path}":
            return False
        rest[0] -= 1
        handler.serve(cut=after if rest[0] >= 0 else -1, ranges=ranges)
        return True

    return behave


def path_of(mirror: Mirror) -> str:
    items = mirror.products[NAME]["versions"]["20260101_05:24"]["items"]
    path: str = items["root.tar.xz"]["path"]
    return path


def test_broken_connections(users: list[Program], server: Server, mirror: Mirror) -> None:
    """Each try resumes where the last one stopped, as long as each makes progress."""
    path = path_of(mirror)
    server.behave = cutting(path, 6, 1000)
    assert users[0]("image", "pull", "alpine:3.22").code == 0
    assert server.asked_for(path) == ["", *(f"bytes={n}000-" for n in range(1, 7))]


def test_server_without_ranges(users: list[Program], server: Server, mirror: Mirror) -> None:
    """It starts again at the beginning, and so does the partial file."""
    server.behave = cutting(path_of(mirror), 2, 1000, ranges=False)
    assert users[0]("image", "pull", "alpine:3.22").code == 0
    assert users[0]("create", "--strict-images", "alpine:3.22", "one").code == 0


def giving_up_after(path: str, count: int, server: Server) -> Callable[[Handler], bool]:
    """The server sends some bytes, and then none."""
    return lambda handler: cutting(path, 1, 0 if server.asked_for(path)[1:] else count)(handler)


def test_silent_connection(
    users: list[Program], server: Server, mirror: Mirror, cache: Path
) -> None:
    """It is given up; the next pull resumes the download."""
    path = path_of(mirror)
    server.behave = giving_up_after(path, 1500, server)
    answer = users[0]("image", "pull", "alpine:3.22")
    assert answer.code == 1
    assert len(server.asked_for(path)) == 4
    assert [name.endswith(".part") for name in left(cache)] == [True]
    server.behave = lambda handler: False
    server.asked.clear()
    assert users[0]("image", "pull", "alpine:3.22").code == 0
    assert server.asked_for(path) == ["bytes=1500-"]
    assert left(cache) == [KEY]


def test_damaged_partial_download(
    users: list[Program], server: Server, mirror: Mirror, cache: Path
) -> None:
    """A damaged partial download is never used: the file is downloaded again."""
    path = path_of(mirror)
    server.behave = giving_up_after(path, 1500, server)
    assert users[0]("image", "pull", "alpine:3.22").code == 1
    server.behave = lambda handler: False
    (part,) = (cache / "images").glob("*.part")
    part.write_bytes(b"x" * 1500)
    server.asked.clear()
    assert users[0]("image", "pull", "alpine:3.22").code == 0
    assert server.asked_for(path) == ["bytes=1500-", ""]


def test_killed_while_it_downloads(
    users: list[Program], server: Server, mirror: Mirror, cache: Path
) -> None:
    """Nothing incomplete is left that could be used, and the next pull resumes."""
    path = path_of(mirror)

    def behave(handler: Handler) -> bool:
        if handler.path == f"/{path}":
            handler.send_response(200)
            handler.send_header("Content-Length", str((mirror.place / path).stat().st_size))
            handler.end_headers()
            handler.wfile.write((mirror.place / path).read_bytes()[: 1 << 19])
            handler.wfile.flush()
            time.sleep(60)
        return handler.path == f"/{path}"

    server.behave = behave
    process = users[0].started("image", "pull", "alpine:3.22")
    while not any(part.stat().st_size for part in (cache / "images").glob("*.part")):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    server.behave = lambda handler: False
    assert users[0]("image", "list").text == ""
    server.asked.clear()
    assert users[1]("create", "--strict-images", "alpine:3.22", "one").code == 0
    assert server.asked_for(path)[0].startswith("bytes=")


@pytest.fixture(scope="session")
def large(rootfs: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An archive that takes a moment to unpack: 12 MB that do not compress, 2,000 files."""
    level = {"XZ_OPT": "-0"}
    place = tmp_path_factory.mktemp("large")
    root = place / "root"
    shutil.copytree(rootfs, root, symlinks=True)
    for number in range(2000):
        (root / "etc" / str(number)).write_bytes(os.urandom(6000))
    return archive(root, place / "root.tar.xz", **level).read_bytes()


@pytest.mark.long
def test_killed_at_any_point(
    users: list[Program], mirror: Mirror, cache: Path, large: bytes
) -> None:
    """An image is complete, or does not exist; nothing else is left, and no process."""
    mirror.offer(NAME, large)
    for step in range(12):
        process = users[0].started("image", "pull", "alpine:3.22")
        time.sleep(0.12 + 0.06 * step)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        shown = users[1]("image", "list")
        assert [name for name in left(cache) if not name.endswith(".part")] in ([], [KEY])
        if shown.text:
            count = len(os.listdir(store_root(cache) / "etc"))
            assert count == 2003
            assert users[1]("image", "remove", "alpine:3.22").code == 0
    assert users[0]("create", "--strict-images", "alpine:3.22", "one").code == 0
    assert users[0]("delete", "-f", "one").code == 0
    assert all_commands(str(cache)) == []


def store_root(cache: Path) -> Path:
    return cache / "images" / KEY / "current" / store.FILES


def all_commands(mark: str) -> list[str]:
    """The processes that use a path."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes().decode(errors="replace")
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            found.append(command if mark in command + environment else "")
    return [line for line in found if line]


@pytest.mark.parametrize("room", ["1m", "6m", "14m", "21m"])
def test_full_disk(
    users: list[Program], mirror: Mirror, large: bytes, cache: Path, room: str
) -> None:
    """During the download or unpacking: one line, and the space is free again afterwards."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a disk")
    mirror.offer(NAME, large)
    cache.mkdir()
    script = 'mount -t tmpfs -o size="$1" none "$2"; shift 2; "$@"; echo "$?"; ls -A "$0/images"; '
    script += 'find "$0" -type f -size +100k'
    inside = ["unshare", "--mount", "sh", "-c", script, str(cache), room, str(cache)]
    program = Program([*inside, *users[0].command], users[0].env)
    answer = program("image", "pull", "alpine:3.22")
    code, *names = answer.lines
    assert code == "1"
    assert "no space left" in answer.err.decode().lower() or "does not fit" in answer.err.decode()
    assert b"Traceback" not in answer.err
    assert [name for name in names if not name.endswith("lock")] == []


def test_host_by_name(users: list[Program], with_host: None) -> None:
    """The host's own root, on request: no requests, no output."""
    made = users[0]("create", "host")
    assert (made.code, made.err) == (0, b"")
    assert users[0]("list", "-q").lines == ["host"]
    assert users[0]("run", "-m", "host", "cat", "/etc/os-release").text == (
        Path("/etc/os-release").read_text()
    )
    record = users[0]("info", "host", "-f", "json").json["record"]["image"]
    assert record["distro"] == images.release()[0]
    assert users[0]("create", "host:12", "x").code == 1
    assert users[0]("create", "-a", "arm64" if ARCH == "amd64" else "amd64", "host", "x").code == 1


def closed_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def test_unreachable_server(
    users: list[Program], mirror: Mirror, cache: Path, with_host: None
) -> None:
    """Reported in one line, and remembered: later calls do not try again until a pull succeeds."""
    port = closed_port()
    env = {"ORBCTL_SIMULATOR_IMAGES": f"http://127.0.0.1:{port}"}
    first = users[0]("create", "alpine:3.22", "one", env=env)
    assert first.code == 0
    text = first.err.decode()
    assert len(text.splitlines()) == 1
    assert "not pulled: 127.0.0.1: connection refused" in text
    assert "using " in text
    assert release(users[0], "one") == Path("/etc/os-release").read_text().splitlines()[0]
    refused = users[0]("create", "--strict-images", "alpine:3.22", "two", env=env)
    assert refused.code == 1
    assert b"image not found: alpine:3.22" in refused.err
    with serving(mirror, port) as server:
        assert users[1]("create", "alpine:3.22", "two", env=env).err.decode() == text
        assert server.asked == []
        assert users[1]("image", "pull", "alpine:3.22", env=env).code == 0
    assert users[0]("create", "--strict-images", "alpine:3.22", "three", env=env).code == 0
    assert not list((cache / "failed").iterdir())


def test_not_offered_is_remembered(users: list[Program], server: Server, with_host: None) -> None:
    """Only for that image."""
    texts = [users[0]("create", "void", f"m{n}").err.decode() for n in (1, 2)]
    assert "no void:current" in texts[0]
    assert texts[0] == texts[1]
    assert len(server.asked_for(INDEX)) == 1
    assert users[0]("create", "--strict-images", "alpine:3.22", "one").code == 0


@pytest.mark.long
def test_silent_network(users: list[Program], with_host: None) -> None:
    """A server that accepts no connection costs seconds, once."""
    with socket.socket() as silent, socket.socket() as filler, socket.socket() as more:
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        for one in (filler, more):
            one.setblocking(False)
            one.connect_ex(silent.getsockname())
        env = {"ORBCTL_SIMULATOR_IMAGES": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        for name in ("one", "two"):
            made = users[0]("create", "alpine:3.22", name, env=env, timeout=30)
            assert made.code == 0
            assert b"no answer in 5 seconds" in made.err


@pytest.mark.parametrize("told", ["ftp://127.0.0.1/", "/no/such/place", "nonsense", "http://"])
def test_bad_source(users: list[Program], told: str) -> None:
    answer = users[0]("image", "pull", "alpine:3.22", env={"ORBCTL_SIMULATOR_IMAGES": told})
    assert answer.code == 1
    assert len(answer.err.splitlines()) == 1
    assert b"Traceback" not in answer.err


def test_password_of_a_mirror_is_not_shown(users: list[Program]) -> None:
    env = {"ORBCTL_SIMULATOR_IMAGES": f"http://me:secret@127.0.0.1:{closed_port()}"}
    create = ["create", "--strict-images", "alpine:3.22", "one"]
    for words in (["image", "pull", "alpine:3.22"], create):
        answer = users[0](*words, env=env)
        assert answer.code == 1
        assert b"127.0.0.1" in answer.err
        assert b"secret" not in answer.err + answer.out


def test_through_a_proxy(users: list[Program], server: Server) -> None:
    """The environment's proxy: it is asked for a server whose name does not resolve."""
    place = server.url

    def behave(handler: Handler) -> bool:
        handler.path = handler.path.replace("http://images.invalid", "")
        return False

    server.behave = behave
    env = {"ORBCTL_SIMULATOR_IMAGES": "http://images.invalid", "http_proxy": place}
    assert users[0]("image", "pull", "alpine:3.22", env=env).code == 0
    assert server.asked[0][0] == f"http://images.invalid/{INDEX}"


def with_cloud_init(rootfs: Path, place: Path) -> Path:
    shutil.copytree(rootfs, place, symlinks=True)
    (place / "usr/bin/cloud-init").write_text("there")
    return place


@pytest.mark.long
def test_cloud_variant(users: list[Program], mirror: Mirror, rootfs: Path, tmp_path: Path) -> None:
    """It is an image in addition to the default one, and pulled under its own name."""
    root = with_cloud_init(rootfs, tmp_path / "cloud")
    content = archive(root, tmp_path / "cloud.tar.xz").read_bytes()
    mirror.offer(NAME.replace(":default", ":cloud"), content)
    for variant, expected in (("cloud", "there"), ("default", "")):
        made = users[0]("create", "--variant", variant, "alpine:3.22", f"a-{variant}")
        assert made.code == 0, made
        script = "if [ -e /usr/bin/cloud-init ]; then cat /usr/bin/cloud-init; fi"
        assert users[0]("run", "-m", f"a-{variant}", "sh", "-c", script).text == expected
    record = users[0]("info", "a-cloud", "-f", "json").json["record"]["image"]
    assert record["variant"] == "cloud"
    assert len(users[0]("image", "list").lines) == 2
    assert b"unknown variant" in users[0]("create", "--variant", "x", "alpine:3.22", "x").err


@pytest.mark.long
def test_cloud_init_in_a_layer(
    users: list[Program], mirror: Mirror, rootfs: Path, tmp_path: Path
) -> None:
    """If the index has no such variant, it is installed once, over the default image."""
    refused = users[0]("create", "--variant", "cloud", "alpine:3.22", "no")
    assert refused.code == 1
    assert b"has no cloud-init, and no supported package manager" in refused.err
    script = 'for last in "$@"; do :; done; id >/usr/bin/$last; ls / >/usr/bin/sudo'
    root = without_sudo(rootfs, tmp_path / "apt", script)
    (root / "etc/os-release").write_text("ID=apt\n")
    mirror.offer(NAME, archive(root, tmp_path / "apt.tar.xz").read_bytes(), "20260303_05:24")
    assert users[0]("image", "pull", "alpine:3.22").code == 0
    said = []
    for program in users:
        made = program("create", "--variant", "cloud", "alpine:3.22", "one")
        assert made.code == 0, made
        said.append(made.err.decode().splitlines()[-1:])
        assert program("run", "-m", "one", "cat", "/usr/bin/cloud-init").text.startswith("uid=0(")
        assert release(program, "one") == "ID=apt"
        assert program("restart", "one").code == 0
        assert program("run", "-m", "one", "cat", "/usr/bin/cloud-init").text.startswith("uid=0(")
        assert program("clone", "one", "two").code == 0
        assert program("run", "-m", "two", "cat", "/usr/bin/cloud-init").text.startswith("uid=0(")
    assert "has no sudo and cloud-init: installing it once, with apt-get" in said[0][0]
    assert "installing" not in "".join(said[1])


def test_a_name_in_use_is_rejected_before_any_download(
    users: list[Program], server: Server, with_host: None
) -> None:
    users[0]("create", "host", "one")
    answer = users[0]("create", "alpine:3.22", "one")
    assert b"machine already exists" in answer.err
    assert server.asked == []


def test_saved_and_added(users: list[Program], tmp_path: Path) -> None:
    """An archive that the caller owns, from which another state directory gets the same image."""
    file = tmp_path / "image.tar.zst"
    assert users[0]("image", "save", "alpine:3.22", str(file)).code == 1
    assert users[0]("image", "pull", "alpine:3.22").code == 0
    assert users[0]("image", "save", "alpine:3.22", str(file)).code == 0
    assert file.stat().st_uid == os.getuid()
    assert users[0]("image", "remove", "alpine:3.22").code == 0
    assert users[1]("image", "add", "alpine:3.22", str(file)).code == 0
    assert users[1]("create", "--strict-images", "alpine:3.22", "one").code == 0
    assert release(users[1], "one") == "ID=alpine"


def test_save_to_an_invalid_path(users: list[Program], tmp_path: Path) -> None:
    users[0]("image", "pull", "alpine:3.22")
    for name in ("none/image.tar", "."):
        answer = users[0]("image", "save", "alpine:3.22", str(tmp_path / name))
        assert answer.code == 1
        assert len(answer.err.splitlines()) == 1


def test_doctor_lists_images(users: list[Program], server: Server, with_host: None) -> None:
    users[0]("image", "pull", "alpine:3.22")
    shown = users[0]("doctor").text
    assert f"ok      image: {KEY}@20260101_0524, pulled from {server.url}" in shown
    assert f"ok      images to pull: from {server.url}" in shown
    assert "images to build: " in shown
    env = {"ORBCTL_SIMULATOR_IMAGES": f"http://127.0.0.1:{closed_port()}"}
    assert "note    images to pull: none: 127.0.0.1: connection refused" in (
        users[0]("doctor", env=env).text
    )


@pytest.mark.parametrize("kind", ["file", "unwritable"])
def test_cache_that_cannot_be_used(users: list[Program], tmp_path: Path, kind: str) -> None:
    """Reported in one line; a machine of a complete host's root needs no cache."""
    (tmp_path / "file").write_text("")
    place = {"file": tmp_path / "file", "unwritable": Path("/proc/none")}[kind]
    env = {"ORBCTL_SIMULATOR_CACHE": str(place)}
    for words in (
        ["create", "--strict-images", "alpine:3.22", "one"],
        ["image", "pull", "alpine:3.22"],
        ["image", "list", "--remote"],
    ):
        answer = users[0](*words, env=env)
        assert b"Traceback" not in answer.err
        listed = kind == "unwritable" and "list" in words
        assert answer.code == (not listed)
        assert len(answer.err.splitlines()) == (not listed)


def test_host_root_replaces_images(users: list[Program], with_host: None) -> None:
    """Requested by the environment, even if images exist: only the state directory's own count."""
    assert users[0]("image", "pull", "alpine:3.22").code == 0
    host = {"ORBCTL_SIMULATOR_IMAGES": "host"}
    distro, version, _ = images.release()
    made = users[0]("create", f"{distro}:{version}", "one", env=host)
    assert (made.code, made.err) == (0, b"")
    made = users[0]("create", "alpine:3.22", "two", env=host)
    assert b"ORBCTL_SIMULATOR_IMAGES is host" in made.err
    text = Path("/etc/os-release").read_text()
    for name in ("one", "two"):
        assert users[0]("run", "-m", name, "cat", "/etc/os-release").text == text
    assert users[0]("image", "list", env=host).text == ""
