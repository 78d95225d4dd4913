"""Serves one process of an overlay: python node.py CONFIG ID

For example: python node.py two_hosts_config.json A
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import gc
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its lines go to stderr, ours tell the same
if sys.platform == "linux":
    # gRPC's older poller: half the thread switches of its event engine, a fifth more requests.
    os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
if sys.platform == "win32" and sys.version_info < (3, 13):
    # There it ticks each 15.6 ms, far too coarse for who is quick and who is slow. Measured with
    # such ticks: 2,300 requests of a map a second in place of 123,000. Newer Pythons do the same.
    time.monotonic = time.perf_counter

try:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

    from overlay import configuration, wire
    from overlay.admin import Admin
    from overlay.connections import Connections, most_connections, raise_file_limit
    from overlay.errors import ConfigError, OverlayError
    from overlay.logs import ProcessLog
    from overlay.memory import Memory, keep_little
    from overlay.reception import Health, Reception, on_threads_of
    from overlay.service import Drained, Service
    from overlay.topology import Process, Topology, join_address
    from overlay.wire import pb2, pb2_grpc
except ImportError as e:
    sys.exit(
        f"node.py: {e}; run: python3 scripts/run.py setup (or pip install -r requirements.txt)"
    )
except Exception as e:  # noqa: BLE001 - missing stubs; ConfigError may be what failed to import
    print(f"node.py: {e}", file=sys.stderr)
    sys.exit(2)

OVERLAY_NODE = pb2.DESCRIPTOR.services_by_name["OverlayNode"].full_name
OVERLAY_ADMIN = pb2.DESCRIPTOR.services_by_name["OverlayAdmin"].full_name
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
PORT_PATIENCE_S = 1.0  # for a port that an old connection still holds for a moment


class OverlayNode(pb2_grpc.OverlayNodeServicer):
    """The methods that others call; the work is in overlay.service."""

    def __init__(self, service: Service, metrics_pool: ThreadPoolExecutor) -> None:
        self._service = service
        self.GetMetrics = on_threads_of(metrics_pool, self.GetMetrics)

    def Forward(self, request, context):
        return self._service.forward(request, context)

    def ForwardStream(self, call, context):
        return self._service.forward_stream(call, context)

    def GetMetrics(self, request, context):
        return self._service.metrics(request.events, request.requests, request.functions)


class OverlayAdmin(pb2_grpc.OverlayAdminServicer):
    """The methods for those who run the process; the work is in overlay.admin."""

    def __init__(self, admin: Admin) -> None:
        self._admin = admin
        self.Drain = on_threads_of(admin.pool, self.Drain)
        self.Logs = on_threads_of(admin.logs_pool, self.Logs)

    def Drain(self, request, context):
        return self._admin.drain(request, context)

    def Logs(self, request, context):
        return self._admin.logs(request, context)


class Node:
    """The gRPC server of one process, from `start` to `stop`.

    stop_process: takes a grace in seconds and lets whoever runs this process call `stop` soon.
    """

    def __init__(
        self,
        topology: Topology,
        me: Process,
        service: Service,
        stop_process: Callable[[float], None],
    ) -> None:
        self.me = me
        self.service = service
        limits = topology.limits
        self.admin = Admin(me, service.journal, limits.drain_grace_s, stop_process)
        self.pool = ThreadPoolExecutor(service.pool_threads, "forward")
        self.metrics_pool = ThreadPoolExecutor(limits.metrics_threads, "metrics")
        most = most_connections(raise_file_limit())
        self.server = grpc.server(self.pool, options=wire.server_options(limits, most))
        self.reception = Reception(self.server, self.pool, limits, service.record)
        service.calls_without_message = lambda: self.reception.unarrived
        peers = self.reception.open_peers
        self.connections = Connections(me.port, most, service.record, peers, self._look_after)
        self.memory = Memory(lambda: service.is_busy)
        self.health = Health(self.metrics_pool)
        node = OverlayNode(service, self.metrics_pool)
        pb2_grpc.add_OverlayNodeServicer_to_server(node, self.reception)
        pb2_grpc.add_OverlayAdminServicer_to_server(OverlayAdmin(self.admin), self.reception)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.reception)
        names = (OVERLAY_NODE, OVERLAY_ADMIN, HEALTH, reflection.SERVICE_NAME)
        look = reflection.ReflectionServicer(names)
        look.ServerReflectionInfo = on_threads_of(self.metrics_pool, look.ServerReflectionInfo)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(look, self.reception)

    def start(self) -> None:
        """Serves when it returns. Raises ConfigError when the port cannot be had."""
        self._bind()
        self.server.start()
        self._probe()
        self.connections.start()
        self.service.start()
        self._set_health(health_pb2.HealthCheckResponse.SERVING)

    def stop(self, grace_s: float) -> Drained:
        """Refuses new requests, lets the running ones end, then closes."""
        # In this order: neighbours route around us before the first request is refused.
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        drained = self.service.drain(grace_s)
        self.admin.tell(grace_s, drained)
        self.server.stop(0.5).wait(2)
        self.service.close()
        self.admin.close()
        self.connections.stop()
        for pool in (self.pool, self.metrics_pool):
            pool.shutdown(wait=False, cancel_futures=True)
        return drained

    def _look_after(self) -> None:
        self.reception.end_late()
        self.memory.look()

    def _set_health(self, status: int) -> None:
        for name in ("", OVERLAY_NODE):
            self.health.set(name, status)

    def _bind(self) -> None:
        address = self.me.listen_address
        try:
            bound = self.server.add_insecure_port(address)
        except RuntimeError as e:
            raise ConfigError(f"process {self.me.id}: cannot listen on {address}: {e}") from None
        if bound != self.me.port:
            raise ConfigError(f"process {self.me.id}: asked for {address} and got port {bound}")

    def _probe(self) -> None:
        # The answer must come from this process, not from another that has the port too.
        host = self.me.bind or self.me.host
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "[::]": "::1"}.get(host, host)
        address = join_address(host, self.me.port)
        with grpc.insecure_channel(address, wire.channel_options()) as channel:
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
        topology = configuration.load(arguments.config)
        me = topology.process(arguments.id)
        if arguments.check:
            return _say_checked(topology)
        _wait_for_port(me)
        return _serve(topology, me, arguments.stop_file)
    except OverlayError as e:
        for problem in getattr(e, "problems", (str(e),)):
            print(f"node.py: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="node.py", description="Serves one process of an overlay."
    )
    parser.add_argument("config", metavar="CONFIG", help="for example two_hosts_config.json")
    parser.add_argument("id", metavar="ID", help="the process of that file to serve, for example A")
    parser.add_argument("--check", action="store_true", help="only check the configuration")
    parser.add_argument(
        "--stop-file",
        type=lambda path: Path(path).absolute(),  # a handler may change the current folder
        metavar="PATH",
        help="stop when this file appears",
    )
    return parser.parse_args(argv)


def _say_checked(topology: Topology) -> int:
    for warning in configuration.warnings(topology):
        print(f"warning: {warning}")
    print(f"{topology.name} is right: {len(topology.processes)} processes")
    return 0


def _serve(topology: Topology, me: Process, stop_file: Path | None) -> int:
    keep_little()
    stopping = _Stopping(topology.limits.drain_grace_s)
    log = ProcessLog(topology.folder / me.log_dir / f"process_{me.id.lower()}.log", me.id)
    log.start()
    try:
        service = Service(topology, me.id, log.recent, lambda: log.dropped)
        node = Node(topology, me, service, stopping.ask)
        try:
            node.start()
        except BaseException:
            node.stop(0)
            raise
        _announce(topology, me)
        with _told_to_prometheus(me, service):
            log.take_prints()
            _calm_garbage_collector()
            stopping.wait(stop_file)
            left = _stop(node, stopping.grace_s)
        if stop_file is not None:  # for `run.py`: it did not die, and how it ended
            with contextlib.suppress(OSError):
                stop_file.write_text(f"{left}\n")
        return 1 if left else 0
    finally:
        log.stop()


@contextlib.contextmanager
def _told_to_prometheus(me: Process, service: Service) -> Iterator[None]:
    """While the process runs and stops, if that is configured."""
    if me.metrics_port is None:
        yield
        return
    from overlay.exporter import Exporter  # its library takes a moment, and few want it

    exporter = Exporter(service.metrics, me.metrics_bind, me.metrics_port)
    exporter.start()
    try:
        yield
    finally:
        exporter.stop()


def _calm_garbage_collector() -> None:
    # Requests leave no cycles behind, and what is there now stays until the end: looking through it
    # with every few hundred new objects costs a twentieth of the work.
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def _announce(topology: Topology, me: Process) -> None:
    print(f"{me.id} {me.role} {me.team} serves on {me.listen_address}", flush=True)
    log = _log()
    for warning in configuration.warnings(topology):
        log.warning("%s", warning)
    if me.host not in ("127.0.0.1", "::1", "[::1]", "localhost"):
        log.warning("no TLS: whoever reaches %s can send requests", me.listen_address)
    about = {"kind": "started"}
    log.info("serves on %s, pid %d", me.listen_address, os.getpid(), extra=about)


def _stop(node: Node, grace_s: float) -> int:
    """How many requests did not end within the grace."""
    began = time.monotonic()
    _log().info("stopping: up to %g s for what runs", grace_s, extra={"kind": "stopping"})
    _watchdog(grace_s + 5)
    drained = node.stop(grace_s)
    _log().info(
        "stopped in %.1f s; %d requests refused, %d left behind",
        time.monotonic() - began,
        drained.refused,
        drained.left,
    )
    if drained.left:  # a handler that does not end holds a thread, and that would hold the process
        _watchdog(1)
    return drained.left


def _watchdog(after_s: float) -> None:
    timer = threading.Timer(after_s, os._exit, (1,))
    timer.daemon = True
    timer.start()


class _Stopping:
    """Waits for a signal, the stop file or `ask`. The second signal ends the process at once.

    grace_s: what runs may take so long then.
    """

    def __init__(self, grace_s: float) -> None:
        self.grace_s = grace_s
        self._wanted = threading.Event()
        self._was_signalled = False
        for name in ("SIGINT", "SIGTERM", "SIGBREAK"):  # Ctrl-Break is what Windows has
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._signalled)

    def wait(self, stop_file: Path | None) -> None:
        # In slices: a wait without end cannot be interrupted on Windows before Python 3.14.
        while not self._wanted.wait(0.2):
            if stop_file is not None and stop_file.exists():
                return

    def ask(self, grace_s: float) -> None:
        """As the first signal does. Safe from any thread; only the first grace counts."""
        if not self._wanted.is_set():
            self.grace_s = grace_s
        self._wanted.set()

    def _signalled(self, number: int, frame: object) -> None:
        if self._was_signalled:
            os._exit(128 + number)
        self._was_signalled = True
        self._wanted.set()


def _wait_for_port(me: Process) -> None:
    until = time.monotonic() + PORT_PATIENCE_S
    while (problem := _port_problem(me)) is not None:
        error, sentence = problem
        if error != errno.EADDRINUSE or time.monotonic() > until:
            raise ConfigError(f"process {me.id}: {sentence}")
        time.sleep(0.1)


def _port_problem(me: Process) -> tuple[int | None, str] | None:
    """Why the address cannot be listened on, found with a plain socket: gRPC does not say."""
    host = (me.bind or me.host).strip("[]")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, me.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            if os.name == "posix":  # as gRPC does; elsewhere it would allow to share the port
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except socket.gaierror:
        return None, f"host '{host}' has no address; check its spelling or write its number"
    except (OSError, UnicodeError) as e:
        return getattr(e, "errno", None), _bind_sentence(me, host, e)
    return None


def _bind_sentence(me: Process, host: str, e: OSError | UnicodeError) -> str:
    code = getattr(e, "errno", None)
    if code == errno.EADDRINUSE:
        return (
            f"port {me.port} on {host} is taken by another program (or by {me.id} itself, "
            f"still running); stop that one or give {me.id} another port"
        )
    if code == errno.EADDRNOTAVAIL:
        return (
            f"{host} is not an address of this machine; start {me.id} on the machine that has it, "
            f"or correct its host (behind NAT: set its bind)"
        )
    if code == errno.EACCES:
        return f"port {me.port} on {host} needs rights that you do not have; use one above 1023"
    return f"cannot listen on {host}:{me.port}: {e}"


def _log():
    import logging

    return logging.getLogger("overlay.node")


if __name__ == "__main__":
    sys.exit(main())
