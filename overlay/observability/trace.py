"""Traces: how long a request took at each process that it passed.

A trace is a tree in a tuple, each process before those below it. A process makes it from

    its own hop        the time in its queue and in service
    the hops below     as the answers report them, adjusted by `below`
    the other hops     from the answers' parts: workers with their times, others without
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from overlay.model.segments import AnswerRow, Code, Executed, Hop, Part, PartSlice, Slice

# In place of a handler's own message, which may quote the payload.
HANDLER_REFUSED = "refused by its handler, in words for its caller"


def below(answers: Slice, away_s: float) -> Slice:
    """A neighbour's answers as the process above sees them: a level deeper and timed from there."""
    first, *rest = answers.trace
    hops = [first._replace(depth=first.depth + 1, away_us=int(away_s * 1e6))]
    hops += [hop._replace(depth=hop.depth + 1) for hop in rest]
    return answers.with_(trace=tuple(hops))


def trace_of_worker(me: str, answers: Slice) -> tuple[Hop, ...]:
    """A worker's own hop, with the time in its handler rather than all its time at the worker."""
    for column in answers.parts:
        return (Hop(me, column.waited_us, column.worked_us, 0, code_of(answers)),)
    return (Hop(me, code=code_of(answers)),)


def trace_of(me: str, waited_us: int, worked_us: int, answers: Slice) -> tuple[Hop, ...]:
    """The whole trace as `me` knows it: its own hop, and one for each process below it."""
    branches: dict[str, list[Hop]] = {}  # by the neighbour that was asked
    neighbour = ""
    for hop in answers.trace:
        neighbour = hop.process_id if hop.depth == 1 else neighbour
        branches.setdefault(neighbour, []).append(hop)
    seen = {hop.process_id for hop in answers.trace}
    for neighbour, hop in _from_parts(me, answers.parts):
        if hop.process_id not in seen:
            seen.add(hop.process_id)
            branches.setdefault(neighbour, []).append(hop)
    order = {process_id: index for index, process_id in enumerate(answers.hops)}
    neighbours = sorted(branches, key=lambda neighbour: order.get(neighbour, len(order)))
    hops = [hop for neighbour in neighbours for hop in branches[neighbour]]
    return (Hop(me, waited_us, worked_us, 0, code_of(answers)), *hops)


def code_of(answers: Slice) -> Code:
    """OK if a worker answered any of the rows OK; otherwise the first worker's code."""
    if answers.refused is not None:
        return answers.refused.code
    first = Code.OK if answers.parts else Code.UNAVAILABLE
    for column in answers.parts:
        code = _code_of(column)
        if code is Code.OK:
            return code
        first = first or code
    return first


def reason_of(answer: AnswerRow) -> str:
    """Why an answer is incomplete, as public text: each missing worker with the reason."""
    return "; ".join(f"{p.process_id}: {_public(p)}" for p in answer.parts if not p.ok)


def is_for_the_caller(answer: AnswerRow) -> bool:
    """Whether it contains a handler's own message, which may quote the payload."""
    return any(_has_handlers_message(part) for part in answer.parts)


def _public(part: Part) -> str:
    return HANDLER_REFUSED if _has_handlers_message(part) else part.reason or part.code.name


def _has_handlers_message(part: Part) -> bool:
    # A handler's BadRequest: the overlay's own ones are raised before anything runs.
    return part.code is Code.INVALID_ARGUMENT and part.executed is not Executed.NO


def lines(trace: Sequence[Hop]) -> Iterator[tuple[str, Hop, int | None]]:
    """A trace as a tree for people: (name with its branch, hop, microseconds in transit).

    In transit: the time between a process and the one above that neither waited nor worked; None
    if unknown.
    """
    for at, hop in enumerate(trace):
        bars = "".join(
            ("│  " if _continues(trace, at, depth) else "   ") for depth in range(1, hop.depth)
        )
        branch = ("├─ " if _continues(trace, at, hop.depth) else "└─ ") if hop.depth else ""
        inside = hop.waited_us + hop.worked_us
        in_transit = max(0, hop.away_us - inside) if hop.away_us else None
        yield bars + branch + hop.process_id, hop, in_transit


def _continues(trace: Sequence[Hop], at: int, depth: int) -> bool:
    """Whether the branch at this depth has another hop after the one at `at`."""
    for hop in trace[at + 1 :]:
        if hop.depth <= depth:
            return hop.depth == depth
    return False


def _from_parts(me: str, parts: Sequence[PartSlice]) -> Iterator[tuple[str, Hop]]:
    """The hops to each worker, with the neighbour that they begin at. Only workers have times."""
    for column in parts:
        path = column.hops[column.hops.index(me) + 1 :] if me in column.hops else ()
        path = path or (column.process_id,)
        for depth, process_id in enumerate(path[:-1], 1):
            yield path[0], Hop(process_id, depth=depth)
        times = column.waited_us, column.worked_us
        yield path[0], Hop(column.process_id, *times, len(path), _code_of(column))


def _code_of(column: PartSlice) -> Code:
    failure = column.failed
    if failure is None and len(column.failures) == column.results.count:
        failure = next(iter(column.failures.values()), None)
    return failure.code if failure else Code.OK
