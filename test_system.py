"""Tests a running overlay: `python test_system.py HOST PORT`.

Three tests (a single request, the queue's status, 10 concurrent requests) and two more: requests to
any one worker, and the links to the neighbours. The expected answers follow from the configuration,
which the process asked reports. Each test is timed, and a failure comes with advice. The tests can
run beside other work, and any number of times.
"""

from __future__ import annotations

import sys

import overlay  # noqa: F401 - from this folder, even if another one is installed

if __name__ == "__main__":  # so that a random.py in this folder does not replace Python's
    sys.path.append(sys.path.pop(0))

import argparse
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TextIO

from overlay.cli.text import clean, counted
from overlay.cli.usage import Parser, importing, name, process_arguments, shared_options

with importing():
    from overlay.cli.check import expected_workers
    from overlay.cli.terminal import Exit, exit_of, guarded, join_all
    from overlay.client import sync as library
    from overlay.model.addresses import join_address
    from overlay.model.segments import Code, Part
    from overlay.transport.codec import pb2

DESCRIPTION = """\
Tests a running overlay: a single request, the queue's status, 10 concurrent requests; then requests
to any one worker, and the neighbours."""

EXITS = """\
exit codes:
  0    every test passed
  1    a test failed; the last lines say what to do
  2    wrong arguments
  4    nothing serves at HOST PORT
  130  interrupted"""

DEADLINE_S = 10.0
CONCURRENT = 10
IN_A_ROW = 20


class Problem(NamedTuple):
    """What is wrong, and what to do about it, in a sentence each."""

    what: str
    advice: str


@dataclass(frozen=True)
class Outcome:
    """The outcome of a test: facts to print, and problems if it failed."""

    facts: str = ""
    problems: Sequence[Problem] = ()


def main() -> int:
    args = _parser().parse_args()
    try:
        asked = learn(args)
    except library.CallFailed as e:
        say(f"test_system.py: {e}", sys.stderr)
        say(f"  - {_advice_for_no_answer(e, args)}", sys.stderr)
        return exit_of(e)
    say(asked.introduction)
    outcomes = [run_test(name, test, asked) for name, test in TESTS.items()]
    failed = sum(bool(outcome.problems) for outcome in outcomes)
    if not failed:
        say(f"all {len(TESTS)} tests passed")
        return Exit.OK
    say(f"{failed} of {len(TESTS)} tests failed. What to do:")
    for advice in dict.fromkeys(p.advice for outcome in outcomes for p in outcome.problems):
        say(f"  - {advice}")
    return Exit.FAILED


def run_test(name: str, test: Callable[[Asked], Outcome], asked: Asked) -> Outcome:
    """Runs one test and prints its outcome. If a call raises, that is the test's only problem."""
    try:
        outcome = test(asked)
    except library.CallFailed as e:
        outcome = Outcome("no answer", [_of_error(e, asked)])
    say(f"{'FAIL' if outcome.problems else 'pass'}  {name}: {outcome.facts}")
    for problem, times in Counter(outcome.problems).items():
        say(f"      {problem.what}" + (f" ({times} times)" if times > 1 else ""))
    return outcome


def say(line: str, stream: TextIO | None = None) -> None:
    # Flushed, so that a log shows each test as soon as it ends.
    print(clean(line), file=stream or sys.stdout, flush=True)


def _parser() -> Parser:
    parser = Parser("test_system.py", DESCRIPTION, EXITS)
    process_arguments(parser)
    add = parser.add_argument
    add(
        "--handler",
        type=name,
        default="",
        metavar="NAME",
        help="the handler to test with (default: echo)",
    )
    add("--payload", default="hello", metavar="TEXT", help="what to send (default: %(default)s)")
    shared_options(
        parser, deadline_s=DEADLINE_S, deadline="how long each request may take", json=""
    )
    return parser


# The process under test


@dataclass(frozen=True)
class Asked:
    """The process under test. workers: those that a request to all should reach, in order.

    metrics: its metrics before the first test. handler: empty for the default of each worker.
    """

    client: library.Client
    metrics: pb2.MetricsResponse
    workers: tuple[str, ...]
    handler: str
    payload: str
    deadline_s: float

    @property
    def id(self) -> str:
        return self.metrics.process_id

    @property
    def introduction(self) -> str:
        by = f", handler {self.handler}" if self.handler else ""
        place = f"{self.id} ({self.metrics.role}) at {self.client.shown}"
        return f"{place}; workers that should answer: {' '.join(self.workers)}{by}"

    @property
    def is_echo(self) -> bool:
        """Whether every answer is known in advance."""
        return self.handler == "echo" or (not self.handler and _all_echo(self.metrics))

    @property
    def check(self) -> str:
        near, _, number = self.client.address.rpartition(":")
        return f"python client.py {near.strip('[]')} {number} check"

    def call(self, payload: str, mode: str = "all") -> library.Answer:
        return self.client.forward(
            payload, mode=mode, handler=self.handler, timeout=self.deadline_s, want_parts=True
        )


def learn(args: argparse.Namespace) -> Asked:
    """Asks the process for its id and the workers that should answer. Raises CallFailed."""
    try:
        client = library.connect(join_address(args.host, args.port))
    except ValueError as e:
        raise library.InvalidCall(str(e), code=Code.INVALID_ARGUMENT) from None
    metrics = client.metrics(timeout=args.deadline)
    # A test must not run the user's own handlers unless asked to.
    handler = args.handler or ("" if _all_echo(metrics) else "echo")
    workers = expected_workers(metrics)
    payload = args.payload.encode("utf-8", "replace").decode()
    return Asked(client, metrics, workers, handler, payload, args.deadline)


def _all_echo(metrics: pb2.MetricsResponse) -> bool:
    workers = expected_workers(metrics)
    return all(p.handler == "echo" for p in metrics.topology if p.id in workers)


# The tests


def single_request(asked: Asked) -> Outcome:
    run = _timed(lambda: asked.call(asked.payload))
    answered, expected = run.answer.coverage
    facts = f"{answered} of {counted(expected, 'worker')} answered in {run.took_ms:.1f} ms"
    path = f", path {' '.join(run.answer.hops)}"
    return Outcome(facts + path, problems_of(run.answer, asked, asked.payload))


def queue_status(asked: Asked) -> Outcome:
    m = _metrics_after_a_request(asked)
    wrong = {
        f"process {m.process_id} answers instead of {asked.id}": m.process_id != asked.id,
        f"{m.process_id} reports that it is not healthy": not m.is_healthy,
        f"{m.queue_size} waiting of {m.queue_slots}": not 0 <= m.queue_size <= m.queue_slots,
        f"{m.active_requests} in service of {m.max_capacity}": not (
            0 <= m.active_requests <= m.max_capacity
        ),
        "no request was counted as completed": m.completed <= asked.metrics.completed,
    }
    return Outcome(
        f"{m.queue_size} of {m.queue_slots} waiting, {m.active_requests} of {m.max_capacity} in "
        f"service; {m.completed} completed, {m.failed} failed, {m.refused} refused",
        [Problem(what, f"look at {asked.check}") for what, is_so in wrong.items() if is_so],
    )


def _metrics_after_a_request(asked: Asked) -> pb2.MetricsResponse:
    """The metrics once they include the request: a counter may lag behind the answer."""
    until = time.monotonic() + 2
    while True:
        m = asked.client.metrics(timeout=asked.deadline_s)
        if m.completed > asked.metrics.completed or time.monotonic() > until:
            return m
        time.sleep(0.05)


def concurrent_requests(asked: Asked) -> Outcome:
    """Each request has its own payload, so that swapped answers are detected."""
    payloads = [asked.payload] * CONCURRENT
    if asked.is_echo:
        payloads = [f"{asked.payload} {n}" for n in range(CONCURRENT)]
    runs = _at_once([partial(asked.call, p) for p in payloads], asked.deadline_s + 5)
    found = [run.problems(asked, sent) for run, sent in zip(runs, payloads, strict=True)]
    whole = [run for run, problems in zip(runs, found, strict=True) if not problems]
    facts = f"{len(whole)} of {CONCURRENT} answered in full"
    if whole:
        total_s = max(run.ended for run in whole) - min(run.started for run in whole)
        facts += f"; {_spread(whole)}, {len(whole) / total_s:.0f} requests/s"
    return Outcome(facts, [problem for problems in found for problem in problems])


def any_worker(asked: Asked) -> Outcome:
    """One after the other, so that the latency does not include queueing."""
    runs = [_timed(lambda: asked.call(asked.payload, "any")) for _ in range(IN_A_ROW)]
    problems = [found for run in runs for found in _problems_of_any(run.answer, asked)]
    served = Counter(part.process_id for run in runs for part in run.answer.parts if part.ok)
    shares = ", ".join(f"{worker} {times}" for worker, times in sorted(served.items()))
    facts = f"{IN_A_ROW} in a row, {_spread(runs)}; served by {shares or 'no worker'}"
    return Outcome(facts, problems)


def neighbours(asked: Asked) -> Outcome:
    m = asked.client.metrics(timeout=asked.deadline_s)
    down = [n for n in m.neighbours if n.state != "up"]
    others = [n for n in m.neighbours if n.state == "up" and not n.same_config]
    problems = [
        Problem(f"{n.process_id} is {n.state}: {n.reason}", _check_process(n.process_id, asked))
        for n in down
    ] + [
        Problem(
            f"{n.process_id} was started with another configuration file",
            f"give {n.process_id} the same configuration file as {asked.id} and restart it",
        )
        for n in others
    ]
    up = len(m.neighbours) - len(down)
    facts = f"{up} of {len(m.neighbours)} up" if m.neighbours else "this process has none below it"
    return Outcome(facts, problems)


TESTS: dict[str, Callable[[Asked], Outcome]] = {
    "single request": single_request,
    "queue status": queue_status,
    "10 concurrent requests": concurrent_requests,
    "any one worker": any_worker,
    "neighbours": neighbours,
}


# Checks of an answer


def problems_of(answer: library.Answer, asked: Asked, sent: str) -> list[Problem]:
    """Everything that is wrong with an answer from all workers, missing workers first."""
    problems = [_missing(part, asked) for part in answer.missing]
    seen = Counter(part.process_id for part in answer.parts)
    odd = [f"{id_} is in the answer {times} times" for id_, times in seen.items() if times > 1]
    odd += [f"worker {w} is not in the answer" for w in asked.workers if w not in seen]
    odd += [f"{id_} answered, which is not expected" for id_ in seen if id_ not in asked.workers]
    odd += _odd_path(answer, asked)
    odd += _odd_result(answer, asked, sent)
    return problems + [Problem(what, _report(asked)) for what in odd]


def _problems_of_any(answer: library.Answer, asked: Asked) -> list[Problem]:
    good = [part for part in answer.parts if part.ok]
    odd = [] if len(good) == 1 else [f"{len(good)} workers answered a request to any one"]
    odd += [
        f"{p.process_id} answered, which is not expected"
        for p in good
        if p.process_id not in asked.workers
    ]
    odd += _odd_path(answer, asked)
    if len(good) == 1 and asked.is_echo and answer.result != _echo(good[0], asked.payload):
        odd.append(f"{good[0].process_id} did not echo '{asked.payload}'")
    return [Problem(what, _report(asked)) for what in odd]


def _odd_path(answer: library.Answer, asked: Asked) -> list[str]:
    path = " ".join(answer.hops)
    odd = []
    if answer.hops[:1] != (asked.id,):
        odd.append(f"the path '{path}' does not begin at {asked.id}")
    if len(set(answer.hops)) < len(answer.hops):
        odd.append(f"the path '{path}' visits a process twice")
    absent = [p.process_id for p in answer.parts if p.ok and p.process_id not in answer.hops]
    return odd + [f"the path '{path}' lacks {id_}, which answered" for id_ in absent]


def _odd_result(answer: library.Answer, asked: Asked, sent: str) -> list[str]:
    """Only the answers of echo are known in advance."""
    if not asked.is_echo:
        return []
    good = [part for part in answer.parts if part.ok]
    odd = [f"{p.process_id} did not echo '{sent}'" for p in good if p.result != _echo(p, sent)]
    lines = set(answer.result.split(b"\n"))
    return odd + [
        f"the result lacks the answer of {p.process_id}"
        for p in good
        if not lines.issuperset(p.result.split(b"\n"))
    ]


def _echo(part: Part, sent: str) -> bytes:
    return f"{part.process_id}: {sent}".encode()


# Advice


def _missing(part: Part, asked: Asked) -> Problem:
    why = part.reason or part.code.name
    if part.code is Code.INTERNAL:
        return Problem(
            f"worker {part.process_id} failed: {why}",
            f"see the log of {part.process_id}: logs/process_{part.process_id.lower()}.log",
        )
    return Problem(
        f"missing worker {part.process_id}: {why}", _check_process(part.process_id, asked)
    )


def _check_process(process_id: str, asked: Asked) -> str:
    at = {p.id: p.address for p in asked.metrics.topology}.get(process_id, "its address")
    return (
        f"see whether {process_id} runs at {at} (python node.py CONFIG {process_id}) and what its "
        f"log there says (logs/process_{process_id.lower()}.log); "
        "python client.py check CONFIG shows every process"
    )


def _report(asked: Asked) -> str:
    return (
        "a healthy overlay does not answer like this: check that every machine has the same "
        f"version and configuration file ({asked.check})"
    )


def _of_error(error: library.CallFailed, asked: Asked) -> Problem:
    what = str(error)
    if isinstance(error, library.Refused):
        advice = f"{asked.id} is overloaded: wait and try again, or look at {asked.check}"
    elif isinstance(error, library.DeadlinePassed):
        advice = f"give a longer --deadline, or see what keeps {asked.id} busy: {asked.check}"
    elif isinstance(error, library.HandlerFailed):
        advice = "see that error id in the log of the worker: logs/process_ID.log there"
    elif isinstance(error, library.NameNotFound):
        advice = f"{asked.check} lists the handlers"
    else:
        advice = f"see which process is down: {asked.check}, or python client.py check CONFIG"
    return Problem(what, advice)


def _advice_for_no_answer(error: library.CallFailed, args: argparse.Namespace) -> str:
    if isinstance(error, library.NoSuchHost):
        return f"write its address in numbers in place of {args.host}"
    if isinstance(error, library.NotReached) and " cannot be used: " in str(error):
        return "run python client.py doctor CONFIG here; docs/security.md says how to be let in"
    if isinstance(error, library.NotReached):
        return (
            "start the process there (python node.py CONFIG ID), check that its configuration says "
            f"host {args.host} and port {args.port}, and that the firewall of that machine lets "
            f"Python accept connections on TCP port {args.port}"
        )
    return f"check which program uses port {args.port} of {args.host}: it is not an overlay process"


# Running and measuring


@dataclass(frozen=True)
class Run:
    """One request: its start and end (monotonic seconds), and its outcome."""

    started: float
    ended: float
    outcome: library.Answer | library.CallFailed

    @property
    def answer(self) -> library.Answer:
        assert isinstance(self.outcome, library.Answer)
        return self.outcome

    @property
    def took_ms(self) -> float:
        return (self.ended - self.started) * 1000

    def problems(self, asked: Asked, sent: str) -> list[Problem]:
        if isinstance(self.outcome, library.CallFailed):
            return [_of_error(self.outcome, asked)]
        return problems_of(self.outcome, asked, sent)


def _timed(ask: Callable[[], library.Answer]) -> Run:
    started = time.monotonic()
    answer = ask()
    return Run(started, time.monotonic(), answer)


def _at_once(asks: Sequence[Callable[[], library.Answer]], within_s: float) -> list[Run]:
    """Runs all at the same time, in threads; a call that does not end counts as failed."""
    runs: dict[int, Run] = {}
    gate = threading.Barrier(len(asks))

    def run(n: int) -> None:
        gate.wait(within_s)
        started = time.monotonic()
        try:
            outcome: library.Answer | library.CallFailed = asks[n]()
        except library.CallFailed as e:
            outcome = e
        runs[n] = Run(started, time.monotonic(), outcome)

    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(len(asks))]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    join_all(threads, within_s)
    lost = Run(began, began + within_s, library.DeadlinePassed(f"no answer within {within_s:g} s"))
    return [runs.get(n, lost) for n in range(len(asks))]


def _spread(runs: Sequence[Run]) -> str:
    took = [run.took_ms for run in runs]
    low, middle, high = min(took), statistics.median(took), max(took)
    return f"latency min/median/max {low:.1f}/{middle:.1f}/{high:.1f} ms"


if __name__ == "__main__":
    sys.exit(guarded(main))
