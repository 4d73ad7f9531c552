"""Pruning of sparse vectors: which terms of a row stay.

The rules, each on one row as it came; a term stays when every given rule keeps it:

- `min_weight`: keep w >= min_weight.
- `max_ratio`: keep w >= max_ratio * (largest weight of the row). OpenSearch's rule; opensearch-py-ml uses a strict >.
- `top_k`: keep the k heaviest; of equal weights the lower token id stays.
- `alpha_mass`: heaviest first (of equal weights the lower token id), keep while the sum so far, in double, stays
  <= alpha_mass * (sum of the row). OpenSearch's rule: the term that crosses goes, so a row of one term becomes empty.

The first three change nothing when they are applied again; alpha_mass does, as what is left has another sum. Ties and
rules are part of a run's identity, so every implementation (numpy here, a device later) must give these very rows.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import numpy.typing as npt

from sparse_ingest.records import SparseRows

_CELLS = 1 << 20  # of the padded table in which sums run along rows: 8 MiB


def prune(
    vectors: SparseRows,
    *,
    top_k: int | None = None,
    max_ratio: float | None = None,
    min_weight: float | None = None,
    alpha_mass: float | None = None,
) -> SparseRows:
    """The same rows with fewer terms; token ids stay ascending."""
    if top_k is None and max_ratio is None and min_weight is None and alpha_mass is None:
        return vectors
    ranking = Ranking(vectors)
    return vectors.keep(ranking.kept(top_k=top_k, max_ratio=max_ratio, min_weight=min_weight, alpha_mass=alpha_mass))


def count_emptied(before: SparseRows, after: SparseRows) -> int:
    """How many rows lost their last term; no sparse query finds such a document."""
    return int(np.count_nonzero((np.diff(after.indptr) == 0) & (np.diff(before.indptr) > 0)))


class Ranking:
    """What the rules look at, computed once for any number of rules."""

    def __init__(self, vectors: SparseRows) -> None:
        self._indptr, self._token_ids = vectors.indptr, vectors.token_ids
        self._weights = vectors.weights.astype(np.float32, copy=False)
        self._lengths = np.diff(vectors.indptr)

    def kept(
        self,
        *,
        top_k: int | None = None,
        max_ratio: float | None = None,
        min_weight: float | None = None,
        alpha_mass: float | None = None,
    ) -> npt.NDArray[np.bool_]:
        """For each term whether it stays."""
        kept = np.ones(len(self._weights), dtype=bool)
        if min_weight is not None:
            kept &= self._weights >= np.float32(min_weight)
        if max_ratio is not None:
            kept &= self._weights >= np.float32(max_ratio) * self._largest[self._row_of]
        if top_k is not None:
            kept &= self._rank < top_k
        if alpha_mass is not None:
            mass, total = self._mass
            kept &= mass <= alpha_mass * total[self._row_of]
        return kept

    @cached_property
    def _row_of(self) -> npt.NDArray[np.int64]:
        return np.repeat(np.arange(len(self._lengths)), self._lengths)

    @cached_property
    def _largest(self) -> npt.NDArray[np.float32]:
        largest = np.zeros(len(self._lengths), dtype=np.float32)
        np.maximum.at(largest, self._row_of, self._weights)
        return largest

    @cached_property
    def _rank(self) -> npt.NDArray[np.int64]:
        """The place of each term in its row."""
        # Sorted by row, then weight downwards, then token id.
        order = np.lexsort((self._token_ids, -self._weights, self._row_of))
        rank = np.empty(len(self._weights), dtype=np.int64)
        rank[order] = np.arange(len(self._weights)) - self._indptr[self._row_of[order]]
        return rank

    @cached_property
    def _mass(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Each term's weight with all heavier ones of its row, and the sum of each row."""
        mass = np.empty(len(self._weights), dtype=np.float64)
        total = np.zeros(len(self._lengths), dtype=np.float64)
        # Row by row, so that a sum never depends on what lies beside the row.
        rows = max(1, _CELLS // max(1, int(self._lengths.max(initial=0))))
        for first in range(0, len(self._lengths), rows):
            lengths = self._lengths[first : first + rows]
            terms = slice(int(self._indptr[first]), int(self._indptr[first + len(lengths)]))
            at = self._row_of[terms] - first, self._rank[terms]
            table = np.zeros((len(lengths), int(lengths.max(initial=0)) or 1))
            table[at] = self._weights[terms]
            np.cumsum(table, axis=1, out=table)
            mass[terms] = table[at]
            total[first : first + rows] = table[:, -1]
        return mass, total
