"""The watching page: a small server of static files and of pictures, as server-sent events.

    GET /              the page        GET /picture   the newest picture, as JSON
    GET /frames        each picture as it is made, until the viewer leaves

Read only, and a process of its own, so that it never shares an interpreter with the leader. A
viewer has no buffer of its own: one that is slow gets the newest picture when it is ready for it,
and never those in between.

The server's event loop runs on the main thread; the watch has a thread (see monitor.poller), and
`web-stdin` waits for the end of standard input, where that ends the server.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
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
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from overlay.cli.terminal import Exit, Screen
from overlay.cli.usage import Parser, complain, host, port_or_any
from overlay.model.topology import join_address
from overlay.monitor.poller import Poller
from overlay.transport.http_door import Server, listen

PAGE = Path(__file__).parent / "page"
PORT = 8050
MAX_VIEWERS = 32  # then the longest-standing of whoever has the most makes room for one more
STALLED_S = 30.0  # a viewer that takes nothing for so long is let go
# Windows asks its registry, where an editor may have made JavaScript plain text; "nosniff" then
# keeps a browser from running it.
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
Serves a page that shows the whole overlay live, and prints its address. Read only. It ends with
Ctrl-C; the overlay may come and go meanwhile."""


def arguments(parser: Parser) -> None:
    parser.description = DESCRIPTION
    add = parser.add_argument
    add(
        "--web-port",
        type=port_or_any,
        default=PORT,
        metavar="PORT",
        help="where the page is served; 0 takes a free port (default: %(default)s)",
    )
    add(
        "--bind",
        type=host,
        default="127.0.0.1",
        metavar="ADDRESS",
        help="the address to serve at; whoever reaches it sees everything (default: %(default)s)",
    )
    add(
        "--until-eof",
        action="store_true",
        help="end when standard input does, with the program that started this",
    )


def run(args: argparse.Namespace) -> int:
    address = join_address(args.host, args.port)
    try:
        watch = Poller(address)
    except ValueError as error:
        complain(str(error))
        return Exit.USAGE
    try:
        listening = listen(args.bind, args.web_port)
    except OSError as error:
        watch.close()
        complain(
            f"the page cannot be served at {join_address(args.bind, args.web_port)}: "
            f"{error.strerror or error}; --web-port 0 takes a free port"
        )
        return Exit.USAGE
    know_types()
    watch.start()
    Screen(sys.stdout).say(f"watching {address}; the page: {_url(listening)}")
    sys.stdout.flush()
    with listening, suppress(KeyboardInterrupt):
        server = _Server(Page(watch, _loopback_only(listening)))
        if args.until_eof:
            threading.Thread(target=server.end_with_stdin, name="web-stdin", daemon=True).start()
        server.run(sockets=[listening])
    watch.close()
    return Exit.OK


class Page:
    """The application. Its methods run on the server's event loop."""

    def __init__(self, watch: Poller, loopback_only: bool) -> None:
        self._watch = watch
        self._loopback_only = loopback_only
        self._newest = b""
        self._viewers: list[_Viewer] = []  # the longest-standing first
        self._has_begun = False
        self._came: asyncio.Event | None = None  # the next picture; a new event for each
        self._routes = Starlette(
            routes=[
                Route("/frames", self._frames),
                Route("/picture", self._picture),
                Mount("/", StaticFiles(directory=PAGE, html=True)),
            ]
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Every answer has the headers; a page elsewhere that had its name lead here gets none."""
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
            app = PlainTextResponse("this page is served to 127.0.0.1 and localhost only", 403)
        with suppress(asyncio.TimeoutError):
            await app(scope, receive, with_headers)

    def _begin(self) -> None:
        """Lets the watch tell of its pictures, from the first request on."""
        if self._has_begun:
            return
        self._has_begun, self._came = True, asyncio.Event()
        loop = asyncio.get_running_loop()

        def tell(picture: dict[str, Any]) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._take, picture)

        self._watch.on_picture = tell

    def _take(self, picture: dict[str, Any]) -> None:
        if self._came is None:  # closed
            return
        came, self._came = self._came, asyncio.Event()
        if self._viewers:
            self._newest = b"data: " + _as_json(picture) + b"\n\n"
        came.set()

    def close(self) -> None:
        """Ends the streams of pictures, which have no end of their own."""
        came, self._came = self._came, None
        if came:
            came.set()

    async def _frames(self, request: Request) -> Response:
        address = request.client.host if request.client else ""
        viewer = _Viewer(address, getattr(request.state, "hang_up", lambda: None))
        return StreamingResponse(self._pictures(viewer), media_type="text/event-stream")

    async def _pictures(self, viewer: _Viewer) -> AsyncIterator[bytes]:
        self._let_in(viewer)
        try:
            yield b"retry: 1000\n\n"
            newest = self._watch.newer(within_s=0)
            if newest:
                yield b"data: " + _as_json(newest) + b"\n\n"
            while self._came is not None and await self._came.wait():
                yield self._newest
        finally:
            if viewer in self._viewers:
                self._viewers.remove(viewer)

    def _let_in(self, viewer: _Viewer) -> None:
        """A page that lost its place to another asks again by itself, a second later."""
        self._viewers.append(viewer)
        if len(self._viewers) > MAX_VIEWERS:
            of = Counter(one.address for one in self._viewers)
            leaver = max(self._viewers, key=lambda one: of[one.address])  # the first of them
            self._viewers.remove(leaver)
            leaver.hang_up()

    async def _picture(self, request: Request) -> Response:
        return JSONResponse(self._watch.newer(within_s=0))


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


def _loopback_only(listening: socket.socket) -> bool:
    return ipaddress.ip_address(listening.getsockname()[0].partition("%")[0]).is_loopback


def _names_loopback(named: str) -> bool:
    """Whether a Host header is a name that nobody else can give to this machine."""
    name = named[: named.rfind("]") + 1] or named.partition(":")[0]
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def _as_json(picture: dict[str, Any]) -> bytes:
    return json.dumps(picture, separators=(",", ":")).encode()
