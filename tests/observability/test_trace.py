"""Traces of a request's way, as trees: what each process tells and what is put together."""

from __future__ import annotations

from overlay.model.segments import Code, Column, Detail, Executed, Hop, Part, PartSlice, Slice
from overlay.observability import trace

DOWN = Detail(Code.UNAVAILABLE, "the link is down", Executed.NO)


def column(worker: str, *way: str, failed: Detail | None = None, rows: int = 1) -> PartSlice:
    return PartSlice(worker, Column([b""] * rows), way, {}, failed, 5, 7)


def ids(trace: tuple[Hop, ...]) -> str:
    """Each process with its depth: "A0 B1 C2"."""
    return " ".join(f"{hop.process_id}{hop.depth}" for hop in trace)


def test_the_process_above_sees_a_trace_one_deeper_and_how_long_it_took():
    answers = Slice(1, (), trace=(Hop("B", 1, 2), Hop("C", 3, 4, 1)))

    seen = trace.below(answers, 0.001).trace

    assert seen == (Hop("B", 1, 2, 1, away_us=1000), Hop("C", 3, 4, 2))


def test_a_worker_tells_its_handlers_time_and_not_its_whole_stay():
    answers = Slice(1, (column("C", "A", "B", "C"),), ("C",))

    assert trace.trace_of_worker("C", answers) == (Hop("C", 5, 7),)


def test_a_trace_is_the_own_hop_and_then_what_the_answers_tell():
    told = (Hop("B", 1, 2, 1), Hop("C", 3, 4, 2), Hop("E", 5, 6, 1), Hop("F", 7, 8, 2))
    parts = column("C", "A", "B", "C"), column("F", "A", "E", "F")
    answers = Slice(1, parts, ("A", "B", "C", "E", "F"), None, told)

    assert trace.trace_of("A", 10, 20, answers) == (Hop("A", 10, 20), *told)


def test_where_nothing_was_told_the_parts_know_the_way_and_the_workers_times():
    parts = column("C", "A", "B", "C"), column("D", "A", "E", "D"), column("F", "A", "E", "F")
    answers = Slice(1, parts, ("A", "B", "C", "E", "D", "F"))

    made = trace.trace_of("A", 10, 20, answers)

    assert ids(made) == "A0 B1 C2 E1 D2 F2"
    assert (made[1].worked_us, made[2].worked_us) == (0, 7)


def test_a_branch_that_told_and_one_that_did_not_keep_their_order():
    told = (Hop("E", 5, 6, 1), Hop("D", 0, 0, 2, Code.UNAVAILABLE), Hop("F", 7, 8, 2))
    missing = column("D", failed=DOWN)
    parts = column("C", "A", "B", "C"), missing, column("F", "A", "E", "F")
    answers = Slice(1, parts, ("A", "B", "C", "E", "F"), None, told)

    assert ids(trace.trace_of("A", 0, 0, answers)) == "A0 B1 C2 E1 D2 F2"


def test_a_worker_that_was_never_reached_is_in_the_trace_with_its_code():
    parts = column("C", "A", "B", "C"), column("F", failed=DOWN)
    made = trace.trace_of("A", 0, 0, Slice(1, parts, ("A", "B", "C")))

    assert ids(made) == "A0 B1 C2 F1"
    assert made[-1].code is Code.UNAVAILABLE


def test_a_hop_is_ok_when_one_worker_answered_and_else_says_why_the_first_did_not():
    good, bad = column("C"), column("F", failed=DOWN)
    refused = Part("A", Code.RESOURCE_EXHAUSTED, "full")
    by_row = PartSlice("F", Column([b""]), (), {0: Detail(Code.INTERNAL, "why")})

    assert trace.code_of(Slice(1, (bad, good))) is Code.OK
    assert trace.code_of(Slice(1, (bad, by_row))) is Code.UNAVAILABLE
    assert trace.code_of(Slice(1, (by_row, bad))) is Code.INTERNAL
    assert trace.code_of(Slice(1, (), refused=refused)) is Code.RESOURCE_EXHAUSTED


def test_what_is_not_waiting_or_working_was_on_the_way():
    made = (Hop("A", 0, 900), Hop("B", 100, 500, 1, away_us=800), Hop("C", 50, 60, 2))

    assert [way for _, _, way in trace.lines(made)] == [None, 200, None]


def test_a_trace_is_drawn_as_a_tree():
    made = (
        Hop("A"),
        Hop("B", depth=1),
        Hop("C", depth=2),
        Hop("E", depth=1),
        Hop("D", depth=2),
        Hop("F", depth=2),
    )

    names = [name for name, _, _ in trace.lines(made)]

    assert names == ["A", "├─ B", "│  └─ C", "└─ E", "   ├─ D", "   └─ F"]
