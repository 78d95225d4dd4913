"""submit, result, jobs, cancel and quarantine, against real processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.harness.cluster import ROOT, Overlay, free_port, running, six_processes, until
from tests.harness.commands import run_client, run_client_on_bytes, start_client

HANDLERS = """
import os
import time

def shout(payload, context):
    return payload.upper()

def boom(payload, context):
    raise ValueError("the secret reason")

def binary(payload, context):
    return bytes(range(256))

def big(payload, context):
    return context.process_id.encode() * 1_500_000

def wait_for(payload, context):
    while not os.path.exists(payload) and not context.cancelled:
        time.sleep(0.01)
    return b"it is there"

def resize(path: str, width: int = 200) -> dict:
    return {"path": path, "width": width}
"""
NAMES = {name: f"mine:{name}" for name in ("shout", "boom", "binary", "big", "wait_for", "resize")}
UNKNOWN = "0123456789abcdef"
LATER = (datetime.now() + timedelta(days=2)).isoformat(timespec="minutes")


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Overlay]:
    """A to F, whose leader keeps jobs."""
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "mine.py").write_text(HANDLERS)
    top = {"journal": "journal.db", "handlers": NAMES, "max_message_mib": 1}
    with running(folder, six_processes(**top)) as found:
        yield found


@pytest.fixture
def never(mine: Overlay, tmp_path: Path) -> Iterator[Path]:
    """A file that is not there. Jobs that wait for it end with the test."""
    yield tmp_path / "never"
    (tmp_path / "never").touch()


def at(found: Overlay, process_id: str = "A") -> tuple[str, int]:
    return "127.0.0.1", found.port(process_id)


def run(found: Overlay, *words: object, code: int = 0, stdin: bytes = b"") -> Any:
    done = run_client(*at(found), *words, stdin=stdin)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def as_json(found: Overlay, *words: object, code: int = 0) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(run(found, *words, "--json", code=code).stdout)
    assert (report["exit_code"], report["address"]) == (code, found.address("A"))
    return report


def submitted(found: Overlay, *words: object) -> str:
    done = run(found, "submit", *words)
    (id_,) = done.stdout.split()
    return str(id_)


def state(found: Overlay, id_: str) -> str:
    report = json.loads(run_client(*at(found), "result", id_, "--json").stdout)
    return str(report["job"]["state"])


def in_quarantine(found: Overlay, never: Path) -> str:
    """A job without a key, whose attempt has taken too long."""
    id_ = submitted(found, "--handler", "wait_for", "--payload", never, "--limit", "0.3")
    run(found, "result", id_, "--wait", code=1)
    return id_


# submit and result


def test_submit_prints_the_id_and_result_the_answer(mine: Overlay) -> None:
    done = run(mine, "submit", "--handler", "shout", "--payload", "hello")
    shown = run(mine, "result", done.stdout.strip(), "--wait")

    assert re.fullmatch(r"[0-9a-f]{16}\n", done.stdout)
    assert done.stderr == shown.stderr == ""
    facts = dict(line.split(maxsplit=1) for line in shown.stdout.splitlines() if line[0] != " ")
    assert facts["result"] == "HELLO"
    assert facts["answers"] == "1 of 1 worker answered"
    assert facts["handler"] == "shout, any worker"
    assert facts["job"] == done.stdout.strip()
    assert re.match(r"done \d\d:\d\d:\d\d, took ", facts["state"])
    assert facts["story"].endswith("  accepted")


def test_the_same_as_json(mine: Overlay) -> None:
    report = as_json(mine, "submit", "--handler", "shout", "--payload", "für")
    (id_,) = report["ids"]
    found = as_json(mine, "result", id_, "--wait")

    assert report["ok"]
    assert (found["ok"], found["result"]) == (True, "FüR")
    assert found["coverage"] == {"answered": 1, "asked": 1}
    assert found["job"]["id"] == id_
    assert found["job"]["state"] == "done"
    assert found["job"]["story"][0]["text"] == "accepted"
    assert found["job"]["accepted_s"] <= found["job"]["started_s"] <= found["job"]["ended_s"]


def test_lines_become_jobs_and_their_keys_make_them_once(mine: Overlay, tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("one\ntwo\nthree\n")
    words = ("submit", "--handler", "shout", "--key", "batch")

    first = run(mine, *words, "--lines", tmp_path / "lines").stdout.split()
    again = run(mine, *words, "--lines", "-", stdin=b"one\ntwo\nthree\nfour\n").stdout.split()

    found = [as_json(mine, "result", id_, "--wait") for id_ in again]
    assert again[:3] == first
    assert [one["result"] for one in found] == ["ONE", "TWO", "THREE", "FOUR"]
    assert [one["job"]["key"] for one in found] == [f"batch-{n}" for n in (1, 2, 3, 4)]
    assert found[0]["job"]["max_attempts"] == 3


def test_a_submit_that_fails_on_its_way_says_what_was_accepted(mine: Overlay) -> None:
    lines = b"one\n" + b"x" * (1 << 20) + b"y\nthree\n"
    words = (*at(mine), "submit", "--lines", "-", "--handler", "shout")

    plain = run_client(*words, stdin=lines)
    report = run_client(*words, "--json", stdin=lines)

    assert (plain.returncode, report.returncode) == (1, 1)
    assert len(plain.stdout.split()) == 1
    assert "1 job before it accepted" in plain.stderr
    assert len(json.loads(report.stdout)["ids"]) == 1


def test_a_typed_function_takes_args(mine: Overlay) -> None:
    id_ = submitted(mine, "--handler", "resize", "--args", '{"path": "a.jpg"}')

    assert json.loads(as_json(mine, "result", id_, "--wait")["result"]) == {
        "path": "a.jpg",
        "width": 200,
    }


def test_a_job_for_all_shows_each_worker(mine: Overlay) -> None:
    id_ = submitted(mine, "--mode", "all", "--payload", "hi")

    done = run(mine, "result", id_, "--wait", "--parts")

    assert "3 of 3 workers answered" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if " OK " in line]
    assert [row[0] for row in rows] == ["C", "D", "F"]


def test_a_result_is_written_with_its_exact_bytes(mine: Overlay, tmp_path: Path) -> None:
    id_ = submitted(mine, "--handler", "binary")

    shown = run(mine, "result", id_, "--wait")
    run(mine, "result", id_, "--out", tmp_path / "kept")
    piped = run_client_on_bytes(*at(mine), "result", id_, "--out", "-")

    assert "256 bytes, not text; --out FILE keeps them" in shown.stdout
    assert (tmp_path / "kept").read_bytes() == piped.stdout == bytes(range(256))
    assert b"done" in piped.stderr


def test_of_a_job_in_parts_each_part_is_kept_by_itself(mine: Overlay, tmp_path: Path) -> None:
    id_ = submitted(mine, "--mode", "all", "--handler", "big", "--in-parts")
    run(mine, "result", id_, "--wait")

    shown = run(mine, "result", id_, "--parts")
    run(mine, "result", id_, "--out", tmp_path / "kept")
    piped = run_client_on_bytes(*at(mine), "result", id_, "--out", "-")
    report = as_json(mine, "result", id_, "--parts")

    assert "4,500,000 bytes in 3 parts; --out FILE writes them" in shown.stdout
    rows = [line.split(maxsplit=2) for line in shown.stdout.splitlines() if " OK " in line]
    assert [row[0] for row in rows] == ["C", "D", "F"]
    assert all("1,500,000 bytes" in row[2] for row in rows)
    assert piped.stdout == b"\n".join(worker * 1_500_000 for worker in (b"C", b"D", b"F"))
    assert (tmp_path / "kept").read_bytes() == piped.stdout
    assert [part["size"] for part in report["parts"]] == [1_500_000] * 3
    assert report["job"]["in_parts"] is True
    assert "result" not in report


def test_a_result_larger_than_a_message_is_kept_in_parts(mine: Overlay, tmp_path: Path) -> None:
    id_ = submitted(mine, "--handler", "big", "--in-parts")

    shown = run(mine, "result", id_, "--wait", "--out", tmp_path / "kept")

    assert f"1,500,000 bytes -> {tmp_path / 'kept'}" in shown.stdout
    assert "1 of 1 worker answered" in shown.stdout
    kept = (tmp_path / "kept").read_bytes()
    assert kept == kept[:1] * 1_500_000


def test_a_job_that_is_not_over_has_exit_code_5(mine: Overlay, never: Path) -> None:
    running_ = submitted(mine, "--handler", "wait_for", "--payload", never)
    until(lambda: state(mine, running_) == "running", what="it runs")
    later = submitted(mine, "--at", LATER)

    assert "running for " in run(mine, "result", running_, code=5).stdout
    assert "running for " in run(mine, "result", running_, "--wait", "0.2", code=5).stdout
    assert "waiting, starts " in run(mine, "result", later, code=5).stdout
    assert as_json(mine, "result", later, code=5)["ok"] is False


def test_a_failed_job_says_why_and_where_its_log_lines_are(mine: Overlay) -> None:
    id_ = submitted(mine, "--handler", "boom")

    shown = run(mine, "result", id_, "--wait", code=1)
    report = as_json(mine, "result", id_, code=1)

    assert "state     failed " in shown.stdout
    assert "handler 'boom' failed" in shown.stdout
    (logs,) = re.findall(r"(?m)^logs +client\.py (.*)$", shown.stdout)
    assert "the secret reason" in run_client(*logs.split()).stdout
    assert report["error"]["code"] == report["job"]["code"] == "INTERNAL"


def test_a_job_that_a_worker_did_not_answer_has_exit_code_6(
    overlays: Callable[..., Overlay],
) -> None:
    found = overlays(journal="journal.db")
    found.kill("F")
    until(lambda: "down" in {n.state for n in found.metrics("E").neighbours}, what="F is down")
    id_ = submitted(found, "--mode", "all")

    shown = run(found, "result", id_, "--wait", code=6)

    assert "2 of 3 workers answered" in shown.stdout
    assert as_json(found, "result", id_, code=6)["missing"] == ["F"]


def wait_in_terminal(found: Overlay, *words: object) -> tuple[str, int]:
    """What a command prints on a terminal, and its exit code."""
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "client.py"), *map(str, (*at(found), *words))]
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    asking = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    text = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # how Linux reports the end
            chunk = b""
        if not chunk:
            break
        text += chunk
    os.close(ours)
    return text.decode(), asking.wait(30)


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_on_a_terminal_submit_says_how_to_get_the_result(mine: Overlay) -> None:
    text, code = wait_in_terminal(mine, "submit", "--handler", "shout")

    (id_,) = re.findall(r"(?m)^([0-9a-f]{16})\r$", text)
    assert f"its result: client.py 127.0.0.1 {mine.port('A')} result {id_} --wait" in text
    assert code == 0


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_a_terminal_shows_how_the_job_stands_while_it_waits(mine: Overlay, never: Path) -> None:
    id_ = submitted(mine, "--handler", "wait_for", "--payload", never)

    text, code = wait_in_terminal(mine, "result", id_, "--wait", "2")

    assert re.search(r"\x1b\[2K(waiting|running for )", text)
    assert code == 5


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_the_job_goes_on_when_the_wait_is_interrupted(mine: Overlay, never: Path) -> None:
    id_ = submitted(mine, "--handler", "wait_for", "--payload", never)
    with start_client(*at(mine), "result", id_, "--wait") as asking:
        until(lambda: mine.metrics("A").jobs.waiters, what="it waits")
        asking.send_signal(signal.SIGINT)
        output, complaint = asking.communicate(timeout=20)

    again = f"client.py 127.0.0.1 {mine.port('A')} result {id_} --wait waits again"
    assert complaint.decode().splitlines() == [
        f"client.py: the job goes on; {again}",
        "client.py: interrupted",
    ]
    assert (asking.returncode, output) == (130, b"")
    assert state(mine, id_) == "running"
    never.touch()
    assert "it is there" in run(mine, "result", id_, "--wait").stdout


def test_the_wait_goes_on_when_the_leader_is_killed_and_started_again(
    overlays: Callable[..., Overlay], tmp_path: Path
) -> None:
    found, go = overlays(HANDLERS, journal="journal.db", handlers=NAMES), tmp_path / "go"
    id_ = submitted(found, "--handler", "wait_for", "--payload", go, "--key", "once more")
    with start_client(*at(found), "result", id_, "--wait") as asking:
        until(lambda: found.metrics("A").jobs.waiters, what="it waits")
        found.kill("A")
        found.start("A")
        go.touch()
        output, complaint = asking.communicate(timeout=60)

    assert (asking.returncode, complaint) == (0, b"")
    assert b"it is there" in output
    assert b"the leader ended while it ran" in output


# jobs


def test_jobs_lists_the_newest_first_with_the_counts_of_all(mine: Overlay) -> None:
    first, second = submitted(mine, "--handler", "shout"), submitted(mine, "--handler", "boom")
    run(mine, "result", first, "--wait")
    run(mine, "result", second, "--wait", code=1)

    shown = run(mine, "jobs").stdout
    report = as_json(mine, "jobs", "--limit", "2")

    rows = [line.split() for line in shown.splitlines() if re.match("0[0-9a-f]{15} ", line)]
    assert [row[:3] for row in rows][:2] == [[second, "failed", "boom"], [first, "done", "shout"]]
    assert "error id" in shown
    assert re.search(r"^\d+ .*\d+ done, .*\d+ failed.* MiB used$", shown, re.M)
    assert [job["id"] for job in report["jobs"]] == [second, first]
    assert report["counts"]["failed"] >= 1
    assert "the newest 2; --limit shows more" in run(mine, "jobs", "--limit", 2).stdout


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["--state", "done"], {("done", "shout")}),
        (["--state", "FAILED,done"], {("done", "shout"), ("failed", "boom")}),
        (["--handler", "boom"], {("failed", "boom")}),
        (["--handler", "boom", "--state", "done"], set()),
    ],
)
def test_jobs_may_be_chosen(mine: Overlay, words: list[str], kept: set[tuple[str, str]]) -> None:
    run(mine, "jobs", "--prune")
    run(mine, "result", submitted(mine, "--handler", "shout"), "--wait")
    run(mine, "result", submitted(mine, "--handler", "boom"), "--wait", code=1)

    report = as_json(mine, "jobs", *words)

    assert {(job["state"], job["handler"]) for job in report["jobs"]} == kept


def test_prune_forgets_what_is_over_and_nothing_else(mine: Overlay, never: Path) -> None:
    run(mine, "jobs", "--prune")
    done = submitted(mine, "--handler", "shout")
    run(mine, "result", done, "--wait")
    failed = submitted(mine, "--handler", "boom")
    run(mine, "result", failed, "--wait", code=1)
    suspect, at_work = in_quarantine(mine, never), submitted(mine, "--handler", "wait_for",
                                                            "--payload", never)  # fmt: skip

    some = run(mine, "jobs", "--prune", "--state", "failed").stdout
    rest = as_json(mine, "jobs", "--prune")

    assert (some, rest["dropped"]) == ("1 job forgotten\n", 1)
    assert "there is no job" in run(mine, "result", done, code=1).stderr
    assert state(mine, suspect) == "quarantined"
    assert state(mine, at_work) in ("waiting", "running")


def test_more_jobs_than_one_page_are_listed(mine: Overlay) -> None:
    lines = b"\n" * 1100
    ids = run(mine, "submit", "--lines", "-", "--handler", "shout", stdin=lines).stdout.split()

    report = as_json(mine, "jobs", "--limit", "1050")

    assert [job["id"] for job in report["jobs"]] == ids[::-1][:1050]


# Schedules


def test_a_schedule_makes_jobs_until_it_is_cancelled(mine: Overlay) -> None:
    id_ = submitted(mine, "--every", "1h", "--handler", "shout", "--payload", "tick")

    def made() -> list[dict[str, Any]]:
        return [job for job in as_json(mine, "jobs")["jobs"] if job["schedule"] == id_]

    (first,) = until(made, what="its first job")
    shown = run(mine, "jobs").stdout

    (row,) = [line.split() for line in shown.splitlines() if line.startswith(id_)]
    assert row[1:3] == ["1", "h"]
    assert "every 1 h, next " in run(mine, "result", id_, code=5).stdout
    assert "has no end; its jobs have" in run(mine, "result", id_, "--wait", code=1).stderr
    assert as_json(mine, "result", first["id"], "--wait")["result"] == "TICK"
    assert run(mine, "cancel", id_).stdout == "1 cancelled\n"
    assert "there is no job" in run(mine, "result", id_, code=1).stderr


def test_a_schedule_may_begin_at_a_time(mine: Overlay) -> None:
    id_ = submitted(mine, "--every", "1d", "--at", LATER)

    job = as_json(mine, "result", id_, code=5)["job"]

    assert job["every_s"] == 86_400
    assert job["due_s"] > job["accepted_s"] + 86_400
    run(mine, "cancel", id_)


# cancel and quarantine


def test_cancel_ends_jobs_that_wait_and_that_run(mine: Overlay, never: Path) -> None:
    at_work = submitted(mine, "--handler", "wait_for", "--payload", never)
    until(lambda: state(mine, at_work) == "running", what="it runs")
    later = submitted(mine, "--at", LATER)

    done = run(mine, "cancel", later, at_work)
    again = as_json(mine, "cancel", later, UNKNOWN, code=1)

    assert (done.stdout, done.stderr) == ("2 cancelled\n", "")
    assert "cancelled" in run(mine, "result", at_work, "--wait", code=1).stdout
    assert "cancelled before it was started" in run(mine, "result", later, code=1).stdout
    assert (again["cancelled"], again["unchanged"], again["unknown"]) == (0, [later], [UNKNOWN])


def test_what_could_not_be_cancelled_is_named(mine: Overlay) -> None:
    id_ = submitted(mine, "--handler", "shout")
    run(mine, "result", id_, "--wait")

    done = run(mine, "cancel", id_, UNKNOWN, code=1)

    assert done.stdout == "0 cancelled\n"
    assert f"not cancelled, as it is over: {id_}\n" in done.stderr
    assert f"no such job: {UNKNOWN};" in done.stderr


def test_a_job_in_quarantine_is_shown_and_runs_again_when_released(
    mine: Overlay, never: Path
) -> None:
    id_ = in_quarantine(mine, never)

    shown = run(mine, "result", id_, code=1).stdout
    listed = run(mine, "quarantine", "list").stdout
    never.touch()
    released = run(mine, "quarantine", "release", id_).stdout

    (remedy,) = re.findall(r"(?m)^next +client\.py (.*)$", shown)
    assert remedy == f"127.0.0.1 {mine.port('A')} quarantine release {id_} runs it again"
    (row,) = [line for line in listed.splitlines() if line.startswith(id_)]
    assert "the deadline passed while the handler 'wait_for' ran" in row
    assert released == "1 released\n"
    assert "it is there" in run(mine, "result", id_, "--wait").stdout


def test_all_in_quarantine_are_changed_at_once(mine: Overlay, never: Path) -> None:
    run(mine, "quarantine", "drop", "--all")
    ids = [in_quarantine(mine, never), in_quarantine(mine, never)]
    never.touch()

    released = as_json(mine, "quarantine", "release", "--all")["released"]
    for id_ in ids:
        run(mine, "result", id_, "--wait")
    left = run(mine, "quarantine", "list").stdout

    assert released == 2
    assert "none is in quarantine" in left
    assert run(mine, "quarantine", "drop", "--all").stdout == "0 dropped\n"


def test_a_job_in_quarantine_may_be_dropped(mine: Overlay, never: Path) -> None:
    id_ = in_quarantine(mine, never)

    assert [job["id"] for job in as_json(mine, "quarantine", "list")["jobs"]] == [id_]
    assert run(mine, "quarantine", "drop", id_).stdout == "1 dropped\n"
    assert "there is no job" in run(mine, "result", id_, code=1).stderr


def test_a_failed_job_may_be_released_too(mine: Overlay) -> None:
    id_ = submitted(mine, "--handler", "boom")
    run(mine, "result", id_, "--wait", code=1)

    assert run(mine, "quarantine", "release", id_).stdout == "1 released\n"
    story = as_json(mine, "result", id_, "--wait", code=1)["job"]["story"]
    assert [event["text"] for event in story].count("released") == 1


def test_what_is_not_in_quarantine_is_not_released(mine: Overlay) -> None:
    id_ = submitted(mine, "--handler", "shout")
    run(mine, "result", id_, "--wait")

    done = run(mine, "quarantine", "release", id_, code=1)

    assert done.stdout == "0 released\n"
    assert f"not released, as it is neither in quarantine nor failed: {id_}\n" in done.stderr


# What is wrong


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("submit --every 5x", "--every: '5x' is not a duration such as 90s, 15m, 1h or 2d"),
        ("submit --every 1h --lines -", "--every makes a schedule of one job: it excludes --lines"),
        ("submit --at 25:00", "--at: '25:00' is not a time such as 22:00"),
        ("submit --at 2020-01-01T00:00", "--at: '2020-01-01T00:00' is in the past"),
        ("submit --limit 0", "--limit: '0' is not a duration"),
        ("submit --attempts 0", "--attempts: '0' is not a whole number"),
        ("submit --attempts 3", "--attempts 3 needs --key, which says that running the job twice"),
        ("submit --key ''", "--key: not a text of 1 to 256 letters"),
        ("submit --payload a --lines -", "not allowed with argument"),
        ("submit --lines nowhere", "cannot use 'nowhere': No such file or directory"),
        ("submit --args [1]", "--args: not a JSON object"),
        ("result", "the following arguments are required: ID"),
        ("result xyz", "ID: 'xyz' is not the id of a job, 16 digits from 0 to f"),
        ("result 0123456789abcdef --wait no", "--wait: 'no' is not a duration"),
        ("result --wait 0123456789abcdef", "the ID comes before --wait"),
        ("jobs --state gone", "--state: 'gone' is no state of a job; there are waiting, running"),
        ("jobs --limit 0", "--limit: '0' is not a whole number"),
        ("jobs --prune --state done,waiting", "--prune forgets no job that is waiting: cancel"),
        ("jobs --prune --handler shout", "it excludes --handler and --limit"),
        ("cancel", "the following arguments are required: ID"),
        ("cancel xyz", "ID: 'xyz' is not the id of a job"),
        ("quarantine", "the following arguments are required: action"),
        ("quarantine free", "invalid choice: 'free'"),
        ("quarantine release", "release needs IDs, or --all; list shows which there are"),
        ("quarantine drop 0123456789abcdef --all", "drop needs IDs, or --all"),
        ("quarantine drop --all --limit 3", "--limit is for list; drop takes IDs, or --all"),
        ("quarantine list --all", "list takes no IDs and no --all"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_asked(words: str, reason: str) -> None:
    given = [word.replace("''", "") for word in words.split()]

    done = run_client("127.0.0.1", free_port(), *given)

    assert (done.returncode, done.stdout) == (2, "")
    assert reason in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_leader_says_what_is_wrong_with_a_job(mine: Overlay) -> None:
    submitted(mine, "--handler", "shout", "--key", "mine", "--payload", "one")
    other = ("--handler", "shout", "--key", "mine", "--payload", "two")

    unknown = run(mine, "submit", "--handler", "nope", code=1).stderr
    used = run(mine, "submit", *other, code=1).stderr
    forgotten = run(mine, "result", UNKNOWN, code=1).stderr

    assert "no handler 'nope' here; there are" in unknown
    assert "key: 'mine' was used for another job" in used
    assert f"there is no job {UNKNOWN}: it was forgotten" in forgotten
    assert as_json(mine, "result", UNKNOWN, code=1)["error"]["code"] == "NOT_FOUND"


VERBS = ("submit", f"result {UNKNOWN}", "jobs", "jobs --prune", f"cancel {UNKNOWN}",
         "quarantine list", f"quarantine release {UNKNOWN}")  # fmt: skip


@pytest.mark.parametrize("words", VERBS)
def test_only_the_leader_keeps_jobs(mine: Overlay, words: str) -> None:
    done = run_client(*at(mine, "B"), *words.split())

    assert (done.returncode, done.stdout) == (1, "")
    reason = f"B keeps no jobs: ask the leader, A at {mine.address('A')}"
    assert done.stderr == f"client.py: {reason}\n"


def test_a_leader_without_a_journal_says_what_it_needs(tmp_path: Path) -> None:
    with Overlay(tmp_path, six_processes()) as found:
        found.serve("A")
        done = run_client(*at(found), "submit")

    assert done.returncode == 1
    assert 'has no "journal"; add "journal": "journal.db" and restart it' in done.stderr


def test_a_leader_that_is_not_there_is_reported() -> None:
    port = free_port()

    with ThreadPoolExecutor(len(VERBS)) as pool:  # each waits for the client's patience
        asked = [
            pool.submit(run_client, "127.0.0.1", port, *words.split(), "--json") for words in VERBS
        ]

    for one in asked:
        done = one.result()
        assert done.returncode == json.loads(done.stdout)["exit_code"] == 4, done.args
        reason = f"nothing serves at 127.0.0.1:{port}: the connection was refused"
        assert done.stderr == f"client.py: {reason}\n"
