"""`make release-check`: everything that a release needs, item by item.

ITEM=NAME,NAME checks only some of it, ITEM=-NAME,NAME all but some.

The first item that fails ends the check, so that the last output says what to do.
"""

from __future__ import annotations

import json
import os
import re
import ssl
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ending
import measure
import yaml
from checkout import BIN, NAME, ROOT, Checkout, Problem, need, read_metadata

REPOSITORY = "https://github.com/elazar/pyinfra-orbstack"
URLS = {
    "Homepage": REPOSITORY,
    "Repository": REPOSITORY,
    "Documentation": f"{REPOSITORY}#readme",
    "Issues": f"{REPOSITORY}/issues",
    "Changelog": f"{REPOSITORY}/blob/main/CHANGELOG.md",
}
#: Where files of the repository appear on the web.
SEEN = re.compile(
    r"https://(?:github\.com/elazar/pyinfra-orbstack/(?:blob|tree|raw)"
    r"|raw\.githubusercontent\.com/elazar/pyinfra-orbstack)/main/([^)#?\s\"]+)"
)
VERSION = re.compile(r"\d+\.\d+\.\d+(?:(?:a|b|rc)\d+)?")
UNRELEASED = "## [Unreleased]"
#: `make release` has changed these, and commits them if the check passes.
RELEASING = {"CHANGELOG.md", "pyproject.toml"}


# Items -----------------------------------------------------------------------------------------


def lint(checkout: Checkout) -> str:
    """Style."""
    checkout.tool("ruff", "check", "--no-cache")
    checkout.tool("ruff", "format", "--check", "--no-cache")
    return "ruff has nothing to say"


def types(checkout: Checkout) -> str:
    """Types."""
    return checkout.tool("mypy").strip().splitlines()[-1]


def tests(checkout: Checkout) -> str:
    """The test suite passes."""
    if measure.have_passed(checkout.root):
        return "passed before, for the same content"
    result = measure.recorded(checkout.root)
    again = result is not None
    result = result or measure.measure(checkout.root)
    need(result["passed"], "the tests failed: make test")
    return "passed before, for the same content" if again else "passed"


def coverage(checkout: Checkout) -> str:
    """They cover as much of `src/` as they should."""
    result = measure.recorded(checkout.root) or measure.measure(checkout.root)
    percent = result["percent"]
    need(percent >= measure.NEEDED, f"{percent:.1f} % of src/, needed are {measure.NEEDED:g} %")
    for path in sorted((checkout.root / "src").rglob("*.py")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            bare = re.search(r"pragma: no cover\s*$", line)
            need(not bare, f"{path}:{number}: a pragma without a reason")
    return f"{percent:.1f} % of src/ (needed {measure.NEEDED:g} %)"


def metadata(checkout: Checkout) -> str:
    """Metadata are complete."""
    project = checkout.project
    checkout.tool("validate-pyproject", "pyproject.toml")
    need(VERSION.fullmatch(checkout.version), f"{checkout.version!r} is not a semantic version")
    need(project.get("urls") == URLS, f"the URLs are not {json.dumps(URLS, indent=4)}")
    need(project["name"] == NAME, f"the name is not {NAME}")
    classifiers = project["classifiers"]
    wanted = [f"Programming Language :: Python :: 3.{minor}" for minor in range(9, 15)]
    wanted += ["Framework :: Pytest", "Operating System :: MacOS", "Typing :: Typed"]
    wanted += ["Operating System :: POSIX :: Linux"]
    for classifier in wanted:
        need(classifier in classifiers, f"the classifier {classifier!r} is missing")
    need(not any(c.startswith("License ::") for c in classifiers), "a license classifier (PEP 639)")
    code = "\n".join(p.read_text(encoding="utf-8") for p in (checkout.root / "src").rglob("*.py"))
    twice = re.search(r"^\s*__version__\s*(?::\s*\w+)?\s*=\s*[\"']", code, re.MULTILINE)
    need(not twice, "src/ has a version of its own: keep it only in pyproject.toml")
    checkout.tool("pyroma", "--min=10", checkout.sdist)
    return f"version {checkout.version}; validate-pyproject and pyroma have nothing to say"


def build(checkout: Checkout) -> str:
    """Both archives can be built from committed files."""
    changed = {line[3:] for line in checkout.run("git", "status", "--porcelain").splitlines()}
    changed -= RELEASING if checkout.releasing else set()
    need(not changed, f"not committed: {', '.join(sorted(changed))}")
    return ", ".join(path.name for path in checkout.dist)


def contents(checkout: Checkout) -> str:
    """The archives contain what they should, and nothing else."""
    files = checkout.files()
    with zipfile.ZipFile(checkout.wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
        licenses = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    expected = {name[len("src/") :] for name in files if name.startswith("src/")}
    strange, missing = sorted(inside - expected), sorted(expected - inside)
    need(not strange, f"the wheel contains files that are not in src/: {', '.join(strange)}")
    need(not missing, f"the wheel lacks {', '.join(missing)}")
    need(licenses, "the wheel has no license")
    with tarfile.open(checkout.sdist) as sdist:
        packed = {member.name.partition("/")[2] for member in sdist.getmembers()}
    made = {"PKG-INFO"}
    strange, missing = sorted(packed - files - made), sorted(files - packed)
    need(not strange, f"the sdist has what git does not keep: {', '.join(strange)}")
    need(not missing, f"the sdist lacks {', '.join(missing)}")
    checkout.tool("check-wheel-contents", checkout.wheel)
    return f"{len(inside)} files in the wheel, {len(packed)} in the sdist"


def strict(checkout: Checkout) -> str:
    """An index would accept them."""
    checkout.tool("twine", "check", "--strict", *checkout.dist)
    return checkout.tool("twine", "--version").split("(")[0].strip()


def readme(checkout: Checkout) -> str:
    """The links in the README work as an index shows it."""
    text = str(checkout.metadata.get_payload())
    targets = set(re.findall(r"\]\(([^)\s]+)\)", text))
    targets |= set(re.findall(r"(?:src|href)=\"([^\"]+)\"", text))
    need(targets, "README has no links: was it read?")
    for target in sorted(targets):
        whole = target.startswith(("https://", "#"))
        need(whole, f"README: the link {target!r} means nothing on an index")
        seen = SEEN.match(target)
        there = not seen or (checkout.root / seen[1]).exists()
        need(there, f"README: {target} is not in the repository")
    return f"{len(targets)} links and pictures"


def index(checkout: Checkout) -> str:
    """Name and version are free, or the name is ours."""
    url = index_url().rstrip("/") + f"/{NAME}/"
    try:
        page = fetch(url).decode()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return f"{NAME} is free"
        return f"unknown: {url} answers {error.code}"
    except OSError as error:
        return f"unknown: {error}"
    links = re.findall(r'href="([^"]+)"', page)
    wheels = {}
    for link in links:
        file = urllib.parse.unquote(link.partition("#")[0].rpartition("/")[2])
        match = re.fullmatch(r"pyinfra_orbstack-([^-]+)-.*\.whl", file)
        if match:
            wheels[match[1]] = link
    need(wheels, f"{url} has no wheel from which to identify the owner of {NAME}")
    newest = max(wheels, key=version_key)
    try:
        theirs = read_metadata(fetch(urllib.parse.urljoin(url, wheels[newest])))
    except OSError as error:
        return f"unknown: {error}"
    ours = any(value.endswith(REPOSITORY) for value in theirs.get_all("Project-URL", []))
    need(ours, f"{NAME} {newest} exists and is not ours")
    need(checkout.version not in wheels, f"{NAME} {checkout.version} already exists")
    return f"{NAME} is ours, newest is {newest}; {checkout.version} is free"


def index_url() -> str:
    """The index that pip uses."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.index-url"],
        capture_output=True,
        text=True,
    )
    return os.environ.get("PIP_INDEX_URL") or done.stdout.strip() or "https://pypi.org/simple"


def fetch(url: str) -> bytes:
    """Download something from an index."""
    tls = ssl.create_default_context(cafile=os.environ.get("PIP_CERT"))
    with urllib.request.urlopen(url, context=tls, timeout=30) as answer:  # noqa: S310
        content: bytes = answer.read()
    return content


def version_key(version: str) -> list[int]:
    """The sort key of a version; good enough for ours."""
    return [int(part) for part in re.findall(r"\d+", version)]


def changes(text: str, version: str) -> str:
    """The changelog entry of a version, if there is one."""
    begin = rf"^## \[{re.escape(version)}\][^\n]*\n(.*?)(?=^## |^\[[^\]]+\]: |\Z)"
    found = re.search(begin, text, re.MULTILINE | re.DOTALL)
    return found[1].strip() if found and re.search(r"^- ", found[1], re.MULTILINE) else ""


def changelog(checkout: Checkout) -> str:
    """The changelog has an entry for the release."""
    text = checkout.text("CHANGELOG.md")
    version = checkout.version
    heading = re.search(rf"^## \[{re.escape(version)}\](.*)$", text, re.MULTILINE)
    if heading:
        need(re.fullmatch(r" - \d{4}-\d\d-\d\d", heading[1]), f"{version} has no date")
        need(changes(text, version), f"CHANGELOG.md has no entry for {version}")
        return f"{version} is dated{heading[1].replace(' -', '')}"
    tagged = f"v{version}" in checkout.git("tag", "--points-at", "HEAD").splitlines()
    need(not tagged, f"HEAD is tagged v{version}, and CHANGELOG.md has no section for it")
    need(not checkout.releasing, f"CHANGELOG.md has no section for {version}")
    need(changes(text, "Unreleased"), f"CHANGELOG.md has no entry below {UNRELEASED}")
    return f"{version} is not released yet: its entries stand below Unreleased"


def badges(checkout: Checkout) -> str:
    """Badges show something that exists."""
    text = checkout.text("README.md")
    found = re.findall(r"\[!\[([^\]]*)\]\(([^)]+)\)\]\(([^)]+)\)", text)
    for label, picture, _ in found:
        workflow = re.search(r"actions/workflows/([^/]+)/badge\.svg", picture)
        if workflow:
            path = checkout.root / ".github" / "workflows" / workflow[1]
            need(path.exists(), f"the badge {label!r} is of {workflow[1]}, which does not exist")
        elif "shields.io" in picture or "codecov.io" in picture:
            name = re.search(r"/pypi/\w+/([\w-]+)|/gh/([\w-]+/[\w-]+)|/github/\w+/(.+)$", picture)
            right = not name or name[1] in (None, NAME)
            right = right and (not name or name[2] in (None, "elazar/pyinfra-orbstack"))
            need(right, f"the badge {label!r} is of another project: {picture}")
    wanted = {"CI", "Codecov", "PyPI", "Python", "License", "Copier"}
    missing = sorted(wanted - {label for label, _, _ in found})
    need(not missing, f"README lacks the badges {', '.join(missing)}")
    return f"{len(found)} badges"


def workflows(checkout: Checkout) -> str:
    """GitHub accepts the workflows, and they meet our rules."""
    github = checkout.root / ".github"
    files = sorted(github.glob("workflows/*.yml"))
    need(len(files) >= 4, "ci.yml, coverage.yml, publish.yml or weekly.yml is missing")
    schema = ("check-jsonschema", "--builtin-schema")
    checkout.tool(*schema, "vendor.github-workflows", *files)
    checkout.tool(*schema, "vendor.dependabot", ".github/dependabot.yml")
    forms = [path for path in github.glob("ISSUE_TEMPLATE/*.yml") if path.name != "config.yml"]
    if forms:
        checkout.tool(*schema, "vendor.github-issue-forms", *forms)
    checkout.tool("zizmor", "--offline", "--no-progress", ".github")
    for path in files:
        check_workflow(path.name, yaml.safe_load(path.read_text(encoding="utf-8")))
    try:
        checkout.run(BIN / "actionlint", *files, PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    except (OSError, Problem) as said:
        # A fork by one author: it may be wrong.
        print(f"actionlint: {said}", file=sys.stderr)
    return ", ".join(path.stem for path in files)


def check_workflow(name: str, workflow: dict[str, Any]) -> None:
    """Permissions are set for each job, every job has a time limit, every action is pinned."""
    need(workflow.get("permissions") == {}, f"{name}: permissions at the top are not {{}}")
    for job, body in workflow["jobs"].items():
        where = f"{name}, {job}"
        need(body.get("timeout-minutes", 999) <= 90, f"{where}: no timeout")
        need("permissions" in body, f"{where}: no permissions")
        for step in body["steps"]:
            uses = step.get("uses", "@" + "0" * 40)
            need(re.search(r"@[0-9a-f]{40}$", uses), f"{where}: {uses} is not pinned by SHA")


def docs(checkout: Checkout) -> str:
    """The documentation builds without a warning, and contains every page."""
    settings = yaml.safe_load(re.sub(r"!!python/\S+", "", checkout.text("mkdocs.yml")))
    shown = set(pages(settings["nav"]))
    there = {p.relative_to(checkout.root / "docs").as_posix() for p in docs_pages(checkout.root)}
    need(shown == there, f"pages and navigation differ: {', '.join(sorted(shown ^ there))}")
    with tempfile.TemporaryDirectory() as folder:
        # With --quiet, warnings would not even be counted.
        site = ("--strict", "--site-dir", folder)
        checkout.run(sys.executable, "-m", "mkdocs", "build", *site, NO_MKDOCS_2_WARNING="1")
    return f"{len(there)} pages"


def docs_pages(root: Path) -> list[Path]:
    """The pages in docs/."""
    return sorted((root / "docs").rglob("*.md"))


def pages(navigation: Any) -> Iterator[str]:
    """The files in a navigation."""
    if isinstance(navigation, str):
        yield navigation
    elif isinstance(navigation, dict):
        for entry in navigation.values():
            yield from pages(entry)
    else:
        for entry in navigation:
            yield from pages(entry)


def rehearsal(checkout: Checkout) -> str:
    """Uploading, installing and rendering work, with a local index."""
    import rehearsal as rehearse

    return rehearse.rehearse(checkout)


ITEMS: dict[str, Callable[[Checkout], str]] = {
    function.__name__: function
    for function in (
        lint,
        types,
        metadata,
        build,
        contents,
        strict,
        readme,
        index,
        changelog,
        badges,
        workflows,
        docs,
        tests,
        coverage,
        rehearsal,
    )
}


def check(checkout: Checkout, items: list[str]) -> str:
    """Check the items; return the name of the first that fails, or ""."""
    for name in items:
        begun = time.monotonic()
        try:
            note = ITEMS[name](checkout)
        except Problem as problem:
            print(f"{name:10} FAILED  {problem}", flush=True)
            return name
        seconds = time.monotonic() - begun
        print(f"{name:10} ok  {seconds:6.1f} s  {note}", flush=True)
    return ""


def main() -> int:
    """Check everything, or only the item in the environment, or all but the ones there."""
    item = os.environ.get("ITEM", "")
    named = item.lstrip("-").split(",") if item else []
    if unknown := sorted(set(named) - set(ITEMS)):
        print(f"ITEM={item!r}: {unknown[0]!r} is none of {', '.join(ITEMS)}", file=sys.stderr)
        return 2
    items = [name for name in ITEMS if not item or (name in named) != item.startswith("-")]
    releasing = "--releasing" in sys.argv[1:]
    return 1 if check(Checkout(ROOT, releasing), items) else 0


if __name__ == "__main__":
    ending.listen()
    sys.exit(main())
