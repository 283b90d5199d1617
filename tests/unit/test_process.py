"""Local processes, where gevent has patched Python as the pyinfra command has it done."""

from __future__ import annotations

import subprocess
import sys

PATCH = "from gevent import monkey; monkey.patch_all()\nimport time, gevent\n"
PATCH += "from pyinfra_orbstack.process import Child\nbegun = time.monotonic()\n"


def patched(code: str) -> str:
    """Run code in a patched Python and return what it prints."""
    command = [sys.executable, "-c", PATCH + code]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout


def test_a_process_sees_the_end_of_its_input_at_once() -> None:
    code = """
child = Child(["cat"])
child.write(b"text")
child.read()
begun = time.monotonic()
child.close_stdin()
print(child.wait(5), time.monotonic() - begun < 2)
"""
    assert patched(code) == "0 True\n"


def test_a_process_that_does_not_read_can_be_ended_while_it_is_written_to() -> None:
    code = """
child = Child(["sleep", "30"])
writer = gevent.spawn(child.try_write, b"x" * 1_000_000)
gevent.sleep(0.2)
child.end()
writer.join(5)
print(writer.value, child.wait(5), time.monotonic() - begun < 5)
other = Child(["cat"])
other.write(b"text")
print(other.read(5))
"""
    assert patched(code) == "False -9 True\n(1, b'text')\n"
