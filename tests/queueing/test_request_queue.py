"""The bounded queue in front of the bounded service."""

from __future__ import annotations

import gc
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from overlay.model.access import UNRESTRICTED, Rights
from overlay.model.errors import Draining, NoTimeLeft, QueueFull
from overlay.model.segments import (
    AnswerRow,
    Caller,
    Code,
    Column,
    Detail,
    Executed,
    Mode,
    PartSlice,
    Route,
    Segment,
    Slice,
)
from overlay.queueing import fair_queue
from overlay.queueing.flow import Flow
from overlay.queueing.queued_segment import QueuedSegment
from overlay.queueing.request_queue import RequestQueue
from tests.harness.cluster import until
from tests.harness.network import Clock

OK = Slice(1, (PartSlice("W", Column((b"done",))),))


@dataclass(frozen=True)
class Place:
    count: int


def one(payload: bytes = b"", number: int = 1, deadline: float = 2000.0) -> Segment:
    return Segment(Route(), Column((payload,)), deadline, number)


def done(count: int) -> Slice:
    return Slice(count, (PartSlice("W", Column((b"done",) * count)),))


def answer_at_once(segment, place, waited_s, sink):
    sink(0, done(len(segment)))
    return lambda code, start, count: None


def nothing(start: int, answers: Slice) -> None:
    pass


class Service:
    """A request queue whose requests run until the test answers them.

    busy: teams without a place. portion: how many rows one claim may get. places: how many rows may
    run; None for any number.
    """

    def __init__(
        self,
        slots: int = 200,
        in_service: int = 100,
        max_bytes: int = 10**9,
        return_margin_s: float = 0.0,
    ) -> None:
        self.clock = Clock()
        self.busy: set[str] = set()
        self.portion = 100
        self.places: int | None = None
        self.claims: list[tuple[Route, int, float, bool]] = []
        self.started: list[bytes] = []
        self.waited: list[float] = []
        self.running: dict[bytes, Callable[..., None]] = {}
        self.cancelled: list[tuple[bytes, Code]] = []
        self.answers: dict[bytes, list[AnswerRow]] = {}
        self.queue = RequestQueue(
            "A",
            slots=slots,
            in_service=in_service,
            max_bytes=max_bytes,
            claim=self._claim,
            start=self._start,
            return_margin_s=return_margin_s,
            clock=self.clock,
        )

    def admit(
        self,
        name: str,
        *,
        left_s: float = 10.0,
        caller: str = "",
        priority: int = 0,
        rights: Rights = UNRESTRICTED,
        **route: object,
    ) -> QueuedSegment:
        body = name.encode()
        segment = Segment(Route(**route), Column((body,)), self.clock.now + left_s, 1)
        return self.queue.admit(segment, self._sink((body,)), Caller(caller), priority, rights)

    def stream(
        self, flow: Flow, names: str, *, left_s: float = 10.0, priority: int = 0, **route: object
    ) -> QueuedSegment:
        """A segment with a row for each letter, or each word, of `names`."""
        rows = tuple(name.encode() for name in (names.split() if " " in names else names))
        segment = Segment(Route(**route), Column(rows), self.clock.now + left_s, 1)
        return self.queue.admit_to(flow, segment, self._sink(rows), priority)

    def answer(self, *names: str) -> None:
        for name in names:
            self.running[name.encode()]()

    def answer_all(self) -> None:
        while self.running:
            next(iter(self.running.values()))()

    def open(self, *teams: str) -> None:
        self.busy -= set(teams)
        self.queue.kick()

    def got(self, name: str) -> AnswerRow:
        (answer,) = self.answers[name.encode()]
        return answer

    def codes(self, names: str) -> list[Code | None]:
        """The code of the answer to each of these rows; None while there is none."""
        answers = [self.answers[name.encode()] for name in names]
        assert all(len(found) <= 1 for found in answers)
        parts = [(found[0].refused or found[0].parts[0]) if found else None for found in answers]
        return [part and part.code for part in parts]

    @property
    def order(self) -> str:
        return b"".join(self.started).decode()

    @property
    def counts(self) -> tuple[int, int]:
        """Streamed rows waiting and in service."""
        return self.queue.streamed[1:]

    def _sink(self, rows: tuple[bytes, ...]):
        received = [self.answers.setdefault(body, []) for body in rows]

        def sink(start: int, answers: Slice) -> None:
            for row in range(len(answers)):
                received[start + row].append(answers.at(row))

        return sink

    def _claim(self, route: Route, count: int, patient_until: float, streamed: bool):
        self.claims.append((route, count, patient_until, streamed))
        free = count if self.places is None else self.places - len(self.running)
        count = min(count, free, self.portion)
        return None if route.team in self.busy or count <= 0 else Place(count)

    def _start(self, segment, place, waited_s, sink):
        assert len(segment) == place.count
        assert segment.deadline > self.clock.now, "an expired request was started"
        self.waited.append(waited_s)
        for row, body in enumerate(segment.payloads.items):
            self.started.append(body)
            self.running[body] = partial(self._finish, body, row, sink)

        def cancel(code: Code, start: int, count: int) -> None:
            column = PartSlice.missing("W", 1, Detail(code, "cancelled"))
            for row in range(start, start + count):
                body = segment.payloads.items[row]
                self.cancelled.append((body, code))
                self._finish(body, row, sink, Slice(1, (column,)))

        return cancel

    def _finish(self, body: bytes, row: int, sink, answers: Slice = OK) -> None:
        if self.running.pop(body, None):
            sink(row, answers)


def test_a_request_starts_immediately_if_there_is_a_place():
    service = Service()
    service.admit("a")
    assert (service.order, service.queue.waiting, service.queue.active) == ("a", 0, 1)

    service.answer("a")

    assert service.got("a").parts[0].ok
    assert (service.queue.waiting, service.queue.active) == (0, 0)


def test_a_full_queue_refuses_immediately():
    service = Service(slots=2, in_service=1)
    for name in "abc":
        service.admit(name)
    assert (service.queue.waiting, service.queue.active) == (2, 1)

    with pytest.raises(QueueFull, match="all 2 queue slots are taken"):
        service.admit("d")

    assert service.answers[b"d"] == []
    assert (service.queue.waiting, service.queue.active) == (2, 1)


def test_a_queue_full_of_bytes_refuses_immediately():
    service = Service(in_service=1, max_bytes=10)
    service.admit("a" * 50)
    service.admit("b" * 6)

    with pytest.raises(QueueFull, match="6 of 10 bytes"):
        service.admit("c" * 5)

    service.admit("d" * 4)
    service.answer_all()
    service.admit("e" * 9)
    assert service.queue.waiting == 0


def test_requests_start_in_order_of_arrival():
    service = Service(in_service=1)
    for name in "abcdef":
        service.admit(name)

    service.answer_all()

    assert service.order == "abcdef"


def test_a_request_for_a_free_team_overtakes_one_for_a_busy_team():
    service = Service()
    service.busy = {"pink"}
    service.admit("p", team="pink")
    service.admit("g", team="green")

    assert service.order == "g"
    service.open("pink")
    assert service.order == "gp"


def test_a_request_does_not_overtake_one_that_may_want_the_same_slots():
    service = Service()
    service.busy = {"pink"}
    service.admit("1", team="pink")
    service.admit("2")  # may go to pink too
    service.admit("3", team="green")
    service.admit("4", team="pink", mode=Mode.ANY)

    # 3 overtakes 1; 2 has not started, as it may want pink's slots.
    assert service.order == "3"
    service.open("pink")
    assert service.order == "3124"


def test_requests_of_both_modes_start_in_order_of_arrival():
    service = Service(in_service=1)
    for name, mode in zip("abcdef", [Mode.ALL, Mode.ANY] * 3, strict=True):
        service.admit(name, mode=mode)

    service.answer_all()

    assert service.order == "abcdef"


def test_an_expired_request_is_dropped_when_its_turn_comes():
    service = Service(in_service=1)
    service.admit("a")
    service.admit("b", left_s=1)
    service.admit("c")
    service.clock.advance(1)

    service.answer("a")

    assert service.order == "ac"
    refused = service.got("b").refused
    assert (refused.code, refused.executed) == (Code.RESOURCE_EXHAUSTED, Executed.NO)
    assert service.queue.active == 1


def test_a_request_without_time_left_is_refused_immediately():
    service = Service()
    with pytest.raises(NoTimeLeft):
        service.admit("a", left_s=0)


@pytest.mark.parametrize(
    ("code", "seen"),
    [(Code.CANCELLED, Code.CANCELLED), (Code.DEADLINE_EXCEEDED, Code.RESOURCE_EXHAUSTED)],
)
def test_a_request_cancelled_while_it_waits_never_starts(code, seen):
    service = Service(in_service=1)
    service.admit("a")
    queued = service.admit("b")

    queued.end(code)
    queued.end(code)

    assert (service.got("b").refused.code, service.got("b").refused.executed) == (seen, Executed.NO)
    assert service.queue.waiting == 0
    service.answer("a")
    assert service.order == "a"


def test_a_running_request_is_interrupted_by_a_cancel():
    service = Service()
    queued = service.admit("a")

    queued.end(Code.CANCELLED)
    queued.end(Code.CANCELLED)

    assert service.cancelled[0] == (b"a", Code.CANCELLED)
    assert service.got("a").parts[0].code is Code.CANCELLED
    assert service.queue.active == 0


def test_cancelling_an_answered_request_does_nothing():
    service = Service()
    queued = service.admit("a")
    service.answer("a")

    queued.end(Code.CANCELLED)

    assert service.got("a").parts[0].ok
    assert service.cancelled == []


def test_a_request_cancelled_between_its_claim_and_its_start_is_cancelled_once_started():
    service = Service()
    admitted: list[QueuedSegment] = []
    cancelled: list[tuple[Code, int, int]] = []

    def start(segment, place, waited_s, sink):
        admitted[0].end(Code.CANCELLED)
        return lambda *what: cancelled.append(what)

    service.busy = {""}
    admitted.append(service.admit("a"))
    service.queue._start = start
    service.open("")

    assert cancelled == [(Code.CANCELLED, 0, 1)]


def test_a_second_answer_to_a_row_is_dropped():
    service = Service()

    def start(segment, place, waited_s, sink):
        sink(0, OK)
        sink(0, OK)
        return lambda code, start, count: None

    service.queue._start = start
    service.admit("a")

    assert service.got("a").parts[0].ok
    assert service.queue.active == 0


def test_a_thousand_answers_at_once_do_not_recurse():
    service = Service(slots=1000, in_service=1)
    served: list[int] = []
    service.queue._start = answer_at_once
    service.busy = {""}
    for n in range(1000):
        service.queue.admit(one(), lambda start, found, n=n: served.append(n))
    service.open("")

    assert served == list(range(1000))
    assert (service.queue.waiting, service.queue.active) == (0, 0)


def test_an_answer_that_brings_the_next_request_does_not_recurse():
    service = Service(in_service=1)
    served: list[int] = []

    def ask(n: int) -> None:
        def sink(start: int, answers: object) -> None:
            served.append(n)
            if n < 1000:
                ask(n + 1)

        service.queue.admit(one(), sink)

    service.queue._start = answer_at_once
    ask(0)

    assert len(served) == 1001


def test_a_claim_gets_the_route_rows_patience_and_kind():
    service = Service()
    flow = service.queue.open_flow()
    service.stream(flow, "abc", left_s=10, team="pink")
    service.admit("x", left_s=4, mode=Mode.ANY)

    assert service.claims == [
        (Route(team="pink"), 3, service.clock.now + 5, True),
        (Route(mode=Mode.ANY), 1, service.clock.now + 2, False),
    ]


def test_closing_refuses_waiting_requests_and_lets_running_ones_finish():
    service = Service(in_service=1)
    for name in "abc":
        service.admit(name)

    assert service.queue.close() == 2
    assert service.queue.close() == 0

    for name in "bc":
        refused = service.got(name).refused
        assert (refused.code, refused.executed) == (Code.UNAVAILABLE, Executed.NO)
    with pytest.raises(Draining):
        service.admit("d")
    service.answer("a")
    assert service.got("a").parts[0].ok
    assert (service.order, service.queue.waiting, service.queue.active) == ("a", 0, 0)


def test_on_started_is_called_once_after_all_starts_of_a_kick():
    service = Service()
    calls: list[str] = []
    service.queue.on_started = lambda: calls.append(service.order)
    service.busy = {""}
    for name in "abc":
        service.admit(name)
    calls.clear()

    service.open("")
    service.queue.kick()

    assert calls == ["abc"]


def test_a_failed_start_costs_only_its_own_request_and_no_place():
    service = Service(in_service=1)
    usual = service.queue._start

    def start(segment, place, waited_s, sink):
        if segment.payloads.items[0] == b"bad":
            raise RuntimeError("the pool is gone")
        return usual(segment, place, waited_s, sink)

    service.queue._start = start
    service.busy = {""}
    service.admit("bad")
    service.admit("good")
    try:
        service.open("")
    except RuntimeError:
        pytest.fail("the error was raised on another request's thread")

    refused = service.got("bad").refused
    assert (refused.code, refused.executed) == (Code.INTERNAL, Executed.UNKNOWN)
    assert service.order == "good"


def test_the_bounds_hold_with_many_threads():
    most, seen, lock = Counter(), Counter(), threading.Lock()
    workers = ThreadPoolExecutor(4)
    answered: Counter[int] = Counter()

    def start(segment, place, waited_s, sink):
        with lock:
            seen["active"] += 1
            most["active"] = max(most["active"], seen["active"])

        def work():
            with lock:
                seen["active"] -= 1
            sink(0, OK)

        workers.submit(work)
        return lambda code, start, count: None

    queue = RequestQueue(
        "A", slots=8, in_service=3, max_bytes=10**9, claim=lambda *what: Place(1), start=start
    )

    def ask(thread: int) -> int:
        refused = 0
        for n in range(300):
            number = thread * 1000 + n
            try:
                queued = queue.admit(
                    one(b"x", deadline=1e12),
                    lambda start, found, number=number: answered.update([number]),
                )
                if n % 7 == 0:
                    queued.end(Code.CANCELLED)
            except QueueFull:
                refused += 1
            with lock:
                most["waiting"] = max(most["waiting"], queue.waiting)
                most["in service"] = max(most["in service"], queue.active)
        return refused

    with ThreadPoolExecutor(8) as callers:
        refused = sum(callers.map(ask, range(8)))
    until(lambda: len(answered) + refused == 8 * 300, 10, "some requests have no answer")
    workers.shutdown(wait=True)

    assert most["active"] <= 3
    assert most["in service"] <= 3
    assert most["waiting"] <= 8
    assert (queue.waiting, queue.active) == (0, 0)
    assert set(answered.values()) == {1}
    assert len(answered) + refused == 8 * 300


# Flows of streams, beside the single requests.


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def flow(service: Service) -> Flow:
    return service.queue.open_flow()


ANNA = Rights("anna", waiting=3)


def test_so_many_requests_of_a_caller_wait_as_its_rights_allow():
    service = Service(in_service=1)
    for name in "abcd":  # one of them finds the place
        service.admit(name, caller="caller anna", rights=ANNA)

    with pytest.raises(QueueFull, match="anna has 3 requests waiting here, and may have no more"):
        service.admit("e", caller="caller anna", rights=ANNA)

    service.admit("f", caller="caller bob")
    service.answer("a", "f")
    service.admit("g", caller="caller anna", rights=ANNA)


def test_a_request_that_finds_a_place_does_not_wait():
    service = Service()
    service.busy = {"pink"}
    for name in "abc":
        service.admit(name, caller="caller anna", rights=ANNA, team="pink")

    service.admit("g", caller="caller anna", rights=ANNA, team="green")

    assert service.order == "g"


def test_streamed_rows_beyond_the_rights_are_refused_from_the_end():
    service = Service()
    service.places = 2
    flow = service.queue.open_flow(Caller("caller anna", "x"), ANNA)
    service.stream(flow, "abc")
    service.stream(flow, "defg")

    service.queue.kick()

    assert service.order == "ab"
    assert service.codes("cde") == [None] * 3
    assert service.codes("fg") == [Code.RESOURCE_EXHAUSTED] * 2
    refused = service.got("g").refused
    assert (refused.reason, refused.executed) == (str(ANNA.too_many()), Executed.NO)
    service.answer_all()
    assert service.order == "abcde"


def test_single_and_streamed_requests_of_all_names_count_together():
    service = Service(in_service=1)
    service.places = 1
    one, other = (service.queue.open_flow(Caller("caller anna", name), ANNA) for name in "12")
    service.stream(one, "ab")
    service.stream(other, "c")
    service.queue.kick()
    service.admit("d", caller="caller anna", rights=ANNA)

    with pytest.raises(QueueFull, match="anna has 3 requests"):
        service.admit("e", caller="caller anna", rights=ANNA)
    service.stream(other, "fg")
    service.queue.kick()

    assert service.codes("abcdfg") == [None] * 4 + [Code.RESOURCE_EXHAUSTED] * 2
    service.queue.close_flow(one)
    assert service.order == "a"


STEPS = st.lists(st.sampled_from(["single", "answer", "1", "2", "5"]), max_size=40)


@given(STEPS)
@settings(deadline=None)
def test_a_caller_never_has_more_waiting_and_is_not_refused_with_less(steps):
    service = Service()
    service.places = 2
    flow = service.queue.open_flow(Caller("caller anna"), ANNA)

    def waiting() -> int:
        return service.queue.waiting + service.counts[0]

    for n, step in enumerate(steps):
        if step == "answer" and service.running:
            service.answer(next(iter(service.running)).decode())
        elif step == "single":
            before = waiting()
            try:
                service.admit(f"{n}", caller="caller anna", rights=ANNA)
            except QueueFull:
                assert before == 3
        elif step != "answer":
            names = [f"{n}-{row}" for row in range(int(step))]
            free = 3 - waiting() + 2 - len(service.running)
            service.stream(flow, " ".join(names) + " ")
            service.queue.kick()
            refused = sum(bool(service.answers[name.encode()]) for name in names)
            assert refused == max(0, len(names) - free)
        assert waiting() <= 3


def test_a_streamed_segment_starts_as_a_whole_with_the_next_kick(service, flow):
    service.stream(flow, "abc")
    assert (service.order, service.counts) == ("", (3, 0))

    service.queue.kick()

    assert (service.order, service.counts, len(service.claims)) == ("abc", (0, 3), 1)
    service.answer("b", "a", "c")
    assert service.counts == (0, 0)
    assert all(service.got(name).parts[0].ok for name in "abc")


def test_the_rows_of_a_segment_start_in_portions_and_in_order(service, flow):
    service.portion = 2
    service.stream(flow, "abcde")
    service.queue.kick()
    assert [count for _, count, _, _ in service.claims] == [5, 3, 1]

    service.answer_all()

    assert service.order == "abcde"
    assert service.counts == (0, 0)


def test_rows_wait_in_their_flow_until_places_are_free(service, flow):
    service.places = 2
    service.stream(flow, "abcde")
    service.queue.kick()
    assert (service.order, service.counts) == ("ab", (3, 2))

    service.clock.advance(1)
    service.answer("b")

    assert (service.order, service.counts) == ("abc", (2, 2))
    assert service.waited == [0, 1]


def test_the_queue_says_whose_requests_wait_for_the_same_places(service, flow):
    other, asked = service.queue.open_flow(Caller("other")), Route(handler="resize")
    service.places = 1
    service.stream(flow, "ab", handler="resize")
    service.queue.kick()
    assert service.queue.waits_for(asked)
    assert not service.queue.waits_for(asked, {flow})
    assert service.queue.waits_for(asked, {other})

    service.stream(other, "c", handler="resize")
    service.queue.kick()
    assert service.queue.waits_for(asked, {flow})
    assert not service.queue.waits_for(asked, {flow, other})
    service.answer_all()
    assert not service.queue.waits_for(asked)


def test_streamed_rows_are_not_counted_as_single_requests(flow, service):
    service.places = 1
    service.stream(flow, "abc")
    service.queue.kick()
    assert (service.queue.waiting, service.queue.active) == (0, 0)
    assert service.queue.streamed == (1, 2, 1)


def test_a_full_queue_never_refuses_a_streamed_segment():
    service = Service(slots=1, in_service=1, max_bytes=1)
    flow = service.queue.open_flow()
    service.busy = {""}
    service.admit("x")
    with pytest.raises(QueueFull):
        service.admit("y")

    service.stream(flow, "abcdefgh")
    service.open("")

    assert service.order in ("xabcdefgh", "abcdefghx")


def test_single_requests_and_streams_take_turns():
    service = Service()
    flows = [service.queue.open_flow(Caller(caller)) for caller in ("mac", "pc")]
    service.busy, service.portion, service.places = {""}, 1, 1
    for name in "123":
        service.admit(name)
    service.stream(flows[0], "abcdef")
    service.stream(flows[1], "xyz")
    service.open("")

    service.answer_all()

    # Each source has one turn in each round while it has something waiting.
    rounds = [set(service.order[i : i + 3]) for i in (0, 3, 6)]
    assert rounds == [set("1ax"), set("2by"), set("3cz")]
    assert service.order[9:] == "def"


@pytest.mark.parametrize("crowd", ["single", "stream"])
def test_neither_a_bulk_stream_nor_many_single_requests_starve_the_other(crowd):
    service = Service(in_service=1000)
    flow = service.queue.open_flow()  # of the same caller
    service.busy, service.portion, service.places = {""}, 10, 10
    many = [f"m{n}" for n in range(150)]
    if crowd == "single":
        for name in many:
            service.admit(name)
        service.stream(flow, "late one")
    else:
        service.stream(flow, " ".join(many))
        service.admit("late")
    service.open("")

    service.answer_all()

    assert service.started.index(b"late") <= 11


def test_urgent_rows_of_a_stream_start_first_until_others_have_waited_long_enough(service, flow):
    service.busy = {""}
    service.stream(flow, "abc")
    service.clock.advance(3)
    service.stream(flow, "de", priority=1)
    service.stream(flow, "xy", priority=2)
    service.stream(flow, "z", priority=99)  # counts as 9

    service.open("")

    assert service.order == "zxyabcde"


def test_streams_of_one_caller_share_its_turns():
    service = Service()
    service.busy, service.portion, service.places = {""}, 1, 1
    for rows in ("abcdef", "ghijkl", "mnopqr"):
        service.stream(service.queue.open_flow(Caller("many")), rows)
    service.admit("s", caller="many")
    service.stream(service.queue.open_flow(Caller("one")), "UVWXYZ")
    service.open("")

    while len(service.started) < 12:
        next(iter(service.running.values()))()

    assert sum(name.isupper() for name in service.order) == 6


def with_service_times(
    service: Service, flow: Flow, places: int = 4, took_s: float = 1.0, **route: object
) -> None:
    """Completes rows of the stream, a second each; leaves all places taken and more waiting."""
    service.places = places
    names = " ".join(f"p{n}" for n in range(13 * places))
    service.stream(flow, names, left_s=1000, **route)
    service.queue.kick()
    for _ in range(10 * places):
        service.clock.advance(took_s / places)
        next(iter(service.running.values()))()
    service.started.clear()


def test_only_the_rows_of_a_segment_that_are_too_late_are_refused(service, flow):
    with_service_times(service, flow)  # 4 a second, 8 of them wait

    service.stream(flow, "abcdefghij", left_s=4.5)
    service.queue.kick()

    codes = service.codes("abcdefghij")
    in_time = codes.index(Code.RESOURCE_EXHAUSTED)
    assert 3 <= in_time <= 7
    assert codes == [None] * in_time + [Code.RESOURCE_EXHAUSTED] * (10 - in_time)
    refused = service.got("j").refused
    assert refused.executed is Executed.NO
    assert 0.5 <= refused.retry_after_s <= 2.5
    service.stream(flow, "xyz", left_s=0.5)
    service.queue.kick()
    assert service.codes("xyz") == [Code.RESOURCE_EXHAUSTED] * 3
    assert "requests are ahead and an answer takes about" in service.got("x").refused.reason


def test_a_row_retried_after_the_suggested_time_is_admitted(service, flow):
    with_service_times(service, flow)
    service.stream(flow, "abc", left_s=2)
    service.queue.kick()
    assert service.codes("abc") == [Code.RESOURCE_EXHAUSTED] * 3

    until_s = service.clock.now + service.got("a").refused.retry_after_s
    while service.clock.now < until_s:
        service.clock.advance(0.25)
        next(iter(service.running.values()))()
    service.stream(flow, "xyz", left_s=2)
    service.queue.kick()

    assert service.codes("xyz") == [None] * 3


@pytest.mark.parametrize("why", ["unreliable", "urgent", "another caller", "places", "long ago"])
def test_a_row_of_a_stream_is_not_refused_without_reliable_estimates(service, flow, why):
    if why == "unreliable":
        service.places = 4
        service.stream(flow, " ".join(f"p{n}" for n in range(20)), left_s=1000)
        service.queue.kick()
        service.clock.advance(1)
        service.answer("p0")
    else:
        with_service_times(service, flow)
    if why == "places":
        service.places = 100
        service.queue.kick()
    if why == "long ago":
        service.answer_all()
        service.clock.advance(2)
        service.stream(flow, "pqrst", left_s=1000)
    urgent = why == "urgent"
    to = service.queue.open_flow(Caller("another")) if why == "another caller" else flow

    service.stream(to, "ab", left_s=2.5, priority=9 if urgent else 0)
    service.queue.kick()

    assert service.codes("ab") == [None, None]


def test_requests_of_another_process_are_judged_like_those_of_a_client(service, flow):
    """Otherwise any client could claim to be a process."""
    down = {"targets": ("C",), "hops": ("A",)}
    with_service_times(service, flow, **down)

    service.stream(flow, "ab", left_s=1, **down)
    service.queue.kick()

    assert service.codes("ab") == [Code.RESOURCE_EXHAUSTED] * 2


def hopeless(service: Service, flow: Flow, names: str, after_s: float, behind: str = "") -> None:
    """These rows wait `after_s` of their 4 s, with `behind` behind them; then places are free."""
    with_service_times(service, flow)
    service.places = 0
    service.stream(flow, names, left_s=4, priority=9)
    if behind:
        service.stream(flow, behind, left_s=1000)
    service.queue.kick()
    service.clock.advance(after_s)
    service.places = 100
    service.queue.kick()


@pytest.mark.parametrize(("after_s", "code"), [(2.4, None), (2.6, Code.RESOURCE_EXHAUSTED)])
def test_the_return_margin_is_not_available_for_work(after_s, code):
    # Work takes a second; of 1.6 and 1.4 s left it has 1.1 and 0.9.
    service = Service(return_margin_s=0.5)
    hopeless(service, service.queue.open_flow(), "ab", after_s)

    assert service.codes("ab") == [code] * 2


def test_a_row_with_less_time_than_the_quickest_took_never_starts(service, flow):
    hopeless(service, flow, "ab", 3.8)

    assert service.codes("ab") == [Code.RESOURCE_EXHAUSTED] * 2
    assert service.got("a").refused.executed is Executed.NO
    assert "even the quickest recent request took longer" in service.got("a").refused.reason
    assert "a" not in service.order


def test_a_row_whose_place_no_other_wants_is_started_however_little_time_it_has():
    service = Service(in_service=1)
    for n in range(10):
        service.admit(f"p{n}", left_s=1000)
    for n in range(10):
        service.clock.advance(1)
        service.answer(f"p{n}")
    service.admit("long", left_s=1000)
    service.admit("late", left_s=1.2)
    service.clock.advance(1)
    service.answer("long")

    assert service.order.endswith("longlate")


def test_a_stream_whose_slots_are_busy_does_not_hold_up_others():
    service = Service()
    flows = [service.queue.open_flow() for _ in range(2)]
    service.busy = {"pink"}
    service.stream(flows[0], "abc", team="pink")
    service.stream(flows[1], "xyz", team="green")
    service.admit("1", team="green")
    service.queue.kick()

    assert set(service.order) == set("xyz1")


def test_in_a_flow_only_rows_that_cannot_want_the_same_slots_overtake(service, flow):
    service.busy = {"pink"}
    service.stream(flow, "ab", team="pink")
    service.stream(flow, "gh", team="green")
    service.stream(flow, "xy")  # may go to pink too
    service.stream(flow, "kl", team="green")
    service.queue.kick()
    assert service.order == "ghkl"

    service.open("pink")
    assert service.order == "ghklabxy"


def test_inner_rows_cancelled_while_they_wait_never_start(service, flow):
    service.busy = {""}
    queued = service.stream(flow, "abcdef")

    queued.end(Code.CANCELLED, 2, 2)
    queued.end(Code.DEADLINE_EXCEEDED, 3, 2)

    codes = [None, None, Code.CANCELLED, Code.CANCELLED, Code.RESOURCE_EXHAUSTED, None]
    assert service.codes("abcdef") == codes
    assert {service.got(name).refused.executed for name in "cde"} == {Executed.NO}
    assert service.counts == (3, 0)
    service.open("")
    assert (service.order, service.counts) == ("abf", (0, 3))


def test_inner_rows_cancelled_while_they_run_are_interrupted_and_the_others_go_on(service, flow):
    service.portion = 3
    queued = service.stream(flow, "abcdef")
    service.queue.kick()

    queued.end(Code.CANCELLED, 2, 2)
    queued.end(Code.CANCELLED, 2, 2)

    assert service.codes("abcdef") == [None, None, Code.CANCELLED, Code.CANCELLED, None, None]
    assert {body for body, _ in service.cancelled} == {b"c", b"d"}
    assert service.counts == (0, 4)
    service.answer_all()
    assert service.codes("abef") == [Code.OK] * 4
    assert service.counts == (0, 0)


def test_a_cancel_of_running_and_waiting_rows_cancels_both(service, flow):
    service.places = 2
    queued = service.stream(flow, "abcd")
    service.queue.kick()

    queued.end(Code.CANCELLED, 1, 2)

    assert service.codes("abcd") == [None, Code.CANCELLED, Code.CANCELLED, None]
    assert service.got("c").refused.executed is Executed.NO
    assert service.order == "abd"


def test_rows_cancelled_between_their_claim_and_their_start_are_cancelled_once_started(
    service, flow
):
    admitted: list[QueuedSegment] = []
    cancelled: list[tuple[Code, int, int]] = []

    def start(segment, place, waited_s, sink):
        admitted[0].end(Code.CANCELLED, 1, 4)
        return lambda *what: cancelled.append((segment.payloads.items[0], *what))

    service.portion = 3
    service.queue._start = start
    admitted.append(service.stream(flow, "abcdef"))
    service.queue.kick()

    # d and e were still waiting; b and c are rows 1 and 2 of the segment that started.
    assert cancelled[0] == (b"a", Code.CANCELLED, 1, 2)
    assert service.codes("de") == [Code.CANCELLED] * 2


def test_an_expired_segment_is_dropped_when_its_turn_comes(service, flow):
    service.busy = {""}
    service.stream(flow, "abc", left_s=1)
    service.stream(flow, "xyz")
    service.clock.advance(1)

    service.open("")

    assert service.order == "xyz"
    assert service.codes("abc") == [Code.RESOURCE_EXHAUSTED] * 3
    assert {service.got(name).refused.executed for name in "abc"} == {Executed.NO}
    assert service.counts == (0, 3)


def test_a_segment_without_time_left_or_after_closing_is_refused_immediately(service, flow):
    with pytest.raises(NoTimeLeft):
        service.stream(flow, "abc", left_s=0)
    service.queue.close()
    with pytest.raises(Draining):
        service.stream(flow, "abc")
    assert service.counts == (0, 0)


def test_closing_refuses_the_rows_that_have_not_started(service, flow):
    service.places = 2
    service.stream(flow, "abcd")
    service.queue.kick()

    assert service.queue.close() == 2

    assert service.codes("abcd") == [None, None, Code.UNAVAILABLE, Code.UNAVAILABLE]
    assert service.got("d").refused.executed is Executed.NO
    service.answer("a", "b")
    assert (service.order, service.counts) == ("ab", (0, 0))


def test_a_failed_start_costs_only_its_own_rows_and_no_place(service, flow):
    usual = service.queue._start

    def start(segment, place, waited_s, sink):
        if segment.payloads.items[0] == b"a":
            raise RuntimeError("the pool is gone")
        return usual(segment, place, waited_s, sink)

    service.queue._start, service.portion = start, 2
    service.stream(flow, "abcd")
    service.queue.kick()

    assert service.codes("abcd") == [Code.INTERNAL, Code.INTERNAL, None, None]
    assert (service.order, service.counts) == ("cd", (0, 2))


def test_rows_may_be_answered_in_slices_of_any_size_and_order(service, flow):
    sinks = []

    def start(segment, place, waited_s, sink):
        sinks.append(sink)
        return lambda code, start, count: None

    service.queue._start = start
    service.stream(flow, "abcdef")
    service.queue.kick()

    sinks[0](4, done(2))
    sinks[0](0, done(3))
    sinks[0](2, done(3))  # only d of these is still unanswered

    assert service.codes("abcdef") == [Code.OK] * 6
    assert service.counts == (0, 0)


def test_an_answer_from_within_another_rows_sink_counts_once(service, flow):
    """Like two threads that answer rows of one segment at the same time."""
    sinks = []

    def start(segment, place, waited_s, sink):
        sinks.append(sink)
        return lambda code, start, count: None

    def reply(first: int, answers: Slice) -> None:
        if first == 0:
            sinks[0](1, done(1))

    service.queue._start = start
    service.queue.admit_to(flow, Segment(Route(), Column((b"", b"")), 2000.0, 1), reply)
    service.queue.kick()
    sinks[0](0, done(1))

    assert service.counts == (0, 0)
    assert service.queue.active == 0


@pytest.mark.parametrize("how", ["answered", "cancelled waiting", "cancelled running", "refused"])
def test_an_answered_segment_is_not_kept(service, flow, how):
    service.busy = {""} if how in ("cancelled waiting", "refused") else set()
    queued = service.stream(flow, "abc")
    service.queue.kick()
    if how == "answered":
        service.answer_all()
    elif how == "refused":
        queued.refuse(Draining("stopping"))
    else:
        queued.end(Code.CANCELLED)
    assert not queued.is_open
    reference = weakref.ref(queued)

    service.claims.clear()
    service.queue._start = service.queue._claim = None
    del queued
    gc.collect()

    assert reference() is None


def test_a_cancelled_and_closed_flow_is_not_counted(service, flow):
    service.places = 1
    queued = service.stream(flow, "abc")
    service.queue.kick()

    queued.end(Code.CANCELLED)
    service.queue.close_flow(flow)

    assert service.queue.streamed == (0, 0, 0)
    assert (service.queue.waiting, service.queue.active) == (0, 0)


def test_many_waiting_segments_do_not_slow_down_a_kick(service, flow):
    service.busy = {"pink"}
    for n in range(4000):
        service.queue.admit_to(flow, Segment(Route(team="pink"), Column((b"",)), 2e3, n), nothing)
    service.queue.kick()
    claims = []
    usual = service.queue._claim
    service.queue._claim = lambda *what: claims.append(what) or usual(*what)

    with mock.patch.object(fair_queue, "may_overtake", wraps=fair_queue.may_overtake) as compared:
        service.queue.kick()

    # These requests all want the same places, so those behind the first cannot start either.
    assert len(claims) == 1
    assert compared.call_count < 100


def test_streams_and_single_requests_with_many_threads():
    most, seen, lock = Counter(), Counter(), threading.Lock()
    workers = ThreadPoolExecutor(4)
    rows: Counter[tuple[int, int]] = Counter()

    def claim(route, count, patient_until, streamed):
        with lock:  # five places for streamed rows
            free = min(count, 5 - seen["streamed"]) if streamed else 1
            if free > 0 and streamed:
                seen["streamed"] += free
                most["streamed"] = max(most["streamed"], seen["streamed"])
        return Place(free) if free > 0 else None

    def start(segment, place, waited_s, sink):
        def work(row: int) -> None:
            if segment.route.team == "stream":
                with lock:
                    seen["streamed"] -= 1
            sink(row, OK)

        for row in range(len(segment)):
            workers.submit(work, row)
        return lambda code, start, count: None

    queue = RequestQueue("A", slots=50, in_service=3, max_bytes=10**9, claim=claim, start=start)

    def ask(thread: int) -> int:
        flow, refused = queue.open_flow(), 0
        for n in range(60):
            number = thread * 1000 + n

            def sink(start: int, answers: Slice, number=number) -> None:
                rows.update((number, start + i) for i in range(len(answers)))

            try:
                if n % 3:
                    segment = Segment(Route(team="stream"), Column((b"",) * (n % 7 + 1)), 1e12, 1)
                    queued = queue.admit_to(flow, segment, sink)
                    queue.kick()
                else:
                    queued = queue.admit(one(deadline=1e12), sink)
                if n % 5 == 0:
                    queued.end(Code.CANCELLED, n % 2, 2)
            except QueueFull:
                refused += 1
            with lock:
                most["in service"] = max(most["in service"], queue.active)
        return refused

    with ThreadPoolExecutor(6) as callers:
        refused = sum(callers.map(ask, range(6)))
    total = 6 * sum(n % 7 + 1 if n % 3 else 1 for n in range(60)) - refused
    until(lambda: len(rows) == total, 10, "some rows have no answer")
    workers.shutdown(wait=True)

    assert set(rows.values()) == {1}
    assert most["streamed"] <= 5
    assert most["in service"] <= 3
    assert (queue.waiting, queue.active) == (0, 0)
    assert queue.streamed[1:] == (0, 0)


class Conservation(RuleBasedStateMachine):
    """Every admitted row is answered exactly once, whatever happens in whatever order."""

    def __init__(self) -> None:
        super().__init__()
        self.service = Service(slots=5, in_service=3, max_bytes=60)
        self.streams = [self.service.queue.open_flow(Caller(caller)) for caller in ("mac", "lab")]
        self.admitted: list[tuple[QueuedSegment, list[str]]] = []
        self.single: list[str] = []
        self.callers: dict[str, str] = {}
        self.seen = dict.fromkeys(("mac", "lab"), self.service.clock.now)  # each has a stream
        self.streamed: list[str] = []
        self.flows: dict[object, list[str]] = {}
        self.number = 0
        self.closed = False

    @rule(
        team=st.sampled_from(["", "green", "pink"]),
        mode=st.sampled_from(Mode),
        left_s=st.sampled_from([0.5, 5, 50]),
        size=st.sampled_from([3, 30]),
        caller=st.sampled_from(["mac", "pc"]),
        priority=st.sampled_from([0, 0, 5]),
    )
    def admit(self, team, mode, left_s, size, caller, priority):
        (name,) = self.names(1, size)
        rivals = not self.closed and self.has_rivals(caller)
        how = {"caller": caller, "priority": priority, "team": team, "mode": mode}
        full = self.is_full(size, caller, rivals)
        try:
            queued = self.service.admit(name, left_s=left_s, **how)
        except Draining:
            assert self.closed
        except NoTimeLeft:
            assert any(map(self.waits, self.single + self.streamed)), "refused with none ahead"
        except QueueFull:
            assert full
        else:
            assert not self.closed
            # A request that finds a place needs no slot.
            assert not (self.waits(name) and self.is_full(size, caller, rivals))
            self.callers[name] = caller
            self.keep(queued, [name], self.single, ("single", team, mode, caller, priority))

    def is_full(self, size, caller, rivals):
        """Whether there is no room for another request to wait."""
        waiting = [n for n in self.single if self.waits(n)]
        own = [n for n in waiting if self.callers[n] == caller]
        return (
            len(waiting) >= 5
            or (waiting and sum(map(len, waiting)) + size > 60)
            or (rivals and len(own) >= 5 - len(waiting))
        )

    @rule(
        stream=st.integers(0, 1),
        team=st.sampled_from(["", "green", "pink"]),
        mode=st.sampled_from(Mode),
        left_s=st.sampled_from([0.5, 5, 50]),
        rows=st.integers(1, 6),
        priority=st.sampled_from([0, 0, 5]),
        kick=st.booleans(),
    )
    def stream(self, stream, team, mode, left_s, rows, priority, kick):
        names, flow = self.names(rows, 3), self.streams[stream]
        waiting = any(map(self.waits, self.single + self.streamed))
        how = {"left_s": left_s, "team": team, "mode": mode, "priority": priority}
        try:
            queued = self.service.stream(flow, " ".join(names) + " ", **how)
        except Draining:
            assert self.closed
        except NoTimeLeft:
            assert waiting, "refused with none ahead"
        else:
            assert not self.closed
            self.keep(queued, names, self.streamed, (stream, team, mode, priority))
        if kick:
            self.service.queue.kick()

    @precondition(lambda self: self.service.running)
    @rule(data=st.data())
    def answer(self, data):
        body = data.draw(st.sampled_from(sorted(self.service.running)))
        self.service.running[body]()

    @precondition(lambda self: self.admitted)
    @rule(data=st.data(), code=st.sampled_from([Code.CANCELLED, Code.DEADLINE_EXCEEDED]))
    def end(self, data, code):
        queued, names = data.draw(st.sampled_from(self.admitted))
        start = data.draw(st.integers(0, len(names) - 1))
        count = data.draw(st.integers(0, len(names) - start))
        queued.end(code, start, count)
        assert all(self.service.answers[name.encode()] for name in names[start : start + count])

    @rule(teams=st.sets(st.sampled_from(["", "green", "pink"])))
    def fill(self, teams):
        self.service.busy |= teams

    @rule(teams=st.sets(st.sampled_from(["", "green", "pink"])))
    def open(self, teams):
        self.service.open(*teams)

    @rule(places=st.sampled_from([None, 1, 4]), portion=st.sampled_from([1, 2, 100]))
    def credit(self, places, portion):
        self.service.places, self.service.portion = places, portion

    @rule(seconds=st.sampled_from([0.1, 1, 10]))
    def time_passes(self, seconds):
        self.service.clock.advance(seconds)

    @precondition(lambda self: self.number > 9)
    @rule()
    def close(self):
        self.service.queue.close()
        self.closed = True
        assert self.service.queue.waiting == 0
        assert self.service.counts[0] == 0

    def has_rivals(self, caller):
        """Records the caller; returns whether another was seen within ten seconds."""
        now = self.service.clock.now
        self.seen[caller] = now
        return any(now - at <= 10 for other, at in self.seen.items() if other != caller)

    def names(self, count, size):
        self.number += count
        return [f"{self.number - n:03}".ljust(size, "-") for n in reversed(range(count))]

    def keep(self, queued, names, kind, flow):
        self.admitted.append((queued, names))
        kind += names
        self.flows.setdefault(flow, []).extend(names)

    def waits(self, name):
        body = name.encode()
        return body not in self.service.started and not self.service.answers[body]

    def runs(self, name):
        return name.encode() in self.service.running

    @invariant()
    def the_counts_are_right_and_the_bounds_hold(self):
        queue = self.service.queue
        assert queue.waiting == sum(map(self.waits, self.single)) <= 5
        assert queue.active == sum(map(self.runs, self.single)) <= 3
        waiting = sum(map(self.waits, self.streamed))
        assert queue.streamed == (2, waiting, sum(map(self.runs, self.streamed)))

    @invariant()
    def every_unanswered_row_waits_or_runs(self):
        for name in self.single + self.streamed:
            assert bool(self.service.answers[name.encode()]) != (
                self.waits(name) or self.runs(name)
            )

    @invariant()
    def no_row_is_answered_or_started_twice(self):
        assert all(len(answers) <= 1 for answers in self.service.answers.values())
        assert len(set(self.service.started)) == len(self.service.started)

    @invariant()
    def each_flow_starts_in_order(self):
        started = [body.decode() for body in self.service.started]
        for names in self.flows.values():
            ours = [name for name in started if name in names]
            assert ours == sorted(ours, key=names.index)

    def teardown(self):
        self.service.places = None
        self.service.open("", "green", "pink")
        self.service.answer_all()
        assert (self.service.queue.waiting, self.service.queue.active) == (0, 0)
        assert self.service.counts == (0, 0)
        names = self.single + self.streamed
        assert all(len(self.service.answers[name.encode()]) == 1 for name in names)
        assert self.service.queue._slot_shares._bytes == 0
        assert not any(list(flow) for flow in self.streams)


TestConservation = Conservation.TestCase
TestConservation.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("how", ["queue", "stream"])
def test_a_request_leaves_no_reference_cycles(how):
    service = Service()
    flow = service.queue.open_flow()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)  # what is collected, as other threads leave some too
    try:
        for n in range(100):
            service.admit(f"{n:03}") if how == "queue" else service.stream(
                flow, f"{n:03}x {n:03}y "
            )
            service.answer_all()
        gc.collect()
        left = [one for one in gc.garbage if isinstance(one, (QueuedSegment, Segment, Slice))]
        assert len(left) < 10
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("of", ["names", "addresses", "teams", "targets"])
def test_nothing_accumulates_with_the_requests_ever_admitted(of, busy):
    """busy: a request waits throughout."""
    service = Service()
    service.queue._start = answer_at_once
    if busy:
        service.busy = {"pink"}
        service.admit("w", left_s=1000, team="pink")
    for n in range(10_000):
        caller = Caller("pc", f"{n}") if of == "names" else Caller(f"{n}" if of != "teams" else "")
        route = Route(team=f"t{n}" if of == "teams" else "")
        if of == "targets":
            route = Route(targets=(f"{n}",))
        segment = Segment(route, Column((b"",)), 3000.0, n)
        service.queue.admit(segment, nothing, caller)

    queue = service.queue
    assert queue.active == 0
    assert queue._room.order.kept <= 100
    assert len(queue._callers) <= 2100
    assert len(queue._classes) <= 1001
    assert queue.waiting == len(queue._flows) == busy
    assert queue._slot_shares.kept <= 3 * busy + 1


def test_the_cost_of_admission_is_at_most_linear_in_the_number_of_waiting_callers():
    service = Service(slots=400)
    service.busy = {"pink"}

    def count(admitted: int) -> int:
        for n in range(admitted):
            segment = Segment(Route(team="pink"), Column((b"",)), 2000.0, n)
            service.queue.admit(segment, nothing, Caller(f"{n}"))
        before = Flow.rows_before
        with mock.patch.object(Flow, "rows_before", autospec=True, side_effect=before) as counted:
            service.admit("x", team="pink")
        service.queue.close()
        service.queue._draining = False
        return counted.call_count

    assert count(300) <= 3 * count(100) + 10


def test_a_service_class_in_use_is_not_forgotten_for_new_ones():
    service = Service()
    service.admit("runs", team="green")
    kept = service.queue._class_of(Route(team="green"))
    service.queue._start = answer_at_once
    for n in range(5000):
        segment = Segment(Route(targets=(f"{n}",)), Column((b"",)), 2000.0, n)
        service.queue.admit(segment, nothing)

    assert service.queue._class_of(Route(team="green")) is kept
    assert len(service.queue._classes) <= 1001


def test_a_request_that_finds_a_place_needs_no_queue_slot():
    service = Service(slots=2)
    service.busy = {"pink"}
    for name in "ab":
        service.admit(name, team="pink")
    with pytest.raises(QueueFull):
        service.admit("c", team="pink")

    service.admit("d", team="green")

    assert (service.order, service.queue.waiting) == ("d", 2)


def test_one_handlers_requests_leave_places_for_others_and_do_not_hold_them_up():
    service = Service()
    for n in range(100):
        service.admit(f"s{n}", handler="slow")
    assert (service.queue.active, service.queue.waiting) == (80, 20)

    service.admit("e", handler="echo")
    service.admit("m", handler="slow", caller="mac")

    assert {"e", "m"} <= {name.decode() for name in service.started}
    service.answer(*(f"s{n}" for n in range(20)))
    assert service.queue.waiting < 10
    service.answer_all()
    assert (service.queue.active, service.queue.waiting) == (0, 0)


def test_a_request_for_the_default_handler_overtakes_those_for_another_handler():
    service = Service()
    service.queue._default_handler = "echo"
    service.places = 1
    service.admit("a", handler="slow")
    usual = service.queue._claim
    service.queue._claim = lambda route, *rest: None if route.handler else Place(1)
    service.admit("b", handler="slow")
    service.admit("c")
    service.queue._claim = usual

    assert service.order == "ac"
