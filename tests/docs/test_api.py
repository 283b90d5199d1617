"""The API reference: it says all that a caller needs about each public name.

What has no heading there is private.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest

from ..conftest import ROOT
from .conftest import Site

pytestmark = pytest.mark.docs

HEADING = re.compile(r'<h\d id="pyinfra_orbstack\.([\w.]+)" class="doc doc-heading">')


@pytest.fixture(scope="module")
def shown(site: Site) -> list[Any]:
    """Each function, class and attribute that the page has a heading for."""
    import griffe

    extensions = griffe.load_extensions(str(ROOT / "scripts" / "docstrings.py"))
    package = griffe.load("pyinfra_orbstack", search_paths=[ROOT / "src"], extensions=extensions)
    page = (site.folder / "api" / "index.html").read_text(encoding="utf-8")
    return [package[name] for name in HEADING.findall(page)]


def sections(obj: Any) -> dict[str, Any]:
    """The sections of an object's docstring, by kind."""
    return {one.kind.value: one.value for one in obj.docstring.parsed}


def raised(function: Any) -> set[str]:
    """Names of the errors that the function itself raises."""
    tree = ast.parse(textwrap.dedent(function.source))
    return {
        node.exc.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise)
        and isinstance(node.exc, ast.Call)
        and isinstance(node.exc.func, ast.Name)
    }


def faults(obj: Any) -> Iterator[str]:
    """What the reference does not say about an object."""
    said = sections(obj)
    rows = [*said.get("parameters", ()), *said.get("attributes", ())]
    for row in [*rows, *said.get("returns", ()), *said.get("raises", ())]:
        if not row.description:
            yield f"{row} is not described"
    if obj.is_attribute:
        return
    if "examples" not in said:
        yield "no example"
    named = {row.name for row in rows}
    given = {one.name.lstrip("*") for one in obj.parameters} - {"self"}
    for name in sorted((given | fields(obj)) - named):
        yield f"{name} is not described"
    if obj.is_function:
        if str(obj.returns) != "None" and "returns" not in said:
            yield "what it returns is not described"
        known = {str(row.annotation) for row in said.get("raises", ())}
        if "OperationError" not in known:  # an operation's own errors become these
            for name in sorted(raised(obj) - known):
                yield f"{name} is not described"


def fields(obj: Any) -> set[str]:
    """What each object of a class consists of, if the class is a mere record."""
    bases = {str(base) for base in obj.bases} if obj.is_class else set()
    records = {"NamedTuple", "TypedDict"} & bases or (obj.is_class and "dataclass" in obj.labels)
    members = obj.members.items() if records else ()
    return {name for name, one in members if one.is_attribute and "property" not in one.labels}


def test_everything_is_described(shown: list[Any]) -> None:
    found = {one.path: list(faults(one)) for one in shown}
    assert len(found) > 60
    assert {path: one for path, one in found.items() if one} == {}


def test_each_description_is_of_something_that_is_there(shown: list[Any]) -> None:
    """No row is about a parameter that was renamed; each has the type of the parameter."""
    for obj in shown:
        said = sections(obj)
        if obj.is_function or obj.is_class:
            given = {one.name.lstrip("*") for one in obj.parameters}
            assert {row.name for row in said.get("parameters", ())} <= given, obj.path
            assert {row.name for row in said.get("attributes", ())} <= set(obj.members), obj.path


def test_examples_are_python(shown: list[Any]) -> None:
    for obj in shown:
        for _, text in sections(obj).get("examples", ()):
            blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
            assert blocks, obj.path
            for block in blocks:
                ast.parse(block)


def test_old_operations_are_described() -> None:
    """They come from a table, so only a running Python sees them."""
    from pyinfra_orbstack.operations import vm

    for name in vm.TABLE:
        text = inspect.getdoc(getattr(vm, name)) or ""
        described = re.findall(r"^\+ (\w+): \S", text, re.MULTILINE)
        assert described == [*inspect.signature(getattr(vm, name)).parameters], name
        assert "**Example:**" in text


# pyinfra's generator of documentation, as of 3.10: what it does with the lines of a docstring.


def test_pyinfra_can_read_operations_and_facts(shown: list[Any]) -> None:
    """Its generator makes a list of lines `+ name: text`, and fences blocks of `.. code::`."""
    google = re.compile(r"^\s*(Args|Attributes|Returns|Raises|Examples?):$", re.MULTILINE)
    for obj in shown:
        text = obj.docstring.value
        assert not google.search(text), obj.path
        listed = re.findall(r"\+ (\*{0,2}[0-9a-z_\/]+):", text)
        rows = sections(obj)
        names = [one.name for kind in ("parameters", "attributes") for one in rows.get(kind, ())]
        assert listed == names, obj.path
