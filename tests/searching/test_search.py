"""Search of an index and of a run gives the same scores, bit for bit."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.indexes import assert_same_hits, bits, fill, filled, random_documents, random_queries
from support.runs import DOCUMENTS, NASTY_TOKENS, make_run

from sparse_ingest.cluster.client import Client, Connection
from sparse_ingest.cluster.hybrid_bodies import bm25_body
from sparse_ingest.cluster.reading import explained_terms, read_fields
from sparse_ingest.cluster.search_bodies import rank_feature_body
from sparse_ingest.errors import ClusterError, UsageError
from sparse_ingest.loading.load import load
from sparse_ingest.pipeline import Pipeline
from sparse_ingest.queries.weight_table import as_query_weights
from sparse_ingest.records import TermShare
from sparse_ingest.runs.run import Run
from sparse_ingest.searching.hits import Hit
from sparse_ingest.searching.index_search import search_index, search_words
from sparse_ingest.searching.run_search import search_run

pytestmark = pytest.mark.both_products


@pytest.fixture(scope="module")
def searched(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Run, str]]:
    """The documents of support.runs in a run and in an index."""
    run = make_run(tmp_path_factory.mktemp("made") / "run")
    with filled(client, run) as index:
        yield run, index


@pytest.mark.parametrize(("kind", "half"), [("float16", slice(12)), ("float32", slice(12, 24))])
def test_queries_score_the_same_in_index_and_run_bit_for_bit(
    tmp_path: Path, client: Client, cluster_url: str, index_name: str, kind: Any, half: slice
) -> None:
    run = make_run(tmp_path / "run", random_documents(300), shard_rows=64, weights=kind)
    load(run.path, index=index_name, pipeline=Pipeline(), connection=Connection(url=cluster_url))
    for number, weights in enumerate(random_queries(24)[half]):
        size = (10, 400)[number % 2]
        exact = [(hit.doc_id, hit.score) for hit in search_run(run, weights, size=size, stored=True)]
        asked = search_index(client, index_name, weights, size=size)
        assert_same_hits([(hit.doc_id, hit.score) for hit in asked], exact, size)


@pytest.mark.parametrize(
    "weight",
    [0.0, -1.0, float("nan"), 1e39, 2.0**-150, "1" * 999, None, True, np.True_, np.float16("inf"), 10**400, 10**5000],
    ids=lambda weight: type(weight).__name__,
)
def test_index_and_run_refuse_the_same_weights(client: Client, searched: tuple[Run, str], weight: Any) -> None:
    run, index = searched
    for search in (partial(search_run, run), partial(search_index, client, index)):
        with pytest.raises(UsageError, match='The query weight of "river" is .{1,101}; expected a number above zero w'):
            search({"stone": 1, "river": weight}, size=1)


@pytest.mark.parametrize("weight", [np.float16(1.5), np.int8(3), 1e-45, 1.4e-45, 2.0**-149])
def test_index_and_run_accept_every_number_that_float32_has(
    client: Client, searched: tuple[Run, str], weight: Any
) -> None:
    run, index = searched
    for search in (partial(search_run, run), partial(search_index, client, index)):
        assert search({"river": weight}, size=1)
        assert search({"stone": 100.0, "river": weight}, size=1)  # which the weights of an index are divided for


def test_a_closed_or_blocked_index_is_named_with_the_request_that_opens_it(client: Client, index_name: str) -> None:
    client.call("PUT", f"/{index_name}", {"settings": {"index.blocks.read": True}})
    with pytest.raises(ClusterError, match=f"refuses to search '{index_name}': .*PUT /{index_name}/_settings"):
        search_index(client, index_name, {"river": 1.0}, size=1)
    client.call("POST", f"/{index_name}/_close")
    with pytest.raises(ClusterError, match=f"index {index_name!r} is closed .*Open it: POST /{index_name}/_open"):
        search_index(client, index_name, {"river": 1.0}, size=1)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("allow_partial", [None, True])
def test_hits_of_an_index_without_source_have_no_fields(
    client: Client,
    index_name: str,
    tmp_path: Path,
    shards: int,
    allow_partial: bool | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    client = client if allow_partial is None else client.allowing(allow_partial)
    properties = {"sparse": client.dialect.field_entry(), "text": {"type": "text"}}
    mappings = {"dynamic": False, "_source": {"enabled": False}, "properties": properties}
    client.call("PUT", f"/{index_name}", {"settings": {"number_of_shards": shards}, "mappings": mappings})
    run = make_run(tmp_path / "run")
    load(run.path, index=index_name, connection=Connection(client.address))
    hits = search_index(client, index_name, {"river": 1.0, "lamp": 1.0}, size=9)
    assert [hit.doc_id for hit in hits] == [hit.doc_id for hit in search_run(run, {"river": 1.0, "lamp": 1.0}, size=9)]
    assert all(hit.terms and not hit.fields for hit in hits)
    assert {hit.doc_id for hit in search_words(client, index_name, "Text", size=9)} == set(DOCUMENTS)
    assert read_fields(client, index_name, "sparse", ["small", "absent"]) == {"small": {}}
    assert "incomplete" not in caplog.text


def test_the_terms_of_a_hit_are_those_of_its_vector_and_sum_to_the_score(
    tmp_path: Path, client: Client, index_name: str
) -> None:
    run = make_run(tmp_path / "run", random_documents(60))
    fill(client, index_name, run)
    for weights in random_queries(10):
        exact = {hit.doc_id: hit for hit in search_run(run, weights, size=100, stored=True)}
        for hit in search_index(client, index_name, weights, size=100):
            assert hit.terms == exact[hit.doc_id].terms
            assert bits(sum(term.contribution for term in hit.terms)) == bits(hit.score)
            assert [term.contribution for term in hit.terms] == sorted(
                (term.contribution for term in hit.terms), reverse=True
            )


@pytest.mark.opensearch_only
def test_rank_feature_queries_score_the_same_in_index_and_run_bit_for_bit(
    tmp_path: Path, client: Client, index_name: str
) -> None:
    run = make_run(tmp_path / "run", random_documents(300), weights="float32", shard_rows=400)
    fill(client, index_name, run)
    for weights in random_queries(20):
        undotted = {token: weight for token, weight in weights.items() if "." not in token}
        body = rank_feature_body(undotted, field="sparse", size=400)
        answer = client.call("POST", f"/{index_name}/_search", body)
        found = [(hit["_id"], hit["_score"]) for hit in answer["hits"]["hits"]]
        exact = [(hit.doc_id, hit.score) for hit in search_run(run, undotted, size=400, stored=True)]
        assert_same_hits(found, exact, 400)


def test_weights_above_64_give_exact_scores(client: Client, searched: tuple[Run, str]) -> None:
    run, index = searched
    weights = as_query_weights([("river", 1000.0), ("stone", 0.3), ("lamp", 70.0)])
    hits = search_index(client, index, weights, size=10)
    exact = search_run(run, weights, size=10, stored=True)
    assert [(hit.doc_id, hit.score, hit.terms) for hit in hits] == [(hit.doc_id, hit.score, hit.terms) for hit in exact]


def test_an_empty_query_finds_nothing(client: Client, searched: tuple[Run, str]) -> None:
    run, index = searched
    assert search_index(client, index, {}, size=10) == []
    assert search_run(run, {}, size=10) == []


def test_a_hit_of_an_index_has_the_documents_fields_without_the_vector(
    client: Client, searched: tuple[Run, str]
) -> None:
    hit = search_index(client, searched[1], {"lamp": 1.0}, size=1)[0]
    assert hit.fields == {"title": "Title of words", "text": "Text of words."}


def test_the_bm25_body_finds_words_of_the_text(client: Client, searched: tuple[Run, str]) -> None:
    answer = client.call("POST", f"/{searched[1]}/_search", bm25_body("small", field="sparse", size=3))
    assert [hit["_id"] for hit in answer["hits"]["hits"]] == ["small"]
    assert "sparse" not in answer["hits"]["hits"][0]["_source"]


@pytest.mark.opensearch_only
def test_a_rank_feature_query_cannot_find_a_token_with_a_dot(client: Client, searched: tuple[Run, str]) -> None:
    """Why rank_feature_body refuses such tokens: the server would ignore them in the score."""
    for token in ("a.b", ".", "b."):
        clause = {"rank_feature": {"field": f"sparse.{token}", "linear": {}, "boost": 1.0}}
        assert client.call("POST", f"/{searched[1]}/_search", {"query": clause})["hits"]["hits"] == []
        assert search_index(client, searched[1], {token: 1.0}, size=1)[0].doc_id == "nasty"


class WithoutNeuralSearch(Client):
    """A real client whose cluster does not know the neural_sparse query."""

    def call(self, method: str, path: str, body: Any = None, **named: Any) -> Any:
        if "neural_sparse" in json.dumps(body):
            body = {"query": {"not_known_here": {}}}
            with pytest.raises(ClusterError) as error:
                super().call(method, path, body, **named)
            raise ClusterError(str(error.value).replace("not_known_here", "neural_sparse"))
        return super().call(method, path, body, **named)


@pytest.mark.opensearch_only
def test_without_the_plugin_scores_are_the_same_and_lost_tokens_are_reported(
    client: Client, searched: tuple[Run, str], caplog: pytest.LogCaptureFixture
) -> None:
    index = searched[1]
    without = copy.copy(client)
    without.__class__ = WithoutNeuralSearch
    weights = {"river": 1.5, "##ing": 0.3}
    assert search_index(without, index, weights, size=5) == search_index(client, index, weights, size=5)
    assert "plugin" not in caplog.text
    hits = search_index(without, index, {**weights, "a.b": 9.0}, size=5)
    assert hits == search_index(client, index, weights, size=5)
    assert "'a.b'" in caplog.text


def test_a_run_is_searched_with_full_weights_unless_index_weights_are_requested(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"a": {"river": 1.2345, "stone": 0.5}}, weights="float32")
    [own] = search_run(run, {"river": 2.0}, size=10)
    [kept] = search_run(run, {"river": 2.0}, size=10, stored=True)
    weight = float(np.float32(1.2345))
    assert own == Hit(
        1, 2 * weight, "a", {"title": "Title of a", "text": "Text of a."}, [TermShare("river", 2.0, weight, 2 * weight)]
    )
    assert kept.score < own.score


def test_hits_of_many_shards_have_their_own_fields_and_ties_keep_source_order(tmp_path: Path) -> None:
    documents = {str(number): {"river": 1.0 + number % 2} for number in range(10)}
    run = make_run(tmp_path / "run", documents, shard_rows=3)
    hits = search_run(run, {"river": 1.0}, size=7)
    assert [hit.doc_id for hit in hits] == ["1", "3", "5", "7", "9", "0", "2"]
    assert [hit.fields["title"] for hit in hits] == [f"Title of {hit.doc_id}" for hit in hits]
    assert [hit.rank for hit in hits] == [1, 2, 3, 4, 5, 6, 7]


def test_an_unfinished_run_is_searched_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run(tmp_path / "run", complete=False)
    assert search_run(run, {"river": 1.0}, size=1)
    assert "unfinished" in caplog.text


def test_tokens_outside_the_vocabulary_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run(tmp_path / "run")
    assert search_run(run, {"zebra": 1.0, "river": 0.5}, size=1)[0].terms[0].token == "river"
    assert "'zebra'" in caplog.text


def test_every_document_is_found_by_each_of_its_tokens(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for doc_id, terms in DOCUMENTS.items():
        for token in terms:
            assert doc_id in [hit.doc_id for hit in search_run(run, {token: 1.0}, size=10)]


def test_an_explanation_shows_every_nasty_token(client: Client, searched: tuple[Run, str]) -> None:
    weights = dict.fromkeys(NASTY_TOKENS, 1.0)
    hit = next(hit for hit in search_index(client, searched[1], weights, size=5) if hit.doc_id == "nasty")
    assert {term.token for term in hit.terms} == set(NASTY_TOKENS)
    assert list(explained_terms({"description": "sum of:", "details": []}, "sparse")) == []


def test_more_tokens_than_the_cluster_allows_are_refused_before_sending(
    client: Client, searched: tuple[Run, str]
) -> None:
    index, most = searched[1], client.dialect.max_clauses(client.find)
    with pytest.raises(UsageError, match=f"query.top_k={most}"):
        search_index(client, index, {str(number): 1.0 for number in range(most + 1)}, size=1)
    assert search_index(client, index, {"river": 1.0, **{str(n): 1.0 for n in range(most - 1)}}, size=1)
