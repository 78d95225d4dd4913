"""The jobs of a leader, for the live page.

    GET /jobs?state=&handler=&text=   the newest jobs that match, and whether they may be changed
    GET /jobs/ID                      one job, with its story
    POST /jobs/ID                     {"action": "cancel"} or {"action": "release"}

The leader decides what the person who started the page's server may see and change. It cannot tell
whether that person or another web site asks, so a change is taken only from a page of this server,
and only where the page is served to this machine alone.

Each call to the leader is made on a thread of the event loop's executor.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from overlay.cli.job_text import as_json, progress_of
from overlay.client import sync as library
from overlay.client.job_status import JobStatus
from overlay.model.jobs import is_job_id

TIMEOUT_S = 5.0
SEARCHED, LISTED = 1000, 100  # of the newest jobs; a search by text looks through more
MAX_BODY = 1024
ACTIONS = {
    "cancel": "only a job that waits or runs can be cancelled",
    "release": "only a job that is quarantined or failed can be released",
}


class JobsOfPage:
    """The routes. may_change: whether the page is served to this machine alone. Its client
    connects at the first request."""

    def __init__(self, address: str, may_change: bool) -> None:
        self._address = address
        self._may_change = may_change
        self._lock = threading.Lock()
        self._client: library.Client | None = None

    def routes(self) -> list[Route]:
        return [
            Route("/jobs", self._listed),
            Route("/jobs/{id}", self._one, methods=["GET"]),
            Route("/jobs/{id}", self._change, methods=["POST"]),
        ]

    def close(self) -> None:
        with self._lock:
            if self._client is not None:
                self._client.close()

    async def _listed(self, request: Request) -> Response:
        wanted = {name: request.query_params.get(name, "") for name in ("state", "handler", "text")}
        return await self._answer(lambda: self._list(**wanted))

    async def _one(self, request: Request) -> Response:
        id_ = request.path_params["id"]
        return await self._answer(
            lambda: as_plain(self._leader().job(id_).status(timeout=TIMEOUT_S))
        )

    async def _change(self, request: Request) -> Response:
        if not self._may_change:
            return problem(403, "this page is served to other machines too, and changes nothing")
        if why := foreign(request.headers):
            return problem(403, why)
        action = _action(await _body(request))
        if action is None:
            return problem(400, f"the body is not an action: {', '.join(ACTIONS)}")
        id_ = request.path_params["id"]
        return await self._answer(lambda: self._changed(action, id_))

    async def _answer(self, ask: Callable[[], dict[str, Any]]) -> Response:
        try:
            return JSONResponse(await asyncio.to_thread(ask))
        except NotChanged as e:
            return problem(409, str(e))
        except library.NameNotFound as e:
            return problem(404, str(e))
        except library.InvalidCall as e:
            return problem(400, str(e))
        except library.CallFailed as e:
            return problem(502, str(e))
        except ValueError as e:  # a query that the library does not send
            return problem(400, str(e))

    def _list(self, state: str, handler: str, text: str) -> dict[str, Any]:
        leader, states = self._leader(), [state] if state else []
        part = text.strip().lower()
        if is_job_id(part):  # it may be older than those that are searched
            found = [leader.job(part).status(timeout=TIMEOUT_S)]
            searched = 0
        else:
            limit = SEARCHED if part else LISTED
            jobs = leader.jobs(states, handler=handler, limit=limit, timeout=TIMEOUT_S)
            found = [job for job in jobs if part in f"{job.id} {job.caller}".lower()]
            searched = len(jobs) if len(jobs) >= limit else 0
        return {
            "jobs": [as_plain(job) for job in found[:LISTED]],
            "searched": searched,  # there may be more jobs, older ones; 0: these are all
            "may_change": self._may_change,
        }

    def _changed(self, action: str, id_: str) -> dict[str, Any]:
        done = self._leader().change_jobs(action, [id_], timeout=TIMEOUT_S)
        if not done.changed:
            # Its state; or the leader's words on a job that this person does not have.
            state = self._leader().job(id_).status(timeout=TIMEOUT_S).state
            raise NotChanged(f"the job is {state} now: {ACTIONS[action]}")
        return {"changed": done.changed}

    def _leader(self) -> library.Client:
        with self._lock:
            if self._client is None:
                self._client = library.connect(self._address)
            return self._client


class NotChanged(Exception):
    """The job's state does not allow it."""


def foreign(headers: Mapping[str, str]) -> str:
    """Why a request to change something may come from another web site; empty: it cannot.

    A browser names in Origin the site whose page asks, which no page can alter; and it does not
    send JSON to another site without that site's leave, which is never given here. That the Host
    is this machine has been checked, so a name that is made to lead here does not come this far.
    """
    if headers.get("origin", "") != f"http://{headers.get('host', '')}":
        return "only a page of this server may change jobs: its address must be the Origin"
    if headers.get("sec-fetch-site", "same-origin") != "same-origin":
        return "only a page of this server may change jobs"
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        return "a change must be sent as application/json"
    return ""


def as_plain(job: JobStatus) -> dict[str, Any]:
    """As the commands give it, and what only the page shows."""
    return {**as_json(job), "progress_text": progress_of(job)}


def problem(status: int, text: str) -> Response:
    return JSONResponse({"problem": text}, status)


async def _body(request: Request) -> bytes:
    """Empty if there is more of it than of any change."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            return b""
    return body


def _action(body: bytes) -> str | None:
    try:
        found = json.loads(body)
    except ValueError:
        return None
    action = found.get("action") if isinstance(found, dict) else None
    return action if isinstance(action, str) and action in ACTIONS else None
