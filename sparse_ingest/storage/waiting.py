"""Wait for stores, web servers and the hub: log silences, and end at a deadline or on SIGTERM.

A request runs in its own thread, which continues if the wait ends first. Not covered: retries (places.py).
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from threading import Event, Thread
from typing import TypeVar

from sparse_ingest.errors import Interrupted, StorageError, UsageError

TIMEOUT = "SPARSE_INGEST_TIMEOUT"
stopping = Event()  # SIGTERM came: waits end after _GRACE_S
left_behind = Event()  # a request still runs in its thread, and Python's exit would wait for threads of libraries
_DEFAULT_S = 120.0
_LINE_EVERY_S = 15.0
_GRACE_S = 10.0
_LEAST_BYTES = 1 << 20  # counted as progress; a byte per second is a silence
T = TypeVar("T")
logger = logging.getLogger(__name__)


@contextlib.contextmanager
def handling_signals(handler: Callable[..., object], *others: signal.Signals) -> Iterator[None]:
    """Handle SIGTERM, SIGHUP and `others` in the block. An ignored signal, as SIGHUP under nohup, stays ignored."""
    numbers = [one for one in (signal.SIGTERM, signal.SIGHUP, *others) if signal.getsignal(one) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def in_thread(ask: Callable[[], T], name: str) -> Future[T]:
    """Call a function in a daemon thread, for which Python's exit does not wait."""
    reply: Future[T] = Future()
    Thread(target=_run, args=(ask, reply), name=name, daemon=True).start()
    return reply


def call_with_timeout(
    ask: Callable[[], T], place: str, *, bytes_sent: int = 0, received: Callable[[], int] = lambda: 0, advice: str = ""
) -> T:
    """Return the result of `ask`, which sends a request to `place`.

    Every 50 KB of `bytes_sent` extend the deadline by a second, and every MB that is `received` restarts it. `advice`
    ends the message after the deadline.

    Raises:
        StorageError: No answer within SPARSE_INGEST_TIMEOUT seconds.
        Interrupted: SIGTERM came, and no answer in the 10 s after it.
    """
    limit_s = _timeout_s() + bytes_sent / 50_000
    reply = in_thread(ask, place)
    began = last_line = time.monotonic()
    stop_at, counted = math.inf, received()
    try:
        while not wait([reply], min(1.0, limit_s)).done:
            now = time.monotonic()
            if received() - counted >= _LEAST_BYTES:
                counted, began, last_line = received(), now, now
            if stopping.is_set():
                stop_at = min(stop_at, now + _GRACE_S)
            if now >= stop_at:
                raise Interrupted(f"Stopped while waiting for {place}; finished work is kept.")
            if now - began >= limit_s:
                raise StorageError(
                    f"No answer from {place} within {limit_s:,.0f} s. Check the address and the network, then start "
                    f"again: what is finished is kept. {TIMEOUT}=SECONDS sets how long to wait.{advice}"
                )
            if now - last_line >= _LINE_EVERY_S:
                last_line = now
                logger.warning("Waiting for %s: %.0f of at most %.0f s (%s)", place, now - began, limit_s, TIMEOUT)
        return reply.result()
    finally:
        if not reply.done():
            left_behind.set()


def _run(ask: Callable[[], T], reply: Future[T]) -> None:
    try:
        reply.set_result(ask())
    except BaseException as error:  # raised where it is waited for
        reply.set_exception(error)
    finally:
        del reply  # the traceback of an error would keep the error and the request alive


def _timeout_s() -> float:
    given = os.environ.get(TIMEOUT) or str(_DEFAULT_S)
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise UsageError(f"{TIMEOUT} is {given!r}; expected seconds, a number above 0.")
    return seconds
