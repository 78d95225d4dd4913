"""Idempotency keys: one answer per key, kept for all of its time."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import overlay as library
from overlay.calls.idempotency import First, IdempotencyKeys, Waiter
from overlay.calls.unary import _question
from overlay.model.errors import (
    AnswerNotKept,
    BadRequest,
    CallCancelled,
    DeadlinePassed,
    HandlerFailed,
    KeyBusy,
    KeysFull,
    OverlayError,
    PartsFailed,
    QueueFull,
)
from overlay.model.limits import MIB, Limits
from overlay.model.segments import Caller, Code, Executed, Mode, Route
from overlay.transport import codec
from overlay.transport.codec import pb2
from tests.harness.cluster import Overlay, until
from tests.harness.network import Clock
from tests.harness.ways import Outcome
from tests.system.test_rules import forget_notes, notes, own

MAC, PC = Caller("10.0.0.1", "mac"), Caller("10.0.0.2", "mac")
LIMITS = replace(Limits(), keys=100, kept_bytes=10_000, key_waiters=20, waiters_of_key=5)


class Bench:
    """Keys with a clock that the test sets."""

    def __init__(self, **limits: int) -> None:
        self.clock = Clock()
        self.keys = IdempotencyKeys(replace(LIMITS, **limits), self.clock)

    def enter(self, key: str = "k", question: bytes = b"q", caller: Caller = MAC):
        return self.keys.enter(caller, key, (question,))

    def ask(self, key: str = "k", answer: bytes = b"the answer", caller: Caller = MAC):
        """Asks with the key: "ran" for the first, else the kept outcome."""
        found = self.enter(key, caller=caller)
        if isinstance(found, First):
            found.answered(answer)
            return "ran"
        return found


def test_requests_with_one_key_run_once_and_get_one_answer():
    bench = Bench()
    assert [bench.ask(), bench.ask(), bench.ask()] == ["ran", b"the answer", b"the answer"]


def test_a_key_reused_for_another_request_is_refused_without_a_word_about_the_first():
    bench = Bench()
    bench.ask(answer=b"a secret")
    with pytest.raises(BadRequest) as raised:
        bench.enter(question=b"other")
    assert str(raised.value) == "idempotency_key: 'k' was used for another request"


@pytest.mark.parametrize(
    "other",
    [
        PC,
        Caller("10.0.0.1", "pc"),
        Caller("10.0.0.1", ""),
        Caller("10.0.0.1m", "ac"),
        Caller("10.0.0.1", "mack"),
    ],
)
@pytest.mark.parametrize("is_answered", [False, True])
def test_another_caller_cannot_use_probe_or_spoil_a_key(other, is_answered):
    bench = Bench()
    first = bench.enter("k")
    if is_answered:
        first.answered(b"a secret")

    theirs = bench.enter("" if other.name == "mack" else "k", b"other", other)

    assert isinstance(theirs, First)
    theirs.failed(HandlerFailed("spoiled"))
    first.answered(b"a secret")
    assert bench.enter("k") == b"a secret"


def test_a_failed_request_that_may_have_run_is_not_repeated_and_each_caller_gets_its_own_error():
    bench = Bench()
    bench.enter().failed(HandlerFailed("it broke"))
    errors = [bench.enter(), bench.enter()]
    assert [(type(error), str(error)) for error in errors] == [(HandlerFailed, "it broke")] * 2
    assert errors[0] is not errors[1]


def test_a_kept_failure_keeps_no_request_alive():
    bench = Bench()

    class Payload:
        pass

    def asks() -> weakref.ref[Payload]:
        payload = Payload()
        try:
            raises(payload)
        except PartsFailed as e:
            found = bench.enter()
            if isinstance(found, First):
                found.failed(e)
            else:
                with pytest.raises(PartsFailed):
                    raise found from None
        return weakref.ref(payload)

    def raises(payload: Payload) -> None:
        raise PartsFailed("broke", Code.INTERNAL, Executed.YES, "it broke", 1.5)

    first, second = asks(), asks()
    gc.collect()

    assert (first(), second()) == (None, None)
    kept = bench.enter()
    assert (type(kept), str(kept), kept.code, kept.retry_after_s) == (
        PartsFailed,
        "broke",
        Code.INTERNAL,
        1.5,
    )


def test_a_request_that_provably_did_not_run_may_run_again():
    bench = Bench()
    bench.enter().failed(QueueFull("full"))
    assert bench.keys.kept == 0
    assert bench.ask() == "ran"


def test_an_answer_expires_after_its_time_and_not_before():
    bench = Bench()
    first = bench.enter()
    bench.clock.advance(2000)  # a slow answer: its time starts with the answer
    first.answered(b"late")
    bench.clock.advance(599)
    assert bench.enter() == b"late"
    bench.clock.advance(2)
    assert bench.keys.kept == bench.keys.kept_bytes == 0
    assert bench.ask() == "ran"


# Bounds: a new key is refused, and old ones are kept.


def test_a_key_is_kept_after_ten_thousand_others_of_its_caller():
    keys = IdempotencyKeys(Limits(), Clock())
    for n in range(10_002):
        first = keys.enter(MAC, f"{n}", (b"q",))
        assert isinstance(first, First)
        first.answered(b"answer %d" % n)

    assert keys.enter(MAC, "0", (b"q",)) == b"answer 0"


def test_without_room_a_new_key_is_refused_with_proof_and_no_key_is_dropped():
    bench = Bench(keys=10)
    assert [bench.ask(str(n)) for n in range(5)] == ["ran"] * 5
    bench.clock.advance(400)

    with pytest.raises(KeysFull) as raised:
        bench.enter("new")

    refused = raised.value
    assert (refused.code, refused.executed) == (Code.RESOURCE_EXHAUSTED, Executed.NO)
    assert refused.retry_after_s == 200
    assert str(refused) == (
        "10.0.0.1 has 5 of 10 idempotency keys, and the 5 that are left are kept for others; each "
        "is kept for 600 s: try again in 200.0 s, send the request without a key, or configure a "
        "shorter key_window_s"
    )
    assert bench.enter("0") == b"the answer"
    assert bench.ask("new", caller=PC) == "ran"
    bench.clock.advance(200)
    assert bench.ask("new") == "ran"


def test_a_key_without_an_answer_takes_room_and_does_not_expire():
    bench = Bench(keys=4)
    first = bench.enter("0")
    bench.enter("1")
    bench.clock.advance(10_000)
    with pytest.raises(KeysFull) as raised:
        bench.enter("new")
    assert raised.value.retry_after_s == 1
    assert isinstance(bench.enter("0"), Waiter)
    first.failed(QueueFull("full"))
    assert bench.ask("new") == "ran"


def test_a_new_key_is_refused_while_kept_answers_take_too_many_bytes():
    bench = Bench()
    assert [bench.ask(str(n), bytes(3000)) for n in range(2)] == ["ran"] * 2
    bench.clock.advance(1)

    with pytest.raises(
        KeysFull, match=r"^10\.0\.0\.1 has 6,000 of 10,000 bytes of answers kept"
    ) as e:
        bench.enter("2")

    assert (e.value.executed, e.value.retry_after_s) == (Executed.NO, 599)
    assert str(e.value).endswith("or configure a larger max_kept_mib")
    assert bench.enter("0") == bytes(3000)
    assert bench.ask("2", caller=PC) == "ran"


def test_an_answer_too_large_to_keep_reaches_its_waiters_and_the_request_does_not_run_again():
    bench = Bench()
    firsts = [bench.enter(str(n)) for n in range(3)]
    waiter, received = bench.enter("2"), []
    waiter.on_done(received.append)
    for first in firsts:
        first.answered(bytes(4000))

    assert received == [bytes(4000)]
    missing = bench.enter("2")
    assert type(missing) is AnswerNotKept
    assert (missing.code, missing.executed) == (Code.ALREADY_EXISTS, Executed.YES)
    assert str(missing) == (
        "the request with this idempotency key ran; its answer of 4,000 bytes could not be kept: "
        "all kept answers together may take 10,000 (max_kept_mib)"
    )
    assert bench.enter("0") == bytes(4000)
    bench.clock.advance(601)
    assert bench.ask("2") == "ran"
    assert bench.keys.kept_bytes == len(b"the answer")


def test_an_error_too_large_to_keep_says_no_more_than_is_known():
    bench = Bench(kept_bytes=100)
    bench.enter().failed(DeadlinePassed("late"))
    missing = bench.enter()
    assert (missing.code, missing.executed) == (Code.ALREADY_EXISTS, Executed.UNKNOWN)


@pytest.mark.parametrize("addresses", [1, 2, 5])
def test_a_caller_with_endless_keys_leaves_room_for_others(addresses):
    bench = Bench()
    full = [Caller(f"10.0.1.{n}") for n in range(addresses)]
    for number in range(LIMITS.keys):
        for caller in full:
            try:
                bench.ask(str(number), caller=caller)
            except KeysFull:
                continue
    assert bench.keys.kept <= LIMITS.keys * addresses / (addresses + 1) + 1
    assert bench.ask("new", caller=PC) == "ran"


def test_a_key_costs_the_same_time_and_memory_however_many_came_before():
    """CPU seconds of 20,000 keys, the first ones against the later ones."""
    clock = Clock()
    keys = IdempotencyKeys(replace(Limits(), keys=20_000), clock)
    took: list[float] = []
    for tenth in range(5):
        began = time.process_time()
        for number in range(20_000):
            clock.now += 600 / 5_000
            first = keys.enter(MAC, f"{tenth} {number}", (b"q",))
            assert isinstance(first, First)
            first.answered(b"x" * 80)
        took.append(time.process_time() - began)
        assert keys.kept <= 5_001
        assert keys.kept_bytes <= 5_001 * 80
    assert min(took[1:]) < 2 * took[0]


# Waiters for the first request.


@dataclass
class Received:
    """What a waiter got; it must get one outcome."""

    outcomes: list[object] = field(default_factory=list)

    def __call__(self, outcome: object) -> None:
        self.outcomes.append(outcome)

    @property
    def outcome(self) -> object:
        (outcome,) = self.outcomes
        return outcome


def test_requests_with_a_running_key_wait_for_it_and_get_its_outcome_once():
    bench = Bench()
    first, waiters, received = bench.enter(), [], [Received() for _ in range(3)]
    for one in received[:2]:
        waiters.append(bench.enter())
        waiters[-1].on_done(one)
    waiters.append(bench.enter())
    assert (bench.keys.waiting, bench.keys.kept) == (3, 1)

    first.answered(b"the answer")
    waiters[2].on_done(received[2])
    for waiter in waiters:
        waiter.cancel()
    first.failed(QueueFull("reported twice"))

    assert [one.outcome for one in received] == [b"the answer"] * 3
    assert (bench.keys.waiting, bench.enter()) == (0, b"the answer")


def test_waiters_learn_that_nothing_ran_and_the_next_request_runs():
    bench, received = Bench(), Received()
    first = bench.enter()
    bench.enter().on_done(received)
    first.failed(QueueFull("full"))
    assert (type(received.outcome), bench.keys.waiting) == (QueueFull, 0)
    assert isinstance(bench.enter(), First)


@pytest.mark.parametrize(
    ("code", "error"), [(Code.CANCELLED, CallCancelled), (Code.DEADLINE_EXCEEDED, DeadlinePassed)]
)
@pytest.mark.parametrize("is_late", [False, True])
def test_a_waiter_that_gives_up_ends_at_once_and_leaves_nothing_behind(code, error, is_late):
    bench, received = Bench(), Received()
    first, waiter = bench.enter(), bench.enter()
    if is_late:
        waiter.end(code)
    waiter.on_done(received)
    waiter.end(code)

    assert type(received.outcome) is error
    assert received.outcome.executed is Executed.UNKNOWN
    assert bench.keys.waiting == 0
    gone = weakref.ref(received)
    del received
    gc.collect()
    assert gone() is None
    first.answered(b"x")
    waiter.cancel()


def test_too_many_waiters_are_refused_without_the_proof_that_nothing_ran():
    bench = Bench()
    firsts = {key: bench.enter(key) for key in "abc"}
    for key in "aaaaabbbbb":
        bench.enter(key)
    for key in "ac":  # of one key, and of one address
        with pytest.raises(KeyBusy) as raised:
            bench.enter(key)
        refused = raised.value
        assert (refused.code, refused.executed) == (Code.RESOURCE_EXHAUSTED, Executed.UNKNOWN)
        assert refused.retry_after_s == 1
    bench.enter(caller=PC)
    assert isinstance(bench.enter(caller=PC), Waiter)
    firsts["a"].answered(b"x")
    assert isinstance(bench.enter("c"), Waiter)


def test_of_many_threads_with_one_key_exactly_one_is_first():
    keys, received, ran = IdempotencyKeys(Limits()), [], []

    def ask(number: int) -> None:
        found = keys.enter(MAC, str(number // 8), (b"q",))
        if isinstance(found, First):
            ran.append(number // 8)
            found.answered(b"%d" % (number // 8))
        elif isinstance(found, Waiter):
            done = threading.Event()
            found.on_done(lambda outcome: (received.append((number // 8, outcome)), done.set()))
            assert done.wait(10)
        else:
            received.append((number // 8, found))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(4000)))

    assert sorted(ran) == list(range(500))
    assert Counter(received) == {(n, b"%d" % n): 7 for n in range(500)}
    assert (keys.waiting, keys.kept) == (0, 500)


KEYS, CALLERS = st.sampled_from("abcdefgh"), st.sampled_from([MAC, PC, Caller("10.0.0.3")])


class KeysMachine(RuleBasedStateMachine):
    """Keys with little room, checked against a list of everything that happened."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(keys=8, kept_bytes=100, key_waiters=6, waiters_of_key=2)
        self.open: dict[tuple[Caller, str], tuple[bytes, First]] = {}
        self.kept: dict[tuple[Caller, str], tuple[bytes, float, bytes | None]] = {}
        self.waiting: dict[tuple[Caller, str], list[tuple[Waiter, Received]]] = {}
        self.over: list[Received] = []

    @rule(caller=CALLERS, key=KEYS, question=st.sampled_from([b"p", b"q"]))
    def enter(self, caller: Caller, key: str, question: bytes) -> None:
        name, now = (caller, key), self.bench.clock.now
        self.kept = {n: kept for n, kept in self.kept.items() if kept[1] > now}
        known = self.open.get(name) or self.kept.get(name)
        try:
            found = self.bench.enter(key, question, caller)
        except BadRequest:
            assert known
            assert known[0] != question
            return
        except KeysFull as e:
            assert not known, "a key that is remembered is never refused for room"
            assert (e.executed, self.is_full(caller)) == (Executed.NO, True)  # noqa: PT017
            return
        except KeyBusy as e:
            assert name in self.open
            assert e.executed is not Executed.NO  # noqa: PT017
            mine = sum(len(w) for (c, _), w in self.waiting.items() if c.address == caller.address)
            everyone = sum(map(len, self.waiting.values()))
            assert len(self.waiting.get(name, ())) == 2 or mine >= 6 - everyone
            return
        assert known is None or known[0] == question
        if isinstance(found, First):
            assert known is None, "it ran twice, or was forgotten early"
            assert not self.is_full(caller)
            self.open[name] = question, found
        elif isinstance(found, Waiter):
            assert name in self.open
            received = Received()
            found.on_done(received)
            self.waiting.setdefault(name, []).append((found, received))
        else:
            answer = self.kept[name][2]
            assert type(found) is AnswerNotKept if answer is None else found == answer

    def is_full(self, caller: Caller) -> bool:
        names = [*self.open, *self.kept]
        mine = [name for name in names if name[0].address == caller.address]
        size = {name: len(kept[2] or b"") for name, kept in self.kept.items()}
        free = 100 - sum(size.values())
        return len(mine) >= 8 - len(names) or sum(size.get(n, 0) for n in mine) >= free

    @precondition(lambda self: self.open)
    @rule(data=st.data(), size=st.integers(0, 60))
    def answer(self, data: st.DataObject, size: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.open)))
        question, first = self.open.pop(name)
        answer, before = b"x" * size, self.bench.keys.kept_bytes
        first.answered(answer)
        is_kept = self.bench.keys.kept_bytes == before + size and size > 0
        self.kept[name] = question, self.bench.clock.now + 600, answer if is_kept else None
        if not size:
            found = self.bench.enter(name[1], question, name[0])
            self.kept[name] = (
                *self.kept[name][:2],
                None if isinstance(found, OverlayError) else b"",
            )
        for _, received in self.waiting.pop(name, ()):
            assert received.outcome == answer
            self.over.append(received)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def refuse(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.open)))
        _, first = self.open.pop(name)
        first.failed(QueueFull("full"))
        for _, received in self.waiting.pop(name, ()):
            assert type(received.outcome) is QueueFull
            self.over.append(received)

    @precondition(lambda self: any(self.waiting.values()))
    @rule(data=st.data(), code=st.sampled_from([Code.CANCELLED, Code.DEADLINE_EXCEEDED]))
    def leave(self, data: st.DataObject, code: Code) -> None:
        name = data.draw(st.sampled_from(sorted(n for n, w in self.waiting.items() if w)))
        waiter, received = self.waiting[name].pop()
        waiter.end(code)
        assert isinstance(received.outcome, CallCancelled | DeadlinePassed)
        self.over.append(received)

    @rule(seconds=st.sampled_from([1, 100, 300, 599, 601]))
    def wait(self, seconds: float) -> None:
        self.bench.clock.advance(seconds)

    @invariant()
    def bounds_hold_and_each_waiter_gets_one_outcome(self) -> None:
        keys = self.bench.keys
        now = self.bench.clock.now
        kept = [kept for kept in self.kept.values() if kept[1] > now]
        assert keys.kept == len(self.open) + len(kept) <= 8
        assert keys.kept_bytes == sum(len(answer or b"") for _, _, answer in kept) <= 100
        assert keys.waiting == sum(map(len, self.waiting.values())) <= 6
        assert all(len(received.outcomes) == 1 for received in self.over)
        assert not any(received.outcomes for some in self.waiting.values() for _, received in some)


TestKeysMachine = KeysMachine.TestCase
TestKeysMachine.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)


# On six real processes.


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Overlay]:
    with own(tmp_path_factory.mktemp("keys")) as overlay:
        yield overlay


@pytest.fixture
def noted(shared: Overlay) -> Overlay:
    """The shared overlay, all of it running, without notes. Each test has its own keys."""
    if gone := [i for i, process in shared.processes.items() if process.poll() is not None]:
        shared.start(*gone)
    forget_notes(shared)
    return shared


def keyed(key: str, payload: bytes = b"x", **fields) -> pb2.Request:
    return pb2.Request(payload=payload, mode=pb2.ANY, idempotency_key=key, **fields)


def test_a_key_is_kept_after_five_large_answers(noted: Overlay) -> None:
    stub, large = noted.stub("D"), bytes(16 * MIB - 1000)
    first = stub.Forward(keyed("first of large", b"0", handler="work"), timeout=10)
    for n in range(5):
        assert len(stub.Forward(keyed(f"large {n}", large), timeout=30).result) > 15 * MIB
    again = stub.Forward(keyed("first of large", b"0", handler="work"), timeout=10)
    assert again == first
    assert len(stub.Forward(keyed("large 0", large), timeout=30).result) > 15 * MIB
    assert len(notes(noted)) == 1


def test_a_new_key_is_refused_while_too_many_answers_are_kept(tmp_path: Path) -> None:
    with own(tmp_path, max_kept_mib=1, key_window_s=5) as overlay:
        new_keys_are_refused_while_too_much_is_kept(overlay)


def new_keys_are_refused_while_too_much_is_kept(overlay: Overlay) -> None:
    stub, large = overlay.stub("A"), bytes(600_000)
    first = stub.Forward(keyed("first", large), timeout=10)

    refused = Outcome(stub.Forward.future(keyed("second", b"0", handler="work"), timeout=10))

    assert (refused.code, refused.refused) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
    assert "127.0.0.1 has 600," in refused.details
    assert "larger max_kept_mib" in refused.details
    assert 0 < codec.retry_after_s(refused.trailers.items()) <= 5
    assert overlay.metrics("A").refused_by_reason["keys full"] == 1
    assert notes(overlay) == []
    assert overlay.ask("A", b"0", handler="work", mode=pb2.ANY).parts
    assert stub.Forward(keyed("first", large), timeout=10) == first
    again = keyed("second", b"0", handler="work")
    until(lambda: Outcome(stub.Forward.future(again, timeout=10)).ok, 15)


def test_repeats_whose_callers_left_hold_no_resources(noted: Overlay) -> None:
    """More repeats than there are threads."""
    stub = noted.stub("A")
    asked = [keyed(f"gate {n}", handler="gate") for n in range(4)]
    firsts = [stub.Forward.future(request, timeout=60) for request in asked]
    until(lambda: len(notes(noted)) == 4)
    repeats = [stub.Forward.future(request, timeout=60) for request in asked for _ in range(95)]
    time.sleep(0.5)
    for repeat in repeats:
        repeat.cancel()
    assert noted.ask("A", timeout=5).result == b"C: hi\nD: hi\nF: hi"
    (noted.folder / "notes.open").touch()
    assert all(Outcome(first).ok for first in firsts)
    assert len(notes(noted)) == 4


def test_a_caller_that_left_gets_its_answer_when_it_asks_again(noted: Overlay) -> None:
    asked = {"mode": "any", "handler": "work", "idempotency_key": "k"}
    with library.connect(noted.address("A")) as client:
        stub = noted.stub("A")
        request = pb2.Request(payload=b"500", mode=pb2.ANY, handler="work", idempotency_key="k")
        call = stub.Forward.future(request, timeout=10)
        until(lambda: notes(noted))
        call.cancel()
        again = client.call(b"500", **asked)
        third = client.call(b"500", **asked)
        with pytest.raises(library.client.InvalidCall, match="was used for another request"):
            client.call(b"501", **asked)
    assert again.result == third.result == notes(noted)[0][0].encode()
    assert len(notes(noted)) == 1


@pytest.mark.parametrize("key", ["", "of a worker that dies"])
def test_a_keyed_request_is_retried_once_when_its_worker_dies(noted: Overlay, key: str) -> None:
    overlay = noted
    request = pb2.Request(payload=b"x", mode=pb2.ANY, handler="gate", idempotency_key=key)
    call = overlay.stub("A").Forward.future(request, timeout=20)
    until(lambda: notes(overlay))
    first = notes(overlay)[0][0]
    overlay.kill(first)
    if not key:
        assert call.exception(10).code() is grpc.StatusCode.UNAVAILABLE
        assert dict(call.trailing_metadata())["overlay-executed"] == "unknown"
        assert len(notes(overlay)) == 1
        return
    until(lambda: len(notes(overlay)) == 2)
    second = notes(overlay)[1][0]
    assert second != first
    overlay.kill(second)  # as if the payload killed its workers: no third one is risked
    error = call.exception(10)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert dict(call.trailing_metadata())["overlay-executed"] == "unknown"
    assert len(notes(overlay)) == 2
    with library.connect(overlay.address("A")) as client:
        with pytest.raises(library.CallFailed) as caught:
            client.call(b"x", mode="any", handler="gate", idempotency_key=key)
        assert caught.value.executed is Executed.UNKNOWN
    assert len(notes(overlay)) == 2


@pytest.mark.parametrize(
    ("route", "request_"),
    [
        (Route(Mode.ANY), pb2.Request(payload=b"x")),
        (Route(team="green"), pb2.Request(payload=b"x")),
        (Route(handler="h"), pb2.Request(payload=b"x")),
        (Route(), pb2.Request(payload=b"y")),
        (Route(), pb2.Request(payload=b"x", want_parts=True)),
    ],
)
def test_a_request_that_differs_in_anything_is_another_question(route, request_):
    plain = _question(Route(), pb2.Request(payload=b"x"))

    assert _question(Route(), pb2.Request(payload=b"x", priority=9)) == plain
    assert _question(route, request_) != plain
