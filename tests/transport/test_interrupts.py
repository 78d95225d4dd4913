"""Ctrl-C is put off while something must not be left half done, and is never lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from overlay.transport.interrupts import Uninterrupted


@pytest.fixture(autouse=True)
def handler_stays() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before
    signal.signal(signal.SIGINT, before)


def section(done: list[str]) -> None:
    with Uninterrupted():
        signal.raise_signal(signal.SIGINT)
        done.append("all of it")


def outer(done: list[str]) -> None:
    with Uninterrupted():
        section(done)
        done.append("the rest too")


def test_ctrl_c_is_raised_at_the_end_of_the_section() -> None:
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        section(done)
    assert done == ["all of it"]


def test_it_is_raised_at_the_end_of_the_outermost_section() -> None:
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        outer(done)
    assert done == ["all of it", "the rest too"]


def test_an_error_in_the_section_does_not_keep_the_handler_away() -> None:
    with suppress(ValueError), Uninterrupted():
        raise ValueError("mine")
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_handler_of_the_system_stays(handler: signal.Handlers) -> None:
    before = signal.signal(signal.SIGINT, handler)
    try:
        with Uninterrupted():
            assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_programs_own_handler_is_called_once_with_the_signal() -> None:
    called = []
    before = signal.signal(signal.SIGINT, lambda number, frame: called.append(number))
    try:
        with Uninterrupted():
            signal.raise_signal(signal.SIGINT)
            assert called == []
        assert called == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_touch_no_handler() -> None:
    seen = []

    def work() -> None:
        with Uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]
