"""Local processes, with gevent's patches, as in pyinfra's command, and without."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import gevent
import pytest

from pyinfra_orbstack import launch, process
from pyinfra_orbstack.process import STDERR, STDOUT, Child

PATCH = "from gevent import monkey; monkey.patch_all()\nimport time, gevent\n"
PATCH += "from pyinfra_orbstack.process import Child\nbegun = time.monotonic()\n"


def patched(code: str) -> str:
    """Run code in a patched Python and return its output."""
    command = [sys.executable, "-c", PATCH + code]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout


def test_a_process_sees_the_end_of_input_immediately() -> None:
    code = """
child = Child(["cat"])
child.write(b"text")
child.read()
begun = time.monotonic()
child.close_stdin()
print(child.wait(5), time.monotonic() - begun < 2)
"""
    assert patched(code) == "0 True\n"


def test_a_process_that_does_not_read_can_be_killed_during_a_write() -> None:
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


PLAIN = "import os, sys, signal, time, gevent\nfrom pyinfra_orbstack import process\n"


def python(code: str, *, patched: bool = False, **options: Any) -> str:
    """Run code in a separate Python and return its output."""
    first = "from gevent import monkey; monkey.patch_all()\n" if patched else ""
    command = [sys.executable, "-c", first + PLAIN + textwrap.dedent(code)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=60, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_status_streams_and_stdin() -> None:
    done = process.run(["sh", "-c", "cat; echo err >&2; exit 3"], stdin=b"in")
    assert done == (3, b"in", b"err\n")
    assert process.run(["sh", "-c", "kill -9 $$"]).returncode == 137


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["/no/such/program"], "No such file"),
        (["no-such-program"], "No such file"),
        (["/etc"], "Permission denied"),
        (["true", "a\0b"], "a command line cannot contain this argument"),
        (["true", "\ud800"], "a command line cannot contain this argument"),
    ],
)
def test_processes_that_cannot_be_started(words: list[str], reason: str) -> None:
    with pytest.raises(OSError, match=reason):
        process.run(words)
    with pytest.raises(OSError, match=reason):
        process.Child(words).end()


@pytest.mark.parametrize(
    ("content", "reason"),
    [("", "Exec format"), ("text", "Exec format"), ("#!/no/such/interpreter\n", "No such file")],
)
def test_files_that_are_not_executable(tmp_path: Path, content: str, reason: str) -> None:
    program = tmp_path / "program"
    program.write_text(content)
    with pytest.raises(PermissionError):
        process.run([str(program)])
    program.chmod(0o755)
    with pytest.raises(OSError, match=reason):
        process.run([str(program)])


@pytest.mark.parametrize(
    "magic", ["7f454c46", "cffaedfe", "cafebabe", "feedfacf"], ids=["ELF", "Mach-O", "fat", "BE"]
)
def test_formats_of_executables_are_left_to_the_system(tmp_path: Path, magic: str) -> None:
    """macOS's too: its `orbctl` would otherwise be taken for a script."""
    program = tmp_path / "program"
    program.write_bytes(bytes.fromhex(magic) + b"\0" * 60)
    program.chmod(0o755)
    launch._check_program(str(program), os.environ)


def test_a_program_that_exits_with_127() -> None:
    text = "echo 'sh: 1: something: not found' >&2; exit 127"
    assert process.run(["sh", "-c", text]).returncode == 127


def test_a_lost_exit_status_is_reported_as_unknown() -> None:
    """The shell in between is killed, and only it knew the status."""
    with pytest.raises(OSError, match="its exit status is unknown"):
        process.run(["sh", "-c", "kill -9 $PPID"])
    child = Child(["true"])
    os.waitpid(child.pid, 0)
    with pytest.raises(OSError, match="its exit status is unknown"):
        child.wait(5)
    child.end()


OTHERS = """
    import asyncio, multiprocessing, subprocess, threading

    def forked(code):
        pid = os.fork()
        if not pid:
            time.sleep(0.3)
            os._exit(code)
        return pid

    def in_thread(found):
        found.append(subprocess.run(["sh", "-c", "sleep 0.3; exit 4"]).returncode)

    async def later():
        one = await asyncio.create_subprocess_exec("sh", "-c", "sleep 0.3; exit 7")
        process.run(["true"])
        return await one.wait()

    {before}
    process.run(["true"])
    popen = subprocess.Popen(["sh", "-c", "sleep 0.3; exit 3"])
    found = []
    thread = threading.Thread(target=in_thread, args=(found,))
    thread.start()
    pid = forked(5)
    fork = multiprocessing.get_context("fork")
    worker = fork.Process(target=lambda: (time.sleep(0.3), sys.exit(6)))
    worker.start()
    child = process.Child(["sleep", "30"])
    assert process.run(["sh", "-c", "sleep 0.6; exit 9"]).returncode == 9
    child.end()
    thread.join()
    worker.join()
    status = os.waitpid(pid, 0)[1]
    print(popen.wait(), found[0], os.WEXITSTATUS(status), worker.exitcode, asyncio.run(later()))
"""


def test_the_programs_other_processes_are_left_alone() -> None:
    assert python(OTHERS.format(before="")) == "3 4 5 6 7\n"


LOCAL = """
    from pyinfra.api import Config, Inventory, State
    from pyinfra.api.connect import connect_all
    state = State(Inventory((["@local"], {})), Config())
    connect_all(state)
    (host,) = state.inventory

    def ours(code):
        return process.run(["sh", "-c", f"exit {code}"]).returncode

    def local(code):
        return host.run_shell_command(f"exit {code}", _success_exit_codes=[code])[0]

    early = process.Child(["sleep", "60"])
    results = [ours(1)]
    jobs = [gevent.spawn(ours, n % 3) for n in range(60)]
    others = [gevent.spawn(local, n % 3) for n in range(60)]
    gevent.joinall(jobs + others)
    results += [ours(2), early.gone, [job.value for job in jobs] == [n % 3 for n in range(60)]]
    results += [all(job.value for job in others), local(3), ours(3)]
    os.kill(early.pid, signal.SIGKILL)
    gevent.sleep(0.5)
    results.append(early.gone)
    early.end()
    print(*results)
"""


@pytest.mark.long
@pytest.mark.parametrize("patched", [False, True])
def test_pyinfras_local_in_the_same_process(patched: bool) -> None:
    """It makes gevent reap all children, ours too: their statuses are still correct."""
    assert python(LOCAL, patched=patched).endswith("1 2 False True True True 3 True\n")


@pytest.mark.parametrize("patched", [False, True])
def test_worker_threads(patched: bool) -> None:
    code = """
        import threading
        found = []

        def work(number):
            for _ in range(20):
                found.append(process.run(["sh", "-c", f"exit {number}"]).returncode == number)
            child = process.Child(["cat"])
            child.write(b"x")
            found.append(child.read(5) == (1, b"x"))
            child.end()

        threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        print(len(found), all(found))
    """
    assert python(code, patched=patched) == "126 True\n"


def test_a_slow_process_blocks_no_other_host() -> None:
    code = """
        ticks = []
        def tick():
            while True:
                ticks.append(1)
                gevent.sleep(0.01)
        gevent.spawn(tick)
        counts = []
        process.run(["sleep", "2"])
        counts.append(len(ticks))
        ticks.clear()
        one = process.Detached(["sleep", "2"])
        one.result(30)
        counts.append(len(ticks))
        ticks.clear()
        child = process.Child(["sh", "-c", "trap '' TERM; sleep 2"])
        child.wait(30)
        child.end()
        counts.append(len(ticks))
        print(min(counts) > 5 or counts)
    """
    assert python(code) == "True\n"


@pytest.mark.parametrize("missing", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_without_standard_streams(tmp_path: Path, missing: str) -> None:
    """New descriptors then reuse their numbers."""
    code = f"""
        done = process.run(["sh", "-c", "cat; echo err >&2; exit 3"], stdin=b"in")
        one = process.Detached(["sh", "-c", "echo err >&2; exit 4"]).result(5)
        child = process.Child(["cat"], tty=True)
        child.write(b"typed")
        read = child.read(5)
        child.end()
        with open({str(tmp_path / "out")!r}, "w") as file:
            print(done, one, read, file=file)
    """
    command = [sys.executable, "-c", PLAIN + textwrap.dedent(code)]
    subprocess.run(["sh", "-c", f'exec "$@" {missing}', "sh", *command], check=True, timeout=60)
    assert (tmp_path / "out").read_text() == (
        "Completed(returncode=3, stdout=b'in', stderr=b'err\\n') "
        "Completed(returncode=4, stdout=b'', stderr=b'err\\n') (1, b'typed')\n"
    )


def test_an_unlimited_number_of_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", lambda name: -1)
    reader, writer = os.pipe()
    os.set_inheritable(reader, True)
    assert reader in launch._inheritable()
    os.close(reader)
    os.close(writer)


def test_a_python_that_cannot_start_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    def spawn(*_: object, **__: object) -> int:
        raise NotImplementedError

    monkeypatch.setattr(launch, "_spawn", spawn)
    with pytest.raises(OSError, match="use another one"):
        process.run(["true"])


def test_only_standard_streams_are_inherited() -> None:
    code = """
        fd = os.open("/dev/null", os.O_RDONLY)
        os.set_inheritable(fd, True)
        list_them = ["sh", "-c", "for f in /dev/fd/*; do [ ! -e $f ] || echo ${f##*/}; done"]
        child = process.Child(list_them)
        seen = b""
        while (piece := child.read(5)) != (1, b""):
            seen += piece[1]
        print(seen.split(), process.run(list_them).stdout.split())
    """
    assert python(code) == "[b'0', b'1', b'2'] [b'0', b'1', b'2']\n"


def test_too_many_open_files() -> None:
    """Whatever number is missing: one error, and nothing stays open."""
    code = """
        import resource
        process.launch.MOST_FILES = 0  # it must not raise the limit itself
        process.run(["true"])  # gevent opens its own
        # So that the limit leaves enough for a shell.
        others = [os.open("/dev/null", os.O_RDONLY) for _ in range(40)]
        before = len(os.listdir("/dev/fd"))
        starts = [
            lambda: process.run(["true"]).returncode == 0,
            lambda: process.Child(["true"]).end() is None,
            lambda: process.Child(["true"], tty=True).end() is None,
            lambda: process.Detached(["true"]).result(5).returncode == 0,
        ]
        for start in starts:
            start()
            results = set()
            for spare in range(14):
                resource.setrlimit(resource.RLIMIT_NOFILE, (before + spare, 4096))
                try:
                    results.add(start())
                except OSError as error:
                    results.add(str(error))
                resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
                gevent.sleep(0)
                assert len(os.listdir("/dev/fd")) <= before + 1, (start, spare)
            print(*map(str, sorted(results, key=str)), sep="; ")
    """
    line = "True; too many open files: raise the limit (ulimit -n) or use fewer hosts\n"
    assert python(code) == 4 * line


def test_the_limit_of_open_files_is_raised_for_many_processes() -> None:
    """Once, and only for this process."""
    code = """
        import resource
        limits = lambda: resource.getrlimit(resource.RLIMIT_NOFILE)
        shown = lambda: process.run(["sh", "-c", "ulimit -Sn; ulimit -Hn"]).stdout.split()
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 4096))
        print(shown(), limits())
        children = [process.Child(["sh", "-c", "ulimit -Sn; read x"]) for _ in range(50)]
        print(shown(), limits(), {one.read() for one in children})
        for name in ("no-such-program", "/no/such/program"):
            try:
                process.Child([name])
            except FileNotFoundError as error:
                print(error.strerror)
        before = len(os.listdir("/dev/fd"))
        for one in children:
            one.end()
        print(before - len(os.listdir("/dev/fd")))
    """
    assert python(code).splitlines() == [
        "[b'64', b'4096'] (64, 4096)",
        "[b'64', b'4096'] (4096, 4096) {(1, b'64\\n')}",
        "No such file or directory",
        "No such file or directory",
        "150",
    ]


def test_streams_end_for_a_reader_when_another_greenlet_ends_the_process() -> None:
    child = Child(["sleep", "30"])
    reading = gevent.spawn(child.read, 20)
    gevent.sleep(0.1)
    child.end()
    assert sorted([reading.get(timeout=5), child.read(0)]) == [(STDOUT, b""), (STDERR, b"")]


def test_streams_that_others_hold_open_end_with_the_process() -> None:
    child = Child(["sh", "-c", "sleep 30 & echo $!"])
    _, data = child.read(5)
    assert sorted([child.read(10), child.read(10)]) == [(STDOUT, b""), (STDERR, b"")]
    os.kill(int(data), signal.SIGKILL)
    child.end()


def test_detached_process_survives_when_this_process_is_killed(tmp_path: Path) -> None:
    """Nor does SIGPIPE kill it."""
    code = f"""
        process.Detached(["sh", "-c", "sleep 0.5; echo said >&2; echo >{tmp_path / "done"}"])
        os.kill(os.getpid(), signal.SIGKILL)
    """
    command = [sys.executable, "-c", PLAIN + textwrap.dedent(code)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while not (tmp_path / "done").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_detached_has_an_empty_stdin() -> None:
    code = """
        one = process.Detached(["sh", "-c", "cat; [ /dev/fd/0 -ef /dev/null ] && echo /dev/null"])
        done = one.result(5)
        print(done.returncode, done.stderr)
        print(type(process.run(["cat"], stdin=b"x").stdout))
    """
    assert python(code, input="ours") == "0 b'/dev/null\\n'\n<class 'bytes'>\n"


def test_detached_process_that_takes_too_long_is_killed() -> None:
    one = process.Detached(["sh", "-c", "sleep 4343 & sleep 4343"])
    with pytest.raises(TimeoutError):
        one.result(0.3)
    deadline = time.monotonic() + 20
    while b"sleep 4343" in subprocess.run(["ps", "ax"], capture_output=True, check=True).stdout:
        assert time.monotonic() < deadline


def test_no_zombie_processes_remain() -> None:
    code = """
        for _ in range(5):
            process.run(["true"])
            process.Detached(["true"]).result(5)
            process.Child(["sleep", "30"]).end()
        one = process.Detached(["sleep", "30"])
        try:
            one.result(0.1)
        except TimeoutError:
            pass
        # It ends a moment later, and the next call reaps it.
        left = 200
        while left:
            gevent.sleep(0.1)
            process.run(["true"])
            try:
                os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                left -= 1
            except ChildProcessError:
                break
        print("none" if left else "some")
    """
    assert python(code) == "none\n"
