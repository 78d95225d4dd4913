"""Which neighbours are healthy, by the outcomes of the requests that were sent to them. Sans-IO.

    healthy     5 requests in a row without an answer   -> ejected, for 1 s
                more than 3 times as slow as its peers  -> slow
    ejected     the pause is over                       -> half-open
    half-open   the next request is answered            -> healthy
                it is not                               -> ejected, for twice as long, 30 s at most
    slow        at most twice as slow as its peers      -> healthy

This affects only requests in mode ANY: a slow neighbour gets a trial request now and then, and what
is too much for its peers; an ejected one gets none unless no other is left. Requests in mode ALL
ask every neighbour.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from enum import IntEnum
from statistics import median_low
from typing import NamedTuple

from overlay.model.segments import Code, Executed, Slice

FAILURES = 5  # in a row; fewer happen by chance when a connection breaks
SLOW_RATIO = 3.0  # to the service time of its peers: beyond the usual noise
RECOVERED_RATIO = 2.0  # up to this it is healthy again; between the two it keeps its state
MIN_DIFFERENCE_S = 0.001  # a smaller difference is not worth a detour
COMPARE_S = 0.5  # between two comparisons of service times


class State(IntEnum):
    """Of a neighbour for one handler, in the order in which neighbours are asked."""

    HALF_OPEN = -1  # the next request is a trial
    HEALTHY = 0
    SLOW = 1
    EJECTED = 2


class Pause(NamedTuple):
    """Seconds to the first trial, and at most between two; they double while trials fail."""

    first_s: float
    max_s: float


# A slow neighbour works: its trials cost their callers time, but no request is lost.
PAUSES = {State.SLOW: Pause(0.5, 5.0), State.EJECTED: Pause(1.0, 30.0)}


class Verdict(IntEnum):
    """What an answer says about the neighbour that gave it."""

    NEITHER = 0
    LATE = 1  # a worker reported that it had no result in time
    BAD = 2
    GOOD = 3


class Outcome(NamedTuple):
    """How requests ended, and why they failed. rows: how many ended like this.

    took_s: the handler's time for each. service_s: the recent service time. 0 if unknown.
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
    """What a slice of answers says about the neighbour. to_all: they answer requests to all.

    Bad: it could not be reached, or did not answer in time. A handler's outcome is an answer, even
    if it raised. A refusal that proves that nothing ran is neither: a process gives it when it
    stops in order, and its link shows that. Nor does an unreachable process below say anything
    about the one that reports it, if the request had to go to that very process: in mode ALL.
    """
    refused = answers.refused
    if refused is not None:
        proof = refused.executed is Executed.NO
        verdict = Verdict.NEITHER if proof else _verdict(refused.code, refused.executed)
        return Outcome(verdict, answers.count, refused.reason)
    worst = Verdict.NEITHER, ""
    for column in answers.parts:
        if column.failed is None and len(column.failures) < answers.count:
            return Outcome(Verdict.GOOD, answers.count, "", column.worked_us / 1e6, service_s)
        for failure in [column.failed] if column.failed else column.failures.values():
            if to_all and failure.executed is Executed.NO:
                continue
            worst = max(worst, (_verdict(failure.code, failure.executed), failure.reason))
    return Outcome(worst[0], answers.count, worst[1])


class PeerHealth:
    """The health of one neighbour for one handler."""

    __slots__ = ("cause", "failures", "on_trial", "pause_s", "recovered_s", "retry_at", "state")

    def __init__(self) -> None:
        self.state = State.HEALTHY
        self.cause = ""
        self.failures = 0  # in a row
        self.pause_s = 0.0
        self.retry_at = 0.0  # when the next trial may start
        self.on_trial = False
        self.recovered_s = 0.0  # slow until its service time is at most this

    def state_at(self, now: float) -> State:
        """Its state, or HALF_OPEN if a trial is due."""
        if self.state is State.HEALTHY or self.on_trial or now < self.retry_at:
            return self.state
        return State.HALF_OPEN

    def describe(self, now: float) -> tuple[str, str]:
        """The state and its reason, as text."""
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

    def wait(self, now: float, factor: float = 1.0) -> None:
        """No trial for another pause, `factor` times as long as the last one."""
        self.pause_s = min(factor * self.pause_s, PAUSES[self.state].max_s)
        self.retry_at = now + self.pause_s
        self.on_trial = False


class OutlierDetector:
    """The health of one process's neighbours, by handler. Has no lock: its owner holds one.

    lone: neighbours that lead to one worker each. Others are never slow: they detect themselves
    which of their workers are slow, and send these less.
    `unhealthy` has an entry for each handler with which a neighbour fails or is slow; the owner may
    read it at any time.
    """

    def __init__(self, neighbours: Iterable[str], lone: Collection[str]) -> None:
        self.unhealthy: dict[str, dict[str, PeerHealth]] = {n: {} for n in neighbours}
        self.ejections = dict.fromkeys(self.unhealthy, 0)
        self._lone = lone
        self._suspects: dict[tuple[str, str], float] = {}  # their time in the last comparison
        self._next_comparison = 0.0

    def begin(self, neighbour: str, handler: str, now: float) -> None:
        """A request is sent there now."""
        health = self.unhealthy[neighbour].get(handler)
        if health is not None and health.state_at(now) is State.HALF_OPEN:
            health.on_trial = True

    def record(
        self, neighbour: str, handler: str, outcome: Outcome, up: Collection[str], now: float
    ) -> Change | None:
        """Requests have ended. up: the neighbours whose links are up."""
        verdict = outcome.verdict
        if verdict is Verdict.GOOD:
            return self._good(neighbour, handler, outcome, now)
        # That one worker is late says nothing about a team leader with several.
        if verdict is Verdict.BAD or (verdict is Verdict.LATE and neighbour in self._lone):
            return self._bad(neighbour, handler, outcome, up, now)
        health = self.unhealthy[neighbour].get(handler)
        if health is not None and health.on_trial:
            health.wait(now)
        return None

    def capacity_added(self, neighbour: str, now: float) -> None:
        """It has gained workers: a trial is due immediately."""
        for health in self.unhealthy[neighbour].values():
            health.retry_at = now

    def forget(self, neighbour: str) -> None:
        """Its link has gone down or come up, which says more than its past answers."""
        self.unhealthy[neighbour].clear()

    def look(self, service_times: Mapping[str, Mapping[str, float]], now: float) -> list[Change]:
        """Compares the neighbours that are up. service_times: neighbour -> handler -> seconds."""
        unhealthy = {handler for found in self.unhealthy.values() for handler in found}
        changes: list[Change] = []
        for handler in sorted(unhealthy):
            changes += self._reinstate(handler, service_times)
        if now >= self._next_comparison:
            self._next_comparison = now + COMPARE_S
            for handler in sorted({h for known in service_times.values() for h in known}):
                one = {n: known[handler] for n, known in service_times.items() if handler in known}
                changes += self._compare(handler, one, now)
        return changes

    def describe(self, neighbour: str, now: float) -> tuple[str, str]:
        """The state and its reason for the handler with which it is worst, as text."""
        found = self.unhealthy[neighbour].items()
        handler, worst = max(found, key=lambda item: item[1].state, default=("", PeerHealth()))
        state, reason = worst.describe(now)
        return state, f"handler {handler}: {reason}" if handler and reason else reason

    def _good(self, neighbour: str, handler: str, outcome: Outcome, now: float) -> Change | None:
        health = self.unhealthy[neighbour].get(handler)
        if health is None:
            return None
        if health.state is State.EJECTED:
            return self._recover(neighbour, handler, "answers again")
        if health.state is State.HEALTHY:
            del self.unhealthy[neighbour][handler]
            return None
        health.failures = 0
        if 0 < outcome.service_s <= health.recovered_s:
            return self._recover(neighbour, handler, f"is quick again: {_ms(outcome.service_s)}")
        if outcome.took_s > health.recovered_s:
            health.wait(now, factor=2)
        else:  # trials follow immediately until its service time has come down
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
                return None  # it was sent before the ejection
            health.wait(now, factor=2)
        elif health.failures >= FAILURES and self._may_eject(neighbour, handler, up):
            health.enter(State.EJECTED, "", now)
        else:
            if tried:
                health.wait(now, factor=2)
            return None
        health.cause = f"{health.failures} requests in a row without an answer; "
        health.cause += f"the last: {outcome.reason}"
        self.ejections[neighbour] += 1
        return Change(neighbour, handler, State.EJECTED, f"is {health.describe(now)[1]}")

    def _may_eject(self, neighbour: str, handler: str, up: Collection[str]) -> bool:
        """At most half of the neighbours that are up, and only while another one answers."""
        others = [self.unhealthy[n].get(handler) for n in up if n != neighbour]
        ejected = sum(health is not None and health.state is State.EJECTED for health in others)
        answering = any(health is None or not health.failures for health in others)
        return neighbour in up and answering and 2 * (ejected + 1) <= len(up)

    def _reinstate(self, handler: str, up: Collection[str]) -> list[Change]:
        """If more than half are ejected now that others are down, those due next come back."""
        found = [(n, self.unhealthy[n].get(handler)) for n in up]
        ejected = [
            (health.retry_at, n) for n, health in found if health and health.state is State.EJECTED
        ]
        too_many = len(ejected) - len(up) // 2
        why = "is asked again: too few others are left"
        return [self._recover(n, handler, why) for _, n in sorted(ejected)[: max(0, too_many)]]

    def _compare(
        self, handler: str, service_times: Mapping[str, float], now: float
    ) -> list[Change]:
        changes = []
        ejected = {n for n in service_times if self._state(n, handler) is State.EJECTED}
        for neighbour in sorted(set(service_times) & set(self._lone) - ejected):
            peers = [service_times[n] for n in service_times if n != neighbour and n not in ejected]
            if peers:
                change = self._judge(
                    neighbour, handler, service_times[neighbour], median_low(peers), now
                )
                changes += [change] if change else []
        return changes

    def _judge(
        self, neighbour: str, handler: str, service_s: float, peers_s: float, now: float
    ) -> Change | None:
        """Whether one is slow, by the service time of its peers."""
        key, cause = (neighbour, handler), f"{_ms(service_s)} where its peers take {_ms(peers_s)}"
        recovered_s = max(RECOVERED_RATIO * peers_s, peers_s + MIN_DIFFERENCE_S)
        if self._state(neighbour, handler) is State.SLOW:
            health = self.unhealthy[neighbour][handler]
            health.cause, health.recovered_s = cause, recovered_s
            if service_s > recovered_s:
                return None
            return self._recover(neighbour, handler, f"is not slow: {cause}")
        if service_s <= max(SLOW_RATIO * peers_s, peers_s + MIN_DIFFERENCE_S):
            self._suspects.pop(key, None)
            return None
        # A single request may have been slow: the next comparison must find a new, slow time.
        if self._suspects.setdefault(key, service_s) == service_s:
            return None
        del self._suspects[key]
        health = self.unhealthy[neighbour].setdefault(handler, PeerHealth())
        health.enter(State.SLOW, cause, now)
        health.recovered_s = recovered_s
        return Change(neighbour, handler, State.SLOW, f"is {health.describe(now)[1]}")

    def _state(self, neighbour: str, handler: str) -> State:
        health = self.unhealthy[neighbour].get(handler)
        return health.state if health else State.HEALTHY

    def _recover(self, neighbour: str, handler: str, reason: str) -> Change:
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
    Executed.NO: Verdict.NEITHER,  # expired before it was sent
    Executed.YES: Verdict.LATE,
    Executed.UNKNOWN: Verdict.BAD,
}


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
