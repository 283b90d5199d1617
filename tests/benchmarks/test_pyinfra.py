"""The benchmarks of pyinfra's own part run, and find what docs/performance.md says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pyinfra.api.arguments import all_argument_meta
from pyinfra.api.connectors import get_all_connectors

ROOT = Path(__file__).parents[2]


def run(*words: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_group_data_is_copied_for_each_argument() -> None:
    if "fake" not in get_all_connectors():
        pytest.skip("this pyinfra has no @fake")
    _, *lines = run("benchmarks/group_data.py").splitlines()
    copies = {int(line.split()[2]) for line in lines}
    # A host with a connector's name is in its groups twice.
    assert copies == {2 * len(all_argument_meta)}


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="it makes machines of the simulator")
def test_shares_of_the_cpu_time(client: Any, simulated: bool, tmp_path: Path) -> None:
    data, temporary = tmp_path / "data.json", tmp_path / "temporary"
    temporary.mkdir()
    words = ["-m", "benchmarks.pyinfra_cost", "--hosts", "1", "--operations", "5"]
    words += ["--data", str(data)]
    shares = re.findall(r"\| (\d+) % \|", run(*words, TMPDIR=str(temporary)))
    assert len(shares) == 10
    assert 196 <= sum(map(int, shares)) <= 204
    assert list(json.loads(data.read_text())["pyinfra_cost"]["deploys"]) == [
        "5 x shell",
        "5 x file",
    ]
    assert list(temporary.iterdir()) == []
