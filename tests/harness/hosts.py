"""The shipped six on two hosts of this one machine, for the tests; faults.hosts makes those.

    host 1, 192.168.1.1: A B D    wire ======== wire    host 2, 192.168.1.2: C E F

`SixOnTwoHosts` runs the shipped configuration there, unchanged, and `Caller` is a gRPC client
inside a host. Run as a program (`python -m tests.harness.hosts`), this file is that client.

A Caller owns one thread, which ends with its client process.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from faults.hosts import ADDRESSES, CannotBuild, Hosts
from overlay.model.segments import Executed
from overlay.transport import codec, endpoints
from overlay.transport.codec import pb2
from tests.harness.cluster import ROOT, Overlay

SHIPPED = ROOT / "two_hosts_config.json"


class SlowHosts(Hosts):
    """Two hosts whose wire takes its time: each packet `delay_ms` to the other side."""

    def __init__(self, delay_ms: float) -> None:
        self._delay_ms = delay_ms
        super().__init__()

    def _join(self) -> None:
        sides = [word for host in ADDRESSES for word in (self.names[host], f"{ADDRESSES[host]}/24")]
        script = str(ROOT / "tests" / "harness" / "slow_link.py")
        program = [sys.executable, script, *sides, str(self._delay_ms)]
        # In host 2 from the start, where it ends up anyway, so that the janitor finds it.
        self._relay = self.popen(
            2, *program, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        said = self._relay.stdout.readline() if self._relay.stdout else ""
        if said != "joined\n":
            raise CannotBuild(f"the slow link does not start: {said}{self._relay.communicate()[0]}")


class SixOnTwoHosts(Overlay):
    """The six processes of two_hosts_config.json, byte for byte, each on its host."""

    def __init__(self, folder: Path, hosts: Hosts) -> None:
        super().__init__(folder, json.loads(SHIPPED.read_text()))
        self.path = folder / SHIPPED.name  # its logs go beside it
        shutil.copyfile(SHIPPED, self.path)
        self.hosts = hosts
        self.callers = {host: Caller(hosts, host) for host in ADDRESSES}

    def host(self, process_id: str) -> int:
        address = self.config["processes"][process_id]["host"]
        return next(host for host, own in ADDRESSES.items() if own == address)

    def start_in_turn(self, *ids: str) -> None:
        """Starts each when the one before serves; waits for the links at the end."""
        for process_id in ids:
            self.processes[process_id] = self._spawn(process_id)
            self._wait_ready(process_id)
        self.settle()

    def begin(
        self,
        process_id: str,
        *,
        host: int = 1,
        timeout: float = 10,
        wait: bool = False,
        **fields: Any,
    ) -> Future[Reply]:
        """Forward from a client on the host; the fields are those of Request."""
        request = pb2.Request(**{"payload": b"hi", **fields}).SerializeToString()
        caller = self.callers[host]
        return caller.begin(self.address(process_id), "Forward", request, timeout, wait)

    def ask(self, process_id: str, **named: Any) -> Reply:
        return self.begin(process_id, **named).result(named.get("timeout", 10) + 5)

    def metrics(self, process_id: str) -> pb2.MetricsResponse:
        """Asked on the process's own host, so that a cut wire does not hide it."""
        caller = self.callers[self.host(process_id)]
        reply = caller.begin(self.address(process_id), "GetMetrics", b"", 5, True).result(10)
        assert reply.code == "OK", f"{process_id}: {reply.code} {reply.details}"
        return pb2.MetricsResponse.FromString(reply.body)

    def stop(self) -> None:
        for caller in self.callers.values():
            caller.close()
        super().stop()

    def _spawn(self, process_id: str) -> subprocess.Popen[str]:
        return self.hosts.popen(
            self.host(process_id),
            *self._node(process_id),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self.folder,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
            start_new_session=True,
        )


@dataclass(frozen=True)
class Reply:
    """What a client saw of one call, and how long it took there."""

    code: str
    details: str
    trailers: dict[str, str]
    body: bytes
    took_s: float

    @property
    def response(self) -> pb2.Response:
        assert self.code == "OK", f"{self.code}: {self.details} after {self.took_s:.2f} s"
        return pb2.Response.FromString(self.body)

    @property
    def coverage(self) -> str:
        return self.trailers.get(codec.COVERAGE_KEY, "")

    @property
    def answered(self) -> str:
        """The ids of the workers that answered, in one word: "CDF". Empty for a failed call."""
        if self.code != "OK":
            return ""
        return "".join(part.process_id for part in self.response.parts if part.code == 0)

    @property
    def missing(self) -> dict[str, str]:
        """Worker -> reason, for those that did not answer."""
        return {p.process_id: p.reason for p in self.response.parts if p.code != 0}

    def proves_that_nothing_ran_at(self, worker: str) -> bool:
        if self.code != "OK":
            return self.trailers.get(codec.EXECUTED_KEY) == "no"
        return any(
            part.process_id == worker and part.executed == Executed.NO
            for part in self.response.parts
        )


class Caller:
    """A gRPC client process inside a host. Calls may be begun while others are under way."""

    def __init__(self, hosts: Hosts, host: int) -> None:
        self._program = hosts.popen(
            host,
            *(sys.executable, "-m", "tests.harness.hosts"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        self._numbers = itertools.count()
        self._open: dict[int, Future[Reply]] = {}
        self._reader = threading.Thread(target=self._read, name=f"caller-{host}", daemon=True)
        self._reader.start()

    def begin(
        self, address: str, method: str, request: bytes, timeout: float, wait: bool = False
    ) -> Future[Reply]:
        number, future = next(self._numbers), Future()
        self._open[number] = future
        text = base64.b64encode(request).decode()
        print(
            json.dumps([number, address, f"/OverlayNode/{method}", text, timeout, wait]),
            file=self._program.stdin,
            flush=True,
        )
        return future

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._program.stdin.close()
        try:
            self._program.wait(5)
        finally:
            self._program.kill()
            self._reader.join(5)
            self._program.stdout.close()

    def _read(self) -> None:
        for line in self._program.stdout:
            number, *facts, body, took_s = json.loads(line)
            reply = Reply(*facts, base64.b64decode(body), took_s)
            self._open.pop(number).set_result(reply)
        for future in list(self._open.values()):
            future.set_exception(AssertionError("the client process has ended"))


def call_as_told() -> None:
    """Makes the calls that stdin names, line by line, and prints what came of each."""
    channels: dict[str, grpc.Channel] = {}
    printing = threading.Lock()

    def ended(number: int, began: float, call: Any) -> None:
        took_s = time.monotonic() - began
        trailers = {k: v for k, v in call.trailing_metadata() or () if isinstance(v, str)}
        body = call.result() if call.code() is grpc.StatusCode.OK else b""
        text = base64.b64encode(body).decode()
        with printing:
            line = [number, call.code().name, call.details() or "", trailers, text, took_s]
            print(json.dumps(line), flush=True)

    for line in sys.stdin:
        number, address, method, text, timeout, wait = json.loads(line)
        if address not in channels:
            channels[address] = grpc.insecure_channel(address, endpoints.channel_options())
        ask = channels[address].unary_unary(method)  # bytes in, bytes out
        began = time.monotonic()
        call = ask.future(base64.b64decode(text), timeout=timeout, wait_for_ready=wait)
        call.add_done_callback(partial(ended, number, began))


if __name__ == "__main__":
    call_as_told()
    os._exit(0)  # without the 0.2 s that gRPC takes to close its channels
