"""The built site: in a browser, at the widths and in the colors that readers use; its search."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

import pytest

from ..conftest import ROOT
from .conftest import Site

pytestmark = [pytest.mark.docs, pytest.mark.timeout(300)]

#: A desktop's and a phone's window.
SIZES = ((1280, 900), (390, 844))
#: The theme's name for the colors that a system asks for.
SCHEMES = {"light": "default", "dark": "slate"}

#: What sticks out of the page, and would make it scroll sideways.
TOO_WIDE = """() => document.documentElement.scrollWidth <= window.innerWidth ? [] :
  [...document.querySelectorAll('.md-content *')].filter(one => {
    const box = one.getBoundingClientRect()
    return box.right > window.innerWidth && box.width > 0
  }).map(one => one.outerHTML.slice(0, 120)).slice(0, 5).concat('the page scrolls sideways')"""
BROKEN_IMAGES = """() => [...document.images]
  .filter(one => !one.complete || !one.naturalWidth).map(one => one.src)"""
#: Text whose contrast to what is behind it is below 4.5, the least that WCAG allows.
TOO_PALE = """() => {
  const channels = text => (text.match(/[\\d.]+/g) || []).map(Number)
  const light = rgb => rgb.slice(0, 3).map(one => one / 255)
    .map(one => one <= 0.03928 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4)
    .reduce((sum, one, at) => sum + one * [0.2126, 0.7152, 0.0722][at], 0)
  const over = (top, under) => top.slice(0, 3)
    .map((one, at) => one * (top[3] ?? 1) + under[at] * (1 - (top[3] ?? 1)))
  const behind = one => {
    if (!one) return [255, 255, 255]
    const color = channels(getComputedStyle(one).backgroundColor)
    return over(color, (color[3] ?? 1) < 1 ? behind(one.parentElement) : [0, 0, 0])
  }
  return [...document.querySelectorAll('.md-content :is(h1, h2, h3, p, li, td, th, code, a)')]
    .filter(one => one.innerText?.trim() && !one.matches('.headerlink'))
    .map(one => {
      const back = behind(one)
      const [a, b] = [light(over(channels(getComputedStyle(one).color), back)), light(back)]
      return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), one.outerHTML.slice(0, 120)]
    }).filter(([ratio]) => ratio < 4.5).slice(0, 5)
}"""


# In a browser ------------------------------------------------------------------------------------


def test_pages_look_right(chromium: Any, site: Site) -> None:
    """Each page, at each width and in each color; nothing comes from another server."""
    page = chromium.new_page()
    said: list[str] = []
    page.on("console", lambda one: said.append(one.text) if one.type == "error" else None)
    page.on("pageerror", lambda one: said.append(str(one)))
    page.on("request", lambda one: said.extend(foreign(site, one.url)))
    page.on("response", lambda one: said.extend([one.url] if one.status >= 400 else []))
    wrong: dict[str, Any] = {}
    for path in site.pages():
        found: dict[str, Any] = {}
        page.emulate_media(color_scheme="light")
        page.goto(site.url + path, wait_until="load")
        for colors, scheme in SCHEMES.items():
            page.emulate_media(color_scheme=colors)
            page.wait_for_function(f"document.body.dataset.mdColorScheme == {scheme!r}")
            for width, height in SIZES:
                page.set_viewport_size({"width": width, "height": height})
                where = f"at {width} in {colors}"
                found[f"too wide {where}"] = page.evaluate(TOO_WIDE)
                found[f"too pale {where}"] = page.evaluate(TOO_PALE)
        found["broken images"] = page.evaluate(BROKEN_IMAGES)
        found["said"], said[:] = list(said), []
        if bad := {what: one for what, one in found.items() if one}:
            wrong[path] = bad
    page.close()
    assert len(site.pages()) > 20
    assert wrong == {}, json.dumps(wrong, indent=1)


def foreign(site: Site, url: str) -> list[str]:
    """The address, if another server has it."""
    return [] if url.startswith((site.url, "data:", "blob:")) else [url]


def test_search_finds_errors_by_their_text(chromium: Any, site: Site) -> None:
    page = chromium.new_page()
    for error in [error for error in errors() if len(error.split()) > 6][::20]:
        page.goto(site.url)
        page.locator(".md-search__input").fill(error.replace("...", "web"))
        first = page.locator(".md-search-result__link").first
        first.wait_for()
        assert "/troubleshooting/" in first.get_attribute("href"), error
    page.close()


def test_browser_of_the_computer_comes_first(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that does not start is not taken; without any, and without apt, the reason says so."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(browser, "MAC", tmp_path / "none")
    for name, status in (("chromium", 127), ("google-chrome", 0)):
        with pytest.raises(browser.Unavailable, match="there is no apt"):
            browser.find(tmp_path / "cache")
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {status}\n")
        (tmp_path / name).chmod(0o755)
    assert browser.find(tmp_path / "cache").executable == tmp_path / "google-chrome"


# Without one -------------------------------------------------------------------------------------


def errors() -> list[str]:
    """The texts of errors, as the headings of the page about them."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^#+ `(.*)`$", text, re.MULTILINE)


def test_search_holds_every_error(site: Site) -> None:
    index = json.loads((site.folder / "search" / "search_index.json").read_text())
    titles = {
        " ".join(html.unescape(re.sub(r"<[^>]+>", "", one["title"])).split())
        for one in index["docs"]
        if one["location"].startswith("troubleshooting/#")
    }
    missing = {" ".join(error.split()) for error in errors()} - titles
    assert errors()
    assert missing == set()


def test_pages_open_with_what_they_are_for(site: Site) -> None:
    for path in site.pages():
        text = (site.folder / path / "index.html").read_text(encoding="utf-8")
        assert re.search(r"</h1>\s*<p>(?!<img)", text), path


class _Links(HTMLParser):
    """Collects what a page links to, and what can be linked to in it."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = {"", "__codelineno"}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors |= {given.get("id") or "", given.get("name") or ""}
        for key in ("href", "src"):
            if given.get(key):
                self.links.append(given[key] or "")


def read(path: Path) -> _Links:
    """The links and anchors of a page."""
    parser = _Links()
    parser.feed(path.read_text(encoding="utf-8"))
    return parser


def internal(site: Site, path: str, links: list[str]) -> Iterator[tuple[str, str]]:
    """The files and anchors of the site that a page links to."""
    for link in links:
        there = urlsplit(urljoin(site.url + path, link))
        if f"{there.scheme}://{there.netloc}/" == site.url:
            file = unquote(there.path.lstrip("/"))
            yield f"{file}index.html" if file.endswith("/") or not file else file, there.fragment


def test_links_resolve(site: Site) -> None:
    pages = {f"{path}index.html": read(site.folder / path / "index.html") for path in site.pages()}
    broken = []
    for name, page in pages.items():
        for file, anchor in internal(site, name, page.links):
            there = (site.folder / file).is_file()
            if not there or (anchor and file in pages and anchor not in pages[file].anchors):
                broken.append(f"{name}: {file}#{anchor}")
    assert len(pages) > 20
    assert broken == []
