"""Asks an overlay from the command line: `python client.py --help` says how.

A verb is a row in VERBS (asks one process) or in OVERALL (asks every process of a configuration):
its arguments, and a function from them to an exit code. Reports go to stdout, complaints to stderr.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overlay.errors import ConfigError

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its lines go to stderr, ours tell the same


def not_installed(error: ModuleNotFoundError) -> str:
    return (
        f"the package '{error.name}' is not installed for this Python; "
        "use the Python in .venv, or run: python -m pip install -r requirements.txt"
    )


try:
    import psutil

    from overlay import bulk, reading, story
    from overlay import client as library
    from overlay.configuration import load
    from overlay.console import (
        Exit,
        Parser,
        Screen,
        complain,
        connected,
        counted,
        failed,
        guarded,
        host,
        join_all,
        misconfigured,
        name,
        out_file,
        port,
        priority_argument,
        result_as_json,
        seconds,
        shown,
        sized,
        whole_number,
    )
    from overlay.topology import ROLES, Process, Topology, join_address
    from overlay.values import Hop, Part
except ModuleNotFoundError as e:
    sys.stderr.write(f"{Path(sys.argv[0]).name}: {not_installed(e)}\n")
    raise SystemExit(2) from None
except ConfigError as e:
    sys.stderr.write(f"{Path(sys.argv[0]).name}: {e}\n")
    raise SystemExit(2) from None
except KeyboardInterrupt:  # half of a short run is importing
    raise SystemExit(130) from None

EXITS = """\
exit codes:
  0    answered, for --mode all by every worker asked; check: all is well
  1    answered with an error (the handler raised, no such team); check: something is not well;
       drain: requests were left behind;
       map: some failed (when all did for one reason, that reason's code)
  2    wrong arguments, or a file that cannot be used
  3    refused truthfully: no handler saw the request, try again later
  4    nobody to ask: nothing serves at the address, or no worker can be reached
  5    the deadline passed first; work may have begun
  6    incomplete: answered, but not by every worker asked
  130  interrupted

The report is the same on a terminal and in a pipe. --out keeps the result's own bytes, --json tells
everything. A character that the output's code page lacks is written as \\uXXXX."""

CHECK_DEADLINE_S = 3.0
STORIES = 1000  # more than a process keeps
LONGEST_GRACE_S = 86_400.0
GONE_S = 10.0  # a drained process has ended by then: its watchdog sees to it
SAME_START_S = 2.0  # start times of one process differ by as much when the clock is corrected


@dataclass(frozen=True)
class Verb:
    """help: one line. arguments: adds its own to a parser. run: does it and gives the exit code."""

    help: str
    arguments: Callable[[Parser], None]
    run: Callable[[argparse.Namespace], int]


def main() -> int:
    parser, verb, words = choose(sys.argv[1:])
    return verb.run(parser.parse_args(words))


# Which verb, and what belongs to it


def choose(words: list[str]) -> tuple[Parser, Verb, list[str]]:
    """The verb that the words name, its parser, and the words left for it."""
    if words and words[0] in OVERALL:
        verb = OVERALL[words[0]]
        parser = Parser(f"client.py {words[0]}", verb.help, EXITS)
        verb.arguments(parser)
        return parser, verb, words[1:]
    name, rest = "ask", words
    if len(words) > 2 and not any(word.startswith("-") for word in words[:3]):
        name, rest = words[2], [*words[:2], *words[3:]]
    if complaint := _misread(words, name):
        Parser("client.py", overview(), EXITS).error(complaint)
    verb = VERBS[name]
    if rest is words:
        parser = Parser("client.py", overview(), EXITS)
    else:
        parser = Parser("client.py", verb.help, EXITS)
        parser.usage = f"client.py HOST PORT {name} [options]"
    parser.add_argument("host", metavar="HOST", type=host, help="name or address of a process")
    parser.add_argument("port", metavar="PORT", type=port, help="its port")
    verb.arguments(parser)
    return parser, verb, rest


def overview() -> str:
    """The forms that a command can have, one line for each verb."""
    forms = [("HOST PORT [options]", VERBS["ask"].help)]
    forms += [(f"HOST PORT {name}", verb.help) for name, verb in VERBS.items() if name != "ask"]
    forms += [(f"{name} CONFIG", verb.help) for name, verb in OVERALL.items()]
    lines = [f"  client.py {form:<22} {help_line}" for form, help_line in forms]
    return "\n".join(["Asks an overlay. A verb tells its own options with --help.", "", *lines])


def _misread(words: list[str], name: str) -> str:
    """What a slip of the usual kinds meant; empty when the words look right."""
    if name not in VERBS:
        return f"there is no verb '{name}'{_suggestion(name, VERBS)}"
    if not words or words[0].startswith("-"):
        return ""
    near, colon, number = words[0].rpartition(":")
    if len(words) == 1 and colon and number.isdigit():
        return f"write HOST and PORT as two words: client.py {near} {number}"
    if len(words) == 1 and words[0].endswith(".json"):
        return f"a verb is missing before the file: client.py check {words[0]}"
    is_verb = difflib.get_close_matches(words[0], OVERALL, n=1)
    if is_verb and not (len(words) > 1 and words[1].isdigit()):
        return f"there is no verb '{words[0]}'{_suggestion(words[0], OVERALL)}"
    return f"PORT is missing after '{words[0]}'" if len(words) == 1 else ""


def _suggestion(word: str, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; '{near[0]}' is one" if near else f"; there are {', '.join(known)}"


def payload(text: str) -> bytes:
    """TEXT, @FILE or - for standard input."""
    if text == "-":
        return sys.stdin.buffer.read()
    if not text.startswith("@"):
        return text.encode("utf-8", "surrogateescape")
    try:
        return Path(text[1:]).read_bytes()
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or e
        raise argparse.ArgumentTypeError(f"cannot read '{text[1:]}': {reason}") from None


# One request


def ask_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "--mode",
        type=str.lower,
        choices=("all", "any"),
        default="all",
        help="all: every worker answers (default); any: one does, the least loaded",
    )
    add("--team", type=name, default="", metavar="NAME", help="only the workers of this team")
    add("--handler", type=name, default="", metavar="NAME", help="a handler of the configuration")
    add(
        "--payload",
        type=payload,
        default=b"hello",
        metavar="TEXT|@FILE|-",
        help="what to send: a text, a file's bytes, or standard input (default: hello)",
    )
    add(
        "--deadline",
        type=seconds,
        default=library.DEFAULT_TIMEOUT_S,
        metavar="SECONDS",
        help="an answer later than this is of no use (default: %(default)g)",
    )
    priority_argument(parser)
    add("--parts", action="store_true", help="show each worker's own result and times")
    add(
        "--trace",
        action="store_true",
        help="show what the way took at each process, and leave a line in each one's log",
    )
    add(
        "--out",
        type=out_file,
        metavar="FILE",
        help="write the result's own bytes there; - for standard output, the report to stderr then",
    )
    add(
        "--as-completed",
        action="store_true",
        help="mode all: show each worker's own answer as soon as it has come; nothing is merged",
    )
    add(
        "--first",
        type=whole_number,
        metavar="N",
        help="as --as-completed, until N workers have answered; the others' work is ended",
    )
    add("--json", action="store_true", help="the report as JSON; of --as-completed, a line each")


def ask(args: argparse.Namespace) -> int:
    if args.as_completed or args.first:
        return ask_for_parts(args)
    started = time.monotonic()
    address = join_address(args.host, args.port)
    request_id = library.new_request_id()
    try:
        client = connected(args)
        answer = client.forward(
            args.payload,
            mode=args.mode,
            team=args.team,
            handler=args.handler,
            timeout=args.deadline,
            want_parts=args.parts,
            priority=args.priority,
            want_trace=args.trace,
            request_id=request_id,
        )
    except library.CallFailed as e:
        code = failed(e, address, args.json)
        if args.trace and not isinstance(e, library.NotReached):
            show_failed(client, request_id, args.json)
        return code
    took_ms = (time.monotonic() - started) * 1000
    code = Exit.INCOMPLETE if answer.missing else Exit.OK
    report = Screen(sys.stderr if args.out == "-" else sys.stdout)
    if args.out and not _kept(answer.result, args.out):
        return Exit.FAILED
    if args.json:
        report.json(answer_as_json(answer, address, took_ms, code, args.parts))
    else:
        show_answer(report, answer, took_ms, args)
    return code


def ask_for_parts(args: argparse.Namespace) -> int:
    """Shows each part when it comes, then who did not answer."""
    if args.mode == "any" or args.out or args.parts:
        complain("--as-completed and --first are of --mode all, without --out and --parts")
        return Exit.USAGE
    started, report = time.monotonic(), Screen(sys.stdout)
    found: list[Part] = []
    try:
        for part in connected(args).parts(
            args.payload,
            team=args.team,
            handler=args.handler,
            timeout=args.deadline,
            first=args.first,
        ):
            found.append(part)
            took_ms = (time.monotonic() - started) * 1000
            if args.json:
                told = {**_part_as_json(part, True), "after_ms": round(took_ms, 3)}
                print(json.dumps(told))
            elif part.ok:
                report.facts((part.process_id, shown(part.result)))
            sys.stdout.flush()
    except library.CallFailed as e:
        return failed(e, join_address(args.host, args.port), args.json)
    missing = [part for part in found if not part.ok]
    if not args.json:
        enough = " (the first; the others' work was ended)" if args.first and not missing else ""
        answered = f"{len(found) - len(missing)} of {counted(len(found), 'worker')} answered"
        report.facts(
            ("answers", f"{len(found)}{enough}" if enough else answered),
            ("missing", "\n".join(f"{p.process_id}: {_reason(p)}" for p in missing)),
            ("time", f"{(time.monotonic() - started) * 1000:.1f} ms"),
        )
    return Exit.INCOMPLETE if missing else Exit.OK


def show_answer(
    report: Screen, answer: library.Answer, took_ms: float, args: argparse.Namespace
) -> None:
    answered, asked = answer.coverage
    kept = f"{sized(answer.result)} -> {args.out}"
    report.facts(
        ("result", kept if args.out else shown(answer.result)),
        ("answers", f"{answered} of {counted(asked, 'worker')} answered"),
        ("missing", "\n".join(f"{p.process_id}: {_reason(p)}" for p in answer.missing)),
        ("path", " ".join(answer.hops)),
        ("time", f"{took_ms:.1f} ms"),
        ("request", f"{answer.request_id:016x}"),
    )
    if args.parts:
        report.table("parts", PART_COLUMNS, [_part_row(part) for part in answer.parts])
    if args.trace:
        show_trace(report, answer.trace)


def show_trace(report: Screen, trace: Sequence[Hop]) -> None:
    bars = str.maketrans("├└│─", "+`|-" if report.options.ascii_only else "├└│─")
    lines = ((shown_name.translate(bars), *rest) for shown_name, *rest in story.lines(trace))
    report.table("trace", TRACE_COLUMNS, map(_hop_row, lines))


def show_failed(client: library.Client, request_id: int, as_json: bool) -> None:
    """The trace of a request that failed, as the process asked remembers it."""
    with suppress(library.CallFailed):
        told = client.metrics(timeout=CHECK_DEADLINE_S, requests=STORIES).requests
        hops = [one.hops for one in told if one.request_id == request_id]
        report = Screen(sys.stderr if as_json else sys.stdout)
        report.facts(("request", f"{request_id:016x}"))
        if hops:
            show_trace(report, library.read_trace(hops[0]))


TRACE_COLUMNS = ("process", "status", "waited ms", "worked ms", "on the way ms")


def _hop_row(line: tuple[str, Hop, int | None]) -> tuple[str, ...]:
    shown_name, hop, away_us = line
    on_the_way = "" if away_us is None else f"{away_us / 1000:.1f}"
    times = f"{hop.waited_us / 1000:.1f}", f"{hop.worked_us / 1000:.1f}", on_the_way
    return shown_name, hop.code.name, *times


PART_COLUMNS = ("worker", "status", "waited ms", "worked ms", "path", "result")


def _part_row(part: Part) -> tuple[str, ...]:
    return (
        part.process_id,
        part.code.name,
        f"{part.waited_us / 1000:.1f}",
        f"{part.worked_us / 1000:.1f}",
        " ".join(part.hops),
        shown(part.result) if part.ok else _reason(part),
    )


def answer_as_json(
    answer: library.Answer, address: str, took_ms: float, code: int, with_results: bool
) -> dict[str, Any]:
    answered, asked = answer.coverage
    lines = list(story.lines(answer.trace))
    return {
        "ok": True,
        "exit_code": int(code),
        "address": address,
        **result_as_json(answer.result),
        "coverage": {"answered": answered, "asked": asked},
        "missing": [part.process_id for part in answer.missing],
        "parts": [_part_as_json(part, with_results) for part in answer.parts],
        "hops": list(answer.hops),
        "request_id": f"{answer.request_id:016x}",
        "took_ms": round(took_ms, 3),
        **({"trace": [_hop_as_json(*line) for line in lines]} if lines else {}),
    }


def _hop_as_json(_name: str, hop: Hop, away_us: int | None) -> dict[str, Any]:
    return {
        "process_id": hop.process_id,
        "depth": hop.depth,
        "code": hop.code.name,
        "waited_ms": hop.waited_us / 1000,
        "worked_ms": hop.worked_us / 1000,
        "on_the_way_ms": None if away_us is None else away_us / 1000,
    }


def _part_as_json(part: Part, with_result: bool) -> dict[str, Any]:
    return {
        "process_id": part.process_id,
        "code": part.code.name,
        "reason": part.reason,
        "executed": part.executed.name,
        "hops": list(part.hops),
        "waited_ms": part.waited_us / 1000,
        "worked_ms": part.worked_us / 1000,
        **(result_as_json(part.result) if with_result and part.ok else {}),
    }


def _kept(result: bytes, out: str) -> bool:
    """Writes the result's own bytes."""
    try:
        if out == "-":
            sys.stdout.write_bytes(result)
        else:
            Path(out).write_bytes(result)
    except OSError as e:
        complain(f"cannot write the result to '{out}': {e.strerror or e}")
        return False
    return True


# One process


def check_arguments(parser: Parser) -> None:
    _deadline_argument(parser)
    parser.add_argument("--json", action="store_true", help="the report as one JSON object")


def check(args: argparse.Namespace) -> int:
    address = join_address(args.host, args.port)
    try:
        found = connected(args).metrics(timeout=args.deadline)
    except library.CallFailed as e:
        return failed(e, address, args.json)
    is_well = (
        found.is_healthy
        and all(n.state == "up" and n.health != "ejected" for n in found.neighbours)
        and not unreached_workers(found)
    )
    code = Exit.OK if is_well else Exit.FAILED
    report = Screen(sys.stdout)
    if args.json:
        report.json({"ok": is_well, "exit_code": int(code), "address": address, **as_plain(found)})
    else:
        show_metrics(report, found, address)
    return code


def show_metrics(report: Screen, m: Any, address: str) -> None:
    refusals = ", ".join(f"{n} {reason}" for reason, n in sorted(m.refused_by_reason.items()))
    workers, unreached = expected_workers(m), unreached_workers(m)
    report.facts(
        ("process", f"{m.process_id}, {m.role} of team {m.team}, at {address}"),
        ("state", f"{'serves' if m.is_healthy else 'stops'}, up for {_span(m.uptime_s)}"),
        ("queue", f"{m.queue_size} of {m.queue_slots} waiting"),
        ("service", f"{m.active_requests} of {m.max_capacity} in service"),
        ("slots", f"{counted(m.slots, 'handler')} can run at once here or below"),
        ("workers", f"{len(workers) - len(unreached)} of {len(workers)} known to be ready"),
        ("missing", ", ".join(unreached)),
        (
            "requests",
            f"{m.received} received: {m.completed} completed, {m.failed} failed, "
            f"{m.refused} refused, {m.cancelled} cancelled",
        ),
        ("refused", refusals),
        ("waiting", _spread(m.waiting_ms)),
        ("serving", _spread(m.service_ms)),
        ("program", f"overlay {m.version}, Python {m.python}, {m.platform}, pid {m.pid}"),
        ("config", m.config_digest),
        ("log", f"{m.log_lines_dropped} lines dropped" if m.log_lines_dropped else ""),
    )
    report.table(
        "neighbours asked by this process", NEIGHBOUR_COLUMNS, map(_neighbour, m.neighbours)
    )
    report.table("handlers", HANDLER_COLUMNS, map(_handler, m.handlers))
    report.table("processes of the configuration", PROCESS_COLUMNS, map(_process, m.topology))


NEIGHBOUR_COLUMNS = (
    "id", "address", "state", "since", "health", "outstanding", "slots", "asked", "failed",
    "version", "same config", "reason",
)  # fmt: skip
HANDLER_COLUMNS = (
    "name", "run", "active", "slots", "completed", "failed", "p50 ms", "p99 ms",
)  # fmt: skip
PROCESS_COLUMNS = ("id", "role", "team", "address", "handler", "slots", "neighbors")


def _neighbour(n: Any) -> tuple[str, ...]:
    return (
        n.process_id, n.address, n.state, _span(n.since_s), n.health, str(n.outstanding),
        str(n.slots), str(n.asked), str(n.failed), n.version, "yes" if n.same_config else "no",
        n.reason or n.health_reason,
    )  # fmt: skip


def _handler(h: Any) -> tuple[str, ...]:
    return (
        h.name, h.run, str(h.active), str(h.slots), str(h.completed), str(h.failed),
        f"{h.worked_ms.p50:.1f}", f"{h.worked_ms.p99:.1f}",
    )  # fmt: skip


def _process(p: Any) -> tuple[str, ...]:
    slots = str(max(p.slots.values())) if p.slots else ""
    return p.id, p.role, p.team, p.address, p.handler, slots, " ".join(p.neighbors)


def expected_workers(m: Any) -> tuple[str, ...]:
    """Whom a request to all means: the leader every worker, a team leader those among its
    neighbours, a worker itself; in the order of the configuration."""
    role = {p.id: ROLES[p.role] for p in m.topology}
    workers = tuple(p.id for p in m.topology if role[p.id].works)
    if m.process_id in workers:
        return (m.process_id,)
    neighbors = {n for p in m.topology if p.id == m.process_id for n in p.neighbors}
    below = {n for n in neighbors if role[n].rank < role[m.process_id].rank}
    if any(not role[n].works for n in below):
        return workers
    return tuple(worker for worker in workers if worker in below)


def unreached_workers(m: Any) -> tuple[str, ...]:
    """The expected workers of which this process has not heard."""
    silent = {p.id for p in m.topology if not p.slots}
    return tuple(worker for worker in expected_workers(m) if worker in silent)


def as_plain(value: Any) -> Any:
    """A message as JSON has it, numbers as numbers, every field present."""
    if hasattr(value, "DESCRIPTOR"):
        return {
            field.name: as_plain(getattr(value, field.name)) for field in value.DESCRIPTOR.fields
        }
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, (str, int)):
        return value
    if isinstance(value, Mapping):
        return {key: as_plain(value[key]) for key in sorted(value)}
    return [as_plain(item) for item in value]


# Stopping one


def drain_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "--grace",
        type=seconds,
        metavar="SECONDS",
        help="what runs may take so long (default: the configured drain_grace_s)",
    )
    add("--no-wait", action="store_true", help="return when the stopping has begun")
    add("--json", action="store_true", help="the report as one JSON object")


def drain(args: argparse.Namespace) -> int:
    began = time.monotonic()
    address = join_address(args.host, args.port)
    try:
        within_s = (args.grace or LONGEST_GRACE_S) + GONE_S
        said = connected(args).drain(grace_s=args.grace, wait=not args.no_wait, timeout=within_s)
    except library.CallFailed as e:
        return failed(e, address, args.json)
    is_gone = not args.no_wait and _has_gone(said, address)
    took_s = time.monotonic() - began
    code = Exit.FAILED if said.left else Exit.OK
    if not (is_gone or args.no_wait):
        code = Exit.LATE
        complain(f"process {said.process_id} (pid {said.pid}) has drained and does not end")
    report = Screen(sys.stdout)
    if args.json:
        facts = {"process_id": said.process_id, "pid": said.pid, "grace_s": said.grace_s}
        facts |= {"gone": is_gone, "refused": said.refused, "left": said.left}
        took = {"drained_s": round(said.took_s, 3), "took_s": round(took_s, 3)}
        ok = {"ok": code == Exit.OK, "exit_code": int(code), "address": address}
        report.json({**ok, **facts, **took})
        return code
    ended = f"{counted(said.refused, 'request')} refused, {said.left} left behind"
    report.facts(
        ("process", f"{said.process_id}, pid {said.pid}, at {address}"),
        ("state", "gone" if is_gone else f"stopping; what runs has up to {said.grace_s:g} s"),
        ("drained", "" if args.no_wait else f"in {said.took_s:.1f} s; {ended}"),
        ("time", "" if args.no_wait else f"{took_s:.1f} s until it was gone"),
    )
    return code


def _has_gone(said: Any, address: str) -> bool:
    until = time.monotonic() + GONE_S
    while _is_there(said, address):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def _is_there(said: Any, address: str) -> bool:
    with suppress(psutil.Error):
        process = psutil.Process(said.pid)
        if abs(process.create_time() - said.started_at) <= SAME_START_S:
            return bool(process.status() != psutil.STATUS_ZOMBIE)
    # Not seen from here, as in a container or at the end of a tunnel: who answers tells.
    try:
        return bool(library.connect(address, patience_s=0.2).metrics(timeout=1).pid == said.pid)
    except library.CallFailed:
        return False


# The whole overlay


@dataclass(frozen=True)
class Look:
    """What one process of the configuration says; metrics is None when it says nothing."""

    process: Process
    state: str = "no answer"
    reason: str = "it gave no answer in time"
    metrics: Any = None
    same_config: bool = False

    @property
    def is_well(self) -> bool:
        return self.state == "serves" and self.same_config


def check_all_arguments(parser: Parser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="the configuration file")
    check_arguments(parser)


def check_all(args: argparse.Namespace) -> int:
    try:
        topology = load(args.config)
    except ConfigError as e:
        return misconfigured(e)
    looks = look_at(topology, args.deadline)
    code = Exit.OK if all(look.is_well for look in looks) else Exit.FAILED
    if all(look.metrics is None for look in looks):
        code = Exit.UNREACHABLE
    report = Screen(sys.stdout)
    if args.json:
        report.json(_overall_as_json(topology, looks, code))
    else:
        show_overall(report, topology, looks, args.config)
    return code


def look_at(topology: Topology, deadline_s: float) -> list[Look]:
    """Asks every process at the same time; nobody is waited for beyond the deadline."""
    found: dict[str, Look] = {}

    def look(process: Process) -> None:
        found[process.id] = _look(process, topology, deadline_s)

    processes = topology.processes.values()
    threads = [threading.Thread(target=look, args=(p,), daemon=True) for p in processes]
    for thread in threads:
        thread.start()
    join_all(threads, deadline_s + 0.5)
    return [found.get(process.id, Look(process)) for process in processes]


def _look(process: Process, topology: Topology, deadline_s: float) -> Look:
    try:
        found = library.connect(process.address).metrics(timeout=deadline_s)
    except (library.CallFailed, ValueError) as e:
        return Look(process, reason=str(e))
    same_config = found.config_digest == topology.digest
    state, reason = _judged(found, process, same_config)
    return Look(process, state, reason, found, same_config)


def _judged(found: Any, process: Process, same_config: bool) -> tuple[str, str]:
    if found.process_id != process.id:
        return "other", f"process {found.process_id} answers at {process.address}"
    if not found.is_healthy:
        return "stops", "it is being stopped and takes no new requests"
    return "serves", "" if same_config else "it was started with another configuration file"


OVERALL_COLUMNS = (
    "id", "role", "team", "address", "state", "queue", "service", "completed", "failed", "refused",
    "p50 ms", "p99 ms", "version", "same config",
)  # fmt: skip


def show_overall(report: Screen, topology: Topology, looks: Sequence[Look], config: str) -> None:
    report.table("", OVERALL_COLUMNS, map(_overall_row, looks))
    well = sum(look.is_well for look in looks)
    report.say(f"{well} of {counted(len(looks), 'process')} well")
    for look in looks:
        if not look.is_well:
            report.say(f"{look.process.id}: {look.reason}{_advice(look, topology, config)}")


def _advice(look: Look, topology: Topology, config: str) -> str:
    if look.metrics is not None:
        return ""
    me = look.process
    log = topology.folder / me.log_dir / f"process_{me.id.lower()}.log"
    return f"; start it on {me.host}: python node.py {config} {me.id}; its log there: {log}"


def _overall_row(look: Look) -> tuple[str, ...]:
    me, m = look.process, look.metrics
    place = (me.id, me.role, me.team, me.address, look.state)
    if m is None:
        return (*place, *("-" for _ in OVERALL_COLUMNS[5:]))
    return (
        *place, f"{m.queue_size}/{m.queue_slots}", f"{m.active_requests}/{m.max_capacity}",
        str(m.completed), str(m.failed), str(m.refused),
        f"{m.service_ms.p50:.1f}", f"{m.service_ms.p99:.1f}", m.version,
        "yes" if look.same_config else "no",
    )  # fmt: skip


def _overall_as_json(topology: Topology, looks: Sequence[Look], code: int) -> dict[str, Any]:
    return {
        "ok": code == Exit.OK,
        "exit_code": int(code),
        "config_digest": topology.digest,
        "processes": [
            {
                "id": look.process.id,
                "role": look.process.role,
                "team": look.process.team,
                "address": look.process.address,
                "state": look.state,
                "reason": look.reason,
                "same_config": look.same_config,
                "metrics": None if look.metrics is None else as_plain(look.metrics),
            }
            for look in looks
        ],
    }


def later(module: str, function: str) -> Callable[[Any], Any]:
    """That function of a module of the package, which is imported when it is called: a page's
    server is nothing that a request should wait for."""

    def call(given: Any) -> Any:
        try:
            found = importlib.import_module(f"overlay.{module}")
        except ModuleNotFoundError as e:
            complain(not_installed(e))
            raise SystemExit(Exit.USAGE) from None
        return getattr(found, function)(given)

    return call


VERBS = {
    "ask": Verb("Sends one request", ask_arguments, ask),
    "map": Verb(
        "Sends lines or files as they are, results in their order", bulk.arguments, bulk.run
    ),
    "check": Verb("What this process says of itself and its neighbours", check_arguments, check),
    "logs": Verb(
        "The last lines of this process's log, or of one below it", reading.arguments, reading.run
    ),
    "top": Verb(
        "The whole overlay live, in this terminal", later("top", "arguments"), later("top", "run")
    ),
    "web": Verb(
        "The whole overlay live, as a page on this machine",
        later("web", "arguments"),
        later("web", "run"),
    ),
    "drain": Verb(
        "Stops this process: what runs is finished, the rest refused", drain_arguments, drain
    ),
}
OVERALL = {
    "init": Verb(
        "Asks for the addresses of your machines and writes them into the configuration",
        later("addressing", "arguments"),
        later("addressing", "run"),
    ),
    "check": Verb(
        "Every process of a configuration file, in one table", check_all_arguments, check_all
    ),
    "doctor": Verb(
        "What is not well as seen from this machine, the likely cause, and what to do",
        later("doctor", "arguments"),
        later("doctor", "run"),
    ),
}


# What all verbs share


def _reason(part: Part) -> str:
    return part.reason or part.code.name


def _span(span_s: float) -> str:
    if span_s < 60:
        return f"{span_s:.1f} s"
    minutes = int(span_s // 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _spread(spread: Any) -> str:
    if not spread.count:
        return ""
    return (
        f"p50 {spread.p50:.1f} ms, p99 {spread.p99:.1f} ms, mean {spread.mean:.1f} ms "
        f"over the last {spread.count}"
    )


def _deadline_argument(parser: Parser) -> None:
    parser.add_argument(
        "--deadline",
        type=seconds,
        default=CHECK_DEADLINE_S,
        metavar="SECONDS",
        help="how long to wait for an answer (default: %(default)g)",
    )


if __name__ == "__main__":
    guarded(main, "client.py")
