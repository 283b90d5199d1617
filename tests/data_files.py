"""pyinfra-testing, imported so that the test process stays as it is.

It needs a function of pyinfra's command line, whose import patches the whole process for gevent;
pytest-xdist, which has begun by then, would not survive that.
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
    """The data files hold the calls; the functions that are called have tests of their own."""
    monkeypatch.setattr(shelltext, "command", lambda call: call)
