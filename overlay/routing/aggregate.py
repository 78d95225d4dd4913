"""How parts become one answer: pure functions, used in every process that a request passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from overlay.model.errors import OverlayError, PartsFailed
from overlay.model.segments import (
    AnswerRow,
    Code,
    Detail,
    Executed,
    Mode,
    Part,
    PartSlice,
    Slice,
)

T = TypeVar("T")

Merge = Callable[[Sequence[Part]], bytes]


def from_branch(answers: Slice, targets: Sequence[str]) -> Slice:
    """A branch's answers with exactly one column per target; a target that it left out has failed.

    A refusal of the whole branch is a refusal of every target.
    """
    count = answers.count
    if answers.refused is not None:
        why = Detail(answers.refused.code, answers.refused.reason, answers.refused.executed)
        columns = tuple(PartSlice.missing(t, count, why) for t in targets)
        return Slice(count, columns, trace=answers.trace)
    by_id = {column.process_id: column for column in answers.parts}
    columns = tuple(by_id.get(t) or PartSlice.missing(t, count, _LEFT_OUT) for t in targets)
    return Slice(count, columns, answers.hops, None, answers.trace)


def gathered(
    me: str, order: Sequence[str], branches: Mapping[str, Slice], missing: Iterable[PartSlice]
) -> Slice:
    """ALL: the branches' answers as one, parts and hops in the order of the configuration.

    branches: by neighbour, as returned by `from_branch`. missing: workers in no branch. All have
    the same rows.
    """
    found = {column.process_id: column for answers in branches.values() for column in answers.parts}
    found.update({column.process_id: column for column in missing})
    hops = [hop for n in order if n in branches for hop in branches[n].hops]
    trace = [hop for n in order if n in branches for hop in branches[n].trace]
    columns = in_order(found, order)
    return Slice(columns[0].results.count, columns, (me, *hops), None, tuple(trace))


def in_order(parts: Mapping[str, T], order: Sequence[str]) -> tuple[T, ...]:
    """The parts of these workers in the order of the configuration, followed by workers that it
    does not have."""
    found = tuple(parts[w] for w in order if w in parts)
    if len(found) < len(parts):
        known = set(order)
        found += tuple(part for worker, part in parts.items() if worker not in known)
    return found


def coverage(answer: AnswerRow) -> str:
    """The trailer with the number of parts and the missing workers, as in "2/3; missing=F"."""
    good = sum(part.ok for part in answer.parts)
    missing = ",".join(part.process_id for part in answer.parts if not part.ok)
    return f"{good}/{len(answer.parts)}" + (f"; missing={missing}" if missing else "")


def failure(answer: AnswerRow, retry_after_s: float) -> OverlayError | None:
    """The error for the caller if no worker answered OK; None otherwise.

    Its code is that of the first part in the order of the configuration. It proves that nothing ran
    only if every part does.
    """
    parts = (answer.refused,) if answer.refused is not None else answer.parts
    if any(part.ok for part in parts):
        return None
    if not parts:
        return PartsFailed(
            "no worker was asked", Code.UNAVAILABLE, Executed.NO, "unreachable", None
        )
    first, executed = parts[0], _executed(parts)
    cause = first.cause or first.code.name.lower().replace("_", " ")
    retry: float | None = first.retry_after_s or retry_after_s
    if executed is not Executed.NO or first.code not in _RETRYABLE:
        retry = None
    reasons = first.reason if answer.refused is not None else _reasons(parts)
    return PartsFailed(reasons, first.code, executed, cause, retry)


def may_try_elsewhere(answer: AnswerRow) -> bool:
    """ANY: whether another worker may be asked, which requires proof that nothing has run."""
    part = answer.refused or (answer.parts[0] if answer.parts else None)
    return part is not None and part.executed is Executed.NO and part.code in _RETRYABLE_ELSEWHERE


def was_lost(answer: AnswerRow) -> bool:
    """ANY: whether the outcome is unknown because the worker, or the path to it, broke down."""
    part = answer.refused or (answer.parts[0] if answer.parts else None)
    return part is not None and part.executed is Executed.UNKNOWN and part.code is Code.UNAVAILABLE


def plain_results(answers: Slice) -> list[bytes]:
    """`result` without a merge function for every row, of answers without failures."""
    columns = [column.results.items for column in answers.parts]
    if len(columns) == 1:
        return list(columns[0])
    return [b"\n".join(row) for row in zip(*columns, strict=True)]


def result(mode: Mode, answer: AnswerRow, merge: Merge | None) -> bytes:
    """What the client gets. ANY: the worker's own bytes. ALL: merged, or joined by newlines."""
    good = [part for part in answer.parts if part.ok]
    if mode is Mode.ANY:
        return good[0].result
    return merge(good) if merge else b"\n".join(part.result for part in good)


_LEFT_OUT = Detail(Code.INTERNAL, "left out of its team leader's answer")
_RETRYABLE = (Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED)
# A process with another configuration or a smaller message limit refuses what others may accept.
_RETRYABLE_ELSEWHERE = (*_RETRYABLE, Code.FAILED_PRECONDITION)


def _executed(parts: Sequence[Part]) -> Executed:
    found = {part.executed for part in parts}
    if found == {Executed.NO}:
        return Executed.NO
    return Executed.YES if Executed.YES in found else Executed.UNKNOWN


def _reasons(parts: Iterable[Part]) -> str:
    """Each reason once, with the processes that gave it."""
    by_reason: dict[str, list[str]] = {}
    for part in parts:
        by_reason.setdefault(part.reason, []).append(part.process_id)
    joined = ((", ".join(filter(None, ids)), why) for why, ids in by_reason.items())
    return "; ".join(f"{ids}: {why}" if ids else why for ids, why in joined)
