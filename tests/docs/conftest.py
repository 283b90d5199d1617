from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import pytest

from pyinfra_orbstack.testing import unavailable

from ..conftest import ROOT


class Site(NamedTuple):
    """The built documentation."""

    folder: Path
    #: A name that no server has: the browser gets each file from the tests.
    url: str = "http://docs.test/"

    def answer(self, route: Any) -> None:
        """Answer a browser's request. Over a network, one that changes meanwhile would fail it."""
        path = unquote(urlsplit(route.request.url).path)
        file = self.folder / path.lstrip("/")
        file = file / "index.html" if path.endswith("/") else file
        if not route.request.url.startswith(self.url):
            route.abort()
        elif file.is_file():
            route.fulfill(path=file)
        else:
            route.fulfill(status=404)

    def pages(self) -> list[str]:
        """The path of each page that a reader can reach."""
        found = [path.parent for path in self.folder.rglob("index.html")]
        return sorted(f"{path.relative_to(self.folder)}/".replace("./", "") for path in found)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("site")
    argv = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return Site(folder)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """The module in `scripts/` that finds or fetches a browser."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        import browser

        yield browser


@pytest.fixture(scope="session")
def chromium(browser: Any, site: Site) -> Iterator[Any]:
    """A headless browser, started, which sees the site and no network."""
    from playwright.sync_api import sync_playwright

    try:
        found = browser.find(ROOT / ".cache" / "browser")
    except browser.Unavailable as reason:
        unavailable(str(reason), "browser")
    env = {**os.environ, **found.environment}
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found.executable, env=env)
        context = started.new_context(reduced_motion="reduce")
        context.set_default_timeout(120_000)  # on a busy computer
        context.route("**/*", lambda route: site.answer(route))
        yield context
        started.close()
