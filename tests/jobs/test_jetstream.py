"""The log of several leaders on three real NATS servers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from overlay.jobs.jetstream import JetStreamLog
from overlay.jobs.log import LogAway, LogFull, Outrun
from tests.harness.cluster import until
from tests.harness.nats_servers import NatsServers, last, log_on


@pytest.fixture(scope="module")
def log(servers: NatsServers) -> Iterator[JetStreamLog]:
    made = log_on(servers, "LOG")
    yield made
    made.close()


def test_an_entry_is_appended_behind_the_last_one_only(log: JetStreamLog) -> None:
    at = last(log)
    assert log.append(at, b"one") == at + 1
    with pytest.raises(Outrun):
        log.append(at, b"another")
    assert log.append(at + 1, b"x" * 3_000_000) == at + 2, "a server allows 8 MiB"
    found = log.entries(at)
    assert [(number, len(body)) for number, body in found] == [(at + 1, 3), (at + 2, 3_000_000)]
    assert log.entries(at + 2) == []


def test_an_entry_beyond_the_last_is_not_known_to_be_refused(
    log: JetStreamLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server asked may know less than others."""
    monkeypatch.setattr("overlay.jobs.jetstream.APPEND_S", 0.3)
    with pytest.raises(LogAway, match="wrong last sequence"):
        log.append(last(log) + 5, b"x")


def test_a_snapshot_is_kept_and_what_was_before_it_purged(
    log: JetStreamLog, tmp_path: Path
) -> None:
    path, at = tmp_path / "made", last(log)
    for number in range(3):
        at = log.append(at, b"entry %d" % number)
    for size in (10, 400_000):
        path.write_bytes(b"s" * size)
        log.save(at - 1, path)
        assert log.load(tmp_path / "read") == at - 1
        assert (tmp_path / "read").read_bytes() == path.read_bytes()
    assert [number for number, _ in log.entries(0)] == [at - 1, at]


def test_a_full_stream_refuses(servers: NatsServers, log: JetStreamLog) -> None:
    at = last(log)
    entries = iter(range(at, at + 20))

    def fill() -> None:
        for after in entries:
            log.append(after, bytes(1_000_000))

    with pytest.raises(LogFull, match="maximum bytes"):
        fill()
    log.save(last(log), Path(__file__))  # which purges
    assert log.append(last(log), b"x")


def test_without_a_majority_it_is_away_and_afterwards_nothing_is_lost(
    servers: NatsServers, log: JetStreamLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = log.append(last(log), b"before")
    for number in (1, 2):
        servers.kill(number)
    monkeypatch.setattr("overlay.jobs.jetstream.APPEND_S", 2.0)
    began = time.monotonic()
    with pytest.raises(LogAway):
        log.append(at, b"meanwhile")
    assert time.monotonic() - began < 10
    servers.start(1)

    def appended() -> int:
        try:
            return log.append(last(log), b"after")
        except (LogAway, Outrun):  # "meanwhile" may have been written at last
            return 0

    until(appended, 30, "a majority is back")
    bodies = [body for _, body in log.entries(at - 1)]
    assert bodies in ([b"before", b"after"], [b"before", b"meanwhile", b"after"])
    servers.start(2)
    servers.wait()
