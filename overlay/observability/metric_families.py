"""The metrics of a process as people see them: a row for each family.

Prometheus gets them all, with `overlay_` before the name. `client.py check` has a line for each
that has a `fact`. They are read from a MetricsResponse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

GAUGE, COUNTER = "gauge", "counter"
JOB_STATES = ("waiting", "running", "done", "failed", "quarantined", "cancelled", "expired")
Samples = Callable[[Any], Iterable[tuple[Any, ...]]]
"""Samples of a metric: the value of each label, then the sample's own."""


class Family(NamedTuple):
    """One metric, or one for each combination of its labels.

    help: what it is, for Prometheus. fact: its label in `check`, which shows it when it is not 0;
    empty if `check` shows it elsewhere or not at all. unit: what is counted, if no label says so.
    """

    name: str
    kind: str
    samples: Samples
    help: str
    labels: tuple[str, ...] = ()
    fact: str = ""
    unit: str = ""


def facts(metrics: Any) -> Iterator[tuple[str, str]]:
    """The lines of `check`: (label, text), which is empty if all samples are 0."""
    for family in FAMILIES:
        if family.fact:
            found = [(value, *labels) for *labels, value in family.samples(metrics) if value]
            words = (" ".join(map(str, (*one, family.unit))).strip() for one in found)
            yield family.fact, ", ".join(words)


def _one(name: str) -> Samples:
    return lambda m: [(getattr(m, name),)]


def _map(name: str) -> Samples:
    return lambda m: sorted(getattr(m, name).items())


def _links(name: str) -> Samples:
    return lambda m: [(link.process_id, getattr(link, name)) for link in m.neighbours]


def _handlers(name: str) -> Samples:
    return lambda m: [(handler.name, getattr(handler, name)) for handler in m.handlers]


def _started(m: Any) -> Iterable[tuple[float]]:
    return [(m.wall_time_s - m.uptime_s,)]


def _count_of(field: str) -> Samples:
    return lambda m: [(len(getattr(m, field)),)]


def _expiry(m: Any) -> Iterable[tuple[float]]:
    return [(m.security.expires_s,)] if m.security.expires_s else []


def _ended(m: Any) -> Iterable[tuple[str, int]]:
    return [(how, getattr(m, how)) for how in ("completed", "failed", "refused", "cancelled")]


def _jobs(m: Any) -> Iterable[tuple[str, int]]:
    """By state, of a process with a journal."""
    return [(state, getattr(m.jobs, state)) for state in JOB_STATES] if m.jobs.max_jobs else []


def _of_jobs(name: str) -> Samples:
    return lambda m: [(getattr(m.jobs, name),)] if m.jobs.max_jobs else []


def _links_up(m: Any) -> Iterable[tuple[str, bool]]:
    return [(link.process_id, link.state == "up") for link in m.neighbours]


def _handled(m: Any) -> Iterable[tuple[str, str, int]]:
    return [(h.name, how, getattr(h, how)) for h in m.handlers for how in ("completed", "failed")]


CROWDED = "Calls, streams and connections ended or refused because there were too many."
FAMILIES = (
    Family("serving", GAUGE, _one("is_healthy"), "1 while it takes requests, 0 while it stops."),
    Family("start_time_seconds", GAUGE, _started, "When it started, since 1970."),
    Family("certificate_expiry_time_seconds", GAUGE, _expiry,
           "When its certificate expires, since 1970; absent without TLS."),
    Family("requests_received", COUNTER, _one("received"), "Requests received."),
    Family("requests_ended", COUNTER, _ended,
           "Requests that ended, each with one of four outcomes.", ("outcome",)),
    Family("requests_refused", COUNTER, _map("refused_by_reason"),
           "Requests refused before any handler ran.", ("reason",), fact="refused"),
    Family("requests_waiting", GAUGE, _one("queue_size"), "Single requests in the queue."),
    Family("queue_slots", GAUGE, _one("queue_slots"), "How many requests the queue can hold."),
    Family("requests_in_service", GAUGE, _one("active_requests"), "Single requests in service."),
    Family("service_slots", GAUGE, _one("max_capacity"), "How many can be in service."),
    Family("crowded_out", COUNTER, _map("crowded_out"), CROWDED, ("what",), fact="ended"),
    Family("calls_without_message", GAUGE, _one("calls_without_message"),
           "Calls whose message has not arrived."),
    Family("idempotency_keys", GAUGE, _one("keys"), "Idempotency keys kept."),
    Family("idempotency_bytes", GAUGE, _one("key_bytes"), "Bytes of the answers kept for them."),
    Family("idempotency_waiters", GAUGE, _one("key_waiters"),
           "Calls waiting for the first with their key."),
    Family("streams", GAUGE, _one("streams"), "Open streams."),
    Family("streamed_requests_waiting", GAUGE, _one("streamed_waiting"),
           "Waiting requests of streams."),
    Family("streamed_requests_slots", GAUGE, _one("streamed_slots"),
           "How many requests of the open streams may wait."),
    Family("streamed_requests_in_service", GAUGE, _one("streamed_active"),
           "Requests of streams in service."),
    Family("lanes", GAUGE, _count_of("lanes"), "Workers lent to clients."),
    Family("lane_requests", COUNTER, _one("lane_requests"),
           "Requests that went straight to a lent worker."),
    Family("jobs", GAUGE, _jobs, "Jobs in the journal.", ("state",)),
    Family("jobs_bytes", GAUGE, _of_jobs("bytes"), "Bytes of their payloads and answers."),
    Family("jobs_slots", GAUGE, _of_jobs("max_jobs"), "How many jobs the journal can hold."),
    Family("jobs_accepted", COUNTER, _of_jobs("accepted"), "Jobs accepted."),
    Family("jobs_refused", COUNTER, _of_jobs("refused"), "Jobs refused, as there was no room."),
    Family("jobs_repeated", COUNTER, _of_jobs("repeated"), "Attempts of jobs begun again."),
    Family("job_waiters", GAUGE, _of_jobs("waiters"), "Calls that wait for a job's end."),
    Family("log_lines_dropped", COUNTER, _one("log_lines_dropped"), "Log lines not written.",
           fact="log", unit="lines dropped"),
    Family("link_up", GAUGE, _links_up, "1 while requests can be sent.", ("neighbour",)),
    Family("link_same_config", GAUGE, _links("same_config"),
           "1 if its configuration is the same.", ("neighbour",)),
    Family("link_outstanding_requests", GAUGE, _links("outstanding"),
           "Requests sent and not yet answered.", ("neighbour",)),
    Family("link_requests", COUNTER, _links("asked"),
           "Requests sent to the neighbour.", ("neighbour",)),
    Family("link_failures", COUNTER, _links("failed"),
           "Of those, how many failed.", ("neighbour",)),
    Family("link_ejections", COUNTER, _links("ejections"),
           "How often it was ejected.", ("neighbour",)),
    Family("handler_running", GAUGE, _handlers("active"),
           "Requests that the handler is running.", ("handler",)),
    Family("handler_slots", GAUGE, _handlers("slots"),
           "How many it can run at once.", ("handler",)),
    Family("handler_requests", COUNTER, _handled,
           "Requests it has run.", ("handler", "outcome")),
)  # fmt: skip
