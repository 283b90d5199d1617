"""Writes the CPU seconds of a Python process, when it ends, to the file named by BENCHMARK_CPU.

Python imports this at its start, if this directory is in PYTHONPATH. From outside, a process's CPU
time is known only with that of its children, which contain the machines here.
"""

from __future__ import annotations

import atexit
import os
import time
from pathlib import Path

# Removed, so that children do not write to it too.
name = os.environ.pop("BENCHMARK_CPU", "")
if name:
    atexit.register(lambda: Path(name).write_text(str(time.process_time())))
