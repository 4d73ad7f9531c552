"""Bulk requests sent, some at a time, until every document has one outcome.

In: `BulkRequest`s. Out: one `Outcome` per request, in order. What can succeed later is sent again after a random
pause, the whole request or only the documents that failed: 429, 502, 503, 504, a broken connection, a timeout.
That is safe because every operation has its id. How many requests are in flight follows the cluster (pacing.py).
A request whose connection breaks repeatedly, while an empty one is answered, is sent in halves as after 413: some
proxies reset the connection of requests that are too large, or whose content they refuse.
A document counts as acknowledged when the answer has its id, in its place, with a status of 200 to 299. One that
OpenSearch refuses or a pipeline drops is in its request's Outcome with the reason. What is no document's fault (a
block, a missing alias, a refused user, retries used up) is a ClusterError: nothing was lost, and the same command goes
on where it stopped.
Not covered: which documents to send, and remembering what was sent (journal.py).
"""

from __future__ import annotations

import random
import re
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Condition, Event, Thread
from typing import Any, NamedTuple

from sparse_ingest.cluster.bulk_bodies import BulkRequest
from sparse_ingest.cluster.client import Client, ResponseError, UnreachableError, path_of
from sparse_ingest.cluster.failures import BUSY, error_of, is_block
from sparse_ingest.cluster.pacing import FEWEST_BYTES, Attempt, Pace
from sparse_ingest.cluster.waiting import LOOK_S, SAY_S
from sparse_ingest.errors import ClusterError
from sparse_ingest.records import Outcome, Refusal

_ON_THE_WAY = frozenset({0, 502, 504})  # statuses that are not OpenSearch's own; 0 is no answer at all
# Failures with these statuses, in a row, before a large request or a small one is halved, or one document is refused.
_BREAKS, _BREAKS_SMALL, _BREAKS_ALONE = 3, 4, 6
# The ids show that an answer belongs to its request, for 35 ms of our time in 100,000 documents.
_ANSWER = "items.*._id,items.*.status,items.*.error"
# Errors of one document that concern all of them.
_STOPPING = ("index_not_found_exception", "index_closed_exception", "security_exception")
# What an alias of several indexes answers, or one that is not for writing.
_NOT_ONE_INDEX = re.compile(r"(no write index is defined for )?alias \[", re.IGNORECASE)
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
    final_pipeline: str | None = None,
) -> Iterator[Outcome]:
    """Send requests to the alias `target`, at a pace that the cluster sets.

    Documents that the index's `final_pipeline` drops count as refused.

    One request is made ahead; the next one when another is answered, so few are in memory at any time.

    Raises:
        ClusterError: something that concerns no single document stopped the load.
    """
    sender = _Sender(client, target, pace or Pace(), retries, final_pipeline)
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
    """What an attempt left to do: send `request` again after a pause, or in halves if `halve` is true.

    `status` is that of the complete answer, 0 if there was none, or None if some documents were accepted.
    """

    request: BulkRequest
    why: str
    status: int | None = None
    pause_s: float = 0.0
    halve: bool = False


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

    def __init__(self, client: Client, target: str, pace: Pace, retries: Retries, final_pipeline: str | None) -> None:
        self._client = client
        self._path = f"{path_of(target)}/_bulk"
        self._pace = pace
        self._retries = retries
        self._final_pipeline = final_pipeline
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
            breaks = breaks + 1 if left.status in _ON_THE_WAY else 0
            request, count = left.request, len(left.request.doc_ids)
            if left.halve or (breaks >= _breaks(request) and self._answers_small()):
                return refused + self._send_halves(request, left)
            if failures == self._retries.attempts or left_s <= 0:
                raise ClusterError(
                    f"{count} documents were not taken in {failures} attempts and {patience_s - left_s:.0f} s. "
                    f"Last: {left.why} "
                    "When the cluster has recovered, start the same command again: it continues after the last "
                    "finished shard."
                )
            attempt = f"attempt {failures + 1} of {self._retries.attempts}, for at most {left_s:.0f} s more"
            self._client.waiting.say(left.why, f"Sending {count} documents again ({attempt}): {left.why}")
            self._pause(min(max(self._retries.pause_s(failures - 1), left.pause_s), left_s), left.why)
        return refused

    def _attempt(self, request: BulkRequest, refused: list[Refusal], end: float) -> _Left | None:
        """Send once, before `end` on the monotonic clock, note what is refused, and return what is left to do."""
        attempt = self._take_turn(request)
        try:
            # The wait for its turn may have taken what was left.
            timeout_s = min(self._retries.timeout_s, max(10.0, end - time.monotonic()))
            waiting = self._sort_out(request, self._ask(request.body, timeout_s), refused)
        except ResponseError as error:
            # 400 for a whole request: one document in it is beyond what OpenSearch reads; halves find which.
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
        """Wait until the pace allows another attempt. Those of requests that failed before count like any other."""
        documents = len(request.doc_ids)
        self._pause(self._pace.wait_s(documents, time.monotonic()))
        with self._changed:
            self._changed.wait_for(lambda: self._attempts < self._pace.in_flight or self._stopped.is_set())
            self._pause(0)
            self._attempts += 1
        return self._pace.begin(len(request.body), documents, time.monotonic())

    def _pause(self, seconds: float, why: str | None = None) -> None:
        """Sleep, unless this sender is stopped; with `why`, a stop request ends the pause too."""
        end = time.monotonic() + seconds
        while not self._stopped.wait(min(LOOK_S, max(0, end - time.monotonic()))):
            if why:
                self._client.waiting.remind(why, max(0, end - time.monotonic()))
            if time.monotonic() >= end:
                return
        raise ClusterError("The load was stopped.")

    def _ask(self, body: bytes, timeout_s: float) -> Any:
        # _none: what is sent has its vector; the index's default pipeline may encode, and would replace it.
        answer = f"{_ANSWER},items.*.result" if self._final_pipeline else _ANSWER
        params = {"require_alias": "true", "pipeline": "_none", "filter_path": answer}
        return self._client.call("POST", self._path, body, params=params, timeout_s=timeout_s)

    def _answers_small(self) -> bool:
        """Return whether a bulk request without documents is answered; OpenSearch answers it with 400."""
        try:
            self._ask(b"\n", min(self._retries.timeout_s, SAY_S))
        except UnreachableError:
            return False
        except ResponseError as error:
            return error.status not in BUSY
        return True

    def _sort_out(self, request: BulkRequest, answer: Any, refused: list[Refusal]) -> dict[int, str]:
        """Note what is refused; give the places of the documents to send again, and why."""
        items = answer.get("items") if isinstance(answer, dict) else None
        if not isinstance(items, list) or len(items) != len(request.doc_ids):
            count = len(items) if isinstance(items, list) else "no"
            raise ClusterError(self._changed_on_the_way(f"{count} items to {len(request.doc_ids)} documents"))
        try:
            results = [item[request.operation] for item in items]
            self._mark_dropped(request, results)
            statuses = [result["status"] for result in results]
            taken = ("deleted",) if request.operation == "delete" else ("created", "updated", "noop")
            pairs = zip(request.doc_ids, results, strict=True)
            spoiled = next((pair for pair in pairs if not _fits(*pair, taken)), None)
        except (KeyError, TypeError, AttributeError):
            raise ClusterError(self._changed_on_the_way("items that are none of a bulk request")) from None
        if spoiled:
            asked, found = spoiled
            said = {key: found[key] for key in ("_id", "status", "result", "error") if key in found}
            raise ClusterError(self._changed_on_the_way(f"{str(said)[:200]} for document {asked!r}"))
        if max(statuses, default=0) < 300:
            return {}
        waiting: dict[int, str] = {}
        for place, status in enumerate(statuses):
            # A document that is not there needs no deleting.
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
        """Add an error to the results of documents that the final pipeline dropped; OpenSearch reports none."""
        for result in results if self._final_pipeline and request.operation == "index" else ():
            if result.get("result") == "noop":
                why = f"the final pipeline {self._final_pipeline!r} of the index (index.final_pipeline) dropped it"
                result |= {"status": 400, "error": {"type": "dropped", "reason": why}}
                self._client.waiting.say(why, f"A document was not indexed: {why}. It is a dead letter.")

    def _changed_on_the_way(self, what: str) -> str:
        return (
            f"{self._client.address} answered with {what}. "
            "Check that nothing between here and OpenSearch changes requests."
        )

    def _send_halves(self, request: BulkRequest, left: _Left) -> list[Refusal]:
        count, status = len(request.doc_ids), left.status
        on_the_way = status in _ON_THE_WAY
        if count == 1:
            why = f"sent alone {_BREAKS_ALONE} times: {left.why}" if on_the_way else left.why
            return [_refusal(request, 0, status or 0, why)]
        if on_the_way:
            self._client.waiting.say(f"halves {left.why}", f"Sending {count} documents in halves: {left.why}")
        halves = (range(count // 2), range(count // 2, count))
        refused = [one for half in halves for one in self._send(request.part(half))]
        # If a document was refused, its content broke the request, not the size: larger ones may still be sent.
        if on_the_way and not any(one.status in _ON_THE_WAY for one in refused):
            self._pace.too_large(self._pace.begin(len(request.body), count, time.monotonic()))
        return refused


def _breaks(request: BulkRequest) -> int:
    """Return after how many such failures a request is halved, or a single document refused."""
    if len(request.doc_ids) == 1:
        return _BREAKS_ALONE
    return _BREAKS if len(request.body) > FEWEST_BYTES else _BREAKS_SMALL


def _fits(doc_id: str, result: Mapping[str, Any], taken: tuple[str, ...]) -> bool:
    """Return whether a result is one of this document, and one that OpenSearch gives: a success, or an error."""
    status = result["status"]
    if result["_id"] != doc_id or type(status) is not int:
        return False
    if 200 <= status < 300:
        return result.get("error") is None and result.get("result", taken[0]) in taken
    return 400 <= status < 600


def _refusal(request: BulkRequest, place: int, status: int, reason: str) -> Refusal:
    return Refusal(request.doc_ids[place], request.shard, int(request.rows[place]), status, reason)


def _stopping(kind: str, reason: str) -> str:
    if kind == "index_not_found_exception":
        return f"The index was deleted or its alias removed during the load ({reason}). Start the load again."
    fixes = {"security_exception": "Grant the right", "index_closed_exception": "Open the index"}
    fix = fixes.get(kind, "Remove the cause (a full disk, or a block that an administrator set)")
    return f"OpenSearch takes no documents: {reason} {fix}, then start the same command again."
