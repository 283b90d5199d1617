"""Facts in pyinfra's own data files: their commands, and how they parse the output."""

from __future__ import annotations

from pathlib import Path

from ..data_files import calls_alone, make_fact_tests

__all__ = ["calls_alone"]

for _folder in sorted(Path(__file__).parent.glob("orbstack.*")):
    _tests = make_fact_tests("pyinfra_orbstack.facts", _folder.name, _folder)
    globals()[f"Test{_folder.name}"] = _tests
