"""The web application: routes, access, limits, errors as JSON, headers and the access log."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
from base64 import b64encode
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from importlib.resources import files
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sparse_ingest.errors import shown
from sparse_ingest.reporting import NOTE
from sparse_ingest.serving.failures import failure_of
from sparse_ingest.serving.inputs import MAX_BYTES, RefusedError, from_address, from_body, required
from sparse_ingest.serving.metrics import Metrics
from sparse_ingest.serving.openapi import Operation
from sparse_ingest.serving.operations import OPERATIONS
from sparse_ingest.serving.options import ServeOptions, is_loopback
from sparse_ingest.serving.service import EVALUATED, Service
from sparse_ingest.serving.work import Work

logger = logging.getLogger(__name__)
OPEN_PATHS = ("/", "/healthz")  # need no token
_LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
_PATH_CHARACTERS = 200  # of a path in the log
_CLOSED = 499  # logged if the client closed the connection
_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


def json_response(content: object, status: int = 200, **headers: str) -> Response:
    """Return a response with JSON. A lone surrogate, which a stored field may contain, is escaped."""
    try:
        body = orjson.dumps(content)
    except TypeError:
        body = json.dumps(content).encode()
    return Response(body, status, headers, "application/json")


def application(service: Service, options: ServeOptions, token: str | None = None) -> Guard:
    """Return the application that answers from a service. With a token, requests need it, except / and /healthz."""
    answer = partial(_answer, service, Work(options.max_requests), options.time_limit_s / 2)
    routes = [Route(one.path, partial(answer, one), methods=one.methods) for one in OPERATIONS]
    plain = {"/": _page(), "/healthz": _health, "/metrics": partial(_metrics, service.metrics)}
    routes += [Route(path, endpoint, methods=("GET",)) for path, endpoint in plain.items()]
    router = Router(routes, redirect_slashes=False)
    return Guard(router, {route.path for route in routes}, service, options, token)


async def _answer(service: Service, work: Work, wait_s: float, operation: Operation, request: Request) -> Response:
    keys = operation.keys
    if request.method == "POST":
        values = from_body(await _body(request, operation.max_bytes), keys)
    else:
        values = from_address(request.scope["query_string"], keys)
    for name in operation.needs:
        required(values, name)
    if operation.judged:
        evaluation, progress = await work.do(service.evaluation)
        # Not in a thread: many requests may wait.
        ends, pause_s = time.monotonic() + wait_s, 0.02
        while not evaluation.done():
            if time.monotonic() > ends:
                raise RefusedError(503, f"The judged queries are being evaluated: {progress()}. Try again.")
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.5)
        values[EVALUATED] = evaluation.result()
    encodes_documents = operation.encodes_documents and values.get("as") != "query"
    piece = partial(operation.answer, service, values)
    return json_response(await work.do(piece, encodes_documents=encodes_documents))


async def _body(request: Request, most: int) -> bytes:
    content = b""
    async for part in request.stream():
        content += part
        if len(content) > most:
            raise RefusedError(413, f"The body has more than {most:,} bytes. Send a shorter one.")
    return content


def _page() -> Any:
    content = (files("sparse_ingest.serving") / "page.html").read_bytes()
    headers = {"content-security-policy": _page_policy(content), "cache-control": "no-cache"}

    async def page(_: Request) -> Response:
        return Response(content, headers=headers, media_type="text/html; charset=utf-8")

    return page


def _page_policy(page: bytes) -> str:
    """Return the Content-Security-Policy of a page with inline style and script."""

    def hashes(tag: bytes) -> str:
        found = re.findall(rb"<" + tag + rb">(.*?)</" + tag + rb">", page, re.DOTALL)
        return " ".join(f"'sha256-{b64encode(sha256(content).digest()).decode()}'" for content in found) or "'none'"

    return (
        f"default-src 'none'; script-src {hashes(b'script')}; style-src {hashes(b'style')}; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


async def _metrics(metrics: Metrics, _: Request) -> Response:
    return Response(metrics.text(), media_type=metrics.content_type)


async def _health(_: Request) -> Response:
    return json_response({"status": "ok"})


class Guard:
    """Checks every request, ends it after the time limit, and turns errors into JSON. Logs a line per request.

    The line has no query string and no header: they have texts of users, and the token.

    Attributes:
        is_closing: Whether each response is the last one of its connection.
    """

    is_closing = False

    def __init__(
        self, app: ASGIApp, paths: set[str], service: Service, options: ServeOptions, token: str | None
    ) -> None:
        self._app, self._paths, self._metrics = app, paths, service.metrics
        self._shown = service.without_addresses
        self._time_limit_s = options.time_limit_s
        self._token = token.encode() if token is not None else None
        # A page of another site could have its own name resolved to 127.0.0.1, and read what is served there.
        only_local = token is None and is_loopback(options.host)
        self._hosts = {options.host.strip("[]"), *_LOCAL_HOSTS} if only_local else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            return
        began, status = time.perf_counter(), 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                there = {name for name, _ in message["headers"]}
                ours = _HEADERS | ({"connection": "close"} if self.is_closing else {})
                extra = ((name.encode(), value.encode()) for name, value in ours.items())
                message["headers"] = [*message["headers"], *(one for one in extra if one[0] not in there)]
            await send(message)

        scope["app"] = self  # so that the router raises for unknown paths
        self._metrics.in_progress.inc()
        try:
            async with asyncio.timeout(self._time_limit_s):
                self._check(scope)
                await self._app(scope, receive, sending)
        except ClientDisconnect:
            status = _CLOSED
        except Exception as error:
            if not status:
                await self._failure(error)(scope, receive, sending)
        finally:
            self._finish(scope, status, time.perf_counter() - began)

    def _finish(self, scope: Scope, status: int, seconds: float) -> None:
        route = scope["path"] if scope["path"] in self._paths else "other"
        self._metrics.in_progress.dec()
        self._metrics.requests.labels(route, status).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        now = datetime.now(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00")
        path = scope["raw_path"].decode("ascii", "backslashreplace")[:_PATH_CHARACTERS]
        logger.log(NOTE, "%sZ %s %s %d %.1f ms", now, scope["method"], path, status, 1000 * seconds)

    def _check(self, scope: Scope) -> None:
        if len(scope["raw_path"]) + len(scope["query_string"]) > MAX_BYTES:
            raise RefusedError(414, f"The URL has more than {MAX_BYTES:,} bytes. Send the query with POST.")
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("ascii", "replace")
        # A client that is no browser may send none.
        if host and self._hosts is not None and re.sub(r":\d*$", "", host).strip("[]").lower() not in self._hosts:
            raise RefusedError(
                403,
                f"The Host header is {shown(host)}. A service on a loopback address without a token answers only "
                "to localhost and 127.0.0.1: send one of them as Host, or start the service with a token.",
            )
        if self._token is None or scope["path"] in OPEN_PATHS:
            return
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self._token):
            raise RefusedError(401, "This service needs a token. Send the header Authorization: Bearer TOKEN.")

    def _failure(self, error: Exception) -> Response:
        if isinstance(error, TimeoutError):
            error = RefusedError(504, f"The request took longer than {self._time_limit_s:g} s, the --time-limit.")
        if isinstance(error, HTTPException):
            headers = dict(error.headers or {})
            words = {404: "There is no such path. See /openapi.json.", 405: f"Use {headers.get('Allow')} here."}
            content = {"type": "RefusedError", "message": words.get(error.status_code, error.detail)}
            return json_response({"error": content}, error.status_code, **headers)
        failure = failure_of(error, self._shown)
        return json_response(failure.content(), failure.status, **failure.headers)
