"""Packages in machines that tests create."""

from __future__ import annotations


def install(*packages: str) -> str:
    """Shell text that installs packages, and spends no time on what only lasting machines need."""
    return f"""
export DEBIAN_FRONTEND=noninteractive
rm -f /var/lib/man-db/auto-update
apt-get -qq update >/dev/null
apt-get -qq install -y --no-install-recommends -o Dpkg::Options::=--force-unsafe-io \\
    {" ".join(packages)} >/dev/null
"""
