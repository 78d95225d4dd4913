"""Many requests through one client: submit, map, threads, restarts, retries."""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import overlay
from overlay.client import submitter
from overlay.client import sync as library
from overlay.client.outbox import CallKind, Submission
from overlay.client.submitter import Submitter
from overlay.model.segments import Code, Executed, Mode, Part, Route
from overlay.transport.codec import pb2
from tests.client.conftest import Noted, numbers, uppers
from tests.harness.cluster import Overlay, until


@pytest.fixture
def client(six: Noted) -> Iterator[overlay.Client]:
    with overlay.connect(six.address("A")) as found:
        yield found


def _until_full(six: Noted) -> None:
    """Waits until each worker runs as many of one handler as it may: 90 in 100 slots."""
    try:
        until(lambda: six.lines()["began"] == 270)
    except AssertionError:
        found = {w: {h.name: h.active for h in six.overlay.metrics(w).handlers} for w in "CDF"}
        links = {
            i: [
                (n.process_id, n.state, n.outstanding, n.slots)
                for n in six.overlay.metrics(i).neighbours
            ]
            for i in "ABE"
        }
        raise AssertionError(f"not 270: {dict(six.lines())}, {found}, {links}") from None


# submit


def test_submit_returns_a_future_of_the_result(client: overlay.Client) -> None:
    assert client.submit("upper", "hello").result(10) == b"HELLO"
    assert client.submit(None, b"x", mode="all").result(10) == b"C: x\nD: x\nF: x"


def test_a_failed_future_has_the_error_type_of_its_status(client: overlay.Client) -> None:
    error = client.submit("picky", "bad").exception(10)

    assert type(error) is library.HandlerFailed
    assert error.executed is Executed.YES


def test_cancelling_a_future_cancels_its_handler(six: Noted, client: overlay.Client) -> None:
    future = client.submit("patient", "20")
    until(lambda: six.lines()["began"] == 1)

    assert future.cancel()
    until(lambda: six.lines()["cancelled"] == 1)
    assert future.cancelled()


def test_thousands_of_futures_are_cancelled_quickly(six: Noted, client: overlay.Client) -> None:
    futures = [client.submit("patient", "20") for _ in range(6000)]
    _until_full(six)
    began = time.monotonic()

    assert all(future.cancel() for future in futures)
    assert time.monotonic() - began < 15
    until(lambda: six.at_work() == 0, 10)
    until(lambda: client._connection._submitter.open_rows == 0, 10)
    assert six.lines()["done"] == 0


def test_a_request_cancelled_before_it_is_sent_never_runs(
    six: Noted, client: overlay.Client
) -> None:
    first = [client.submit("patient", "20") for _ in range(4096)]  # these fill the window
    _until_full(six)
    late = [client.submit("upper", payload) for payload in numbers(100)]

    assert all(future.cancel() for future in [*late, *first])
    until(lambda: client._connection._submitter.open_rows == 0, 10)
    assert not any(line.startswith("n") for line in six.lines())


def test_a_deadline_is_kept_behind_a_full_window(six: Noted, client: overlay.Client) -> None:
    held = [client.submit("patient", "20") for _ in range(4096)]
    _until_full(six)
    began = time.monotonic()

    with pytest.raises(library.DeadlinePassed) as caught:
        client.submit("upper", "late", timeout=0.5).result(10)

    assert time.monotonic() - began < 10
    assert caught.value.executed is Executed.NO
    for future in held:
        future.cancel()


def test_the_helpers_of_concurrent_futures_work(client: overlay.Client) -> None:
    futures = {client.submit("upper", payload): payload for payload in numbers(50)}

    for future in concurrent.futures.as_completed(futures, timeout=10):
        assert future.result() == futures[future].upper()
    done, open_ = concurrent.futures.wait(futures, timeout=10)
    assert (len(done), len(open_)) == (50, 0)


def test_a_client_works_as_the_executor_of_an_event_loop(client: overlay.Client) -> None:
    async def ask() -> bytes:
        return await asyncio.get_running_loop().run_in_executor(client, "upper", b"hello")

    assert asyncio.run(ask()) == b"HELLO"


def test_the_helpers_of_tqdm_work(client: overlay.Client) -> None:
    tqdm = pytest.importorskip("tqdm")
    helpers = pytest.importorskip("tqdm.contrib.concurrent")
    quiet = {"disable": True}

    bar = tqdm.tqdm(client.map("upper", numbers(100)), total=100, **quiet)
    threads = helpers.thread_map(client.call, numbers(20), max_workers=5, **quiet)

    assert list(bar) == uppers(100)
    assert [answer.result.split(b"\n")[0] for answer in threads] == [
        b"C: " + payload for payload in numbers(20)
    ]


def test_shutdown_waits_for_submitted_requests(six: Noted) -> None:
    client = overlay.connect(six.address("A"))
    future = client.submit("patient", "0.5")

    client.shutdown()

    assert future.result(0) == b"done"


# map


@pytest.mark.parametrize(("window", "chunksize"), [(4096, 0), (1, 0), (7, 3), (100, 1000)])
def test_map_keeps_the_order_and_sends_each_payload_once(
    six: Noted, client: overlay.Client, window: int, chunksize: int
) -> None:
    found = client.map("upper", numbers(300), window=window, chunksize=chunksize)

    assert list(found) == uppers(300)
    assert six.lines() == Counter(payload.decode() for payload in numbers(300))


def test_map_as_completed_gives_each_index_once(client: overlay.Client) -> None:
    payloads = ["0.3" if n % 10 == 0 else "0" for n in range(40)]

    found = [index for index, _ in client.map_as_completed("patient", payloads, chunksize=1)]

    assert sorted(found) == list(range(40))
    assert {0, 10, 20, 30} == set(found[-4:]), "the slow ones are last"


def test_map_raises_a_failure_in_its_place(client: overlay.Client) -> None:
    payloads = itertools.chain(numbers(5), ["bad"], itertools.repeat("more"))
    results = client.map("picky", payloads)

    assert [next(results) for _ in range(5)] == numbers(5)
    with pytest.raises(library.HandlerFailed):
        next(results)


def test_map_as_completed_gives_failures_and_continues(client: overlay.Client) -> None:
    payloads = [b"bad" if n % 3 == 0 else b"%d" % n for n in range(30)]

    found = dict(client.map_as_completed("picky", payloads))

    assert sorted(found) == list(range(30))
    for index, result in found.items():
        wanted = library.HandlerFailed if index % 3 == 0 else bytes
        assert isinstance(result, wanted)


def test_payloads_are_taken_only_as_results_are_consumed(client: overlay.Client) -> None:
    taken = 0

    def payloads() -> Iterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield b"x"

    results = client.map("upper", payloads(), window=100)
    assert taken == 0
    for _ in range(500):
        next(results)

    assert 500 <= taken <= 600
    results.close()


def test_a_pausing_source_does_not_delay_results(client: overlay.Client) -> None:
    given: list[bytes] = []

    def payloads() -> Iterator[Any]:
        for payload in numbers(3):
            yield payload
            end = time.monotonic() + 10
            while len(given) <= int(payload[1:]) and time.monotonic() < end:
                yield library.NOTHING_YET

    for result in client.map("upper", payloads()):
        given.append(result)

    assert given == uppers(3)


def test_the_window_also_limits_bytes(client: overlay.Client) -> None:
    taken = 0

    def payloads() -> Iterator[bytes]:
        nonlocal taken
        for _ in range(130):
            taken += 1
            yield b"x" * 1_000_000

    results = client.map("upper", payloads())
    next(results)

    assert taken < 100, "at most 64 MiB are in flight, not 4,096 payloads"
    assert sum(len(result) for result in results) == 129 * 1_000_000


def test_the_window_limits_running_requests(six: Noted, client: overlay.Client) -> None:
    for _ in client.map("timed", ["0.1"] * 60, window=12):
        pass

    times = [line.split() for line in six.lines().elements()]
    changes = sorted([(int(ended), -1) for _, ended in times] + [(int(b), 1) for b, _ in times])
    assert len(times) == 60
    assert 4 <= max(itertools.accumulate(change for _, change in changes)) <= 12


def test_leaving_a_map_early_cancels_the_rest(six: Noted, client: overlay.Client) -> None:
    for _ in client.map("patient", itertools.chain(["0"], itertools.repeat("20")), window=40):
        until(lambda: six.lines()["began"] == 40, what="the window is at work")
        break

    until(lambda: six.lines()["cancelled"] == 39)
    assert six.at_work() == 0


def test_an_error_in_the_payload_iterator_is_raised_and_cancels_the_rest(
    six: Noted, client: overlay.Client
) -> None:
    def payloads() -> Iterator[str]:
        yield from ["20"] * 10
        until(lambda: six.lines()["began"] == 10)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        list(client.map("patient", payloads(), chunksize=1))

    until(lambda: six.lines()["cancelled"] == 10)


def test_an_incomplete_result_names_the_missing_workers(own: Noted) -> None:
    own.overlay.kill("F")
    with overlay.connect(own.address("A")) as client:
        until(lambda: _is_down(own.overlay, "E", "F"), 10)
        (mapped,) = client.map(None, ["x"], mode="all")
        submitted = client.submit(None, "x", mode="all").result(10)

    for result in (mapped, submitted):
        assert result == b"C: x\nD: x"
        assert isinstance(result, library.Incomplete)
        assert [part.process_id for part in result.missing] == ["F"]


def _is_down(found: Overlay, process_id: str, neighbour: str) -> bool:
    neighbours = found.metrics(process_id).neighbours
    return any(n.process_id == neighbour and n.state == "down" for n in neighbours)


# Threads


def test_fifty_threads_share_one_client(six: Noted, client: overlay.Client) -> None:
    def work(thread: int) -> list[bytes]:
        mine = [b"t%d-%d" % (thread, n) for n in range(20)]
        called = [client.call(p, mode="any", handler="upper").result for p in mine[:10]]
        return called + list(client.map("upper", mine[10:]))

    before = threading.active_count()
    client.call("x")
    with ThreadPoolExecutor(50) as pool:
        found = list(pool.map(work, range(50)))
        threads = threading.active_count()

    assert found == [[b"T%d-%d" % (t, n) for n in range(20)] for t in range(50)]
    assert set(six.lines().values()) == {1}
    assert sum(six.lines().values()) == 1000
    assert threads - before < 50 + 10, "the client has a few threads, not one per call"
    assert six.overlay.metrics("A").streams == 1


def test_closing_ends_each_open_call_once(six: Noted) -> None:
    ended = Counter[concurrent.futures.Future[bytes]]()
    with overlay.connect(six.address("A")) as client:
        futures = [client.submit("patient", "20") for _ in range(5000)]
        _until_full(six)
        for future in futures:
            future.add_done_callback(lambda f: ended.update([f]))

        client.close()
        client.close()

    assert all(isinstance(f.exception(0), library.CallCancelled) for f in futures)
    assert set(ended.values()) == {1}
    until(lambda: six.at_work() == 0, 5)


def test_closing_from_many_threads_ends_every_call(six: Noted) -> None:
    client = overlay.connect(six.address("A"))
    ends = Counter[str]()

    def ask() -> None:
        try:
            while True:
                client.call("x", mode="any", timeout=5)
        except library.CallFailed as e:
            ends[type(e).__name__] += 1

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(20)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    closers = [threading.Thread(target=client.close) for _ in range(3)]
    for thread in closers:
        thread.start()
    for thread in [*threads, *closers]:
        thread.join(10)

    assert not any(thread.is_alive() for thread in threads)
    assert ends == {"CallCancelled": 20}


# Restarts


def test_a_client_survives_a_restart_of_the_leader_and_nothing_runs_twice(own: Noted) -> None:
    with overlay.connect(own.address("A"), patience_s=20) as client:
        assert list(client.map("upper", numbers(100))) == uppers(100)
        held = [client.submit("patient", "20") for _ in range(20)]
        until(lambda: own.lines()["began"] == 20)
        own.overlay.kill("A")
        lost = [future.exception(10) for future in held]
        with ThreadPoolExecutor(1) as pool:
            during = pool.submit(client.call, "during", mode="any", handler="upper", timeout=20)
            own.overlay.start("A")
            assert during.result(20).result == b"DURING"
        after = [b"after%d" % n for n in range(200)]
        assert list(client.map("upper", after)) == [payload.upper() for payload in after]

    assert {type(error) for error in lost} == {library.Unavailable}
    assert {error.executed for error in lost} == {Executed.UNKNOWN}
    lines = own.lines()
    assert lines["began"] == 20, "requests that may have run are not sent again"
    assert all(lines[p.decode()] == 1 for p in [*numbers(100), *after, b"during"])


def test_a_map_reports_the_true_outcome_of_each_payload_if_the_leader_is_killed(own: Noted) -> None:
    payloads = numbers(10_000)
    found: dict[int, bytes | library.CallFailed] = {}
    with overlay.connect(own.address("A"), patience_s=20) as client:
        results = client.map_as_completed("upper", payloads, window=500)
        for index, result in results:
            assert index not in found
            found[index] = result
            if len(found) == 2000:
                own.overlay.kill("A")
                threading.Thread(target=own.overlay.start, args=("A",)).start()

    lines = own.lines()
    assert sorted(found) == list(range(10_000))
    assert max(lines.values()) == 1
    failed = 0
    for index, result in found.items():
        if isinstance(result, bytes):
            assert result == payloads[index].upper()
            assert lines[payloads[index].decode()] == 1
        else:
            failed += 1
            assert isinstance(result, library.Unavailable)
            if result.executed is Executed.NO:
                assert lines[payloads[index].decode()] == 0
    assert failed <= 500, "at most the window has an unknown outcome"


def test_a_map_continues_when_a_lost_leader_is_back(own: Noted) -> None:
    """The leader is away for longer than a call waits; only payloads in flight over it are lost."""
    payloads, pool = numbers(10_000), ThreadPoolExecutor(1)
    found: dict[int, bytes | library.CallFailed] = {}
    with overlay.connect(own.address("A"), patience_s=1, lanes=False) as client, pool:
        for index, result in client.map_as_completed("upper", payloads, window=500):
            assert index not in found
            found[index] = result
            if len(found) == 2000:
                again = pool.submit(killed_and_started, own, 1.5)
        again.result()

    check_map_over_a_loss(own, payloads, found)


def killed_and_started(own: Noted, after_s: float) -> None:
    own.overlay.kill("A")
    time.sleep(after_s)
    own.overlay.start("A")


def check_map_over_a_loss(
    own: Noted, payloads: list[bytes], found: dict[int, bytes | library.CallFailed]
) -> None:
    lines = own.lines()
    assert sorted(found) == list(range(len(payloads)))
    assert max(lines.values()) == 1, "nothing runs twice"
    lost = {index: result for index, result in found.items() if not isinstance(result, bytes)}
    assert 0 < len(lost) <= 500, "at most the window was in flight"
    assert {result.executed for result in lost.values()} == {Executed.UNKNOWN}  # type: ignore[union-attr]
    assert all(found[i] == payloads[i].upper() for i in found if i not in lost)


def test_a_map_ends_after_the_sent_payloads_if_the_leader_stays_away(own: Noted) -> None:
    with overlay.connect(own.address("A")) as client:
        payloads = itertools.repeat("x")
        results = client.map_as_completed("upper", payloads, window=100, patience_s=1, timeout=3600)
        found = [next(results) for _ in range(500)]
        own.overlay.kill("A")
        began = time.monotonic()
        with pytest.raises(library.NotReached) as caught:
            found.extend(results)
        took_s = time.monotonic() - began

    good = sum(isinstance(result, bytes) for _, result in found)
    assert sorted(index for index, _ in found) == list(range(len(found)))
    assert f"; {good:,} payloads were answered, " in str(caught.value)
    assert 1 <= took_s < 15


def test_payloads_that_a_lost_leader_never_got_are_reported_as_not_run(own: Noted) -> None:
    """The map's window is larger than the stream's, so that some payloads are still unsent."""
    with overlay.connect(own.address("A")) as client:
        payloads = ["3"] * 6000
        results = client.map_as_completed("patient", payloads, window=6000, patience_s=1)
        found = [next(results) for _ in range(1)]
        own.overlay.kill("A")
        with pytest.raises(library.NotReached) as caught:
            found.extend(results)

    failed = [result for _, result in found if isinstance(result, library.CallFailed)]
    unsent = sum(result.executed is Executed.NO for result in failed)
    assert sorted(index for index, _ in found) == list(range(len(found)))
    assert unsent >= len(found) - submitter.WINDOW_ROWS - 300  # those that had already ended
    assert f", {len(failed) - unsent:,} failed, {unsent:,} were not sent" in str(caught.value)


@pytest.mark.skipif(os.name == "nt", reason="there, terminate() is a kill")
def test_requests_to_a_stopping_worker_go_to_others(own: Noted) -> None:
    payloads = numbers(3000)
    with overlay.connect(own.address("A")) as client:
        found: list[bytes] = []
        for result in client.map("upper", payloads, window=200):
            found.append(result)
            if len(found) == 500:
                own.overlay.processes["C"].send_signal(signal.SIGTERM)

    assert found == [payload.upper() for payload in payloads]
    assert set(own.lines().values()) == {1}
    assert own.overlay.processes["C"].wait(30) == 0


# Retries, on a stream whose server is simulated here, frame by frame


class Played:
    """A Submitter whose stream is replaced: `answer` answers each segment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
        self.asked: list[tuple[int, int]] = []  # rows of a segment, its attempt
        self._answer = answer
        self._pending: list[pb2.Slice] = []
        played = self

        class PlayedPipe:
            rests = False

            def __init__(
                self, channel: Any, name: str, fill: Any, receive: Any, *more: Any, **options: Any
            ) -> None:
                self.fill, self.receive = fill, receive
                self.lost, self.live, self.patience_s = more
                played.pipe = self
                self.kicked = threading.Event()
                self.ended = False
                self.thread = threading.Thread(target=self.run, daemon=True)

            def start(self) -> None:
                self.thread.start()

            def kick(self) -> None:
                self.kicked.set()

            def send_now(self) -> None: ...

            def end(self) -> None:
                self.ended = True
                self.kicked.set()
                self.thread.join(2)

            def run(self) -> None:
                self.live({})
                while not self.ended:
                    self.kicked.wait()
                    self.kicked.clear()
                    frame = pb2.Frame()
                    while self.fill(frame):
                        self.receive(played.answers_to(frame))
                        frame = pb2.Frame()

        monkeypatch.setattr(submitter, "ReconnectingStream", PlayedPipe)
        self.submitter = Submitter(None, "played")  # type: ignore[arg-type]
        self.submitter.start()

    def answers_to(self, frame: pb2.Frame) -> pb2.Frame:
        answer = pb2.Frame()
        for segment in frame.segments:
            self.asked.append((segment.count, segment.attempt))
            self._answer(segment, answer)
        return answer

    def ask(self, count: int = 1, within_s: float = 5.0) -> list[Any]:
        delivered: list[Any] = [None] * count
        submission = Submission(
            CallKind(Route(Mode.ANY)),
            numbers(count),
            time.monotonic() + within_s,
            lambda rows, what, at, id_: [delivered.__setitem__(row, what) for row in rows],
        )
        self.submitter.send(submission)
        until(lambda: None not in delivered, within_s + 1)
        return delivered


def refusing(executed: Executed, code: Code = Code.UNAVAILABLE, retry_after_ms: int = 10) -> Any:
    def answer(segment: pb2.Segment, frame: pb2.Frame) -> None:
        slice_ = frame.slices.add(number=segment.number, start=0, count=segment.count)
        slice_.failures.add(
            code=code, reason="no", executed=int(executed), retry_after_ms=retry_after_ms
        )

    return answer


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    made: list[Played] = []

    def make(answer: Any) -> Played:
        made.append(Played(monkeypatch, answer))
        return made[-1]

    yield make
    for one in made:
        one.submitter.close()


def test_a_request_that_provably_did_not_run_is_retried_a_few_times(played: Any) -> None:
    stream = played(refusing(Executed.NO))

    (failure,) = stream.ask()

    assert failure.executed is Executed.NO
    assert stream.asked == [(1, attempt) for attempt in range(submitter.RETRIES + 1)]


@pytest.mark.parametrize("executed", [Executed.UNKNOWN, Executed.YES])
def test_a_request_that_may_have_run_is_not_retried(played: Any, executed: Executed) -> None:
    stream = played(refusing(executed))

    stream.ask()

    assert stream.asked == [(1, 0)]


def test_an_invalid_request_is_not_retried(played: Any) -> None:
    stream = played(refusing(Executed.NO, Code.NOT_FOUND))

    stream.ask()

    assert stream.asked == [(1, 0)]


def test_a_retry_waits_for_the_requested_time(played: Any) -> None:
    stream = played(refusing(Executed.NO, retry_after_ms=800))
    began = time.monotonic()

    stream.ask(within_s=1.5)

    assert len(stream.asked) == 2, "the second retry would have come after the deadline"
    assert time.monotonic() - began >= 0.8


def test_an_urgent_request_overtakes_those_waiting_for_the_window(played: Any) -> None:
    held: list[pb2.Segment] = []
    stream = played(lambda segment, frame: held.append(segment))
    delivered: list[Any] = []

    def send(payload: bytes, count: int, priority: int) -> None:
        kind = CallKind(Route(Mode.ANY), priority=priority)
        deadline, keep = time.monotonic() + 30, lambda *what: delivered.append(what)
        stream.submitter.send(Submission(kind, (payload,) * count, deadline, keep))

    send(b"a", 4000, 0)
    send(b"b", 4000, 0)
    until(lambda: sum(segment.count for segment in held) == submitter.WINDOW_ROWS)
    send(b"c", 1, 2)
    send(b"d", 1, 9)
    full = held.copy()
    answer = pb2.Frame()
    slice_ = answer.slices.add(number=full[0].number, start=0, count=full[0].count)
    slice_.results.items.extend([b""] * full[0].count)
    stream.submitter._receive(answer)
    until(lambda: len(held) > len(full) + 2)

    later = [(s.priority, s.payloads.items[0]) for s in held[len(full) :]]
    assert later[:3] == [(9, b"d"), (2, b"c"), (0, b"b")]


def test_requests_returned_by_a_stopping_process_wait_for_the_next_stream(played: Any) -> None:
    def answer(segment: pb2.Segment, frame: pb2.Frame) -> None:
        if len(stream.asked) == 1:
            frame.stopping = True
            refusing(Executed.NO)(segment, frame)
        elif len(stream.asked) == 2:
            frame.slices.add(number=segment.number, count=segment.count).results.items.extend(
                segment.payloads.items
            )

    stream = played(answer)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(stream.ask, 2000)
        until(
            lambda: stream.submitter.open_rows == 2000 and not stream.submitter.connected.is_set()
        )
        stream.pipe.lost(Part("", Code.UNAVAILABLE, "A is stopping", executed=Executed.NO))
        assert stream.asked == [(2000, 0)]
        stream.pipe.live({})
        delivered = asked.result()

    assert stream.asked[1:] == [(2000, 0)], "this uses neither an attempt nor the budget"
    assert [one.results[row] for row, one in enumerate(delivered)] == numbers(2000)


def test_requests_not_read_by_a_stopping_process_wait_for_the_next_stream(played: Any) -> None:
    def answer(segment: pb2.Segment, frame: pb2.Frame) -> None:
        if len(stream.asked) > 1:
            frame.slices.add(number=segment.number, count=segment.count).results.items.extend(
                segment.payloads.items
            )

    stream = played(answer)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(stream.ask, 3)
        until(lambda: stream.asked == [(3, 0)])
        stream.pipe.lost(Part("", Code.UNAVAILABLE, "A is stopping", executed=Executed.NO))
        stream.pipe.live({})
        delivered = asked.result()

    assert stream.asked[1:] == [(3, 0)]
    assert [one.results[row] for row, one in enumerate(delivered)] == numbers(3)


def test_retries_have_a_budget(played: Any) -> None:
    stream = played(refusing(Executed.NO))

    stream.ask(2000)

    retried = sum(rows for rows, attempt in stream.asked if attempt)
    # RETRY_SHARE of the requests, retries not counted, and the initial budget.
    assert 180 <= retried <= 2000 * submitter.RETRY_SHARE + submitter.MIN_RETRIES
    assert retried <= 200
