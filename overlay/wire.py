"""Between the messages of overlay.proto and our values; the only module that knows both.

Reading checks what came in; writing never fails.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from overlay.errors import BadRequest, ConfigError, OverlayError
from overlay.limits import Limits
from overlay.meter import Spread
from overlay.values import Answer, Code, Executed, Item, Mode, Part, Route, Segment

if TYPE_CHECKING:
    import overlay_pb2 as pb2
    import overlay_pb2_grpc as pb2_grpc
else:
    try:
        import overlay_pb2 as pb2
        import overlay_pb2_grpc as pb2_grpc
    except ModuleNotFoundError as e:
        if e.name not in {"overlay_pb2", "overlay_pb2_grpc"}:
            raise
        raise ConfigError(
            f"{e.name} is missing; run ./build_proto.sh (Windows: python -m grpc_tools.protoc "
            f"-I . --python_out=. --pyi_out=. --grpc_python_out=. overlay.proto)"
        ) from None
    except Exception as e:  # noqa: BLE001 - the generated code checks versions with errors of its own
        raise ConfigError(
            f"overlay_pb2 does not fit the installed packages ({e}); run ./build_proto.sh again"
        ) from None

__all__ = ["pb2", "pb2_grpc"]

EXECUTED_KEY = "overlay-executed"
COVERAGE_KEY = "overlay-coverage"
REQUEST_ID_KEY = "overlay-request-id"
_STATUS_KEY = "grpc-status-details-bin"

# A frozen or vanished peer is noticed within about 2.5 s on every system; see the keepalive test.
_KEEPALIVE = [
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 1500),
    ("grpc.http2.ping_timeout_ms", 1500),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]


def channel_options(limits: Limits | None = None) -> list[tuple[str, Any]]:
    """Options of a channel to a process: quick to notice a dead peer, quick to come back."""
    return [
        *_size_options(limits or Limits()),
        *_KEEPALIVE,
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
        ("grpc.enable_retries", 0),  # gRPC's own retries run a request twice
        ("grpc.use_local_subchannel_pool", 1),  # a client of its own, not one shared in the process
    ]


def server_options(limits: Limits) -> list[tuple[str, Any]]:
    """Options of a process's server: nobody shares its port, and no ping is too many."""
    return [
        *_size_options(limits),
        *_KEEPALIVE,
        ("grpc.so_reuseport", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 500),
        ("grpc.http2.max_ping_strikes", 0),
    ]


def _size_options(limits: Limits) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.max_send_message_length", limits.max_message_bytes),
    ]


CHANNEL_OPTIONS = channel_options()


def read_request(request: pb2.Request, deadline: float, limits: Limits) -> Segment:
    """A segment of one. Raises BadRequest naming the field that is not usable.

    deadline: monotonic seconds. A request without an id gets one here.
    """
    _check_names("hops", request.hops, limits)
    _check_names("targets", request.targets, limits)
    _check_names("team", [request.team], limits)
    _check_names("handler", [request.handler], limits)
    mode = int(request.mode)
    if mode not in (Mode.ALL, Mode.ANY):
        raise BadRequest(f"mode {mode} is not 0 (all) or 1 (any)")
    route = Route(
        mode=Mode(mode),
        team=request.team,
        handler=request.handler,
        hops=tuple(request.hops),
        # Only between processes; the process that a client asks finds the targets itself.
        targets=(tuple(request.targets) or None) if request.hops else None,
    )
    request_id = request.request_id or secrets.randbits(63) + 1
    return Segment(route, (Item(request_id, request.payload, deadline, request.attempt),))


def write_request(route: Route, item: Item) -> pb2.Request:
    return pb2.Request(
        payload=item.payload,
        hops=route.hops,
        mode=_MODES[route.mode],
        team=route.team,
        handler=route.handler,
        targets=route.targets or (),
        request_id=item.request_id,
        attempt=item.attempt,
    )


def read_response(response: pb2.Response) -> Answer:
    return Answer(tuple(read_part(part) for part in response.parts), tuple(response.hops))


def write_response(
    answer: Answer, request_id: int, result: bytes = b"", *, with_results: bool
) -> pb2.Response:
    """with_results: between processes, and for a client that wants each part's own bytes."""
    return pb2.Response(
        result=result,
        hops=answer.hops,
        parts=[write_part(part, with_results) for part in answer.parts],
        request_id=request_id,
    )


def read_part(part: pb2.Part) -> Part:
    return Part(
        process_id=part.process_id,
        code=read_code(part.code),
        reason=part.reason,
        result=part.result,
        hops=tuple(part.hops),
        waited_us=part.waited_us,
        worked_us=part.worked_us,
        executed=Executed(part.executed) if part.executed in (0, 1, 2) else Executed.UNKNOWN,
    )


def write_part(part: Part, with_result: bool) -> pb2.Part:
    return pb2.Part(
        process_id=part.process_id,
        code=part.code,
        reason=part.reason,
        result=part.result if with_result else b"",
        hops=part.hops,
        waited_us=min(part.waited_us, 0xFFFFFFFF),
        worked_us=min(part.worked_us, 0xFFFFFFFF),
        executed=_EXECUTED[part.executed],
    )


def read_code(number: int) -> Code:
    return Code(number) if 0 <= number <= 16 else Code.UNKNOWN


def write_spread(spread: Spread) -> pb2.Spread:
    return pb2.Spread(
        p50=spread.p50 * 1e3, p99=spread.p99 * 1e3, mean=spread.mean * 1e3, count=spread.count
    )


def grpc_code(code: Code) -> grpc.StatusCode:
    return _GRPC_CODES[code]


def trailers(error: OverlayError) -> list[tuple[str, str | bytes]]:
    """The trailing metadata of a failed request: the proof that nothing ran, and when to retry."""
    made: list[tuple[str, str | bytes]] = []
    if error.executed is Executed.NO:
        made.append((EXECUTED_KEY, "no"))
    if error.retry_after_s is not None:
        made.append((_STATUS_KEY, _retry_status(error)))
    return made


def read_error(error: grpc.RpcError) -> Part:
    """What a failed call says, as a refusal. Only the trailer proves that nothing ran."""
    metadata = dict(error.trailing_metadata() or ())
    executed = Executed.NO if metadata.get(EXECUTED_KEY) == "no" else Executed.UNKNOWN
    code = Code(error.code().value[0])
    return Part("", code, error.details() or code.name, executed=executed)


def retry_after_s(trailing_metadata: Iterable[tuple[str, Any]] | None) -> float | None:
    """The seconds of google.rpc.RetryInfo in a failed call's trailing metadata, if it is there."""
    packed = dict(trailing_metadata or ()).get(_STATUS_KEY)
    if packed is None:
        return None
    status = status_pb2.Status()
    try:
        status.ParseFromString(packed)
        for detail in status.details:
            info = error_details_pb2.RetryInfo()
            if detail.Unpack(info):
                return float(info.retry_delay.ToTimedelta().total_seconds())
    except Exception:  # noqa: BLE001 - another program's trailer may hold anything
        return None
    return None


def _retry_status(error: OverlayError) -> bytes:
    delay = Duration()
    delay.FromMilliseconds(max(1, round((error.retry_after_s or 0) * 1000)))
    # The message must be the call's own, or clients that compare the two see a broken status.
    status = status_pb2.Status(code=int(error.code), message=str(error))
    status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return bytes(status.SerializeToString())


def _check_names(field: str, names: Iterable[str], limits: Limits) -> None:
    names = list(names)
    if len(names) > limits.max_hops:
        raise BadRequest(f"{field}: {len(names)} entries are more than {limits.max_hops}")
    for name in names:
        if len(name) > limits.max_name or not name.isprintable():
            shown = name[:20].encode("ascii", "backslashreplace").decode()
            raise BadRequest(
                f"{field}: '{shown}' is not a name of at most {limits.max_name} letters"
            )


_MODES = {Mode.ALL: pb2.ALL, Mode.ANY: pb2.ANY}
_EXECUTED = {Executed.UNKNOWN: pb2.UNKNOWN, Executed.NO: pb2.NO, Executed.YES: pb2.YES}
_GRPC_CODES = {Code(status.value[0]): status for status in grpc.StatusCode}
