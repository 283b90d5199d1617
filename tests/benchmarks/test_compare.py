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
    words = ["--rounds", "1", "--hosts", "1", "--scale", "0.01", "--no-containers"]
    words += ["--contenders", "session,local,floor"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compare", *words, "--data", str(data)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    measured = json.loads(data.read_text())
    assert set(measured["commands"]) == {"session", "local", "orbctl run true", "unshare true"}
    assert all(len(times) == 1 for times in measured["deploys"]["1"]["nothing"].values())
    cpu = measured["cpu"]["1"]["nothing"]
    assert set(cpu) == {"session", "local", "floor"}
    assert all(one > 0 for (one,) in cpu.values())
    again = measured["deploys"]["1"]["100 files.file, no change"]
    assert set(again) == {"session", "local"}  # the floor has nothing to run again on
    assert "| one host, nothing |" in report.report(measured)
    assert [path for path in tmp_path.iterdir() if path != data] == []


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="it makes machines of the simulator")
def test_many_hosts(client: Any, simulated: bool, tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.many", "--hosts=1,2", "--rounds=1", f"--data={data}"],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    measured = json.loads(data.read_text())["many"]
    one, two = (measured[hosts] for hosts in ("1", "2"))
    # The session of a host keeps three files open.
    assert two["files"][0] == one["files"][0] + 3
    assert 0 < one["connected"][0] < one["seconds"][0]
    assert [path for path in tmp_path.iterdir() if path != data] == []
