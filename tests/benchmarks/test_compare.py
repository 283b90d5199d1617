"""The benchmark itself, just enough to show that it works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report

ROOT = Path(__file__).parents[2]


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="it makes machines of the simulator")
def test_one_round(client: Any, simulated: bool, tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    # A hundredth of the work, and without installing anything.
    words = ["--rounds", "1", "--hosts", "1", "--scale", "0.01", "--contenders", "session,local"]
    words.append("--no-containers")
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compare", *words, "--data", str(data)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    measured = json.loads(data.read_text())
    assert set(measured["commands"]) == {"session", "local", "orbctl run true", "unshare true"}
    assert all(len(times) == 1 for times in measured["deploys"]["1"]["nothing"].values())
    assert report.report(measured).count("`@local`") == 3
    assert [path for path in tmp_path.iterdir() if path != data] == []
