"""Section F: files through all of pyinfra's wrappers, with every shell on the way."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import gevent
import pyinfra
import pytest

from .conftest import PASSWORD, Guest, Remote
from .test_privilege_environment import supports

VERSION = tuple(map(int, pyinfra.__version__.split(".")[:2]))
SHELLS = ("sh", "bash", "dash", "zsh", "fish", "ksh", "busyboxsh", None)
#: Users that the wrapped command runs as, each with another login shell.
USERS = ("alice", "likedash", "likezsh", "likefish", "likeksh", "likebusybox")

SUDO: dict[str, Any] = {"_sudo": True}
WITH_PASSWORD: dict[str, Any] = {"_sudo": True, "_sudo_password": PASSWORD}
SU_PASSWORD: dict[str, Any] = {"_su_user": "root", "_su_password": PASSWORD}
#: By name: who connects, pyinfra's arguments, and the argument that names the user to become.
WRAPPERS: dict[str, tuple[str | None, dict[str, Any], str | None]] = {
    "none": (None, {}, None),
    "sudo": (None, SUDO, None),
    "sudo_user": (None, SUDO, "_sudo_user"),
    "sudo_login": (None, {**SUDO, "_use_sudo_login": True}, None),
    "sudo_user_login": (None, {**SUDO, "_use_sudo_login": True}, "_sudo_user"),
    "preserve_sudo_env": (None, {**SUDO, "_preserve_sudo_env": True}, "_sudo_user"),
    "sudo_password": ("bob", WITH_PASSWORD, "_sudo_user"),
    "sudo_password_login": ("bob", {**WITH_PASSWORD, "_use_sudo_login": True}, "_sudo_user"),
    "su": ("root", {}, "_su_user"),
    "su_login": ("root", {"_use_su_login": True}, "_su_user"),
    "preserve_su_env": ("root", {"_preserve_su_env": True}, "_su_user"),
    "su_shell": ("root", {"_su_shell": "fish"}, "_su_user"),
    "sudo_su": (None, SUDO, "_su_user"),
    "su_password": ("bob", SU_PASSWORD, "_su_user"),
    "su_password_login": ("bob", {**SU_PASSWORD, "_use_su_login": True}, "_su_user"),
    "su_password_shell": ("bob", {**SU_PASSWORD, "_su_shell": "zsh"}, "_su_user"),
    "doas": (None, {"_doas": True}, None),
    "doas_user": (None, {"_doas": True, "_doas_user": "alice"}, None),
    "dzdo": (None, {"_dzdo": True}, "_dzdo_user"),
}
#: Each kind of wrapper once; the others differ only in the text, which any transport passes on.
KINDS = ("none", "sudo", "sudo_user_login", "sudo_password", "su_login", "su_password_shell")
SOME_SHELLS = (SHELLS[0], SHELLS[-1])
CASES: list[Any] = [
    pytest.param(
        transport, wrapper, SOME_SHELLS, marks=pytest.mark.smoke, id=f"{transport}-{wrapper}"
    )
    for transport, wrappers in (("session", WRAPPERS), ("spawn", KINDS), ("container", KINDS))
    for wrapper in wrappers
]
CASES += [
    pytest.param("session", wrapper, SHELLS, id=f"session-{wrapper}-all") for wrapper in WRAPPERS
]


@pytest.fixture
def wrapped(guest: Guest) -> Iterator[str]:
    """A directory that everyone may write to; users with passwords; `dzdo`, which is sudo here."""
    path = "/var/tmp/wrapped"
    guest.sh(
        'rm -rf "$1"; mkdir -m 1777 "$1"; IFS= read -r password; shift; '
        'for user; do printf "%s:%s\\n" "$user" "$password"; done | chpasswd; '
        "printf '#!/bin/sh\\nexec sudo \"$@\"\\n' >/usr/local/bin/dzdo; "
        "chmod 755 /usr/local/bin/dzdo",
        path,
        *USERS,
        stdin=f"{PASSWORD}\n".encode(),
    )
    yield path
    guest.sh('rm -rf "$1" /usr/local/bin/dzdo', path)


def combinations(wrapper: str, shells: Sequence[str | None]) -> Iterable[tuple[Any, Any]]:
    """Combinations of these shells and of users.

    Login shells interpret the text once more, so all combinations with all shells run. Otherwise,
    each shell is tested once, and if all are, each user.
    """
    users = USERS if WRAPPERS[wrapper][2] else (None,)
    if shells == SHELLS and wrapper in ("sudo_user_login", "su_login"):
        return itertools.product(shells, users)
    return zip(shells, itertools.cycle(users))


@pytest.mark.thorough
@pytest.mark.parametrize(("transport", "wrapper", "shells"), CASES)
def test_F9_every_wrapper_and_shell(
    machine: str,
    connect: Callable[..., Remote],
    guest: Guest,
    wrapped: str,
    transport: str,
    wrapper: str,
    shells: Sequence[str | None],
) -> None:
    """A new file, an old one and a download; small, and with its own stdin."""
    login, arguments, user_argument = WRAPPERS[wrapper]
    for argument in (*arguments, *filter(None, [user_argument])):
        if not supports(argument):
            pytest.skip(f"this pyinfra has no {argument}")
    user = {} if login is None else {"orbstack_user": login}
    remote = connect(machine, orbstack_transport=transport, **user)
    written: dict[str, dict[str, Any]] = {}
    owners: list[str] = []
    for shell, become in combinations(wrapper, shells):
        given = {**arguments, "_shell_executable": shell}
        if become is not None:
            given[user_argument or ""] = become
        base = f"it's {len(written)} $HOME"
        name = f"{wrapped}/{base}"
        if shell is not None:
            # Without a shell, pyinfra puts these before sudo. A newline in its own text is
            # lost in `sudo -i`, and older versions expand the values.
            plain = wrapper.endswith("login") or VERSION < (3, 8)
            value = "it is x" if plain else "it's\n$x `id`"
            given.update(_chdir=wrapped, _env={"KEY": value})
            name = base
        written[name] = given
        owners.append(become or given.get("_doas_user") or (login and "root") or "")
        for data in (os.urandom(300), b"\n\n", os.urandom(20_000)):
            remote.put(io.BytesIO(data), name, **given)
            arrived = io.BytesIO()
            remote.get(name, arrived, **given)
            assert arrived.getvalue() == data, given
    look = 'cd "$1" && stat -c "%U %a %s" "it\'s "* && chmod 640 "it\'s "*'
    listed = sorted_by_number(guest.sh(look.replace("%U", "%n/%U"), wrapped))
    default = {"none": None}.get(wrapper, "root")
    for owner, (found, mode, size) in zip(owners, listed):
        assert (mode, size) == ("644", "20000")
        if default:
            assert found == (owner or default)
    for name, given in written.items():
        remote.put(io.BytesIO(b"again"), name, **given)
    again = sorted_by_number(guest.sh(look.replace("%U", "%n/%U"), wrapped))
    assert again == [(owner, "640", "5") for owner, _, _ in listed]
    assert guest.sh('ls -A "$1" | grep pyinfra || true', wrapped) == b""
    remote.close()
    assert guest.leftovers() == []


def sorted_by_number(listing: bytes) -> list[tuple[str, ...]]:
    """The output of `stat` for the files, in the order in which they were written."""
    lines = [line.rpartition("/") for line in listing.decode().splitlines()]
    lines.sort(key=lambda line: int(line[0].split()[1]))
    return [tuple(line[2].split()) for line in lines]


@pytest.mark.parametrize("user", ["likezsh", "likefish", "likebusybox"])
def test_F9_login_shell_output_is_not_content(
    machine: str, connect: Callable[..., Remote], guest: Guest, user: str, transport: str
) -> None:
    """Profiles that print a greeting and a farewell."""
    profile = {
        "likezsh": ".zprofile .zlogout",
        "likefish": ".config/fish/config.fish",
        "likebusybox": ".profile",
    }[user]
    home = f"/home/{user}"
    guest.sh(
        'cd "$1"; shift; mkdir -p .config/fish; '
        'for file; do { echo "echo welcome"; echo "echo oops >&2"; } >>"$file"; done',
        home,
        *profile.split(),
    )
    remote = connect(machine, orbstack_transport=transport)
    given = {"_sudo": True, "_sudo_user": user, "_use_sudo_login": True}
    try:
        for data in (b"content", os.urandom(100_000), b""):
            remote.put(io.BytesIO(data), "greeted", **given)
            arrived = io.BytesIO()
            remote.get("greeted", arrived, **given)
            assert arrived.getvalue() == data
    finally:
        guest.sh('cd "$1"; shift; rm -f greeted "$@"', home, *profile.split())


def test_F16_the_error_quotes_the_wrapper(
    machine: str, connect: Callable[..., Remote], transport: str
) -> None:
    """One line with the message of sudo or su, without their prompt."""
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("alice", {"_sudo": True}, "sudo: a password is required"),
        ("bob", {"_sudo": True, "_sudo_password": "wrong"}, "sudo: .*password"),
        ("bob", {"_su_user": "alice"}, "su: Authentication failure"),
        ("bob", {"_su_user": "root", "_su_password": "wrong"}, "su: Authentication failure"),
        ("bob", {"_sudo": True, "_sudo_user": "no-such"}, "sudo: unknown user:? no-such"),
        ("alice", {"_chdir": "/no/such"}, "can't cd to /no/such"),
        ("alice", {"_shell_executable": "no-such-shell"}, "no-such-shell: not found"),
        ("bob", {"_doas": True}, "doas: Operation not permitted"),
    ]

    def refused(user: str, arguments: dict[str, Any], reason: str) -> None:
        remote = connect(machine, orbstack_user=user, orbstack_transport=transport)
        for action, call in (("write", remote.put), ("read", remote.get)):
            source_or_target = (io.BytesIO(b"x"), "/tmp/refused")
            words = source_or_target if action == "write" else reversed(source_or_target)
            with pytest.raises(OSError, match=f"^cannot {action} /tmp/refused: .*{reason}") as told:
                call(*words, **arguments)
            assert "\n" not in str(told.value)
            assert "assword: " not in str(told.value)

    # Both sudo and su are slow to reject a password.
    possible = [case for case in cases if all(map(supports, case[1]))]
    gevent.joinall([gevent.spawn(refused, *case) for case in possible], raise_error=True)
