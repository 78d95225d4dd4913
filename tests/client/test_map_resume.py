"""Maps that go on from the results in a file: both clients, with a real process.

tests/client/test_resume.py has the file itself, tests/cli/test_map_resume.py the command.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import overlay
from overlay.client import aio, resume
from overlay.client import sync as library
from overlay.client.arguments import call_kind
from tests.harness.cluster import Overlay, free_port, running_one, until

HANDLERS = """
import pathlib, time

HERE = pathlib.Path(__file__).parent

def _note(text):
    with open(HERE / "ran", "a") as file:
        file.write(text + "\\n")

def upper(payload, context):
    _note(payload.decode())
    until = time.monotonic() + 20
    while payload.startswith(b"held") and not (HERE / "go").exists() and not context.cancelled:
        assert time.monotonic() < until
        time.sleep(0.01)
    return payload.upper()

def picky(payload, context):
    _note(payload.decode())
    if payload.startswith(b"bad") and not (HERE / "good").exists():
        raise ValueError(payload)
    return payload

def square(number: int) -> int:
    _note(str(number))
    return number * number
"""


class Worker:
    """One process, asked directly, and what its handlers noted."""

    def __init__(self, found: Overlay) -> None:
        self.address = found.address("C")
        self.folder = found.folder

    def ran(self) -> Counter[str]:
        path = self.folder / "ran"
        return Counter(path.read_text().splitlines()) if path.exists() else Counter()

    def forget(self) -> None:
        for name in ("ran", "go", "good"):
            (self.folder / name).unlink(missing_ok=True)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    folder = tmp_path_factory.mktemp("resume")
    with running_one(folder, HANDLERS, ["upper", "picky", "square"]) as found:
        yield Worker(found)


@pytest.fixture
def worker(shared: Worker) -> Worker:
    shared.forget()
    return shared


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "results"


class Runs:
    """One client or the other. Each call is a program of its own: it connects and closes."""

    def __init__(self, is_async: bool) -> None:
        self.is_async = is_async

    def __call__(
        self, address: str, *words: Any, verb: str = "map", stop: int | None = None, **options: Any
    ) -> list[Any]:
        """All results, or the first `stop`; the map is left then."""
        found: list[Any] = []
        self.into(found, address, *words, verb=verb, stop=stop, **options)
        return found

    def into(
        self,
        found: list[Any],
        address: str,
        *words: Any,
        verb: str = "map",
        stop: int | None = None,
        **options: Any,
    ) -> None:
        if self.is_async:
            asyncio.run(self._into_async(found, address, words, verb, stop, options))
            return
        with overlay.connect(address, patience_s=0.5) as client:
            results = getattr(client, verb)(*words, **options)
            with contextlib.closing(results):
                found += itertools.islice(results, stop)

    async def _into_async(
        self,
        found: list[Any],
        address: str,
        words: tuple[Any, ...],
        verb: str,
        stop: int | None,
        options: dict[str, Any],
    ) -> None:
        async with overlay.connect_async(address, patience_s=0.5) as client:
            results = getattr(client, verb)(*words, **options)
            async with contextlib.aclosing(results):
                async for result in results:
                    found.append(result)
                    if len(found) == stop:
                        break


@pytest.fixture(params=["threads", "asyncio"])
def mapped(request: pytest.FixtureRequest) -> Runs:
    return Runs(request.param == "asyncio")


def numbers(count: int) -> list[bytes]:
    return [b"n%d" % n for n in range(count)]


def uppers(count: int) -> list[bytes]:
    return [b"N%d" % n for n in range(count)]


def recorded(file: Path, handler: str = "upper", has_values: bool = False) -> dict[int, bytes]:
    """The results in a copy of the file, which may be in use."""
    folder = file.parent / "copy"
    folder.mkdir(exist_ok=True)
    for path in file.parent.glob(f"{file.name}*"):
        shutil.copy(path, folder)
    record = resume.open_record(
        str(folder / file.name), call_kind("any", "", handler, False, 0), has_values
    )
    with contextlib.closing(record):
        known = [index for index, _ in record._known(0, record.last + 1)]
        results = {index: record.result(index) for index in known}
    shutil.rmtree(folder)
    return results


def test_a_map_that_was_left_goes_on_without_what_is_recorded(
    worker: Worker, file: Path, mapped: Runs
) -> None:
    first = mapped(worker.address, "upper", numbers(300), window=20, stop=100, resume=file)
    before = recorded(file)
    second = mapped(worker.address, "upper", numbers(300), window=20, resume=file)

    assert first == uppers(100)
    assert second == uppers(300)
    assert len(before) >= 100
    ran = worker.ran()
    assert {ran[f"n{index}"] for index in before} == {1}
    assert set(ran) == {f"n{index}" for index in range(300)}
    assert sum(ran.values()) <= 320, "only what was in flight runs twice"
    assert recorded(file) == dict(enumerate(uppers(300)))


def test_a_map_that_is_done_needs_no_process(worker: Worker, file: Path, mapped: Runs) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    mapped(worker.address, "upper", numbers(3000), resume=file)

    again = mapped(nobody, "upper", iter(numbers(3000)), resume=str(file))
    pairs = mapped(nobody, "upper", numbers(3000), verb="map_as_completed", resume=file)

    assert again == uppers(3000)
    assert pairs == list(enumerate(uppers(3000)))
    assert set(worker.ran().values()) == {1}


def test_without_a_process_what_is_recorded_is_given_before_the_error(
    worker: Worker, file: Path, mapped: Runs
) -> None:
    mapped(worker.address, "upper", numbers(1000), resume=file)
    found: list[bytes] = []

    with pytest.raises(library.NotReached):
        mapped.into(found, f"127.0.0.1:{free_port()}", "upper", numbers(2000), resume=file)

    assert found[:512] == uppers(512)
    assert found == uppers(len(found))


def test_failures_are_tried_again(worker: Worker, file: Path, mapped: Runs) -> None:
    mixed = [b"bad%d" % n if n % 3 else b"good%d" % n for n in range(60)]
    how = {"verb": "map_as_completed", "resume": file}
    first = dict(mapped(worker.address, "picky", mixed, **how))
    (worker.folder / "good").touch()
    second = dict(mapped(worker.address, "picky", mixed, **how))

    failed = [index for index, result in first.items() if not isinstance(result, bytes)]
    assert failed
    assert all(mixed[index].startswith(b"bad") for index in failed)
    assert second == dict(enumerate(mixed))
    ran = worker.ran()
    assert all(ran[mixed[n].decode()] == (2 if n in failed else 1) for n in range(60))


def test_a_failure_in_its_place_keeps_the_results_of_the_others(
    worker: Worker, file: Path, mapped: Runs
) -> None:
    found: list[bytes] = []
    with pytest.raises(library.HandlerFailed):
        mapped.into(found, worker.address, "picky", [*numbers(50), b"bad"], window=5, resume=file)

    assert found == numbers(50)
    assert recorded(file, "picky") == dict(enumerate(numbers(50)))


def test_recorded_results_come_at_once_or_in_their_order(
    worker: Worker, file: Path, mapped: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    for client in (library, aio):
        monkeypatch.setattr(client, "CHECK_S", 60)  # it does not wait for what is sent
    began = time.monotonic()
    with_gap = [*numbers(5), b"held", *numbers(5)]
    kind = call_kind("any", "", "upper", False, 0)
    with contextlib.closing(resume.open_record(str(file), kind, False)) as record:
        digests, _ = record.look_up(0, with_gap)
        for index in (*range(5), *range(6, 11)):
            record.add(index, digests[index], b"recorded")
    how = {"window": 6, "chunksize": 3, "resume": file}

    early = mapped(
        worker.address, "upper", with_gap, verb="map_as_completed", stop=10, **how
    )  # leaves the one that is held
    (worker.folder / "go").touch()
    in_order = mapped(worker.address, "upper", with_gap, **how)

    assert time.monotonic() - began < 15
    assert early == [(index, b"recorded") for index in (*range(5), *range(6, 11))]
    assert in_order == [b"recorded"] * 5 + [b"HELD"] + [b"recorded"] * 5
    assert set(worker.ran()) == {"held"}


def test_lazy_and_asynchronous_payloads_go_on_too(worker: Worker, file: Path) -> None:
    async def lazily(count: int) -> AsyncIterator[bytes]:
        for payload in numbers(count):
            await asyncio.sleep(0)
            yield payload

    taken = 0

    def endless() -> Iterator[bytes]:
        nonlocal taken
        for taken in itertools.count(1):
            yield b"n%d" % (taken - 1)

    runs = Runs(is_async=True)
    assert runs(worker.address, "upper", lazily(50), window=9, resume=file) == uppers(50)
    assert runs(worker.address, "upper", lazily(90), window=9, resume=file) == uppers(90)
    for is_async in (False, True):
        found = Runs(is_async)(worker.address, "upper", endless(), window=20, stop=200, resume=file)
        assert found == uppers(200)
        assert taken <= 240
    assert {worker.ran()[f"n{index}"] for index in range(90)} == {1}


# Payloads or options that changed


def test_changed_payloads_in_a_list_are_refused_before_anything_is_sent(
    worker: Worker, file: Path, mapped: Runs
) -> None:
    mapped(worker.address, "upper", numbers(100), resume=file)
    worker.forget()
    now = numbers(200)
    now[7] = now[90] = b"other"
    found: list[bytes] = []

    with pytest.raises(library.ResumeError) as caught:
        mapped.into(found, worker.address, "upper", now, resume=file)

    assert "; changed: payload 7, payload 90 (of 100 compared): " in str(caught.value)
    assert found == []
    assert worker.ran() == {}


@pytest.mark.parametrize("verb", ["map", "map_as_completed"])
def test_a_changed_payload_of_an_iterator_ends_the_map_before_its_result(
    worker: Worker, file: Path, mapped: Runs, verb: str
) -> None:
    mapped(worker.address, "upper", numbers(100), resume=file)
    worker.forget()
    now = numbers(200)
    now[70] = b"other"
    found: list[Any] = []

    with pytest.raises(library.ResumeError, match=r"changed: payload 70 \(of 10 compared\)"):
        mapped.into(found, worker.address, "upper", iter(now), verb=verb, chunksize=10, resume=file)

    assert found == (uppers(70) if verb == "map" else list(enumerate(uppers(70))))
    assert worker.ran() == {}


def test_fewer_payloads_are_refused_or_an_error_at_the_end(
    worker: Worker, file: Path, mapped: Runs
) -> None:
    mapped(worker.address, "upper", numbers(100), resume=file)
    for fewer in (numbers(60), iter(numbers(60))):
        found: list[bytes] = []

        with pytest.raises(library.ResumeError, match="at least 100, and now 60: "):
            mapped.into(found, worker.address, "upper", fewer, resume=file)

        assert found == ([] if isinstance(fewer, list) else uppers(60))
    assert mapped(worker.address, "upper", numbers(101), resume=file) == uppers(101)


@pytest.mark.parametrize(
    ("handler", "options", "difference"),
    [
        ("picky", {}, "handler 'upper' there, 'picky' now"),
        (None, {}, "handler 'upper' there, '' now"),
        ("upper", {"mode": "all"}, "mode 'any' there, 'all' now"),
        ("upper", {"team": "green"}, "team '' there, 'green' now"),
    ],
)
def test_another_map_is_refused_when_it_is_called(
    worker: Worker, file: Path, handler: str, options: dict[str, str], difference: str
) -> None:
    Runs(False)(worker.address, "upper", numbers(10), resume=file)
    worker.forget()

    async def called() -> None:
        overlay.connect_async(worker.address).map(handler, numbers(10), resume=file, **options)

    with pytest.raises(library.ResumeError, match=f"of another map: {difference}: "):
        overlay.connect(worker.address).map(handler, numbers(10), resume=file, **options)
    with pytest.raises(library.ResumeError, match=f"of another map: {difference}: "):
        asyncio.run(called())
    assert worker.ran() == {}


def test_a_second_map_with_the_file_is_refused_while_the_first_goes_on(
    worker: Worker, file: Path
) -> None:
    with overlay.connect(worker.address) as client:
        results = client.map("upper", numbers(100), window=10, resume=file)
        first = list(itertools.islice(results, 20))
        with pytest.raises(library.ResumeError, match="is in use by another map"):
            client.map("upper", numbers(100), resume=file)

        assert first + list(results) == uppers(100)
        assert list(client.map("upper", numbers(100), resume=file)) == uppers(100)


def test_a_map_that_is_never_started_does_not_keep_the_file(worker: Worker, file: Path) -> None:
    with overlay.connect(worker.address) as client:
        client.map("upper", numbers(3), resume=file)

        assert list(client.map("upper", numbers(3), resume=file)) == uppers(3)


@pytest.mark.parametrize(
    ("given", "kind"), [(1, TypeError), (b"x", TypeError), (True, TypeError), ("", ValueError)]
)
def test_what_is_no_path_is_refused_by_the_argument_s_name(
    worker: Worker, given: Any, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match="resume must be the path of a file, not "):
        overlay.connect(worker.address).map("upper", [], resume=given)
    with pytest.raises(ValueError, match="resume must be the path of a file"):
        overlay.connect(worker.address).map("upper", [], resume="a\0b")


def test_a_file_of_something_else_is_refused_and_left_as_it_is(
    worker: Worker, file: Path, mapped: Runs
) -> None:
    file.write_text("precious")

    with pytest.raises(library.ResumeError, match="is not a file of a map's results"):
        mapped(worker.address, "upper", numbers(3), resume=file)

    assert file.read_text() == "precious"


# Typed functions


def args(count: int) -> Iterable[dict[str, int]]:
    return [{"number": number} for number in range(count)]


def test_a_typed_function_goes_on_with_its_values(worker: Worker, file: Path, mapped: Runs) -> None:
    squares = [number * number for number in range(200)]
    first = mapped(worker.address, "square", args=args(200), window=20, stop=50, resume=file)
    before = recorded(file, "square", has_values=True)
    second = mapped(worker.address, "square", args=iter(args(200)), window=20, resume=file)

    assert (first, second) == (squares[:50], squares)
    assert len(before) >= 50
    assert {worker.ran()[str(index)] for index in before} == {1}
    other = [{"number": 9 if n == 3 else n} for n in range(200)]
    with pytest.raises(library.ResumeError, match="changed: payload 3 "):
        mapped(worker.address, "square", args=other, resume=file)
    with pytest.raises(library.ResumeError, match="input 'args' there, 'payloads' now"):
        mapped(worker.address, "square", [b'{"number":0}'], resume=file)


def test_a_value_that_cannot_be_read_is_a_failure_and_not_recorded(
    worker: Worker, file: Path, mapped: Runs
) -> None:
    found = mapped(
        worker.address, "upper", args=[{"a": True}], verb="map_as_completed", resume=file
    )

    assert isinstance(found[0][1], library.InvalidCall), "TRUE is not JSON"
    assert recorded(file, "upper", has_values=True) == {}


# When results are written


def test_what_arrives_is_written_although_its_reader_is_slow(worker: Worker, file: Path) -> None:
    with overlay.connect(worker.address) as client:
        results = client.map("upper", numbers(100), window=100, chunksize=10, resume=file)
        for _ in range(9):
            next(results)
            time.sleep(0.1)

        assert len(recorded(file)) == 100
        results.close()


def test_with_asyncio_it_is_written_although_nobody_takes_results(
    worker: Worker, file: Path
) -> None:
    async def run() -> None:
        async with overlay.connect_async(worker.address) as client:
            results = client.map("upper", numbers(100), window=100, chunksize=10, resume=file)
            await anext(results)
            end = time.monotonic() + 10
            while len(recorded(file)) < 100:
                assert time.monotonic() < end
                await asyncio.sleep(0.05)
            await results.aclose()

    asyncio.run(run())


def test_what_has_arrived_when_a_map_is_left_is_written(worker: Worker, file: Path) -> None:
    held = [b"held%d" % n for n in range(10)]
    with overlay.connect(worker.address) as client:
        results = client.map("upper", [b"first", *held], chunksize=1, resume=file)
        assert next(results) == b"FIRST"
        (worker.folder / "go").touch()
        until(lambda: client._connection._submitter.open_rows == 0)
        results.close()

    assert len(recorded(file)) == 11


def test_a_map_that_waits_for_slow_results_has_written_the_quick_ones(
    worker: Worker, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "CHECK_S", 60)
    monkeypatch.setattr(resume, "COMMIT_S", 0.5)  # so that it is not due when they arrive
    with overlay.connect(worker.address) as client, ThreadPoolExecutor(1) as pool:
        mixed = [b"held", *numbers(20)]
        results = pool.submit(lambda: list(client.map("upper", mixed, chunksize=1, resume=file)))
        until(lambda: file.exists() and len(recorded(file)) == 20, 10)
        (worker.folder / "go").touch()

        assert results.result(10) == [b"HELD", *uppers(20)]
