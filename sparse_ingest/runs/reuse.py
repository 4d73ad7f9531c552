"""The vectors of another run by the hash of their text, for `encode --reuse`.

In: a run that was encoded with the same settings. Out: for text hashes (16 bytes of SHA-256), which ones the run has,
and their vectors. The table of hashes is in unnamed files on disk, so that a killed process leaves nothing; one piece
of it and a few row groups are in memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sparse_ingest.errors import RunError
from sparse_ingest.records import SparseRows
from sparse_ingest.runs.checking import checked_shard, finished_shards
from sparse_ingest.runs.manifest import Identity, differences
from sparse_ingest.runs.run import Run
from sparse_ingest.runs.shards import read_text_hashes, read_vectors
from sparse_ingest.runs.sorted_pieces import Numbers, SortedPieces, mapped

RANGE_ROWS = 1_000_000  # rows sorted at a time: 24 MB, three times that while they are sorted
CACHED_GROUPS = 8  # row groups kept: 8192 rows of 120 terms are 4 MB
# Settings of the identity that no vector depends on: the choice of documents, and the division into shards.
OF_THE_CORPUS = frozenset({"format", "corpus", "fields", "limit", "shard_rows", "dedup_text"})

_GROUP_BITS, _PLACE_BITS = 24, 16
_HALF, _HASH = ">u8", "S16"  # both are in the order of the bytes


def refuse_other_settings(old: Run, identity: Identity) -> None:
    """Raise `RunError` with the first setting of a run's vectors that differs from `identity`."""
    found = differences(old.manifest.identity, identity)
    first = next((one for one in found if one.setting.partition(".")[0] not in OF_THE_CORPUS), None)
    if first:
        raise RunError(
            f"The vectors of {old.path} cannot be reused: {first.in_words('it')}. Encode with the settings of that "
            "run, or without --reuse."
        )


class OldVectors:
    """The vectors of the finished shards of a run, which must not change, by text hash. Not safe for several threads.

    The folder `scratch` needs space for 48 bytes per row while the table is built, 24 afterwards.
    """

    def __init__(self, run: Run, scratch: Path) -> None:
        self._run, self.run_id = run, run.manifest.run_id
        self._hashes, self._addresses = _sorted_table(run, scratch)
        self._group = lru_cache(CACHED_GROUPS)(self._read_group)

    def __len__(self) -> int:
        """Return the number of different texts."""
        return len(self._hashes)

    def find(self, text_hashes: Sequence[bytes]) -> tuple[npt.NDArray[np.bool_], SparseRows | None]:
        """Return which hashes are known, and the vectors of those in order, with their ids in the run; None for none.

        Weights have the type of the run's shards. A call reads each row group at most once and keeps the last ones, so
        that a corpus in the order of the run reads each group once.
        """
        hashes = np.frombuffer(b"".join(text_hashes), dtype=_HASH)
        places = np.searchsorted(self._hashes, hashes)
        known = places < len(self._hashes)
        known[known] = self._hashes[places[known]] == hashes[known]
        return known, self._vectors(self._addresses[places[known]]) if known.any() else None

    def _vectors(self, addresses: Numbers) -> SparseRows:
        """Return the vectors at some addresses, in their order."""
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
        tokens = len(self._run.vocabulary())
        return read_vectors(checked_shard(self._run, shard), group, tokens=tokens)


def _sorted_table(run: Run, scratch: Path) -> tuple[npt.NDArray[np.bytes_], Numbers]:
    """Return the sorted hashes of all finished shards and the first address of each, both on disk."""
    shards = finished_shards(run)
    pieces = SortedPieces(scratch, 3, rows=sum(map(run.rows_of, shards)), range_rows=RANGE_ROWS)
    hashes, addresses = (tempfile.TemporaryFile(dir=scratch) for _ in range(2))
    for shard in shards:
        for group, digests in enumerate(read_text_hashes(checked_shard(run, shard))):
            pieces.add(_addressed(shard, group, digests))
    for table in pieces.ranges():
        # The sort is stable, so the first of equal hashes is the first in the run.
        table = table[np.lexsort((table[:, 1], table[:, 0]))]
        first = np.ones(len(table), dtype=np.bool_)
        first[1:] = (table[1:, :2] != table[:-1, :2]).any(axis=1)
        hashes.write(table[first, :2].astype(_HALF).tobytes())
        addresses.write(table[first, 2].tobytes())
    with hashes, addresses:
        return mapped(hashes, _HASH), mapped(addresses, np.uint64)


def _addressed(shard: int, group: int, digests: bytes) -> Numbers:
    halves = np.frombuffer(digests, dtype=_HALF).reshape(-1, 2).astype(np.uint64)
    assert len(halves) <= 1 << _PLACE_BITS and group < 1 << _GROUP_BITS, "row groups have at most 8192 rows"
    base = (shard << _GROUP_BITS | group) << _PLACE_BITS
    return np.column_stack((halves, np.uint64(base) + np.arange(len(halves), dtype=np.uint64)))
