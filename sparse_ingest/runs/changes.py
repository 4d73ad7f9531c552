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
from sparse_ingest.runs.checking import checked_shard, finished_shards, shard_parts
from sparse_ingest.runs.run import Run
from sparse_ingest.runs.shards import ShardPart, read_doc_ids, take_rows
from sparse_ingest.runs.sorted_pieces import SECOND, Numbers, SortedPieces, match

RANGE_ROWS = 200_000  # rows of both runs merged at a time: 6 MB, five times that while they are sorted

_CONTENT, _PLACE = 2, 3  # columns, after both halves of the hash of the id


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
        self._old_places, old_rows = _places(old)
        self._new_places, new_rows = _places(new)
        pieces = SortedPieces(scratch, 4, rows=old_rows + new_rows, range_rows=RANGE_ROWS)
        _add(old, self._old_places, pieces, np.uint64(0), frozenset(refused))
        _add(new, self._new_places, pieces, SECOND, frozenset())
        self._differs = _flags(scratch, new_rows)
        self._missing = _flags(scratch, old_rows)
        self.counts = self._merge(pieces)

    def documents(self, shard: int) -> Iterator[ShardPart]:
        """The documents of a shard of the newer run that differ, one row group at a time."""
        first = self._new_places[shard].start
        for part in shard_parts(self._new, shard):
            differs = np.array(self._differs[first : first + len(part.rows)])
            first += len(part.rows)
            if differs.any():
                yield part if differs.all() else take_rows(part, np.flatnonzero(differs))

    def differing(self, shard: int) -> int:
        """How many documents `documents` gives for a shard."""
        return int(np.count_nonzero(self._differs[self._new_places[shard]]))

    def missing_ids(self) -> Iterator[str]:
        """The ids of the older run that the newer one lacks, in order of the older run."""
        for shard, places in self._old_places.items():
            if self._missing[places].any():
                for place, (_, doc_id) in enumerate(read_doc_ids(checked_shard(self._old, shard)), start=places.start):
                    if self._missing[place]:
                        yield doc_id

    def _merge(self, pieces: SortedPieces) -> ChangeCounts:
        counts = np.zeros(4, dtype=np.int64)
        for table in pieces.ranges():
            found = match(table)
            added = found.extra | found.repeat
            self._differs[found.places[added | found.changed]] = True
            self._missing[found.places[found.missing]] = True
            counts += [np.count_nonzero(rows) for rows in (added, found.changed, found.same, found.missing)]
        return ChangeCounts(*counts.tolist())


def _places(run: Run) -> tuple[dict[int, slice], int]:
    """Return the places of the documents of each finished shard in the run, and the number of all documents."""
    shards = finished_shards(run)
    ends = list(accumulate(map(run.rows_of, shards), initial=0))
    return {shard: slice(*span) for shard, span in zip(shards, pairwise(ends), strict=True)}, ends[-1]


def _flags(scratch: Path, rows: int) -> npt.NDArray[np.bool_]:
    """Return one bool per document on disk, all false. There is at least one: an empty file cannot be mapped."""
    with tempfile.TemporaryFile(dir=scratch) as file:
        return np.memmap(file, dtype=np.bool_, mode="w+", shape=max(1, rows))


def _add(run: Run, places: dict[int, slice], pieces: SortedPieces, mark: np.uint64, refused: frozenset[str]) -> None:
    """Add a row for each document of a run, marked as of this run."""
    for shard, expected in places.items():
        place = expected.start
        for part in shard_parts(run, shard):
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
