"""Bulk requests sent, some at a time, until every document has one outcome.

In: `BulkRequest`s. Out: one `Outcome` per request, in order. What can succeed later is sent again after a random
pause, the whole request or only the documents that failed: 429, 502, 503, 504, a broken connection, a timeout.
That is safe because every operation has its id. How many requests are in flight follows the cluster (pacing.py).
A document counts as acknowledged when the answer has its id, in its place, with a status below 300. One that
OpenSearch refuses is in its request's Outcome with the reason. What is no document's fault (a block, a missing alias,
a refused user, retries used up) is a ClusterError: nothing was lost, and the same command goes on where it stopped.
Not covered: which documents to send, and remembering what was sent (journal.py).
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Condition, Event, Thread
from typing import Any, NamedTuple

from sparse_ingest.cluster.bulk_bodies import BulkRequest
from sparse_ingest.cluster.client import Client, ResponseError, UnreachableError, path_of
from sparse_ingest.cluster.failures import BLOCKED, BUSY, error_of
from sparse_ingest.cluster.pacing import Attempt, Pace
from sparse_ingest.errors import ClusterError
from sparse_ingest.records import Outcome, Refusal

# The ids show that an answer belongs to its request, for 35 ms of our time in 100,000 documents.
_ANSWER = "items.*._id,items.*.status,items.*.error"
# A server may ask for a longer pause than our own, but a wrong clock or number must not stop a load for hours.
_LONGEST_PAUSE_S = 600.0


@dataclass(frozen=True)
class Retries:
    """How often and how patiently to send again: pauses are random between 0 and base_s · 2^n, at most cap_s.

    `attempts` are those in a row in which not a single document was taken.
    """

    attempts: int = 12
    base_s: float = 0.5
    cap_s: float = 30.0
    timeout_s: float = 120.0

    def pause_s(self, attempt: int) -> float:
        """The pause after failed attempt number `attempt`, counted from 0 ("full jitter")."""
        return random.uniform(0, min(self.cap_s, self.base_s * 2.0**attempt))  # noqa: S311


def send(
    client: Client,
    requests: Iterable[BulkRequest],
    *,
    target: str,
    pace: Pace | None = None,
    retries: Retries = Retries(),  # noqa: B008 - frozen
) -> Iterator[Outcome]:
    """Send requests to the alias `target`, at a pace that the cluster sets.

    One request is made ahead; the next one when another is answered, so few are in memory at any time.

    Raises:
        ClusterError: something that concerns no single document stopped the load.
    """
    sender = _Sender(client, target, pace or Pace(), retries)
    in_flight: deque[Future[Outcome]] = deque()
    try:
        for request in requests:
            while sender.is_full(in_flight):
                yield from _outcomes(in_flight)
                sender.wait(in_flight, for_room=True)
            in_flight.append(sender.start(request))
            del request  # its bytes are needed no longer than its thread needs them
            yield from _outcomes(in_flight)
        while in_flight:
            sender.wait(in_flight)
            yield from _outcomes(in_flight)
    finally:
        # Reached by Ctrl-C as well: threads that pause end now, those that wait for an answer die with the process.
        sender.stop()


class _Left(NamedTuple):
    """What an attempt left to do: send `request` again after a pause, or in halves because of an error."""

    request: BulkRequest
    why: str
    pause_s: float = 0.0
    halves: ResponseError | None = None


def _outcomes(in_flight: deque[Future[Outcome]]) -> Iterator[Outcome]:
    """Take the outcomes from the front that are there, and raise the first error that is anywhere."""
    while in_flight and in_flight[0].done() and not in_flight[0].exception():
        yield in_flight.popleft().result()
    for one in filter(_failed, in_flight):
        one.result()


def _failed(one: Future[Outcome]) -> bool:
    return one.done() and one.exception() is not None


class _Sender:
    """Sends requests to the end, each in a thread of its own: answers, retries, halves."""

    def __init__(self, client: Client, target: str, pace: Pace, retries: Retries) -> None:
        self._client = client
        self._path = f"{path_of(target)}/_bulk"
        self._pace = pace
        self._retries = retries
        self._stopped = Event()
        # Guards what is counted below; told whenever an attempt or a request has ended.
        self._changed = Condition()
        self._attempts = 0

    def start(self, request: BulkRequest) -> Future[Outcome]:
        """Send a request in a daemon thread: a thread pool is waited for at exit, and Ctrl-C would not be prompt."""
        one: Future[Outcome] = Future()

        def run() -> None:
            try:
                refused = self._send(request)
                one.set_result(Outcome(request.shard, len(request.doc_ids) - len(refused), refused))
            except BaseException as error:
                one.set_exception(error)
            with self._changed:
                self._changed.notify_all()

        Thread(target=run, name="bulk request", daemon=True).start()
        return one

    def is_full(self, in_flight: Iterable[Future[Outcome]]) -> bool:
        """Whether no other request may be started now."""
        return sum(not one.done() for one in in_flight) >= self._pace.in_flight

    def wait(self, in_flight: deque[Future[Outcome]], *, for_room: bool = False) -> None:
        """Wait until the oldest request has ended, something stopped the load, or another may be started."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    (for_room and not self.is_full(in_flight)) or in_flight[0].done() or any(map(_failed, in_flight))
                )
            )

    def stop(self) -> None:
        """Wake every thread that pauses or waits for its turn; none sends anything any more."""
        self._stopped.set()
        with self._changed:
            self._changed.notify_all()

    def _send(self, request: BulkRequest) -> list[Refusal]:
        """Send until each document is acknowledged or refused."""
        refused: list[Refusal] = []
        failures = 0
        while left := self._attempt(request, refused):
            if left.halves:
                return refused + self._send_halves(request, left.halves)
            failures = failures + 1 if len(left.request.doc_ids) == len(request.doc_ids) else 1
            request = left.request
            if failures == self._retries.attempts:
                raise ClusterError(
                    f"{len(request.doc_ids)} documents were not taken in {failures} attempts. Last: {left.why} "
                    "When the cluster has recovered, start the same command again: it continues after the last "
                    "finished shard."
                )
            self._pause(max(self._retries.pause_s(failures - 1), left.pause_s))
        return refused

    def _attempt(self, request: BulkRequest, refused: list[Refusal]) -> _Left | None:
        """Send once, note what is refused, and give what is left to do."""
        attempt = self._take_turn(request)
        try:
            waiting = self._sort_out(request, self._ask(request), refused)
        except ResponseError as error:
            # 400 for a whole request: one document in it is beyond what OpenSearch reads; halves find which.
            if error.status in (400, 413) and error.kind != BLOCKED:
                if error.status == 413:
                    self._pace.too_large(attempt)
                return _Left(request, str(error), halves=error)
            if not error.may_pass:
                raise
            self._pace.overloaded(attempt)
            return _Left(request, str(error), pause_s=min(error.retry_after_s or 0, _LONGEST_PAUSE_S))
        except UnreachableError as error:
            self._pace.overloaded(attempt)
            return _Left(request, str(error))
        else:
            if not waiting:
                self._pace.answered(attempt, time.monotonic())
                return None
            self._pace.overloaded(attempt)
            return _Left(request.part(list(waiting)), next(iter(waiting.values())))
        finally:
            with self._changed:
                self._attempts -= 1
                self._changed.notify_all()

    def _take_turn(self, request: BulkRequest) -> Attempt:
        """Wait until the pace allows another attempt. Those of requests that failed before count like any other."""
        documents = len(request.doc_ids)
        self._pause(self._pace.wait_s(documents, time.monotonic()))
        with self._changed:
            self._changed.wait_for(lambda: self._attempts < self._pace.in_flight or self._stopped.is_set())
            self._pause(0)
            self._attempts += 1
        return self._pace.begin(len(request.body), documents, time.monotonic())

    def _pause(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise ClusterError("The load was stopped.")

    def _ask(self, request: BulkRequest) -> Any:
        return self._client.call(
            "POST",
            self._path,
            request.body,
            # _none: what is sent has its vector; the index's default pipeline may encode, and would replace it.
            params={"require_alias": "true", "pipeline": "_none", "filter_path": _ANSWER},
            timeout_s=self._retries.timeout_s,
        )

    def _sort_out(self, request: BulkRequest, answer: Any, refused: list[Refusal]) -> dict[int, str]:
        """Note what is refused; give the places of the documents to send again, and why."""
        items = answer.get("items") if isinstance(answer, dict) else None
        if not isinstance(items, list) or len(items) != len(request.doc_ids):
            count = len(items) if isinstance(items, list) else "no"
            raise ClusterError(self._changed_on_the_way(f"{count} items to {len(request.doc_ids)} documents"))
        try:
            results = [item[request.operation] for item in items]
            ids = [result["_id"] for result in results]
            statuses = [int(result["status"]) for result in results]
        except (KeyError, TypeError, ValueError):
            raise ClusterError(self._changed_on_the_way("items that are none of a bulk request")) from None
        if ids != list(request.doc_ids):
            asked, found = next(pair for pair in zip(request.doc_ids, ids, strict=True) if pair[0] != pair[1])
            raise ClusterError(self._changed_on_the_way(f"document {found!r} in the place of {asked!r}"))
        if max(statuses, default=0) < 300:
            return {}
        waiting: dict[int, str] = {}
        for place, status in enumerate(statuses):
            # A document that is not there needs no deleting.
            if status < 300 or (status == 404 and request.operation == "delete" and "error" not in results[place]):
                continue
            kind, reason = error_of(results[place])
            if kind in (BLOCKED, "index_not_found_exception", "index_closed_exception", "security_exception"):
                raise ClusterError(_stopping(kind, reason))
            if status in BUSY:
                waiting[place] = f"{status} {kind}: {reason}."
            else:
                refused.append(_refusal(request, place, status, kind, reason))
        return waiting

    def _changed_on_the_way(self, what: str) -> str:
        return (
            f"{self._client.address} answered with {what}. "
            "Check that nothing between here and OpenSearch changes requests."
        )

    def _send_halves(self, request: BulkRequest, error: ResponseError) -> list[Refusal]:
        count = len(request.doc_ids)
        if count == 1:
            return [_refusal(request, 0, error.status, error.kind, error.reason)]
        halves = (range(count // 2), range(count // 2, count))
        return [one for half in halves for one in self._send(request.part(half))]


def _refusal(request: BulkRequest, place: int, status: int, kind: str, reason: str) -> Refusal:
    return Refusal(request.doc_ids[place], request.shard, int(request.rows[place]), status, f"{kind}: {reason}")


def _stopping(kind: str, reason: str) -> str:
    if kind != "index_not_found_exception":
        return (
            f"OpenSearch takes no documents: {reason} Remove the cause (a full disk, a block that somebody set, "
            "a missing right), then start the same command again."
        )
    return f"The index was deleted or its alias removed during the load ({reason}). Start the load again."
