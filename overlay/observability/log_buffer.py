"""The last lines of this process's log, kept in memory for the Logs call.

    log.warning("link to B is down", extra={"kind": "link"})            also an event
    log.error("handler %s failed", name, extra={"private": traceback})  stays on this machine

Attributes of a record: `kind` makes it an event, `count` says for how many it stands; `request_id`
is the request that it is about, written as clients print it; `private` is the rest of the line,
which may quote a payload. Everything that handlers print or log is private. A warning without a
kind is an event of kind "log", unless its kind is "".

Events with equal `same` become one, with the text of the last and the total count; one with `more`
only adds to the count. So a thousand equal failures take one line and do not hide a lost link.
"""

from __future__ import annotations

import itertools
import logging
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace

from overlay.observability.events import RECURRING, latest

LINES = 1000
EVENTS = 256  # that happened once, and as many kinds of repeated ones
MAX_LINE = 4096  # characters; 1,000 lines of this length are 4 MiB
BREAK = " | "  # stands for a line end
MAX_BREAKS = 200  # reported for a line; tracebacks have fewer
WITHHELD = "(a handler's own text; it is in this process's log)"
HANDLER_LOGGER = "overlay.handler"


@dataclass(frozen=True)
class Line:
    """number: counts up. public: the text for readers without access to the file, if it differs.

    kind: of an event, otherwise empty. count: how many equal events it stands for since first_s.
    breaks: positions of the BREAKs that stand for line ends, as in a traceback.
    """

    number: int
    at_s: float
    level: str
    logger: str
    text: str
    public: str | None = None
    request_id: int = 0
    kind: str = ""
    count: int = 1
    first_s: float = 0.0
    breaks: tuple[int, ...] = ()


class LogBuffer(logging.Handler):
    """Keeps the last lines and, so that handlers' output does not displace them, the last events.

    Thread-safe.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lines: deque[Line] = deque(maxlen=LINES)
        self._once: deque[Line] = deque(maxlen=EVENTS)
        self._repeated: OrderedDict[Hashable, Line] = OrderedDict()
        self._line_number = self._event_number = 0

    def emit(self, record: logging.LogRecord) -> None:
        """`logging` calls it under the handler's lock."""
        try:
            line = _line(self._line_number + 1, record)
        except Exception:  # noqa: BLE001 - formatting may call methods of the logged values
            return
        self._line_number += 1
        self._lines.append(line)
        if line.kind:
            self._event_number += 1
            text = line.text if line.public is None else line.public
            event = replace(line, number=self._event_number, text=text, public=None, breaks=())
            self._add_event(event, _same(record, line.kind), getattr(record, "more", False))

    def _add_event(self, event: Line, same: Hashable, only_counts: bool) -> None:
        if same is None:
            self._once.append(event)
            return
        before = self._repeated.pop(same, None)
        if before is not None:
            text = before.text if only_counts else event.text
            count = before.count + event.count
            event = replace(event, text=text, count=count, first_s=before.first_s)
        self._repeated[same] = event
        if len(self._repeated) > EVENTS:
            self._repeated.popitem(last=False)

    def lines(self, limit: int = LINES, request_id: int = 0, error_id: str = "") -> list[Line]:
        """The last ones, oldest first; only those about one request or error if an id is given."""
        found: Iterable[Line] = self._lines.copy()
        if request_id:
            found = [line for line in found if line.request_id == request_id]
        if error_id:
            found = [line for line in found if names_error(line.text, error_id)]
        return list(found)[-limit:] if limit else []

    def events(self, limit: int = EVENTS) -> list[Line]:
        """The last ones, oldest first; their text is public."""
        self.acquire()
        try:
            events = [*self._once, *self._repeated.values()]
        finally:
            self.release()
        events.sort(key=lambda event: event.number)
        return latest(events, limit, lambda event: event.kind not in RECURRING)


def texts_of(record: logging.LogRecord) -> tuple[str, str, str]:
    """The parts of a line: the request that it is about, its public text, and its private text.

    Raises whatever formatting raises.
    """
    request_id = getattr(record, "request_id", 0)
    about = f"request {request_id:016x}: " if request_id else ""
    if record.name.startswith(HANDLER_LOGGER):
        return about, "", record.getMessage()
    rest = getattr(record, "private", "")
    private = f": {rest}" if rest else ""
    if record.exc_info:
        private += "\n" + _formatter.formatException(record.exc_info)
    return about, record.getMessage(), private


def _kind_of(record: logging.LogRecord) -> str:
    """The kind of an event; empty for a line that is none."""
    kind: str | None = getattr(record, "kind", None)
    if (
        kind is not None
        or record.levelno < logging.WARNING
        or record.name.startswith(HANDLER_LOGGER)
    ):
        return kind or ""
    return "log"


def _same(record: logging.LogRecord, kind: str) -> Hashable:
    """Equal for events that become one; None for an event of its own."""
    if kind == "log":
        return record.name, str(record.msg)
    same: str | None = getattr(record, "same", None)
    return same and (kind, same)


def escaped(text: str, limit: int = MAX_LINE) -> str:
    """The text on one line, without control characters, cut after `limit` of its characters."""
    if len(text) > limit:
        text = f"{text[:limit]}... ({len(text):,} characters)"
    text = text.replace("\n", BREAK)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def unfolded(text: str, breaks: Iterable[int]) -> str:
    """The text with its line ends restored; positions without a BREAK are ignored."""
    begin, lines = 0, []
    for at in breaks:
        if at >= begin and text.startswith(BREAK, at):
            lines.append(text[begin:at])
            begin = at + len(BREAK)
    return "\n".join([*lines, text[begin:]])


def names_error(text: str, error_id: str) -> bool:
    return f"error id {error_id}" in text


def _breaks(text: str) -> tuple[int, ...]:
    """The positions of the line ends of this text after `escaped`, at most MAX_BREAKS."""
    *lines, _ = text[:MAX_LINE].split("\n")[: MAX_BREAKS + 1]
    ends = itertools.accumulate(len(escaped(line)) + len(BREAK) for line in lines)
    return tuple(end - len(BREAK) for end in ends)


def _line(number: int, record: logging.LogRecord) -> Line:
    about, public, private = texts_of(record)
    text = about + public + private
    return Line(
        number,
        record.created,
        record.levelname,
        record.name,
        escaped(text),
        escaped(about + (public or WITHHELD)) if private else None,
        getattr(record, "request_id", 0),
        _kind_of(record),
        getattr(record, "count", 1),
        record.created,
        _breaks(text) if "\n" in text else (),
    )


_formatter = logging.Formatter()
