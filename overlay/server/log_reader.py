"""The last lines of this process's log, and of the logs below it.

There are two kinds of text. What the overlay itself says is for everyone who may call GetMetrics,
whose events are the same lines. What a handler printed, logged or raised may quote a payload: it is
given only where the client, and every process on the way, is on this machine, where the log file
can be read anyway.

The question goes down by rank, as requests do, and so never in a circle.
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
    """Safe from any thread; `read` may wait for other processes. dropped: lines that no log got."""

    def __init__(
        self,
        topology: Topology,
        me: str,
        recent: LogBuffer,
        links: Peers,
        dropped: Callable[[], int] = lambda: 0,
    ) -> None:
        self._topology = topology
        self._me = me
        self._recent = recent
        self._links = links
        self._dropped = dropped

    def fill(self, made: pb2.MetricsResponse, events: int) -> None:
        """With so many of the last events."""
        made.events.extend(map(metrics_codec.write_event, self._recent.events(events)))
        made.log_lines_dropped = self._dropped()

    def read(self, asked: pb2.LogsRequest, is_near: bool, timeout_s: float) -> pb2.LogsResponse:
        """The lines asked for. is_near: the question comes from this machine.

        Raises OverlayError: no such process, none of those below, not reached in time; BadRequest.
        """
        public_only = asked.public_only or not is_near
        if len(asked.error_id) > codec.LONGEST_ERROR_ID:
            raise BadRequest(f"error_id: more than {codec.LONGEST_ERROR_ID} characters")
        if asked.process_id in ("", self._me):
            return self._own(asked, public_only)
        limits = self._topology.limits
        hops = codec.read_hops(asked.hops, limits)
        up, target = self._links.up(), asked.process_id
        neighbour = planner.next_hop(self._topology, self._me, up, target, hops)
        onward = pb2.LogsRequest(
            process_id=target,
            lines=asked.lines,
            request_id=asked.request_id,
            hops=(*hops, self._me),
            public_only=public_only,
            error_id=asked.error_id,
        )
        return self._links.logs(neighbour, onward, timeout_s)

    def _own(self, asked: pb2.LogsRequest, public_only: bool) -> pb2.LogsResponse:
        most = min(asked.lines or codec.MIN_LINES, LINES)
        found = self._recent.lines(most, asked.request_id, asked.error_id)
        said = [codec.write_line(line, public_only) for line in found]
        size, first = 0, len(said)
        while first and size < MAX_BYTES:
            first -= 1
            size += said[first].ByteSize()
        return pb2.LogsResponse(process_id=self._me, lines=said[first:], dropped=self._dropped())
