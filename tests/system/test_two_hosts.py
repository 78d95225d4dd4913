"""The shipped configuration, unchanged, on two hosts with its real addresses.

The hosts are network namespaces, see tests/harness/hosts.py. `pytest -rP` shows the measured times.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from overlay.transport.codec import pb2
from tests.harness.cluster import IDS, ROOT, until
from tests.harness.hosts import (
    ADDRESSES,
    SHIPPED,
    Caller,
    CannotBuild,
    Hosts,
    Reply,
    SixOnTwoHosts,
    SlowHosts,
    ip,
)

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="network namespaces need Linux"
)

NOTICED_S = 5.0  # until a dead link is down; see the keepalive options in transport.endpoints
HEALED_S = 5.0  # until it serves again
LATE_S = 1.0  # how late a call may end, on two busy cores
EVERYONE = "A B C E D F"
DOCTOR = [sys.executable, "client.py", "doctor"]
COMMAND = [sys.executable, "client.py", ADDRESSES[1], "50051"]


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SixOnTwoHosts]:
    """All six, started. A test that cuts or freezes something restores it."""
    with hosts_or_reason() as hosts:
        yield from started(tmp_path_factory.mktemp("two"), hosts, IDS)


@pytest.fixture
def stopped_hosts(tmp_path: Path) -> Iterator[SixOnTwoHosts]:
    """Two hosts on which nothing runs yet."""
    with hosts_or_reason() as hosts:
        yield from started(tmp_path, hosts, "")


@pytest.fixture(scope="module")
def slow_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SixOnTwoHosts]:
    """All six, with 100 ms of round-trip time between the hosts."""
    with hosts_or_reason(delay_ms=50) as hosts:
        yield from started(tmp_path_factory.mktemp("slow"), hosts, IDS)


@contextlib.contextmanager
def hosts_or_reason(delay_ms: float = 0) -> Iterator[Hosts]:
    """Two hosts. If they cannot be created, the test is skipped, or fails in CI."""
    try:
        hosts = SlowHosts(delay_ms) if delay_ms else Hosts()
    except CannotBuild as e:
        give_up(e)
    with contextlib.closing(hosts):
        yield hosts


def give_up(why: CannotBuild) -> None:
    if os.environ.get("CI"):
        pytest.fail(str(why))
    pytest.skip(str(why))


def started(folder: Path, hosts: Hosts, ids: str) -> Iterator[SixOnTwoHosts]:
    with SixOnTwoHosts(folder, hosts) as overlay:
        yield overlay.start(*ids) if ids else overlay


# Normal operation


@pytest.mark.parametrize("host", ADDRESSES)
@pytest.mark.parametrize(
    ("process_id", "hops", "workers"),
    [
        ("A", EVERYONE, "CDF"),
        ("B", "B C D", "CD"),
        ("C", "C", "C"),
        ("D", "D", "D"),
        ("E", "E D F", "DF"),
        ("F", "F", "F"),
    ],
)
def test_every_process_answers_a_client_on_either_host(
    two_hosts: SixOnTwoHosts, host: int, process_id: str, hops: str, workers: str
) -> None:
    reply = two_hosts.ask(process_id, host=host, payload=b"hello")

    assert reply.response.result.decode() == "\n".join(f"{w}: hello" for w in workers)
    assert " ".join(reply.response.hops) == hops
    assert reply.coverage == f"{len(workers)}/{len(workers)}"


def test_mode_any_asks_one_worker_and_reaches_each(two_hosts: SixOnTwoHosts) -> None:
    replies = [two_hosts.ask("A", host=1 + i % 2, mode="ANY") for i in range(12)]

    assert all(len(reply.response.parts) == 1 for reply in replies)
    assert {reply.answered for reply in replies} == {"C", "D", "F"}


def test_mode_any_reaches_each_worker_after_many_requests_to_all(two_hosts: SixOnTwoHosts) -> None:
    for call in [two_hosts.begin("A") for _ in range(50)]:
        assert call.result(10).answered == "CDF"

    replies = [two_hosts.ask("A", mode="ANY") for _ in range(12)]

    assert {reply.answered for reply in replies} == {"C", "D", "F"}


@pytest.mark.parametrize("host", ADDRESSES)
@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (COMMAND, ["3 of 3 workers answered", EVERYONE]),
        ([*COMMAND, "--mode", "any"], ["1 of 1 worker answered"]),
        ([*COMMAND, "check"], ["A, leader of team green, at 192.168.1.1:50051"]),
        ([*COMMAND, "logs", "F"], ["F overlay.node INFO serves on 192.168.1.2:50056"]),
        ([sys.executable, "client.py", "check", SHIPPED.name], ["192.168.1.2:50056"]),
        ([*DOCTOR, SHIPPED.name], ["6 of 6 processes well, 6 of 6 links up"]),
        ([sys.executable, "test_system.py", *COMMAND[2:]], ["all 5 tests passed"]),
    ],
    ids=["request", "any", "check", "logs", "check all", "doctor", "test_system"],
)
def test_every_command_works_from_either_host(
    two_hosts: SixOnTwoHosts, host: int, command: list[str], expected: list[str]
) -> None:
    done = two_hosts.hosts.run(host, *command)

    assert done.returncode == 0, done.stdout
    for words in expected:
        assert words in done.stdout


def test_logs_are_written_beside_the_configuration(two_hosts: SixOnTwoHosts) -> None:
    assert two_hosts.path.read_bytes() == SHIPPED.read_bytes()
    for process_id in IDS:
        address = two_hosts.address(process_id)
        until(lambda p=process_id, a=address: f"serves on {a}" in two_hosts.log(p), what=process_id)


def test_a_process_refuses_to_start_on_the_other_host(two_hosts: SixOnTwoHosts) -> None:
    command = [sys.executable, "node.py", str(two_hosts.path), "C"]

    done = two_hosts.hosts.run(1, *command)

    assert done.returncode == 2
    assert "192.168.1.2 is not an address of this machine" in done.stdout
    assert "Traceback" not in done.stdout


def test_the_workers_may_start_first_and_are_drained_from_their_own_machine(
    stopped_hosts: SixOnTwoHosts,
) -> None:
    stopped_hosts.start_in_turn(*"FDCEBA")

    reply = stopped_hosts.ask("A")

    assert reply.answered == "CDF"
    assert " ".join(reply.response.hops) == EVERYONE

    drain = [sys.executable, "client.py", ADDRESSES[1], "50054", "drain"]
    remote = stopped_hosts.hosts.run(2, *drain)
    assert remote.returncode == 1
    assert "drain is answered only to callers on D's own machine" in remote.stdout
    assert f"this one calls from {ADDRESSES[2]}" in remote.stdout
    assert stopped_hosts.ask("D").response.result == b"D: hi"

    local = stopped_hosts.hosts.run(1, *drain)
    assert local.returncode == 0, local.stdout
    assert stopped_hosts.processes["D"].wait(20) == 0


def test_the_leader_may_start_first_and_names_missing_workers(stopped_hosts: SixOnTwoHosts) -> None:
    stopped_hosts.start_in_turn("A")
    alone = stopped_hosts.ask("A", timeout=3)
    stopped_hosts.start_in_turn(*"EBFDC")
    reply = stopped_hosts.ask("A")

    assert (alone.code, alone.trailers["overlay-executed"]) == ("UNAVAILABLE", "no")
    for worker, leads in {"C": "B", "D": "E or B", "F": "E"}.items():
        assert f"{worker}: cannot be reached: A has no live link to {leads}" in alone.details
    assert alone.took_s < 3 + LATE_S
    assert reply.answered == "CDF"
    assert " ".join(reply.response.hops) == EVERYONE


# A cut link


def test_a_cut_while_idle_is_noticed_and_heals_without_a_restart(two_hosts: SixOnTwoHosts) -> None:
    pids = {p: two_hosts.metrics(p).pid for p in IDS}
    with cut_wire(two_hosts):
        measured("cut noticed", lambda: not any(link_up(two_hosts, p) for p in ACROSS))

        here = two_hosts.ask("A", timeout=3)
        there = two_hosts.ask("E", host=2, timeout=3)
        cut_off = two_hosts.ask("A", host=2, timeout=2)

        # D is reached through B, because its own team leader is on the other host.
        assert (here.answered, here.coverage) == ("D", "1/3; missing=C,F")
        assert " ".join(here.response.hops) == "A B D"
        assert set(here.missing) == {"C", "F"}
        assert all(here.missing.values())
        assert (there.answered, there.coverage) == ("F", "1/2; missing=D")
        assert cut_off.code in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
        assert max(r.took_s for r in (here, there, cut_off)) < 2 + LATE_S

    until_all_answer(two_hosts)
    # The client on the other host may still have to notice that its connection is broken.
    until(lambda: two_hosts.ask("A", host=2).answered == "CDF", 5)
    assert {p: two_hosts.metrics(p).pid for p in IDS} == pids


def test_each_call_during_a_cut_ends_by_its_deadline_with_a_true_answer(
    two_hosts: SixOnTwoHosts,
) -> None:
    before = runs(two_hosts)
    with asking(two_hosts, timeout=2.0) as calls:
        until(lambda: len(calls) > 20)
        with cut_wire(two_hosts):
            measured("cut noticed under load", lambda: answered_last(calls) == "D")
        measured("healed under load", lambda: answered_last(calls) == "CDF", HEALED_S)

    replies = [call.result(5) for call in calls]
    print(f"{len(replies)} calls: {tally(replies)}")
    assert max(reply.took_s for reply in replies) < 2 + LATE_S
    for reply in replies:
        assert_truthful(reply)
    for worker, ran in runs(two_hosts).items():
        ran -= before[worker]
        proven_not = sum(reply.proves_that_nothing_ran_at(worker) for reply in replies)
        assert sum(worker in r.answered for r in replies) <= ran <= len(replies) - proven_not


def test_a_cut_of_a_third_of_a_second_loses_nothing(two_hosts: SixOnTwoHosts) -> None:
    with asking(two_hosts, timeout=5.0) as calls:
        until(lambda: len(calls) > 5)
        with cut_wire(two_hosts):
            before = len(calls)
            until(lambda: len(calls) > before + 15)
        before = len(calls)
        until(lambda: len(calls) > before + 5)

    replies = [call.result(6) for call in calls]
    print(f"{len(replies)} calls: {tally(replies)}; slowest {max(r.took_s for r in replies):.2f} s")
    assert {reply.answered for reply in replies} == {"CDF"}


def test_a_link_cut_in_one_direction_counts_as_cut(two_hosts: SixOnTwoHosts) -> None:
    with deaf_host(two_hosts, 1):
        assert_counts_as_cut(two_hosts)
    until_all_answer(two_hosts)


def test_a_link_cut_in_the_other_direction_too_and_doctor_explains_it_from_either_side(
    two_hosts: SixOnTwoHosts,
) -> None:
    look = [*DOCTOR, SHIPPED.name, "--deadline", "1"]
    with deaf_host(two_hosts, 2):
        assert_counts_as_cut(two_hosts)
        with ThreadPoolExecutor(len(ADDRESSES)) as pool:
            found = pool.map(lambda host: two_hosts.hosts.run(host, *look), ADDRESSES)
            done = dict(zip(ADDRESSES, found, strict=True))

    for host, (there, ids) in {
        1: ("192.168.1.2", "C, E, F"),
        2: ("192.168.1.1", "A, B, D"),
    }.items():
        assert done[host].returncode == 1
        assert f"{ids}: nothing comes back from {there}" in done[host].stdout
        assert f"open the firewall on {there}: Windows, as administrator" in done[host].stdout
    until_all_answer(two_hosts)


def assert_counts_as_cut(overlay: SixOnTwoHosts) -> None:
    measured("deafness noticed", lambda: not any(link_up(overlay, p) for p in ACROSS))
    reply = overlay.ask("A", timeout=3)

    assert (reply.answered, reply.coverage) == ("D", "1/3; missing=C,F")
    assert reply.took_s < 3


def test_a_frozen_team_leader_is_noticed_and_routed_around(
    two_hosts: SixOnTwoHosts,
) -> None:
    with frozen(two_hosts, "E"):
        first = two_hosts.ask("A")
        measured("frozen E noticed", lambda: not link_up(two_hosts, "AE"))
        reply = two_hosts.ask("A")

        # The first request is sent before the freeze is known. E's workers are missing from its
        # answer as soon as E's silence is noticed, well before the deadline of 10 s.
        assert (first.answered, first.coverage) == ("C", "1/3; missing=D,F")
        assert all("no answer from E" in first.missing[worker] for worker in "DF")
        assert first.took_s < NOTICED_S + LATE_S
        assert (reply.answered, reply.coverage) == ("CD", "2/3; missing=F")
        assert " ".join(reply.response.hops) == "A B C D"

    until_all_answer(two_hosts)


# Lanes

CALLS = """
import json, sys, time
sys.path.insert(0, {root!r})
import overlay

with overlay.connect("192.168.1.1:50051") as client:
    paths, longest = {{" ".join(client.call("x", mode="any").hops)}}, 0.0
    until, unreachable = time.monotonic() + 20, client._connection._submitter.lanes._retries
    while time.monotonic() < until and not ({lent!r} & paths and len(unreachable) == {without}):
        began = time.monotonic()
        paths.add(" ".join(client.call("x", mode="any").hops))
        longest = max(longest, time.monotonic() - began)
        time.sleep(0.001)
print(json.dumps([sorted(paths), sorted(unreachable), longest]))
"""


def test_a_client_behind_a_firewall_goes_over_the_leader_without_delay(
    two_hosts: SixOnTwoHosts,
) -> None:
    """The client reaches A, and not worker C, which is on the other host."""

    def calls(lent: set[str], without: int) -> subprocess.CompletedProcess[str]:
        """A client that calls until it goes straight to one of these workers, and has found that
        so many cannot be reached."""
        script = CALLS.format(root=str(ROOT), lent=lent, without=without)
        return two_hosts.hosts.run(1, sys.executable, "-c", script, within_s=60)

    try:
        with two_hosts.hosts.firewall(2, 50053):
            behind = calls({"D", "F"}, 1)
    except CannotBuild as e:
        give_up(e)
    free = calls({"C", "D", "F"}, 0)

    paths, unreachable, longest_s = json.loads(behind.stdout)
    assert "A B C" in paths
    assert "C" not in paths
    assert {"D", "F"} & set(paths), "it is lent another worker"
    assert unreachable == ["C"]
    assert longest_s < 5, "no call waits for a lane to connect"
    paths, unreachable, _ = json.loads(free.stdout)
    assert {"C", "D", "F"} & set(paths)
    assert unreachable == []


# A slow link


@pytest.mark.parametrize("host", ADDRESSES)
def test_over_a_slow_link_all_answer_within_a_second(slow_hosts: SixOnTwoHosts, host: int) -> None:
    slow_hosts.ask("A", host=host, wait=True)  # the client's own connection
    replies = [slow_hosts.ask("A", host=host, timeout=1) for _ in range(5)]

    took_ms = sorted(reply.took_s * 1000 for reply in replies)
    print(f"ALL from host {host}: {took_ms[0]:.0f} to {took_ms[-1]:.0f} ms")
    assert {reply.answered for reply in replies} == {"CDF"}
    # A to E and E to D take 100 ms each, and so does the client's own call from host 2.
    assert 200 + 100 * (host == 2) <= took_ms[0] < 400 + 100 * (host == 2)


def test_over_a_slow_link_mode_any_asks_one_worker(slow_hosts: SixOnTwoHosts) -> None:
    replies = [slow_hosts.ask("A", mode="ANY", timeout=1) for _ in range(6)]

    took_ms = {reply.answered: round(reply.took_s * 1000) for reply in replies}
    print(f"ANY from host 1: {took_ms} ms")
    assert all(len(worker) == 1 for worker in took_ms), took_ms
    assert 100 <= min(took_ms.values()) < max(took_ms.values()) < 400


def test_a_new_client_reaches_a_far_process_at_its_first_attempt(slow_hosts: SixOnTwoHosts) -> None:
    with contextlib.closing(Caller(slow_hosts.hosts, 2)) as newcomer:
        request = pb2.Request(payload=b"hi").SerializeToString()
        reply = newcomer.begin(slow_hosts.address("A"), "Forward", request, 2).result(5)

    assert (reply.code, reply.details) == ("OK", "")
    assert reply.answered == "CDF"


def test_over_a_slow_link_a_frozen_worker_costs_only_its_own_part(
    slow_hosts: SixOnTwoHosts,
) -> None:
    for host in ADDRESSES:
        slow_hosts.ask("A", host=host, wait=True)
    with frozen(slow_hosts, "F"):
        # Host and seconds. A process keeps time for the way back to the one that asked it, not to a
        # caller behind a slow link; that one's answer comes when F is known to be frozen.
        deadlines = [(1, 1), (1, 2), (2, 10)]
        calls = [slow_hosts.begin("A", host=host, timeout=s) for host, s in deadlines]
        for (host, deadline_s), call in zip(deadlines, calls, strict=True):
            reply = call.result(10)
            print(f"{reply.coverage} from host {host} after {reply.took_s:.2f} s of {deadline_s} s")
            assert (reply.answered, reply.coverage) == ("CD", "2/3; missing=F"), reply.missing
            assert reply.missing["F"]
            assert reply.took_s < deadline_s + LATE_S

        measured("frozen F noticed", lambda: not link_up(slow_hosts, "EF"))
        until(lambda: link_down_s(slow_hosts, "EF") > 1)  # before that, requests wait for it
        reply = slow_hosts.ask("A", timeout=2)  # and now none waits

        assert (reply.answered, reply.coverage) == ("CD", "2/3; missing=F")
        assert reply.took_s < 2
    until_all_answer(slow_hosts)


# The hosts themselves


def test_the_hosts_are_removed_even_when_the_tests_are_killed() -> None:
    with hosts_or_reason():
        pass  # skips where hosts cannot be made
    build = (
        "from tests.harness.hosts import SlowHosts as H; "
        "h = H(50); print(*h.names.values(), flush=True)"
    )
    killed = subprocess.Popen(
        [sys.executable, "-c", f"{build}; input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    )
    with killed:
        names = killed.stdout.readline().split()
        (relay,) = ip("netns", "pids", names[1]).split()
        killed.kill()

    until(lambda: not set(names) & set(os.listdir("/run/netns")), what=f"{names} removed")
    until(lambda: not Path(f"/proc/{relay}").exists(), what=f"process {relay} ended")


# Helpers

ACROSS = ("AE", "BC", "ED")  # the links between the hosts: from, to


def link(overlay: SixOnTwoHosts, ids: str) -> pb2.Neighbour:
    """What the first of the two processes reports about its link to the second."""
    near, far = ids
    return next(n for n in overlay.metrics(near).neighbours if n.process_id == far)


def link_up(overlay: SixOnTwoHosts, ids: str) -> bool:
    return link(overlay, ids).state == "up"


def link_down_s(overlay: SixOnTwoHosts, ids: str) -> float:
    found = link(overlay, ids)
    return found.since_s if found.state == "down" else 0.0


def all_answer(overlay: SixOnTwoHosts) -> bool:
    return overlay.ask("A", timeout=2).answered == "CDF"


def until_all_answer(overlay: SixOnTwoHosts) -> None:
    measured("all three answer again", lambda: all_answer(overlay), HEALED_S)


def measured(what: str, happened: Callable[[], bool], within_s: float = NOTICED_S) -> None:
    began = time.monotonic()
    until(happened, within_s, what)
    print(f"{what} after {time.monotonic() - began:.2f} s")


@contextlib.contextmanager
def cut_wire(overlay: SixOnTwoHosts) -> Iterator[None]:
    overlay.hosts.cut()
    try:
        yield
    finally:
        overlay.hosts.heal()


@contextlib.contextmanager
def deaf_host(overlay: SixOnTwoHosts, host: int) -> Iterator[None]:
    try:
        overlay.hosts.deafen(host)
    except CannotBuild as e:
        give_up(e)
    try:
        yield
    finally:
        overlay.hosts.undeafen(host)


@contextlib.contextmanager
def frozen(overlay: SixOnTwoHosts, process_id: str) -> Iterator[None]:
    overlay.freeze(process_id)
    try:
        yield
    finally:
        overlay.thaw(process_id)


@contextlib.contextmanager
def asking(overlay: SixOnTwoHosts, timeout: float) -> Iterator[list[Future[Reply]]]:
    """Sends 50 requests a second to A, in its own thread, until the block ends."""
    calls: list[Future[Reply]] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.wait(0.02):
            calls.append(overlay.begin("A", timeout=timeout))

    thread = threading.Thread(target=ask, name="asking")
    thread.start()
    try:
        yield calls
    finally:
        stop.set()
        thread.join()


def answered_last(calls: list[Future[Reply]]) -> str:
    """The workers that answered the newest call that has ended."""
    return next((c.result().answered for c in reversed(calls) if c.done()), "")


def runs(overlay: SixOnTwoHosts) -> dict[str, int]:
    """How often each worker's handler has run."""
    counts = {w: overlay.metrics(w).handlers[0] for w in "CDF"}
    return {w: found.completed + found.failed for w, found in counts.items()}


def assert_truthful(reply: Reply) -> None:
    if reply.code != "OK":
        assert reply.code in ("DEADLINE_EXCEEDED", "UNAVAILABLE", "RESOURCE_EXHAUSTED"), reply
        if reply.code == "RESOURCE_EXHAUSTED":  # too little time, given the queue
            assert reply.trailers["overlay-executed"] == "no", reply
        assert reply.details, reply
        return
    parts = reply.response.parts
    names = [part.process_id for part in parts]
    missing = ",".join(part.process_id for part in parts if part.code)
    expected = f"{len(reply.answered)}/3" + (f"; missing={missing}" if missing else "")
    assert (names, reply.coverage) == (["C", "D", "F"], expected)
    assert all(bool(part.reason) == bool(part.code) for part in parts), reply.missing


def tally(replies: list[Reply]) -> dict[str, int]:
    kinds = [reply.answered or reply.code for reply in replies]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
