"""The last lines of this process's log, kept in memory for those who ask from elsewhere.

    log.warning("link to B is down", extra={"kind": "link"})            an event too
    log.error("handler %s failed", name, extra={"private": traceback})  stays on this machine

What a record may say of itself: `kind` makes it an event, `count` says of how many; `request_id` is
the request that it is about, told in the one form in which clients print it; `private` is the rest
of the line, which may hold what was in a payload. What handlers print or log is private as a whole.
A warning that names no kind is an event of kind "log", unless its kind is "".

Events that say the `same` are one, with the words of the last and how many they were; one with
`more` only counts. So what fails a thousand times takes one line, and hides no link that went down.
"""

from __future__ import annotations

import itertools
import logging
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace

from overlay.observability.events import COME_AGAIN, latest

LINES = 1000
EVENTS = 256  # that happened once, and as many kinds of those that come again
LONGEST = 4096  # characters of a line; 1,000 such lines are 4 MiB
BREAK = " | "  # a line end, in a text on one line
MAX_BREAKS = 200  # that are told of a line; a traceback that is kept has fewer
WITHHELD = "(a handler's own text; it is in this process's log)"
OF_HANDLERS = "overlay.handler"


@dataclass(frozen=True)
class Line:
    """number: rises by one. public: the text for those who cannot read the file, when it differs.

    kind: of an event, else empty. count: how many the same it tells of, since first_s. breaks:
    where the text had line ends, as a traceback does, which are BREAK in it.
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
    """Keeps the last lines and, apart from them, the last events. Safe from any thread.

    Apart, so that what handlers print pushes out no event.
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
        except Exception:  # noqa: BLE001 - what is logged may fail in any way when it is written
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
        """The last ones, the oldest first; of one request or error only, if an id is given."""
        found: Iterable[Line] = self._lines.copy()
        if request_id:
            found = [line for line in found if line.request_id == request_id]
        if error_id:
            found = [line for line in found if names_error(line.text, error_id)]
        return list(found)[-most:] if most else []

    def events(self, most: int = EVENTS) -> list[Line]:
        """The last ones, the oldest first; their text is public."""
        self.acquire()
        try:
            once, again = list(self._once), list(self._again.values())
        finally:
            self.release()
        in_order = sorted([*once, *again], key=lambda event: event.number)
        return latest(in_order, most, lambda event: event.kind not in COME_AGAIN)


def texts_of(record: logging.LogRecord) -> tuple[str, str, str]:
    """A line: which request it is about, what everybody may read of it, and the rest of it.

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
    """The event's kind; empty for a line that is none."""
    kind: str | None = getattr(record, "kind", None)
    if kind is not None or record.levelno < logging.WARNING or record.name.startswith(OF_HANDLERS):
        return kind or ""
    return "log"


def _same(record: logging.LogRecord, kind: str) -> Hashable:
    """What it has in common with those that say the same; None for what happens once."""
    if kind == "log":
        return record.name, str(record.msg)
    same: str | None = getattr(record, "same", None)
    return same and (kind, same)


def escaped(text: str, most: int = LONGEST) -> str:
    """The text on one line and without control characters, cut at 4,096 characters."""
    if len(text) > most:
        text = f"{text[:most]}... ({len(text):,} characters)"
    text = text.replace("\n", BREAK)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def unfolded(text: str, breaks: Iterable[int]) -> str:
    """The text with its line ends again; a place where none can have been is left alone."""
    begin, lines = 0, []
    for at in breaks:
        if at >= begin and text.startswith(BREAK, at):
            lines.append(text[begin:at])
            begin = at + len(BREAK)
    return "\n".join([*lines, text[begin:]])


def names_error(text: str, error_id: str) -> bool:
    return f"error id {error_id}" in text


def _breaks(text: str) -> tuple[int, ...]:
    """Where `escaped` of this text has its line ends, the first ones."""
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
