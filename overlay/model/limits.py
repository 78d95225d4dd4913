"""The limits of one process: those that the configuration sets, and those that modules share.

A limit that only one module enforces is a constant at the top of that module.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1024 * 1024


@dataclass(frozen=True)
class Limits:
    """Counts are requests, times are seconds, sizes are bytes. The configuration can change the
    first group; these are its defaults."""

    queue_slots: int = 200  # the leader's queue; more hide overload, fewer refuse short bursts
    # In one process at a time, divided among callers by queueing.shares.PlaceShares; also the queue
    # size of every process but the leader.
    in_service: int = 100
    default_deadline_s: float = 30.0  # when a client gives none, so that every wait ends
    max_deadline_s: float = 3600  # a longer deadline is cut to this
    drain_grace_s: float = 30  # for running requests to finish when a process stops
    max_message_bytes: int = 16 * MIB  # of a body; gRPC parses it on its only serving thread
    max_waiting_bytes: int = 256 * MIB  # payloads in the queue; 200 slots x 16 MiB would be 3 GiB
    key_window_s: float = 600  # how long an answer is kept for its idempotency key
    kept_bytes: int = 128 * MIB  # of answers kept for keys; beyond it new keys are refused
    max_jobs: int = 1_000_000  # in the journal, whatever their state; beyond it they are refused
    journal_bytes: int = 1024 * MIB  # of their payloads and answers
    keep_jobs_s: float = 86_400  # how long a job that has ended is kept

    # RPC threads beyond queue and service, to refuse requests while both are full
    reserve_threads: int = 40
    metrics_threads: int = 4  # GetMetrics and health checks have their own threads
    max_hops: int = 64  # no valid overlay produces a longer hop list
    max_targets: int = 10_000  # workers below one team leader
    max_name: int = 64  # characters of an id, team or handler in a request
    # Reserved for the return path, so that a late worker costs only its own part.
    return_margin_s: float = 0.05
    patience_s: float = 1.0  # how long a request waits for a link that has just gone down
    restart_s: float = 2.5  # the same after an orderly stop: long enough for a restart
    probe_interval_s: float = 1.0  # between two probes of a neighbour
    probe_timeout_s: float = 2.0  # no answer means down; a frozen peer is noticed within 3 s
    segment_rows: int = 4096  # requests in one segment of a stream
    window_rows: int = 4096  # unanswered requests of a stream; beyond them it is not read
    window_bytes: int = 64 * MIB  # the same in bytes of payloads and results
    streams: int = 1024  # open at once; an idle one holds no thread and about 40 KiB
    stream_threads: int = 64  # read and write streams, each for one frame at a time
    # Answers that clients have not read: of all streams together, and as much again of calls.
    # Each byte is in memory two or three times.
    unread_bytes: int = 32 * MIB
    # Per stream, not counted in the above, so that small requests share no counter: 8 MiB in all.
    uncounted_bytes: int = 8 * 1024
    # Chunks sent ahead to clients that have read none yet, of all streams together. The library
    # takes half a MiB of each part in advance.
    ahead_bytes: int = 16 * MIB
    unarrived_calls: int = 2000  # calls whose message has not arrived; about 10 KiB each
    resting_calls: int = 256  # open calls of health's Watch and of reflection
    calls_of_a_connection: int = 512  # at once; further ones wait in the client
    handshake_s: float = 5.0  # for a new connection to speak HTTP/2
    join_rows: int = 256  # requests of small segments that a link joins into one
    few_rows: int = 8  # a segment with at most this many is small
    gather_rows: int = 64  # requests gathered while a link is busy; beyond that they leave at once
    gather_s: float = 0.005  # how long they are gathered, if no answer arrives first
    frame_bytes: int = MIB  # approximately; a larger frame would hold up those behind it
    chunk_bytes: int = 128 * 1024  # of a result that is sent in chunks; a few fit into a frame
    chunks_ahead: int = 64  # that a client may request before it has read any
    small_bytes: int = 16 * 1024  # larger bodies use a link's second stream
    keys: int = 200_000  # idempotency keys remembered; 340 bytes each, besides the answer
    key_waiters: int = 1000  # calls that wait for a key's first answer; they hold no thread
    waiters_of_key: int = 100  # the same, for one key
    max_key: int = 256  # characters of an idempotency key
    own_ids: int = 100_000  # random request ids that a worker remembers, the latest; 10 MiB
    id_window_s: float = 60.0  # how long a caller's own id is remembered, at least to its deadline
    chosen_ids: int = 300_000  # callers' own ids remembered, or runs of up to 256; 150 bytes each
    min_message_limit: int = MIB  # the range of max_message_mib, also in a neighbour's metadata
    max_message_limit: int = 1024 * MIB
    max_text: int = 16_384  # characters of a text from another process, such as an escaped log line
    max_reported_slots: int = (
        1_000_000  # of one handler on one worker, as another process reports it
    )
    function_schema: int = 16_000  # characters of a JSON Schema; a longer one is left out
    # Of all functions that a process reports: fits into the smallest message limit in any alphabet.
    # Beyond it only names are reported.
    functions_characters: int = MIB // 4
    wrong_s: float = 1.0  # until a peer that answered wrongly is asked again; then twice as long,
    most_wrong_s: float = 30.0  # and so on up to this
    lease_s: float = 1.0  # how long a lease of a worker lasts, if it is not renewed
    leases: int = 10_000  # that a process has lent, passed on or holds; about 1 KiB each
    frame_cancels: int = 2_000  # and grants, in one frame: 180 KB with the longest names

    def pool_threads(self, queue_slots: int) -> int:
        """RPC threads for a process with this queue: each waiting request holds one."""
        return queue_slots + self.in_service + self.reserve_threads
