"""`client.py HOST PORT map`, against real processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.cluster import ROOT, Overlay, free_port, running, six_processes, until
from tests.harness.commands import run_client_on_bytes, start_client

HANDLERS = """
import os
import time

def upper(payload, context):
    return payload.upper()

def picky(payload, context):
    if payload.startswith(b"bad"):
        raise ValueError(payload)
    return payload

def slow(payload, context):
    until = time.monotonic() + float(payload)
    while time.monotonic() < until and not context.cancelled:
        time.sleep(0.01)
    return payload

def binary(payload, context):
    return bytes(range(256))

def wait_for(payload, context):
    while payload and not os.path.exists(payload) and not context.cancelled:
        time.sleep(0.01)
    return payload
"""
NAMES = {name: f"mine:{name}" for name in ("upper", "picky", "slow", "binary", "wait_for")}


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Overlay]:
    folder = tmp_path_factory.mktemp("map")
    (folder / "mine.py").write_text(HANDLERS)
    with running(folder, six_processes(handlers=NAMES)) as found:
        yield found


def words_of(found: Overlay, *words: object) -> list[str]:
    return ["127.0.0.1", str(found.port("A")), "map", *map(str, words)]


def command(found: Overlay, *words: object) -> list[str]:
    return [sys.executable, str(ROOT / "client.py"), *words_of(found, *words)]


def run(found: Overlay, *words: object, stdin: bytes = b"") -> Any:
    return run_client_on_bytes(*words_of(found, *words), stdin=stdin)


@pytest.fixture
def ending(six: Overlay) -> Iterator[Overlay]:
    """The same six for a test that ends one of them, which is started again afterwards."""
    yield six
    if ended := [i for i, process in six.processes.items() if process.poll() is not None]:
        six.start(*ended)
    until(lambda: not at_work(six), 20, "the handlers end")


def at_work(found: Overlay) -> int:
    return sum(handler.active for w in "CDF" for handler in found.metrics(w).handlers)


# Input and output


@pytest.mark.parametrize(
    ("text", "results"),
    [
        (b"a\nb\nc\n", b"A\nB\nC\n"),
        (b"a\nb", b"A\nB\n"),
        (b"a\r\n\r\nb\r\n", b"A\n\nB\n"),
        (b"", b""),
        (b"\n", b"\n"),
        (b"\xff\x00x\n", b"\xff\x00X\n"),
    ],
)
def test_results_are_in_the_order_of_the_input_lines(
    six: Overlay, tmp_path: Path, text: bytes, results: bytes
) -> None:
    (tmp_path / "lines").write_bytes(text)

    piped = run(six, "--handler", "upper", stdin=text)
    named = run(six, "-", "--handler", "upper", stdin=text)
    filed = run(six, tmp_path / "lines", "--handler", "upper")

    assert piped.stdout == named.stdout == filed.stdout == results
    assert piped.returncode == named.returncode == filed.returncode == 0


def test_several_files_are_read_as_one_input_and_out_names_a_file(
    six: Overlay, tmp_path: Path
) -> None:
    (tmp_path / "1").write_text("a\nb\n")
    (tmp_path / "2").write_text("c\n")

    done = run(six, tmp_path / "1", tmp_path / "2", "--handler", "upper", "--out", tmp_path / "out")

    assert (tmp_path / "out").read_bytes() == b"A\nB\nC\n"
    assert done.stdout == b""
    assert done.stderr.startswith(b"client.py: 3 of 3 answered in ")


def test_many_lines_keep_their_order_with_a_small_window(six: Overlay) -> None:
    text = b"".join(b"%d\n" % n for n in range(5000))

    done = run(six, "--handler", "upper", "--window", 50, stdin=text)

    assert done.stdout == text


def test_as_completed_prints_quick_results_first(six: Overlay) -> None:
    done = run(six, "--handler", "slow", "--as-completed", "--json", stdin=b"1\n0\n0\n0\n")

    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert sorted(line["index"] for line in lines) == [0, 1, 2, 3]
    assert lines[-1] == {"index": 0, "ok": True, "result": "1"}


def test_team_and_mode_limit_the_workers_asked(six: Overlay) -> None:
    green = run(six, "--team", "green", stdin=b"x\n" * 9)
    all_ = run(six, "--mode", "all", "--json", stdin=b"x\n")

    assert green.stdout == b"C: x\n" * 9
    assert json.loads(all_.stdout)["result"] == "C: x\nD: x\nF: x"


def test_results_for_the_files_of_a_folder_go_to_files_of_the_same_names(
    six: Overlay, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    (folder / "deeper").mkdir(parents=True)
    for number in range(30):
        (folder / f"{number:02}.bin").write_bytes(b"a\n%d" % number)
    (folder / ".hidden").write_text("not this one")

    done = run(six, folder, "--handler", "upper", "--out-folder", tmp_path / "out")
    shown = run(six, folder, "--handler", "binary")

    assert (done.returncode, done.stdout) == (0, b"")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {
        f"{number:02}.bin": b"A\n%d" % number for number in range(30)
    }
    assert shown.stdout.startswith(b"00.bin: 256 bytes, not text; ")
    assert len(shown.stdout.splitlines()) == 30


def test_json_output_names_the_files_and_preserves_bytes(six: Overlay, tmp_path: Path) -> None:
    (tmp_path / "one").write_text("x")

    done = run(six, tmp_path, "--handler", "binary", "--json")

    report = json.loads(done.stdout)
    assert (report["index"], report["name"], report["ok"]) == (0, "one", True)
    assert report["result_base64"].startswith("AAECAwQF")


# Failures


def test_failures_do_not_stop_the_others_and_leave_empty_lines(six: Overlay) -> None:
    text = b"".join(b"bad\n" if n % 2 else b"%d\n" % n for n in range(40))

    done = run(six, "--handler", "picky", stdin=text)

    assert done.stdout == b"".join(b"\n" if n % 2 else b"%d\n" % n for n in range(40))
    assert done.returncode == 1
    complaints = done.stderr.decode().splitlines()
    assert len(complaints) == 12
    assert re.match(r"client.py: line 2: [CDF]: handler 'picky' failed; error id ", complaints[0])
    assert complaints[10] == "client.py: further ones are only counted, at the end"
    assert complaints[11].startswith("client.py: 20 of 40 answered in ")
    assert complaints[11].endswith("; 20 failed: 20 INTERNAL")


def test_json_output_has_each_failure_in_its_place(six: Overlay) -> None:
    done = run(six, "--handler", "picky", "--json", stdin=b"a\nbad\nb\n")

    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["index"], line["ok"]) for line in lines] == [(0, True), (1, False), (2, True)]
    assert lines[1]["error"]["code"] == "INTERNAL"
    assert lines[1]["error"]["executed"] == "YES"


def test_a_failed_file_is_named_and_has_no_output_file(six: Overlay, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good").write_text("x")
    (tmp_path / "in" / "poor").write_text("bad")

    done = run(six, tmp_path / "in", "--handler", "picky", "--out-folder", tmp_path / "out")

    assert done.returncode == 1
    assert re.search(rb"client.py: poor: [CDF]: handler 'picky' failed", done.stderr)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["good"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--handler", "slow", "--deadline", "0.3"], 5, "2 failed: 2 DEADLINE_EXCEEDED"),
        (["--handler", "nope"], 1, "2 failed: 2 NOT_FOUND"),
    ],
)
def test_if_all_fail_for_one_reason_the_exit_code_is_that_of_the_reason(
    six: Overlay, words: list[str], code: int, message: str
) -> None:
    done = run(six, *words, stdin=b"9\n9\n")

    assert done.returncode == code
    assert message in done.stderr.decode()


def test_a_missing_server_is_exit_code_4() -> None:
    done = run_client_on_bytes("127.0.0.1", free_port(), "map", stdin=b"a\nb\n")

    assert done.returncode == 4
    assert done.stderr.decode().startswith("client.py: nothing serves at 127.0.0.1:")
    assert len(done.stderr.splitlines()) == 1


def test_an_incomplete_result_is_reported_with_exit_code_6(ending: Overlay) -> None:
    ending.kill("F")

    done = run(ending, "--mode", "all", "--json", stdin=b"x\n")

    assert json.loads(done.stdout) == {
        "index": 0, "ok": True, "result": "C: x\nD: x", "missing": ["F"]
    }  # fmt: skip
    assert done.returncode == 6
    assert b"line 1: not answered by F (" in done.stderr
    assert b"1 result incomplete" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no-such-file"], "cannot use 'no-such-file': "),
        (["{folder}", "{file}"], "is a folder, which has to be the only input"),
        (["{file}", "--out-folder", "x"], "--out-folder needs a folder as input"),
        (["{folder}", "--out-folder", "{folder}"], "its files would be overwritten"),
        (["{file}", "--out", "{file}"], "is an input: it would be overwritten"),
        (["{folder}", "--out", "x", "--out-folder", "y"], "exclude each other"),
        (["{file}", "--failed", "{file}"], "is an input: it would be overwritten"),
        (["{file}", "--failed", "-"], "--failed needs a file of its own"),
        (["@{file}", "{file}"], "is a list of files, which has to be the only input"),
        (["--window", "0"], "'0' is not a whole number from 1 to 1000000"),
        (["--deadline", "-1"], "is not a number of seconds"),
        (["--priority", "10"], "'10' is not 0 to 9"),
    ],
)
def test_invalid_arguments_get_a_one_line_message_before_anything_is_sent(
    six: Overlay, tmp_path: Path, words: list[str], message: str
) -> None:
    (tmp_path / "file").write_text("precious\n")
    words = [word.format(folder=tmp_path, file=tmp_path / "file") for word in words]

    done = run(six, *words)

    assert done.returncode == 2
    assert message in done.stderr.decode()
    assert len(done.stderr.splitlines()) == 1
    assert (tmp_path / "file").read_text() == "precious\n"


# Failed input, saved for another map


def test_failed_lines_are_saved_in_a_file_that_map_can_read(six: Overlay, tmp_path: Path) -> None:
    text, kept = b"a\nbad 1\r\nb\nbad 2", tmp_path / "failed"

    done = run(six, "--handler", "picky", "--failed", kept, stdin=text)
    again = run(six, kept, "--handler", "upper", "--failed", tmp_path / "none")

    assert done.returncode == 1
    assert sorted(kept.read_bytes().splitlines()) == [b"bad 1", b"bad 2"]
    assert f"; 2 failed (kept for another map: {kept}): 2 INTERNAL" in done.stderr.decode()
    assert sorted(again.stdout.splitlines()) == [b"BAD 1", b"BAD 2"]
    assert not (tmp_path / "none").exists()


def test_the_paths_of_failed_files_are_saved(six: Overlay, tmp_path: Path) -> None:
    kept, folder = tmp_path / "failed", tmp_path / "in folder"
    folder.mkdir()
    for name, text in (("good", "x"), ("poor ü", "bad"), ("poor 2", "bad")):
        (folder / name).write_text(text)

    done = run(six, folder, "--handler", "picky", "--failed", kept)
    again = run(six, f"@{kept}", "--handler", "upper", "--out-folder", tmp_path / "out")

    assert done.returncode == 1
    assert f"kept for another map: @{kept}" in done.stderr.decode()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["poor 2", "poor ü"]
    assert (tmp_path / "out" / "poor 2").read_text() == "BAD"
    assert again.returncode == 0


def test_without_a_server_all_of_the_input_is_saved(tmp_path: Path) -> None:
    kept = tmp_path / "failed"
    words = "127.0.0.1", free_port(), "map", "--patience", 0.2, "--window", 100, "--failed", kept
    text = b"".join(b"%d\n" % n for n in range(5000))

    done = run_client_on_bytes(*words, stdin=text)

    assert done.returncode == 4
    assert sorted(kept.read_bytes().splitlines()) == sorted(text.splitlines())


def test_a_failure_names_its_request_and_how_to_see_its_log_lines(six: Overlay) -> None:
    done = run(six, "--handler", "picky", "--json", stdin=b"bad\n")

    error = json.loads(done.stdout)["error"]
    command = f"client.py 127.0.0.1 {six.port('A')} logs --request {error['request_id']}"
    assert error["logs"] == command
    assert f"; request {error['request_id']}, its log lines: {command}" in done.stderr.decode()


# Streaming, interruption, restarts


def test_slow_input_is_answered_line_by_line(six: Overlay) -> None:
    asking = start_client(*words_of(six, "--handler", "upper"))
    for number in range(5):
        asking.stdin.write(b"line %d\n" % number)
        asking.stdin.flush()

        assert asking.stdout.readline() == b"LINE %d\n" % number
    asking.stdin.close()
    assert asking.wait(10) == 0
    asking.stdout.close()
    asking.stderr.close()


@pytest.mark.skipif(os.name == "nt", reason="there, Ctrl-C reaches the whole console")
def test_ctrl_c_cancels_the_remaining_requests_and_exits_with_130(six: Overlay) -> None:
    asking = subprocess.Popen(
        command(six, "--handler", "slow", "--window", 20),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    asking.stdin.write(b"0\n" + b"30\n" * 100)
    asking.stdin.flush()
    until(lambda: at_work(six) >= 15, what="the window is at work")

    asking.send_signal(signal.SIGINT)
    _, complaint = asking.communicate(timeout=5)

    assert asking.returncode == 130
    assert complaint.splitlines()[-1] == b"client.py: interrupted"
    assert b" answered in " in complaint
    assert b"Traceback" not in complaint
    until(lambda: at_work(six) == 0, 5)


def test_a_closed_output_pipe_ends_map_quietly_and_cancels_the_rest(six: Overlay) -> None:
    asking = subprocess.Popen(
        command(six, "--handler", "slow", "--as-completed"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    asking.stdin.write(b"0\n" * 3 + b"0.5\n" * 50 + b"30\n" * 50)
    asking.stdin.flush()
    assert asking.stdout.readline() == b"0\n"

    asking.stdout.close()

    assert asking.wait(10) == 0
    assert asking.stderr.read() == b""
    asking.stdin.close()
    asking.stderr.close()
    until(lambda: at_work(six) == 0, 5)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads a size from /proc")
def test_endless_input_needs_bounded_memory(six: Overlay) -> None:
    asking = subprocess.Popen(
        command(six, "--handler", "upper", "--window", 1000),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    chunk = b"".join(b"%0100d\n" % n for n in range(1000))
    sizes = []
    for step in range(100):
        asking.stdin.write(chunk)
        if step % 50 == 49:
            sizes.append(_resident_mib(asking.pid))
    asking.stdin.close()

    assert asking.wait(30) == 0
    assert b"100,000 of 100,000 answered" in asking.stderr.read()
    asking.stderr.close()
    assert sizes[1] - sizes[0] < 20, sizes


def _resident_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if "VmRSS" in line)


def test_a_restart_of_the_leader_fails_only_requests_with_unknown_outcome(ending: Overlay) -> None:
    asking = start_client(*words_of(ending, "--handler", "upper", "--json", "--window", 100))
    asking.stdin.write(b"x\n" * 100)
    asking.stdin.flush()
    first = [asking.stdout.readline() for _ in range(100)]
    ending.kill("A")
    ending.start("A")
    asking.stdin.write(b"y\n" * 100)
    asking.stdin.close()
    rest = asking.stdout.read().splitlines()
    asking.stdout.close()

    assert asking.wait(10) == 0
    asking.stderr.close()
    results = Counter(json.loads(line)["result"] for line in [*first, *rest])
    assert results == {"X": 100, "Y": 100}


def test_a_lost_leader_fails_only_requests_in_flight(ending: Overlay) -> None:
    asking = start_client(*words_of(ending, "--handler", "slow", "--json", "--window", 100))
    asking.stdin.write(b"0.03\n" * 3000)  # shorter ones may be on a lane, and are not lost
    asking.stdin.close()
    first = [asking.stdout.readline() for _ in range(500)]
    ending.kill("A")
    time.sleep(3)  # longer than a call waits
    ending.start("A")
    lines = [json.loads(line) for line in [*first, *asking.stdout.read().splitlines()]]
    complaints = asking.stderr.read().decode()
    asking.stdout.close()
    asking.stderr.close()

    failed = [line for line in lines if not line["ok"]]
    assert asking.wait(10) == 1
    assert [line["index"] for line in lines] == list(range(3000))
    assert 0 < len(failed) <= 100, "no more than the window was under way"
    assert {line["error"]["executed"] for line in failed} == {"UNKNOWN"}
    assert (
        f"client.py: {ending.address('A')} is gone; the map goes on when it is back" in complaints
    )
    assert f"line {failed[0]['index'] + 1}: no answer from {ending.address('A')}" in complaints
    assert f"{3000 - len(failed):,} of 3,000 answered in " in complaints
    assert f"; {len(failed)} failed: {len(failed)} UNAVAILABLE" in complaints


def test_a_leader_that_stays_away_ends_map_with_the_counts(ending: Overlay) -> None:
    asking = start_client(
        *words_of(ending, "--handler", "slow", "--json", "--window", 100, "--patience", 1)
    )
    asking.stdin.write(b"0.01\n" * 3000)
    asking.stdin.close()
    first = [asking.stdout.readline() for _ in range(500)]
    ending.kill("A")
    lines = [json.loads(line) for line in [*first, *asking.stdout.read().splitlines()]]
    complaints = asking.stderr.read().decode()
    asking.stdout.close()
    asking.stderr.close()

    good = sum(line["ok"] for line in lines)
    assert asking.wait(20) == 1
    assert [line["index"] for line in lines] == list(range(len(lines)))
    assert f"; {good:,} payloads were answered, " in complaints
    assert f"{good:,} of {len(lines):,} answered in " in complaints


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_progress_is_shown_on_a_terminal(six: Overlay, tmp_path: Path) -> None:
    import pty

    (tmp_path / "lines").write_text("0.5\n" * 3 + "bad\n" + "0.5\n" * 6)
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    words = command(six, tmp_path / "lines", "--handler", "slow", "--window", 4)
    asking = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=theirs, env=env)
    os.close(theirs)

    text = _read_all(ours)
    out = asking.stdout.read()
    asking.stdout.close()

    assert asking.wait(10) == 1
    assert "of 10, " in text
    assert "1 failed" in text
    assert re.search("client.py: line 4: [CDF]: handler 'slow' failed", text)
    assert out == b"0.5\n" * 3 + b"\n" + b"0.5\n" * 6


def _read_all(terminal: int) -> str:
    text = b""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            chunk = os.read(terminal, 65536)
        except OSError:  # how Linux reports the end
            chunk = b""
        if not chunk:
            break
        text += chunk
    os.close(terminal)
    return text.decode()


def test_a_reader_that_leaves_ends_the_map_although_it_waits_for_a_result(
    six: Overlay, tmp_path: Path
) -> None:
    go, never = tmp_path / "go", tmp_path / "never"
    lines = b"\n" + bytes(go) + b"\n" + bytes(never) + b"\n"
    # With buffered output, so that it is not the write of a result that finds the reader gone.
    buffered = {key: text for key, text in os.environ.items() if key != "PYTHONUNBUFFERED"}
    asking = subprocess.Popen(
        command(six, "--handler", "wait_for"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=buffered,
    )
    assert asking.stdin is not None
    assert asking.stdout is not None
    try:
        asking.stdin.write(lines)
        asking.stdin.close()
        assert asking.stdout.readline() == b"\n"
        asking.stdout.close()
        go.touch()

        assert asking.wait(20) == 0
    finally:
        asking.kill()
        asking.wait()
    until(lambda: not at_work(six), 10, "the work that no one reads is cancelled")
