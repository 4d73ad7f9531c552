"""What OpenSearch does with rank_features fields: facts that the loader relies on."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.runs import NASTY_TOKENS
from support.server_scores import score

from sparse_ingest.cluster import indexes
from sparse_ingest.cluster.bulk_bodies import shortest_decimal
from sparse_ingest.cluster.client import Client
from sparse_ingest.cluster.reading import StoredReader
from sparse_ingest.cluster.scores import LOWEST_WEIGHT, stored_weights, weight_codes

MAPPINGS = {"dynamic": False, "properties": {"sparse": {"type": "rank_features"}}}


@pytest.fixture
def index(client: Client, index_name: str) -> str:
    client.call("PUT", f"/{index_name}", {"settings": {"number_of_replicas": 0}, "mappings": MAPPINGS})
    return index_name


def put(client: Client, index: str, documents: dict[str, str]) -> dict[str, dict[str, object]]:
    """Index raw JSON sources. Return the bulk items by id."""
    lines = "".join(f'{{"index":{{"_id":{json.dumps(doc_id)}}}}}\n{source}\n' for doc_id, source in documents.items())
    answer = client.call("POST", f"/{index}/_bulk", lines.encode(), params={"refresh": "true"})
    return {item["index"]["_id"]: item["index"] for item in answer["items"]}


def kept(client: Client, index: str, doc_id: str, tokens: list[str]) -> dict[str, np.float32]:
    return StoredReader(client, index, "sparse", 1024).weights({doc_id: tokens})[doc_id]


@pytest.mark.parametrize("value", ["0", "-1", "1e-40", "1.1754941e-38", "NaN", "1e400", '"many"'])
def test_a_document_with_a_weight_that_is_not_positive_and_normal_is_refused(
    client: Client, index: str, value: str
) -> None:
    items = put(client, index, {"bad": f'{{"sparse":{{"good":1,"bad":{value}}}}}', "next": '{"sparse":{"good":1}}'})
    assert items["bad"]["status"] == 400
    assert items["bad"]["error"]["type"] == "mapper_parsing_exception"  # type: ignore[index]
    assert items["next"]["status"] == 201


def test_the_lowest_weight_and_numeric_strings_are_accepted_and_null_is_dropped(client: Client, index: str) -> None:
    source = f'{{"sparse":{{"low":{LOWEST_WEIGHT:.9g},"text":"1.5","nothing":null,"high":3.4e38}}}}'
    assert put(client, index, {"a": source})["a"]["status"] == 201
    found = kept(client, index, "a", ["low", "text", "nothing", "high"])
    assert found.keys() == {"low", "text", "high"}
    assert found["low"] == np.float32(LOWEST_WEIGHT)
    assert found["text"] == 1.5


def test_a_document_with_a_duplicate_token_is_refused(client: Client, index: str) -> None:
    assert put(client, index, {"a": '{"sparse":{"x":1,"x":2}}'})["a"]["status"] == 400


def test_any_string_can_be_a_token(client: Client, index: str) -> None:
    weights = {token: 1 + place / 64 for place, token in enumerate(NASTY_TOKENS)}
    assert put(client, index, {"a": json.dumps({"sparse": weights})})["a"]["status"] == 201
    assert kept(client, index, "a", list(NASTY_TOKENS)) == {
        token: stored_weights(np.array([weight]))[0] for token, weight in weights.items()
    }


def test_a_document_with_an_empty_map_is_never_found_by_sparse_queries(client: Client, index: str) -> None:
    assert put(client, index, {"empty": '{"sparse":{}}'})["empty"]["status"] == 201
    query = {"query": {"neural_sparse": {"sparse": {"query_tokens": {"a": 1.0}}}}}
    assert client.call("POST", f"/{index}/_search", query)["hits"]["hits"] == []
    assert client.call("GET", f"/{index}/_count")["count"] == 1
    assert kept(client, index, "empty", []) == {}


def test_weights_are_truncated_to_nine_bits(client: Client, index: str) -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0x00800000, 0x7F800000, 400, dtype=np.uint32)
    # With each value also the largest one of the same 9-bit step, which rounding would raise.
    weights = np.concatenate([bits, bits | 0x7FFF]).astype(np.uint32).view(np.float32)
    tokens = [f"t{place}" for place in range(len(weights))]
    decimals = ",".join(f'"{token}":{weight!s}' for token, weight in zip(tokens, weights, strict=True))
    assert put(client, index, {"a": f'{{"sparse":{{{decimals}}}}}'})["a"]["status"] == 201
    found = kept(client, index, "a", tokens)
    np.testing.assert_array_equal(np.array([found[token] for token in tokens]), stored_weights(weights))


def test_short_decimals_are_stored_as_the_same_nine_bits(client: Client, index: str) -> None:
    codes = np.random.default_rng(1).choice(np.arange(256, 0xFF00), 900, replace=False)
    decimals = ",".join(f'"t{code}":{shortest_decimal(int(code))}' for code in codes)
    assert put(client, index, {"a": f'{{"sparse":{{{decimals}}}}}'})["a"]["status"] == 201
    found = kept(client, index, "a", [f"t{code}" for code in codes])
    np.testing.assert_array_equal(weight_codes(np.array([found[f"t{code}"] for code in codes])), codes)


def test_a_token_with_a_dot_is_found_by_neural_sparse_and_not_by_rank_feature(client: Client, index: str) -> None:
    put(client, index, {"a": '{"sparse":{"a.b":1.5}}'})
    dotted = {"query": {"rank_feature": {"field": "sparse.a.b", "linear": {}}}}
    assert client.call("POST", f"/{index}/_search", dotted)["hits"]["hits"] == []
    assert kept(client, index, "a", ["a.b"]) == {"a.b": 1.5}


@pytest.mark.parametrize("size", [3, 60])  # Lucene uses another scorer for a small size than for all hits
def test_scores_equal_the_formula_bit_for_bit(client: Client, index: str, size: int) -> None:
    """float32 products are summed in double and cast once, so the order of the terms does not matter."""
    rng = np.random.default_rng(2)
    vocabulary = [f"t{place}" for place in range(300)]
    documents = {}
    for number in range(60):
        chosen = np.sort(rng.choice(300, rng.integers(1, 250), replace=False))
        documents[f"d{number}"] = (chosen, rng.gamma(1.0, 0.7, len(chosen)).astype(np.float16).clip(1e-4))
    put(
        client,
        index,
        {
            doc_id: json.dumps({"sparse": {vocabulary[t]: float(w) for t, w in zip(*terms, strict=True)}})
            for doc_id, terms in documents.items()
        },
    )
    for query_size in (1, 2, 7, 40, 300):
        for _ in range(5):
            query_terms = rng.choice(300, query_size, replace=False)
            query_weights = rng.gamma(1.0, 1.5, query_size).astype(np.float32).clip(1e-3, 64)
            tokens = {vocabulary[t]: float(w) for t, w in zip(query_terms, query_weights, strict=True)}
            body = {"query": {"neural_sparse": {"sparse": {"query_tokens": tokens}}}, "size": size}
            hits = client.call("POST", f"/{index}/_search", body)["hits"]["hits"]
            weight_of = dict(zip(query_terms.tolist(), query_weights, strict=True))
            expected = {}
            for doc_id, (terms, weights) in documents.items():
                both = [place for place, term in enumerate(terms.tolist()) if term in weight_of]
                if both:
                    asked_weights = np.array([weight_of[terms[place]] for place in both])
                    expected[doc_id] = score(asked_weights, weights[both])
            found = [np.float32(hit["_score"]) for hit in hits]
            assert found == [expected[hit["_id"]] for hit in hits]
            assert found == sorted(expected.values(), reverse=True)[:size]


def test_a_filter_on_ids_counts_as_one_clause(client: Client, index: str) -> None:
    limit = client.dialect.max_clauses(client.find)
    put(client, index, {"a": '{"sparse":{"t0":1}}', "b": '{"sparse":{}}'})
    # The reader queries the vocabulary in groups of its maximum size; the server refuses more clauses than its limit.
    reader = StoredReader(client, index, "sparse", limit)
    vocabulary = [f"t{place}" for place in range(2 * limit)]
    sums = reader.sums(["a", "b"], vocabulary)
    assert sums["a"].tolist() == [1.0, 0.0, 0.0]
    assert sums["b"].tolist() == [0.0, 0.0, 0.0]


def test_a_bulk_request_with_require_alias_creates_no_index(client: Client, index_name: str) -> None:
    answer = client.call(
        "POST", f"/{index_name}/_bulk", b'{"index":{"_id":"a"}}\n{}\n', params={"require_alias": "true"}
    )
    assert answer["items"][0]["index"]["error"]["type"] == "index_not_found_exception"
    assert indexes.find_index(client, index_name) is None
