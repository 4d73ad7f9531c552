"""Run the web application with uvicorn, until a stop request."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
import socket
import threading
import time
from collections.abc import Iterator

import uvicorn

from sparse_ingest.errors import UsageError
from sparse_ingest.reporting import Reporter
from sparse_ingest.serving.options import ServeOptions
from sparse_ingest.serving.service import Service
from sparse_ingest.serving.web import Guard, application
from sparse_ingest.storage.waiting import handling_signals

_BACKLOG = 2048
_DRAIN_S = 1.0  # how long idle connections stay open after a stop request


class _Server(uvicorn.Server):
    """Ends without raising the signal again: a stop request is the usual end of a service."""

    def __init__(self, config: uvicorn.Config, guard: Guard) -> None:
        super().__init__(config)
        self._guard = guard

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, and answer with `Connection: close`, before idle connections are closed.

        A client that sends a request on a closed connection would get a reset.
        """
        self._guard.is_closing = True
        for server in self.servers:
            server.close()
        ends = time.monotonic() + _DRAIN_S
        while self.server_state.connections and time.monotonic() < ends and not self.force_exit:
            await asyncio.sleep(0.05)
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        in_main = threading.current_thread() is threading.main_thread()
        with handling_signals(self.handle_exit, signal.SIGINT) if in_main else contextlib.nullcontext():
            yield


def run(
    service: Service, listener: socket.socket, options: ServeOptions, token: str | None, reporter: Reporter
) -> None:
    """Serve until SIGTERM or SIGINT, then finish open requests. Raise `UsageError` if the port cannot be used."""
    guard = application(service, options, token)
    config = uvicorn.Config(
        guard,
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(options.time_limit_s) + 1,
    )
    with _named(options):
        listener.listen(_BACKLOG)
    port = listener.getsockname()[1]
    host = f"[{options.host}]" if ":" in options.host else options.host
    reporter.note(f"Serving {' and '.join(one.name for one in service.targets)} at http://{host}:{port}/")
    with _no_words_in_the_log():
        asyncio.run(_Server(config, guard).serve(sockets=[listener]))


@contextlib.contextmanager
def _no_words_in_the_log() -> Iterator[None]:
    """Omit the warnings of searches in the block: they have words of queries."""
    searching = logging.getLogger("sparse_ingest.searching")
    searching.setLevel(logging.ERROR)
    try:
        yield
    finally:
        searching.setLevel(logging.NOTSET)


@contextlib.contextmanager
def bound(options: ServeOptions) -> Iterator[socket.socket]:
    """Yield a socket with the address of the options. It does not listen: connections are refused until `run`."""
    host = options.host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol asyncio sets TCP_NODELAY; without it, an answer waits 40 ms for an acknowledgment.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        with _named(options):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, options.port))
        yield listener


@contextlib.contextmanager
def _named(options: ServeOptions) -> Iterator[None]:
    """Raise `UsageError` for an address that cannot be used in the block."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"Cannot listen on {options.host} port {options.port}: {error.strerror or error}. Pass another --host or "
            "--port, or stop the program that uses it."
        ) from error
