"""Every rule holds for a single request, for a segment of a stream, and for one on a lane: one
table, asked all ways.

The limits on waiting differ and are not in it: a single request takes a queue slot
(tests/system/test_rules.py), a stream has its window (tests/calls/test_stream_session.py).

Not for a lane are the rules of merges, as it carries mode any only: a request to all workers, or
one for another handler, is refused there (tests/system/test_lanes.py).
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import grpc
import pytest
from grpc import StatusCode

from overlay.calls.reception import Reception
from overlay.model import config
from overlay.model.errors import BadRequest
from overlay.model.limits import Limits
from overlay.model.topology import HandlerSpec
from overlay.server.service import Service
from overlay.transport import endpoints
from overlay.transport.codec import pb2, pb2_grpc
from overlay.workers.api import Context
from tests.harness import cluster
from tests.harness.cluster import six_processes, until
from tests.harness.ways import QUICK, Laned, Outcome, Streamed, Unary, Way

MAX_BYTES = 64 * 1024
LIMITS = replace(Limits(), max_message_bytes=MAX_BYTES, chosen_ids=3, default_deadline_s=5.0)
GATE = threading.Event()
STARTED: list[Context] = []
SLOW = b"slow"  # for `held`
PAYLOADS: list[bytes] = []  # of the requests in STARTED


def echo(payload: bytes, context: Context) -> bytes:
    return b"C: " + payload


def held(payload: bytes, context: Context) -> bytes:
    if payload == QUICK:
        return payload
    if payload == SLOW:
        time.sleep(0.05)
        return payload
    PAYLOADS.append(payload)
    STARTED.append(context)
    while not GATE.wait(0.01) and not context.cancelled:
        pass
    return payload


def sized(payload: bytes, context: Context) -> bytes:
    return bytes(int(payload))


def picky(payload: bytes, context: Context) -> bytes:
    if payload == QUICK:
        return payload
    raise BadRequest("no such word")


def broken(payload: bytes, context: Context) -> bytes:
    if payload == QUICK:
        return payload
    raise SystemExit(3) if payload == b"exit" else ValueError("the secret")


def swollen(parts: object) -> bytes:
    return bytes(MAX_BYTES + 1)


def stubborn(parts: object) -> bytes:
    raise BadRequest("these do not fit together")


def failing(parts: object) -> bytes:
    raise ValueError("the secret")


def spec(name: str, call: str, merge: str | None = None, slots: int = 8) -> HandlerSpec:
    here = "tests.calls.test_both_ways"
    return HandlerSpec(name, f"{here}:{call}", merge and f"{here}:{merge}", slots=slots)


HANDLERS = [
    *(spec(name, name) for name in ("echo", "sized", "picky", "broken")),
    *(spec(name, "echo", name) for name in ("swollen", "stubborn", "failing")),
    spec("held", "held", slots=1),
]


class Worker:
    """Process C, served in this process on its own port. `above` has the processes above it."""

    def __init__(self, above: cluster.Overlay) -> None:
        topology = config.load(above.path)
        handlers = {handler.name: handler for handler in HANDLERS}
        self.config, self.metrics = above.config, above.metrics
        self.service = service = Service(replace(topology, handlers=handlers, limits=LIMITS), "C")
        self._above = above
        self._pool = ThreadPoolExecutor(16)

        class Servicer(pb2_grpc.OverlayNodeServicer):
            def Forward(self, request, context):
                return service.forward(request, context)

            def ForwardStream(self, call, context):
                return service.forward_stream(call, context)

            def GetMetrics(self, request, context):
                return service.metrics()

        self._server = grpc.server(self._pool, options=endpoints.server_options(LIMITS))
        reception = Reception(self._server, self._pool, LIMITS, service.request_log)
        pb2_grpc.add_OverlayNodeServicer_to_server(Servicer(), reception)
        port = above.port("C")
        assert self._server.add_insecure_port(f"127.0.0.1:{port}") == port
        self._server.start()
        service.start()
        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}", endpoints.channel_options())

    def stub(self, process_id: str) -> pb2_grpc.OverlayNodeStub:
        if process_id != "C":
            return self._above.stub(process_id)
        return pb2_grpc.OverlayNodeStub(self._channel)

    def counts(self) -> Counts:
        return counts(self.service.metrics())

    def stop(self) -> None:
        self._channel.close()
        self._server.stop(0).wait(5)
        self.service.close()
        self._pool.shutdown(wait=False)


@dataclass(frozen=True)
class Counts:
    """ended: completed, failed, refused, cancelled."""

    received: int
    ended: tuple[int, int, int, int]
    refused: dict[str, int]

    def since(self, before: Counts) -> tuple[int, tuple[int, ...], dict[str, int]]:
        ended = tuple(now - then for now, then in zip(self.ended, before.ended, strict=True))
        grown = {why: n - before.refused.get(why, 0) for why, n in self.refused.items()}
        return self.received - before.received, ended, {why: n for why, n in grown.items() if n}


def counts(m: pb2.MetricsResponse) -> Counts:
    ended = m.completed, m.failed, sum(m.refused_by_reason.values()), m.cancelled
    return Counts(m.received, ended, dict(m.refused_by_reason))


COMPLETED, FAILED, REFUSED, CANCELLED = (tuple(int(i == way) for i in range(4)) for way in range(4))


@pytest.fixture(scope="module")
def above(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cluster.Overlay]:
    """Processes A and B of an overlay whose worker is served by the tests; not started."""
    handlers = {h.name: {"call": h.call, "slots": h.slots} for h in HANDLERS}
    found = six_processes(handlers=handlers)
    found["processes"] = {i: found["processes"][i] for i in "ABC"}
    for process in found["processes"].values():
        process["neighbors"] = [i for i in process["neighbors"] if i in "ABC"]
    with cluster.Overlay(tmp_path_factory.mktemp("above"), found) as above:
        yield above


@pytest.fixture
def worker(above: cluster.Overlay) -> Iterator[Worker]:
    GATE.clear()
    made = Worker(above)
    yield made
    GATE.set()
    made.stop()


WAYS = (Unary, Streamed, Laned)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, worker: Worker, above: cluster.Overlay) -> Iterator[Way]:
    with laned(worker, above) if request.param is Laned else closing(request.param()) as made:
        yield made


@contextmanager
def laned(worker: Worker, above: cluster.Overlay) -> Iterator[Laned]:
    """Lanes that A lends. In the end A has counted what their client got, and nothing else."""
    if not above.processes:
        above.serve("A", "B")
    before = counts(worker.metrics("A"))
    with closing(Laned()) as made:
        yield made
    received, (completed, failed, refused, cancelled), _ = counts(worker.metrics("A")).since(before)
    assert received == completed + failed + refused + cancelled
    assert completed - made.learned == made.ends["completed"]
    assert (failed, cancelled) == (made.ends["failed"], made.ends["cancelled"])


@pytest.fixture(autouse=True)
def _lines_of_all_levels(caplog):
    caplog.set_level(logging.INFO, "overlay")


@dataclass(frozen=True)
class Rule:
    """How a request with the fields `asked` ends. why: the reason a refusal is counted under."""

    asked: dict[str, Any]
    code: StatusCode
    sentence: str = ""
    executed: str = ""
    ended: tuple[int, ...] = FAILED
    why: str = ""


def refused(code: StatusCode, sentence: str, why: str = "bad request", **asked: Any) -> Rule:
    return Rule(asked, code, sentence, "no", REFUSED, why)


def failed(code: StatusCode, sentence: str, executed: str = "yes", **asked: Any) -> Rule:
    return Rule(asked, code, sentence, executed)


INVALID, LARGE = StatusCode.INVALID_ARGUMENT, StatusCode.RESOURCE_EXHAUSTED
TOO_LARGE = r"the answer has [\d,]+ bytes, more than max_message_mib allows \(65,536\)"
RULES = {
    "an answer": Rule({}, StatusCode.OK, ended=COMPLETED),
    "an unknown handler": refused(
        StatusCode.NOT_FOUND, "no handler 'os:system'", "unknown name", handler="os:system"
    ),
    "an unknown team": refused(StatusCode.NOT_FOUND, "no team 'blue'", "unknown name", team="blue"),
    "a loop": refused(
        StatusCode.FAILED_PRECONDITION, "C is already in the hop list", "loop", hops=["X", "C"]
    ),
    "an invalid mode": refused(INVALID, "mode 7 is not", mode=7),
    "too many hops": refused(INVALID, "hops: 100 entries", hops=["x"] * 100),
    "an invalid name": refused(INVALID, "team: 'xxxx", team="x" * 65),
    "too large a payload": refused(
        INVALID, r"payload: 65,537 bytes are more than max_message_mib allows \(65,536\)",
        payload=bytes(MAX_BYTES + 1),
    ),
    "too large a result": failed(
        LARGE, "handler 'sized' returned 70,000 bytes", handler="sized", payload=b"70000"
    ),
    "too large a result when it is sent twice": failed(
        LARGE, TOO_LARGE, handler="sized", payload=b"40000", want_parts=True
    ),
    "a handler that refuses": failed(INVALID, "no such word", handler="picky"),
    "a handler that raises": failed(StatusCode.INTERNAL, "error id", handler="broken"),
    "a handler that exits": failed(
        StatusCode.INTERNAL, "error id", handler="broken", payload=b"exit"
    ),
    "an empty answer": Rule({"handler": "sized", "payload": b"0"}, StatusCode.OK, ended=COMPLETED),
}  # fmt: skip
RULES_OF_MERGES = {
    "too large a merged result": failed(LARGE, TOO_LARGE, handler="swollen"),
    "a merge that refuses": failed(INVALID, "these do not fit together", handler="stubborn"),
    "a merge that raises": failed(
        StatusCode.INTERNAL, "the handler's merge failed; error id", handler="failing"
    ),
}  # fmt: skip
EACH = [(way, what) for way in WAYS for what in RULES]
EACH += [(way, what) for way in (Unary, Streamed) for what in RULES_OF_MERGES]


def ready(worker: Worker, way: Way, handler: str = "", **rest: Any) -> Counts:
    """The counts before requests of this handler."""
    way.ready(worker, "C", handler)
    if handler == "held":  # known as quick, it would get more requests than it has slots
        Unary().ask(worker, "C", SLOW, handler=handler)
    STARTED.clear()
    PAYLOADS.clear()
    return worker.counts()


@pytest.mark.parametrize(("way", "what"), EACH, indirect=["way"])
def test_a_rule_is_kept_and_its_outcome_counted_and_logged_once(worker, way, what, caplog):
    rule = {**RULES, **RULES_OF_MERGES}[what]
    before = ready(worker, way, **rule.asked)
    stories = len(worker.service.metrics(requests=99).requests)
    caplog.clear()

    (call,) = way.at_once(worker, 1, "C", **rule.asked)
    outcome = Outcome(call)

    assert (outcome.code, outcome.executed) == (rule.code, rule.executed)
    if not outcome.ok:
        assert re.search(rule.sentence, outcome.details), outcome.details
        assert "secret" not in outcome.details
    refused = {rule.why: 1} if rule.why else {}
    assert worker.counts().since(before) == (1, rule.ended, refused)
    lines = [line for line in caplog.records if "asked by" in line.getMessage()]
    assert len(lines) == (not outcome.ok)
    assert all("127.0.0.1" in line.getMessage() for line in lines)
    (summary,) = worker.service.metrics(requests=99).requests[stories:]
    assert (summary.code, summary.count) == (outcome.code.value[0], 1)


@pytest.mark.parametrize("mode", [pb2.ALL, pb2.ANY])
def test_all_ways_answer_the_same(worker, above, mode):
    """Those of mode any on a lane, too."""
    with ExitStack() as stack:
        ways = [stack.enter_context(closing(way())) for way in (Unary, Streamed)]
        if mode == pb2.ANY:
            ways.append(stack.enter_context(laned(worker, above)))
        for what, rule in RULES.items():
            asked = {"mode": mode, **rule.asked}
            outcomes = [Outcome(way.at_once(worker, 1, "C", **asked)[0]) for way in ways]
            failures = {re.sub("error id [0-9a-f]+", "", o.details) for o in outcomes if not o.ok}
            results = {o.response.result for o in outcomes if o.ok}
            assert len(failures | results) == 1, (what, failures, results)


def test_a_chosen_id_runs_once_and_counts_twice(worker, way):
    asked = {"payload": b"x", "request_id": 4711}
    ready(worker, way)
    assert Outcome(way.at_once(worker, 1, "C", **asked)[0]).ok
    before = worker.counts()

    again = Outcome(way.at_once(worker, 1, "C", **asked)[0])

    assert (again.code, again.executed) == (StatusCode.ALREADY_EXISTS, "unknown")
    assert worker.counts().since(before) == (1, FAILED, {})


def test_beyond_the_limit_a_chosen_id_is_refused_with_a_time_to_retry(worker, way):
    ready(worker, way)
    outcomes = [
        Outcome(way.at_once(worker, 1, "C", request_id=n, timeout=3)[0]) for n in (1, 9, 17, 25)
    ]
    (full,) = [outcome for outcome in outcomes if not outcome.ok][:1]

    assert (full.code, full.executed) == (LARGE, "no")
    assert full.retry_after_s > 0
    assert worker.counts().refused["ids full"] >= 1


def test_a_stopping_process_refuses_and_says_when_to_retry(worker, way):
    assert Outcome(way.at_once(worker, 1, "C")[0]).ok
    before = worker.counts()
    worker.service.queue.close()

    outcome = Outcome(way.at_once(worker, 1, "C")[0])

    assert (outcome.code, outcome.executed) == (StatusCode.UNAVAILABLE, "no")
    assert outcome.details == "C is stopping and takes no new requests"
    assert outcome.retry_after_s > 0
    assert worker.counts().since(before) == (1, REFUSED, {"draining": 1})


def test_waiting_requests_are_refused_as_draining_when_the_process_stops(worker, way):
    before = ready(worker, way, "held")
    (running,) = way.at_once(worker, 1, "C", handler="held", timeout=30)
    until(lambda: STARTED)
    (waiting,) = way.at_once(worker, 1, "C", handler="held", timeout=30)
    queued(worker, 1)
    worker.service.queue.close()

    outcome = Outcome(waiting)
    GATE.set()

    assert (outcome.code, outcome.executed) == (StatusCode.UNAVAILABLE, "no")
    assert Outcome(running).ok
    assert worker.counts().since(before) == (2, (1, 0, 1, 0), {"draining": 1})


@pytest.mark.parametrize("waits", [False, True], ids=["it runs", "it waits"])
def test_a_caller_that_leaves_ends_its_request_which_counts_once(worker, way, waits):
    before = ready(worker, way, "held")
    first = way.at_once(worker, 1, "C", handler="held", timeout=30)
    until(lambda: STARTED)
    calls = way.at_once(worker, 1, "C", handler="held", timeout=30) if waits else first
    queued(worker, int(waits))

    calls[0].cancel()

    until(lambda: worker.counts().since(before)[1] == CANCELLED)
    queued(worker, 0)
    assert (len(STARTED), STARTED[0].cancelled) == (1, not waits)


@pytest.mark.parametrize("waits", [False, True], ids=["it runs", "it waits"])
def test_a_deadline_ends_running_and_refuses_waiting_requests(worker, way, waits):
    before = ready(worker, way, "held")
    calls = way.at_once(worker, 1, "C", handler="held", timeout=30) if waits else []
    until(lambda: len(STARTED) == len(calls))

    calls += way.at_once(worker, 1, "C", handler="held", timeout=0.4)

    until(lambda: sum(worker.counts().since(before)[1]) == 1)
    _, ended, refused = worker.counts().since(before)
    assert (ended, refused) == ((REFUSED, {"no time left": 1}) if waits else (FAILED, {}))
    assert (len(STARTED), STARTED[0].cancelled) == (1, not waits)


def test_a_request_without_a_deadline_gets_the_default(worker, way):
    ready(worker, way, "held")
    (call,) = way.at_once(worker, 1, "C", handler="held", timeout=None)
    until(lambda: STARTED)

    assert 0 < STARTED[0].remaining_s() <= LIMITS.default_deadline_s
    call.cancel()


def test_a_request_that_asks_for_a_log_line_gets_one(worker, way, caplog):
    assert Outcome(way.at_once(worker, 1, "C", want_trace=True)[0]).ok

    until(lambda: [line for line in caplog.records if "answered; waited" in line.getMessage()])


def test_the_request_with_the_higher_priority_goes_first(worker, way):
    ready(worker, way, "held")
    calls = way.at_once(worker, 1, "C", handler="held", payload=b"first", timeout=30)
    until(lambda: STARTED)
    for payload, priority in ((b"late", 0), (b"urgent", 9)):
        asked = {"handler": "held", "payload": payload, "priority": priority, "timeout": 30}
        calls += way.at_once(worker, 1, "C", **asked)
        queued(worker, len(calls) - 1)

    GATE.set()

    assert all(Outcome(call).ok for call in calls)
    assert PAYLOADS == [b"first", b"urgent", b"late"]


def test_a_worker_runs_no_more_at_once_than_it_has_slots(worker, way):
    ready(worker, way, "held")
    calls = way.at_once(worker, 3, "C", handler="held", timeout=30)
    until(lambda: STARTED)
    queued(worker, 2)
    (handler,) = [h for h in worker.service.metrics().handlers if h.name == "held"]
    assert (len(STARTED), handler.active, handler.slots) == (1, 1, 1)

    GATE.set()

    assert all(Outcome(call).ok for call in calls)


def queued(worker: Worker, count: int) -> None:
    def waiting() -> bool:
        metrics = worker.service.metrics()
        return metrics.queue_size + metrics.streamed_waiting == count

    until(waiting, what=f"{count} wait")
