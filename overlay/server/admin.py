"""The service OverlayAdmin: RPCs that act on the process itself.

With TLS operators may use it, without TLS callers on the same machine; `logs` also answers others,
without private lines. From `Admin` to `close` it owns two threads, "admin", as a drain
holds one until it ends, and two, "logs", which may wait for another process.
"""

from __future__ import annotations

import ipaddress
import logging
import math
import os
import socket
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NoReturn

import grpc
import psutil

from overlay.calls.gate import Gate
from overlay.model.addresses import number_of
from overlay.model.errors import BadRequest, NotAllowed, OverlayError
from overlay.model.identity import OPERATOR, PROCESS
from overlay.model.program import CLIENT
from overlay.model.topology import Process
from overlay.server.enrolment import Enrolment
from overlay.server.log_reader import LogReader
from overlay.server.service import Drained
from overlay.transport import codec
from overlay.transport.codec import pb2

log = logging.getLogger(__name__)

LONGEST_GRACE_S = 86_400.0
LOGS_S = 5.0  # how long to wait for another process


class Admin:
    """stop: starts stopping the process, with this grace, as a signal does; does not block."""

    def __init__(
        self,
        me: Process,
        log_reader: LogReader,
        grace_s: float,
        stop: Callable[[float], None],
        gate: Gate,
        enrolment: Enrolment,
    ) -> None:
        self.pool = ThreadPoolExecutor(2, "admin")
        self.logs_pool = ThreadPoolExecutor(2, "logs")
        self._me = me
        self._log_reader = log_reader
        self._grace_s = grace_s
        self._stop = stop
        self._gate = gate
        self._enrolment = enrolment
        self._drained: Future[tuple[float, Drained]] = Future()
        self._started_at = psutil.Process().create_time()

    def drain(self, request: pb2.DrainRequest, context: grpc.ServicerContext) -> pb2.DrainResponse:
        """Stops the process. Answers when running requests have ended, or at once with no_wait.

        A second caller waits for the same drain.
        """
        try:
            self._check_caller("drain", context)
            grace_s = self._grace_of(request)
        except OverlayError as e:
            _abort(context, e)
        by = self._gate.identity(context) or codec.address_in(context.peer())
        log.info("drain: requested by %s", by, extra={"kind": "stopping"})
        self._stop(grace_s)
        if request.no_wait:
            return self._response(grace_s, Drained())
        return self._response(*self._drained.result(LONGEST_GRACE_S))

    def logs(self, request: pb2.LogsRequest, context: grpc.ServicerContext) -> pb2.LogsResponse:
        """The last lines of this process, or of one below it."""
        remaining: float | None = context.time_remaining()
        within_s = LOGS_S if remaining is None else min(remaining * 0.9, LOGS_S)
        try:
            return self._log_reader.read(request, self._may_read(context), within_s)
        except OverlayError as e:
            _abort(context, e)

    def join(self, request: pb2.JoinRequest, context: grpc.ServicerContext) -> pb2.JoinResponse:
        """For an invitation: what it is for, or its certificates."""
        try:
            return self._enrolment.join(request, *self._gate.invitation(context))
        except OverlayError as e:
            _abort(context, e)

    def renew(self, request: pb2.RenewRequest, context: grpc.ServicerContext) -> pb2.RenewResponse:
        """A certificate for the caller, in place of its own."""
        try:
            return self._enrolment.renew(request, self._gate.certificate(context))
        except OverlayError as e:
            _abort(context, e)

    def finish_drain(self, grace_s: float, drained: Drained) -> None:
        """Passes the result of the drain to the callers that wait for it."""
        self._drained.set_result((grace_s, drained))

    def close(self) -> None:
        for pool in (self.pool, self.logs_pool):
            pool.shutdown(wait=False, cancel_futures=True)

    def _may_read(self, context: grpc.ServicerContext) -> bool:
        """Whether private lines are shown. A process above passes an operator's question on, and
        says so itself if it was somebody else's."""
        if self._gate.is_open:
            return is_on_this_machine(context.peer())
        identity = self._gate.identity(context)
        return identity is not None and identity.kind in (OPERATOR, PROCESS)

    def _check_caller(self, verb: str, context: grpc.ServicerContext) -> None:
        peer = context.peer()
        if not self._gate.is_open:
            if not self._gate.is_operator(context):
                who = self._gate.identity(context) or (
                    "a program of this machine without a certificate"
                )
                raise NotAllowed(
                    f"{verb} is for operators, and the caller is {who}; on the leader's machine, "
                    f"'{CLIENT} invite NAME --operator' makes one"
                )
        elif not is_on_this_machine(peer):
            host, port = self._me.host, self._me.port
            raise NotAllowed(
                f"{verb} is answered only to callers on {self._me.id}'s own machine, and this one "
                f"calls from {codec.address_in(peer)}; run it there: "
                f"python client.py {host} {port} {verb}"
            )

    def _grace_of(self, request: pb2.DrainRequest) -> float:
        if not request.HasField("grace_s"):
            return self._grace_s
        if not (math.isfinite(request.grace_s) and 0 <= request.grace_s <= LONGEST_GRACE_S):
            raise BadRequest(
                f"grace_s: {request.grace_s:g} is not a number of seconds from 0 to "
                f"{LONGEST_GRACE_S:g}"
            )
        return float(request.grace_s)

    def _response(self, grace_s: float, drained: Drained) -> pb2.DrainResponse:
        return pb2.DrainResponse(
            process_id=self._me.id,
            pid=os.getpid(),
            started_at=self._started_at,
            grace_s=grace_s,
            took_s=drained.took_s,
            refused=drained.refused,
            left=drained.left,
        )


def _abort(context: grpc.ServicerContext, error: OverlayError) -> NoReturn:
    context.set_trailing_metadata(codec.trailers(error))
    context.abort(codec.grpc_code(error.code), str(error)[: codec.LONGEST_REASON])
    raise AssertionError("context.abort always raises")


def is_on_this_machine(peer: str) -> bool:
    """Whether gRPC's name for a caller is an address of this machine: loopback or another.

    A process that listens on 192.168.1.1 sees a local caller as 192.168.1.1, not as loopback.
    """
    text = codec.address_in(peer)
    address = number_of(text)
    if address is None:
        return peer.startswith("unix:")
    if address.is_loopback:
        return True
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    try:
        # Sends nothing. Only towards one of its own addresses does a machine use that very address.
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((str(address), 9))
            return ipaddress.ip_address(probe.getsockname()[0].partition("%")[0]) == address
    except OSError:
        return False
