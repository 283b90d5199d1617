"""Signals in a separate Python: what is called, what is postponed, and how it exits."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

FIRST = """
import os, signal, sys, time, gevent, gevent.event
from pyinfra_orbstack import interrupts, process
interrupts.watch()
def say(word):
    os.write(1, word.encode() + b"\\n")
"""


class Program:
    """Running Python code, and its output."""

    def __init__(self, code: str, *, before: str = "", patched: bool = False) -> None:
        patch = "from gevent import monkey; monkey.patch_all()\n" if patched else ""
        self.process = subprocess.Popen(
            [sys.executable, "-c", patch + before + FIRST + textwrap.dedent(code)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def wait_for(self, word: str) -> None:
        assert self.process.stdout
        assert self.process.stdout.readline().decode().strip() == word

    def kill(self, *signals: int, pause: float = 0.0) -> None:
        for number in signals:
            self.process.send_signal(number)
            time.sleep(pause)

    def end(self) -> tuple[int, list[str], str]:
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out.decode().split(), err.decode()


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_callbacks_run_first_and_their_processes_finish(
    tmp_path: Path, number: int, patched: bool
) -> None:
    """Whatever follows: other signals, or the exit of this process."""
    code = f"""
        def begin():
            say("called")
            process.Detached(["sh", "-c", "sleep 0.5; echo >{tmp_path / "done"}"])

        def work():
            with interrupts.at_interrupt(begin), interrupts.interruptible():
                say("ready")
                gevent.sleep(60)

        gevent.spawn(work).join()
    """
    program = Program(code, patched=patched)
    program.wait_for("ready")
    program.kill(number)
    # Python handles simultaneous signals by number, not in order of arrival.
    program.wait_for("called")
    program.kill(number, signal.SIGINT, pause=0.02)
    status = program.end()[0]
    assert status == (-signal.SIGTERM if number == signal.SIGTERM else status)
    assert status != 0
    deadline = time.monotonic() + 20
    while not (tmp_path / "done").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_during_a_callback_does_not_change_the_exit_status(number: int) -> None:
    code = """
        def slow():
            say("called")
            time.sleep(0.3)

        with interrupts.at_interrupt(slow):
            say("ready")
            gevent.sleep(60)
    """
    program = Program(code)
    program.wait_for("ready")
    program.kill(number)
    program.wait_for("called")
    program.kill(signal.SIGINT)
    assert program.end()[0] == -number


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_terminated_process_waits_for_its_children(tmp_path: Path, number: int) -> None:
    code = f"""
        start = lambda: process.Detached(["sh", "-c", "sleep 0.5; echo >{tmp_path / "done"}"])
        with interrupts.at_interrupt(start):
            say("ready")
            gevent.sleep(60)
    """
    program = Program(code)
    program.wait_for("ready")
    program.kill(number)
    assert program.end() == (-number, [], "")
    assert (tmp_path / "done").exists()


def test_greenlets_are_interrupted_once() -> None:
    """A second Ctrl-C does not interrupt their cleanup."""
    code = """
        def work(number):
            try:
                with interrupts.interruptible():
                    if number == 2:
                        say("ready")
                    gevent.sleep(60)
            except interrupts.Interrupted:
                pass

        def careful():
            with interrupts.interruptible():
                try:
                    gevent.sleep(60)
                except interrupts.Interrupted:
                    second.wait(30)
                    gevent.sleep(0.1)
                    say("cleaned-up")

        second = gevent.event.Event()
        jobs = [gevent.spawn(careful), *(gevent.spawn(work, number) for number in range(3))]
        try:
            gevent.joinall(jobs)
        except KeyboardInterrupt:
            pass
        gevent.spawn_later(0, say, "waits")
        try:
            gevent.joinall(jobs)
        except KeyboardInterrupt:
            say("main")
        second.set()
        gevent.joinall(jobs)
    """
    program = Program(code)
    program.wait_for("ready")
    program.kill(signal.SIGINT)
    program.wait_for("waits")
    program.kill(signal.SIGINT)
    assert program.end()[:2] == (0, ["main", "cleaned-up"])


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 1), (signal.SIGTERM, -15), (signal.SIGHUP, -1)]
)
def test_a_shield_postpones_all_interrupts(number: int, status: int) -> None:
    code = """
        def work():
            with interrupts.shielded():
                say("ready")
                gevent.sleep(0.7)
                say("whole")
            gevent.sleep(60)

        try:
            gevent.spawn(work).join()
        except KeyboardInterrupt:
            say("main")
            sys.exit(1)
    """
    program = Program(code)
    program.wait_for("ready")
    program.kill(number, number, pause=0.1)
    main = ["main"] if number == signal.SIGINT else []
    assert program.end()[:2] == (status, ["whole", *main])


def test_a_shield_in_the_main_greenlet() -> None:
    code = """
        try:
            with interrupts.shielded():
                say("ready")
                for _ in range(3000):
                    gevent.sleep(0.01)
                    if interrupts._postponed:
                        break
                say("whole")
            say("never")
        except KeyboardInterrupt:
            say("main")
    """
    program = Program(code)
    program.wait_for("ready")
    program.kill(signal.SIGINT)
    assert program.end() == (0, ["whole", "main"], "")


def test_unawaited_hosts_clean_up_before_exit() -> None:
    code = """
        def work():
            with interrupts.interruptible():
                try:
                    say("ready")
                    gevent.sleep(60)
                except interrupts.Interrupted:
                    say(str(process.run(["sh", "-c", "sleep 0.3; exit 7"]).returncode))

        gevent.spawn(work)
        gevent.sleep(1)
        sys.exit(5)
    """
    assert Program(code).end() == (5, ["ready", "7"], "")


def test_interpreter_exit_is_an_interrupt(tmp_path: Path) -> None:
    code = f"""
        start = lambda: process.Detached(["sh", "-c", "sleep 0.3; echo >{tmp_path / "done"}"])

        def work():
            with interrupts.at_interrupt(start):
                gevent.sleep(60)

        gevent.spawn(work)
        gevent.sleep(0.1)
        raise ValueError("an error of somebody else")
    """
    assert Program(code).end()[0] == 1
    deadline = time.monotonic() + 20
    while not (tmp_path / "done").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_ignored_signals_stay_ignored(number: int) -> None:
    before = f"import signal; signal.signal({int(number)}, signal.SIG_IGN)\n"
    code = """
        with interrupts.at_interrupt(lambda: say("called")):
            say("ready")
            gevent.sleep(0.5)
            say("end")
    """
    program = Program(code, before=before)
    program.wait_for("ready")
    program.kill(number)
    assert program.end() == (0, ["end"], "")


def test_signal_handlers_of_others_are_kept() -> None:
    before = """if True:
        import signal
        seen = []
        def theirs(*_):
            seen.append(1)
            say("theirs")
        signal.signal(signal.SIGTERM, theirs)
    """
    code = """
        say("ready")
        for _ in range(3000):
            gevent.sleep(0.01)
            if seen:
                break
        say("end")
    """
    program = Program(code, before=before)
    program.wait_for("ready")
    program.kill(signal.SIGTERM)
    assert program.end() == (0, ["theirs", "end"], "")


def test_greenlets_of_other_threads_are_interrupted() -> None:
    code = """
        import threading

        def work():
            try:
                with interrupts.interruptible():
                    gevent.sleep(60)
            except interrupts.Interrupted:
                say("interrupted")

        def both():
            worker = gevent.spawn(work)
            gevent.spawn_later(0.5, say, "ready")  # once all are asleep
            worker.join()

        thread = threading.Thread(target=both)
        thread.start()
        try:
            gevent.sleep(60)
        except KeyboardInterrupt:
            say("main")
        thread.join()
    """
    program = Program(code)
    program.wait_for("ready")
    program.kill(signal.SIGINT)
    status, said, _ = program.end()
    assert (status, sorted(said)) == (0, ["interrupted", "main"])


def test_a_callback_that_fails_does_not_stop_the_others() -> None:
    code = """
        with interrupts.at_interrupt(lambda: 1 / 0), interrupts.at_interrupt(lambda: say("called")):
            try:
                say("ready")
                gevent.sleep(60)
            except KeyboardInterrupt:
                say("main")
    """
    program = Program(code)
    program.wait_for("ready")
    program.kill(signal.SIGINT)
    assert program.end()[:2] == (0, ["called", "main"])


@pytest.mark.parametrize("end", ["exit", "terminate", "interrupt"])
def test_a_fork_does_not_interrupt_the_original(end: str) -> None:
    code = f"""
        called = []
        with interrupts.at_interrupt(lambda: called.append(os.write(1, b"called\\n"))):
            pid = os.fork()
            if not pid:
                if "{end}" == "exit":
                    sys.exit(0)
                time.sleep(60)
            time.sleep(0.3)
            if "{end}" != "exit":
                os.kill(pid, signal.SIGTERM if "{end}" == "terminate" else signal.SIGINT)
            print(os.waitpid(pid, 0)[1] != 0)
    """
    status, said, _ = Program(code).end()
    assert (status, said) == (0, [str(end != "exit")])
