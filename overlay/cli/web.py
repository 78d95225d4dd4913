"""The live page: a small server of static files, and of snapshots as server-sent events.

    GET /              the page        GET /snapshot  the newest snapshot, as JSON
    GET /frames        each snapshot as it is made, until the viewer leaves
    /jobs              the leader's jobs (see web_jobs), the only thing that it changes

A process of its own, so that it never shares an interpreter with the leader. A
viewer has no buffer: a slow one gets the newest snapshot when it is ready for it, and none of those
in between.

The server's event loop runs on the main thread; the poller has a thread (see monitor.poller), and
`web-stdin` waits for the end of standard input where that ends the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import mimetypes
import os
import socket
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from overlay.cli.terminal import Exit, Screen
from overlay.cli.usage import Parser, complain, host, port_or_any
from overlay.cli.web_jobs import JobsOfPage
from overlay.model.addresses import is_loopback, join_address
from overlay.monitor.poller import Poller
from overlay.monitor.snapshot import Snapshot
from overlay.transport.http_server import Server, listen

PAGE = Path(__file__).parent / "page"
PORT = 8050
MAX_VIEWERS = 32  # then the oldest one of the address with the most makes room for one more
STALLED_S = 30.0  # a viewer that reads nothing for so long is disconnected
# Windows looks in its registry, where an editor may have registered .js as plain text; "nosniff"
# would then keep a browser from running it.
TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
HEADERS = (
    (
        "content-security-policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    ("cross-origin-resource-policy", "same-origin"),
    ("cache-control", "no-cache"),
)

DESCRIPTION = """\
Serves a page that shows the whole overlay live, and prints its address. A leader's jobs can be
cancelled and released there. Ctrl-C ends it; the overlay may come and go meanwhile."""


def arguments(parser: Parser) -> None:
    parser.description = DESCRIPTION
    add = parser.add_argument
    add(
        "--web-port",
        type=port_or_any,
        default=PORT,
        metavar="PORT",
        help="the port of the page; 0 takes a free one (default: %(default)s)",
    )
    add(
        "--bind",
        type=host,
        default="127.0.0.1",
        metavar="ADDRESS",
        help="where to serve; anyone who reaches it sees everything, and changes nothing "
        "(default: %(default)s)",
    )
    add(
        "--until-eof",
        action="store_true",
        help="end when standard input ends, so with the program that started this",
    )


def run(args: argparse.Namespace) -> int:
    address = join_address(args.host, args.port)
    try:
        poller = Poller(address)
    except ValueError as error:
        complain(str(error))
        return Exit.USAGE
    try:
        listening = listen(args.bind, args.web_port)
    except OSError as error:
        poller.close()
        complain(
            f"the page cannot be served at {join_address(args.bind, args.web_port)}: "
            f"{error.strerror or error}; --web-port 0 takes a free port"
        )
        return Exit.USAGE
    know_types()
    poller.start()
    Screen(sys.stdout).say(f"watching {address}; the page: {_url(listening)}")
    sys.stdout.flush()
    with listening, suppress(KeyboardInterrupt):
        only_here = is_loopback(listening.getsockname()[0])
        server = _Server(Page(poller, only_here, JobsOfPage(address, may_change=only_here)))
        if args.until_eof:
            threading.Thread(target=server.end_with_stdin, name="web-stdin", daemon=True).start()
        server.run(sockets=[listening])
    poller.close()
    return Exit.OK


class Page:
    """The application. Its methods run on the server's event loop."""

    def __init__(self, poller: Poller, loopback_only: bool, jobs: JobsOfPage) -> None:
        self._poller = poller
        self._jobs = jobs
        self._loopback_only = loopback_only
        self._newest = b""
        self._viewers: list[_Viewer] = []  # the oldest first
        self._has_begun = False
        self._next: asyncio.Event | None = None  # of the next snapshot; a new event for each
        self._routes = Starlette(
            routes=[
                Route("/frames", self._frames),
                Route("/snapshot", self._snapshot),
                *jobs.routes(),
                Mount("/", StaticFiles(directory=PAGE, html=True)),
            ]
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Adds the headers to every answer. A site whose name is made to lead here gets nothing."""
        if scope["type"] != "http":
            return
        self._begin()

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                ours = [(name.encode(), value.encode()) for name, value in HEADERS]
                message["headers"] = [*message["headers"], *ours]
            await asyncio.wait_for(send(message), STALLED_S)

        app: ASGIApp = self._routes
        if self._loopback_only and not _names_loopback(Request(scope).headers.get("host", "")):
            app = PlainTextResponse("this page is served only to 127.0.0.1 and localhost", 403)
        with suppress(asyncio.TimeoutError):
            await app(scope, receive, with_headers)

    def _begin(self) -> None:
        """Subscribes to the poller's snapshots, at the first request."""
        if self._has_begun:
            return
        self._has_begun, self._next = True, asyncio.Event()
        loop = asyncio.get_running_loop()

        def publish(made: Snapshot) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._take, made)

        self._poller.on_snapshot = publish

    def _take(self, made: Snapshot) -> None:
        if self._next is None:  # closed
            return
        ready, self._next = self._next, asyncio.Event()
        if self._viewers:
            self._newest = b"data: " + _as_json(made) + b"\n\n"
        ready.set()

    def close(self) -> None:
        """Ends the streams of snapshots, which have no end of their own, and calls for jobs."""
        ready, self._next = self._next, None
        if ready:
            ready.set()
        self._jobs.close()

    async def _frames(self, request: Request) -> Response:
        address = request.client.host if request.client else ""
        viewer = _Viewer(address, getattr(request.state, "hang_up", lambda: None))
        return StreamingResponse(self._snapshots(viewer), media_type="text/event-stream")

    async def _snapshots(self, viewer: _Viewer) -> AsyncIterator[bytes]:
        self._let_in(viewer)
        try:
            yield b"retry: 1000\n\n"
            newest = self._poller.newer(within_s=0)
            if newest:
                yield b"data: " + _as_json(newest) + b"\n\n"
            while self._next is not None and await self._next.wait():
                yield self._newest
        finally:
            if viewer in self._viewers:
                self._viewers.remove(viewer)

    def _let_in(self, viewer: _Viewer) -> None:
        """A page that loses its place to another reconnects by itself a second later."""
        self._viewers.append(viewer)
        if len(self._viewers) > MAX_VIEWERS:
            of = Counter(one.address for one in self._viewers)
            oldest = max(self._viewers, key=lambda one: of[one.address])  # the first of them
            self._viewers.remove(oldest)
            oldest.hang_up()

    async def _snapshot(self, request: Request) -> Response:
        return JSONResponse(self._poller.newer(within_s=0))


@dataclass(eq=False)
class _Viewer:
    address: str
    hang_up: Callable[[], None]


class _Server(Server):
    def __init__(self, page: Page) -> None:
        super().__init__(page)
        self._page = page

    def end_with_stdin(self) -> None:
        with suppress(OSError, ValueError):
            while os.read(0, 4096):
                pass
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._page.close()
        await super().shutdown(sockets)


def know_types() -> None:
    for ending, kind in TYPES.items():
        mimetypes.add_type(kind, ending)


def _url(listening: socket.socket) -> str:
    address, port = listening.getsockname()[:2]
    return f"http://{join_address(address, port)}/"


def _names_loopback(named: str) -> bool:
    """Whether a Host header is a name that no other site can give to this machine."""
    return is_loopback(named[: named.rfind("]") + 1] or named.partition(":")[0])


def _as_json(made: Snapshot) -> bytes:
    return json.dumps(made, separators=(",", ":")).encode()
