"""Errors are one line and a failure's exit code, and leave nothing behind."""

from __future__ import annotations

import fcntl
import io
import os
import shutil
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from orbctl_simulator import archives, boot, show, state
from tests.contract.conftest import Made
from tests.contract.program import Answer, Program
from tests.simulator.conftest import Elsewhere


def refused(answer: Answer, *said: str, code: int = 1) -> None:
    """It failed, with the reason in its last line, and without a traceback."""
    text = answer.err.decode()
    assert answer.code == code, answer
    assert "Traceback" not in text
    assert all(words in text for words in said), text


# Words -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["status", "now"], 'unknown command "now" for "orbctl-simulator status"'),
        (["list", "-f", "xml"], "unknown format: xml"),
        (["config", "frob"], 'unknown command "frob" for "orbctl-simulator config"'),
        (["config", "get"], "accepts 1 arg(s), received 0"),
        (["config", "docker"], "no Docker engine"),
        (["config", "set", "rosetta", "maybe"], "not true or false: 'maybe'"),
        (["config", "set", "no.such.key", "1"], "unknown config key: 'no.such.key'"),
        (["config", "set", "machine.{}.nothing", "1"], "unknown config key"),
        (["config", "set", "machine.{}.isolated", "1"], "not true or false: '1'"),
        (["config", "set", "machine.{}.memory_mib", "much"], "not a number: 'much'"),
        (["config", "set", "machine.{}.cpu", "many"], "invalid CPU limit: 'many'"),
        (["config", "set", "machine.{}.cpu", "nan"], "invalid CPU limit: 'nan'"),
        (["config", "set", "machine.{}.cpu", "-1"], "invalid CPU limit: '-1'"),
        (["config", "set", "machine.{}.memory_mib", "\u00b2"], "not a number: '\u00b2'"),
        (["config", "set", "machine.{}.username", "\033[2J"], "invalid user name: '?[2J'"),
        (["create", "--cpus", ".", "debian", "x"], "invalid CPU limit: '.'"),
        (["create", "--cpus", "0.001", "debian", "x"], "invalid CPU limit: '0.001'"),
        (["create", "--memory", "512K", "debian", "x"], "less than 1 MiB: '512K'"),
        (["create", "--disk", "9" * 400, "debian", "x"], "invalid size: '999"),
        (["delete"], "requires at least 1 arg(s)"),
        (["create", "debian:1/2", "x"], "unknown version for debian: '1/2'"),
        (["create", "--isolated", "--mount", "a\nb", "debian", "x"], "a line break"),
        (["create", "--isolated", "--mount", "/proc/1:/proc/x", "debian", "x"], "on /proc/x: "),
        (["rename", "{}", "{}"], "machine already exists"),
        (["image", "frob"], "image: add NAME"),
        (["image", "remove", "void"], "does not exist"),
        (["import", "/no/such/file"], "import '/no/such/file': No such file or directory"),
    ],
)
def test_bad_words(orb: Program, machine: str, words: list[str], said: str) -> None:
    before = orb("list", "-f", "json").json
    refused(orb(*(word.format(machine) for word in words)), said)
    assert orb("list", "-f", "json").json == before


def test_ctrl_c_at_a_question(orb: Program, machine: str) -> None:
    call = orb.started("delete", machine, stdin=subprocess.PIPE)
    assert call.stderr
    assert call.stderr.read(6) == b"Delete"
    call.send_signal(signal.SIGINT)
    assert call.wait(20) == 130
    call.communicate()
    assert orb("info", machine).code == 0


def test_keys_of_a_newer_version(orb: Program, machine: str) -> None:
    env = {"ORBCTL_SIMULATOR_PROFILE": "2.0"}
    refused(orb("config", "set", f"machine.{machine}.cpu", "1", env=env), "unknown config key")


def test_settings(own: Program) -> None:
    assert own("config", "set", "rosetta", "false").code == 0
    assert own("config", "set", "memory_mib", "4096").code == 0
    assert own("config", "get", "rosetta").text == "false\n"
    assert "memory_mib: 4096" in own("config", "show").lines
    assert own("config", "reset").code == 0
    assert own("config", "get", "rosetta").text == "true\n"


def test_sizes() -> None:
    shown = [show._human(size) for size in (5, 2500, 3e6, 4e9, 5e12)]
    assert shown == ["5.0 B", "2.5 KB", "3.0 MB", "4.0 GB", "5000.0 GB"]


# Reading and writing ---------------------------------------------------------------------------


def without_reader(orb: Program, *words: str, stream: str) -> int:
    """Exit code of a call one of whose outputs has no reader."""
    process = orb.started(*words)
    reader = getattr(process, stream)
    reader.close()
    setattr(process, stream, None)
    process.communicate(timeout=20)
    return process.returncode


def test_output_without_a_reader(orb: Program, machine: str, tmp_path: Path) -> None:
    assert without_reader(orb, "list", stream="stdout") == 141
    log = {**orb.env, "ORBCTL_SIMULATOR_LOG": str(tmp_path / "log")}
    words = ["run", "-m", machine, "sh", "-c", "sleep 0.5; yes"]
    assert without_reader(Program(orb.command, log), *words, stream="stdout") == 141
    assert without_reader(orb, "run", "-m", machine, "-u", "nobody2", "id", stream="stderr") == 1


@pytest.mark.parametrize("words", [[], ["help"], ["version"]])
def test_output_to_a_full_disk(orb: Program, words: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*orb.command, *words], env=orb.env, stdout=full, stderr=subprocess.PIPE, check=False
        )
    word = (words or ["help"])[0]
    said = f"orbctl-simulator: {word}: no space left on device\n"
    assert (done.returncode, done.stderr.decode()) == (1, said)


@pytest.mark.parametrize("url", ["http://[bad", "http://a:port", "http:///x"])
def test_mirrors_that_are_no_urls(own: Program, url: str) -> None:
    env = {"ORBCTL_SIMULATOR_IMAGES": url}
    answer = own("image", "list", "--remote", env=env)
    refused(answer, f"{url}: not a URL of a server")
    env = {"ORBCTL_SIMULATOR_IMAGES": "http://192.0.2.1", "http_proxy": "http://[bad"}
    refused(own("image", "list", "--remote", env=env), "http://[bad: not a URL of a server")


def test_output_without_a_reader_and_with_a_cut(orb: Program, machine: str) -> None:
    """Also through the simulator, the command sees that its output is closed."""
    rule = '{"match": "run", "cut": 9999999}'
    program = Program(orb.command, {**orb.env, "ORBCTL_SIMULATOR_FAULTS": rule})
    words = ["run", "-m", machine, "sh", "-c", "sleep 0.5; yes"]
    assert without_reader(program, *words, stream="stdout") == 141


def test_deleted_directory(orb: Program, machine: str, tmp_path: Path) -> None:
    """The caller's cwd: a command then runs at home, and the log has no cwd for the call."""
    script = 'mkdir gone && cd gone && rmdir ../gone && exec "$@"'
    log = {**orb.env, "ORBCTL_SIMULATOR_LOG": str(tmp_path / "log")}
    program = Program(["sh", "-c", script, "sh", *orb.command], log)
    user = orb("run", "-m", machine, "id", "-un").text.strip()
    assert program("run", "-m", machine, "pwd", cwd=tmp_path).text == f"/home/{user}\n"
    assert '"cwd": ""' in (tmp_path / "log").read_text()


def test_background_process_on_a_terminal(orb: Program, machine: str) -> None:
    """Processes that still have the terminal open are not waited for."""
    begun = time.monotonic()
    script = "trap '' HUP; sleep 20 & echo over"
    answer = orb.on_terminal("run", "-m", machine, "sh", "-c", script)
    assert (answer.code, answer.out) == (0, b"over\r\n")
    assert time.monotonic() - begun < 10


def test_password_is_asked_for(own: Program) -> None:
    """On a terminal, without echo."""
    words = ("create", "--set-password", "debian", "asked")
    answer = own.on_terminal(*words, typed=b"secret\n", prompt=b"Password: ")
    assert answer.code == 0
    assert b"secret" not in answer.out
    shadow = own("run", "-m", "asked", "-u", "root", "grep", "^root:", "/etc/shadow").text
    assert shadow.startswith("root:$")


def test_isolated_network_is_not_enforced(own: Program) -> None:
    answer = own("create", "--isolated", "--isolate-network", "debian", "alone")
    assert answer.code == 0
    assert b"--isolate-network is not enforced" in answer.err


def test_list_twice_as_text(own: Program) -> None:
    own("create", "debian", "one")
    rules = {"ORBCTL_SIMULATOR_FAULTS": '{"match": "list", "list": "duplicate"}'}
    assert own("list", "-q", env=rules).text == "one\n" * 2


def test_unreadable_rules(orb: Program) -> None:
    env = {"ORBCTL_SIMULATOR_FAULTS": "/no/such/file"}
    refused(orb("list", env=env), "ORBCTL_SIMULATOR_FAULTS: ", "/no/such/file")


@pytest.mark.parametrize("text", [b"mine\n", b"\xff"])
def test_counters_that_are_another_file(orb: Program, tmp_path: Path, text: bytes) -> None:
    rules, counters = tmp_path / "rules", tmp_path / "rules.counts"
    rules.write_text("[]")
    counters.write_bytes(text)
    env = {"ORBCTL_SIMULATOR_FAULTS": str(rules)}
    refused(orb("list", env=env), f"{counters} is not a list of counters: delete it")
    assert counters.read_bytes() == text


# Commands in a machine -------------------------------------------------------------------------


def test_commands_that_cannot_run(orb: Program, machine: str) -> None:
    script = "cd /tmp; echo 'echo ran $1' >plain; chmod 755 plain; ln -s loop loop; : >empty"
    assert orb("run", "-m", machine, "sh", "-c", script).code == 0
    assert orb("run", "-m", machine, "/tmp/plain", "as shell").text == "ran as shell\n"
    refused(orb("run", "-m", machine, "/no/such"), "/no/such: No such file", code=127)
    refused(orb("run", "-m", machine, "."), ".: command not found", code=127)
    refused(orb("run", "-m", machine, "/tmp/loop"), "Too many levels", code=126)


def test_user_file_that_is_damaged(orb: Program, made: Made, machine: str) -> None:
    name = made.clone(machine)
    script = "echo broken:x:many:1::/:/bin/sh >>/etc/passwd"
    assert orb("run", "-m", name, "-u", "root", "sh", "-c", script).code == 0
    refused(orb("run", "-m", name, "-u", "broken", "id"), "ValueError: invalid literal")
    assert orb("run", "-m", name, "id", "-u").text == "501\n"


def test_single_file_is_shared(made: Made, orb: Program, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("shared\n")
    (tmp_path / "file").chmod(0o644)
    tmp_path.chmod(0o755)
    name = made.create("--isolated", "--mount", f"{tmp_path}/file:/opt/deep/er")
    assert orb("run", "-m", name, "cat", "/opt/deep/er").text == "shared\n"


def test_deleted_share(own: Program, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    assert own("create", "--isolated", "--mount", f"{tmp_path}/here:/x", "debian", "m").code == 0
    assert own("stop", "m").code == 0
    (tmp_path / "here").rmdir()
    refused(own("start", "m"), "start 'm': mount ", "no such file or directory")
    refused(own("run", "-m", "m", "true"), "start 'm': mount ")


def test_stop_while_a_client_is_stopped(orb: Program, made: Made, machine: str) -> None:
    """The process that it should reap stays a zombie, which does not count as a machine."""
    name = made.clone(machine)
    call = orb.started("run", "-m", name, "sh", "-c", "echo up; sleep 60")
    assert call.stdout
    call.stdout.readline()
    call.send_signal(signal.SIGSTOP)
    assert orb("stop", name).code == 0
    assert orb("info", name, "-f", "json").json["record"]["state"] == "stopped"
    call.send_signal(signal.SIGCONT)
    call.communicate(timeout=10)
    assert call.returncode == 137


def test_process_that_exited() -> None:
    """A pid without a process is not a machine."""
    with subprocess.Popen(["true"]) as process:
        process.wait()
    assert not boot._is_there(process.pid, "1")
    assert state._parent_of(process.pid) == 0


@pytest.mark.usefixtures("root_only")
def test_machine_without_its_directory(tmp_path: Path) -> None:
    machine = state.Machine(str(tmp_path / "none"), {"name": "none", "user": "root"})
    with pytest.raises(state.Failure, match="No such file or directory"):
        boot.Boot(machine)


@pytest.mark.usefixtures("root_only")
def test_machine_deleted_while_a_call_waits(own: Program, tmp_path: Path) -> None:
    assert own("create", "debian", "brief").code == 0
    assert own("stop", "brief").code == 0
    (folder,) = (tmp_path / "state" / "machines").iterdir()
    with open(folder / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        call = own.started("start", "brief")
        with pytest.raises(subprocess.TimeoutExpired):
            call.wait(0.7)
        folder.rename(tmp_path / "elsewhere")
    _, err = call.communicate(timeout=10)
    assert (call.returncode, err) == (1, b"[-32098] machine not found: 'brief'\n")


# Copies ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("root_only")
def test_copies_of_a_damaged_machine(own: Program, tmp_path: Path) -> None:
    """Nothing incomplete is left."""
    assert own("create", "debian", "one").code == 0
    assert own("stop", "one").code == 0
    assert own("clone", "one", "two").code == 0
    (folder,) = (
        folder
        for folder in (tmp_path / "state" / "machines").iterdir()
        if "name=one\n" in (folder / "machine").read_text()
    )
    (folder / ".files" / "upper").rename(folder / "lost")
    refused(own("clone", "one", "three"), "clone 'one': cannot copy")
    refused(own("export", "one", str(tmp_path / "one.tar.zst")), "export 'one': ", "no such file")
    assert not (tmp_path / "one.tar.zst").exists()
    assert own("list", "-q").lines == ["one", "two"]


def packed(path: Path, *members: str) -> str:
    """An archive as `export` writes it, of empty files."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name in members:
            text = b"name=x\nuser=user\ndistro=void\nversion=\narch=amd64\nvariant=default\n"
            head = tarfile.TarInfo(name)
            head.size = len(text)
            archive.addfile(head, io.BytesIO(text))
    with open(path, "wb") as file:
        stream = archives.ZstdWriter(file)
        stream.write(content.getvalue())
        stream.finish()
    return str(path)


def test_archives_that_are_not_machines(own: Program, tmp_path: Path) -> None:
    refused(own("import", packed(tmp_path / "a", "other")), "not a machine that the simulator")
    refused(
        own("import", packed(tmp_path / "b", "machine")), "import", "contains no files of a machine"
    )
    if shutil.which("zstd"):
        (tmp_path / "c").write_bytes(b"garbage" * 99)
        refused(own("import", str(tmp_path / "c")), "not a zstd file")
    assert own("list", "-q").text == ""


@pytest.mark.usefixtures("root_only")  # sudo has its own PATH
def test_archive_without_its_decompressor(own: Program, tmp_path: Path) -> None:
    (tmp_path / "archive").write_bytes(b"garbage" * 99)
    answer = own("import", str(tmp_path / "archive"), env={"PATH": str(tmp_path)})
    refused(answer, "zstd is not installed")


def test_links_and_places_of_copies(orb: Program, machine: str, tmp_path: Path) -> None:
    """`push` replaces links; an error names what cannot be written."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "link").symlink_to("first")
    (tmp_path / "file").write_text("")
    for _ in range(2):
        assert orb("push", "-m", machine, str(tmp_path / "tree")).code == 0
    assert orb("run", "-m", machine, "sh", "-c", "readlink ~/tree/link").text == "first\n"
    both = [str(tmp_path / "tree"), str(tmp_path / "file")]
    refused(orb("push", "-m", machine, *both, "none"), "none: no such directory")
    long = str(tmp_path / ("x" * 300))
    refused(orb("pull", "-m", machine, "/etc/hostname", long), "file name too long")
    assert orb("run", "-m", machine, "sh", "-c", "rm -r ~/tree").code == 0


def test_restart_of_everything(own: Program) -> None:
    """Without a name, OrbStack restarts: the machines that ran run again."""
    assert own("create", "debian", "one").code == 0
    assert own("clone", "one", "two").code == 0
    assert own("restart").code == 0
    assert own("list", "-r", "-q").lines == ["one"]


@pytest.mark.usefixtures("root_only")
def test_directory_without_a_record_is_swept(own: Program, tmp_path: Path) -> None:
    (tmp_path / "state" / "machines" / ("0" * 26)).mkdir(parents=True)
    assert own("list", "-q").text == ""
    assert list((tmp_path / "state" / "machines").iterdir()) == []


# Unusual hosts ---------------------------------------------------------------------------------


def test_file_systems_that_cannot_hold_machines(
    elsewhere: Elsewhere, rootfs: Path, tmp_path: Path
) -> None:
    answer = elsewhere("mount -t ramfs none state; orb create debian x")
    refused(answer, "create 'x': this host cannot hide its root", "put ORBCTL_SIMULATOR_HOME on")
    (tmp_path / "scratch").mkdir()
    script = (
        "mount -t tmpfs none scratch; mkdir scratch/u scratch/w; "
        "mount -t overlay none -o lowerdir=state,upperdir=scratch/u,workdir=scratch/w state; "
        f"orb image add void '{rootfs}'; orb create void x"
    )
    refused(elsewhere(script), "create 'x': this host cannot mount an overlay in", "`doctor`")


def test_host_without_a_resolver(elsewhere: Elsewhere) -> None:
    script = (
        "cp -a /etc etc; rm -f etc/resolv.conf; mount --bind etc /etc; orb create debian x; "
        "orb run -m x wc -c /etc/resolv.conf; orb delete -f x"
    )
    assert elsewhere(script).text.split() == ["0", "/etc/resolv.conf"]


def test_doctor_where_machines_have_no_network(elsewhere: Elsewhere) -> None:
    """Then none boots either, so it must not say that they do."""
    shown = elsewhere("mount -t tmpfs none /dev/net; orb doctor").text
    reason = "/dev/net/tun: No such file or directory: modprobe tun"
    assert f"note    network: machines use this host's: {reason}\n" in shown
    assert "note    init: machines have none: " in shown
    assert "note    limits: not enforced\n" in shown


def test_doctor_where_more_is_mounted(elsewhere: Elsewhere, tmp_path: Path) -> None:
    """Also if nothing was installed into a layer yet."""
    elsewhere.cache = str(tmp_path / "none")
    (tmp_path / "more").mkdir()
    shown = elsewhere("mount -t proc none /srv; orb doctor").text
    assert "note    mounted file systems that machines do not see: " in shown
    assert "/srv" in shown
    if not os.path.exists("/usr/bin/sudo"):
        assert "note    sudo: missing in the base" in shown


# Incomplete bases ------------------------------------------------------------------------------


def test_empty_base(own: Program, rootfs: Path, tmp_path: Path) -> None:
    """No sudo, and nothing to install it with; no group of admins; no way to set passwords."""
    bare = tmp_path / "bare"
    shutil.copytree(rootfs, bare, symlinks=True)
    (bare / "usr/bin/sudo").unlink()
    assert own("image", "add", "void", str(bare)).code == 0
    refused(own("create", "void", "x"), "has no sudo, and no supported package manager")
    (bare / "usr/bin/sudo").write_text("there")
    (bare / "etc/group").write_text("root:x:0:\n")
    (bare / "etc/skel/deep").mkdir(parents=True)
    (bare / "etc/skel/deep/file").write_text("x")
    (bare / "etc/skel/link").symlink_to("deep/file")
    assert own("image", "add", "alpine", str(bare)).code == 0
    assert own("create", "-u", "me", "alpine", "y").code == 0
    assert "sudo:x:27:me" in own("run", "-m", "y", "cat", "/etc/group").lines
    assert own("run", "-m", "y", "sh", "-c", "cat ~/link").text == "x"
    refused(
        own("create", "--set-password", "alpine", "z", stdin=b"secret\n"), "cannot set the password"
    )


def test_base_with_the_users_home(own: Program, rootfs: Path, tmp_path: Path) -> None:
    """The user gets it, and what the skeleton adds. No link in it is followed."""
    base = tmp_path / "base"
    shutil.copytree(rootfs, base, symlinks=True)
    for name in ("etc/skel/deep", "home/me/deep", "home/linked"):
        (base / name).mkdir(parents=True)
    for name in ("etc/skel/.profile", "etc/skel/deep/new", "etc/skel/link"):
        (base / name).write_text("skeleton")
    for name in ("home/me/.profile", "home/me/deep/old"):
        (base / name).write_text("original")
    (base / "home/me/link").symlink_to("/etc/os-release")
    (base / "home/other").symlink_to("linked")
    (base / "home/file").write_text("original")
    assert own("image", "add", "alpine", str(base)).code == 0
    assert own("create", "-u", "me", "alpine", "m").code == 0
    script = "cd; cat .profile deep/old deep/new; echo; ls -lndU /etc/os-release . .profile deep"
    text, *lines = own("run", "-m", "m", "sh", "-c", f"{script} deep/new deep/old link").lines
    assert text == "originaloriginalskeleton"
    assert [line.split()[2] for line in lines] == ["0", *["501"] * 6], lines
    for user in ("other", "file"):
        answer = own("create", "-u", user, "alpine", "x")
        refused(answer, f"/home/{user} is not a directory in this image")
