"""Send the shards of a load as one stream of requests, and journal each shard when all its documents are answered.

In: a run, the writer that fits the index, a journal. Out: journal lines and dead letters. The next shard starts before
the last one is answered, so the connections are never idle. A line is written only after a check that the index is the
one that the load started with, that no other load has started since, and that the documents are on its disk.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from sparse_ingest.cluster import installed
from sparse_ingest.cluster.bulk_bodies import BodyWriter, BulkRequest, delete_requests
from sparse_ingest.cluster.claim import Claim
from sparse_ingest.cluster.client import ResponseError, UnreachableError
from sparse_ingest.cluster.pacing import Pace
from sparse_ingest.cluster.sending import Retries, send
from sparse_ingest.cluster.settling import Durability, patiently
from sparse_ingest.errors import ClusterError, Interrupted, RunError, counted
from sparse_ingest.pruning import prune
from sparse_ingest.records import Outcome, Refusal
from sparse_ingest.reporting import Reporter
from sparse_ingest.runs.changes import Changes
from sparse_ingest.runs.checking import shard_parts
from sparse_ingest.runs.run import Run
from sparse_ingest.runs.shards import take_rows


@dataclass(frozen=True)
class Operations:
    """The documents that a load sends: with pruned vectors, or with `update` the vectors alone.

    With `changes`, only documents that differ from the older run in the index.
    """

    run: Run
    writer: BodyWriter
    pruning: Mapping[str, Any]
    update: bool = False
    changes: Changes | None = None

    def requests(
        self, shard: int, *, rows: Collection[int] | None = None, max_bytes: Callable[[], int]
    ) -> Iterator[BulkRequest]:
        """Yield requests with the documents of a shard, or of some of its source rows."""
        if self.changes and rows is None:
            parts = self.changes.documents(shard)
        else:
            parts = shard_parts(self.run, shard)
        if rows is not None:
            wanted = np.array(list(rows), dtype=np.uint64)
            parts = (take_rows(part, np.flatnonzero(np.isin(part.rows, wanted))) for part in parts)
        pruned = (part._replace(vectors=prune(part.vectors, **self.pruning)) for part in parts)
        yield from self.writer.requests(pruned, shard=shard, max_bytes=max_bytes)

    def unchanged(self, shard: int) -> int:
        """Return how many documents of a shard are not sent, because the index has them."""
        return self.run.rows_of(shard) - self.changes.differing(shard) if self.changes else 0


def rules_of(pruning: Mapping[str, Any], update: bool) -> dict[str, Any]:
    """Return the `rules` of a journal line: a load continues only with the same ones."""
    return {"pruning": dict(pruning), **({"update": True} if update else {})}


@dataclass
class _ShardInFlight:
    """A shard that is being sent."""

    shard: int
    began: float = field(default_factory=time.monotonic)
    sent: int = 0
    answered: int = 0
    refused: int = 0
    all_sent: bool = False


class Sent(NamedTuple):
    """A shard that another process has sent, and of which every document was answered."""

    shard: int
    rows: int
    refused: list[Refusal]
    seconds: float


@dataclass(frozen=True)
class Delivery:
    """The sending side of a load. `durability` is None if a confirmed write is on disk."""

    claim: Claim
    operations: Operations
    pace: Pace
    retries: Retries
    durability: Durability | None

    def load_shards(
        self, missing: Sequence[int], documents: int, reporter: Reporter, run_on: Callable[..., None] | None = None
    ) -> None:
        """Send the missing shards, or let `run_on` do it. `documents` is the number of documents in other shards.

        Raise `Interrupted` if `reporter` requested a stop; started shards are finished.
        """
        reporter.earlier(documents)
        if missing and run_on:
            return self._load_elsewhere(missing, run_on, reporter)
        in_flight: deque[_ShardInFlight] = deque()
        started: list[int] = []
        self.claim.journal.begin(set(missing))
        reporter.advance(0)  # starts the clock

        def requests() -> Iterator[BulkRequest]:
            for shard in missing:
                if reporter.stop_requested():
                    return
                started.append(shard)
                in_flight.append(this := _ShardInFlight(shard))
                for request in self.operations.requests(shard, max_bytes=self.pace.max_bytes):
                    this.sent += len(request.rows)
                    yield request
                this.all_sent = True

        for outcome in self._send(requests()):
            this = next(one for one in in_flight if one.shard == outcome.shard)
            this.answered += outcome.documents
            this.refused += len(outcome.refused)
            self.claim.journal.record_dead(outcome.refused)
            reporter.advance(outcome.documents + self._finish_answered(in_flight))
        reporter.advance(self._finish_answered(in_flight))
        if len(started) < len(missing):
            raise Interrupted(
                f"Stopped after {counted(len(started), 'shard')}; the same command continues with shard "
                f"{missing[len(started)]}."
            )

    def _load_elsewhere(self, missing: Sequence[int], run_on: Callable[..., None], reporter: Reporter) -> None:
        """Let other processes send the missing shards, and record each one that was answered completely.

        `run_on` gets groups of shards, and calls `done` with a list of `Sent` for each (executors/ray.py).
        """
        self.claim.journal.begin(set(missing))

        def record(sent: list[Sent]) -> None:
            for one in sent:
                self.claim.journal.record_dead(one.refused)
                self._finish(one.shard, one.rows, len(one.refused), one.seconds)

        groups = [range(shard, shard + 1) for shard in missing]
        with self._explained():
            run_on(lambda: groups, reporter=reporter, done=record)

    def retry_dead(self, shard: int) -> int:
        """Send the refused documents of a finished shard again, and return their number.

        Dead letters and counts are replaced atomically, after all are answered.
        """
        journal = self.claim.journal
        rows = journal.dead_rows(shard)

        def still_dead() -> Iterator[Refusal]:
            answered = 0
            for outcome in self._send(self.operations.requests(shard, rows=rows, max_bytes=self.pace.max_bytes)):
                answered += outcome.documents
                yield from outcome.refused
            # A source row with several passages sends all of them.
            if answered < len(rows):
                raise RunError(
                    f"{journal.dead_path} names {len(rows)} documents of shard {shard}, but only {answered} of "
                    "them are in the run. Delete its folder, and load again: documents keep their ids."
                )
            self._make_sure()

        journal.retried(shard, still_dead())
        return len(rows)

    def delete(self, ids: Iterable[str]) -> int:
        """Delete documents, and return the number of ids; ids that the index lacks count as deleted."""
        deleted = 0
        for outcome in self._send(delete_requests(ids)):
            for one in outcome.refused:
                raise ClusterError(
                    f"Document {one.doc_id!r} cannot be deleted ({one.status} {one.reason}). Remove the cause, then "
                    "start the same command again."
                )
            deleted += outcome.documents
        self._make_sure()
        return deleted

    def _send(self, requests: Iterator[BulkRequest]) -> Iterator[Outcome]:
        claim = self.claim
        how: dict[str, Any] = {"pace": self.pace, "retries": self.retries}
        how["final_pipeline"] = installed.final_pipeline(claim.index)
        with self._explained():
            yield from send(claim.client, requests, target=claim.alias, **how)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Raise the better error of the claim, if there is one: a load that starts removes the alias."""
        try:
            yield
        except ClusterError as error:
            if not isinstance(error, UnreachableError):
                with contextlib.suppress(ResponseError, UnreachableError):
                    self.claim.check()
            raise

    def _finish_answered(self, in_flight: deque[_ShardInFlight]) -> int:
        """Write the journal lines of the first shards if they are sent and answered completely.

        Return how many of their documents were not sent, because the index has them.
        """
        not_sent = 0
        while in_flight and in_flight[0].all_sent and in_flight[0].answered == in_flight[0].sent:
            this = in_flight[0]
            unchanged = self.operations.unchanged(this.shard)
            not_sent += unchanged
            self._finish(this.shard, this.answered, this.refused, time.monotonic() - this.began, unchanged)
            in_flight.popleft()
        return not_sent

    def _finish(self, shard: int, rows: int, refused: int, seconds: float, unchanged: int = 0) -> None:
        """Write the journal line of a shard of which every document was answered."""
        self._make_sure()
        line = {
            "rows": rows,
            "acknowledged": rows - refused,
            "refused": refused,
            **({"unchanged": unchanged} if unchanged else {}),
            "sha256": (self.operations.run.done(shard) or {}).get("sha256"),
            "rules": rules_of(self.operations.pruning, self.operations.update),
            "seconds": round(seconds, 3),
            **({"takeover": takeover} if (takeover := self.claim.stamp.takeover) else {}),
        }
        self.claim.journal.finish(shard, line)

    def _make_sure(self) -> None:
        """Raise unless this process still has lock and claim, and confirmed writes are on disk."""
        self.operations.run.refuse_lost()
        if self.durability:
            self.durability.settle()
        patiently(self.claim.check, self.retries, self.claim.client.waiting)
