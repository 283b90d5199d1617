"""What a machine's processes may use of the host's resources, and what they leave behind."""

from __future__ import annotations

import ctypes
import os
import resource
import time

from .linux import CLONE_NEWTIME, unshare
from .userns import system_call

# Limits that a machine's root could not raise: the kernel requires the host's sys_resource.
_UNLIMITED = resource.RLIM_INFINITY
_LIMITS = (
    (resource.RLIMIT_NOFILE, 1024, 1 << 20),
    (resource.RLIMIT_MEMLOCK, 8 << 20, _UNLIMITED),
    (resource.RLIMIT_NPROC, _UNLIMITED, _UNLIMITED),
    (resource.RLIMIT_CORE, 0, _UNLIMITED),
    (13, 40, 40),  # RLIMIT_NICE
)

# Capabilities without effect in a user namespace. Programs and units that have them would try to
# use them, and fail: sys_module, sys_rawio, sys_pacct, sys_time, mac_override, mac_admin, syslog,
# wake_alarm, block_suspend, audit_read.
_DROPPED = (16, 17, 20, 25, 32, 33, 34, 35, 36, 37)
_PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _JOIN_SESSION_KEYRING = 4, 24, 1
_KEYCTL = {"x86_64": 250}  # other architectures use 219

_libc = ctypes.CDLL(None, use_errno=True)


def drop_capabilities() -> None:
    for number in _DROPPED:
        _libc.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(number), 0, 0, 0)


def hide_from_others() -> None:
    """Keep processes without the host's capabilities from inspecting this one."""
    _libc.prctl(_PR_SET_DUMPABLE, ctypes.c_ulong(0), 0, 0, 0)


def leave_keys() -> None:
    """Replace the caller's session keyring with an empty one."""
    number = _KEYCTL.get(os.uname().machine, 219)
    system_call(number, "session keyring", _JOIN_SESSION_KEYRING, None)


def raise_limits() -> None:
    """Set the resource limits that an init expects, as far as this process may."""
    for kind, soft, hard in _LIMITS:
        try:
            resource.setrlimit(kind, (soft, hard))
        except (OSError, ValueError):  # without sys_resource, as in most containers
            most = resource.getrlimit(kind)[1]
            if most != _UNLIMITED:
                soft = most if soft == _UNLIMITED else min(soft, most)
            resource.setrlimit(kind, (soft, most))


def use_default_scheduling() -> None:
    """Leave the caller's real-time policy, which control groups may reject."""
    if os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def start_clock(begins: float) -> None:
    """Let the time since boot start at `begins` seconds, for children of this process."""
    unshare(CLONE_NEWTIME)
    with open("/proc/self/timens_offsets", "w") as file:
        for name, clock in (("monotonic", time.CLOCK_MONOTONIC), ("boottime", time.CLOCK_BOOTTIME)):
            seconds, nanoseconds = divmod(int(begins * 10**9) - time.clock_gettime_ns(clock), 10**9)
            file.write(f"{name} {seconds} {nanoseconds}\n")
