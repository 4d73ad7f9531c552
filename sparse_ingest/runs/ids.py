"""Duplicate document ids of a run: found exactly in bounded memory, and removed on request.

The ids become sorted 64-bit hashes on disk, which are compared one range of hashes at a time; equal hashes are
confirmed on the ids themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from sparse_ingest.runs.files import SkippedRow
from sparse_ingest.runs.run import Run
from sparse_ingest.runs.shards import ShardPart, read_doc_ids, read_shard, shard_schema_of, take_rows, write_parts
from sparse_ingest.runs.sorted_pieces import Numbers, SortedPieces
from sparse_ingest.storage.durable import move_whole

RANGE_IDS = 8_000_000  # ids in memory at a time: 64 MB of hashes
MOST_REPEATED = 1_000_000  # hashes whose ids are compared in one pass over the shards, about 300 MB


class Duplicate(NamedTuple):
    """A duplicate id of a run: the (shard, source row) of its first and of a later occurrence."""

    doc_id: str
    first: tuple[int, int]
    again: tuple[int, int]


def find_duplicates(
    run: Run, *, range_ids: int = RANGE_IDS, hashes: SortedPieces | None = None, rows: int | None = None
) -> Iterator[Duplicate]:
    """Yield every row of the finished shards whose id an earlier row has, in no particular order.

    `hashes` has the `id_hashes` of all finished shards; without it they are computed here. `rows` is the number of
    documents, if it is known.
    """
    if hashes is None:
        hashes = pieces_of(run, range_ids=range_ids, rows=rows)
        for shard in run.done_shards():
            hashes.add(id_hashes(run, shard))
    repeated: set[int] = set()
    for some in hashes.ranges():
        together = np.sort(some[:, 0])
        repeated.update(together[1:][together[1:] == together[:-1]].tolist())
        if len(repeated) >= MOST_REPEATED:
            yield from _confirm(run, repeated)
            repeated = set()
    if repeated:
        yield from _confirm(run, repeated)


def pieces_of(run: Run, *, range_ids: int = RANGE_IDS, rows: int | None = None) -> SortedPieces:
    """Return empty storage for the `id_hashes` of all finished shards."""
    rows = sum(map(run.rows_of, run.done_shards())) if rows is None else rows
    return SortedPieces(run.scratch_path("ids").parent, 1, rows=rows, range_rows=range_ids)


def id_hashes(run: Run, shard: int) -> Numbers:
    """Return the hashes of the ids of a shard: uint64 [rows, 1], 8 bytes per row."""
    hashes = np.fromiter((hash_id(doc_id) for _, doc_id in read_doc_ids(run.shard_path(shard))), dtype=np.uint64)
    return hashes.reshape(-1, 1)


def _confirm(run: Run, repeated: set[int]) -> Iterator[Duplicate]:
    first: dict[str, tuple[int, int]] = {}
    for shard in run.done_shards():
        for row, doc_id in read_doc_ids(run.shard_path(shard)):
            if hash_id(doc_id) in repeated:
                if doc_id in first:
                    yield Duplicate(doc_id, first[doc_id], (shard, row))
                else:
                    first[doc_id] = (shard, row)


def remove_rows(run: Run, shard: int, rows: Mapping[int, SkippedRow], *, less: Mapping[str, int] | None = None) -> None:
    """Rewrite a finished shard without some of its source rows, and record them as skipped.

    `less` has what those rows contributed to the other counts of its record. If the process is killed in between, the
    shard is not done and is encoded again, with the same result.
    """
    path, done = run.shard_path(shard), run.need_done(shard)
    skipped = sorted({*run.skipped(shard), *rows.values()})
    lengths = [np.empty(0, np.int64)]

    def remaining() -> Iterator[ShardPart]:
        removed = np.array(list(rows), dtype=np.uint64)
        # One part at a time: a row of the corpus may be thousands of passages.
        for part in read_shard(path):
            if len(kept := np.flatnonzero(~np.isin(part.rows, removed))):
                lengths.append(np.diff(part.vectors.indptr)[kept])
                yield take_rows(part, kept)

    schema = shard_schema_of(path)
    run.unmark_done(shard)
    scratch = run.scratch_path(path.name)
    sha256 = write_parts(remaining(), scratch=scratch, schema=schema)
    move_whole(scratch, path, run.refuse_lost)
    run.write_skipped(shard, skipped)
    terms = np.concatenate(lengths)
    counts = {"rows": len(terms), "nnz": int(terms.sum()), "empty": int((terms == 0).sum())}
    counts |= {name: done[name] - count for name, count in (less or {}).items()}
    run.mark_done(shard, {**done, **counts, "skipped": len(skipped), "sha256": sha256})


def hash_id(doc_id: str) -> int:
    """Return the 8-byte BLAKE2b digest of an id as a little-endian integer."""
    return int.from_bytes(hashlib.blake2b(doc_id.encode(), digest_size=8).digest(), "little")
