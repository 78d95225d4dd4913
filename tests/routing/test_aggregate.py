"""How parts become one answer."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlay.model.segments import (
    AnswerRow,
    Code,
    Column,
    Detail,
    Executed,
    Mode,
    Part,
    PartSlice,
    Slice,
)
from overlay.routing import aggregate

ORDER = tuple("ABCDEF")
NO, YES, UNKNOWN = Executed.NO, Executed.YES, Executed.UNKNOWN


def ok(worker: str, result: bytes = b"") -> Part:
    return Part(worker, result=result, executed=YES)


def failed(worker: str, code: Code = Code.UNAVAILABLE, executed: Executed = NO) -> Part:
    return Part(worker, code, f"{worker} did not", executed=executed)


def column(part: Part, count: int = 1) -> PartSlice:
    """Rows that all have this part."""
    failed = None if part.ok else Detail(part.code, part.reason, part.executed)
    return PartSlice(part.process_id, Column((part.result,) * count), part.hops, {}, failed)


def answers(*parts: Part, hops: tuple[str, ...] = (), count: int = 1) -> Slice:
    return Slice(count, tuple(column(part, count) for part in parts), hops)


def test_hops_start_with_the_process_asked_and_go_depth_first_in_configuration_order():
    at_b = answers(ok("C"), hops=("B", "C"))
    at_e = answers(ok("D"), ok("F"), hops=("E", "D", "F"))

    found = aggregate.gathered("A", ORDER, {"E": at_e, "B": at_b}, ())

    assert found.hops == tuple("ABCEDF")
    assert [part.process_id for part in found.at(0).parts] == list("CDF")


def test_parts_of_workers_in_no_branch_are_in_configuration_order_too():
    at_e = answers(ok("D"), hops=("E", "D"))

    missing = [column(failed("F")), column(failed("C"))]
    found = aggregate.gathered("A", ORDER, {"E": at_e}, missing)

    assert [part.process_id for part in found.at(0).parts] == list("CDF")
    assert found.hops == tuple("AED")


def test_each_row_is_gathered_by_itself():
    at_b = Slice(3, (PartSlice("C", Column((b"c0", b"c1", b"c2"))),), ("B", "C"))
    failures = {1: Detail(Code.INTERNAL, "row 1", YES)}
    at_e = Slice(3, (PartSlice("D", Column((b"d0", b"", b"d2")), (), failures),), ("E", "D"))

    found = aggregate.gathered("A", ORDER, {"E": at_e, "B": at_b}, ())

    rows = [found.at(row) for row in range(3)]
    assert [aggregate.result(Mode.ALL, row, None) for row in rows] == [b"c0\nd0", b"c1", b"c2\nd2"]
    assert [aggregate.coverage(row) for row in rows] == ["2/2", "1/2; missing=D", "2/2"]


def test_plain_results_equal_the_results_of_the_single_rows():
    two = Slice(2, tuple(PartSlice(w, Column((b"0" + w.encode(), b"1"))) for w in "CD"))
    one = Slice(2, two.parts[:1])
    for mode, found in ((Mode.ALL, two), (Mode.ALL, one), (Mode.ANY, one)):
        alone = [aggregate.result(mode, found.at(row), None) for row in range(2)]
        assert aggregate.plain_results(found) == alone


COVERAGES = [
    ((ok("C"), ok("D"), ok("F")), "3/3"),
    ((ok("C"), ok("D"), failed("F")), "2/3; missing=F"),
    ((failed("C"), ok("D"), failed("F")), "1/3; missing=C,F"),
    ((failed("C"),), "0/1; missing=C"),
    ((), "0/0"),
]


@pytest.mark.parametrize(("parts", "text"), COVERAGES)
def test_coverage_has_the_number_of_parts_and_the_missing_workers(parts, text):
    assert aggregate.coverage(AnswerRow(parts)) == text


def test_a_branch_answers_for_each_of_its_targets_and_no_others():
    given = answers(ok("D", b"d"), ok("Z"), ok("C"), hops=("E", "D"), count=2)

    found = aggregate.from_branch(given, ("D", "F"))

    for row in range(2):
        first, second = found.at(row).parts
        assert (first.process_id, first.result) == ("D", b"d")
        assert (second.process_id, second.code) == ("F", Code.INTERNAL)
    assert found.hops == ("E", "D")


def test_a_part_that_a_branch_left_out_does_not_prove_that_nothing_ran():
    (part,) = aggregate.from_branch(Slice(1, ()), ("F",)).at(0).parts
    assert part.executed is UNKNOWN


@pytest.mark.parametrize("executed", Executed)
def test_a_refusal_of_a_branch_is_a_refusal_of_each_target(executed):
    refused = Part("E", Code.RESOURCE_EXHAUSTED, "full", executed=executed)

    found = aggregate.from_branch(Slice(2, (), refused=refused), ("D", "F"))

    for row in range(2):
        assert found.at(row).parts == (
            Part("D", Code.RESOURCE_EXHAUSTED, "full", executed=executed),
            Part("F", Code.RESOURCE_EXHAUSTED, "full", executed=executed),
        )
    assert found.hops == ()


def test_one_ok_part_is_enough():
    answer = AnswerRow((failed("C"), ok("D"), failed("F", Code.INTERNAL, YES)))
    assert aggregate.failure(answer, 1.0) is None


FIRSTS = list(itertools.permutations([Code.INTERNAL, Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED]))


@pytest.mark.parametrize("codes", FIRSTS)
def test_the_code_of_a_failure_is_the_first_parts_in_configuration_order(codes):
    parts = tuple(failed(worker, code) for worker, code in zip("CDF", codes, strict=True))

    error = aggregate.failure(AnswerRow(parts), 1.0)

    assert error.code is codes[0]
    assert str(error) == "C: C did not; D: D did not; F: F did not"


def test_a_reason_that_several_workers_give_appears_once():
    parts = [Part(worker, Code.INTERNAL, why) for worker, why in zip("CDF", "xyx", strict=True)]
    assert str(aggregate.failure(AnswerRow(tuple(parts)), 1.0)) == "C, F: x; D: y"


@pytest.mark.parametrize("found", list(itertools.product(Executed, repeat=3)))
def test_a_failure_proves_that_nothing_ran_only_if_every_part_does(found):
    parts = tuple(failed(w, executed=e) for w, e in zip("CDF", found, strict=True))

    error = aggregate.failure(AnswerRow(parts), 1.0)

    assert (error.executed is NO) == (set(found) == {NO})
    assert (error.executed is YES) == (YES in found)


RETRIES = [
    (Code.UNAVAILABLE, NO, 1.5),
    (Code.RESOURCE_EXHAUSTED, NO, 1.5),
    (Code.INTERNAL, NO, None),
    (Code.NOT_FOUND, NO, None),
    (Code.UNAVAILABLE, UNKNOWN, None),
    (Code.RESOURCE_EXHAUSTED, YES, None),
]


@pytest.mark.parametrize(("code", "executed", "after_s"), RETRIES)
def test_only_a_refusal_that_proves_that_nothing_ran_says_when_to_retry(code, executed, after_s):
    error = aggregate.failure(AnswerRow((failed("C", code, executed),)), 1.5)
    assert error.retry_after_s == after_s


def test_a_refusal_of_the_process_asked_is_the_failure():
    refused = Part("A", Code.CANCELLED, "left", executed=UNKNOWN)

    error = aggregate.failure(AnswerRow((), refused=refused), 1.0)

    assert (error.code, str(error), error.executed) == (Code.CANCELLED, "left", UNKNOWN)


def test_a_reason_without_workers_appears_once_and_alone():
    parts = tuple(Part("", Code.UNAVAILABLE, "E is down") for _ in range(3))
    assert str(aggregate.failure(AnswerRow(parts), 1.0)) == "E is down"


ELSEWHERE = [
    (AnswerRow((), refused=failed("", Code.UNAVAILABLE, NO)), True),
    (AnswerRow((), refused=failed("", Code.RESOURCE_EXHAUSTED, NO)), True),
    (AnswerRow((failed("D"),)), True),
    (AnswerRow((), refused=failed("", Code.UNAVAILABLE, UNKNOWN)), False),
    (AnswerRow((), refused=failed("", Code.UNAVAILABLE, YES)), False),
    (AnswerRow((), refused=failed("", Code.INVALID_ARGUMENT, NO)), False),
    (AnswerRow((), refused=failed("", Code.INTERNAL, NO)), False),
    (AnswerRow((ok("D"),)), False),
    (AnswerRow(()), False),
]


@pytest.mark.parametrize(("answer", "may"), ELSEWHERE)
def test_another_worker_is_asked_only_with_proof_that_nothing_ran(answer, may):
    assert aggregate.may_try_elsewhere(answer) is may


def test_in_mode_all_results_are_joined_by_newlines_in_configuration_order():
    answer = AnswerRow((ok("C", b"c"), failed("D"), ok("F", b"f")))
    assert aggregate.result(Mode.ALL, answer, None) == b"c\nf"


def test_an_empty_answer_is_an_answer():
    answer = AnswerRow((ok("C", b""), ok("D", b"d"), ok("F", b"")))

    assert aggregate.result(Mode.ALL, answer, None) == b"\nd\n"
    assert aggregate.coverage(answer) == "3/3"
    assert aggregate.failure(AnswerRow((ok("C", b""),)), 1.0) is None
    assert aggregate.result(Mode.ANY, AnswerRow((ok("C", b""),)), None) == b""


def test_a_merge_function_gets_the_ok_parts_in_configuration_order():
    answer = AnswerRow((ok("C", b"1"), failed("D"), ok("F", b"2")))

    def merge(parts):
        return b",".join(part.process_id.encode() + part.result for part in parts)

    assert aggregate.result(Mode.ALL, answer, merge) == b"C1,F2"


def test_in_mode_any_the_result_is_the_workers_own_whatever_the_merge_function():
    answer = AnswerRow((ok("D", b"d"),))
    assert aggregate.result(Mode.ANY, answer, lambda parts: b"merged") == b"d"


def test_an_answer_without_parts_is_a_failure():
    assert aggregate.failure(AnswerRow(()), 1.0).code is Code.UNAVAILABLE


PARTS = st.builds(
    Part,
    st.sampled_from("CDF"),
    st.sampled_from(Code),
    st.text(max_size=3),
    executed=st.sampled_from(Executed),
)


@given(st.lists(PARTS, max_size=4), st.lists(st.sampled_from("CDF"), unique=True, min_size=1))
def test_any_answer_of_a_branch_has_one_part_for_each_target(parts, targets):
    found = aggregate.from_branch(answers(*parts, hops=("E",)), targets)
    assert [part.process_id for part in found.at(0).parts] == targets


@given(st.lists(PARTS, min_size=1, max_size=4))
def test_there_is_an_error_exactly_if_no_part_is_ok(parts):
    error = aggregate.failure(AnswerRow(tuple(parts)), 1.0)
    assert (error is None) == any(part.ok for part in parts)
