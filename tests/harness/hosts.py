"""Two hosts on one machine: network namespaces joined by a virtual link, with the six processes.

    host 1, 192.168.1.1: A B D    wire ======== wire    host 2, 192.168.1.2: C E F

Linux only, as root. `Hosts` creates and removes them; `Wire` runs programs in them and cuts the
link, also from a program inside one. `SixOnTwoHosts` runs the shipped configuration there,
unchanged, and `Caller` is a gRPC client in a host: this file as a program.

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
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from overlay.model.segments import Executed
from overlay.transport import codec, endpoints
from overlay.transport.codec import pb2
from tests.harness.cluster import NODE, ROOT, Overlay, environment
from tests.harness.commands import CLIENT_MODULES
from tests.harness.forks import Fork, ForkServer

SHIPPED = ROOT / "two_hosts_config.json"
ADDRESSES = {1: "192.168.1.1", 2: "192.168.1.2"}
# Programs that `Hosts.run` forks, as their starts take longer than what they do; their imports.
FORKED = {"client.py": CLIENT_MODULES, "launcher.py": ()}

# Waits until its parent closes stdin or exits, then kills what runs in the hosts and deletes them.
# Deleting a namespace alone would leave its processes behind.
JANITOR = """
cat >/dev/null
for host do
    for pid in $(ip netns pids "$host" 2>/dev/null); do kill -KILL "$pid"; done
    ip netns del "$host" 2>/dev/null
done
"""

_numbers = itertools.count(1)


class CannotBuild(Exception):
    """This machine cannot have two hosts; the message says why."""


def why_not() -> str:
    """Why this machine cannot have two hosts; empty if nothing is known to prevent it."""
    if not sys.platform.startswith("linux"):
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "two hosts need root, for network namespaces"
    return "" if shutil.which("ip") else "two hosts need the program 'ip'"


class Wire:
    """Two existing hosts and the link between them. names: their namespaces."""

    def __init__(self, names: Mapping[int, str]) -> None:
        self.names = dict(names)

    def popen(self, host: int, *command: str, **options: Any) -> subprocess.Popen[str]:
        """Starts a program in the host. `ip` execs it, so the pid is the program's own."""
        options = {"text": True, "encoding": "utf-8", **options}
        return subprocess.Popen(self.inside(host, *command), **options)

    def inside(self, host: int, *command: str) -> list[str]:
        """The command prefixed to run in the host."""
        return ["ip", "netns", "exec", self.names[host], *command]

    def run(
        self, host: int, *command: str, within_s: float = 30, cwd: Path = ROOT
    ) -> subprocess.CompletedProcess[str]:
        """Runs a program in the host; returns its exit code and all that it printed."""
        pipes = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
        }
        with self.popen(host, *command, cwd=cwd, **pipes) as program:
            try:
                printed, _ = program.communicate(timeout=within_s)
            finally:
                program.kill()
        return subprocess.CompletedProcess(command, program.returncode, printed)

    def cut(self) -> None:
        """Takes down host 2's end of the link."""
        ip("-n", self.names[2], "link", "set", "wire", "down")

    def heal(self) -> None:
        ip("-n", self.names[2], "link", "set", "wire", "up")

    def deafen(self, host: int) -> None:
        """Drops the packets that the host receives; what it sends still arrives."""
        self._deafness(host, "-A", "add")

    def undeafen(self, host: int) -> None:
        self._deafness(host, "-D", "del")

    def _deafness(self, host: int, rule: str, route: str) -> None:
        if shutil.which("iptables"):
            done = self.run(host, "iptables", rule, "INPUT", "-i", "wire", "-j", "DROP")
            if done.returncode:
                raise CannotBuild(f"iptables in a namespace: {done.stdout.strip()}")
        else:  # nearly the same, but the other host's sends fail immediately
            ip("-n", self.names[3 - host], "route", route, "blackhole", f"{ADDRESSES[host]}/32")

    @contextlib.contextmanager
    def firewall(self, host: int, port: int) -> Iterator[None]:
        """The port of this host takes no new connections from the other; the open ones stay."""
        if not shutil.which("iptables"):
            raise CannotBuild("the program 'iptables' is missing")
        rule = ["INPUT", "-i", "wire", "-p", "tcp", "--dport", str(port), "--syn", "-j", "DROP"]
        done = self.run(host, "iptables", "-A", *rule)
        if done.returncode:
            raise CannotBuild(f"iptables in a namespace: {done.stdout.strip()}")
        try:
            yield
        finally:
            self.run(host, "iptables", "-D", *rule)


class Hosts(Wire):
    """Creates both. `close`, or the end of this process, removes them. Raises CannotBuild."""

    def __init__(self) -> None:
        if why := why_not():
            raise CannotBuild(why)
        number = next(_numbers)
        super().__init__({host: f"overlay-{os.getpid()}-{number}-{host}" for host in ADDRESSES})
        self._fork_servers: dict[tuple[int, Path], ForkServer] = {}
        self._janitor = subprocess.Popen(
            ["sh", "-c", JANITOR, "janitor", *self.names.values()],
            stdin=subprocess.PIPE,
            start_new_session=True,  # so that a signal to this process's group spares it
        )
        try:
            for name in self.names.values():
                ip("netns", "add", name)
                ip("-n", name, "link", "set", "lo", "up")
            self._join()
        except BaseException:
            self.close()
            raise

    def run(
        self, host: int, *command: str, within_s: float = 30, cwd: Path = ROOT
    ) -> subprocess.CompletedProcess[str]:
        if command[0] != sys.executable or Path(command[1]).name not in FORKED:
            return super().run(host, *command, within_s=within_s, cwd=cwd)
        program = self.fork_server(host, cwd / command[1]).start(list(command[2:]), cwd)
        with program.stdout, ThreadPoolExecutor(1) as pool:
            printed = pool.submit(program.stdout.read)
            try:
                program.wait(within_s)
            finally:
                program.kill()
            return subprocess.CompletedProcess(command, program.returncode, printed.result())

    def fork_server(self, host: int, script: Path = NODE) -> ForkServer:
        """Forks processes of the script in the host."""
        if (host, script) not in self._fork_servers:
            modules = FORKED.get(script.name, ())
            made = ForkServer(script, environment(), self.inside(host), modules)
            self._fork_servers[host, script] = made
        return self._fork_servers[host, script]

    def close(self) -> None:
        for fork_server in self._fork_servers.values():
            fork_server.close()
        if self._janitor.stdin and not self._janitor.stdin.closed:
            self._janitor.stdin.close()
        self._janitor.wait(10)

    def _join(self) -> None:
        end1, end2 = self.names.values()
        ip(*f"link add wire netns {end1} type veth peer name wire netns {end2}".split())
        for host, name in self.names.items():
            ip("-n", name, "addr", "add", f"{ADDRESSES[host]}/24", "dev", "wire")
            ip("-n", name, "link", "set", "wire", "up")


def ip(*words: str) -> str:
    """Runs `ip` and returns its output. Raises CannotBuild with its error message."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotBuild(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


class SlowHosts(Hosts):
    """Two hosts whose link delays each packet by `delay_ms`."""

    def __init__(self, delay_ms: float) -> None:
        self._delay_ms = delay_ms
        super().__init__()

    def _join(self) -> None:
        sides = [word for host in ADDRESSES for word in (self.names[host], f"{ADDRESSES[host]}/24")]
        script = str(ROOT / "tests" / "harness" / "slow_link.py")
        program = [sys.executable, script, *sides, str(self._delay_ms)]
        # Started in host 2, where it ends up anyway, so that the janitor finds it.
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
        """Starts one after another, each when the one before serves; then waits for the links."""
        for process_id in ids:
            self.spawn(process_id)
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
        """Calls Forward from a client on the host. fields: of Request."""
        request = pb2.Request(**{"payload": b"hi", **fields}).SerializeToString()
        caller = self.callers[host]
        return caller.begin(self.address(process_id), "Forward", request, timeout, wait)

    def ask(self, process_id: str, **named: Any) -> Reply:
        return self.begin(process_id, **named).result(named.get("timeout", 10) + 5)

    def metrics(self, process_id: str) -> pb2.MetricsResponse:
        """Asks from the process's own host, so that a cut link does not matter."""
        caller = self.callers[self.host(process_id)]
        reply = caller.begin(self.address(process_id), "GetMetrics", b"", 5, True).result(10)
        assert reply.code == "OK", f"{process_id}: {reply.code} {reply.details}"
        return pb2.MetricsResponse.FromString(reply.body)

    def stop(self) -> None:
        for caller in self.callers.values():
            caller.close()
        super().stop()

    def _spawn(self, process_id: str) -> subprocess.Popen[Any] | Fork:
        host, command = self.host(process_id), self._node(process_id)
        if command[:2] == [sys.executable, str(NODE)]:
            return self.hosts.fork_server(host).start(command[2:], self.folder)
        return self.hosts.popen(
            host,
            *command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self.folder,
            env=self.environment,
            start_new_session=True,
        )


@dataclass(frozen=True)
class Reply:
    """The result of one call and its duration, both measured by the client."""

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
        """The ids of the workers that answered, for example "CDF". Empty for a failed call."""
        if self.code != "OK":
            return ""
        return "".join(part.process_id for part in self.response.parts if part.code == 0)

    @property
    def missing(self) -> dict[str, str]:
        """Worker -> reason, for each worker that did not answer."""
        return {p.process_id: p.reason for p in self.response.parts if p.code != 0}

    def proves_that_nothing_ran_at(self, worker: str) -> bool:
        if self.code != "OK":
            return self.trailers.get(codec.EXECUTED_KEY) == "no"
        return any(
            part.process_id == worker and part.executed == Executed.NO
            for part in self.response.parts
        )


class Caller:
    """A gRPC client process in a host, for concurrent calls."""

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


def run_caller() -> None:
    """Makes a call for each line of stdin, and prints the result of each."""
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
    run_caller()
    os._exit(0)  # saves the 0.2 s that gRPC takes to close its channels
