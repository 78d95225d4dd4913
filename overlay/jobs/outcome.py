"""What an attempt makes of its job. Decisions without a clock or a disk.

    an answer                                   done
    an error of the handler itself              failed: the handler was asked, and said so
    an error that can never go away             failed: no such handler, a payload too large
    a refusal, with proof that nothing ran      waits again; the attempt does not count
    anything else: it may have run              waits again if it has attempts left, or quarantined

So a payload that kills its worker is started as often as its attempts allow, and no more. One that
kills only its handler's own process ("run": "process") is an error of the handler.
"""

from __future__ import annotations

from overlay.model.errors import OverlayError
from overlay.model.jobs import JobEnd, JobState
from overlay.model.segments import Code, Executed

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0  # before another attempt; each time twice as long
_MAY_PASS = (Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED, Code.CANCELLED, Code.DEADLINE_EXCEEDED)
_OF_HANDLERS = (Code.INTERNAL, Code.INVALID_ARGUMENT)
MAX_REASON = 2000  # characters that are kept


def done(answer: bytes) -> JobEnd:
    return JobEnd(JobState.DONE, answer=answer)


def after(
    error: OverlayError, attempts: int, max_attempts: int, refusals: int, now: float
) -> JobEnd:
    """attempts: begun so far, with this one. refusals: in a row before this attempt."""
    code, reason = error.code, str(error)[:MAX_REASON]
    if error.executed is Executed.NO:
        if code in _MAY_PASS:
            again = now + max(error.retry_after_s or 0.0, pause_s(refusals))
            return JobEnd(JobState.WAITING, code, reason, due=again, counts=False)
        return JobEnd(JobState.FAILED, code, reason)
    if error.executed is Executed.YES and code in _OF_HANDLERS:
        return JobEnd(JobState.FAILED, code, reason)
    if error.executed is Executed.YES and code is Code.RESOURCE_EXHAUSTED:  # too large an answer
        return JobEnd(JobState.FAILED, code, reason)
    if attempts < max_attempts:
        return JobEnd(JobState.WAITING, code, reason, due=now + pause_s(attempts - 1))
    return JobEnd(JobState.QUARANTINED, code, reason)


def pause_s(before: int) -> float:
    """before: how many pauses in a row there were."""
    return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(before, 10))
