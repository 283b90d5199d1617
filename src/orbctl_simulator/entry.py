"""Entering a booted machine with a process of the host."""

from __future__ import annotations

import os

from . import cgroups, userns
from .linux import close_all_but, setns
from .rights import drop_capabilities, hide_from_others, leave_keys, raise_limits

# The user namespace is entered last. Entering the others requires the host's rights, and once the
# machine's root has rights over this process, it must not have anything of the host open.
_KINDS = ("time", "uts", "ipc", "net", "cgroup", "mnt", "pid")


class Entry:
    """What is needed to enter a machine, opened in advance."""

    def __init__(self, machine_id: str, proc: int) -> None:
        """`proc` is the open directory ``/proc/PID`` of the machine's init."""
        flags = os.O_RDONLY | os.O_CLOEXEC
        kinds = [kind for kind in _KINDS if os.path.exists(f"/proc/self/ns/{kind}")]
        self._spaces = [os.open(f"ns/{kind}", flags, dir_fd=proc) for kind in kinds]
        self._user = os.open("ns/user", flags, dir_fd=proc)
        self._root = os.open("root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=proc)
        self._group = cgroups.CommandGroup(machine_id)

    def enter(self, *kept: int, root: int = -1) -> None:
        """Become the machine's root; children of this process will be its processes.

        Only descriptors 0, 1, 2 and `kept` stay open. Import modules before. `root` is another
        directory to use as the root.
        """
        hide_from_others()
        raise_limits()
        self._group.join()
        self._root = self._root if root < 0 else root
        close_all_but(self._root, self._user, *self._spaces, *kept)
        for space in self._spaces:
            setns(space)
            os.close(space)
        os.fchdir(self._root)
        os.close(self._root)
        os.chroot(".")
        userns.become_root_in(self._user)
        hide_from_others()
        os.close(self._user)
        leave_keys()
        drop_capabilities()
