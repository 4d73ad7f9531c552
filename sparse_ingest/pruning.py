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

from collections.abc import Iterator
from functools import cached_property
from typing import TypedDict, Unpack

import numpy as np
import numpy.typing as npt

from sparse_ingest.records import SparseRows

_CELLS = 1 << 20  # of a padded table with a line for each row: 8 MiB


class Rules(TypedDict, total=False):
    """The rules to apply; one that is None or missing keeps all."""

    top_k: int | None
    max_ratio: float | None
    min_weight: float | None
    alpha_mass: float | None


def prune(vectors: SparseRows, **rules: Unpack[Rules]) -> SparseRows:
    """The same rows with fewer terms; token ids stay ascending."""
    if all(value is None for value in rules.values()):
        return vectors
    return vectors.keep(Ranking(vectors).kept(**rules))


def count_emptied(before: SparseRows, after: SparseRows) -> int:
    """How many rows lost their last term; no sparse query finds such a document."""
    return int(np.count_nonzero((np.diff(after.indptr) == 0) & (np.diff(before.indptr) > 0)))


class Ranking:
    """What the rules look at, computed once for any number of rules."""

    def __init__(self, vectors: SparseRows) -> None:
        self._indptr = vectors.indptr
        self._weights = vectors.weights.astype(np.float32, copy=False)
        self._lengths = np.diff(vectors.indptr)

    def kept(self, **rules: Unpack[Rules]) -> npt.NDArray[np.bool_]:
        """For each term whether it stays."""
        kept = np.ones(len(self._weights), dtype=bool)
        if (min_weight := rules.get("min_weight")) is not None:
            kept &= self._weights >= np.float32(min_weight)
        if (max_ratio := rules.get("max_ratio")) is not None:
            kept &= self._weights >= np.float32(max_ratio) * self._largest[self._row_of]
        if (top_k := rules.get("top_k")) is not None:
            kept &= self._rank < top_k
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
        """The terms row by row, heaviest first, of equal weights the lower token id."""
        order = np.empty(len(self._weights), dtype=np.int64)
        # Weights are above zero, so their bits sort as the weights do; the place in the row is the token id.
        heaviest = (~self._weights.view(np.uint32)).astype(np.uint64) << np.uint64(32)
        keys = heaviest | self._place.astype(np.uint64)
        for _, terms, cells in self._tables():
            table = np.full(cells.shape, np.iinfo(np.uint64).max)
            table[cells] = keys[terms]
            table.sort(axis=1)
            order[terms] = table[cells] & np.uint64(0xFFFFFFFF)
        return order + self._first

    @cached_property
    def _rank(self) -> npt.NDArray[np.int64]:
        """The place of each term in its row, heaviest first."""
        rank = np.empty(len(self._weights), dtype=np.int64)
        rank[self._order] = self._place
        return rank

    @cached_property
    def _mass(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Each term's weight with all heavier ones of its row, and the sum of each row."""
        mass = np.empty(len(self._weights), dtype=np.float64)
        total = np.zeros(len(self._lengths), dtype=np.float64)
        # Row by row, so that a sum never depends on other rows.
        for rows, terms, cells in self._tables():
            table = np.zeros(cells.shape)
            table[cells] = self._weights[self._order[terms]]
            np.cumsum(table, axis=1, out=table)
            mass[self._order[terms]] = table[cells]
            total[rows] = table[:, -1]
        return mass, total

    @cached_property
    def _first(self) -> npt.NDArray[np.int64]:
        """Where the row of each term begins."""
        return np.repeat(self._indptr[:-1], self._lengths)

    @cached_property
    def _place(self) -> npt.NDArray[np.int64]:
        """The place of each term in its row, as it came."""
        return np.arange(len(self._weights)) - self._first

    def _tables(self) -> Iterator[tuple[slice, slice, npt.NDArray[np.bool_]]]:
        """Rows, a bounded number at a time; their terms; and the cells that these fill of a table with a line a row."""
        longest = int(self._lengths.max(initial=1))
        step = max(1, _CELLS // longest)
        for first in range(0, len(self._lengths), step):
            lengths = self._lengths[first : first + step]
            end = first + len(lengths)
            terms = slice(int(self._indptr[first]), int(self._indptr[end]))
            yield slice(first, end), terms, np.arange(longest) < lengths[:, np.newaxis]
