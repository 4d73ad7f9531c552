"""`--dedup-text encode-once`: compute one vector for equal texts of a shard, and copy it.

The first text of a shard is computed, so the bytes of a shard depend on its rows alone; equal texts of two shards are
computed twice, because processes would otherwise wait for each other. Copies change which texts share a batch and with
it the last bits of weights, so the setting is part of the identity. Vectors are kept under 16 bytes of the text's
SHA-256 in unnamed files on disk, which a killed process does not leave behind; memory holds about 150 bytes per text.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sparse_ingest.encoding.counts import OfRows
from sparse_ingest.records import SparseRows
from sparse_ingest.runs.sorted_pieces import mapped

Numbers = npt.NDArray[np.int64]


class Kept(NamedTuple):
    """Vectors as the run stores them, and what each adds to the counts of its shard (counts.py)."""

    vectors: SparseRows
    of_rows: OfRows

    def take(self, places: Numbers) -> Kept:
        """Return the vectors at these places, in this order."""
        return Kept(self.vectors.take(places), self.of_rows[places])

    def with_more(self, more: Kept) -> Kept:
        """Return these vectors, followed by others."""
        return Kept(SparseRows.joined([self.vectors, more.vectors]), np.concatenate([self.of_rows, more.of_rows]))


class Copies:
    """The vectors computed for one shard so far by text hash, numbered from 0."""

    def __init__(self, folder: Path) -> None:
        self._files = [tempfile.TemporaryFile(dir=folder) for _ in ("token_ids", "weights")]
        self._types: list[np.dtype[Any]] = []
        self._numbers: dict[bytes, int] = {}
        self._ends = array("q", [0])  # of the terms of each text
        self._of_rows: list[OfRows] = []

    def close(self) -> None:
        """Delete the files."""
        for file in self._files:
            file.close()

    def find(self, text_hashes: Sequence[bytes]) -> Numbers:
        """Return the number of each hash, -1 for an unknown one."""
        return np.fromiter((self._numbers.get(one, -1) for one in text_hashes), np.int64, len(text_hashes))

    def add(self, text_hashes: Sequence[bytes], kept: Kept) -> None:
        """Add vectors under new hashes."""
        arrays = (kept.vectors.token_ids, kept.vectors.weights)
        self._types = [values.dtype for values in arrays]
        for file, values in zip(self._files, arrays, strict=True):
            file.write(values.tobytes())
        first, end = len(self._numbers), self._ends[-1]
        self._numbers.update(zip(text_hashes, range(first, first + len(text_hashes)), strict=True))
        self._ends.extend((kept.vectors.indptr[1:] - kept.vectors.indptr[0] + end).tolist())
        self._of_rows.append(kept.of_rows)

    def take(self, numbers: Numbers) -> Kept:
        """Return the vectors with these numbers."""
        terms = [mapped(file, kind) for file, kind in zip(self._files, self._types, strict=True)]
        vectors = SparseRows([""] * len(self._numbers), np.array(self._ends), *terms)
        return Kept(vectors.take(numbers), np.concatenate(self._of_rows)[numbers])
