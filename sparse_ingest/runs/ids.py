"""Document ids that stand in two shards of a run: found exactly in bounded memory, and taken out on request.

Each shard's ids become sorted 64-bit hashes on disk; the hash space is walked in ranges, so that only one range of
all shards is in memory at a time; equal hashes are confirmed on the ids themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sparse_ingest.runs.manifest import Run, SkippedRow
from sparse_ingest.runs.shards import drop_rows, read_doc_ids, read_shard, shard_schema_of, write_shard

RANGE_IDS = 8_000_000  # ids held at a time: 64 MB of hashes


class Duplicate(NamedTuple):
    """An id that stands twice in a run: the (shard, source row) where it came first and where it came again."""

    doc_id: str
    first: tuple[int, int]
    again: tuple[int, int]


def find_duplicates(run: Run, *, range_ids: int = RANGE_IDS) -> Iterator[Duplicate]:
    """Give every row of the finished shards whose id an earlier row has, by ranges of hash."""
    shards, path_of = run.done_shards(), run.shard_path
    scratch = run.scratch_path("ids")
    scratch.mkdir(exist_ok=True)
    files = [scratch / f"{shard}.u64" for shard in shards]
    total = 0
    for shard, file in zip(shards, files, strict=True):
        hashes = np.fromiter((_hash(doc_id) for _, doc_id in read_doc_ids(path_of(shard))), dtype=np.uint64)
        np.sort(hashes).tofile(file)
        total += len(hashes)
    ranges = max(1, -(-total // range_ids))
    for step in range(ranges):
        low, high = (step << 64) // ranges, ((step + 1) << 64) // ranges
        repeated = _repeated_hashes(files, low, high)
        if repeated:
            yield from _confirm(repeated, shards, path_of)
    for file in files:
        file.unlink()


def _repeated_hashes(files: Sequence[Path], low: int, high: int) -> set[int]:
    """The hashes in [low, high) that occur more than once."""
    slices: list[npt.NDArray[np.uint64]] = []
    for file in files:
        if file.stat().st_size:
            hashes = np.memmap(file, dtype=np.uint64, mode="r")
            # 2**64 is no uint64: the last range ends at the last value, included.
            start = np.searchsorted(hashes, np.uint64(low), side="left")
            end = len(hashes) if high == 1 << 64 else np.searchsorted(hashes, np.uint64(high), side="left")
            slices.append(np.array(hashes[start:end]))
    if not slices:
        return set()
    together = np.sort(np.concatenate(slices))
    return set(together[1:][together[1:] == together[:-1]].tolist())


def _confirm(repeated: set[int], shards: Sequence[int], path_of: Callable[[int], Path]) -> Iterator[Duplicate]:
    first: dict[str, tuple[int, int]] = {}
    for shard in shards:
        for row, doc_id in read_doc_ids(path_of(shard)):
            if _hash(doc_id) in repeated:
                if doc_id in first:
                    yield Duplicate(doc_id, first[doc_id], (shard, row))
                else:
                    first[doc_id] = (shard, row)


def remove_rows(run: Run, shard: int, rows: Mapping[int, SkippedRow]) -> None:
    """Rewrite a finished shard without some of its source rows, and name them as skipped.

    Killed in between, the shard counts as not done and is made anew, with the same result.
    """
    done = run.done(shard)
    assert done is not None, "only finished shards are searched for duplicates"
    path = run.shard_path(shard)
    skipped = sorted({*run.skipped(shard), *rows.values()})
    parts = [part for part in (drop_rows(part, list(rows)) for part in read_shard(path)) if len(part.rows)]
    schema = shard_schema_of(path)
    run.unmark_done(shard)
    sha256 = write_shard(parts, scratch=run.scratch_path(path.name), target=path, schema=schema)
    run.write_skipped(shard, skipped)
    lengths = np.concatenate([np.diff(part.vectors.indptr) for part in parts] or [np.empty(0, np.int64)])
    counts = {"rows": len(lengths), "nnz": int(lengths.sum()), "empty": int((lengths == 0).sum())}
    run.mark_done(shard, {**done, **counts, "skipped": len(skipped), "sha256": sha256})


def _hash(doc_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(doc_id.encode(), digest_size=8).digest(), "little")
