"""Limits of a query: messages for what exceeds them, and clause counts compared with a real server."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from sparse_ingest.cluster.client import Client, ResponseError
from sparse_ingest.cluster.dialects import MAX_CLAUSES
from sparse_ingest.cluster.engines import engine_body
from sparse_ingest.cluster.hybrid_bodies import hybrid_body
from sparse_ingest.cluster.limits import check_clauses, check_seismic, count_clauses, fit_weights
from sparse_ingest.cluster.search_bodies import Engine, neural_sparse_body
from sparse_ingest.errors import PipelineError, UsageError


def test_weights_up_to_64_stay_as_they_are() -> None:
    assert fit_weights({"a": 64.0, "b": 0.1}) == ({"a": 64.0, "b": 0.1}, 1.0)


def test_weights_above_64_are_scaled_by_one_power_of_two() -> None:
    assert fit_weights({"a": 300.0, "b": 1.0}) == ({"a": 37.5, "b": 0.125}, 8.0)
    assert fit_weights({"a": 65.0}).scale == 2.0
    assert fit_weights({"a": 100.0, "b": 2.0**-149}).weights == {"a": 50.0, "b": 2.0**-149}
    with warnings.catch_warnings(action="error"):
        assert fit_weights({"a": 3.4028235e38, "b": np.float16(1.5)}).scale == 2.0**122


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_not_a_positive_number_is_refused_with_its_token(weight: float) -> None:
    with pytest.raises(UsageError, match='"bad"'):
        fit_weights({"good": 1.0, "bad": weight})


TERM = {"term": {"tag": "a"}}
FILTERS: dict[str, tuple[dict[str, Any], int]] = {
    "one term": (TERM, 1),
    "many terms at once": ({"terms": {"tag": ["a", "b", "c"]}}, 1),
    "a range": ({"range": {"tag": {"gte": "a"}}}, 1),
    "words": ({"match": {"text": "red fox dog"}}, 3),
    "words of two fields": ({"multi_match": {"query": "red fox fox", "fields": ["text", "title"]}}, 4),
    "a bool": ({"bool": {"should": [TERM, {"term": {"tag": "b"}}], "must_not": TERM}}, 3),
    "a constant score": ({"constant_score": {"filter": TERM}}, 1),
    "nothing": ({"match_none": {}}, 0),
}


@pytest.mark.parametrize("name", FILTERS)
def test_clauses_are_counted_over_the_complete_query(name: str) -> None:
    query, clauses = FILTERS[name]
    assert count_clauses(query) == clauses
    body = neural_sparse_body({"a": 1.0, "b": 1.0}, field="sparse", size=1, filter=query)
    assert count_clauses(body["query"]) == 2 + clauses
    assert count_clauses(hybrid_body("red fox", {"a": 1.0}, Engine(), size=1)["query"]) == 1 + 4
    inside = {"neural_sparse": {"f": {"query_tokens": {"1": 1.0}, "method_parameters": {"k": 1, "filter": query}}}}
    assert count_clauses(inside) == 1


@pytest.mark.parametrize(
    "malformed",
    [
        {"bool": "x"},
        {"bool": {"must": ["x"]}},
        {"match": "x"},
        {"dis_max": {}},
        {"neural_sparse": {"f": 1}},
        {"terms": 1},
    ],
)
def test_a_malformed_filter_is_sent_and_the_server_refuses_it(
    client: Client, index_name: str, malformed: dict[str, Any]
) -> None:
    assert count_clauses(malformed) == 1
    client.call("PUT", f"/{index_name}", {"mappings": {"properties": {"sparse": {"type": "rank_features"}}}})
    for engine in (Engine(), Engine("seismic", kind="sparse_vector")):
        body = engine_body({"1": 1.0}, engine, size=1, filter=malformed)
        with pytest.raises(ResponseError, match="answered 400"):
            client.call("POST", f"/{index_name}/_search", body)


def test_the_message_counts_other_clauses_and_gives_the_setting_to_change() -> None:
    query = {"bool": {"should": [{"neural_sparse": {"f": {"query_tokens": {"a": 1, "b": 2}}}}], "filter": [TERM]}}
    check_clauses(2, count_clauses(query) - 2, max_clauses=3)
    with pytest.raises(UsageError, match=r"2 tokens and 1 other clauses.*2 clauses.*query\.top_k=1"):
        check_clauses(2, count_clauses(query) - 2, max_clauses=2)
    with pytest.raises(UsageError, match="Shorten the filter .*or the text"):  # fewer tokens would not help
        check_clauses(2, 3, max_clauses=3)


def test_the_server_accepts_our_maximum_of_clauses_and_at_most_two_more(client: Client, index_name: str) -> None:
    """The server's limit is one or two clauses above ours: Lucene flattens the query before it counts."""
    properties = {"sparse": {"type": "rank_features"}, "tag": {"type": "keyword"}}
    properties |= {"title": {"type": "text"}, "text": {"type": "text"}}
    settings = {"number_of_shards": 1, "number_of_replicas": 0}
    client.call("PUT", f"/{index_name}", {"settings": settings, "mappings": {"properties": properties}})
    document = {"sparse": {"a": 1.0}, "tag": "a", "title": "red fox", "text": "red fox dog"}
    client.call("PUT", f"/{index_name}/_doc/1", document, params={"refresh": "true"})

    def tokens(count: int) -> dict[str, float]:
        return {str(number): 1.0 for number in range(count)}

    def request(name: str, count: int) -> dict[str, Any]:
        if name == "hybrid":
            return hybrid_body("red fox dog", tokens(count), Engine(), size=1, max_clauses=2 * MAX_CLAUSES)
        query, _ = FILTERS[name]
        return neural_sparse_body(tokens(count), field="sparse", size=1, filter=query, max_clauses=2 * MAX_CLAUSES)

    for name in ("one term", "words", "words of two fields", "hybrid"):
        others = 6 if name == "hybrid" else FILTERS[name][1]
        client.call("POST", f"/{index_name}/_search", request(name, MAX_CLAUSES - others))
        with pytest.raises(ResponseError, match="maxClauseCount is set to"):
            client.call("POST", f"/{index_name}/_search", request(name, MAX_CLAUSES - others + 3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_n": 0}, r"seismic\.top_n = 0; expected an integer above zero"),
        ({"top_n": 2.5}, r"seismic\.top_n = 2\.5; expected an integer"),
        ({"heap_factor": -1}, r"seismic\.heap_factor = -1; expected a number above zero"),
        ({"heap_factor": "1"}, r"seismic\.heap_factor = '1'"),
        ({"k": True}, r"seismic\.k = True"),
        ({"topn": 3}, "has a key 'topn'; known are heap_factor, k, top_n"),
    ],
)
def test_invalid_seismic_settings_are_reported(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        check_seismic(settings)
    check_seismic({"k": 20, "top_n": 3, "heap_factor": 1.2})
