"""Kept channels to processes, wherever the name of their machine leads at the moment.

    host:port --> what the name stands for here (resolver) --> a gRPC channel to those numbers

gRPC tries several addresses in their order. A name is looked up with the first call, and once a
second for a while after something went wrong: after a call got no answer, a stream ended, or the
owner had doubts. When it stands for other addresses then, and nothing of ours answers at the old
ones, the channel leads to the new ones: what is under way over the old ends as unavailable.

An address in numbers stands for itself, and its calls are gRPC's own. To the other side, and to
certificates, the channel goes by its name (`:authority`).

Owns a thread, "name-HOST", while it looks.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import weakref
from typing import TYPE_CHECKING, Any

import grpc

from overlay.model import clocks as time
from overlay.model.topology import join_address
from overlay.transport.endpoints import channel_options, open_channel
from overlay.transport.resolver import Named, is_number, resolve, silent

if TYPE_CHECKING:
    from overlay.transport.endpoints import Options

log = logging.getLogger(__name__)

AGAIN_S = 1.0  # from one look to the next
DOUBT_S = 30.0  # it is looked at for so long after the last trouble: a call's default deadline
WRONG_S = 3.0  # what was found to answer there wrongly is taken for wrong for so long
FIRST_S = 0.25  # who has no time to wait for the first look does so for so long after its begin
READY_S = 0.3  # gRPC takes some thread switches to say that a channel is connected
SILENT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
MOVED = "the name of its machine stands for another address now"


class Channel:
    """What a grpc.Channel is to generated stubs. Safe from any thread; close() may be called twice.

    address: host:port; what is not leads nowhere. Does not wait: a call does, within its time.
    """

    def __init__(self, address: str, options: Options | None = None) -> None:
        self.address = address
        self._options = list(channel_options() if options is None else options)
        try:
            self._host, self._port = split(address)
            self._is_fixed = is_number(self._host)
            found = Named(self._host, (self._host,)) if self._is_fixed else silent(self._host)
        except ValueError as e:
            self._host, self._port, self._is_fixed = address, 0, True
            found = Named(address, (), str(e))
        self._lock = threading.Lock()
        self._looked = threading.Event()  # at least once
        if self._is_fixed:
            self._looked.set()
        self._wake = threading.Event()
        self._is_looking = False
        self._begun = math.inf  # the first look; monotonic seconds
        self._doubted_until = 0.0
        self._wrong_until = 0.0
        self._closed = False
        self._found = found
        self._leads_to = found.addresses
        self._channel = self._made()

    @property
    def shown(self) -> str:
        """The address, with what it stands for here."""
        still = tuple(number for number in self._leads_to if number in self._found.addresses)
        return Named(self._host, still or self._leads_to).shown(self.address)

    @property
    def problem(self) -> str:
        """Why the name leads nowhere, as far as is known; empty when it leads somewhere."""
        return "" if self._leads_to else self._found.why

    def doubt(self, is_wrong: bool = False) -> None:
        """What should be there is not; is_wrong: something else answers. Never waits."""
        if self._is_fixed:
            return
        with self._lock:
            now = time.monotonic()
            self._begun = min(self._begun, now)
            self._doubted_until = now + DOUBT_S
            if is_wrong:
                self._wrong_until = now + WRONG_S
            if self._closed or self._is_looking:
                return
            self._is_looking = True
        look = weakref.ref(self), self._host, self._wake
        name = f"name-{self._host}"
        threading.Thread(target=_look, args=look, name=name, daemon=True).start()

    def unary_unary(self, *given: Any, **named: Any) -> Any:
        return self._method(_Unary, "unary_unary", given, named)

    def stream_unary(self, *given: Any, **named: Any) -> Any:
        return self._method(_Unary, "stream_unary", given, named)

    def unary_stream(self, *given: Any, **named: Any) -> Any:
        return self._method(_Stream, "unary_stream", given, named)

    def stream_stream(self, *given: Any, **named: Any) -> Any:
        return self._method(_Stream, "stream_stream", given, named)

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self._wake.set()
        self._looked.set()
        self._channel.close()

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def has_looked(self, within_s: float = 0.0) -> bool:
        """Whether the name was looked up at least once. Waits for it within the time given, and in
        any case for the moment that a look takes when all is well."""
        if not self._looked.is_set():
            self.doubt()
            moment_s = self._begun + FIRST_S - time.monotonic()
            self._looked.wait(max(within_s, moment_s, 0.0))
        return self._looked.is_set()

    def now(self, within_s: float = 0.0) -> grpc.Channel:
        """The channel to where the name leads, as soon as that is known, or the time is over."""
        self.has_looked(within_s)
        return self._channel

    def _method(self, kind: type[_Method], verb: str, given: Any, named: Any) -> Any:
        if self._is_fixed:
            return getattr(self._channel, verb)(*given, **named)
        return kind(self, verb, given, named)

    def _made(self) -> grpc.Channel:
        options = self._options
        if not self._is_fixed:
            options = [("grpc.default_authority", _authority(self._host, self._port)), *options]
        return open_channel(self._leads_to, self._port, options)

    def take(self, found: Named) -> bool:
        """Goes where the name leads by now; whether to look again. On the looking thread."""
        if not set(found.addresses) <= set(self._leads_to) and not self._is_well:
            self._lead_to(found)
        with self._lock:
            self._found = found
            self._looked.set()
            goes_on = not self._closed and time.monotonic() < self._doubted_until
            self._is_looking = goes_on
        return goes_on

    @property
    def _is_well(self) -> bool:
        """Whether what it leads to need not be left, whatever the name says now."""
        is_right = bool(self._leads_to) and time.monotonic() >= self._wrong_until
        return is_right and _is_connected(self._channel)

    def _lead_to(self, found: Named) -> None:
        with self._lock:
            if self._closed:
                return
            before, old = Named(self._host, self._leads_to), self._channel
            self._found, self._leads_to, self._wrong_until = found, found.addresses, 0.0
            self._channel = self._made()
        if before.addresses:
            log.info("%s is now %s", before.shown(), ", ".join(found.addresses))
        old.close()


def split(address: str) -> tuple[str, int]:
    """The host, without brackets, and the port of host:port. Raises ValueError."""
    host, colon, port = address.rpartition(":")
    is_number = port.isascii() and port.isdigit() and len(port) < 10
    if not (colon and host and is_number and 1 <= int(port) <= 65535 and host.isprintable()):
        raise ValueError(f"the address {address[:100]!r} is not host:port")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ValueError(
            f"the address {address[:100]!r} is not host:port; write an IPv6 host in brackets"
        )
    return host.strip("[]"), int(port)


class Moved(grpc.RpcError):  # type: ignore[misc]
    """A call over a channel that leads elsewhere now. Whether it ran is open."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return MOVED

    def trailing_metadata(self) -> tuple[Any, ...]:
        return ()


class _Method:
    """One method of the other side, over wherever the channel leads when it is called."""

    def __init__(self, channel: Channel, verb: str, given: Any, named: Any) -> None:
        self._channel = channel
        self._made_by = verb, given, named
        self._last: tuple[Any, Any] = None, None

    def _now(self, within_s: float = 0.0) -> tuple[grpc.Channel, Any]:
        channel, last = self._channel.now(within_s), self._last
        if last[0] is not channel:
            verb, given, named = self._made_by
            self._last = last = channel, getattr(channel, verb)(*given, **named)
        return last


class _Unary(_Method):
    def __call__(self, request: Any, timeout: float | None = None, **named: Any) -> Any:
        began = time.monotonic()
        channel, call = self._now(timeout or 0.0)
        if timeout is not None:
            timeout = time.Timeout(max(0.001, timeout - (time.monotonic() - began)))
        try:
            return call(request, timeout=timeout, **named)
        except grpc.RpcError as e:
            if e.code() in SILENT:
                self._channel.doubt()
            if e.code() is grpc.StatusCode.CANCELLED and channel is not self._channel.now():
                raise Moved from None
            raise
        except ValueError:  # it was closed meanwhile
            if channel is not self._channel.now():
                raise Moved from None
            raise

    def future(self, request: Any, **named: Any) -> Any:
        """Ends as cancelled when the channel leads elsewhere before there is an answer."""
        while True:
            channel, call = self._now()
            try:
                future = call.future(request, **named)
            except ValueError:  # it was closed between these two lines
                if channel is self._channel.now():
                    raise
            else:
                future.add_done_callback(self._ended)
                return future

    def _ended(self, future: Any) -> None:
        if future.code() in SILENT:
            self._channel.doubt()


class _Stream(_Method):
    def __call__(self, *given: Any, **named: Any) -> Any:
        call = self._now()[1](*given, **named)
        if not call.add_callback(self._channel.doubt):
            self._channel.doubt()
        return call


def _look(found: weakref.ref[Channel], host: str, wake: threading.Event) -> None:
    """Until there is no more doubt, or the channel is closed or no longer held."""
    while True:
        named = resolve(host)
        channel = found()
        if channel is None or not channel.take(named):
            return
        del channel
        wake.wait(AGAIN_S)


def _is_connected(channel: grpc.Channel) -> bool:
    ready, is_ready = grpc.channel_ready_future(channel), threading.Event()
    ready.add_done_callback(lambda _: is_ready.set())
    try:
        return is_ready.wait(READY_S)  # its own wait goes by a clock that a test may have frozen
    finally:
        with contextlib.suppress(ValueError):
            ready.cancel()


def _authority(host: str, port: int) -> str:
    with contextlib.suppress(UnicodeError):
        host = host.encode("idna").decode()
    return join_address(host, port)
