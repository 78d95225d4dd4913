"""The last lines of this process's log and of the logs below it.

There are two kinds of lines. The overlay's own are for every caller of GetMetrics, whose events are
the same lines. What a handler printed, logged or raised may quote a payload, so it is sent only if
the client and every process on the way are on this machine, where the log file can be read anyway.

A query goes down by rank, as requests do, and so never in a circle.
"""

from __future__ import annotations

from collections.abc import Callable

from overlay.calls import metrics_codec
from overlay.model.errors import BadRequest
from overlay.model.topology import Topology
from overlay.observability.log_buffer import LINES, LogBuffer
from overlay.peers.peers import Peers
from overlay.routing import planner
from overlay.transport import codec
from overlay.transport.codec import pb2

MAX_BYTES = 512 * 1024  # of one answer; the smallest max_message_mib is 1


class LogReader:
    """Thread-safe; `read` may wait for other processes. dropped: counts lines not written."""

    def __init__(
        self,
        topology: Topology,
        me: str,
        log_buffer: LogBuffer,
        links: Peers,
        dropped: Callable[[], int] = lambda: 0,
    ) -> None:
        self._topology = topology
        self._me = me
        self._log_buffer = log_buffer
        self._links = links
        self._dropped = dropped

    def fill(self, response: pb2.MetricsResponse, events: int) -> None:
        """Adds the last `events` events."""
        response.events.extend(map(metrics_codec.write_event, self._log_buffer.events(events)))
        response.log_lines_dropped = self._dropped()

    def read(self, request: pb2.LogsRequest, is_local: bool, timeout_s: float) -> pb2.LogsResponse:
        """The lines asked for. is_local: the query comes from this machine.

        Raises UnknownName, Unreachable, BadRequest and other OverlayErrors.
        """
        public_only = request.public_only or not is_local
        if len(request.error_id) > codec.LONGEST_ERROR_ID:
            raise BadRequest(f"error_id: more than {codec.LONGEST_ERROR_ID} characters")
        if request.process_id in ("", self._me):
            return self._own(request, public_only)
        limits = self._topology.limits
        hops = codec.read_hops(request.hops, limits)
        up, target = self._links.up(), request.process_id
        neighbour = planner.next_hop(self._topology, self._me, up, target, hops)
        onward = pb2.LogsRequest(
            process_id=target,
            lines=request.lines,
            request_id=request.request_id,
            hops=(*hops, self._me),
            public_only=public_only,
            error_id=request.error_id,
        )
        return self._links.logs(neighbour, onward, timeout_s)

    def _own(self, request: pb2.LogsRequest, public_only: bool) -> pb2.LogsResponse:
        most = min(request.lines or codec.MIN_LINES, LINES)
        found = self._log_buffer.lines(most, request.request_id, request.error_id)
        lines = [codec.write_line(line, public_only) for line in found]
        size, first = 0, len(lines)
        while first and size < MAX_BYTES:
            first -= 1
            size += lines[first].ByteSize()
        return pb2.LogsResponse(process_id=self._me, lines=lines[first:], dropped=self._dropped())
