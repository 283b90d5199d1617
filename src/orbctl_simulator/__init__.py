"""`orbctl` for Linux: machines without OrbStack.

Nothing of pyinfra is imported here, nor anything that is slow to load on the way to
``orbctl-simulator run``: that command is called for every command of a deploy.
"""

from __future__ import annotations
