"""Diff two runs: documents to send and ids to delete.

In: two runs of one vocabulary. Out: for each shard of the newer run its documents that are new or have another text,
vector or field; and the ids of the older run that the newer one lacks. Both are found by a merge of 128-bit hashes of
the ids on disk, in memory that does not grow with the runs: equal hash means equal id, as with texts. Whether a
document changed is a 64-bit hash of all that it has, compared with that of the same id alone.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Collection, Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sparse_ingest.errors import RunError
from sparse_ingest.runs.checking import refuse_other_rows
from sparse_ingest.runs.run import Run
from sparse_ingest.runs.shards import ShardPart, read_doc_ids, read_shard, take_rows
from sparse_ingest.runs.sorted_pieces import Numbers, SortedPieces

RANGE_ROWS = 200_000  # rows of both runs merged at a time: 6 MB, five times that while they are sorted

_HIGH, _LOW, _CONTENT, _PLACE = range(4)
_NEWER = np.uint64(1 << 63)  # in _PLACE: the row is of the newer run


class ChangeCounts(NamedTuple):
    """How many documents of the newer run are new, changed or the same, and how many of the older one it lacks."""

    added: int
    changed: int
    same: int
    missing: int


class Changes:
    """The differences between two runs. Neither may change during the comparison.

    Args:
        old: the older run, as it was loaded.
        new: the newer one.
        scratch: an existing folder with room for 33 bytes per document of both while they are merged, 1 afterwards.
        refused: ids of `old` that the index did not take: no document of `new` is the same as one of these.
    """

    def __init__(self, old: Run, new: Run, scratch: Path, *, refused: Collection[str] = ()) -> None:
        if old.vocabulary() != new.vocabulary():
            raise RunError(
                f"{old.path} and {new.path} have different vocabularies: all vectors differ. "
                "Load the newer run into an index of its own."
            )
        self._old, self._new = old, new
        self._first_old, old_rows = _first_places(old)
        self._first_new, new_rows = _first_places(new)
        pieces = SortedPieces(scratch, 4, rows=old_rows + new_rows, range_rows=RANGE_ROWS)
        _add(old, self._first_old, pieces, np.uint64(0), frozenset(refused))
        _add(new, self._first_new, pieces, _NEWER, frozenset())
        self._differs = _flags(scratch, new_rows)
        self._missing = _flags(scratch, old_rows)
        self.counts = self._merge(pieces)

    def documents(self, shard: int) -> Iterator[ShardPart]:
        """The documents of a shard of the newer run that differ, one row group at a time."""
        first = self._first_new[shard]
        for part in read_shard(self._new.shard_path(shard)):
            differs = np.array(self._differs[first : first + len(part.rows)])
            first += len(part.rows)
            if differs.any():
                yield part if differs.all() else take_rows(part, np.flatnonzero(differs))

    def differing(self, shard: int) -> int:
        """How many documents `documents` gives for a shard."""
        first = self._first_new[shard]
        return int(np.count_nonzero(self._differs[first : first + self._new.rows_of(shard)]))

    def missing_ids(self) -> Iterator[str]:
        """The ids of the older run that the newer one lacks, in order of the older run."""
        for shard, first in self._first_old.items():
            if self._missing[first : first + self._old.rows_of(shard)].any():
                for place, (_, doc_id) in enumerate(read_doc_ids(self._old.shard_path(shard)), start=first):
                    if self._missing[place]:
                        yield doc_id

    def _merge(self, pieces: SortedPieces) -> ChangeCounts:
        counts = np.zeros(4, dtype=np.int64)
        for table in pieces.ranges():
            # Of equal ids the older run's row comes first: pieces are added in that order, and the sort is stable.
            table = table[np.lexsort((table[:, _LOW], table[:, _HIGH]))]
            newer = table[:, _PLACE] >= _NEWER
            begins = np.ones(len(table), dtype=np.bool_)
            begins[1:] = (table[1:, :_CONTENT] != table[:-1, :_CONTENT]).any(axis=1)
            document = np.cumsum(begins) - 1
            in_new = np.bincount(document, weights=newer) > 0
            lacking = ~newer & ~in_new[document]
            # A newer row is the same as the older one right before it, if that has its id and its content.
            follows = newer & ~begins
            follows[1:] &= ~newer[:-1]
            equal = follows.copy()
            equal[1:] &= table[1:, _CONTENT] == table[:-1, _CONTENT]
            self._differs[(table[newer & ~equal, _PLACE] & ~_NEWER).astype(np.int64)] = True
            self._missing[table[lacking, _PLACE].astype(np.int64)] = True
            counts += [np.count_nonzero(rows) for rows in (newer & ~follows, follows & ~equal, equal, lacking)]
        return ChangeCounts(*counts.tolist())


def _first_places(run: Run) -> tuple[dict[int, int], int]:
    """Return the place of the first document of each finished shard in the run, and the number of all documents."""
    rows = {shard: run.rows_of(shard) for shard in run.done_shards()}
    return dict(zip(rows, accumulate(rows.values(), initial=0), strict=False)), sum(rows.values())


def _flags(scratch: Path, rows: int) -> npt.NDArray[np.bool_]:
    """Return one bool per document on disk, all false. There is at least one: an empty file cannot be mapped."""
    with tempfile.TemporaryFile(dir=scratch) as file:
        return np.memmap(file, dtype=np.bool_, mode="w+", shape=max(1, rows))


def _add(
    run: Run, first_places: dict[int, int], pieces: SortedPieces, mark: np.uint64, refused: frozenset[str]
) -> None:
    """Add a row for each document of a run, marked as of this run."""
    for shard, first in first_places.items():
        place = first
        for part in read_shard(run.shard_path(shard)):
            rows = np.empty((len(part.rows), 4), dtype=np.uint64)
            ids = b"".join(hashlib.blake2b(doc_id.encode(), digest_size=16).digest() for doc_id in part.vectors.doc_ids)
            rows[:, :_CONTENT] = np.frombuffer(ids, dtype=np.uint64).reshape(-1, 2)
            rows[:, _CONTENT] = _content_hashes(part)
            if refused:
                # Inverted, it equals that of no document: the index holds none of this content.
                taken = [doc_id in refused for doc_id in part.vectors.doc_ids]
                rows[taken, _CONTENT] = ~rows[taken, _CONTENT]
            rows[:, _PLACE] = np.arange(place, place + len(part.rows), dtype=np.uint64) | mark
            pieces.add(rows)
            place += len(part.rows)
        refuse_other_rows(run.shard_path(shard), place - first, run.rows_of(shard))


def _content_hashes(part: ShardPart) -> Numbers:
    """A hash of the text, the fields and the vector of each document, whatever types the shard has."""
    vectors = part.vectors
    terms = np.empty((len(vectors.weights), 2), dtype=np.uint32)
    terms[:, 0] = vectors.token_ids
    terms[:, 1] = vectors.weights.astype(np.float32, copy=False).view(np.uint32)
    content = terms.tobytes()
    borders = (8 * vectors.indptr).tolist()
    # No JSON object holds a zero byte: the fields end where the first one is, after the 16 bytes of the text.
    hashes = b"".join(
        hashlib.blake2b(b"%b%b\0%b" % (text, fields.encode(), content[start:end]), digest_size=8).digest()
        for text, fields, (start, end) in zip(part.text_hashes, part.fields, pairwise(borders), strict=True)
    )
    return np.frombuffer(hashes, dtype=np.uint64)
