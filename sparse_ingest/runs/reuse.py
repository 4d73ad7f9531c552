"""The vectors of another run, found by the hash of the text they were made from: what `encode --reuse` copies.

In: a run whose vectors were made with the same settings. Out: of any number of text hashes, which ones it knows and
their vectors. Equal hash means equal text (16 bytes of SHA-256). The table of hashes is on disk in files without a
name, so that a killed process leaves nothing; memory holds one piece of it and a few row groups, whatever the size.
Known of a row are its terms, so `nnz` and `empty`; not known are `truncated`, `underflow` and `without_token`, which
a run counts per shard only.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sparse_ingest.errors import RunError
from sparse_ingest.records import SparseRows
from sparse_ingest.runs.manifest import Identity, differences
from sparse_ingest.runs.run import Run
from sparse_ingest.runs.shards import read_text_hashes, read_vectors, shard_schema_of
from sparse_ingest.runs.sorted_pieces import Numbers, SortedPieces

RANGE_ROWS = 1_000_000  # rows sorted at a time: 24 MB, three times that while they are sorted
CACHED_GROUPS = 8  # row groups kept: 8192 rows of 120 terms are 4 MB
# Settings of the identity that no vector depends on: which documents they are of, and how files are cut.
OF_THE_CORPUS = frozenset({"format", "corpus", "fields", "limit", "shard_rows", "dedup_text"})

_GROUP_BITS, _PLACE_BITS = 24, 16


def refuse_unlike(old: Run, identity: Identity) -> None:
    """Refuse a run whose vectors were made with other settings than those of `identity`.

    Raises:
        RunError: with the first setting that differs and both values.
    """
    found = differences(old.manifest.identity, identity)
    first = next((one for one in found if one.setting.partition(".")[0] not in OF_THE_CORPUS), None)
    if first:
        raise RunError(
            f"The vectors of {old.path} cannot be used again: {first.setting} is {first.stored!r} there, asked is "
            f"{first.asked!r}. Encode with the settings of that run, or without --reuse."
        )


class _Known(NamedTuple):
    """The sorted table: both halves of each hash, and the place of its vector."""

    high: Numbers
    low: Numbers
    address: Numbers


class OldVectors:
    """The vectors of the finished shards of a run, by text hash. Not safe to use from several threads.

    Args:
        run: where they come from; it must not change during the encode.
        scratch: an existing folder with room for 48 bytes per row while the table is made, 24 afterwards.
    """

    def __init__(self, run: Run, scratch: Path) -> None:
        self._run = run
        self._known = _sorted_table(run, scratch)
        self._group = lru_cache(CACHED_GROUPS)(self._read_group)
        self._types = _term_types(run)

    def __len__(self) -> int:
        """How many different texts are known."""
        return len(self._known.high)

    def find(self, text_hashes: Sequence[bytes]) -> tuple[npt.NDArray[np.bool_], SparseRows]:
        """Which of the hashes are known, and the vectors of those, in order, with the ids that they have in the run.

        Weights have the type of the run's shards. Each row group is read once per call at most, and those read last
        are kept: a corpus in the order of the run reads each group once.
        """
        high, low = _halves(b"".join(text_hashes))
        places = _find(self._known, high, low)
        known = places >= 0
        addresses = np.array(self._known.address[places[known]])
        return known, self._vectors(addresses)

    def _vectors(self, addresses: Numbers) -> SparseRows:
        """The vectors at some addresses, in their order."""
        if not len(addresses):
            return SparseRows([], np.zeros(1, np.int64), *(np.empty(0, kind) for kind in self._types))
        order = np.argsort(addresses, kind="stable")
        groups, starts = np.unique(addresses[order] >> np.uint64(_PLACE_BITS), return_index=True)
        pieces = [
            self._group(group).take((addresses[some] & np.uint64((1 << _PLACE_BITS) - 1)).astype(np.int64))
            for group, some in zip(groups.tolist(), np.split(order, starts[1:]), strict=True)
        ]
        together = SparseRows.joined(pieces)
        return together if (order[1:] > order[:-1]).all() else together.take(np.argsort(order))

    def _read_group(self, address: int) -> SparseRows:
        shard, group = address >> _GROUP_BITS, address & ((1 << _GROUP_BITS) - 1)
        return read_vectors(self._run.shard_path(shard), group)


def _sorted_table(run: Run, scratch: Path) -> _Known:
    """The hashes of all finished shards in order, each with its first address, in files without a name."""
    shards = run.done_shards()
    rows = sum((run.done(shard) or {}).get("rows", 0) for shard in shards)
    pieces = SortedPieces(scratch, 3, rows=rows, range_rows=RANGE_ROWS)
    columns = [tempfile.TemporaryFile(dir=scratch) for _ in _Known._fields]
    for shard in shards:
        for group, hashes in enumerate(read_text_hashes(run.shard_path(shard))):
            pieces.add(_addressed(shard, group, hashes))
    for table in pieces.ranges():
        # A stable sort of rows in order of the run: the first of equal hashes is the first of the run.
        table = table[np.lexsort((table[:, 1], table[:, 0]))]
        first = np.ones(len(table), dtype=np.bool_)
        first[1:] = (table[1:, :2] != table[:-1, :2]).any(axis=1)
        for number, column in enumerate(columns):
            column.write(table[first, number].tobytes())
    return _Known(*map(_mapped, columns))


def _mapped(file: IO[bytes]) -> Numbers:
    """Map the numbers that were written to a file. The mapping outlives the file's name."""
    with file:
        file.flush()
        # An empty file cannot be mapped.
        return np.memmap(file, dtype=np.uint64, mode="r+") if file.tell() else np.empty(0, np.uint64)


def _addressed(shard: int, group: int, hashes: bytes) -> Numbers:
    high, low = _halves(hashes)
    assert len(high) <= 1 << _PLACE_BITS and group < 1 << _GROUP_BITS, "row groups have at most 8192 rows"
    base = (shard << _GROUP_BITS | group) << _PLACE_BITS
    return np.stack((high, low, np.uint64(base) + np.arange(len(high), dtype=np.uint64)), axis=1)


def _find(known: _Known, high: Numbers, low: Numbers) -> npt.NDArray[np.int64]:
    """The row of the table that each hash has; -1 where there is none."""
    places = np.searchsorted(known.high, high, side="left").astype(np.int64)
    inside = places < len(known.high)
    found = np.zeros(len(high), dtype=np.bool_)
    found[inside] = known.high[places[inside]] == high[inside]
    found[found] = known.low[places[found]] == low[found]
    # The first half alone is right but not the second: it may be that of a later row, one in 2^64 says so.
    doubtful = inside & ~found
    doubtful[doubtful] = known.high[places[doubtful]] == high[doubtful]
    for one in np.flatnonzero(doubtful).tolist():
        end = int(np.searchsorted(known.high, high[one], side="right"))
        places[one] += int(np.searchsorted(known.low[places[one] : end], low[one]))
        found[one] = places[one] < end and known.low[places[one]] == low[one]
    return np.where(found, places, -1)


def _halves(hashes: bytes) -> tuple[Numbers, Numbers]:
    pairs = np.frombuffer(hashes, dtype=">u8").reshape(-1, 2).astype(np.uint64)
    return pairs[:, 0].copy(), pairs[:, 1].copy()


def _term_types(run: Run) -> tuple[Any, Any]:
    """The types of token ids and weights in the shards of a run."""
    for shard in run.done_shards()[:1]:
        schema = shard_schema_of(run.shard_path(shard))
        token_ids, weights = (schema.field(name).type.value_type.to_pandas_dtype() for name in ("token_ids", "weights"))
        return token_ids, weights
    return np.uint16, np.float16
