"""Images built from a distribution's own archive, with its own tools.

They are small on purpose: a package that a deploy forgets to install must be missing here, too.
Each package is there for something that OrbStack's machines do; see `_PACKAGES`.
"""

from __future__ import annotations

import os
import shlex
import time

from . import mirrors, tools, unpack
from .linux import (
    CLONE_NEWNS,
    CLONE_NEWPID,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_REC,
    default_signals,
    end_with_parent,
    mount,
    unshare,
)
from .state import Failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .mirrors import Archive
    from .progress import Progress

_PACKAGES = (
    "apt",  # which Ubuntu does not mark as required
    *("systemd", "systemd-sysv"),  # the init, as in OrbStack's machines
    *("dbus", "dbus-user-session", "libpam-systemd"),  # hostnamectl, loginctl, systemctl --user
    "sudo",  # lets the default user become root
    "ca-certificates",  # archives and downloads over https
    *("iproute2", "iputils-ping", "netbase"),  # ip, ss, ping, /etc/services
    "procps",  # ps, sysctl
    "python3",  # every server that cloud-init has set up has it, and scripts expect it
)
# Files that a build leaves, but that a machine must not share with others or creates for itself.
_LEFT = (
    *("etc/apt/apt.conf.d/99mmdebstrap", "etc/dpkg/dpkg.cfg.d/99mmdebstrap"),
    *("etc/hostname", "etc/resolv.conf"),
    *("run/*", "tmp/*", "var/tmp/*"),
    *("var/lib/apt/lists/*", "var/cache/apt/*", "var/log/apt/*"),
    *("var/log/alternatives.log", "var/log/bootstrap.log", "var/log/dpkg.log"),
)
# In Ubuntu's newer releases, base-files provides usr-is-merged and contains the links. mmdebstrap's
# hooks mistake it for the package of that name, which then cannot be installed.
_MERGE = """set -e
run() {{ env --chdir="$1" APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" "$2" "$3" "$4"; }}
run "$1" apt-get update --error-on=any
[ -z "$(run "$1" apt-cache madison usr-is-merged)" ] || {0}/setup00.sh "$1"
"""
_MERGED = """set -e
status=$(dpkg-query --root="$1" -f '${{db:Status-Status}}' --show usr-is-merged || true)
[ "$status" != installed ] || {0}/essential00.sh "$1"
"""
_SETTINGS = "etc/apt/apt.conf.d/90mirror"
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_TICK = 0.1


class Builder:
    """A tool that builds root file systems, and that this host has or can download."""

    def __init__(self, name: str = "") -> None:
        self.name = name = name or builders()[0]
        tools.ensure((name,))
        self._tool = tools.find(name, (name,))
        share = os.path.join(os.path.dirname(os.path.dirname(self._tool.path)), "share")
        self._files = os.path.join(share, name)

    def command(self, archive: Archive, arch: str, target: str) -> tuple[list[str], dict[str, str]]:
        common = ["--variant=minbase", f"--include={','.join(_PACKAGES)}"]
        common.append(f"--keyring={archive.keyring}")
        if self.name == "mmdebstrap":
            words = [*common, "--mode=root", "--format=directory", f"--architectures={arch}"]
            words += [f"--aptopt={line}" for line in archive.settings]
            words += ["--dpkgopt=force-unsafe-io"]  # an incomplete build is not kept
            merging = shlex.quote(f"{self._files}/hooks/maybe-merged-usr")
            words += [f"--setup-hook={_MERGE.format(merging)}"]
            words += [f"--essential-hook={_MERGED.format(merging)}"]
            # Otherwise the keys that this host trusts for its own packages would also count.
            trust = f"deb [signed-by={archive.keyring}] "
            lines = [line.replace("deb ", trust, 1) for line in archive.lines]
            words += [archive.suite, target, *lines]
        else:
            words = [*common, f"--arch={arch}", archive.suite, target, archive.mirror]
        return [self._tool.path, *words], {
            **self._tool.environment,
            **mirrors.proxies(),
            "DEBOOTSTRAP_DIR": self._files,
            "HOME": "/root",
            "LC_ALL": "C.UTF-8",
            "TMPDIR": os.path.dirname(target),  # anything that it leaves there is removed
        }


def builders() -> list[str]:
    """The tools that this host has or can download, the faster one first."""
    return ["mmdebstrap", "debootstrap"] if tools.can_fetch() else ["debootstrap"]


def ready() -> str:
    """What can be built on this host, and with which tool."""
    names = [name for name in mirrors.NAMES if mirrors.can_trust(name)]
    if not names or not any(map(tools.is_available, builders())):
        return ""
    return f"{', '.join(names)}, with {builders()[0]}"


def build(
    builder: Builder, archive: Archive, arch: str, target: str, log: str, progress: Progress
) -> int:
    """Build a root file system in an empty directory. Returns its size in bytes."""
    command, env = builder.command(archive, arch, target)
    progress.step(f"{builder.name}")
    _run(command, env, log, progress)
    files = [("etc/apt/sources.list", "".join(f"{line}\n" for line in archive.lines))]
    if archive.settings:
        files.append((_SETTINGS, "".join(f"{line}\n" for line in archive.settings)))
    if builder.name == "debootstrap":  # it uses one suite, so not the security suite
        for path, text in files:
            with open(os.path.join(target, path), "w", encoding="utf-8") as file:
                file.write(text)
        script = "apt-get -q update && apt-get -qy dist-upgrade"
        env = {**env, "PATH": _PATH, "DEBIAN_FRONTEND": "noninteractive", "TMPDIR": "/tmp"}
        _run(["/usr/sbin/chroot", target, "/bin/sh", "-c", script], env, log, progress)
    return unpack.tidy(target, _LEFT, files)


def _run(command: list[str], env: dict[str, str], log: str, progress: Progress) -> None:
    """Run it in namespaces, so its mounts and processes end with it and with this process."""
    output = os.open(log, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        child = os.fork()
        if child == 0:
            try:
                _become(command, env, output)
            except BaseException as error:
                os.write(output, f"E: {error}\n".encode(errors="surrogateescape"))
            os._exit(1)
        try:
            status = _wait(child, output, progress)
        except BaseException:
            os.kill(child, 9)
            os.waitpid(child, 0)
            raise
        if status:
            lines = os.pread(output, 1 << 24, 0).decode(errors="replace").splitlines()
            wrong = [line[2:].strip() for line in lines if line.startswith("E:")]
            wrong = [line for line in wrong if "/dev/pts" not in line]
            reason = (wrong or lines[-1:] or ["it gave no reason"])[0]
            raise Failure(f"{os.path.basename(command[0])}: {reason} (full log: {log})")
    finally:
        os.close(output)


def _become(command: list[str], env: dict[str, str], output: int) -> None:
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    end_with_parent()
    unshare(CLONE_NEWNS | CLONE_NEWPID)
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    child = os.fork()
    if child:
        os._exit(1 if os.waitpid(child, 0)[1] else 0)
    end_with_parent()
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    default_signals()
    os.execve(command[0], command, env)


def _wait(child: int, output: int, progress: Progress) -> int:
    """Wait for its exit status, and show its progress messages."""
    place, rest = 0, b""
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        said = os.pread(output, 1 << 16, place)
        place += len(said)
        *lines, rest = (rest + said).split(b"\n")
        steps = [line[2:].strip() for line in lines if line.startswith(b"I:")]
        if steps:
            progress.step(f"{steps[-1].decode(errors='replace')[:50]},")
        if ended:
            return status
        progress.tick()
        if not said:
            time.sleep(_TICK)
