"""The metrics of the process itself; each other owner of metrics fills in its own."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence

import overlay
from overlay.calls import metrics_codec
from overlay.model import clocks as time
from overlay.model.signatures import Function, digest, gathered
from overlay.model.topology import Process, Topology
from overlay.observability.resources import resources_of
from overlay.peers.peers import Peers, PeerState
from overlay.transport import codec
from overlay.transport.codec import pb2
from overlay.workers.executor import Executor


class ProcessMetrics:
    """The process `me`: its identity, its resources, its handlers, and what is below it."""

    def __init__(
        self, topology: Topology, me: Process, links: Peers, executor: Executor | None
    ) -> None:
        self._topology = topology
        self._me = me
        self._links = links
        self._executor = executor
        self._started = time.monotonic()

    def fill(self, response: pb2.MetricsResponse, with_functions: bool) -> None:
        """with_functions: describe the handlers' functions, here and below."""
        me, now = self._me, time.monotonic()
        states = self._links.states()
        slots = self._known_slots(states)
        functions = self._known_functions(states, slots)
        used = resources_of(self._executor.pids if self._executor else ())
        handlers = self._executor.counts() if self._executor else ()
        metrics_codec.fill(
            response,
            used,
            process_id=me.id,
            role=me.role,
            team=me.team,
            max_capacity=me.in_service,
            uptime_s=now - self._started,
            wall_time_s=time.time(),
            version=overlay.__version__,
            wire_format=codec.FORMAT,
            python=platform.python_version(),
            platform=f"{platform.system()}-{platform.machine()}",
            pid=os.getpid(),
            config_digest=self._topology.digest,
            slots=sum(max(known.values(), default=0) for known in slots.values()),
            neighbours=[metrics_codec.write_neighbour(state, now) for state in states],
            handlers=map(metrics_codec.write_handler, handlers),
            topology=self._processes(slots),
            functions=map(metrics_codec.write_function, functions if with_functions else ()),
            functions_digest=digest(functions),
        )

    def _known_slots(self, states: Sequence[PeerState]) -> dict[str, dict[str, int]]:
        if self._executor:
            return {self._me.id: self._executor.slots}
        known: dict[str, dict[str, int]] = {}
        for state in states:
            known.update({worker: dict(slots) for worker, slots in state.slots.items()})
        return known

    def _known_functions(
        self, states: Sequence[PeerState], slots: dict[str, dict[str, int]]
    ) -> tuple[Function, ...]:
        """The functions of configured handlers, at the workers that are up now."""
        if self._executor:
            mine = (self._me.id,)
            return gathered(f._replace(workers=mine) for f in self._executor.functions())
        reported = (f for state in states for f in state.functions)
        here = (f._replace(workers=tuple(w for w in f.workers if w in slots)) for f in reported)
        known = self._topology.handlers
        return gathered(f for f in here if f.workers and f.name in known)

    def _processes(self, slots: dict[str, dict[str, int]]) -> list[pb2.Process]:
        return [
            metrics_codec.copied(
                pb2.Process,
                process,
                handler=process.handler if process.works else "",
                slots=slots.get(process.id, {}),
            )
            for process in self._topology.processes.values()
        ]
