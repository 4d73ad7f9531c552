"""Hybrid search against a combination that the test computes from its two searches; collapse; both scores; refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from support.indexes import filled, random_documents, random_queries
from support.runs import make_run

from sparse_ingest.cluster.client import Client, Connection, connect
from sparse_ingest.cluster.dialects import OpenSearchDialect
from sparse_ingest.cluster.hybrid_bodies import bm25_body
from sparse_ingest.cluster.limits import check_hybrid
from sparse_ingest.cluster.search_bodies import Engine
from sparse_ingest.errors import ClusterError, PipelineError, UsageError
from sparse_ingest.pipeline import HybridSettings, QuerySettings
from sparse_ingest.searching.index_search import rank_index, search_hybrid, search_index
from sparse_ingest.searching.pipelines import hybrid_settings

Scores = dict[str, float]
TEXT, SIZE = "word3 word9 title", 200  # more than all documents
WEIGHTS = random_queries(5)[4]


@pytest.fixture(scope="module")
def client(opensearch_url: str) -> Client:
    return connect(Connection(url=opensearch_url))


@pytest.fixture(scope="module")
def index(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    documents = random_documents(120)
    fields = {
        doc_id: {"title": f"Title of {doc_id}", "text": " ".join(terms) + " river", "tag": f"tag{place % 7}"}
        for place, (doc_id, terms) in enumerate(documents.items())
    }
    run = make_run(tmp_path_factory.mktemp("made") / "run", documents, fields=fields, shard_rows=200)
    with filled(client, run, shards=2) as index:
        yield index


@pytest.fixture(scope="module")
def legs(client: Client, index: str) -> tuple[Scores, Scores]:
    """The scores of the two searches, each sent alone."""
    answer = client.call("POST", f"/{index}/_search", bm25_body(TEXT, field="sparse", size=SIZE))
    sparse = search_index(client, index, WEIGHTS, size=SIZE)
    return {hit["_id"]: hit["_score"] for hit in answer["hits"]["hits"]}, {hit.id: hit.score for hit in sparse}


def engine(**settings: Any) -> Engine:
    return Engine(hybrid=HybridSettings(hybrid=True, **settings))


def min_max(leg: Scores) -> Scores:
    low, high = min(leg.values()), max(leg.values())
    return {doc_id: (score - low) / (high - low) or 0.001 for doc_id, score in leg.items()}


def l2(leg: Scores) -> Scores:
    return {doc_id: score / float(np.linalg.norm(list(leg.values()))) for doc_id, score in leg.items()}


def z_score(leg: Scores) -> Scores:
    mean, spread = np.mean(list(leg.values())), np.std(list(leg.values()), ddof=1)
    found = {doc_id: float((score - mean) / spread) for doc_id, score in leg.items()}
    return {doc_id: score if score > 0 else 0.001 for doc_id, score in found.items()}


def arithmetic(scores: list[float], weights: list[float]) -> float:
    return sum(score * weight for score, weight in zip(scores, weights, strict=True)) / sum(weights)


def geometric(scores: list[float], weights: list[float]) -> float:
    """Return the geometric mean over the searches that found the document."""
    found = [(score, weight) for score, weight in zip(scores, weights, strict=True) if score]
    return float(np.exp(sum(weight * np.log(score) for score, weight in found) / sum(weight for _, weight in found)))


def harmonic(scores: list[float], weights: list[float]) -> float:
    found = [(score, weight) for score, weight in zip(scores, weights, strict=True) if score]
    return sum(weight for _, weight in found) / sum(weight / score for score, weight in found)


@pytest.mark.parametrize(
    ("settings", "normalize", "combine"),
    [
        ({}, min_max, arithmetic),
        ({"hybrid_weights": (0.3, 0.7), "hybrid_combination": "geometric_mean"}, min_max, geometric),
        ({"hybrid_normalization": "l2", "hybrid_combination": "harmonic_mean"}, l2, harmonic),
        ({"hybrid_normalization": "z_score", "hybrid_weights": (0.8, 0.2)}, z_score, arithmetic),
    ],
    ids=["default", "geometric", "l2 harmonic", "z_score"],
)
def test_scores_are_the_combination_of_two_single_searches(
    client: Client,
    index: str,
    legs: tuple[Scores, Scores],
    settings: Mapping[str, Any],
    normalize: Callable[[Scores], Scores],
    combine: Callable[[list[float], list[float]], float],
) -> None:
    words, sparse = map(normalize, legs)
    weights = list(settings.get("hybrid_weights", (0.5, 0.5)))
    expected = {
        doc_id: combine([words.get(doc_id, 0.0), sparse.get(doc_id, 0.0)], weights)
        for doc_id in words.keys() | sparse.keys()
    }
    [ranked] = rank_index(client, index, [("q", WEIGHTS)], engine(**settings), texts=[TEXT], size=SIZE)
    found = dict(zip(ranked.doc_ids, ranked.scores, strict=True))
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert len(found) > 60
    assert ranked.scores == sorted(ranked.scores, reverse=True)


def test_ranks_are_fused_with_weights(client: Client, index: str, legs: tuple[Scores, Scores]) -> None:
    settings = engine(hybrid_combination="rrf", hybrid_weights=(0.25, 0.75))
    [ranked] = rank_index(client, index, [("q", WEIGHTS)], settings, texts=[TEXT], size=5)
    best = max(legs[1], key=legs[1].__getitem__)  # no tie there
    found = dict(zip(ranked.doc_ids, ranked.scores, strict=True))
    rank = 1 + sum(score > legs[0][best] for score in legs[0].values()) if best in legs[0] else None
    ties = sum(score == legs[0][best] for score in legs[0].values()) if rank else 1
    possible = [0.75 / 61 + (0.25 / (60 + rank + tie) if rank else 0) for tie in range(ties)]
    assert min(abs(found[best] - score) for score in possible) < 1e-7


def test_each_hit_has_both_scores_and_the_terms_of_the_sparse_one(
    client: Client, index: str, legs: tuple[Scores, Scores]
) -> None:
    scaled = {token: 100 * weight for token, weight in WEIGHTS.items()}  # above 64: divided, and multiplied again
    for weights, factor in ((WEIGHTS, 1), (scaled, 100)):
        hits = search_hybrid(client, index, TEXT, weights, size=SIZE)
        assert len(hits) == len(legs[0].keys() | legs[1].keys())
        for hit in hits:
            parts = {name: leg[hit.id] * by for name, leg, by in zip(("bm25", "sparse"), legs, (1, factor), strict=True)
                     if hit.id in leg}  # fmt: skip
            assert hit.sub_scores == pytest.approx(parts, rel=1e-6)
            assert sum(term.contribution for term in hit.terms) == pytest.approx(parts.get("sparse", 0), rel=1e-6)


def test_a_collapsed_search_keeps_the_best_of_each_value(client: Client, index: str) -> None:
    every = search_hybrid(client, index, TEXT, WEIGHTS, size=SIZE, filter={"exists": {"field": "tag"}})
    best: dict[str, float] = {}
    for hit in every:
        best.setdefault(hit.fields["tag"], hit.score)
    collapsed = search_hybrid(client, index, TEXT, WEIGHTS, size=10, collapse="tag")
    assert {hit.fields["tag"]: hit.score for hit in collapsed} == pytest.approx(best, rel=1e-6)
    assert len(collapsed) == len(best) == 7 and all(hit.sub_scores for hit in collapsed)
    [ranked] = rank_index(client, index, [("q", WEIGHTS)], engine(), texts=[TEXT], size=10, collapse="tag")
    assert ranked.doc_ids == [hit.fields["tag"] for hit in collapsed]
    with pytest.raises(UsageError, match="does not map the field 'nowhere' of collapse"):
        search_hybrid(client, index, TEXT, WEIGHTS, size=10, collapse="nowhere")


class OldServer(Client):
    """As much of a client as is used before a request is sent."""

    def __init__(self) -> None:
        self.address, self.dialect = "http://old", OpenSearchDialect((3, 0, 0))


def test_a_server_that_would_ignore_collapse_is_refused() -> None:
    old: Any = OldServer()
    tag = {"properties": {"tag": {"type": "keyword"}}}
    with pytest.raises(
        ClusterError, match=r"http://old is OpenSearch 3\.0\.0, which does not collapse the hits of a hyb"
    ):
        search_hybrid(old, "i", TEXT, WEIGHTS, size=1, engine=Engine(mappings=tag), collapse="tag")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"hybrid_weights": (0.5, 0.5)}, "hybrid_weights has no effect without a hybrid search. Set hybrid = true"),
        (
            {"hybrid": True, "hybrid_weights": (0.5, 0.6)},
            r"hybrid_weights = \[0.5, 0.6\]; expected two numbers .* sum to 1",
        ),
        ({"hybrid": True, "hybrid_weights": (-1.0, 2.0)}, "expected two numbers from 0 to 1"),
        ({"hybrid": True, "hybrid_combination": "rrf", "hybrid_normalization": "l2"}, "omit the normalization"),
        ({"hybrid": True, "hybrid_combination": "harmonic_mean", "hybrid_normalization": "z_score"}, "arithmetic_mean"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(PipelineError, match=said):
        check_hybrid(HybridSettings(**settings))


def test_options_override_the_settings_of_the_pipeline() -> None:
    query = QuerySettings(hybrid=True, hybrid_weights=(0.3, 0.7), hybrid_normalization="l2")
    assert hybrid_settings(query, HybridSettings()) == HybridSettings(
        hybrid=True, hybrid_weights=(0.3, 0.7), hybrid_normalization="l2"
    )
    given = hybrid_settings(query, HybridSettings(hybrid_weights=(0.5, 0.5)))
    assert given and (given.hybrid_weights, given.hybrid_normalization) == ((0.5, 0.5), "l2")
    assert hybrid_settings(query, HybridSettings(hybrid=False)) is None
    assert hybrid_settings(QuerySettings(), HybridSettings()) is None
    with pytest.raises(UsageError, match="hybrid_weights has no effect with hybrid = false"):
        hybrid_settings(query, HybridSettings(hybrid=False, hybrid_weights=(0.5, 0.5)))
    with pytest.raises(PipelineError, match="Two-phase has no effect in a hybrid query"):
        check_hybrid(query, "two-phase")
