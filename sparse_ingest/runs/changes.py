"""Diff two runs: documents to send and ids to delete.

In: two runs of one vocabulary. Out: for each shard of the newer run its documents that are new or have another text,
vector or field; and the ids of the older run that the newer one lacks. Ids are matched by 128-bit hashes, merged on
disk so that memory does not grow with the runs; contents of the same id are compared by 64-bit hashes.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Collection, Iterator
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sparse_ingest.errors import RunError
from sparse_ingest.runs.checking import checked_shard, finished_shards, shard_parts
from sparse_ingest.runs.run import Run
from sparse_ingest.runs.shards import ShardPart, read_doc_ids, take_rows
from sparse_ingest.runs.sorted_pieces import SECOND, Numbers, SortedPieces, match
from sparse_ingest.storage.durable import naming

_WRITTEN = 1 << 20  # bytes at a time
RANGE_ROWS = 200_000  # rows of both runs merged at a time: 6 MB, five times that while they are sorted

_CONTENT, _PLACE = 2, 3  # columns, after both halves of the hash of the id


class Changes:
    """The differences between two runs. Neither may change during the comparison.

    The folder `scratch` needs space for 33 bytes per document of both during the merge, 1 afterwards. `refused` are ids
    of `old` that the index refused; their documents in `new` count as changed.
    """

    def __init__(self, old: Run, new: Run, scratch: Path, *, refused: Collection[str] = ()) -> None:
        if old.vocabulary() != new.vocabulary():
            raise RunError(
                f"{old.path} and {new.path} have different vocabularies, so all vectors differ. "
                "Load the newer run into a new index."
            )
        self._old, self._new = old, new
        self._old_places, old_rows = _places(old)
        self._new_places, new_rows = _places(new)
        pieces = SortedPieces(scratch, 4, rows=old_rows + new_rows, range_rows=RANGE_ROWS)
        _add(old, self._old_places, pieces, np.uint64(0), frozenset(refused))
        _add(new, self._new_places, pieces, SECOND, frozenset())
        self._differs = _flags(scratch, new_rows)
        self._missing = _flags(scratch, old_rows)
        for table in pieces.ranges():
            found = match(table)
            self._differs[found.places[found.extra | found.repeat | found.changed]] = True
            self._missing[found.places[found.missing]] = True

    def documents(self, shard: int) -> Iterator[ShardPart]:
        """Yield the documents of a shard of the newer run that differ, one row group at a time."""
        first = self._new_places[shard].start
        for part in shard_parts(self._new, shard):
            differs = np.array(self._differs[first : first + len(part.rows)])
            first += len(part.rows)
            if differs.any():
                yield part if differs.all() else take_rows(part, np.flatnonzero(differs))

    def differing(self, shard: int) -> int:
        """Return the number of documents that `documents` yields for a shard."""
        return int(np.count_nonzero(self._differs[self._new_places[shard]]))

    def missing_ids(self) -> Iterator[str]:
        """Yield the ids of the older run that the newer one lacks, in order of the older run."""
        for shard, places in self._old_places.items():
            if self._missing[places].any():
                for place, (_, doc_id) in enumerate(read_doc_ids(checked_shard(self._old, shard)), start=places.start):
                    if self._missing[place]:
                        yield doc_id


def _places(run: Run) -> tuple[dict[int, slice], int]:
    """Return the range of document numbers of each finished shard, and the number of all documents."""
    shards = finished_shards(run)
    ends = list(accumulate(map(run.rows_of, shards), initial=0))
    return {shard: slice(*span) for shard, span in zip(shards, pairwise(ends), strict=True)}, ends[-1]


def _flags(scratch: Path, rows: int) -> npt.NDArray[np.bool_]:
    """Return one bool per document on disk, all false; at least one, because an empty file cannot be mapped."""
    size = max(1, rows)
    with naming(scratch), tempfile.TemporaryFile(dir=scratch) as file:
        # Written before it is mapped: if the disk is full, a write is an error and the mapping would be SIGBUS.
        for start in range(0, size, _WRITTEN):
            file.write(bytes(min(_WRITTEN, size - start)))
        file.flush()
        return np.memmap(file, dtype=np.bool_, mode="w+", shape=size)


def _add(run: Run, places: dict[int, slice], pieces: SortedPieces, mark: np.uint64, refused: frozenset[str]) -> None:
    """Add a row for each document of a run; `mark` identifies the run."""
    for shard, expected in places.items():
        place = expected.start
        for part in shard_parts(run, shard):
            rows = np.empty((len(part.rows), 4), dtype=np.uint64)
            ids = b"".join(hashlib.blake2b(doc_id.encode(), digest_size=16).digest() for doc_id in part.vectors.doc_ids)
            rows[:, :_CONTENT] = np.frombuffer(ids, dtype=np.uint64).reshape(-1, 2)
            rows[:, _CONTENT] = _content_hashes(part)
            if refused:
                # No document has the inverted hash, so the document counts as changed.
                inverted = [doc_id in refused for doc_id in part.vectors.doc_ids]
                rows[inverted, _CONTENT] = ~rows[inverted, _CONTENT]
            rows[:, _PLACE] = np.arange(place, place + len(part.rows), dtype=np.uint64) | mark
            pieces.add(rows)
            place += len(part.rows)


def _content_hashes(part: ShardPart) -> Numbers:
    """Return a hash of the text, fields and vector of each document that does not depend on the types of the shard."""
    vectors = part.vectors
    terms = np.empty((len(vectors.weights), 2), dtype=np.uint32)
    terms[:, 0] = vectors.token_ids
    terms[:, 1] = vectors.weights.astype(np.float32, copy=False).view(np.uint32)
    content = terms.tobytes()
    borders = (8 * vectors.indptr).tolist()
    # JSON has no zero byte, so the first one after the 16 bytes of the text's hash ends the fields.
    hashes = b"".join(
        hashlib.blake2b(b"%b%b\0%b" % (text, fields.encode(), content[start:end]), digest_size=8).digest()
        for text, fields, (start, end) in zip(part.text_hashes, part.fields, pairwise(borders), strict=True)
    )
    return np.frombuffer(hashes, dtype=np.uint64)
