"""Pruning against a plain implementation, row by row."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_ingest.pruning import Ranking, count_emptied, prune
from sparse_ingest.records import SparseRows

# Few different weights, so that ties are common.
weights = st.sampled_from([0.0625, 0.1, 0.3, 0.30000001, 0.5, 0.5000001, 1.0, 1.5, 3.0]) | st.floats(
    2.0**-20, 9, width=32
)
rows_of = st.lists(st.dictionaries(st.integers(0, 60), weights, max_size=12), max_size=6)
rules_of = st.fixed_dictionaries(
    {},
    optional={
        "top_k": st.integers(1, 14),
        "max_ratio": st.sampled_from([0.0, 0.1, 0.2, 1 / 3, 0.5, 1.0, 1.1]),
        "min_weight": st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0, 10.0]),
    },
)
with_alpha = st.builds(
    lambda rules, alpha: {**rules, "alpha_mass": alpha}, rules_of, st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0])
)


def csr(rows: list[dict[int, float]], kind: type = np.float32) -> SparseRows:
    pairs = [sorted(row.items()) for row in rows]
    return SparseRows(
        [str(place) for place in range(len(rows))],
        np.cumsum([0, *map(len, pairs)], dtype=np.int64),
        np.array([token for row in pairs for token, _ in row], dtype=np.int32),
        np.array([weight for row in pairs for _, weight in row], dtype=kind),
    )


def naive(vectors: SparseRows, top_k=None, max_ratio=None, min_weight=None, alpha_mass=None) -> list[dict[int, float]]:
    pruned = []
    for place in range(len(vectors.doc_ids)):
        terms = [(int(token), np.float32(weight)) for token, weight in zip(*vectors.row(place), strict=True)]
        largest = max((weight for _, weight in terms), default=np.float32(0))
        within, mass = set(), 0.0
        for token, weight in sorted(terms, key=lambda term: (-term[1], term[0])):
            mass += float(weight)
            if alpha_mass is None or mass <= alpha_mass * sum(
                float(one) for one in sorted((weight for _, weight in terms), reverse=True)
            ):
                within.add(token)
        if min_weight is not None:
            terms = [term for term in terms if term[1] >= np.float32(min_weight)]
        if max_ratio is not None:
            terms = [term for term in terms if term[1] >= np.float32(max_ratio) * largest]
        if top_k is not None:
            terms = sorted(terms, key=lambda term: (-term[1], term[0]))[:top_k]
        pruned.append({token: float(weight) for token, weight in sorted(terms) if token in within})
    return pruned


def as_rows(vectors: SparseRows) -> list[dict[int, float]]:
    return [
        {int(token): float(weight) for token, weight in zip(*vectors.row(place), strict=True)}
        for place in range(len(vectors.doc_ids))
    ]


@pytest.mark.parametrize("kind", [np.float32, np.float16])
@given(rows_of, rules_of | with_alpha)
def test_pruning_equals_the_plain_implementation(kind: type, rows: list[dict[int, float]], rules: dict) -> None:
    vectors = csr(rows, kind)
    pruned = prune(vectors, **rules)
    assert as_rows(pruned) == naive(vectors, **rules)
    assert pruned.weights.dtype == kind and pruned.token_ids.dtype == np.int32 and pruned.indptr.dtype == np.int64
    for place in range(len(rows)):
        token_ids, _ = pruned.row(place)
        assert np.all(np.diff(token_ids) > 0)


@given(rows_of, rules_of)
def test_pruning_is_idempotent_and_does_not_change_its_input(rows: list[dict[int, float]], rules: dict) -> None:
    vectors = csr(rows)
    once = prune(vectors, **rules)
    assert as_rows(prune(once, **rules)) == as_rows(once)
    assert as_rows(vectors) == as_rows(csr(rows))


def test_without_rules_the_input_is_returned() -> None:
    vectors = csr([{1: 1.0}])
    assert prune(vectors) is vectors


def test_of_equal_weights_the_lower_token_id_is_kept() -> None:
    assert as_rows(prune(csr([{9: 1.0, 3: 1.0, 5: 2.0, 7: 1.0}]), top_k=2)) == [{3: 1.0, 5: 2.0}]


def test_weights_at_the_threshold_are_kept() -> None:
    assert as_rows(prune(csr([{1: 4.0, 2: 1.0, 3: 0.5}]), max_ratio=0.25)) == [{1: 4.0, 2: 1.0}]
    assert as_rows(prune(csr([{1: 4.0, 2: 0.3}]), min_weight=0.3)) == [{1: 4.0, 2: np.float32(0.3)}]


def test_the_largest_weight_is_that_of_its_own_row() -> None:
    assert as_rows(prune(csr([{1: 8.0, 2: 1.0}, {}, {1: 1.0, 2: 0.5}]), max_ratio=0.5)) == [
        {1: 8.0},
        {},
        {1: 1.0, 2: 0.5},
    ]


def test_the_term_that_crosses_alpha_mass_is_removed() -> None:
    # As in OpenSearch: 3 is at most half of the sum 6, 3 + 2 is more.
    before = csr([{1: 1.0, 2: 2.0, 3: 3.0}, {7: 0.5}, {}])
    after = prune(before, alpha_mass=0.5)
    assert as_rows(after) == [{3: 3.0}, {}, {}]
    assert count_emptied(before, after) == 1
    assert prune(before, alpha_mass=1.0).weights.tolist() == before.weights.tolist()


def test_alpha_mass_breaks_ties_by_the_lower_token_id() -> None:
    assert as_rows(prune(csr([{9: 1.0, 3: 1.0, 5: 1.0, 7: 1.0}]), alpha_mass=0.5)) == [{3: 1.0, 5: 1.0}]


def test_alpha_mass_of_a_row_does_not_depend_on_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(5)
    rows = [
        {int(token): float(random.gamma(0.3) + 1e-6) for token in random.choice(5000, random.integers(0, 400), False)}
        for _ in range(50)
    ]
    together = as_rows(prune(csr(rows), alpha_mass=0.7))
    assert together == [as_rows(prune(csr([row]), alpha_mass=0.7))[0] for row in rows]
    monkeypatch.setattr("sparse_ingest.pruning._CELLS", 1000)
    assert as_rows(prune(csr(rows), alpha_mass=0.7)) == together


def test_one_ranking_can_be_used_for_many_rules() -> None:
    vectors = csr([{1: 1.0, 2: 2.0, 3: 3.0}, {4: 1.0}])
    ranking = Ranking(vectors)
    for rules in ({"top_k": 1}, {"max_ratio": 0.5}, {"alpha_mass": 0.9}, {"top_k": 2, "alpha_mass": 0.5}):
        assert as_rows(vectors.keep(ranking.kept(**rules))) == as_rows(prune(vectors, **rules))
