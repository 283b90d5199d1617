"""Section F: `files.rsync`, with the rsync of this host and that of the target."""

from __future__ import annotations

import io
import os
import shlex
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest

from .conftest import PASSWORD, PLACES, Guest, Remote
from .test_files_wrappers import WRAPPERS
from .test_privilege_environment import supports

PYINFRA = os.path.join(os.path.dirname(sys.executable), "pyinfra")
FOLDER = "/var/tmp/rsync $HOME"
#: Each is the name of something to an option parser, to a shell, or to rsync.
NAMES = (
    "a b",
    "$HOME",
    "-rf",
    "--delete",
    "host:path",
    "rsync://host/x",
    "*",
    'it\'s "q"; id',
    "~",
)
STRANGE = ("ü\n$(id)", os.fsdecode(b"latin-\xe4"))

pytestmark = pytest.mark.parametrize("transport", PLACES)

DEPLOY = """
from pyinfra.operations import files
files.rsync(name="sync", src="src/", dest="{dest}", flags={flags})
"""

# A host without rsync borrows that of the machine, with its libraries.
PACK = r"""
set -e
d=$(mktemp -d)
for file in $(command -v rsync) $(ldd "$(command -v rsync)" | grep -o '/[^ ]*'); do
cp -L "$file" "$d"; done
tar -C "$d" -c .
rm -r "$d"
"""


@pytest.fixture(scope="module")
def borrowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rsync")


@pytest.fixture(autouse=True)
def local_rsync(
    transport: str, guest: Guest, borrowed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This host has rsync."""
    monkeypatch.setenv("PATH", str(borrowed), prepend=os.pathsep)
    command = borrowed / "rsync"
    if not command.exists() and subprocess.run(["sh", "-c", "command -v rsync"]).returncode:
        libraries = borrowed / "libraries"
        with tarfile.open(fileobj=io.BytesIO(guest.sh(PACK))) as packed:
            packed.extractall(libraries)  # noqa: S202
        (loader,) = libraries.glob("ld-*")
        words = f"'{loader}' --library-path '{libraries}' '{libraries}/rsync'"
        command.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        command.chmod(0o755)


@pytest.fixture
def there(guest: Guest) -> Iterator[str]:
    """An empty directory in the target, in which everybody may write."""
    guest.sh('rm -rf "$1"; mkdir -m 1777 "$1"', FOLDER)
    yield FOLDER
    guest.sh('rm -rf "$1"', FOLDER)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory on this host, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listed(guest: Guest, folder: str) -> set[str]:
    """All files and links below a directory in the target."""
    found = guest.sh('cd "$1" && find . ! -type d -print0', folder)
    return {os.fsdecode(name[2:]) for name in found.split(b"\0") if name}


def sync(remote: Remote, src: str, dest: str, *flags: str, **arguments: Any) -> None:
    assert remote.host.rsync(src, dest, flags or ["-ax", "--delete"], **arguments)


@pytest.mark.smoke
def test_F26_names_are_data(remote: Remote, guest: Guest, here: Path, there: str) -> None:
    names = (*NAMES, *STRANGE)
    # pyinfra 3.2 does not quote the value of _chdir.
    plain = "/var/tmp/rsync-names"
    guest.sh('rm -f "$2" && ln -s "$1" "$2"', there, plain)
    for name in names:
        # A name with a slash is a path.
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(os.fsencode(name))
        remote.out(shlex.join(["mkdir", "-p", f"./{os.path.dirname(name)}"]), _chdir=plain)
        sync(remote, name, name, "-a", _chdir=plain)
    guest.sh('rm "$1"', plain)
    assert listed(guest, there) == {os.path.normpath(name) for name in names}
    found = guest.sh('cd "$1" && cat ./"$2"', there, STRANGE[0])
    assert os.fsdecode(found) == STRANGE[0]


@pytest.mark.smoke
def test_F27_delete_exclude_and_links(remote: Remote, guest: Guest, here: Path, there: str) -> None:
    data = os.urandom(3_000_000)
    for name in ("kept", "no pe", "old/$x"):
        (here / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "src" / name).write_bytes(data)
    (here / "src" / "link").symlink_to("kept")
    dest = f"{there}/dest"
    sync(remote, "src/", dest)
    assert listed(guest, dest) == {"kept", "no pe", "old/$x", "link"}
    assert guest.sh('cat "$1"', f"{dest}/link") == data
    assert guest.sh('readlink "$1"', f"{dest}/link") == b"kept\n"

    words = [PYINFRA, "-y", "-vvv", f"@orbstack/{remote.name}", "deploy.py"]
    (here / "deploy.py").write_text(DEPLOY.format(dest=dest, flags=["-ai", "--delete"]))
    (here / "src" / "new").touch()
    done = subprocess.run(words, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    shown = [line.partition("] ")[2] for line in done.stderr.splitlines()]
    at = shown.index(f">>> rsync -ai --delete ./src/ ':{dest}'")
    # Besides the directory, if it is more than a second younger.
    assert "new" in [line.split()[-1] for line in shown[at + 1 : at + 3]], done.stderr

    # One text with several words, and quotes, as a shell would split them.
    (here / "src" / "old" / "$x").unlink()
    sync(remote, "src/", dest, "-rtL --delete --delete-excluded", "--exclude 'no *'")
    assert listed(guest, dest) == {"kept", "link", "new"}
    assert guest.sh('stat -c %F "$1"', f"{dest}/link") == b"regular file\n"


@pytest.mark.smoke
@pytest.mark.parametrize(
    "wrapper", [one for one in WRAPPERS if not one.startswith(("su_password", "dzdo"))]
)
def test_F28_as_other_users(
    machine: str, connect: Callable[..., Remote], guest: Guest, here: Path, there: str, wrapper: str
) -> None:
    login, arguments, user_argument = WRAPPERS[wrapper]
    for argument in (*arguments, *filter(None, [user_argument])):
        if not supports(argument):
            pytest.skip(f"this pyinfra has no {argument}")
    if user_argument:
        arguments = {**arguments, user_argument: "alice"}
    remote = connect(machine, **({"orbstack_user": login} if login else {}))
    (here / "it's").write_text("data")
    sync(remote, "it's", f"{there}/it's $x", "-t", **arguments)
    owner = guest.sh('stat -c %U "$1"', f"{there}/it's $x").decode().strip()
    assert owner == remote.out("id -un", **arguments)


@pytest.mark.smoke
def test_F29_a_bad_argument_is_one_line(remote: Remote, here: Path, there: str) -> None:
    (here / "src").mkdir()

    def refuses(message: str, src: str, dest: str, flags: Any, **arguments: Any) -> None:
        with pytest.raises(OSError, match=f"^{message}") as refused:
            remote.host.rsync(src, dest, flags, **arguments)
        assert "\n" not in str(refused.value)

    refuses("src must not be empty", "", there, ["-a"])
    refuses("dest must not be empty", "src", "", ["-a"])
    refuses("dest must not contain a NUL", "src", "a\0b", ["-a"])
    refuses(r"flags must be a list, such as \[", "src", there, "-ax")
    refuses("cannot split flags into words", "src", there, ["--exclude 'a"])
    refuses("files.rsync cannot use _su_password", "src", there, [], **WRAPPERS["su_password"][1])
    refuses("rsync failed with exit code .*remove -s", "src", there, ["-as"])
    refuses("rsync failed with exit code 23: .*missing", "missing", there, ["-a"])
    refuses("sudo: unknown user", "src", there, ["-a"], _sudo=True, _sudo_user="no-such")
    assert remote.host.rsync("missing", there, ["-a"], _success_exit_codes=[0, 23])


@pytest.mark.smoke
def test_F29_missing_on_either_side(
    remote: Remote, guest: Guest, here: Path, there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line about that host; the others go on, and a dry run says it too."""
    (here / "src").mkdir()
    (here / "src" / "file").touch()
    # pyinfra's own `@local` gives the name to a shell.
    (here / "deploy.py").write_text(DEPLOY.format(dest=here / "dest", flags=["-a"]))
    hosts = [(f"@orbstack/{remote.name}", {"_env": {"PATH": "/nowhere"}}), "@local"]
    (here / "inventory.py").write_text(f"hosts = {hosts}\n")

    def pyinfra(option: str) -> str:
        words = [PYINFRA, option, "inventory.py", "deploy.py"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=100)
        assert "Traceback" not in done.stderr, done.stderr
        assert done.returncode == (option != "--dry"), done.stderr
        return done.stderr

    line = (
        f"{remote.host.connector.runner.target} has no rsync: install it there first, for example"
    )
    for option in ("--dry", "-y"):
        said = pyinfra(option)
        assert said.replace('\\"', '"').replace("\\'", "'").count(line) == 1, said
    assert os.listdir(here / "dest") == ["file"]

    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(OSError, match=r"^rsync was not found on this host: install it"):
        sync(remote, "src/", there)
    assert listed(guest, there) == set()


@pytest.mark.smoke
def test_F30_nothing_is_left_after_a_timeout(
    machine: str, connect: Callable[..., Remote], guest: Guest, here: Path, there: str
) -> None:
    """And no password is in an argument list on this host meanwhile (S1)."""
    (here / "src").mkdir()
    remote = connect(machine, orbstack_user="bob")
    mark = f"7{time.monotonic_ns() % 10**8}"
    hangs = f"--rsync-path='trap \"\" TERM HUP; sleep {mark}; sleep {mark}; rsync'"
    password = {"_sudo": True, "_sudo_password": PASSWORD}
    late = gevent.spawn(sync, remote, "src", there, "-a", hangs, **password, _timeout=12)
    guest.wait_for(f"sleep {mark}", seconds=30)
    shown = subprocess.run(["ps", "-axww", "-o", "args="], capture_output=True, text=True).stdout
    assert "orbstack:destination" in shown
    assert PASSWORD not in shown
    with pytest.raises(TimeoutError, match="did not finish within 12 s and was killed"):
        late.get()
    assert guest.running(mark) == []
    sync(remote, "src", there, "-a")


@pytest.mark.parametrize("number", [2, 15], ids=["int", "term"])
def test_F30_nothing_is_left_after_a_signal(
    machine: str, guest: Guest, here: Path, there: str, number: int
) -> None:
    mark = f"6{time.monotonic_ns() % 10**8}"
    hangs = f"--rsync-path='trap \"\" TERM HUP; sleep {mark}; sleep {mark}; rsync'"
    (here / "deploy.py").write_text(DEPLOY.format(dest=there, flags=[hangs]))
    (here / "src").mkdir()
    running = subprocess.Popen(
        [PYINFRA, "-y", f"@orbstack/{machine}", "deploy.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        guest.wait_for(f"sleep {mark}", seconds=60)
        running.send_signal(number)
        output, _ = running.communicate(timeout=30)
    finally:
        running.kill()
    assert b"Traceback" not in output
    guest.wait_for(mark, there=False, seconds=60)
    shown = subprocess.run(["ps", "-axww", "-o", "args="], capture_output=True, text=True).stdout
    assert mark not in shown


def test_F30_a_failure_ends_the_server(
    remote: Remote, guest: Guest, here: Path, there: str
) -> None:
    (here / "src").mkdir()
    mark = f"5{time.monotonic_ns() % 10**8}"
    # It closes its outputs, so that rsync gives up, and keeps running.
    stays = f"--rsync-path='sleep {mark} >&- 2>&- & exec >&-; sleep {mark}; rsync'"
    with pytest.raises(OSError, match=r"^rsync failed with exit code (12|30): "):
        sync(remote, "src", there, "-a", "--timeout=1", stays)
    assert guest.running(mark) == []


@pytest.mark.parametrize("banner", ["stdout:around", "stderr"])
def test_D15_a_banner_is_not_rsyncs(
    remote: Remote,
    guest: Guest,
    here: Path,
    there: str,
    simulated: bool,
    banner: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not simulated:
        pytest.skip("only the simulator prints a banner on request")
    (here / "src").write_bytes(os.urandom(100_000))
    monkeypatch.setenv("ORBCTL_SIMULATOR_BANNER", banner)
    sync(remote, "src", f"{there}/", "-a")
    assert listed(guest, there) == {"src"}
