"""The overlay itself: six processes as shipped, asked through its client library."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

from benchmarks.children import Group
from benchmarks.loads import TIMEOUT_S, FuturesCaller
from benchmarks.rows import Setup
from tests.harness.machine import ROOT, NotReached, until

TITLE = "ours"
PACKAGES = ("grpcio", "protobuf")
SUPPORTS = {"window", "threads", "unary", "bulk", "bulk_singly", "all"}
BULK = 50_000
NOTES = (
    "The six processes of two_hosts_config.json, every setting as shipped; only host and port are "
    "changed, and for the 5 ms rows a handler with its slots is named. One client connection, but "
    "where the row says how many clients there are. "
    "The library gathers calls that are under way at the same time into frames, and the processes "
    "send them on in segments: its rate above one caller comes from that."
)


def missing() -> str:
    return ""


def start(group: Group, setup: Setup) -> dict:
    return serve(group, setup, configuration(setup))


def serve(group: Group, setup: Setup, config: dict) -> dict:
    """Starts the processes of this configuration."""
    path = group.folder / "overlay.json"
    path.write_text(json.dumps(config, indent=2))
    for process_id in config["processes"]:
        name = f"node-{process_id}"
        group.command(name, [sys.executable, str(ROOT / "node.py"), str(path), process_id])
    for process_id in config["processes"]:
        group.wait_for_text(f"node-{process_id}", "serves on")
    leader = next(p for p in config["processes"].values() if p["role"] == "leader")
    return {"address": f"{leader['host']}:{leader['port']}", "workers": len(setup.workers)}


def configuration(setup: Setup) -> dict:
    """The shipped file on loopback, without the workers that the set-up leaves out."""
    from tests.harness.cluster import six_processes  # here, because it imports gRPC

    config = six_processes()
    processes = config["processes"]
    if not set(setup.workers) <= set(processes):
        processes = config["processes"] = _with_workers(processes, setup.workers)
    kept = {i for i, p in processes.items() if p["role"] != "worker" or p["id"] in setup.workers}
    # A team leader without workers of its team has nothing to lead.
    teams = {processes[i]["team"] for i in kept if processes[i]["role"] == "worker"}
    kept -= {i for i in kept if processes[i]["role"] == "team_leader"} - {
        i for i in kept if processes[i]["team"] in teams
    }
    config["processes"] = {i: p for i, p in processes.items() if i in kept}
    for process in config["processes"].values():
        process["neighbors"] = [n for n in process["neighbors"] if n in kept]
    if setup.slots:
        name = "nap" if setup.nap_s else "tiny"
        config["handlers"] = {name: {"call": f"benchmarks.handlers:{name}", "slots": setup.slots}}
        for process in config["processes"].values():
            process["handler"] = name
    return config


def _with_workers(processes: dict, workers: tuple[str, ...]) -> dict:
    """The same leader and team leaders, with other workers below them in turn."""
    from tests.harness.machine import free_ports

    kept = {i: p for i, p in processes.items() if p["role"] != "worker"}
    leaders = [process for process in kept.values() if process["role"] == "team_leader"]
    used = {process["port"] for process in kept.values()}
    ports = [port for port in free_ports(len(workers) + len(kept)) if port not in used]
    for number, (id_, port) in enumerate(zip(workers, ports, strict=False)):
        leader = leaders[number % len(leaders)]
        leader["neighbors"] = [*leader["neighbors"], id_]
        like = {"role": "worker", "team": leader["team"], "host": leader["host"]}
        kept[id_] = {"id": id_, "port": port, "neighbors": [leader["id"]], **like}
    return kept


class Caller(FuturesCaller):
    def __init__(self, address: str, workers: int, tls: str = "", lanes: bool = True) -> None:
        """tls: the folder of certificates; empty for plaintext. lanes: as for `connect`."""
        import overlay
        from overlay.transport import codec as wire

        self._connect = partial(overlay.connect, address, tls=tls or False)
        self._client = self._connect(lanes=lanes)
        self._clients: dict[tuple[int, bool], _Client] = {}
        self._wait_for(workers)
        self._pb2 = wire.pb2
        self._channel = _channel(address, tls)
        self._forward = wire.pb2_grpc.OverlayNodeStub(self._channel).Forward

    def call(self, payload: bytes, mode: str) -> bytes:
        return self._client.call(payload, mode=mode, timeout=TIMEOUT_S).result

    def submit(self, payload: bytes, mode: str):
        return self._client.submit(None, payload, mode=mode)

    def map(self, items: list[bytes], mode: str):
        return self._client.map(None, items, mode=mode)

    def unary_of(self, thread: int):
        request, forward = self._pb2.Request, self._forward
        return lambda payload, mode: (
            forward(request(payload=payload, mode=mode.upper()), timeout=TIMEOUT_S).result
        )

    def client(self, number: int, lanes: bool) -> FuturesCaller:
        key = number, lanes
        if key not in self._clients:
            self._clients[key] = _Client(self._connect(lanes=lanes))
        return self._clients[key]

    def close(self) -> None:
        self._channel.close()
        for client in (self._client, *self._clients.values()):
            client.close()

    def _wait_for(self, workers: int) -> None:
        """Waits until every worker answers: links take a moment to come up."""

        def all_answer() -> bool:
            return self._client.call(b"0", timeout=TIMEOUT_S).coverage == (workers, workers)

        try:
            until(all_answer, TIMEOUT_S)
        except NotReached:
            raise TimeoutError(f"not all {workers} workers answered") from None


class _Client(FuturesCaller):
    def __init__(self, client) -> None:
        self._client = client

    def submit(self, payload: bytes, mode: str):
        return self._client.submit(None, payload, mode=mode)

    def close(self) -> None:
        self._client.close()


def _channel(address: str, tls: str):
    """As any gRPC client makes one."""
    import grpc

    if not tls:
        return grpc.insecure_channel(address)
    ca, user = ((Path(tls) / name).read_bytes() for name in ("ca.pem", "user.pem"))
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(ca, user, user))
