"""OrbStack's machines and containers as pyinfra hosts.

The connector registers itself with pyinfra as ``@orbstack``. Import facts and operations from
`pyinfra_orbstack.facts.orbstack` and `pyinfra_orbstack.operations.orbstack`.
"""

# Nothing of pyinfra is imported here: pyinfra 3.2 loads every connector while its own API is
# only half imported.
from __future__ import annotations

__all__ = ["__version__"]


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version

        return version("pyinfra-orbstack")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
