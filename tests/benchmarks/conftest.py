"""Tests of the benchmarks leave the published numbers alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.report import DATA


@pytest.fixture(autouse=True)
def published_numbers() -> Iterator[None]:
    before = DATA.read_bytes()
    yield
    assert DATA.read_bytes() == before, f"the test changed {DATA}: pass --data"
