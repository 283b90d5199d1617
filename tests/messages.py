"""Every message that the packages can raise, log, warn with or print as an error.

They are read from the sources, so none has to be listed by hand: the arguments of exceptions, of
loggers' warnings and errors, of what prints to stderr, and of functions of the packages that pass
an argument on to one of these. A field of an f-string is `...` in its text.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
FIELD = "..."

#: Exceptions of pyinfra, pytest and argparse, and functions that show an error.
OTHERS = {
    "ArgumentTypeError",
    "ConnectError",
    "FactError",
    "FactProcessError",
    "FactValueError",
    "InventoryError",
    "NestedOperationError",
    "OperationError",
    "OperationTypeError",
    "OperationValueError",
    "PyinfraError",
    "UsageError",
}
#: Method names whose first argument is a message, whatever object they belong to.
METHODS = {"error", "warning", "warn", "fail", "skip", "exit", "critical", "exception"}

#: Functions that are handed in, or that make an error of a text: the position of the message.
HANDED_IN = {"say": 0, "tell": 0, "_tell": 0, "_fail": 0, "kind": 0, "worded": 1}
#: Lists that are shown or raised as a whole.
COLLECTED = {"problems", "said"}

Function = (ast.FunctionDef, ast.AsyncFunctionDef)


class Message(NamedTuple):
    """A message, and where it is.

    Attributes:
        file: Path of the source, relative to the checkout.
        line: Its line.
        text: Its text, with `...` for each field.
    """

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"


class Sources:
    """Python sources, and what their functions do with texts."""

    def __init__(self, texts: dict[str, str]) -> None:
        self.trees = {file: ast.parse(text) for file, text in texts.items()}
        self.files = {
            id(node): file for file, tree in self.trees.items() for node in ast.walk(tree)
        }
        self.nodes = [node for tree in self.trees.values() for node in ast.walk(tree)]
        self._known: dict[tuple[int, int, int], list[ast.expr]] = {}
        self.functions: dict[str, list[ast.FunctionDef]] = {}
        self.constants: dict[str, ast.expr] = {}
        for node in self.nodes:
            if isinstance(node, ast.FunctionDef):
                self.functions.setdefault(node.name, []).append(node)
        for tree in self.trees.values():
            for node in tree.body:
                target = node.targets[0] if isinstance(node, ast.Assign) else None
                if isinstance(node, ast.AnnAssign):
                    target = node.target
                if isinstance(target, ast.Name) and node.value:
                    self.constants[target.id] = node.value
        self.attributes: dict[str, list[ast.expr]] = {}
        for node in self.nodes:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
                self.attributes.setdefault(node.targets[0].attr, []).append(node.value)
        self.exceptions = self._exceptions()
        #: Functions that pass on an argument as a message: its position, and its name.
        self.sinks: dict[str, set[tuple[int, str]]] = {}
        self._find_sinks()

    def _exceptions(self) -> set[str]:
        found = {
            name
            for name, one in vars(builtins).items()
            if isinstance(one, type) and issubclass(one, BaseException)
        } | OTHERS
        classes = [node for node in self.nodes if isinstance(node, ast.ClassDef)]
        for _ in range(5):
            for one in classes:
                if any(name_of(base) in found for base in one.bases):
                    found.add(one.name)
        return found

    # Sinks

    def sinks_of(self, call: ast.Call) -> list[ast.expr]:
        """The arguments of a call that are messages."""
        # `raise (One if this else Other)("...")`
        called = call.func.body if isinstance(call.func, ast.IfExp) else call.func
        name = name_of(called)
        if name in self.exceptions:
            return [one for one in call.args if not isinstance(one, ast.Starred)]
        if isinstance(call.func, ast.Attribute) and name in METHODS:
            return call.args[:1]
        if name in ("print", "echo", "secho"):
            words = {one.arg: one.value for one in call.keywords}
            to = ast.unparse(words["file"]) if "file" in words else ""
            return call.args[:1] if "stderr" in to or "err" in words else []
        if name == "write" and ast.unparse(call.func).endswith("stderr.write"):
            return call.args[:1]
        if name == "append" and name_of(getattr(call.func, "value", call)) in COLLECTED:
            return call.args
        if name in HANDED_IN:
            return call.args[HANDED_IN[name] : HANDED_IN[name] + 1]
        found = []
        for position, parameter in self.sinks.get(name, ()):
            if position < len(call.args):
                found.append(call.args[position])
            found += [one.value for one in call.keywords if one.arg == parameter]
        return found

    def _find_sinks(self) -> None:
        size = -1
        while size != sum(map(len, self.sinks.values())):
            size = sum(map(len, self.sinks.values()))
            for functions in self.functions.values():
                for function in functions:
                    self._look_at(function)

    def _look_at(self, function: ast.FunctionDef) -> None:
        names = [one.arg for one in (*function.args.posonlyargs, *function.args.args)]
        first = names[:1] in (["self"], ["cls"])
        names = names[first:] + [one.arg for one in function.args.kwonlyargs]
        for call in calls_in(function):
            for argument in self.sinks_of(call):
                for name in passed_on(argument):
                    if name in names:
                        self.sinks.setdefault(function.name, set()).add((names.index(name), name))

    # Texts

    def texts(self, expr: ast.expr | None, scope: ast.AST, deep: int = 8) -> list[ast.expr]:
        """The expressions that can be the text of an expression."""
        if expr is None or not deep:
            return []
        key = (id(expr), id(scope), deep)
        if key not in self._known:
            self._known[key] = []  # what contains itself adds nothing
            self._known[key] = list(self._texts(expr, scope, deep))
        return self._known[key]

    def _texts(self, expr: ast.expr, scope: ast.AST, deep: int) -> Iterator[ast.expr]:
        if isinstance(expr, (ast.Constant, ast.JoinedStr)):
            yield expr
            last = expr.values[-1] if isinstance(expr, ast.JoinedStr) else None
            if isinstance(last, ast.FormattedValue):
                yield from self.texts(last.value, scope, deep - 1)
        elif isinstance(expr, ast.BinOp):
            if text_of(expr).replace(FIELD, ""):
                yield expr
            for one in (expr.left, expr.right):
                if isinstance(one, ast.Call):
                    yield from self.texts(one, scope, deep - 1)
        elif isinstance(expr, (ast.IfExp, ast.BoolOp)):
            parts = expr.values if isinstance(expr, ast.BoolOp) else [expr.body, expr.orelse]
            for one in parts:
                yield from self.texts(one, scope, deep - 1)
        elif isinstance(expr, (ast.List, ast.Tuple, ast.Set)):
            for one in expr.elts:
                yield from self.texts(one, scope, deep - 1)
        elif isinstance(expr, (ast.ListComp, ast.GeneratorExp)):
            yield from self.texts(expr.elt, scope, deep - 1)
        elif isinstance(expr, ast.Starred):
            yield from self.texts(expr.value, scope, deep - 1)
        elif isinstance(expr, ast.Subscript) and isinstance(expr.value, ast.Name):
            table = self.constants.get(expr.value.id)
            for one in table.values if isinstance(table, ast.Dict) else []:
                yield from self.texts(one, scope, deep - 1)
        elif isinstance(expr, ast.Attribute):
            for one in self.attributes.get(expr.attr, ()):
                yield from self.texts(one, scope, deep - 1)
        elif isinstance(expr, ast.Name):
            for one in values_of(expr.id, scope):
                yield from self.texts(one, scope, deep - 1)
            if expr.id in self.constants:
                yield from self.texts(self.constants[expr.id], scope, deep - 1)
        elif isinstance(expr, ast.Call):
            name = name_of(expr.func)
            if name in ("join", "format", "str", "sorted") and expr.args:
                yield from self.texts(expr.args[0], scope, deep - 1)
                return
            for function in self.functions.get(name, ()):
                for node in own_nodes(function):
                    if isinstance(node, (ast.Return, ast.Yield)):
                        yield from self.texts(node.value, function, deep - 1)

    def messages(self) -> Iterator[Message]:
        for tree in self.trees.values():
            scopes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
            for scope in (*scopes, tree):
                for call in calls_in(scope):
                    for argument in self.sinks_of(call):
                        for one in self.texts(argument, scope):
                            text = text_of(one)
                            if re.search(r"[a-z]{2}\S* \S|\S [a-z]{2}", text):
                                yield Message(self.files[id(one)], one.lineno, plain(text))


def name_of(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


@cache
def own_nodes(scope: ast.AST) -> list[ast.AST]:
    """The nodes of a function or module, without those of functions in it."""
    found, new = [], [scope]
    while new:
        children = [one for one in ast.iter_child_nodes(new.pop()) if not isinstance(one, Function)]
        found += children
        new += children
    return found


@cache
def calls_in(scope: ast.AST) -> list[ast.Call]:
    return [node for node in own_nodes(scope) if isinstance(node, ast.Call)]


def passed_on(expr: ast.expr) -> set[str]:
    """Names that become the text of an expression, or the reason at its end."""
    if isinstance(expr, ast.Name):
        return {expr.id}
    if isinstance(expr, ast.JoinedStr):
        *before, last = expr.values
        begun = text_of(before[-1]) if before else FIELD
        if isinstance(last, ast.FormattedValue) and begun.endswith((": ", "] ", FIELD)):
            return passed_on(last.value)
    return set()


def values_of(name: str, scope: ast.AST) -> Iterator[ast.expr]:
    """What a function assigns to a name, or appends to it."""
    for node in own_nodes(scope):
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(name_of(one) == name for one in targets) and node.value:
                yield node.value
        elif isinstance(node, ast.For) and name_of(node.target) == name:
            yield node.iter
        elif isinstance(node, ast.NamedExpr) and name_of(node.target) == name:
            yield node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            grows = node.func.attr in ("append", "extend")
            if grows and name_of(node.func.value) == name:
                yield from node.args[:1]


def text_of(expr: ast.expr) -> str:
    """The text of an expression, with `...` for what is known only when it is shown."""
    if isinstance(expr, ast.Constant):
        return expr.value if isinstance(expr.value, str) else ""
    if isinstance(expr, ast.JoinedStr):
        return "".join(map(text_of, expr.values))
    if isinstance(expr, ast.BinOp) and isinstance(expr.op, ast.Add):
        return text_of(expr.left) + text_of(expr.right)
    if isinstance(expr, ast.BinOp) and isinstance(expr.op, ast.Mod):
        return re.sub(r"%[sdr]", FIELD, text_of(expr.left))
    return FIELD


def plain(text: str) -> str:
    """A text with one `...` for adjacent fields, and without what is around the message."""
    text = re.sub(r"(?:\.\.\.){2,}", FIELD, text)
    # A log may follow an error of a test.
    return re.sub(r"^\.\.\.(?=[a-z]{2})|\n\.\.\.$", "", text).strip(" ;")


#: What prints an error in our shell code, and its text in quotes.
SHELL = re.compile(
    r"""(?:\b(?:fail|say|give_up)\ |\b(?:said|told|reason|why)=|echo\ |printf\ '%s\\n'\ )
        (?: "((?:[^"$\\]|\\.|\$?\$\w|\$\{[^}]*\}|\$\((?:[^()"]|"[^"]*")*\))*)" | '([^']*)' )""",
    re.VERBOSE,
)
#: A field of a text in shell.
EXPANSION = re.compile(r"\$?\$\{[^}]*\}|\$\((?:[^()\"]|\"[^\"]*\")*\)|\$?\$\w+")


#: A text for a reason that is unknown.
DEFAULT = re.compile(r"\$\{\w+:-([^}$]+)\}")


def in_shell(file: str, source: str) -> Iterator[Message]:
    """The messages of the functions of a `.sh` file, or of the recipes of a Makefile."""
    recipes = not file.endswith(".sh")
    for number, line in enumerate(source.splitlines(), 1):
        if line.lstrip().startswith("#") or (recipes and ">&2" not in line):
            continue
        found = [EXPANSION.sub(FIELD, double) or single for double, single in SHELL.findall(line)]
        for text in found + DEFAULT.findall(line):
            said = plain(text).removeprefix("failed ")
            if re.search(r"[a-z]{2}\S* \S", said):
                yield Message(file, number, said)


def in_questions(file: str, text: str) -> Iterator[Message]:
    """The messages of the validators of a copier.yml."""
    for block in re.finditer(r"^  validator: >-\n((?:    .*\n)+)", text, re.MULTILINE):
        for said in re.finditer(r"%}\s*([^{}]+?)\s*{%", block[1]):
            line = text.count("\n", 0, block.start(1) + said.start(1)) + 1
            yield Message(file, line, said[1])


def texts_of(*patterns: str) -> dict[str, str]:
    """The texts of files, by their paths relative to the checkout."""
    paths = sorted(path for pattern in patterns for path in ROOT.glob(pattern))
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}


@cache
def messages() -> list[Message]:
    """All messages, in the order of their places."""
    found = set(Sources(texts_of("src/**/*.py", "scripts/*.py")).messages())
    for file, text in texts_of("src/**/*.sh", "Makefile", "template/Makefile.jinja").items():
        found |= set(in_shell(file, text))
    return sorted(found | set(in_questions("copier.yml", texts_of("copier.yml")["copier.yml"])))


if __name__ == "__main__":
    for message in messages():
        print(message)
