"""Persistent channels to processes, which follow a machine's name to its current addresses.

    host:port --> the name's addresses (resolver) --> a gRPC channel to those addresses

gRPC tries several addresses in order. A name is looked up with the first call. After a problem (a
call got no answer, a stream ended, the owner called `doubt`) it is looked up again, once a second
for a while. If its addresses have changed, and the process no longer answers at the old ones, the
channel moves to the new ones; calls in progress on the old ones end with UNAVAILABLE.

A numeric address needs no lookup, and calls to it are plain gRPC calls. The server, and its
certificate check, see the name (`:authority`).

Owns a thread, "name-HOST", during lookups.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import grpc

from overlay.model import clocks as time
from overlay.model.addresses import join_address
from overlay.transport.endpoints import channel_options, open_channel
from overlay.transport.resolver import Host, is_number, pending, resolve
from overlay.transport.tls_check import tls_problem

if TYPE_CHECKING:
    from overlay.security.credentials import Credentials
    from overlay.transport.endpoints import Options

log = logging.getLogger(__name__)

LOOKUP_INTERVAL_S = 1.0  # between two lookups
DOUBT_S = 30.0  # how long lookups continue after the last problem: a call's default deadline
WRONG_S = 3.0  # how long an address counts as wrong after another program answered there
FIRST_LOOKUP_S = 0.25  # how long even a call without a timeout waits for the first lookup
CONNECTED_S = 0.3  # how long an answer takes at most on a working connection
HEALTH_CHECK = "/grpc.health.v1.Health/Check"
SILENT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
# A connection keeps the certificate that it was opened with, and a new one may count by now.
NOT_TRUSTED = grpc.StatusCode.UNAUTHENTICATED
MOVED = "the name of its machine has another address now"


class Channel:
    """Acts as a grpc.Channel for generated stubs. Thread-safe; close() may be called twice.

    address: host:port, or several with commas, of which the first that answers is used; with
    anything else every call is UNAVAILABLE. The constructor does not block; a call waits for the
    name within its timeout.
    """

    def __init__(
        self,
        address: str,
        options: Options | None = None,
        credentials: Credentials | None = None,
        process_id: str = "",
    ) -> None:
        """credentials: for mutual TLS. process_id: the only process that is accepted there."""
        self.address = address
        self._credentials = credentials
        self._process_id = process_id
        self._shown: object = None
        self._tls_problem = ""
        self._options = list(channel_options() if options is None else options)
        try:
            self._places = split_all(address)
            self._host, self._port = self._places[0]
            is_numeric = all(is_number(host) for host, _ in self._places)
            self._is_fixed = is_numeric and credentials is None
            found = resolve_all(self._places) if is_numeric else pending(self._host)
            if len(self._places) > 1:
                self._port = 0  # each has its own
        except ValueError as e:
            self._places = []
            self._host, self._port, self._is_fixed, is_numeric = address, 0, True, True
            found = Host(address, (), str(e))
        self._lock = threading.Lock()
        self._looked = threading.Event()  # set after the first lookup
        if is_numeric:
            self._looked.set()
        self._wake = threading.Event()
        self._is_looking = False
        self._first_lookup_at = math.inf  # when the first lookup started; monotonic seconds
        self._doubted_until = 0.0
        self._wrong_until = 0.0
        self._closed = False
        self._found = found
        self._addresses = found.addresses
        self._channel = self._open()

    @property
    def shown(self) -> str:
        """The address, with the numeric addresses of its name."""
        still = tuple(number for number in self._addresses if number in self._found.addresses)
        return Host(self._host, still or self._addresses).shown(self.address)

    @property
    def problem(self) -> str:
        """Why nothing can be reached here, as far as is known: the name has no address, or the two
        sides do not accept each other's certificates. Empty if neither."""
        return self._tls_problem if self._addresses else self._found.why

    def doubt(self, is_wrong: bool = False) -> None:
        """The process does not answer; is_wrong: another program does. Never blocks."""
        if self._is_fixed:
            return
        with self._lock:
            now = time.monotonic()
            self._first_lookup_at = min(self._first_lookup_at, now)
            self._doubted_until = now + DOUBT_S
            if is_wrong:
                self._wrong_until = now + WRONG_S
            if self._closed or self._is_looking:
                return
            self._is_looking = True
        look = weakref.ref(self), self._places, self._wake
        name = f"name-{self._host}"
        threading.Thread(target=_keep_looking_up, args=look, name=name, daemon=True).start()

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        return self._method(_Unary, "unary_unary", args, kwargs)

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        return self._method(_Unary, "stream_unary", args, kwargs)

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        return self._method(_Stream, "unary_stream", args, kwargs)

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        return self._method(_Stream, "stream_stream", args, kwargs)

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
        """Whether the name was looked up at least once. Waits for that up to `within_s`, but at
        least as long as a lookup usually takes."""
        if not self._looked.is_set():
            self.doubt()
            first_s = self._first_lookup_at + FIRST_LOOKUP_S - time.monotonic()
            self._looked.wait(max(within_s, first_s, 0.0))
        return self._looked.is_set()

    def now(self, within_s: float = 0.0) -> grpc.Channel:
        """The channel to the name's addresses, once they are known or the time is up."""
        self.has_looked(within_s)
        return self._channel

    def _method(self, kind: type[_Method], verb: str, args: Any, kwargs: Any) -> Any:
        if self._is_fixed:
            return getattr(self._channel, verb)(*args, **kwargs)
        return kind(self, verb, args, kwargs)

    def _open(self) -> grpc.Channel:
        options = self._options
        if not self._is_fixed:
            options = [("grpc.default_authority", _authority(*self._places[0])), *options]
        if self._credentials is not None:
            self._shown = self._credentials.current()[1]
        keys = self._credentials, self._process_id
        return open_channel(self._addresses, self._port, options, *keys)

    def on_resolved(self, found: Host) -> bool:
        """Moves to the addresses found. Returns whether to look again. On the lookup thread."""
        is_other = not set(found.addresses) <= set(self._addresses)
        if (is_other or self._is_renewed) and not self._is_working:
            self._move_to(found)
        if self._credentials is not None and found.addresses:
            self._tls_problem = "" if self._is_working else self._find_problem(found.addresses)
        with self._lock:
            self._found = found
            self._looked.set()
            goes_on = not self._closed and time.monotonic() < self._doubted_until
            self._is_looking = goes_on
        return goes_on

    def _find_problem(self, addresses: tuple[str, ...]) -> str:
        """What gRPC does not say of a handshake that fails."""
        if not self._port:
            return ""
        return tls_problem(addresses, self._port, self._credentials, self._process_id)

    @property
    def _is_renewed(self) -> bool:
        """Whether there is another certificate to show by now: a gRPC channel keeps its own."""
        return self._credentials is not None and self._credentials.current()[1] != self._shown

    @property
    def _is_working(self) -> bool:
        """Whether to keep the current addresses, whatever the name's are now."""
        is_right = bool(self._addresses) and time.monotonic() >= self._wrong_until
        return is_right and _is_connected(self._channel, self._is_renewed)

    def _move_to(self, found: Host) -> None:
        with self._lock:
            if self._closed:
                return
            before, old = Host(self._host, self._addresses), self._channel
            self._found, self._addresses, self._wrong_until = found, found.addresses, 0.0
            self._channel = self._open()
        if before.addresses and before.addresses != found.addresses:
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


def split_all(address: str) -> list[tuple[str, int]]:
    """As `split`, of several addresses with commas between them. Raises ValueError."""
    return [split(one.strip()) for one in address.split(",")]


def resolve_all(places: Sequence[tuple[str, int]]) -> Host:
    """As `resolve`; of several places, each of their numeric addresses has its port."""
    if len(places) == 1:
        return resolve(places[0][0])
    found = [(resolve(host), port) for host, port in places]
    numbers = [join_address(number, port) for host, port in found for number in host.addresses]
    why = "" if numbers else "; ".join(host.why for host, _ in found)
    return Host(places[0][0], tuple(numbers), why)


class Moved(grpc.RpcError):  # type: ignore[misc]
    """A call over a channel that has moved. Whether the request ran is unknown."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return MOVED

    def trailing_metadata(self) -> tuple[Any, ...]:
        return ()


class _Method:
    """One RPC method, called over the channel's current addresses."""

    def __init__(self, channel: Channel, verb: str, args: Any, kwargs: Any) -> None:
        self._channel = channel
        self._factory_call = verb, args, kwargs
        self._last: tuple[Any, Any] = None, None

    def _now(self, within_s: float = 0.0) -> tuple[grpc.Channel, Any]:
        channel, last = self._channel.now(within_s), self._last
        if last[0] is not channel:
            verb, args, kwargs = self._factory_call
            self._last = last = channel, getattr(channel, verb)(*args, **kwargs)
        return last


class _Unary(_Method):
    def __call__(self, request: Any, timeout: float | None = None, **kwargs: Any) -> Any:
        began = time.monotonic()
        channel, call = self._now(timeout or 0.0)
        if timeout is not None:
            timeout = time.Timeout(max(0.001, timeout - (time.monotonic() - began)))
        try:
            return call(request, timeout=timeout, **kwargs)
        except grpc.RpcError as e:
            if e.code() in (*SILENT, NOT_TRUSTED):
                self._channel.doubt()
            if e.code() is grpc.StatusCode.CANCELLED and channel is not self._channel.now():
                raise Moved from None
            raise
        except ValueError:  # the channel was closed in the meantime
            if channel is not self._channel.now():
                raise Moved from None
            raise

    def future(self, request: Any, **kwargs: Any) -> Any:
        """Ends as cancelled if the channel moves before there is an answer."""
        while True:
            channel, call = self._now()
            try:
                future = call.future(request, **kwargs)
            except ValueError:  # closed between these two lines
                if channel is self._channel.now():
                    raise
            else:
                future.add_done_callback(self._ended)
                return future

    def _ended(self, future: Any) -> None:
        if future.code() in (*SILENT, NOT_TRUSTED):
            self._channel.doubt()


class _Stream(_Method):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self._now()[1](*args, **kwargs)
        if not call.add_callback(self._channel.doubt):
            self._channel.doubt()
        return call


def _keep_looking_up(
    found: weakref.ref[Channel], places: Sequence[tuple[str, int]], wake: threading.Event
) -> None:
    """Looks up the hosts until there is no doubt, or the channel is closed or garbage."""
    while True:
        kwargs = resolve_all(places)
        channel = found()
        if channel is None or not channel.on_resolved(kwargs):
            return
        del channel
        wake.wait(LOOKUP_INTERVAL_S)


def _is_connected(channel: grpc.Channel, is_renewed: bool) -> bool:
    """Whether a server answers, whatever it answers: gRPC's own watch on a channel is a thread that
    dies with a traceback if the channel is closed meanwhile.

    is_renewed: there is another certificate to show, so that not to be trusted is no answer.
    """
    try:
        channel.unary_unary(HEALTH_CHECK)(b"", timeout=time.Timeout(CONNECTED_S))
    except grpc.RpcError as e:
        wrong = (NOT_TRUSTED,) if is_renewed else ()
        return e.code() not in (*SILENT, *wrong, grpc.StatusCode.CANCELLED)
    except ValueError:  # it was closed
        return False
    return True


def _authority(host: str, port: int) -> str:
    with contextlib.suppress(UnicodeError):
        host = host.encode("idna").decode()
    return join_address(host, port)
