"""Pruning of sparse vectors: which terms of a row are kept.

Each rule applies to the original row; a term is kept if every given rule keeps it:

- `min_weight`: keep w >= min_weight.
- `max_ratio`: keep w >= max_ratio * (largest weight of the row). OpenSearch's rule; opensearch-py-ml uses a strict >.
- `top_k`: keep the k heaviest; of equal weights the lower token id.
- `alpha_mass`: in the order of `top_k`, keep while the sum so far, in double, is <= alpha_mass * (sum of the row).
  OpenSearch's rule: the term that crosses the limit is dropped, so a row of one term becomes empty.

All but alpha_mass can be repeated without effect. The rules are part of a run's identity, so every implementation must
return the same rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TypedDict, Unpack

import numpy as np
import numpy.typing as npt

from sparse_ingest.records import SparseRows

_CELLS = 1 << 20  # of a padded table with a line for each row: 8 MiB


class Rules(TypedDict, total=False):
    """The rules to apply; a rule that is None or missing keeps all."""

    top_k: int | None
    max_ratio: float | None
    min_weight: float | None
    alpha_mass: float | None


def prune(vectors: SparseRows, **rules: Unpack[Rules]) -> SparseRows:
    """Return the rows with the kept terms; token ids stay ascending."""
    if all(value is None for value in rules.values()):
        return vectors
    return vectors.keep(Ranking(vectors).kept(**rules))


def count_emptied(before: SparseRows, after: SparseRows) -> int:
    """Return how many rows lost their last term; no sparse query finds such a document."""
    return int(np.count_nonzero((np.diff(after.indptr) == 0) & (np.diff(before.indptr) > 0)))


class Ranking:
    """Ranks and sums of the terms, computed once for any number of rules."""

    def __init__(self, vectors: SparseRows) -> None:
        self._indptr = vectors.indptr
        self._weights = vectors.weights.astype(np.float32, copy=False)
        self._lengths = np.diff(vectors.indptr)

    def kept(self, **rules: Unpack[Rules]) -> npt.NDArray[np.bool_]:
        """Return for each term whether it is kept."""
        kept = np.ones(len(self._weights), dtype=bool)
        if (min_weight := rules.get("min_weight")) is not None:
            kept &= self._weights >= np.float32(min_weight)
        if (max_ratio := rules.get("max_ratio")) is not None:
            kept &= self._weights >= np.float32(max_ratio) * self._largest[self._row_of]
        if (top_k := rules.get("top_k")) is not None:
            kept &= self.rank < top_k
        if (alpha_mass := rules.get("alpha_mass")) is not None:
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
    def _order(self) -> npt.NDArray[np.int64]:
        """The terms row by row, heaviest first, then by token id."""
        order = np.empty(len(self._weights), dtype=np.int64)
        # Weights are above zero, so their bits sort like the weights; places in a row sort like token ids.
        heaviest = (~self._weights.view(np.uint32)).astype(np.uint64) << np.uint64(32)
        keys = heaviest | self._place.astype(np.uint64)
        for _, terms, cells in self._tables():
            table = np.full(cells.shape, np.iinfo(np.uint64).max)
            table[cells] = keys[terms]
            table.sort(axis=1)
            order[terms] = table[cells] & np.uint64(0xFFFFFFFF)
        return order + self._first

    @cached_property
    def rank(self) -> npt.NDArray[np.int64]:
        """The place of each term in its row, heaviest first."""
        rank = np.empty(len(self._weights), dtype=np.int64)
        rank[self._order] = self._place
        return rank

    @cached_property
    def _mass(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """The sum of each term and all heavier terms of its row, and the sum of each row."""
        mass = np.empty(len(self._weights), dtype=np.float64)
        total = np.zeros(len(self._lengths), dtype=np.float64)
        # Row by row, so that a sum does not depend on other rows.
        for rows, terms, cells in self._tables():
            table = np.zeros(cells.shape)
            table[cells] = self._weights[self._order[terms]]
            np.cumsum(table, axis=1, out=table)
            mass[self._order[terms]] = table[cells]
            total[rows] = table[:, -1]
        return mass, total

    @cached_property
    def _first(self) -> npt.NDArray[np.int64]:
        """The start of the row of each term."""
        return np.repeat(self._indptr[:-1], self._lengths)

    @cached_property
    def _place(self) -> npt.NDArray[np.int64]:
        """The place of each term in its row."""
        return np.arange(len(self._weights)) - self._first

    def _tables(self) -> Iterator[tuple[slice, slice, npt.NDArray[np.bool_]]]:
        """Yield a bounded number of rows, their terms, and the cells of the terms in a padded table of the rows."""
        longest = int(self._lengths.max(initial=1))
        step = max(1, _CELLS // longest)
        for first in range(0, len(self._lengths), step):
            lengths = self._lengths[first : first + step]
            end = first + len(lengths)
            terms = slice(int(self._indptr[first]), int(self._indptr[end]))
            yield slice(first, end), terms, np.arange(longest) < lengths[:, np.newaxis]
