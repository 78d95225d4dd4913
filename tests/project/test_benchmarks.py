"""The benchmark's statistics, order, rows and page, all without I/O; and its loads on an echo."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks import figures, loads, peers, report, rows
from benchmarks.handlers import answer
from benchmarks.loads import FuturesCaller, LoopCaller, Work, WrongAnswer

WORKERS = ("C", "D", "F")


# Statistics.


@pytest.mark.parametrize(
    ("share", "value"), [(0, 1.0), (0.5, 2.5), (0.99, 3.97), (1, 4.0), (0.25, 1.75)]
)
def test_a_quantile_lies_between_its_neighbours(share, value):
    assert figures.quantile([4, 1, 3, 2], share) == pytest.approx(value)


def test_no_values_have_no_quantile():
    with pytest.raises(ValueError, match="no values"):
        figures.quantile([], 0.5)


def test_only_rounds_that_both_have_make_a_ratio():
    assert figures.paired_ratios({0: 10.0, 1: 30.0, 3: 8.0}, {1: 10.0, 2: 5.0, 3: 4.0}) == [3, 2]


def test_a_peer_without_answers_makes_no_ratio():
    assert figures.paired_ratios({0: 10.0}, {0: 0.0}) == []


def test_the_interval_contains_the_median_and_is_the_same_each_time():
    values = [1.0, 1.1, 0.9, 1.3, 1.05, 0.95, 1.2, 1.0, 0.8, 1.15]

    found = figures.estimate(values)

    assert found == figures.estimate(values)
    assert 0.8 < found.low < found.median < found.high < 1.3
    assert found.count == 10


def test_equal_rounds_have_an_interval_without_width():
    assert figures.estimate([2.0] * 5) == figures.Estimate(2.0, 2.0, 2.0, 5)


def test_no_rounds_give_no_estimate():
    assert figures.estimate([]) is None


def test_one_outlying_round_does_not_move_the_median():
    assert figures.estimate([2.0] * 9 + [90.0]).median == 2.0


@pytest.mark.parametrize(
    ("counts", "off"),
    [
        ({"C": 10, "D": 10, "F": 10}, 0.0),
        ({"C": 15, "D": 10, "F": 5}, 0.5),
        ({"C": 30}, 2.0),
        ({}, 0.0),
    ],
)
def test_unevenness_is_the_largest_distance_from_an_even_share(counts, off):
    assert figures.unevenness(counts, WORKERS) == pytest.approx(off)


# The order of the peers in a round.


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_each_peer_takes_each_place_equally_often(count):
    names = list(range(count))

    orders = [figures.rotated(names, number) for number in range(2 * count)]

    assert all(sorted(order) == names for order in orders)
    for name in names:
        places = sorted(order.index(name) for order in orders)
        assert places == sorted(names * 2)


def test_no_peer_is_always_measured_right_after_the_same_other():
    orders = [figures.rotated("abcd", number) for number in range(8)]
    before_b = {order[order.index("b") - 1] for order in orders if order[0] != "b"}
    assert len(before_b) > 1


def test_no_peers_have_an_empty_order():
    assert figures.rotated([], 3) == []


# Rows and figures to reach.


def test_row_names_are_unique_and_their_setups_exist():
    assert len({row.name for row in rows.ROWS}) == len(rows.ROWS)
    assert {rows.setup_of(row).name for row in rows.ROWS} == {s.name for s in rows.SETUPS}


def test_every_figure_to_reach_is_also_measured_in_the_quick_run():
    quick = {row.name for row in rows.chosen([], quick=True)}
    assert {target.row for target in rows.TARGETS} <= quick
    assert {target.against for target in rows.TARGETS if target.kind == "p99"} <= quick


def test_every_peer_of_a_figure_takes_part_in_its_row():
    from benchmarks.contest import entered

    for target in rows.TARGETS:
        row = next(row for row in rows.ROWS if row.name == target.row)
        others = {target.against} if target.kind == "rate" else set()
        assert {"ours"} | others <= set(entered(row, peers.MODULES))


def test_an_unknown_row_is_named():
    with pytest.raises(ValueError, match="no row 'windows'; there are window-1"):
        rows.chosen(["windows"], quick=False)


@pytest.mark.parametrize(
    ("kind", "low", "high", "verdict"),
    [
        ("rate", 1.6, 2.0, "reached"),
        ("rate", 1.4, 2.0, "reached within the interval"),
        ("rate", 1.0, 1.4, "missed"),
        ("p99", 1.0, 1.4, "reached"),
        ("p99", 1.4, 2.0, "reached within the interval"),
        ("p99", 1.6, 2.0, "missed"),
    ],
)
def test_a_figure_is_missed_only_when_its_whole_interval_misses(kind, low, high, verdict):
    assert rows.Target("", "row", "peer", 1.5, kind).verdict(low, high) == verdict


@pytest.mark.parametrize("name", peers.MODULES)
def test_every_peer_has_the_same_interface(name):
    module = peers.load(name)

    assert module.TITLE
    assert module.NOTES
    assert module.PACKAGES
    assert module.BULK >= 100 or "bulk" not in module.SUPPORTS
    known = {row.load for row in rows.ROWS} | {"all"}
    assert set(module.SUPPORTS) <= known
    assert isinstance(module.missing(), str)
    assert callable(module.start)
    assert callable(module.Caller)


@pytest.mark.parametrize("setup", rows.SETUPS, ids=lambda setup: setup.name)
def test_the_overlay_of_every_setup_is_a_valid_configuration(setup, tmp_path):
    import json

    from overlay.model import config

    path = tmp_path / "overlay.json"
    path.write_text(json.dumps(peers.load("ours").configuration(setup)))

    topology = config.load(path)

    workers = [p.id for p in topology.processes.values() if p.role == "worker"]
    assert tuple(workers) == setup.workers


# Loads.


class Threads(FuturesCaller):
    """An echo in this process: workers in turn, on threads."""

    def __init__(self, workers=WORKERS) -> None:
        self._pool = ThreadPoolExecutor(8)
        self._workers = workers
        self._turn = itertools.cycle(workers)
        self._lock = threading.Lock()
        self.calls = 0

    def client(self, number, lanes):
        return self

    def submit(self, payload, mode):
        with self._lock:
            self.calls += 1
            worker = next(self._turn)
        return self._pool.submit(self._work, worker, payload, mode)

    def close(self):
        self._pool.shutdown()

    def _work(self, worker, payload, mode):
        if mode == "all":
            return b"\n".join(answer(name, payload) for name in self._workers)
        return answer(worker, payload)


class Loop(LoopCaller):
    def __init__(self) -> None:
        super().__init__()
        self._turn = itertools.cycle(WORKERS)

    def client(self, number, lanes):
        return self

    async def request(self, payload, mode):
        if mode == "all":
            return b"\n".join(answer(name, payload) for name in WORKERS)
        return answer(next(self._turn), payload)


@pytest.fixture(params=[Threads, Loop], ids=["futures", "asyncio"])
def caller(request):
    made = request.param()
    yield made
    made.close()


@pytest.mark.parametrize("mode", ["any", "all"])
@pytest.mark.parametrize("load", ["window", "threads", "unary"])
def test_a_timed_load_counts_the_right_answers_within_its_time(caller, load, mode):
    found = caller.run(Work(load, WORKERS, mode, callers=4, seconds=0.05)).report()

    assert found["answers"] > 0
    assert found["seconds"] >= 0.05
    assert sum(found["by_worker"].values()) == (found["answers"] if mode == "any" else 0)


@pytest.mark.parametrize("load", ["bulk", "bulk_singly"])
def test_a_bulk_answers_all_its_items(caller, load):
    found = caller.run(Work(load, WORKERS, count=1000)).report()
    assert found["answers"] == 1000


def test_blocking_calls_report_latencies(caller):
    found = caller.run(Work("threads", WORKERS, callers=2, seconds=0.05)).report()
    assert 0 < found["p50_ms"] <= found["p99_ms"]


def test_large_calls_beside_small_ones_are_counted_separately(caller):
    work = Work("threads", WORKERS, callers=2, seconds=0.05, beside=2)

    found = caller.run(work).report()

    assert found["beside"] > 0
    assert sum(found["by_worker"].values()) == found["answers"]


def test_several_clients_have_a_window_each_and_count_what_comes_after_they_have_lanes(
    caller, monkeypatch
):
    monkeypatch.setattr(loads, "SETTLING_S", 0.05)
    windows = []
    window = caller.window
    caller.window = lambda work: windows.append(work) or window(work)

    found = caller.run(Work("clients", WORKERS, callers=2, seconds=0.1, clients=3)).report()

    assert sorted(work.seconds for work in windows) == [0.05] * 3 + [0.1] * 3
    assert found["seconds"] >= 0.1
    assert sum(found["by_worker"].values()) == found["answers"] > 0


def test_a_client_that_fails_ends_the_load_of_all(monkeypatch):
    monkeypatch.setattr(loads, "SETTLING_S", 0.05)
    caller = Threads()
    caller._work = lambda worker, payload, mode: b"C: 1"

    with pytest.raises(WrongAnswer):
        caller.run(Work("clients", WORKERS, callers=2, seconds=0.1, clients=3))
    caller.close()


def test_a_window_never_has_more_outstanding_than_its_size():
    caller = Threads()
    peak = 0
    outstanding = 0
    submit, result = caller.submit, caller.result

    def counted_submit(payload, mode):
        nonlocal peak, outstanding
        outstanding += 1
        peak = max(peak, outstanding)
        return submit(payload, mode)

    def counted_result(handle):
        nonlocal outstanding
        outstanding -= 1
        return result(handle)

    caller.submit, caller.result = counted_submit, counted_result
    caller.run(Work("window", WORKERS, callers=5, seconds=0.3))
    caller.close()

    assert peak == 5
    assert outstanding == 0


@pytest.mark.parametrize("load", ["window", "threads", "bulk"])
@pytest.mark.parametrize("mode", ["any", "all"])
def test_a_wrong_answer_ends_a_load(load, mode):
    caller = Threads()
    caller._work = lambda worker, payload, mode: b"C: 0000000000000000"[: 10 + len(mode)]

    with pytest.raises(WrongAnswer):
        caller.run(
            Work(load, WORKERS, mode, callers=2, seconds=0.05, count=0 if load != "bulk" else 9)
        )
    caller.close()


def test_an_answer_from_something_else_than_a_worker_is_wrong():
    caller = Threads(workers=("C", "Z"))
    tally = caller.run(Work("window", WORKERS, callers=2, seconds=0.02))
    caller.close()

    with pytest.raises(WrongAnswer, match="answers from Z, not a worker"):
        tally.report()


def test_payloads_have_the_given_size_and_all_differ():
    found = list(loads.payloads(Work("bulk", WORKERS, size=100, count=50)))
    assert {len(payload) for payload in found} == {100}
    assert len(set(found)) == 50


# The page.


def measurement(row, peer, number, rate, **more):
    found = {"row": row, "peer": peer, "round": number, "answers": int(rate), "seconds": 1.0}
    even = {"C": 1, "D": 1, "F": 1}
    return {**found, "by_worker": even, "cpu_s": 1.5, "other_cores": 0.01, **more}


@pytest.fixture
def raw():
    measurements = []
    for number in range(4):
        measurements += [
            measurement("window-64", "ours", number, 30_000),
            measurement("window-64", "nats", number, 20_000),
            measurement("nap-1", "ours", number, 540),
            measurement("small-alone", "ours", number, 5000, p99_ms=4.0),
            measurement("small-beside", "ours", number, 4000, p99_ms=6.0),
        ]
    measurements.append({"row": "window-64", "peer": "zeromq", "round": 0, "error": "it fell over"})
    machine = {"cpu": "A CPU", "cores": 2, "memory_gib": 4, "os": "an OS", "python": "3.10.1"}
    about = {
        "date": "2026-11-22",
        "command": "python benchmarks/run.py",
        "rounds": 4,
        "seconds": 0.6,
        "minutes": 3.0,
        "machine": {**machine, "commit": "abc"},
        "versions": {"grpcio": "1.85"},
    }
    return {"about": about, "not_run": {"dask": "not installed"}, "measurements": measurements}


def test_the_page_names_the_machine_the_versions_the_command_and_the_rounds(raw):
    page = report.page(raw)
    for word in ("A CPU", "2 cores", "grpcio 1.85", "python benchmarks/run.py", "4 rounds"):
        assert word in page


def test_a_figure_to_reach_has_a_ratio_and_a_verdict(raw):
    page = report.page(raw)
    assert "| 64 outstanding, against NATS | at least 1.2x | 1.5x (1.5 to 1.5) | reached |" in page
    assert "| 5 ms handlers, 3 x 1 slot, of the ideal | at least 0.88 | 0.9 (0.9 to 0.9) |" in page
    assert "| small calls' p99 beside 64 KiB ones | at most 2x | 1.5x (1.5 to 1.5) |" in page


def test_the_price_of_tls_is_its_rate_over_that_of_plaintext(raw):
    assert "Mutual TLS" not in report.page(raw)
    raw["measurements"] += [measurement("window-64", "ours-tls", n, 24_000) for n in range(4)]

    page = report.page(raw)

    assert "| 64 outstanding | 30,000 | 24,000 | 0.8x (0.8 to 0.8) |" in page
    assert "1.25x" not in page  # it is no peer that ours is ahead of


def test_many_clients_with_lanes_are_shown_over_the_same_without(raw):
    assert "Many clients" not in report.page(raw)
    (row,) = [row for row in rows.ROWS if row.name == "8-clients-48-workers"]
    for n in range(4):
        raw["measurements"] += [
            measurement(row.over, "ours-tls", n, 4_000),
            measurement(row.name, "ours-tls", n, 10_000),
        ]

    page = report.page(raw)

    assert f"| {row.title} | 4,000 | 10,000 | 2.5x (2.5 to 2.5) |" in page


def test_a_row_that_is_shown_over_another_is_measured_in_the_same_setup():
    by_name = {row.name: row for row in rows.ROWS}
    for row in rows.ROWS:
        if row.over:
            assert by_name[row.over].setup == row.setup
            assert by_name[row.over].peers == row.peers


def test_tls_is_measured_in_rows_that_exist_and_not_in_all():
    from benchmarks.contest import entered

    measured = [row.name for row in rows.ROWS if "ours-tls" in entered(row, peers.MODULES)]
    assert sorted(measured) == sorted(peers.load("ours-tls").ROWS)


def test_the_page_lists_what_was_not_run_or_failed(raw):
    page = report.page(raw)
    assert "- not run: dask: not installed" in page
    assert "- zeromq, window-64: failed in 1 of 4 rounds: it fell over" in page
    assert "| bulk, against Dask | at least 50x | not run |" in page


def test_the_page_shows_the_last_run_beside_this_one(raw):
    assert "last time (2026-11-22)" in report.page(raw, before=raw)


def test_the_page_says_when_the_machine_was_busy(raw):
    for found in raw["measurements"]:
        found["other_cores"] = 0.4
    assert "**busy: these figures say little**" in report.page(raw)


def test_a_run_without_results_still_makes_a_page(raw):
    assert "not run" in report.page({**raw, "measurements": []})


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123, "0.0123"), (1.5, "1.5"), (99.94, "99.9"), (1234.5, "1,230"), (105_678, "106,000")],
)
def test_numbers_have_three_significant_figures(value, text):
    assert report.number(value) == text
