"""client.py web in a real browser, and client.py top in a real terminal, over a real overlay."""

from __future__ import annotations

import asyncio
import http.client
import json
import mimetypes
import re
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import grpc
import pytest

from overlay.cli import web
from overlay.cli.web_jobs import JobsOfPage
from overlay.monitor.poller import Poller
from overlay.transport.codec import pb2
from tests.harness.cluster import ROOT, Overlay, free_port, running, six_processes, tool, until
from tests.harness.commands import run_client, start_client
from tests.harness.stalled_clients import FRAMES, STALLED_REQUESTS, held_open, timed

CLIENT = [sys.executable, str(ROOT / "client.py")]
SWITCHES = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
SWITCHES += ["--disable-component-update", "--disable-sync"]

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Overlay]:
    """A to F. A test that ends a process restarts it."""
    folder = tmp_path_factory.mktemp("views")
    (folder / "mine.py").write_text("def broken(payload, context):\n    raise ValueError\n")
    broken = {"broken": {"call": "mine:broken"}}
    with running(folder, six_processes(handlers=broken)) as found:
        yield found


@pytest.fixture
def well(mine: Overlay) -> Overlay:
    """The same, when every process is well: one that a busy machine has held up for some
    milliseconds counts as slow until it has answered a few more requests."""

    def is_well() -> bool:
        for _ in range(20):
            mine.ask("A", mode=pb2.ANY)
        links = (link for i in "ABE" for link in mine.metrics(i).neighbours)
        return all(link.state == "up" and link.health == "healthy" for link in links)

    until(is_well, 30)
    return mine


@contextmanager
def page_of(overlay: Overlay, *options: str) -> Iterator[tuple[Any, str]]:
    """The server of the page, and its address."""
    with start_client("127.0.0.1", overlay.port("A"), "web", "--web-port", 0, *options) as server:
        try:
            line = server.stdout.readline().decode()
            assert "the page: http://" in line
            yield server, line.rpartition(" ")[2].strip()
        finally:
            server.kill()


@pytest.fixture(scope="module")
def address(mine: Overlay) -> Iterator[str]:
    with page_of(mine) as (_, found):
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    pytest.importorskip("playwright")
    from playwright.sync_api import sync_playwright

    chromium = tool("chromium", "apt-get install chromium")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=SWITCHES)
        yield found
        found.close()


@pytest.fixture(scope="module")
def opened(browser: Any, address: str) -> Any:
    """The rendered page, and its console messages."""
    complaints: list[str] = []
    found = browser.new_page()
    found.set_default_timeout(20_000)
    found.on("console", lambda message: complaints.append(message.text))
    found.on("pageerror", lambda error: complaints.append(str(error)))
    found.goto(address)
    found.wait_for_selector(".node")
    return found, complaints


@pytest.fixture
def page(opened: Any) -> Iterator[Any]:
    """The page at desktop size. Fails if there are console messages."""
    found, complaints = opened
    found.set_viewport_size({"width": 1280, "height": 800})
    found.mouse.move(0, 0)
    yield found
    assert complaints == []


# The page


def test_the_page_shows_six_processes_and_every_link(page):
    states = page.locator("#processes tbody td:nth-child(2)")

    assert page.locator(".node.well").count() == 6
    assert page.locator(".link").count() == 6
    assert states.all_inner_texts() == ["serves"] * 6
    assert page.inner_text("#figures").count("3 of 3") == 1


def test_without_a_journal_the_page_has_no_jobs(page):
    assert page.locator("#jobs").is_hidden()


def test_the_charts_cover_the_known_history(page):
    drawn = """async (points) => {
        const { drawCharts } = await import("./charts.js");
        drawCharts({ completed: [null, ...Array(points).fill(7)] }, 1, 300);
        const chart = document.querySelector("#charts svg");
        const line = chart.querySelector(".line").getAttribute("d");
        return [line.match(/^M([0-9.]+) /)[1], chart.textContent, document.querySelector("#series-when").textContent];
    }"""  # noqa: E501
    for points, axis in ((72, "1 min 12 s"), (299, "4 min 59 s"), (300, "5 min")):
        begin, texts, title = page.evaluate(drawn, points)
        assert float(begin) == pytest.approx(38)
        assert f"−{axis}" in texts  # noqa: RUF001 - as it is printed
        assert title == f"last {axis}"


def test_the_page_says_whether_the_overlay_is_open(page):
    drawn = """async (found) => {
        const { showSecurity } = await import("./tables.js");
        showSecurity(found);
        const shown = document.querySelector("#security");
        const lines = [...shown.children].map((line) => [line.className, line.textContent]);
        return [shown.hidden, lines];
    }"""
    local = {"mode": "local", "text": "", "problems": []}
    closed = {"mode": "tls", "text": "closed", "problems": ["C: it expires in 9 days"]}

    assert page.locator("#security").is_hidden()
    assert page.evaluate(drawn, {**local, "mode": "open", "text": "OPEN"}) == [
        False,
        [["warning", "OPEN"]],
    ]
    assert page.evaluate(drawn, closed) == [
        False,
        [["quiet", "closed"], ["warning", "C: it expires in 9 days"]],
    ]
    assert page.evaluate(drawn, local) == [True, []]


def test_a_request_is_shown_with_its_path(page, mine):
    mine.ask("A", b"hello")
    row = page.locator("#requests tbody tr").first

    row.get_by_text("OK").wait_for()
    assert row.locator(".path b").all_inner_texts() == list("ABCEDF")

    row.locator("button").click()
    way = page.wait_for_selector(".way")
    assert [name for name in way.inner_text().split() if name in "ABCDEF"] == list("ABCEDF")


def test_a_handler_is_shown_with_its_signature_and_docstring(page):
    shown = page.locator("#handlers details").first

    shown.get_by_text("echo(payload: bytes, context: Context) -> bytes").click()
    shown.get_by_text("The default handler: returns the payload").wait_for()
    assert "on C, D, F" in shown.inner_text()


def test_data_from_the_wire_is_shown_as_text_and_not_as_html(page, mine):
    with suppress(Exception):
        mine.ask("A", b"", handler="<img src=x onerror=document.body.remove()>")

    page.locator("#requests").get_by_text("<img src=x onerror").first.wait_for()
    assert page.locator("img").count() == 0


def test_a_killed_worker_turns_red_until_it_is_back(page, mine):
    mine.kill("C")
    try:
        page.wait_for_selector(".node.gone[data-id=C]", timeout=15_000)
        page.wait_for_selector(".link.down", state="attached")
        assert "gone" in page.inner_text("#processes tbody tr:nth-child(3)")
        page.locator("#events").get_by_text("gone: ").first.wait_for()
    finally:
        mine.start("C")
    page.wait_for_selector(".node.well[data-id=C]")


def test_requests_can_be_filtered_by_handler_or_id(page, mine):
    mine.ask("A", b"hello")
    with suppress(grpc.RpcError):
        mine.ask("A", b"x", handler="broken")
    asks, ids = (page.locator(f"#requests td:nth-child({n})") for n in (3, 2))
    wanted, failed = (
        page.locator(f"#wanted input[type={kind}]") for kind in ("search", "checkbox")
    )
    asks.get_by_text("all broken").first.wait_for()

    wanted.fill("BROKEN")
    until(lambda: set(asks.all_inner_texts()) == {"all broken"})
    assert "are not shown" in page.inner_text("#hidden-requests")
    found = ids.first.inner_text()
    assert re.fullmatch("[0-9a-f]{16}", found), "the whole id, to be copied"

    wanted.fill(found)
    until(lambda: ids.all_inner_texts() == [found])
    wanted.fill("")
    failed.check()
    until(lambda: "all default" not in asks.all_inner_texts())
    failed.uncheck()
    until(lambda: "all default" in asks.all_inner_texts())


def test_a_process_can_be_selected_by_keyboard(page):
    page.focus("[data-id=A]")

    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")

    chosen = page.evaluate("document.activeElement.dataset.id")
    assert chosen in "CDF"
    page.locator("#details-title").get_by_text(f"{chosen}, worker").wait_for()
    assert page.get_attribute(f"[data-id={chosen}]", "aria-pressed") == "true"


def test_a_process_can_be_selected_by_a_click_in_the_table(page):
    page.click("#processes tbody tr:nth-child(5) button")

    page.wait_for_selector(".node.is-picked[data-id=E]")
    assert "E → F" in page.inner_text("#details")


def test_the_page_follows_the_systems_dark_mode(page):
    def brightness() -> int:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in colour[4:-1].split(","))

    page.emulate_media(color_scheme="light")
    assert brightness() > 600
    page.emulate_media(color_scheme="dark")
    assert brightness() < 150


def test_the_page_fits_the_width_of_a_phone(page):
    page.set_viewport_size({"width": 390, "height": 844})

    until(lambda: page.locator(".node").last.bounding_box()["x"] < 390, 10, "drawn anew")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.locator(".node").first.bounding_box()["width"] >= 60


def test_a_missing_leader_is_reported_and_the_others_are_still_shown(page, well):
    mine = well
    mine.freeze("A")
    try:
        page.wait_for_selector("#alarm:not([hidden])")
        assert "The leader A has been gone for" in page.inner_text("#alarm")
        assert page.locator(".node.well").count() == 5
    finally:
        mine.thaw("A")
    page.wait_for_selector("#alarm", state="hidden")


def test_the_page_reports_when_its_own_server_is_gone(browser, mine):
    with page_of(mine, "--until-eof") as (server, address):
        page = browser.new_page()
        page.goto(address)
        page.wait_for_selector(".node")

        server.stdin.close()

        assert server.wait(10) == 0
        page.wait_for_selector("#alarm:not([hidden])")
        assert "No news from this page's own server" in page.inner_text("#alarm")
        page.close()


# The server


def got(url: str, **headers: str) -> Any:
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10)
    except urllib.error.HTTPError as error:
        return error


def test_a_request_with_a_foreign_host_name_is_rejected(address):
    assert got(address + "snapshot", Host="evil.example").status == 403
    assert got(address + "snapshot", Host="127.0.0.1.evil.example").status == 403
    assert got(address + "snapshot", Host="localhost:1").status == 200


def test_every_response_forbids_foreign_scripts_and_addresses(address):
    for path in ("", "page.js", "snapshot", "missing"):
        policy = got(address + path).headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy


def test_no_file_of_the_page_contains_an_address():
    for path in web.PAGE.iterdir():
        text = path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text, path.name


def test_nothing_but_a_job_can_be_changed(address):
    request = urllib.request.Request(address + "snapshot", data=b"{}", method="POST")

    with pytest.raises(urllib.error.HTTPError, match="405"):
        urllib.request.urlopen(request, timeout=10)


@pytest.mark.parametrize(
    "sent", [*STALLED_REQUESTS, FRAMES], ids=[*STALLED_REQUESTS.values(), "pages open"]
)
def test_a_new_viewer_is_answered_at_once_while_others_hold_idle_connections(address, sent):
    def see() -> None:
        assert got(address).status == got(address + "page.js").status == 200
        with got(address + "frames") as frames:
            assert frames.status == 200
            assert frames.readline() == b"retry: 1000\n"

    with held_open(urlsplit(address).port, sent):
        took_s = min(timed(see) for _ in range(3))

    assert took_s < 1


def test_one_page_too_many_replaces_the_one_open_longest(address):
    with ExitStack() as stack:
        pages = [stack.enter_context(got(address + "frames")) for _ in range(web.MAX_VIEWERS + 1)]

        assert pages[-1].readline() == b"retry: 1000\n"
        assert is_ended(pages[0])
        assert pages[1].readline() == b"retry: 1000\n"


def is_ended(page: Any) -> bool:
    """Whether the stream has ended, once all snapshots are read."""
    until_ = time.monotonic() + 10
    try:
        while time.monotonic() < until_:
            if not page.readline():
                return True
    except (OSError, http.client.HTTPException):
        return True
    return False


def test_a_slow_viewer_skips_to_the_newest_snapshot():
    async def view() -> list[bytes]:
        page = web.Page(
            Poller("127.0.0.1:1"), loopback_only=True, jobs=JobsOfPage("127.0.0.1:1", True)
        )
        page._begin()
        viewer = page._snapshots(web._Viewer("127.0.0.1", lambda: None))
        await anext(viewer)  # the first message; then the viewer is slow
        waiting = asyncio.ensure_future(anext(viewer))
        await asyncio.sleep(0)
        for number in range(5):
            page._take({"round": number})
        seen = [await waiting]
        page.close()
        with suppress(StopAsyncIteration):
            seen.append(await anext(viewer))
        return seen

    with ThreadPoolExecutor(1) as beside:  # the browser's own loop is on this thread
        seen = beside.submit(asyncio.run, view()).result(10)
    assert seen == [b'data: {"round":4}\n\n']


def test_a_port_in_use_gets_a_message_without_a_traceback(mine):
    done = run_client("127.0.0.1", 1, "web", "--web-port", mine.port("A"))

    assert done.returncode == 2
    assert "--web-port 0 takes a free port" in done.stderr


# The terminal


def top(port: int, *options: str) -> subprocess.CompletedProcess[str]:
    return run_client("127.0.0.1", port, "top", *options)


def test_a_script_can_read_one_report(well):
    done = top(well.port("A"), "--once", "--json")

    found = json.loads(done.stdout)
    assert (done.returncode, found["ok"], found["format"]) == (0, True, 1)
    assert [p["id"] for p in found["processes"]] == list("ABCDEF")
    assert {link["from"] + link["to"] for link in found["links"]} == {
        "AB", "AE", "BC", "BD", "ED", "EF",
    }  # fmt: skip
    assert all(link["rtt_ms"] > 0 for link in found["links"])
    assert found["processes"][0]["rates"]["received"] >= 0


def test_repeated_failures_of_a_handler_are_one_event_per_worker(mine):
    for _ in range(20):
        with suppress(grpc.RpcError):
            mine.ask("A", b"x", handler="broken")

    def failures() -> dict[str, int]:
        found = json.loads(top(mine.port("A"), "--once", "--json").stdout)["events"]
        failures = [event for event in found if event["kind"] == "failure"]
        assert len({event["process"] for event in failures}) == len(failures), "one of each"
        return {event["process"]: event["count"] for event in failures}

    # The last are reported a second later; other tests may have caused failures too.
    until(lambda: all(failures().get(worker, 0) >= 20 for worker in "CDF"), 20)
    assert set(failures()) == set("CDF"), "the leaders pass on what the workers know"


def test_a_report_shows_only_the_requests_that_match(mine):
    with suppress(grpc.RpcError):
        mine.ask("A", b"x", handler="broken")
    mine.ask("A", b"hello")

    done = top(mine.port("A"), "--once", "--json", "--failed", "--handler", "broken")

    found = json.loads(done.stdout)["requests"]
    assert found
    assert {(r["handler"], r["code"]) for r in found} == {("broken", 13)}


def test_a_report_has_the_resource_usage_of_each_process(mine):
    found = json.loads(top(mine.port("A"), "--once", "--json").stdout)["processes"]

    assert all(10 < process["memory_mib"] < 1000 for process in found)
    assert all(process["cores"] >= 0 for process in found)


def test_one_report_is_written_to_a_pipe(well):
    done = top(well.port("A"), "--once")

    assert done.returncode == 0
    assert "workers 3 of 3" in done.stdout
    assert len(re.findall("(?m)^ *● [A-F] +serves", done.stdout)) == 6


def test_a_report_without_a_server_has_a_message_and_its_own_exit_code():
    done = top(free_port(), "--once")

    assert done.returncode == 4
    assert "the connection was refused" in done.stderr


def test_without_a_terminal_top_names_the_alternative(mine):
    done = top(mine.port("A"))

    assert done.returncode == 2
    assert "--once prints one report" in done.stderr


def test_top_fits_a_terminal_and_restores_it(mine, tmp_path):
    tmux = [tool("tmux", "apt-get install tmux"), "-S", str(tmp_path / "tmux")]

    def run_tmux(*words: str) -> str:
        return subprocess.run([*tmux, *words], capture_output=True, text=True, timeout=10).stdout

    command = shlex.join([*CLIENT, "127.0.0.1", str(mine.port("A")), "top"])
    run_tmux("new-session", "-d", "-x", "80", "-y", "24", f"{command}; echo ended $?; sleep 60")
    try:
        until(lambda: "● F" in run_tmux("capture-pane", "-p"), 20, "six processes on the screen")
        shown = run_tmux("capture-pane", "-p")
        assert shown.startswith("overlay  A leader at")
        assert "E → F" in shown

        run_tmux("send-keys", "q")

        until(lambda: "ended 0" in run_tmux("capture-pane", "-p"), 10, "the end")
        assert "serves" not in run_tmux("capture-pane", "-p")
    finally:
        run_tmux("kill-server")


def test_the_page_works_if_the_system_maps_javascript_to_plain_text() -> None:
    mimetypes.add_type("text/plain", ".js")  # as the registry of a Windows PC may do

    web.know_types()

    assert mimetypes.guess_type("page.js")[0] == "text/javascript"
