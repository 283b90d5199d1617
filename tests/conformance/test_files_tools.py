"""Section F: files with each shell and each set of tools that a target may have."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyinfra_orbstack import transfer

from .conftest import Guest, Remote

BASE = f"/opt/tools-{os.getpid()}"
USUAL = "/usr/sbin:/usr/bin:/sbin:/bin"
#: Directories that are put in front of PATH.
TOOLS = ("dash", "bash", "busybox", "cksum", "lengths", "old dd", "few")
MAKE = r"""
rm -rf "$1" && mkdir "$1" && cd "$1" || exit
for shell in dash bash; do mkdir $shell; ln -s "$(command -v $shell)" $shell/sh; done
mkdir busybox cksum lengths "old dd" few
program=$(command -v busybox)
for tool in $(busybox --list); do ln -s "$program" busybox/$tool; done
for rest in cksum lengths few; do cp -R -P busybox/. $rest; done
rm cksum/sha256sum lengths/sha256sum lengths/cksum
cd few && rm -f stat flock readlink lsattr find setsid && cd .. || exit
cat >"old dd/dd" <<'DD'
#!/bin/sh
case $1 in iflag=*) echo "dd: unrecognized operand '$1'" >&2; exit 1;; esac
exec /bin/dd "$@"
DD
chmod 755 "old dd/dd"
"""


@pytest.fixture(scope="module")
def tooled() -> Iterator[dict[str, Guest]]:
    """Where the sets of tools are installed; no test changes them."""
    places: dict[str, Guest] = {}
    yield places
    for guest in places.values():
        guest.sh('rm -rf "$1"', BASE)


@pytest.fixture
def tools(guest: Guest, tooled: dict[str, Guest]) -> Callable[[str], dict[str, Any]]:
    """Arguments for pyinfra that select the `sh` and the commands of a set of tools."""
    if guest.name not in tooled:
        guest.sh(MAKE, BASE)
        tooled[guest.name] = guest

    def arguments(name: str) -> dict[str, Any]:
        rest = "" if name in ("busybox", "cksum", "lengths", "few") else f":{USUAL}"
        return {"_env": {"PATH": f"{BASE}/{name}{rest}"}}

    return arguments


@pytest.fixture
def folder(guest: Guest) -> Iterator[str]:
    """A directory with all kinds of targets; those of another owner belong to root."""
    path = f"/var/tmp/tools-{os.getpid()}"
    guest.sh('rm -rf "$1"; mkdir -m 777 "$1"', path)
    yield path
    guest.sh('rm -rf "$1"', path)


SETTING = r"""
cd "$1" && rm -rf * && printf old >replaced && printf old >theirs && printf old >one || exit
ln one two && chmod 666 * && chmod 640 replaced && chown "$2:" replaced || exit
ln -s replaced link && ln -s made dangling
"""


@pytest.mark.parametrize("name", TOOLS)
def test_F5_with_these_tools(
    remote: Remote,
    transport: str,
    guest: Guest,
    folder: str,
    tools: Callable[[str], dict[str, Any]],
    name: str,
) -> None:
    """New, replaced, overwritten, through links; small, large and empty; and back."""
    user = remote.out("id -un")
    # Without readlink, a link cannot be followed, which is an error.
    targets = ["new", "replaced", "theirs", "one", "link", "dangling"]
    if name == "few":
        for target in targets[-2:]:
            guest.sh(SETTING, folder, user)
            with pytest.raises(
                OSError, match=r"^cannot write .*: its symbolic link cannot be read$"
            ):
                remote.put(io.BytesIO(b"x"), f"{folder}/{target}", **tools(name))
        targets = targets[:-2]
    small, large = [0, 7, transfer.SMALL], [transfer.SMALL + 1, 70_000]
    rounds = [[7], [70_000]]
    if transport == "session":
        # Each target gets a small and a large content, and each set of tools every size; the sets
        # together, every size for each target. The other transports move the same bytes.
        turn = TOOLS.index(name)
        rounds = [kind[turn % len(kind) :] + kind[: turn % len(kind)] for kind in (small, large)]
    for sizes in rounds:
        guest.sh(SETTING, folder, user)
        written = {}
        for target, size in zip(targets, itertools.cycle(sizes)):
            data = os.urandom(size)
            remote.put(io.BytesIO(data), f"{folder}/{target}", **tools(name))
            remote.get(f"{folder}/{target}", arrived := io.BytesIO(), **tools(name))
            assert arrived.getvalue() == data, target
            written[target] = size
        shown = guest.sh('cd "$1" && stat -c "%n %a %h %s %U" *', folder).decode()
        assert f"new 644 1 {written['new']} {user}" in shown
        assert f"replaced 640 1 {written.get('link', written['replaced'])} {user}" in shown
        assert f"theirs 666 1 {written['theirs']} root" in shown
        assert f"two 666 2 {written['one']} root" in shown
        if name != "few":
            assert f"made 644 1 {written['dangling']} {user}" in shown
    assert guest.sh('ls -A "$1" | grep pyinfra || true', folder) == b""
    for source in ("/proc/uptime", "/proc/version"):
        remote.get(source, arrived := io.BytesIO(), **tools(name))
        assert arrived.getvalue()
    for target, reason in {"no/such": "No such file or directory", ".": "Is a directory"}.items():
        with pytest.raises(OSError, match=f"^cannot write .*: {reason}$"):
            remote.put(io.BytesIO(b"x"), f"{folder}/{target}", **tools(name))
        with pytest.raises(OSError, match=f"^cannot read .*: {reason}$"):
            remote.get(f"{folder}/{target}", io.BytesIO(), **tools(name))


@pytest.mark.parametrize("name", ["tee", "head"])
def test_F5_the_error_names_the_missing_tool(
    one: Remote, guest: Guest, folder: str, tools: Callable[[str], dict[str, Any]], name: str
) -> None:
    tools("busybox")
    path = f"{BASE}/busybox-without-{name}"
    guest.sh('cp -R -P "$1" "$2"; rm "$2/$3"', f"{BASE}/busybox", path, name)
    arguments = {"_env": {"PATH": path}}
    guest.sh('head -c 100000 /dev/zero >"$1/file"', folder)
    with pytest.raises(OSError, match=f"^cannot read {folder}/file: {name} was not found$"):
        one.get(f"{folder}/file", io.BytesIO(), **arguments)


@pytest.mark.parametrize("name", ["dash", "bash", "busybox"])
def test_F5_F7_any_content_and_any_name(
    one: Remote, guest: Guest, folder: str, tools: Callable[[str], dict[str, Any]], name: str
) -> None:
    """Content and names travel as shell text, and are never interpreted as shell."""
    letters = st.characters(blacklist_characters="/\0", blacklist_categories=("Cs",))
    names = st.text(letters, min_size=1, max_size=60).filter(
        lambda text: text not in (".", "..") and len(text.encode()) <= 255
    )

    @settings(
        max_examples=40,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(
        st.binary(max_size=2000), names | st.sampled_from(["-", "--", "-n", "\\", "'", "~", "*"])
    )
    def try_one(data: bytes, base: str) -> None:
        path = f"{folder}/{base}"
        one.put(io.BytesIO(data), path, **tools(name))
        one.get(path, arrived := io.BytesIO(), **tools(name))
        assert arrived.getvalue() == data
        one.run(f"rm -f -- {folder}/* {folder}/.[!.]*")

    try_one()
    round_trip_bytes = os.fsdecode(b"\xff\xfe latin \xe9")
    one.put(io.BytesIO(b"x"), f"{folder}/{round_trip_bytes}", **tools(name))
    assert guest.sh('ls "$1"', folder) == b"\xff\xfe latin \xe9\n"
