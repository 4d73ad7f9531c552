"""Elasticsearch: exact scores beside the pruning of its default query, the same run on both products, refusals."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support.faulty_proxy import faulty_proxy
from support.indexes import random_documents, random_queries
from support.runs import make_run
from support.secure_proxy import secure_proxy

from sparse_ingest.cluster.client import Client, Connection, connect
from sparse_ingest.cluster.diagnosis import check_cluster
from sparse_ingest.cluster.dialects import ElasticsearchDialect
from sparse_ingest.cluster.index_admin import create_index, show_index
from sparse_ingest.cluster.index_list import list_indexes
from sparse_ingest.cluster.search_bodies import Engine
from sparse_ingest.errors import ClusterError, PipelineError, UsageError
from sparse_ingest.loading.load import load
from sparse_ingest.pipeline import IndexSettings, Pipeline, QuerySettings
from sparse_ingest.runs.run import Run
from sparse_ingest.searching.empty import why_empty_index
from sparse_ingest.searching.explaining import explain_in_index
from sparse_ingest.searching.index_search import rank_index, search_hybrid, search_index
from sparse_ingest.searching.run_search import search_run
from sparse_ingest.verification.verify import verify

pytestmark = pytest.mark.elasticsearch_only

TOKEN = "a.common token"  # with a dot, which OpenSearch's rank_feature query and Elasticsearch 8.15 refuse
DOCUMENTS = {f"d{number}": {TOKEN: 1.0, f"rare{number}": 2.0} for number in range(60)}
QUERY = {TOKEN: 0.25, "rare1": 1.0}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    vocabulary = [TOKEN, *(f"rare{number}" for number in range(60))]
    return make_run(tmp_path / "run", DOCUMENTS, vocabulary=vocabulary)


def hits(client: Client, index: str, clause: dict[str, Any]) -> set[str]:
    body = {"query": clause, "size": 100}
    return {hit["_id"] for hit in client.call("POST", f"/{index}/_search", body)["hits"]["hits"]}


def test_the_product_is_detected_by_its_header_and_without_it_by_its_nodes(client: Client) -> None:
    assert client.dialect.product == "elasticsearch" and client.version >= ElasticsearchDialect.oldest
    with faulty_proxy(client.address) as proxy, closing(connect(Connection(proxy.url))) as without_header:
        assert (without_header.dialect.product, without_header.version) == ("elasticsearch", client.version)
        assert without_header.cluster_uuid == client.cluster_uuid != "unknown"


def test_the_default_query_loses_hits_unless_the_mapping_or_the_query_prevents_it(
    client: Client, index_name: str, run: Run
) -> None:
    load(run, index=index_name, url=client.address)
    plain = f"{index_name}-plain"
    client.call("PUT", f"/{plain}", {"mappings": {"properties": {"sparse": {"type": "sparse_vector"}}}})
    lines = [json.dumps(line) for doc_id, weights in DOCUMENTS.items()
             for line in ({"index": {"_id": doc_id}}, {"sparse": weights})]  # fmt: skip
    client.call("POST", f"/{plain}/_bulk", "".join(f"{line}\n" for line in lines).encode(), params={"refresh": "true"})
    default = {"sparse_vector": {"field": "sparse", "query_vector": QUERY}}
    ours = client.dialect.tokens_clause("sparse", QUERY)
    assert hits(client, plain, default) == {"d1"}
    assert (
        hits(client, plain, ours) == hits(client, index_name, default) == hits(client, index_name, ours) == {*DOCUMENTS}
    )
    pruned = Engine("pruned")
    [ranked] = rank_index(client, index_name, [("q", QUERY)], pruned, size=100)
    assert ranked.doc_ids == ["d1"]
    missed = explain_in_index(client, index_name, QUERY, "d2", size=100, engine=pruned)
    assert (missed.reason, [term.token for term in missed.terms]) == ("missed", [TOKEN])
    light = {TOKEN: 0.25, "unknown": 1.0}
    assert search_index(client, index_name, light, size=1, engine=pruned) == []
    assert why_empty_index(client, index_name, light, pruned, "", None) == [
        "Pruned search finds no document by frequent tokens with a low weight in the query; --engine exact finds some."
    ]


def test_one_run_has_the_same_scores_on_both_products_and_in_its_folder(
    client: Client, index_name: str, opensearch_url: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", random_documents(80), shard_rows=30)
    queries = [(f"q{number}", weights) for number, weights in enumerate(random_queries(20))]
    scores = []
    for url in (client.address, opensearch_url):
        assert load(run, index=index_name, url=url).acknowledged == 80
        assert verify(run, index=index_name, url=url, sample=None).ok
        with closing(connect(Connection(url))) as one:
            ranked = rank_index(one, index_name, queries, Engine(), size=80)
            scores.append([dict(zip(each.doc_ids, each.scores, strict=True)) for each in ranked])
            if url == opensearch_url:
                one.call("DELETE", f"/{index_name}")
    exact = [
        {hit.doc_id: hit.score for hit in search_run(run, weights, size=80, stored=True)} for _, weights in queries
    ]
    assert scores[0] == scores[1] == exact


@pytest.mark.parametrize("source", ["exclude", "keep"])
def test_a_partial_update_keeps_a_vector_unless_source_excludes_it(
    client: Client, index_name: str, run: Run, source: Any
) -> None:
    load(run, index=index_name, url=client.address, pipeline=Pipeline(index=IndexSettings(source=source)))
    change = {"doc": {"title": "changed"}}
    client.call("POST", f"/{index_name}/_update/d1", change, params={"refresh": "true"})
    assert ("d1" in hits(client, index_name, client.dialect.tokens_clause("sparse", QUERY))) == (source == "keep")
    assert show_index(index_name, url=client.address).kind == "rank_features"
    assert [one.kind for one in list_indexes(index_name, url=client.address)] == ["rank_features"]


def test_what_elasticsearch_lacks_is_refused_with_one_message(client: Client, index_name: str, run: Run) -> None:
    with pytest.raises(ClusterError, match="The cluster is Elasticsearch, which has no SEISMIC"):
        load(run, index=index_name, url=client.address, kind="sparse_vector")
    with pytest.raises(PipelineError, match="Elasticsearch has no engine two-phase; it has exact and pruned"):
        load(run, index=index_name, url=client.address, pipeline=Pipeline(query=QuerySettings(engine="two-phase")))
    with pytest.raises(UsageError, match="Elasticsearch has no search pipelines"):
        create_index(index_name, url=client.address, search=("two-phase",))
    assert client.find(f"/{index_name}") is None
    rights = [check for check in check_cluster(Connection(client.address), index_name) if check.name == "rights"]
    assert [(check.found, check.advice) for check in rights] == [
        ("not checked on Elasticsearch", "See the Elasticsearch guide for the privileges.")
    ]
    with pytest.raises(UsageError, match="need a paid license. Omit --hybrid"):
        search_hybrid(client, index_name, "river", QUERY, size=5)


def test_the_refusal_of_a_filter_names_its_cause_in_one_line(client: Client, index_name: str, run: Run) -> None:
    load(run, index=index_name, url=client.address)
    of_opensearch = {"neural_sparse": {"sparse": {"query_tokens": QUERY}}}
    with pytest.raises(ClusterError, match=r"unknown query \[neural_sparse\]"):
        search_index(client, index_name, QUERY, size=5, filter=of_opensearch)
    # The parser of the server quotes the request in a second line.
    with pytest.raises(ClusterError, match="Infinity.*$") as caught:
        search_index(client, index_name, QUERY, size=5, filter={"boosting": {"negative_boost": float("inf")}})
    assert "\n" not in str(caught.value)


def test_an_index_body_of_the_other_product_is_refused(
    client: Client, index_name: str, run: Run, tmp_path: Path
) -> None:
    body = tmp_path / "body.json"
    body.write_text(json.dumps({"mappings": {"properties": {"sparse": {"type": "rank_features"}}}}))
    with pytest.raises(PipelineError, match="on Elasticsearch it must be sparse_vector"):
        load(run, index=index_name, url=client.address, pipeline=Pipeline(index=IndexSettings(body=str(body))))


def test_an_api_key_is_sent_and_never_printed(client: Client) -> None:
    seen: list[str] = []

    def check(request: Any) -> None:
        seen.append(request.headers.get("authorization", ""))

    with secure_proxy(client.address, check=check) as proxy:
        connection = Connection(proxy.url, api_key="c2VjcmV0")
        assert "c2VjcmV0" not in repr(connection)
        with closing(connect(connection)) as one:
            assert one.dialect.product == "elasticsearch"
    assert set(seen) == {"ApiKey c2VjcmV0"}
    with pytest.raises(UsageError, match="--api-key and user 'me' cannot be combined"):
        connect(Connection(client.address, api_key="c2VjcmV0", user="me", password="p"))


def test_an_index_of_a_release_without_the_field_is_refused(client: Client, index_name: str, run: Run) -> None:
    """The server does not create such an index, so a proxy changes the version in its answers."""
    client.call("PUT", f"/{index_name}", {"mappings": {"properties": {"title": {"type": "text"}}}})
    [entry] = client.call("GET", f"/{index_name}").values()
    entry["settings"]["index"]["version"]["created"] = "8100099"

    def old(request: Any) -> tuple[int, Any] | None:
        return (200, {index_name: entry}) if request.path.partition("?")[0] == f"/{index_name}" else None

    with secure_proxy(client.address, check=old) as proxy:
        with pytest.raises(ClusterError, match="was created by Elasticsearch 8.0 to 8.10 and cannot have"):
            load(run, index=index_name, url=proxy.url, update=True)
    assert load(run, index=index_name, url=client.address, update=True).refused == len(DOCUMENTS)
