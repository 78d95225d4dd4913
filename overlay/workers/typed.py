"""Wraps a user's function as the handler that a worker calls.

    def shout(payload: bytes, context) -> bytes              a function of bytes
    def resize(path: str, width: int = 200) -> dict          a typed function

A function of bytes can be called with (payload, context): its first parameter is annotated `bytes`
or not at all, its second is the context or not annotated. Any other function is a typed function.

The payload of a typed function is a JSON object of its arguments, which pydantic validates and
converts by the annotations; its result is sent as JSON. Validation is strict: "200" and true are
not numbers, but types that JSON lacks (dates, bytes, paths, sets) are read from strings. The worker
supplies an argument that is the context, by its annotation or its name.

Either kind may be `async def`: the calls of one handler share an event loop (event_loop), from
`load` to `close`. Either kind may be a generator: of bytes, whose concatenation is the result, or
of the items of a JSON array.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import json
import reprlib
import sys
import typing
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Generator,
    Iterator,
    Mapping,
)
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overlay.model import json_values
from overlay.model.errors import BadRequest, ConfigError
from overlay.model.signatures import Function, bounded
from overlay.model.topology import HandlerSpec
from overlay.transport.chunks import ITEM_END, Items
from overlay.workers import api
from overlay.workers.api import Context, Handler
from overlay.workers.event_loop import EventLoop
from overlay.workers.inspection import (
    AnyFunction,
    Parameter,
    doc_of,
    is_async,
    is_context,
    is_given_bytes,
    resolved,
    shown,
    signature_of,
)

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError
    from pydantic_core import ErrorDetails

MAX_PROBLEMS = 5  # named in one error message about a call's arguments
MAX_NAME = 60  # characters shown of an unknown argument's name

_UNNAMED = {
    Parameter.POSITIONAL_ONLY: "it is positional-only",
    Parameter.VAR_POSITIONAL: "it takes any number of values",
    Parameter.VAR_KEYWORD: "it takes any names",
}


@dataclass(frozen=True)
class Loaded:
    """A handler that is ready to be called. function: its description. close: ends its loop."""

    call: Handler
    function: Function
    close: Callable[[], None] = lambda: None


def load(spec: HandlerSpec) -> Loaded:
    """Imports the handler's function. Raises ConfigError if that fails or it cannot be called."""
    return prepared(spec.name, api.find(spec, spec.call))


def prepared(name: str, found: AnyFunction) -> Loaded:
    """Raises ConfigError for an argument that JSON cannot supply."""
    signature, function = signature_of(found)
    doc = doc_of(found)
    is_typed = signature is not None and not is_given_bytes(signature, function)
    loop = EventLoop(name) if is_async(found) else None
    close = loop.close if loop else (lambda: None)
    if signature is None or not is_typed:
        text = "(...)" if signature is None else shown(signature, signature.parameters.values())
        about = bounded(Function(name, f"{name}{text}", doc))
        return Loaded(loop.blocking(found) if loop else found, about, close)
    try:
        typed = _Typed(name, found, signature, function, loop)
    except BaseException:
        close()
        raise
    return Loaded(typed, bounded(typed.described(doc)), close)


class _Typed:
    """A typed function as a handler of bytes. Its validator is built once, here."""

    def __init__(
        self,
        name: str,
        found: AnyFunction,
        signature: inspect.Signature,
        function: AnyFunction,
        loop: EventLoop | None,
    ) -> None:
        """Raises ConfigError."""
        self._name = name
        self._found = found
        self._signature = signature
        self._function = function
        self._loop = loop
        from pydantic import ValidationError

        parameters = signature.parameters.values()
        for parameter in parameters:
            self._check_kind(parameter)
        self._contexts = [p.name for p in parameters if is_context(p, function)]
        self._arguments = [p for p in parameters if p.name not in self._contexts]
        self._adapter = self._adapted()
        self._read = self._adapter.validator.validate_json
        self._validation_error = ValidationError

    def __call__(self, payload: bytes, context: Context) -> bytes | Iterator[bytes]:
        """Raises BadRequest for invalid arguments, NotJson for a result that is not JSON."""
        try:
            arguments = self._read(payload or b"{}")
        except self._validation_error as e:
            raise BadRequest(self._error_message(e)) from None
        for name in self._contexts:
            arguments[name] = context
        result = self._found(**arguments)
        if self._loop is not None:
            result = self._loop.result_of(result, context)
        return Items(_array(result)) if isinstance(result, Iterator) else json_values.write(result)

    def described(self, doc: str) -> Function:
        text = f"{self._name}{shown(self._signature, self._arguments)}"
        return Function(self._name, text, doc, self._arguments_schema(), self._result_schema())

    def _adapted(self) -> TypeAdapter[Any]:
        names = {p.name: self._annotation_of(p) for p in self._arguments}
        required = {p.name for p in self._arguments if p.default is Parameter.empty}
        try:
            return _adapter(self._name, names, required, self._function)
        except Exception as e:  # noqa: BLE001 - pydantic and the user's types may raise anything
            for parameter_name, annotation in names.items():
                try:
                    _adapter(self._name, {parameter_name: annotation}, set(), self._function)
                except Exception as why:  # noqa: BLE001
                    raise self._problem(parameter_name, _reason(why)) from None
            raise self._problem("", _reason(e)) from None

    def _check_kind(self, parameter: Parameter) -> None:
        if parameter.kind in _UNNAMED:
            why = f"{_UNNAMED[parameter.kind]}; arguments come from JSON by their names"
            raise self._problem(parameter.name, why)

    def _annotation_of(self, parameter: Parameter) -> Any:
        if parameter.annotation is Parameter.empty:
            return Any
        found = resolved(parameter.annotation, self._function)
        if isinstance(found, str):
            why = f"its annotation '{found}' cannot be resolved when its module is loaded"
            raise self._problem(parameter.name, why)
        return found

    def _problem(self, argument: str, why: str) -> ConfigError:
        inner = inspect.unwrap(self._function)
        code = getattr(inner, "__code__", None)
        module = sys.modules.get(getattr(inner, "__module__", None) or "")
        file = code.co_filename if code else getattr(module, "__file__", None) or "its module"
        called = getattr(inner, "__qualname__", type(inner).__qualname__)
        about = f"argument '{argument}': " if argument else ""
        return ConfigError(
            f"handler '{self._name}': {Path(file)}, function {called}: {about}{why} "
            "(a function of bytes is declared as (payload: bytes, context))"
        )

    def _error_message(self, error: ValidationError) -> str:
        """Names each invalid argument and what is wrong with it."""
        found = error.errors(include_url=False, include_context=False)
        problems = [self._describe_problem(e) for e in found]
        if len(problems) > MAX_PROBLEMS:
            problems[MAX_PROBLEMS:] = [f"and {len(problems) - MAX_PROBLEMS} more"]
        return f"handler '{self._name}': {'; '.join(problems)}"

    def _describe_problem(self, error: ErrorDetails) -> str:
        kind, loc, message = error["type"], error["loc"], error["msg"]
        if kind == "json_invalid":
            return f"the payload is not JSON: {message.partition(': ')[2]}"
        names = [parameter.name for parameter in self._arguments]
        if not loc:
            known = ", ".join(names) or "none"
            return f"the payload is not a JSON object of the arguments by name ({known})"
        place = ".".join(map(str, loc))
        if kind == "missing":
            return f"argument '{place}' is missing"
        if kind == "extra_forbidden":
            near = difflib.get_close_matches(place, names, n=1) if len(loc) == 1 else []
            known = f"did you mean '{near[0]}'?" if near else f"it has {', '.join(names) or 'none'}"
            return f"there is no argument '{place[:MAX_NAME]}'; {known}"
        value = reprlib.repr(error.get("input"))
        return f"argument '{place}': {message[:1].lower()}{message[1:]}, not {value}"

    def _arguments_schema(self) -> str:
        try:
            schema = self._adapter.json_schema()
        except Exception:  # noqa: BLE001 - not every type that pydantic validates has a schema
            return "{}"
        for parameter in self._arguments:
            if parameter.default is not Parameter.empty:
                with contextlib.suppress(Exception):  # the default may not be JSON
                    default = json_values.read(json_values.write(parameter.default))
                    schema["properties"][parameter.name]["default"] = default
        return json.dumps(schema)

    def _result_schema(self) -> str:
        annotation = resolved(self._signature.return_annotation, self._function)
        if annotation is Parameter.empty or isinstance(annotation, str):
            return ""
        if typing.get_origin(annotation) in _ITEMS:
            item, *_ = typing.get_args(annotation) or (Any,)
            annotation = list[item]  # type: ignore[valid-type]
        try:
            made = _adapter(self._name, {"result": annotation}, {"result"}, self._function)
            schema = made.json_schema(mode="serialization")
            more = {"$defs": schema["$defs"]} if "$defs" in schema else {}
            return json.dumps({**schema["properties"]["result"], **more})
        except Exception:  # noqa: BLE001 - pydantic may not know the result's type
            return ""


_ITEMS = (Iterator, Generator, AsyncIterator, AsyncGenerator)


def _adapter(
    name: str, annotations: Mapping[str, Any], required: set[str], function: AnyFunction
) -> TypeAdapter[Any]:
    """Validates a JSON object with exactly these keys. May raise any exception."""
    from pydantic import ConfigDict, TypeAdapter
    from typing_extensions import NotRequired, Required, TypedDict

    fields = {
        key: Required[hint] if key in required else NotRequired[hint]
        for key, hint in annotations.items()
    }
    # Arguments that are not given are left out, so that the function's own defaults apply.
    make: Any = TypedDict
    made = make(name, fields)
    made.__module__ = getattr(inspect.unwrap(function), "__module__", __name__)
    made.__pydantic_config__ = ConfigDict(
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        val_json_bytes="base64",
        ser_json_bytes="base64",
    )
    adapter = TypeAdapter(made)
    adapter.rebuild(raise_errors=True)  # for an undefined name inside an annotation
    return adapter


def _array(items: Iterator[Any]) -> Iterator[bytes]:
    """A JSON array, item by item. ITEM_END after each lets clients read single items."""
    before = b"["
    try:
        for item in items:
            yield before + json_values.write(item) + ITEM_END
            before = b","
        yield b"]" if before == b"," else b"[" + ITEM_END + b"]"
    finally:
        if hasattr(items, "close"):  # a generator may hold open files
            items.close()


def _reason(error: Exception) -> str:
    """Why pydantic rejects an annotation."""
    if type(error).__name__ == "PydanticSchemaGenerationError":
        return (
            "JSON cannot be converted to its annotation; Python's own types, dataclasses and "
            "pydantic models work"
        )
    return str(error).strip().partition("\n")[0] or type(error).__name__
