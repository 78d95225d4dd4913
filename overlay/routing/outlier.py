"""Which neighbours are well, by what became of the requests that they were given: pure decisions.

    healthy     5 requests in a row without an answer   -> ejected, for 1 s
                3 times as slow as its peers            -> slow
    ejected     its time is over                        -> half-open
    half-open   the next request is answered            -> healthy
                it is not                               -> ejected, for twice as long, 30 s at most
    slow        its pace is near that of its peers      -> healthy

Only requests to any one heed it: a slow neighbour gets one at a time, now and then, and what is
too much for its peers; an ejected one gets none, unless nobody else is left. A request to all asks
everybody.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from enum import IntEnum
from statistics import median_low
from typing import NamedTuple

from overlay.model.segments import Answers, Code, Executed

FAILURES = 5  # in a row; fewer come by chance, when a few were under way on one connection
SLOW_TIMES = 3.0  # as slow as its peers: more than one machine's usual noise
QUICK_TIMES = 2.0  # below this it is well again; between the two it stays what it is
SLOW_BY_S = 0.001  # a smaller difference costs nobody anything
LOOK_S = 0.5  # between two comparisons of paces


class State(IntEnum):
    """Of a neighbour with one handler; in the order in which they are asked."""

    HALF_OPEN = -1  # the next request is its trial
    HEALTHY = 0
    SLOW = 1
    EJECTED = 2


class Pause(NamedTuple):
    """Seconds to the first trial, and at most between two, doubling while they fail."""

    first_s: float
    most_s: float


# A slow one does work: its trials cost their callers time and nobody a request.
PAUSES = {State.SLOW: Pause(0.5, 5.0), State.EJECTED: Pause(1.0, 30.0)}


class Verdict(IntEnum):
    """What an answer says of the neighbour that gave it."""

    NEITHER = 0
    LATE = 1  # a worker had no result in time, and said so
    BAD = 2
    GOOD = 3


class Outcome(NamedTuple):
    """What became of requests, all the same way: of so many rows, and why they failed.

    took_s: the handler's time for each now, pace_s: what it takes of late; 0 when not known.
    """

    verdict: Verdict
    rows: int
    reason: str = ""
    took_s: float = 0.0
    pace_s: float = 0.0


class Change(NamedTuple):
    """A decision, for the log."""

    neighbour: str
    handler: str
    state: State
    reason: str


def classify(answers: Answers, pace_s: float, to_all: bool = False) -> Outcome:
    """What a slice of answers says of the neighbour. to_all: of requests to all.

    Bad: nobody could be reached, or nobody answered in time. What a handler made of its request is
    an answer, also when it raised. A refusal with the proof that nothing ran is neither: so speaks
    a process that stops in good order, and its link will tell. That somebody below cannot be
    reached says nothing of who tells it, when just that one was to be asked: a request to all.
    """
    refused = answers.refused
    if refused is not None:
        proof = refused.executed is Executed.NO
        said = Verdict.NEITHER if proof else _verdict(refused.code, refused.executed)
        return Outcome(said, answers.count, refused.reason)
    found = Verdict.NEITHER, ""
    for column in answers.parts:
        if column.failed is None and len(column.failures) < answers.count:
            return Outcome(Verdict.GOOD, answers.count, "", column.worked_us / 1e6, pace_s)
        for failure in [column.failed] if column.failed else column.failures.values():
            if to_all and failure.executed is Executed.NO:
                continue
            found = max(found, (_verdict(failure.code, failure.executed), failure.reason))
    return Outcome(found[0], answers.count, found[1])


class PeerHealth:
    """What is the matter with a neighbour and one handler."""

    __slots__ = ("cause", "failures", "on_trial", "pause_s", "quick_s", "retry_at", "state")

    def __init__(self) -> None:
        self.state = State.HEALTHY
        self.cause = ""
        self.failures = 0  # in a row
        self.pause_s = 0.0
        self.retry_at = 0.0  # when one request may be tried
        self.on_trial = False
        self.quick_s = 0.0  # slow until it takes no more

    def standing(self, now: float) -> State:
        """How it is to be treated now."""
        if self.state is State.HEALTHY or self.on_trial or now < self.retry_at:
            return self.state
        return State.HALF_OPEN

    def shown(self, now: float) -> tuple[str, str]:
        """State and reason, in words."""
        if self.state is State.HEALTHY:
            return "healthy", ""
        if self.state is State.SLOW:
            return "slow", f"slow: {self.cause}"
        if self.on_trial or now >= self.retry_at:
            return "half-open", f"the next request is a trial: {self.cause}"
        return "ejected", f"ejected for {self.pause_s:g} s: {self.cause}"

    def enter(self, state: State, cause: str, now: float) -> None:
        self.state, self.cause = state, cause
        self.pause_s = PAUSES[state].first_s
        self.wait(now)

    def wait(self, now: float, times: float = 1.0) -> None:
        """No trial for the time of the last pause, or so many times as long."""
        self.pause_s = min(times * self.pause_s, PAUSES[self.state].most_s)
        self.retry_at = now + self.pause_s
        self.on_trial = False


class OutlierDetector:
    """The neighbours of one process, by handler. No lock of its own: its owner holds one.

    lone: those who stand for one worker each. Others are never slow: who of their workers is, and
    gets less, is theirs to see.
    `cases` has an entry for each handler that something is the matter with; its owner may read it
    at any time.
    """

    def __init__(self, neighbours: Iterable[str], lone: Collection[str]) -> None:
        self.cases: dict[str, dict[str, PeerHealth]] = {n: {} for n in neighbours}
        self.ejections = dict.fromkeys(self.cases, 0)
        self._lone = lone
        self._odd: dict[tuple[str, str], float] = {}  # slow at the last look, with this pace
        self._next_look = 0.0

    def begin(self, neighbour: str, handler: str, now: float) -> None:
        """A request goes there now."""
        case = self.cases[neighbour].get(handler)
        if case is not None and case.standing(now) is State.HALF_OPEN:
            case.on_trial = True

    def record(
        self, neighbour: str, handler: str, heard: Outcome, up: Collection[str], now: float
    ) -> Change | None:
        """Requests have ended. up: the neighbours whose links are up."""
        said = heard.verdict
        if said is Verdict.GOOD:
            return self._good(neighbour, handler, heard, now)
        # One worker's lateness says nothing of a team leader with others.
        if said is Verdict.BAD or (said is Verdict.LATE and neighbour in self._lone):
            return self._bad(neighbour, handler, heard, up, now)
        case = self.cases[neighbour].get(handler)
        if case is not None and case.on_trial:
            case.wait(now)
        return None

    def capacity_added(self, neighbour: str, now: float) -> None:
        """There are workers behind it that were not there before: a trial is due at once."""
        for case in self.cases[neighbour].values():
            case.retry_at = now

    def forget(self, neighbour: str) -> None:
        """Its link has gone down or come up, which says more."""
        self.cases[neighbour].clear()

    def look(self, paces: Mapping[str, Mapping[str, float]], now: float) -> list[Change]:
        """Compares the neighbours that are up; paces: neighbour -> handler -> seconds."""
        ill = {handler for cases in self.cases.values() for handler in cases}
        changes = [change for handler in sorted(ill) for change in self._relieve(handler, paces)]
        if now >= self._next_look:
            self._next_look = now + LOOK_S
            for handler in sorted({handler for known in paces.values() for handler in known}):
                one = {n: known[handler] for n, known in paces.items() if handler in known}
                changes += self._compare(handler, one, now)
        return changes

    def shown(self, neighbour: str, now: float) -> tuple[str, str]:
        """State and reason of the handler with which it is worst, in words."""
        cases = self.cases[neighbour].items()
        handler, worst = max(cases, key=lambda item: item[1].state, default=("", PeerHealth()))
        state, reason = worst.shown(now)
        return state, f"handler {handler}: {reason}" if handler and reason else reason

    def _good(self, neighbour: str, handler: str, heard: Outcome, now: float) -> Change | None:
        case = self.cases[neighbour].get(handler)
        if case is None:
            return None
        if case.state is State.EJECTED:
            return self._heal(neighbour, handler, "answers again")
        if case.state is State.HEALTHY:
            del self.cases[neighbour][handler]
            return None
        case.failures = 0
        if 0 < heard.pace_s <= case.quick_s:
            return self._heal(neighbour, handler, f"is quick again: {_ms(heard.pace_s)}")
        if heard.took_s > case.quick_s:
            case.wait(now, times=2)
        else:  # the next trial follows at once, until its pace has come down
            case.retry_at, case.on_trial = now, False
        return None

    def _bad(
        self, neighbour: str, handler: str, heard: Outcome, up: Collection[str], now: float
    ) -> Change | None:
        case = self.cases[neighbour].setdefault(handler, PeerHealth())
        case.failures += heard.rows
        tried, case.on_trial = case.on_trial, False
        if case.state is State.EJECTED:
            if not tried:
                return None  # it was under way before
            case.wait(now, times=2)
        elif case.failures >= FAILURES and self._may_eject(neighbour, handler, up):
            case.enter(State.EJECTED, "", now)
        else:
            if tried:
                case.wait(now, times=2)
            return None
        case.cause = f"{case.failures} requests in a row without an answer; "
        case.cause += f"the last: {heard.reason}"
        self.ejections[neighbour] += 1
        return Change(neighbour, handler, State.EJECTED, f"is {case.shown(now)[1]}")

    def _may_eject(self, neighbour: str, handler: str, up: Collection[str]) -> bool:
        """At most half of those that are up, and only while another one does answer."""
        others = [self.cases[n].get(handler) for n in up if n != neighbour]
        ejected = sum(case is not None and case.state is State.EJECTED for case in others)
        answering = any(case is None or not case.failures for case in others)
        return neighbour in up and answering and 2 * (ejected + 1) <= len(up)

    def _relieve(self, handler: str, up: Collection[str]) -> list[Change]:
        """Of those ejected too many when others went down, the next to be tried come back."""
        found = [(n, self.cases[n].get(handler)) for n in up]
        ejected = [(case.retry_at, n) for n, case in found if case and case.state is State.EJECTED]
        too_many = len(ejected) - len(up) // 2
        why = "is asked again: too few others are left"
        return [self._heal(n, handler, why) for _, n in sorted(ejected)[: max(0, too_many)]]

    def _compare(self, handler: str, paces: Mapping[str, float], now: float) -> list[Change]:
        changes = []
        ejected = {n for n in paces if self._state(n, handler) is State.EJECTED}
        for neighbour in sorted(set(paces) & set(self._lone) - ejected):
            peers = [paces[n] for n in paces if n != neighbour and n not in ejected]
            if peers:
                change = self._place(neighbour, handler, paces[neighbour], median_low(peers), now)
                changes += [change] if change else []
        return changes

    def _place(
        self, neighbour: str, handler: str, pace_s: float, peers_s: float, now: float
    ) -> Change | None:
        """Decides on one by its peers' pace."""
        key, cause = (neighbour, handler), f"{_ms(pace_s)} where its peers take {_ms(peers_s)}"
        quick_s = max(QUICK_TIMES * peers_s, peers_s + SLOW_BY_S)
        if self._state(neighbour, handler) is State.SLOW:
            case = self.cases[neighbour][handler]
            case.cause, case.quick_s = cause, quick_s
            healed = pace_s <= quick_s
            return self._heal(neighbour, handler, f"is not slow: {cause}") if healed else None
        if pace_s <= max(SLOW_TIMES * peers_s, peers_s + SLOW_BY_S):
            self._odd.pop(key, None)
            return None
        # One look may have met a single odd request: the second must find others, and slow too.
        if self._odd.setdefault(key, pace_s) == pace_s:
            return None
        del self._odd[key]
        case = self.cases[neighbour].setdefault(handler, PeerHealth())
        case.enter(State.SLOW, cause, now)
        case.quick_s = quick_s
        return Change(neighbour, handler, State.SLOW, f"is {case.shown(now)[1]}")

    def _state(self, neighbour: str, handler: str) -> State:
        case = self.cases[neighbour].get(handler)
        return case.state if case else State.HEALTHY

    def _heal(self, neighbour: str, handler: str, reason: str) -> Change:
        self.cases[neighbour].pop(handler, None)
        return Change(neighbour, handler, State.HEALTHY, reason)


def _verdict(code: Code, executed: Executed) -> Verdict:
    if code is Code.UNAVAILABLE:
        return Verdict.BAD
    if code is Code.DEADLINE_EXCEEDED:
        return _LATENESS[executed]
    if code is Code.CANCELLED:  # by the caller
        return Verdict.NEITHER
    return Verdict.GOOD if executed is Executed.YES else Verdict.NEITHER


_LATENESS = {
    Executed.NO: Verdict.NEITHER,  # out of time before it was sent
    Executed.YES: Verdict.LATE,
    Executed.UNKNOWN: Verdict.BAD,
}


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
