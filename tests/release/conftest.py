from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ..conftest import ROOT

# The tools need Python 3.10.
collect_ignore_glob = ["test_*"] if sys.version_info < (3, 10) else []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.release)
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(scope="session")
def scripts() -> Iterator[Any]:
    """The scripts in scripts/, which is not a package."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(ROOT / "scripts"))
    # Checking all types again would take a minute.
    patch.setenv("MYPY_CACHE_DIR", str(ROOT / ".mypy_cache"))
    for name in ("MAKEFLAGS", "MAKELEVEL", "VIRTUAL_ENV", "UV_PYTHON", "ITEM", "VERSION"):
        patch.delenv(name, raising=False)
    import checkout
    import measure
    import rehearsal
    import release_check

    yield type(
        "Scripts",
        (),
        {
            **vars(release_check),
            **vars(checkout),
            "rehearsal": rehearsal,
            "measure": measure,
            "release_check": release_check,
        },
    )
    patch.undo()
