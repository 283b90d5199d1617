"""The hosts of a project's inventories, read as the `pyinfra` command reads them."""

from __future__ import annotations

import ast
import glob
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyinfra_orbstack.targets import meaning, parse

if TYPE_CHECKING:
    from pyinfra.api.inventory import Inventory


#: The pattern of Python files, without those that macOS writes beside them on some disks (``._*``).
FILES = "[!.]*.py"


class CommandError(Exception):
    """The user has to do something first; the text is one line and nothing was changed."""


def execute(path: Path) -> dict[str, Any]:
    """The names that a file of the project assigns."""
    values: dict[str, Any] = {"__file__": str(path)}
    exec(compile(path.read_bytes(), str(path), "exec"), values)  # noqa: S102  (the user's own)
    return values


def inventory_hosts(path: str | os.PathLike[str]) -> list[str]:
    """Names of the hosts in an inventory file, as pyinfra calls them; patterns are not resolved.

    Raises:
        CommandError: The file cannot be executed.
    """
    names = (_name(host) for hosts, _ in _groups(Path(path)).values() for host in hosts)
    return list(dict.fromkeys(map(_called, filter(lambda name: isinstance(name, str), names))))


def _called(host: str) -> str:
    named = parse(host)
    return named.called if named else host


def _groups(path: Path) -> dict[str, tuple[Sequence[Any], Any]]:
    """Hosts and data by group, as the file assigns them.

    Raises:
        CommandError: The file cannot be executed, or a host has no name.
    """
    if os.getcwd() not in sys.path:  # as in pyinfra, for the file's imports
        sys.path.append(os.getcwd())
    try:
        values = execute(path)
    except Exception as broken:
        raise CommandError(_where(str(path), broken)) from None
    found: dict[str, tuple[Sequence[Any], Any]] = {}
    for key, group in values.items():
        if key.startswith("_") or not isinstance(group, (list, tuple)):
            continue
        hosts = group[0] if isinstance(group, tuple) and group else group
        data = group[1] if isinstance(group, tuple) and len(group) > 1 else {}
        if not isinstance(hosts, (list, tuple)):
            continue
        for name in map(_name, hosts):
            if isinstance(name, list):
                raise CommandError(
                    f"{path}: a host in {key} must be a name or a tuple, not {name!r}"
                )
        found[key] = (hosts, data)
    return found


def _name(host: Any) -> Any:
    return host[0] if isinstance(host, tuple) and host else host


def _where(path: str, broken: Exception) -> str:
    """The error in a file, with its line number, in one line."""
    if isinstance(broken, SyntaxError):
        path, line, text = broken.filename or path, broken.lineno, broken.msg
    else:
        frames = traceback.extract_tb(broken.__traceback__)
        line = next((frame.lineno for frame in reversed(frames) if frame.filename == path), None)
        text = f"{type(broken).__name__}: {broken}"
    return " ".join(f"{path}{f':{line}' if line else ''}: {text}".split())


def find_inventory(name: str) -> Path:
    """The file of an inventory.

    Raises:
        CommandError: There is no inventory of that name.
    """
    known = sorted(path.stem for path in Path("inventories").glob(FILES))
    if not known:
        folder = Path("inventories").absolute()
        raise CommandError(f"there is no inventory in {folder}: run this in a project's directory")
    if name not in known:
        raise CommandError(
            f"there is no inventory {name!r}: set INVENTORY to one of: {', '.join(known)}"
        )
    return Path("inventories", f"{name}.py")


def hosts_of(inventory: Path) -> list[str]:
    """Names of the hosts of a non-empty inventory.

    Raises:
        CommandError: It has no hosts.
    """
    hosts = inventory_hosts(inventory)
    if not hosts:
        raise CommandError(f"{inventory} has no hosts yet: add some to its groups")
    return hosts


def is_container(host: str) -> bool:
    """Whether a host, or a pattern of hosts, stands for containers."""
    named = parse(host)
    return named is not None and named.container


def is_machine(host: str) -> bool:
    """Whether a host, or a pattern of hosts, stands for machines on this host."""
    named = parse(host)
    return named is not None and not named.container


def is_pattern(host: str) -> bool:
    """Whether it stands for any number of machines or containers."""
    named = parse(host)
    return named is not None and named.is_pattern


def deploy_file(inventory: Path) -> str:
    """The deploy of an inventory: deploy_NAME.py if it exists, else deploy.py."""
    own = Path(f"deploy_{inventory.stem}.py")
    return str(own) if own.is_file() else "deploy.py"


# Groups, data and limits -----------------------------------------------------------------------


def group_data(path: Path) -> dict[str, Any]:
    """The data in a file of group data: its assignments, without its imports."""
    values = execute(path)
    imports = (node for node in ast.parse(path.read_bytes()).body if hasattr(node, "names"))
    imported = {
        alias.asname or alias.name.split(".")[0] for node in imports for alias in node.names
    }
    names = values.get("__all__") or set(values) - imported
    return {name: values[name] for name in names if not name.startswith("__")}


def read(path: Path, wanted: Callable[[str], bool] = lambda host: True) -> Inventory:
    """The selected hosts of an inventory file, with their groups and data.

    Raises:
        CommandError: A file cannot be executed, or pyinfra rejects the inventory.
    """
    # This import takes as long as everything else, and most verbs do not need it.
    from pyinfra.api.exceptions import PyinfraError
    from pyinfra.api.inventory import Inventory
    from pyinfra.context import ctx_inventory

    groups = {
        key: ([host for host in hosts if wanted(str(_name(host)))], dict(data))
        for key, (hosts, data) in _groups(path).items()
        if isinstance(data, dict)
    }
    everyone, data = groups.pop("all", ([], {}))
    names = (host for hosts, _ in groups.values() for host in hosts)
    everyone = everyone or list(dict.fromkeys(_name(host) for host in names))
    groups.setdefault(path.stem, (everyone, {}))
    try:
        ctx_inventory.set(Inventory((everyone, data), **groups))
        for file in _data_files(path):
            try:
                values = group_data(file)
            except Exception as broken:
                raise CommandError(_where(str(file), broken)) from None
            (data if file.stem == "all" else groups.setdefault(file.stem, ([], {}))[1]).update(
                values
            )
        return Inventory((everyone, data), **groups)
    except PyinfraError as broken:
        raise CommandError(f"{path}: {' '.join(str(broken).split())}") from None


def host_names(inventory: Inventory) -> list[str]:
    """Names of the hosts, as pyinfra calls them; `parse` understands them."""
    named = ((host.name, meaning(host)) for host in inventory)
    return [found.called if found else name for name, found in named]


def setting(path: Path, key: str) -> dict[str, Any]:
    """The values of a key by the names of hosts, in an inventory file and its group data.

    Raises:
        CommandError: As `read`.
    """
    if not _is_set(path, key):  # Reading all data takes a while.
        return {}
    values = ((host.name, host.data.get(key)) for host in read(path))
    found = {name: value for name, value in values if value}
    # Which `orbctl` lists machines may not have been chosen yet.
    from pyinfra_orbstack.inventory import list_machines

    list_machines.cache.clear()
    return found


def _is_set(path: Path, key: str) -> bool:
    """Whether the inventory, or any group data beside it, sets a key for any host."""
    for hosts, data in _groups(path).values():
        own = (host[1] for host in hosts if isinstance(host, tuple) and len(host) > 1)
        if any(isinstance(one, dict) and key in one for one in (data, *own)):
            return True
    return any(_may_set(file, key) for file in _data_files(path))


def _may_set(file: Path, key: str) -> bool:
    try:
        return key in group_data(file)
    except Exception:  # it needs pyinfra's inventory, or a secret of another inventory
        return key.encode() in file.read_bytes()


def _data_files(path: Path) -> list[Path]:
    """The files of group data that pyinfra reads with an inventory."""
    return [*Path("group_data").glob(FILES), *path.parent.glob(f"group_data/{FILES}")]


def limited(inventory: Inventory, path: Path, limit: str) -> list[str]:
    """Names of the hosts that a limit selects: groups, hosts or patterns of hosts.

    Raises:
        CommandError: One of its words selects nothing; pyinfra would ignore that.
    """
    words = re.split(r"[\s,]+", limit.strip(" \t\n,"))
    chosen: dict[str, None] = {}
    for word in words:
        members = inventory.groups.get(word) or [
            host for host in inventory if fnmatch(host.name, word)
        ]
        if not members:
            # Those with a slash are names of single hosts.
            groups = ", ".join(sorted(one for one in inventory.groups if "/" not in one))
            hosts = ", ".join(host.name for host in inventory)
            raise CommandError(
                f"LIMIT {word!r} matches nothing in {path}; use groups: {groups}; or hosts: {hosts}"
            )
        chosen.update((host.name, None) for host in members)
    return [name for name in host_names(inventory) if name in chosen]


def limit_words(hosts: Sequence[str]) -> list[str]:
    """`pyinfra` arguments that select only these hosts."""
    return [word for host in hosts for word in ("--limit", _exactly(host))]


def _exactly(host: str) -> str:
    """A pattern for only this host, which pyinfra cannot mistake for the name of a group.

    A connector's own name, and a pattern, remain unchanged: they stand for what is found later.
    """
    if (host.startswith("@") and "/" not in host) or is_pattern(host):
        return host
    return f"[{host[0]}]{glob.escape(host[1:])}" if host[:1].isalnum() else glob.escape(host)
