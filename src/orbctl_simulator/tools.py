"""The tools for networks and images: found on the host, or downloaded into the cache.

On Debian and Ubuntu, apt downloads a missing tool once, with the libraries that the host lacks. It
uses the host's sources and signatures, but caches, lists and archives in a temporary directory, and
no hooks, so the host's package state does not change. Nothing is installed: the packages are
unpacked into the cache and run from there. Elsewhere, ``listing`` returns the command that installs
them.
"""

from __future__ import annotations

import os

from .light import sha256, suppress
from .state import Failure, Lock, cache, say, write_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_PACKAGES = {
    "ip": {"apt-get": "iproute2", "dnf": "iproute", "*": "iproute2"},
    "nft": {"*": "nftables"},
    "dnsmasq": {"apt-get": "dnsmasq-base", "*": "dnsmasq"},
    "slirp4netns": {"*": "slirp4netns"},
    "mmdebstrap": {"*": "mmdebstrap"},
    "debootstrap": {"*": "debootstrap"},
    "xz": {"apt-get": "xz-utils", "*": "xz"},
    "zstd": {"*": "zstd"},
    "bzip2": {"*": "bzip2"},
    "gzip": {"*": "gzip"},
}
#: The tools for the network, which are the default.
NAMES = ("ip", "nft", "dnsmasq", "slirp4netns")
_INSTALLERS = {
    "apt-get": "apt-get install --no-install-recommends",
    "dnf": "dnf install",
    "zypper": "zypper install",
    "pacman": "pacman -S",
    "apk": "apk add",
    "xbps-install": "xbps-install -S",
}
_DIRECTORIES = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_STATUS = "/var/lib/dpkg/status"
_OPENED: dict[str, int] = {}
_VERSION = {"ip": "-V"}
_APT_DIRECTORIES = {
    "State": "state",
    "State::lists": "state/lists",
    "Cache": "cache",
    "Cache::archives": "cache/archives",
    "Log": "log",
}
_APT = """\
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Pre-Invoke;
#clear DPkg::Pre-Install-Pkgs;
#clear DPkg::Post-Invoke;
Debug::NoLocking "true";
APT::Sandbox::User "root";
APT::Install-Recommends "false";
APT::Update::Error-Mode "any";
Acquire::Retries "1";
Acquire::http::Timeout "30";
Dir::State::status "/var/lib/dpkg/status";
"""


class Tool:
    """An executable; if it was downloaded, also the directory that contains its libraries."""

    def __init__(self, path: str, root: str = "") -> None:
        self.path, self.root = path, root
        self.environment = {"PATH": _DIRECTORIES, "LC_ALL": "C"}
        if root:
            self.environment["LD_LIBRARY_PATH"] = _libraries(root)
            self.environment["DEBOOTSTRAP_DIR"] = os.path.join(root, "usr/share/debootstrap")

    def seen_at(self, place: str) -> Tool:
        """The same tool, with its directory mounted at another place."""
        return Tool(place + self.path[len(self.root) :], place)


def find(name: str, names: Sequence[str] = NAMES) -> Tool:
    """The host's tool, otherwise the cached one, which was downloaded with these `names`."""
    path = _on_host(name)
    if path:
        return Tool(path)
    root = _place(_missing(names))
    path = _below(root, name)
    if not path:
        raise Failure(f"{name} is not installed: {install_command([name])}")
    return Tool(path, root)


def call(name: str, *words: str, text: str = "") -> str:
    """Run a tool in the namespaces of this process. If it fails, raises its error message."""
    return _run(find(name), list(words), name, text)


def start(name: str, *words: str, text: str = "") -> Call:
    """Like `call`, but do not wait for it."""
    return Call(find(name), list(words), name, text)


def ip(lines: list[str]) -> None:
    """Run several ``ip`` commands in one process."""
    call("ip", "-batch", "-", text="\n".join([*lines, ""]))


def ensure(names: Sequence[str] = NAMES) -> None:
    """Download missing tools, or raise an error that says what to install."""
    missing = _missing(names)
    if not missing:
        return
    root = _place(missing)
    if _usable(root, missing):
        return
    if not can_fetch():
        raise Failure(f"{', '.join(missing)}: not installed: {install_command(missing)}")
    os.makedirs(cache(), mode=0o700, exist_ok=True)
    with Lock(root + ".lock"):
        if not _usable(root, missing):
            say(f"downloading {', '.join(missing)} once, into {cache()}")
            packages = [_package(name, "apt-get") for name in missing]
            _fetch(packages, root, lambda new: _try(new, missing))


def ensure_file(package: str, path: str, source: str = "") -> str:
    """A file from a package: the host's own, otherwise downloaded once.

    It comes from the host's own archive, or from `source`, a line for apt, if that lacks it.
    """
    if os.path.exists(path):
        return path
    root = _place([package])
    if not os.path.exists(root + path):
        if not can_fetch():
            raise Failure(f"{path} not found: install {package}")
        os.makedirs(cache(), mode=0o700, exist_ok=True)
        with Lock(root + ".lock"):
            if not os.path.exists(root + path):
                say(f"downloading {package} once, into {cache()}")
                try:
                    _fetch([package], root, lambda new: os.stat(new + path))
                except Failure:
                    if not source:
                        raise
                    _fetch([package], root, lambda new: os.stat(new + path), source)
    return root + path


def is_available(name: str) -> bool:
    """Whether it is installed, or could be downloaded."""
    return bool(_on_host(name)) or can_fetch()


def can_fetch() -> bool:
    return all(_on_host(name) for name in ("apt-get", "dpkg-deb")) and os.path.exists(_STATUS)


def listing() -> list[tuple[str, str, str]]:
    """Each tool, its path or nothing, and the command that installs it."""
    found = []
    for name in NAMES:
        path = _on_host(name) or _below(_place(_missing()), name)
        found.append((name, path, install_command([name])))
    return found


def install_command(names: list[str]) -> str:
    installer = next((name for name in _INSTALLERS if _on_host(name)), "")
    packages = [_package(name, installer) for name in names]
    command = _INSTALLERS.get(installer, "install the packages")
    return " ".join([command, *packages])


def _package(name: str, installer: str) -> str:
    return _PACKAGES[name].get(installer, _PACKAGES[name]["*"])


def _missing(names: Sequence[str] = NAMES) -> list[str]:
    return [name for name in names if not _on_host(name)]


def _on_host(name: str) -> str:
    for folder in f"{os.environ.get('PATH', '')}:{_DIRECTORIES}".split(":"):
        path = os.path.join(folder, name)
        usable = folder.startswith("/") and os.access(path, os.X_OK) and os.path.isfile(path)
        if usable and os.path.basename(os.path.realpath(path)) != "busybox":  # lacks parts of `ip`
            return path
    return ""


def _below(root: str, name: str) -> str:
    paths = (os.path.join(root, folder, name) for folder in ("usr/sbin", "usr/bin", "sbin", "bin"))
    return next((path for path in paths if os.access(path, os.X_OK)), "")


def _libraries(root: str) -> str:
    if ":" in root or ";" in root:  # it would end an entry of the list
        root = f"/proc/self/fd/{_opened(root)}"
    folders = []
    for parent in (os.path.join(root, "usr/lib"), os.path.join(root, "lib")):
        if os.path.isdir(parent):
            folders += [parent] + [entry.path for entry in os.scandir(parent) if entry.is_dir()]
    return ":".join(folders)


def _opened(root: str) -> int:
    if root not in _OPENED:
        _OPENED[root] = os.open(root, os.O_PATH)
        os.set_inheritable(_OPENED[root], True)
    return _OPENED[root]


def _place(missing: list[str]) -> str:
    """The directory of these tools for this distribution; hosts with the same one may share it."""
    told = os.uname().machine
    for path in ("/etc/os-release", "/usr/lib/os-release"):
        if os.path.isfile(path):
            with open(path, "rb") as file:
                told += repr([line for line in file if line.startswith((b"ID=", b"VERSION"))])
            break
    return os.path.join(cache(), "tools-" + sha256(f"1 {told} {missing}".encode()).hexdigest()[:16])


def _usable(root: str, names: list[str]) -> bool:
    """Whether all exist and run. They are tried again after the host's packages have changed."""
    stamp = os.path.join(root, "stamp")
    try:
        state = os.stat(_STATUS)
        now = f"{state.st_size} {state.st_mtime_ns}"
        with open(stamp) as file:
            if file.read() == now:
                return True
        _try(root, names)
        write_file(stamp, now)
        return True
    except (OSError, Failure):
        return False


def _try(root: str, names: list[str]) -> None:
    for name in names:
        _run(Tool(_below(root, name), root), [_VERSION.get(name, "--version")], name)


def _fetch(
    packages: list[str], root: str, check: Callable[[str], object], source: str = ""
) -> None:
    """Unpack packages into `root`, unless `check` of the directory fails."""
    from shutil import rmtree
    from tempfile import mkdtemp

    for name in os.listdir(cache()):
        if name.startswith(os.path.basename(root) + ".build-"):  # left by a killed call
            rmtree(os.path.join(cache(), name), ignore_errors=True)
    place = mkdtemp(prefix=os.path.basename(root) + ".build-", dir=cache())
    try:
        folder = os.path.join(place, "apt")
        for name in ("state/lists/partial", "cache/archives/partial", "log"):
            os.makedirs(os.path.join(folder, name))
        with open(os.path.join(folder, "conf"), "w") as file:
            file.write(_APT)
        _download(packages, folder, source)
        new = os.path.join(place, "root")
        os.mkdir(new, 0o755)
        archives = os.path.join(folder, "cache/archives")
        for archive in sorted(os.listdir(archives)):
            if archive.endswith(".deb"):
                _run(Tool(_on_host("dpkg-deb")), ["-x", os.path.join(archives, archive), new])
        check(new)
        with open(os.path.join(new, "stamp"), "w") as file:
            state = os.stat(_STATUS)
            file.write(f"{state.st_size} {state.st_mtime_ns}")
        rmtree(root, ignore_errors=True)
        os.rename(new, root)
    except OSError as error:
        raise Failure(f"cannot download {', '.join(packages)}: {error}") from None
    finally:
        rmtree(place, ignore_errors=True)


def _download(packages: list[str], folder: str, source: str) -> None:
    """Download them with the host's package lists, otherwise with new ones."""
    apt = Tool(_on_host("apt-get"))
    proxies = {key: value for key, value in os.environ.items() if key.lower().endswith("_proxy")}
    apt.environment.update(proxies, DEBIAN_FRONTEND="noninteractive")
    options = ["-c", os.path.join(folder, "conf"), "-q", "-y"]
    for key, path in _APT_DIRECTORIES.items():
        options += ["-o", f"Dir::{key}={os.path.join(folder, path)}"]
    install = ["--download-only", "--reinstall", "install", *packages]
    if source:
        path = os.path.join(folder, "sources")
        write_file(path, source + "\n")
        options += ["-o", f"Dir::Etc::SourceList={path}", "-o", "Dir::Etc::SourceParts=-"]
    else:
        with suppress(Failure):
            _run(apt, [*options, "-o", "Dir::State::lists=/var/lib/apt/lists", *install])
            return
    try:
        _run(apt, [*options, "update"])
        _run(apt, [*options, *install])
    except Failure as failure:
        command = f"{_INSTALLERS['apt-get']} {' '.join(packages)}"
        raise Failure(f"cannot download {', '.join(packages)} ({failure}): {command}") from None


def _run(tool: Tool, words: list[str], name: str = "", text: str = "") -> str:
    return Call(tool, words, name, text).wait()


class Call:
    """A running tool."""

    def __init__(self, tool: Tool, words: list[str], name: str = "", text: str = "") -> None:
        self._name = name or os.path.basename(tool.path)
        given = os.memfd_create("given")
        self._shown = os.memfd_create("shown")
        try:
            os.write(given, text.encode())
            os.lseek(given, 0, os.SEEK_SET)
            actions = [(os.POSIX_SPAWN_DUP2, given, 0)]
            actions += [(os.POSIX_SPAWN_DUP2, self._shown, fd) for fd in (1, 2)]
            command = [tool.path, *words]
            self._pid = os.posix_spawn(tool.path, command, tool.environment, file_actions=actions)
        except OSError:
            os.close(self._shown)
            raise
        finally:
            os.close(given)

    def wait(self) -> str:
        """Wait until it has ended; returns its output. If it fails, raises its error message."""
        try:
            status = os.waitpid(self._pid, 0)[1]
            path = f"/proc/self/fd/{self._shown}"
            with open(path, encoding="utf-8", errors="replace") as file:
                output = file.read()
        finally:
            os.close(self._shown)
        if status:
            lines = [line.strip() for line in output.splitlines() if line.strip()]
            wrong = [line for line in lines if line.startswith(("E:", "Error", "RTNETLINK"))]
            reason = (wrong or lines or [f"exited with status {status}"])[0]
            raise Failure(f"{self._name}: {reason}")
        return output
