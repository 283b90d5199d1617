"""A Chromium for the tests of the site: the computer's own, or Debian's, kept in `.cache`.

Nothing is installed: apt downloads the packages that this system lacks, and they are extracted
below `.cache/browser`. That needs no root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

PACKAGE = "chromium-headless-shell"
#: On PATH, under the names that distributions and Google use.
NAMES = (PACKAGE, "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
#: Where Chrome is on a Mac.
MAC = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")


class Unavailable(Exception):
    """This host has no browser, and none could be downloaded."""


class Browser(NamedTuple):
    """A browser that can be started.

    Attributes:
        executable: Path of the browser.
        environment: Variables that it needs, in addition to the usual ones.
    """

    executable: Path
    environment: dict[str, str]

    def starts(self) -> bool:
        """Whether it runs here, with all its libraries."""
        env = {**os.environ, **self.environment}
        argv = [str(self.executable), "--version"]
        try:
            return not subprocess.run(argv, env=env, capture_output=True, timeout=60).returncode
        except (OSError, subprocess.TimeoutExpired):
            return False


def find(cache: Path) -> Browser:
    """A browser of this computer, else one in the cache, fetched if it is not there.

    Raises:
        Unavailable: There is none, with the reason.
    """
    for name in (*NAMES, str(MAC)):
        found = Browser(Path(shutil.which(name) or name), {})
        if found.starts():
            return found
    root = cache / "root"
    if not _extracted(root).starts():
        fetch(PACKAGE, cache, root)
    found = _extracted(root)
    if not found.starts():
        raise Unavailable(f"{found.executable} does not start here")
    return found


def _extracted(root: Path) -> Browser:
    """The browser of packages that were extracted to a directory."""
    libraries = {path.parent for path in root.glob("usr/lib/*-linux-*/**/*.so*")}
    environment = {
        "LD_LIBRARY_PATH": os.pathsep.join(sorted(map(str, libraries))),
        "XDG_DATA_DIRS": f"{root}/usr/share:/usr/local/share:/usr/share",
        "XDG_DATA_HOME": f"{root}/usr/share",  # where fontconfig looks for fonts
    }
    if not Path("/etc/fonts/fonts.conf").exists():
        environment["FONTCONFIG_PATH"] = f"{root}/etc/fonts"
    return Browser(root / "usr" / "lib" / "chromium" / PACKAGE, environment)


def fetch(package: str, cache: Path, root: Path) -> None:
    """Download a package, and those that it needs and that are missing, and extract them.

    Raises:
        Unavailable: That failed, with the reason.
    """
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise Unavailable(f"{package} is not on PATH, and there is no apt to download it with")
    for folder in ("lists/partial", "archives/partial"):
        (cache / folder).mkdir(parents=True, exist_ok=True)
    settings = [f"Dir::State::lists={cache}/lists", f"Dir::Cache={cache}"]
    settings += [f"Dir::Cache::archives={cache}/archives", f"Dir::State={cache}"]
    # The system's own record says what is there already.
    settings += ["Dir::State::status=/var/lib/dpkg/status", "Debug::NoLocking=1"]
    # apt would give up root for a user who may not write here.
    settings += ["APT::Sandbox::User=root", "Acquire::Retries=2", "Acquire::http::Timeout=20"]
    apt = ["apt-get", "-qq", "-y", *(word for one in settings for word in ("-o", one))]
    _run([*apt, "update"])
    _run([*apt, "install", "--no-install-recommends", "--download-only", package])
    shutil.rmtree(root, ignore_errors=True)
    for archive in sorted((cache / "archives").glob("*.deb")):
        _run(["dpkg-deb", "--extract", str(archive), str(root)])
        archive.unlink()
    shutil.rmtree(cache / "lists")


def _run(argv: list[str]) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, errors="replace", timeout=600)
    if done.returncode:
        raise Unavailable(f"{argv[0]}: {done.stderr.strip() or done.returncode}")
