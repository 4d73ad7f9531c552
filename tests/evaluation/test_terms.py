"""Active dimensions, sparsity and FLOPS against a count by hand."""

from __future__ import annotations

from collections import Counter

import pytest

from sparse_ingest.evaluation.terms import TermCounts, flops, sparsity

QUERIES = [("1", {"a": 1.0, "b": 2.0}), ("2", {"b": 1.0}), ("3", {})]
DOCUMENTS = [{"a", "b", "c"}, {"b"}, set(), {"z"}]


def test_flops_is_the_mean_number_of_shared_terms():
    counted = TermCounts()
    assert list(counted.passing(QUERIES)) == QUERIES
    holding = {token: sum(token in document for document in DOCUMENTS) for token in "abcz"}
    shared = [len(document & weights.keys()) for _, weights in QUERIES for document in DOCUMENTS]
    found = flops(counted, TermCounts(len(DOCUMENTS), Counter(holding)))
    assert found == pytest.approx(sum(shared) / len(shared))


def test_sparsity_is_the_fraction_of_zeros():
    counts = TermCounts(4, Counter("abbcz"))
    found = sparsity(counts, 10)
    assert (found.count, found.active_dimensions, found.sparsity) == (4, 1.25, 0.875)


def test_figures_of_nothing_are_zero():
    assert sparsity(TermCounts(), 10).active_dimensions == 0.0
    assert flops(TermCounts(), TermCounts(3, Counter("a"))) == 0.0
