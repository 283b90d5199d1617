"""cloud-init's data for a machine, where its data source NoCloud finds it without a network."""

from __future__ import annotations

import contextlib
import os
import stat

from .state import Caller, Failure, why
from .trees import Descent

_MOST = 1 << 20
_SEED = "var/lib/cloud/seed/nocloud"
_CONFIG = "etc/cloud/cloud.cfg.d"
# cloud-init must not look for other sources or addresses: the machine already has its network. An
# image without language packages cannot have cloud-init's own choice of a locale.
_LIMITS = """\
# Written by the simulator. Its data for cloud-init is in /var/lib/cloud/seed/nocloud.
datasource_list: [ NoCloud, None ]
network: { config: disabled }
locale: C.UTF-8
"""


def read_user_data(path: str) -> bytes:
    """A file of the caller, read with the caller's rights."""
    try:
        with Caller():
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise Failure(f"{path}: {why(error).lower()}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise Failure(f"{path}: not a file")
    with open(fd, "rb") as file:
        data = file.read(_MOST + 1)
    if len(data) > _MOST:
        raise Failure(f"{path}: larger than {_MOST >> 20} MB")
    return data


def put_seed(root: int, user_data: bytes | None, ident: str, name: str) -> None:
    """Write it below an open directory, a machine's root or its upper layer; follows no links.

    Each machine has its own `ident`, also a clone: cloud-init runs once for each.
    """
    meta = f"instance-id: {ident}\nlocal-hostname: {name}\n".encode()
    with contextlib.closing(Descent(root, make=True)) as descent:
        seed = descent.to(_SEED.split("/"))
        if user_data is not None:
            _write(seed, "user-data", user_data, 0o600)
        _write(seed, "meta-data", meta, 0o644)
        config = descent.to(_CONFIG.split("/"))
        _write(config, "99-orbctl-simulator.cfg", _LIMITS.encode(), 0o644)


def _write(folder: int, name: str, data: bytes, mode: int) -> None:
    """Write a new file, replacing whatever has its name."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with open(os.open(name, flags, mode, dir_fd=folder), "wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(data)
