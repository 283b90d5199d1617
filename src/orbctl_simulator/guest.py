"""What turns a root file system into a machine: its user, sudo, hostname and resolver.

Everything here runs inside the machine's own root, with nothing mounted in it. So no symbolic link,
absolute or relative, leads to a file of the host, and shared directories are not written.
"""

from __future__ import annotations

import os
import stat
from errno import EINVAL

from .account import Account, read_lines, read_plain
from .state import Failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

USER_ID = 501
ORBSTACK_GROUP_ID = 67278
_RESOLVER = "/opt/orbstack-guest/etc/resolv.conf"
_NO_MAC = "#!/bin/sh\necho 'dial: no such file or directory' >&2\nexit 1\n"


def _write(path: str, lines: list[str], mode: int) -> None:
    """Write in place: an existing file keeps its mode and owner, a new one gets `mode`."""
    # If it is truncated at once, the overlay does not copy what it contains, and wait for the disk.
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK
    fd = os.open(path, flags, mode)
    with open(fd, "w", encoding="utf-8", errors="surrogateescape") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(EINVAL, "not a regular file", path)
        file.writelines(line + "\n" for line in lines)


def set_hostname(name: str) -> None:
    """Set the name and an address for it: `sudo` complains if it cannot resolve the name."""
    before = read_lines("/etc/hostname")
    old = before[0].strip() if before else ""
    hosts = read_lines("/etc/hosts")
    own = f"127.0.1.1\t{name}"
    if old == name and own in hosts:
        return
    _write("/etc/hostname", [name], 0o644)
    stale = f"127.0.1.1\t{old}"
    _write("/etc/hosts", [line for line in hosts if line not in (own, stale)] + [own], 0o644)


def refresh(name: str, resolver: str) -> None:
    """Update what changes between starts: the name, and the host's resolver, as on a laptop.

    If a deploy has replaced these files with something else, the machine starts without it.
    """
    for write, text in ((_set_resolver, resolver), (set_hostname, name)):
        try:  # noqa: SIM105 contextlib takes as long to load as the rest of a start
            write(text)
        except (OSError, Failure):
            pass


def _set_resolver(content: str) -> None:
    os.makedirs(os.path.dirname(_RESOLVER), exist_ok=True)
    _write(_RESOLVER, content.splitlines(), 0o644)


def prepare(name: str, user: str, resolver: str, hosts: tuple[str, ...] = ()) -> None:
    """Write the files that a new machine gets once. A deploy may change all of them.

    `hosts` are names that its resolver does not know.
    """
    _set_resolver(resolver)
    fresh = ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback"]
    _write("/etc/hosts", [*fresh, *hosts], 0o644)
    if os.path.lexists("/etc/resolv.conf"):
        os.unlink("/etc/resolv.conf")
    os.symlink(_RESOLVER, "/etc/resolv.conf")
    set_hostname(name)
    os.makedirs("/usr/local/bin", exist_ok=True)
    for command in ("mac", "macctl"):
        _write(f"/usr/local/bin/{command}", _NO_MAC.splitlines(), 0o755)
    if user != "root":
        _add_user(user)


def _add_user(user: str) -> None:
    shell = "/bin/bash" if os.path.exists("/bin/bash") else "/bin/sh"
    home = f"/home/{user}"
    old = {f[0] for f in map(_split, read_lines("/etc/passwd")) if _clashes(f, user, USER_ID)}
    _replace("/etc/passwd", old, f"{user}:x:{USER_ID}:{USER_ID}::{home}:{shell}", 0o644)
    _replace("/etc/shadow", old, f"{user}:*:19000:0:99999:7:::", 0o640)

    groups = read_lines("/etc/group")
    admins = next((g for g in ("sudo", "wheel") if any(_split(x)[0] == g for x in groups)), "sudo")
    stale = {
        f[0]
        for f in map(_split, groups)
        if _clashes(f, user, USER_ID) or _clashes(f, "orbstack", ORBSTACK_GROUP_ID)
    }
    kept = [fields for fields in map(_split, groups) if fields[0] not in stale]
    for fields in kept:
        if len(fields) > 3:
            members = [m for m in fields[3].split(",") if m and m not in old]
            fields[3] = ",".join(members + [user] * (fields[0] == admins))
    if not any(fields[0] == admins for fields in kept):
        taken = {fields[2] for fields in kept if len(fields) > 2}
        free = next(n for n in range(27, 1000) if str(n) not in taken)
        kept.append([admins, "x", str(free), user])
    kept.append([user, "x", str(USER_ID), ""])
    kept.append(["orbstack", "x", str(ORBSTACK_GROUP_ID), user])
    _write("/etc/group", [":".join(fields) for fields in kept], 0o644)
    if os.path.exists("/etc/gshadow"):
        _replace("/etc/gshadow", stale, f"{user}:!::", 0o640)

    os.makedirs("/etc/sudoers.d", mode=0o750, exist_ok=True)
    _write("/etc/sudoers.d/orbstack", [f"{user} ALL=(ALL:ALL) NOPASSWD: ALL"], 0o440)
    os.chmod("/etc/sudoers.d/orbstack", 0o440)
    _make_home(home)


def _split(line: str) -> list[str]:
    return line.split(":")


def _clashes(fields: list[str], name: str, number: int) -> bool:
    return fields[0] == name or (len(fields) > 2 and fields[2] == str(number))


def _replace(path: str, names: set[str], entry: str, mode: int) -> None:
    kept = [line for line in read_lines(path) if _split(line)[0] not in names | {_split(entry)[0]}]
    _write(path, [*kept, entry], mode)


def _make_home(home: str) -> None:
    """Create the user's home directory, or give the user the one that the image has."""
    os.makedirs("/home", exist_ok=True)
    if os.path.lexists(home) and not _is_folder(home):
        raise Failure(f"{home} is not a directory in this image: choose another user with --user")
    _copy_skeleton("/etc/skel", home)
    _give_to_user(home)
    os.chmod(home, 0o700)


def _is_folder(path: str) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)


def _copy_skeleton(source: str, target: str) -> None:
    """Copy what does not exist yet."""
    if not os.path.lexists(target):
        os.mkdir(target, 0o755)
    for name in os.listdir(source) if os.path.isdir(source) else ():
        theirs, ours = os.path.join(source, name), os.path.join(target, name)
        if os.path.lexists(ours) and not (_is_folder(theirs) and _is_folder(ours)):
            continue
        if os.path.islink(theirs):
            os.symlink(os.readlink(theirs), ours)
        elif os.path.isdir(theirs):
            _copy_skeleton(theirs, ours)
        else:
            with open(ours, "xb") as copy:
                copy.write(read_plain(theirs))
            os.chmod(ours, os.stat(theirs).st_mode & 0o777)


def _give_to_user(path: str) -> None:
    """Give the user a directory and everything in it; links are not followed."""
    paths = [path]
    while paths:
        path = paths.pop()
        os.lchown(path, USER_ID, USER_ID)
        if _is_folder(path):
            paths += [os.path.join(path, name) for name in os.listdir(path)]


def set_password(user: str, secret: int, limit: Callable[[], None] | None = None) -> None:
    """Set it with the machine's own `chpasswd`, while it cannot write anything of the host.

    The password is read from `secret`; `limit` removes files and rights from that process.
    """
    password = os.read(secret, 1 << 16)
    os.close(secret)
    if not password:
        return
    reader, writer = os.pipe()
    for name in (user, "root"):
        os.write(writer, name.encode() + b":" + password + b"\n")
    os.close(writer)
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(reader, 0)
            if limit:
                limit()
            root = Account("root")
            env = root.environment()
            root.become()
            for folder in env["PATH"].split(":"):
                try:  # noqa: SIM105 contextlib is slow to load
                    os.execve(f"{folder}/chpasswd", ["chpasswd"], env)
                except OSError:
                    pass
        finally:
            os._exit(127)
    os.close(reader)
    if os.waitpid(pid, 0)[1] != 0:
        raise OSError("cannot set the password")
