"""Compare the ids and weights of an index with a run, and fill in a `VerifyReport`.

Ids are compared for the complete index. Weights are compared for single documents by explanations of scores, or for all
documents token by token: if the sum of the fingerprints of a document's terms differs, its weights are explained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sparse_ingest.cluster import mappings
from sparse_ingest.cluster.client import Client
from sparse_ingest.cluster.indexes import Index
from sparse_ingest.cluster.postings import IndexScan
from sparse_ingest.cluster.reading import Stored, StoredReader, as_weight, reader_of
from sparse_ingest.cluster.scores import LEVELS, stored_bytes, stored_weights
from sparse_ingest.records import batched
from sparse_ingest.reporting import Reporter
from sparse_ingest.runs.run import Run
from sparse_ingest.runs.sorted_pieces import SECOND, SortedPieces, match
from sparse_ingest.verification.loaded import Expected, Loaded, Places, RunPart, rows_of, term_fingerprints

NAMED = 20  # differences and ids in the report
RANGE_ROWS = 2_000_000  # documents of both sides matched at a time: 24 bytes each, four times as much while sorting
_BATCH = 200


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

    def include(self, later: VerifyReport) -> None:
        """Add what was found in documents after those of this report."""
        for name in ("checked_documents", "checked_weights", "differing", "missing"):
            setattr(self, name, getattr(self, name) + getattr(later, name))
        self.differences += later.differences[: NAMED - len(self.differences)]
        self.missing_ids += later.missing_ids[: NAMED - len(self.missing_ids)]


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
        # A token without a key is in no document of the index.
        wanted = {
            one.doc_id: {place: key for place in one.token_ids.tolist() if (key := self.keys[place]) is not None}
            for one in batch
        }
        stored = self.reader.weights({doc_id: list(keys.values()) for doc_id, keys in wanted.items()})
        present = [one for one in batch if one.doc_id in stored]
        of_bytes = {doc_id for doc_id, found in stored.items() if any(isinstance(w, np.uint8) for w in found.values())}
        ids = [one.doc_id for one in present]
        sums = self.reader.sums(ids, self._known, of_bytes=of_bytes) if present else {}
        same = set()
        for one in present:
            self.report.checked_documents += 1
            self.report.checked_weights += len(one.token_ids)
            found = {token_id: stored[one.doc_id].get(key) for token_id, key in wanted[one.doc_id].items()}
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
            kept = found.get(token_id)
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


def checker_of(client: Client, there: Index, field: str, run: Run, report: VerifyReport) -> WeightChecker:
    """Return the checker for the kind of field."""
    vocabulary = run.vocabulary()
    reader, ceiling = reader_of(client, there, field)
    keys: Sequence[str | None] = vocabulary if ceiling is None else mappings.keys_of(there, vocabulary)
    return WeightChecker(reader, vocabulary, keys, ceiling, report)


def compare_all(sides: BothSides, name: str, checker: WeightChecker, reporter: Reporter) -> None:
    """Note the ids that are only in the run or only in the index, and every different weight."""
    report = checker.report
    terms_of = sides.terms()
    total = int(terms_of.sum())
    queries, numbers, likely = _token_queries(checker.vocabulary, sides.frequencies, checker.reader.groups)
    read = reached = 0
    reporter.advance(0)  # starts the clock
    for query, places, weights in sides.snapshot.weights(name, queries, likely):
        at = np.searchsorted(sides.places, places)
        sides.fingerprints[at] += term_fingerprints(numbers[query], weights.view(np.uint32))
        read += len(places)
        before, reached = reached, min(len(terms_of), len(terms_of) * read // max(1, total))
        reporter.advance(reached - before)
    gone, differing = sides.note_mismatches()
    # Different documents are counted when they are explained.
    report.checked_documents = sides.expected - len(gone) - len(differing)
    report.checked_weights = total - int(terms_of[gone].sum() + terms_of[differing].sum())
    for batch in batched(sides.loaded.documents(differing), _BATCH):
        checker.check_strictly(batch)


class BothSides:
    """The documents of an index, numbered by ascending place, and those of a run, which `add` receives in any order.

    `expected` documents of the run should be in the index; `frequencies` has how many have each token.
    """

    def __init__(self, snapshot: IndexScan, loaded: Loaded, report: VerifyReport, folder: Path) -> None:
        self.snapshot, self.loaded, self._report = snapshot, loaded, report
        self.expected = 0
        self.frequencies = np.zeros(len(loaded.run.vocabulary()), dtype=np.int64)
        self._terms: list[tuple[int, npt.NDArray[np.int32]]] = []
        rows = sum(loaded.rows) + report.index_documents
        self._documents = SortedPieces(folder, 3, rows=rows, range_rows=RANGE_ROWS)
        places, count = [np.empty(0, np.int64)], 0
        for some, ids in snapshot.ids():
            self._documents.add(rows_of(ids, 0, np.arange(count, count + len(ids), dtype=np.uint64) | SECOND))
            places.append(some)
            count += len(ids)
        self.places = np.concatenate(places)
        self.fingerprints = np.zeros(count, dtype=np.uint64)  # of the documents of the index

    def add(self, part: RunPart) -> None:
        """Add a part of the run."""
        self._documents.add(part.documents)
        self.expected += len(part.documents)
        self.frequencies += part.frequencies
        self._terms.append((part.start, part.terms))

    def terms(self) -> npt.NDArray[np.int32]:
        """Return the number of terms of each document of the run, 0 if the load refused it."""
        self._terms.sort(key=lambda one: one[0])
        return np.concatenate([*(terms for _, terms in self._terms), np.zeros(0, dtype=np.int32)])

    def note_mismatches(self) -> tuple[Places, Places]:
        """Note missing and extra ids. Return the places in the run of missing and of different documents."""
        missing, differing = [], []
        lone: tuple[list[Places], list[Places]] = [], []
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
        self._report.missing_ids += [one.doc_id for one in self.loaded.documents(gone[:NAMED])]
        for some, names in zip(lone, (self._report.extra_ids, self._report.doubled_ids), strict=True):
            names.extend(self.snapshot.id_at(int(place)) for place in np.sort(np.concatenate(some))[:NAMED])
        return gone, np.sort(np.concatenate(differing))


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


def check_sample(loaded: Loaded, places: Places, checker: WeightChecker, reporter: Reporter, *, ids_too: bool) -> None:
    """Compare the weights of the documents at some places, and with `ids_too` note the missing documents."""
    report = checker.report
    reporter.advance(0)  # starts the clock
    for batch in batched(loaded.documents(places), _BATCH):
        before = report.checked_documents
        if missing := [doc_id for doc_id in checker.check(batch)[0] if ids_too and doc_id not in loaded.refused]:
            report.missing += len(missing)
            report.missing_ids += missing[: NAMED - len(report.missing_ids)]
        reporter.advance(report.checked_documents - before)
