"""Wait for a cluster: report slow and retried requests, end on stop requests.

Reports come after 10 s and at most once in 10 s for each cause. A stop request ends only requests that take longer than
4 s, so a healthy stage finishes its current work first. Not covered: how often to send again (sending.py, settling.py).
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable
from concurrent.futures import wait
from threading import Event, Lock
from typing import TypeVar

from sparse_ingest.errors import Interrupted
from sparse_ingest.reporting import SILENT, Reporter
from sparse_ingest.storage.waiting import in_thread

SAY_S = 10.0
_LOOK_S = 0.1  # between looks at stop requests
_SLOW_S = 4.0  # a request that takes longer is abandoned when a stop is requested
_MARGIN_S = 1.0  # for the request to end with its own, more specific error
_NUMBER = re.compile(r"(?<!answered )(?<![0-9a-f])[0-9a-f]*\d[0-9a-f]*")  # except the status of an answer
T = TypeVar("T")
logger = logging.getLogger(__name__)


class Waiting:
    """Notes and stop requests while a client waits. Safe to use from several threads.

    Without a `reporter`, notes are log warnings and nothing requests a stop. A request, retries included,
    may go without success for `patience_s`.
    """

    def __init__(self, address: str, reporter: Reporter | None = None, patience_s: float = math.inf) -> None:
        self.reporter = None if reporter is SILENT else reporter
        self.patience_s = patience_s
        self._address = address
        self._lock = Lock()
        self._ended = False
        self._said: dict[str, tuple[float, int]] = {}

    def answer(self, what: str, ask: Callable[[], T], timeout_s: float = math.inf) -> T:
        """Return what `ask` returns. Raise `Interrupted` on a stop request, `TimeoutError` after `timeout_s`."""
        reply, began = in_thread(ask, what), time.monotonic()
        while not wait([reply], _LOOK_S).done:
            waited = time.monotonic() - began
            if waited > timeout_s + _MARGIN_S:
                raise TimeoutError
            why = f"{self._address} has not answered {what} for {waited:.0f} s"
            if waited >= SAY_S:
                self.say(what, f"{why}; waiting up to {timeout_s:g} s.", counted=False)
            if waited > _SLOW_S or self._ended:
                self._refuse_stopped(why)
        try:
            return reply.result()
        finally:
            del reply  # the traceback of an error would keep the error and the request alive

    def pause(self, seconds: float, why: str, ended: Event | None = None) -> None:
        """Sleep or wait for `ended`, and report every 10 s. Raise `Interrupted` on a stop request."""
        ended, end = ended or Event(), time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not ended.wait(min(left, _LOOK_S)):
            self._refuse_stopped(why)
            self._said.setdefault(_NUMBER.sub("#", why), (time.monotonic(), 0))
            self.say(why, f"Trying again in {left:.0f} s: {why}", counted=False)

    def end(self) -> None:
        """End all waits, also in other threads: the client is closed."""
        self._ended = True

    def _refuse_stopped(self, why: str) -> None:
        if self._ended or (self.reporter and self.reporter.stop_requested()):
            reason = why.rstrip(".")
            again = "What is finished is kept; start the same command again."
            raise Interrupted(f"Stopped while waiting: {reason}. {again}")

    def say(self, cause: str, message: str, *, counted: bool = True) -> None:
        """Report a message, at most once in 10 s for each cause; numbers in a cause are ignored.

        A message that is not reported counts for the next report, unless it is not `counted`.
        """
        cause, now = _NUMBER.sub("#", cause), time.monotonic()
        with self._lock:
            last, unsaid = self._said.get(cause, (-math.inf, 0))
            due = now - last >= SAY_S
            self._said[cause] = (now, 0) if due else (last, unsaid + counted)
        if due:
            note = self.reporter.note if self.reporter else logger.warning
            note(f"{message} ({unsaid} more since the last such line)" if unsaid else message)
