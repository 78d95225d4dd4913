"""The user's function as a worker calls it: made once, from what the configuration names.

    def shout(payload: bytes, context) -> bytes              is given the payload as it is
    def resize(path: str, width: int = 200) -> dict          is given its arguments

A function gets the payload's bytes if it can be called with (payload, context), the first of them
`bytes` or without annotation, the second `context` or without annotation; any other is a typed one.

A typed function's payload is a JSON object of its arguments, checked and converted by pydantic from
its annotations; what it returns leaves as JSON. Checked strictly: "200" is no number and true is
none, while what JSON lacks (dates, bytes, paths, sets) comes from its text. An argument that is
the context, by its name or its annotation, is given by the worker.

Either kind may be `async def`: those of one handler share an event loop, on a thread of its own,
"handler-NAME-loop", from `load` to `close`. Either kind may yield: bytes that together are the
result, or items of a JSON array.
"""

from __future__ import annotations

import asyncio
import builtins
import concurrent.futures
import contextlib
import difflib
import functools
import inspect
import json
import logging
import reprlib
import sys
import threading
import types
import typing
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Generator,
    Iterable,
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
from overlay.workers.api import Context, Handler, NobodyWaits

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

log = logging.getLogger("overlay.handler")

LOOK_S = 0.1  # how often it is looked whether somebody still waits for an async function
MAX_PROBLEMS = 5  # of a call's arguments that are told
LONGEST_NAME = 60  # characters of a name that is none of the arguments'

Parameter = inspect.Parameter
_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
_UNNAMED = {
    Parameter.POSITIONAL_ONLY: "it is positional-only",
    Parameter.VAR_POSITIONAL: "it takes any number of values",
    Parameter.VAR_KEYWORD: "it takes any names",
}
_ANYTHING = (Parameter.empty, Any, object)
_BYTES = (*_ANYTHING, bytes, bytearray, memoryview)


@dataclass(frozen=True)
class Loaded:
    """A handler, ready to be called. function: what it is like. close: ends its event loop."""

    call: Handler
    function: Function
    close: Callable[[], None] = lambda: None


def load(spec: HandlerSpec) -> Loaded:
    """Imports the handler's function. Raises ConfigError saying why it cannot be had."""
    return prepared(spec.name, api.find(spec, spec.call))


def prepared(name: str, found: Callable[..., Any]) -> Loaded:
    """Raises ConfigError for an argument that cannot be had from JSON."""
    signature, function = _signature_of(found)
    doc = _doc_of(found)
    is_typed = signature is not None and not _is_given_bytes(signature, function)
    loop = _Loop(name) if _is_async(found) else None
    close = loop.close if loop else (lambda: None)
    if signature is None or not is_typed:
        shown = "(...)" if signature is None else _shown(signature, signature.parameters.values())
        about = bounded(Function(name, f"{name}{shown}", doc))
        return Loaded(_awaited(found, loop) if loop else found, about, close)
    try:
        typed = _Typed(name, found, signature, function, loop)
    except BaseException:
        close()
        raise
    return Loaded(typed, bounded(typed.described(doc)), close)


# Which kind it is


def _signature_of(found: Callable[..., Any]) -> tuple[inspect.Signature | None, Any]:
    """Its own, or that of the function inside a wrapper that passes everything on; and whose it is.

    None where Python knows none, as of what is written in C.
    """
    function: Any = found
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


def _own_signature(function: Any) -> inspect.Signature:
    as_written: dict[str, Any] = {}
    if sys.version_info >= (3, 14):  # annotations are not evaluated before they are asked for
        import annotationlib

        as_written["annotation_format"] = annotationlib.Format.FORWARDREF
    return inspect.signature(function, follow_wrapped=False, **as_written)


def _is_given_bytes(signature: inspect.Signature, function: Any) -> bool:
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


def _is_for_context(parameter: Parameter, function: Any) -> bool:
    """The second parameter of a function that is given bytes, whatever its context's name is."""
    if parameter.name == "context" or _is_context(parameter, function):
        return True
    is_open = parameter.default in (Parameter.empty, None)
    return is_open and _fits(parameter, function, _ANYTHING)


def _is_context(parameter: Parameter, function: Any) -> bool:
    """Whether the worker gives it: annotated as the context, or only called so."""
    if parameter.name == "context" and _fits(parameter, function, _ANYTHING):
        return True
    annotation = _resolved(parameter.annotation, function)
    if isinstance(annotation, str):  # imported for the type checker only
        return annotation.rpartition(".")[2] == "Context"
    if getattr(annotation, "_is_protocol", False):  # nothing else can be meant: JSON has none
        return True
    return annotation is not Parameter.empty and _is_among(annotation, (Context,))


def _fits(parameter: Parameter, function: Any, known: tuple[Any, ...]) -> bool:
    return _is_among(_resolved(parameter.annotation, function), known)


def _is_among(annotation: Any, known: tuple[Any, ...]) -> bool:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _is_among(typing.get_args(annotation)[0], known)
    if origin in (typing.Union, types.UnionType):
        members = [m for m in typing.get_args(annotation) if m is not type(None)]
        return all(_is_among(member, known) for member in members)
    annotation = getattr(annotation, "__supertype__", annotation)  # of a NewType
    return any(annotation is one for one in known)


def _resolved(annotation: Any, function: Any) -> Any:
    """What a text stands for in the function's module; the text itself where that is not known."""
    for _ in range(3):  # quoted, and once more by `from __future__ import annotations`
        annotation = getattr(annotation, "__forward_arg__", annotation)
        if not isinstance(annotation, str):
            break
        try:
            annotation = eval(annotation, _names_of(function))
        except Exception:  # noqa: BLE001 - it may be any expression
            break
    return annotation


def _names_of(function: Any) -> dict[str, Any]:
    """What its module knows by name."""
    while isinstance(function, functools.partial):
        function = function.func
    module = sys.modules.get(getattr(function, "__module__", None) or "", builtins)
    return vars(module)


def _is_async(found: Any) -> bool:
    while found is not None:
        for one in (found, getattr(found, "__call__", None)):  # noqa: B004 - of an object
            if inspect.iscoroutinefunction(one) or inspect.isasyncgenfunction(one):
                return True
        found = getattr(found, "__wrapped__", None)
    return False


def _doc_of(found: Any) -> str:
    if isinstance(found, functools.partial):  # its own is about partials
        return _doc_of(found.func)
    try:
        return inspect.getdoc(found) or ""
    except Exception:  # noqa: BLE001 - an object of the user's may answer anything
        return ""


# A typed one


class _Typed:
    """Called as any handler is. Its validator is made once, here."""

    def __init__(
        self,
        name: str,
        found: Callable[..., Any],
        signature: inspect.Signature,
        function: Any,
        loop: _Loop | None,
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
            self._check_named(parameter)
        self._contexts = [p.name for p in parameters if _is_context(p, function)]
        self._given = [p for p in parameters if p.name not in self._contexts]
        self._adapter = self._adapted()
        self._read = self._adapter.validator.validate_json
        self._wrong = ValidationError

    def __call__(self, payload: bytes, context: Context) -> bytes | Iterator[bytes]:
        """Raises BadRequest for wrong arguments, and NotJson for a result."""
        try:
            arguments = self._read(payload or b"{}")
        except self._wrong as e:
            raise BadRequest(self._complaint(e)) from None
        for name in self._contexts:
            arguments[name] = context
        result = self._found(**arguments)
        if self._loop is not None:
            result = self._loop.result_of(result, context)
        return Items(_array(result)) if isinstance(result, Iterator) else json_values.write(result)

    def described(self, doc: str) -> Function:
        shown = f"{self._name}{_shown(self._signature, self._given)}"
        return Function(self._name, shown, doc, self._arguments_schema(), self._result_schema())

    def _adapted(self) -> TypeAdapter[Any]:
        names = {p.name: self._annotation_of(p) for p in self._given}
        required = {p.name for p in self._given if p.default is Parameter.empty}
        try:
            return _adapter(self._name, names, required, self._function)
        except Exception as e:  # noqa: BLE001 - pydantic's many, and those of the user's own types
            for parameter_name, annotation in names.items():
                try:
                    _adapter(self._name, {parameter_name: annotation}, set(), self._function)
                except Exception as why:  # noqa: BLE001
                    raise self._problem(parameter_name, _reason(why)) from None
            raise self._problem("", _reason(e)) from None

    def _check_named(self, parameter: Parameter) -> None:
        if parameter.kind in _UNNAMED:
            why = f"{_UNNAMED[parameter.kind]}; arguments come from JSON by their names"
            raise self._problem(parameter.name, why)

    def _annotation_of(self, parameter: Parameter) -> Any:
        if parameter.annotation is Parameter.empty:
            return Any
        found = _resolved(parameter.annotation, self._function)
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

    def _complaint(self, error: ValidationError) -> str:
        """What is wrong with the arguments, each by its name."""
        found = error.errors(include_url=False, include_context=False)
        problems = [self._sentence(e) for e in found]
        if len(problems) > MAX_PROBLEMS:
            problems[MAX_PROBLEMS:] = [f"and {len(problems) - MAX_PROBLEMS} more"]
        return f"handler '{self._name}': {'; '.join(problems)}"

    def _sentence(self, error: Mapping[str, Any]) -> str:
        kind, loc, said = error["type"], error["loc"], error["msg"]
        if kind == "json_invalid":
            return f"the payload is not JSON: {said.partition(': ')[2]}"
        names = [parameter.name for parameter in self._given]
        if not loc:
            known = ", ".join(names) or "none"
            return f"the payload is not a JSON object of the arguments by name ({known})"
        place = ".".join(map(str, loc))
        if kind == "missing":
            return f"argument '{place}' is missing"
        if kind == "extra_forbidden":
            near = difflib.get_close_matches(place, names, n=1) if len(loc) == 1 else []
            known = f"did you mean '{near[0]}'?" if near else f"it has {', '.join(names) or 'none'}"
            return f"there is no argument '{place[:LONGEST_NAME]}'; {known}"
        value = reprlib.repr(error.get("input"))
        return f"argument '{place}': {said[:1].lower()}{said[1:]}, not {value}"

    def _arguments_schema(self) -> str:
        try:
            schema = self._adapter.json_schema()
        except Exception:  # noqa: BLE001 - not every type of pydantic's has one
            return "{}"
        for parameter in self._given:
            if parameter.default is not Parameter.empty:
                with contextlib.suppress(Exception):  # it need not be JSON
                    default = json_values.read(json_values.write(parameter.default))
                    schema["properties"][parameter.name]["default"] = default
        return json.dumps(schema)

    def _result_schema(self) -> str:
        annotation = _resolved(self._signature.return_annotation, self._function)
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
        except Exception:  # noqa: BLE001 - a result's type need not be one that pydantic knows
            return ""


_ITEMS = (Iterator, Generator, AsyncIterator, AsyncGenerator)


def _adapter(
    name: str, annotations: Mapping[str, Any], required: set[str], function: Any
) -> TypeAdapter[Any]:
    """Reads a JSON object to a dict of exactly these. Raises what pydantic raises, and others."""
    from pydantic import ConfigDict, TypeAdapter
    from typing_extensions import NotRequired, Required, TypedDict

    fields = {
        key: Required[hint] if key in required else NotRequired[hint]
        for key, hint in annotations.items()
    }
    # A default is the function's own business: what is not given is not there.
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
    adapter.rebuild(raise_errors=True)  # where a name inside an annotation is not known yet
    return adapter


def _array(items: Iterator[Any]) -> Iterator[bytes]:
    """A JSON array, as its items come. Each is ended, for a client that takes them so."""
    before = b"["
    try:
        for item in items:
            yield before + json_values.write(item) + ITEM_END
            before = b","
        yield b"]" if before == b"," else b"[" + ITEM_END + b"]"
    finally:
        if hasattr(items, "close"):  # a generator may have files open
            items.close()


def _shown(signature: inspect.Signature, parameters: Iterable[Parameter]) -> str:
    """As it is written, of these parameters."""
    shown = [p.replace(annotation=_written(p.annotation)) for p in parameters]
    returned = _written(signature.return_annotation)
    try:
        return str(inspect.Signature(shown, return_annotation=returned))
    except Exception:  # noqa: BLE001 - a default value may have any way to show itself
        return "(...)"


class _Written:
    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def _written(annotation: Any) -> Any:
    """A text without the quotes that an annotation which is one is shown with."""
    text = getattr(annotation, "__forward_arg__", annotation)
    return _Written(text) if isinstance(text, str) else annotation


def _reason(error: Exception) -> str:
    """Why pydantic does not take an annotation."""
    if type(error).__name__ == "PydanticSchemaGenerationError":
        return (
            "its annotation is nothing that JSON can be converted to; Python's own types, "
            "dataclasses and models of pydantic's are"
        )
    return str(error).strip().partition("\n")[0] or type(error).__name__


# An async one


class _Loop:
    """The event loop of one handler's async functions, which are called on other threads."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._loop = asyncio.new_event_loop()
        self._is_closed = False
        threading.Thread(target=self._serve, name=f"handler-{name}-loop", daemon=True).start()

    def close(self) -> None:
        """What runs on it is cancelled. May be called twice."""
        with contextlib.suppress(RuntimeError):  # it is closed
            self._loop.call_soon_threadsafe(self._end)

    def result_of(self, found: Any, context: Context) -> Any:
        """What an async function's call comes to; an iterator of an async generator's items.

        Raises what the function raises, and NobodyWaits when it was ended for that.
        """
        if isinstance(found, AsyncIterator):
            return self._items(found, context)
        return self._run(found, context) if inspect.isawaitable(found) else found

    def _run(self, awaitable: Any, context: Context) -> Any:
        work = asyncio.run_coroutine_threadsafe(_outcome_of(awaitable), self._loop)
        while True:
            try:
                result, error = work.result(LOOK_S)
                break
            except concurrent.futures.TimeoutError:
                if context.cancelled:
                    work.cancel()
                    raise NobodyWaits from None
            except concurrent.futures.CancelledError:  # by `close`
                raise NobodyWaits from None
        if error is not None:
            raise error
        return result

    def _items(self, found: AsyncIterator[Any], context: Context) -> Iterator[Any]:
        try:
            while True:
                try:
                    item = self._run(found.__anext__(), context)
                except StopAsyncIteration:
                    return
                yield item
        finally:
            if hasattr(found, "aclose"):
                with contextlib.suppress(NobodyWaits, RuntimeError):  # or it runs still
                    self._run(found.aclose(), context)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        while not self._is_closed:
            try:
                self._loop.run_forever()
            except BaseException:
                # A task that the function has left behind may raise SystemExit.
                log.exception("handler %s: a task ended its event loop", self._name)
        self._loop.close()

    def _end(self) -> None:
        self._is_closed = True
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.call_soon(self._loop.stop)


async def _outcome_of(awaitable: Any) -> tuple[Any, BaseException | None]:
    """The result, or what was raised: SystemExit from a task would end the loop."""
    try:
        return await awaitable, None
    except BaseException as e:  # noqa: BLE001 - told to the thread that waits
        return None, e


def _awaited(function: Callable[..., Any], loop: _Loop) -> Handler:
    """A function of bytes that is async, as one that is not."""

    def call(payload: bytes, context: Context) -> Any:
        return loop.result_of(function(payload, context), context)

    return call
