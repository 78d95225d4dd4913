"""`client.py HOST PORT map --resume FILE`, interrupted in every way and run again.

The handlers note what they run, so that a test sees what ran twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.cluster import ROOT, Overlay, free_port, running, six_processes, until
from tests.harness.commands import run_client_on_bytes, start_client

HANDLERS = """
import pathlib, time

HERE = pathlib.Path(__file__).parent

def _note(payload, context):
    with open(HERE / f"ran.{context.process_id}", "ab") as file:
        file.write(payload.splitlines()[0] + b"\\n")

def upper(payload, context):
    _note(payload, context)
    time.sleep(0.01)
    return payload.upper()

def other(payload, context):
    _note(payload, context)
    return b"other"

def held(payload, context):
    _note(payload, context)
    while not (HERE / "go").exists() and not context.cancelled:
        time.sleep(0.01)
    return payload

def picky(payload, context):
    _note(payload, context)
    if payload.startswith(b"bad") and not (HERE / "go").exists():
        raise ValueError(payload)
    return payload.upper()

def large(payload, context):
    _note(payload, context)
    return payload * 1000
"""
NAMES = {name: f"mine:{name}" for name in ("upper", "other", "held", "picky", "large")}
WINDOW = 40
LINES = [b"line %d" % n for n in range(400)]
UPPERS = b"".join(line.upper() + b"\n" for line in LINES)


class Six:
    """An overlay, and what its handlers noted."""

    def __init__(self, found: Overlay) -> None:
        self.overlay = found

    def words(self, *words: object) -> list[str]:
        return ["127.0.0.1", str(self.overlay.port("A")), "map", *map(str, words)]

    def run(self, *words: object, stdin: bytes = b"") -> Any:
        return run_client_on_bytes(*self.words(*words), stdin=stdin)

    def popen(self, *words: object, **options: Any) -> subprocess.Popen[bytes]:
        """The command by itself, not forked, with its complaints in a pipe."""
        command = [sys.executable, str(ROOT / "client.py"), *self.words(*words)]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL} | options
        return subprocess.Popen(command, stderr=subprocess.PIPE, **quiet)

    def ran(self) -> Counter[bytes]:
        paths = self.overlay.folder.glob("ran.*")
        return Counter(line for path in paths for line in path.read_bytes().splitlines())

    def reset(self) -> None:
        for path in (*self.overlay.folder.glob("ran.*"), self.overlay.folder / "go"):
            path.unlink(missing_ok=True)

    def go(self) -> None:
        (self.overlay.folder / "go").touch()

    def at_work(self) -> int:
        return sum(h.active for w in "CDF" for h in self.overlay.metrics(w).handlers)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Six]:
    folder = tmp_path_factory.mktemp("resume")
    (folder / "mine.py").write_text(HANDLERS)
    with running(folder, six_processes(handlers=NAMES)) as found:
        yield Six(found)


@pytest.fixture
def six(shared: Six) -> Iterator[Six]:
    shared.reset()
    yield shared
    found = shared.overlay
    if ended := [i for i, process in found.processes.items() if process.poll() is not None]:
        found.start(*ended)
    until(lambda: not shared.at_work(), 20, "the handlers end")


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "lines"
    path.write_bytes(b"\n".join(LINES))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "done.results"


def recorded(file: Path) -> list[int]:
    """The payloads that have a result, in a copy of the file as it is."""
    folder = file.parent / "copy"
    folder.mkdir()
    for path in file.parent.glob(f"{file.name}*"):
        shutil.copy(path, folder)
    with contextlib.closing(sqlite3.connect(folder / file.name)) as db:
        found = [index for (index,) in db.execute("SELECT payload FROM results")]
    shutil.rmtree(folder)
    return sorted(found)


def ends(asking: Any) -> tuple[int, str]:
    """Its exit code and complaints."""
    _, complaints = asking.communicate(timeout=30)
    assert b"Traceback" not in complaints, complaints.decode()
    return asking.returncode, complaints.decode()


# Interruptions


@pytest.mark.parametrize("form", ["lines", "as they come", "standard input", "json"])
def test_a_map_that_was_killed_goes_on_where_it_was(
    six: Six, lines: Path, file: Path, form: str
) -> None:
    how = ["--handler", "upper", "--window", WINDOW, "--resume", file]
    how += {"as they come": ["--as-completed"], "json": ["--json"]}.get(form, [])
    source, text = ([], lines.read_bytes()) if form == "standard input" else ([lines], b"")
    with start_client(*six.words(*source, *how)) as asking:
        if text:
            asking.stdin.write(text)
            asking.stdin.close()
        until(lambda: sum(six.ran().values()) > 150)
        asking.kill()
        asking.wait()
    before = recorded(file)
    until(lambda: not six.at_work())
    ran_first = six.ran()

    done = six.run(*source, *how, stdin=text)

    assert done.returncode == 0
    results = done.stdout
    if form == "json":
        found = [json.loads(line) for line in results.splitlines()]
        assert [line["index"] for line in found] == list(range(400))
        results = b"".join(line["result"].encode() + b"\n" for line in found)
    if form == "as they come":
        assert sorted(results.splitlines()) == sorted(UPPERS.splitlines())
    else:
        assert results == UPPERS
    assert len(before) >= 50
    # What was in flight, and what came in the 20 ms since the last commit.
    assert sum(ran_first.values()) - len(before) <= 3 * WINDOW
    assert {six.ran()[LINES[index]] for index in before} == {1}, "what is recorded ran once"
    assert f"; {len(before):,} of them from '{file}', {400 - len(before):,} recorded there" in (
        done.stderr.decode()
    )


def test_the_files_of_a_folder_go_on_to_the_same_results(
    six: Six, tmp_path: Path, file: Path
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for number in range(200):
        (folder / f"{number:03}.txt").write_bytes(b"%d\n\xff" % number)
    words = folder, "--handler", "upper", "--window", 20, "--out-folder", out, "--resume", file
    with start_client(*six.words(*words)) as asking:
        until(lambda: sum(six.ran().values()) > 80)
        asking.kill()
        asking.wait()
    before = recorded(file)
    shutil.rmtree(out)

    done = six.run(*words)

    assert (done.returncode, done.stdout) == (0, b"")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        f"{number:03}.txt": b"%d\n\xff" % number for number in range(200)
    }
    assert len(before) >= 20
    assert {six.ran()[b"%d" % number] for number in before} == {1}


@pytest.mark.skipif(os.name == "nt", reason="there, Ctrl-C reaches the whole console")
def test_ctrl_c_records_what_has_arrived_and_the_same_command_goes_on(
    six: Six, tmp_path: Path, lines: Path, file: Path
) -> None:
    out = tmp_path / "out"
    words = lines, "--handler", "upper", "--window", WINDOW, "--out", out, "--resume", file
    asking = six.popen(*words)
    until(lambda: sum(six.ran().values()) > 150)
    asking.send_signal(signal.SIGINT)
    code, complaints = ends(asking)
    before = recorded(file)
    written = out.read_bytes().splitlines()

    done = six.run(*words)

    assert code == 130
    assert f"; 0 of them from '{file}', {len(before):,} recorded there" in complaints
    assert len(written) >= 50
    assert set(range(len(written))) <= set(before), "what was given is recorded"
    assert (done.returncode, out.read_bytes()) == (0, UPPERS)
    assert {six.ran()[LINES[index]] for index in before} == {1}
    assert not file.with_name(f"{file.name}-wal").exists()


def test_when_the_leader_is_lost_the_rest_runs_when_it_is_back(
    six: Six, lines: Path, file: Path
) -> None:
    words = lines, "--handler", "upper", "--window", WINDOW, "--resume", file, "--patience", 0.5
    with start_client(*six.words(*words)) as asking:
        until(lambda: sum(six.ran().values()) > 150)
        six.overlay.kill("A")
        code, complaints = ends(asking)
    before = recorded(file)
    away = six.run(*words)
    six.overlay.start("A")

    done = six.run(*words)

    assert code == 1, complaints
    assert away.returncode == 1
    assert "nothing serves at 127.0.0.1:" in away.stderr.decode()
    assert away.stdout, "what is recorded is given all the same"
    assert UPPERS.startswith(away.stdout)
    assert (done.returncode, done.stdout) == (0, UPPERS)
    assert {six.ran()[LINES[index]] for index in before} == {1}


def test_a_map_that_is_done_runs_nothing_and_needs_no_leader(
    six: Six, tmp_path: Path, lines: Path, file: Path
) -> None:
    first = six.run(lines, "--handler", "upper", "--resume", file)
    size = file.stat().st_size
    words = "127.0.0.1", free_port(), "map", lines, "--handler", "upper", "--resume", file

    again = run_client_on_bytes(*words)

    assert (again.returncode, again.stdout) == (0, first.stdout)
    assert re.fullmatch(
        rf"client.py: 400 of 400 answered in [\d.]+ s; 400 of them from '{file}', 0 recorded there",
        again.stderr.decode().strip(),
    )
    assert set(six.ran().values()) == {1}
    assert file.stat().st_size == size


def test_failures_and_lines_that_follow_run_and_nothing_else(
    six: Six, tmp_path: Path, file: Path
) -> None:
    text, failed = b"a\nbad\nb\n", tmp_path / "failed"
    words = "--handler", "picky", "--resume", file, "--failed", failed
    first = six.run(*words, stdin=text)
    kept = failed.read_bytes()
    six.go()

    second = six.run(*words, stdin=text + b"c\n")

    assert (first.returncode, first.stdout, kept) == (1, b"A\n\nB\n", b"bad\n")
    assert (second.returncode, second.stdout) == (0, b"A\nBAD\nB\nC\n")
    assert not failed.exists()
    assert six.ran() == {b"a": 1, b"bad": 2, b"b": 1, b"c": 1}


def test_an_incomplete_result_is_not_recorded(six: Six, file: Path) -> None:
    words = "--mode", "all", "--json", "--handler", "upper", "--resume", file
    six.overlay.kill("F")
    incomplete = six.run(*words, stdin=b"x\n")
    six.overlay.start("F")

    complete = six.run(*words, stdin=b"x\n")

    assert (incomplete.returncode, json.loads(incomplete.stdout)["missing"]) == (6, ["F"])
    assert (complete.returncode, json.loads(complete.stdout)) == (
        0,
        {"index": 0, "ok": True, "result": "X\nX\nX"},
    )
    assert recorded(file) == [0]


# What has changed


def test_a_changed_line_is_refused_by_its_number_before_anything_happens(
    six: Six, tmp_path: Path, lines: Path, file: Path
) -> None:
    out = tmp_path / "out"
    words = lines, "--handler", "upper", "--out", out, "--resume", file
    six.run(*words)
    six.reset()
    changed = [*LINES]
    changed[7] = changed[300] = b"precious"
    lines.write_bytes(b"\n".join(changed))

    done = six.run(*words)

    assert done.returncode == 2
    assert done.stderr.decode() == (
        f"client.py: '{file}' has the results of other payloads; changed: line 8, line 301 (of 400 "
        "compared): give the payloads of the first run (more may follow them), or name another "
        "file\n"
    )
    assert out.read_bytes() == UPPERS
    assert six.ran() == {}


def test_a_changed_line_of_standard_input_ends_the_map_there(six: Six, file: Path) -> None:
    words = "--handler", "upper", "--window", 20, "--resume", file
    six.run(*words, stdin=b"\n".join(LINES))
    six.reset()
    changed = [*LINES[:300], b"precious", *LINES[301:]]

    done = six.run(*words, stdin=b"\n".join(changed))

    assert done.returncode == 1
    assert "; changed: line 301 (of " in done.stderr.decode()
    assert UPPERS.startswith(done.stdout)
    assert 200 < len(done.stdout.splitlines()) <= 300
    assert six.ran() == {}


def test_a_changed_and_an_additional_file_are_named(six: Six, tmp_path: Path, file: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in "abcdef":
        (folder / name).write_text(name)
    words = folder, "--handler", "upper", "--resume", file
    six.run(*words)
    (folder / "c").write_text("other")
    changed = six.run(*words)
    (folder / "c").write_text("c")
    (folder / "bb").write_text("new")
    inserted = six.run(*words)
    (folder / "bb").rename(folder / "g")
    appended = six.run(*words)

    assert changed.returncode == inserted.returncode == 2
    assert "; changed: c (of 6 compared): " in changed.stderr.decode()
    assert "; changed: bb, c, d and 1 more (of 6 compared): " in inserted.stderr.decode()
    assert appended.returncode == 0
    assert six.ran() == {**dict.fromkeys([b"a", b"b", b"c", b"d", b"e", b"f"], 1), b"new": 1}


@pytest.mark.parametrize("is_file", [True, False])
def test_fewer_lines_are_refused_or_an_error_at_the_end(
    six: Six, lines: Path, file: Path, is_file: bool
) -> None:
    six.run(lines, "--handler", "upper", "--resume", file)
    lines.write_bytes(b"\n".join(LINES[:90]))
    words = "--handler", "upper", "--resume", file

    done = six.run(lines, *words) if is_file else six.run(*words, stdin=lines.read_bytes())

    assert "; there were at least 400, and now 90: " in done.stderr.decode()
    assert done.returncode == (2 if is_file else 1)
    assert done.stdout == (b"" if is_file else b"\n".join(UPPERS.splitlines()[:90]) + b"\n")


@pytest.mark.parametrize(
    ("words", "difference"),
    [
        (["--handler", "other"], "handler 'upper' there, 'other' now"),
        ([], "handler 'upper' there, '' now"),
        (["--handler", "upper", "--mode", "all"], "mode 'any' there, 'all' now"),
        (["--handler", "upper", "--team", "pink"], "team '' there, 'pink' now"),
    ],
)
def test_another_map_is_refused(
    six: Six, lines: Path, file: Path, words: list[str], difference: str
) -> None:
    six.run(lines, "--handler", "upper", "--resume", file)
    six.reset()
    before = file.read_bytes()

    done = six.run(lines, *words, "--resume", file)

    assert done.returncode == 2
    assert f"'{file}' has the results of another map: {difference}: " in done.stderr.decode()
    assert len(done.stderr.splitlines()) == 1
    assert six.ran() == {}
    assert file.read_bytes() == before


# Files that cannot be used


def test_a_second_command_with_the_file_is_refused_and_the_first_goes_on(
    six: Six, tmp_path: Path, file: Path
) -> None:
    (tmp_path / "few").write_bytes(b"a\nb\n")
    out = tmp_path / "out"
    words = tmp_path / "few", "--handler", "held", "--resume", file, "--out", out
    with start_client(*six.words(*words)) as asking:
        until(lambda: len(six.ran()) == 2)
        second = six.run(*words)
        six.go()
        code, _ = ends(asking)

    assert second.returncode == 2
    assert second.stderr.decode() == (
        f"client.py: '{file}' is in use by another map: wait for its end, or name another file\n"
    )
    assert (code, out.read_bytes()) == (0, b"a\nb\n")
    assert set(six.ran().values()) == {1}


@pytest.mark.parametrize("content", [b"precious\n" * 99, b"SQLite format 3\0precious"])
def test_a_file_of_something_else_is_refused_and_left_as_it_is(
    six: Six, lines: Path, file: Path, content: bytes
) -> None:
    file.write_bytes(content)

    done = six.run(lines, "--handler", "upper", "--resume", file)

    assert done.returncode == 2
    assert done.stderr.decode() == (
        f"client.py: '{file}' is not a file of a map's results, and is left as it is: name another "
        "file\n"
    )
    assert file.read_bytes() == content
    assert six.ran() == {}


def test_a_damaged_file_is_refused_and_left_as_it_is(six: Six, lines: Path, file: Path) -> None:
    six.run(lines, "--handler", "upper", "--resume", file)
    damaged = file.read_bytes()[:-4096]
    file.write_bytes(damaged)

    done = six.run(lines, "--handler", "upper", "--resume", file)

    assert done.returncode == 2
    assert f"'{file}' is damaged (" in done.stderr.decode()
    assert "put back a copy, or name another file" in done.stderr.decode()
    assert file.read_bytes() == damaged


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{file}", "--resume", "{file}"], "is an input: it would be overwritten"),
        (["{file}", "--resume", "x", "--out", "x"], "--out and --resume cannot be one file"),
        (["{file}", "--resume", "x", "--failed", "./x"], "--failed and --resume cannot be one"),
        (["{folder}", "--resume", "{folder}/x"], "--resume cannot be in '{folder}', among"),
        (["{file}", "--resume", "-"], "--resume needs a file of its own"),
        (["{file}", "--resume", ""], "--resume needs a file of its own"),
        (["{file}", "--resume", "{folder}"], "'{folder}' is not a file"),
        (["{file}", "--resume", "{folder}/none/x"], "there is no such folder"),
    ],
)
def test_files_that_are_in_the_way_of_each_other_are_refused(
    six: Six, tmp_path: Path, words: list[str], message: str
) -> None:
    (tmp_path / "file").write_text("precious\n")
    names = {"folder": tmp_path, "file": tmp_path / "file"}

    done = six.run(*(word.format(**names) for word in words))

    assert done.returncode == 2
    assert message.format(**names) in done.stderr.decode()
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "precious\n"


@pytest.mark.skipif(os.name == "nt", reason="needs a shell with ulimit")
def test_a_full_disk_is_an_error_and_what_was_written_is_given_next_time(
    six: Six, lines: Path, file: Path
) -> None:
    words = [lines, "--handler", "large", "--window", 20, "--resume", file]
    command = shlex.join([sys.executable, str(ROOT / "client.py"), *six.words(*words)])
    limited = subprocess.run(  # the size that a file may have, in KiB
        ["bash", "-c", f"ulimit -f 800; exec {command}"], capture_output=True, timeout=60
    )
    before = recorded(file)

    done = six.run(*words)

    assert limited.returncode == 1
    assert f"cannot write '{file}': disk I/O error; the results that it has stay" in (
        limited.stderr.decode()
    )
    assert b"Traceback" not in limited.stderr
    assert 0 < len(before) < 400
    assert (done.returncode, done.stdout) == (0, b"".join(line * 1000 + b"\n" for line in LINES))
    assert {six.ran()[LINES[index]] for index in before} == {1}
