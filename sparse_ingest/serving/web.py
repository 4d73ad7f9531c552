"""The web application: routes, access, limits, errors as JSON, headers and the access log."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from functools import partial
from importlib.resources import files
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sparse_ingest.reporting import NOTE
from sparse_ingest.serving.failures import failure_of
from sparse_ingest.serving.inputs import MAX_BYTES, RefusedError, from_address, from_body
from sparse_ingest.serving.operations import OPERATIONS, Operation
from sparse_ingest.serving.options import ServeOptions
from sparse_ingest.serving.page import page_policy
from sparse_ingest.serving.service import Service
from sparse_ingest.serving.work import Work

logger = logging.getLogger(__name__)
OPEN_PATHS = ("/", "/healthz")  # need no token
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


def application(service: Service, options: ServeOptions, token: str | None = None) -> ASGIApp:
    """Return the application that answers from a service. With a token, requests need it, except / and /healthz."""
    work = Work(options.max_requests)
    routes = [Route(one.path, partial(_answer, service, work, one), methods=one.methods) for one in OPERATIONS]
    routes += [Route("/", _page(), methods=("GET",)), Route("/healthz", _health, methods=("GET",))]
    return Guard(Router(routes, redirect_slashes=False), options.time_limit_s, token)


async def _answer(service: Service, work: Work, operation: Operation, request: Request) -> Response:
    keys = operation.keys
    if request.method == "POST":
        values = from_body(await _body(request, operation.max_bytes), keys)
    else:
        values = from_address(request.scope["query_string"], keys)
    return json_response(await work.do(partial(operation.answer, service, values)))


async def _body(request: Request, most: int) -> bytes:
    content = b""
    async for part in request.stream():
        content += part
        if len(content) > most:
            raise RefusedError(413, f"The body has more than {most:,} bytes. Send a shorter one.")
    return content


def _page() -> Any:
    content = (files("sparse_ingest.serving") / "page.html").read_bytes()
    headers = {"content-security-policy": page_policy(content), "cache-control": "no-cache"}

    async def page(_: Request) -> Response:
        return Response(content, headers=headers, media_type="text/html; charset=utf-8")

    return page


async def _health(_: Request) -> Response:
    return json_response({"status": "ok"})


class Guard:
    """Checks every request, ends it after the time limit, and turns errors into JSON. Logs a line per request.

    The line has no query string and no header: they have texts of users, and the token.
    """

    def __init__(self, app: ASGIApp, time_limit_s: float, token: str | None) -> None:
        self._app, self._time_limit_s = app, time_limit_s
        self._token = token.encode() if token is not None else None

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
                extra = ((name.encode(), value.encode()) for name, value in _HEADERS.items())
                message["headers"] = [*message["headers"], *(one for one in extra if one[0] not in there)]
            await send(message)

        scope["app"] = self  # so that the router raises for unknown paths
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
            ms = 1000 * (time.perf_counter() - began)
            logger.log(NOTE, "%s %s %d %.1f ms", scope["method"], scope["path"], status, ms)

    def _check(self, scope: Scope) -> None:
        if len(scope["raw_path"]) + len(scope["query_string"]) > MAX_BYTES:
            raise RefusedError(414, f"The address has more than {MAX_BYTES:,} bytes. Send the query with POST.")
        if self._token is None or scope["path"] in OPEN_PATHS:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, token = given.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self._token):
            raise RefusedError(401, "This service needs a token. Send the header Authorization: Bearer TOKEN.")

    def _failure(self, error: Exception) -> Response:
        if isinstance(error, TimeoutError):
            error = RefusedError(504, f"The request took longer than {self._time_limit_s:g} s, the time limit.")
        if isinstance(error, HTTPException):
            words = {404: "There is no such path; see /openapi.json.", 405: "This path has no such method."}
            content = {"type": "RefusedError", "message": words.get(error.status_code, error.detail)}
            return json_response({"error": content}, error.status_code, **dict(error.headers or {}))
        failure = failure_of(error)
        return json_response(failure.content(), failure.status, **failure.headers)
