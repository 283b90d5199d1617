"""The way into a booted machine, for a process of the host's that is to become one of its own."""

from __future__ import annotations

import os

from . import cgroups, userns
from .linux import close_all_but, setns
from .world import drop_rights, hide_from_others, leave_keys

# The user namespace comes last: until then the host's own rights open the others, and when the
# machine's root has rights over this process, it holds nothing of the host's any more.
_KINDS = ("time", "uts", "ipc", "net", "cgroup", "mnt", "pid")


class Entry:
    """What is needed to get in, opened on the host's side."""

    def __init__(self, machine_id: str, proc: int) -> None:
        """`proc` is the open directory ``/proc/PID`` of the machine's init."""
        flags = os.O_RDONLY | os.O_CLOEXEC
        kinds = [kind for kind in _KINDS if os.path.exists(f"/proc/self/ns/{kind}")]
        self._spaces = [os.open(f"ns/{kind}", flags, dir_fd=proc) for kind in kinds]
        self._user = os.open("ns/user", flags, dir_fd=proc)
        self._root = os.open("root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=proc)
        self._leaf = cgroups.Leaf(machine_id)

    def enter(self, *kept: int) -> None:
        """Go in, as root of the machine; the children of this process are then seen in there.

        Of the open files only 0, 1, 2 and `kept` are left. What is to be used inside must be
        imported before.
        """
        hide_from_others()
        self._leaf.enter()
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
        drop_rights()
