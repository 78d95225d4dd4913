"""Inspects a user's function: signature, annotations, docstring, async or not.

Accepts any callable without raising: it may be written in C, wrapped, an object with `__call__`, or
annotated with names that only a type checker can resolve.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from overlay.workers.api import Context

Parameter = inspect.Parameter
_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
_ANYTHING = (Parameter.empty, Any, object)
_BYTES = (*_ANYTHING, bytes, bytearray, memoryview)

AnyFunction: TypeAlias = Callable[..., Any]


def signature_of(found: AnyFunction) -> tuple[inspect.Signature | None, AnyFunction]:
    """The signature, and the function that it belongs to.

    That is the function itself, or the one inside a wrapper that takes *args and **kwargs. The
    signature is None if Python knows none, as for a function written in C.
    """
    function = found
    while True:
        try:
            signature = _own_signature(function)
        except (TypeError, ValueError):
            return None, function
        inner = getattr(function, "__wrapped__", None)
        kinds = [parameter.kind for parameter in signature.parameters.values()]
        if inner is None or kinds != [Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD]:
            return signature, function
        function = inner


def _own_signature(function: AnyFunction) -> inspect.Signature:
    as_written: dict[str, Any] = {}
    if sys.version_info >= (3, 14):  # where annotations are evaluated on demand
        import annotationlib

        as_written["annotation_format"] = annotationlib.Format.FORWARDREF
    return inspect.signature(function, follow_wrapped=False, **as_written)


def is_given_bytes(signature: inspect.Signature, function: AnyFunction) -> bool:
    """Whether its parameters and annotations allow a call with (payload, context)."""
    try:
        signature.bind(b"", None)
    except TypeError:
        return False
    first, second = _first_two(signature)
    return _fits(first, function, _BYTES) and _is_for_context(second, function)


def _first_two(signature: inspect.Signature) -> list[Parameter]:
    found = []
    for parameter in signature.parameters.values():
        if parameter.kind is Parameter.VAR_POSITIONAL:
            found += [parameter, parameter]
        elif parameter.kind in _POSITIONAL:
            found.append(parameter)
    return found[:2]


def _is_for_context(parameter: Parameter, function: AnyFunction) -> bool:
    """Whether the second parameter of a function of bytes can take the context."""
    if parameter.name == "context" or is_context(parameter, function):
        return True
    is_open = parameter.default in (Parameter.empty, None)
    return is_open and _fits(parameter, function, _ANYTHING)


def is_context(parameter: Parameter, function: AnyFunction) -> bool:
    """Whether the worker passes its context here: by annotation, or else by name."""
    if parameter.name == "context" and _fits(parameter, function, _ANYTHING):
        return True
    annotation = resolved(parameter.annotation, function)
    if isinstance(annotation, str):  # imported for the type checker only
        return annotation.rpartition(".")[2] == "Context"
    if getattr(annotation, "_is_protocol", False):  # no JSON value fits a Protocol, but a context
        return True
    return annotation is not Parameter.empty and _is_among(annotation, (Context,))


def _fits(parameter: Parameter, function: AnyFunction, known: tuple[Any, ...]) -> bool:
    return _is_among(resolved(parameter.annotation, function), known)


def _is_among(annotation: Any, known: tuple[Any, ...]) -> bool:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _is_among(typing.get_args(annotation)[0], known)
    if origin in (typing.Union, types.UnionType):
        members = [m for m in typing.get_args(annotation) if m is not type(None)]
        return all(_is_among(member, known) for member in members)
    annotation = getattr(annotation, "__supertype__", annotation)  # of a NewType
    return any(annotation is one for one in known)


def resolved(annotation: Any, function: AnyFunction) -> Any:
    """Evaluates a string annotation in the function's module; returns the string if that fails."""
    for _ in range(3):  # quoted, and again by `from __future__ import annotations`
        annotation = getattr(annotation, "__forward_arg__", annotation)
        if not isinstance(annotation, str):
            break
        try:
            annotation = eval(annotation, _names_of(function))
        except Exception:  # noqa: BLE001 - it may be any expression
            break
    return annotation


def _names_of(function: AnyFunction) -> dict[str, Any]:
    while isinstance(function, functools.partial):
        function = function.func
    module = sys.modules.get(getattr(function, "__module__", None) or "", builtins)
    return vars(module)


def is_async(found: AnyFunction | None) -> bool:
    while found is not None:
        for one in (found, getattr(found, "__call__", None)):  # noqa: B004 - of an object
            if inspect.iscoroutinefunction(one) or inspect.isasyncgenfunction(one):
                return True
        found = getattr(found, "__wrapped__", None)
    return False


def doc_of(found: AnyFunction) -> str:
    if isinstance(found, functools.partial):  # whose own docstring describes partials
        return doc_of(found.func)
    try:
        return inspect.getdoc(found) or ""
    except Exception:  # noqa: BLE001 - a user's object may raise anything
        return ""


def shown(signature: inspect.Signature, parameters: Iterable[Parameter]) -> str:
    """The signature as it is written in the source, with only these parameters."""
    written = [p.replace(annotation=_written(p.annotation)) for p in parameters]
    returned = _written(signature.return_annotation)
    try:
        return str(inspect.Signature(written, return_annotation=returned))
    except Exception:  # noqa: BLE001 - the repr of a default value may raise anything
        return "(...)"


class _Written:
    """A string annotation, shown without the quotes that inspect adds."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def _written(annotation: Any) -> Any:
    text = getattr(annotation, "__forward_arg__", annotation)
    return _Written(text) if isinstance(text, str) else annotation
