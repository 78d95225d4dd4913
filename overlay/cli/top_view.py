"""A snapshot of the overlay as lines of text for a screen of any size. Sans-IO.

What does not fit is left out: first the healthy among many processes and links, then old requests
and events, then the ends of lines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from rich.cells import cell_len
from rich.text import Text

from overlay.cli.terminal import aligned
from overlay.cli.text import clean, counted, jobs, no_jobs, span
from overlay.model import clocks as time
from overlay.model.segments import Code
from overlay.monitor.protection import OPEN
from overlay.monitor.snapshot import Snapshot
from overlay.observability.events import latest

T = TypeVar("T")

MAX_LISTED = 40  # requests, and events
MAX_WIDTH = 1_000  # beyond, it is a pipe, and nothing is aligned to the right edge


class Signs:
    """Shapes, or ASCII where the code page has none."""

    def __init__(self, health: Mapping[str, str], bar: str, steps: str, arrow: str) -> None:
        self.health = health
        self.bar = bar
        self.steps = steps
        self.arrow = arrow

    @staticmethod
    def of(encoding: str) -> Signs:
        return SHAPES if encoding.lower().startswith("utf") else LETTERS


STATES = ("well", "impaired", "stopping", "gone", "unseen", "asking")
SHAPES = Signs(dict(zip(STATES, "●▲■✕○○", strict=True)), "█░", " ▁▂▃▄▅▆▇█", "→")
LETTERS = Signs(dict(zip(STATES, "*!=x??", strict=True)), "#.", " .:-=+*#@", ">")
COLOURS = {"impaired": "yellow", "stopping": "blue", "gone": "bold red", "unseen": "magenta"}
WORDS = {"well": "serves", "asking": "being asked", "unseen": "not seen"}
DIM = "bright_black"
PROCESS_COLUMNS = (
    "process", "state", "answers/s", "wait", "busy", "p50 ms", "p99 ms", "cpu %", "MiB", "team",
    "host",
)  # fmt: skip
USAGE = ("cpu %", "MiB")  # shown where there is room
NUMBERS = PROCESS_COLUMNS[2:-2]  # aligned to the right
MAX_MAPS = 3
MAX_PROBLEMS = 2
SILENT_S = 5  # a map whose client has been silent for so long may have stopped
ROOMY = 96  # columns of a screen


def lines(snapshot: Snapshot, width: int, height: int, signs: Signs) -> list[Text]:
    """The snapshot in at most `height` lines of at most `width` columns."""
    top = [_title(snapshot, width), *_security(snapshot)]
    top += [*_figures(snapshot, width, signs), *_jobs(snapshot)]
    top += [*_maps(snapshot, signs), *_lanes(snapshot)]
    if not snapshot["processes"]:
        return [_cut(line, width) for line in top]
    left = height - len(top) - 1
    links = _links(snapshot, width, max(2, left // 5), signs)
    most = max(4, min(left - len(links) - 8, left * 2 // 3))
    tables = [_processes(snapshot, width, most, signs), links]
    left -= sum(len(table) + 1 for table in tables)
    requests = _requests(snapshot, max(0, left // 2 - 1), signs)
    events = _events(snapshot, max(0, left - len(requests) - 2), signs)
    made = top
    for table in (*tables, requests, events):
        if table:
            made += [Text(), *table]
    return [_cut(line, width) for line in made[:height]]


def _title(snapshot: Snapshot, width: int) -> Text:
    asked = snapshot["asked"]
    role = next((p["role"] for p in snapshot["processes"] if p["id"] == asked["id"]), "")
    name = f"{asked['id']} {role.replace('_', ' ')} at " if role else ""
    left = Text.assemble(("overlay  ", "bold"), clean(f"{name}{asked['address']}"))
    clock = time.strftime("%H:%M:%S", time.localtime(snapshot["at"]))
    right = f"{counted(len(snapshot['processes']), 'process')}  {clock}"
    space = max(2, width - cell_len(left.plain) - len(right)) if width < MAX_WIDTH else 2
    return left.append(" " * space + right, DIM)


def _security(snapshot: Snapshot) -> list[Text]:
    """Whether the overlay is open, and what is wrong with its certificates."""
    found = snapshot["security"]
    style = COLOURS["impaired"] if found["mode"] == OPEN else DIM
    made = [Text(clean(found["text"]), style)] if found["text"] else []
    problems = [clean(one) for one in found["problems"][:MAX_PROBLEMS]]
    if rest := len(found["problems"]) - len(problems):
        problems[-1] = f"and {rest} more: {problems[-1]}"
    return made + [Text(one, COLOURS["impaired"]) for one in problems]


def _figures(snapshot: Snapshot, width: int, signs: Signs) -> list[Text]:
    asked = snapshot["asked"]
    if asked["health"] not in ("well", "impaired", "stopping"):
        since = f"gone for {span(asked['for_s'])}" if asked["id"] else "no answer yet"
        alarm = f"{asked['id']} {since}: {asked['why']}; asked every {snapshot['interval_s']:g} s"
        return [Text(clean(alarm.strip()), COLOURS["gone"])]
    me = next(p for p in snapshot["processes"] if p["id"] == asked["id"])
    series = snapshot["course"]
    p50, p99 = series["p50_ms"][-1], series["p99_ms"][-1]
    long = 12 if width < 100 else 24
    bar = _bar(me["queued"], me["queue_slots"], long, signs)
    ready, workers = snapshot["workers_ready"], snapshot["workers"]
    queue = Text.assemble(
        "queue    ", bar, f" {me['queued']} of {me['queue_slots']}",
        f"   in streams {me['waiting'] - me['queued']}   in service {me['in_service']}   ",
        (f"workers {ready} of {workers}", COLOURS["gone"] if ready < workers else ""),
    )  # fmt: skip
    rates = me["rates"]
    lost = {name: rates.get(name, 0.0) for name in ("refused", "failed", "cancelled")}
    answers = Text.assemble(
        "answers  ", (_spark(series["completed"], long, signs), "cyan"),
        f" {_rate(rates.get('completed'))}/s   p50 {_ms(p50)}  p99 {_ms(p99)} ms",
    )  # fmt: skip
    for name, rate in lost.items():
        if rate:
            answers.append(f"   {name} {_rate(rate)}/s", COLOURS["gone"])
    if not any(lost.values()):
        answers.append("   none lost", DIM)
    return [queue, answers]


def _jobs(snapshot: Snapshot) -> list[Text]:
    """How many jobs the process asked keeps, and why it accepts no more."""
    found = snapshot["jobs"]
    if found is None:
        return []
    line = Text(f"jobs     {jobs(found['states'], found['schedules'])}")
    line.highlight_regex(r"[\d,]+ quarantined", COLOURS["impaired"])
    problem = clean(no_jobs(found["problem"]))
    return [line, Text(problem, COLOURS["gone"])] if problem else [line]


def _maps(snapshot: Snapshot, signs: Signs) -> list[Text]:
    """A line for each of the latest few."""
    made = []
    for one in snapshot["maps"][-MAX_MAPS:]:
        ended = one["answered"] + one["failed"]
        line = Text("map      ")
        if one["total"]:
            line.append(_bar(ended, one["total"], 12, signs, "cyan"))
            line.append(f" {ended:,} of {one['total']:,}")
        else:
            line.append(f"{ended:,}")
        line.append(f" by {clean(one['handler']) or 'default'}, {_rate(one['rate'])}/s")
        if one["left_s"] is not None:
            line.append(f", {span(one['left_s'])} left")
        if one["failed"]:
            line.append(f", {one['failed']:,} failed", COLOURS["gone"])
        if one["silent_s"] > SILENT_S:
            line.append(f", silent for {span(one['silent_s'])}", COLOURS["impaired"])
        made.append(line.append(f"  {clean(one['caller'])}", DIM))
    return made


def _lanes(snapshot: Snapshot) -> list[Text]:
    """A line for each client that is lent workers, of the latest few."""
    by_client: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for one in snapshot["lanes"]:
        by_client.setdefault((one["caller"], one["handler"]), []).append(one)
    made = []
    for (caller, handler), lanes in list(by_client.items())[-MAX_MAPS:]:
        workers = ", ".join(clean(one["worker"]) for one in lanes)
        answered = sum(one["answered"] for one in lanes)
        unanswered = sum(one["unanswered"] for one in lanes)
        line = Text(f"lent     {workers} for {clean(handler) or 'default'}")
        line.append(f", {unanswered:,} under way, {answered:,} answered")
        made.append(line.append(f"  {clean(caller)}", DIM))
    return made


def _processes(snapshot: Snapshot, width: int, most: int, signs: Signs) -> list[Text]:
    """In configuration order; when not all fit, those with a problem are kept."""
    processes = snapshot["processes"]
    if len(processes) > most - 1:
        worst = sorted(processes, key=lambda p: (p["health"] == "well", -p["rank"]))
        kept = {p["id"] for p in worst[: most - 2]}
        processes = [p for p in processes if p["id"] in kept]
    rows = [_process(p, signs) for p in processes]
    shown = [i for i, name in enumerate(PROCESS_COLUMNS) if width >= ROOMY or name not in USAGE]
    head = [PROCESS_COLUMNS[i] for i in shown]
    right = [at for at, name in enumerate(head) if name in NUMBERS]
    cells = [[row[i] for i in shown] for row, _ in rows]
    made = _table(head, cells, [style for _, style in rows], right)
    if rest := len(snapshot["processes"]) - len(processes):
        made.append(Text(f"and {rest} more", DIM))
    return made


def _process(p: Mapping[str, Any], signs: Signs) -> tuple[tuple[str, ...], str]:
    health = p["health"]
    indent = "  " * (2 - p["rank"])
    name = f"{indent}{signs.health[health]} {p['id']}"
    state = WORDS.get(health, health)
    if health in ("gone", "unseen"):
        state += f" {span(p['for_s'])}"
    figures = ("-",) * 7
    if health in ("well", "impaired", "stopping"):
        busy = f"{p['in_service']} of {p['slots']}" if p["rank"] < 2 else str(p["in_service"])
        rate, times = (
            p["rates"].get("completed"),
            p["service_ms"] if p["totals"]["received"] else {},
        )
        figures = (
            _rate(rate),
            str(p["waiting"]),
            busy,
            _ms(times.get("p50")),
            _ms(times.get("p99")),
            "-" if p["cores"] is None else f"{100 * p['cores']:.0f}",
            f"{p['memory_mib']:,.0f}",
        )
    return (name, state, *figures, p["team"], p["host"]), COLOURS.get(health, "")


def _links(snapshot: Snapshot, width: int, most: int, signs: Signs) -> list[Text]:
    """Several in a line; when not all fit, those with a problem."""
    unwell = [link for link in snapshot["links"] if not _is_well(link)]
    cells = [(_link(link, signs), _is_well(link)) for link in snapshot["links"]]
    wide = max((cell_len(text) for text, _ in cells), default=0) + 3
    across = max(1, min(width, 160) // max(1, wide))
    if len(cells) > most * across:
        up = len(snapshot["links"]) - len(unwell)
        cells = [(_link(link, signs), False) for link in unwell[: most * across - 1]]
        cells.append((f"{counted(up, 'link')} of {len(snapshot['links'])} up", True))
        wide = max(cell_len(text) for text, _ in cells) + 3
        across = max(1, width // wide)
    made = []
    for start in range(0, len(cells), across):
        line = Text()
        for text, is_well in cells[start : start + across]:
            style = "" if is_well else COLOURS["impaired" if " down" not in text else "gone"]
            line.append(text, style).append(" " * (wide - cell_len(text)))
        line.rstrip()
        made.append(line)
    return made


def _is_well(link: Mapping[str, Any]) -> bool:
    return bool(link["state"] == "up" and link["health"] == "healthy")


def _link(link: Mapping[str, Any], signs: Signs) -> str:
    name = f"{link['from']} {signs.arrow} {link['to']}"
    if link["state"] != "up":
        since = "" if link["state"] == "unknown" else f" {span(link['for_s'])}"
        return f"{name} {link['state']}{since}"
    health = "" if link["health"] == "healthy" else f" {link['health']}"
    return f"{name} {_rate(link['rate'])}/s {_ms(link['rtt_ms'])} ms{health}"


def _requests(snapshot: Snapshot, most: int, signs: Signs) -> list[Text]:
    rows, styles = [], []
    for r in _latest(snapshot["requests"], most):
        status = Code(r["code"]).name if r["code"] in set(Code) else str(r["code"])
        many = f" x{r['count']}" if r["count"] > 1 else ""
        path = _path(r["hops"], signs)
        what = f"{r['mode']} {r['handler'] or 'default'}{many}"
        reason = f"{path}  {r['reason']}" if r["reason"] else path
        rows.append(
            (_clock(r["ended_at"]), r["request_id"], what, status, _ms(r["total_ms"]), reason)
        )
        styles.append("" if r["code"] == 0 else COLOURS["gone"])
    head = ("ended", "request", "asks", "status", "ms", "path, with the ms at each hop")
    return _table(head, rows, styles, (4,)) if rows else []


def _path(hops: Sequence[Mapping[str, Any]], signs: Signs) -> str:
    """Each process before those that it asked, with the milliseconds of the request there."""
    path, above = "", -1
    for hop in hops:
        if path:
            path += f" {signs.arrow} " if hop["depth"] > above else ", "
        path += f"{hop['id']} {_ms(hop['waited_ms'] + hop['worked_ms'])}"
        above = hop["depth"]
    return path


def _events(snapshot: Snapshot, most: int, signs: Signs) -> list[Text]:
    shown = latest(snapshot["events"], min(most, MAX_LISTED), lambda event: event["is_change"])
    rows, styles = [], []
    for event in reversed(shown):
        many = ""
        if event.get("count", 1) > 1:
            many = f" ({event['count']:,} times since {_clock(event['first_at'])})"
        rows.append((_clock(event["at"]), event["process"], event["text"] + many))
        colour = {"warning": COLOURS["impaired"], "error": COLOURS["gone"]}.get(event["level"], "")
        styles.append(f"bold {colour}".strip() if event["is_change"] else colour)
    return _table(("at", "of", "event"), rows, styles) if rows else []


def _latest(items: Sequence[T], most: int) -> list[T]:
    """The last ones, the latest first; at most MAX_LISTED, however long the report."""
    return list(items[::-1][: max(0, min(most, MAX_LISTED))])


def _table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    styles: Sequence[str],
    right: Sequence[int] = (),
) -> list[Text]:
    first, *others = aligned(head, rows, right)
    return [Text(first, DIM), *(Text(*line) for line in zip(others, styles, strict=True))]


def _cut(line: Text, width: int) -> Text:
    line.no_wrap = True
    if cell_len(line.plain) > width:
        line.truncate(width, overflow="ellipsis" if width > 1 else "crop")
    return line


def _bar(used: int, of: int, width: int, signs: Signs, style: str = "") -> Text:
    full = min(width, -(-used * width // of)) if of else 0
    style = style or ("cyan" if used < of * 0.8 else "yellow" if used < of else "red")
    return Text.assemble((signs.bar[0] * full, style), (signs.bar[1] * (width - full), DIM))


def _spark(points: Sequence[float | None], width: int, signs: Signs) -> str:
    points = points[-width:]
    most = max([1.0, *(point for point in points if point is not None)])
    last = len(signs.steps) - 1
    drawn = [" " if p is None else signs.steps[max(1, round(p / most * last))] for p in points]
    return "".join(drawn).rjust(width)


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))


def _rate(n: float | None) -> str:
    return "-" if n is None else f"{n:.1f}" if 0 < n < 10 else f"{n:,.0f}"


def _ms(n: float | None) -> str:
    return "-" if n is None else f"{n:,.0f}" if n >= 99.5 else f"{n:.1f}" if n >= 10 else f"{n:.2f}"
