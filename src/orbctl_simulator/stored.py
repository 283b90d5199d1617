"""The files of booted machines as they lie on the disk, under ids that nobody on the host has."""

from __future__ import annotations

import os

from . import userns
from .linux import CLONE_NEWNS, MS_PRIVATE, MS_REC, mount, unshare

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def give(path: str) -> None:
    """Let a directory that we have just made belong to root of the machine."""
    os.chown(path, userns.STORED, userns.STORED, follow_symlinks=False)


def with_plain_owners(path: str, work: Callable[[], int]) -> int:
    """Do `work` in a child for which the files in `path` have the ids that they have in a machine.

    It returns what `work` does, which is 0 if all went well. So what is copied from elsewhere, or
    packed, has plain ids, and the disk has the others.
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
