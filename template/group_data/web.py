"""Data of the group `web`, in all inventories."""

from __future__ import annotations

# Web servers do not need SSH tunnels.
ssh_tcp_forwarding = False

site_title = "It works"
open_ports = [80]
