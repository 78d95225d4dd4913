"""Which neighbours are healthy, by the outcomes of the requests that they were given. Sans-IO.

    healthy     5 requests in a row without an answer   -> ejected, for 1 s
                3 times as slow as its peers            -> slow
    ejected     its time is over                        -> half-open
    half-open   the next request is answered            -> healthy
                it is not                               -> ejected, for twice as long, 30 s at most
    slow        its time is near that of its peers      -> healthy

It matters to requests to any one only: a slow neighbour gets one at a time, now and then, and what
is too much for its peers; an ejected one gets none, unless no other is left. A request to all asks
every one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from enum import IntEnum
from statistics import median_low
from typing import NamedTuple

from overlay.model.segments import Code, Executed, Slice

FAILURES = 5  # in a row; fewer come by chance, when a few were under way on one connection
SLOW_TIMES = 3.0  # as slow as its peers: more than one machine's usual noise
QUICK_TIMES = 2.0  # below this it is healthy again; between the two it stays what it is
SLOW_BY_S = 0.001  # a smaller difference is not worth a detour
LOOK_S = 0.5  # between two comparisons of service times


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


# A slow one does work: its trials cost their callers time, and no request is lost.
PAUSES = {State.SLOW: Pause(0.5, 5.0), State.EJECTED: Pause(1.0, 30.0)}


class Verdict(IntEnum):
    """What an answer says of the neighbour that gave it."""

    NEITHER = 0
    LATE = 1  # a worker had no result in time, and said so
    BAD = 2
    GOOD = 3


class Outcome(NamedTuple):
    """What became of requests, all the same way: of so many rows, and why they failed.

    took_s: the handler's time for each now, service_s: what it took recently; 0 when not known.
    """

    verdict: Verdict
    rows: int
    reason: str = ""
    took_s: float = 0.0
    service_s: float = 0.0


class Change(NamedTuple):
    """A decision, for the log."""

    neighbour: str
    handler: str
    state: State
    reason: str


def classify(answers: Slice, service_s: float, to_all: bool = False) -> Outcome:
    """What a slice of answers says of the neighbour. to_all: of requests to all.

    Bad: it could not be reached, or no answer came in time. What a handler made of its request is
    an answer, also when it raised. A refusal with the proof that nothing ran is neither: a process
    that stops in good order gives it, and its link will tell. That a process below cannot be
    reached says nothing of the one that reports it, where only that one was to be asked: in a
    request to all.
    """
    refused = answers.refused
    if refused is not None:
        proof = refused.executed is Executed.NO
        verdict = Verdict.NEITHER if proof else _verdict(refused.code, refused.executed)
        return Outcome(verdict, answers.count, refused.reason)
    found = Verdict.NEITHER, ""
    for column in answers.parts:
        if column.failed is None and len(column.failures) < answers.count:
            return Outcome(Verdict.GOOD, answers.count, "", column.worked_us / 1e6, service_s)
        for failure in [column.failed] if column.failed else column.failures.values():
            if to_all and failure.executed is Executed.NO:
                continue
            found = max(found, (_verdict(failure.code, failure.executed), failure.reason))
    return Outcome(found[0], answers.count, found[1])


class PeerHealth:
    """Of one neighbour with one handler."""

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

    lone: those that stand for one worker each. Others are never slow: they see themselves which of
    their workers are, and give those less.
    `unhealthy` has an entry for each handler with which a neighbour fails or is slow; its owner may
    read it at any time.
    """

    def __init__(self, neighbours: Iterable[str], lone: Collection[str]) -> None:
        self.unhealthy: dict[str, dict[str, PeerHealth]] = {n: {} for n in neighbours}
        self.ejections = dict.fromkeys(self.unhealthy, 0)
        self._lone = lone
        self._odd: dict[tuple[str, str], float] = {}  # slow at the last comparison, with this time
        self._next_look = 0.0

    def begin(self, neighbour: str, handler: str, now: float) -> None:
        """A request goes there now."""
        health = self.unhealthy[neighbour].get(handler)
        if health is not None and health.standing(now) is State.HALF_OPEN:
            health.on_trial = True

    def record(
        self, neighbour: str, handler: str, outcome: Outcome, up: Collection[str], now: float
    ) -> Change | None:
        """Requests have ended. up: the neighbours whose links are up."""
        verdict = outcome.verdict
        if verdict is Verdict.GOOD:
            return self._good(neighbour, handler, outcome, now)
        # That one worker is late says nothing of a team leader with others.
        if verdict is Verdict.BAD or (verdict is Verdict.LATE and neighbour in self._lone):
            return self._bad(neighbour, handler, outcome, up, now)
        health = self.unhealthy[neighbour].get(handler)
        if health is not None and health.on_trial:
            health.wait(now)
        return None

    def capacity_added(self, neighbour: str, now: float) -> None:
        """There are workers behind it that were not there before: a trial is due at once."""
        for health in self.unhealthy[neighbour].values():
            health.retry_at = now

    def forget(self, neighbour: str) -> None:
        """Its link has gone down or come up, which says more than its answers."""
        self.unhealthy[neighbour].clear()

    def look(self, service_times: Mapping[str, Mapping[str, float]], now: float) -> list[Change]:
        """Compares the neighbours that are up. service_times: neighbour -> handler -> seconds."""
        ill = {handler for found in self.unhealthy.values() for handler in found}
        changes = [
            change for handler in sorted(ill) for change in self._relieve(handler, service_times)
        ]
        if now >= self._next_look:
            self._next_look = now + LOOK_S
            for handler in sorted(
                {handler for known in service_times.values() for handler in known}
            ):
                one = {n: known[handler] for n, known in service_times.items() if handler in known}
                changes += self._compare(handler, one, now)
        return changes

    def shown(self, neighbour: str, now: float) -> tuple[str, str]:
        """State and reason of the handler with which it is worst, in words."""
        found = self.unhealthy[neighbour].items()
        handler, worst = max(found, key=lambda item: item[1].state, default=("", PeerHealth()))
        state, reason = worst.shown(now)
        return state, f"handler {handler}: {reason}" if handler and reason else reason

    def _good(self, neighbour: str, handler: str, outcome: Outcome, now: float) -> Change | None:
        health = self.unhealthy[neighbour].get(handler)
        if health is None:
            return None
        if health.state is State.EJECTED:
            return self._heal(neighbour, handler, "answers again")
        if health.state is State.HEALTHY:
            del self.unhealthy[neighbour][handler]
            return None
        health.failures = 0
        if 0 < outcome.service_s <= health.quick_s:
            return self._heal(neighbour, handler, f"is quick again: {_ms(outcome.service_s)}")
        if outcome.took_s > health.quick_s:
            health.wait(now, times=2)
        else:  # the next trial follows at once, until its time has come down
            health.retry_at, health.on_trial = now, False
        return None

    def _bad(
        self, neighbour: str, handler: str, outcome: Outcome, up: Collection[str], now: float
    ) -> Change | None:
        health = self.unhealthy[neighbour].setdefault(handler, PeerHealth())
        health.failures += outcome.rows
        tried, health.on_trial = health.on_trial, False
        if health.state is State.EJECTED:
            if not tried:
                return None  # it was under way before
            health.wait(now, times=2)
        elif health.failures >= FAILURES and self._may_eject(neighbour, handler, up):
            health.enter(State.EJECTED, "", now)
        else:
            if tried:
                health.wait(now, times=2)
            return None
        health.cause = f"{health.failures} requests in a row without an answer; "
        health.cause += f"the last: {outcome.reason}"
        self.ejections[neighbour] += 1
        return Change(neighbour, handler, State.EJECTED, f"is {health.shown(now)[1]}")

    def _may_eject(self, neighbour: str, handler: str, up: Collection[str]) -> bool:
        """At most half of those that are up, and only while another one does answer."""
        others = [self.unhealthy[n].get(handler) for n in up if n != neighbour]
        ejected = sum(health is not None and health.state is State.EJECTED for health in others)
        answering = any(health is None or not health.failures for health in others)
        return neighbour in up and answering and 2 * (ejected + 1) <= len(up)

    def _relieve(self, handler: str, up: Collection[str]) -> list[Change]:
        """Of those ejected too many when others went down, the next to be tried come back."""
        found = [(n, self.unhealthy[n].get(handler)) for n in up]
        ejected = [
            (health.retry_at, n) for n, health in found if health and health.state is State.EJECTED
        ]
        too_many = len(ejected) - len(up) // 2
        why = "is asked again: too few others are left"
        return [self._heal(n, handler, why) for _, n in sorted(ejected)[: max(0, too_many)]]

    def _compare(
        self, handler: str, service_times: Mapping[str, float], now: float
    ) -> list[Change]:
        changes = []
        ejected = {n for n in service_times if self._state(n, handler) is State.EJECTED}
        for neighbour in sorted(set(service_times) & set(self._lone) - ejected):
            peers = [service_times[n] for n in service_times if n != neighbour and n not in ejected]
            if peers:
                change = self._place(
                    neighbour, handler, service_times[neighbour], median_low(peers), now
                )
                changes += [change] if change else []
        return changes

    def _place(
        self, neighbour: str, handler: str, service_s: float, peers_s: float, now: float
    ) -> Change | None:
        """Decides on one by its peers' times."""
        key, cause = (neighbour, handler), f"{_ms(service_s)} where its peers take {_ms(peers_s)}"
        quick_s = max(QUICK_TIMES * peers_s, peers_s + SLOW_BY_S)
        if self._state(neighbour, handler) is State.SLOW:
            health = self.unhealthy[neighbour][handler]
            health.cause, health.quick_s = cause, quick_s
            healed = service_s <= quick_s
            return self._heal(neighbour, handler, f"is not slow: {cause}") if healed else None
        if service_s <= max(SLOW_TIMES * peers_s, peers_s + SLOW_BY_S):
            self._odd.pop(key, None)
            return None
        # One comparison may have met a single odd request: the next must find others, slow too.
        if self._odd.setdefault(key, service_s) == service_s:
            return None
        del self._odd[key]
        health = self.unhealthy[neighbour].setdefault(handler, PeerHealth())
        health.enter(State.SLOW, cause, now)
        health.quick_s = quick_s
        return Change(neighbour, handler, State.SLOW, f"is {health.shown(now)[1]}")

    def _state(self, neighbour: str, handler: str) -> State:
        health = self.unhealthy[neighbour].get(handler)
        return health.state if health else State.HEALTHY

    def _heal(self, neighbour: str, handler: str, reason: str) -> Change:
        self.unhealthy[neighbour].pop(handler, None)
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
