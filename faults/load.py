"""An open-loop load: calls are sent by a schedule, and every answer is recorded.

Three ways: "unary", a Forward each; "stream", all on one ForwardStream, which is reopened when it
ends; "library", the client library's Futures. The first two use plain gRPC, so that nothing hides
an answer. Calls with an idempotency key are unary, and are repeated with it when they are lost.

Owns the threads "pulse", "stream", "stream-clock" and "library", from `start` to `close`.
"""

from __future__ import annotations

import itertools
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import grpc

from faults.checker import SILENT_S
from faults.history import Answer, Call, Cancel, Look, Stall, Submit
from overlay.client.sync import CallFailed, Incomplete
from overlay.model.segments import Code
from overlay.transport import codec
from overlay.transport.codec import pb2, pb2_grpc
from tests.harness.cluster import Overlay
from tests.harness.machine import until

STALL_S = 0.1  # if the pulse is this late, the bench did not get the CPU
LIBRARY_THREADS = 1000  # up to 200 such calls a second, which wait at most 3 s
TRY_AGAIN_S = 0.1  # the pause of a client that retries and ignores retry-after
WAYS = ("unary", "stream", "library")
EXECUTED = {0: "unknown", 1: "no", 2: "yes"}
REPEATS = 2  # of a call with an idempotency key, at most


@dataclass(frozen=True)
class Planned:
    """A scheduled call.

    after_s: from the start. named: it has a request id. again: it has the id and payload of the
    call before it. keyed: it has an idempotency key; "same": that of the call before it.
    insists: it is repeated even after an answer. Of unary calls only: caller, the caller's name,
    and tries, the retries after a failure without a key.
    """

    after_s: float
    mode: str
    way: str
    team: str
    handler: str
    nap_ms: int
    timeout_s: float
    named: bool = False
    again: bool = False
    keyed: Literal["", "new", "same"] = ""
    insists: bool = False
    size: int = 0  # bytes of payload, at least
    caller: str = ""
    tries: int = 0


LONG = Planned(0, "any", "unary", "", "work", nap_ms=3000, timeout_s=10)
LONG_S = 3.5  # until it has ended everywhere


def evenly(rate: float, seconds: float, like: Planned) -> list[Planned]:
    """`rate` equal calls a second."""
    return [replace(like, after_s=number / rate) for number in range(int(rate * seconds))]


@dataclass(frozen=True)
class Mixture:
    """A mix of calls. rate: per second. ways, teams: of which each call has one. repeats: the share
    that is sent twice. keyed: the share of the others with an idempotency key. long_first: each
    team first gets a call that takes 3 s. clients: of the library, which take turns."""

    rate: float = 60
    nap_ms: tuple[int, int] = (2, 40)
    timeouts_s: Sequence[float] = (0.5, 2, 5)
    ways: Sequence[str] = WAYS
    teams: Sequence[str] = ("", "", "green", "pink")
    handlers: Sequence[str] = ("work",)
    all_share: float = 0.3
    repeats: float = 0.0
    keyed: float = 0.2
    long_first: bool = False
    clients: int = 1

    @property
    def longest_s(self) -> float:
        """The longest timeout of its calls."""
        return max([*self.timeouts_s, LONG.timeout_s if self.long_first else 0.0])

    def plan(self, seconds: float, rng: random.Random) -> list[Planned]:
        """The same seed gives the same calls."""
        planned: list[Planned] = []
        if self.long_first:
            planned += [replace(LONG, team=team) for team in ("", "green", "pink")]
        begin = LONG_S if self.long_first else 0.0
        for number in range(int(self.rate * seconds)):
            call = Planned(
                after_s=begin + number / self.rate,
                mode="all" if rng.random() < self.all_share else "any",
                way=rng.choice(self.ways),
                team=rng.choice(self.teams),
                handler=rng.choice(self.handlers),
                nap_ms=rng.randint(*self.nap_ms),
                timeout_s=rng.choice(self.timeouts_s),
            )
            if rng.random() < self.repeats:
                planned += _sent_twice(call, rng)
            elif rng.random() < self.keyed:
                planned += _with_a_key(call, rng)
            else:
                planned.append(call)
        return planned


def _sent_twice(call: Planned, rng: random.Random) -> list[Planned]:
    # In a team of one worker, because another worker could not know the id.
    way = rng.choice(WAYS[:2])  # the library never reuses an id
    call = replace(call, mode="any", way=way, team="green", timeout_s=5, named=True)
    return [call, _soon_after(call, again=True)]


def _with_a_key(call: Planned, rng: random.Random) -> list[Planned]:
    """Once, repeated after its answer, twice at the same time, or with a different payload."""
    call = replace(call, way="unary", keyed="new", insists=rng.random() < 0.2)
    kind = rng.random()
    if kind < 0.2:
        return [call, _soon_after(call, again=True, keyed="same")]
    if kind < 0.3:
        return [call, _soon_after(call, keyed="same")]
    return [call]


def _soon_after(call: Planned, **fields: Any) -> Planned:
    return replace(call, after_s=call.after_s + 0.002, insists=False, **fields)


class Notes:
    """Calls and answers, jobs and what was told of them, from any thread."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.answers: list[Answer] = []
        self.stalls: list[Stall] = []
        self.submits: list[Submit] = []
        self.looks: list[Look] = []
        self.cancels: list[Cancel] = []
        self._open: set[int] = set()
        self._lock = threading.Lock()

    def asked(self, call: Call) -> None:
        with self._lock:
            self.calls.append(call)
            self._open.add(call.id)

    def answered(self, answer: Answer) -> None:
        with self._lock:
            self.answers.append(answer)
            self._open.discard(answer.id)

    @property
    def open(self) -> int:
        return len(self._open)


class Load:
    """A client of process `asked`. scope: team -> its workers; "" means all."""

    def __init__(
        self,
        overlay: Overlay,
        notes: Notes,
        first_id: int,
        scope: Mapping[str, Sequence[str]],
        asked: str = "A",
        clients: int = 1,
    ) -> None:
        self._notes = notes
        self._scope = scope
        self._asked = asked
        self._ids = itertools.count(first_id)
        self._key = 0
        self._idempotency = ""
        self._again: deque[tuple[float, Planned]] = deque()  # when due, in this order
        self._base = random.getrandbits(40) << 20  # of our request ids
        self._closed = threading.Event()
        self._channel = overlay.new_channel(asked)
        self._stub = pb2_grpc.OverlayNodeStub(self._channel)
        self._stream = _Stream(self._stub, notes, self._closed)
        self._library = [overlay.connect(asked) for _ in range(clients)]
        # The library's submit waits for a connection, which must not delay the schedule.
        self._submitting = ThreadPoolExecutor(LIBRARY_THREADS, "library")

    def start(self) -> None:
        """Waits until its stream is open. Raises NotReached."""
        self._stream.start()
        until(lambda: self._stream.is_up, 10, "the stream is served")
        threading.Thread(target=self._pulse, name="pulse", daemon=True).start()

    def run(self, planned: Sequence[Planned]) -> None:
        """Sends each call when it is due."""
        began = time.monotonic()
        for call in planned:
            due = began + call.after_s
            self._wait(due)
            self.send(call, due)

    def keep(self, open_: int, like: Planned, seconds: float) -> None:
        """A closed loop: keeps `open_` calls in flight."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for _ in range(open_ - self._notes.open):
                self.send(like)
            time.sleep(0.001)

    def _wait(self, due: float) -> None:
        """Waits, and sends the retries that are due meanwhile."""
        while True:
            now = time.monotonic()
            if self._again and self._again[0][0] <= now:
                again_due, call = self._again.popleft()
                self.send(call, again_due)
            elif (left := due - now) > 0:
                time.sleep(min(left, 0.005))
            else:
                return

    def send(self, planned: Planned, due: float | None = None) -> Call:
        id_ = next(self._ids)
        self._key = self._key if planned.again else id_
        if planned.keyed == "new":
            self._idempotency = f"{self._base}-{id_}"
        at = time.monotonic()
        call = Call(
            id=id_,
            key=self._key,
            due=at if due is None else due,
            at=at,
            deadline=at + planned.timeout_s,
            mode=planned.mode,
            way=planned.way,
            team=planned.team,
            handler=planned.handler,
            asked=self._asked,
            idempotency=self._idempotency if planned.keyed else "",
        )
        self._notes.asked(call)
        payload = f"{call.key} {planned.nap_ms}".encode().ljust(planned.size)
        request_id = self._base + call.key if planned.named else 0
        if planned.way == "unary":
            self._send_unary(call, planned, payload, request_id)
        elif planned.way == "stream":
            self._stream.send(call, payload, request_id)
        else:
            self._submitting.submit(self._send_library, call, payload)
        return call

    def close(self) -> None:
        self._closed.set()
        self._stream.close()
        for client in self._library:
            client.close()
        self._submitting.shutdown(cancel_futures=True)
        self._channel.close()

    def _send_unary(self, call: Call, planned: Planned, payload: bytes, request_id: int) -> None:
        request = pb2.Request(
            payload=payload,
            mode=call.mode.upper(),
            team=call.team,
            handler=call.handler,
            request_id=request_id,
            idempotency_key=call.idempotency,
        )
        more = REPEATS if call.idempotency else 0
        self._ask(call, planned, request, more, planned.insists)

    def _ask(
        self,
        call: Call,
        planned: Planned,
        request: pb2.Request,
        more: int,
        insists: bool,
        patient: bool = False,
    ) -> None:
        """more: how often it may be repeated. patient: it waits for the connection."""
        future = self._stub.Forward.future(
            request,
            timeout=call.deadline - call.at,
            wait_for_ready=patient,
            metadata=((codec.CALLER_KEY, planned.caller),) if planned.caller else (),
        )
        future.add_done_callback(partial(self._ended, call, planned, request, more, insists))

    def _ended(
        self,
        call: Call,
        planned: Planned,
        request: pb2.Request,
        more: int,
        insists: bool,
        future: Any,
    ) -> None:
        answer = _of_unary(call, time.monotonic(), future)
        if more and (insists or answer.by == "client") and not self._closed.is_set():
            now, timeout_s = time.monotonic(), call.deadline - call.at
            again = replace(call, id=next(self._ids), due=now, at=now, deadline=now + timeout_s)
            self._notes.asked(again)
            self._ask(again, planned, request, more - 1, False, patient=True)
        if planned.tries and answer.code != "OK":
            tried = replace(planned, tries=planned.tries - 1)
            self._again.append((answer.at + TRY_AGAIN_S, tried))
        self._notes.answered(answer)

    def _send_library(self, call: Call, payload: bytes) -> None:
        timeout_s = max(0.001, call.deadline - time.monotonic())
        how: Any = {"mode": call.mode, "team": call.team, "timeout": timeout_s}
        try:
            client = self._library[call.id % len(self._library)]
            future = client.submit(call.handler, payload, **how)
        except CallFailed as e:
            self._notes.answered(_of_failure(call, e))
        else:
            future.add_done_callback(partial(self._library_ended, call))

    def _library_ended(self, call: Call, future: Future[bytes]) -> None:
        try:
            result = future.result(0)
        except CallFailed as e:
            self._notes.answered(_of_failure(call, e))
        else:
            scope = self._scope[call.team]
            self._notes.answered(_of_bytes(call, time.monotonic(), result, scope))

    def _pulse(self) -> None:
        while not self._closed.is_set():
            slept = time.monotonic()
            time.sleep(0.02)
            if time.monotonic() - slept > STALL_S:
                self._notes.stalls.append(Stall(slept, time.monotonic()))


class _Stream:
    """One ForwardStream after another; records each answer as it arrives."""

    def __init__(self, stub: Any, notes: Notes, closed: threading.Event) -> None:
        self._stub = stub
        self._notes = notes
        self._closed = closed
        self._lock = threading.Lock()
        self._frames: queue.SimpleQueue[pb2.Frame | None] | None = None
        self._open: dict[int, Call] = {}
        self._given_up: dict[int, Call] = {}

    def start(self) -> None:
        for name, work in (("stream", self._run), ("stream-clock", self._watch)):
            threading.Thread(target=work, name=name, daemon=True).start()

    @property
    def is_up(self) -> bool:
        return self._frames is not None

    def send(self, call: Call, payload: bytes, request_id: int) -> None:
        frame = pb2.Frame()
        frame.segments.add(
            number=call.id,
            count=1,
            payloads=pb2.Column(items=[payload]),
            remaining_us=max(1, int((call.deadline - time.monotonic()) * 1e6)),
            first_id=request_id,
            mode=call.mode.upper(),
            team=call.team,
            handler=call.handler,
        )
        with self._lock:
            frames = self._frames
            if frames is not None:
                self._open[call.id] = call
                frames.put(frame)
        if frames is None:  # it was never sent
            self._give_up(call, "UNAVAILABLE", "no", "the stream is not up")

    def close(self) -> None:
        with self._lock:
            if self._frames is not None:
                self._frames.put(None)

    def _run(self) -> None:
        while not self._closed.is_set():
            frames: queue.SimpleQueue[pb2.Frame | None] = queue.SimpleQueue()
            reason = "the stream was ended"
            try:
                answers = self._stub.ForwardStream(iter(frames.get, None), wait_for_ready=True)
                answers.initial_metadata()  # waits until the server has accepted it
                with self._lock:
                    self._frames = frames
                for frame in answers:
                    for made in frame.slices:
                        self._take(made, time.monotonic())
            except (grpc.RpcError, ValueError) as e:  # ValueError: our channel is closed
                reason = getattr(e, "details", str)() or str(e)
            frames.put(None)
            self._lost(reason)
            self._closed.wait(0.1)

    def _lost(self, reason: str) -> None:
        with self._lock:
            self._frames = None
            lost, self._open, self._given_up = list(self._open.values()), {}, {}
        for call in lost:
            self._give_up(call, "UNAVAILABLE", "unknown", reason)

    def _watch(self) -> None:
        """Gives up calls without an answer well after their deadlines."""
        while not self._closed.wait(0.05):
            now = time.monotonic()
            with self._lock:
                silent = [c for c in self._open.values() if now > c.deadline + SILENT_S]
                for call in silent:
                    self._given_up[call.id] = self._open.pop(call.id)
            for call in silent:
                self._give_up(call, "DEADLINE_EXCEEDED", "unknown", "given up")

    def _give_up(self, call: Call, code: str, executed: str, reason: str) -> None:
        at = time.monotonic()
        self._notes.answered(Answer(call.id, at, code, "client", executed, reason=reason))

    def _take(self, made: pb2.Slice, at: float) -> None:
        with self._lock:
            call = self._open.pop(made.number, None)
            if call is None and self._given_up.pop(made.number, None) is not None:
                return  # already recorded by _give_up, so this is not a second answer
        # Without a call it is a second answer, which the checker must see.
        self._notes.answered(_of_slice(made, at))


def _of_unary(call: Call, at: float, future: Any) -> Answer:
    trailers = dict(future.trailing_metadata() or ())
    if not future.cancelled() and future.exception() is None:
        return _of_response(call, at, future.result(), trailers)
    executed = trailers.get(codec.EXECUTED_KEY)
    code, by = future.code().name, "overlay" if executed else "client"
    reason = str(future.details())
    return Answer(call.id, at, code, by, executed or "unknown", reason=reason)


def _of_response(call: Call, at: float, response: pb2.Response, trailers: Any) -> Answer:
    return Answer(
        id=call.id,
        at=at,
        code="OK",
        executed="yes",
        coverage=trailers.get(codec.COVERAGE_KEY, ""),
        parts=tuple(
            (p.process_id, Code(p.code).name, EXECUTED[p.executed]) for p in response.parts
        ),
        result=response.result.decode(errors="replace"),
    )


def _of_failure(call: Call, error: CallFailed) -> Answer:
    code, executed = error.code.name, error.executed.name.lower()
    return Answer(call.id, time.monotonic(), code, executed=executed, reason=str(error))


def _of_bytes(call: Call, at: float, result: bytes, scope: Sequence[str]) -> Answer:
    """A library's Future has the missing workers; the result has those that answered."""
    text = result.decode(errors="replace")
    answered = {line.partition(" ")[0] for line in text.splitlines()}
    parts = {worker: (worker, "OK", "yes") for worker in answered}
    for part in result.missing if isinstance(result, Incomplete) else ():
        parts[part.process_id] = part.process_id, part.code.name, part.executed.name.lower()
    ordered = tuple(parts[worker] for worker in scope if worker in parts)
    return Answer(call.id, at, "OK", executed="yes", parts=ordered, result=text)


def _of_slice(made: pb2.Slice, at: float) -> Answer:
    parts = tuple(_of_part(part) for part in made.parts)
    if made.failures:
        failure = made.failures[0]
        code, executed = Code(failure.code).name, EXECUTED[failure.executed]
        answer = Answer(made.number, at, code, "overlay", executed, reason=failure.reason)
        return replace(answer, parts=parts)
    result = made.results.items[0].decode(errors="replace") if made.results.items else ""
    return Answer(made.number, at, "OK", "overlay", "yes", parts=parts, result=result)


def _of_part(part: pb2.PartSlice) -> tuple[str, str, str]:
    if not part.failures:
        return part.process_id, "OK", "yes"
    failure = part.failures[0]
    return part.process_id, Code(failure.code).name, EXECUTED[failure.executed]
