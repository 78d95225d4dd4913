"""The demo: six processes on this machine, a page that shows them, real requests with answers.

    demo.py          stays up until Ctrl-C, so that you can try more
    demo.py --once   ends after the requests; exit code 0 only when every answer was right

The processes are those of one_host_config.json, on other ports, with the handlers of the examples.
Their configuration is written to examples/.demo.json, because handlers are looked for beside the
configuration. What a killed demo left running is stopped by the next one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import launcher
import psutil
from processes import (
    ROOT,
    Child,
    Record,
    Refused,
    apart,
    command,
    end,
    launch,
    report_failure,
    shown,
    take_back,
    wait_until_linked,
    wait_until_ready,
)

from overlay.cli import stdio
from overlay.cli.terminal import Screen
from overlay.cli.usage import Parser
from overlay.client.sync import connect
from overlay.model.config import load
from overlay.model.errors import ConfigError, OverlayError

CONFIG = ROOT / "examples" / ".demo.json"
LOGS = ROOT / "logs" / "demo"
OWNER = LOGS / "demo.pid"  # which demo the processes belong to
THUMBNAILS = LOGS / "thumbnails"
PHOTOS = ROOT / "examples" / "photos"
PATTERN = r"re:^class \w+Error\("
GRACE_S = 10.0
PAGE_PORT = 8050
# The demo's ports are this far below the configured ones: no closed overlay speaks TLS there, and
# no outgoing connection takes one just before a process listens on it, as happens above 32767.
BELOW = 30_000
TIMEOUT_S = 60.0  # a laptop may be busy just after six processes have started


class WrongAnswer(Exception):
    """The overlay answered, but not as expected."""


def main(arguments: Sequence[str]) -> int:
    stdio.escape_unprintable()
    parser = Parser("run.py demo", (__doc__ or "").splitlines()[0])
    parser.add_argument("--once", action="store_true", help="end after the requests")
    once = parser.parse_args(arguments).once
    given_up = launcher.end_on_signal()
    try:
        with _the_only_demo():
            return _demo(once, given_up)
    except (ConfigError, Refused) as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:  # as with `| head`: everything is stopped by now
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


@contextlib.contextmanager
def _the_only_demo() -> Iterator[None]:
    """Raises Refused while another demo runs; stops what a killed one has left running."""
    LOGS.mkdir(parents=True, exist_ok=True)
    other = Record.read(OWNER)
    if other and other.process():
        raise Refused(
            f"the demo is already running as pid {other.pid}; end it with Ctrl-C in its terminal, "
            f"or with: {command('stop')} {shown(CONFIG)}"
        )
    left = [r for path in LOGS.glob("process_*.pid") if (r := Record.read(path)) and r.process()]
    if left:
        end(left, GRACE_S)
        names = ", ".join(sorted(record.id for record in left))
        print(f"stopped {names}, left by a demo that was killed")
    me = psutil.Process()
    Record("demo", 0, me.pid, me.create_time(), 0, str(CONFIG), "", "").write(OWNER)
    try:
        yield
    finally:
        OWNER.unlink(missing_ok=True)


def _demo(once: bool, given_up: threading.Event) -> int:
    examples = _write_configuration()
    topology = load(CONFIG)
    children: list[Child] = []
    page: subprocess.Popen[bytes] | None = None
    print("starting six processes on this machine ...", flush=True)
    try:
        launch(topology, topology.processes.values(), children, given_up)
        wait_until_ready(children, launcher.WAIT_S, given_up, None)
        if not given_up.is_set() and any(child.ready_ms is None for child in children):
            report_failure(children, None)
            children.clear()
            return 1
        wait_until_linked(children, given_up, None)
        _print_processes(children)
        address = topology.processes["A"].address
        if not once:
            page = _open_page(address)
        fine = _requests(address, examples, given_up)
        if not once and not given_up.is_set():
            _stay_up(address, children, given_up)
        return 0 if fine else 1
    finally:
        if page:
            page.kill()  # it only reads
            page.wait()
        if children:
            with contextlib.suppress(OSError):  # the reader may be gone
                print("stopping ...", flush=True)
            take_back(children)
            with contextlib.suppress(OSError):
                print("all six processes have stopped", flush=True)


# The configuration


def _write_configuration() -> list[str]:
    """Writes CONFIG. Returns the names of its handlers; echo is built in."""
    made = _read("one_host_config.json")
    processes = made["processes"].values()
    made.pop("tls", "")
    ports = free_ports([process["port"] - BELOW for process in processes])
    for process, port in zip(processes, ports, strict=True):
        process["port"] = port
    made |= {"log_dir": "../logs/demo", "handlers": {}}
    names = ["search.json"]
    if importlib.util.find_spec("PIL"):
        names.append("pictures.json")
    else:
        print("no thumbnails: Pillow is not installed in this Python")
    for name in names:
        example = _read("examples", name)
        made["handlers"] |= example["handlers"]
        for process_id, process in example["processes"].items():
            options = made["processes"][process_id].setdefault("options", {})
            options |= process.get("options", {})
    CONFIG.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    return list(made["handlers"])


def _read(*names: str) -> Any:
    return json.loads(ROOT.joinpath(*names).read_text(encoding="utf-8-sig"))


def free_ports(wanted: Sequence[int]) -> list[int]:
    """These ports where they are free, else others below those of outgoing connections."""
    with contextlib.ExitStack() as stack:
        return [_hold(stack, port) for port in wanted]


def _hold(stack: contextlib.ExitStack, port: int) -> int:
    for tried in (port, *random.sample(range(10_000, 32_000), 100)):
        with contextlib.suppress(OSError):
            held = stack.enter_context(socket.socket())
            held.bind(("127.0.0.1", tried))
            return tried
    raise Refused("no free port was found on 127.0.0.1")


def _print_processes(children: Sequence[Child]) -> None:
    rows = []
    for child in children:
        process = child.process
        ready = f"{child.ready_ms:.0f} ms" if child.ready_ms else ""
        pid = str(child.record.pid)
        rows.append((process.id, process.role, process.team, process.address, pid, ready))
    Screen(sys.stdout).table("", ("id", "role", "team", "address", "pid", "ready"), rows)
    print(f"logs: {shown(LOGS)}\n")


# The page


def _open_page(address: str) -> subprocess.Popen[bytes]:
    """Starts the page that shows the six processes, and prints its address.

    It ends when its standard input does, and so with this process, however that ends.
    """
    host, port = address.split(":")
    (page_port,) = free_ports([PAGE_PORT])
    call = [sys.executable, str(ROOT / "client.py"), host, port, "web", "--until-eof"]
    page = subprocess.Popen(
        [*call, "--web-port", str(page_port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **apart(),
    )
    line = page.stdout.readline().decode("utf-8", "replace").strip() if page.stdout else ""
    found = re.search(r"http://\S+", line)
    print(f"watch them work: {found[0]}\n" if found else f"no page: {line}\n", flush=True)
    return page


# The requests


def _requests(address: str, examples: Sequence[str], given_up: threading.Event) -> bool:
    """Sends each request and shows its answer. Returns False when one of them was not right."""
    steps: list[Callable[[Any], None]] = [_echo_all, _echo_any]
    if "search" in examples:
        steps.append(_search)
    if "pictures" in examples:
        steps.append(_pictures)
    steps.append(_status)
    fine = True
    with connect(address) as client:
        for step in steps:
            if given_up.is_set():
                return False
            try:
                step(client)
            except (OverlayError, WrongAnswer) as error:
                print(f"  NOT RIGHT: {error}")
                fine = False
            print(flush=True)
    return fine


def _echo_all(client: Any) -> None:
    print('mode ALL, handler echo: every worker answers "hello"')
    answer = client.call("hello", timeout=TIMEOUT_S)
    print("".join(f"  {line}\n" for line in answer.result.decode().splitlines()), end="")
    print(f"  its path: {' '.join(answer.hops)}; answered: {_coverage(answer)}")
    _expect(answer.result == b"C: hello\nD: hello\nF: hello", f"the result is {answer.result!r}")
    _expect_all(answer)


def _echo_any(client: Any) -> None:
    print("mode ANY, handler echo: one worker answers, the least loaded")
    for number in range(1, 5):
        payload = f"request {number}"
        answer = client.call(payload, mode="any", timeout=TIMEOUT_S)
        print(f"  {answer.result.decode()}   (path: {' '.join(answer.hops)})")
        _expect(answer.result.endswith(payload.encode()), f"the result is {answer.result!r}")


def _search(client: Any) -> None:
    print(f"mode ALL, handler search: {PATTERN} in Python's library, a third for each worker")
    began = time.monotonic()
    answer = client.call(PATTERN, handler="search", timeout=TIMEOUT_S)
    took_ms = (time.monotonic() - began) * 1000
    lines = answer.result.decode("utf-8", "replace").splitlines()
    counts = Counter(line[0] for line in lines if re.match(r"[CDF]: ", line))
    found = ", ".join(f"{worker} {count}" for worker, count in sorted(counts.items()))
    print(f"  {sum(counts.values())} lines in {took_ms:.0f} ms, merged by A: {found}; for example")
    for line in lines[:: max(1, len(lines) // 4)][:4]:
        print(f"  {line[:96]}")
    _expect_all(answer)
    _expect(counts.keys() == {"C", "D", "F"}, f"only {sorted(counts)} found something")


def _pictures(client: Any) -> None:
    print("mode ANY, handler pictures: each picture goes to one worker, all at once")
    THUMBNAILS.mkdir(parents=True, exist_ok=True)
    photos = sorted(PHOTOS.glob("*.jpg"))
    with ThreadPoolExecutor(len(photos), "demo") as pool:
        jobs = [pool.submit(_thumbnail, client, photo) for photo in photos]
    columns = ("picture", "KiB", "thumbnail", "KiB", "made by", "ms")
    Screen(sys.stdout).table("", columns, [job.result() for job in jobs])


def _thumbnail(client: Any, photo: Path) -> tuple[str, ...]:
    before = photo.read_bytes()
    began = time.monotonic()
    answer = client.call(before, mode="any", handler="pictures", timeout=TIMEOUT_S)
    took_ms = (time.monotonic() - began) * 1000
    _expect(answer.result.startswith(b"\xff\xd8"), f"{photo.name}: the answer is no JPEG")
    target = THUMBNAILS / photo.name
    target.write_bytes(answer.result)
    worker = answer.parts[0].process_id
    sizes = _kib(before), _kib(answer.result)
    return (photo.name, sizes[0], shown(target), sizes[1], worker, f"{took_ms:.0f}")


def _status(client: Any) -> None:
    print("the leader's queue, from GetMetrics")
    m = client.metrics(timeout=TIMEOUT_S)
    print(f"  waiting {m.queue_size} of {m.queue_slots}, in service ", end="")
    print(f"{m.active_requests} of {m.max_capacity}; since the start: ", end="")
    print(f"{m.completed} answered, {m.failed} failed, {m.refused} refused")
    _expect(m.failed == m.refused == 0, "a request has failed or was refused")


def _coverage(answer: Any) -> str:
    answered, asked = answer.coverage
    return f"{answered} of {asked}"


def _expect_all(answer: Any) -> None:
    missing = ", ".join(f"{part.process_id} ({part.reason})" for part in answer.missing)
    _expect(len(answer.parts) == 3 and not missing, f"no answer from: {missing or 'some workers'}")


def _expect(right: bool, otherwise: str) -> None:
    if not right:
        raise WrongAnswer(otherwise)


def _kib(data: bytes) -> str:
    return f"{len(data) / 1024:.0f}"


# Until Ctrl-C


def _stay_up(address: str, children: Sequence[Child], given_up: threading.Event) -> None:
    host, port = address.split(":")
    python = shown(Path(sys.executable))
    print("the six processes stay up; in another terminal try")
    verbs = (
        ("client.py", ""),
        ("client.py", " top"),
        ("client.py", " check"),
        ("test_system.py", ""),
    )
    for script, verb in verbs:
        print(f"  {python} {shown(ROOT / script)} {host} {port}{verb}")
    print(f"  {command('status')} {shown(CONFIG)}")
    print("and press Ctrl-C here to stop them", flush=True)
    up = list(children)
    while up and not given_up.wait(0.3):
        for child in [child for child in up if child.popen.poll() is not None]:
            up.remove(child)
            print(f"process {child.process.id} has ended ({_how(child.popen)})", flush=True)
    if given_up.is_set():
        print()


def _how(popen: subprocess.Popen[bytes]) -> str:
    return f"exit code {popen.returncode}" if popen.returncode >= 0 else "it was killed"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
