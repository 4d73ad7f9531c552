"""`--dedup-text encode-once`: compute one vector for equal texts of a shard, and copy it.

Which one is computed is a pure function of the corpus: the first of its shard. So the bytes of a shard depend on
nothing but its rows, whoever makes it and whatever was killed; equal texts of two shards are computed twice, since
waiting for another shard would make workers wait for each other. Copies change which texts share a batch, and so the
last bits of a weight may differ from a run without: the choice is part of the identity.

In: text hashes (16 bytes of SHA-256: equal hash means equal text). Out: the vectors kept under them. They are on disk
in a file without a name, so that a killed process leaves nothing; memory holds about 150 bytes for each text.
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
    """Vectors as the run keeps them, and what each adds to the counts of its shard (counts.py)."""

    vectors: SparseRows
    of_rows: OfRows

    def take(self, places: Numbers) -> Kept:
        """Those at these places, in this order."""
        return Kept(self.vectors.take(places), self.of_rows[places])


def together(pieces: Sequence[Kept]) -> Kept:
    """Return all vectors in the order of the pieces."""
    of_rows = np.concatenate([piece.of_rows for piece in pieces])
    return Kept(SparseRows.joined([piece.vectors for piece in pieces]), of_rows)


class Copies:
    """The vectors that were computed for one shard so far, numbered from 0, by text hash."""

    def __init__(self, folder: Path) -> None:
        self._files = [tempfile.TemporaryFile(dir=folder) for _ in ("token_ids", "weights")]
        self._types: list[np.dtype[Any]] = []
        self._numbers: dict[bytes, int] = {}
        self._ends = array("q", [0])  # of the terms of each text
        self._of_rows: list[OfRows] = []

    def close(self) -> None:
        """Forget all."""
        for file in self._files:
            file.close()

    def find(self, text_hashes: Sequence[bytes]) -> Numbers:
        """The number under which each hash is kept; -1 where it is not."""
        return np.fromiter((self._numbers.get(one, -1) for one in text_hashes), np.int64, len(text_hashes))

    def add(self, text_hashes: Sequence[bytes], kept: Kept) -> None:
        """Keep vectors under hashes that are new."""
        arrays = (kept.vectors.token_ids, kept.vectors.weights)
        self._types = [values.dtype for values in arrays]
        for file, values in zip(self._files, arrays, strict=True):
            file.write(values.tobytes())
        first, end = len(self._numbers), self._ends[-1]
        self._numbers.update(zip(text_hashes, range(first, first + len(text_hashes)), strict=True))
        self._ends.extend((kept.vectors.indptr[1:] - kept.vectors.indptr[0] + end).tolist())
        self._of_rows.append(kept.of_rows)

    def take(self, numbers: Numbers) -> Kept:
        """The vectors of these numbers."""
        terms = [mapped(file, kind) for file, kind in zip(self._files, self._types, strict=True)]
        vectors = SparseRows([""] * len(self._numbers), np.array(self._ends), *terms)
        return Kept(vectors.take(numbers), np.concatenate(self._of_rows)[numbers])
