"""Many queries over a run give the same results as one by one, for any block size and with load pruning."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from support.runs import WORDS, make_run

from sparse_ingest.pruning import prune
from sparse_ingest.queries.weight_table import as_query_weights
from sparse_ingest.searching import run_search as runs
from sparse_ingest.searching.run_search import rank_run, search_run


@pytest.fixture
def documents() -> dict[str, dict[str, float]]:
    random = np.random.default_rng(2)
    return {
        f"doc-{number}": {
            str(word): float(random.gamma(2.0, 0.4) + 0.01)
            for word in random.choice(WORDS, random.integers(0, 9), replace=False)
        }
        for number in range(40)
    }


@pytest.fixture
def queries() -> list[tuple[str, dict[str, float]]]:
    random = np.random.default_rng(3)
    weights = [
        as_query_weights((str(word), float(random.gamma(2.0))) for word in random.choice(WORDS, count, replace=False))
        for count in (3, 1, 0, 6, 2)
    ]
    return [(f"q{number}", one) for number, one in enumerate(weights)]


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("block", [2, 100])
def test_each_query_gets_the_same_hits_as_alone(tmp_path, documents, queries, monkeypatch, block, stored):
    monkeypatch.setattr(runs, "QUERIES_AT_ONCE", block)
    run = make_run(tmp_path / "run", documents, shard_rows=16)
    found = list(rank_run(run, iter(queries), size=7, stored=stored))
    assert [one.query_id for one in found] == [query_id for query_id, _ in queries]
    for one, (_, weights) in zip(found, queries, strict=True):
        alone = search_run(run, weights, size=7, stored=stored)
        assert list(zip(one.doc_ids, one.scores, strict=True)) == [(hit.doc_id, hit.score) for hit in alone]
        assert one.took_ms is None and one.latency_s > 0


def test_search_with_pruning_matches_a_pruned_run(tmp_path, documents, queries):
    run = make_run(tmp_path / "run", documents, weights="float32")
    heaviest = {
        doc_id: dict(sorted(terms.items(), key=lambda pair: -np.float32(pair[1]))[:2])
        for doc_id, terms in documents.items()
    }
    pruned = make_run(tmp_path / "pruned", heaviest, weights="float32")
    expected = [(one.doc_ids, one.scores) for one in rank_run(pruned, queries, size=10)]
    found = rank_run(run, queries, size=10, prune=lambda rows: prune(rows, top_k=2))
    assert [(one.doc_ids, one.scores) for one in found] == expected


def test_tokens_outside_the_vocabulary_of_the_run_are_reported_once(tmp_path, documents, caplog):
    run = make_run(tmp_path / "run", documents)
    with caplog.at_level(logging.WARNING):
        found = list(rank_run(run, [("a", {"zebra": 1.0}), ("b", {"river": 1.0, "gnu": 1.0})], size=3))
    assert found[0].doc_ids == [] and found[1].doc_ids
    assert "2 tokens of the queries are not in the vocabulary of the run, such as 'zebra'" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_the_best_passage_of_each_document_is_found(tmp_path, size):
    # The first 40 passages belong to one document: 4 x 2 hits are requested first, then 32, then 128.
    passages = {f"long#{number}": {"river": 9.0 - number / 16} for number in range(40)}
    passages |= {f"b#{number}": {"river": 1.0 + number, "stone": 1.0} for number in range(3)} | {
        "a#1#0": {"river": 2.0}
    }
    run = make_run(tmp_path / "run", passages, shard_rows=7)
    queries = [("river", {"river": 1.0}), ("stone", {"stone": 1.0}), ("none", {})]
    found = {one.query_id: one for one in rank_run(run, queries, size=size, passages=True)}
    assert found["river"].doc_ids == ["long", "b", "a#1"][:size]
    assert found["river"].scores == [9.0, 3.0, 2.0][:size]
    assert (found["stone"].doc_ids, found["none"].doc_ids) == (["b"], [])
