"""The log of several leaders in a stream of NATS JetStream, on three machines or more.

    append     with the number of the last entry, which the servers compare, and a mark of its own,
               by which an entry is known again whose answer was lost
    entries    from any server that has them
    save       into an object store of the same servers

With certificates it speaks TLS, as the leader that it belongs to (`server_tls`).

Owns a thread, "jobs-nats", on which nats-py runs. Every call waits for it, for a bounded time. No
other module knows NATS.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import threading
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from overlay.jobs.log import LogAway, LogError, LogFull, Outrun
from overlay.jobs.server_tls import ServerTls
from overlay.model import clocks as time
from overlay.model.errors import ConfigError
from overlay.model.jobs_servers import ID_SUBJECT, RELOAD_SUBJECT, JobsServer
from overlay.model.limits import MIB

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.js.client import JetStreamContext

    from overlay.security.credentials import Credentials

log = logging.getLogger(__name__)

T = TypeVar("T")

NAME, OBJECT = "OVERLAY_JOBS", "jobs"
REPLICAS = 3
APPEND_S = 5.0  # until an append is given up whose outcome is not known
TRY_S = 1.5  # of one request, as its server may be gone
PAUSE_S = 0.1  # between two tries
COPY_S = 300.0  # for a snapshot
DUPLICATES_S = 120.0  # for which the servers know marks
ENTRIES, ENTRIES_BYTES = 256, 4 * MIB  # read at a time, about
HEADERS_BYTES = 4096  # of a message, besides the entry
LOOK_S = 1.0  # between two looks at the own certificate
RELOAD_S = 10.0  # for a server to read its files
NOT_A_USER = "authorization violation"  # of a certificate that is known, and may do nothing
WRONG_LAST, FULL = (10071, 10164), (10077, 10023, 10047)  # error codes of the servers


class JetStreamLog:
    """servers: host:port, the nearest first. stream_bytes: that the stream may have, and the object
    store too. name: of both. credentials: for TLS."""

    def __init__(
        self,
        servers: Sequence[str],
        stream_bytes: int,
        name: str = NAME,
        credentials: Credentials | None = None,
    ) -> None:
        try:
            import nats  # noqa: F401 - only here: nobody else needs it
        except ImportError:
            raise ConfigError(
                "journal: a journal on NATS servers needs the package nats-py; install it with: "
                "pip install -r requirements-nats.txt (run.py does it by itself)"
            ) from None
        self.max_bytes = MIB - HEADERS_BYTES  # NATS's default, until a server says what it allows
        self._servers = list(servers)
        self._tls = ServerTls(credentials) if credentials else None
        self._next_look = 0.0
        self._refusal: Exception | None = None  # of the last server that was there and no use
        self._stream_bytes = stream_bytes
        self._name, self._subject = name, f"overlay.jobs.{name}"
        self._loop = asyncio.new_event_loop()
        self._client: Client | None = None
        self._connecting: asyncio.Task[JetStreamContext] | None = None
        self._created = ""
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="jobs-nats", daemon=True)
        self._thread.start()

    def origin(self) -> str:
        return self._created or self._wait(self._origin(), APPEND_S)

    def size(self) -> int:
        return self._wait(self._size(), TRY_S + PAUSE_S)

    def append(self, expected: int, entry: bytes) -> int:
        return self._wait(self._append(expected, entry), APPEND_S + TRY_S)

    def entries(self, after: int) -> Sequence[tuple[int, bytes]]:
        return self._wait(self._entries(after), APPEND_S)

    def save(self, sequence: int, path: Path) -> None:
        self._wait(self._save(sequence, path), COPY_S)

    def load(self, path: Path) -> int:
        return self._wait(self._load(path), COPY_S)

    def close(self) -> None:
        if self._is_closed:
            return
        with contextlib.suppress(LogError):
            self._wait(self._end(), 2.0)
        self._is_closed = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(2)

    # the thread

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _wait(self, work: Coroutine[Any, Any, T], within_s: float) -> T:
        """Raises LogAway for whatever NATS has to complain about."""
        if self._is_closed:
            work.close()
            raise LogAway("the leader is stopping")
        future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, within_s), self._loop)
        try:
            return future.result(within_s + 1.0)
        except LogAway as e:
            raise LogAway(self._problem() or str(e)) from None
        except LogError:
            raise
        except Exception as e:  # noqa: BLE001 - of NATS, TLS, sockets and files: no common class
            future.cancel()
            raise LogAway(self._problem() or _said(e)) from None

    def _problem(self) -> str:
        """Why the servers that are there are of no use; empty where they are, or none is."""
        client, refusal = self._client, self._refusal
        if self._tls is None or refusal is None or (client is not None and client.is_connected):
            return ""
        if NOT_A_USER in (said := _said(refusal)).lower():
            return self._tls.not_a_leader()
        return self._tls.problem(self._servers) or said

    async def _heard(self, error: Exception) -> None:
        """Of each try to connect that fails, and of what a server complains about."""
        if isinstance(error, (ConnectionRefusedError, TimeoutError, asyncio.TimeoutError)):
            return
        # A server that refuses closes at once, and what it has said may be lost with that.
        if self._refusal is None or not isinstance(error, (BrokenPipeError, ConnectionResetError)):
            self._refusal = error

    async def _is_up(self) -> None:
        self._refusal = None

    async def _jetstream(self) -> JetStreamContext:
        """Once the first connection is up and the stream is there. Reconnects by itself then."""
        is_closed = self._client is not None and self._client.is_closed  # a server wanted it so
        if self._connecting is None or (
            self._connecting.done() and (is_closed or self._connecting.exception() is not None)
        ):
            self._connecting = self._loop.create_task(self._connect())
        self._look_at_keys()
        return await asyncio.shield(self._connecting)

    def _look_at_keys(self) -> None:
        """So that the next connection shows the certificate that there is then."""
        if self._tls is None or self._client is None or time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + LOOK_S
        if (context := self._tls.newer()) is not None:
            self._client.options["tls"] = context

    async def _connect(self) -> JetStreamContext:
        import nats

        client = self._client
        if client is None or client.is_closed:
            self._client = client = nats.NATS()  # whose options follow the own certificate
            try:
                await client.connect(
                    [f"nats://{server}" for server in self._servers],
                    dont_randomize=True,
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=0.1,
                    connect_timeout=2,
                    ping_interval=1,  # so that a server that is frozen is left within 3 s
                    max_outstanding_pings=2,
                    error_cb=self._heard,
                    reconnected_cb=self._is_up,
                    **(self._tls.options() if self._tls else {}),
                )
            except BaseException:
                self._client = None
                raise
            await self._is_up()
        found = client.jetstream(timeout=TRY_S)
        await self._make_stream(found)
        self.max_bytes = client.max_payload - HEADERS_BYTES
        return found

    async def _make_stream(self, jetstream: JetStreamContext) -> None:
        from nats.js import api, errors

        try:
            info = await jetstream.stream_info(self._name)
        except errors.NotFoundError:
            info = await jetstream.add_stream(
                api.StreamConfig(
                    name=self._name,
                    subjects=[self._subject],
                    num_replicas=REPLICAS,
                    storage=api.StorageType.FILE,
                    discard=api.DiscardPolicy.NEW,
                    max_bytes=self._stream_bytes,
                    allow_direct=True,
                    duplicate_window=DUPLICATES_S,
                )
            )
        if (info.config.num_replicas or 1) < REPLICAS:
            raise LogAway(f"the stream {self._name} is kept by fewer than {REPLICAS} servers")
        self._created = str(info.created)

    async def _origin(self) -> str:
        await self._jetstream()
        return self._created

    async def _size(self) -> int:
        info = await (await self._jetstream()).stream_info(self._name)
        if info.cluster is None or not info.cluster.leader:  # it is answered all the same
            raise LogAway("the servers have not chosen who leads the stream")
        return int(info.state.bytes)

    async def _append(self, expected: int, entry: bytes) -> int:
        import nats.errors
        from nats.js import errors

        jetstream, mark = await self._jetstream(), secrets.token_hex(12)
        headers = {"Nats-Msg-Id": mark, "Nats-Expected-Last-Sequence": str(expected)}
        until = time.monotonic() + APPEND_S
        while True:
            try:
                await jetstream.publish(self._subject, entry, TRY_S, self._name, headers.copy())
                return expected + 1
            except errors.APIError as e:
                if e.err_code in FULL:
                    raise LogFull(_said(e)) from None
                problem = _said(e)
                if e.err_code in WRONG_LAST and await self._is_there(jetstream, expected + 1, mark):
                    return expected + 1
            except (nats.errors.Error, TimeoutError, asyncio.TimeoutError) as e:
                problem = _said(e)
            if time.monotonic() > until:
                raise LogAway(problem)
            await asyncio.sleep(PAUSE_S)

    async def _is_there(self, jetstream: JetStreamContext, number: int, mark: str) -> bool:
        """Whether the entry with this mark is the one of this number. Raises Outrun if it is
        another; False if none is known, as the server asked may know less than others."""
        import nats.errors
        from nats.js import errors

        try:
            found = await jetstream.get_msg(self._name, seq=number)
        except (errors.Error, nats.errors.Error, TimeoutError, asyncio.TimeoutError):
            return False
        if (found.headers or {}).get("Nats-Msg-Id") != mark:
            raise Outrun(f"entry {number} is another leader's")
        return True

    async def _entries(self, after: int) -> list[tuple[int, bytes]]:
        await self._jetstream()
        client = self._client
        assert client is not None
        inbox = client.new_inbox()
        answers = await client.subscribe(inbox)
        asked = {"seq": after + 1, "batch": ENTRIES, "max_bytes": ENTRIES_BYTES}
        asked["next_by_subj"] = self._subject  # type: ignore[assignment]
        found: list[tuple[int, bytes]] = []
        try:
            await client.publish(
                f"$JS.API.DIRECT.GET.{self._name}", json.dumps(asked).encode(), reply=inbox
            )
            while True:
                message = await answers.next_msg(TRY_S)
                headers = message.headers or {}
                status = headers.get("Status", "")
                if status in ("204", "404"):
                    return found
                if status:
                    raise LogAway(f"status {status}: {headers.get('Description', '')}")
                found.append((int(headers["Nats-Sequence"]), message.data))
        finally:
            await answers.unsubscribe()

    async def _save(self, sequence: int, path: Path) -> None:
        from nats.js import api, errors

        jetstream = await self._jetstream()
        try:
            store = await jetstream.object_store(self._name)
        except errors.NotFoundError:
            config = api.ObjectStoreConfig(
                max_bytes=self._stream_bytes, replicas=REPLICAS, storage=api.StorageType.FILE
            )
            store = await jetstream.create_object_store(self._name, config)
        with path.open("rb") as file:
            about = api.ObjectMeta(name=OBJECT, description=str(sequence))
            await store.put(OBJECT, file, about)
        await jetstream.purge_stream(self._name, seq=sequence)

    async def _load(self, path: Path) -> int:
        from nats.js import errors

        jetstream = await self._jetstream()
        try:
            store = await jetstream.object_store(self._name)
            with path.open("wb") as file:
                found = await store.get(OBJECT, writeinto=file)  # compares the digest
        except errors.NotFoundError:
            return 0
        said = found.info.description or ""
        if not (said.isascii() and said.isdigit() and len(said) < 20):
            raise LogAway("the snapshot of the jobs does not say which entry it goes to")
        return int(said)

    async def _end(self) -> None:
        if self._connecting is not None:
            self._connecting.cancel()
        if self._client is not None:
            await self._client.close()


def reload(server: JobsServer, credentials: Credentials) -> None:
    """Makes a server read its configuration anew, and its certificates with it; one that does not
    run will when it starts. A signal would do that on POSIX only. credentials: the server's own.

    Raises LogAway.
    """
    try:
        asyncio.run(asyncio.wait_for(_reload(server, credentials), RELOAD_S))
    except ConnectionRefusedError:
        pass
    except LogAway:
        raise
    except Exception as e:  # noqa: BLE001 - as in JetStreamLog
        raise LogAway(ServerTls(credentials).problem([server.address]) or _said(e)) from None


async def _reload(server: JobsServer, credentials: Credentials) -> None:
    import nats
    import nats.errors

    failed: list[Exception] = []

    async def keep(error: Exception) -> None:
        failed[:] = [error]

    try:
        client = await nats.connect(
            [f"nats://{server.address}"],
            allow_reconnect=False,
            max_reconnect_attempts=1,
            reconnect_time_wait=0.1,
            error_cb=keep,
            **ServerTls(credentials).options(),
        )
    except nats.errors.NoServersError as e:
        raise (failed or [e])[0] from None
    try:
        answers = await client.subscribe(inbox := client.new_inbox())
        await client.publish(ID_SUBJECT, reply=inbox)
        while (found := json.loads((await answers.next_msg(TRY_S)).data))["name"] != server.name:
            pass
        asked = RELOAD_SUBJECT.format(found["id"])
        said = json.loads((await client.request(asked, timeout=RELOAD_S)).data)
        if problem := said.get("error"):
            raise LogAway(str(problem.get("description"))[:200])
    finally:
        await client.close()


def _said(error: Exception) -> str:
    description = getattr(error, "description", "") or str(error) or type(error).__name__
    return str(description)[:200]
