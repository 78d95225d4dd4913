"""JSON between a typed function and its callers.

Values may be anything that pydantic can serialize (dataclasses, its models, dates, paths, enums,
sets), bytes, which become base64, and numpy scalars and arrays, for which numpy is not needed here.
"""

from __future__ import annotations

import base64
import dataclasses
from typing import Any

# pydantic is imported where it is used: a process whose functions take bytes does not need it.


class NotJson(TypeError):
    """A value that cannot be serialized; the message names its type and where it was found."""


def write(value: object) -> bytes:
    """JSON on one line. NaN and infinities become null, as in JavaScript. Raises NotJson."""
    from pydantic_core import PydanticSerializationError, to_json

    unknown: list[str] = []

    def fallback(found: Any) -> Any:
        """A number or list for a scalar or array like numpy's."""
        to_list = None if isinstance(found, type) else getattr(found, "tolist", None)
        if to_list is None:
            unknown.append(name_of(found))
            raise TypeError
        return to_list()

    whole, inside, why = name_of(value), "", ""
    try:
        return to_json(_with_text(value), inf_nan_mode="null", fallback=fallback)
    except RecursionError:
        why = ": it contains itself, or is nested too deeply"
    except PydanticSerializationError as e:
        why = f": {' '.join(str(e).split())}"
        if "utf-8" in why:
            why += "; bytes in a pydantic model become base64 if its ser_json_bytes says so"
    if unknown:
        inside, why = "" if unknown == [whole] else f" with {unknown[0]} in it", ""
    raise NotJson(f"{whole}{inside}, which is not JSON{why}")


def read(text: bytes) -> Any:
    """Raises ValueError."""
    from pydantic_core import from_json

    return from_json(text, allow_inf_nan=False)


def name_of(value: object) -> str:
    """The name of the value's type, with its module unless it is built in."""
    kind = type(value)
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{module}{kind.__qualname__}"


_SIMPLE = frozenset({str, int, float, bool, type(None)})


def _with_text(value: Any) -> Any:
    """The value with all bytes as base64 in the standard alphabet.

    Decoders of every language read that one; pydantic would use the URL-safe alphabet.
    """
    if type(value) in _SIMPLE:
        return value
    if isinstance(value, (bytes, bytearray, memoryview)):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, dict):
        if _SIMPLE.issuperset(map(type, value.values())):
            return value
        return {key: _with_text(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        if _SIMPLE.issuperset(map(type, value)):
            return value
        return [_with_text(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if hasattr(value, "__pydantic_serializer__"):  # pydantic's own dataclasses know how
            return value
        fields = dataclasses.fields(value)
        return {field.name: _with_text(getattr(value, field.name)) for field in fields}
    return value
