"""Invariants of a real overlay during and after an attack.

an ordinary client of A gets every answer, and the right one
no process restarts, and each becomes idle again
its counters balance: received = completed + failed + refused + cancelled
its memory and open files do not grow after the first quarter of the attack
no log and no output has a traceback
it shuts down in order, without waiting for anything
"""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import grpc
import psutil

from overlay.model.segments import Mode
from overlay.transport import endpoints
from overlay.transport.codec import pb2, pb2_grpc
from tests.harness.cluster import IDS, Overlay, until

MEMORY_MIB = 24  # resident memory varies this much, because the allocator keeps freed pages
FILES = 4
STOP_S = 10.0  # well below the grace of 30 s, which a leftover request would take
PATIENCE_S = 20.0  # for the bystander's answers, on a machine that the attack keeps busy


class Watched:
    def __init__(self, overlay: Overlay) -> None:
        self.overlay = overlay
        self._pids = {i: overlay.metrics(i).pid for i in IDS}
        self._streams = {i: overlay.metrics(i).streams for i in IDS}

    def withstands(
        self, send: Callable[[int], object], numbers: Iterable[int], threads: int = 8
    ) -> None:
        """Calls `send` with each number, and checks the invariants.

        An exception of `send` fails the test and names the number.
        """
        numbers = list(numbers)
        began = time.monotonic()
        with Bystander(self.overlay.address("A")) as bystander:
            self._send_all(send, numbers[: len(numbers) // 4], threads)
            sizes = self._wait_until_idle()
            self._send_all(send, numbers[len(numbers) // 4 :], threads)
            took_s = time.monotonic() - began
            self._check_growth(sizes)
        print(
            f"{len(numbers)} in {took_s:.1f} s; the bystander got {bystander.answers} answers, "
            f"the slowest in {bystander.slowest_s:.2f} s"
        )
        assert bystander.wrong == []
        assert bystander.answers > 0
        self._check_logs()

    def stops_in_order(self) -> None:
        """Stops the overlay, which must have nothing left to wait for. Call it last."""
        processes = self.overlay.processes
        for process in processes.values():
            process.terminate()
        for process_id, process in processes.items():
            until(lambda p=process: p.poll() is not None, STOP_S, f"{process_id} to stop")
            output = process.stdout.read() if process.stdout else ""
            ended = process.returncode, "Traceback" in output
            assert ended == (0, False), f"{process_id}: {output}"
            assert "stopped in" in self.overlay.log(process_id), f"{process_id} was killed"

    def _send_all(self, send: Callable[[int], object], numbers: list[int], threads: int) -> None:
        def numbered(number: int) -> None:
            try:
                send(number)
            except Exception as e:
                raise AssertionError(f"number {number}: {e}") from e

        with ThreadPoolExecutor(threads) as pool:
            try:
                for done in [pool.submit(numbered, number) for number in numbers]:
                    done.result()
            finally:
                pool.shutdown(cancel_futures=True)  # after a failure, skip the rest

    def _wait_until_idle(self) -> dict[str, tuple[float, int]]:
        """MiB and open files of each process."""
        for process_id in IDS:
            until(lambda p=process_id: self._is_idle(p), 20, f"{process_id} idle and balanced")
        return {process_id: self._size(process_id) for process_id in IDS}

    def _is_idle(self, process_id: str) -> bool:
        now = self.overlay.metrics(process_id)
        assert now.pid == self._pids[process_id], f"{process_id} was restarted"
        busy = now.queue_size + now.active_requests + now.streamed_waiting + now.streamed_active
        ended = now.completed + now.failed + now.refused + now.cancelled
        return not busy and now.received == ended and now.streams <= self._streams[process_id]

    def _size(self, process_id: str) -> tuple[float, int]:
        process = psutil.Process(self._pids[process_id])
        files = process.num_handles() if sys.platform == "win32" else process.num_fds()
        return process.memory_info().rss / 2**20, files

    def _check_growth(self, sizes: dict[str, tuple[float, int]]) -> None:
        self._wait_until_idle()
        for process_id, (mib, files) in sizes.items():

            def is_flat(p: str = process_id, mib: float = mib, files: int = files) -> bool:
                now_mib, now_files = self._size(p)
                return now_mib <= mib + MEMORY_MIB and now_files <= files + FILES

            what = f"{process_id} back to {mib:.0f} MiB and {files} files"
            until(is_flat, 20, f"{what}, not {self._size(process_id)}")
            now_mib, now_files = self._size(process_id)
            print(f"{process_id}: {mib:.1f} -> {now_mib:.1f} MiB, {files} -> {now_files} files")

    def _check_logs(self) -> None:
        for process_id in IDS:
            log = self.overlay.log(process_id)
            assert "Traceback" not in log, f"{process_id}: {log[log.index('Traceback') :][:2000]}"
            assert self.overlay.processes[process_id].poll() is None


class Bystander:
    """An ordinary client with its own connection and thread, which calls A until it is closed."""

    def __init__(self, address: str) -> None:
        self.answers = 0
        self.slowest_s = 0.0
        self.wrong: list[str] = []
        self._channel = grpc.insecure_channel(address, endpoints.channel_options())
        self._stub = pb2_grpc.OverlayNodeStub(self._channel)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bystander", daemon=True)

    def __enter__(self) -> Bystander:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(2 * PATIENCE_S)
        self._channel.close()

    def _run(self) -> None:
        for number in itertools.count():
            if self._stop.wait(0.005):
                return
            began = time.monotonic()
            try:
                self._ask(number)
            except grpc.RpcError as e:
                self.wrong.append(f"{e.code().name}: {e.details()}")
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)
            self.answers += 1

    def _ask(self, number: int) -> None:
        payload, mode = b"bystander %d" % number, Mode(number % 2)
        request = pb2.Request(payload=payload, mode=mode)
        response = self._stub.Forward(request, timeout=PATIENCE_S, wait_for_ready=True)
        answers = [worker.encode() + b": " + payload for worker in "CDF"]
        right = [b"\n".join(answers)] if mode is Mode.ALL else answers
        if response.result not in right:
            self.wrong.append(f"{mode.name}: {response}")
