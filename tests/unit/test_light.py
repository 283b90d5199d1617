"""What replaces slow parts of the standard library does the same."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys

import pytest

from orbctl_simulator.light import is_name, sha256, suppress


@pytest.mark.parametrize("text", ["", "a", "A-1", "-a", ".a", "a/b", "a\n", "é", "_a", "a_.-9"])
def test_names(text: str) -> None:
    assert is_name(text) == bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", text))


def test_digests() -> None:
    assert sha256(b"text").hexdigest() == hashlib.sha256(b"text").hexdigest()


def test_suppress() -> None:
    with suppress(OSError):
        raise FileNotFoundError
    with pytest.raises(ValueError, match="text"), suppress(OSError, KeyError):
        raise ValueError("text")


def test_create_loads_no_slow_modules() -> None:
    """Each of them takes longer to load than the code of `create`."""
    slow = "contextlib enum hashlib re signal socket subprocess"
    code = "import sys; from orbctl_simulator import creating, lifecycle, booted, supervisor\n"
    code += f"print(*{{*sys.modules}} & {{*'{slow}'.split()}})"
    answer = subprocess.run([sys.executable, "-IS", "-c", f"{_PATH}{code}"], capture_output=True)
    assert (answer.stdout, answer.stderr) == (b"\n", b"")


_PATH = f"import sys; sys.path[:0] = {[path for path in sys.path if path.endswith('src')]!r}\n"
