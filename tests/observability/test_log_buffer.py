"""The last lines of a log in memory: bounded, numbered, and what leaves the machine is public."""

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
    made, logger = LogBuffer(), logging.getLogger("overlay")
    before = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(made)
    yield made
    logger.removeHandler(made)
    logger.level, logger.propagate = before


def log(name: str = "overlay.links") -> logging.Logger:
    return logging.getLogger(name)


def test_a_line_with_a_kind_is_an_event_and_a_line_without_is_none(recent):
    log().info("link to %s is up", "B", extra={"kind": "link"})
    log().info("nothing much")

    assert [(line.number, line.text) for line in recent.lines()] == [
        (1, "link to B is up"),
        (2, "nothing much"),
    ]
    assert [(e.number, e.kind, e.text) for e in recent.events()] == [(1, "link", "link to B is up")]


def test_a_warning_is_an_event_unless_it_says_that_it_is_none(recent):
    log().warning("odd")
    log().error("one of many", extra={"kind": ""})

    assert [(event.kind, event.text) for event in recent.events()] == [("log", "odd")]


def test_what_may_have_been_in_a_payload_is_apart_from_what_others_may_read(recent):
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


def test_what_a_handler_says_is_private_as_a_whole_and_never_an_event(recent):
    log("overlay.handler").warning("my password", extra={"request_id": 0xAB})

    (line,) = recent.lines()
    assert line.text == "request 00000000000000ab: my password"
    assert line.public == f"request 00000000000000ab: {WITHHELD}"
    assert recent.events() == []


def test_a_request_finds_its_lines(recent):
    log().info("its", extra={"request_id": 7})
    log().info("another's", extra={"request_id": 8})
    log().info("nobody's, with 0000000000000007 in it")

    assert [line.text for line in recent.lines(request_id=7)] == ["request 0000000000000007: its"]


def test_lines_push_out_lines_and_no_events(recent):
    log().warning("kept")
    for n in range(3 * LINES):
        log("overlay.handler").info("line %d", n)

    lines = recent.lines()
    assert len(lines) == LINES
    assert (lines[-1].number, lines[-1].text) == (3 * LINES + 1, f"line {3 * LINES - 1}")
    assert [event.text for event in recent.events()] == ["kept"]


def test_events_are_bounded_and_their_numbers_go_on(recent):
    for n in range(EVENTS + 10):
        log().info("link %d", n, extra={"kind": "link"})
        log().info("reason %d", n, extra={"kind": "failure", "same": f"reason {n}"})

    assert len(recent.events(10 * EVENTS)) == 2 * EVENTS
    assert recent.events(1)[0].number == 2 * (EVENTS + 10) - 1


def test_what_comes_again_is_one_event_with_the_last_words_and_how_often(recent):
    about = {"kind": "failure", "same": "failed, internal"}
    for n in range(3):
        log().warning("failed, internal: %d", n, extra=about)
    log().warning("997 more failed", extra=about | {"more": True, "count": 997})
    log().warning("odd: %d", 1)
    log().warning("odd: %d", 2)

    told = [(event.text, event.count, event.number) for event in recent.events()]
    assert told == [("failed, internal: 2", 1000, 4), ("odd: 2", 2, 6)]
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


def test_a_line_is_one_line_and_has_an_end(recent):
    log().info("two\nlines\x1b[2J")
    log().info("%s", "x" * 100_000)
    recent.emit(logging.makeLogRecord({"msg": "%d", "args": ("no number",)}))  # cannot be written

    two, long = recent.lines()
    assert two.text == r"two | lines\x1b[2J"
    assert len(long.text) < 4200


def test_none_are_asked_for_and_none_are_given(recent):
    log().warning("one")

    assert (recent.lines(0), recent.events(0)) == ([], [])


def test_a_line_of_several_has_them_on_one_and_knows_where_they_end(recent):
    text = "failed:\nTraceback\n  a | b\x1b[0m\n\nValueError: ü"
    log().error("it", extra={"private": text})

    (line,) = recent.lines()
    assert line.text == "it: failed: | Traceback |   a | b\\x1b[0m |  | ValueError: ü"
    assert unfolded(line.text, line.breaks) == "it: " + text.replace("\x1b", "\\x1b")
    assert recent.events()[0].breaks == ()


def test_a_text_without_end_has_so_many_line_ends_and_no_more(recent):
    log().error("it", extra={"private": "x\n" * 5000})

    (line,) = recent.lines()
    assert len(line.breaks) == MAX_BREAKS
    assert unfolded(line.text, line.breaks).count("\n") == MAX_BREAKS


@pytest.mark.parametrize("breaks", [(), (3,), (1, 0), (99,), (1, 1), (2, 4)])
def test_a_line_end_that_cannot_be_there_changes_nothing(breaks):
    assert unfolded("a  | b", breaks).replace("\n", " | ") == "a  | b"


def test_an_error_id_finds_its_lines(recent):
    log().error("error id %s: it failed", "0123abcd")
    log().warning("B: it failed; error id 0123abcd in that log")
    log().error("error id %s: it failed", "77777777")

    assert [line.number for line in recent.lines(error_id="0123abcd")] == [1, 2]
