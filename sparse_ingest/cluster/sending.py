"""Send bulk requests until every document is acknowledged or refused.

In: `BulkRequest`s. Out: one `Outcome` per request, in order. After 429, 502, 503, 504, a broken connection or a
timeout, the request or its failed documents are sent again: every operation has its id. A request whose connection
breaks repeatedly, while an empty one is answered, is sent in halves as after 413: some proxies reset the connection of
requests that are too large, or whose content they refuse. An error of more than one document is raised as
`ClusterError`.
"""

from __future__ import annotations

import random
import re
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Condition, Event
from typing import Any, NamedTuple

from sparse_ingest.cluster.bulk_bodies import BulkRequest
from sparse_ingest.cluster.client import Client, ResponseError, UnreachableError, path_of
from sparse_ingest.cluster.failures import BUSY, error_of, is_block
from sparse_ingest.cluster.pacing import FEWEST_BYTES, Attempt, Pace
from sparse_ingest.cluster.waiting import SAY_S
from sparse_ingest.errors import ClusterError, counted
from sparse_ingest.records import Outcome, Refusal
from sparse_ingest.storage.waiting import in_thread

_BROKEN = frozenset({0, 502, 504})  # statuses of proxies; 0 stands for no answer
# Consecutive failures with these statuses before a large or small request is halved, or a single document is refused.
_BREAKS, _BREAKS_SMALL, _BREAKS_ALONE = 3, 4, 6
# The ids show that an answer belongs to its request; they cost 35 ms per 100,000 documents.
_ANSWER = "items.*._id,items.*.status,items.*.error"
# Errors of one document that concern all documents.
_STOPPING = ("index_not_found_exception", "index_closed_exception", "security_exception")
# The error of an alias with several indexes, or without a write index.
_NOT_ONE_INDEX = re.compile(r"(no write index is defined for )?alias \[", re.IGNORECASE)
_LONGEST_PAUSE_S = 600.0  # a wrong Retry-After must not stop a load for hours


@dataclass(frozen=True)
class Retries:
    """The retry policy of a request: random pauses between 0 and base_s · 2^n, at most cap_s.

    `attempts` counts consecutive attempts in which no document was accepted.
    """

    attempts: int = 12
    base_s: float = 0.5
    cap_s: float = 30.0
    timeout_s: float = 120.0

    def pause_s(self, attempt: int) -> float:
        """Return the pause after failed attempt number `attempt`, counted from 0 ("full jitter")."""
        return random.uniform(0, min(self.cap_s, self.base_s * 2.0**attempt))  # noqa: S311


def send(
    client: Client,
    requests: Iterable[BulkRequest],
    *,
    target: str,
    pace: Pace | None = None,
    retries: Retries = Retries(),  # noqa: B008 - frozen
    final_pipeline: str | None = None,
) -> Iterator[Outcome]:
    """Send requests to the alias `target`. Documents that the index's `final_pipeline` drops count as refused.

    One request is created ahead, so that few are in memory. An error of more than one document is a `ClusterError`.
    """
    sender = _Sender(client, target, pace or Pace(), retries, final_pipeline)
    in_flight: deque[Future[Outcome]] = deque()
    try:
        for request in requests:
            while sender.is_full(in_flight):
                yield from _outcomes(in_flight)
                sender.wait(in_flight, for_room=True)
            in_flight.append(sender.start(request))
            del request  # frees its bytes when its thread ends
            yield from _outcomes(in_flight)
        while in_flight:
            sender.wait(in_flight)
            yield from _outcomes(in_flight)
    finally:
        # Also after Ctrl-C: threads that pause end now, those that wait for an answer end with the process.
        sender.stop()


class _Left(NamedTuple):
    """A request to send again after a pause, or in halves if `halve` is true.

    `status` is the status of the complete answer, 0 without an answer, or None if some documents were accepted.
    """

    request: BulkRequest
    why: str
    status: int | None = None
    pause_s: float = 0.0
    halve: bool = False


def _outcomes(in_flight: deque[Future[Outcome]]) -> Iterator[Outcome]:
    """Remove and yield the finished outcomes at the front, and raise the first error of any request."""
    while in_flight and in_flight[0].done() and not in_flight[0].exception():
        yield in_flight.popleft().result()
    for one in filter(_failed, in_flight):
        one.result()


def _failed(one: Future[Outcome]) -> bool:
    return one.done() and one.exception() is not None


class _Sender:
    """Sends each request in its own thread, with retries and halves."""

    def __init__(self, client: Client, target: str, pace: Pace, retries: Retries, final_pipeline: str | None) -> None:
        self._client = client
        self._path = f"{path_of(target)}/_bulk"
        self._pace = pace
        self._retries = retries
        self._final_pipeline = final_pipeline
        self._stopped = Event()
        self._changed = Condition()  # guards `_attempts`; notified when an attempt or a request has ended
        self._attempts = 0

    def start(self, request: BulkRequest) -> Future[Outcome]:
        """Send a request in a daemon thread: Python's exit would wait for a thread pool, also after Ctrl-C."""

        def run() -> Outcome:
            refused = self._send(request)
            return Outcome(request.shard, len(request.doc_ids) - len(refused), refused)

        one = in_thread(run, "bulk request")
        one.add_done_callback(self._notify)
        return one

    def is_full(self, in_flight: Iterable[Future[Outcome]]) -> bool:
        """Return whether no other request may be started now."""
        return sum(not one.done() for one in in_flight) >= self._pace.in_flight

    def wait(self, in_flight: deque[Future[Outcome]], *, for_room: bool = False) -> None:
        """Wait until the oldest request has ended, a request failed, or another may be started."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    (for_room and not self.is_full(in_flight)) or in_flight[0].done() or any(map(_failed, in_flight))
                )
            )

    def stop(self) -> None:
        """Wake every thread that pauses or waits for its turn; none sends another request."""
        self._stopped.set()
        self._notify()

    def _notify(self, _: object = None) -> None:
        with self._changed:
            self._changed.notify_all()

    def _send(self, request: BulkRequest) -> list[Refusal]:
        """Send until each document is acknowledged or refused."""
        if len(request.doc_ids) > 1 and len(request.body) > self._pace.ceiling:
            return self._send_halves(request, _Left(request, "too large"))
        refused: list[Refusal] = []
        failures = breaks = 0
        patience_s = self._client.waiting.patience_s
        end = time.monotonic() + patience_s
        while left := self._attempt(request, refused, end):
            failures += 1
            if len(left.request.doc_ids) < len(request.doc_ids):
                failures, end = 1, time.monotonic() + patience_s
            left_s = end - time.monotonic()
            breaks = breaks + 1 if left.status in _BROKEN else 0
            request, count = left.request, len(left.request.doc_ids)
            if left.halve or (breaks >= _breaks(request) and self._answers_small()):
                return refused + self._send_halves(request, left)
            if failures == self._retries.attempts or left_s <= 0:
                documents = counted(count, "document")
                raise ClusterError(
                    f"The cluster did not accept {documents} in {counted(failures, 'attempt')} and "
                    f"{patience_s - left_s:.0f} s. Last: {left.why.rstrip('.')}. When the cluster has "
                    "recovered, start the same command again: it continues after the last finished shard."
                )
            attempt = f"attempt {failures + 1} of {self._retries.attempts}, for at most {left_s:.0f} s more"
            self._client.waiting.say(left.why, f"Sending {count} documents again ({attempt}): {left.why}")
            self._pause(min(max(self._retries.pause_s(failures - 1), left.pause_s), left_s), left.why)
        return refused

    def _attempt(self, request: BulkRequest, refused: list[Refusal], end: float) -> _Left | None:
        """Send once, before `end` on the monotonic clock; add refusals to `refused` and return what is left to send."""
        attempt = self._take_turn(request)
        try:
            # The wait for its turn may have used up the time.
            timeout_s = min(self._retries.timeout_s, max(10.0, end - time.monotonic()))
            waiting = self._sort_out(request, self._ask(request.body, timeout_s), refused)
        except ResponseError as error:
            # 400 for the complete request: the cluster cannot parse one document in it; halves find which.
            if error.status in (400, 413):
                if error.status == 413:
                    self._pace.too_large(attempt)
                return _Left(request, f"{error.kind}: {error.reason}", error.status, halve=True)
            if not error.may_pass:
                raise
            self._pace.overloaded(attempt)
            return _Left(request, str(error), error.status, min(error.retry_after_s or 0, _LONGEST_PAUSE_S))
        except UnreachableError as error:
            self._pace.overloaded(attempt)
            return _Left(request, str(error), 0)
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
        """Wait until the pace allows another attempt; retries count too."""
        documents = len(request.doc_ids)
        self._pause(self._pace.wait_s(documents, time.monotonic()))
        with self._changed:
            self._changed.wait_for(lambda: self._attempts < self._pace.in_flight or self._stopped.is_set())
            self._pause(0)
            self._attempts += 1
        return self._pace.begin(len(request.body), documents, time.monotonic())

    def _pause(self, seconds: float, why: str | None = None) -> None:
        """Sleep, unless this sender is stopped; with `why`, a stop request ends the pause too."""
        if why:
            self._client.waiting.pause(seconds, why, self._stopped)
        if self._stopped.wait(0 if why else seconds):
            raise ClusterError("The load was stopped.")

    def _ask(self, body: bytes, timeout_s: float) -> Any:
        # _none: the documents have their vectors, which an encoding default pipeline of the index would replace.
        answer = f"{_ANSWER},items.*.result" if self._final_pipeline else _ANSWER
        params = {"require_alias": "true", "pipeline": "_none", "filter_path": answer}
        return self._client.call("POST", self._path, body, params=params, timeout_s=timeout_s)

    def _answers_small(self) -> bool:
        """Return whether a bulk request without documents is answered; clusters answer it with 400."""
        try:
            self._ask(b"\n", min(self._retries.timeout_s, SAY_S))
        except UnreachableError:
            return False
        except ResponseError as error:
            return error.status not in BUSY
        return True

    def _sort_out(self, request: BulkRequest, answer: Any, refused: list[Refusal]) -> dict[int, str]:
        """Add refusals to `refused`; return the places of the documents to send again, and why."""
        items = answer.get("items") if isinstance(answer, dict) else None
        if not isinstance(items, list) or len(items) != len(request.doc_ids):
            count = len(items) if isinstance(items, list) else "no"
            raise self._altered(f"{count} items to {len(request.doc_ids)} documents")
        try:
            results = [item[request.operation] for item in items]
            self._mark_dropped(request, results)
            statuses = [result["status"] for result in results]
            of_success = ("deleted",) if request.operation == "delete" else ("created", "updated", "noop")
            pairs = zip(request.doc_ids, results, strict=True)
            wrong = next((pair for pair in pairs if not _fits(*pair, of_success)), None)
        except (KeyError, TypeError, AttributeError):
            raise self._altered("items that do not belong to a bulk request") from None
        if wrong:
            doc_id, result = wrong
            found = {key: result[key] for key in ("_id", "status", "result", "error") if key in result}
            raise self._altered(f"{str(found)[:200]} for document {doc_id!r}")
        if max(statuses, default=0) < 300:
            return {}
        waiting: dict[int, str] = {}
        for place, status in enumerate(statuses):
            # A document to delete may be absent.
            if status < 300 or (status == 404 and request.operation == "delete" and "error" not in results[place]):
                continue
            kind, reason = error_of(results[place])
            if kind == "illegal_argument_exception" and _NOT_ONE_INDEX.match(reason):
                raise ClusterError(
                    f"Another client changed the alias of this load: {reason}. Start the load again, which corrects it."
                )
            if is_block(status, kind) or kind in _STOPPING:
                raise ClusterError(_stopping(kind, reason))
            if status in BUSY:
                waiting[place] = f"{status} {kind}: {reason}."
            else:
                refused.append(_refusal(request, place, status, f"{kind}: {reason}"))
        return waiting

    def _mark_dropped(self, request: BulkRequest, results: list[dict[str, Any]]) -> None:
        """Add an error to the results of documents that the final pipeline dropped; clusters report none."""
        for result in results if self._final_pipeline and request.operation == "index" else ():
            if result.get("result") == "noop":
                why = f"the final pipeline {self._final_pipeline!r} of the index (index.final_pipeline) dropped it"
                result |= {"status": 400, "error": {"type": "dropped", "reason": why}}
                self._client.waiting.say(why, f"A document was not indexed: {why}. It is a dead letter.")

    def _altered(self, what: str) -> ClusterError:
        cause = "no proxy changes requests"
        if self._final_pipeline:
            cause = f"the final pipeline {self._final_pipeline!r} of the index (index.final_pipeline) changes no ids"
        return ClusterError(f"{self._client.address} answered with {what}. Check that {cause}.")

    def _send_halves(self, request: BulkRequest, left: _Left) -> list[Refusal]:
        count, status = len(request.doc_ids), left.status
        broken = status in _BROKEN
        if count == 1:
            why = f"sent alone {_BREAKS_ALONE} times: {left.why}" if broken else left.why
            return [_refusal(request, 0, status or 0, why)]
        if broken:
            self._client.waiting.say(f"halves {left.why}", f"Sending {count} documents in halves: {left.why}")
        halves = (range(count // 2), range(count // 2, count))
        refused = [one for half in halves for one in self._send(request.part(half))]
        # If a document was refused, its content broke the request, not the size: larger ones may still be sent.
        if broken and not any(one.status in _BROKEN for one in refused):
            self._pace.too_large(self._pace.begin(len(request.body), count, time.monotonic()))
        return refused


def _breaks(request: BulkRequest) -> int:
    """Return after how many broken connections a request is halved, or a single document refused."""
    if len(request.doc_ids) == 1:
        return _BREAKS_ALONE
    return _BREAKS if len(request.body) > FEWEST_BYTES else _BREAKS_SMALL


def _fits(doc_id: str, result: Mapping[str, Any], of_success: tuple[str, ...]) -> bool:
    """Return whether a result belongs to this document and is a success or an error of the cluster."""
    status = result["status"]
    if result["_id"] != doc_id or type(status) is not int:
        return False
    if 200 <= status < 300:
        return result.get("error") is None and result.get("result", of_success[0]) in of_success
    return 400 <= status < 600


def _refusal(request: BulkRequest, place: int, status: int, reason: str) -> Refusal:
    return Refusal(request.doc_ids[place], request.shard, int(request.rows[place]), status, reason)


def _stopping(kind: str, reason: str) -> str:
    if kind == "index_not_found_exception":
        return f"The index was deleted or its alias removed during the load ({reason}). Start the load again."
    fixes = {"security_exception": "Grant the right", "index_closed_exception": "Open the index"}
    fix = fixes.get(kind, "Remove the cause (a full disk, or a block that an administrator set)")
    return f"The cluster accepts no documents: {reason} {fix}, then start the same command again."
