"""Compare an index with the run that was loaded into it: how many documents, and what it keeps of their weights.

In: a run folder, the name of an index, a connection. Out: a `VerifyReport`. Of every sampled document each weight
must be, bit for bit, what the index keeps of the run's weight; and the sums over the whole vocabulary must be those of
the run, so that a weight too many is seen as well (unless it is below 2^-24 of the sum, or its token is in no
vocabulary: no request lists the tokens of a document).
Not covered: the other fields of the documents, and mending what differs.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sparse_ingest.errors import ClusterError
from sparse_ingest.load import loaded_shards, refuse_incomplete, run_stamp
from sparse_ingest.opensearch import indexes
from sparse_ingest.opensearch.client import Connection, connect
from sparse_ingest.opensearch.journal import open_journal
from sparse_ingest.opensearch.reading import StoredReader
from sparse_ingest.opensearch.scores import stored_weights
from sparse_ingest.runs.manifest import Run, open_run
from sparse_ingest.runs.shards import read_shard

SAMPLE = 200
NAMED = 20  # differences and missing ids that the report names
_BATCH = 200


class WeightDifference(NamedTuple):
    """A weight that the index keeps otherwise than expected; `found` None: it has none for this token.

    `token` None: the weights expected are all there, and others besides; the two sums differ.
    """

    doc_id: str
    token: str | None
    expected: float
    found: float | None


@dataclass
class VerifyReport:
    """What a verification found.

    `expected_documents` is None when others wrote into the index as well; `unloaded_shards` counts those that an
    unfinished load has not sent yet.
    """

    index: str
    index_documents: int
    expected_documents: int | None
    refused_documents: int
    checked_documents: int = 0
    checked_weights: int = 0
    differing: int = 0
    missing: int = 0
    unloaded_shards: int = 0
    seconds: float = 0.0
    differences: list[WeightDifference] = field(default_factory=list)
    missing_ids: list[str] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        found = self.differing or self.missing or self.unloaded_shards
        return not found and self.expected_documents in (None, self.index_documents)


class _Expected(NamedTuple):
    """A document of the run: its id, and its tokens with what an index keeps of their weights."""

    doc_id: str
    tokens: list[str]
    token_ids: npt.NDArray[np.integer]
    weights: npt.NDArray[np.float32]


def verify(
    run_path: Path,
    *,
    index: str,
    connection: Connection,
    sample: int | None = SAMPLE,
    field: str | None = None,
    progress: Callable[[int], None] = lambda documents: None,
) -> VerifyReport:
    """Check counts, and `sample` documents spread evenly over the run (None: all of them).

    `field` is the sparse field; left out, the one that the index is stamped with.

    Raises:
        RunError, ClusterError, UsageError: the two cannot be compared.
    """
    started = time.monotonic()
    run = open_run(run_path)
    with contextlib.closing(connect(connection)) as client:
        there = indexes.find_index(client, index)
        if there is None:
            raise ClusterError(
                f"There is no index {index!r}. Load the run first: sparse-ingest load RUN --index {index}."
            )
        stamp = there.stamp
        field = field or (stamp.field if stamp else "sparse")
        indexes.check_fits(there, run_stamp(run, field))
        indexes.refresh(client, there)
        journal = open_journal(run.path, client.cluster_uuid, there.uuid)
        loaded = loaded_shards(run, journal)
        if not loaded:
            refuse_incomplete(run, partial=False)
        shards = [shard for shard in run.done_shards() if shard in loaded or not loaded]
        refused = {letter.doc_id for letter in journal.dead()}
        rows = [int((run.done(shard) or {})["rows"]) for shard in shards]
        alone = stamp is not None and stamp.only_run == run.manifest.run_id
        report = VerifyReport(
            there.name,
            indexes.count_documents(client, there),
            sum(rows) - len(refused) if alone else None,
            len(refused),
            unloaded_shards=len(run.done_shards()) - len(shards),
        )
        reader = StoredReader(client, there.name, field, indexes.max_clauses(client))
        checker = _Checker(reader, run.vocabulary(), refused, report)
        documents = _sampled(run, shards, rows, sample, run.vocabulary())
        while batch := list(islice(documents, _BATCH)):
            checker.check(batch)
            progress(report.checked_documents)
    report.seconds = round(time.monotonic() - started, 3)
    return report


def _sampled(
    run: Run, shards: Sequence[int], rows: Sequence[int], sample: int | None, vocabulary: Sequence[str | None]
) -> Iterator[_Expected]:
    """The documents to check, in order of the run."""
    total = sum(rows)
    if sample is None or sample >= total:
        chosen = np.arange(total)
    else:
        chosen = np.unique(np.linspace(0, total - 1, sample).astype(np.int64))
    first = 0
    for shard, count in zip(shards, rows, strict=True):
        places = chosen[(chosen >= first) & (chosen < first + count)] - first
        first += count
        if not len(places):
            continue
        start = 0
        for part in read_shard(run.shard_path(shard)):
            length = len(part.vectors.doc_ids)
            for place in (places[(places >= start) & (places < start + length)] - start).tolist():
                token_ids, weights = part.vectors.row(place)
                tokens = [str(vocabulary[token_id]) for token_id in token_ids.tolist()]
                yield _Expected(part.vectors.doc_ids[place], tokens, token_ids, stored_weights(weights))
            start += length


class _Checker:
    """Compares batches of documents and notes what differs in the report."""

    def __init__(
        self, reader: StoredReader, vocabulary: Sequence[str | None], refused: set[str], report: VerifyReport
    ) -> None:
        self._reader = reader
        self._refused = refused
        self._report = report
        self._known = [token for token in vocabulary if token is not None]
        position = np.cumsum([token is not None for token in vocabulary]) - 1
        sizes = [len(group) for group in reader.groups(self._known)]
        self._groups = len(sizes)
        # The group of sums() that a token id belongs to.
        self._group_of = np.repeat(np.arange(len(sizes)), sizes)[np.maximum(position, 0)]

    def check(self, batch: Sequence[_Expected]) -> None:
        stored = self._reader.weights({one.doc_id: one.tokens for one in batch})
        present = [one for one in batch if one.doc_id in stored]
        sums = self._reader.sums([one.doc_id for one in present], self._known) if present else {}
        for one in batch:
            if one.doc_id not in stored:
                if one.doc_id not in self._refused:
                    self._note_missing(one.doc_id)
                continue
            self._report.checked_documents += 1
            self._report.checked_weights += len(one.tokens)
            if not self._compare_weights(one, stored[one.doc_id]):
                self._compare_sums(one, sums.get(one.doc_id, np.zeros(self._groups, dtype=np.float32)))

    def _compare_weights(self, one: _Expected, found: dict[str, np.float32]) -> bool:
        """Note each weight that differs; whether there was one."""
        differs = False
        for token, expected in zip(one.tokens, one.weights, strict=True):
            if found.get(token) != expected:
                differs = True
                self._note(one.doc_id, token, expected, found.get(token))
        return differs

    def _compare_sums(self, one: _Expected, found: npt.NDArray[np.float32]) -> None:
        # In double, whose 53 bits hold such sums of 9-bit numbers exactly, and cast once, as the index does.
        sums = np.bincount(
            self._group_of[one.token_ids], weights=one.weights.astype(np.float64), minlength=self._groups
        ).astype(np.float32)
        for expected, seen in zip(sums, found, strict=True):
            if expected != seen:
                self._note(one.doc_id, None, expected, seen)

    def _note(self, doc_id: str, token: str | None, expected: np.float32, found: np.float32 | None) -> None:
        self._report.differing += 1
        if len(self._report.differences) < NAMED:
            seen = None if found is None else float(found)
            self._report.differences.append(WeightDifference(doc_id, token, float(expected), seen))

    def _note_missing(self, doc_id: str) -> None:
        self._report.missing += 1
        if len(self._report.missing_ids) < NAMED:
            self._report.missing_ids.append(doc_id)
