"""Files that a booted machine's init expects; written as the machine's root, in its own files."""

from __future__ import annotations

import os

from . import guest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .bootplan import Plan

_MACHINE_ID, _DBUS_ID = "/etc/machine-id", "/var/lib/dbus/machine-id"


def set_up(plan: Plan) -> None:
    if plan.is_new:
        guest.prepare(plan.name, plan.fields["user"])
        _mark_as_updated()
    if plan.is_first_boot:
        _renew_identity()
    guest.set_hostname(plan.name)


def replace(files: dict[str, str]) -> None:
    """Write files, replacing whatever has these names."""
    for path, text in files.items():
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        if os.path.lexists(path):
            os.unlink(path)
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        with open(fd, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)


def _renew_identity() -> None:
    """Give a new machine, or a copy, its own id."""
    if os.path.lexists(_MACHINE_ID):
        ident = bytearray(os.urandom(16))
        ident[6], ident[8] = ident[6] & 0x0F | 0x40, ident[8] & 0x3F | 0x80  # as systemd does
        replace({_MACHINE_ID: f"{ident.hex()}\n"})
    if os.path.isfile(_DBUS_ID) and not os.path.islink(_DBUS_ID):
        os.unlink(_DBUS_ID)


def _mark_as_updated() -> None:
    """Spare systemd the updates of ``ConditionNeedsUpdate=`` at each new machine's first boot.

    The image's package manager has already run them: system users, linker cache, catalogs.
    """
    if not os.path.isdir("/usr/lib/systemd"):
        return
    for path in ("/etc/.updated", "/var/.updated"):
        if not os.path.lexists(path):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            newest = os.stat("/usr").st_mtime_ns
            os.utime(path, ns=(newest, newest))
