"""Runs an executable as on Linux 5.3, the oldest supported version: newer system calls are missing.

    python old_kernel.py PROGRAM ...

Its child processes run the same way. Requires root, which keeps sudo working in machines.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

#: close_range, openat2, pidfd_getfd, faccessat2, and all later ones; the numbers are the same
#: on every architecture.
FIRST = 436
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
ALLOW, ERRNO = 0x7FFF0000, 0x00050000 | errno.ENOSYS
LOAD, AT_LEAST, RETURN = 0x20, 0x35, 0x06


class Program(ctypes.Structure):
    """A filter in the kernel's format."""

    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p)]


def forget() -> None:
    """Disable these system calls for this process and its children."""
    # Code, jumps if true and if false, value: the first word is the number of the call.
    steps = [(LOAD, 0, 0, 0), (AT_LEAST, 0, 1, FIRST), (RETURN, 0, 0, ERRNO), (RETURN, 0, 0, ALLOW)]
    text = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = Program(len(steps), ctypes.cast(text, ctypes.c_void_p))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program)):
        raise OSError(ctypes.get_errno(), "no filter of system calls")


if __name__ == "__main__":
    forget()
    os.execvp(sys.argv[1], sys.argv[1:])
