"""Waiting for a cluster: requests without an answer, pauses before a request is sent again, and stop requests.

In: a request or a pause, and the reporter of the stage. Out: the answer, or `Interrupted`. Slow and repeated requests
are reported, at most once in 30 s for each cause, to keep logs short. A stop request ends only requests that take
longer than 4 s, so a healthy stage finishes its current work first.
Not covered: how often to send again (sending.py, settling.py).
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Lock, Thread
from typing import TypeVar

from sparse_ingest.errors import Interrupted
from sparse_ingest.reporting import SILENT, Reporter

SAY_S = 30.0
LOOK_S = 0.1  # between looks at stop requests
_SLOW_S = 4.0  # a request that takes longer is abandoned when a stop is requested
_NUMBER = re.compile(r"(?<!answered )(?<![0-9a-f])[0-9a-f]*\d[0-9a-f]*")  # except the status of an answer
T = TypeVar("T")


class Waiting:
    """Notes and stop requests while a client waits. Safe to use from several threads.

    `reporter` is that of the stage; if it is None or silent, nothing is reported and stop requests are ignored.
    """

    def __init__(self, address: str, reporter: Reporter | None = None) -> None:
        self.reporter = None if reporter is SILENT else reporter
        self._address = address
        self._lock = Lock()
        self._said: dict[str, tuple[float, int]] = {}

    def answer(self, what: str, ask: Callable[[], T], deadline_s: float = math.inf) -> T:
        """Return what `ask` returns. It runs in a thread of its own, which continues if the wait ends first.

        Raises:
            Interrupted: A stop was requested, and no answer came.
            TimeoutError: No answer came before the deadline, counted to its last byte.
        """
        one: Future[T] = Future()
        Thread(target=_fulfil, args=(one, ask), name=what, daemon=True).start()
        began = said = time.monotonic()
        while not wait([one], LOOK_S).done:
            now = time.monotonic()
            if now - began > deadline_s:
                raise TimeoutError
            if now - said >= SAY_S:
                said = now
                self.say(what, f"{self._address} has not answered {what} for {now - began:.0f} s; still waiting.")
            if now - began > _SLOW_S:
                self.refuse_stopped(f"{self._address} has not answered {what}")
        try:
            return one.result()
        finally:
            del one  # the traceback of an error would keep the error and the request alive

    def pause(self, seconds: float, why: str) -> None:
        """Sleep.

        Raises:
            Interrupted: A stop was requested.
        """
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.refuse_stopped(why)
            time.sleep(min(left, LOOK_S))

    def refuse_stopped(self, why: str) -> None:
        """Raise `Interrupted` if a stop was requested; `why` is what was waited for."""
        if self.reporter and self.reporter.stop_requested():
            reason = why.rstrip(".")
            raise Interrupted(
                f"Stopped while waiting: {reason}. What is finished is kept; start the same command again."
            )

    def say(self, cause: str, message: str) -> None:
        """Report a message, at most once in 30 s for each cause; numbers in a cause are ignored."""
        cause, now = _NUMBER.sub("#", cause), time.monotonic()
        with self._lock:
            last, unsaid = self._said.get(cause, (-math.inf, 0))
            due = now - last >= SAY_S
            self._said[cause] = (now, 0) if due else (last, unsaid + 1)
        if due and self.reporter:
            self.reporter.note(f"{message} ({unsaid} more since the last such line)" if unsaid else message)


def _fulfil(one: Future[T], ask: Callable[[], T]) -> None:
    try:
        one.set_result(ask())
    except BaseException as error:
        one.set_exception(error)
    finally:
        del one
