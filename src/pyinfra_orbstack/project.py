"""The name that `pyinfra_orbstack.cli` had before it was a command."""

from __future__ import annotations

import sys

from pyinfra_orbstack.cli import main

if __name__ == "__main__":
    sys.exit(main())
