"""Bulk requests sent, a few at a time, until every document has one outcome.

In: `BulkRequest`s. Out: one `Outcome` per document, in order. What can succeed later is sent again after a random
pause, the whole request or only the documents that failed: 429, 502, 503, 504, a broken connection, a timeout.
That is safe because every operation has its id. A document that OpenSearch refuses gets a failing Outcome. What is
no document's fault (a block, a missing alias, a refused user, retries used up) is a ClusterError: nothing was lost,
and the same command goes on where it stopped.
Not covered: which documents to send, and remembering what was sent (journal.py).
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from threading import Event, Thread
from typing import Any
from urllib.parse import quote

from sparse_ingest.errors import ClusterError
from sparse_ingest.opensearch.bodies import BulkRequest
from sparse_ingest.opensearch.client import Client, ResponseError, UnreachableError, error_of
from sparse_ingest.records import Outcome

RETRIED = frozenset({429, 502, 503, 504})
# A node that runs out of disk answers 429 too, and goes on to until somebody frees some.
BLOCKED = "cluster_block_exception"
_ANSWER = "items.*._id,items.*.status,items.*.error"


@dataclass(frozen=True)
class Retries:
    """How often and how patiently to send again: pauses are random between 0 and base_s · 2^n, at most cap_s."""

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
    in_flight: int = 3,
    retries: Retries = Retries(),  # noqa: B008 - frozen
) -> Iterator[Outcome]:
    """Send requests to the alias `target`, `in_flight` at a time; the next one is made when the oldest is answered.

    Raises:
        ClusterError: something that concerns no single document stopped the load.
    """
    stopped = Event()
    sender = _Sender(client, target, retries, stopped)
    waiting: deque[Future[list[Outcome]]] = deque()
    try:
        for request in requests:
            if len(waiting) >= in_flight:
                yield from waiting.popleft().result()
            waiting.append(_in_background(partial(sender.send, request)))
        while waiting:
            yield from waiting.popleft().result()
    finally:
        # Reached by Ctrl-C as well: threads that pause end now, those that wait for an answer die with the process.
        stopped.set()


def _in_background(work: Callable[[], list[Outcome]]) -> Future[list[Outcome]]:
    """Run `work` in a daemon thread. A thread pool would be waited for at exit, and Ctrl-C would not stop promptly."""
    future: Future[list[Outcome]] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name="bulk request", daemon=True).start()
    return future


class _Sender:
    """Sends one request to the end: answers, retries, halves."""

    def __init__(self, client: Client, target: str, retries: Retries, stopped: Event) -> None:
        self._client = client
        self._target = target
        self._retries = retries
        self._stopped = stopped

    def send(self, request: BulkRequest) -> list[Outcome]:
        outcomes: dict[int, Outcome] = {}
        pending = list(range(len(request.documents)))
        for attempt in range(self._retries.attempts):
            part = request.part(pending) if len(pending) < len(request.documents) else request
            try:
                answer = self._client.call(
                    "POST",
                    f"/{quote(self._target, safe='')}/_bulk",
                    part.body,
                    params={"require_alias": "true", "filter_path": _ANSWER},
                    timeout_s=self._retries.timeout_s,
                )
            except ResponseError as error:
                # 400 for a whole request: one document in it is beyond what OpenSearch reads; halves find which.
                if error.status in (400, 413) and error.kind != BLOCKED:
                    outcomes |= zip(pending, self._send_halves(part, error), strict=True)
                    return [outcomes[place] for place in range(len(request.documents))]
                if error.status not in RETRIED or error.kind == BLOCKED:
                    raise
                why = str(error)
            except UnreachableError as error:
                why = str(error)
            else:
                retried = self._sort_out(part, pending, answer, outcomes)
                if not retried:
                    return [outcomes[place] for place in range(len(request.documents))]
                pending, why = list(retried), next(iter(retried.values()))
            if attempt + 1 < self._retries.attempts and self._stopped.wait(self._retries.pause_s(attempt)):
                raise ClusterError("The load was stopped.")
        raise ClusterError(
            f"{len(pending)} documents were not taken in {self._retries.attempts} attempts. Last: {why} "
            "When the cluster has recovered, start the same command again: it continues after the last finished shard."
        )

    def _sort_out(
        self, part: BulkRequest, pending: list[int], answer: Any, outcomes: dict[int, Outcome]
    ) -> dict[int, str]:
        """Note the outcome of each document; give the places of those to send again, and why."""
        items = answer.get("items") if isinstance(answer, dict) else None
        if not isinstance(items, list) or len(items) != len(part.documents):
            count = len(items) if isinstance(items, list) else "no"
            raise ClusterError(
                f"{self._client.address} answered with {count} items to {len(part.documents)} documents. "
                "Check that nothing between here and OpenSearch changes requests."
            )
        retried: dict[int, str] = {}
        for place, (row, doc_id), item in zip(pending, part.documents, items, strict=True):
            result = next(iter(item.values()))
            if result.get("_id") != doc_id:
                raise ClusterError(
                    f"{self._client.address} answered for document {result.get('_id')!r}, not {doc_id!r}. "
                    "Check that nothing between here and OpenSearch changes requests."
                )
            status = int(result["status"])
            if status < 300:
                outcomes[place] = Outcome(doc_id, row, status, None)
                continue
            kind, reason = error_of(result)
            if kind in (BLOCKED, "index_not_found_exception", "security_exception"):
                raise ClusterError(_stopping(kind, reason))
            if status in RETRIED:
                retried[place] = f"{status} {kind}: {reason}."
            else:
                outcomes[place] = Outcome(doc_id, row, status, f"{kind}: {reason}")
        return retried

    def _send_halves(self, request: BulkRequest, error: ResponseError) -> list[Outcome]:
        count = len(request.documents)
        if count == 1:
            row, doc_id = request.documents[0]
            return [Outcome(doc_id, row, error.status, f"{error.kind}: {error.reason}")]
        halves = (range(count // 2), range(count // 2, count))
        return [outcome for half in halves for outcome in self.send(request.part(half))]


def _stopping(kind: str, reason: str) -> str:
    if kind != "index_not_found_exception":
        return (
            f"OpenSearch takes no documents: {reason} Remove the cause (a full disk, a block that somebody set, "
            "a missing right), then start the same command again."
        )
    return f"The index was deleted or its alias removed during the load ({reason}). Start the load again."
