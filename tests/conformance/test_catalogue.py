"""Every behavior in the catalogue has a test, or a reason why it has none."""

from __future__ import annotations

from pathlib import Path

import pytest

from .catalogue import BEHAVIOURS, CANNOT, SECTIONS
from .report import ids


def known_ids() -> set[str]:
    names: set[str] = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if "def test_" in line or 'id="' in line:
                names.update(ids(line))
    return names


def test_every_id_has_a_test_or_a_reason() -> None:
    assert sorted(set(BEHAVIOURS) - known_ids() - set(CANNOT)) == []
    assert sorted(known_ids() & set(CANNOT)) == []
    assert {word[0] for word in BEHAVIOURS} == set(SECTIONS)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("test_x[session-Q1_single_quotes]", ["Q1"]),
        ("test_E9_E13_login_shells", ["E9", "E13"]),
        ("test_sizes[F3_64KiB]", ["F3"]),
        ("test_HTTP2_X99", []),
    ],
)
def test_ids_are_parsed_from_names(name: str, found: list[str]) -> None:
    assert ids(name) == found
