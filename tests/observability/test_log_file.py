"""The log never stops the process, and every event stays on one line."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlay.observability import log_file
from overlay.observability.log_file import Printed, ProcessLog, escaped
from tests.harness.cluster import ROOT, Overlay, free_port, six_processes, until


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    logger = logging.getLogger("overlay")
    before = (logger.level, logger.propagate, logging.raiseExceptions, list(logger.handlers))
    yield
    logger.level, logger.propagate, logging.raiseExceptions, logger.handlers[:] = before


@contextlib.contextmanager
def logging_to(path: Path, process_id: str = "C") -> Iterator[ProcessLog]:
    log = ProcessLog(path, process_id)
    log.start()
    try:
        yield log
    finally:
        log.stop()


def test_an_event_is_one_line_with_process_and_logger(tmp_path):
    path = tmp_path / "logs" / "process_c.log"
    with logging_to(path):
        logging.getLogger("overlay.routing").warning("no answer from %s", "F")

    (line,) = path.read_text("utf-8").splitlines()
    assert line.endswith(" C overlay.routing WARNING no answer from F")


def test_newlines_and_control_characters_are_escaped(tmp_path):
    path = tmp_path / "c.log"
    with logging_to(path):
        logging.getLogger("overlay").warning("hops %s", "A\nB\r\x1b[2J\x00\u2028\u202e\x85")

    text = path.read_bytes().decode("utf-8")
    assert text.count("\n") == 1
    assert len(text.splitlines()) == 1
    assert r"A | B\r\x1b[2J\x00\u2028\u202e\x85" in text


def test_an_exception_is_on_one_line(tmp_path):
    path = tmp_path / "c.log"
    with logging_to(path):
        try:
            raise ValueError("two\nlines")
        except ValueError:
            logging.getLogger("overlay").exception("it broke")

    (line,) = path.read_text("utf-8").splitlines()
    assert "it broke | Traceback" in line
    assert line.endswith("ValueError: two | lines")


@given(st.text())
def test_any_text_is_printable_and_on_one_line_after_escaping(text):
    shown = escaped(text)
    assert shown.isprintable()
    assert shown.encode("utf-8").decode("utf-8") == shown


def test_a_long_line_is_cut_and_says_so():
    shown = escaped("x" * 10_000)
    assert len(shown) < 4200
    assert shown.endswith("... (10,000 characters)")


def test_info_is_written_and_debug_is_not(tmp_path):
    path = tmp_path / "c.log"
    with logging_to(path):
        logging.getLogger("overlay.x").debug("step")
        logging.getLogger("overlay.x").info("event")
    assert "event" in path.read_text()
    assert "step" not in path.read_text()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_lines_lost_to_a_full_disk_are_counted(capfd):
    with logging_to(Path("/dev/full")) as log:
        for _ in range(3):
            logging.getLogger("overlay").warning("lost")
        until(lambda: log.dropped == 3)
    assert capfd.readouterr() == ("", "")


def test_logging_works_if_the_folder_cannot_be_created(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    with logging_to(tmp_path / "file" / "logs" / "c.log") as log:
        logging.getLogger("overlay").warning("lost")
        assert not (tmp_path / "file" / "logs").exists()
    assert log.path.name == "c.log"
    assert capfd.readouterr() == ("", "")


def test_logging_works_if_the_path_is_impossible(tmp_path):
    with logging_to(tmp_path / "a\0b" / "c.log"):
        logging.getLogger("overlay").warning("lost")


def test_lines_that_cannot_be_written_are_counted(tmp_path):
    (tmp_path / "file").write_text("")
    with logging_to(tmp_path / "file" / "c.log") as log:
        for _ in range(3):
            logging.getLogger("overlay").warning("lost")
    assert log.dropped >= 3


def test_a_full_queue_drops_lines_and_counts_them(tmp_path, monkeypatch):
    monkeypatch.setattr(log_file, "MAX_QUEUED", 5)
    log = ProcessLog(tmp_path / "c.log", "C")
    logger = logging.getLogger("overlay")
    logger.propagate = False
    logger.addHandler(log._handler)  # without its thread nothing leaves the queue

    for n in range(8):
        logger.warning("line %d", n)

    assert log.dropped == 3


def test_a_line_that_cannot_be_formatted_is_counted(tmp_path, capfd):
    class Bad:
        def __str__(self) -> str:
            raise ValueError("no text")

    path = tmp_path / "c.log"
    with logging_to(path) as log:
        logging.getLogger("overlay").warning("%d", "not a number")
        logging.getLogger("overlay").warning("%s", Bad())
        logging.getLogger("overlay").warning("the next")

    assert "the next" in path.read_text()
    assert log.dropped == 2
    assert capfd.readouterr() == ("", "")


def text_of(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:  # it is just being rotated
        return ""


def test_the_files_are_rotated_and_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(log_file, "FILE_BYTES", 2000)
    path = tmp_path / "c.log"
    with logging_to(path) as log:
        for n in range(300):
            logging.getLogger("overlay").warning("line %d", n)
        until(lambda: "line 299" in text_of(path))

    files = sorted(tmp_path.glob("c.log*"))
    assert [file.name for file in files] == ["c.log", "c.log.1", "c.log.2", "c.log.3"]
    assert all(file.stat().st_size <= 2000 for file in files)
    assert log.dropped == 0


def test_without_a_terminal_nothing_goes_to_stderr(tmp_path, capfd, monkeypatch):
    with logging_to(tmp_path / "c.log"):
        logging.getLogger("overlay").error("to the file only")
    assert capfd.readouterr() == ("", "")

    monkeypatch.setattr(sys, "stderr", None)  # as under pythonw
    with logging_to(tmp_path / "d.log"):
        logging.getLogger("overlay").error("to the file only")
    assert "to the file only" in (tmp_path / "d.log").read_text()


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be deleted there")
@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_deleted_log_is_created_again(tmp_path, what):
    path = tmp_path / "logs" / "c.log"
    with logging_to(path) as log:
        logging.getLogger("overlay").warning("before")
        until(lambda: "before" in path.read_text())
        shutil.rmtree(path.parent) if what == "folder" else path.unlink()

        logging.getLogger("overlay").warning("after")
        until(path.exists)
        until(lambda: "after" in path.read_text())
    assert log.dropped == 0


def test_writing_resumes_when_the_folder_becomes_writable(tmp_path, monkeypatch):
    monkeypatch.setattr(log_file, "RETRY_S", 0.05)
    (tmp_path / "logs").write_text("a file in its place")
    path = tmp_path / "logs" / "c.log"
    with logging_to(path) as log:
        logging.getLogger("overlay").warning("lost")
        until(lambda: log.dropped >= 2)  # this line, and the warning about the file
        (tmp_path / "logs").unlink()
        until(lambda: logging.getLogger("overlay").warning("kept") or path.exists())
        until(lambda: "kept" in path.read_text())


def test_after_an_incomplete_line_the_next_starts_on_a_new_line(tmp_path):
    path = tmp_path / "c.log"
    path.write_text("half of a li")
    with logging_to(path):
        logging.getLogger("overlay").warning("the next")
    half, whole = path.read_text().splitlines()
    assert half == "half of a li"
    assert whole.endswith("the next")


def test_long_lines_are_cut_before_they_are_queued(tmp_path):
    log = ProcessLog(tmp_path / "c.log", "C")
    record = logging.makeLogRecord({"name": "overlay.x", "msg": "x" * 1_000_000})
    log._handler.emit(record)
    kept = log._lines.get().getMessage()
    assert len(kept) < 4096
    assert kept.endswith("... (1,000,000 characters)")


def test_output_of_handlers_does_not_displace_everything_else(tmp_path):
    path = tmp_path / "c.log"
    with logging_to(path) as log:
        for n in range(5000):
            logging.getLogger("overlay.handler").info("line %d", n)
        logging.getLogger("overlay.routing").warning("something else")
    lines = path.read_text().splitlines()
    assert 1000 < len(lines) < 3000
    assert log.dropped == 5000 - (len(lines) - 2)
    assert sum("handlers write more lines than the log takes" in line for line in lines) == 1
    assert lines[-1].endswith("something else")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes in folders on this system")
def test_a_hanging_disk_does_not_block_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr(log_file, "MAX_QUEUED", 50)
    monkeypatch.setattr(log_file, "STOP_S", 0.2)
    path = tmp_path / "c.log"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # never reads
    try:
        log = ProcessLog(path, "C")
        log.start()
        until(lambda: logging.getLogger("overlay").warning("x" * 3000) or log.dropped > 100)
        began = time.monotonic()
        log.stop()
        assert time.monotonic() - began < 15
    finally:
        os.close(reader)


SILENCERS = """
import logging, logging.config, sys
from pathlib import Path

from overlay.observability.log_file import ProcessLog

def loggers():
    return [logging.getLogger(name) for name in list(logging.root.manager.loggerDict)]

def fails(*args, **kwargs):
    raise RuntimeError("a factory that fails")

class Silent(logging.Logger):
    def handle(self, record): pass

def each(act):
    for logger in loggers():
        act(logger)

ACTS = [
    lambda: logging.config.dictConfig({"version": 1}),
    lambda: logging.config.dictConfig({"version": 1, "loggers": {"overlay": {"level": 50}}}),
    lambda: logging.disable(logging.CRITICAL),
    lambda: logging.basicConfig(force=True, level=logging.CRITICAL),
    lambda: each(lambda logger: logger.setLevel(logging.CRITICAL)),
    lambda: each(lambda logger: logger.handlers.clear()),
    lambda: each(lambda logger: logger.addFilter(lambda record: False)),
    lambda: each(lambda logger: setattr(logger, "disabled", True)),
    lambda: logging.setLogRecordFactory(fails),
    lambda: logging.setLoggerClass(Silent),
    logging.shutdown,
    logging.root.manager.loggerDict.clear,
]

ours = logging.getLogger("overlay.workers.job")
log = ProcessLog(Path(sys.argv[1]), "C")
log.start()
for n, act in enumerate(ACTS):
    act()
    ours.error("line %d of %d", n + 1, len(ACTS), extra={"request_id": 7})
log.stop()
"""


def test_no_change_to_logging_silences_the_log(tmp_path):
    path = tmp_path / "c.log"
    command = [sys.executable, "-c", SILENCERS, str(path)]

    subprocess.run(command, cwd=ROOT, check=True, timeout=60)

    lines = [line.partition("ERROR ")[2] for line in path.read_text().splitlines()]
    assert lines == [f"request {7:016x}: line {n} of 12" for n in range(1, 13)]


def test_a_stopped_log_restores_the_loggers(tmp_path):
    ours = logging.getLogger("overlay.workers.job")
    with logging_to(tmp_path / "c.log"):
        assert type(ours) is not logging.Logger
        ours.setLevel(logging.DEBUG)
        ours.debug("on request")
        ours.setLevel(logging.NOTSET)

    assert type(ours) is logging.Logger
    assert "DEBUG on request" in (tmp_path / "c.log").read_text()


def printed_lines(*texts: str) -> list[str]:
    lines: list[str] = []
    out = Printed(lines.append, 1)
    for text in texts:
        out.write(text)
    out.end_line()
    return lines


@pytest.mark.parametrize(
    ("texts", "lines"),
    [
        (["a\nb\n"], ["a", "b"]),
        (["a", "b", "\n", "c"], ["ab", "c"]),
        (["\n \n", ""], []),
        (["\u00e9\ud800\n"], ["\u00e9\\ud800"]),
    ],
)
def test_printed_text_becomes_lines(texts, lines):
    assert printed_lines(*texts) == lines


def test_printed_text_is_bounded_per_call_and_per_line():
    (line, left_out) = printed_lines("x" * 10_000_000 + "\n")[::-1]
    assert len(line) < 4096
    assert left_out == "9,934,465 more bytes printed at once are left out"
    assert len("".join(printed_lines(*["y" * 10_000] * 1000))) < 4096


def test_a_captured_output_stays_open_and_behaves_like_stdout():
    lines: list[str] = []
    out = Printed(lines.append, 1)
    out.close()
    out.buffer.close()
    print("still", file=out)
    out.buffer.write(b"bytes\n")
    assert lines == ["still", "bytes"]
    assert (out.fileno(), out.isatty(), out.encoding) == (1, False, "utf-8")
    assert isinstance(out, io.TextIOBase)


def test_printed_text_goes_to_the_log_until_it_stops(tmp_path, capfd):
    path = tmp_path / "c.log"
    before = sys.stdout, sys.stderr
    with logging_to(path) as log:
        log.capture_prints()
        print("to the log")
        print("this too", file=sys.stderr)
    assert (sys.stdout, sys.stderr) == before
    text = path.read_text()
    assert "C overlay.handler INFO to the log\n" in text
    assert "C overlay.handler INFO this too\n" in text
    assert capfd.readouterr() == ("", "")


def test_printed_text_has_the_id_of_the_request_that_its_thread_works_on(tmp_path):
    path, both = tmp_path / "c.log", threading.Barrier(2)

    def work(first: int) -> None:
        for request_id in range(first, first + 3):
            log_file.set_request(request_id)
            print(f"{request_id} ", end="")
            both.wait(10)  # the other thread prints during this line
            print("begins")
            both.wait(10)
            print(f"{request_id} has no end", end="")
        log_file.set_request(0)

    with logging_to(path) as log:
        log.capture_prints()
        threads = [threading.Thread(target=work, args=(first,)) for first in (0x10, 0x20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print("no request's")

    *lines, last = [line.split(" INFO ")[1] for line in path.read_text().splitlines()]
    ids = [0x10, 0x11, 0x12, 0x20, 0x21, 0x22]
    expected = [f"request {n:016x}: {n} {how}" for n in ids for how in ("begins", "has no end")]
    assert sorted(lines) == expected
    assert last == "no request's"


def test_stopping_twice_is_allowed(tmp_path):
    log = ProcessLog(tmp_path / "c.log", "C")
    log.start()
    log.stop()
    log.stop()


def test_stopping_before_the_start_is_allowed(tmp_path):
    ProcessLog(tmp_path / "c.log", "C").stop()


# Two processes, one file


@pytest.fixture
def worker(tmp_path):
    """Process C alone, of the six."""
    overlay = Overlay(tmp_path / "one", six_processes())
    try:
        yield overlay.start("C")
    finally:
        overlay.stop()


def second(worker):
    """The command for a process with the same folder and id but another configuration."""
    other = json.loads(worker.path.read_text())
    other["processes"]["C"]["port"] = free_port()
    (worker.folder / "other.json").write_text(json.dumps(other))
    return [sys.executable, str(ROOT / "node.py"), "other.json", "C"]


def test_a_second_process_with_the_same_log_refuses_to_start(worker):
    before = until(lambda: worker.log("C"), what="what it logs when it starts is in the file")

    done = subprocess.run(
        second(worker), cwd=worker.folder, capture_output=True, text=True, timeout=60
    )

    path, pid = Path("logs", "process_c.log"), worker.processes["C"].pid
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert f"{path} is the log of another process that runs (pid {pid})" in line
    assert '"log_dir"' in line
    assert worker.log("C") == before
    assert worker.ask("C").result == b"C: hi"


def test_a_process_that_died_leaves_its_log_to_the_next(worker):
    until(lambda: worker.log("C").count(" serves on ") == 1)  # or that line dies with it
    worker.kill("C")

    next_one = subprocess.Popen(
        second(worker), cwd=worker.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        assert b"serves on" in next_one.stdout.readline()
        until(lambda: worker.log("C").count(" serves on ") == 2)
    finally:
        next_one.kill()
        next_one.wait(10)
        next_one.stdout.close()


def test_a_stopped_log_is_unlocked(tmp_path):
    path = tmp_path / "process_a.log"
    log = ProcessLog(path, "A")
    log.start()
    script = (
        "import sys; from pathlib import Path; from overlay.observability import log_file\n"
        "log_file.LOCK_PATIENCE_S = 0\n"
        "log = log_file.ProcessLog(Path(sys.argv[1]), 'A'); log.start(); log.stop()"
    )
    command = [sys.executable, "-c", script, str(path)]
    taken = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    log.stop()
    free = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)

    assert taken.returncode == 1
    assert "ConfigError" in taken.stderr
    assert (free.returncode, free.stderr) == (0, "")
