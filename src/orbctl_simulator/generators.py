"""systemd generators that have nothing to do in a machine, and are masked while it boots.

systemd runs all generators before it loads units. Each of these looks for a disk, a parameter of
the kernel or a file that the machine does not have. They are masked in ``/run`` until the machine
is up, so a later ``systemctl daemon-reload`` runs all of them.
"""

from __future__ import annotations

import os

_PLACE = "/run/systemd/system-generators"
# Each with the files that it reads, wherever distros have them. One without a file only acts in an
# initrd, on a disk, or on parameters of the kernel's command line, which machines do not have.
_IDLE = {
    "systemd-cryptsetup-generator": ("/etc/crypttab",),
    "systemd-debug-generator": (),
    "systemd-gpt-auto-generator": (),
    "systemd-hibernate-resume-generator": (),
    "systemd-integritysetup-generator": ("/etc/integritytab",),
    "systemd-rc-local-generator": ("/etc/rc.local", "/etc/rc.d/rc.local", "/etc/init.d/boot.local"),
    "systemd-run-generator": (),
    "systemd-system-update-generator": ("/system-update", "/etc/system-update"),
    "systemd-veritysetup-generator": ("/etc/veritytab",),
}


def mask() -> int:
    """Mask them in this process's root; returns an open directory for `unmask`."""
    os.makedirs(_PLACE, mode=0o755, exist_ok=True)
    for name, paths in _IDLE.items():
        if not any(map(os.path.lexists, paths)):
            os.symlink("/dev/null", f"{_PLACE}/{name}")
    return os.open(_PLACE, os.O_RDONLY | os.O_DIRECTORY)


def unmask(place: int) -> None:
    for name in _IDLE:
        try:  # noqa: SIM105 contextlib is slow to import
            os.unlink(name, dir_fd=place)
        except OSError:
            pass  # it was not masked, or the machine has removed it
    os.close(place)
