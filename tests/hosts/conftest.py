from __future__ import annotations

import pytest

from ..conftest import ROOT


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if ROOT / "tests" / "hosts" in item.path.parents:
            item.add_marker(pytest.mark.hosts)
