"""The last lines of a log in memory: bounded, numbered, and only public text leaves the machine."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from overlay.observability.log_buffer import (
    EVENTS,
    LINES,
    MAX_BREAKS,
    WITHHELD,
    LogBuffer,
    unfolded,
)


@pytest.fixture
def recent() -> Iterator[LogBuffer]:
    buffer, logger = LogBuffer(), logging.getLogger("overlay")
    before = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(buffer)
    yield buffer
    logger.removeHandler(buffer)
    logger.level, logger.propagate = before


def log(name: str = "overlay.links") -> logging.Logger:
    return logging.getLogger(name)


def test_a_line_with_a_kind_is_an_event_and_one_without_is_not(recent):
    log().info("link to %s is up", "B", extra={"kind": "link"})
    log().info("nothing much")

    assert [(line.number, line.text) for line in recent.lines()] == [
        (1, "link to B is up"),
        (2, "nothing much"),
    ]
    assert [(e.number, e.kind, e.text) for e in recent.events()] == [(1, "link", "link to B is up")]


def test_a_warning_is_an_event_unless_its_kind_is_empty(recent):
    log().warning("odd")
    log().error("one of many", extra={"kind": ""})

    assert [(event.kind, event.text) for event in recent.events()] == [("log", "odd")]


def test_text_that_may_quote_a_payload_is_not_public(recent):
    log().error("handler h failed", extra={"private": "ValueError: secret", "kind": "failure"})
    try:
        raise ValueError("secret")
    except ValueError:
        log().exception("it broke")

    first, second = recent.lines()
    assert first.text == "handler h failed: ValueError: secret"
    assert (first.public, second.public) == ("handler h failed", "it broke")
    assert second.text.endswith("ValueError: secret")
    assert not any("secret" in event.text for event in recent.events())


def test_a_handlers_output_is_private_and_never_an_event(recent):
    log("overlay.handler").warning("my password", extra={"request_id": 0xAB})

    (line,) = recent.lines()
    assert line.text == "request 00000000000000ab: my password"
    assert line.public == f"request 00000000000000ab: {WITHHELD}"
    assert recent.events() == []


def test_lines_are_found_by_their_request(recent):
    log().info("its", extra={"request_id": 7})
    log().info("another's", extra={"request_id": 8})
    log().info("no request's, with 0000000000000007 in it")

    assert [line.text for line in recent.lines(request_id=7)] == ["request 0000000000000007: its"]


def test_lines_displace_lines_and_not_events(recent):
    log().warning("kept")
    for n in range(3 * LINES):
        log("overlay.handler").info("line %d", n)

    lines = recent.lines()
    assert len(lines) == LINES
    assert (lines[-1].number, lines[-1].text) == (3 * LINES + 1, f"line {3 * LINES - 1}")
    assert [event.text for event in recent.events()] == ["kept"]


def test_events_are_bounded_and_their_numbers_continue(recent):
    for n in range(EVENTS + 10):
        log().info("link %d", n, extra={"kind": "link"})
        log().info("reason %d", n, extra={"kind": "failure", "same": f"reason {n}"})

    assert len(recent.events(10 * EVENTS)) == 2 * EVENTS
    assert recent.events(1)[0].number == 2 * (EVENTS + 10) - 1


def test_repeated_events_become_one_with_the_last_text_and_the_count(recent):
    about = {"kind": "failure", "same": "failed, internal"}
    for n in range(3):
        log().warning("failed, internal: %d", n, extra=about)
    log().warning("997 more failed", extra=about | {"more": True, "count": 997})
    log().warning("odd: %d", 1)
    log().warning("odd: %d", 2)

    events = [(event.text, event.count, event.number) for event in recent.events()]
    assert events == [("failed, internal: 2", 1000, 4), ("odd: 2", 2, 6)]
    first = recent.lines()[0]
    assert recent.events()[0].first_s == first.at_s


@pytest.mark.parametrize("most", [2, 5, 40, EVENTS])
def test_a_flood_of_failures_hides_no_change_of_state(recent, most):
    log().info("link to F is down", extra={"kind": "link"})
    for n in range(1000):
        log().warning("failed", extra={"kind": "failure", "same": f"reason {n}"})

    texts = [event.text for event in recent.events(most)]
    assert len(texts) == most
    assert texts[0] == "link to F is down"


def test_a_line_is_one_line_of_bounded_length(recent):
    log().info("two\nlines\x1b[2J")
    log().info("%s", "x" * 100_000)
    recent.emit(logging.makeLogRecord({"msg": "%d", "args": ("no number",)}))  # cannot be formatted

    two, long = recent.lines()
    assert two.text == r"two | lines\x1b[2J"
    assert len(long.text) < 4200


def test_a_limit_of_zero_returns_nothing(recent):
    log().warning("one")

    assert (recent.lines(0), recent.events(0)) == ([], [])


def test_a_line_knows_its_original_line_ends(recent):
    text = "failed:\nTraceback\n  a | b\x1b[0m\n\nValueError: ü"
    log().error("it", extra={"private": text})

    (line,) = recent.lines()
    assert line.text == "it: failed: | Traceback |   a | b\\x1b[0m |  | ValueError: ü"
    assert unfolded(line.text, line.breaks) == "it: " + text.replace("\x1b", "\\x1b")
    assert recent.events()[0].breaks == ()


def test_the_reported_line_ends_are_bounded(recent):
    log().error("it", extra={"private": "x\n" * 5000})

    (line,) = recent.lines()
    assert len(line.breaks) == MAX_BREAKS
    assert unfolded(line.text, line.breaks).count("\n") == MAX_BREAKS


@pytest.mark.parametrize("breaks", [(), (3,), (1, 0), (99,), (1, 1), (2, 4)])
def test_an_impossible_line_end_is_ignored(breaks):
    assert unfolded("a  | b", breaks).replace("\n", " | ") == "a  | b"


def test_lines_are_found_by_their_error_id(recent):
    log().error("error id %s: it failed", "0123abcd")
    log().warning("B: it failed; error id 0123abcd in that log")
    log().error("error id %s: it failed", "77777777")

    assert [line.number for line in recent.lines(error_id="0123abcd")] == [1, 2]
