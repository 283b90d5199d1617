"""The host's directories and files that a machine shares, and where they are.

Root in a machine can replace everything below a share, also the source of another share. So a
source is resolved once, when it is given. Later, no link on its path is followed.
"""

from __future__ import annotations

import os

from .state import Failure, cache, home

# systemd-tmpfiles deletes the content of /tmp, but not of what is mounted below.
_EMPTIED = ("/", "/dev", "/dev/shm", "/run", "/tmp")
# What is below could not be seen.
_MOUNTED = ("/dev/mqueue/", "/dev/pts/", "/proc/", "/sys/")

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .state import Machine


def resolve(entries: list[str]) -> str:
    """The sources of mounts or shares that were just given, as a field of a machine's record."""
    sources = []
    for entry in entries:
        source = os.path.realpath(os.path.expanduser(entry.partition(":")[0]))
        _check(entry, source)
        sources.append(source)
    return "\t".join(sources)


def _check(entry: str, source: str) -> None:
    """Refuse to share the simulator's own files: root in a machine could replace them."""
    for own in (home(), cache()):
        ours, theirs = f"{own}/", f"{source.rstrip('/')}/"
        if ours.startswith(theirs) or theirs.startswith(ours):
            raise Failure(
                f"mount {entry}: would share {own}, which belongs to the simulator: share another"
                " directory, or set ORBCTL_SIMULATOR_HOME and ORBCTL_SIMULATOR_CACHE"
            )


def is_of_boot(target: str) -> bool:
    """Whether a machine mounts or empties this directory when it boots."""
    return target in _EMPTIED or f"{target}/".startswith(_MOUNTED)


def of(machine: Machine) -> list[str]:
    """What is shared with a machine, as pairs of source and target."""
    mounts, sources = machine.many("mounts"), machine.many("sources")
    # An earlier version has not resolved them.
    shares = [os.path.abspath(source) for source in machine.many("shares")]
    if len(sources) != len(mounts):  # an earlier version has written the record
        given = (entry.partition(":")[0] for entry in mounts)
        sources = [os.path.abspath(os.path.expanduser(source)) for source in given]
    pairs = []
    for entry, source in zip(mounts + shares, sources + shares):
        _check(entry, source)
        try:
            os.close(open_source(source))
        except OSError:
            raise Failure(f"mount {entry}: no such file or directory") from None
    for entry, source in zip(mounts, sources):
        target = os.path.normpath("/" + (entry.partition(":")[2] or source).lstrip("/"))
        if target == "/":
            raise Failure(f"mount {entry}: cannot mount over the root directory")
        pairs += [source, target]
    for source in shares:
        if not (machine.boots and is_of_boot(source)):
            pairs += [source, source]
        pairs += [source, f"/mnt/mac{source}"]
    return pairs


def open_source(source: str) -> int:
    """Open a source, unless a link on its path leads elsewhere."""
    fd = os.open(source, os.O_PATH | os.O_CLOEXEC)
    # The kernel knows where the file is, whatever changes on the path meanwhile.
    if os.readlink(f"/proc/self/fd/{fd}") != source:
        os.close(fd)
        raise Failure(
            f"mount {source}: a part of this path is a symbolic link: replace it with a directory,"
            " set the machine's mounts again, or create the machine again"
        )
    return fd
