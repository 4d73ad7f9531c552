"""Compare the ids and weights of an index with a run, and fill in a `VerifyReport`.

Ids are compared for the complete index. Weights are compared for single documents by explanations of scores, or for all
documents token by token: if the sum of the fingerprints of a document's terms differs, its weights are explained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sparse_ingest.cluster.postings import IndexScan
from sparse_ingest.cluster.reading import Stored, StoredReader, as_weight
from sparse_ingest.cluster.scores import LEVELS, stored_bytes, stored_weights
from sparse_ingest.pruning import prune
from sparse_ingest.records import SparseRows, batched
from sparse_ingest.reporting import Reporter
from sparse_ingest.runs.checking import shard_parts
from sparse_ingest.runs.ids import hash_id
from sparse_ingest.runs.run import Run
from sparse_ingest.runs.sorted_pieces import SECOND, Numbers, SortedPieces, match

NAMED = 20  # differences and ids in the report
RANGE_ROWS = 2_000_000  # documents of both sides matched at a time: 24 bytes each, four times as much while sorting
_BATCH = 200
_Places = npt.NDArray[np.int64]


class WeightDifference(NamedTuple):
    """A weight in the index that differs from the run; `found` is None if the token is missing.

    `token` is None if only the sum of weights differs: the index has additional tokens.
    """

    doc_id: str
    token: str | None
    expected: float
    found: float | None


@dataclass
class VerifyReport:
    """Result of a verification.

    `expected_documents` is None if other clients wrote to the index; `extra` then counts their documents, which are not
    differences. `doubled` counts duplicates (under another routing). `unloaded_shards` were not sent by an unfinished
    load. `notes` are checks that were not possible.
    """

    index: str
    index_documents: int
    expected_documents: int | None
    refused_documents: int
    checked_documents: int = 0
    checked_weights: int = 0
    differing: int = 0
    missing: int = 0
    extra: int = 0
    doubled: int = 0
    unloaded_shards: int = 0
    seconds: float = 0.0
    differences: list[WeightDifference] = field(default_factory=list)
    missing_ids: list[str] = field(default_factory=list)
    extra_ids: list[str] = field(default_factory=list)
    doubled_ids: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {"same": self.same, **asdict(self), "differences": [one._asdict() for one in self.differences]}

    @property
    def same(self) -> bool:
        """Whether nothing differs; the same as `ok`."""
        if self.differing or self.missing or self.doubled or self.unloaded_shards:
            return False
        return self.expected_documents is None or (self.expected_documents == self.index_documents and not self.extra)

    ok = same

    def note(self, doc_id: str, token: str | None, expected: float, found: float | None) -> None:
        """Count a different weight, and store the first ones."""
        self.differing += 1
        if len(self.differences) < NAMED:
            self.differences.append(WeightDifference(doc_id, token, expected, found))


class Expected(NamedTuple):
    """A document of the run with its loaded vector."""

    doc_id: str
    token_ids: npt.NDArray[np.integer]
    weights: npt.NDArray[np.float32]


class Loaded(NamedTuple):
    """The documents of some shards as they were loaded. Places number the documents of all these shards."""

    run: Run
    shards: Sequence[int]
    rows: Sequence[int]
    pruning: dict[str, Any]
    refused: frozenset[str]

    def parts(self) -> Iterator[tuple[int, SparseRows]]:
        """Yield all vectors, with the place of the first document of each part."""
        for shard, start, _ in self._places():
            for part in shard_parts(self.run, shard):
                yield start, prune(part.vectors, **self.pruning)
                start += len(part.rows)

    def documents(self, places: _Places) -> Iterator[Expected]:
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


@dataclass
class WeightChecker:
    """Compares single documents and notes differences. `ceiling` is the ingest ceiling of a sparse_vector field."""

    reader: StoredReader
    vocabulary: Sequence[str | None]
    keys: Sequence[str | None]
    ceiling: float | None
    report: VerifyReport

    def __post_init__(self) -> None:
        self._known = [key for key in self.keys if key is not None]
        position = np.cumsum([key is not None for key in self.keys]) - 1
        sizes = [len(group) for group in self.reader.groups(self._known)]
        self._groups = len(sizes)
        # The group of sums() that a token id belongs to.
        self._group_of = np.repeat(np.arange(len(sizes)), sizes)[np.maximum(position, 0)]

    def check(self, batch: Sequence[Expected]) -> tuple[list[str], set[str]]:
        """Compare documents; return the ids of missing ones (not counted), and of equal ones."""
        wanted = {one.doc_id: [str(self.keys[token_id]) for token_id in one.token_ids.tolist()] for one in batch}
        stored = self.reader.weights(wanted)
        present = [one for one in batch if one.doc_id in stored]
        of_bytes = {doc_id for doc_id, found in stored.items() if any(isinstance(w, np.uint8) for w in found.values())}
        ids = [one.doc_id for one in present]
        sums = self.reader.sums(ids, self._known, of_bytes=of_bytes) if present else {}
        same = set()
        for one in present:
            self.report.checked_documents += 1
            self.report.checked_weights += len(one.token_ids)
            found = dict(zip(one.token_ids.tolist(), map(stored[one.doc_id].get, wanted[one.doc_id]), strict=True))
            kept = np.zeros(self._groups, dtype=np.float32)
            if not self._compare(one, found, sums.get(one.doc_id, kept), one.doc_id in of_bytes):
                same.add(one.doc_id)
        return [doc_id for doc_id in wanted if doc_id not in stored], same

    def check_strictly(self, batch: Sequence[Expected]) -> None:
        """Compare documents that are known to differ, including weights too small to change a sum."""
        for doc_id in self.check(batch)[1]:
            [one] = (one for one in batch if one.doc_id == doc_id)
            held = self.reader.weights({doc_id: self._known})[doc_id]
            tokens = dict(zip(self.keys, self.vocabulary, strict=True))
            expected = {self.keys[token_id] for token_id in one.token_ids.tolist()}
            for key in held.keys() - expected:
                self.report.note(doc_id, tokens[key], 0.0, as_weight(held[key], self.ceiling))

    def _compare(
        self, one: Expected, found: dict[int, Stored | None], sums: npt.NDArray[np.float32], of_bytes: bool
    ) -> bool:
        """Note each different weight, otherwise each different sum. Return whether anything differs."""
        ceiling, weights = self.ceiling if of_bytes else None, one.weights
        stored: npt.NDArray[Any] = stored_weights(weights) if ceiling is None else stored_bytes(weights, ceiling)
        before = self.report.differing
        for token_id, expected in zip(one.token_ids.tolist(), stored, strict=True):
            kept = found[token_id]
            if kept is None or kept != expected or type(kept) is not type(expected):
                seen = None if kept is None else as_weight(kept, self.ceiling)
                self.report.note(one.doc_id, self.vocabulary[token_id], as_weight(expected, self.ceiling), seen)
        if self.report.differing > before:
            return True
        # As in the index: summed in double, which is exact for 9-bit weights, and cast once.
        wanted = np.bincount(
            self._group_of[one.token_ids], weights=stored.astype(np.float64), minlength=self._groups
        ).astype(np.float32)
        for expected, seen in zip(wanted, sums, strict=True):
            if expected != seen:
                unit = 1.0 if ceiling is None else ceiling / LEVELS
                self.report.note(one.doc_id, None, float(expected) * unit, float(seen) * unit)
        return self.report.differing > before


def compare_ids(snapshot: IndexScan, loaded: Loaded, report: VerifyReport, folder: Path) -> None:
    """Note the ids that are only in the run or only in the index."""
    sides = _BothSides(snapshot, loaded, report, folder)
    for start, vectors in loaded.parts():
        sides.add(start, vectors, np.zeros(len(vectors.doc_ids), dtype=np.uint64))
    sides.note_mismatches()


def compare_all(
    snapshot: IndexScan, name: str, loaded: Loaded, checker: WeightChecker, folder: Path, reporter: Reporter
) -> None:
    """Note the ids that are only in the run or only in the index, and every different weight."""
    report = checker.report
    sides = _BothSides(snapshot, loaded, report, folder)
    vocabulary = loaded.run.vocabulary()
    frequencies = np.zeros(len(vocabulary), dtype=np.int64)
    expected = 0
    lengths: list[npt.NDArray[np.int32]] = []
    for start, vectors in loaded.parts():
        terms = term_fingerprints(vectors.token_ids, stored_weights(vectors.weights).view(np.uint32))
        kept = sides.add(start, vectors, row_fingerprints(vectors.indptr, terms))
        expected += int(kept.sum())
        frequencies += np.bincount(vectors.token_ids, minlength=len(vocabulary))
        lengths.append(np.where(kept, np.diff(vectors.indptr), 0).astype(np.int32))
    terms_of = np.concatenate([*lengths, np.zeros(0, dtype=np.int32)])
    total = int(terms_of.sum())
    queries, numbers, likely = _token_queries(vocabulary, frequencies, checker.reader.groups)
    read = reached = 0
    reporter.advance(0)  # starts the clock
    for query, places, weights in snapshot.weights(name, queries, likely):
        at = np.searchsorted(sides.places, places)
        sides.fingerprints[at] += term_fingerprints(numbers[query], weights.view(np.uint32))
        read += len(places)
        before, reached = reached, min(len(terms_of), len(terms_of) * read // max(1, total))
        reporter.advance(reached - before)
    gone, differing = sides.note_mismatches()
    # Different documents are counted when they are explained.
    report.checked_documents = expected - len(gone) - len(differing)
    report.checked_weights = total - int(terms_of[gone].sum() + terms_of[differing].sum())
    for batch in batched(loaded.documents(differing), _BATCH):
        checker.check_strictly(batch)


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


class _BothSides:
    """The documents of a run and of an index. Those of the index are numbered by ascending place."""

    def __init__(self, snapshot: IndexScan, loaded: Loaded, report: VerifyReport, folder: Path) -> None:
        self._snapshot, self._loaded, self._report = snapshot, loaded, report
        rows = sum(loaded.rows) + report.index_documents
        self._documents = SortedPieces(folder, 3, rows=rows, range_rows=RANGE_ROWS)
        places, count = [np.empty(0, np.int64)], 0
        for some, ids in snapshot.ids():
            self._documents.add(_rows(ids, 0, np.arange(count, count + len(ids), dtype=np.uint64) | SECOND))
            places.append(some)
            count += len(ids)
        self.places = np.concatenate(places)
        self.fingerprints = np.zeros(count, dtype=np.uint64)  # of the documents of the index

    def add(self, start: int, vectors: SparseRows, fingerprints: Numbers) -> npt.NDArray[np.bool_]:
        """Add a part of the run without the documents that the load refused. Return which rows were added."""
        kept = np.array([doc_id not in self._loaded.refused for doc_id in vectors.doc_ids], dtype=np.bool_)
        ids = [doc_id for doc_id, stays in zip(vectors.doc_ids, kept.tolist(), strict=True) if stays]
        self._documents.add(_rows(ids, fingerprints[kept], (np.flatnonzero(kept) + start).astype(np.uint64)))
        return kept

    def note_mismatches(self) -> tuple[_Places, _Places]:
        """Note missing and extra ids. Return the places in the run of missing and of different documents."""
        missing, differing = [], []
        lone: tuple[list[_Places], list[_Places]] = [], []
        for rows in self._documents.ranges():
            there = rows[:, 2] >= SECOND
            rows[there, 1] = self.fingerprints[(rows[there, 2] & ~SECOND).astype(np.int64)]
            found = match(rows)
            missing.append(found.places[found.missing])
            differing.append(found.places[np.flatnonzero(found.changed) - 1])
            self._report.extra += int(found.extra.sum())
            self._report.doubled += int(found.repeat.sum())
            for flags, first in zip((found.extra, found.repeat), lone, strict=True):
                first.append(np.sort(self.places[found.places[flags]])[:NAMED])
        gone = np.sort(np.concatenate(missing))
        self._report.missing += len(gone)
        self._report.missing_ids += [one.doc_id for one in self._loaded.documents(gone[:NAMED])]
        for some, names in zip(lone, (self._report.extra_ids, self._report.doubled_ids), strict=True):
            names.extend(self._snapshot.id_at(int(place)) for place in np.sort(np.concatenate(some))[:NAMED])
        return gone, np.sort(np.concatenate(differing))


def _rows(ids: Sequence[str], fingerprints: Numbers | int, places: Numbers) -> Numbers:
    """Return rows for `match`."""
    rows = np.empty((len(ids), 3), dtype=np.uint64)
    rows[:, 0] = np.fromiter(map(hash_id, ids), dtype=np.uint64, count=len(ids))
    rows[:, 1], rows[:, 2] = fingerprints, places
    return rows


def _token_queries(
    vocabulary: Sequence[str | None],
    documents: npt.NDArray[np.int64],
    groups: Callable[[Sequence[str]], Sequence[Sequence[str]]],
) -> tuple[list[Sequence[str]], list[int], list[int]]:
    """Return queries that cover every token: their tokens, a number for each, and the expected number of hits.

    A token that occurs in the run has its own query, numbered by its id; unused tokens share the queries of `groups`.
    """
    tokens = {token_id: token for token_id, token in enumerate(vocabulary) if token is not None}
    held = [token_id for token_id in tokens if documents[token_id]]
    unused = groups([token for token_id, token in tokens.items() if not documents[token_id]])
    numbers = [*held, *range(len(vocabulary), len(vocabulary) + len(unused))]
    likely = [int(documents[token_id]) for token_id in held] + [0] * len(unused)
    return [*([tokens[token_id]] for token_id in held), *unused], numbers, likely


def check_sample(loaded: Loaded, places: _Places, checker: WeightChecker, reporter: Reporter, *, ids_too: bool) -> None:
    """Compare the weights of the documents at some places, and with `ids_too` note the missing documents."""
    report = checker.report
    reporter.advance(0)  # starts the clock
    for batch in batched(loaded.documents(places), _BATCH):
        before = report.checked_documents
        absent, _ = checker.check(batch)
        for doc_id in absent if ids_too else ():
            if doc_id not in loaded.refused:
                report.missing += 1
                if len(report.missing_ids) < NAMED:
                    report.missing_ids.append(doc_id)
        reporter.advance(report.checked_documents - before)


def _between(places: _Places, low: int, high: int) -> _Places:
    return places[slice(*np.searchsorted(places, [low, high]))]
