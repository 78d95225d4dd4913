"""client.py HOST PORT: what it makes of its options."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from overlay.cli import ask, main
from overlay.cli import map as mapping
from overlay.model.segments import Part


class Recorder:
    """A client that keeps how it was asked, and answers with nothing."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def forward(self, payload: bytes, **options: Any) -> None:
        self.asked.append(options)
        raise KeyboardInterrupt  # there is no answer to show

    def parts(self, payload: bytes, **options: Any) -> Iterator[Part]:
        self.asked.append(options)
        return iter(())

    def map_as_completed(self, handler: str, payloads: object, **options: Any) -> Iterator[Any]:
        self.asked.append(options)
        yield from ()

    def close(self) -> None: ...


@pytest.mark.parametrize("form", [[], ["--as-completed"], ["--first", "2"], ["map", "LINES"]])
def test_every_form_of_a_request_heeds_the_options_that_all_have(form, monkeypatch, tmp_path):
    recorder = Recorder()
    monkeypatch.setattr(ask, "connected", lambda args: recorder)
    monkeypatch.setattr(mapping, "connected", lambda args: recorder)
    lines = tmp_path / "lines"
    lines.write_text("one\n")
    words = [str(lines) if word == "LINES" else word for word in form]
    options = ["--team", "green", "--deadline", "7", "--priority", "5"]
    monkeypatch.setattr(sys, "argv", ["client.py", "127.0.0.1", "1", *words, *options])

    main.main()

    (asked,) = recorder.asked
    assert (asked["team"], asked["timeout"], asked["priority"]) == ("green", 7, 5)
