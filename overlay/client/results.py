"""Makes the outcome of a request: an Answer, its result, or a CallFailed."""

from __future__ import annotations

from typing import Any

from overlay.client.submitter import Delivery
from overlay.model import json_values
from overlay.model.errors import CallFailed, InvalidCall, of_status
from overlay.model.segments import Code, Detail, Executed, Hop, Part
from overlay.transport import codec


class Answer:
    """The answer to a request.

    result: mode "all": the merged results, or all of them joined by newlines; "any": the worker's
    result. parts: one for every worker asked, in configuration order, each with its own `result`
    only with want_parts. hops: the processes that took part, the one asked first. trace: with
    want_trace, the times at each of them.
    """

    __slots__ = ("_at", "_delivered", "_hops", "_parts", "request_id", "result", "trace")

    def __init__(
        self,
        result: bytes,
        parts: tuple[Part, ...],
        hops: tuple[str, ...],
        request_id: int,
        trace: tuple[Hop, ...] = (),
    ) -> None:
        self.result = result
        self.request_id = request_id
        self.trace = trace
        self._parts = parts
        self._hops = hops
        self._delivered: Delivery | None = None
        self._at = 0

    @classmethod
    def of(cls, delivered: Delivery, at: int, request_id: int) -> Answer:
        """The answer in a row of a delivery. Its parts and hops are decoded when they are looked
        at, because most callers want the result only, and decoding takes longer than all else."""
        made = cls(delivered.results[at], (), (), request_id)
        made._delivered, made._at = delivered, at
        return made

    @property
    def parts(self) -> tuple[Part, ...]:
        self._decode()
        return self._parts

    @property
    def hops(self) -> tuple[str, ...]:
        self._decode()
        return self._hops

    def _decode(self) -> None:
        delivered = self._delivered
        if delivered is not None:
            row = delivered.answers.at(self._at)
            self._parts, self._hops, self._delivered = row.parts, row.hops, None

    def _key(self) -> tuple[Any, ...]:
        return self.result, self.parts, self.hops, self.request_id, self.trace

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, Answer) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        names = "result", "parts", "hops", "request_id", "trace"
        return f"Answer({', '.join(f'{n}={v!r}' for n, v in zip(names, self._key(), strict=True))})"

    def __reduce__(self) -> tuple[type[Answer], tuple[Any, ...]]:
        return Answer, self._key()

    @property
    def coverage(self) -> tuple[int, int]:
        """The numbers of workers that answered, and that were asked."""
        return sum(part.ok for part in self.parts), len(self.parts)

    @property
    def missing(self) -> tuple[Part, ...]:
        """The workers that did not answer, each with its code and reason."""
        return tuple(part for part in self.parts if not part.ok)

    @property
    def value(self) -> Any:
        """The JSON value that a typed function returned on one worker, or that a merge made.

        Raises ValueError if several workers returned a value each; `values` has those.
        """
        try:
            return json_values.read(self.result)
        except ValueError as e:
            if self.coverage[0] > 1:
                raise ValueError(
                    f"{self.coverage[0]} workers returned a value each: use `values`, or "
                    'mode="any" to ask one of them'
                ) from None
            raise ValueError(f"the result is not JSON ({e}); `result` has its bytes") from None

    @property
    def values(self) -> dict[str, Any]:
        """The JSON value that a typed function returned on each worker that answered, by its id.

        Needs `args` or want_parts if several workers answered. Raises ValueError.
        """
        good = [part for part in self.parts if part.ok]
        if len(good) == 1 and not good[0].result:  # the only value is the result itself
            return {good[0].process_id: self.value}
        return {part.process_id: part.value for part in good}


class Incomplete(bytes):
    """The result of a map or a Future in mode "all" that some workers did not answer."""

    missing: tuple[Part, ...] = ()


NOT_PICKLED = "a Future belongs to the process that waits for it; pickle its result()"


def results_of(delivered: Delivery, at: int, count: int) -> list[bytes]:
    if delivered.is_whole:
        return delivered.results[at : at + count]
    return [result_of(delivered, row) for row in range(at, at + count)]


def result_of(delivered: Delivery, at: int) -> bytes:
    result = delivered.results[at]
    if delivered.is_whole:
        return result
    missing = tuple(part for part in delivered.answers.at(at).parts if not part.ok)
    if not missing:
        return result
    incomplete = Incomplete(result)
    incomplete.missing = missing
    return incomplete


def read_value(result: bytes) -> Any:
    """The JSON value of a result. Raises InvalidCall if it is not JSON."""
    try:
        return json_values.read(result)
    except ValueError as e:
        reason = f"the result is not JSON ({e}): only typed functions take args, others a payload"
        raise InvalidCall(reason, executed=Executed.YES) from None


def is_value(result: bytes) -> bool:
    try:
        json_values.read(result)
    except ValueError:
        return False
    return True


def value_of(result: bytes | CallFailed) -> Any:
    """Like `read_value`, but returns failures instead of raising them."""
    if isinstance(result, CallFailed):
        return result
    try:
        return read_value(result)
    except InvalidCall as e:
        return e.with_traceback(None)  # the traceback would keep the result alive


def error_from_rpc(error: Any, address: str, timeout_s: float) -> CallFailed:
    """Converts a gRPC error. Only the trailer proves that no handler ran; no status code does."""
    status = codec.read_error(error)
    after_s = codec.retry_after_s(error.trailing_metadata())
    failure = Detail(status.code, status.reason, status.executed, after_s)
    request_id = codec.read_request_id(error.trailing_metadata())
    return error_of(failure, _message_from_rpc(error, status, address, timeout_s), request_id)


def error_of(failure: Detail, message: str, request_id: int = 0) -> CallFailed:
    error = of_status(failure.code, failure.executed)(
        message,
        code=failure.code,
        executed=failure.executed,
        retry_after_s=failure.retry_after_s,
    )
    error.request_id = request_id
    return error


def message_of(code: Code, reason: str, address: str) -> str:
    """The process's own reason, unless the server is not an overlay process."""
    if code is Code.UNIMPLEMENTED:
        return f"the server at {address} is not a process of an overlay, or is an older one"
    return reason


def _message_from_rpc(error: Any, status: Part, address: str, timeout_s: float) -> str:
    """The process's own reason if it gave one, else a clearer message than gRPC's."""
    if status.code is Code.CANCELLED:
        return "this client was closed before the answer came"
    if status.code is Code.DEADLINE_EXCEEDED and status.reason == "Deadline Exceeded":
        return f"no answer from {address} within {timeout_s:g} s"
    if status.code is Code.UNAVAILABLE and not error.trailing_metadata():
        return f"no answer from {address}: {status.reason}"
    return message_of(status.code, status.reason, address)
