"""Traces as trees: what each process reports, and how that is combined."""

from __future__ import annotations

from overlay.model.segments import Code, Column, Detail, Executed, Hop, Part, PartSlice, Slice
from overlay.observability import trace

DOWN = Detail(Code.UNAVAILABLE, "the link is down", Executed.NO)


def column(worker: str, *way: str, failed: Detail | None = None, rows: int = 1) -> PartSlice:
    return PartSlice(worker, Column([b""] * rows), way, {}, failed, 5, 7)


def ids(trace: tuple[Hop, ...]) -> str:
    """Each process with its depth: "A0 B1 C2"."""
    return " ".join(f"{hop.process_id}{hop.depth}" for hop in trace)


def test_the_process_above_sees_a_trace_one_level_deeper_and_with_the_time_it_took():
    answers = Slice(1, (), trace=(Hop("B", 1, 2), Hop("C", 3, 4, 1)))

    seen = trace.below(answers, 0.001).trace

    assert seen == (Hop("B", 1, 2, 1, away_us=1000), Hop("C", 3, 4, 2))


def test_a_worker_reports_the_time_in_its_handler():
    answers = Slice(1, (column("C", "A", "B", "C"),), ("C",))

    assert trace.trace_of_worker("C", answers) == (Hop("C", 5, 7),)


def test_a_trace_is_the_own_hop_and_then_the_reported_ones():
    reported = (Hop("B", 1, 2, 1), Hop("C", 3, 4, 2), Hop("E", 5, 6, 1), Hop("F", 7, 8, 2))
    parts = column("C", "A", "B", "C"), column("F", "A", "E", "F")
    answers = Slice(1, parts, ("A", "B", "C", "E", "F"), None, reported)

    assert trace.trace_of("A", 10, 20, answers) == (Hop("A", 10, 20), *reported)


def test_without_reports_the_parts_give_the_hops_and_the_workers_times():
    parts = column("C", "A", "B", "C"), column("D", "A", "E", "D"), column("F", "A", "E", "F")
    answers = Slice(1, parts, ("A", "B", "C", "E", "D", "F"))

    hops = trace.trace_of("A", 10, 20, answers)

    assert ids(hops) == "A0 B1 C2 E1 D2 F2"
    assert (hops[1].worked_us, hops[2].worked_us) == (0, 7)


def test_branches_with_and_without_a_report_keep_their_order():
    reported = (Hop("E", 5, 6, 1), Hop("D", 0, 0, 2, Code.UNAVAILABLE), Hop("F", 7, 8, 2))
    missing = column("D", failed=DOWN)
    parts = column("C", "A", "B", "C"), missing, column("F", "A", "E", "F")
    answers = Slice(1, parts, ("A", "B", "C", "E", "F"), None, reported)

    assert ids(trace.trace_of("A", 0, 0, answers)) == "A0 B1 C2 E1 D2 F2"


def test_a_worker_that_was_never_reached_is_in_the_trace_with_its_code():
    parts = column("C", "A", "B", "C"), column("F", failed=DOWN)
    hops = trace.trace_of("A", 0, 0, Slice(1, parts, ("A", "B", "C")))

    assert ids(hops) == "A0 B1 C2 F1"
    assert hops[-1].code is Code.UNAVAILABLE


def test_a_hop_is_ok_if_a_worker_answered_and_otherwise_has_the_first_workers_code():
    good, bad = column("C"), column("F", failed=DOWN)
    refused = Part("A", Code.RESOURCE_EXHAUSTED, "full")
    by_row = PartSlice("F", Column([b""]), (), {0: Detail(Code.INTERNAL, "why")})

    assert trace.code_of(Slice(1, (bad, good))) is Code.OK
    assert trace.code_of(Slice(1, (bad, by_row))) is Code.UNAVAILABLE
    assert trace.code_of(Slice(1, (by_row, bad))) is Code.INTERNAL
    assert trace.code_of(Slice(1, (), refused=refused)) is Code.RESOURCE_EXHAUSTED


def test_time_without_waiting_or_working_was_in_transit():
    hops = (Hop("A", 0, 900), Hop("B", 100, 500, 1, away_us=800), Hop("C", 50, 60, 2))

    assert [in_transit for _, _, in_transit in trace.lines(hops)] == [None, 200, None]


def test_a_trace_is_drawn_as_a_tree():
    hops = (
        Hop("A"),
        Hop("B", depth=1),
        Hop("C", depth=2),
        Hop("E", depth=1),
        Hop("D", depth=2),
        Hop("F", depth=2),
    )

    names = [name for name, _, _ in trace.lines(hops)]

    assert names == ["A", "├─ B", "│  └─ C", "└─ E", "   ├─ D", "   └─ F"]
