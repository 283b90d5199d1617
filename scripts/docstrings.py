"""A griffe extension: pyinfra's style of docstrings, as tables of the API reference.

Public docstrings use the style that pyinfra's own documentation is generated from::

    Summary.

    + name: what this parameter, attribute or field is

    **Returns:** what is returned

    **Raises:**

    + ValueError: when this is raised

    **Example:**

    .. code:: python

        call(name="value")

What all operations and all facts share is not in each docstring: it is added here.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from typing import Any

import griffe

ITEM = re.compile(r"\+ (\*{0,2}\w+): (.*)")
HEADING = re.compile(r"\*\*(Returns|Raises|Examples?):\*\*\s*(.*)")
CODE = re.compile(r"^\.\. code:: ?(\w*)\n\n?((?:(?: {4}.*)?(?:\n|\Z))+)", re.MULTILINE)

OPERATION_RETURNS = "the operation's result; for example, pass its ``did_change`` to ``_if``"
OPERATION_RAISES = {
    "OperationValueError": "an argument is not valid",
    "OperationError": "the current state does not allow this; while operations run, the host "
    "fails instead",
}
FACT_RAISES = {"FactValueError": "an argument is not valid"}

Sections = list[griffe.DocstringSection]


class Docstrings(griffe.Extension):  # type: ignore[misc]
    """Parses docstrings, and shows operations, facts and fixtures as their users see them."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Adjust a function, and parse its docstring."""
        decorators = {str(one.value).partition("(")[0] for one in func.decorators}
        is_operation = "orbstack_operation" in decorators
        if is_operation:
            func.returns = griffe.ExprName("OperationMeta")
        if "pytest.fixture" in decorators:
            func.parameters = griffe.Parameters()  # pytest passes them
            if isinstance(func.returns, griffe.ExprSubscript):  # what it yields
                func.returns = func.returns.slice
        if func.docstring:
            sections = parse(func)
            if is_operation:
                place = next(at for at, one in enumerate(sections) if is_example(one))
                returns = [item(griffe.DocstringReturn, func.returns, OPERATION_RETURNS, name="")]
                sections[place:place] = [
                    griffe.DocstringSectionReturns(returns),
                    raises(OPERATION_RAISES),
                ]
            func.docstring.parsed = sections

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Adjust a class, and parse its docstring."""
        if "__init__" in cls.members and not cls.members["__init__"].docstring:
            cls.del_member("__init__")  # not for users: something else makes these objects
        fact = next((one for one in cls.bases if is_fact(one)), None)
        if fact is not None and "command" in cls.members:
            # `host.get_fact` passes its arguments to the command.
            command = cls.members["command"]
            assert isinstance(command, griffe.Function)
            made = griffe.Function("__init__", parameters=command.parameters)
            cls.set_member("__init__", made)
        if cls.docstring:
            sections = parse(cls)
            if fact is not None:
                describe_fact(cls, fact, sections)
            cls.docstring.parsed = sections

    def on_module(self, *, mod: griffe.Module, **_: Any) -> None:
        """Parse the docstring of a module."""
        if mod.docstring:
            mod.docstring.parsed = parse(mod)


def is_fact(base: Any) -> bool:
    """Whether a base class makes its subclass a fact."""
    return str(base).startswith(("_OrbctlFact[", "OrbStackMachine"))


def is_example(section: griffe.DocstringSection) -> bool:
    return isinstance(section, griffe.DocstringSectionExamples)


def describe_fact(cls: griffe.Class, base: Any, sections: Sections) -> None:
    """Turn the sentence `Returns ...` into a section, with the type of the fact."""
    first = sections[0]
    assert isinstance(first, griffe.DocstringSectionText)
    said, _, rest = first.value.partition("\n\n")
    text = said.removeprefix("Returns ").rstrip(".")
    kind = base.slice if isinstance(base, griffe.ExprSubscript) else base
    made: Sections = [
        griffe.DocstringSectionReturns([item(griffe.DocstringReturn, kind, text, name="")])
    ]
    parameters = next((one for one in sections if one.kind.value == "parameters"), None)
    if any(one.annotation and str(one.annotation) != "bool" for one in described(parameters)):
        made.append(raises(FACT_RAISES))
    place = next((at for at, one in enumerate(sections) if is_example(one)), len(sections))
    sections[place:place] = made
    sections[:1] = [griffe.DocstringSectionText(rest)] if rest else []


def described(section: Any) -> list[Any]:
    return [] if section is None else list(section.value)


def item(kind: Any, annotation: Any, text: str, **more: Any) -> Any:
    """A row of a table."""
    return kind(annotation=annotation, description=text, **more)


def raises(errors: dict[str, str]) -> griffe.DocstringSection:
    """A table of errors."""
    rows = [
        item(griffe.DocstringRaise, griffe.ExprName(name), text) for name, text in errors.items()
    ]
    return griffe.DocstringSectionRaises(rows)


# Text --------------------------------------------------------------------------------------------


def parse(obj: griffe.Module | griffe.Class | griffe.Function) -> Sections:
    """The sections of an object's docstring, in its order."""
    assert obj.docstring is not None
    sections: Sections = []
    for heading, text in split(obj.docstring.value):
        if heading == "Returns":
            returns = getattr(obj, "returns", None)
            row = item(griffe.DocstringReturn, returns, " ".join(text.split()), name="")
            sections.append(griffe.DocstringSectionReturns([row]))
        elif heading == "Raises":
            sections.append(raises(dict(items(text))))
        elif heading.startswith("Example"):
            code = (griffe.DocstringSectionKind.text, fenced(text))
            sections.append(griffe.DocstringSectionExamples([code]))
        elif heading == "+":
            sections.append(table(obj, dict(items(text))))
        elif text:
            sections.append(griffe.DocstringSectionText(fenced(text)))
    return sections


def split(text: str) -> Iterator[tuple[str, str]]:
    """The parts of a docstring, each with its heading; `+` stands for a list of names."""
    heading, part = "", ""
    for paragraph in re.split(r"\n\n+(?=\S)", text):
        found = HEADING.match(paragraph)
        if found or (heading in ("Returns", "+") and not ITEM.match(paragraph)):
            yield heading, part.strip()
            heading, part = "", ""
        if found:
            heading, part = found[1], f"{found[2]}{paragraph[found.end() :]}"
        elif not heading and ITEM.match(paragraph):
            yield heading, part.strip()
            heading, part = "+", paragraph
        else:
            part += f"\n\n{paragraph}"
    yield heading, part.strip()


def items(text: str) -> Iterator[tuple[str, str]]:
    """The names of a list, each with its description."""
    for one in re.split(r"\n(?=\+ )", text):
        found = ITEM.match(one)
        assert found, f"not a name and a description: {one!r}"
        yield found[1], " ".join(f"{found[2]}{one[found.end() :]}".split())


def table(obj: Any, texts: dict[str, str]) -> griffe.DocstringSection:
    """A table of parameters; of attributes, if they are what a class has under these names."""
    if isinstance(obj, griffe.Class) and not set(texts) <= {one.name for one in obj.parameters}:
        return griffe.DocstringSectionAttributes(
            [
                item(griffe.DocstringAttribute, annotation_of(obj, name), text, name=name)
                for name, text in texts.items()
            ]
        )
    rows = []
    for name, text in texts.items():
        one = obj.parameters[name]
        rows.append(
            item(griffe.DocstringParameter, one.annotation, text, name=name, value=one.default)
        )
    return griffe.DocstringSectionParameters(rows)


def annotation_of(cls: griffe.Class, name: str) -> Any:
    """The type of an attribute, or of the value that `__init__` gives it."""
    member = cls.members.get(name)
    return getattr(member, "annotation", None)


def fenced(text: str) -> str:
    """Text whose blocks of code are Markdown's."""

    def fence(found: re.Match[str]) -> str:
        return f"```{found[1]}\n{textwrap.dedent(found[2]).strip()}\n```\n"

    return CODE.sub(fence, text)
