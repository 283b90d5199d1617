"""The control groups of a booted machine: one in every hierarchy that the host has mounted.

They enforce the machine's limits, freeze and kill its processes together, and hide other groups
from it: a control group namespace shows only what is below the group that it was created in.
"""

from __future__ import annotations

import os
import time
from errno import EBUSY, ENOENT

from .userns import system_call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator

_FSOPEN, _FSCONFIG, _FSMOUNT, _CONFIG_CREATE, _CLOEXEC = 430, 431, 432, 6, 1
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_DELEGATED = ("cgroup.procs", "cgroup.subtree_control", "cgroup.threads")
_PERIOD = 100_000
_PATIENCE = 10.0
# The group of commands that are run in the machine; its init manages the others.
COMMANDS = "orb"
# Removing the groups also removes everything that the machine's root created in them.
_MOST = (("cgroup.max.depth", "32"), ("cgroup.max.descendants", "10000"))


class Hierarchy:
    """A tree of control groups, with its root as an open directory."""

    def __init__(self, root: int, version: int, controllers: set[str]) -> None:
        self.root, self.version, self.controllers = root, version, controllers


def hierarchies() -> Generator[Hierarchy, None, None]:
    """All hierarchies; version 2 comes first."""
    mounts = _mounts()
    root = _version_2(mounts)
    try:
        yield Hierarchy(root, 2, set(_read("cgroup.controllers", root).split()))
    finally:
        os.close(root)
    for kind, point, options in mounts:
        if kind == "cgroup":
            root = os.open(point, _DIRECTORY)
            try:
                yield Hierarchy(root, 1, set(options.split(",")))
            finally:
                os.close(root)


def _mounts() -> list[tuple[str, str, str]]:
    """File system, mount point and options of each mounted hierarchy."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        lines = [line.split() for line in file if " - cgroup" in line]
    found: dict[str, tuple[str, str, str]] = {}
    for fields in lines:
        kind, _, options = fields[fields.index("-") + 1 :]
        if fields[3] == "/" and "rw" in fields[5].split(","):
            found.setdefault(fields[2], (kind, fields[4].replace("\\040", " "), options))
    return list(found.values())


def _version_2(mounts: list[tuple[str, str, str]] | None = None) -> int:
    """Open the root of version 2. If the host has not mounted it, a detached mount is created."""
    for kind, point, _ in _mounts() if mounts is None else mounts:
        if kind == "cgroup2":
            return os.open(point, _DIRECTORY)
    context = system_call(_FSOPEN, "control groups", b"cgroup2", _CLOEXEC)
    try:
        system_call(_FSCONFIG, "control groups", context, _CONFIG_CREATE, None, None, 0)
        mount = system_call(_FSMOUNT, "control groups", context, _CLOEXEC, 0)
    finally:
        os.close(context)
    try:
        return os.open(".", _DIRECTORY, dir_fd=mount)
    finally:
        os.close(mount)


def _write(path: str, text: str, root: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=root)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _read(path: str, root: int) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=root)
    try:
        return os.read(fd, 1 << 16).decode()
    finally:
        os.close(fd)


def name_of(machine_id: str) -> str:
    return f"orb-{machine_id}"


def enter(machine_id: str, owner: int, cpus: float, memory: int) -> None:
    """Create a machine's groups and move this process into them; `owner` may create subgroups."""
    name = name_of(machine_id)
    for tree in hierarchies():
        _enable(tree, cpus, memory)
        os.mkdir(name, 0o755, dir_fd=tree.root)
        if tree.version == 1 and "cpuset" in tree.controllers:
            for setting in ("cpuset.cpus", "cpuset.mems"):
                _write(f"{name}/{setting}", _read(setting, tree.root), tree.root)
        _limit(tree, name, cpus, memory)
        if tree.version == 2:
            for setting, most in _MOST:
                _write(f"{name}/{setting}", most, tree.root)
            os.mkdir(f"{name}/{COMMANDS}", 0o755, dir_fd=tree.root)
            for group in (name, f"{name}/{COMMANDS}"):
                for path in (group, *(f"{group}/{entry}" for entry in _DELEGATED)):
                    os.chown(path, owner, owner, dir_fd=tree.root)
        _write(f"{name}/cgroup.procs", "0", tree.root)


def _enable(tree: Hierarchy, cpus: float, memory: int) -> None:
    """Enable the controllers that the limits need, as container engines do."""
    if tree.version == 2:
        there = _enabled(tree)
        for controller, wanted in (("cpu", cpus), ("memory", memory)):
            if wanted and controller in tree.controllers - there:
                try:  # noqa: SIM105 contextlib takes longer to load
                    _write("cgroup.subtree_control", f"+{controller}", tree.root)
                except OSError:
                    pass  # the host does not allow it, so the limit is not enforced
        tree.controllers = _enabled(tree)


def _enabled(tree: Hierarchy) -> set[str]:
    return set(_read("cgroup.subtree_control", tree.root).split())


def _limit(tree: Hierarchy, name: str, cpus: float, memory: int) -> None:
    quota = str(int(cpus * _PERIOD))
    if cpus and "cpu" in tree.controllers:
        if tree.version == 2:
            _write(f"{name}/cpu.max", f"{quota} {_PERIOD}", tree.root)
        else:
            _write(f"{name}/cpu.cfs_period_us", str(_PERIOD), tree.root)
            _write(f"{name}/cpu.cfs_quota_us", quota, tree.root)
    if memory and "memory" in tree.controllers:
        setting = "memory.max" if tree.version == 2 else "memory.limit_in_bytes"
        _write(f"{name}/{setting}", str(memory), tree.root)


def limits() -> dict[str, str]:
    """The controllers that enforce limits, with their version of control groups.

    Enables them, as creating a machine with limits does.
    """
    found: dict[str, str] = {}
    for tree in hierarchies():
        _enable(tree, 1, 1)
        for controller in tree.controllers & {"cpu", "memory"}:
            found[controller] = f"version {tree.version}"
    return found


class CommandGroup:
    """The group that a machine's commands run in. It is opened before entering the machine."""

    def __init__(self, machine_id: str) -> None:
        self._files = []
        for tree in hierarchies():
            group = name_of(machine_id)
            if tree.version == 2:
                group += f"/{COMMANDS}"
                self._files.append(_processes_of(group, tree.root))
            elif _exists(group, tree.root):
                self._files.append(_processes_of(group, tree.root))

    def join(self) -> None:
        for file in self._files:
            os.write(file, b"0")
            os.close(file)


def _processes_of(group: str, root: int) -> int:
    """Open the list of a group's processes. The machine's root may have removed an empty group."""
    flags = os.O_WRONLY | os.O_CLOEXEC
    try:
        return os.open(f"{group}/cgroup.procs", flags, dir_fd=root)
    except FileNotFoundError:
        os.mkdir(group, 0o755, dir_fd=root)
        return os.open(f"{group}/cgroup.procs", flags, dir_fd=root)


def _exists(group: str, root: int) -> bool:
    try:
        os.stat(group, dir_fd=root)
        return True
    except FileNotFoundError:
        return False


def freeze(machine_id: str, frozen: bool) -> None:
    """Freeze or thaw all processes of a machine, and wait until it is done."""
    root, name = _version_2(), name_of(machine_id)
    try:
        _write(f"{name}/cgroup.freeze", str(int(frozen)), root)
        deadline = time.monotonic() + _PATIENCE
        while f"frozen {int(frozen)}" not in _read(f"{name}/cgroup.events", root):
            if time.monotonic() > deadline:
                raise OSError(EBUSY, "a process of the machine cannot be frozen")
            time.sleep(0.001)
    finally:
        os.close(root)


def is_empty(machine_id: str) -> bool:
    """Whether no process of the machine is alive."""
    root = _version_2()
    try:
        return "populated 0" in _read(f"{name_of(machine_id)}/cgroup.events", root)
    except FileNotFoundError:
        return True
    finally:
        os.close(root)


def remove(machine_id: str, grace: float = 0) -> None:
    """Kill the processes that are left in a machine's groups, and remove the groups.

    Commands that have just lost their machine get `grace` seconds to report how they ended.
    """
    begun = time.monotonic()
    while time.monotonic() < begun + grace and not is_empty(machine_id):
        time.sleep(0.002)
    deadline = time.monotonic() + _PATIENCE
    for tree in hierarchies():
        while not _removed(name_of(machine_id), tree):
            if time.monotonic() > deadline:
                raise OSError(EBUSY, "a process of the machine cannot be killed")
            time.sleep(0.002)


def _removed(name: str, tree: Hierarchy) -> bool:
    try:
        group = os.open(name, _DIRECTORY, dir_fd=tree.root)
    except FileNotFoundError:
        return True
    try:
        if tree.version == 2:
            _write("cgroup.kill", "1", group)
        _remove_below(group)
        os.rmdir(name, dir_fd=tree.root)
        return True
    except OSError as error:
        if error.errno not in (EBUSY, ENOENT):
            raise
        return False
    finally:
        os.close(group)


def _remove_below(group: int) -> None:
    with os.scandir(group) as entries:
        names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    for name in names:
        inner = os.open(name, _DIRECTORY, dir_fd=group)
        try:
            _remove_below(inner)
        finally:
            os.close(inner)
        os.rmdir(name, dir_fd=group)
