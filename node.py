"""Serves one process of an overlay: python node.py CONFIG ID

For example: python node.py two_hosts_config.json A
"""

from __future__ import annotations

import sys

import overlay  # noqa: F401 - this folder's, whatever else is installed

if __name__ == "__main__":  # so that a random.py beside this file does not hide Python's own
    sys.path.append(sys.path.pop(0))

import argparse
import atexit
import contextlib
import errno
import gc
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overlay.cli import stdio

stdio.complete()

from overlay.workers import descendants  # noqa: E402 - it and the rest may open files

if __name__ == "__main__":  # registered before multiprocessing's own, so it runs after it
    atexit.register(descendants.end)

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC's lines on stderr repeat our log
if sys.platform == "win32" and sys.version_info < (3, 13):
    # It ticks every 15.6 ms there, too coarse to tell quick workers from slow ones: a map ran 2,300
    # requests a second with such ticks, 123,000 without. Newer Pythons do the same.
    time.monotonic = time.perf_counter

try:
    from overlay.transport import older_poller  # noqa: F401, I001 - imports gRPC before others do

    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from overlay.calls.connection_limits import Connections, max_connections, raise_file_limit
    from overlay.calls.gate import Gate
    from overlay.calls.reception import Call, Health, Reception, on_threads_of
    from overlay.cli import usage
    from overlay.model import config
    from overlay.model.errors import ConfigError, OverlayError
    from overlay.model.program import CLIENT
    from overlay.model.addresses import join_address
    from overlay.model.topology import REQUIRED, Process, Topology
    from overlay.observability.log_file import ProcessLog
    from overlay.security.lookup import needs_certificates
    from overlay.server import reflection
    from overlay.server.admin import Admin
    from overlay.server.enrolment import Enrolment, keepers
    from overlay.server.heap import HeapTrimmer, limit_kept_memory
    from overlay.server.service import Drained, Service
    from overlay.server.shutdown import StopFile, when_console_ends
    from overlay.transport.channels import Channel
    from overlay.transport.codec import pb2, pb2_grpc
    from overlay.transport.endpoints import server_options
    from overlay.transport.listener import Listener
    from overlay.transport.machine import own_addresses
    from overlay.transport.resolver import Host, look_up, socket_address
    from overlay.workers import spawn_main
except ImportError as e:
    sys.exit(
        f"node.py: {e}; run: python3 scripts/run.py setup (or pip install -r requirements.txt)"
    )
except Exception as e:  # noqa: BLE001 - missing stubs; ConfigError may be what failed to import
    print(f"node.py: {e}", file=sys.stderr)
    sys.exit(2)

if TYPE_CHECKING:
    from overlay.security.credentials import Credentials

OVERLAY_NODE = pb2.DESCRIPTOR.services_by_name["OverlayNode"].full_name
OVERLAY_JOBS = pb2.DESCRIPTOR.services_by_name["OverlayJobs"].full_name
OVERLAY_ADMIN = pb2.DESCRIPTOR.services_by_name["OverlayAdmin"].full_name
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
logger = logging.getLogger("overlay.node")

EXIT_S = 2.0  # for atexit functions of handler modules
PORT_PATIENCE_S = 1.0  # for a port that an old connection holds for a moment
NOT_OURS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # the address is not this machine's


class OverlayNode(pb2_grpc.OverlayNodeServicer):  # type: ignore[misc]
    """The RPCs of the overlay; the work is in overlay.server.service."""

    def __init__(self, service: Service, metrics_pool: ThreadPoolExecutor) -> None:
        self._service = service
        self.GetMetrics = on_threads_of(metrics_pool, self.GetMetrics)  # type: ignore[method-assign]

    def Forward(
        self, request: pb2.Request, context: grpc.ServicerContext
    ) -> pb2.Response | Future[pb2.Response]:
        return self._service.forward(request, context)

    def ForwardStream(self, call: Call, context: grpc.ServicerContext) -> None:
        self._service.forward_stream(call, context)

    def GetMetrics(
        self, request: pb2.MetricsRequest, context: grpc.ServicerContext
    ) -> pb2.MetricsResponse:
        return self._service.metrics(request.events, request.requests, request.functions)


class OverlayJobs(pb2_grpc.OverlayJobsServicer):  # type: ignore[misc]
    """The RPCs of jobs; the work is in overlay.jobs.requests."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def Submit(
        self, request: pb2.SubmitRequest, context: grpc.ServicerContext
    ) -> Future[pb2.SubmitResponse]:
        return self._service.submit(request, context)

    def Result(self, request: pb2.ResultRequest, context: grpc.ServicerContext) -> Future[pb2.Job]:
        return self._service.job_result(request, context)

    def Part(
        self, request: pb2.PartRequest, context: grpc.ServicerContext
    ) -> Future[pb2.PartResponse]:
        return self._service.job_part(request, context)

    def Jobs(
        self, request: pb2.JobsRequest, context: grpc.ServicerContext
    ) -> Future[pb2.JobsResponse]:
        return self._service.list_jobs(request, context)

    def Change(
        self, request: pb2.ChangeRequest, context: grpc.ServicerContext
    ) -> Future[pb2.ChangeResponse]:
        return self._service.change_jobs(request, context)


class OverlayAdmin(pb2_grpc.OverlayAdminServicer):  # type: ignore[misc]
    """The RPCs for operators; the work is in overlay.server.admin."""

    def __init__(self, admin: Admin, quick_pool: ThreadPoolExecutor) -> None:
        self._admin = admin
        self.Drain = on_threads_of(admin.pool, self.Drain)  # type: ignore[method-assign]
        self.Logs = on_threads_of(admin.logs_pool, self.Logs)  # type: ignore[method-assign]
        self.Join = on_threads_of(quick_pool, self.Join)  # type: ignore[method-assign]
        self.Renew = on_threads_of(quick_pool, self.Renew)  # type: ignore[method-assign]

    def Drain(self, request: pb2.DrainRequest, context: grpc.ServicerContext) -> pb2.DrainResponse:
        return self._admin.drain(request, context)

    def Join(self, request: pb2.JoinRequest, context: grpc.ServicerContext) -> pb2.JoinResponse:
        return self._admin.join(request, context)

    def Renew(self, request: pb2.RenewRequest, context: grpc.ServicerContext) -> pb2.RenewResponse:
        return self._admin.renew(request, context)

    def Logs(self, request: pb2.LogsRequest, context: grpc.ServicerContext) -> pb2.LogsResponse:
        return self._admin.logs(request, context)


class Node:
    """The gRPC server of one process, from `start` to `stop`.

    place: the addresses to listen on. stop_process: requests a stop with a grace in seconds and
    returns at once; the main thread then calls `stop`.
    """

    def __init__(
        self,
        topology: Topology,
        me: Process,
        place: Host,
        service: Service,
        stop_process: Callable[[float], None],
        gate: Gate,
    ) -> None:
        self.me = me
        self.place = place
        self.service = service
        limits = topology.limits
        self.gate = gate
        enrolment = Enrolment(topology, me, gate.credentials)
        self.admin = Admin(
            me, service.log_reader, limits.drain_grace_s, stop_process, gate, enrolment
        )
        self.pool = ThreadPoolExecutor(service.pool_threads, "forward")
        self.metrics_pool = ThreadPoolExecutor(limits.metrics_threads, "metrics")
        limit = max_connections(raise_file_limit())
        options = server_options(limits, limit)
        self.server = Listener(
            place,
            me.port,
            lambda: grpc.server(self.pool, options=options),
            gate.credentials,
            local_plaintext=topology.tls != REQUIRED,
        )
        self.reception = Reception(self.server, self.pool, limits, service.request_log, gate)
        service.calls_without_message = lambda: self.reception.unarrived
        self.connections = Connections(
            me.port, limit, service.request_log, gate.peers, self._on_check
        )
        self.keepers = keepers(topology, me, gate.credentials) if gate.credentials else []
        self.memory = HeapTrimmer(lambda: service.is_busy)
        self.health = Health(self.metrics_pool)
        node = OverlayNode(service, self.metrics_pool)
        pb2_grpc.add_OverlayNodeServicer_to_server(node, self.reception)
        pb2_grpc.add_OverlayJobsServicer_to_server(OverlayJobs(service), self.reception)
        pb2_grpc.add_OverlayAdminServicer_to_server(
            OverlayAdmin(self.admin, self.metrics_pool), self.reception
        )
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.reception)
        services = (OVERLAY_NODE, OVERLAY_JOBS, OVERLAY_ADMIN, HEALTH)
        reflection.serve(self.reception, self.metrics_pool, services)

    def start(self) -> None:
        """Returns when it serves. Raises ConfigError if it cannot listen on its port."""
        try:
            self.server.start()
        except RuntimeError as e:
            raise ConfigError(f"process {self.me.id}: cannot listen: {e}") from None
        self._probe()
        self.connections.start()
        self.service.start()
        for keeper in self.keepers:
            keeper.start()
        self._set_health(health_pb2.HealthCheckResponse.SERVING)

    def stop(self, grace_s: float, for_good: bool = False) -> Drained:
        """Refuses new requests, lets running ones end, then closes.

        for_good: it will not be back soon, so neighbours need not wait for it.
        """
        # In this order: neighbours route around us before the first request is refused.
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        drained = self.service.drain(grace_s, for_good)
        self.admin.finish_drain(grace_s, drained)
        self.server.stop(0.5)
        self.service.close()
        self.admin.close()
        self.connections.stop()
        for keeper in self.keepers:
            keeper.stop()
        for pool in (self.pool, self.metrics_pool):
            pool.shutdown(wait=False, cancel_futures=True)
        return drained

    def _on_check(self) -> None:
        self.reception.end_late()
        self.reception.end_untrusted()
        self.memory.trim()

    def _set_health(self, status: int) -> None:
        for name in ("", OVERLAY_NODE):
            self.health.set(name, status)

    def _probe(self) -> None:
        # This process must answer, not another one that shares the port.
        number = self.place.addresses[0]
        number = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(number, number)
        address = join_address(number, self.me.port)
        keys = self.gate.credentials
        with Channel(address, credentials=keys, process_id=self.me.id) as channel:
            ask = pb2_grpc.OverlayNodeStub(channel).GetMetrics
            try:
                found = ask(pb2.MetricsRequest(), timeout=5, wait_for_ready=True)
            except grpc.RpcError as e:
                raise ConfigError(
                    f"process {self.me.id}: no answer from itself at {address}: {e.details()}"
                ) from None
        if (found.process_id, found.pid) != (self.me.id, os.getpid()):
            raise ConfigError(
                f"process {self.me.id}: {found.process_id} (pid {found.pid}) answers at {address}"
            )


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    try:
        topology = config.load(arguments.config)
        me = topology.process(arguments.id)
        if arguments.check:
            return _report_check(topology)
        return _serve(topology, me, _wait_for_port(me), arguments.stop_file)
    except OverlayError as e:
        for problem in getattr(e, "problems", (str(e),)):
            print(f"node.py: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = usage.Parser("node.py", "Serves one process of an overlay.")
    parser.add_argument("config", metavar="CONFIG", help="for example two_hosts_config.json")
    parser.add_argument("id", metavar="ID", help="the process of that file to serve, for example A")
    parser.add_argument("--check", action="store_true", help="only check the configuration")
    parser.add_argument(
        "--stop-file",
        type=lambda path: StopFile(Path(path).absolute()),  # before a handler can chdir
        metavar="PATH",
        help="stop when this file appears",
    )
    return parser.parse_args(argv)


def _report_check(topology: Topology) -> int:
    for warning in config.warnings(topology):
        print(f"warning: {warning}")
    print(f"{topology.name} is right: {len(topology.processes)} processes")
    return 0


def _serve(topology: Topology, me: Process, place: Host, stop_file: StopFile | None) -> int:
    limit_kept_memory()
    spawn_main.be_main()
    descendants.hold_together()
    stopping = _Stopping(topology.limits.drain_grace_s, stop_file)
    log = ProcessLog(topology.folder / me.log_dir / f"process_{me.id.lower()}.log", me.id)
    log.start()
    try:
        gate = Gate(_credentials(topology, me), place.is_loopback, topology.access)
        service = Service(topology, me.id, log.recent, lambda: log.dropped, gate)
        node = Node(topology, me, place, service, stopping.ask, gate)
        try:
            node.start()
        except BaseException:
            node.stop(0)
            raise
        _announce(topology, me, place, gate)
        with _exporter(me, service):
            log.capture_prints()
            _freeze_garbage_collector()
            stopping.wait()
            left = _stop(node, stopping)
        if stop_file is not None:  # tells run.py that it stopped in order, and how
            stop_file.leave(left)
        return 1 if left else 0
    finally:
        log.stop()


def _credentials(topology: Topology, me: Process) -> Credentials | None:
    """Those of this process, if the configuration asks for TLS. Raises ConfigError."""
    folder = topology.tls_folder
    if folder is None:
        return None
    from overlay.security.credentials import Credentials  # only if used, as it loads slowly

    try:
        found = Credentials.of_process(folder, me.id)
        if found.certificate_problem and found.folder.can_issue:
            Enrolment(topology, me, found).renew_own()
            found = Credentials.of_process(folder, me.id)
    except ConfigError as e:
        raise ConfigError(f"process {me.id}: {needs_certificates(topology, e)}") from None
    if found.certificate_problem:
        raise ConfigError(f"process {me.id}: {found.certificate_problem}")
    return found


@contextlib.contextmanager
def _exporter(me: Process, service: Service) -> Iterator[None]:
    """Serves metrics to Prometheus, if configured, until the process has stopped."""
    if me.metrics_port is None:
        yield
        return
    from overlay.server.prometheus import Exporter  # rarely used, and its library loads slowly

    exporter = Exporter(service.metrics, me.metrics_bind, me.metrics_port)
    exporter.start()
    try:
        yield
    finally:
        exporter.stop()


def _freeze_garbage_collector() -> None:
    # Requests leave no cycles, and what exists now lives until the end: scanning it after every few
    # hundred new objects costs 5 % of all CPU time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def _announce(topology: Topology, me: Process, place: Host, gate: Gate) -> None:
    at = place.shown(me.listen_address)
    print(f"{me.id} {me.role} {me.team} serves on {at}", flush=True)
    for warning in config.warnings(topology):
        logger.warning("%s", warning)
    if gate.credentials is not None:
        logger.info("mutual TLS as %s", gate.credentials.identity)
        if problem := gate.credentials.warning:
            print(f"warning: {problem}", flush=True)  # and CertificateKeeper logs it
    elif not place.is_loopback:
        logger.warning(
            "OPEN: anyone who can reach %s can run its handlers; '%s secure %s' closes it",
            at,
            CLIENT,
            topology.name,
        )
    elif place.shown() != place.host and len({p.host for p in topology.processes.values()}) > 1:
        # As with Debian's hosts file, where a machine's own name is 127.0.1.1.
        logger.warning("other machines cannot reach %s as %s: give it a bind", me.id, place.shown())
    about = {"kind": "started"}
    logger.info("serves on %s, pid %d", at, os.getpid(), extra=about)


def _stop(node: Node, stopping: _Stopping) -> int:
    """Stops the node. Returns the number of requests that did not end within the grace."""
    began, grace_s = time.monotonic(), stopping.grace_s
    logger.info("stopping: up to %g s for running requests", grace_s, extra={"kind": "stopping"})
    _watchdog(grace_s + 5)
    drained = node.stop(grace_s, stopping.is_for_good)
    logger.info(
        "stopped in %.1f s; %d requests refused, %d left behind",
        time.monotonic() - began,
        drained.refused,
        drained.left,
    )
    return drained.left


def _watchdog(after_s: float, code: int = 1) -> None:
    timer = threading.Timer(after_s, _end_now, (code,))
    timer.daemon = True
    timer.start()


def _end_now(code: int) -> None:
    """Kills this process and all that its handlers have started, without a word."""
    descendants.end()
    os._exit(code)


class _Stopping:
    """Waits for a signal, the stop file or `ask`.

    A second signal ends the process at once, except SIGHUP, which a closing terminal may send more
    than once. grace_s: the time that running requests then have.
    """

    def __init__(self, grace_s: float, stop_file: StopFile | None) -> None:
        self.grace_s = grace_s
        self._stop_file = stop_file
        self._wanted = threading.Event()
        self._was_signalled = False
        before = {}
        for name in ("SIGINT", "SIGTERM", "SIGBREAK"):  # SIGBREAK is Ctrl-Break on Windows
            if hasattr(signal, name):
                number = getattr(signal, name)
                before[number] = signal.signal(number, self._signalled)
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            # Not if it is ignored, as under nohup.
            hang_up = signal.signal(signal.SIGHUP, lambda number, frame: self._wanted.set())
            before[signal.SIGHUP] = hang_up
        if hasattr(os, "register_at_fork"):  # a handler's own pool stops its children with SIGTERM
            os.register_at_fork(after_in_child=lambda: _set_signals(before))
        when_console_ends(self.ask)

    @property
    def is_for_good(self) -> bool:
        """Whether the stop file says that the process will not be back soon."""
        return self._stop_file is not None and self._stop_file.is_for_good

    def wait(self) -> None:
        # In slices: before Python 3.14, nothing interrupts a wait without a timeout on Windows.
        while not self._wanted.wait(0.2):
            stdio.leave_terminal()
            if self._stop_file is not None and self._stop_file.is_there:
                return
        stdio.leave_terminal()

    def ask(self, grace_s: float) -> None:
        """Stops the process as a first signal does; only the first grace counts. Thread-safe."""
        if not self._wanted.is_set():
            self.grace_s = grace_s
        self._wanted.set()

    def _signalled(self, number: int, frame: object) -> None:
        if self._was_signalled:
            _end_now(128 + number)
        self._was_signalled = True
        self._wanted.set()


def _set_signals(actions: dict[int, Any]) -> None:
    for number, action in actions.items():
        with contextlib.suppress(TypeError, ValueError):  # None: not set from Python
            signal.signal(number, action)


def _wait_for_port(me: Process) -> Host:
    """Its host's addresses that this machine has and can listen on. Raises ConfigError."""
    until = time.monotonic() + PORT_PATIENCE_S
    while True:
        place = look_up(me.bind or me.host)
        errors = {n: e for n in place.addresses if (e := _bind_error(n, me.port)) is not None}
        unusable = [e for e in errors.values() if e.errno not in NOT_OURS]
        if len(errors) < len(place.addresses) and not unusable:
            own = tuple(number for number in place.addresses if number not in errors)
            return replace(place, addresses=own)
        if not unusable or unusable[0].errno != errno.EADDRINUSE or time.monotonic() > until:
            e = next(iter([*unusable, *errors.values()]), None)
            raise ConfigError(f"process {me.id}: {_explain(me, place, e)}")
        time.sleep(0.1)


def _bind_error(number: str, port: int) -> OSError | None:
    """Why this machine cannot listen on the address, from a plain socket, as gRPC does not say."""
    try:
        family, place = socket_address(number, port)
        with socket.socket(family) as probe:
            if os.name == "posix":  # as gRPC does; on Windows this would share the port
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
            probe.listen(1)
    except OSError as e:
        return e
    return None


def _explain(me: Process, place: Host, e: OSError | None) -> str:
    host = place.shown()
    if e is None:
        return place.why
    if e.errno == errno.EADDRINUSE:
        return (
            f"port {me.port} on {host} is taken by another program (or by {me.id} itself, "
            f"still running); stop it or give {me.id} another port"
        )
    if e.errno in NOT_OURS:
        return (
            f"{host} is not an address of this machine, which has {', '.join(own_addresses())}; "
            f"start {me.id} on the machine that has it, or correct its host (behind NAT: set its "
            "bind)"
        )
    if e.errno == errno.EACCES:
        return f"port {me.port} on {host} needs privileges that you do not have; use one above 1023"
    return f"cannot listen on port {me.port} of {host}: {e}"


if __name__ == "__main__":
    code = main()
    _watchdog(EXIT_S, code)  # the process ends even if a handler left a thread running
    sys.exit(code)
