"""The name of `pyinfra_orbstack.cli` before it was a command."""

from __future__ import annotations

import sys

from pyinfra_orbstack.cli import main

if __name__ == "__main__":
    sys.exit(main())
