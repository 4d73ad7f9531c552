"""Evaluate all pruning rules in one pass over a run: hits of each query, document frequencies, emptied documents.

Rules of a family are nested, so a term has one level in it, the number of rules that keep it. Sums of products by
(document, level), accumulated over levels, are the scores under all rules of the family. Scores equal
searching/exact.py with 9-bit weights (tests/planning/test_sweep.py compares them). Memory: one part of the run, a count
per rule and token, and up to 0.2 MB of hits per query. The rules are scaled to mean numbers of terms. pruning.py and
query.py apply them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from sparse_ingest.cluster.scores import stored_weights
from sparse_ingest.pipeline import in_words as settings_in_words
from sparse_ingest.pruning import Ranking
from sparse_ingest.records import SparseRows
from sparse_ingest.searching.exact import QueryVector, best_places

PruningRule = Mapping[str, Any]  # the arguments of `prune`; empty: all terms
Family = tuple[PruningRule, ...]  # rules of one kind, from mild to strict: each keeps terms that all milder ones keep

ALL_TERMS: PruningRule = {}
_SHARES_OF_TERMS = (1.0, 0.75, 0.5, 0.35, 0.25, 0.15)
_DOCUMENT_RATIOS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
_MASSES = (0.99, 0.97, 0.95, 0.9, 0.8, 0.7, 0.5)
_QUERY_RATIOS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)


def document_families(mean_terms: float) -> list[Family]:
    """Return the rules to try on documents with this mean number of terms."""
    return [
        tuple({"top_k": count} for count in _counts(mean_terms)),
        tuple({"max_ratio": ratio} for ratio in _DOCUMENT_RATIOS),
        tuple({"alpha_mass": share} for share in _MASSES),
    ]


def query_rules(mean_tokens: float) -> list[PruningRule]:
    """Return the rules to try on queries with this mean number of tokens; the first keeps all."""
    counts = [{"top_k": count} for count in _counts(mean_tokens)]
    return [ALL_TERMS, *counts, *({"max_ratio": ratio} for ratio in _QUERY_RATIOS)]


def rule_text(rule: PruningRule) -> str:
    """Return a rule as shown in tables."""
    return settings_in_words(rule, " and ") or "all"


def as_flags(rule: PruningRule) -> str:
    """Return a rule as options of `load`."""
    return "".join(f" --{name.replace('_', '-')} {value:g}" for name, value in rule.items())


def _counts(mean: float) -> list[int]:
    return sorted({max(1, round(mean * share)) for share in _SHARES_OF_TERMS}, reverse=True)


T = TypeVar("T", np.int64, np.float64)
_EMPTY = np.iinfo(np.uint32).max


class Sweep:
    """Results of every rule; `rules[0]` keeps all terms. Add the parts of a run in order."""

    def __init__(
        self, families: Sequence[Family], queries: Sequence[QueryVector], vocabulary_size: int, *, depth: int
    ) -> None:
        self.rules: list[PruningRule] = [ALL_TERMS, *(rule for family in families for rule in family)]
        self.documents = 0
        self.frequencies = np.zeros((len(self.rules), vocabulary_size), dtype=np.int64)
        self.emptied = np.zeros(len(self.rules), dtype=np.int64)
        self._families, self._queries, self._depth = families, queries, depth
        self._rules_of = [slice(*ends) for ends in pairwise(np.cumsum([1, *map(len, families)]).tolist())]
        shape = (len(queries), len(self.rules), depth)
        self._scores = np.zeros(shape, dtype=np.float32)
        self._places = np.full(shape, _EMPTY, dtype=np.uint32)
        self._asked = np.zeros(vocabulary_size, dtype=np.bool_)
        for query in queries:
            self._asked[query.token_ids] = True

    def add(self, part: SparseRows) -> None:
        """Add the next part of the run."""
        ranking = Ranking(part)
        levels = [_levels(ranking, family) for family in self._families]
        self._count(part, levels)
        wanted = np.flatnonzero(self._asked[part.token_ids])
        wanted = wanted[np.argsort(part.token_ids[wanted], kind="stable")]
        # 32-bit like the ids of queries: otherwise searchsorted converts the array each time.
        token_ids = part.token_ids[wanted].astype(np.uint32)
        rows = np.repeat(np.arange(len(part.doc_ids)), np.diff(part.indptr))[wanted]
        weights = stored_weights(part.weights)[wanted]
        kept = [level[wanted] for level in levels]
        for number, query in enumerate(self._queries):
            starts = np.searchsorted(token_ids, query.token_ids, side="left")
            lengths = np.searchsorted(token_ids, query.token_ids, side="right") - starts
            at = np.arange(lengths.sum()) + np.repeat(starts - np.cumsum(lengths) + lengths, lengths)
            products = (weights[at] * np.repeat(query.weights.astype(np.float32), lengths)).astype(np.float64)
            self._search(number, rows[at], products, [level[at] for level in kept], len(part.doc_ids))
        self.documents += len(part.doc_ids)

    def best(self, query: int, rule: int) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.float32]]:
        """Return the best documents of a query under a rule, as positions among all rows of the run, and scores."""
        found = self._places[query, rule] != _EMPTY
        return self._places[query, rule][found], self._scores[query, rule][found]

    def all_places(self) -> npt.NDArray[np.uint32]:
        """Return the positions of all documents that any query finds under any rule."""
        places: npt.NDArray[np.uint32] = np.setdiff1d(self._places, [_EMPTY])
        return places

    def _count(self, part: SparseRows, levels: Sequence[npt.NDArray[np.uint8]]) -> None:
        size, lengths = self.frequencies.shape[1], np.diff(part.indptr)
        rows = np.repeat(np.arange(len(lengths)), lengths)
        self.frequencies[0] += np.bincount(part.token_ids, minlength=size)
        for rules, level in zip(self._rules_of, levels, strict=True):
            width = rules.stop - rules.start + 1
            counts = np.bincount(level.astype(np.int64) * size + part.token_ids, minlength=width * size)
            self.frequencies[rules] += _from_above(counts.reshape(width, size), 0)[1:]
            highest = np.zeros(len(lengths), dtype=np.uint8)
            np.maximum.at(highest, rows, level)
            self.emptied[rules] += np.cumsum(np.bincount(highest[lengths > 0], minlength=width))[:-1]

    def _search(
        self,
        query: int,
        places: npt.NDArray[np.int64],
        products: npt.NDArray[np.float64],
        levels: Sequence[npt.NDArray[np.uint8]],
        row_count: int,
    ) -> None:
        for rules, level in zip(self._rules_of, levels, strict=True):
            width = rules.stop - rules.start + 1
            sums = np.bincount(places * width + level, weights=products, minlength=row_count * width)
            # A rule keeps terms with a level above its position; level 0 sums all terms.
            scores = _from_above(sums.reshape(row_count, width), 1).astype(np.float32)
            if rules.start == 1:
                self._merge(query, 0, scores[:, 0])
            for rule in range(rules.start, rules.stop):
                self._merge(query, rule, scores[:, rule - rules.start + 1])

    def _merge(self, query: int, rule: int, scores: npt.NDArray[np.float32]) -> None:
        """Merge the rows of the next part into the best."""
        before_scores, before = self._scores[query, rule], self._places[query, rule]
        # The last score is zero while places are empty.
        rows = np.flatnonzero(scores > before_scores[-1])
        if not len(rows):
            return
        all_scores = np.concatenate([before_scores, scores[rows]])
        all_places = np.concatenate([before, (rows + self.documents).astype(np.uint32)])
        order = best_places(all_scores, self._depth)
        # Hits have scores above zero, so they replace empty places.
        self._scores[query, rule], self._places[query, rule] = all_scores[order], all_places[order]


def _levels(ranking: Ranking, family: Family) -> npt.NDArray[np.uint8]:
    """Return how many rules of a family keep each term."""
    levels: npt.NDArray[np.uint8] = np.sum([ranking.kept(**rule) for rule in family], axis=0, dtype=np.uint8)
    return levels


def _from_above(table: npt.NDArray[T], axis: int) -> npt.NDArray[T]:
    """Return the sum over each level and all higher ones."""
    sums: npt.NDArray[T] = np.flip(np.cumsum(np.flip(table, axis), axis), axis)
    return sums
