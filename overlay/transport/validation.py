"""Validates messages from other processes before anything acts on them.

The sender may be broken, hostile or of an unknown release: a slice of 60 bytes can claim 2^32 rows.
Everything that a process or client reads from another process passes through here first, and raises
BadResponse if it does not fit the request or exceeds any reasonable limit.

All parts, hops and failures of an answer are checked, but not each row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from overlay.model.errors import BadResponse
from overlay.model.jobs import is_job_id
from overlay.model.limits import Limits
from overlay.model.topology import ROLES
from overlay.observability.log_buffer import escaped

_LIMITS = Limits()
MAX_NAME = _LIMITS.max_name
MAX_TEXT = _LIMITS.max_text
MAX_PARTS = _LIMITS.max_targets
MAX_HOPS = _LIMITS.max_targets + _LIMITS.max_hops  # of an answer: all workers, and those in between
MAX_ENTRIES = _LIMITS.max_targets  # of any list in a process's metrics
MAX_SLOTS = _LIMITS.max_reported_slots
MAX_CHARACTERS = _LIMITS.functions_characters
MAX_RETRY_S = _LIMITS.max_deadline_s  # no request waits longer
MESSAGE_BYTES = range(_LIMITS.min_message_limit, _LIMITS.max_message_limit + 1)


_checked: set[tuple[str, ...]] = {()}  # hops that were valid recently


class Asked(NamedTuple):
    """What a slice may answer, whichever rows are still open.

    targets: the workers that may have a part in it; None if the process asked chooses them.
    partial: parts may arrive before the answer. chunks: they may arrive in chunks.
    """

    rows: int
    targets: frozenset[str] | None = None
    partial: bool = False
    chunks: bool = False


ReadPart = tuple[Any, str, int, Any, tuple[str, ...]]
"""A part's fields, read once: the message, its worker, number of results, failures and hops."""


def check_slice(
    message: Any, asked: Asked, results: bool = True
) -> tuple[list[ReadPart], tuple[str, ...]]:
    """Checks a slice between processes or, with `results` false, one for a client.

    Returns its parts and hops. Raises BadResponse.
    """
    count = message.count
    if not 0 < count <= asked.rows - message.start:
        raise BadResponse(f"rows {message.start} to +{count} of a segment of {asked.rows}")
    more = message.more
    if more and not asked.partial:
        raise BadResponse("parts before the answer, where none were requested")
    parts = [read_part(part) for part in message.parts]
    if parts:
        _check_workers([part[1] for part in parts], asked.targets)
        for part in parts:
            _check_part(part, count, asked, more, results)
    if message.failures:
        _check_failures(message.failures, count)
    if message.trace:
        _check_trace(message.trace)
    if not results:
        _check_results(message, count)
    return parts, _hops(message.hops)


def read_part(part: Any) -> ReadPart:
    """Reads a part. Raises BadResponse for its hops."""
    return part, part.process_id, len(part.results.items), part.failures, _hops(part.hops)


def check_response(message: Any) -> None:
    """Checks the answer to a unary request. Raises BadResponse."""
    workers = {part.process_id for part in message.parts}
    if len(workers) < len(message.parts):
        raise BadResponse("two parts of one worker in one answer")
    _check_names("parts", workers, MAX_PARTS)
    _check_names("hops", message.hops, MAX_HOPS)
    for part in message.parts:
        _check_names("hops", part.hops, MAX_HOPS)
    _check_trace(message.trace)


def check_metrics(message: Any) -> None:
    """Checks metrics, and cuts and escapes their texts in place. Raises BadResponse."""
    tidy(message)
    ids = {process.id for process in message.topology}
    if len(ids) < len(message.topology):
        raise BadResponse("topology: one process twice")
    if ids and message.process_id not in ids:
        raise BadResponse(f"topology: it does not have '{_shown(message.process_id)}' itself")
    _check_names("topology", ids, MAX_ENTRIES)
    _check_names("process_id", (message.process_id,))
    for process in message.topology:
        _check_process(process, ids)
    _check_functions(message.functions)
    for histogram in (message.service, message.waiting):
        if histogram.bounds_s and len(histogram.counts) != len(histogram.bounds_s) + 1:
            raise BadResponse("a histogram with a count too many or too few")


def check_logs(message: Any, process_id: str, lines: int) -> None:
    """Checks at most `lines` lines of a log, and tidies them in place. Raises BadResponse."""
    tidy(message)
    if message.process_id != process_id:
        raise BadResponse(
            f"the log of '{_shown(message.process_id)}', not of '{_shown(process_id)}'"
        )
    if len(message.lines) > lines:
        raise BadResponse(f"{len(message.lines)} lines, and {lines} were asked for")


def check_job_ids(ids: Sequence[str], count: int) -> None:
    """Checks the ids of jobs that were submitted. Raises BadResponse."""
    if len(ids) != count:
        raise BadResponse(f"{len(ids)} ids for {count} jobs")
    for id_ in ids:
        _check_job_id(id_)


def check_job(id_: str, message: Any) -> None:
    """Checks a job that was asked for, and tidies its texts in place. Raises BadResponse."""
    if message.id != id_:
        raise BadResponse(f"job '{_shown(message.id)}', not '{_shown(id_)}'")
    if message.HasField("answer"):
        check_response(message.answer)
    tidy(message)


def check_jobs(message: Any) -> None:
    """Checks a list of jobs, and tidies it in place. Raises BadResponse."""
    tidy(message)
    for job in message.jobs:
        _check_job_id(job.id)


def _check_job_id(id_: str) -> None:
    if not is_job_id(id_):
        raise BadResponse(f"'{_shown(id_)}' is not the id of a job")


def tidy(message: Any) -> None:
    """Checks a message that people will read, and cuts and escapes its texts in place.

    Raises BadResponse for negative numbers, NaN, unknown enum values, and too long lists or names.
    """
    for field, value in message.ListFields():
        if isinstance(value, str):
            if len(value) > MAX_TEXT or not value.isprintable():
                setattr(message, field.name, _escaped(field.name, value))
        elif isinstance(value, (bool, bytes)):
            continue
        elif isinstance(value, (int, float)):
            _check_number(field, value)
        elif hasattr(value, "ListFields"):
            tidy(value)
        else:
            _tidy_many(field, value)


def retry_after_s(seconds: float) -> float | None:
    """Another process's time to retry after, bounded; None if it is not positive."""
    return min(seconds, MAX_RETRY_S) if seconds > 0 else None


def max_bytes(value: object) -> int | None:
    """The largest message that another process accepts; None if it gives no valid number."""
    if not (isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 12):
        return None
    return int(value) if int(value) in MESSAGE_BYTES else None


def _escaped(field: str, text: str) -> str:
    if field != "doc":
        return escaped(text, MAX_TEXT)
    return "\n".join(escaped(line) for line in text[:MAX_TEXT].split("\n"))[:MAX_TEXT]


def _check_functions(functions: Sequence[Any]) -> None:
    size = sum(len(f.signature) + len(f.doc) + len(f.arguments) + len(f.result) for f in functions)
    if size > MAX_CHARACTERS:
        raise BadResponse(f"functions: {size:,} characters of them")
    _check_names("functions", [function.name for function in functions])


def request_id(text: object) -> int:
    """A request id from its printed form; 0 if invalid."""
    if not (isinstance(text, str) and len(text) == 16 and set(text) <= _HEXADECIMAL):
        return 0
    return int(text, 16)


_HEXADECIMAL = set("0123456789abcdef")


def _check_workers(workers: list[str], targets: frozenset[str] | None) -> None:
    if len(workers) > 1 and len(set(workers)) < len(workers):
        raise BadResponse("two parts of one worker in one slice")
    if targets is None:
        _check_names("parts", workers, MAX_PARTS)
    elif not targets.issuperset(workers):
        unknown = min(set(workers) - targets)
        raise BadResponse(f"a part of '{_shown(unknown)}', which was not asked")


def _check_part(read: ReadPart, count: int, asked: Asked, more: bool, results: bool) -> None:
    part, worker, found, failures, _ = read
    if failures:
        _check_failures(failures, count)
    if found != count and (found or (results and not _all_failed(failures))):
        raise BadResponse(f"{worker}: {found} results for {count} rows")
    if part.more or part.at:
        if count != 1:
            raise BadResponse(f"{worker}: a chunk for {count} rows")
        if not asked.chunks or not found or (part.more and not more):
            raise BadResponse(f"{worker}: a chunk where none can come")


def _all_failed(failures: Any) -> bool:
    return len(failures) == 1 and not failures[0].count


def _check_failures(details: Any, count: int) -> None:
    """Each must lie within the slice, and there must be no more failures than rows."""
    failed = 0
    for detail in details:
        rows = detail.count or count
        failed += rows
        if failed > count or (detail.count and detail.start + rows > count):
            raise BadResponse(f"failures of rows {detail.start} to +{rows} in a slice of {count}")
        if detail.code == 0:
            raise BadResponse("a failure with the code OK")


def _check_results(message: Any, count: int) -> None:
    """For a client: either one result per row, or none and a failure for every row."""
    found = len(message.results.items)
    if found == count or (found == 0 and message.more):
        return
    failed = sum(detail.count or count for detail in message.failures)
    if found or failed < count:
        raise BadResponse(f"{found} results and {failed} failures for {count} rows")


def _check_trace(trace: Sequence[Any]) -> None:
    _check_names("trace", [hop.process_id for hop in trace], MAX_HOPS)


def _check_process(process: Any, ids: set[str]) -> None:
    if process.role not in ROLES:
        raise BadResponse(f"topology: '{_shown(process.role)}' is not a role")
    _check_names("topology", (process.team, process.handler))
    if unknown := set(process.neighbors) - ids:
        raise BadResponse(f"topology: neighbor '{_shown(min(unknown))}' is not in it")
    host, _, port = process.address.rpartition(":")
    if not (host and port.isascii() and port.isdigit() and len(host) < 300 and len(port) < 6):
        raise BadResponse(f"topology: '{_shown(process.address)}' is not host:port")
    check_slots(process.slots)


def check_slots(slots: Mapping[str, int]) -> None:
    if len(slots) > MAX_ENTRIES or any(not 0 <= n <= MAX_SLOTS for n in slots.values()):
        raise BadResponse(f"slots: not 0 to {MAX_SLOTS:,} of each handler")


def _tidy_many(field: Any, values: Any) -> None:
    if len(values) > MAX_ENTRIES:
        raise BadResponse(f"{field.name}: {len(values):,} entries")
    if hasattr(values, "items"):
        _check_names(field.name, values)
        for value in values.values():
            _check_number(field, value)
        return
    for value in values:
        if isinstance(value, str):
            _check_names(field.name, (value,))
        elif isinstance(value, (int, float)):
            _check_number(field, value)
        else:
            tidy(value)


def _check_number(field: Any, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise BadResponse(f"{field.name}: {value} is not a number from 0 on")
    if field.enum_type is not None and value not in field.enum_type.values_by_number:
        raise BadResponse(f"{field.name}: {value} is not one of its values")


def _hops(hops: Sequence[str]) -> tuple[str, ...]:
    """Raises BadResponse."""
    names = tuple(hops)
    if names not in _checked:  # the same few routes recur
        _check_names("hops", names, MAX_HOPS)
        if len(_checked) > 1000:
            _checked.clear()
        if len(names) < 32:
            _checked.add(names)
    return names


def _check_names(field: str, names: Iterable[str], limit: int = MAX_ENTRIES) -> None:
    names = names if isinstance(names, tuple) else tuple(names)
    if len(names) > limit:
        raise BadResponse(f"{field}: {len(names):,} entries")
    if max(map(len, names), default=0) > MAX_NAME or not "".join(names).isprintable():
        invalid = next(n for n in names if len(n) > MAX_NAME or not n.isprintable())
        raise BadResponse(f"{field}: '{_shown(invalid)}' is not a name")


def _shown(text: str) -> str:
    return ascii(text[:20])[1:-1]
