"""Data of the group `web`, on this computer and in production."""

from __future__ import annotations

# Nobody needs tunnels through a web server.
ssh_tcp_forwarding = False

site_title = "It works"
open_ports = [80]
