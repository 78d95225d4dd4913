"""What was asked under an idempotency key: the first asks, those after it get the same outcome.

    enter --> First     the key is new: ask, then report the outcome to it
          --> Waiter    the first has no answer yet: `on_done` gets it, and no thread waits
          --> Outcome   the first one's outcome: its answer, or the error to raise

A key belongs to its caller, by address and name: other callers cannot use it, probe it or spoil it.
It is remembered from its first request until `key_window_s` after its answer, never less. So where
there is no room, the new key is refused and its request has not run. Room is shared by address: no
address has more than is left free for others.

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
"""The answer, or the error to raise; each receiver gets an error object of its own."""

ERROR_BYTES = 600  # that a kept error takes besides its text
LEAST_RETRY_S = 0.05
UNKNOWN_RETRY_S = 1.0  # while no key is answered yet, so that no better time is known


class IdempotencyKeys:
    """Safe from any thread. Each `enter` takes the same time, however many keys there are."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._lock = threading.Lock()
        self._secret = secrets.token_bytes(
            16
        )  # so that no caller can construct two names with one digest
        self._asked: dict[bytes, _Asked] = {}
        self._answered: deque[bytes] = deque()  # their names, the first one to forget in front
        self._waiters: dict[bytes, dict[Waiter, None]] = {}  # of keys with requests that wait
        self._shares: dict[str, _Share] = {}  # of addresses that have keys
        self._bytes = 0
        self._waiting = 0

    def fill(self, made: pb2.MetricsResponse) -> None:
        made.keys, made.key_bytes, made.key_waiters = self.kept, self.kept_bytes, self.waiting

    @property
    def kept(self) -> int:
        """Keys that are remembered."""
        with self._lock:
            self._forget_locked(self._clock())
            return len(self._asked)

    @property
    def kept_bytes(self) -> int:
        """Of the answers that are kept."""
        with self._lock:
            self._forget_locked(self._clock())
            return self._bytes

    @property
    def waiting(self) -> int:
        """Requests that wait for the first one of their key."""
        return self._waiting

    def enter(
        self, caller: Caller, key: str, question: Sequence[bytes]
    ) -> First | Waiter | Outcome:
        """What a request with this key is: the first, one that waits, or one with a known outcome.

        question: everything that distinguishes one request from another. Raises BadRequest when
        the key stands for another question, KeysFull when there is no room for a new key, which
        proves that it has not run, and KeyBusy when too many wait already.
        """
        address, name = caller
        whose = f"{len(address)} {len(name)} {address}{name}{key}"
        named = self._digest([whose.encode("utf-8", "surrogatepass")])
        digest = self._digest(question)
        with self._lock:
            now = self._clock()
            self._forget_locked(now)
            asked = self._asked.get(named)
            if asked is None:
                return self._first_locked(named, digest, address, now)
            if asked.question != digest:
                raise BadRequest(f"idempotency_key: '{key}' was used for another request")
            kept = asked.kept
            if kept is None:
                return self._waiter_locked(named, asked.share)
        return _own(self._lost(kept) if isinstance(kept, _Lost) else kept)

    def _digest(self, parts: Sequence[bytes]) -> bytes:
        made = hashlib.blake2b(key=self._secret, digest_size=16)
        for part in parts:
            made.update(part)
        return made.digest()

    def _first_locked(self, named: bytes, digest: bytes, address: str, now: float) -> First:
        share = self._shares.get(address) or _Share(address)
        self._check_room_locked(share, now)
        self._shares[address] = share
        share.keys += 1
        asked = self._asked[named] = _Asked(digest, share)
        return First(self, named, asked)

    def _check_room_locked(self, share: _Share, now: float) -> None:
        limits = self._limits
        free = limits.keys - len(self._asked)
        free_bytes = limits.kept_bytes - self._bytes
        if share.keys >= free:
            holds, what = f"{share.keys:,} of {limits.keys:,} idempotency keys", f"{free:,}"
            remedy = "a shorter key_window_s"
        elif share.bytes >= free_bytes:
            holds = f"{share.bytes:,} of {limits.kept_bytes:,} bytes of answers kept for their keys"
            what, remedy = f"{max(0, free_bytes):,}", "a larger max_kept_mib"
        else:
            return
        first = self._asked[self._answered[0]].until if self._answered else now + UNKNOWN_RETRY_S
        again_s = max(LEAST_RETRY_S, first - now)
        raise KeysFull(
            f"{share.address} has {holds}, and the {what} that are left are kept for others; each "
            f"is kept for {limits.key_window_s:g} s: come again in {again_s:.1f} s, ask without a "
            f"key, or configure {remedy}",
            retry_after_s=again_s,
        )

    def _waiter_locked(self, named: bytes, share: _Share) -> Waiter:
        limits = self._limits
        waiters = self._waiters.get(named, {})
        free = limits.key_waiters - self._waiting
        if len(waiters) >= limits.waiters_of_key or share.waiting >= free:
            raise KeyBusy(
                f"{len(waiters):,} of {limits.waiters_of_key:,} wait for the answer to this "
                f"idempotency key; for any, {self._waiting:,} of {limits.key_waiters:,} wait, from "
                f"{share.address} {share.waiting:,}",
                retry_after_s=UNKNOWN_RETRY_S,
            )
        waiter = Waiter(self, named)
        self._waiters.setdefault(named, waiters)[waiter] = None
        share.waiting += 1
        self._waiting += 1
        return waiter

    def _end(self, named: bytes, asked: _Asked, outcome: Outcome) -> None:
        """The first one has its outcome, and so have the ones that wait."""
        mine = _own(outcome)
        with self._lock:
            if asked.kept is not None or self._asked.get(named) is not asked:
                return  # it was reported before
            if isinstance(outcome, OverlayError) and outcome.executed is Executed.NO:
                self._drop_locked(named, asked)  # nothing ran: the next one may ask again
            else:
                self._keep_locked(named, asked, mine)
            waiters = self._waiters.pop(named, {})
            asked.share.waiting -= len(waiters)
            self._waiting -= len(waiters)
            callbacks = [callback for w in waiters if (callback := w._done_locked(mine))]
        for callback in callbacks:
            callback(_own(mine))

    def _keep_locked(self, named: bytes, asked: _Asked, outcome: Outcome) -> None:
        size, share = _size(outcome), asked.share
        free = self._limits.kept_bytes - self._bytes
        # By one answer, an address may have more than its share; with all under way, it may not.
        if size <= free and share.bytes < free:
            asked.kept = outcome
            share.bytes += size
            self._bytes += size
        else:
            asked.kept = _Lost(size, isinstance(outcome, bytes))
        asked.until = self._clock() + self._limits.key_window_s
        self._answered.append(named)

    def _leave(self, waiter: Waiter, named: bytes, error: OverlayError) -> None:
        with self._lock:
            waiters = self._waiters.get(named, {})
            if waiter not in waiters:
                return
            del waiters[waiter]
            if not waiters:
                del self._waiters[named]
            self._asked[named].share.waiting -= 1
            self._waiting -= 1
            callback = waiter._done_locked(error)
        if callback is not None:
            callback(error)

    def _forget_locked(self, now: float) -> None:
        while self._answered:
            named = self._answered[0]
            asked = self._asked[named]
            if asked.until > now:
                return
            self._answered.popleft()
            self._drop_locked(named, asked)

    def _drop_locked(self, named: bytes, asked: _Asked) -> None:
        del self._asked[named]
        size, share = _size(asked.kept), asked.share
        self._bytes -= size
        share.bytes -= size
        share.keys -= 1
        if not share.keys:
            del self._shares[share.address]

    def _lost(self, lost: _Lost) -> AnswerNotKept:
        what = "ran; its answer" if lost.ran else "may have run; what came of it,"
        error = AnswerNotKept(
            f"the request of this idempotency key {what} of {lost.size:,} bytes could not be kept: "
            f"all that are kept together may have {self._limits.kept_bytes:,} (max_kept_mib)"
        )
        error.executed = Executed.YES if lost.ran else Executed.UNKNOWN
        return error


class First:
    """The one that asks. It must report its outcome, whatever that is; the first report counts."""

    __slots__ = ("_asked", "_keys", "_named")

    def __init__(self, keys: IdempotencyKeys, named: bytes, asked: _Asked) -> None:
        self._keys = keys
        self._named = named
        self._asked = asked

    def answered(self, answer: bytes) -> None:
        self._keys._end(self._named, self._asked, answer)

    def failed(self, error: OverlayError) -> None:
        """An error that proves that nothing ran is not kept: the next one asks again."""
        self._keys._end(self._named, self._asked, error)


class Waiter:
    """Waits for the first one; ends once: with it, at its own deadline, or when its caller leaves.

    To wait for it without a thread, from an rpc that can be answered later:

        deadlines.watch(waiter, deadline)       # whose expiry calls waiter.end(DEADLINE_EXCEEDED)
        context.add_callback(waiter.cancel)     # the caller has left
        waiter.on_done(answer_the_rpc)          # takes the Outcome
    """

    __slots__ = ("_callback", "_keys", "_named", "_outcome")

    def __init__(self, keys: IdempotencyKeys, named: bytes) -> None:
        self._keys = keys
        self._named = named
        self._callback: Callable[[Outcome], None] | None = None
        self._outcome: Outcome | None = None

    def on_done(self, callback: Callable[[Outcome], None]) -> None:
        """Calls it once with the outcome, at once or later on any thread; it must be quick."""
        with self._keys._lock:
            outcome = self._outcome
            if outcome is None:
                self._callback = callback
                return
        callback(_own(outcome))

    def end(self, code: Code) -> None:
        """Its deadline has passed or its caller has left. Nothing happens after its end."""
        if code is Code.CANCELLED:
            error: OverlayError = CallCancelled("the caller left")
        else:
            error = DeadlinePassed("the first request of this key has no answer yet")
        self._keys._leave(self, self._named, error)

    def cancel(self) -> None:
        self.end(Code.CANCELLED)

    def _done_locked(self, outcome: Outcome) -> Callable[[Outcome], None] | None:
        """The callback to call, if it is set already."""
        callback, self._callback, self._outcome = self._callback, None, outcome
        return callback


class _Lost(NamedTuple):
    """An outcome that there was no room to keep. ran: it was an answer."""

    size: int
    ran: bool


class _Asked:
    """A key's question and what is kept of it, lean: there may be hundreds of thousands."""

    __slots__ = ("kept", "question", "share", "until")

    def __init__(self, question: bytes, share: _Share) -> None:
        self.question = question
        self.share = share
        self.kept: Outcome | _Lost | None = None  # None while it has no answer
        self.until = 0.0  # when it is forgotten, once it has one


class _Share:
    """What one address holds."""

    __slots__ = ("address", "bytes", "keys", "waiting")

    def __init__(self, address: str) -> None:
        self.address = address
        self.keys = 0
        self.bytes = 0
        self.waiting = 0


def _size(kept: Outcome | _Lost | None) -> int:
    if isinstance(kept, bytes):
        return len(kept)
    return ERROR_BYTES + 2 * len(str(kept)) if isinstance(kept, OverlayError) else 0


def _own(outcome: Outcome) -> Outcome:
    """A copy; an error loses its traceback, whose frames hold their requests."""
    if isinstance(outcome, bytes):
        return outcome
    made = type(outcome).__new__(type(outcome), *outcome.args)
    made.__dict__.update(outcome.__dict__)
    return made
