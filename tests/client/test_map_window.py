"""The decisions of a map: how much is sent, what is given next, how long it waits. Sans-IO."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlay.client.map_window import NOTHING_YET, MapWindow, Patience
from overlay.model.errors import CallFailed
from overlay.model.limits import Limits


def take_all(window: MapWindow) -> list[tuple[int, Any]]:
    """All results that can be given now."""
    found: list[tuple[int, Any]] = []
    while (run := window.take()) is not None:
        found += enumerate(run[1], run[0])
        window.release()
    return found


# Rows of each chunk of three, in the order of their results -> the indexes given after each.
ARRIVALS = [
    (True, [(0, [0, 1, 2]), (3, [0, 1, 2])], [[0, 1, 2], [3, 4, 5]]),
    (True, [(3, [0, 1, 2]), (0, [0, 1, 2])], [[], [0, 1, 2, 3, 4, 5]]),
    (True, [(0, [1]), (0, [0]), (3, [0]), (0, [2])], [[], [0, 1], [], [2, 3]]),
    (True, [(0, [0, 2]), (0, [1])], [[0], [1, 2]]),
    (False, [(3, [0, 1, 2]), (0, [0, 1, 2])], [[3, 4, 5], [0, 1, 2]]),
    (False, [(0, [0, 2]), (0, [1])], [[0, 2], [1]]),
]


@pytest.mark.parametrize(("ordered", "arrivals", "expected"), ARRIVALS)
def test_results_are_given_in_order_or_as_they_arrive(ordered, arrivals, expected) -> None:
    window = MapWindow(6, 3, ordered)
    window.open_chunk(3, 3)
    window.open_chunk(3, 3)
    for (first, rows), indexes in zip(arrivals, expected, strict=True):
        window.add_results(first, rows, [b"%d" % (first + row) for row in rows], False)

        assert take_all(window) == [(index, b"%d" % index) for index in indexes]


def test_a_chunk_waits_until_there_is_room_for_all_of_it() -> None:
    window = MapWindow(4, 2, True)
    window.open_chunk(2, 2)
    window.open_chunk(1, 1)

    assert not window.has_room(2)
    assert window.has_room(1)


@pytest.mark.parametrize("ordered", [True, False])
def test_a_buffered_result_takes_room_until_it_is_given(ordered: bool) -> None:
    window = MapWindow(2, 1, ordered)
    window.open_chunk(1, 1)
    window.open_chunk(1, 1)
    window.add_results(1, [0], [b"b"], False)
    if not ordered:
        assert not window.has_room(1)
        assert take_all(window) == [(1, b"b")]
        assert window.has_room(1)
    else:
        assert take_all(window) == []
        assert not window.has_room(1)


@pytest.mark.parametrize(
    ("ordered", "given"), [(True, [[], [0, 1, 2, 3]]), (False, [[1, 2], [0, 3]])]
)
def test_recorded_results_are_given_in_order_or_at_once(
    ordered: bool, given: list[list[int]]
) -> None:
    window = MapWindow(4, 4, ordered)
    window.open_chunk(4, 2)
    assert not window.add_recorded(0, 1, [b"1", b"2"])
    assert window.unanswered == 2
    assert window.has_ready != ordered
    assert [index for index, _ in take_all(window)] == given[0]

    assert window.add_results(0, [0, 3], [b"0", b"3"], False)

    assert take_all(window) == [(index, b"%d" % index) for index in given[1]]


def test_expected_results_take_room_before_they_arrive() -> None:
    window = MapWindow(1000, 16, True, max_bytes=1000)
    window.open_chunk(16, 16)
    window.add_results(0, range(16), [b"x" * 100] * 16, False)
    take_all(window)
    window.open_chunk(9, 9)
    assert window.has_room(16)

    window.open_chunk(1, 1)

    assert not window.has_room(1)


def test_a_payload_larger_than_the_window_is_sent_when_nothing_is_open() -> None:
    window = MapWindow(10, 1, True, max_bytes=10)
    assert window.has_room(1)
    window.open_chunk(1, 100)
    assert not window.has_room(1)

    window.add_results(0, [0], [b""], False)
    take_all(window)

    assert window.has_room(1)


def test_a_chunk_ends_at_a_pause_a_large_payload_or_the_last_payload() -> None:
    large = b"x" * Limits.frame_bytes
    payloads = iter([b"a", NOTHING_YET, large, b"b", "ü", b"d", b"e"])
    window = MapWindow(9, 3, True)

    def next_chunk() -> tuple[list[bytes], bool, bool]:
        return window.gather(payloads)[0], window.pauses, window.is_fed

    assert next_chunk() == ([b"a"], True, False)
    assert next_chunk() == ([large], False, False)
    assert next_chunk() == ([b"b", "ü".encode(), b"d"], False, False)
    assert next_chunk() == ([b"e"], False, True)


@given(st.data())
def test_each_result_is_given_once_and_the_window_is_never_exceeded(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 12), "window")
    chunk = data.draw(st.integers(1, size), "chunk")
    ordered = data.draw(st.booleans(), "ordered")
    count = data.draw(st.integers(0, 40), "payloads")
    window = MapWindow(size, chunk, ordered, max_bytes=data.draw(st.integers(1, 60), "bytes"))
    payloads = iter([b"x" * (n % 5) for n in range(count)])
    waiting: dict[int, list[int]] = {}  # rows of each chunk without a result
    found: list[tuple[int, Any]] = []

    while not window.is_fed or window.unanswered:
        if not window.is_fed and window.has_room(chunk):
            rows, _ = window.gather(payloads)
            if rows:
                recorded = data.draw(st.sets(st.sampled_from(range(len(rows)))), "recorded")
                rest = [row for row in range(len(rows)) if row not in recorded]
                first = window.open_chunk(len(rows), sum(len(rows[row]) for row in rest))
                for row in sorted(recorded):
                    window.add_recorded(first, row, [b"%d" % (first + row)])
                if rest:
                    waiting[first] = rest
        assert window.open <= size
        if waiting and data.draw(st.booleans()):
            first = data.draw(st.sampled_from(sorted(waiting)))
            rows = sorted(data.draw(st.sets(st.sampled_from(waiting[first]), min_size=1)))
            waiting[first] = [row for row in waiting[first] if row not in rows]
            failed = data.draw(st.booleans())
            made = [CallFailed(str(first + r)) if failed else b"%d" % (first + r) for r in rows]
            assert window.add_results(first, rows, made, failed) == (not waiting[first])
            if not waiting[first]:
                del waiting[first]
        elif not (window.has_room(chunk) or waiting):
            assert window._ready, "it makes no progress"
        if data.draw(st.booleans()):
            found += take_all(window)
    found += take_all(window)

    indexes = [index for index, _ in found]
    assert indexes == list(range(count)) if ordered else sorted(indexes) == list(range(count))
    indexes_found = [r.decode() if isinstance(r, bytes) else str(r) for _, r in found]
    assert indexes_found == [str(index) for index in indexes]
    assert (window.open, window._bytes, window._chunks, window._out_of_order) == (0, 0, {}, {})


UP, RESTS, AWAY, STOPPING = (
    (True, False, True),
    (False, True, False),
    (False, False, False),
    (False, False, True),
)
# What is observed each second -> w: the map waits, W: it gives up; its patience is 2 s.
ABSENCES = [
    ([AWAY, AWAY, AWAY, AWAY], "...."),  # it was never up: the patience of a call applies
    ([UP, AWAY, AWAY, AWAY, AWAY], ".wwwW"),
    ([UP, AWAY, AWAY, UP, AWAY, AWAY, AWAY, AWAY], ".ww.wwwW"),
    ([UP, STOPPING, STOPPING, STOPPING, STOPPING, AWAY, AWAY, AWAY], ".wwwwwwW"),
    ([UP, RESTS, RESTS, RESTS, RESTS], "....."),
]


@pytest.mark.parametrize(("seen", "expected"), ABSENCES)
def test_a_running_map_waits_for_its_process(seen, expected) -> None:
    patience = Patience(2.0, 0.0)
    found = ""
    for now, (is_up, rests, is_served) in enumerate(seen):
        is_away = patience.is_away(now, is_up, rests, is_served)
        found += ("W" if patience.is_over(now) else "w") if is_away else "."

    assert found == expected


def test_each_absence_is_warned_about_once() -> None:
    patience = Patience(60.0, 0.0)
    warned = []
    for now, seen in enumerate([UP, AWAY, AWAY, AWAY, AWAY, UP, AWAY, AWAY, AWAY]):
        if patience.is_away(now, *seen) and patience.should_warn(now):
            warned.append(now)

    assert warned == [3, 8]


def test_rejected_requests_are_retried_for_a_while_after_the_last_answer() -> None:
    patience = Patience(5.0, 100.0)
    assert patience.keeps_trying(104.9)
    assert not patience.keeps_trying(105.1)

    patience.answered(105.1)

    assert patience.keeps_trying(110.0)
