"""Every query body of every engine, sent to a real server: filters, two-phase, hybrid, batches, server-side weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
from support.indexes import assert_same_hits, bits, filled, random_documents, random_queries
from support.runs import make_run
from support.server_scores import two_phase_score, two_phase_split

from sparse_ingest.cluster.client import Client
from sparse_ingest.cluster.engines import engine_body
from sparse_ingest.cluster.hybrid_bodies import bm25_body, hybrid_body, packaged_search_pipeline
from sparse_ingest.cluster.limits import two_phase_window
from sparse_ingest.cluster.search_bodies import (
    Engine,
    msearch_bytes,
    msearch_lines,
    neural_sparse_body,
    rank_feature_body,
    server_side_body,
    two_phase_body,
)
from sparse_ingest.errors import ClusterError, PipelineError, UsageError
from sparse_ingest.pipeline import IndexSettings, Pipeline, QuerySettings
from sparse_ingest.queries.weight_table import QueryWeights
from sparse_ingest.runs.run import Run
from sparse_ingest.searching.index_search import rank_index, search_hybrid, search_index, search_words
from sparse_ingest.searching.pipelines import engine_of
from sparse_ingest.searching.run_search import search_run

SHARP = {"prune_type": "max_ratio", "prune_ratio": 0.4}
EVEN = {"term": {"tag": "even"}}


class Searched(NamedTuple):
    """The same documents in a run and in an index; `tags` by document id."""

    run: Run
    index: str  # type: ignore[assignment]
    tags: dict[str, str]


@pytest.fixture(scope="module")
def searched(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Searched]:
    documents = random_documents(120)
    tags = {doc_id: ("even", "odd")[place % 2] for place, doc_id in enumerate(documents)}
    fields = {
        doc_id: {"title": f"Title of {doc_id}", "text": " ".join(terms) + " river", "tag": tags[doc_id]}
        for doc_id, terms in documents.items()
    }
    run = make_run(tmp_path_factory.mktemp("made") / "run", documents, fields=fields, shard_rows=200)
    with filled(client, run) as index:
        yield Searched(run, index, tags)


def ask(client: Client, index: str, body: Mapping[str, Any]) -> list[tuple[str, float]]:
    answer = client.call("POST", f"/{index}/_search", body)
    return [(hit["_id"], hit["_score"]) for hit in answer["hits"]["hits"]]


def exact(searched: Searched, weights: QueryWeights, size: int = 1000) -> list[tuple[str, float]]:
    return [(hit.doc_id, hit.score) for hit in search_run(searched.run, weights, size=size, stored=True)]


def two_phases(
    searched: Searched, weights: QueryWeights, settings: Mapping[str, Any], size: int
) -> list[tuple[str, float]]:
    """Return what the two-phase processor gives for the documents of one shard."""
    heavy, light = two_phase_split(weights, settings)
    window = two_phase_window(settings, size)
    added = dict(exact(searched, light))
    rescored = [
        (doc_id, float(two_phase_score(np.float32(score), np.float32(added.get(doc_id, 0.0)))))
        for doc_id, score in exact(searched, heavy)[:window]
    ]
    return sorted(rescored, key=lambda pair: -pair[1])[:size]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prune_type": "max_ratio", "prune_ratio": 0.7, "expansion_rate": 1.0},
        {"prune_type": "top_k", "prune_ratio": 3, "expansion_rate": 1.5},
        {"prune_type": "abs_value", "prune_ratio": 0.9, "expansion_rate": 2.0},
        {"prune_type": "alpha_mass", "prune_ratio": 0.8, "expansion_rate": 2.5},
        {"prune_type": "max_ratio", "prune_ratio": 0},
    ],
)
def test_two_phase_scores_are_predicted_bit_for_bit(
    client: Client, searched: Searched, settings: dict[str, Any]
) -> None:
    asked = 0
    for weights in random_queries(12):
        if not two_phase_split(weights, settings)[0]:
            continue
        asked += 1
        found = search_index(client, searched.index, weights, size=7, engine=Engine("two-phase", two_phase=settings))
        assert_same_hits([(hit.doc_id, hit.score) for hit in found], two_phases(searched, weights, settings, 7), 7)
        for hit in found:  # both phases are explained; the sum of the two may differ in the last bit
            assert sum(term.contribution for term in hit.terms) == pytest.approx(hit.score, rel=2**-23)
    assert asked >= 8


def test_a_document_outside_the_window_keeps_the_score_of_its_first_phase(client: Client, searched: Searched) -> None:
    weights = random_queries(3)[2]
    settings = {"prune_type": "top_k", "prune_ratio": 2, "expansion_rate": 1.0}
    heavy, light = two_phase_split(weights, settings)
    body = two_phase_body(weights, field="sparse", size=5, settings=settings)
    behind = ask(client, searched.index, body | {"from": 5})
    assert behind and light
    assert_same_hits(behind, exact(searched, heavy)[5:10], 5)


def test_two_phase_search_of_weights_above_64_gives_exact_scores(client: Client, searched: Searched) -> None:
    weights = {"word1": 300.0, "word2": 90.0, "word3": 20.0}
    for settings in (SHARP, {"prune_type": "abs_value", "prune_ratio": 50.0}):
        found = search_index(client, searched.index, weights, size=20, engine=Engine("two-phase", two_phase=settings))
        assert_same_hits([(hit.doc_id, hit.score) for hit in found], two_phases(searched, weights, settings, 20), 20)


def test_a_filter_changes_no_score_of_any_engine(client: Client, searched: Searched) -> None:
    weights = random_queries(1)[0]
    undotted = {token: weight for token, weight in weights.items() if "." not in token}
    asked = {
        "exact": (neural_sparse_body(weights, field="sparse", size=500, filter=EVEN), exact(searched, weights)),
        "plain": (rank_feature_body(undotted, field="sparse", size=500, filter=EVEN), exact(searched, undotted)),
        "two-phase": (
            two_phase_body(weights, field="sparse", size=500, settings=SHARP, filter=EVEN),
            two_phases(searched, weights, SHARP, 500),
        ),
    }
    for name, (body, unfiltered) in asked.items():
        expected = [(doc_id, score) for doc_id, score in unfiltered if searched.tags[doc_id] == "even"]
        assert 0 < len(expected) < len(unfiltered), name
        assert_same_hits(ask(client, searched.index, body), expected, 500)


@pytest.mark.both_products
def test_a_filter_finds_no_document_without_a_token_of_the_query(client: Client, searched: Searched) -> None:
    """A `should` clause beside the filter would return such documents with score 0."""
    [only] = [doc_id for doc_id, _ in exact(searched, {"word7": 1.0})][:1]
    everything = {"match_all": {}}
    found = search_index(client, searched.index, {"word7": 1.0}, size=500, filter=everything)
    assert only in [hit.doc_id for hit in found]
    assert len(found) == len(exact(searched, {"word7": 1.0})) < 120
    assert search_index(client, searched.index, {}, size=500, filter=everything) == []


@pytest.mark.both_products
def test_a_body_can_be_part_of_a_larger_query(client: Client, searched: Searched) -> None:
    weights = random_queries(2)[1]
    clause = engine_body(weights, Engine(product=client.dialect.product), size=1)["query"]
    body = {"query": {"bool": {"should": [clause], "must_not": [{"term": {"tag": "odd"}}]}}, "size": 500}
    expected = [(doc_id, score) for doc_id, score in exact(searched, weights) if searched.tags[doc_id] == "even"]
    assert_same_hits([hit for hit in ask(client, searched.index, body) if hit[1] > 0], expected, 500)


@pytest.mark.both_products
def test_a_filter_changes_no_score_of_an_exact_search(client: Client, searched: Searched) -> None:
    for weights in random_queries(3):
        found = search_index(client, searched.index, weights, size=500, filter=EVEN)
        expected = [(doc_id, score) for doc_id, score in exact(searched, weights) if searched.tags[doc_id] == "even"]
        assert_same_hits([(hit.id, hit.score) for hit in found], expected, 500)


@pytest.mark.both_products
def test_hits_are_collapsed_to_the_best_of_each_value(client: Client, searched: Searched) -> None:
    weights = random_queries(1)[0]
    best: dict[str, float] = {}
    for doc_id, score in exact(searched, weights):
        best.setdefault(searched.tags[doc_id], score)
    found = search_index(client, searched.index, weights, size=500, collapse="tag")
    assert {hit.fields["tag"]: hit.score for hit in found} == best and len(found) == len(best) == 2


def min_max(scores: dict[str, float]) -> dict[str, float]:
    """Normalize as the packaged pipeline does; the server raises the worst score to 0.001."""
    low, high = min(scores.values()), max(scores.values())
    return {doc_id: max(0.001, (score - low) / (high - low)) for doc_id, score in scores.items()}


def test_hybrid_scores_are_the_mean_of_normalized_scores(client: Client, searched: Searched) -> None:
    weights, text = random_queries(5)[4], "word3 word9 title"
    words = min_max(dict(ask(client, searched.index, bm25_body(text, field="sparse", size=500))))
    sparse = min_max(dict(exact(searched, weights)))
    expected = {doc_id: (words.get(doc_id, 0) + sparse.get(doc_id, 0)) / 2 for doc_id in words.keys() | sparse.keys()}
    best = sorted(expected.values(), reverse=True)
    for size in (500, 5):
        found = ask(client, searched.index, hybrid_body(text, weights, Engine(), size=size, depth=500))
        assert dict(found) == pytest.approx({doc_id: expected[doc_id] for doc_id, _ in found}, rel=1e-5)
        assert [score for _, score in found] == pytest.approx(best[:size], rel=1e-5)
    shallow = hybrid_body(text, weights, Engine(), size=5, depth=None)
    assert "pagination_depth" not in shallow["query"]["hybrid"]
    assert [score for _, score in ask(client, searched.index, shallow)] != pytest.approx(best[:5], rel=1e-3)
    hits = search_hybrid(client, searched.index, text, weights, size=5, filter=EVEN)
    assert {searched.tags[hit.doc_id] for hit in hits} == {"even"}
    assert len(hits) == 5


def test_a_hybrid_search_may_name_an_installed_pipeline(client: Client, searched: Searched) -> None:
    name = searched.index  # random name, deleted with the index below
    client.call("PUT", f"/_search/pipeline/{name}", packaged_search_pipeline("rrf"))
    try:
        body = hybrid_body("word3", {"word3": 1.0}, Engine(), size=3, search_pipeline=name)
        assert body["search_pipeline"] == name
        # Reciprocal rank fusion: 1 / (60 + rank) for each subquery.
        assert ask(client, searched.index, body)[0][1] <= 2 / 61 + 1e-6
    finally:
        client.call("DELETE", f"/_search/pipeline/{name}")


def test_one_msearch_takes_bodies_of_every_engine(client: Client, searched: Searched) -> None:
    weights = random_queries(1)[0]
    bodies = [
        engine_body(weights, Engine(), size=5),
        engine_body(weights, Engine("two-phase", two_phase=SHARP), size=5),
        hybrid_body("word3", weights, Engine(), size=5),
        bm25_body("word3", field="sparse", size=5),
    ]
    one_by_one = [ask(client, searched.index, body) for body in bodies]
    for index, path in ((None, f"/{searched.index}/_msearch"), (searched.index, "/_msearch")):
        answer = client.call("POST", path, msearch_bytes(bodies, index))
        assert [
            [(hit["_id"], hit["_score"]) for hit in one["hits"]["hits"]] for one in answer["responses"]
        ] == one_by_one
    assert list(msearch_lines(bodies[:1], "a")) == [{"index": "a"}, bodies[0]]
    assert msearch_bytes(bodies[:1]).count(b"\n") == 2


def test_an_index_with_a_default_search_pipeline_still_gives_exact_scores(client: Client, searched: Searched) -> None:
    name = f"{searched.index}-default"
    client.call("PUT", f"/_search/pipeline/{name}", two_phase_body({}, field="sparse", size=1)["search_pipeline"])
    client.call("PUT", f"/{searched.index}/_settings", {"index.search.default_pipeline": name})
    try:
        weights = random_queries(4)[3]
        assert len(ask(client, searched.index, neural_sparse_body(weights, field="sparse", size=500))) < len(
            exact(searched, weights)
        )
        found = [(hit.doc_id, hit.score) for hit in search_index(client, searched.index, weights, size=500)]
        assert_same_hits(found, exact(searched, weights), 500)
    finally:
        client.call("PUT", f"/{searched.index}/_settings", {"index.search.default_pipeline": None})
        client.call("DELETE", f"/_search/pipeline/{name}")


def test_a_server_side_body_can_use_an_analyzer(client: Client, searched: Searched) -> None:
    """The standard analyzer gives every word a weight of 1.0."""
    body = server_side_body("word3 word9", Engine(), size=500, analyzer="standard", filter=EVEN)
    expected = [pair for pair in exact(searched, {"word3": 1.0, "word9": 1.0}) if searched.tags[pair[0]] == "even"]
    assert_same_hits(ask(client, searched.index, body), expected, 500)
    two = server_side_body("word3 word9", Engine("two-phase", two_phase=SHARP), size=500, analyzer="standard")
    assert_same_hits(ask(client, searched.index, two), exact(searched, {"word3": 1.0, "word9": 1.0}), 500)


def test_a_server_side_body_needs_exactly_one_model_or_analyzer() -> None:
    """Without any, OpenSearch 3.1 and newer use bert-uncased silently."""
    for named in ({}, {"analyzer": "a", "model_id": "b"}):
        with pytest.raises(UsageError, match="either a model_id or an analyzer"):
            server_side_body("word", Engine(), size=1, **named)
    with pytest.raises(UsageError, match="The query is empty"):
        server_side_body(" ", Engine(), size=1, analyzer="a")
    body = server_side_body("word", Engine(), size=1, model_id="b")
    assert body["query"] == {"neural_sparse": {"sparse": {"query_text": "word", "model_id": "b"}}}


def vectors(count: int) -> dict[str, dict[str, Any]]:
    """Documents of a sparse_vector field; every third has none of the query tokens."""
    return {
        f"d{number}": {
            "sparse": {"7": 1.0} if number % 3 == 0 else {"1": 1 + number / 16, "2": 0.5},
            "tag": ("even", "odd")[number % 2],
            "text": "word" if number % 2 else "other",
        }
        for number in range(count)
    }


@pytest.fixture(scope="module", params=[1, 1000], ids=["clusters", "features"])
def seismic_index(client: Client, searched: Searched, request: pytest.FixtureRequest) -> Iterator[str]:
    name = f"{searched.index}-seismic-{request.param}"
    method = {"name": "seismic", "parameters": {"approximate_threshold": request.param}}
    properties = {"sparse": {"type": "sparse_vector", "method": method}, "tag": {"type": "keyword"}}
    properties |= {"title": {"type": "text"}, "text": {"type": "text"}}
    settings = {"index": {"sparse": True, "number_of_replicas": 0}}
    client.call("PUT", f"/{name}", {"settings": settings, "mappings": {"dynamic": False, "properties": properties}})
    lines = "".join(
        f"{json.dumps({'index': {'_id': doc_id}})}\n{json.dumps(source)}\n" for doc_id, source in vectors(30).items()
    )
    client.call("POST", f"/{name}/_bulk", lines.encode(), params={"refresh": "true"})
    yield name
    client.call("DELETE", f"/{name}")


def test_filtered_seismic_search_returns_matching_documents_only(client: Client, seismic_index: str) -> None:
    """The server alone would add documents that match the filter and no token, with score 0."""
    engine = Engine("seismic", kind="sparse_vector", seismic={"top_n": 5, "heap_factor": 2.0, "k": 2})
    body = engine_body({"1": 1.0, "2": 2.0}, engine, size=30, filter=EVEN)
    expected = {doc_id for doc_id, one in vectors(30).items() if one["tag"] == "even" and "1" in one["sparse"]}
    assert {doc_id for doc_id, _ in ask(client, seismic_index, body)} == expected
    [clause] = body["query"]["bool"]["should"]
    parameters = clause["neural_sparse"]["sparse"]["method_parameters"]
    assert parameters == {"k": 30, "top_n": 5, "heap_factor": 2.0, "filter": EVEN}
    unbounded = {key: value for key, value in body.items() if key != "min_score"}
    assert min(score for _, score in ask(client, seismic_index, unbounded)) == 0


def test_seismic_search_accepts_terms_and_bool_filters(client: Client, seismic_index: str) -> None:
    """The server fails on such filters, so `terms` is rewritten as one `term` per value."""
    engine = Engine("seismic", kind="sparse_vector")
    asked = {"1": 1.0, "2": 2.0}
    expected = ask(client, seismic_index, engine_body(asked, engine, size=30, filter=EVEN))
    terms = {"terms": {"tag": ["even", "nowhere"]}}
    for filter in (terms, {"bool": {"filter": [terms], "must_not": {"terms": {"tag": ["odd"]}}}}):
        assert ask(client, seismic_index, engine_body(asked, engine, size=30, filter=filter)) == expected != []
    assert ask(client, seismic_index, engine_body(asked, engine, size=30, filter={"terms": {"tag": []}})) == []


def test_seismic_search_with_a_filter_without_matches_finds_nothing(client: Client, seismic_index: str) -> None:
    """A filter inside the clause only is ignored in a segment where it matches nothing."""
    engine, asked, nothing = Engine("seismic", kind="sparse_vector"), {"1": 1.0, "2": 2.0}, {"match_none": {}}
    body = engine_body(asked, engine, size=30, filter=nothing)
    assert ask(client, seismic_index, body) == []
    assert ask(client, seismic_index, server_side_body("1", engine, size=30, analyzer="standard", filter=nothing)) == []
    assert ask(client, seismic_index, hybrid_body("word", asked, engine, size=30, filter=nothing)) == []
    [inside] = body["query"]["bool"]["should"]
    leaked = ask(client, seismic_index, {"query": inside, "size": 30})
    assert len(leaked) == (20 if seismic_index.endswith("-1") else 0)


def test_hits_of_filtered_seismic_search_are_explained(client: Client, seismic_index: str) -> None:
    engine = Engine("seismic", kind="sparse_vector", keys={"one": "1", "two": "2"})
    hits = search_index(client, seismic_index, {"one": 1.0, "two": 2.0}, size=30, engine=engine, filter=EVEN)
    assert len(hits) == 10
    for hit in hits:
        assert {term.token for term in hit.terms} == {"one", "two"}
        assert sum(term.contribution for term in hit.terms) == pytest.approx(hit.score, rel=1e-6)


def test_a_filter_that_seismic_search_does_not_support_gives_one_message(client: Client, seismic_index: str) -> None:
    engine = Engine("seismic", kind="sparse_vector")
    with pytest.raises(ClusterError, match=r"does not work on the sparse_vector field .*3\.6 fails on ids, prefix"):
        search_index(client, seismic_index, {"1": 1.0}, size=5, engine=engine, filter={"prefix": {"tag": "ev"}})


def test_seismic_works_with_hybrid_and_server_side_weights(client: Client, seismic_index: str) -> None:
    engine = Engine("seismic", kind="sparse_vector", keys={"one": "1"})
    found = search_hybrid(client, seismic_index, "word", {"one": 1.0}, size=30, engine=engine)
    with_token = {doc_id for doc_id, one in vectors(30).items() if "1" in one["sparse"]}
    assert {hit.doc_id for hit in found} == with_token | {doc_id for doc_id in vectors(30) if int(doc_id[1:]) % 2}
    # The standard analyzer keeps the ids as they are.
    body = server_side_body("1 2", engine, size=30, analyzer="standard", filter=EVEN)
    asked = engine_body({"1": 1.0, "2": 1.0}, engine, size=30, filter=EVEN)
    assert ask(client, seismic_index, body) == ask(client, seismic_index, asked) != []


def test_a_query_weight_that_seismic_clips_is_reported_once(
    client: Client, seismic_index: str, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = Pipeline(index=IndexSettings(kind="sparse_vector"))
    engine = replace(engine_of(pipeline, client, seismic_index), keys={"one": "1"})
    assert engine.ceiling == 16.0
    queries = [("a", {"one": 16.0}), ("b", {"one": 17.5}), ("c", {"one": 40.0})]
    ranked = list(rank_index(client, seismic_index, queries, engine, size=1))
    if seismic_index.endswith("-1"):
        assert ranked[0].scores == ranked[1].scores == ranked[2].scores
    else:  # segments without clusters do not clip
        assert ranked[0].scores < ranked[1].scores < ranked[2].scores
    [message] = [text for text in caplog.messages if "quantization_ceiling_search" in text]
    assert "17.5 is clipped to 16" in message


def test_two_phases_on_a_sparse_vector_field_are_refused(client: Client, seismic_index: str) -> None:
    with pytest.raises(ClusterError, match="Two-phase search needs a rank_features field"):
        search_index(client, seismic_index, {"1": 1.0}, size=5, engine=Engine("two-phase"))


def test_an_engine_that_the_field_lacks_is_refused_by_name() -> None:
    for engine, kind, others in (
        ("seismic", "rank_features", "exact and two-phase can"),
        ("exact", "sparse_vector", "seismic can"),
        ("two-phase", "sparse_vector", "seismic can"),
    ):
        pipeline = Pipeline(index=IndexSettings(kind=kind), query=QuerySettings(engine=engine))
        with pytest.raises(PipelineError, match=f"engine {engine} cannot search a {kind} field; {others}"):
            engine_of(pipeline)
    assert engine_of(Pipeline()).name == "exact"
    assert engine_of(Pipeline(index=IndexSettings(kind="sparse_vector"))).name == "seismic"


def test_unknown_settings_of_an_engine_are_reported() -> None:
    with pytest.raises(PipelineError, match="two_phase has a key 'ratio'; known are expansion_rate, max_window_size"):
        engine_of(Pipeline(query=QuerySettings(two_phase={"ratio": 1})))
    with pytest.raises(PipelineError, match="seismic has a key 'cut'; known are heap_factor, k, top_n"):
        engine_of(Pipeline(query=QuerySettings(seismic={"cut": 1})))


def test_settings_without_effect_on_an_engine_are_refused() -> None:
    with pytest.raises(UsageError, match="cannot collapse"):
        engine_body({"a": 1.0}, Engine("two-phase"), size=1, collapse="parent")
    with pytest.raises(UsageError, match="has no effect in a hybrid query"):
        hybrid_body("a", {"a": 1.0}, Engine("two-phase"), size=1)
    with pytest.raises(UsageError, match="leaves no token of the query to the first phase"):
        two_phase_body({"a": 1.0}, field="f", size=1, settings={"prune_type": "alpha_mass", "prune_ratio": 0.5})


@pytest.mark.both_products
def test_the_server_also_refuses_the_wrong_field_type(client: Client, searched: Searched) -> None:
    with pytest.raises(ClusterError, match=rf"of index '{searched.index}' is not a sparse field.*index\.field"):
        search_index(client, searched.index, {"word1": 1.0}, size=1, engine=Engine(field="title"))


@pytest.mark.both_products
def test_more_hits_than_max_result_window_give_one_message(client: Client, searched: Searched) -> None:
    with pytest.raises(ClusterError, match=r"requested number of hits is above index.max_result_window.*-k"):
        search_words(client, searched.index, "word1", size=10_001)
    assert bits(exact(searched, {"word1": 1.0})[0][1]) == bits(
        search_index(client, searched.index, {"word1": 1.0}, size=1)[0].score
    )
