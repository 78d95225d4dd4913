"""The jobs on the page: over HTTP and in a real browser, from a real overlay with a journal."""

from __future__ import annotations

import json
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import overlay
from overlay.cli.web_jobs import foreign
from overlay.client.jobs import Job
from overlay.model.identity import CALLER, OPERATOR
from overlay.security.tls_folder import TlsFolder
from tests.cli.test_views import browser, page_of  # noqa: F401 - a fixture
from tests.harness.certificates import user_of
from tests.harness.cluster import Overlay, running, six_processes, until

MINE = """
import pathlib
import time

def upper(payload, context):
    return payload.upper()

def bad(payload, context):
    raise ValueError("no")

def held(payload, context):
    while not pathlib.Path("open").exists() and not context.cancelled:
        time.sleep(0.01)
"""
LATER = time.time() + 3600
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Overlay]:
    folder = tmp_path_factory.mktemp("web_jobs")
    (folder / "mine.py").write_text(MINE)
    handlers = {name: f"mine:{name}" for name in ("upper", "bad", "held")}
    with running(folder, six_processes(handlers=handlers, journal="journal.db")) as found:
        yield found


@pytest.fixture(scope="module")
def client(six: Overlay) -> Iterator[overlay.Client]:
    with overlay.connect(six.address("A")) as found:
        yield found


@pytest.fixture(scope="module")
def address(six: Overlay) -> Iterator[str]:
    with page_of(six) as (_, found):
        yield found


@pytest.fixture
def later(client: overlay.Client) -> Job:
    """A job that waits."""
    return client.later("upper", b"x", start_at=LATER)


def asked(url: str, body: object = None, **headers: str) -> tuple[int, Any]:
    """The status and the JSON of an answer. With a body it is a POST."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            text = error.read()
        return error.code, json.loads(text) if text.startswith(b"{") else text.decode()


def sent(address: str, job: str, action: object, **headers: str) -> tuple[int, Any]:
    """What a page of this server sends, with other headers."""
    own = {"Origin": address.rstrip("/"), "Content-Type": "application/json"}
    return asked(f"{address}jobs/{job}", action, **own | headers)


def ids(address: str, **wanted: str) -> list[str]:
    query = urllib.parse.urlencode(wanted)
    return [job["id"] for job in asked(f"{address}jobs?{query}")[1]["jobs"]]


# What the server answers


def test_the_list_can_be_narrowed_by_state_handler_and_text(
    address: str, client: overlay.Client, later: Job
) -> None:
    done = client.later("upper", b"x")
    done.wait(20)
    failed = client.later("bad", b"x")
    failed.wait(20)

    everything = ids(address)
    assert everything.index(failed.id) < everything.index(done.id) < everything.index(later.id)
    assert later.id in ids(address, state="waiting")
    assert {done.id, failed.id}.isdisjoint(ids(address, state="waiting"))
    assert ids(address, state="failed", handler="upper") == []
    assert ids(address, text=done.id) == [done.id]
    assert done.id in ids(address, text="127.0.0")
    assert ids(address, text="nobody") == []


def test_a_job_is_told_with_its_story(address: str, client: overlay.Client) -> None:
    job = client.later("bad", b"x", key="order-1")
    job.wait(20)

    status, found = asked(f"{address}jobs/{job.id}")

    assert (status, found["state"], found["key"]) == (200, "failed", "order-1")
    assert found["story"][0]["text"] == "accepted"
    assert "error id" in found["reason"]


def test_a_waiting_job_is_cancelled_and_released_is_not_possible_then(
    address: str, later: Job
) -> None:
    assert sent(address, later.id, {"action": "cancel"}) == (200, {"changed": 1})
    assert later.state == "cancelled"

    assert sent(address, later.id, {"action": "release"}) == (
        409,
        {
            "problem": "the job is cancelled now: only a job that is quarantined or failed can be "
            "released"
        },
    )


def test_a_failed_job_is_released(address: str, client: overlay.Client) -> None:
    job = client.later("bad", b"x")
    job.wait(20)

    assert sent(address, job.id, {"action": "release"})[0] == 200
    until(lambda: len(job.status().story) > 3 and job.state == "failed", 20, "its second end")


def test_a_schedule_is_listed_and_cancelled(address: str, client: overlay.Client) -> None:
    schedule = client.later("upper", b"x", every_s=3600, start_at=LATER)
    (found,) = [job for job in asked(f"{address}jobs")[1]["jobs"] if job["id"] == schedule.id]

    assert found["every_s"] == 3600
    assert sent(address, schedule.id, {"action": "cancel"})[0] == 200
    assert schedule.id not in ids(address)


@pytest.mark.parametrize(
    ("query", "status", "says"),
    [
        ("jobs?state=lost", 400, "is not waiting, running"),
        ("jobs/12", 400, "is not the id of a job"),
        ("jobs/0000000000000000", 404, "there is no job"),
        ("jobs?text=0000000000000000", 404, "there is no job"),
    ],
)
def test_what_cannot_be_told_has_a_reason(address: str, query: str, status: int, says: str) -> None:
    found = asked(address + query)

    assert found[0] == status
    assert says in found[1]["problem"]


@pytest.mark.parametrize(
    "body", [{"action": "drop"}, {"action": ["cancel"]}, ["cancel"], b"", b"\xff", b"{" * 2000]
)
def test_a_body_that_is_not_an_action_changes_nothing(
    address: str, later: Job, body: object
) -> None:
    assert sent(address, later.id, body)[0] == 400
    assert later.state == "waiting"


def test_without_a_journal_the_leader_says_how_to_get_one(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with Overlay(tmp_path_factory.mktemp("worker"), six_processes()) as found:
        found.start("A")
        with page_of(found) as (_, address):
            status, answer = asked(f"{address}jobs")
            snapshot = until(
                lambda: (found := asked(f"{address}snapshot"))[0] == 200 and found[1], 30
            )
            assert snapshot["jobs"] is None

    assert status == 502
    assert 'add "journal": "journal.db"' in answer["problem"]


# Who may change jobs


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Host": "evil.example", "Origin": "http://evil.example"},
    ],
)
def test_another_web_site_changes_nothing(
    address: str, later: Job, headers: dict[str, str]
) -> None:
    status, _ = sent(address, later.id, {"action": "cancel"}, **headers)

    assert status == 403
    assert later.state == "waiting"


def test_a_request_without_an_origin_is_refused() -> None:
    assert foreign({"host": "127.0.0.1:8050", "content-type": "application/json"})
    assert not foreign(
        {
            "host": "127.0.0.1:8050",
            "origin": "http://127.0.0.1:8050",
            "content-type": "application/json; charset=utf-8",
        }
    )


def test_no_answer_lets_another_site_ask_for_leave(address: str, later: Job) -> None:
    asks = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    request = urllib.request.Request(f"{address}jobs/{later.id}", None, asks, method="OPTIONS")

    with pytest.raises(urllib.error.HTTPError, match="405") as refused:
        urllib.request.urlopen(request, timeout=10)

    with refused.value as answer:
        assert not [name for name in answer.headers if name.lower().startswith("access-control")]


def test_a_page_that_other_machines_reach_changes_nothing(six: Overlay, later: Job) -> None:
    with page_of(six, "--bind", "0.0.0.0") as (_, shown):
        address = shown.replace("0.0.0.0", "127.0.0.1")
        listed = asked(f"{address}jobs")[1]
        status, answer = sent(address, later.id, {"action": "cancel"})

    assert not listed["may_change"]
    assert (status, later.state) == (403, "waiting")
    assert "served to other machines too" in answer["problem"]


def test_with_certificates_the_page_shows_and_changes_what_its_owner_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "six"
    access = {"cat": {"verbs": ["metrics"]}}
    folder.mkdir()
    (folder / "mine.py").write_text(MINE)
    config = six_processes(
        handlers={"upper": "mine:upper"}, journal="journal.db", tls="tls", access=access
    )
    people = {"ann": CALLER, "bob": CALLER, "cat": CALLER, "boss": OPERATOR}
    answers = {}
    with running(folder, config) as closed:
        for name, kind in people.items():
            user_of(TlsFolder(folder / "tls"), tmp_path / name / "tls", name, kind)
            shutil.copy(closed.path, tmp_path / name)
        with overlay.connect(closed.address("A"), tls=tmp_path / "ann" / "tls") as ann:
            job = ann.later("upper", b"x", start_at=LATER)
            for name in ("cat", "bob", "boss"):
                monkeypatch.chdir(tmp_path / name)
                with page_of(closed) as (_, address):
                    listed = asked(f"{address}jobs")[1]
                    done = sent(address, job.id, {"action": "cancel"})
                answers[name] = [one["id"] for one in listed.get("jobs", [])], done[0], job.state
                if name == "cat":
                    assert "cat may not send requests" in listed["problem"]

    assert answers == {
        "cat": ([], 502, "waiting"),
        "bob": ([], 404, "waiting"),
        "boss": ([job.id], 200, "cancelled"),
    }


# In a browser


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:  # noqa: F811
    """The page. Fails if there are console messages."""
    complaints: list[str] = []
    found = browser.new_page()
    found.set_default_timeout(20_000)
    found.on("pageerror", lambda error: complaints.append(str(error)))
    found.goto(address)
    found.wait_for_selector("#jobs")
    yield found
    found.close()
    assert complaints == []


def test_the_page_shows_the_counts_and_a_jobs_story(
    later: Job, client: overlay.Client, page: Any
) -> None:
    page.locator("#jobs-counts").get_by_text("waiting").wait_for()

    page.fill("#jobs-wanted input", later.id)
    until(lambda: page.locator("#jobs tbody .id").all_inner_texts() == [later.id])
    page.click("#jobs tbody .id")

    page.locator("#jobs .story").get_by_text("accepted").wait_for()
    assert "any one worker" in page.inner_text("#jobs .facts")


def test_a_job_is_cancelled_once_that_is_confirmed(later: Job, page: Any) -> None:
    page.fill("#jobs-wanted input", later.id)
    until(lambda: page.locator("#jobs tbody .id").all_inner_texts() == [later.id])
    said: list[str] = []
    page.once("dialog", lambda asks: (said.append(asks.message), asks.dismiss()))
    page.click("#jobs .act")
    assert later.id in said[0]
    assert later.state == "waiting"

    page.once("dialog", lambda asks: asks.accept())
    page.click("#jobs .act")

    page.locator("#jobs-said").get_by_text("is cancelled").wait_for()
    page.locator("#jobs tbody").get_by_text("cancelled", exact=True).wait_for()
    assert later.state == "cancelled"


def test_the_page_says_why_a_job_was_not_changed(later: Job, page: Any) -> None:
    page.fill("#jobs-wanted input", later.id)
    until(lambda: page.locator("#jobs tbody .id").all_inner_texts() == [later.id])

    def cancel_first(asks: Any) -> None:
        later.cancel()
        asks.accept()

    page.once("dialog", cancel_first)
    page.click("#jobs .act")

    page.locator("#jobs-said").get_by_text("only a job that waits or runs").wait_for()


def test_what_comes_from_a_job_is_text_and_not_html(client: overlay.Client, page: Any) -> None:
    job = client.later("upper", b"x", key="<img src=x onerror=document.body.remove()>")
    page.fill("#jobs-wanted input", job.id)
    until(lambda: page.locator("#jobs tbody .id").all_inner_texts() == [job.id])

    page.click("#jobs tbody .id")

    page.locator("#jobs .facts").get_by_text("<img src=x").wait_for()
    assert page.locator("img").count() == 0


def test_the_page_says_why_no_jobs_are_accepted(page: Any) -> None:
    shown = """async () => {
        const { showJobs } = await import("./jobs.js");
        const jobs = { states: { waiting: 1200, running: 0 }, schedules: 1, problem: "<b>full" };
        showJobs({ at: 0, processes: [], jobs });
        const text = (name) => document.querySelector(`#jobs-${name}`).textContent;
        return ["problem", "counts"].map(text);
    }"""

    assert page.evaluate(shown) == ["No jobs are accepted: <b>full", "1,200 waiting1 schedule"]
