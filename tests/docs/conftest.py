from __future__ import annotations

import functools
import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pyinfra_orbstack.testing import unavailable

from ..conftest import ROOT


class Site(NamedTuple):
    """The built documentation, and the address that serves it."""

    folder: Path
    url: str

    def pages(self) -> list[str]:
        """The path of each page that a reader can reach."""
        found = [path.parent for path in self.folder.rglob("index.html")]
        return sorted(f"{path.relative_to(self.folder)}/".replace("./", "") for path in found)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Keep requests out of the tests' output."""


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    argv = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Site(folder, f"http://127.0.0.1:{server.server_port}/")
        server.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """The module in `scripts/` that finds or fetches a browser."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        import browser

        yield browser


@pytest.fixture(scope="session")
def chromium(browser: Any) -> Iterator[Any]:
    """A headless browser, started."""
    from playwright.sync_api import sync_playwright

    try:
        found = browser.find(ROOT / ".cache" / "browser")
    except browser.Unavailable as reason:
        unavailable(str(reason), "browser")
    env = {**os.environ, **found.environment}
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found.executable, env=env)
        yield started
        started.close()
