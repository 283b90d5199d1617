"""Operations in pyinfra's own data files: the commands they yield for given facts."""

from __future__ import annotations

from pathlib import Path

from ..data_files import calls_alone, make_operation_tests

__all__ = ["calls_alone"]

for _folder in sorted(one for one in Path(__file__).parent.glob("*.*") if one.is_dir()):
    _tests = make_operation_tests("pyinfra_orbstack.operations", _folder.name, _folder)
    globals()[f"Test{_folder.name}"] = _tests
