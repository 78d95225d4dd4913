"""How much one process takes on. Every number that bounds something lives here, with its reason."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1024 * 1024

# Of the page and of what Prometheus reads. A browser has six connections, and 32 pages one more.
DOOR_CONNECTIONS = 64  # at once; one more ends an idle one
DOOR_IDLE_S = 5.0  # a connection on which nothing is asked is closed after so long


@dataclass(frozen=True)
class Limits:
    """Counts are requests, times seconds, sizes bytes. The configuration sets the first group."""

    queue_slots: int = 200  # the leader's queue; more hides overload, less refuses bursts
    # At once per process, shared out as queueing.shares.PlaceShares has it; also the size of the
    # other processes' queues.
    in_service: int = 100
    default_deadline_s: float = 30.0  # when a client gives none, so that every wait has an end
    max_deadline_s: float = 3600.0  # a longer wish is cut to this
    drain_grace_s: float = 30.0  # running requests may finish within this when a process stops
    max_message_bytes: int = 16 * MIB  # per gRPC message; parsing is on gRPC's one serving thread
    max_waiting_bytes: int = 256 * MIB  # payloads in the queue: 200 slots x 16 MiB would be 3 GiB
    key_window_s: float = 600.0  # an answer is kept for its idempotency key for so long
    kept_bytes: int = 128 * MIB  # answers kept for their keys; more are refused, none is dropped

    reserve_threads: int = (
        40  # rpc threads beyond queue and service, that refuse while both are full
    )
    metrics_threads: int = 4  # GetMetrics and health answer on threads of their own
    max_hops: int = 64  # a longer hop list is not from an overlay
    max_targets: int = 10_000  # workers below one team leader
    max_name: int = 64  # characters in an id, team or handler of a request
    return_margin_s: float = (
        0.05  # kept for the way back, so that a late worker costs only its part
    )
    patience_s: float = 1.0  # a link that has just gone down is waited for so long
    restart_s: float = 2.5  # one whose neighbour stopped in order: a restart takes no longer
    probe_interval_s: float = 1.0  # between two looks at a neighbour
    probe_timeout_s: float = 2.0  # no answer for so long: down. A frozen peer is seen within 3 s
    segment_rows: int = 4096  # requests in one segment of a stream
    window_rows: int = 4096  # requests of a stream that may be unanswered; then it is not read
    window_bytes: int = 64 * MIB  # the same in payload and result bytes
    streams: int = 1024  # at once per process; an idle one holds no thread and about 40 KiB
    stream_threads: int = 64  # that read and write them; each is held for no longer than a frame
    unread_bytes: int = 32 * MIB  # of answers that clients do not read: of all streams together,
    # and as much of single calls; each byte is there two or three times
    uncounted_bytes: int = 8 * 1024  # of a stream's, so that small requests touch nothing that is
    # shared; 8 MiB of all streams
    ahead_bytes: int = 16 * MIB  # of chunks that clients may be sent before they have read any, of
    # all streams together; the library takes half a MiB of each part so
    unarrived_calls: int = 2000  # whose message has not come; about 10 KiB each
    resting_calls: int = 256  # of health's Watch, and of reflection, that stay open
    calls_of_a_connection: int = 512  # at once; more wait at the client
    handshake_s: float = 5.0  # until a connection has said that it speaks HTTP/2
    join_rows: int = 256  # requests of small segments that a link joins to one
    few_rows: int = 8  # what a small segment has at most
    gather_rows: int = 64  # requests that gather behind a busy link; more leave at once
    gather_s: float = 0.005  # and the time for which they do, if no answer comes before
    frame_bytes: int = MIB  # about; a larger frame would hold up those behind it
    chunk_bytes: int = 128 * 1024  # of a result that comes in chunks; a few fit into a frame
    chunks_ahead: int = 64  # that a client may take before it has read any
    small_bytes: int = 16 * 1024  # larger bodies take a link's second stream
    keys: int = 200_000  # idempotency keys that are remembered; 340 bytes each besides the answer
    key_waiters: int = 1000  # who may wait for a key's first answer; a call each, and no thread
    waiters_of_key: int = 100  # and for that of one key
    max_key: int = 256  # characters of an idempotency key
    own_ids: int = 100_000  # the overlay's own request ids that a worker keeps, the latest; 10 MiB
    id_window_s: float = 60.0  # one that a caller chose is kept so long, or until its deadline
    chosen_ids: int = 300_000  # of those that are kept, or runs of up to 256; 150 bytes each
    least_message_bytes: int = MIB  # what max_message_mib may be, and so what a neighbour may say
    most_message_bytes: int = 1024 * MIB
    max_text: int = 16_384  # characters of a text that another tells: a log's line, escaped
    max_told_slots: int = 1_000_000  # of one handler on one worker, as another tells
    function_schema: int = (
        16_000  # characters of a function's JSON Schema; a longer one is not told
    )
    functions_characters: int = MIB // 4  # of all that a process tells of functions, which fits
    # into the least message in any alphabet; of more than that, only names
    wrong_s: float = 1.0  # one that speaks wrongly is asked again after so long, then after twice
    most_wrong_s: float = 30.0  # as much, and so on up to this
    frame_cancels: int = 2_000  # and grants, in one frame: 180 KB, where all names are longest

    def pool_threads(self, queue_slots: int) -> int:
        """Rpc threads for a process with such a queue: each waiting request holds one."""
        return queue_slots + self.in_service + self.reserve_threads
