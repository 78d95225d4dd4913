"""`client.py HOST PORT result ID`: how a job stands, and its answer as the verb ask shows one.

Without --wait it returns at once. While it waits, a terminal shows on one line how the job stands.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator

from rich.progress import Progress, TextColumn

from overlay.cli import job_text
from overlay.cli.ask import answer_as_json, answer_facts, show_parts, write_result
from overlay.cli.terminal import Exit, Screen, connected, error_as_json, failed
from overlay.cli.text import clean
from overlay.cli.usage import (
    Parser,
    complain,
    duration,
    job_id,
    out_file,
    program,
    shared_options,
)
from overlay.client import sync as library
from overlay.client.job_status import JobStatus
from overlay.client.jobs import Job
from overlay.model import clocks as time
from overlay.model.addresses import join_address

DEADLINE_S = 10.0


def arguments(parser: Parser) -> None:
    parser.usage = f"{parser.prog} ID [options]"
    add = parser.add_argument
    add("id", metavar="ID", type=job_id, help="of the job, as submit has printed it")
    add(
        "--wait",
        type=_patience,
        nargs="?",
        const=math.inf,
        metavar="SECONDS",
        help="wait until the job is over; with a number, for so long at most (also 15m, 1h)",
    )
    add("--parts", action="store_true", help="show each worker's own result and times")
    add(
        "--out",
        type=out_file,
        metavar="FILE",
        help="write the exact bytes of the result there; - is standard output, and the report goes "
        "to standard error then; of a job in parts those of each worker, newlines between",
    )
    shared_options(parser, deadline_s=DEADLINE_S)


def _patience(text: str) -> float:
    try:
        return duration(text)
    except argparse.ArgumentTypeError as e:
        raise argparse.ArgumentTypeError(f"{e}; the ID comes before --wait") from None


def run(args: argparse.Namespace) -> int:
    address = join_address(args.host, args.port)
    try:
        handle = connected(args).job(args.id)
        job = _found(handle, args)
    except library.CallFailed as e:
        return failed(e, address, args.json, of_a_request=False)
    except KeyboardInterrupt:
        complain(f"the job goes on; {_command(args, 'result', args.id, '--wait')} waits again")
        raise
    try:
        if args.out and job.answer is not None and not write_result(args.out, _bytes(handle, job)):
            return Exit.FAILED
    except library.CallFailed as e:
        cut = f"; '{args.out}' has only the beginning"
        return failed(e, address, args.json, of_a_request=False, remark=cut)
    code = exit_of(job)
    report = Screen(sys.stderr if args.out == "-" else sys.stdout)
    if args.json:
        report.json(_as_json(job, address, code, args.parts))
    else:
        _show(report, job, args)
    return code


def _bytes(handle: Job, job: JobStatus) -> Iterator[bytes]:
    """The exact bytes of the result; of a job in parts those of each worker, newlines between.
    Raises CallFailed."""
    assert job.answer is not None
    if not job.in_parts:
        yield job.answer.result
        return
    between = b""
    for part in job.answer.parts:
        if part.ok:
            yield between
            yield from handle.chunks(part)
            between = b"\n"


def exit_of(job: JobStatus) -> Exit:
    if not job.is_over:
        return Exit.LATE
    if job.answer is None:
        return Exit.FAILED
    return Exit.INCOMPLETE if job.answer.missing else Exit.OK


def _found(job: Job, args: argparse.Namespace) -> JobStatus:
    """How it stands, or how it ended if it is waited for. Raises CallFailed."""
    found = job.status(timeout=args.deadline)  # a missing leader, or job, is reported at once
    if args.wait and not found.is_over:
        try:
            with _Line() as line:
                line.show(found)
                return job.wait(None if args.wait == math.inf else args.wait, on_status=line.show)
        except library.DeadlinePassed:
            found = job.status(timeout=args.deadline)
    return job.wait(args.deadline) if found.state == "done" else found


def _show(report: Screen, job: JobStatus, args: argparse.Namespace) -> None:
    now = time.time()
    error_id = job_text.error_id_of(job.reason)
    remedy = f"{_command(args, 'quarantine release', job.id)} runs it again"
    report.facts(
        ("state", job_text.standing(job, now)),
        ("reason", job.reason),
        ("next", remedy if job.state == "quarantined" else ""),
        ("logs", _command(args, "logs --error", error_id) if error_id else ""),
        *([] if job.answer is None else answer_facts(job.answer, args.out, job.in_parts)),
        *job_text.facts(job, now),
    )
    if args.parts and job.answer is not None:
        show_parts(report, job.answer, job.in_parts)


def _as_json(job: JobStatus, address: str, code: Exit, with_results: bool) -> dict[str, object]:
    found: dict[str, object] = {"ok": code in (Exit.OK, Exit.INCOMPLETE), "exit_code": int(code)}
    found |= {"address": address, "job": job_text.as_json(job)}
    if job.answer is not None:
        took_ms = max(0.0, job.ended - job.started) * 1000
        shown = answer_as_json(job.answer, address, took_ms, code, with_results, job.in_parts)
        return shown | found
    return found | ({"error": error_as_json(job.error(), address)} if job.is_over else {})


def _command(args: argparse.Namespace, *words: str) -> str:
    return " ".join([program(), args.host, str(args.port), *words])


class _Line:
    """How the job stands, on one line of stderr, when that is a terminal."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        if sys.stderr.isatty():
            text = TextColumn("{task.fields[text]}", markup=False)
            self._progress = Progress(
                text, console=Screen(sys.stderr), transient=True, refresh_per_second=4
            )
            self._task = self._progress.add_task("", total=None, text="")

    def __enter__(self) -> _Line:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def show(self, job: JobStatus) -> None:
        if self._progress is not None:
            text = clean(job_text.standing(job, time.time()))
            self._progress.update(self._task, text=text)
