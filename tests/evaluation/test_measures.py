"""Measures agree with ir-measures, and comparisons with scipy."""

from __future__ import annotations

import sys

import ir_measures
import numpy as np
import pytest
from scipy.stats import permutation_test, ttest_rel

from sparse_ingest.errors import MissingExtraError, UsageError
from sparse_ingest.evaluation import measures
from sparse_ingest.evaluation.measures import compare, depth_of, measure
from sparse_ingest.searching.hits import Ranked


def random_collection(queries: int = 40) -> tuple[list[Ranked], dict[str, dict[str, int]]]:
    random = np.random.default_rng(3)
    documents = [f"d{number}" for number in range(60)]
    ranked, qrels = [], {}
    for number in range(queries):
        found = random.permutation(documents)[: random.integers(0, 50)].tolist()
        # Only four different scores, so that there are ties.
        scores = sorted(random.integers(1, 5, len(found)).astype(float).tolist(), reverse=True)
        ranked.append(Ranked(f"q{number}", found, scores))
        qrels[f"q{number}"] = {doc: int(random.integers(0, 3)) for doc in random.permutation(documents)[:9].tolist()}
    return ranked, qrels


def test_values_equal_ir_measures_for_any_block_size(monkeypatch):
    ranked, qrels = random_collection()
    # Measures of trec_eval. The other providers order equal scores differently.
    library = {
        "nDCG@10": ir_measures.nDCG @ 10, "RR": ir_measures.RR, "R@100": ir_measures.R @ 100,
        "AP@100": ir_measures.AP @ 100, "Success@1": ir_measures.Success @ 1, "P(rel=2)@5": ir_measures.P(rel=2) @ 5,
    }  # fmt: skip
    names = list(library)
    run = {one.query_id: dict(zip(one.doc_ids, one.scores, strict=True)) for one in ranked if one.doc_ids}
    expected = ir_measures.calc(list(library.values()), qrels, run)
    for block in (1, 7, 1000):
        monkeypatch.setattr(measures, "_BLOCK", block)
        found = measure(iter(ranked), qrels, names)
        assert list(found.mean) == names
        for name in names:
            assert found.mean[name] == pytest.approx(expected.aggregated[library[name]], abs=1e-12)
        for metric in expected.per_query:
            assert found.per_query[str(metric.measure)][metric.query_id] == metric.value


def test_every_measure_ranks_the_larger_id_first_at_equal_scores():
    for found in (["x", "y"], ["y", "x"]):
        mean = measure([Ranked("a", found, [1.0, 1.0])], {"a": {"y": 1}}, ["RR", "RR@10", "P@1", "Judged@1"]).mean
        assert mean == {"RR": 1.0, "RR@10": 1.0, "P@1": 1.0, "Judged@1": 1.0}


def test_a_query_without_hits_counts_as_zero_and_one_without_judgments_is_ignored():
    found = measure(
        [Ranked("a", ["x"], [1.0]), Ranked("b", [], []), Ranked("z", ["x"], [1.0])],
        {"a": {"x": 1}, "b": {"x": 1}, "never asked": {"x": 1}},
        ["R@100"],
    )
    assert found.per_query == {"R@100": {"a": 1.0, "b": 0.0}}
    assert found.mean == {"R@100": 0.5}


def test_a_measure_keeps_its_requested_name():
    found = measure([Ranked("a", ["y", "x"], [2.0, 1.0])], {"a": {"x": 1}}, ["MRR@10", "RR@10"])
    assert found.mean == {"MRR@10": 0.5, "RR@10": 0.5}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ndcg@10", "similar: NDCG"),
        ("accuracy@1", "accuracy@k is Success@k"),
        ("xyzxyz", "is not a measure of ir-measures. Use its names"),
        ("nDCG@x", "cutoff"),
        ("P", "cutoff"),
        ("nDCG(foo=1)@10", "parameters"),
        ("", "cutoff"),
        ("P(rel=-1)@5", "parameters"),
        ("P(rel=0)@5", "parameters"),
        ("nDCG(gains={1: []})@3", "parameters"),
        ("P(2)@5", "parameters"),
        ("P(**{'rel': 2})@5", "parameters"),
        ("nDCG@" + "-" * 5000 + "1", "parameters"),
    ],
)
def test_an_unknown_measure_is_an_error(name, message):
    with pytest.raises(UsageError) as caught:
        measure([], {}, ["RR", name])
    assert repr(name) in str(caught.value)
    assert message in str(caught.value)


def test_the_depth_is_the_largest_cutoff_and_at_least_100():
    assert depth_of(["nDCG@10", "RR"]) == 100
    assert depth_of(["nDCG@10", "R@1000"]) == 1000


def test_comparison_of_two_rankings_equals_scipy():
    random = np.random.default_rng(4)
    first = random.random(30)
    second = np.clip(first + random.normal(0.05, 0.15, 30), 0, 1)
    values = [{"RR": {f"q{place}": float(value) for place, value in enumerate(one)}} for one in (first, second)]
    [found] = compare(*values)
    assert found.queries == 30
    assert found.difference == pytest.approx(first.mean() - second.mean())
    assert found.t_test == pytest.approx(ttest_rel(first, second).pvalue)
    expected = permutation_test(
        (first, second), lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples",
        vectorized=True, n_resamples=9_999, rng=1,
    )  # fmt: skip
    # Both draw 9,999 permutations, so their standard deviation sqrt(p (1 - p) / 9,999) is at most 0.005.
    assert found.randomisation == pytest.approx(expected.pvalue, abs=0.02)
    assert compare(*values) == [found]


def test_equal_rankings_have_no_difference():
    values = {"RR": {"a": 0.5, "b": 1.0}, "AP": {"a": 0.0, "b": 0.0}}
    assert [(one.difference, one.t_test, one.randomisation) for one in compare(values, values)] == [(0.0, 1.0, 1.0)] * 2


@pytest.mark.parametrize("library", ["ir_measures", "scipy.stats"])
def test_a_missing_extra_is_named(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=r"sparse-ingest\[evaluate\]"):
        if library == "ir_measures":
            measure([], {}, ["RR"])
        else:
            compare({"RR": {"a": 1.0}}, {"RR": {"a": 1.0}})
