"""Makes what the library gives for a request: an Answer, its result, or a CallFailed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from overlay.client.submitter import Delivery
from overlay.model import json_values
from overlay.model.errors import CallFailed, InvalidCall, of_status
from overlay.model.segments import Code, Detail, Executed, Hop, Part
from overlay.transport import codec


@dataclass(frozen=True)
class Answer:
    """What came back. parts: every worker asked, in the order of the configuration.

    result: ALL: merged, or joined by newlines; ANY: the worker's own bytes. A part's own `result`
    is filled only with want_parts. hops: the processes that took part, the one asked first. trace:
    with want_trace, what the way took at each of them.
    """

    result: bytes
    parts: tuple[Part, ...]
    hops: tuple[str, ...]
    request_id: int
    trace: tuple[Hop, ...] = ()

    @property
    def coverage(self) -> tuple[int, int]:
        """(answered, asked), counted in workers."""
        return sum(part.ok for part in self.parts), len(self.parts)

    @property
    def missing(self) -> tuple[Part, ...]:
        """The workers that did not answer, each with its code and reason."""
        return tuple(part for part in self.parts if not part.ok)

    @property
    def value(self) -> Any:
        """Of a typed function: the JSON value that any one worker gave, or that a merge made.

        Raises ValueError where several workers gave one each, which `values` has.
        """
        try:
            return json_values.read(self.result)
        except ValueError as e:
            if self.coverage[0] > 1:
                raise ValueError(
                    f"{self.coverage[0]} workers gave a value each, which `values` has; "
                    'mode="any" asks one of them'
                ) from None
            raise ValueError(f"the result is not JSON ({e}); `result` has its bytes") from None

    @property
    def values(self) -> dict[str, Any]:
        """Of a typed function: each worker's own JSON value, by its id; without the missing ones.

        Of all with `args` or want_parts. Raises ValueError.
        """
        good = [part for part in self.parts if part.ok]
        if len(good) == 1 and not good[0].result:  # any one's own is the result
            return {good[0].process_id: self.value}
        return {part.process_id: part.value for part in good}


class Incomplete(bytes):
    """The result, in a map or a Future, of a request to all that some workers did not answer."""

    missing: tuple[Part, ...] = ()


NOT_PICKLED = "a Future belongs to the process that waits for it; pickle its result()"


def results_of(came: Delivery, at: int, count: int) -> list[bytes]:
    if came.is_whole:
        return came.results[at : at + count]
    return [result_of(came, row) for row in range(at, at + count)]


def result_of(came: Delivery, at: int) -> bytes:
    result = came.results[at]
    if came.is_whole:
        return result
    missing = tuple(part for part in came.answers.at(at).parts if not part.ok)
    if not missing:
        return result
    incomplete = Incomplete(result)
    incomplete.missing = missing
    return incomplete


def read_value(result: bytes) -> Any:
    """The JSON value of a result. Raises InvalidCall, which says that it is no JSON."""
    try:
        return json_values.read(result)
    except ValueError as e:
        reason = f"the result is not JSON ({e}): args are for typed functions, others get a payload"
        raise InvalidCall(reason, executed=Executed.YES) from None


def value_of(result: bytes | CallFailed) -> Any:
    """As `read_value`; a failure as it is, and that of a result that is no JSON too."""
    if isinstance(result, CallFailed):
        return result
    try:
        return read_value(result)
    except InvalidCall as e:
        return e.with_traceback(None)  # which would hold the result


def failure_of(error: Any, address: str, timeout_s: float) -> CallFailed:
    """gRPC's error as ours. Only the trailer proves that no handler ran; no code does."""
    said = codec.read_error(error)
    after_s = codec.retry_after_s(error.trailing_metadata())
    failure = Detail(said.code, said.reason, said.executed, after_s)
    request_id = codec.read_request_id(error.trailing_metadata())
    return error_of(failure, _sentence(error, said, address, timeout_s), request_id)


def error_of(failure: Detail, sentence: str, request_id: int = 0) -> CallFailed:
    error = of_status(failure.code, failure.executed)(
        sentence,
        code=failure.code,
        executed=failure.executed,
        retry_after_s=failure.retry_after_s,
    )
    error.request_id = request_id
    return error


def sentence_of(code: Code, reason: str, address: str) -> str:
    """The process's own words, unless what answers there is no process of an overlay."""
    if code is Code.UNIMPLEMENTED:
        return f"what serves at {address} is not a process of an overlay, or an older one"
    return reason


def _sentence(error: Any, said: Part, address: str, timeout_s: float) -> str:
    """The process's own words where it had some; else ours in place of gRPC's."""
    if said.code is Code.CANCELLED:
        return "this client was closed before the answer came"
    if said.code is Code.DEADLINE_EXCEEDED and said.reason == "Deadline Exceeded":
        return f"no answer from {address} within {timeout_s:g} s"
    if said.code is Code.UNAVAILABLE and not error.trailing_metadata():
        return f"no answer from {address}: {said.reason}"
    return sentence_of(said.code, said.reason, address)
