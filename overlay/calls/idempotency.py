"""Idempotency keys: the first request with a key runs, later ones get the same outcome.

    enter --> First     the key is new: run the request, then report its outcome
          --> Waiter    the first request is still running: `on_done` gets its outcome
          --> Outcome   the first request's outcome: its answer, or the error to raise

A key belongs to its caller, by address and name: no other caller can use, probe or spoil it. It is
kept from its first request until `key_window_s` after its answer, never less. So when there is no
room, a new key is refused, and its request has not run. Room is shared by address: no address may
hold more than is left free for the others.

Owns no thread. The holder of a Waiter ends it when its deadline passes or its caller leaves.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from overlay.model import clocks as time
from overlay.model.errors import (
    AnswerNotKept,
    BadRequest,
    CallCancelled,
    DeadlinePassed,
    KeyBusy,
    KeysFull,
    OverlayError,
)
from overlay.model.limits import Limits
from overlay.model.segments import Caller, Code, Executed
from overlay.transport.codec import pb2

Outcome = bytes | OverlayError
"""The answer, or the error to raise; each receiver gets its own error object."""

ERROR_BYTES = 600  # a kept error, besides its text
MIN_RETRY_S = 0.05
UNKNOWN_RETRY_S = 1.0  # while no key has an answer yet, so that no better time is known


class IdempotencyKeys:
    """Thread-safe. `enter` takes constant time, however many keys there are."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._lock = threading.Lock()
        # So that no caller can construct two names with one digest.
        self._secret = secrets.token_bytes(16)
        self._entries: dict[bytes, _Entry] = {}
        self._answered: deque[bytes] = deque()  # names, in the order in which they expire
        self._waiters: dict[bytes, dict[Waiter, None]] = {}  # of keys with waiting requests
        self._shares: dict[str, _Share] = {}  # of addresses with keys
        self._bytes = 0
        self._waiting = 0

    def fill(self, response: pb2.MetricsResponse) -> None:
        response.keys, response.key_bytes = self.kept, self.kept_bytes
        response.key_waiters = self.waiting

    @property
    def kept(self) -> int:
        """The number of keys held."""
        with self._lock:
            self._forget_locked(self._clock())
            return len(self._entries)

    @property
    def kept_bytes(self) -> int:
        """Bytes of the kept answers."""
        with self._lock:
            self._forget_locked(self._clock())
            return self._bytes

    @property
    def waiting(self) -> int:
        """Requests that wait for the first one with their key."""
        return self._waiting

    def enter(
        self, caller: Caller, key: str, question: Sequence[bytes]
    ) -> First | Waiter | Outcome:
        """Whether the request runs as the first with its key, waits, or has an outcome already.

        question: everything that distinguishes one request from another. Raises BadRequest when
        the key was used for another question, KeysFull when there is no room for a new key, which
        proves that the request has not run, and KeyBusy when too many wait already.
        """
        address, caller_name = caller
        identity = f"{len(address)} {len(caller_name)} {address}{caller_name}{key}"
        name = self._digest([identity.encode("utf-8", "surrogatepass")])
        digest = self._digest(question)
        with self._lock:
            now = self._clock()
            self._forget_locked(now)
            entry = self._entries.get(name)
            if entry is None:
                return self._first_locked(name, digest, address, now)
            if entry.question != digest:
                raise BadRequest(f"idempotency_key: '{key}' was used for another request")
            kept = entry.kept
            if kept is None:
                return self._waiter_locked(name, entry.share)
        return _copy(self._not_kept(kept) if isinstance(kept, _NotKept) else kept)

    def _digest(self, parts: Sequence[bytes]) -> bytes:
        hashed = hashlib.blake2b(key=self._secret, digest_size=16)
        for part in parts:
            hashed.update(part)
        return hashed.digest()

    def _first_locked(self, name: bytes, digest: bytes, address: str, now: float) -> First:
        share = self._shares.get(address) or _Share(address)
        self._check_room_locked(share, now)
        self._shares[address] = share
        share.keys += 1
        entry = self._entries[name] = _Entry(digest, share)
        return First(self, name, entry)

    def _check_room_locked(self, share: _Share, now: float) -> None:
        limits = self._limits
        free = limits.keys - len(self._entries)
        free_bytes = limits.kept_bytes - self._bytes
        if share.keys >= free:
            holds, what = f"{share.keys:,} of {limits.keys:,} idempotency keys", f"{free:,}"
            remedy = "a shorter key_window_s"
        elif share.bytes >= free_bytes:
            holds = f"{share.bytes:,} of {limits.kept_bytes:,} bytes of answers kept for their keys"
            what, remedy = f"{max(0, free_bytes):,}", "a larger max_kept_mib"
        else:
            return
        first = self._entries[self._answered[0]].until if self._answered else now + UNKNOWN_RETRY_S
        retry_after_s = max(MIN_RETRY_S, first - now)
        raise KeysFull(
            f"{share.address} has {holds}, and the {what} that are left are kept for others; each "
            f"is kept for {limits.key_window_s:g} s: try again in {retry_after_s:.1f} s, send the "
            f"request without a key, or configure {remedy}",
            retry_after_s=retry_after_s,
        )

    def _waiter_locked(self, name: bytes, share: _Share) -> Waiter:
        limits = self._limits
        waiters = self._waiters.get(name, {})
        free = limits.key_waiters - self._waiting
        if len(waiters) >= limits.waiters_of_key or share.waiting >= free:
            raise KeyBusy(
                f"{len(waiters):,} of {limits.waiters_of_key:,} wait for the answer to this "
                f"idempotency key; for any, {self._waiting:,} of {limits.key_waiters:,} wait, from "
                f"{share.address} {share.waiting:,}",
                retry_after_s=UNKNOWN_RETRY_S,
            )
        waiter = Waiter(self, name)
        self._waiters.setdefault(name, waiters)[waiter] = None
        share.waiting += 1
        self._waiting += 1
        return waiter

    def _end(self, name: bytes, entry: _Entry, outcome: Outcome) -> None:
        """Keeps the first request's outcome and passes it to those that wait."""
        mine = _copy(outcome)
        with self._lock:
            if entry.kept is not None or self._entries.get(name) is not entry:
                return  # reported before
            if isinstance(outcome, OverlayError) and outcome.executed is Executed.NO:
                self._drop_locked(name, entry)  # nothing ran: the next request may
            else:
                self._keep_locked(name, entry, mine)
            waiters = self._waiters.pop(name, {})
            entry.share.waiting -= len(waiters)
            self._waiting -= len(waiters)
            callbacks = [callback for w in waiters if (callback := w._done_locked(mine))]
        for callback in callbacks:
            callback(_copy(mine))

    def _keep_locked(self, name: bytes, entry: _Entry, outcome: Outcome) -> None:
        size, share = _size(outcome), entry.share
        free = self._limits.kept_bytes - self._bytes
        # One answer may take an address beyond its share; further ones may not.
        if size <= free and share.bytes < free:
            entry.kept = outcome
            share.bytes += size
            self._bytes += size
        else:
            entry.kept = _NotKept(size, isinstance(outcome, bytes))
        entry.until = self._clock() + self._limits.key_window_s
        self._answered.append(name)

    def _leave(self, waiter: Waiter, name: bytes, error: OverlayError) -> None:
        with self._lock:
            waiters = self._waiters.get(name, {})
            if waiter not in waiters:
                return
            del waiters[waiter]
            if not waiters:
                del self._waiters[name]
            self._entries[name].share.waiting -= 1
            self._waiting -= 1
            callback = waiter._done_locked(error)
        if callback is not None:
            callback(error)

    def _forget_locked(self, now: float) -> None:
        while self._answered:
            name = self._answered[0]
            entry = self._entries[name]
            if entry.until > now:
                return
            self._answered.popleft()
            self._drop_locked(name, entry)

    def _drop_locked(self, name: bytes, entry: _Entry) -> None:
        del self._entries[name]
        size, share = _size(entry.kept), entry.share
        self._bytes -= size
        share.bytes -= size
        share.keys -= 1
        if not share.keys:
            del self._shares[share.address]

    def _not_kept(self, missing: _NotKept) -> AnswerNotKept:
        what = "ran; its answer" if missing.ran else "may have run; its error"
        error = AnswerNotKept(
            f"the request with this idempotency key {what} of {missing.size:,} bytes could not be "
            f"kept: all kept answers together may take {self._limits.kept_bytes:,} (max_kept_mib)"
        )
        error.executed = Executed.YES if missing.ran else Executed.UNKNOWN
        return error


class First:
    """The request that runs. Its outcome must be reported; only the first report counts."""

    __slots__ = ("_entry", "_keys", "_name")

    def __init__(self, keys: IdempotencyKeys, name: bytes, entry: _Entry) -> None:
        self._keys = keys
        self._name = name
        self._entry = entry

    def answered(self, answer: bytes) -> None:
        self._keys._end(self._name, self._entry, answer)

    def failed(self, error: OverlayError) -> None:
        """An error that proves that nothing ran is not kept: the next request runs."""
        self._keys._end(self._name, self._entry, error)


class Waiter:
    """Waits for the first request, its own deadline or the end of its call, whichever comes first.

    To wait without a thread, in an RPC that can be answered later:

        deadlines.watch(waiter, deadline)       # whose expiry calls waiter.end(DEADLINE_EXCEEDED)
        context.add_callback(waiter.cancel)     # the caller has left
        waiter.on_done(answer_the_rpc)          # takes the Outcome
    """

    __slots__ = ("_callback", "_keys", "_name", "_outcome")

    def __init__(self, keys: IdempotencyKeys, name: bytes) -> None:
        self._keys = keys
        self._name = name
        self._callback: Callable[[Outcome], None] | None = None
        self._outcome: Outcome | None = None

    def on_done(self, callback: Callable[[Outcome], None]) -> None:
        """Calls `callback` once with the outcome, now or later, on any thread. It must be quick."""
        with self._keys._lock:
            outcome = self._outcome
            if outcome is None:
                self._callback = callback
                return
        callback(_copy(outcome))

    def end(self, code: Code) -> None:
        """Its deadline has passed or its caller has left. Does nothing once it has an outcome."""
        if code is Code.CANCELLED:
            error: OverlayError = CallCancelled("the caller left")
        else:
            error = DeadlinePassed("the first request with this key has no answer yet")
        self._keys._leave(self, self._name, error)

    def cancel(self) -> None:
        self.end(Code.CANCELLED)

    def _done_locked(self, outcome: Outcome) -> Callable[[Outcome], None] | None:
        """The callback to call, if one is set already."""
        callback, self._callback, self._outcome = self._callback, None, outcome
        return callback


class _NotKept(NamedTuple):
    """Stands for an outcome that there was no room to keep. ran: it was an answer."""

    size: int
    ran: bool


class _Entry:
    """What is kept for a key. Lean, as there may be hundreds of thousands."""

    __slots__ = ("kept", "question", "share", "until")

    def __init__(self, question: bytes, share: _Share) -> None:
        self.question = question
        self.share = share
        self.kept: Outcome | _NotKept | None = None  # None until it is answered
        self.until = 0.0  # when it expires, once it is answered


class _Share:
    """What one address holds."""

    __slots__ = ("address", "bytes", "keys", "waiting")

    def __init__(self, address: str) -> None:
        self.address = address
        self.keys = 0
        self.bytes = 0
        self.waiting = 0


def _size(kept: Outcome | _NotKept | None) -> int:
    if isinstance(kept, bytes):
        return len(kept)
    return ERROR_BYTES + 2 * len(str(kept)) if isinstance(kept, OverlayError) else 0


def _copy(outcome: Outcome) -> Outcome:
    """A copy; an error loses its traceback, whose frames keep requests alive."""
    if isinstance(outcome, bytes):
        return outcome
    copy = type(outcome).__new__(type(outcome), *outcome.args)
    copy.__dict__.update(outcome.__dict__)
    return copy
