"""Files of booted machines on the host's disk, where they have ids that no user of the host has."""

from __future__ import annotations

import os

from . import userns
from .linux import CLONE_NEWNS, MS_PRIVATE, MS_REC, mount, unshare

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def give_to_root(path: str) -> None:
    """Let a directory that we have just created belong to the machine's root."""
    os.chown(path, userns.STORED, userns.STORED, follow_symlinks=False)


def with_plain_owners(path: str, work: Callable[[], int]) -> int:
    """Run `work` in a child that sees the files in `path` with the owners they have in a machine.

    Archives and copies then contain plain ids, while the disk has stored ones. Returns what `work`
    returns, 0 for success.
    """
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            line = f"{userns.STORED} 0 {userns.SPAN}\n"
            space = userns.make(line, line)
            unshare(CLONE_NEWNS)
            mount(None, "/", None, MS_REC | MS_PRIVATE)
            userns.put_mount(userns.copy_of_mount(path, space), path)
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
