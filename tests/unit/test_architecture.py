"""docs/architecture.md is correct: each module calls only its own layer and those below."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "pyinfra_orbstack"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PICTURE = (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")


def _floors() -> dict[str, int]:
    """The layer of each module in the page's table, counted from the top."""
    floor, found = 0, {}
    for title, modules in re.findall(r"^([\w ]*) \| ((?:`\w+`(?:, )?)+) \|", PAGE, re.MULTILINE):
        floor += bool(title)
        for name in re.findall(r"\w+", modules):
            assert name not in found, f"{name} is there twice"
            found[name] = floor
    return found


FLOORS = _floors()
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].partition(".")[0]


def _imported(path: Path) -> set[str]:
    """Our own modules that a file imports at run time, without submodules of packages."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    checked = [
        one
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for part in node.body
        for one in ast.walk(part)
    ]
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in checked and node.module:
            parts = node.module.split(".")
            if parts[0] == PACKAGE.name:
                names |= {parts[1]} if parts[1:] else {alias.name for alias in node.names}
    return names


def test_every_module_has_a_layer_and_every_name_is_a_module() -> None:
    assert {_room(path) for path in FILES} == FLOORS.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_imports_from_a_layer_above(path: Path) -> None:
    room = _room(path)
    above = {name for name in _imported(path) if FLOORS[name] < FLOORS[room]}
    assert not above, f"{room} imports {above}"


def test_the_picture_shows_the_layers_in_order() -> None:
    shown = re.findall(r">([\w, ]+)</text>", PICTURE)
    names = [name for text in shown for name in text.split(", ") if name in FLOORS]
    assert names == sorted(names, key=FLOORS.__getitem__)
    assert {FLOORS[name] for name in names} == set(FLOORS.values())


@pytest.mark.parametrize("name", re.findall(r"`([\w/.]+(?:\.\w+|/))`", PAGE))
def test_every_named_file_exists(name: str) -> None:
    folders = (ROOT, PACKAGE, PACKAGE / "shell", ROOT / "src" / "orbctl_simulator")
    assert any((folder / name).exists() for folder in folders)
