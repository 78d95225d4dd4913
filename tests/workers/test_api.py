"""Handlers: imported by their configured name, called with a context."""

from __future__ import annotations

import dataclasses
import json
import pickle
import time

import pytest

from overlay.model.errors import ConfigError
from overlay.model.segments import Column, Route, Segment
from overlay.model.topology import BUILT_IN, HandlerSpec, Process
from overlay.workers import api, process_main
from overlay.workers.api import Context


def context(left_s: float = 5.0, ended: bytearray | None = None, row: int = 0) -> Context:
    rows = ended or bytearray(1)
    return Context("C", "green", 7, 0, time.monotonic() + left_s, {}, rows, row)


def test_the_default_handler_returns_the_workers_id_and_the_payload():
    assert api.echo(b"hi", context()) == b"C: hi"
    assert api.echo(b"", context()) == b"C: "
    assert api.echo(b"\xff\x00", context()) == b"C: \xff\x00"


def test_built_in_handlers_can_be_imported():
    for spec in BUILT_IN.values():
        assert callable(api.find(spec, spec.call))


def test_a_handler_sees_that_its_caller_left():
    ended = bytearray(3)
    seen, other = context(ended=ended, row=1), context(ended=ended, row=2)
    assert not seen.cancelled

    ended[1] = 1

    assert seen.cancelled
    assert not other.cancelled


def test_a_handler_sees_that_its_deadline_passed():
    late = context(left_s=-1)
    assert late.cancelled
    assert late.remaining_s() == 0


def test_a_handlers_log_has_its_own_logger():
    assert context().log.name == "overlay.handler"


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        ("nowhere_at_all:f", "module 'nowhere_at_all' cannot be imported (ModuleNotFoundError"),
        ("json:nope", f"module 'json' has no function 'nope' ({json.__file__})"),
        ("json:__name__", "module 'json' has '__name__', which is not a function ("),
        ("time:nope", "module 'time' has no function 'nope' (built into Python)"),
    ],
)
def test_a_function_that_cannot_be_imported_is_named(function, sentence):
    with pytest.raises(ConfigError) as raised:
        api.find(HandlerSpec("mine", function), function)
    assert str(raised.value).startswith(f"handler 'mine': {sentence}")


def test_another_process_is_told_all_that_a_handler_here_is_told():
    here = Context("C", "green", 7, 2, time.monotonic() + 5, {"a": 1}, bytearray([0, 1]), 1)

    sent = pickle.dumps(process_main.request_of(b"hi", here, False))
    _, facts, left_s, _ = pickle.loads(sent)
    there = process_main._context_of(facts, left_s)

    told = [field.name for field in dataclasses.fields(Context) if field.name[0] != "_"]
    for name in set(told) - {"deadline"}:
        assert getattr(there, name) == getattr(here, name)
    assert there.remaining_s() == pytest.approx(here.remaining_s(), abs=0.5)
    assert not there.cancelled, "the process of a cancelled request is killed instead"


def test_a_handler_is_told_of_its_own_row():
    ended = bytearray([0, 1])
    segment = Segment(Route(), Column([b"", b""]), time.monotonic() + 5, 40, attempt=3)
    worker = Process("C", "worker", "green", "h", 1)

    first, second = (api.context_of(worker, segment, row, {"a": 1}, ended) for row in (0, 1))

    assert (second.process_id, second.team, second.options) == ("C", "green", {"a": 1})
    assert (first.request_id, second.request_id, second.attempt) == (40, 41, 3)
    assert (first.cancelled, second.cancelled) == (False, True)
