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
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

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


class Desk:
    """An intake whose requests run until the test answers them, at the places that are open.

    portion: the most rows that one claim gets. places: how many rows may run, None for any number.
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
        self.ended: list[tuple[bytes, Code]] = []
        self.answers: dict[bytes, list[AnswerRow]] = {}
        self.intake = RequestQueue(
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
        **route: object,
    ) -> QueuedSegment:
        body = name.encode()
        segment = Segment(Route(**route), Column((body,)), self.clock.now + left_s, 1)
        return self.intake.admit(segment, self._sink((body,)), Caller(caller), priority)

    def stream(
        self, flow: Flow, names: str, *, left_s: float = 10.0, priority: int = 0, **route: object
    ) -> QueuedSegment:
        """A segment with a row for each letter, or each word, of `names`."""
        rows = tuple(name.encode() for name in (names.split() if " " in names else names))
        segment = Segment(Route(**route), Column(rows), self.clock.now + left_s, 1)
        return self.intake.admit_to(flow, segment, self._sink(rows), priority)

    def answer(self, *names: str) -> None:
        for name in names:
            self.running[name.encode()]()

    def answer_all(self) -> None:
        while self.running:
            next(iter(self.running.values()))()

    def open(self, *teams: str) -> None:
        self.busy -= set(teams)
        self.intake.kick()

    def got(self, name: str) -> AnswerRow:
        (answer,) = self.answers[name.encode()]
        return answer

    def codes(self, names: str) -> list[Code | None]:
        """What each of these rows was refused or ended with; None while it is open."""
        found = [self.answers[name.encode()] for name in names]
        assert all(len(answers) <= 1 for answers in found)
        parts = [
            (answers[0].refused or answers[0].parts[0]) if answers else None for answers in found
        ]
        return [part and part.code for part in parts]

    @property
    def order(self) -> str:
        return b"".join(self.started).decode()

    @property
    def counts(self) -> tuple[int, int]:
        """Streamed rows waiting and in service."""
        return self.intake.streamed[1:]

    def _sink(self, rows: tuple[bytes, ...]):
        found = [self.answers.setdefault(body, []) for body in rows]

        def sink(start: int, answers: Slice) -> None:
            for row in range(len(answers)):
                found[start + row].append(answers.at(row))

        return sink

    def _claim(self, route: Route, count: int, patient_until: float, streamed: bool):
        self.claims.append((route, count, patient_until, streamed))
        free = count if self.places is None else self.places - len(self.running)
        count = min(count, free, self.portion)
        return None if route.team in self.busy or count <= 0 else Place(count)

    def _start(self, segment, place, waited_s, sink):
        assert len(segment) == place.count
        assert segment.deadline > self.clock.now, "nobody waits for this any more"
        self.waited.append(waited_s)
        for row, body in enumerate(segment.payloads.items):
            self.started.append(body)
            self.running[body] = partial(self._finish, body, row, sink)

        def end(code: Code, start: int, count: int) -> None:
            column = PartSlice.missing("W", 1, Detail(code, "ended"))
            for row in range(start, start + count):
                body = segment.payloads.items[row]
                self.ended.append((body, code))
                self._finish(body, row, sink, Slice(1, (column,)))

        return end

    def _finish(self, body: bytes, row: int, sink, answers: Slice = OK) -> None:
        if self.running.pop(body, None):
            sink(row, answers)


def test_a_request_starts_at_once_when_there_is_room():
    desk = Desk()
    desk.admit("a")
    assert (desk.order, desk.intake.waiting, desk.intake.active) == ("a", 0, 1)

    desk.answer("a")

    assert desk.got("a").parts[0].ok
    assert (desk.intake.waiting, desk.intake.active) == (0, 0)


def test_a_full_queue_refuses_at_once():
    desk = Desk(slots=2, in_service=1)
    for name in "abc":
        desk.admit(name)
    assert (desk.intake.waiting, desk.intake.active) == (2, 1)

    with pytest.raises(QueueFull, match="all 2 queue slots are taken"):
        desk.admit("d")

    assert desk.answers[b"d"] == []
    assert (desk.intake.waiting, desk.intake.active) == (2, 1)


def test_a_queue_full_of_bytes_refuses_at_once():
    desk = Desk(in_service=1, max_bytes=10)
    desk.admit("a" * 50)
    desk.admit("b" * 6)

    with pytest.raises(QueueFull, match="6 of 10 bytes"):
        desk.admit("c" * 5)

    desk.admit("d" * 4)
    desk.answer_all()
    desk.admit("e" * 9)
    assert desk.intake.waiting == 0


def test_requests_start_in_the_order_they_came():
    desk = Desk(in_service=1)
    for name in "abcdef":
        desk.admit(name)

    desk.answer_all()

    assert desk.order == "abcdef"


def test_a_request_for_a_free_team_overtakes_one_for_a_busy_team():
    desk = Desk()
    desk.busy = {"pink"}
    desk.admit("p", team="pink")
    desk.admit("g", team="green")

    assert desk.order == "g"
    desk.open("pink")
    assert desk.order == "gp"


def test_nobody_overtakes_who_may_want_the_same_slots():
    desk = Desk()
    desk.busy = {"pink"}
    desk.admit("1", team="pink")
    desk.admit("2")  # may go to pink too
    desk.admit("3", team="green")
    desk.admit("4", team="pink", mode=Mode.ANY)

    # 3 overtakes 1, and 2 has not been let through.
    assert desk.order == "3"
    desk.open("pink")
    assert desk.order == "3124"


def test_a_later_flow_is_not_starved_by_an_earlier_one():
    desk = Desk(in_service=1)
    for name, mode in zip("abcdef", [Mode.ALL, Mode.ANY] * 3, strict=True):
        desk.admit(name, mode=mode)

    desk.answer_all()

    assert desk.order == "abcdef"


def test_an_expired_request_is_dropped_at_dequeue_and_never_started():
    desk = Desk(in_service=1)
    desk.admit("a")
    desk.admit("b", left_s=1)
    desk.admit("c")
    desk.clock.advance(1)

    desk.answer("a")

    assert desk.order == "ac"
    refused = desk.got("b").refused
    assert (refused.code, refused.executed) == (Code.RESOURCE_EXHAUSTED, Executed.NO)
    assert desk.intake.active == 1


def test_a_request_that_comes_too_late_is_refused_at_once():
    desk = Desk()
    with pytest.raises(NoTimeLeft):
        desk.admit("a", left_s=0)


@pytest.mark.parametrize(
    ("code", "seen"),
    [(Code.CANCELLED, Code.CANCELLED), (Code.DEADLINE_EXCEEDED, Code.RESOURCE_EXHAUSTED)],
)
def test_an_abandoned_request_is_never_served(code, seen):
    desk = Desk(in_service=1)
    desk.admit("a")
    queued = desk.admit("b")

    queued.end(code)
    queued.end(code)

    assert (desk.got("b").refused.code, desk.got("b").refused.executed) == (seen, Executed.NO)
    assert desk.intake.waiting == 0
    desk.answer("a")
    assert desk.order == "a"


def test_a_started_request_is_cut_short_by_its_end():
    desk = Desk()
    queued = desk.admit("a")

    queued.end(Code.CANCELLED)
    queued.end(Code.CANCELLED)

    assert desk.ended[0] == (b"a", Code.CANCELLED)
    assert desk.got("a").parts[0].code is Code.CANCELLED
    assert desk.intake.active == 0


def test_ending_an_answered_request_does_nothing():
    desk = Desk()
    queued = desk.admit("a")
    desk.answer("a")

    queued.end(Code.CANCELLED)

    assert desk.got("a").parts[0].ok
    assert desk.ended == []


def test_a_request_ended_between_its_claim_and_its_start_is_ended_once_started():
    desk = Desk()
    all_queued: list[QueuedSegment] = []
    ended: list[tuple[Code, int, int]] = []

    def start(segment, place, waited_s, sink):
        all_queued[0].end(Code.CANCELLED)
        return lambda *what: ended.append(what)

    desk.busy = {""}
    all_queued.append(desk.admit("a"))
    desk.intake._start = start
    desk.open("")

    assert ended == [(Code.CANCELLED, 0, 1)]


def test_an_answer_that_comes_twice_is_taken_once():
    desk = Desk()

    def start(segment, place, waited_s, sink):
        sink(0, OK)
        sink(0, OK)
        return lambda code, start, count: None

    desk.intake._start = start
    desk.admit("a")

    assert desk.got("a").parts[0].ok
    assert desk.intake.active == 0


def test_a_thousand_answers_at_once_do_not_recurse():
    desk = Desk(slots=1000, in_service=1)
    served: list[int] = []
    desk.intake._start = answer_at_once
    desk.busy = {""}
    for n in range(1000):
        desk.intake.admit(one(), lambda start, found, n=n: served.append(n))
    desk.open("")

    assert served == list(range(1000))
    assert (desk.intake.waiting, desk.intake.active) == (0, 0)


def test_an_answer_that_brings_the_next_request_does_not_recurse():
    desk = Desk(in_service=1)
    served: list[int] = []

    def ask(n: int) -> None:
        def sink(start: int, answers: object) -> None:
            served.append(n)
            if n < 1000:
                ask(n + 1)

        desk.intake.admit(one(), sink)

    desk.intake._start = answer_at_once
    ask(0)

    assert len(served) == 1001


def test_a_claim_is_told_what_it_is_for():
    desk = Desk()
    flow = desk.intake.open_flow()
    desk.stream(flow, "abc", left_s=10, team="pink")
    desk.admit("x", left_s=4, mode=Mode.ANY)

    assert desk.claims == [
        (Route(team="pink"), 3, desk.clock.now + 5, True),
        (Route(mode=Mode.ANY), 1, desk.clock.now + 2, False),
    ]


def test_stopping_refuses_what_waits_and_lets_go_on_what_runs():
    desk = Desk(in_service=1)
    for name in "abc":
        desk.admit(name)

    assert desk.intake.close() == 2
    assert desk.intake.close() == 0

    for name in "bc":
        refused = desk.got(name).refused
        assert (refused.code, refused.executed) == (Code.UNAVAILABLE, Executed.NO)
    with pytest.raises(Draining):
        desk.admit("d")
    desk.answer("a")
    assert desk.got("a").parts[0].ok
    assert (desk.order, desk.intake.waiting, desk.intake.active) == ("a", 0, 0)


def test_what_was_started_is_told_after_the_last_of_a_kick_and_not_for_nothing():
    desk = Desk()
    told: list[str] = []
    desk.intake.on_started = lambda: told.append(desk.order)
    desk.busy = {""}
    for name in "abc":
        desk.admit(name)
    told.clear()

    desk.open("")
    desk.intake.kick()

    assert told == ["abc"]


def test_a_start_that_fails_costs_its_own_request_and_no_place():
    desk = Desk(in_service=1)
    usual = desk.intake._start

    def start(segment, place, waited_s, sink):
        if segment.payloads.items[0] == b"bad":
            raise RuntimeError("the pool is gone")
        return usual(segment, place, waited_s, sink)

    desk.intake._start = start
    desk.busy = {""}
    desk.admit("bad")
    desk.admit("good")
    try:
        desk.open("")
    except RuntimeError:
        pytest.fail("it came out on the thread of somebody else's request")

    refused = desk.got("bad").refused
    assert (refused.code, refused.executed) == (Code.INTERNAL, Executed.UNKNOWN)
    assert desk.order == "good"


def test_never_more_than_the_bounds_with_many_threads():
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

    intake = RequestQueue(
        "A", slots=8, in_service=3, max_bytes=10**9, claim=lambda *what: Place(1), start=start
    )

    def ask(thread: int) -> int:
        refused = 0
        for n in range(300):
            number = thread * 1000 + n
            try:
                queued = intake.admit(
                    one(b"x", deadline=1e12),
                    lambda start, found, number=number: answered.update([number]),
                )
                if n % 7 == 0:
                    queued.end(Code.CANCELLED)
            except QueueFull:
                refused += 1
            with lock:
                most["waiting"] = max(most["waiting"], intake.waiting)
                most["in service"] = max(most["in service"], intake.active)
        return refused

    with ThreadPoolExecutor(8) as callers:
        refused = sum(callers.map(ask, range(8)))
    until(lambda: len(answered) + refused == 8 * 300, 10, "some requests have no answer")
    workers.shutdown(wait=True)

    assert most["active"] <= 3
    assert most["in service"] <= 3
    assert most["waiting"] <= 8
    assert (intake.waiting, intake.active) == (0, 0)
    assert set(answered.values()) == {1}
    assert len(answered) + refused == 8 * 300


# Flows of streams, beside the waiting room.


@pytest.fixture
def desk() -> Desk:
    return Desk()


@pytest.fixture
def flow(desk: Desk) -> Flow:
    return desk.intake.open_flow()


def test_a_streamed_segment_starts_with_the_next_kick_as_one(desk, flow):
    desk.stream(flow, "abc")
    assert (desk.order, desk.counts) == ("", (3, 0))

    desk.intake.kick()

    assert (desk.order, desk.counts, len(desk.claims)) == ("abc", (0, 3), 1)
    desk.answer("b", "a", "c")
    assert desk.counts == (0, 0)
    assert all(desk.got(name).parts[0].ok for name in "abc")


def test_the_rows_of_a_segment_start_in_portions_and_in_their_order(desk, flow):
    desk.portion = 2
    desk.stream(flow, "abcde")
    desk.intake.kick()
    assert [count for _, count, _, _ in desk.claims] == [5, 3, 1]

    desk.answer_all()

    assert desk.order == "abcde"
    assert desk.counts == (0, 0)


def test_rows_wait_in_their_flow_until_places_are_free(desk, flow):
    desk.places = 2
    desk.stream(flow, "abcde")
    desk.intake.kick()
    assert (desk.order, desk.counts) == ("ab", (3, 2))

    desk.clock.advance(1)
    desk.answer("b")

    assert (desk.order, desk.counts) == ("abc", (2, 2))
    assert desk.waited == [0, 1]


def test_streamed_rows_are_not_counted_as_single_requests(flow, desk):
    desk.places = 1
    desk.stream(flow, "abc")
    desk.intake.kick()
    assert (desk.intake.waiting, desk.intake.active) == (0, 0)
    assert desk.intake.streamed == (1, 2, 1)


def test_a_full_queue_never_refuses_on_a_stream():
    desk = Desk(slots=1, in_service=1, max_bytes=1)
    flow = desk.intake.open_flow()
    desk.busy = {""}
    desk.admit("x")
    with pytest.raises(QueueFull):
        desk.admit("y")

    desk.stream(flow, "abcdefgh")
    desk.open("")

    assert desk.order in ("xabcdefgh", "abcdefghx")


def test_the_room_and_the_lanes_take_turns():
    desk = Desk()
    flows = [desk.intake.open_flow(Caller(caller)) for caller in ("mac", "pc")]
    desk.busy, desk.portion, desk.places = {""}, 1, 1
    for name in "123":
        desk.admit(name)
    desk.stream(flows[0], "abcdef")
    desk.stream(flows[1], "xyz")
    desk.open("")

    desk.answer_all()

    # Each source once in a round, as long as it has something.
    rounds = [set(desk.order[i : i + 3]) for i in (0, 3, 6)]
    assert rounds == [set("1ax"), set("2by"), set("3cz")]
    assert desk.order[9:] == "def"


@pytest.mark.parametrize("crowd", ["room", "flow"])
def test_neither_a_bulk_nor_a_crowd_starves_the_other(crowd):
    desk = Desk(in_service=1000)
    flow = desk.intake.open_flow()  # of the same caller
    desk.busy, desk.portion, desk.places = {""}, 10, 10
    many = [f"m{n}" for n in range(150)]
    if crowd == "room":
        for name in many:
            desk.admit(name)
        desk.stream(flow, "late one")
    else:
        desk.stream(flow, " ".join(many))
        desk.admit("late")
    desk.open("")

    desk.answer_all()

    assert desk.started.index(b"late") <= 11


def test_of_a_stream_the_urgent_start_first_until_the_others_have_waited(desk, flow):
    desk.busy = {""}
    desk.stream(flow, "abc")
    desk.clock.advance(3)
    desk.stream(flow, "de", priority=1)
    desk.stream(flow, "xy", priority=2)
    desk.stream(flow, "z", priority=99)  # as 9

    desk.open("")

    assert desk.order == "zxyabcde"


def test_streams_of_one_caller_share_its_turn():
    desk = Desk()
    desk.busy, desk.portion, desk.places = {""}, 1, 1
    for rows in ("abcdef", "ghijkl", "mnopqr"):
        desk.stream(desk.intake.open_flow(Caller("many")), rows)
    desk.admit("s", caller="many")
    desk.stream(desk.intake.open_flow(Caller("one")), "UVWXYZ")
    desk.open("")

    while len(desk.started) < 12:
        next(iter(desk.running.values()))()

    assert sum(name.isupper() for name in desk.order) == 6


def paced(desk: Desk, flow: Flow, places: int = 4, took_s: float = 1.0, **route: object) -> None:
    """Rows of the stream have ended lately, a second each; all places are taken and some wait."""
    desk.places = places
    names = " ".join(f"p{n}" for n in range(13 * places))
    desk.stream(flow, names, left_s=1000, **route)
    desk.intake.kick()
    for _ in range(10 * places):
        desk.clock.advance(took_s / places)
        next(iter(desk.running.values()))()
    desk.started.clear()


def test_the_rows_of_a_segment_that_come_too_late_are_refused_and_the_others_are_not(desk, flow):
    paced(desk, flow)  # 4 a second, 8 of them wait

    desk.stream(flow, "abcdefghij", left_s=4.5)
    desk.intake.kick()

    codes = desk.codes("abcdefghij")
    in_time = codes.index(Code.RESOURCE_EXHAUSTED)
    assert 3 <= in_time <= 7
    assert codes == [None] * in_time + [Code.RESOURCE_EXHAUSTED] * (10 - in_time)
    refused = desk.got("j").refused
    assert refused.executed is Executed.NO
    assert 0.5 <= refused.retry_after_s <= 2.5
    desk.stream(flow, "xyz", left_s=0.5)
    desk.intake.kick()
    assert desk.codes("xyz") == [Code.RESOURCE_EXHAUSTED] * 3
    assert "requests are ahead and an answer takes about" in desk.got("x").refused.reason


def test_what_a_refused_row_is_told_to_wait_is_enough(desk, flow):
    paced(desk, flow)
    desk.stream(flow, "abc", left_s=2)
    desk.intake.kick()
    assert desk.codes("abc") == [Code.RESOURCE_EXHAUSTED] * 3

    until_s = desk.clock.now + desk.got("a").refused.retry_after_s
    while desk.clock.now < until_s:
        desk.clock.advance(0.25)
        next(iter(desk.running.values()))()
    desk.stream(flow, "xyz", left_s=2)
    desk.intake.kick()

    assert desk.codes("xyz") == [None] * 3


@pytest.mark.parametrize("why", ["no proof", "urgent", "another caller", "places", "a while ago"])
def test_without_proof_no_row_of_a_stream_is_refused(desk, flow, why):
    if why == "no proof":
        desk.places = 4
        desk.stream(flow, " ".join(f"p{n}" for n in range(20)), left_s=1000)
        desk.intake.kick()
        desk.clock.advance(1)
        desk.answer("p0")
    else:
        paced(desk, flow)
    if why == "places":
        desk.places = 100
        desk.intake.kick()
    if why == "a while ago":
        desk.answer_all()
        desk.clock.advance(2)
        desk.stream(flow, "pqrst", left_s=1000)
    urgent = why == "urgent"
    to = desk.intake.open_flow(Caller("another")) if why == "another caller" else flow

    desk.stream(to, "ab", left_s=2.5, priority=9 if urgent else 0)
    desk.intake.kick()

    assert desk.codes("ab") == [None, None]


def test_what_another_process_hands_down_is_judged_as_what_a_client_asks(desk, flow):
    """Or anyone would say so to be let in."""
    down = {"targets": ("C",), "hops": ("A",)}
    paced(desk, flow, **down)

    desk.stream(flow, "ab", left_s=1, **down)
    desk.intake.kick()

    assert desk.codes("ab") == [Code.RESOURCE_EXHAUSTED] * 2


def hopeless(desk: Desk, flow: Flow, names: str, after_s: float, behind: str = "") -> None:
    """These wait so long of their 4 s for a place, with `behind` behind them; then all are free."""
    paced(desk, flow)
    desk.places = 0
    desk.stream(flow, names, left_s=4, priority=9)
    if behind:
        desk.stream(flow, behind, left_s=1000)
    desk.intake.kick()
    desk.clock.advance(after_s)
    desk.places = 100
    desk.intake.kick()


@pytest.mark.parametrize(("after_s", "code"), [(2.4, None), (2.6, Code.RESOURCE_EXHAUSTED)])
def test_the_time_that_the_way_home_takes_is_not_for_work(after_s, code):
    desk = Desk(return_margin_s=0.5)  # work takes a second, of 1.4 and of 1.2 s it has 0.9 and 0.7
    hopeless(desk, desk.intake.open_flow(), "ab", after_s)

    assert desk.codes("ab") == [code] * 2


def test_a_row_with_less_time_than_the_quickest_took_never_starts(desk, flow):
    hopeless(desk, flow, "ab", 3.8)

    assert desk.codes("ab") == [Code.RESOURCE_EXHAUSTED] * 2
    assert desk.got("a").refused.executed is Executed.NO
    assert "even the quickest recent one took longer" in desk.got("a").refused.reason
    assert "a" not in desk.order


def test_a_row_whose_place_nobody_else_wants_is_started_however_little_time_it_has():
    desk = Desk(in_service=1)
    for n in range(10):
        desk.admit(f"p{n}", left_s=1000)
    for n in range(10):
        desk.clock.advance(1)
        desk.answer(f"p{n}")
    desk.admit("long", left_s=1000)
    desk.admit("late", left_s=1.2)
    desk.clock.advance(1)
    desk.answer("long")

    assert desk.order.endswith("longlate")


def test_a_stream_whose_slots_are_busy_holds_up_nobody_else():
    desk = Desk()
    flows = [desk.intake.open_flow() for _ in range(2)]
    desk.busy = {"pink"}
    desk.stream(flows[0], "abc", team="pink")
    desk.stream(flows[1], "xyz", team="green")
    desk.admit("1", team="green")
    desk.intake.kick()

    assert set(desk.order) == set("xyz1")


def test_in_a_flow_only_who_cannot_want_the_same_slots_overtakes(desk, flow):
    desk.busy = {"pink"}
    desk.stream(flow, "ab", team="pink")
    desk.stream(flow, "gh", team="green")
    desk.stream(flow, "xy")  # may go to pink too
    desk.stream(flow, "kl", team="green")
    desk.intake.kick()
    assert desk.order == "ghkl"

    desk.open("pink")
    assert desk.order == "ghklabxy"


def test_inner_rows_ended_before_their_start_never_start(desk, flow):
    desk.busy = {""}
    queued = desk.stream(flow, "abcdef")

    queued.end(Code.CANCELLED, 2, 2)
    queued.end(Code.DEADLINE_EXCEEDED, 3, 2)

    codes = [None, None, Code.CANCELLED, Code.CANCELLED, Code.RESOURCE_EXHAUSTED, None]
    assert desk.codes("abcdef") == codes
    assert {desk.got(name).refused.executed for name in "cde"} == {Executed.NO}
    assert desk.counts == (3, 0)
    desk.open("")
    assert (desk.order, desk.counts) == ("abf", (0, 3))


def test_inner_rows_ended_after_their_start_are_cut_short_and_the_others_run_on(desk, flow):
    desk.portion = 3
    queued = desk.stream(flow, "abcdef")
    desk.intake.kick()

    queued.end(Code.CANCELLED, 2, 2)
    queued.end(Code.CANCELLED, 2, 2)

    assert desk.codes("abcdef") == [None, None, Code.CANCELLED, Code.CANCELLED, None, None]
    assert {body for body, _ in desk.ended} == {b"c", b"d"}
    assert desk.counts == (0, 4)
    desk.answer_all()
    assert desk.codes("abef") == [Code.OK] * 4
    assert desk.counts == (0, 0)


def test_an_end_over_started_and_waiting_rows_ends_both(desk, flow):
    desk.places = 2
    queued = desk.stream(flow, "abcd")
    desk.intake.kick()

    queued.end(Code.CANCELLED, 1, 2)

    assert desk.codes("abcd") == [None, Code.CANCELLED, Code.CANCELLED, None]
    assert desk.got("c").refused.executed is Executed.NO
    assert desk.order == "abd"


def test_rows_ended_between_their_claim_and_their_start_are_ended_once_started(desk, flow):
    all_queued: list[QueuedSegment] = []
    ended: list[tuple[Code, int, int]] = []

    def start(segment, place, waited_s, sink):
        all_queued[0].end(Code.CANCELLED, 1, 4)
        return lambda *what: ended.append((segment.payloads.items[0], *what))

    desk.portion = 3
    desk.intake._start = start
    all_queued.append(desk.stream(flow, "abcdef"))
    desk.intake.kick()

    # d and e were still waiting; b and c are ended in their own segment's rows.
    assert ended[0] == (b"a", Code.CANCELLED, 1, 2)
    assert desk.codes("de") == [Code.CANCELLED] * 2


def test_an_expired_segment_is_dropped_at_its_turn_and_never_started(desk, flow):
    desk.busy = {""}
    desk.stream(flow, "abc", left_s=1)
    desk.stream(flow, "xyz")
    desk.clock.advance(1)

    desk.open("")

    assert desk.order == "xyz"
    assert desk.codes("abc") == [Code.RESOURCE_EXHAUSTED] * 3
    assert {desk.got(name).refused.executed for name in "abc"} == {Executed.NO}
    assert desk.counts == (0, 3)


def test_a_segment_that_comes_too_late_or_while_stopping_is_refused_at_once(desk, flow):
    with pytest.raises(NoTimeLeft):
        desk.stream(flow, "abc", left_s=0)
    desk.intake.close()
    with pytest.raises(Draining):
        desk.stream(flow, "abc")
    assert desk.counts == (0, 0)


def test_stopping_refuses_the_rows_that_have_not_started(desk, flow):
    desk.places = 2
    desk.stream(flow, "abcd")
    desk.intake.kick()

    assert desk.intake.close() == 2

    assert desk.codes("abcd") == [None, None, Code.UNAVAILABLE, Code.UNAVAILABLE]
    assert desk.got("d").refused.executed is Executed.NO
    desk.answer("a", "b")
    assert (desk.order, desk.counts) == ("ab", (0, 0))


def test_a_start_that_fails_costs_its_own_rows_and_no_place(desk, flow):
    usual = desk.intake._start

    def start(segment, place, waited_s, sink):
        if segment.payloads.items[0] == b"a":
            raise RuntimeError("the pool is gone")
        return usual(segment, place, waited_s, sink)

    desk.intake._start, desk.portion = start, 2
    desk.stream(flow, "abcd")
    desk.intake.kick()

    assert desk.codes("abcd") == [Code.INTERNAL, Code.INTERNAL, None, None]
    assert (desk.order, desk.counts) == ("cd", (0, 2))


def test_rows_may_be_answered_in_slices_of_any_size_and_order(desk, flow):
    sinks = []

    def start(segment, place, waited_s, sink):
        sinks.append(sink)
        return lambda code, start, count: None

    desk.intake._start = start
    desk.stream(flow, "abcdef")
    desk.intake.kick()

    sinks[0](4, done(2))
    sinks[0](0, done(3))
    sinks[0](2, done(3))  # only d is still open of these

    assert desk.codes("abcdef") == [Code.OK] * 6
    assert desk.counts == (0, 0)


def test_an_answer_that_brings_the_answer_of_another_row_counts_each_once(desk, flow):
    """What two threads that answer rows of one segment do when they meet."""
    sinks = []

    def start(segment, place, waited_s, sink):
        sinks.append(sink)
        return lambda code, start, count: None

    def reply(first: int, answers: Slice) -> None:
        if first == 0:
            sinks[0](1, done(1))

    desk.intake._start = start
    desk.intake.admit_to(flow, Segment(Route(), Column((b"", b"")), 2000.0, 1), reply)
    desk.intake.kick()
    sinks[0](0, done(1))

    assert desk.counts == (0, 0)
    assert desk.intake.active == 0


@pytest.mark.parametrize("how", ["answered", "ended waiting", "ended running", "refused"])
def test_nothing_is_kept_of_a_segment_that_is_answered(desk, flow, how):
    desk.busy = {""} if how in ("ended waiting", "refused") else set()
    queued = desk.stream(flow, "abc")
    desk.intake.kick()
    if how == "answered":
        desk.answer_all()
    elif how == "refused":
        queued.refuse(Draining("stopping"))
    else:
        queued.end(Code.CANCELLED)
    assert not queued.is_open
    forgotten = weakref.ref(queued)

    desk.claims.clear()
    desk.intake._start = desk.intake._claim = None
    del queued
    gc.collect()

    assert forgotten() is None


def test_a_closed_flow_is_not_counted_and_its_end_can_still_come(desk, flow):
    desk.places = 1
    queued = desk.stream(flow, "abc")
    desk.intake.kick()

    queued.end(Code.CANCELLED)
    desk.intake.close_flow(flow)

    assert desk.intake.streamed == (0, 0, 0)
    assert (desk.intake.waiting, desk.intake.active) == (0, 0)


def test_many_small_segments_that_wait_do_not_slow_down_a_kick(desk, flow):
    desk.busy = {"pink"}
    for n in range(4000):
        desk.intake.admit_to(flow, Segment(Route(team="pink"), Column((b"",)), 2e3, n), nothing)
    desk.intake.kick()
    looks = []
    route = desk.intake._claim
    desk.intake._claim = lambda *what: looks.append(what) or route(*what)

    with mock.patch.object(fair_queue, "may_overtake", wraps=fair_queue.may_overtake) as compared:
        desk.intake.kick()

    # One flow's requests want the same places: who is behind the first of them cannot start either.
    assert len(looks) == 1
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

    intake = RequestQueue("A", slots=50, in_service=3, max_bytes=10**9, claim=claim, start=start)

    def ask(thread: int) -> int:
        flow, refused = intake.open_flow(), 0
        for n in range(60):
            number = thread * 1000 + n

            def sink(start: int, answers: Slice, number=number) -> None:
                rows.update((number, start + i) for i in range(len(answers)))

            try:
                if n % 3:
                    segment = Segment(Route(team="stream"), Column((b"",) * (n % 7 + 1)), 1e12, 1)
                    queued = intake.admit_to(flow, segment, sink)
                    intake.kick()
                else:
                    queued = intake.admit(one(deadline=1e12), sink)
                if n % 5 == 0:
                    queued.end(Code.CANCELLED, n % 2, 2)
            except QueueFull:
                refused += 1
            with lock:
                most["in service"] = max(most["in service"], intake.active)
        return refused

    with ThreadPoolExecutor(6) as callers:
        refused = sum(callers.map(ask, range(6)))
    total = 6 * sum(n % 7 + 1 if n % 3 else 1 for n in range(60)) - refused
    until(lambda: len(rows) == total, 10, "some rows have no answer")
    workers.shutdown(wait=True)

    assert set(rows.values()) == {1}
    assert most["streamed"] <= 5
    assert most["in service"] <= 3
    assert (intake.waiting, intake.active) == (0, 0)
    assert intake.streamed[1:] == (0, 0)


class Conservation(RuleBasedStateMachine):
    """Every admitted row is answered exactly once, whatever happens and in which order."""

    def __init__(self) -> None:
        super().__init__()
        self.desk = Desk(slots=5, in_service=3, max_bytes=60)
        self.streams = [self.desk.intake.open_flow(Caller(caller)) for caller in ("mac", "lab")]
        self.all_queued: list[tuple[QueuedSegment, list[str]]] = []
        self.single: list[str] = []
        self.callers: dict[str, str] = {}
        self.came = dict.fromkeys(("mac", "lab"), self.desk.clock.now)  # with a stream each
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
        rivals = not self.closed and self.rivals(caller)
        who = {"caller": caller, "priority": priority}
        full = self.is_full(size, caller, rivals)
        try:
            queued = self.desk.admit(name, left_s=left_s, **who, team=team, mode=mode)
        except Draining:
            assert self.closed
        except NoTimeLeft:
            assert any(map(self.waits, self.single + self.streamed)), "nobody need wait"
        except QueueFull:
            assert full
        else:
            assert not self.closed
            # Who finds a place needs no room, and makes none for itself.
            assert not (self.waits(name) and self.is_full(size, caller, rivals))
            self.callers[name] = caller
            self.keep(queued, [name], self.single, ("room", team, mode, caller, priority))

    def is_full(self, size, caller, rivals):
        """Whether there is no room for one more to wait."""
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
            queued = self.desk.stream(flow, " ".join(names) + " ", **how)
        except Draining:
            assert self.closed
        except NoTimeLeft:
            assert waiting, "who need not wait is never refused for its time"
        else:
            assert not self.closed
            self.keep(queued, names, self.streamed, (stream, team, mode, priority))
        if kick:
            self.desk.intake.kick()

    @precondition(lambda self: self.desk.running)
    @rule(data=st.data())
    def answer(self, data):
        body = data.draw(st.sampled_from(sorted(self.desk.running)))
        self.desk.running[body]()

    @precondition(lambda self: self.all_queued)
    @rule(data=st.data(), code=st.sampled_from([Code.CANCELLED, Code.DEADLINE_EXCEEDED]))
    def end(self, data, code):
        queued, names = data.draw(st.sampled_from(self.all_queued))
        start = data.draw(st.integers(0, len(names) - 1))
        count = data.draw(st.integers(0, len(names) - start))
        queued.end(code, start, count)
        assert all(self.desk.answers[name.encode()] for name in names[start : start + count])

    @rule(teams=st.sets(st.sampled_from(["", "green", "pink"])))
    def fill(self, teams):
        self.desk.busy |= teams

    @rule(teams=st.sets(st.sampled_from(["", "green", "pink"])))
    def open(self, teams):
        self.desk.open(*teams)

    @rule(places=st.sampled_from([None, 1, 4]), portion=st.sampled_from([1, 2, 100]))
    def credit(self, places, portion):
        self.desk.places, self.desk.portion = places, portion

    @rule(seconds=st.sampled_from([0.1, 1, 10]))
    def time_passes(self, seconds):
        self.desk.clock.advance(seconds)

    @precondition(lambda self: self.number > 9)
    @rule()
    def close(self):
        self.desk.intake.close()
        self.closed = True
        assert self.desk.intake.waiting == 0
        assert self.desk.counts[0] == 0

    def rivals(self, caller):
        """Notes that it came; whether another one did within ten seconds."""
        now = self.desk.clock.now
        self.came[caller] = now
        return any(now - at <= 10 for other, at in self.came.items() if other != caller)

    def names(self, count, size):
        self.number += count
        return [f"{self.number - n:03}".ljust(size, "-") for n in reversed(range(count))]

    def keep(self, queued, names, kind, flow):
        self.all_queued.append((queued, names))
        kind += names
        self.flows.setdefault(flow, []).extend(names)

    def waits(self, name):
        body = name.encode()
        return body not in self.desk.started and not self.desk.answers[body]

    def runs(self, name):
        return name.encode() in self.desk.running

    @invariant()
    def the_counts_are_true_and_the_bounds_hold(self):
        intake = self.desk.intake
        assert intake.waiting == sum(map(self.waits, self.single)) <= 5
        assert intake.active == sum(map(self.runs, self.single)) <= 3
        waiting = sum(map(self.waits, self.streamed))
        assert intake.streamed == (2, waiting, sum(map(self.runs, self.streamed)))

    @invariant()
    def what_is_not_answered_waits_or_runs(self):
        for name in self.single + self.streamed:
            assert bool(self.desk.answers[name.encode()]) != (self.waits(name) or self.runs(name))

    @invariant()
    def nobody_is_answered_twice_or_started_twice(self):
        assert all(len(found) <= 1 for found in self.desk.answers.values())
        assert len(set(self.desk.started)) == len(self.desk.started)

    @invariant()
    def a_flow_starts_in_its_order(self):
        started = [body.decode() for body in self.desk.started]
        for names in self.flows.values():
            ours = [name for name in started if name in names]
            assert ours == sorted(ours, key=names.index)

    def teardown(self):
        self.desk.places = None
        self.desk.open("", "green", "pink")
        self.desk.answer_all()
        assert (self.desk.intake.waiting, self.desk.intake.active) == (0, 0)
        assert self.desk.counts == (0, 0)
        names = self.single + self.streamed
        assert all(len(self.desk.answers[name.encode()]) == 1 for name in names)
        assert self.desk.intake._slot_shares._bytes == 0
        assert not any(list(flow) for flow in self.streams)


TestConservation = Conservation.TestCase
TestConservation.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("how", ["queue", "stream"])
def test_a_request_leaves_nothing_for_the_garbage_collector(how):
    desk = Desk()
    flow = desk.intake.open_flow()
    gc.collect()
    gc.disable()
    try:
        for n in range(100):
            desk.admit(f"{n:03}") if how == "queue" else desk.stream(flow, f"{n:03}x {n:03}y ")
            desk.answer_all()
        assert gc.collect() < 100
    finally:
        gc.enable()


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("of", ["names", "addresses", "teams", "targets"])
def test_what_is_kept_does_not_grow_with_all_that_ever_came(of, busy):
    """busy: something waits all the while."""
    desk = Desk()
    desk.intake._start = answer_at_once
    if busy:
        desk.busy = {"pink"}
        desk.admit("w", left_s=1000, team="pink")
    for n in range(10_000):
        caller = Caller("pc", f"{n}") if of == "names" else Caller(f"{n}" if of != "teams" else "")
        route = Route(team=f"t{n}" if of == "teams" else "")
        if of == "targets":
            route = Route(targets=(f"{n}",))
        segment = Segment(route, Column((b"",)), 3000.0, n)
        desk.intake.admit(segment, nothing, caller)

    intake = desk.intake
    assert intake.active == 0
    assert intake._room.order.kept <= 100
    assert len(intake._callers) <= 2100
    assert len(intake._classes) <= 1001
    assert intake.waiting == len(intake._flows) == busy
    assert intake._slot_shares.kept <= 3 * busy + 1


def test_a_newcomer_costs_as_much_beside_many_waiting_as_their_number_and_no_more():
    desk = Desk(slots=400)
    desk.busy = {"pink"}

    def count(admitted: int) -> int:
        for n in range(admitted):
            segment = Segment(Route(team="pink"), Column((b"",)), 2000.0, n)
            desk.intake.admit(segment, nothing, Caller(f"{n}"))
        before = Flow.rows_before
        with mock.patch.object(Flow, "rows_before", autospec=True, side_effect=before) as counted:
            desk.admit("x", team="pink")
        desk.intake.close()
        desk.intake._draining = False
        return counted.call_count

    assert count(300) <= 3 * count(100) + 10


def test_a_kind_that_waits_or_runs_is_not_forgotten_for_those_that_come_and_go():
    desk = Desk()
    desk.admit("runs", team="green")
    kept = desk.intake._class_of(Route(team="green"))
    desk.intake._start = answer_at_once
    for n in range(5000):
        segment = Segment(Route(targets=(f"{n}",)), Column((b"",)), 2000.0, n)
        desk.intake.admit(segment, nothing)

    assert desk.intake._class_of(Route(team="green")) is kept
    assert len(desk.intake._classes) <= 1001


def test_who_finds_a_place_needs_no_slot_of_the_queue():
    desk = Desk(slots=2)
    desk.busy = {"pink"}
    for name in "ab":
        desk.admit(name, team="pink")
    with pytest.raises(QueueFull):
        desk.admit("c", team="pink")

    desk.admit("d", team="green")

    assert (desk.order, desk.intake.waiting) == ("d", 2)


def test_one_handlers_calls_leave_places_to_others_and_hold_up_nobody():
    desk = Desk()
    for n in range(100):
        desk.admit(f"s{n}", handler="slow")
    assert (desk.intake.active, desk.intake.waiting) == (80, 20)

    desk.admit("e", handler="echo")
    desk.admit("m", handler="slow", caller="mac")

    assert {"e", "m"} <= {name.decode() for name in desk.started}
    desk.answer(*(f"s{n}" for n in range(20)))
    assert desk.intake.waiting < 10
    desk.answer_all()
    assert (desk.intake.active, desk.intake.waiting) == (0, 0)


def test_a_request_without_a_handlers_name_passes_those_that_want_another():
    desk = Desk()
    desk.intake._default_handler = "echo"
    desk.places = 1
    desk.admit("a", handler="slow")
    usual = desk.intake._claim
    desk.intake._claim = lambda route, *rest: None if route.handler else Place(1)
    desk.admit("b", handler="slow")
    desk.admit("c")
    desk.intake._claim = usual

    assert desk.order == "ac"
