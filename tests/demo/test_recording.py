"""The picture in README, as far as it can be tested without the demo."""

from __future__ import annotations

import doctest
import runpy
import xml.etree.ElementTree as ElementTree

from ..conftest import ROOT

PROGRAM = runpy.run_path(str(ROOT / "scripts" / "record_demo.py"))


def texts(svg: str) -> list[str]:
    root = ElementTree.fromstring(svg)  # noqa: S314
    return ["".join(one.itertext()) for one in root.iter("{http://www.w3.org/2000/svg}text")]


def test_examples_in_docstrings() -> None:
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    for name in ("in_time", "keep_spaces"):
        for test in finder.find(PROGRAM[name], name, globs=PROGRAM):
            runner.run(test)
    assert (runner.tries, runner.failures) == (2, 0)


def test_lines_appear_in_order_and_long_ones_are_truncated() -> None:
    lines = [(0.0, "$ make demo"), (0.5, "  <two>"), (9.0, ""), (9.1, "x" * 200)]
    svg = PROGRAM["draw"](lines)
    assert texts(svg) == ["$\xa0make\xa0demo", "<two>", "x" * 99 + "…"]
    # The numbers of lines shown after 0, 0.5, 1.5 and 1.6 of 7.6 seconds.
    for step in (
        "0.000% { transform: translateY(18px) }",
        "6.579% { transform: translateY(36px) }",
        "19.737% { transform: translateY(54px) }",
        "21.053% { transform: translateY(72px) }",
    ):
        assert step in svg


def test_the_readme_picture_shows_the_whole_demo() -> None:
    shown = texts((ROOT / "docs" / "demo.svg").read_text(encoding="utf-8"))
    assert shown[0] == "$\xa0make\xa0demo"
    assert shown[-1] == "make\xa0clean"
    assert any("the\xa0second\xa0none" in line for line in shown)
