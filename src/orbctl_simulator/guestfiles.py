"""Files that a booted machine's init expects; written as the machine's root, in its own files."""

from __future__ import annotations

import os

from . import guest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .bootplan import Plan

# Files left by container images; the second one keeps packages from starting their services.
_CONTAINER_MARKS = ("/.dockerenv", "/usr/sbin/policy-rc.d")
# The services that a minimal Debian or Ubuntu enables.
_MINIMAL_UNITS = {
    *("apt-daily-upgrade.timer", "apt-daily.timer", "dpkg-db-backup.timer", "e2scrub_all.timer"),
    *("e2scrub_reap.service", "fstrim.timer", "getty@tty1.service", "motd-news.timer"),
    *("remote-fs.target", "systemd-pstore.service"),
}
_LEVELS = ("rc2.d", "rc3.d", "rc4.d", "rc5.d", "rcS.d")
_MINIMAL_SCRIPTS = {"dbus", "hwclock.sh", "procps", "sudo"}
_UNITS = "/etc/systemd/system"
_MACHINE_ID, _DBUS_ID = "/etc/machine-id", "/var/lib/dbus/machine-id"


def set_up(plan: Plan) -> None:
    if plan.is_new:
        guest.prepare(plan.name, plan.fields["user"], "")
        for path in _CONTAINER_MARKS:
            _remove(path)
        if "/" in plan.lowers:
            _leave_hosts_services()
        _mark_as_updated()
    if plan.is_first_boot:
        _renew_identity()


def replace(files: dict[str, str]) -> None:
    """Write files, replacing whatever has these names."""
    for path, text in files.items():
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        _remove(path)
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        with open(fd, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)


def _remove(path: str) -> None:
    if os.path.lexists(path):
        os.unlink(path)


def _leave_hosts_services() -> None:
    """Start only the services that a minimal installation of the host's distribution starts.

    The host's services, mounts and agents are not meant to run twice.
    """
    for path, kept in ((_UNITS, _MINIMAL_UNITS), ("/etc", _MINIMAL_SCRIPTS)):
        for name in os.listdir(path) if os.path.isdir(path) else ():
            if name.endswith((".wants", ".requires")) or name in _LEVELS:
                for entry in os.listdir(f"{path}/{name}"):
                    is_script = entry[0] == "S" and entry[1:3].isdigit()
                    if (entry[3:] if is_script else entry) not in kept:
                        _remove(f"{path}/{name}/{entry}")
    _remove(f"{_UNITS}/display-manager.service")
    replace({"/etc/fstab": ""})
    if os.path.isdir("/etc/cloud"):
        replace({"/etc/cloud/cloud-init.disabled": ""})


def _renew_identity() -> None:
    """Give a new machine or a clone its own machine id."""
    if os.path.lexists(_MACHINE_ID):
        ident = bytearray(os.urandom(16))
        ident[6], ident[8] = ident[6] & 0x0F | 0x40, ident[8] & 0x3F | 0x80  # as systemd does
        replace({_MACHINE_ID: f"{ident.hex()}\n"})
    if not os.path.islink(_DBUS_ID):
        _remove(_DBUS_ID)


def _mark_as_updated() -> None:
    """Skip systemd's ``ConditionNeedsUpdate=`` updates at each new machine's first boot.

    The image's package manager has already run them: system users, linker cache, catalogs.
    """
    if not os.path.isdir("/usr/lib/systemd"):
        return
    for path in ("/etc/.updated", "/var/.updated"):
        if not os.path.lexists(path):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            newest = os.stat("/usr").st_mtime_ns
            os.utime(path, ns=(newest, newest))
