"""Where a distribution's packages come from, and which keys verify them.

If the host runs the same distribution, its own mirror is used: it may be the only reachable one, or
its CI's local one. The host's settings about the age of package lists belong to that mirror.
"""

from __future__ import annotations

import os
import re
import subprocess

from . import tools, web
from .state import Failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_KEYRINGS = "/usr/share/keyrings"
_SETTINGS = ("Acquire::Check-Valid-Until", "Acquire::Check-Date")


class _Distro:
    def __init__(
        self,
        mirror: str,
        package: str,
        components: str = "main",
        suffixes: tuple[str, ...] = (),
        security: str = "",
        ports: str = "",
        suite: str = "",
    ) -> None:
        self.mirror, self.security, self.ports = mirror, security or mirror, ports
        self.package, self.components, self.suffixes = package, components, suffixes
        self.suite = suite

    @property
    def keyring_path(self) -> str:
        return f"{_KEYRINGS}/{self.package}.gpg"


_DISTROS = {
    "debian": _Distro(
        "http://deb.debian.org/debian",
        "debian-archive-keyring",
        suffixes=("-updates", "-security"),
        security="http://deb.debian.org/debian-security",
    ),
    "kali": _Distro(
        "http://http.kali.org/kali",
        "kali-archive-keyring",
        "main contrib non-free non-free-firmware",
        suite="kali-rolling",
    ),
    "ubuntu": _Distro(
        "http://archive.ubuntu.com/ubuntu",
        "ubuntu-archive-keyring",
        "main restricted universe multiverse",
        suffixes=("-updates", "-security"),
        security="http://security.ubuntu.com/ubuntu",
        ports="http://ports.ubuntu.com/ubuntu-ports",
    ),
}
NAMES = tuple(_DISTROS)


class Archive:
    """One release of a distribution: its suites as lines for apt, its keyring, its settings."""

    def __init__(self, mirror: str, suite: str, lines: list[str], keyring: str) -> None:
        self.mirror, self.suite, self.lines, self.keyring = mirror, suite, lines, keyring
        self.settings: list[str] = []


class Entry:
    """One entry of a host's package sources."""

    def __init__(self, uris: list[str], suites: list[str]) -> None:
        self.uris, self.suites = uris, suites


def can_trust(distro: str) -> bool:
    """Whether the keys that sign its archive are installed, or can be downloaded."""
    return os.path.exists(_DISTROS[distro].keyring_path) or tools.can_fetch()


def _vouching() -> str:
    """Debian's newest release as a line for apt: it also has the keyrings of others."""
    debian = _DISTROS["debian"]
    if not os.path.exists(debian.keyring_path):
        return ""
    return f"deb [signed-by={debian.keyring_path}] {debian.mirror} stable main"


def find(distro: str, version: str, arch: str, host: tuple[str, str]) -> Archive:
    """The archive of a release; `host` is this host's own distribution and version."""
    known = _DISTROS.get(distro)
    if known is None:
        raise Failure(f"images of {distro} cannot be built")
    mirror, security = known.mirror, known.security
    if known.ports and arch not in ("amd64", "i386"):
        mirror = security = known.ports
    own = list(_entries("/etc/apt")) if host[0] == distro else []
    mirror = _mirror_of(own, host[1]) or mirror
    security = _mirror_of(own, f"{host[1]}-security") or security
    suite = known.suite or version
    web.reach(mirror)
    if not web.exists(f"{mirror}/dists/{suite}/InRelease"):
        raise web.Missing(f"{web.shown(mirror)} has no {suite}")
    trusted = tools.ensure_file(known.package, known.keyring_path, _vouching())
    if not re.fullmatch(r"[\w./+-]+", trusted):  # apt accepts no other characters in this option
        raise Failure(f"{known.keyring_path} not found: install {known.package}")
    lines = [f"deb {mirror} {suite} {known.components}"]
    for suffix in known.suffixes:
        place = security if suffix == "-security" else mirror
        if web.exists(f"{place}/dists/{suite}{suffix}/InRelease"):
            lines.append(f"deb {place} {suite}{suffix} {known.components}")
    archive = Archive(mirror, suite, lines, trusted)
    if own:
        archive.settings = _settings()
    return archive


def _mirror_of(entries: list[Entry], suite: str) -> str:
    """The first server that the host's sources list for a suite."""
    for entry in entries:
        for uri in entry.uris if suite in entry.suites else ():
            if uri.startswith(("http://", "https://")) and "@" not in uri:
                return uri.rstrip("/")
    return ""


def _entries(folder: str) -> Iterator[Entry]:
    """The host's package sources, in both formats."""
    parts = os.path.join(folder, "sources.list.d")
    names = sorted(os.listdir(parts)) if os.path.isdir(parts) else []
    for path in (os.path.join(folder, "sources.list"), *(os.path.join(parts, n) for n in names)):
        if not path.endswith((".list", ".sources")) or not os.path.isfile(path):
            continue
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read()
        yield from (_lines if path.endswith(".list") else _stanzas)(text)


def _lines(text: str) -> Iterator[Entry]:
    """``deb [options] URI suite component...``"""
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if words[:1] == ["deb"]:
            if len(words) > 1 and words[1].startswith("["):
                end = next((n for n, word in enumerate(words) if word.endswith("]")), len(words))
                words = ["deb", *words[end + 1 :]]
            if len(words) > 2:
                yield Entry([words[1]], [words[2]])


def _stanzas(text: str) -> Iterator[Entry]:
    """Paragraphs of ``Field: values``, continued by lines that begin with a space."""
    for paragraph in "\n".join(
        line for line in text.splitlines() if not line.startswith("#")
    ).split("\n\n"):
        fields: dict[str, list[str]] = {}
        name = ""
        for line in paragraph.splitlines():
            if not line.startswith((" ", "\t")):
                name, _, line = line.partition(":")
                name = name.strip().lower()
            fields.setdefault(name, []).extend(line.split())
        enabled = [word.lower() for word in fields.get("enabled", ["yes"])]
        if "deb" in fields.get("types", []) and enabled[:1] != ["no"]:
            yield Entry(fields.get("uris", []), fields.get("suites", []))


def _settings() -> list[str]:
    """Settings of this host's apt that its mirror requires."""
    return [line for line in _dump(*_SETTINGS) if line.endswith(('"false";', '"0";', '"no";'))]


def proxies() -> dict[str, str]:
    """The environment's proxies, otherwise the one that this host's apt uses."""
    found = {key: value for key, value in os.environ.items() if key.lower().endswith("_proxy")}
    if "http_proxy" not in found:
        for line in _dump("Acquire::http::Proxy"):
            value = line.partition('"')[2].partition('"')[0]
            if value.startswith("http"):
                found["http_proxy"] = value
    return found


def _dump(*names: str) -> list[str]:
    try:
        done = subprocess.run(
            ["apt-config", "dump", *names], capture_output=True, text=True, check=False
        )
    except OSError:
        return []
    lines = done.stdout.splitlines()
    return [line for line in lines if line.partition(" ")[0] in names]
