"""Six processes under attack: what an honest client gets, and what the attack costs.

faults/strangers.py has the attacks. What is promised meanwhile:

an honest client on a new connection has its answer, from all three workers, within 1 s
no process ever uses 100 MiB more than before
2 s after the attack its counts are those of an idle process
no process ends or restarts
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import overlay
from faults.strangers import Strangers
from overlay.transport.codec import pb2, pb2_grpc
from tests.harness.cluster import IDS, Overlay, until
from tests.harness.memory import Rss

PROMISE_S = 1.0
TRIES = 8  # the best one counts, because the attack keeps this machine busy too
PATIENCE_S = 2.0  # for each try
MEMORY_MIB = 100
IDLE_S = 4.0  # 2 s are promised, but this machine also has to clean up after the attackers

MIN_FILES = 1024  # the usual limit
LIMITS = {"A": f"ulimit -Sn {MIN_FILES}", "E": f"ulimit -n {MIN_FILES}"}


class FewDescriptors(Overlay):
    """A has a low soft limit of file descriptors, which it may raise; E has a low hard limit."""

    def _node(self, process_id: str) -> list[str]:
        limit = LIMITS.get(process_id)
        if limit is None or sys.platform == "win32":
            return super()._node(process_id)
        return ["sh", "-c", f'{limit}; exec "$0" "$@"', *super()._node(process_id)]


def raise_descriptor_limit(count: int) -> None:
    """Of this process, which plays all attackers."""
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < count:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(count, hard), hard))


class Target:
    """The overlay that is attacked. Used by one thread at a time."""

    def __init__(self, six: Overlay) -> None:
        self.six = six
        self._pids: dict[str, int] = {}
        self._streams: dict[str, int] = {}
        self.peaks: dict[str, float] = {}  # of each process in the last attack, MiB

    @contextlib.contextmanager
    def attacked(
        self, memory_mib: float = MEMORY_MIB, beyond: Mapping[str, float] | None = None
    ) -> Iterator[Strangers]:
        """Gives the attackers. When the block ends they are gone, and the costs are checked.

        memory_mib: what each process may use more than before, or more than `beyond`. Use `beyond`
        after bursts, because the allocator keeps freed memory.
        """
        self._begin()
        with Rss(self._pids) as memory, Strangers() as strangers:
            yield strangers
        self._wait_until_idle()
        self.peaks, usual = memory.peaks, beyond or memory.before
        growth = {i: peak - usual[i] for i, peak in self.peaks.items()}
        print("memory: " + ", ".join(f"{i} {mib:+.0f} MiB" for i, mib in growth.items()))
        assert {i: f"{mib:.0f} MiB" for i, mib in growth.items() if mib > memory_mib} == {}
        for process_id, pid in self._pids.items():
            assert self.six.metrics(process_id).pid == pid, f"{process_id} was restarted"

    def expect_restart(self, process_id: str) -> None:
        """The test has restarted it, so its new pid is the right one."""
        self._pids[process_id] = self.six.processes[process_id].pid

    def check_served(self, also: Sequence[str] = ()) -> None:
        """An honest client has its answers in time. also: names in OTHERS of further calls."""
        asks = {**USUAL, **{name: OTHERS[name] for name in also}}
        best = dict.fromkeys(asks, math.inf)
        why: dict[str, str] = {}
        with ThreadPoolExecutor(len(asks)) as pool:
            for number in range(TRIES):
                slow = [name for name in asks if best[name] > PROMISE_S]
                if not slow:
                    break
                time.sleep(0.1 * number)  # an immediate retry would be refused for the same reason
                for name, (took_s, error) in zip(
                    slow, pool.map(lambda n: _timed(asks[n], self.six), slow), strict=True
                ):
                    best[name] = min(best[name], took_s)
                    why[name] = error
        print("honest: " + ", ".join(f"{name} {s * 1e3:.0f} ms" for name, s in best.items()))
        late = {name: why[name] or f"{s:.2f} s" for name, s in best.items() if s > PROMISE_S}
        assert late == {}, f"no answer within {PROMISE_S:g} s: {late}"

    def _wait_until_idle(self) -> None:
        end = time.monotonic() + IDLE_S
        for process_id in IDS:
            left = max(0.1, end - time.monotonic())
            until(lambda p=process_id: self._is_idle(p), left, f"{process_id} idle")

    def _begin(self) -> None:
        raise_descriptor_limit(4 * MIN_FILES)
        try:
            self.six.settle(10)
            self.check_served()
        except (AssertionError, grpc.RpcError):  # a failed test has left it broken
            self.six.stop()
            self.six.start()
        found = {process_id: self.six.metrics(process_id) for process_id in IDS}
        self._pids = {process_id: m.pid for process_id, m in found.items()}
        self._streams = {process_id: m.streams for process_id, m in found.items()}

    def _is_idle(self, process_id: str) -> bool:
        try:
            m = self.six.stub(process_id).GetMetrics(pb2.MetricsRequest(), timeout=1)
        except grpc.RpcError:
            return False
        counts = [
            m.active_requests,
            m.queue_size,
            m.streamed_waiting,
            m.streamed_active,
            max(0, m.streams - self._streams[process_id]),
            *(n.outstanding for n in m.neighbours),
            *(h.active for h in m.handlers),
            m.received - m.completed - m.failed - m.refused - m.cancelled,
        ]
        return not any(counts) and all(n.state == "up" for n in m.neighbours)


# The calls of an honest client, each on a new connection. Each raises if it is not answered.


def _timed(ask: Callable[[Overlay], None], six: Overlay) -> tuple[float, str]:
    began = time.monotonic()
    try:
        ask(six)
    except Exception as e:  # noqa: BLE001 - any exception means no answer
        reason = e.details() if isinstance(e, grpc.RpcError) else e
        return math.inf, f"{type(e).__name__}: {reason}"
    return time.monotonic() - began, ""


def _any(six: Overlay) -> None:
    with overlay.connect(six.address("A"), patience_s=PATIENCE_S) as client:
        client.submit("echo", b"hi", timeout=PATIENCE_S).result(PATIENCE_S)


def _all(six: Overlay) -> None:
    with overlay.connect(six.address("A"), patience_s=PATIENCE_S) as client:
        answer = client.call(b"hi", handler="echo", timeout=PATIENCE_S)
        assert not answer.missing, f"{answer.coverage}, {answer.missing} did not answer"


def _unary(six: Overlay) -> None:
    with raw(six) as channel:
        request = pb2.Request(payload=b"hi", mode=pb2.ALL, handler="echo")
        answer = pb2_grpc.OverlayNodeStub(channel).Forward(request, timeout=PATIENCE_S)
        assert len(answer.parts) == 3


def _metrics(process_id: str) -> Callable[[Overlay], None]:
    def ask(six: Overlay) -> None:
        with raw(six, process_id) as channel:
            stub = pb2_grpc.OverlayNodeStub(channel)
            stub.GetMetrics(pb2.MetricsRequest(), timeout=PATIENCE_S)

    return ask


def _stream(six: Overlay) -> None:
    column = pb2.Column(items=[b"hi"])
    segment = pb2.Segment(number=1, count=1, payloads=column, mode=pb2.ANY, handler="echo")
    with raw(six) as channel:
        frames = iter([pb2.Frame(segments=[segment])])
        answers = pb2_grpc.OverlayNodeStub(channel).ForwardStream(frames, timeout=PATIENCE_S)
        assert any(s.results.items for answer in answers for s in answer.slices)


def _check(six: Overlay) -> None:
    with raw(six) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        stub.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)


def _watch(six: Overlay) -> None:
    with raw(six) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        next(stub.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S))


def _drain(six: Overlay) -> None:
    """A drain that is refused immediately."""
    with raw(six) as channel:
        stub = pb2_grpc.OverlayAdminStub(channel)
        try:
            stub.Drain(pb2.DrainRequest(grace_s=-1), timeout=PATIENCE_S)
        except grpc.RpcError as e:
            if e.code() is not grpc.StatusCode.INVALID_ARGUMENT:
                raise


def _logs(six: Overlay) -> None:
    with raw(six) as channel:
        stub = pb2_grpc.OverlayAdminStub(channel)
        stub.Logs(pb2.LogsRequest(lines=1), timeout=PATIENCE_S)


def _reflection(six: Overlay) -> None:
    with raw(six) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="*")
        next(stub.ServerReflectionInfo(iter([asked]), timeout=PATIENCE_S))


@contextlib.contextmanager
def raw(six: Overlay, process_id: str = "A") -> Iterator[grpc.Channel]:
    """A connection of its own."""
    unshared: list[tuple[str, Any]] = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(six.address(process_id), unshared) as channel:
        yield channel


USUAL: dict[str, Callable[[Overlay], None]] = {
    "any": _any,
    "all": _all,
    "unary": _unary,
    **{f"metrics of {process_id}": _metrics(process_id) for process_id in "ABE"},
}
OTHERS: dict[str, Callable[[Overlay], None]] = {
    "stream": _stream,
    "check": _check,
    "watch": _watch,
    "drain": _drain,
    "logs": _logs,
    "reflection": _reflection,
}
