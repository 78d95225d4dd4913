"""The record of a map's results: what it keeps, what it refuses, what survives."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlay.client import resume
from overlay.client.arguments import call_kind
from overlay.client.resume import Record, open_record
from overlay.model.errors import ResumeError
from tests.harness.cluster import ROOT

UPPER = call_kind("any", "", "upper", False, 0)


def opened(path: Path, kind: Any = UPPER, has_values: bool = False) -> Record:
    return open_record(str(path), kind, has_values)


def keep(record: Record, *indexes: int) -> None:
    """Records the results R0, R1, … of the payloads p0, p1, …"""
    for index in indexes:
        (digest,), known = record.look_up(index, [b"p%d" % index])
        assert not known
        record.add(index, digest, b"R%d" % index)


def payloads(count: int) -> list[bytes]:
    return [b"p%d" % index for index in range(count)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "results"


def test_results_are_found_again_with_their_payloads(file: Path) -> None:
    with closing(opened(file)) as record:
        keep(record, 0, 2, 3)

    with closing(opened(file)) as record:
        _, known = record.look_up(0, payloads(3))
        _, rest = record.look_up(3, [b"p3", b"p4"])

        assert (known, rest) == ([0, 2], [0])
        assert list(record.results(2, 2)) == [b"R2", b"R3"]
        assert (record.last, record.recalled, record.added) == (3, 2, 0)


def test_nothing_stays_beside_the_file_after_the_close(file: Path) -> None:
    with closing(opened(file)) as record:
        keep(record, 0)

    assert [path.name for path in file.parent.iterdir()] == ["results"]


def test_what_is_added_is_written_by_commit_and_by_close_but_not_before(file: Path) -> None:
    """Seen in a copy, because nobody else can open the file itself."""

    def count_in_copy() -> int:
        for path in file.parent.glob("results*"):
            shutil.copy(path, path.with_name(f"copy{path.name.removeprefix('results')}"))
        with closing(sqlite3.connect(file.with_name("copy"))) as db:
            (count,) = db.execute("SELECT count(*) FROM results").fetchone()
            return int(count)

    with closing(opened(file)) as record:
        keep(record, 0, 1)
        assert count_in_copy() == 0
        record.commit()
        assert count_in_copy() == 2
        keep(record, 2)

    assert count_in_copy() == 3


def test_a_commit_is_due_after_a_while_or_when_much_was_added(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(resume.time, "monotonic", lambda: now)
    with closing(opened(file)) as record:
        assert not record.is_due
        keep(record, 0)
        assert record.is_due
        record.commit()
        keep(record, 1)
        assert not record.is_due
        now += 2 * resume.COMMIT_S
        assert record.is_due

        record.commit()
        keep(record, 2)
        assert not record.is_due
        record.add(3, b"", b"x" * resume.COMMIT_BYTES)
        assert record.is_due


def test_an_interrupted_commit_is_repeated_whole(file: Path) -> None:
    with closing(opened(file)) as record:
        keep(record, 0, 1)
        record._db.execute("BEGIN")  # as Ctrl-C may leave it, between two statements
        record._db.execute("INSERT INTO results VALUES (0, x'00', 0, x'00')")

    with closing(opened(file)) as record:
        assert list(record.results(0, 2)) == [b"R0", b"R1"]


# Refusals: none of them changes the file.


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(ResumeError) as caught:
        action()
    return str(caught.value)


def test_a_second_user_of_the_file_is_refused_until_the_first_has_closed_it(file: Path) -> None:
    script = (
        "import sys; from tests.client.test_resume import opened, Path; opened(Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", script, str(file)]
    with closing(opened(file)) as record:
        keep(record, 0)
        in_this_process = refusal(lambda: opened(file))
        other = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)

        assert in_this_process == (
            f"'{file}' is in use by another map: wait for its end, or name another file"
        )
        assert f"ResumeError: {in_this_process}" in other.stderr
        record.commit()  # the refused ones have not ended its lock, nor its work
        assert "in use" in refusal(lambda: opened(file))

    with closing(opened(file)) as record:
        assert record.last == 0


FOREIGN = {
    "text": b"precious\n" * 100,
    "a few bytes": b"x",
    "zeros": bytes(8192),
    "half a header": b"SQLite format 3\0" + bytes(20),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_of_something_else_is_refused_and_left_as_it_is(file: Path, name: str) -> None:
    file.write_bytes(FOREIGN[name])

    assert "is not a file of a map's results, and is left as it is" in refusal(lambda: opened(file))
    assert file.read_bytes() == FOREIGN[name]
    assert [path.name for path in file.parent.iterdir()] == ["results"]


def test_a_database_of_another_program_is_refused_and_left_as_it_is(file: Path) -> None:
    with closing(sqlite3.connect(file)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("CREATE TABLE map (handler)")
    before = file.read_bytes()

    assert "is not a file of a map's results" in refusal(lambda: opened(file))
    assert file.read_bytes() == before


def test_a_file_of_another_release_is_refused(file: Path) -> None:
    opened(file).close()
    with closing(sqlite3.connect(file)) as db:
        db.execute("PRAGMA user_version = 2")

    assert "another release of this program (format 2, this one has 1)" in refusal(
        lambda: opened(file)
    )


def filled(file: Path, rows: int = 2000) -> bytes:
    """The bytes of a closed file with results of 200 bytes each."""
    with closing(opened(file)) as record:
        digests, _ = record.look_up(0, payloads(rows))
        for index, digest in enumerate(digests):
            record.add(index, digest, b"R%d" % index * 40)
    return file.read_bytes()


@pytest.mark.parametrize("size", [100, 512, 4096, 5000, 100_000, -4096])
def test_a_file_that_was_cut_off_is_refused_and_left_as_it_is(file: Path, size: int) -> None:
    cut = filled(file)[:size]
    file.write_bytes(cut)

    message = refusal(lambda: opened(file))

    assert "left as it is" in message
    assert "name another file" in message
    assert file.read_bytes() == cut


def test_a_file_with_a_page_of_zeros_is_refused_and_left_as_it_is(file: Path) -> None:
    whole = filled(file)
    for page in range(1, len(whole) // 4096):
        torn = whole[: page * 4096] + bytes(4096) + whole[(page + 1) * 4096 :]
        file.write_bytes(torn)

        assert "is damaged (" in refusal(lambda: opened(file))
        assert file.read_bytes() == torn


def test_a_result_that_is_not_what_was_written_is_never_given(file: Path) -> None:
    """A damage that SQLite does not see: it has checksums of nothing."""
    whole = filled(file)
    file.write_bytes(whole.replace(b"R7R7R7R7", b"R7R7X7R7", 1))

    with closing(opened(file)) as record:
        assert next(iter(record.results(6, 1))) == b"R6" * 40
        assert "the result of payload 7 is not what was written" in refusal(
            lambda: list(record.results(6, 2))
        )


def test_a_whole_of_damages_gives_an_error_or_the_truth(file: Path) -> None:
    whole = filled(file, 300)
    for at in range(0, len(whole), 97):
        broken = bytearray(whole)
        broken[at] ^= 0x55
        file.write_bytes(broken)
        for path in file.parent.glob("results-*"):
            path.unlink()
        try:
            with closing(opened(file)) as record:
                _, known = record.look_up(0, payloads(300))
                found = {row: list(record.results(row, 1)) for row in known}
        except ResumeError:
            continue

        assert all(result == [b"R%d" % row * 40] for row, result in found.items()), at


OTHERS = [
    (("any", "", "lower"), False, "handler 'upper' there, 'lower' now"),
    (("all", "", "upper"), False, "mode 'any' there, 'all' now"),
    (("any", "green", "upper"), False, "team '' there, 'green' now"),
    (("any", "", "upper"), True, "input 'payloads' there, 'args' now"),
    (("all", "green", "upper"), False, "mode 'any' there, 'all' now; team '' there, 'green' now"),
]


@pytest.mark.parametrize(("options", "has_values", "difference"), OTHERS)
def test_another_map_is_refused_with_what_differs(
    file: Path, options: tuple[str, str, str], has_values: bool, difference: str
) -> None:
    before = filled(file)

    message = refusal(lambda: opened(file, call_kind(*options, False, 0), has_values))

    assert f"'{file}' has the results of another map: {difference}: " in message
    assert file.read_bytes() == before


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="nobody can write to /proc")
def test_a_folder_that_cannot_be_written_is_an_error() -> None:
    assert refusal(lambda: opened(Path("/proc/results"))) == (
        "cannot use '/proc/results': unable to open database file; its folder must be writable, too"
    )


def test_a_folder_or_a_missing_one_is_refused(tmp_path: Path) -> None:
    assert "is not a file" in refusal(lambda: opened(tmp_path))
    assert "there is no such folder" in refusal(lambda: opened(tmp_path / "none" / "results"))
    assert "is not a file" in refusal(lambda: opened(Path(os.devnull)))


def test_an_empty_file_becomes_a_record(file: Path) -> None:
    file.touch()
    with closing(opened(file)) as record:
        keep(record, 0)

    with closing(opened(file)) as record:
        assert record.last == 0


# Payloads that changed


def test_payloads_that_changed_are_named_and_counted(file: Path) -> None:
    filled(file, 1000)
    now = payloads(1000)
    for index in (3, 600, 601, 999):
        now[index] = b"other"

    with closing(opened(file)) as record:
        checked = refusal(lambda: record.check(iter(now)))
        looked_up = refusal(lambda: record.look_up(600, now[600:]))
        record.look_up(4, now[4:600])

    assert checked == (
        f"'{file}' has the results of other payloads; changed: payload 3, payload 600, payload 601 "
        "and 1 more (of 1,000 compared): give the payloads of the first run (more may follow "
        "them), or name another file"
    )
    assert "; changed: payload 600, payload 601, payload 999 (of 400 compared): " in looked_up


def test_fewer_payloads_are_refused_and_more_are_not(file: Path) -> None:
    filled(file, 1000)
    with closing(opened(file)) as record:
        for fewer in (0, 1, 511, 512, 999):
            counts = f"; there were at least 1,000, and now {fewer:,}: "
            assert counts in refusal(lambda n=fewer: record.check(payloads(n)))
            assert counts in refusal(lambda n=fewer: record.check_end(n))
        for more in (1000, 1001, 5000):
            record.check(payloads(more))
            record.check_end(more)


def test_no_more_payloads_are_taken_than_have_results(file: Path) -> None:
    filled(file, 700)
    endless = map(b"p%d".__mod__, itertools.count())
    with closing(opened(file)) as record:
        record.check(endless)

    assert next(endless) == b"p700"


def test_a_payload_without_a_result_may_change(file: Path) -> None:
    with closing(opened(file)) as record:
        keep(record, 0, 2)

    with closing(opened(file)) as record:
        record.check([b"p0", b"other", b"p2"])
        assert record.look_up(0, [b"p0", b"other", b"p2"])[1] == [0, 2]


@given(st.data())
def test_any_runs_with_any_interruptions_find_what_was_committed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Against a dict; a kill is a copy of the files as they are."""
    folder = tmp_path_factory.mktemp("runs")
    kept: dict[int, bytes] = {}
    file, count = folder / "0", data.draw(st.integers(1, 30), "payloads")
    for run in range(data.draw(st.integers(1, 4), "runs")):
        with closing(opened(file)) as record:
            assert record.last == max(kept, default=-1)
            digests, known = record.look_up(0, payloads(count))
            assert {row: next(iter(record.results(row, 1))) for row in known} == kept
            rest = [index for index in range(count) if index not in kept]
            added: dict[int, bytes] = {}
            for index in data.draw(st.permutations(rest), "order")[: data.draw(st.integers(0, 30))]:
                added[index] = data.draw(st.binary(max_size=5), "result")
                record.add(index, digests[index], added[index])
                if data.draw(st.booleans(), "commits"):
                    record.commit()
                    kept |= added
            if data.draw(st.booleans(), "is killed"):
                for path in folder.glob(f"{run}*"):
                    shutil.copy(path, folder / path.name.replace(str(run), str(run + 1), 1))
            else:
                record.close()
                kept |= added
                shutil.copy(file, folder / str(run + 1))
        file = folder / str(run + 1)


# A full disk, and memory


def test_a_full_disk_is_an_error_and_keeps_what_was_written(file: Path) -> None:
    with closing(opened(file)) as record:
        keep(record, *range(10))
        record.commit()
        (pages,) = record._db.execute("PRAGMA page_count").fetchone()
        record._db.execute(f"PRAGMA max_page_count = {pages}")
        record.add(10, b"", b"x" * 100_000)

        message = refusal(record.commit)

        assert message.startswith(f"cannot write '{file}': database or disk is full; ")
    with closing(opened(file)) as record:
        assert record.last == 9
        assert list(record.results(0, 10)) == [b"R%d" % index for index in range(10)]


def test_a_result_is_written_once_there_is_room_again(file: Path) -> None:
    with closing(opened(file)) as record:
        (pages,) = record._db.execute("PRAGMA page_count").fetchone()
        record._db.execute(f"PRAGMA max_page_count = {pages}")
        keep(record, 0)
        record.add(1, b"", b"x" * 100_000)
        refusal(record.commit)
        record._db.execute("PRAGMA max_page_count = 100000")

    with closing(opened(file)) as record:
        assert (record.last, next(iter(record.results(0, 1)))) == (1, b"R0")


def test_memory_does_not_grow_with_the_file(file: Path) -> None:
    with closing(opened(file)) as record:
        for first in range(0, 30_000, 1000):
            digests, _ = record.look_up(first, payloads(30_000)[first : first + 1000])
            for index, digest in enumerate(digests, first):
                record.add(index, digest, bytes(1000))
            record.commit()
    assert file.stat().st_size > 30_000_000

    tracemalloc.start()
    with closing(opened(file)) as record:
        for first in range(0, 30_000, 500):
            _, known = record.look_up(first, [b"p%d" % n for n in range(first, first + 500)])
            assert sum(map(len, record.results(first, len(known)))) == 500_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 2_000_000


# Kills and forks

KILLED = """
import os, signal, sys
from pathlib import Path
from tests.client.test_resume import keep, opened
record = opened(Path(sys.argv[1]))
for first in range(0, 10**9, 100):
    keep(record, *range(first, first + 100))
    record.commit()
    print(first + 100, flush=True)
"""


@pytest.mark.parametrize("commits", [1, 7, 60])
def test_what_was_committed_survives_a_kill(file: Path, commits: int) -> None:
    writing = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(file)], cwd=ROOT, stdout=subprocess.PIPE
    )
    with writing:
        for _ in range(commits):
            count = int(writing.stdout.readline())
        writing.kill()

    with closing(opened(file)) as record:
        assert record.last + 1 >= count
        assert (record.last + 1) % 100 == 0
        last = range(max(0, count - 100), count)
        assert list(record.results(last[0], len(last))) == [b"R%d" % n for n in last]


def test_a_kill_while_the_file_is_begun_is_undone(file: Path) -> None:
    opened(file).close()
    with closing(sqlite3.connect(file)) as db:
        db.execute("PRAGMA journal_mode = DELETE")
    file.write_bytes(file.read_bytes()[:4096])
    # Its magic, no rows, a nonce, and the pages that the file had before, of which size.
    header = bytes.fromhex("d9d505f920a163d7") + b"".join(
        number.to_bytes(4, "big") for number in (0, 0, 0, 512, 4096)
    )
    file.with_name("results-journal").write_bytes(header.ljust(512, b"\0"))

    with closing(opened(file)) as record:
        keep(record, 0)
    with closing(opened(file)) as record:
        assert record.last == 0


def test_a_kill_while_the_log_is_copied_into_the_file_loses_nothing(file: Path) -> None:
    """The first page, which says how long the file is, is copied first."""
    page = 4096
    with closing(opened(file)) as record:
        keep(record, 0)
    with closing(opened(file)) as record:
        for index in range(1, 50):
            record.add(index, b"", bytes(1000))
        record.commit()
        log = file.with_name("results-wal").read_bytes()
        frames = [log[at : at + 24 + page] for at in range(32, len(log), 24 + page)]
        first = next(frame[24:] for frame in reversed(frames) if frame[:4] == b"\0\0\0\1")
        copy = file.with_name("copy")
        copy.write_bytes(first + file.read_bytes()[page:])
        file.with_name("copy-wal").write_bytes(log)
        assert int.from_bytes(first[28:32], "big") * page > copy.stat().st_size

    with closing(opened(copy)) as record:
        assert (record.last, list(record.results(0, 2))) == (49, [b"R0", bytes(1000)])


FORKED = """
import os, sys
from pathlib import Path
from tests.client.test_resume import keep, opened
record = opened(Path(sys.argv[1]))
keep(record, 0)
record.commit()
keep(record, 1)
pid = os.fork()
if not pid:
    record.commit()
    record.close()
    keep_ = record  # to the end of the interpreter
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
keep(record, 2)
record.commit()
os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_a_forked_child_leaves_the_file_to_its_parent(file: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKED, str(file)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr

    with closing(opened(file)) as record:
        assert list(record.results(0, 3)) == [b"R0", b"R1", b"R2"]


def test_a_record_that_is_dropped_is_closed(file: Path) -> None:
    record = opened(file)
    keep(record, 0)
    del record

    began = time.monotonic()
    with closing(opened(file)) as record:
        assert record.last == 0
    assert time.monotonic() - began < 10
