"""The last lines of this process's log, kept in memory for the Logs call.

    log.warning("link to B is down", extra={"kind": "link"})            an event too
    log.error("handler %s failed", name, extra={"private": traceback})  stays on this machine

Attributes that a record may have: `kind` makes it an event, `count` says how many it stands for;
`request_id` is the request that it is about, written as clients print it; `private` is the rest of
the line, which may quote a payload. Whatever handlers print or log is private as a whole. A warning
without a kind is an event of kind "log", unless its kind is "".

Events with equal `same` become one, with the text of the last and their number; one with `more`
only adds to the number. So a thousand equal failures take one line, and hide no lost link.
"""

from __future__ import annotations

import itertools
import logging
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace

from overlay.observability.events import COME_AGAIN, latest

LINES = 1000
EVENTS = 256  # that happened once, and as many kinds of repeated ones
LONGEST = 4096  # characters of a line; 1,000 such lines are 4 MiB
BREAK = " | "  # a line end, in a text on one line
MAX_BREAKS = 200  # reported for a line; a traceback that is kept has fewer
WITHHELD = "(a handler's own text; it is in this process's log)"
OF_HANDLERS = "overlay.handler"


@dataclass(frozen=True)
class Line:
    """number: rises by one. public: the text for readers without access to the file, if it differs.

    kind: of an event, else empty. count: how many equal events it stands for, since first_s.
    breaks: positions of BREAK that stand for line ends, as in a traceback.
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
    """Keeps the last lines and, separately, the last events. Safe from any thread.

    Separately, so that the output of handlers does not push events out.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lines: deque[Line] = deque(maxlen=LINES)
        self._once: deque[Line] = deque(maxlen=EVENTS)
        self._again: OrderedDict[Hashable, Line] = OrderedDict()
        self._line_number = self._event_number = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Under the handler's lock, as logging calls it."""
        try:
            line = _line(self._line_number + 1, record)
        except Exception:  # noqa: BLE001 - formatting may run code of whatever is logged
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
        before = self._again.pop(same, None)
        if before is not None:
            text = before.text if only_counts else event.text
            count = before.count + event.count
            event = replace(event, text=text, count=count, first_s=before.first_s)
        self._again[same] = event
        if len(self._again) > EVENTS:
            self._again.popitem(last=False)

    def lines(self, most: int = LINES, request_id: int = 0, error_id: str = "") -> list[Line]:
        """The last ones, oldest first; only those about one request or error, if an id is given."""
        found: Iterable[Line] = self._lines.copy()
        if request_id:
            found = [line for line in found if line.request_id == request_id]
        if error_id:
            found = [line for line in found if names_error(line.text, error_id)]
        return list(found)[-most:] if most else []

    def events(self, most: int = EVENTS) -> list[Line]:
        """The last ones, oldest first; their text is public."""
        self.acquire()
        try:
            once, again = list(self._once), list(self._again.values())
        finally:
            self.release()
        in_order = sorted([*once, *again], key=lambda event: event.number)
        return latest(in_order, most, lambda event: event.kind not in COME_AGAIN)


def texts_of(record: logging.LogRecord) -> tuple[str, str, str]:
    """The parts of a line: which request it is about, what anyone may read, and the rest.

    Raises what formatting raises.
    """
    request_id = getattr(record, "request_id", 0)
    about = f"request {request_id:016x}: " if request_id else ""
    if record.name.startswith(OF_HANDLERS):
        return about, "", record.getMessage()
    rest = getattr(record, "private", "")
    private = f": {rest}" if rest else ""
    if record.exc_info:
        private += "\n" + _formatter.formatException(record.exc_info)
    return about, record.getMessage(), private


def _kind_of(record: logging.LogRecord) -> str:
    """The event's kind; empty for a line that is not an event."""
    kind: str | None = getattr(record, "kind", None)
    if kind is not None or record.levelno < logging.WARNING or record.name.startswith(OF_HANDLERS):
        return kind or ""
    return "log"


def _same(record: logging.LogRecord, kind: str) -> Hashable:
    """Equal for events that become one; None for what happens once."""
    if kind == "log":
        return record.name, str(record.msg)
    same: str | None = getattr(record, "same", None)
    return same and (kind, same)


def escaped(text: str, most: int = LONGEST) -> str:
    """The text on one line, without control characters, cut after `most` of its characters."""
    if len(text) > most:
        text = f"{text[:most]}... ({len(text):,} characters)"
    text = text.replace("\n", BREAK)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def unfolded(text: str, breaks: Iterable[int]) -> str:
    """The text with its line ends restored; positions where none can have been are ignored."""
    begin, lines = 0, []
    for at in breaks:
        if at >= begin and text.startswith(BREAK, at):
            lines.append(text[begin:at])
            begin = at + len(BREAK)
    return "\n".join([*lines, text[begin:]])


def names_error(text: str, error_id: str) -> bool:
    return f"error id {error_id}" in text


def _breaks(text: str) -> tuple[int, ...]:
    """The positions of the first line ends in what `escaped` makes of this text."""
    *lines, _ = text[:LONGEST].split("\n")[: MAX_BREAKS + 1]
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
