"""pyinfra-testing, imported without changing the test process.

It needs a function of pyinfra's command line, whose import patches the whole process for gevent.
pytest-xdist, which has started by then, would not survive that.
"""

from __future__ import annotations

from unittest import mock

import pytest

from pyinfra_orbstack import shelltext

with mock.patch("gevent.monkey.patch_all"):
    pytest.importorskip("pyinfra_testing", reason="pyinfra-testing needs Python 3.10")
    from pyinfra_testing.facts import make_fact_tests
    from pyinfra_testing.operations import make_operation_tests

__all__ = ["calls_alone", "make_fact_tests", "make_operation_tests"]


@pytest.fixture(autouse=True)
def calls_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The data files contain the calls; the called functions have their own tests."""
    monkeypatch.setattr(shelltext, "command", lambda call: call)
