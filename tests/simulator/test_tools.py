"""Faults, the call log, version profiles, images, `doctor` and other tools of the simulator."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from orbctl_simulator import images
from tests.contract.conftest import ROOT, Made
from tests.contract.program import Answer, Program
from tests.simulator.conftest import make_program, wait_for


def spoiled(orb: Program, tmp_path: Path, *rules: dict[str, Any]) -> Program:
    """The same simulator with faults; their counters are beside the file."""
    file = tmp_path / "faults.json"
    file.write_text(json.dumps(rules))
    return Program(orb.command, {**orb.env, "ORBCTL_SIMULATOR_FAULTS": str(file)})


def test_fault_with_exit_code(orb: Program, machine: str, tmp_path: Path) -> None:
    """The nth call, counted across processes, ends with the given code and text."""
    rule = {"match": "run", "nth": 2, "exit": 9, "stderr": "boo\n", "stdout": "\N{GHOST}"}
    bad = spoiled(orb, tmp_path, rule)
    words = ["run", "-m", machine, "echo", "ran"]
    assert bad(*words).text == "ran\n"
    assert bad("list", "-q").code == 0
    assert bad(*words) == Answer(9, "\N{GHOST}".encode(), b"boo\n")
    assert bad(*words).text == "ran\n"


def test_fault_by_substring(orb: Program, machine: str, tmp_path: Path) -> None:
    """A match that is not a command is a part of the command line."""
    bad = spoiled(orb, tmp_path, {"match": "echo two", "exit": 3}, {"match": "", "nth": [3, 4]})
    assert [bad("run", "-m", machine, "echo", word).code for word in ("one", "two")] == [0, 3]


def test_faults_inline(orb: Program, tmp_path: Path) -> None:
    """The variable can contain the rules; their counters are then in the state directory."""
    rules = json.dumps({"match": "list", "nth": [1, 3], "exit": 4, "stderr": str(tmp_path)})
    bad = Program(orb.command, {**orb.env, "ORBCTL_SIMULATOR_FAULTS": rules})
    assert [bad("list").code for _ in range(4)] == [4, 0, 4, 0]


def test_delay_and_hang(orb: Program, tmp_path: Path) -> None:
    bad = spoiled(orb, tmp_path, {"match": "version", "delay": 0.5})
    started = time.monotonic()
    assert bad("version").code == 0
    assert time.monotonic() - started > 0.5
    bad = spoiled(orb, tmp_path, {"match": "version", "hang": True})
    call = bad.started("version")
    with pytest.raises(subprocess.TimeoutExpired):
        call.wait(0.5)
    call.kill()
    assert call.communicate() == (b"", b"")


@pytest.mark.parametrize("words", [["list", "-f", "json"], ["run", "echo"]])
def test_silence(orb: Program, machine: str, tmp_path: Path, words: list[str]) -> None:
    """Exit code 0, no output, and nothing was done."""
    bad = spoiled(orb, tmp_path, {"match": words[0], "silent": True})
    assert bad(*words) == Answer(0, b"", b"")


def test_cut_streams(orb: Program, machine: str, tmp_path: Path) -> None:
    """A stream, also stdin, ends after n bytes, and with it the call."""
    words = ["run", "-m", machine, "sh", "-c", "printf 0123456789; sleep 0.2; printf abcdef >&2"]
    assert spoiled(orb, tmp_path, {"match": "run", "cut": 4})(*words)[:2] == (1, b"0123")
    bad = spoiled(orb, tmp_path, {"match": "run", "cut_stderr": 3, "exit": 255})
    assert bad(*words) == Answer(255, b"0123456789", b"abc")
    words = ["run", "-m", machine, "sh", "-c", "cat >/tmp/cut"]
    assert spoiled(orb, tmp_path, {"match": "run", "cut_stdin": 5})(*words, stdin=b"x" * 9).code
    # The command in the machine may end later than its call.
    wait_for(lambda: orb("run", "-m", machine, "cat", "/tmp/cut").out == b"xxxxx")
    shown = spoiled(orb, tmp_path, {"match": "list", "cut": 7})("list", "-f", "json")
    assert shown.out == orb("list", "-f", "json").out[:7]
    assert shown.code == 1


def test_stop_in_the_middle(orb: Program, made: Made, machine: str, tmp_path: Path) -> None:
    name = made.clone(machine)
    bad = spoiled(orb, tmp_path, {"match": "run", "stop": True, "delay": 3})
    answer = bad("run", "-m", name, "sh", "-c", "echo before; sleep 60; echo after")
    assert (answer.code, answer.out) == (137, b"before\n")
    assert orb("info", name, "-f", "json").json["record"]["state"] == "stopped"


def test_spoiled_lists(orb: Program, machine: str, tmp_path: Path) -> None:
    """`null`, garbage, truncated, empty, everything twice; always with exit code 0."""
    whole = orb("list", "-f", "json").json

    def shown(how: str) -> str:
        return spoiled(orb, tmp_path, {"match": "list", "list": how})("list", "-f", "json").text

    assert shown("null") == "null\n"
    assert shown("empty") == ""
    assert json.loads(shown("duplicate")) == whole * 2
    for how in ("garbage", "truncated"):
        assert shown(how)
        with pytest.raises(ValueError, match=r"Expecting|Unterminated"):
            json.loads(shown(how))


@pytest.mark.parametrize(
    "rules",
    [
        *("{", '{"mach": "run"}', '{"list": "x"}', "[1]", "5", "null", '"run"', "\udcff"),
        *('{"delay": "1"}', '{"delay": -1}', '{"hold": NaN}', '{"delay": true}'),
        *('{"nth": "3"}', '{"nth": [1, "3"]}', '{"exit": "x"}', '{"exit": 256}'),
        *('{"match": 5}', '{"stdout": 5}', '{"cut": "1"}', '{"cut_stdin": -1}'),
    ],
)
@pytest.mark.parametrize("place", ["variable", "file"])
def test_invalid_rules_are_rejected(orb: Program, tmp_path: Path, place: str, rules: str) -> None:
    """A typo would be a fault that never fires, and a test that proves nothing."""
    if place == "file":
        (tmp_path / "rules").write_bytes(os.fsencode(rules))
        rules = str(tmp_path / "rules")
    answer = orb("list", env={"ORBCTL_SIMULATOR_FAULTS": rules})
    assert answer.code == 1
    assert answer.err.startswith(b"ORBCTL_SIMULATOR_FAULTS")
    assert answer.err.count(b"\n") == 1


def logged(orb: Program, tmp_path: Path) -> tuple[Program, Path]:
    file = tmp_path / "calls.log"
    return Program(orb.command, {**orb.env, "ORBCTL_SIMULATOR_LOG": str(file)}), file


def test_log(orb: Program, machine: str, tmp_path: Path) -> None:
    """One line per call: exact words, names without values, a digest of stdin."""
    program, file = logged(orb, tmp_path)
    env = {"ORBENV": "TOKEN", "TOKEN": "the-secret"}
    secret = b"stdin-secret\0\xff" * 9999
    words = ["run", "-m", machine, "sh", "-c", "cat >/dev/null; exit 5", b"\xff\xfe", "a\nb", "ü"]
    assert program(*words, stdin=secret, env=env, cwd="/usr").code == 5
    text = file.read_text()
    (line,) = map(json.loads, text.splitlines())
    assert [os.fsencode(word) for word in line["argv"][1:]] == [
        word if isinstance(word, bytes) else word.encode() for word in words
    ]
    assert line["cwd"] == "/usr"
    assert line["exit"] == 5
    assert line["ttys"] == [False, False, False]
    assert {"TOKEN", "ORBENV", "PATH"} <= set(line["env"])
    assert line["stdin"] == {"length": len(secret), "sha256": hashlib.sha256(secret).hexdigest()}
    assert "secret" not in text
    assert abs(line["started"] - time.time()) < 60


def test_log_of_many_and_of_failures(orb: Program, machine: str, tmp_path: Path) -> None:
    program, file = logged(orb, tmp_path)
    calls = [program.started("run", "-m", machine, "true") for _ in range(10)]
    for call in calls:
        call.communicate(timeout=60)
    assert program("info", "no-such-machine").code == 1
    assert program("frob").code == 1
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["exit"] for line in lines] == [0] * 10 + [1, 1]
    assert len({line["pid"] for line in lines}) == 12


def test_log_of_a_killed_call(orb: Program, machine: str, tmp_path: Path) -> None:
    program, file = logged(orb, tmp_path)
    call = program.started("run", "-m", machine, "sh", "-c", "echo up; sleep 10")
    assert call.stdout
    call.stdout.readline()
    call.terminate()
    call.communicate(timeout=30)
    assert call.returncode == -15
    assert json.loads(file.read_text())["exit"] == 143


def test_log_and_terminals(orb: Program, machine: str, tmp_path: Path) -> None:
    program, file = logged(orb, tmp_path)
    assert program.on_terminal("run", "-m", machine, "test", "-t", "0").code == 0
    assert json.loads(file.read_text())["ttys"] == [True, True, True]
    null = subprocess.DEVNULL
    assert program.on_terminal("run", "-m", machine, "test", "-t", "1", stdin=null).code == 1
    assert json.loads(file.read_text().splitlines()[1])["ttys"] == [False, True, True]


def test_streams_are_exact_with_a_log(orb: Program, machine: str, tmp_path: Path) -> None:
    """The log reads the caller's stdin before the command does, and changes nothing."""
    program, _ = logged(orb, tmp_path)
    data = bytes(range(256)) * 4000
    assert program("run", "-m", machine, "cat", stdin=data).out == data
    assert program("run", "-m", machine, "true", stdin=data).code == 0
    call = program.started("run", "-m", machine, "head", "-n1", stdin=subprocess.PIPE)
    assert call.stdin
    call.stdin.write(b"line\n")
    call.stdin.flush()
    assert call.wait(60) == 0
    call.stdin.close()
    call.stdin = None
    call.communicate()


BANNER = "OrbStack update available!"


def test_banner(orb: Program, machine: str) -> None:
    """The update banner surrounds any command's output, on either stream."""
    words = ["run", "-m", machine, "echo", "ran"]
    answer = orb(*words, env={"ORBCTL_SIMULATOR_BANNER": "stderr"})
    assert answer.text == "ran\n"
    assert BANNER in answer.err.decode()
    shown = orb(*words, env={"ORBCTL_SIMULATOR_BANNER": "stdout"}).text
    assert shown.index(BANNER) < shown.index("ran\n")
    shown = orb(*words, env={"ORBCTL_SIMULATOR_BANNER": "stdout:after"}).text
    assert shown.index(BANNER) > shown.index("ran\n")
    shown = orb("list", "-f", "json", env={"ORBCTL_SIMULATOR_BANNER": "stdout:around"}).text
    assert shown.count(BANNER) == 2
    assert BANNER not in orb(*words).out.decode()


def test_profiles(orb: Program, machine: str) -> None:
    """Flags, fields and keys that a version lacks are missing."""
    isolated, limits = ["--isolated"], ["--cpus", "1"]
    lacks = {"2.0": [isolated, limits], "2.1": [limits], "2.2": []}
    for profile, flags in lacks.items():
        env = {"ORBCTL_SIMULATOR_PROFILE": profile}
        assert orb("version", env=env).text.startswith(f"Version: {profile}.")
        for words in (isolated, limits):
            answer = orb("create", *words, "nosuchdistro", "x", env=env)
            unknown = f"unknown flag: {words[0]}".encode() in answer.err
            assert unknown == (words in flags)
            assert (words[0] in orb("create", "--help", env=env).text) == (words not in flags)
        config = orb("info", machine, "-f", "json", env=env).json["record"]["config"]
        assert ("forward_ssh_agent" in config) == (profile != "2.0")
        assert (orb("config", "get", f"machine.{machine}.cpu", env=env).code == 0) == (
            profile == "2.2"
        )
        shown = orb("config", "show", env=env).text
        assert (f"machine.{machine}.isolated" in shown) == (profile != "2.0")
    assert orb("list", env={"ORBCTL_SIMULATOR_PROFILE": "1.0"}).code == 1


def test_uptime(orb: Program, made: Made, machine: str) -> None:
    """The host's uptime, or the machine's own since its start."""
    name = made.clone(machine)
    words = ["run", "-m", name, "cut", "-d.", "-f1", "/proc/uptime"]
    before = int(time.clock_gettime(time.CLOCK_BOOTTIME))
    shown = float(orb(*words).text)
    assert before <= shown <= time.clock_gettime(time.CLOCK_BOOTTIME)
    if not os.path.exists("/proc/self/ns/time"):
        pytest.skip("this kernel has no time namespaces")
    begun = time.monotonic()
    assert orb("restart", name, env={"ORBCTL_SIMULATOR_UPTIME": "own"}).code == 0
    assert float(orb(*words).text) <= time.monotonic() - begun + 2
    time.sleep(1.1)
    assert 1 <= float(orb(*words).text) <= time.monotonic() - begun + 2
    now = int(time.time())
    assert now <= float(orb("run", "-m", name, "date", "+%s").text) <= time.time()


def test_images(own: Program, rootfs: Path, tmp_path: Path) -> None:
    """A root file system by name, from a directory or a tarball."""
    archive = tmp_path / "root.tar.gz"
    subprocess.run(["tar", "-C", rootfs, "-czf", archive, "."], check=True)
    assert own("image", "add", "alpine:3.22", str(rootfs)).code == 0
    assert own("image", "add", "void", str(archive)).code == 0
    rows = [line.split(maxsplit=5) for line in own("image", "list").lines]
    assert [row[:3] for row in rows] == [
        ["alpine:3.22", images.host_arch(), "default"],
        ["void:current", images.host_arch(), "default"],
    ]
    assert [row[5] for row in rows] == [f"added from {rootfs}", f"added from {archive}"]
    assert own("image", "add", "void", str(archive)).code == 1
    assert own("image", "add", "arch", str(tmp_path)).code == 1
    for image, name in (("alpine", "one"), ("void", "two")):
        made = own("create", "--strict-images", "-u", "me", image, name)
        assert (made.code, made.err) == (0, b"")
        assert own("run", "-m", name, "cat", "/etc/os-release").lines[0] == "ID=alpine"
        assert own("run", "-m", name, "id").text.startswith("uid=501(me) gid=501(me)")
        assert own("run", "-m", name, "hostname").text == f"{name}\n"
        groups = own("run", "-m", name, "cat", "/etc/group").lines
        assert "wheel:x:10:me" in groups
    assert own("image", "remove", "void").code == 1
    assert own("export", "two", str(tmp_path / "two.tar.zst")).code == 0
    assert own("delete", "-f", "two").code == 0
    assert own("image", "remove", "void").code == 0
    assert b"its image is not available" in own("import", str(tmp_path / "two.tar.zst")).err


def test_image_that_is_not_available(own: Program) -> None:
    """One line on stderr, or an error; nothing in the machine claims to be that image."""
    answer = own("create", "ubuntu:22.04", "x")
    assert answer.code == 0
    assert answer.err.count(b"ubuntu:jammy") == 1
    image = own("info", "x", "-f", "json").json["record"]["image"]
    assert (image["distro"], image["version"]) == ("ubuntu", "jammy")
    release = Path("/etc/os-release").read_text()
    assert own("run", "-m", "x", "cat", "/etc/os-release").text == release
    for refused in (
        own("create", "--strict-images", "ubuntu:22.04", "y"),
        own("create", "ubuntu:22.04", "y", env={"ORBCTL_SIMULATOR_STRICT_IMAGES": "1"}),
    ):
        assert refused.code == 1
        assert b"image not found: ubuntu:jammy" in refused.err
    assert own("list", "-q").lines == ["x"]


def test_foreign_zstd(own: Program, tmp_path: Path) -> None:
    """Archives that another program compressed can be imported if `zstd` exists; garbage never."""
    own("create", "debian", "one")
    own("run", "-m", "one", "sh", "-c", "echo data >~/file")
    plain, packed = tmp_path / "one.tar.zst", tmp_path / "packed.tar.zst"
    assert own("export", "one", str(plain)).code == 0
    (tmp_path / "garbage").write_bytes(b"\x28\xb5\x2f\xfd\x00\x38garbage" * 99)
    assert own("import", "-n", "bad", str(tmp_path / "garbage")).code == 1
    (tmp_path / "half").write_bytes(plain.read_bytes()[: plain.stat().st_size // 2])
    assert own("import", "-n", "bad", str(tmp_path / "half")).code == 1
    assert own("list", "-q").lines == ["one"]
    if not shutil.which("zstd"):
        pytest.skip("needs zstd")
    repack = 'zstd -qdc "$1" | zstd -q -o "$2"'
    subprocess.run(["sh", "-c", repack, "sh", plain, packed], check=True)
    assert own("import", "-n", "two", str(packed)).code == 0
    assert own("run", "-m", "two", "sh", "-c", "cat ~/file").text == "data\n"


def test_doctor(orb: Program) -> None:
    shown = orb("doctor").text
    for word in ("machines:", "base:", "sudo:", "zstd:", "state directory:"):
        assert f"ok      {word}" in shown
    for word in ("init", "network", "limits"):
        assert re.search(rf"^(ok|note) +{word}: ", shown, re.MULTILINE), shown
    assert "MISSING" not in shown


@pytest.fixture
def nested(orb: Program, made: Made) -> tuple[str, list[str]]:
    """A machine that has the simulator, but may not create machines, like a container."""
    if not os.path.exists("/usr/bin/python3"):
        pytest.skip("needs a Python in the base")
    mounts = ["--mount", f"{ROOT / 'src'}:/opt/simulator"]
    # Lines reached in there count, too, see scripts/reached.py.
    measured = ROOT / ".cache" / "coverage"
    if measured.is_dir():
        mounts += ["--mount", f"{measured}:{measured}"]
    name = made.create("--isolated", *mounts)
    text = (
        "import sys; sys.path.insert(0, '/opt/simulator'); "
        "from orbctl_simulator.__main__ import main; sys.exit(main())"
    )
    assert orb("run", "-m", name, "-u", "root", "chmod", "755", "/opt").code == 0
    return name, ["/usr/bin/python3", "-I", "-S", "-B", "-c", text]


def test_error_where_machines_are_impossible(orb: Program, nested: tuple[str, list[str]]) -> None:
    """Inside a container without the rights: one line with the error and the reason."""
    name, program = nested
    answer = orb("run", "-m", name, "-u", "root", *program, "create", "debian", "x")
    assert answer.code == 1
    assert answer.err.startswith(b"[-32098] create 'x': this host")
    assert answer.err.count(b"\n") == 1
    shown = orb("run", "-m", name, "-u", "root", *program, "doctor")
    assert shown.code == 1
    assert b"MISSING machines: this host" in shown.out
    assert orb("run", "-m", name, "-u", "root", *program, "list").text == ""
    script = "mkdir -p /opt/own/bin /opt/own/usr/bin; touch /opt/own/bin/sh /opt/own/usr/bin/sudo"
    assert orb("run", "-m", name, "-u", "root", "sh", "-c", script).code == 0
    for words in (["image", "add", "void", "/opt/own"], ["create", "void", "x"]):
        answer = orb("run", "-m", name, "-u", "root", *program, *words)
    assert answer.code == 1
    assert b"does not allow namespaces" in answer.err


def test_ordinary_user(orb: Program, nested: tuple[str, list[str]]) -> None:
    """Through ``sudo -n``, with the caller's own state directory; without sudo, one line."""
    name, program = nested
    env = ["env", "SECRET=1", "ORBCTL_SIMULATOR_LOG=/tmp/log"]
    answer = orb("run", "-m", name, *env, *program, "list", "-f", "json")
    assert answer.json == []
    script = "cd ~/.local/state && stat -c '%U %a' . orbctl-simulator; sudo cat /tmp/log"
    owners = orb("run", "-m", name, "sh", "-c", script)
    user = orb("run", "-m", name, "id", "-un").text.strip()
    assert [line.split()[0] for line in owners.lines[:2]] == [user, user]
    line = json.loads(owners.lines[2])
    assert "SECRET" in line["env"]
    assert line["argv"][1:] == ["list", "-f", "json"]
    assert orb("run", "-m", name, "sudo", "useradd", "-m", "nobody2").code == 0
    refused = orb("run", "-m", name, "-u", "nobody2", *program, "list")
    assert refused.code == 1
    assert refused.err.count(b"\n") == 1
    assert b"need root" in refused.err
    without = orb("run", "-m", name, "env", "PATH=/nowhere", *program, "list")
    assert without.err == refused.err


def without_sudo(rootfs: Path, place: Path, installer: str) -> Path:
    """A root file system without sudo, whose package manager is a short script."""
    shutil.copytree(rootfs, place, symlinks=True)
    (place / "usr/bin/sudo").unlink()
    (place / "var/lib/dpkg").mkdir(parents=True)
    (place / "var/lib/dpkg/status").write_text("")
    (place / "usr/bin/apt-get").write_text(f"#!/bin/sh\n{installer}\n")
    (place / "usr/bin/apt-get").chmod(0o755)
    return place


def test_layer_is_built_once(rootfs: Path, tmp_path: Path, orb: Program) -> None:
    """What the base lacks is installed into the cache, for all machines and state directories."""
    script = 'echo "$@"; id >/usr/bin/sudo; ls / >/usr/clutter; echo x >/root/clutter'
    base = without_sudo(rootfs, tmp_path / "base", script)
    cache = str(tmp_path / "cache")
    said = []
    for number in (1, 2):
        program = make_program(tmp_path / f"state-{number}", ORBCTL_SIMULATOR_CACHE=cache)
        assert program("image", "add", "void", str(base)).code == 0
        for name in ("one", "two"):
            made = program("create", "void", name)
            assert made.code == 0, made
            said.append(made.err.decode())
            assert program("run", "-m", name, "cat", "/usr/bin/sudo").text.startswith("uid=0(root)")
            assert program("run", "-m", name, "-u", "root", "ls", "/root").text == ""
        assert program("delete", "-f", "one", "two").code == 0
    assert "installing it once, with apt-get" in said[0]
    assert [len(text.splitlines()) for text in said] == [1, 0, 0, 0]
    assert not list(Path(cache).glob("*.build"))


def test_layer_that_cannot_be_built(own: Program, rootfs: Path, tmp_path: Path) -> None:
    """One line with the reason, and no machine."""
    base = without_sudo(rootfs, tmp_path / "base", "echo E: no network; exit 100")
    cache = {"ORBCTL_SIMULATOR_CACHE": str(tmp_path / "cache")}
    assert own("image", "add", "void", str(base)).code == 0
    answer = own("create", "void", "x", env=cache)
    assert answer.code == 1
    last = answer.err.decode().splitlines()[-1]
    assert last.startswith("[-32098] create 'x': sudo could not be installed")
    assert "E: no network" in last
    assert own("list", "-q").text == ""


def test_logs_of_a_machine(own: Program) -> None:
    """They contain its starts and stops."""
    own("create", "debian", "one")
    own("stop", "one")
    shown = own("logs", "one").text
    assert "one: started" in shown
    assert "one: stopped" in shown
