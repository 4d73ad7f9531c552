"""The documents of a run as they were loaded: pruned, without refused ones, and with fingerprints to compare."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sparse_ingest.cluster.scores import stored_weights
from sparse_ingest.pruning import prune
from sparse_ingest.records import SparseRows
from sparse_ingest.runs.checking import shard_parts
from sparse_ingest.runs.ids import hash_id
from sparse_ingest.runs.run import Run
from sparse_ingest.runs.sorted_pieces import Numbers

Places = npt.NDArray[np.int64]


class Expected(NamedTuple):
    """A document of the run with its loaded vector."""

    doc_id: str
    token_ids: npt.NDArray[np.integer]
    weights: npt.NDArray[np.float32]


class RunPart(NamedTuple):
    """Consecutive documents of a run, as they are compared with an index.

    `start` is the place of the first one. `documents` are rows for `match`, without those that the load refused.
    `frequencies` has how many have each token; `terms` has the number of terms of each, 0 if the load refused it.
    """

    start: int
    documents: Numbers
    frequencies: npt.NDArray[np.int64]
    terms: npt.NDArray[np.int32]


class Loaded(NamedTuple):
    """The documents of some shards as they were loaded. Places number the documents of all these shards."""

    run: Run
    shards: Sequence[int]
    rows: Sequence[int]
    pruning: dict[str, Any]
    refused: frozenset[str]

    def parts(self, shards: range, *, weights: bool) -> Iterator[RunPart]:
        """Yield what `BothSides` compares of some of the shards, without `weights` only the ids."""
        tokens = len(self.run.vocabulary())
        for shard, start, _ in islice(self._places(), shards.start, shards.stop):
            for part in shard_parts(self.run, shard):
                yield self._part(prune(part.vectors, **self.pruning), start, tokens if weights else 0)
                start += len(part.rows)

    def _part(self, vectors: SparseRows, start: int, tokens: int) -> RunPart:
        kept = np.array([doc_id not in self.refused for doc_id in vectors.doc_ids], dtype=np.bool_)
        ids = [doc_id for doc_id, stays in zip(vectors.doc_ids, kept.tolist(), strict=True) if stays]
        places = (np.flatnonzero(kept) + start).astype(np.uint64)
        if not tokens:
            return RunPart(start, rows_of(ids, 0, places), np.zeros(1, np.int64), np.zeros(0, np.int32))
        terms = term_fingerprints(vectors.token_ids, stored_weights(vectors.weights).view(np.uint32))
        documents = rows_of(ids, row_fingerprints(vectors.indptr, terms)[kept], places)
        lengths = np.where(kept, np.diff(vectors.indptr), 0).astype(np.int32)
        return RunPart(start, documents, np.bincount(vectors.token_ids, minlength=tokens), lengths)

    def places(self, shards: range) -> Places:
        """Return the places of all documents of some of the shards."""
        ends = [0, *accumulate(self.rows)]
        return np.arange(ends[shards.start], ends[shards.stop])

    def documents(self, places: Places) -> Iterator[Expected]:
        """Yield the documents at some ascending places; other shards are not read."""
        for shard, start, end in self._places():
            if not len(_between(places, start, end)):
                continue
            for part in shard_parts(self.run, shard):
                chosen = _between(places, start, start + len(part.rows)) - start
                start += len(part.rows)
                if len(chosen):
                    vectors = prune(part.vectors.take(chosen), **self.pruning)
                    for row, doc_id in enumerate(vectors.doc_ids):
                        token_ids, weights = vectors.row(row)
                        yield Expected(doc_id, token_ids, weights.astype(np.float32))

    def _places(self) -> Iterator[tuple[int, int, int]]:
        """Return each shard, the place of its first document, and the place after its last."""
        ends = list(accumulate(self.rows))
        return zip(self.shards, [0, *ends][:-1], ends, strict=True)


def term_fingerprints(tokens: npt.NDArray[Any] | int, codes: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """Return a hash for each pair of a token id and its stored value."""
    mixed = (np.asarray(tokens).astype(np.uint64) << np.uint64(32)) | codes.astype(np.uint64)
    # The finalizer of splitmix64.
    mixed = (mixed + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def row_fingerprints(indptr: npt.NDArray[np.int64], terms: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return the fingerprint of each row: the sum of its terms' fingerprints, modulo 2^64, in any order."""
    before = np.zeros(len(terms) + 1, dtype=np.uint64)
    np.cumsum(terms, out=before[1:])
    return before[indptr[1:]] - before[indptr[:-1]]


def rows_of(ids: Sequence[str], fingerprints: Numbers | int, places: Numbers) -> Numbers:
    """Return rows for `match`."""
    rows = np.empty((len(ids), 3), dtype=np.uint64)
    rows[:, 0] = np.fromiter(map(hash_id, ids), dtype=np.uint64, count=len(ids))
    rows[:, 1], rows[:, 2] = fingerprints, places
    return rows


def _between(places: Places, low: int, high: int) -> Places:
    return places[slice(*np.searchsorted(places, [low, high]))]
