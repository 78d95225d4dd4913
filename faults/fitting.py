"""Whether a seeded bug fits the code in which it replaces something; and how to undo it.

A bug that does not fit breaks its process by accident, or does nothing, and proves nothing of the
checker. So each name that it replaces must exist, and take what it is called with; what it calls
itself must take that; the private names and the SQL that it uses must be there.

Reads the source of the bug and of the modules that it imports. Starts no process.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import inspect
import pkgutil
import sqlite3
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import overlay
from overlay.jobs import journal_file

Apply = Callable[[], None]
Shape = tuple[int, tuple[str, ...]]
"""What a call passes: how many arguments by position, and the names of the others."""
SQL = ("select ", "insert ", "update ", "delete ")


@dataclass(frozen=True)
class Replaced:
    """owner: a module or class. before: None if there was nothing of that name."""

    owner: Any
    name: str
    before: Any
    after: Any

    @property
    def shown(self) -> str:
        module = getattr(self.owner, "__module__", "")
        return ".".join(filter(None, (module, self.owner.__name__, self.name)))


@contextlib.contextmanager
def applied(apply: Apply) -> Iterator[list[Replaced]]:
    """The bug is in this process meanwhile. Gives what it has replaced."""
    for name in _imports(_tree(apply)):
        importlib.import_module(name)
    before = _names()
    try:
        apply()
        yield list(_changes(before))
    finally:
        for one in _changes(before):
            if one.before is None:
                delattr(one.owner, one.name)
            else:
                setattr(one.owner, one.name, one.before)


def misfits(apply: Apply) -> list[str]:
    """A sentence for each thing that does not fit; none if the bug fits."""
    try:
        with applied(apply) as replaced:
            pass
    except (ImportError, AttributeError) as e:
        return [f"it cannot be applied: {e}"]
    if not replaced:
        return ["it replaces nothing"]
    found = [f"it replaces {one.shown}, which is not there" for one in replaced if not one.before]
    for one in replaced:
        if one.before and (shape := _refused(one)):
            found.append(
                f"{one.shown} is called with {_said(shape)}, and the bug's does not take it"
            )
    code = _tree(apply)
    modules = sorted(_imports(code))
    found += _wrong_calls(code, [one for one in replaced if one.before])
    known = set().union(*map(_words, {*modules, *(near for m in modules for near in _near(m))}))
    for name in sorted(_private_names(code) - known):
        found.append(f"it uses {name}, which neither {', '.join(modules)} nor what they import has")
    found += _wrong_sql(code)
    return found


# What a bug replaces


def _names() -> dict[Any, dict[str, Any]]:
    """What each module of the overlay and each of its classes has."""
    found: dict[Any, dict[str, Any]] = {}
    for module in [m for name, m in sys.modules.items() if name.startswith("overlay.")]:
        found[module] = dict(vars(module))
        for made in vars(module).values():
            if inspect.isclass(made) and made.__module__ == module.__name__:
                found[made] = dict(vars(made))
    return found


def _changes(before: dict[Any, dict[str, Any]]) -> Iterator[Replaced]:
    for owner, had in before.items():
        for name, value in list(vars(owner).items()):
            if value is not had.get(name) and not isinstance(value, ModuleType):
                yield Replaced(owner, name, had.get(name), value)


def _refused(one: Replaced) -> Shape | None:
    """A call that the replaced function takes, and the bug's does not."""
    if not (callable(one.before) and callable(one.after)):
        return None
    right, wrong = inspect.signature(one.before), inspect.signature(one.after)
    kinds = [p for p in right.parameters.values() if p.kind in (p.POSITIONAL_ONLY, _EITHER)]
    shapes = {(len(kinds), _required_names(right))}
    shapes.add((len([p for p in kinds if p.default is p.empty]), _required_names(right)))
    bound = int(inspect.isclass(one.owner) and not isinstance(one.before, staticmethod))
    shapes |= {(by_place + bound, names) for by_place, names in _calls_of().get(one.name, ())}
    fit = (shape for shape in sorted(shapes) if _takes(right, shape))
    return next((shape for shape in fit if not _takes(wrong, shape)), None)


_EITHER = inspect.Parameter.POSITIONAL_OR_KEYWORD


def _required_names(of: inspect.Signature) -> tuple[str, ...]:
    found = of.parameters.values()
    return tuple(p.name for p in found if p.kind is p.KEYWORD_ONLY and p.default is p.empty)


def _takes(signature: inspect.Signature, shape: Shape) -> bool:
    by_place, names = shape
    try:
        signature.bind(*[None] * by_place, **dict.fromkeys(names))
    except TypeError:
        return False
    return True


def _said(shape: Shape) -> str:
    by_place, names = shape
    return " and ".join([f"{by_place} arguments by position", *names])


@functools.cache
def _calls_of() -> dict[str, set[Shape]]:
    """How the overlay calls what has a name, whatever it is."""
    found: dict[str, set[Shape]] = {}
    folder = Path(overlay.__file__).parent
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and (shape := _shape(node)):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                found.setdefault(name, set()).add(shape)
    return found


def _shape(call: ast.Call) -> Shape | None:
    """None if it passes on what it was given."""
    names = [keyword.arg for keyword in call.keywords]
    if None in names or any(isinstance(each, ast.Starred) for each in call.args):
        return None
    return len(call.args), tuple(sorted(filter(None, names)))


# What a bug uses


def _tree(apply: Apply) -> ast.FunctionDef:
    (found,) = ast.parse(textwrap.dedent(inspect.getsource(apply))).body
    assert isinstance(found, ast.FunctionDef)
    return found


def _imports(code: ast.AST) -> Iterator[str]:
    """The overlay's modules that it imports."""
    for node in ast.walk(code):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("overlay"):
            inside = {m.name for m in pkgutil.iter_modules(_path_of(node.module))}
            names = {alias.name for alias in node.names}
            yield from (f"{node.module}.{name}" for name in sorted(names & inside))
            if names - inside:
                yield str(node.module)


def _path_of(module: str | None) -> list[str]:
    return list(getattr(importlib.import_module(module or ""), "__path__", ()))


def _wrong_calls(code: ast.FunctionDef, replaced: list[Replaced]) -> Iterator[str]:
    """Calls of what was replaced, which the bug has kept under a name of its own."""
    by_name = {one.name: one for one in replaced}
    kept: dict[str, Replaced] = {}
    for node in ast.walk(code):
        if not isinstance(node, ast.Assign):
            continue
        for target, value in _pairs(node):
            one = by_name.get(value.attr) if isinstance(value, ast.Attribute) else None
            if one and isinstance(target, ast.Name):
                kept[target.id] = one
    for node in ast.walk(code):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            right, shape = kept.get(node.func.id), _shape(node)
            if right and shape and not _takes(inspect.signature(right.before), shape):
                yield f"it calls {right.shown} with {_said(shape)}, which that does not take"


def _pairs(node: ast.Assign) -> Iterator[tuple[ast.expr, ast.expr]]:
    for target in node.targets:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            yield from zip(target.elts, node.value.elts, strict=False)
        else:
            yield target, node.value


def _private_names(code: ast.FunctionDef) -> set[str]:
    """Of the overlay, for all that is known."""
    found = {node.attr for node in ast.walk(code) if isinstance(node, ast.Attribute)}
    names = {name for name in found if name.startswith("_") and not name.startswith("__")}
    return names - {"_exit", "_replace"}  # of os, of named tuples


@functools.cache
def _near(module: str) -> tuple[str, ...]:
    """The overlay's modules that this one imports."""
    return tuple(_imports(_source(module)))


@functools.cache
def _words(module: str) -> set[str]:
    """All names in it."""
    found: set[str] = set()
    for node in ast.walk(_source(module)):
        for field in ("attr", "id", "name", "arg"):
            if isinstance(name := getattr(node, field, None), str):
                found.add(name)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):  # in __slots__
            found.add(node.value)
    return found


@functools.cache
def _source(module: str) -> ast.Module:
    path = importlib.import_module(module).__file__
    return ast.parse(Path(str(path)).read_text(encoding="utf-8"))


def _wrong_sql(code: ast.FunctionDef) -> Iterator[str]:
    """Statements that the tables of the jobs do not fit."""
    with contextlib.closing(journal_file.opened(":memory:", lambda db: None)) as db:
        parts = {part for node in ast.walk(code) for part in getattr(node, "values", ())}
        for node in ast.walk(code):
            text = "" if node in parts else _text(node)
            if text.lower().startswith(SQL):
                try:
                    db.execute(f"explain {text}", [None] * text.count("?"))
                except sqlite3.Error as e:
                    yield f"its SQL does not fit: {e}: {text}"


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            str(each.value) if isinstance(each, ast.Constant) else "(null)" for each in node.values
        )
    return ""
