from __future__ import annotations

import pytest

from ..conftest import ROOT


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if ROOT / "tests" / "hosts" in item.path.parents:
            item.add_marker(pytest.mark.hosts)
            # One of them waits until another has restored a setting of the kernel.
            item.add_marker(pytest.mark.timeout(1800))
