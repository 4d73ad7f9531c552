"""One pass over a run gives for every pruning rule the same results as pruning and searching one by one."""

from __future__ import annotations

import numpy as np
import pytest

from sparse_ingest.cluster.scores import stored_weights
from sparse_ingest.planning.sweep import Sweep, as_flags, document_families, query_rules, rule_text
from sparse_ingest.pruning import count_emptied, prune
from sparse_ingest.records import SparseRows
from sparse_ingest.searching.exact import QueryVector, search_exact

VOCABULARY = 300
DEPTH = 20


def random_parts(*sizes: int, seed: int = 7) -> list[SparseRows]:
    random = np.random.default_rng(seed)
    parts = []
    for size in sizes:
        lengths = random.integers(0, 60, size)
        lengths[:2] = 0, 1  # a document without terms, and one emptied by alpha_mass
        ids = [np.sort(random.choice(VOCABULARY, length, replace=False)) for length in lengths]
        weights = random.gamma(1.5, 0.5, lengths.sum()).astype(np.float32) + np.float32(1e-3)
        weights[::7] = 0.5  # ties
        parts.append(
            SparseRows(
                [f"d{len(parts)}-{row}" for row in range(size)],
                np.concatenate([[0], np.cumsum(lengths)]),
                np.concatenate(ids).astype(np.uint16),
                weights.astype(np.float16),
            )
        )
    return parts


def random_queries(count: int) -> list[QueryVector]:
    random = np.random.default_rng(8)
    queries = [
        QueryVector(
            random.choice(VOCABULARY, length, replace=False).astype(np.uint32),
            random.gamma(2.0, 1.0, length).astype(np.float32),
        )
        for length in random.integers(1, 20, count)
    ]
    return [*queries, QueryVector(np.empty(0, np.uint32), np.empty(0, np.float32))]


def test_every_rule_matches_exact_search_of_pruned_vectors() -> None:
    parts, queries = random_parts(90, 250, 3, 120), random_queries(12)
    sweep = Sweep(document_families(30.0), queries, VOCABULARY, depth=DEPTH)
    for part in parts:
        sweep.add(part)
    assert sweep.documents == 463
    assert len(sweep.rules) == 21 and sweep.rules[0] == {}
    for number, rule in enumerate(sweep.rules):
        pruned = [prune(part, **rule) for part in parts]
        stored = [part._replace(weights=stored_weights(part.weights)) for part in pruned]
        for query, exact in enumerate(search_exact(stored, queries, DEPTH)):
            places, scores = sweep.best(query, number)
            np.testing.assert_array_equal(places, exact.positions)
            np.testing.assert_array_equal(scores, exact.scores)
        together = np.concatenate([part.token_ids for part in pruned])
        np.testing.assert_array_equal(sweep.frequencies[number], np.bincount(together, minlength=VOCABULARY))
        emptied = sum(count_emptied(before, after) for before, after in zip(parts, pruned, strict=True))
        assert sweep.emptied[number] == emptied
    assert sweep.emptied.any()


@pytest.mark.parametrize("mean", [1.0, 3.4, 120.0, 2000.0])
def test_a_stricter_rule_keeps_a_subset_of_a_milder_one(mean: float) -> None:
    [part] = random_parts(200)
    for family in document_families(mean):
        kept = [set(_terms(prune(part, **rule))) for rule in family]
        assert all(strict <= mild for mild, strict in zip(kept, kept[1:], strict=False))
    rules = query_rules(mean)
    assert rules[0] == {} and len({rule_text(rule) for rule in rules}) == len(rules)


def test_rules_are_written_as_options_of_load() -> None:
    assert as_flags({"top_k": 60}) == " --top-k 60"
    assert as_flags({"alpha_mass": 0.95}) == " --alpha-mass 0.95"
    assert rule_text({"top_k": 60, "max_ratio": 0.1}) == "top_k 60 and max_ratio 0.1"


def _terms(part: SparseRows) -> list[tuple[int, int]]:
    rows = np.repeat(np.arange(len(part.doc_ids)), np.diff(part.indptr))
    return list(zip(rows.tolist(), part.token_ids.tolist(), strict=True))
