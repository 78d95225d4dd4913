"""What an attempt makes of its job: every kind of end, by table."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlay.jobs import outcome
from overlay.model.errors import CallFailed, OverlayError
from overlay.model.jobs import JobState
from overlay.model.segments import Code, Executed

NOW = 1000.0
W, F, Q = JobState.WAITING, JobState.FAILED, JobState.QUARANTINED


def error(code: Code, executed: Executed, retry_after_s: float | None = None) -> OverlayError:
    return CallFailed("why", code=code, executed=executed, retry_after_s=retry_after_s)


@pytest.mark.parametrize(
    ("code", "executed", "attempts", "max_attempts", "state", "counts"),
    [
        # Proof that nothing ran: again, and it does not count, however often.
        (Code.UNAVAILABLE, Executed.NO, 1, 1, W, False),
        (Code.RESOURCE_EXHAUSTED, Executed.NO, 3, 3, W, False),
        (Code.DEADLINE_EXCEEDED, Executed.NO, 1, 1, W, False),
        (Code.CANCELLED, Executed.NO, 1, 1, W, False),  # by a leader that stops
        # It can never be served.
        (Code.NOT_FOUND, Executed.NO, 1, 3, F, True),
        (Code.INVALID_ARGUMENT, Executed.NO, 1, 3, F, True),
        (Code.PERMISSION_DENIED, Executed.NO, 1, 3, F, True),
        (Code.FAILED_PRECONDITION, Executed.NO, 1, 3, F, True),
        # The handler was asked and said so.
        (Code.INTERNAL, Executed.YES, 1, 3, F, True),
        (Code.INVALID_ARGUMENT, Executed.YES, 1, 3, F, True),
        (Code.RESOURCE_EXHAUSTED, Executed.YES, 1, 3, F, True),  # its answer is too large
        # It may have run.
        (Code.UNAVAILABLE, Executed.UNKNOWN, 1, 1, Q, True),
        (Code.UNAVAILABLE, Executed.UNKNOWN, 1, 3, W, True),
        (Code.UNAVAILABLE, Executed.UNKNOWN, 2, 3, W, True),
        (Code.UNAVAILABLE, Executed.UNKNOWN, 3, 3, Q, True),
        (Code.DEADLINE_EXCEEDED, Executed.UNKNOWN, 1, 1, Q, True),
        (Code.DEADLINE_EXCEEDED, Executed.YES, 1, 1, Q, True),
        (Code.INTERNAL, Executed.UNKNOWN, 1, 1, Q, True),
        (Code.DATA_LOSS, Executed.UNKNOWN, 1, 2, W, True),
    ],
)
def test_an_error_makes_of_a_job(
    code: Code, executed: Executed, attempts: int, max_attempts: int, state: JobState, counts: bool
) -> None:
    end = outcome.after(error(code, executed), attempts, max_attempts, 0, NOW)
    assert (end.state, end.counts) == (state, counts)
    assert (end.due > NOW) is (state is W)
    assert (end.code, end.reason) == (code, "why")


def test_the_pause_doubles_up_to_a_minute_and_heeds_what_the_refusal_says() -> None:
    refusals = [error(Code.UNAVAILABLE, Executed.NO)] * 8
    pauses = [outcome.after(e, 1, 1, n, NOW).due - NOW for n, e in enumerate(refusals)]
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    told = outcome.after(error(Code.UNAVAILABLE, Executed.NO, 5.0), 1, 1, 0, NOW)
    assert told.due == NOW + 5


@given(
    st.sampled_from(Code),
    st.sampled_from(Executed),
    st.integers(1, 100),
    st.integers(0, 99),
    st.integers(0, 10**6),
)
def test_without_proof_no_job_is_started_more_often_than_its_attempts(
    code: Code, executed: Executed, max_attempts: int, before: int, refusals: int
) -> None:
    attempts = min(before, max_attempts - 1) + 1
    end = outcome.after(error(code, executed), attempts, max_attempts, refusals, NOW)
    if end.state is W:
        assert executed is Executed.NO or attempts < max_attempts
        assert NOW < end.due <= NOW + outcome.LONGEST_PAUSE_S
        assert end.counts is (executed is not Executed.NO)
    else:
        assert end.counts
